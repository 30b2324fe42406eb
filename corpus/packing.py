"""Documents into rows of one length, in one of three ways.

`best_fit`: every row begins with a document or a piece of one, no position is wasted, and few documents are cut.
`concat`: one document after the other, cut wherever a row ends. `pad`: every document whole, rows filled up with
padding.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

BUFFER = 1_000
Packing = Literal["best_fit", "concat", "pad"]

Document = tuple[np.ndarray, np.ndarray | None]
# (length, -order of arrival, ids, mask): of equally long documents the one that waited longest sorts last
_Entry = tuple[int, int, np.ndarray, np.ndarray | None]


def pack(
    documents: Iterable[Document], row_len: int, packing: Packing, pad_id: int = 0, counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Rows of ids (row_len,) and loss mask (row_len,) uint8 from documents (ids, mask).

    All documents have a mask, or none has, and then rows have one only under "pad". A document begins with `<|bos|>`,
    and so does, under "best_fit" and "pad", every row.

    best_fit: a row takes the longest waiting document that fits; when none does, the head of the shortest one fills it,
    and what remains waits again. Longer documents are split beforehand. Every piece but a document's first begins with
    the document's first id once more, and `counts["repeated"]` grows by one.
    pad: when none fits, the row is filled with `pad_id` and mask 0; longer documents are cropped.
    The last, incomplete row is dropped, under "pad" it is padded. `counts["cropped"]` grows by the tokens left out, so
    that under "best_fit" and "concat" the documents' tokens and those repeated are the rows' and those left out.
    """
    if row_len < 2:
        raise ValueError(f"row_len must be at least 2, got {row_len}")
    counts = Counter() if counts is None else counts
    return (
        _concat(documents, row_len, counts)
        if packing == "concat"
        else _fit(documents, row_len, packing, pad_id, counts)
    )


def _concat(documents: Iterable[Document], row_len: int, counts: Counter[str]) -> Iterator[Document]:
    waiting: list[Document] = []
    room = row_len
    for ids, mask in documents:
        while len(ids) >= room:
            yield _joined([*waiting, (ids[:room], None if mask is None else mask[:room])])
            ids, mask = ids[room:], None if mask is None else mask[room:]
            waiting, room = [], row_len
        waiting.append((ids, mask))
        room -= len(ids)
    counts["cropped"] += row_len - room


def _fit(
    documents: Iterable[Document], row_len: int, packing: Packing, pad_id: int, counts: Counter[str]
) -> Iterator[Document]:
    padding = packing == "pad"
    arriving = enumerate(_pieces(documents, row_len, not padding, counts))
    waiting: list[_Entry] = []
    row: list[Document] = []
    room = row_len
    while True:
        while len(waiting) < BUFFER and (arrival := next(arriving, None)) is not None:
            order, (piece, mask) = arrival
            bisect.insort(waiting, (len(piece), -order, piece, mask))
        if not waiting and (not padding or room == row_len):
            counts["cropped"] += row_len - room
            return
        fitting = bisect.bisect_left(waiting, (room + 1,))
        if fitting:
            length, _, piece, mask = waiting.pop(fitting - 1)
        elif padding:
            length, piece, mask = room, np.full(room, pad_id), np.zeros(room, dtype=np.uint8)
        else:  # lost, the remainder would cost documents just shorter than a row half of their tokens
            length, order, piece, mask = waiting.pop(0)
            bisect.insort(waiting, (length - room + 1, order, *_again(piece, mask, room, length, counts)))
            length, piece, mask = room, piece[:room], None if mask is None else mask[:room]
        row.append((piece, mask))
        room -= length
        if not room:
            yield _joined(row)
            row, room = [], row_len


def _pieces(documents: Iterable[Document], row_len: int, split: bool, counts: Counter[str]) -> Iterator[Document]:
    for ids, mask in documents:
        if not split and mask is None:  # padding must be told from what counts
            mask = np.ones(len(ids), dtype=np.uint8)
        if len(ids):
            yield ids[:row_len], None if mask is None else mask[:row_len]
        if not split:
            counts["cropped"] += max(0, len(ids) - row_len)
            continue
        for start in range(row_len, len(ids), row_len - 1):
            yield _again(ids, mask, start, start + row_len - 1, counts)


def _again(ids: np.ndarray, mask: np.ndarray | None, start: int, stop: int, counts: Counter[str]) -> Document:
    """The tokens from `start` to `stop`, behind the document's first once more."""
    counts["repeated"] += 1
    return _behind_first(ids, start, stop), None if mask is None else _behind_first(mask, start, stop)


def _behind_first(values: np.ndarray, start: int, stop: int) -> np.ndarray:
    piece = values[start - 1 : stop].copy()
    piece[0] = values[0]
    return piece


def _joined(parts: list[Document]) -> Document:
    masks = [mask for _, mask in parts if mask is not None]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate(masks) if masks else None
