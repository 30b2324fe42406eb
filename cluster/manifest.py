"""The manifest: written last, it is what makes an artifact or a checkpoint complete.

It lists every file with size and SHA-256, the identity that defines the artifact, and the digests of what it
was made from. Names place artifacts; the fingerprint only tells that an identity has drifted.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from cluster.scratch import cache_folder
from cluster.storage import (
    CHUNK,
    DamagedError,
    FileEntry,
    Storage,
    StorageError,
    agreed,
    checksum,
)
from cluster.storage import MANIFEST as MANIFEST

METRICS = "metrics.jsonl"
REPORT = "report.html"  # its curves
SAMPLES = "samples.jsonl"  # what the model said on the way
CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)


def fingerprint(identity: dict[str, Any], upstream: dict[str, str]) -> str:
    """SHA-256 over what defines an artifact and what it is made from."""
    return checksum({"identity": identity, "upstream": upstream})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Incident(BaseModel):
    """Something that did not go as it should while a stage was made, and when, in UTC."""

    model_config = ConfigDict(strict=True)

    kind: Literal["lost worker", "replaced actor", "out of memory", "damaged checkpoint", "early stopping", "not asked"]
    text: str
    at: str = Field(default_factory=_now)


class Counts(BaseModel):
    """What there is of a source, as `corpus.left_out` counts it."""

    model_config = ConfigDict(strict=True)

    read: int
    kept: int
    left_out: dict[str, int]
    example: str = ""
    shortened: int = 0


class Stats(BaseModel):
    """What the commands show of `Manifest.stats`, which may hold more."""

    notes: list[str] = Field(default_factory=list)
    skipped: dict[str, dict[str, Annotated[int, Field(strict=True)]]] = Field(default_factory=dict)
    read: dict[str, Counts] = Field(default_factory=dict)
    tokens_below: dict[int, int] = Field(default_factory=dict)
    incidents: list[Incident] = Field(default_factory=list)


@dataclass(config=ConfigDict(extra="forbid"))
class Manifest:
    """`identity` holds nested config fields, `upstream` digests such as {"ingest:base": "..."}, `metrics` the figures
    that status shows, `stats` all that was counted; `seconds` of work. Raises ValueError for what is not of this shape.
    """

    run: str
    stage: str
    files: list[FileEntry]
    identity: dict[str, Any] = field(default_factory=dict)
    upstream: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    created: str = field(default_factory=_now)

    @model_validator(mode="after")
    def _each_file_once(self) -> Manifest:
        paths = {file.path for file in self.files}
        if len(paths) < len(self.files):
            raise ValueError("a file is listed twice")
        if any(str(folder) in paths for path in paths for folder in PurePosixPath(path).parents):
            raise ValueError("a file is listed as a folder, too")
        return self

    @model_validator(mode="after")
    def _stats_can_be_shown(self) -> Manifest:
        Stats.model_validate(self.stats)
        return self

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity, self.upstream)

    def below(self, prefix: str = "") -> list[FileEntry]:
        """The files in folder `prefix`, or all of them, sorted by path."""
        start = f"{prefix.strip('/')}/" if prefix else ""
        return sorted((f for f in self.files if f.path.startswith(start)), key=lambda f: f.path)

    def digest(self, prefix: str = "") -> str:
        """SHA-256 over the content below `prefix`; what holds timings, or only shows, is left out."""
        kept = [f for f in self.below(prefix) if Path(f.path).name not in (METRICS, REPORT, SAMPLES)]
        return checksum([[f.path, f.size, f.sha256] for f in kept])


MANIFESTS = TypeAdapter(Manifest)


def write(storage: Storage, manifest: Manifest) -> None:
    """Complete the artifact at `storage`; every file must have been uploaded before."""
    storage.write_json(MANIFEST, asdict(manifest))


def read(storage: Storage) -> Manifest | None:
    """The manifest at `storage`, None when there is none; StorageError when it cannot be understood."""
    try:
        return MANIFESTS.validate_python(storage.read_json(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise DamagedError(f"{storage.uri}/{MANIFEST} is not a manifest of this version: {faults(error)}") from error


def faults(error: ValidationError) -> str:
    """What does not fit, without the values, which come from outside and may be long."""
    lines = [f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}" for e in error.errors(include_url=False)]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


Informing = TypeVar("Informing", bound=BaseModel)


def informing(storage: Storage, path: str, kind: type[Informing], context: object = None) -> Informing | None:
    """A file that only informs; None when it is absent or, which is said once, when it cannot be understood. `context`
    is what `kind` is validated with."""
    try:
        return kind.model_validate(storage.read_json(path), context=context)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedError as error:
        fault = str(error)
    except ValidationError as error:
        fault = f"{storage.uri}/{path} is not of this version: {faults(error)}"
    _say_once(fault)
    return None


@functools.lru_cache(maxsize=256)
def _say_once(fault: str) -> None:
    log.warning("%s; it only informs, so the run goes on without it", fault)


def remove(storage: Storage) -> None:
    """Delete an artifact or checkpoint, manifest first, so that a kill half-way leaves nothing that looks whole."""
    storage.delete(MANIFEST)
    storage.delete()


def _recover(manifest: Manifest) -> str:
    return f"Make it again with --force {manifest.stage}"


def verify(storage: Storage, manifest: Manifest) -> None:
    """Compare every file's size with the manifest; raises DamagedError listing each that is missing or differs."""

    def wrong() -> list[str]:
        there = storage.list()
        return [
            f"{f.path} is missing" if f.path not in there else f"{f.path} has {there[f.path]} bytes instead of {f.size}"
            for f in manifest.files
            if there.get(f.path) != f.size
        ]

    if found := agreed(wrong, lambda found: not found, f"the list of {storage.uri}"):
        raise DamagedError(f"{storage.uri} is damaged or truncated: {'; '.join(found)}. {_recover(manifest)}")


def fetch(storage: Storage, prefix: str = "", cache: Path | None = None) -> Path:
    """A local directory that holds the files of folder `prefix`, each SHA-256 checked.

    Local storage is used in place. Remote files are downloaded below `cache` (default ~/.cache/fathom), and those
    already there are kept. Raises StorageError for an incomplete artifact or a file that is not what was stored.
    """
    manifest = read(storage)
    if manifest is None:
        raise StorageError(f"{storage.uri} holds no complete artifact: it has no {MANIFEST}. Run its stage first")
    entries = manifest.below(prefix)
    if not entries:
        raise DamagedError(f"{storage.uri} has no files in {prefix or 'its root'}. {_recover(manifest)}")
    root = local_root(storage, manifest.fingerprint, cache)
    with ThreadPoolExecutor(8) as pool:
        wrong = [fault for fault in pool.map(lambda entry: _bring(storage, entry, root), entries) if fault]
    if wrong:
        raise DamagedError(f"{storage.uri} is damaged: {'; '.join(wrong)}. {_recover(manifest)}")
    return root / prefix


def local_root(storage: Storage, fingerprint: str, cache: Path | None = None) -> Path:
    """Where this machine has the files of an artifact: in the storage itself where that is local, else below `cache`
    (default ~/.cache/fathom)."""
    if storage.local_path is not None:
        return storage.local_path
    root = (cache or cache_folder()) / hashlib.sha256(storage.uri.encode()).hexdigest()[:16] / fingerprint[:16]
    if root.exists():
        os.utime(root)  # in use
    return root


def fetch_file(storage: Storage, entry: FileEntry, root: Path) -> Path:
    """One file below `root`, which `local_root` gave, its SHA-256 checked; downloaded once by the processes of a
    machine together. Raises StorageError where it is missing or damaged."""
    if fault := _bring(storage, entry, root):
        stage = storage.uri.partition("?")[0].rpartition("/")[2]
        raise DamagedError(f"{storage.uri} is damaged: {fault}. Make it again with --force {stage}")
    return root / entry.path


def _bring(storage: Storage, entry: FileEntry, root: Path) -> str | None:
    """Has a file below `root`; what is wrong with it, None when its SHA-256 is right."""
    if storage.local_path is not None:
        return _check(entry, root / entry.path)
    lock = root / ".locks" / hashlib.sha256(entry.path.encode()).hexdigest()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:  # let go by the system when a process dies
        fcntl.flock(held, fcntl.LOCK_EX)
        return _download(storage, entry, root / entry.path)


def _check(entry: FileEntry, path: Path) -> str | None:
    """What is wrong with a local file; None when its SHA-256 is right."""
    folder = Storage(path.parent)
    return compare(entry, lambda: folder.hash(path.name), str(path))


def compare(entry: FileEntry, read: Callable[[], tuple[int, str]], where: str) -> str | None:
    """What is wrong with a file, whose size and SHA-256 `read` gives; None when they are right."""
    right = entry.size, entry.sha256
    try:
        size, digest = agreed(read, lambda found: found == right, where)
    except FileNotFoundError:
        return f"{entry.path} is missing"
    if (size, digest) == right:
        return None
    if size != entry.size:
        return f"{entry.path} has {size:,} bytes instead of {entry.size:,}"
    return f"{entry.path} has SHA-256 {digest[:12]} instead of {entry.sha256[:12]}"


def _download(storage: Storage, entry: FileEntry, path: Path) -> str | None:
    """Has a remote file at `path`; what is wrong with it in the storage, None when its SHA-256 is right."""
    if path.exists() and _check(entry, path) is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")

    def copy() -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with storage.open_read(entry.path) as source, temporary.open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    try:
        fault = compare(entry, lambda: storage.reading(entry.path, copy), f"{storage.uri}/{entry.path}")
        if fault is None:
            os.replace(temporary, path)
        return fault
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StorageError(
            f"the disk of {path.parent} is full, where {entry.size / 1e9:.1f} GB of {storage.uri}/{entry.path} were to "
            "be kept: make room, or let FATHOM_CACHE_GB bound the cache to fewer gigabytes"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def drift(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """The fields that differ, one line each: "base.matrix_lr: 0.02 -> 0.03"."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after, name = old.get(key, "unset"), new.get(key, "unset"), f"{where}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += drift(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    """A setting within a line: as it is, but for white space that would not be seen, or break the line."""
    return value if isinstance(value, str) and value.isprintable() and value == value.strip() else repr(value)


def checkpoint_path(step: int) -> str:
    """Where a stage keeps the checkpoint taken after `step` optimizer steps."""
    return f"{CHECKPOINTS}/step_{step:06d}"


def checkpoints(stage: Storage) -> list[tuple[int, Storage]]:
    """The checkpoints of a stage that have a manifest, oldest first."""
    found = [re.fullmatch(rf"(step_(\d{{1,18}}))/{MANIFEST}", path) for path in stage.list(CHECKPOINTS)]
    return sorted(((int(m[2]), stage.at(CHECKPOINTS, m[1])) for m in found if m), key=lambda c: c[0])


def latest_checkpoint(stage: Storage) -> tuple[int, Storage, Manifest] | None:
    """The newest complete checkpoint; a damaged one is passed over with a warning, as resuming is exact from any."""
    for step, storage in reversed(checkpoints(stage)):
        try:
            if (manifest := read(storage)) is not None:
                verify(storage, manifest)
                return step, storage, manifest
        except DamagedError as error:
            log.warning("checkpoint %d is passed over: %s", step, error)
    return None
