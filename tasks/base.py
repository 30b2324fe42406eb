"""What a problem is, how its solution becomes a conversation, and how an answer is graded (GSM8K's conventions)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_NUMBER = re.compile(r"[ \t]*([-+]?)[ \t]*\$?[ \t]*([-+]?)([0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)")


@dataclass(frozen=True)
class Problem:
    """`answer` is the reference solution: calculator marks `<<48/2=24>>`, a last line `#### 24`."""

    question: str
    answer: str


def conversation_of(problem: Problem) -> dict[str, Any]:
    """The problem as a conversation; each `<<48/2=24>>` becomes a call of the calculator and its result."""
    parts: list[dict[str, str]] = []
    # re.split with two groups: text, expression, result, text, expression, result, ..., text
    pieces = _MARK.split(problem.answer)
    for i, piece in enumerate(pieces):
        if piece:
            parts.append({"type": ("text", "python", "python_output")[i % 3], "text": piece})
    return {"messages": [{"role": "user", "content": problem.question}, {"role": "assistant", "content": parts}]}


def final_number(text: str) -> str | None:
    """The number after the last `####`, normalised ("1,000" -> "1000", "$5.0" -> "5"); None when there is none."""
    _, mark, tail = text.rpartition("####")
    match = _NUMBER.match(tail) if mark else None
    if match is None:
        return None
    whole, _, decimals = match[3].replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    negative = "-" in (match[1], match[2]) and number != "0"
    return f"-{number}" if negative else number


def grade(problem: Problem, completion: str) -> float:
    """1.0 when the completion's final number equals the reference's, else 0.0."""
    number = final_number(completion)
    return float(number is not None and number == final_number(problem.answer))


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file with `question` and `answer`."""
    with path.open(encoding="utf-8", newline="\n") as lines:  # questions may hold Unicode's other line breaks
        return [Problem(**json.loads(line)) for line in lines]
