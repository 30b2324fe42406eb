"""Every kind of source yields its documents in one order, and a fault is one message."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus.sources import read_records, read_unit, units

ROOT = Path(__file__).parent.parent
TEXTS = ["one", "two\r\nlines", "", "dréi \u2028 日本", "  ", "five"]
KEPT = [text for text in TEXTS if text.strip()]


def write_parquet(path: Path, columns: dict[str, list], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def write_jsonl(path: Path, texts: list[str]) -> None:
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)


def documents(spec: str) -> list[str]:
    # units travel between machines as JSON
    return [text for unit in units(spec) for text in read_unit(json.loads(json.dumps(unit)))]


def test_parquet_row_groups_are_units(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": [*TEXTS, None], "id": list(range(7))})
    assert [unit["row_group"] for unit in units(str(tmp_path))] == [0, 1, 2, 3]
    assert documents(str(tmp_path)) == KEPT


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, TEXTS)
    assert documents(str(tmp_path / name)) == KEPT
    assert [row["text"] for row in read_records(str(tmp_path / name))] == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"b\r\nb")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "notes.md").write_text("not read")
    assert documents(str(tmp_path)) == ["a", "b\r\nb"]


def test_globs_directories_and_uris_name_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_1", "train_0", "val_0", "deep/er/train_2"):
        write_parquet(tmp_path / f"{name}.parquet", {"text": [name]})
    assert documents(f"{tmp_path}/train_*.parquet") == ["train_0", "train_1"]
    assert documents(f"{tmp_path}/train_[1-9].parquet") == ["train_1"]
    assert documents(f"{tmp_path}/**/train_?.parquet") == ["deep/er/train_2", "train_0", "train_1"]
    assert documents(f"{tmp_path}/*/*/*.parquet") == ["deep/er/train_2"]
    assert documents(f"file://{tmp_path}/train_*.parquet") == ["train_0", "train_1"]
    assert documents(f"{tmp_path}/") == ["deep/er/train_2", "train_0", "train_1", "val_0"]
    monkeypatch.chdir(tmp_path)
    assert documents("train_*.parquet") == documents("./train_*.parquet") == ["train_0", "train_1"]


def test_units_of_a_relative_path_work_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    found = units("a.txt")
    monkeypatch.chdir("/")
    assert [text for unit in found for text in read_unit(unit)] == ["a"]


def test_the_synthetic_corpus_does_not_depend_on_who_reads_which_unit() -> None:
    found = units("synthetic", documents=2_500, seed=3)
    assert [unit["count"] for unit in found] == [1_000, 1_000, 500]
    backwards = [list(read_unit(unit)) for unit in reversed(found)]
    assert backwards[::-1] == [list(read_unit(unit)) for unit in found]
    assert sum(map(len, backwards)) == 2_500


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "x"} for i in range(5)]
    write_parquet(tmp_path / "chat.parquet", {"prompt": [r["prompt"] for r in rows], "response": ["x"] * 5})
    assert list(read_records(str(tmp_path / "chat.parquet"))) == rows


def test_novels_are_read(shared_data: Path) -> None:
    found = units(str(shared_data / "novels" / "val_*.parquet"))
    assert sum(1 for unit in found for _ in read_unit(unit)) == 400


@pytest.mark.parametrize("spec", ["{}/*.parquet", "{}/nowhere", "{}", "{}/nowhere/*.txt"])
def test_a_corpus_that_matches_nothing_is_named(tmp_path: Path, spec: str) -> None:
    spec = spec.format(tmp_path)
    with pytest.raises(FileNotFoundError, match="matches no file") as error:
        units(spec)
    assert spec in str(error.value)


def test_parquet_without_text_names_the_file_and_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet has no string column `text`; its columns are body .*, id"):
        units(str(tmp_path))
    write_parquet(tmp_path / "a.parquet", {"text": [1]})
    with pytest.raises(ValueError, match=r"text \(int64\)"):
        units(str(tmp_path))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is not readable Parquet"):
        units(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot read near line 2"):
        documents(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="not a JSON object"):
        documents(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: a row has no string column `text`; its columns are body"):
        documents(str(tmp_path / "a.jsonl"))
    write_jsonl(tmp_path / "b.jsonl.gz", TEXTS * 100)
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "b.jsonl.gz").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: cannot read"):
        documents(str(tmp_path / "b.jsonl.gz"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        documents(str(tmp_path / "a.txt"))
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"a\.csv is of no known kind"):
        units(str(tmp_path / "a.csv"))


def test_locations_nobody_can_read_are_refused() -> None:
    with pytest.raises(ValueError, match="ftp://host/x is not a location"):
        units("ftp://host/x")


def offline(program: str, home: Path, *arguments: str) -> str:
    """Output of a program in a new interpreter: the hub's library reads its settings when it is imported."""
    program = f"import sys, json; from corpus.sources import read_records, read_unit, units; {program}"
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hub_datasets_are_read_a_file_a_unit(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", {"text": TEXTS})
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", {"text": ["six", "seven"]})
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", {"text": ["held out"]})
    program = (
        "found = json.loads(json.dumps(units(sys.argv[1]))); rows = read_records(sys.argv[1], 'test')\n"
        "print(json.dumps([[list(read_unit(unit)) for unit in found], list(rows)]))"
    )
    read = json.loads(offline(program, tmp_path / "home", f"hub:{tmp_path}/set"))
    assert read == [[KEPT, ["six", "seven"]], [{"text": "held out"}]]


def test_a_hub_that_is_out_of_reach_says_what_to_do(tmp_path: Path) -> None:
    program = (
        "\nfor read in (units, lambda spec: next(read_records(spec))):"
        "\n    try: read('hub:nobody/nothing')"
        "\n    except ValueError as error: print(error)"
    )
    messages = offline(program, tmp_path / "home").splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("hub:nobody/nothing (split train) cannot be loaded: ")
        assert message.endswith("check the name and the network, or give files instead")
