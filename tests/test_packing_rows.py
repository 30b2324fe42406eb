"""Packing loses nothing it need not; the order of rows does not depend on who reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.packing import pack
from corpus.rows import ROWS_FILE, Rows, RowWriter

BOS, PAD = 0, 9_999
LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def numbered(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents of `bos` and then ids no other document has; the mask is 1 on odd ids."""
    documents, start = [], 1
    for length in lengths:
        ids = np.arange(start - 1, start - 1 + length)
        ids[:1] = BOS
        documents.append((ids, (ids % 2).astype(np.uint8)))
        start += length
    return documents


def runs(row: np.ndarray) -> list[tuple[int, ...]]:
    """A row cut before each bos."""
    return [tuple(int(i) for i in run) for run in np.split(row, np.flatnonzero(row == BOS)[1:])]


@given(LENGTHS, st.integers(2, 24))
def test_best_fit_rows_are_full_and_made_of_document_heads(lengths: list[int], row_len: int) -> None:
    documents = numbered(lengths)
    rows = list(pack(documents, row_len))
    pieces = {
        tuple(int(i) for i in (ids[:row_len] if start == 0 else [BOS, *ids[start : start + row_len - 1]]))
        for ids, _ in documents
        for start in [0, *range(row_len, len(ids), row_len - 1)]
        if len(ids)
    }
    for ids, mask in rows:
        assert ids.shape == mask.shape == (row_len,)
        assert ids[0] == BOS
        assert np.array_equal(mask, ids % 2)
        *whole, last = runs(ids)
        assert all(run in pieces for run in whole)
        assert any(piece[: len(last)] == last for piece in pieces)
    written = np.concatenate([ids for ids, _ in rows]) if rows else np.array([], dtype=np.int64)
    own = written[written != BOS]
    assert len(np.unique(own)) == len(own)
    # no more is lost than one crop a row and the last row
    total = sum(map(len, pieces))
    assert total - len(written) <= (len(rows) + 1) * row_len


@given(LENGTHS, st.integers(40, 60))
def test_padded_rows_keep_every_document_whole(lengths: list[int], row_len: int) -> None:
    documents = numbered(lengths)
    rows = list(pack(documents, row_len, PAD))
    found = []
    for ids, mask in rows:
        assert ids.shape == mask.shape == (row_len,)
        assert not mask[ids == PAD].any()
        found += runs(ids[ids != PAD])
    assert sorted(found) == sorted(tuple(int(i) for i in ids) for ids, _ in documents if len(ids))


@given(LENGTHS)
def test_packing_is_a_function_of_its_input(lengths: list[int]) -> None:
    first, second = (list(pack(numbered(lengths), 16)) for _ in range(2))
    assert all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_best_fit_prefers_the_longest_document_that_fits() -> None:
    rows = list(pack(((ids, None) for ids, _ in numbered([3, 7, 5, 4, 3])), 10))
    assert [[len(run) for run in runs(ids)] for ids, _ in rows] == [[7, 3], [5, 4, 1]]
    assert all(mask.all() for _, mask in rows)


def test_few_tokens_are_lost_on_many_documents() -> None:
    lengths = np.random.default_rng(0).integers(20, 900, 3_000).tolist()
    kept = sum(len(ids) for ids, _ in pack(((ids, None) for ids, _ in numbered(lengths)), 512))
    assert kept / sum(lengths) > 0.97


def write(directory: Path, rows: np.ndarray, vocab_size: int, masked: bool = False, cuts: Sequence[int] = ()) -> Rows:
    """`rows` in shards that end at `cuts`: each is written alone and then joined to the others, as ingest does."""
    index, counts = {}, []
    for i, shard in enumerate(np.split(rows, cuts)):
        writer = RowWriter(directory / "alone", rows.shape[1], vocab_size, masked)
        for row in shard:
            writer.add(row, (row % 2).astype(np.uint8) if masked else None)
        writer.close()
        index = json.loads((directory / "alone" / ROWS_FILE).read_text())
        counts += index["shards"]
        for file in (directory / "alone").glob("00000.*"):
            file.rename((directory / f"{i:05d}").with_suffix(file.suffix))
    (directory / ROWS_FILE).write_text(json.dumps(index | {"shards": counts}))
    return Rows(directory)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_read_back_what_was_written(tmp_path: Path, vocab_size: int, itemsize: int, masked: bool) -> None:
    written = np.random.default_rng(0).integers(0, vocab_size, (11, 9))
    written[0, 0] = vocab_size - 1
    rows = write(tmp_path, written, vocab_size, masked, cuts=(4, 8))
    assert (rows.num_rows, rows.row_len, rows.masked) == (11, 9, masked)
    assert (tmp_path / "00000.tokens").stat().st_size == 4 * 9 * itemsize
    wanted = np.array([10, 0, 4, 3, 10])
    ids, mask = rows.read(wanted)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, written[wanted])
    assert mask is None if not masked else np.array_equal(mask, written[wanted] % 2)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [(0,), (3, 3), (3, 3, 3, 5), (8,), (0, 0, 8, 8)])
def test_shards_without_rows_are_passed_over(tmp_path: Path, cuts: Sequence[int], masked: bool, missing: bool) -> None:
    written = np.arange(8 * 3).reshape(8, 3)
    write(tmp_path, written, 100, masked, cuts)
    empty = [path for path in tmp_path.glob("0*") if not path.stat().st_size]
    assert len(empty) == (2 if masked else 1) * [len(shard) for shard in np.split(written, cuts)].count(0) > 0
    for path in empty if missing else []:
        path.unlink()
    rows = Rows(tmp_path)
    wanted = np.array([7, 0, 3, 2, 3, 4])
    ids, mask = rows.read(wanted)
    assert np.array_equal(ids, written[wanted])
    assert mask is None if not masked else np.array_equal(mask, written[wanted] % 2)
    assert sorted(rows.step_rows(0, 0, 8)) == list(range(8))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return write(tmp_path_factory.mktemp("rows"), np.arange(37 * 2).reshape(37, 2), 100, cuts=range(4, 37, 4))


@given(st.integers(0, 3), st.integers(0, 60), st.integers(1, 4))
def test_ranks_of_any_world_see_one_sequence(rows: Rows, seed: int, step: int, world: int) -> None:
    alone = Rows.step_rows(rows, seed, step, 12)
    share = 12 // world
    ranks = [rows.step_rows(seed, step, 12)[rank * share : (rank + 1) * share] for rank in range(world)]
    assert np.array_equal(np.concatenate(ranks), alone)


@given(st.integers(0, 3), st.integers(1, 100))
def test_every_epoch_visits_every_row_once_across_step_borders(rows: Rows, seed: int, rows_per_step: int) -> None:
    steps = -(-3 * 37 // rows_per_step)
    sequence = np.concatenate([rows.step_rows(seed, step, rows_per_step) for step in range(steps)])
    epochs = sequence[: 3 * 37].reshape(3, 37)
    assert (np.sort(epochs) == np.arange(37)).all()
    assert not np.array_equal(epochs[0], epochs[1])
    # how steps are cut does not change the sequence, nor does reading backwards
    single = [int(rows.step_rows(seed, place, 1)[0]) for place in reversed(range(len(sequence)))]
    assert single[::-1] == sequence.tolist()


def test_the_order_depends_on_the_seed(rows: Rows) -> None:
    assert not np.array_equal(rows.step_rows(0, 0, 37), rows.step_rows(1, 0, 37))


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished rows"):
        Rows(tmp_path)
    empty = write(tmp_path / "empty", np.empty((0, 4), dtype=np.int64), 100)
    with pytest.raises(ValueError, match="no rows"):
        empty.step_rows(0, 0, 1)
    with pytest.raises(ValueError, match="the vocabulary is 100"):
        write(tmp_path / "large", np.full((1, 4), 100), 100)
    write(tmp_path / "cut", np.ones((6, 4), dtype=np.int64), 100, cuts=(4,))
    with (tmp_path / "cut" / "00001.tokens").open("r+b") as file:
        file.truncate(5)
    with pytest.raises(ValueError, match=r"00001\.tokens has 5 bytes, not 16"):
        Rows(tmp_path / "cut")
