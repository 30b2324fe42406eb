"""HumanEval (Chen et al., arXiv 2107.03374): functions to be written from their signature and docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from corpus.sources import read_records
from corpus.synthetic import Split
from tasks.base import Problem, Tool
from tasks.sandbox import Program, Sandbox

HUB = "hub:openai/openai_humaneval"
# Where a continuation has left the function: what the paper stops generation at, and the end of a fence.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")

_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)


_CODE = re.compile(r"^(?:import|from|def|class|@)", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """`prompt` ends in the function's docstring, `canonical_solution` goes on from there, and `test` defines
    `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def problems(source: str = HUB) -> list[Task]:
    """The problems in the order of the file.

    `source`: a folder or URI with HumanEval.jsonl.gz or the like, one such file, or `hub:openai/openai_humaneval`.
    Raises FileNotFoundError or ValueError when they cannot be read.
    """
    names = [field.name for field in fields(Task)]
    tasks = []
    for number, row in enumerate(read_records(source, "test"), 1):
        if not all(isinstance(row.get(name), str) for name in names):
            has = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "nothing"
            raise ValueError(f"{source}, row {number}: it has {has}; HumanEval's rows need {', '.join(names)}, texts")
        tasks.append(Task(**{name: row[name] for name in names}))
    if not tasks:
        raise ValueError(f"{source} has no rows")
    return tasks


def program(task: Task, completion: str) -> Program:
    """What the sandbox runs for a completion, which is a body that goes on from the prompt, as a base model writes it,
    or a whole function, alone or in a Markdown fence, as an answer in a chat has it."""
    defines = re.compile(rf"^def {re.escape(task.entry_point)}\b", re.MULTILINE).search
    goes_on = re.match(r"\n*[ \t]+\S", completion)  # indented as a body is
    blocks = (not goes_on and _FENCED.findall(completion)) or [completion]
    block = next(filter(defines, blocks), blocks[0])
    code = next(filter(defines, _python(block)), None)
    # with a whole function, the prompt gives its imports and its other functions
    rest = continuation(block) if code is None else f"\n    pass\n\n{code}"
    return Program(task.prompt + rest, task.entry_point, task.test, context=task.prompt)


def _python(text: str) -> Iterator[str]:
    """From each line on that may begin code, as many lines as are Python: an answer without a fence says something
    before and after it."""
    for start in _CODE.finditer(text):
        lines = text[start.start() :].split("\n")
        for count in range(len(lines), 0, -1):
            code = "\n".join(lines[:count])
            try:
                ast.parse(code)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            yield code
            break


def continuation(text: str) -> str:
    """`text` up to the first of STOPS."""
    return text[: min((place for place in map(text.find, STOPS) if place >= 0), default=len(text))]


class HumanEval:
    """The problems as an environment: the prompt is what the user says, and an answer is right when its function passes
    the test in the sandbox. With `unsafe` that has no walls. Grading raises SandboxUnavailable."""

    tools: Mapping[str, Tool] = {}

    def __init__(self, source: str = HUB, unsafe: bool = False) -> None:
        self._source, self._unsafe = source, unsafe

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        return {task.prompt: task for task in problems(self._source)}

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self._unsafe)

    def problems(self, split: Split) -> list[Problem]:
        return [Problem(task.prompt, f"{task.test}\n# of {task.entry_point}") for task in self._tasks.values()]

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        return [{"role": "user", "content": problem.question}]

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        return {"reward": float(self._sandbox.run(program(self._tasks[problem.question], completion)).passed)}

    def answer(self, completion: str) -> str | None:
        return None
