"""What RL learns from: the protocol of an environment, and problems whose answer is a number (GSM8K's conventions)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from corpus.synthetic import Split
from tasks.calculator import calculate

Tool = Callable[[str], str | None]  # what the model wrote in its call → the result put in after it; None: no result

_MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_MINUS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # hyphens, short dashes, the minus sign itself
# A comma is within a number only where all of its groups have three digits, and no longer list goes on: else 2020,2021
# would be one number. Every run of blanks can be matched in one way only, so that a text of blanks costs no more.
_NUMBER = re.compile(
    rf"(?:([{_MINUS}+])[ \t]*+)?(?:\$[ \t]*+)?([{_MINUS}+]?)"
    r"((?:(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3})++(?!,?[0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
)
_FINAL = re.compile(rf"####[ \t]*+{_NUMBER.pattern}")


@dataclass(frozen=True)
class Problem:
    """`answer` is the reference, whatever the grader takes it for; here a solution with calculator marks `<<48/2=24>>`
    and a last line `#### 24`."""

    question: str
    answer: str


class Environment(Protocol):
    """What a model is asked and how that is graded: all that RL and evaluation know of a task."""

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The tools the model may call, by name; the only one that models know is "python". Picklable."""

    def problems(self, split: Split) -> list[Problem]:
        """The problems of "train" or "test", the same every time."""

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        """The messages of the prompt, as in `corpus.conversation`; the assistant goes on from there."""

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        """A "reward", which RL maximises and from 1 on counts as solved, and figures to report beside it: always the
        same ones, all finite."""

    def answer(self, completion: str) -> str | None:
        """What a majority of completions is asked for (maj@k); None has no vote."""


def conversation_of(problem: Problem) -> dict[str, Any]:
    """The problem as a conversation; each `<<48/2=24>>` becomes a call of the calculator and its result."""
    parts: list[dict[str, str]] = []
    # re.split with two groups: text, expression, result, text, expression, result, ..., text
    pieces = _MARK.split(problem.answer)
    for i, piece in enumerate(pieces):
        if piece:
            parts.append({"type": ("text", "python", "python_output")[i % 3], "text": piece})
    return {"messages": [{"role": "user", "content": problem.question}, {"role": "assistant", "content": parts}]}


class NumberProblems:
    """All of an environment but the problems: the question is the prompt, the calculator the tool, and the reward is
    for the number after `####`, as it is for GSM8K."""

    tools: Mapping[str, Tool] = {"python": calculate}

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        return [{"role": "user", "content": problem.question}]

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        """Strict asks for the number after `####` and is the reward; lenient takes the last number, wherever it is."""
        reference = final_number(problem.answer)
        strict = float(reference is not None and final_number(completion) == reference)
        lenient = float(reference is not None and last_number(completion) == reference)
        return {"reward": strict, "strict": strict, "lenient": lenient}

    def answer(self, completion: str) -> str | None:
        return final_number(completion)


def final_number(text: str) -> str | None:
    """The number after the first `####` that has one, as GSM8K's own extractor takes it, normalised ("1,000" -> "1000",
    "$5.0" -> "5"); None when there is none."""
    match = _FINAL.search(text)
    return _normalised(match) if match else None


def last_number(text: str) -> str | None:
    """The last number of a text, normalised as by `final_number`; None when there is none."""
    *_, match = (None, *_NUMBER.finditer(text))
    if match is None:
        return None
    is_operator = text[: match.start()].rstrip()[-1:] in (*"0123456789)%",)  # the minus of "10 - 3" is no sign
    return _normalised(match, signed=not is_operator)


def _normalised(match: re.Match[str], signed: bool = True) -> str:
    whole, _, decimals = match[3].replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    negative = signed and any(sign and sign in _MINUS for sign in (match[1], match[2])) and number != "0"
    return f"-{number}" if negative else number
