"""Documents into rows of one length: best fit, so that few documents are cut and no position is wasted."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import numpy as np

BUFFER = 1_000

Document = tuple[np.ndarray, np.ndarray | None]
# (length, -order of arrival, ids, mask): of equally long documents the one that waited longest sorts last
_Entry = tuple[int, int, np.ndarray, np.ndarray]


def pack(
    documents: Iterable[Document], row_len: int, pad_id: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of ids (row_len,) and loss mask (row_len,) uint8 from documents (ids, mask or None for all ones).

    Every document, and so every row, begins with `<|bos|>`. A row takes the longest waiting document that fits;
    when none does, the shortest one is cropped to fill the row, or, with `pad_id`, the tail is padded with mask 0.
    Longer documents are split beforehand into pieces that each begin with the document's first id; with `pad_id`
    they are cropped. The last, incomplete row is dropped, or padded with `pad_id`.
    """
    if row_len < 2:
        raise ValueError(f"row_len must be at least 2, got {row_len}")
    arriving = enumerate(_pieces(documents, row_len, split=pad_id is None))
    waiting: list[_Entry] = []
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    room = row_len
    while True:
        while len(waiting) < BUFFER and (arrival := next(arriving, None)) is not None:
            order, (piece, mask) = arrival
            bisect.insort(waiting, (len(piece), -order, piece, mask))
        if not waiting and (pad_id is None or room == row_len):
            return
        fitting = bisect.bisect_right(waiting, room, key=lambda entry: entry[0])
        if fitting:
            _, _, piece, mask = waiting.pop(fitting - 1)
        elif pad_id is None:
            _, _, piece, mask = waiting.pop(0)
        else:
            piece, mask = np.full(room, pad_id), np.zeros(room, dtype=np.uint8)
        ids.append(piece[:room])
        masks.append(mask[:room])
        room -= len(ids[-1])
        if not room:
            yield np.concatenate(ids), np.concatenate(masks)
            ids, masks, room = [], [], row_len


def _pieces(documents: Iterable[Document], row_len: int, split: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for ids, mask in documents:
        if mask is None:
            mask = np.ones(len(ids), dtype=np.uint8)
        yield from [(ids[:row_len], mask[:row_len])] if len(ids) else []
        for start in range(row_len, len(ids) if split else 0, row_len - 1):
            stop = start + row_len - 1
            yield np.concatenate([ids[:1], ids[start:stop]]), np.concatenate([mask[:1], mask[start:stop]])
