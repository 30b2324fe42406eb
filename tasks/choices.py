"""Multiple-choice questions (ARC, arXiv 1803.05457; MMLU, arXiv 2009.03300), asked and answered by letter."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from corpus.left_out import UnusableError


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
