"""Which documents of the corpus are held out for validation.

It is told by their order and their characters alone, so that the tokenizer, which is made before there are tokens,
leaves out the same ones.
"""

from __future__ import annotations

from corpus.sources import MAX_DOCUMENT, Document
from stages.config import DataConfig

SHARDS = 8  # documents are held out from these, the first, so that validation need not wait for all
MOST = 0.1  # a document that is more than this share of the corpus stays with what is trained on


class HeldOut:
    """Asked for the documents of shard `shard` one after the other: every (1 / data.validation_share)-th is held out,
    up to this shard's part of data.validation_chars.

    `total` is about how many characters the corpus has, None where nobody knows. The shards count from different
    numbers, so that one is held out even where each of them holds but a few.
    """

    def __init__(self, data: DataConfig, shard: int, shards: int, total: int | None) -> None:
        validating = min(shards, SHARDS)
        self._share = data.validation_share
        self._number = int(shard / self._share / validating) - 1
        self.most = self._left = data.validation_chars / validating if shard < SHARDS else 0.0  # characters
        self._largest = min(MAX_DOCUMENT // 2, MOST * total if total else MAX_DOCUMENT)
        self._last = False

    def takes(self, document: Document) -> bool:
        """Whether the next document, or piece of one, is held out; the pieces of a document stay together."""
        if document.first:
            self._number += 1
            # as long as half of MAX_DOCUMENT, it may be a piece with many more to come
            chosen = int((self._number + 1) * self._share) > int(self._number * self._share)
            chosen = chosen and len(document.text) < self._largest
            self._last = chosen and self._left > 0
        if self._last:
            self._left -= len(document.text)
        return self._last
