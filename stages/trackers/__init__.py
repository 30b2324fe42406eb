"""Trackers: what is recorded of a run, shown by wandb or TensorBoard.

The record is the truth, and a tracker only repeats it. `follow` runs in a process of its own beside the run, reads from
storage what is settled, which is what a complete checkpoint or a finished artifact has, and hands it to one tracker. A
resumed stage goes on from a complete checkpoint, so what was handed on once stays true whatever is killed. How far a
tracker is, it finds in what it has kept itself, and not in a note beside that could say something else.

`pipeline.track` starts these processes and waits for them, for so long and no longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import DamagedError, Storage

Record = dict[str, Any]
Say = Callable[[str], None]  # tells the user
SAID = 3  # exit status of a tracker's process that has said why it failed


class Job(BaseModel):
    """What a tracker's process is told, in a line on its standard input: `hardware` by stage, in words; `limit` is how
    many seconds it has at the end.

    It holds no secret: an account's key is in the environment, where wandb looks for it.
    """

    kind: str
    run: str
    storage: str
    stages: list[str]
    folder: str
    project: str
    entity: str | None
    tags: list[str]
    mode: str
    hardware: dict[str, str]
    limit: float | None


@dataclass(frozen=True)
class Settled:
    """What of a stage will not change any more, from its newest complete checkpoint, or, `done`, from its artifact."""

    stage: str
    uri: str
    made: Manifest
    done: bool
    records: list[Record]

    @property
    def version(self) -> str:
        """Another one for whatever else is settled later, also where the same artifact is made again."""
        return version_of(self.made)


class Tracker(Protocol):
    def feed(self, settled: Settled) -> None:
        """Takes over what it does not have yet."""

    def finish(self) -> None:
        """Returns when all that was fed is kept."""


def version_of(made: Manifest) -> str:
    return hashlib.sha256(json.dumps([made.created, [f.sha256 for f in made.files]]).encode()).hexdigest()


def settled(storage: Storage, stage: str, known: str | None = None) -> Settled | None:
    """What is settled of the stage in `storage`; None where nothing is, or only the version already `known`.

    A stage without steps has one record, its figures. Raises StorageError or OSError for what cannot be read now.
    """
    place, made = storage, manifests.read(storage)
    done = made is not None
    if made is None:
        newest = manifests.latest_checkpoint(storage)
        if newest is None:
            return None
        _, place, made = newest
    if version_of(made) == known:
        return None
    entry = next((file for file in made.files if file.path == manifests.METRICS), None)
    if entry is None:
        records = [{"step": 0, **made.metrics}]
    else:
        data = place.read_bytes(manifests.METRICS)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamagedError(f"{place.uri}/{manifests.METRICS} is not what its manifest says")
        records = [json.loads(line) for line in data.decode().splitlines()]
    figures = [{k: v for k, v in record.items() if isinstance(v, int | float)} for record in records]
    return Settled(stage, storage.uri, made, done, figures)


def same(one: Record, other: Record) -> bool:
    """Whether two records say the same, one of them read from where 2.0 is 2; a figure that is no number is itself."""
    return {k: repr(float(v)) for k, v in one.items()} == {k: repr(float(v)) for k, v in other.items()}


def begins(part: list[Record], whole: list[Record]) -> bool:
    """Whether `whole` begins with all of `part`."""
    there = whole[: len(part)]
    return part == there or (len(part) == len(there) and all(map(same, part, there)))
