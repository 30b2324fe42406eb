"""Commands as a person would give them: real process trees that can be watched, killed and read back."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.artifacts import REPORT

ROOT = Path(__file__).parents[1]
# What may differ between two runs of the same thing.
TIMING = ("_ms", "_share", "tokens_per_second", "_gb", "mfu", "cpu_cores", "gpu_watts", "gpu_celsius")
POLL_SECONDS, LOOK_SECONDS = 0.02, 0.5


@functools.lru_cache
def ray_directory() -> Path:
    """Where the tests' Ray keeps its sessions: a short path, as it holds sockets; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="fathom-ray-", dir="/tmp"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def environment(**extra: str) -> dict[str, str]:
    """This process's environment for a command of the working tree, with no cluster of anybody else in it."""
    others = ("RAY_ADDRESS", "COLUMNS", "WANDB_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(ray_directory()), "PYTHONUNBUFFERED": "1"}
    own |= {"RAY_AUTH_MODE": "token"}
    return kept | own | extra


class Command:
    """A command in a process group of its own. `below` has every process it was seen to start: Ray's leave the group
    and outlive their parents, so they are remembered while it runs."""

    def __init__(self, *command: str, **extra: str) -> None:
        self.began = time.monotonic()
        # Files and not pipes: a pipe would stay open in any process that outlives the command.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**extra), stdout=self._out, stderr=self._err, start_new_session=True
        )
        self.root = psutil.Process(self.process.pid)
        self.below: set[psutil.Process] = set()

    def output(self) -> str:
        """All it has said, what went to stderr last."""
        return self._text(self._out) + self._text(self._err)

    @staticmethod
    def _text(file: IO[bytes]) -> str:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    def look(self) -> None:
        """Remember the processes it has by now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.below.update(self.root.children(recursive=True))

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether `condition` came true before the command ended; fails after `seconds`."""
        now = time.monotonic()
        deadline, looked = now + seconds, now
        while not condition():
            if self.process.poll() is not None:
                return False
            if (now := time.monotonic()) > deadline:
                self.kill()
                raise TimeoutError(f"{self.process.args} took more than {seconds} s:\n{self.output()}")
            if now - looked > LOOK_SECONDS:
                self.look()
                looked = now
            time.sleep(POLL_SECONDS)
        return True

    def kill(self) -> None:
        """kill -9 of the command and everything below it."""
        self.look()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while alive := self.alive():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.below.update(process.children(recursive=True))
                    process.kill()
            time.sleep(0.05)

    def alive(self) -> list[psutil.Process]:
        """The processes below it that still run."""
        left = []
        for process in self.below:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        return left

    def named(self, name: str) -> list[psutil.Process]:
        """The processes below it whose command line has `name` in it."""
        self.look()
        found = []
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def finish(self, seconds: float) -> Result:
        """Wait for its end; processes it left behind are counted, then killed."""
        self.until(lambda: False, seconds)
        took = time.monotonic() - self.began
        deadline = time.monotonic() + 15
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(process.name())
        self.kill()
        return Result(self.process.returncode, self.output(), self._text(self._out), took, names)


@dataclass(frozen=True)
class Result:
    code: int
    output: str
    stdout: str
    seconds: float
    left_behind: list[str]


def start(name: str, *arguments: str, **extra: str) -> Command:
    """Begin `python -m pipeline.NAME ARGUMENTS`."""
    return Command(sys.executable, "-m", f"pipeline.{name}", *arguments, **extra)


def fathom(name: str, *arguments: str, seconds: float = 600) -> Result:
    """`python -m pipeline.NAME ARGUMENTS` from beginning to end."""
    return start(name, *arguments).finish(seconds)


@dataclass(frozen=True)
class Run:
    """A run in a local storage directory and the settings that make it."""

    storage: Path
    name: str
    settings: Sequence[str]
    result: Result | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        return self.storage / self.name

    def arguments(self, *more: str) -> list[str]:
        return ["--name", self.name, "--storage", str(self.storage), *self.settings, *more]

    def go(self, *more: str, seconds: float = 600) -> Result:
        return fathom("run", *self.arguments(*more), seconds=seconds)

    def states(self) -> dict[str, str]:
        """The state of every stage, as `status --json` tells it."""
        return {stage["name"]: stage["state"] for stage in self.status()["stages"]}

    def status(self) -> dict[str, Any]:
        shown = fathom("status", self.name, "--storage", str(self.storage), "--json", seconds=120)
        assert shown.code == 0, shown.output
        return dict(json.loads(shown.stdout))

    def manifests(self) -> dict[str, bytes]:
        """Of the stages; the run's report, which says when it was made, is none."""
        found = {path.parent.name: path.read_bytes() for path in sorted(self.path.glob("*/manifest.json"))}
        return {name: made for name, made in found.items() if name != REPORT}

    def records(self, stage: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a finished stage."""
        return [json.loads(line) for line in (self.path / stage / "metrics.jsonl").read_text().splitlines()]

    def lasting(self, stage: str) -> list[dict[str, Any]]:
        """The records without what depends on the speed of the machine."""
        return [{k: v for k, v in record.items() if not k.endswith(TIMING)} for record in self.records(stage)]

    def losses(self, stage: str) -> list[float]:
        return [record["loss"] for record in self.records(stage) if "loss" in record]

    def branch(self, storage: Path, *stages: str) -> Run:
        """A run of its own that has taken over these stages of this one: an artifact is its directory."""
        copy = Run(storage, "branch", self.settings)
        for stage in stages:
            shutil.copytree(self.path / stage, copy.path / stage)
        return copy


@functools.lru_cache
def explained() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The figures of docs/metrics.md as regular expressions, each with its stages: what status shows, and what only the
    records have."""
    shown, recorded = (ROOT / "docs/metrics.md").read_text().split("## In `metrics.jsonl`")
    tables: list[dict[str, set[str]]] = []
    for part in (shown, recorded):
        tables.append({})
        for names, stages, sentence in re.findall(r"^\| (`.*?) \| (.*?) \| (.+?) \|$", part, re.MULTILINE):
            assert sentence.count(" ") > 2, sentence
            for name in re.findall(r"`(.+?)`", names):
                pattern = re.sub(r"_k$", r"_\\d+", name.replace("...", r"\w+"))
                assert pattern not in tables[-1], f"{name} is explained twice"
                tables[-1][pattern] = set(stages.split(", "))
    return tables[0], tables[1]


def explanations(stage: str, name: str, records: bool = False) -> list[str]:
    """Which entries there explain this figure of this stage: the one of that very name, else all that fit."""
    shown, recorded = explained()
    tables = (shown, recorded) if records else (shown,)
    fitting = [p for t in tables for p, stages in t.items() if stage in stages and re.fullmatch(p, name)]
    return [p for p in fitting if p == name] or fitting


def kill_at_checkpoint(run: Run, stage: str, *more: str, seconds: float = 400) -> int:
    """Begin a run and kill -9 all of it once `stage` has a checkpoint; returns the step of the newest by then."""

    def saved() -> list[Path]:
        return sorted((run.path / stage / "checkpoints").glob("step_*/manifest.json"))

    command = start("run", *run.arguments(*more))
    reached = command.until(lambda: bool(saved()), seconds)
    command.kill()
    assert reached, f"the command ended before a checkpoint:\n{command.output()}"
    assert not (run.path / stage / "manifest.json").exists(), "the stage was finished before it could be killed"
    return int(saved()[-1].parent.name.removeprefix("step_"))


def one_clear_message(result: Result, *parts: str) -> None:
    """Exit status 1, and an output that says all of `parts` and shows no traceback."""
    assert result.code == 1, result.output
    assert "Traceback" not in result.output, result.output
    for part in parts:
        assert part in result.output, result.output
    assert not result.left_behind
