"""How well a model predicts a text: bits a byte and perplexity a word, which compare across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tasks.estimates import interval_of_ratio
from tasks.ranking import Answer, Question, Text

SCORES = ("bpb", "word_perplexity")  # what is always reported


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
    _documents: list[tuple[int, int]] = field(default_factory=list, init=False)  # windows and bytes of each
    _words: int = field(default=0, init=False)

    def questions(self, text: Text, limit: int | None) -> Iterator[Question]:
        """The windows of the first `limit` documents."""
        self._documents, self._words = [], 0
        for document in islice(self.documents(), limit):
            ids = [text.bos, *text.encode(document)]
            starts = range(0, len(ids) - 1, self.context - 1)
            self._documents.append((len(starts), len(document.encode("utf-8", "replace"))))
            self._words += len(document.split())
            for start in starts:
                yield Question((tuple(ids[start : start + self.context]),), (1,), None)

    def figures(self, answers: Sequence[Answer]) -> dict[str, float]:
        """`bpb`, bits a UTF-8 byte, with its 95% interval `low` and `high` where there is more than one document, and
        `word_perplexity`, of words between white space."""
        nats = iter([given.losses[0] * given.tokens[0] for given in answers])
        parts = [(sum(islice(nats, windows)) / math.log(2), float(size)) for windows, size in self._documents]
        bits, size = sum(bits for bits, _ in parts), sum(size for _, size in parts)
        between = interval_of_ratio(parts)
        word_perplexity = math.exp(min(700.0, bits * math.log(2) / max(1, self._words)))
        scores = dict(zip(SCORES, (bits / max(1, size), word_perplexity), strict=True))
        return scores | (dict(zip(("low", "high"), between, strict=True)) if between else {})
