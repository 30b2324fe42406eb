"""How well a model predicts a text: bits a byte and perplexity a word, which compare across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tasks.ranking import Answer, Question, Text


@dataclass
class Perplexity:
    """Documents, each predicted from its beginning on; a `tasks.ranking.RankedTask` of windows.

    A window has `context` tokens: the first of a document begins with bos, each other one with the last token of the
    window before, so every token is predicted once (as lm-evaluation-harness does it). `stamp` changes with the text.
    """

    documents: Callable[[], Iterator[str]]
    context: int
    stamp: str
    name: str = "perplexity"
    baseline: float = 0.0
    few_shot: int = 0
    _bytes: int = field(default=0, init=False)
    _words: int = field(default=0, init=False)

    def questions(self, text: Text, limit: int | None) -> Iterator[Question]:
        """The windows of the first `limit` documents."""
        self._bytes = self._words = 0
        for document in islice(self.documents(), limit):
            ids = [text.bos, *text.encode(document)]
            self._bytes += len(document.encode("utf-8", "replace"))
            self._words += len(document.split())
            for start in range(0, len(ids) - 1, self.context - 1):
                yield Question((tuple(ids[start : start + self.context]),), (1,), None)

    def figures(self, answers: Sequence[Answer]) -> dict[str, float]:
        """`bpb`, bits a UTF-8 byte, and `word_perplexity`, of words between white space."""
        nats = sum(given.losses[0] * given.tokens[0] for given in answers)
        return {
            "bpb": nats / (math.log(2) * max(1, self._bytes)),
            "word_perplexity": math.exp(min(700.0, nats / max(1, self._words))),
        }
