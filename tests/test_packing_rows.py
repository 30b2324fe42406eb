"""Packing loses nothing it need not; the order of rows does not depend on who reads them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.packing import pack
from corpus.rows import ROWS_FILE, Rows, RowWriter, write_index
from stages.training.batches import Batches
from stages.training.parallel import World

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
def test_best_fit_rows_are_full_and_every_token_is_in_one_or_counted(lengths: list[int], row_len: int) -> None:
    documents = numbered(lengths)
    counts: Counter[str] = Counter()
    rows = list(pack(documents, row_len, "best_fit", counts=counts))
    document_of, ends = {}, set()
    for number, (ids, _) in enumerate(documents):
        document_of |= {int(i): number for i in ids[1:]}
        ends |= {int(ids[stop - 1]) for stop in [*range(row_len, len(ids), row_len - 1), len(ids)] if len(ids)}
    for ids, mask in rows:
        assert ids.shape == mask.shape == (row_len,)
        assert ids[0] == BOS
        assert np.array_equal(mask, ids % 2)
        found = runs(ids)
        for _, *own in found:  # behind each bos comes what stands together in one document
            assert own == list(range(own[0], own[0] + len(own))) if own else True
            assert len({document_of[i] for i in own}) <= 1
        assert all(run[-1] in ends for run in found[:-1]), "only the row's end cuts"
    written = np.concatenate([ids for ids, _ in rows]) if rows else np.array([], dtype=np.int64)
    own = written[written != BOS]
    assert len(np.unique(own)) == len(own)
    assert sum(lengths) + counts["repeated"] == len(written) + counts["cropped"]
    assert len(document_of) - len(own) <= counts["cropped"] < row_len


def packed_alike(length: int, row_len: int, rows: int) -> tuple[float, Counter[str]]:
    """The share of tokens left out of about so many rows of documents of one length, and the counts."""
    documents = [(np.arange(length), None)] * math.ceil(rows * row_len / length)
    counts: Counter[str] = Counter()
    counts["rows"] = sum(1 for _ in pack(documents, row_len, "best_fit", counts=counts))
    tokens = length * len(documents)
    assert tokens + counts["repeated"] == counts["rows"] * row_len + counts["cropped"]
    return counts["cropped"] / tokens, counts


def test_documents_of_any_one_length_are_kept() -> None:
    """A free place at the end of a row does not cost a whole other document."""
    cropped = {length: packed_alike(length, 2_048, rows=30)[0] for length in range(64, 4_097)}
    assert not {length: share for length, share in cropped.items() if share > 0.05}


@pytest.mark.parametrize(("length", "row_len"), [(127, 128), (2_047, 2_048), (2_047, 2_049), (1_500, 2_048)])
def test_documents_that_fit_badly_are_kept(length: int, row_len: int) -> None:
    """More documents than wait at once."""
    share, counts = packed_alike(length, row_len, rows=2_000)
    assert share < 0.001
    assert counts["repeated"] <= counts["rows"], "one cut a row"


@given(LENGTHS, st.integers(2, 24), st.booleans())
def test_concatenated_rows_are_the_documents_one_after_the_other(
    lengths: list[int], row_len: int, masked: bool
) -> None:
    documents = numbered(lengths)
    counts: Counter[str] = Counter()
    given_mask = ((ids, mask if masked else None) for ids, mask in documents)
    rows = list(pack(given_mask, row_len, "concat", counts=counts))
    stream = np.concatenate([ids for ids, _ in documents]) if documents else np.array([], dtype=np.int64)
    assert len(stream) - counts["cropped"] == len(rows) * row_len and counts["cropped"] < row_len
    if rows:
        assert np.array_equal(np.concatenate([ids for ids, _ in rows]), stream[: len(rows) * row_len])
    assert all((mask is not None and np.array_equal(mask, ids % 2)) == masked for ids, mask in rows)


@given(LENGTHS, st.integers(40, 60))
def test_padded_rows_keep_every_document_whole(lengths: list[int], row_len: int) -> None:
    documents = numbered(lengths)
    rows = list(pack(documents, row_len, "pad", PAD))
    found = []
    for ids, mask in rows:
        assert ids.shape == mask.shape == (row_len,)
        assert not mask[ids == PAD].any()
        found += runs(ids[ids != PAD])
    assert sorted(found) == sorted(tuple(int(i) for i in ids) for ids, _ in documents if len(ids))


@given(LENGTHS)
def test_packing_is_a_function_of_its_input(lengths: list[int]) -> None:
    first, second = (list(pack(numbered(lengths), 16, "best_fit")) for _ in range(2))
    assert all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_best_fit_prefers_the_longest_document_that_fits() -> None:
    rows = list(pack(((ids, None) for ids, _ in numbered([3, 7, 5, 4, 3])), 10, "best_fit"))
    assert [[len(run) for run in runs(ids)] for ids, _ in rows] == [[7, 3], [5, 4, 1]]
    assert all(mask is None for _, mask in rows)


def test_only_the_last_row_is_lost_of_many_documents() -> None:
    """More than wait at once."""
    lengths = np.random.default_rng(0).integers(20, 900, 3_000).tolist()
    counts: Counter[str] = Counter()
    rows = list(pack(((ids, None) for ids, _ in numbered(lengths)), 512, "best_fit", counts=counts))
    assert sum(lengths) + counts["repeated"] == len(rows) * 512 + counts["cropped"]
    assert counts["cropped"] < 512 and counts["repeated"] < 0.005 * sum(lengths)


def write(directory: Path, rows: np.ndarray, vocab_size: int, masked: bool = False, cuts: Sequence[int] = ()) -> Rows:
    """`rows` in shards that end at `cuts`: each is written alone and then joined to the others, as ingest does."""
    index: dict[str, Any] = {}
    for i, shard in enumerate(np.split(rows, cuts)):
        writer = RowWriter(directory, rows.shape[1], vocab_size, masked, f"{i:05d}")
        for row in shard:
            writer.add(row, (row % 2).astype(np.uint8) if masked else None)
        made = writer.close()
        index = made | {"files": index.get("files", []) + made["files"]}
    write_index(directory, index)
    return Rows(directory)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_read_back_what_was_written(tmp_path: Path, vocab_size: int, itemsize: int, masked: bool) -> None:
    written = np.random.default_rng(0).integers(0, vocab_size, (11, 9))
    written[0, 0] = vocab_size - 1
    rows = write(tmp_path, written, vocab_size, masked, cuts=(4, 8))
    assert (rows.num_rows, rows.row_len, rows.masked) == (11, 9, masked)
    assert (tmp_path / "00000-000.tokens").stat().st_size == 4 * 9 * itemsize
    wanted = np.array([10, 0, 4, 3, 10])
    ids, mask = rows.read(wanted)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, written[wanted])
    assert mask is None if not masked else np.array_equal(mask, written[wanted] % 2)


@pytest.mark.parametrize("cuts", [(0,), (3, 3), (3, 3, 3, 5), (8,), (0, 0, 8, 8)])
def test_shards_without_rows_are_passed_over(tmp_path: Path, cuts: Sequence[int]) -> None:
    written = np.arange(8 * 3).reshape(8, 3)
    rows = write(tmp_path, written, 100, False, cuts)
    wanted = np.array([7, 0, 3, 2, 3, 4])
    assert np.array_equal(rows.read(wanted)[0], written[wanted])
    assert sorted(rows.step_rows(0, 0, 8)) == list(range(8))


def test_a_large_shard_becomes_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.rows.FILE_BYTES", 3 * 5 * 2 + 1)
    written = np.arange(8 * 5).reshape(8, 5)
    rows = write(tmp_path, written, 100, masked=True)
    assert sorted(p.name for p in tmp_path.glob("*.tokens")) == [f"00000-00{i}.tokens" for i in range(3)]
    ids, mask = rows.read(np.arange(8))
    assert np.array_equal(ids, written) and np.array_equal(mask, written % 2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return write(tmp_path_factory.mktemp("rows"), np.arange(37 * 2).reshape(37, 2), 100, cuts=range(4, 37, 4))


@given(st.integers(0, 3), st.integers(0, 60), st.integers(1, 20))
def test_ranks_of_any_world_see_one_sequence(rows: Rows, seed: int, step: int, rows_per_step: int) -> None:
    """What the ranks read, joined, is what one reads alone, whether or not the rows divide among them."""
    alone = rows.read(rows.step_rows(seed, step, rows_per_step))[0]
    for size in (1, 2, 3, 4):
        read = []
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"), 1)
            ids, weights = Batches(rows, seed, rows_per_step, world).read(step)
            read.append(ids[(weights > 0).all(1)].numpy())
        assert np.array_equal(np.concatenate(read), alone)


def test_resuming_at_any_step_of_two_epochs_continues_exactly(rows: Rows) -> None:
    """The border of the epochs included: 37 rows, 5 a step."""
    world = World(0, 1, torch.device("cpu"), 1)
    steps = math.ceil(2 * 37 / 5) + 1
    whole = Batches(rows, 1, 5, world)
    unbroken = [whole.read(step)[0].numpy() for step in range(steps)]
    seen = np.concatenate(unbroken)[:, 0]
    assert (np.sort(seen[:37]) == np.sort(seen[37:74])).all() and (seen[:37] != seen[37:74]).any()
    for start in range(steps):
        resumed = Batches(rows, 1, 5, world)
        assert all(np.array_equal(resumed.read(step)[0], unbroken[step]) for step in range(start, steps))


def test_files_are_read_one_after_the_other_and_the_next_is_fetched_ahead(tmp_path: Path) -> None:
    write(tmp_path, np.arange(60 * 2).reshape(60, 2), 200, cuts=(10, 20, 30, 40, 50))
    fetched: list[str] = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        return tmp_path / name

    rows = Rows(tmp_path, fetch)
    assert fetched == ["rows.json"]
    for epoch in range(2):
        order = np.concatenate([rows.step_rows(0, epoch * 30 + step, 2) for step in range(30)])
        files = [int(row) // 10 for row in order]
        visits = [f for f, before in zip(files, [None, *files], strict=False) if f != before]
        assert sorted(visits) == list(range(6)) and (visits == sorted(visits)) == (epoch == 0)
    rows._ahead.shutdown()
    del fetched[:]
    fresh = Rows(tmp_path, fetch)
    fresh.read(fresh.step_rows(0, 0, 2))
    fresh._ahead.shutdown()
    assert set(fetched) == {"rows.json", "00000-000.tokens", "00001-000.tokens"}


def test_the_first_epoch_begins_before_the_last_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.rows.POLL_SECONDS", 0.01)
    made = write(tmp_path, np.arange(37 * 2).reshape(37, 2), 100, cuts=(10, 20, 30))
    whole = json.loads((tmp_path / ROWS_FILE).read_text())
    there = 1

    def index() -> dict[str, Any]:
        return whole | {"files": whole["files"][:there], "complete": there == 4}

    growing = Rows(tmp_path, index=index)
    assert np.array_equal(growing.step_rows(5, 0, 10), made.step_rows(5, 0, 10))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(growing.step_rows, 5, 1, 10)
        assert not wait([waiting], 0.2).done
        there = 2
        assert np.array_equal(waiting.result(5), made.step_rows(5, 1, 10))
        across = pool.submit(growing.step_rows, 5, 3, 10)  # 30 to 40 of 37: where the epoch ends must be known
        there = 3
        assert not wait([across], 0.2).done
        there = 4
        assert np.array_equal(across.result(5), made.step_rows(5, 3, 10))


@given(st.integers(0, 3), st.integers(1, 100))
def test_every_epoch_visits_every_row_once_across_step_borders(rows: Rows, seed: int, rows_per_step: int) -> None:
    steps = -(-3 * 37 // rows_per_step)
    sequence = np.concatenate([rows.step_rows(seed, step, rows_per_step) for step in range(steps)])
    epochs = sequence[: 3 * 37].reshape(3, 37)
    assert (np.sort(epochs) == np.arange(37)).all()
    assert not np.array_equal(epochs[1], epochs[2])
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
    with (tmp_path / "cut" / "00001-000.tokens").open("r+b") as file:
        file.truncate(5)
    cut = Rows(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"00001-000\.tokens has 5 bytes, not 16"):
        cut.read(np.arange(6))
