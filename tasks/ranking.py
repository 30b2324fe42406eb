"""Questions that are answered without writing: by which of several continuations a model finds likeliest.

Three kinds, as in the DCLM paper (arXiv 2406.11794) and the evaluators after it. `multiple_choice` ranks continuations
of one context, `schema` ranks contexts of one continuation, both by the mean loss of the continuation's tokens, and
`language_modeling` asks whether every token of the continuation is the likeliest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from tasks.estimates import interval

Kind = Literal["multiple_choice", "schema", "language_modeling"]


class Text(Protocol):
    """What tasks need of a tokenizer; `bos` begins every text."""

    @property
    def bos(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a chat up to where the assistant answers. Raises ValueError for a model without a chat format."""


@dataclass(frozen=True)
class Question:
    """`options` are the token sequences to score, each from the token at its `starts` on. `gold` is the index of the
    right one; None where there is one option, which has to be the likeliest continuation token by token."""

    options: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    gold: int | None


@dataclass(frozen=True)
class Answer:
    """To one question: whether it is right, and of each option the mean loss of its scored tokens, in nats, and how
    many these are."""

    correct: bool
    losses: tuple[float, ...]
    tokens: tuple[int, ...]


def answer(asked: Question, losses: Sequence[float], greedy: bool) -> Answer:
    """Grades the losses of the options; `greedy` says that every scored token of the first was the likeliest. Of equal
    losses the first counts."""
    right = greedy if asked.gold is None else losses.index(min(losses)) == asked.gold
    tokens = (len(option) - start for option, start in zip(asked.options, asked.starts, strict=True))
    return Answer(right, tuple(losses), tuple(tokens))


class RankedTask(Protocol):
    """A task whose questions are answered by ranking. `baseline` is what guessing scores, from 0 to 1."""

    @property
    def name(self) -> str: ...

    @property
    def baseline(self) -> float: ...

    @property
    def few_shot(self) -> int: ...

    @property
    def stamp(self) -> str:
        """Changes with what is asked."""

    def questions(self, text: Text, limit: int | None) -> Iterator[Question]:
        """The first `limit` questions, in the task's order. Raises FileNotFoundError or ValueError."""

    def figures(self, answers: Sequence[Answer]) -> dict[str, float]:
        """What is reported of the task, by name."""


SCORES = ("accuracy", "low", "high", "baseline", "centered")  # what `accuracy` gives


def accuracy(correct: Sequence[bool], baseline: float) -> dict[str, float]:
    """The share that is right with its 95% interval, and on the scale on which guessing is 0 and knowing is 1."""
    share = sum(correct) / len(correct)
    low, high = interval(share, len(correct))
    return dict(zip(SCORES, (share, low, high, baseline, (share - baseline) / (1 - baseline)), strict=True))


def question(kind: Kind, prompts: Sequence[str], gold: int | None, text: Text) -> Question:
    """A question of whole texts: of every option, or for `language_modeling` the context, then context and
    continuation. Which tokens are scored is found in the tokens, as a boundary in the text may lie within one."""
    options = [(text.bos, *text.encode(prompt)) for prompt in prompts]
    if kind == "schema":
        suffix = common_prefix([option[::-1] for option in options])
        return _scored(options, [len(option) - suffix for option in options], gold)
    shared = common_prefix(options)
    if kind == "multiple_choice":
        return _scored(options, [shared] * len(options), gold)
    return _scored(options[1:], [shared], None)


def _scored(options: Sequence[tuple[int, ...]], starts: Sequence[int], gold: int | None) -> Question:
    """An option that is the beginning of another one has no token of its own: its last one is scored."""
    starts = [max(1, min(start, len(option) - 1)) for option, start in zip(options, starts, strict=True)]
    return Question(tuple(options), tuple(starts), gold)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of `sequences` have in common at their beginning."""
    columns = zip(*sequences, strict=False)
    least = min(map(len, sequences))
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), least)


def within(asked: Question, context: int) -> Question:
    """The question for a model that sees `context` tokens: a longer option keeps its last ones.

    Raises ValueError where what is scored has no room, with one token before it.
    """
    over = [max(0, len(option) - context) for option in asked.options]
    starts = tuple(start - cut for start, cut in zip(asked.starts, over, strict=True))
    if min(starts) < 1:
        longest = max(len(option) - start for option, start in zip(asked.options, asked.starts, strict=True))
        raise ValueError(f"an answer of {longest} tokens does not fit into the model's context of {context}")
    options = tuple(option[cut:] for option, cut in zip(asked.options, over, strict=True))
    return replace(asked, options=options, starts=starts)
