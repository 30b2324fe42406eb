"""The process that a user's environment runs in: a fault there ends this process at most, and has a file and a line.

`tasks.environments` starts it. It reads the environment's file and then answers one call after the other, as JSON. A
call that does not come back in time is ended by faulthandler's watchdog, which needs no part of the interpreter: it
writes down where the code was, even where that holds the GIL.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import linecache
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from numbers import Real
from types import ModuleType
from typing import Any

from tasks.base import Problem

REQUIRED = ("problems(split)", "grade(problem, completion)")
OPTIONAL: dict[str, Callable[..., Any]] = {
    "render": lambda problem: [{"role": "user", "content": problem.question}],
    "answer": lambda completion: None,
}
ROLES = ("system", "user", "assistant", "tool")


class Wrong(Exception):
    """`message` is about line `line` of the environment's file."""

    def __init__(self, line: int, message: str) -> None:
        self.line, self.message = line, message


class Host:
    """The environment of one file. Every method raises Wrong, and whatever the file's own code raises."""

    def __init__(self, path: str, text: str) -> None:
        # for tracebacks: this machine may not have the file
        linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
        module = ModuleType("environment")
        module.__file__ = path
        sys.modules[module.__name__] = module
        exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
        self._path = path
        self._figures: list[str] = []
        self._functions = OPTIONAL | vars(module)
        for signature in REQUIRED:
            if not callable(self._functions.get(signature.partition("(")[0])):
                raise Wrong(1, f"there is no function {signature}")
        self._tools = self._functions.get("tools", {})
        good = isinstance(self._tools, dict) and self._tools.keys() <= {"python"}
        if not good or not all(map(callable, self._tools.values())):
            raise Wrong(1, f'tools must be {{"python": a function}}, and is {self._tools!r:.100}')

    def tools(self) -> list[str]:
        return list(self._tools)

    def problems(self, split: str) -> list[dict[str, str]]:
        value = self._functions["problems"](split)
        good = (
            isinstance(value, list)
            and len(value) > 0
            and all(isinstance(p, Problem) and isinstance(p.question, str) and isinstance(p.answer, str) for p in value)
        )
        self._check("problems", value, good, "a list of one Problem or more, question and answer of type str")
        return [asdict(problem) for problem in value]

    def render(self, problem: dict[str, str]) -> list[dict[str, Any]]:
        value = self._functions["render"](Problem(**problem))
        good = isinstance(value, list) and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str | list) for m in value
        )
        expected = f'a list of {{"role": one of {", ".join(ROLES)}, "content": text or its parts}}'
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            good, expected = False, f"{expected}, in values that JSON has"
        self._check("render", value, good and len(value) > 0, expected)
        return list(value)

    def grade(self, problem: dict[str, str], completion: str) -> dict[str, float]:
        value = self._functions["grade"](Problem(**problem), completion)
        good = (
            isinstance(value, dict)
            and "reward" in value
            and all(
                isinstance(name, str) and isinstance(figure, Real) and math.isfinite(figure)
                for name, figure in value.items()
            )
        )
        self._check("grade", value, good, '{"reward": a finite number}, and other figures beside it')
        self._figures = self._figures or sorted(value)
        self._check("grade", value, sorted(value) == self._figures, f"the same figures always, {self._figures}")
        return {name: float(figure) for name, figure in value.items()}

    def answer(self, completion: str) -> str | None:
        value: str | None = self._functions["answer"](completion)
        self._check("answer", value, value is None or isinstance(value, str), "a str or None")
        return value

    def tool(self, name: str, call: str) -> str | None:
        value: str | None = self._tools[name](call)
        self._check(name, value, value is None or isinstance(value, str), "a str or None")
        return value

    def _check(self, name: str, value: Any, good: bool, expected: str) -> None:
        """Raises Wrong where the function begins."""
        if not good:
            function = inspect.unwrap(self._tools.get(name) or self._functions[name])
            code = getattr(function, "__code__", None)
            line = code.co_firstlineno if code is not None and code.co_filename == self._path else 1
            raise Wrong(line, f"it must return {expected}; it returned {value!r:.200}")


def fault(path: str, error: BaseException) -> dict[str, Any]:
    """{line, message}, with the innermost line of the environment's file that `error` went through."""
    if isinstance(error, Wrong):
        return {"line": error.line, "message": error.message}
    if isinstance(error, SyntaxError) and error.filename == path:
        return {"line": error.lineno or 1, "message": f"{type(error).__name__}: {error.msg}"}
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return {"line": lines[-1] if lines else 1, "message": f"{type(error).__name__}: {error}"}


def serve(connection: Connection, dump: int, timeout: float) -> None:
    """Answers (path, text) and then every (method, *arguments) with {value} or {line, message}, until no one asks."""
    host: Host | None = None
    path = ""
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, exit=True, file=dump)
        try:
            if host is None:
                path, text = message
                host, value = Host(path, text), None
            else:
                value = getattr(host, message[0])(*message[1:])
            reply = json.dumps({"value": value})
        except BaseException as error:  # SystemExit, too
            reply = json.dumps(fault(path, error))
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(reply.encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it also ends it
    faulthandler.enable(int(sys.argv[2]))
    try:
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]))
    finally:
        os._exit(0)  # whatever threads the environment has left
