"""A run in storage: the state of each stage, and the claim that keeps a second run of the same name out.

`{storage}/{run}/{stage}/` is a stage's artifact. It is done if and only if its manifest is there and verifies.
Beside the artifacts lie small files that only inform: the claim, the progress of a stage, the configuration last used.
One of these that cannot be read is as good as absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster import manifest as manifests
from cluster.manifest import Manifest, informing
from cluster.storage import DamagedError, FencedError, Storage, StorageError
from pipeline.config import STAGE_NAMES, Config, identity_of
from stages.context import ANSWERS, PROGRESS, TRACEBACK, Progress, settled
from stages.growing import NOTES

CONFIG, CLAIM = "config.json", "claim.json"
TRACKING = "fathom-tracking"  # below a storage, what trackers keep
REPORT, REPORT_PAGE = "report", "report.html"  # beside the stages of a run, and what a person opens
EVALUATIONS = "evaluations"  # below a storage, what `fathom evaluate` was answered
SET_ASIDE = ".set-aside"  # artifacts that --force replaces, until their successors are there
BEAT_SECONDS = 2.0
CONFIRM_SECONDS = 0.5
LAPSE_SECONDS = 15.0
log = logging.getLogger(__name__)


class RunHeldError(RuntimeError):
    """Another process holds the run, or has taken it over."""


class Holder(BaseModel):
    """Who holds a run; `beat` rises while the process lives."""

    model_config = ConfigDict(extra="ignore", strict=True)

    host: str
    pid: int = Field(ge=1, lt=2**31)
    user: str
    since: str
    token: str
    beat: int


@dataclass(frozen=True)
class StageState:
    """`state` is done, running, resumable, fresh, drifted or failed.

    `drift` has a line a field; `checkpoint_step` is where a started stage goes on.
    """

    name: str
    state: str
    manifest: Manifest | None = None
    drift: list[str] = field(default_factory=list)
    checkpoint_step: int | None = None
    progress: Progress | None = None
    error: str | None = None
    traceback: str | None = None  # the file that has it


class RunStore:
    """One run below a storage root; raises ValueError for a name that could not be a folder."""

    def __init__(self, storage_uri: str, run: str, token: str | None = None) -> None:
        """With the `token` of a claim, what is written here is written under that claim."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run):
            raise ValueError(f"run name {run!r} must start with a letter or digit and hold only those, '.', '_', '-'")
        if run == EVALUATIONS:
            raise ValueError(f"no run can be named {run!r}: fathom evaluate keeps answers in a folder of that name")
        if run == TRACKING:
            raise ValueError(f"no run can be named {run!r}: trackers keep their files in a folder of that name")
        self.run = run
        self.storage = Storage(storage_uri).at(run)
        if token is not None:
            self.storage = self.storage.of_run(token)
        self._claim: Claim | None = None

    def begin(self) -> None:
        """Makes the local directory of all runs where it is not there, with a file that keeps them out of git, and out
        of what `ray job submit` uploads of a working directory. Whether it can be written is for others to check."""
        if (folder := self.storage.local_path) is not None and not folder.parent.exists():
            with contextlib.suppress(OSError):
                folder.parent.mkdir(parents=True)
                (folder.parent / ".gitignore").write_text("*\n")

    def stage(self, name: str) -> Storage:
        return self.storage.at(name)

    def remove(self, name: str) -> None:
        """Delete a stage's artifact and checkpoints, manifest first."""
        manifests.remove(self.stage(name))

    def set_aside(self, name: str) -> None:
        """Keeps the finished artifact of a stage that is made again, and removes what else the stage has."""
        self._check_aside()
        try:
            made = manifests.read(self.stage(name))
        except DamagedError:
            made = None
        if made is None:
            self.remove(name)
            return
        self.storage.delete(f"{SET_ASIDE}/{name}")
        self.storage.move(name, f"{SET_ASIDE}/{name}")

    def settle(self) -> list[str]:
        """Ends what `set_aside` began: where the successor is there, its predecessor goes; where nothing of one is
        that a next attempt goes on from, the predecessor comes back, if it is made of what is there now, and else
        waits. Returns the stages that came back."""
        self._check_aside()
        back = []
        aside = {path.split("/")[0] for path in self.storage.list(SET_ASIDE)}
        for name in (name for name in STAGE_NAMES if name in aside):  # each after what it is made of
            stage = self.stage(name)
            try:
                made = manifests.read(stage)
            except DamagedError as error:
                log.warning("the artifact from before --force stays in %s: %s", SET_ASIDE, error)
                continue
            if made is None:
                if manifests.checkpoints(stage) or stage.list(NOTES) or stage.list(ANSWERS):
                    continue
                if not self._is_current(self.storage.at(SET_ASIDE, name)):
                    continue
                trace = stage.read_bytes(TRACEBACK) if stage.exists(TRACEBACK) else None
                self.storage.delete(name)
                self.storage.move(f"{SET_ASIDE}/{name}", name)
                if trace is not None:  # the message has named it
                    stage.write_bytes(TRACEBACK, trace)
                back.append(name)
            self.storage.delete(f"{SET_ASIDE}/{name}")
        if not self.storage.list(SET_ASIDE):
            self.storage.delete(SET_ASIDE)
        return sorted(back)

    def _check_aside(self) -> None:
        if (root := self.storage.local_path) is not None and (root / SET_ASIDE).is_symlink():
            raise StorageError(
                f"{root / SET_ASIDE} is a link, and what --force replaces is kept there: remove the link"
            )

    def _is_current(self, aside: Storage) -> bool:
        """Whether the artifact `aside` is made of what is there now."""
        try:
            made = manifests.read(aside)
        except DamagedError:
            return False
        if made is None:
            return False
        for part, digest in made.upstream.items():
            stage, _, prefix = part.partition(":")
            upstream = manifests.read(self.stage(stage))
            if upstream is None or upstream.digest(prefix) != digest:
                return False
        return True

    def record(self, config: Config) -> None:
        """Keep the configuration beside the artifacts, for status."""
        self.storage.write_json(CONFIG, config.model_dump(mode="json"))

    def recorded(self) -> Config | None:
        """The configuration last run under this name; None when there is none this version can read."""
        return informing(self.storage, CONFIG, Config)

    def progress(self, name: str) -> Progress | None:
        """What the stage last reported."""
        return informing(self.stage(name), PROGRESS, Progress)

    def state(
        self, name: str, identity: dict[str, Any] | None = None, upstream: dict[str, str] | None = None
    ) -> StageState:
        """Where a stage stands against what it should be.

        Without `identity` the recorded configuration is compared; without `upstream` no upstream is.
        Raises StorageError when an artifact has a manifest whose files are missing or truncated.
        """
        if identity is None and (config := self.recorded()) is not None:
            identity = identity_of(name, config)
        progress = self.progress(name)
        manifest = manifests.read(self.stage(name))
        if manifest is not None:
            manifests.verify(self.stage(name), manifest)
            lines = self._drift(manifest, identity, upstream)
            return StageState(name, "drifted" if lines else "done", manifest, lines, progress=progress)
        doing, error = (progress.state, progress.error) if progress else (None, None)
        checkpoint = manifests.latest_checkpoint(self.stage(name))
        step = checkpoint[0] if checkpoint else None
        lines = self._drift(checkpoint[2], identity, upstream) if checkpoint else []
        # within a claim of our own, "running" is what a killed attempt left behind
        if doing == "running" and self._claim is None and self.claim_alive():
            state = "running"
        elif lines:
            state = "drifted"
        elif doing == "failed":
            state = "failed"
        else:
            state = "resumable" if checkpoint else "fresh"
        trace = f"{self.stage(name).uri}/{TRACEBACK}" if error and self.stage(name).exists(TRACEBACK) else None
        return StageState(name, state, None, lines, step, progress, error, trace)

    def _drift(self, manifest: Manifest, identity: dict[str, Any] | None, upstream: dict[str, str] | None) -> list[str]:
        lines = manifests.drift(manifest.identity, identity) if identity is not None else []
        if upstream is not None:
            made_of = settled(
                manifest.upstream, {p.partition(":")[0]: self.stage(p.partition(":")[0]) for p in upstream}
            )
            names = sorted(made_of.keys() | upstream.keys())
            lines += [f"upstream {name} changed" for name in names if made_of.get(name) != upstream.get(name)]
        return lines

    def claim_alive(self) -> bool:
        """Whether a living process holds the run; asks the system on its own host, else waits for a beat."""
        if self._claim is not None:
            return True
        holder = informing(self.storage, CLAIM, Holder)
        if holder is None:
            return False
        if holder.host == socket.gethostname():
            return _pid_alive(holder.pid)
        return self._beats(holder, 2 * BEAT_SECONDS)

    def _beats(self, holder: Holder, seconds: float) -> bool:
        """Whether the claim changes while we watch. No clocks are compared: machines disagree on the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.25)
            now = informing(self.storage, CLAIM, Holder)
            if now is None:
                return False
            if now != holder:
                return True
        return False

    @contextmanager
    def claim(self) -> Iterator[Claim]:
        """Hold the run while the block runs; a dead holder's claim lapses. Raises RunHeldError naming a live holder.

        Meanwhile all that this store writes is written under the claim, and refused once another process has it.
        """
        claim = Claim(self.storage, self.run)
        while True:
            holder = informing(self.storage, CLAIM, Holder)
            if holder is not None:
                died = holder.host == socket.gethostname() and not _pid_alive(holder.pid)
                if not died and self._beats(holder, LAPSE_SECONDS):
                    raise RunHeldError(_held(self.run, holder))
            with self._alone():
                now = informing(self.storage, CLAIM, Holder)
                if now is None or now == holder:
                    claim.write()
                    break
        time.sleep(CONFIRM_SECONDS)
        winner = informing(self.storage, CLAIM, Holder)
        if winner is not None and winner.token != claim.token:
            raise RunHeldError(_held(self.run, winner))
        unclaimed = self.storage
        self.storage, self._claim = unclaimed.mark(claim.token), claim
        claim.storage = self.storage
        with self._alone():
            self.storage.sweep()
        beating = threading.Thread(target=claim.beat_on, daemon=True, name="claim")
        beating.start()
        try:
            yield claim
        finally:
            claim.stop.set()
            beating.join()
            with contextlib.suppress(StorageError):  # taken over, or gone: then there is no claim of ours
                if claim.lost is None:
                    self.storage.delete(CLAIM)
            self.storage, self._claim = unclaimed, None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Where storage is local, no other process is in this block; an object store has no such lock to offer."""
        if self.storage.local_path is None:
            yield
            return
        self.storage.local_path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.storage.local_path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Claim:
    """Our hold on a run: a file with our token, rewritten with a rising beat."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.run = storage, run
        self.token, self.beat = uuid.uuid4().hex, 0
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self.stop = threading.Event()
        self.lost: str | None = None

    def write(self) -> None:
        self.beat += 1
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": self.since}
        self.storage.write_json(CLAIM, {**holder, "token": self.token, "beat": self.beat})

    def beat_on(self) -> None:
        """Beat until stopped, or until another token shows that the run was taken over while we could not beat."""
        while not self.stop.wait(BEAT_SECONDS):
            try:
                holder = informing(self.storage, CLAIM, Holder)
                if holder is not None and holder.token != self.token:
                    self.lost = _held(self.run, holder)
                    return
                self.write()
            except FencedError as error:
                self.lost = str(error)
                return
            except (OSError, StorageError) as error:
                log.warning("the claim on run %s could not be renewed: %s", self.run, error)

    def check(self) -> None:
        """Raise RunHeldError when the run has been taken over."""
        if self.lost is not None:
            raise RunHeldError(self.lost)


class Pulse:
    """Whether the process that holds a run lives, for one who looks again and again; on another host, where its id says
    nothing, it is dead when its claim has not changed for LAPSE_SECONDS of looking. Its `holder` is as last seen."""

    def __init__(self, store: RunStore) -> None:
        self._run, self._since = store.storage, 0.0
        self.holder: Holder | None = None

    def look(self) -> Literal["alive", "dead", "over"]:
        """A run that nobody holds is "over". Raises StorageError or OSError for a storage that cannot be read now."""
        holder = informing(self._run, CLAIM, Holder)
        if holder is None:
            return "over"
        if holder != self.holder:
            self.holder, self._since = holder, time.monotonic()
        if holder.host == socket.gethostname():
            return "alive" if _pid_alive(holder.pid) else "dead"
        return "alive" if time.monotonic() - self._since < LAPSE_SECONDS else "dead"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _pid_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _held(run: str, holder: Holder) -> str:
    return (
        f"run {run} is held by {holder.user}@{holder.host} pid {holder.pid} since {holder.since}; "
        "wait for it, or give yours another name with --name"
    )
