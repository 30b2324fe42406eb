"""Rows of base that are still being made: what ingest has finished so far, and how base reads them meanwhile.

Beside the rows lies a plan (what they are made from, how many shards) and, for each shard that is done, a note of its
files. So a killed ingest makes only the other shards, and base can begin with the first ones: the first epoch visits
shards in order (see `corpus.rows`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import manifest
from cluster.storage import DamagedError, FileEntry, Storage, StorageError
from corpus.rows import POLL_SECONDS, ROWS_FILE, Index, RowFiles, Rows, read_index
from stages import held_out
from stages.context import GROWING, PROGRESS, SOURCES, STOP, Progress, StageContext, Stopped, settled

PLAN = "plan.json"
NOTES = "shards"
SPLITS = ("train", "val")

logger = logging.getLogger(__name__)


class Plan(BaseModel):
    """What the rows are made from, of which files, and in how many shards."""

    model_config = ConfigDict(extra="forbid", strict=True)

    made_from: str
    sources: str
    shards: int


Note = dict[str, Any]  # of one shard: what NoteOfShard says
Count = Annotated[int, Field(strict=True, ge=0)]


class Statistics(BaseModel):
    """What was counted in a shard, and how many of its documents have a length of so many bits."""

    model_config = ConfigDict(extra="forbid")

    counts: dict[str, Count]
    rejected: dict[str, Count]
    lengths: dict[int, Count]


class NoteOfShard(BaseModel):
    """What ingest keeps of a shard that is done."""

    model_config = ConfigDict(extra="forbid")

    files: list[FileEntry]
    index: dict[Literal["train", "val"], RowFiles]
    stats: Statistics

    @model_validator(mode="after")
    def _both_splits(self) -> NoteOfShard:
        if self.index.keys() != set(SPLITS):
            raise ValueError(f"it must have the rows of {' and '.join(SPLITS)}")
        return self


def note_path(shard: int) -> str:
    return f"{NOTES}/{shard:06d}.json"


def read_notes(ingest: Storage, known: dict[int, Note]) -> None:
    """Adds the notes that `known` lacks, by number of the shard; those that are damaged are passed over.
    FileNotFoundError when ingest ends meanwhile."""
    numbered = [re.fullmatch(r"(\d{6})\.json", name) for name in ingest.list(NOTES)]
    new = sorted({int(match[1]) for match in numbered if match} - known.keys())
    with ThreadPoolExecutor(16) as pool:
        notes = zip(new, pool.map(lambda i: _read_note(ingest, i), new), strict=True)
        known.update({i: note for i, note in notes if note is not None})


def _read_note(ingest: Storage, shard: int) -> Note | None:
    try:
        note = ingest.read_json(note_path(shard))
        NoteOfShard.model_validate(note)
        return dict(note)
    except ValidationError as error:
        fault = manifest.faults(error)
    except DamagedError as error:
        fault = str(error)
    logger.warning("the note of shard %d is damaged: %s", shard, fault)
    return None


def index_of(notes: dict[int, Note], shards: int, split: str) -> Index | None:
    """The rows of a split that are there by now, without a gap in the order of shards; None before the first."""
    until = next((i for i in range(shards) if i not in notes), shards)
    if not until:
        return None
    needed = min(held_out.SHARDS, shards) if split == "val" else shards
    first: Index = notes[0]["index"][split]
    files = [file for i in range(until) for file in notes[i]["index"][split]["files"]]
    return first | {"files": files, "complete": until >= needed}


def holder_of(part: str) -> str:
    """The stage whose artifact has the rows of "<stage>/<split>"."""
    return "ingest" if part.startswith("base/") else "conversations"


def open_rows(context: StageContext, part: str, vocab_size: int | None = None) -> Rows:
    """The rows of "<stage>/<split>" wherever ingest left them, or is leaving them; every file's hash is checked when it
    is first read, and every id where `vocab_size` is given. Raises RuntimeError once ingest has failed, StorageError
    where there are none."""
    ingest = context.upstream[holder_of(part)]
    made = manifest.read(ingest)
    digest = context.upstream_digests.get("ingest:base", "")
    if made is None and not digest.startswith(GROWING):
        raise StorageError(f"{ingest.uri} holds no complete artifact: it has no manifest. Run its stage first")
    made_from = made.fingerprint if made else digest.removeprefix(GROWING)
    root = manifest.local_root(ingest, made_from)
    entries = {entry.path: entry for entry in made.below(part)} if made else {}

    def fetch(name: str) -> Path:
        path = f"{part}/{name}"
        if path not in entries:
            raise FileNotFoundError(f"{ingest.uri} lists no {path}; make it again with --force {holder_of(part)}")
        return manifest.fetch_file(ingest, entries[path], root)

    if made is not None:
        _same_sources(context, made.stats.get("sources"))
        return Rows(root / part, fetch, vocab_size=vocab_size)
    states = _states(context, made_from, part, entries)
    return Rows(root / part, fetch, lambda: next(states), vocab_size)


def _states(context: StageContext, made_from: str, part: str, entries: dict[str, FileEntry]) -> Iterator[Index]:
    """What there is of a part's rows, looked up anew for each index, the first once there is enough to begin with.
    `entries` is kept up to them."""
    ingest = context.upstream["ingest"]
    notes: dict[int, Note] = {}
    while True:
        if (made := manifest.read(ingest)) is not None:
            _same_sources(context, made.stats.get("sources"))
            entries.update({entry.path: entry for entry in made.below(part)})
            listing = manifest.fetch_file(
                ingest, entries[f"{part}/{ROWS_FILE}"], manifest.local_root(ingest, made_from)
            )
            yield read_index(listing)
            continue
        check_going(context)
        with contextlib.suppress(FileNotFoundError):  # not begun, or ended just now
            plan = manifest.informing(ingest, PLAN, Plan)
            missing = next((i for i in range(plan.shards if plan else 0) if i not in notes), None)
            if plan and plan.made_from == made_from and (missing is None or ingest.exists(note_path(missing))):
                _same_sources(context, plan.sources)
                read_notes(ingest, notes)
                entries.update({f["path"]: FileEntry(**f) for note in notes.values() for f in note["files"]})
                index, validation = (index_of(notes, plan.shards, s) for s in (part.rpartition("/")[2], "val"))
                if index is not None and validation is not None and validation["complete"]:
                    yield index
                    continue
        time.sleep(POLL_SECONDS)


def _same_sources(context: StageContext, sources: str | None) -> None:
    """Keeps beside the checkpoints which sources the rows are of that were read while ingest was at work. Raises
    RuntimeError when they are others now."""
    known = context.storage.exists(SOURCES)
    if not known and any(digest.startswith(GROWING) for digest in context.upstream_digests.values()):
        context.storage.write_json(SOURCES, {"sources": sources})
    elif known and _known_sources(context.storage) not in ({"sources": sources}, sources):
        raise RuntimeError(
            f"the corpus's files are not those that {context.stage} has trained on: --force {context.stage} begins anew"
        )


def _known_sources(stage: Storage) -> Any:
    """What `_same_sources` kept; None where that is damaged, which is like no sources."""
    try:
        return stage.read_json(SOURCES)
    except DamagedError:
        return None


def wait_until_made(context: StageContext) -> None:
    """Returns once ingest, if it is still at work beside this stage, is done; raises RuntimeError when it failed."""
    if not any(digest.startswith(GROWING) for digest in context.upstream_digests.values()):
        return
    ingest = context.upstream["ingest"]
    while True:
        made = manifest.read(ingest)
        if not any(d.startswith(GROWING) for d in settled(context.upstream_digests, context.upstream).values()):
            return
        if made is not None:
            raise RuntimeError("ingest was made again with other settings, while its rows were read")
        check_going(context)
        time.sleep(POLL_SECONDS)


def check_going(context: StageContext) -> None:
    """Raises RuntimeError when ingest has ended without an artifact, Stopped when this stage is asked to stop."""
    if context.storage.exists(STOP):
        raise Stopped(f"stopped as asked while {context.stage} waited for ingest; its last checkpoint stays")
    ingest = context.upstream["ingest"]
    progress = manifest.informing(ingest, PROGRESS, Progress)
    if progress is not None and progress.state != "running":
        raise RuntimeError(f"ingest has {progress.state}, and its rows are needed to go on")
