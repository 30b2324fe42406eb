"""`fathom track RUN --to wandb|tensorboard`: show a run in a tracker, finished or not; what the tracker has stays.

`fathom run --track ...` does the same while it trains.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.console import Console

from cluster.storage import Storage
from pipeline.artifacts import TRACKING, RunStore
from pipeline.attempts import attempts
from pipeline.config import (
    STAGE_NAMES,
    Config,
    ConfigError,
    Parser,
    add_storage_flag,
    default_storage,
    stage_names,
)
from pipeline.terminal import Terminal, say
from stages.config import TrackingConfig, as_trackers
from stages.trackers import SAID, Job

FINISH_SECONDS = 20.0  # that a tracker has when the run has ended
ROOT = Path(__file__).resolve().parents[1]


class Feeder:
    """The process that feeds one tracker. Whatever it does or fails to do, the run only shows what it says."""

    def __init__(self, job: Job, console: Console, said: Callable[[str, str], None]) -> None:
        self.job, self.console, self.said = job, console, said
        folder = Path(job.folder, "log")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{job.run}-{job.kind}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stages.trackers.follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the run, which then ends this
                text=True,
                errors="replace",
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `finish` says so
            self.process.stdin.write(job.model_dump_json() + "\n")
            self.process.stdin.flush()
        self.listener = threading.Thread(target=self._listen, daemon=True, name=f"{job.kind} says")
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            say(self.console, f"{self.job.kind}: {line.rstrip()}")
            self.said(self.job.kind, line.rstrip())

    def end(self) -> None:
        """Has it take over the rest and end."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def finish(self, deadline: float | None) -> bool:
        """Waits for its end, until `deadline` at the latest; whether it has taken over everything."""
        later = f"`fathom track {self.job.run} --to {self.job.kind}` gives it what is missing"
        try:
            status = self.process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self.listener.join(1)
            if status not in (0, SAID):
                say(self.console, f"{self.job.kind}: it ended with status {status}, see {self.log}; {later}")
            return status == 0
        except subprocess.TimeoutExpired:
            say(self.console, f"{self.job.kind}: it was not ready in time and is left; {later}")
            return False
        finally:
            self.kill()

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait()


def asked(tracking: TrackingConfig) -> tuple[str, ...]:
    """The trackers of a run: those it names, else wandb where there is the key of an account."""
    if tracking.to is not None:
        return tracking.to
    return ("wandb",) if os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "disabled" else ()


def check_installed(kinds: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose library is missing."""
    for kind in kinds:
        try:
            importlib.metadata.version(kind)
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                f"{kind} is not installed: pip install 'fathom[track]', or go on with --track none"
            ) from error


def folder_of(tracking: TrackingConfig, storage: Storage) -> Path:
    """Where trackers keep their files: beside the runs, or where these are not on this machine in ./fathom-tracking."""
    if tracking.folder is not None:
        return Path(tracking.folder).expanduser().absolute()
    if storage.local_path is not None:
        return storage.local_path / TRACKING
    home = Path(default_storage()).absolute().parent
    return home / TRACKING / storage.uri.partition("://")[2].partition("?")[0]


@contextmanager
def tracked(
    config: Config,
    names: Sequence[str],
    kinds: Sequence[str],
    console: Console,
    limit: float | None = FINISH_SECONDS,
    said: Callable[[str, str], None] = lambda kind, text: None,
) -> Iterator[list[str]]:
    """Meanwhile each of the trackers follows these stages; then they have `limit` seconds, together, for what is left.
    The list yielded has, after it, those that did not take over everything. `said` is given what each says: where it
    shows the run, or what is wrong."""
    tracking, storage = config.tracking, Storage(config.storage)
    feeders, failed = [], list[str]()
    attempted = attempts(storage.at(config.name)) if kinds else []
    hardware = {stage: attempt.hardware for attempt in attempted for stage in attempt.actions if attempt.hardware}
    for kind in kinds:
        job = Job(
            kind=kind,
            run=config.name,
            storage=storage.uri,
            stages=list(names),
            folder=str(folder_of(tracking, storage)),
            project=tracking.project,
            entity=tracking.entity,
            tags=list(tracking.tags),
            mode=tracking.mode,
            hardware=hardware,
            limit=limit,
        )
        try:
            feeders.append(Feeder(job, console, said))
        except OSError as error:
            failed.append(kind)
            say(console, f"{kind}: it could not be started: {error}")
    try:
        yield failed
    finally:
        deadline = None if limit is None else time.monotonic() + limit
        for feeder in feeders:  # each has all of the time, whatever another does with it
            feeder.end()
        failed += [feeder.job.kind for feeder in feeders if not feeder.finish(deadline)]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when the trackers have everything, 1 when one has not."""
    parser = Parser(prog="fathom track", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="name of the run")
    parser.add_argument("--to", required=True, metavar="TRACKER", help="wandb, tensorboard, or both")
    add_storage_flag(parser)
    parser.add_argument("--folder", help="where trackers keep their files (default: as the run has it)")
    args = parser.parse_args(argv)
    try:
        kinds = as_trackers(args.to)
    except ValueError as error:
        raise ConfigError(f"--to {args.to}: {error}") from error
    if not kinds:
        raise ConfigError(f"--to {args.to} names no tracker: wandb, tensorboard or both")
    check_installed(kinds)
    store = RunStore(args.storage, args.run)
    if not store.storage.exists():
        raise FileNotFoundError(f"no run {args.run!r} in {Storage(args.storage).uri}; see --storage")
    recorded = store.recorded()
    tracking = (recorded.tracking if recorded else TrackingConfig()).model_copy(
        update={"folder": args.folder} if args.folder else {}
    )
    config = (recorded or Config()).model_copy(
        update={"name": args.run, "storage": Storage(args.storage).uri, "tracking": tracking}
    )
    names = stage_names(config) if recorded else STAGE_NAMES
    with tracked(config, names, kinds, Terminal(), limit=None) as failed:
        pass
    return 1 if failed else 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["track", *sys.argv[1:]]))
