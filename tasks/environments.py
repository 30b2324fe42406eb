"""A user's own environment: one Python file, run in a process of its own (`tasks.host`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, get_args

from pydantic import BaseModel, ConfigDict

from corpus.synthetic import Split
from tasks.base import Problem, Tool

LONGEST = 1 << 20  # characters of a file
GRACE = 5.0  # seconds, beyond a call's, in which the process must have said where it was


class EnvironmentFault(ValueError):
    """An environment's own code failed; the message names its file and the line."""


class EnvironmentFile(BaseModel):
    """An environment's Python file. It travels with its text, as other machines may not have it.

    Only `read` opens a file, for a path that the user gives: what is read back from storage may name any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    text: str

    @classmethod
    def read(cls, path: str) -> EnvironmentFile:
        """The file at `path`. Raises ValueError for one that cannot be used."""
        place = os.path.expanduser(path)
        try:
            if not stat.S_ISREG(os.stat(place).st_mode):
                raise ValueError("it is no regular file")  # a pipe would be waited for
            with open(place, encoding="utf-8") as stream:
                text = stream.read(LONGEST + 1)
            if len(text) > LONGEST:
                raise ValueError(f"it has more than {LONGEST:,} characters")
        except (OSError, ValueError) as error:
            raise ValueError(f"this must be a Python file that can be read: {error}") from error
        return cls(path=path, text=text)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, which the grades depend on wherever the file lies."""
        return hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    dump: IO[bytes]  # where faulthandler writes


@dataclass
class FileEnvironment:
    """The environment of a file, run in a child process that starts with the first call.

    A call that raises, returns what it must not, ends its process or takes more than `timeout` seconds, even while it
    holds the GIL, raises EnvironmentFault. A copy made by pickling starts a child of its own.
    """

    file: EnvironmentFile
    timeout: float = 30.0
    _child: _Child | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_child": None}

    @property
    def tools(self) -> Mapping[str, Tool]:
        apart = FileEnvironment(self.file, self.timeout)  # as tools are called while others grade
        return {name: partial(apart.call, "tool", name) for name in self.call("tools")}

    def problems(self, split: Split) -> list[Problem]:
        return [Problem(**row) for row in self.call("problems", split)]

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        return self.call("render", vars(problem))

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        return self.call("grade", vars(problem), completion)

    def answer(self, completion: str) -> str | None:
        return self.call("answer", completion)

    def close(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.process.pid, signal.SIGKILL)  # with what it may have started itself
            self._child.process.wait()
            self._child.connection.close()
            self._child.dump.close()
            self._child = None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method of `tasks.host.Host` returns."""
        if self._child is None:
            self._child = self._start()
            self._ask("as it is read", self.file.path, self.file.text)
        return self._ask(arguments[0] if method == "tool" else method, method, *arguments)

    def _start(self) -> _Child:
        here, there = Pipe()
        dump = tempfile.TemporaryFile()  # noqa: SIM115
        handed = [there.fileno(), dump.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.host", *map(str, handed), str(self.timeout)],
            stdin=subprocess.DEVNULL,
            pass_fds=handed,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        there.close()
        return _Child(process, here, dump)

    def _ask(self, doing: str, *message: Any) -> Any:
        assert self._child is not None
        child, late = self._child, threading.Event()

        def give_up() -> None:  # which ends whatever sending or receiving waits for
            late.set()
            child.process.kill()

        timer = threading.Timer(self.timeout + GRACE, give_up)
        timer.start()
        try:
            child.connection.send_bytes(json.dumps(message).encode())
            reply = json.loads(child.connection.recv_bytes())
        except (EOFError, OSError):
            reply = self._end(doing, late.is_set())
        finally:
            timer.cancel()
        if "value" in reply:
            return reply["value"]
        lines = [line.strip() for line in self.file.text.splitlines()[reply["line"] - 1 : reply["line"]]]
        message_of = f"{self.file.path}, line {reply['line']}, {doing}: {reply['message']}"
        raise EnvironmentFault("\n    ".join([message_of, *lines]))

    def _end(self, doing: str, late: bool) -> dict[str, Any]:
        """The line and what there is to say of a child that did not answer, or not in time; it is gone afterwards."""
        assert self._child is not None
        try:
            status = self._child.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it closed its end and lives on
            self._child.process.kill()
            status = self._child.process.wait()
        self._child.dump.seek(0)
        dumped = self._child.dump.read().decode("ascii", "replace")
        self.close()
        # the thread that serves, innermost frame first; names are escaped as faulthandler does it
        frames = "".join(part for part in re.split(r"\n\n|(?=Thread 0x)", dumped) if "in serve" in part)
        path = re.escape(self.file.path.encode("ascii", "backslashreplace").decode())
        place = re.search(rf'File "{path}", line (\d+)', frames)
        begins = re.search(rf"^def {doing}\b", self.file.text, re.MULTILINE)
        line = int(place[1]) if place else 1 + self.file.text[: begins.start() if begins else 0].count("\n")
        if late or dumped.startswith("Timeout"):
            return {"line": line, "message": f"there is no answer within {self.timeout:g} s"}
        return {"line": line, "message": f"its process ended, with status {status}"}


def check(file: EnvironmentFile, timeout: float) -> None:
    """Calls all that the file has once, as far as that goes without a model. Raises EnvironmentFault."""
    environment = FileEnvironment(file, timeout)
    try:
        for split in get_args(Split):
            problem = environment.problems(split)[0]
            environment.render(problem)
            environment.grade(problem, "")
            environment.answer("")
    finally:
        environment.close()
