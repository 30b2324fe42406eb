"""Packed rows on disk, and the order in which training visits them.

A directory holds row files `00000-000.tokens` (little-endian uint16 or uint32, rows one after another, at most
FILE_BYTES), where there is a loss mask `00000-000.mask` (uint8), and `rows.json`, written last, which lists them.

Which rows make up a step is a pure function of (seed, step): the same for every number of workers, and resuming needs
nothing but the step. An epoch visits file after file, the first epoch as they are listed and the others in an order of
their own, and the rows of a file in a random order. So files can be read one after the other, and the first epoch can
begin before the last file is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROWS_FILE = "rows.json"
FILE_BYTES = 64 << 20
OPEN_FILES = 16  # each takes a file descriptor
POLL_SECONDS = 1.0

Index = dict[str, Any]  # what RowFiles says


class RowFiles(BaseModel):
    """The rows of a directory; `files` has the name without its suffix, and the rows, of each."""

    model_config = ConfigDict(extra="forbid")

    row_len: Annotated[int, Field(strict=True, gt=1, le=1 << 24)]
    dtype: Literal["<u2", "<u4"]
    masked: Annotated[bool, Field(strict=True)]
    complete: Annotated[bool, Field(strict=True)]
    files: list[tuple[Annotated[str, Field(pattern=r"^[\w-]+$")], Annotated[int, Field(strict=True, ge=0, le=1 << 40)]]]


class RowWriter:
    """Writes rows of `row_len` ids into a directory, as files that begin with `name`; nothing is readable before
    `close`."""

    def __init__(self, directory: Path, row_len: int, vocab_size: int, masked: bool, name: str = "00000") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name = directory, name
        self._row_len, self._vocab_size = row_len, vocab_size
        self._dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self._suffixes = (".tokens", ".mask") if masked else (".tokens",)
        self._most = max(1, FILE_BYTES // (row_len * np.dtype(self._dtype).itemsize))
        self._files: list[Any] = []
        self._written: list[list[Any]] = []

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append one row: ids (row_len,), and the mask (row_len,) of a masked set."""
        masked = len(self._suffixes) == 2
        if ids.shape != (self._row_len,) or (masked and (mask is None or mask.shape != ids.shape)):
            raise ValueError(f"a row must be ({self._row_len},) ids, with a mask in a masked set; got {ids.shape} ids")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(f"a row holds ids {ids.min()} to {ids.max()}; the vocabulary is {self._vocab_size}")
        if not self._written or self._written[-1][1] == self._most:
            self._finish_file()
            stem = f"{self._name}-{len(self._written):03d}"
            self._files = [(self._directory / f"{stem}{suffix}").open("wb") for suffix in self._suffixes]
            self._written.append([stem, 0])
        self._files[0].write(ids.astype(self._dtype).tobytes())
        if masked and mask is not None:
            self._files[1].write(mask.astype(np.uint8).tobytes())
        self._written[-1][1] += 1

    def close(self) -> Index:
        """Finish, and write `rows.json`, which makes the rows readable; returns what it holds."""
        self._finish_file()
        index = {"row_len": self._row_len, "dtype": self._dtype, "masked": len(self._suffixes) == 2, "complete": True}
        index["files"] = self._written
        write_index(self._directory, index)
        return index

    def _finish_file(self) -> None:
        for file in self._files:
            file.close()


def write_index(directory: Path, index: Index) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ROWS_FILE).write_text(json.dumps(index, sort_keys=True) + "\n", encoding="utf-8")


class Rows:
    """The rows of a directory, each file memory-mapped when it is first read. `read` gives int64 ids; no mask means
    that every target counts.

    `fetch(name)` makes a file of the directory available and returns its path; unset: they are there. `index()` returns
    what is listed by now, for rows that are still being made: `step_rows` then waits for those it needs. With
    `vocab_size`, `read` raises ValueError for ids beyond it.
    """

    def __init__(
        self,
        directory: Path,
        fetch: Callable[[str], Path] | None = None,
        index: Callable[[], Index] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._directory, self._vocab_size = directory, vocab_size
        self._fetch = fetch or directory.joinpath
        self._index = index or (lambda: read_index(self._fetch(ROWS_FILE)))
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._open = lru_cache(OPEN_FILES)(self._map)
        self._permutation = lru_cache(OPEN_FILES)(_permutation)
        self._coming: int | None = None
        self._refresh()

    def _refresh(self) -> None:
        index = self._index()
        self.row_len: int = index["row_len"]
        self.masked: bool = index["masked"]
        self._dtype: str = index["dtype"]
        self._complete: bool = index["complete"]
        self._files: list[tuple[str, int]] = [(name, count) for name, count in index["files"] if count]
        self._starts = np.cumsum([0, *(count for _, count in self._files)])

    @property
    def num_rows(self) -> int:
        """The rows there are; waits for the last one where they are still being made."""
        self._wait(lambda: self._complete)
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids (n, row_len) int64 and mask (n, row_len) uint8 or None, of the rows `indices` (n,)."""
        files = np.searchsorted(self._starts, indices, side="right") - 1
        ids = np.empty((len(indices), self.row_len), dtype=np.int64)
        mask = np.empty(ids.shape, dtype=np.uint8) if self.masked else None
        for file in np.unique(files):
            at = files == file
            rows = indices[at] - self._starts[file]
            ids[at] = self._open(int(file), ".tokens", self._dtype)[rows]
            if mask is not None:
                mask[at] = self._open(int(file), ".mask", "u1")[rows]
        if self._vocab_size is not None:  # a GPU would end in an assertion of its own
            check_ids(ids, self._vocab_size, str(self._directory))
        return ids, mask

    def step_rows(self, seed: int, step: int, rows_per_step: int) -> np.ndarray:
        """Indices (rows_per_step,) of the rows of `step`.

        Each epoch visits every row once in a fresh order drawn from (seed, epoch); steps run on over its end.
        """
        places = step * rows_per_step + np.arange(rows_per_step)
        self._wait(lambda: self._complete or places[-1] < self._starts[-1])
        if not self._complete:  # all of it lies in the first epoch
            return self._epoch_rows(seed, 0, places)
        if not self._files:
            raise ValueError("there are no rows to train on; the documents fill not even one row")
        epochs, places = np.divmod(places, self._starts[-1])
        return np.concatenate([self._epoch_rows(seed, int(e), places[epochs == e]) for e in np.unique(epochs)])

    def _epoch_rows(self, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
        order = np.arange(len(self._files)) if epoch == 0 else self._permutation(seed, epoch, -1, len(self._files))
        counts = np.diff(self._starts)[order]
        ends = np.cumsum(counts)
        rows = np.empty_like(places)
        visited = np.searchsorted(ends, places, side="right")
        for i in np.unique(visited):
            at, file = visited == i, int(order[i])
            own = self._permutation(seed, epoch, file, int(counts[i]))
            rows[at] = self._starts[file] + own[places[at] - (ends[i] - counts[i])]
        if visited[-1] + 1 < len(order):
            self._prefetch(int(order[visited[-1] + 1]))
        return rows

    def _prefetch(self, file: int) -> None:
        if file != self._coming:
            self._coming = file
            for suffix in (".tokens", ".mask") if self.masked else (".tokens",):
                self._ahead.submit(self._fetch, self._files[file][0] + suffix)

    def _wait(self, there: Callable[[], bool]) -> None:
        while not there():
            time.sleep(POLL_SECONDS)
            self._refresh()

    def _map(self, file: int, suffix: str, dtype: str) -> np.ndarray:
        name, count = self._files[file]
        path = self._fetch(name + suffix)
        expected = count * self.row_len * np.dtype(dtype).itemsize
        actual = path.stat().st_size if path.is_file() else 0
        if actual != expected:
            raise ValueError(f"{path} has {actual} bytes, not {expected}: the rows are damaged; run ingest again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count, self.row_len))


def read_index(path: Path) -> Index:
    """What `write_index` wrote. Raises FileNotFoundError, or ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} holds no finished rows; run the ingest stage")
    try:
        return RowFiles.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fault = f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    except (ValueError, RecursionError):
        fault = "it is no JSON"
    raise ValueError(f"{path} does not list rows ({fault}): the rows are damaged; run the stage that made them again")


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises ValueError where ids, of rows in `where`, are none of the vocabulary."""
    if ids.max(initial=0) >= vocab_size:
        raise ValueError(
            f"{where} holds the id {ids.max()}, and the vocabulary is {vocab_size}: the rows are damaged; run the "
            "stage that made them again"
        )


def _permutation(seed: int, epoch: int, file: int, count: int) -> np.ndarray:
    """A random order of `count` things; file -1 stands for the order of the files."""
    key = np.array([seed % (1 << 64), (epoch << 32) + file + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
