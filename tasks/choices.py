"""Multiple-choice questions (ARC, arXiv 1803.05457; MMLU, arXiv 2009.03300), asked and answered by letter."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase
from typing import Any

from corpus.left_out import UnusableError
from corpus.sources import below, count_records, read_records
from tasks import ranking

ORDER = 42  # seed of the order in which questions are asked


@dataclass(frozen=True)
class Question:
    """`answer` is the letter of the right choice; the choices are A, B, C and so on."""

    question: str
    choices: tuple[str, ...]
    answer: str


def question_of(record: dict[str, Any]) -> Question:
    """The question of a row of ARC or MMLU; else UnusableError naming what the row has.

    ARC: `question`, `choices` {text, label}, `answerKey`, one of the labels (A to E, or 1 to 4).
    MMLU: `question`, `choices`, `answer` from 0; in its `auxiliary_train` all that under `train`.
    """
    record = record["train"] if isinstance(record.get("train"), dict) else record
    match record:
        case {"question": str(question), "choices": {"text": list(texts), "label": list(labels)}, "answerKey": key}:
            right = labels.index(key) if key in labels else -1
        case {"question": str(question), "choices": list(texts), "answer": int(right)}:
            pass
        case _:
            keys = ", ".join(sorted(map(str, record))) or "no keys"
            raise UnusableError(
                "malformed",
                f"not a multiple-choice question: the row has {keys}; it needs `question`, `choices` and "
                "`answerKey` (ARC) or `answer` (MMLU)",
            )
    if not 0 <= right < len(texts) <= len(ascii_uppercase):
        said = f"a multiple-choice question has no right answer among its choices: {question[:80]!r}"
        raise UnusableError("malformed", said)
    return Question(question, tuple(map(str, texts)), ascii_uppercase[right])


def prompt(question: Question) -> str:
    """What the user asks."""
    # A letter at the start of its line is the same token as the letter alone, which is the answer.
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, question.choices, strict=False))
    return f"{question.question}\n\n{listed}\n\nWhich one is right? Give its letter only."


def conversation_of(record: dict[str, Any]) -> dict[str, Any]:
    """A row of ARC or MMLU as a conversation; the assistant says the letter and no more."""
    question = question_of(record)
    asked = {"role": "user", "content": prompt(question)}
    return {"messages": [asked, {"role": "assistant", "content": question.answer}]}


def first_of(folder: str, names: Sequence[str]) -> str:
    """The first of the files `names`, which may be globs, that a folder or URI has. Raises FileNotFoundError."""
    for name in names:
        spec = below(folder, name)
        try:
            count_records(spec, limit=1)
        except FileNotFoundError:
            continue
        return spec
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


@dataclass(frozen=True)
class ChoiceTask:
    """The questions of `source`, asked in a chat and answered by the letter that the model finds likeliest; a
    `tasks.ranking.RankedTask`. `split` is that of a hub dataset."""

    name: str
    source: str
    split: str
    baseline: float = 0.25
    few_shot: int = 0

    @property
    def stamp(self) -> str:
        """Changes with what is asked, wherever that is: the hub's data sets change under their names."""
        return hashlib.sha256(repr(self._questions).encode("utf-8", "replace")).hexdigest()

    @cached_property
    def _questions(self) -> list[Question]:
        """Read once, so that the answers are known by what was asked."""
        found = []
        for number, record in enumerate(read_records(self.source, self.split), 1):
            try:
                found.append(question_of(record))
            except UnusableError as error:
                raise ValueError(f"{self.source}, row {number}: {error}") from error
        random.Random(ORDER).shuffle(found)  # MMLU's are sorted by subject, and a limit would ask of one alone
        return found

    def questions(self, text: ranking.Text, limit: int | None) -> Iterator[ranking.Question]:
        for asked in self._questions[:limit]:
            before = text.prompt([{"role": "user", "content": prompt(asked)}])
            letters = ascii_uppercase[: len(asked.choices)]
            options = tuple((*before, *text.encode(letter)) for letter in letters)
            yield ranking.Question(options, (len(before),) * len(options), letters.index(asked.answer))

    def figures(self, answers: Sequence[ranking.Answer]) -> dict[str, float]:
        return ranking.accuracy([given.correct for given in answers], self.baseline)
