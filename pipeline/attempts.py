"""What happened to a run from the driver's side: each attempt at it, with what went wrong in the stages meanwhile.

It is kept beside the artifacts for the report and only informs: it fails no run, and no stage reads it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType

from pydantic import BaseModel, ConfigDict, Field

from cluster.manifest import Incident, informing
from cluster.storage import Storage, StorageError

ATTEMPTS = "attempts.json"
MOST_TOLD = 1_000  # incidents of an attempt that are kept
log = logging.getLogger(__name__)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class StageIncident(Incident):
    stage: str


class Attempt(BaseModel):
    """One `fathom run`: its command line, what was to do (stage: run, resume from step 30, ...) and on what; where its
    dashboard, its metrics and its trackers are. One that was killed has no `ended`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    began: str = Field(default_factory=now)
    ended: str | None = None
    outcome: str | None = None  # done, or why not
    stopped: bool = False  # as somebody asked
    arguments: list[str] = []
    actions: dict[str, str] = {}
    hardware: str | None = None
    places: dict[str, str] = {}
    incidents: list[StageIncident] = []


class History(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    attempts: list[Attempt] = []


def attempts(run: Storage) -> list[Attempt]:
    """Every attempt at a run, the oldest first."""
    found = informing(run, ATTEMPTS, History)
    return found.attempts if found else []


class Diary:
    """Keeps the attempt under way. A failure to write is logged, and changes nothing."""

    def __init__(
        self,
        run: Storage,
        arguments: list[str],
        actions: dict[str, str],
        hardware: str,
        places: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._run, self._before = run, attempts(run)
        self._lock = threading.Lock()  # the live view, trackers and the run itself write it
        self.attempt = Attempt(arguments=arguments, actions=actions, hardware=hardware, places=dict(places))
        self._write()

    def __enter__(self) -> Diary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            self.end("interrupted" if stopped else str(error) or type(error).__name__, stopped)

    def tell(self, stage: str, incidents: Sequence[Incident]) -> None:
        """Keeps those of a stage that it has not been told before."""
        told = [StageIncident(stage=stage, **incident.model_dump()) for incident in incidents]
        with self._lock:
            known = self.attempt.incidents
            if new := [incident for incident in told if incident not in known][: MOST_TOLD - len(known)]:
                known += new
                self._write()

    def place(self, what: str, where: str) -> None:
        """Where something that shows the run is, such as its dashboard; the last word on each counts."""
        with self._lock:
            self.attempt.places[what] = where
            self._write()

    def end(self, outcome: str, stopped: bool = False) -> None:
        with self._lock:
            self.attempt.ended, self.attempt.outcome, self.attempt.stopped = now(), outcome, stopped
            self._write()

    def _write(self) -> None:
        history = History(attempts=[*self._before, self.attempt])
        try:
            self._run.write_json(ATTEMPTS, history.model_dump(mode="json"))
        except (OSError, StorageError) as error:
            log.warning("%s is unwritten: %s", ATTEMPTS, error)
