"""Runs what a model wrote, and grades it, where it can reach nothing: no file, process or network of this machine.

`tasks.jail` is what runs inside, and says how. Each program has processes of its own, which see Python, the system's
libraries (both read-only) and a small /tmp that goes with them; the environment is empty; the kernel refuses sockets,
new processes and threads, signals and whatever else a computation does not need; time, memory, file sizes, open files
and output are limited. The test is in another process than the program, so that the program cannot learn or touch it.

What is left open: the kernel's own faults, as far as they can be reached through the system calls that are allowed; the
time a computation takes, by which programs on the same cores can tell that they are not alone; and world-readable files
of the system's libraries and of Python's folder. Programs get the standard library and no other package.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

Limit = Literal["time", "memory", "output"]
Way = Literal["bubblewrap", "namespaces", "none"]

START_S = 60.0  # a machine that takes so long to start a process is in trouble
GRACE_S = 0.5
_JAIL = Path(__file__).with_name("jail.py").read_text()
# not a virtual environment's, whose packages stay outside
_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_ADVICE = (
    "Install bubblewrap and libseccomp (apt install bubblewrap libseccomp2; dnf install bubblewrap libseccomp), or let "
    "users make namespaces (sysctl -w user.max_user_namespaces=10000, on Ubuntu also "
    "kernel.apparmor_restrict_unprivileged_userns=0). --unsafe-sandbox, in a run --set evaluate.unsafe_sandbox=true, "
    "runs programs with all that you may do yourself"
)


class SandboxUnavailable(RuntimeError):
    """This machine cannot shut a program in; the message says what to do."""


@dataclass(frozen=True)
class Program:
    """`source` defines the function `entry_point`; `test` defines `check(candidate)`, which calls it and raises if it
    is wrong; `context` is Python that runs before the test and may give it what it uses."""

    source: str
    entry_point: str
    test: str
    context: str = ""


@dataclass(frozen=True)
class Outcome:
    """`reason` is empty for a program that passed, and else the exception or what ended it. `limit` is what it ran
    into; the program has a say in "memory", which is its own MemoryError. `output` is what it printed."""

    passed: bool
    reason: str
    limit: Limit | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Of one program. `temporary_bytes` is the size of /tmp, `output_bytes` that of all it may print."""

    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    temporary_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    open_files: int = 64


class Sandbox:
    def __init__(self, unsafe: bool = False, limits: Limits = Limits()) -> None:
        """Finds out how this machine can shut a program in: bubblewrap where it is installed, else namespaces that it
        makes itself. With `unsafe` programs only have their limits. Raises SandboxUnavailable."""
        self.limits = limits
        self.way: Way = "none" if unsafe else self._way()

    def run(self, program: Program, timeout_s: float = 5.0) -> Outcome:
        """The outcome after `timeout_s` seconds of the program at most. Raises SandboxUnavailable."""
        return self._run(program, timeout_s, self.way)

    def run_many(
        self, programs: Sequence[Program], timeout_s: float = 5.0, workers: int | None = None
    ) -> list[Outcome]:
        """The outcomes in the programs' order; `workers` of them run at once, and never more than there are cores."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        with ThreadPoolExecutor(min(workers or cores, cores)) as pool:
            return list(pool.map(lambda program: self.run(program, timeout_s), programs))

    def _way(self) -> Way:
        trial = Program("from fractions import Fraction as f", "f", "def check(f):\n    assert f('1/2') == 0.5\n")
        found: tuple[Way, ...] = ("bubblewrap", "namespaces") if shutil.which("bwrap") else ("namespaces",)
        failures = [] if sys.platform == "linux" else ["it needs Linux"]
        for way in found if not failures else ():
            try:
                outcome = self._run(trial, START_S, way)
                if outcome.passed:
                    return way
                failures.append(f"{way}: {outcome.reason}")
            except SandboxUnavailable as error:
                failures.append(f"{way}: {error}")
        raise SandboxUnavailable(f"this machine cannot shut in what a model wrote ({'; '.join(failures)}). {_ADVICE}")

    def _run(self, program: Program, timeout_s: float, way: Way) -> Outcome:
        with ExitStack() as stack:
            lifeline_there, lifeline = _pipe(stack)
            output, output_there = _pipe(stack)
            verdict, verdict_there = _pipe(stack)
            there = (lifeline_there, output_there, verdict_there)
            task = stack.enter_context(tempfile.TemporaryFile())
            task.write(json.dumps(asdict(program)).encode())
            task.seek(0)
            readable, links = _shown()
            settings = {
                "way": way,
                "lifeline": lifeline_there.fileno(),
                "verdict": verdict_there.fileno(),
                "readable": readable,
                "links": links,
                "devices": _DEVICES,
                "limits": asdict(self.limits) | {"cpu_s": math.ceil(timeout_s) + 1},
            }
            jail = subprocess.Popen(
                [*self._around(way), _PYTHON, "-ISu", "-Xutf8", "-c", _JAIL, json.dumps(settings)],
                stdin=task,
                stdout=output_there,
                stderr=output_there,
                pass_fds=(lifeline_there.fileno(), verdict_there.fileno()),
                env={},
                cwd="/",
                start_new_session=True,
            )
            try:
                for file in there:
                    file.close()
                return self._watch(output, verdict, timeout_s)
            finally:
                lifeline.close()  # at which the jail ends, with all that is in it
                try:
                    jail.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(jail.pid, signal.SIGKILL)
                    jail.wait()

    def _around(self, way: Way) -> list[str]:
        """The command that makes the jail, where it does not make itself."""
        if way != "bubblewrap":
            return []
        # CAP_SYS_ADMIN is for mounting /tmp with its size, after which the jail gives it up.
        options = "--die-with-parent --unshare-all --unshare-user --uid 65534 --gid 65534 --cap-add CAP_SYS_ADMIN"
        command = [shutil.which("bwrap") or "bwrap", *options.split()]
        readable, links = _shown()
        for path, target in links.items():
            command += ["--symlink", target, path]
        for path in readable:
            command += ["--ro-bind", path, path]
        for path in _DEVICES:
            command += ["--dev-bind", path, path]
        return [*command, "--dir", "/tmp", "--remount-ro", "/"]

    def _watch(self, output: FileIO, verdict: FileIO, timeout_s: float) -> Outcome:
        """Reads until the jail has said its verdict and ended, or the program ran into a limit."""
        printed, said = bytearray(), bytearray()
        limit: Limit | None = None
        began, is_ready = time.monotonic(), False
        deadline = began + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ, printed)
            selector.register(verdict, selectors.EVENT_READ, said)
            while selector.get_map() and limit is None:
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    data = os.read(key.fd, 1 << 16)
                    key.data.extend(data)
                    if not data:
                        selector.unregister(key.fileobj)
                        deadline = min(deadline, time.monotonic() + GRACE_S)  # for the other one, too
                if not is_ready and b"\n" in said:
                    began, is_ready = time.monotonic(), True
                    deadline = began + timeout_s
                if len(printed) > self.limits.output_bytes:
                    limit = "output"
                elif time.monotonic() >= deadline:
                    limit = "time" if len(selector.get_map()) == 2 else None
                    break
        seconds = time.monotonic() - began
        text = printed[: self.limits.output_bytes].decode(errors="replace")
        start, *verdicts = [json.loads(line) for line in said.splitlines()] or [{}]
        if "ready" not in start:
            late = f"a process has not started within {START_S:g} s" if limit else text.strip()
            raise SandboxUnavailable(start.get("unavailable") or late or "a process did not start")
        if verdicts and limit != "output":
            return Outcome(output=text, seconds=seconds, **verdicts[0])
        reason = {
            None: "the grader ended without a verdict",
            "time": f"no end within {timeout_s:g} s",
            "output": f"more than {self.limits.output_bytes:,} bytes of output",
        }[limit]
        return Outcome(False, reason, limit, text, seconds)


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading)), stack.enter_context(FileIO(writing, "w"))


def _shown() -> tuple[list[str], dict[str, str]]:
    """What of this machine's files is in the sandbox: paths, a folder before what is in it, and links by their path."""
    paths = {*_LIBRARIES, sys.base_prefix, sys.base_exec_prefix, os.path.realpath(sys.base_prefix)}
    links = {path: os.readlink(path) for path in _LIBRARIES if os.path.islink(path)}  # /lib, where it is usr/lib
    return sorted((path for path in paths - links.keys() if os.path.exists(path)), key=len), links
