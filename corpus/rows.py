"""Packed rows on disk, and the order in which training visits them.

A directory holds `00000.tokens`, `00001.tokens`, ... (little-endian uint16 or uint32, rows one after another), where
there is a loss mask `00000.mask`, ... (uint8), and `rows.json`, written last. Which rows make up a step is a pure
function of (seed, step): the same for every number of workers, and resuming needs nothing but the step.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROWS_FILE = "rows.json"


class RowWriter:
    """Writes rows of `row_len` ids as the one shard of a directory; nothing is readable before `close`."""

    def __init__(self, directory: Path, row_len: int, vocab_size: int, masked: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._row_len = row_len
        self._vocab_size = vocab_size
        self._dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self._masked = masked
        suffixes = (".tokens", ".mask") if masked else (".tokens",)
        self._files = [(directory / f"00000{suffix}").open("wb") for suffix in suffixes]
        self._count = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append one row: ids (row_len,), and the mask (row_len,) of a masked set."""
        if ids.shape != (self._row_len,) or (self._masked and (mask is None or mask.shape != ids.shape)):
            raise ValueError(f"a row must be ({self._row_len},) ids, with a mask in a masked set; got {ids.shape} ids")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(f"a row holds ids {ids.min()} to {ids.max()}; the vocabulary is {self._vocab_size}")
        self._files[0].write(ids.astype(self._dtype).tobytes())
        if self._masked and mask is not None:
            self._files[1].write(mask.astype(np.uint8).tobytes())
        self._count += 1

    def close(self) -> None:
        """Finish the shard and write `rows.json`, which makes it readable."""
        for file in self._files:
            file.close()
        index = {"row_len": self._row_len, "dtype": self._dtype, "masked": self._masked, "shards": [self._count]}
        (self._directory / ROWS_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")


class Rows:
    """The rows of a directory, memory-mapped. `read` gives int64 ids; no mask means that every target counts."""

    def __init__(self, directory: Path) -> None:
        path = directory / ROWS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {directory} holds no finished rows; run the ingest stage")
        index = json.loads(path.read_text(encoding="utf-8"))
        self.row_len: int = index["row_len"]
        self.masked: bool = index["masked"]
        counts: list[int] = index["shards"]
        self._starts = np.cumsum([0, *counts])
        self.num_rows = int(self._starts[-1])
        self._tokens = [
            self._map(directory / f"{i:05d}.tokens", index["dtype"], count) for i, count in enumerate(counts)
        ]
        self._masks = (
            [self._map(directory / f"{i:05d}.mask", "u1", count) for i, count in enumerate(counts)]
            if self.masked
            else []
        )
        self._order: tuple[int, int, np.ndarray] | None = None

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids (n, row_len) int64 and mask (n, row_len) uint8 or None, of the rows `indices` (n,)."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        ids = np.empty((len(indices), self.row_len), dtype=np.int64)
        mask = np.empty(ids.shape, dtype=np.uint8) if self.masked else None
        for shard in np.unique(shards):
            at = shards == shard
            rows = indices[at] - self._starts[shard]
            ids[at] = self._tokens[shard][rows]
            if mask is not None:
                mask[at] = self._masks[shard][rows]
        return ids, mask

    def step_rows(self, seed: int, step: int, rows_per_step: int) -> np.ndarray:
        """Indices (rows_per_step,) of the rows of `step`.

        Each epoch visits every row once in a fresh order drawn from (seed, epoch); steps run on over its end.
        """
        if not self.num_rows:
            raise ValueError("there are no rows to train on; the documents fill not even one row")
        epochs, places = np.divmod(step * rows_per_step + np.arange(rows_per_step), self.num_rows)
        return np.concatenate([self._permutation(seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[:2] != (seed, epoch):
            key = np.array([seed % (1 << 64), epoch], dtype=np.uint64)
            self._order = (seed, epoch, np.random.Generator(np.random.Philox(key=key)).permutation(self.num_rows))
        return self._order[2]

    def _map(self, path: Path, dtype: str, count: int) -> np.ndarray:
        expected = count * self.row_len * np.dtype(dtype).itemsize
        actual = path.stat().st_size if path.is_file() else 0
        if actual != expected:
            raise ValueError(f"{path} has {actual} bytes, not {expected}: the rows are damaged; run ingest again")
        if not count:  # an empty file cannot be mapped
            return np.empty((0, self.row_len), dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", shape=(count, self.row_len))
