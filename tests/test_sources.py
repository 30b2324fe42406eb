"""Every kind of source streams its documents in one order; a bad document is counted, and a bad file is one message."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import served
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import sources
from corpus.sources import Document, count_records, read_records, read_unit, shards_needed, skipped_files, units

ROOT = Path(__file__).parent.parent
TEXTS = ["one", "two\r\nlines", "", "dréi \u2028 日本", "  ", "five"]
KEPT = [text for text in TEXTS if text.strip()]
NOT_UTF8 = b"caf\xe9 au lait"


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_lines(path: Path, lines: list[bytes]) -> Path:
    data = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write_lines(path, [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts])


def strings(values: list[bytes]) -> pa.Array:
    """A string column of any bytes, UTF-8 or not."""
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + len(value))
    buffers = [None, pa.py_buffer(bytes(pa.array(offsets, pa.int32()).buffers()[1])), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def read(spec: str | Path, **options: Any) -> tuple[list[Document], Counter[str]]:
    """A corpus's documents and what was counted; read twice, because ingest does."""
    found = json.loads(json.dumps(units(str(spec), **options)))  # units travel between machines as JSON
    counts: Counter[str] = Counter()
    read = [document for unit in found for document in read_unit(unit, counts)]
    assert read == [document for unit in found for document in read_unit(unit)]
    return read, counts


def documents(spec: str | Path, **options: Any) -> list[str]:
    return [document.text for document in read(spec, **options)[0]]


def test_parquet_row_groups_are_units(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [*TEXTS, None], "id": list(range(7))})
    assert [unit["row_group"] for unit in units(str(tmp_path))] == [0, 1, 2, 3]
    found, counts = read(path)
    assert found == [Document(text, str(path), TEXTS.index(text) + 1) for text in KEPT]
    assert counts == {"empty": 2, "null": 1}


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_column_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "b"], None if pa.types.is_dictionary(kind) else kind)
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    write_parquet(tmp_path / "a.parquet", {"body": column, "text": [{"text": "x"}] * 3})
    assert documents(tmp_path, text_column="body") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, TEXTS)
    found, counts = read(path)
    assert found == [Document(text, str(path), TEXTS.index(text) + 1) for text in KEPT]
    assert counts == {"empty": 2}
    assert [row["text"] for row in read_records(str(path))] == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\nb")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "notes.md").write_text("not read")
    found, counts = read(tmp_path)
    assert found == [Document("a", f"{tmp_path}/a.txt", 1), Document("b\r\nb", f"{tmp_path}/b.txt", 1)]
    assert counts == {"empty": 1}


LINES = st.lists(st.one_of(st.text(max_size=20).map(lambda text: json.dumps({"text": text})), st.just("?")), max_size=8)


@settings(max_examples=60)
@given(LINES, st.integers(1, 60), st.booleans())
def test_byte_ranges_of_jsonl_are_the_file(lines: list[str], unit_bytes: int, ends: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.jsonl"
        path.write_bytes("\n".join(['{"text": "first"}', *lines]).encode() + b"\n" * ends)
        whole, parts = read(path), read(path, unit_bytes=unit_bytes)
        assert [document.text for document in parts[0]] == [document.text for document in whole[0]]
        assert parts[1] == whole[1]
        sizes = [unit["bytes"] for unit in units(str(path), unit_bytes=unit_bytes)]
        assert sum(sizes) == path.stat().st_size and max(sizes) <= unit_bytes
        for document in parts[0]:
            start = int((re.findall(r"from byte ([\d,]+)\)$", document.source) or ["0"])[0].replace(",", ""))
            line = path.read_bytes()[start - 1 if start else 0 :].split(b"\n")[document.line - (0 if start else 1)]
            assert json.loads(line)["text"] == document.text


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"te', b'{"text": "kept"}', b"[1]", b'{"text": null}', b'{"text": 5}', b"{}", b'{"text": " \\n"}', b"",
        b'{"text": "' + NOT_UTF8 + b'"}', b'{"text": "\\ud800"}', b'{"text": "a\\u0000b"}',
        b'{"text": "\\u0001\\u0002ab"}',
        b"[" * 100_000,
        b'{"text": "\xe2\x80\xa8 last"}',
    ]  # fmt: skip
    found, counts = read(write_lines(tmp_path / "a.jsonl", lines))
    assert [(document.text, document.line) for document in found] == [("kept", 2), ("\u2028 last", len(lines))]
    assert counts == {
        **{"not_json": 3, "null": 1, "not_text": 1, "no_column": 1, "empty": 1, "invalid_utf8": 2, "binary": 2}
    }


def test_a_line_too_long_to_be_parsed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 30)
    monkeypatch.setattr(sources, "READ_BYTES", 16)
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b" * 100, "c" * 17, "d"])
    for unit_bytes in (1_000, 50, 20, 7):
        found, counts = read(path, unit_bytes=unit_bytes)
        assert [document.text for document in found] == ["a", "c" * 17, "d"]
        assert counts == {"too_long": 1}


@pytest.mark.parametrize("batch_bytes", [1, 1 << 20])
def test_bad_values_in_parquet_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", batch_bytes)
    values = [b"one", NOT_UTF8, b"", b"a\0b", "dréi".encode()]
    found, counts = read(write_parquet(tmp_path / "a.parquet", {"text": strings(values)}, row_group_size=10))
    assert [(document.text, document.line) for document in found] == [("one", 1), ("dréi", 5)]
    assert counts == {"invalid_utf8": 1, "empty": 1, "binary": 1}
    nothing, counts = read(write_parquet(tmp_path / "b.parquet", {"text": pa.array([None, None])}))
    assert not nothing and counts == {"null": 2}


def test_a_bad_value_of_a_dictionary_or_view_is_counted_as_any(tmp_path: Path) -> None:
    values = strings([b"one", NOT_UTF8 * 3, "dréi".encode()])
    view = pa.Array.from_buffers(pa.string_view(), 3, values.cast(pa.binary()).cast(pa.binary_view()).buffers())
    of_values = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 0]), values)
    for column, lines in ((of_values, [1, 4, 5]), (view, [1, 3])):
        found, counts = read(write_parquet(tmp_path / "a.parquet", {"text": column}, row_group_size=10))
        texts = ["one", "dréi", "one"][: len(lines)]
        assert [(document.text, document.line) for document in found] == list(zip(texts, lines, strict=True))
        assert counts == ({"invalid_utf8": 1, "null": 1} if column is of_values else {"invalid_utf8": 1})


def test_columns_of_one_name_are_refused_with_the_file(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    for failing in (units, lambda spec: list(read_records(spec))):
        with pytest.raises(ValueError, match=r"a\.parquet has several columns named text,"):
            failing(str(tmp_path))
    assert documents(tmp_path, text_column="body") == ["c"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(path.read_bytes() * 2),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "new": lambda path: os.utime(path, ns=(0, 0)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_changes_is_named_before_and_while_it_is_read(tmp_path: Path, name: str, change: str) -> None:
    path, texts = tmp_path / name, [f"{i} words" for i in range(40)]
    for begun in (False, True):
        if name == "a.txt":
            path.write_text("words")
        else:
            write_parquet(path, {"text": texts}, 40) if name == "a.parquet" else write_jsonl(path, texts)
        reading = read_unit(units(str(path), unit_bytes=100)[-1])
        if begun:
            next(reading)
        CHANGES[change](path)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not what it was.*run the same command"):
            list(reading)


def test_bad_text_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(NOT_UTF8)
    (tmp_path / "b.txt").write_bytes(b"PK\0\1")
    (tmp_path / "c.txt").write_bytes(b"\n \n")
    found, counts = read(tmp_path)
    assert not found and counts == {"invalid_utf8": 1, "binary": 1, "empty": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zst", "a.parquet"])
def test_a_document_of_50_mb_comes_in_pieces(tmp_path: Path, name: str) -> None:
    text = "".join(f"{i} and some words\n" for i in range(2_500_000))
    assert len(text) > 50_000_000
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    elif name == "a.parquet":
        write_parquet(tmp_path / name, {"text": ["short", text]})
    else:
        write_jsonl(tmp_path / name, ["short", text])
    counts: Counter[str] = Counter()
    found = [document for unit in units(str(tmp_path), text_documents="file") for document in read_unit(unit, counts)]
    pieces = [document for document in found if document.text != "short"]
    assert "".join(piece.text for piece in pieces) == text and counts == {"split": 1}
    assert all(len(piece.text) <= sources.MAX_DOCUMENT and piece.text.endswith("\n") for piece in pieces)
    if name == "a.txt":
        assert all(piece.text.startswith(f"{piece.line - 1} ") for piece in pieces)
    else:
        assert {piece.line for piece in pieces} == {2}


@settings(max_examples=60)
@given(st.text(st.sampled_from("ab \n日"), min_size=1, max_size=80).filter(str.strip), st.integers(2, 20))
def test_pieces_put_together_are_the_document(text: str, limit: int) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MAX_DOCUMENT", limit)
        path = write_jsonl(Path(directory) / "a.jsonl", [text])
        pieces, counts = read(path)
        assert "".join(piece.text for piece in pieces) == text
        assert all(len(piece.text) <= limit for piece in pieces)
        assert counts == ({"split": 1} if len(text) > limit else {})
        (Path(directory) / "a.txt").write_text(text)
        streamed, counts = read(Path(directory) / "a.txt", text_documents="file")
        assert [piece.text for piece in streamed] == [piece.text for piece in pieces if piece.text.strip()]
        assert counts["split"] == (len(text) > limit)


def test_a_bad_byte_in_a_huge_text_file_costs_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 100)
    (tmp_path / "a.txt").write_bytes(b"words\n" * 100 + b"\xff\n" + b"words\n" * 100)
    found, counts = read(tmp_path, text_documents="file")
    assert counts == {"split": 1, "invalid_utf8": 1}
    assert sum(len(document.text) for document in found) >= 1_202 - 100


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["to be", "or not", "", "", " \t", "a longer line of words", "y" * 90]), max_size=40),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["paragraphs", "lines"]),
)
def test_a_text_file_is_cut_at_blank_lines_or_line_ends(lines: list[str], end: str, mode: str) -> None:
    """Nothing is lost but blank lines, and a place in the text is known by its line."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "TEXT_CHARS", 50)
        patch.setattr(sources, "MAX_DOCUMENT", 64 if mode == "lines" else 1 << 20)
        path = Path(directory) / "a.txt"
        path.write_text(end.join(lines), newline="")
        found, counts = read(path, text_documents=mode)
    texts = [document.text for document in found]
    said = "".join(line for line in lines if line.strip())
    assert re.sub(r"\s", "", "".join(texts)) == re.sub(r"\s", "", said)
    assert counts == ({} if said else {"empty": 1}) and all(document.first for document in found)
    for document in found:
        begins = document.text.splitlines()[0]
        assert begins.strip() and begins.strip() in lines[document.line - 1]
    if mode == "lines":
        assert sum(len(text) < 64 for text in texts) >= len([line for line in lines if line.strip() and len(line) < 64])
        return
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip())
    assert all(len(text) <= 50 for text in texts)
    if all(len(end.join(p.split("\n"))) <= 40 for p in paragraphs):  # none must be cut itself
        ends = [set(accumulate(len(re.sub(r"\s", "", text)) for text in cut)) for cut in (texts, paragraphs)]
        assert ends[0] <= ends[1]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = "some words of the text and a line end here\n"
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(200):
            file.write(text * 25_000)
    column = pa.array([f"{i} {text * 12_000}" for i in range(400)])
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet", write_batch_size=1)
    program = (
        # ru_maxrss would begin with the peak of the process that started this one
        "peak = lambda: int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) >> 10; start = peak()\n"
        "n = sum(len(d.text) for unit in units(sys.argv[1]) for d in read_unit(unit)); print(n, peak() - start)"
    )
    characters, growth = map(int, run_python(program, str(tmp_path)).split())
    assert characters > 380_000_000
    assert growth < 150  # MiB


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


@pytest.mark.parametrize("folder", ["a[1]", "b?", "*", "[", "[!x]*", "a b"])
def test_a_name_that_is_there_is_no_glob(tmp_path: Path, folder: str) -> None:
    """Of a folder, of one on the way, and of a file; where nothing has just this name, it is a glob as ever."""
    for name in (folder, "a1", "bb", "c"):
        (tmp_path / name / "deep").mkdir(parents=True)
        write_parquet(tmp_path / name / "deep" / "p[0].parquet", {"text": [name]})
    for spec in ("", "/", "/deep", "/deep/p[0].parquet", "/*/*.parquet", "/deep/p[[]0].parquet", "/**"):
        assert documents(f"{tmp_path}/{folder}{spec}") == [folder]
        if folder not in ("b?", "a b"):  # in a URI they are written otherwise
            assert documents(f"file://{tmp_path}/{folder}{spec}") == [folder]
    assert folder in documents(f"file://{tmp_path}"), "names that a URI does not have as they are"
    assert documents(f"{tmp_path}/[ab]1/deep/*") == documents(f"{tmp_path}/[ab]1/**") == ["a1"]


def test_what_others_left_in_a_folder_is_not_read_but_counted(tmp_path: Path) -> None:
    hidden = ["._a.parquet", ".git/x.txt", "deep/.ipynb_checkpoints/a.jsonl", "_temporary/0/p.parquet", ".cache/c.txt"]
    for name in hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("neither Parquet nor JSONL")
    (tmp_path / "_SUCCESS").write_text("")
    for name in ("d.parquet", "d.jsonl.gz"):
        (tmp_path / name).write_text("")
    with pytest.raises(FileNotFoundError, match=r"besides (?=.*5 files hidden).*2 files of no bytes"):
        units(str(tmp_path))
    write_parquet(tmp_path / "deep" / "a.parquet", {"text": ["a"]})
    for spec in (tmp_path, f"{tmp_path}/**", f"file://{tmp_path}"):
        assert documents(spec) == ["a"]
        assert list(read_records(str(spec))) == [{"text": "a"}] and count_records(str(spec)) == 1
        assert skipped_files(str(spec)) == {"hidden": 5, "empty": 2}
    (tmp_path / "b.txt").write_text("b")
    assert skipped_files(f"{tmp_path}/*") == {"hidden": 1, "empty": 2}
    assert not skipped_files(str(tmp_path / "b.txt")) and not skipped_files("synthetic")


@pytest.mark.parametrize("spec", ["{}/_raw", "{}/_raw/*", "{}/_r*/*.txt", "{}/_raw/a.txt"])
def test_hidden_names_that_are_asked_for_are_read(tmp_path: Path, spec: str) -> None:
    (tmp_path / "_raw").mkdir()
    (tmp_path / "_raw" / "a.txt").write_text("a")
    assert documents(spec.format(tmp_path)) == ["a"]


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.PARQUET", {"text": ["a"]})
    (tmp_path / "b.TXT").write_text("b")
    write_jsonl(tmp_path / "c.JsonL", ["c", "d"])
    for made, name in (("e.jsonl.gz", "e.JSONL.GZ"), ("f.jsonl.zst", "f.jsonl.ZST")):
        write_jsonl(tmp_path / made, [name]).rename(tmp_path / name)
    assert documents(tmp_path, unit_bytes=5) == ["a", "b", "c", "d", "e.JSONL.GZ", "f.jsonl.ZST"]
    assert len(units(str(tmp_path), unit_bytes=5)) > 6, "JSONL is cut up"


def test_a_link_to_a_folder_is_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    for link, target in (("self", "."), ("deep/up", ".."), ("other", "../elsewhere"), ("loop", "loop"), ("c.txt", "x")):
        (tmp_path / "data" / link).symlink_to(target)
    assert documents(tmp_path / "data") == ["a", "b"]


def test_units_of_a_relative_path_work_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    found = units("a.txt")
    monkeypatch.chdir("/")
    assert [document.text for unit in found for document in read_unit(unit)] == ["a"]


def test_the_synthetic_corpus_does_not_depend_on_who_reads_which_unit() -> None:
    found = units("synthetic", documents=2_500, seed=3)
    assert [unit["count"] for unit in found] == [1_000, 1_000, 500]
    backwards = [list(read_unit(unit)) for unit in reversed(found)]
    assert backwards[::-1] == [list(read_unit(unit)) for unit in found]
    assert [document.line for unit in backwards[::-1] for document in unit] == list(range(1, 2_501))


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "x"} for i in range(5)]
    write_parquet(tmp_path / "chat.parquet", {"prompt": [r["prompt"] for r in rows], "response": ["x"] * 5})
    assert list(read_records(str(tmp_path / "chat.parquet"))) == rows


def test_half_a_surrogate_pair_in_a_record_is_the_replacement_character(tmp_path: Path) -> None:
    lines = [rb'{"question": "\ud83d!", "n": [{"\uDE00": "\ud83d\ude00"}, 1.5, null]}', b'{"question": "\xed\xa0\xbd"}']
    first, second = read_records(str(write_lines(tmp_path / "a.jsonl", lines)))
    assert first == {"question": "\ufffd!", "n": [{"\ufffd": "\U0001f600"}, 1.5, None]}
    assert second["question"].encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_are_counted_as_they_are_read(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        write_parquet(tmp_path / name, {"n": list(range(7))})
    else:
        write_lines(tmp_path / name, [b'{"n": %d}' % n if n >= 0 else b"" for n in (0, 1, -1, 2, 3, 4, 5, 6)])
    spec = str(tmp_path)
    (tmp_path / "licence.txt").write_text("not a record")
    assert [record["n"] for record in read_records(spec)] == list(range(7))
    assert [count_records(spec, limit=limit) for limit in (None, 0, 3, 7, 9)] == [7, 0, 3, 7, 7]


def test_the_first_shards_are_taken(tmp_path: Path) -> None:
    for name in "cab":
        write_parquet(tmp_path / f"{name}.parquet", {"text": [name, name, name]})
    assert documents(tmp_path, shards=2) == list("aaabbb")
    with pytest.raises(ValueError, match=r"4 shards are asked for, but .* has 3; ask for at most 3"):
        units(str(tmp_path), shards=4)
    assert [unit["count"] for unit in units("synthetic", documents=2_500, shards=1)] == [1_000]


def test_a_run_needs_so_many_shards() -> None:
    assert shards_needed("fineweb-edu-100b", 20 * 560_988_160, 4.8) == 216
    assert shards_needed("fineweb-edu-100b", 1, 4.8) == 1
    assert shards_needed("data/*.parquet", 1, 4.8) is None


def test_novels_are_read(shared_data: Path) -> None:
    found = units(str(shared_data / "novels" / "val_*.parquet"))
    assert sum(1 for unit in found for _ in read_unit(unit)) == 400


@pytest.mark.parametrize("spec", ["{}/*.parquet", "{}/nowhere", "{}", "{}/nowhere/*.txt"])
def test_a_corpus_that_matches_nothing_is_named(tmp_path: Path, spec: str) -> None:
    spec = spec.format(tmp_path)
    with pytest.raises(FileNotFoundError, match="matches no file") as error:
        units(spec)
    assert spec in str(error.value)


def test_a_missing_text_column_names_the_file_and_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(
        ValueError, match=r"a\.parquet has no string column `text`; its columns are body .*, id .*: set"
    ):
        units(str(tmp_path))
    write_parquet(tmp_path / "a.parquet", {"text": [1]})
    with pytest.raises(ValueError, match=r"text \(int64\)"):
        units(str(tmp_path))
    for line, columns in ((b'{"body": "x"}', r"body \(str\)"), (b'{"text": ["x"]}', r"text \(list\)")):
        path = write_lines(tmp_path / "a.jsonl", [b"?", line, b'{"text": "x"}'])
        with pytest.raises(ValueError, match=rf"a\.jsonl has no string column `text`; its columns are {columns}"):
            documents(path)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst"])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [f"{i} {random.Random(i).random()}" for i in range(1_000)])
    path.write_bytes(path.read_bytes()[:-100])
    for failing in (documents, count_records, lambda spec: list(read_records(spec))):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read: Truncated"):
            failing(str(path))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is not readable Parquet"):
        units(str(tmp_path / "a.parquet"))
    path = write_parquet(tmp_path / "b.parquet", {"text": [f"{i} words" for i in range(1_000)]}, row_group_size=1_000)
    path.write_bytes(path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:])
    with pytest.raises(ValueError, match=r"b\.parquet is not readable Parquet"):
        documents(path)
    for line in (b'{"text": ', b"[1]", b'"\xff"'):
        path = write_lines(tmp_path / "a.jsonl", [b'{"text": "x"}', line])
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not"):
            list(read_records(str(path)))
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"a\.csv is of no kind that can serve"):
        units(str(tmp_path / "a.csv"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt is of no kind that can serve"):
        next(read_records(str(tmp_path / "a.txt")))


def test_locations_nobody_can_read_are_refused() -> None:
    with pytest.raises(ValueError, match="ftp://host/x is not a location"):
        units("ftp://host/x")


def run_python(program: str, *arguments: str, **env: str) -> str:
    """Output of a program in a new interpreter: the hub's library reads its settings when it is imported."""
    program = f"import sys, json; from corpus.sources import count_records, read_records, read_unit, units\n{program}"
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def offline(program: str, home: Path, *arguments: str) -> str:
    return run_python(program, *arguments, HF_HOME=str(home), HF_HUB_OFFLINE="1")


def test_a_hub_dataset_on_disk_is_read_like_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", {"text": TEXTS})
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", {"text": ["six", "seven"]})
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", {"text": ["held out"]})
    program = (
        "found = units(sys.argv[1], shards=2); rows = read_records(sys.argv[1], 'test')\n"
        "print(json.dumps([[d.text for u in found for d in read_unit(u)], list(rows), count_records(sys.argv[1])]))\n"
        "try: count_records(sys.argv[1], 'dev')\n"
        "except ValueError as error: print(error)"
    )
    lines = offline(program, tmp_path / "home", f"hub:{tmp_path}/set").splitlines()
    assert json.loads(lines[0]) == [[*KEPT, "six", "seven"], [{"text": "held out"}], 8]
    assert lines[1].endswith("set has no split dev; its splits are train, test")


def test_a_configuration_of_a_hub_dataset_is_chosen(tmp_path: Path) -> None:
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
        for name, path in (("main", "main/*.jsonl.gz"), ("table", "table/*.csv"))
    )
    for name in ("main", "table"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(card + "---\n")
    write_lines(tmp_path / "set" / "main" / "b.jsonl.gz", [b'{"text": "b"}'])
    write_lines(tmp_path / "set" / "main" / "a.jsonl.gz", [b'{"text": "a"}'])
    (tmp_path / "set" / "table" / "a.csv").write_text("text\nx\n")
    program = (
        "for config in (':main', ':table', ''):"
        "\n    try: print([d.text for unit in units(sys.argv[1] + config) for d in read_unit(unit)])"
        "\n    except ValueError as error: print(error)"
    )
    read, table, several = offline(program, tmp_path / "home", f"hub:{tmp_path}/set").splitlines()
    assert read == "['a', 'b']"
    assert re.search(r"set:table keeps .*a\.csv, which is neither Parquet nor JSONL; convert it", table)
    assert "['main', 'table']" in several and "hub:<dataset>[:config]" in several


@pytest.mark.parametrize("spec, named", [("hub:nobody/nothing",) * 2, ("slimpajama-6b", "hub:DKYoon/SlimPajama-6B")])
def test_a_hub_that_is_out_of_reach_says_what_to_do(tmp_path: Path, spec: str, named: str) -> None:
    program = (
        "for read in (units, lambda spec: next(read_records(spec))):"
        "\n    try: read(sys.argv[1])"
        "\n    except ValueError as error: print(error)"
    )
    messages = offline(program, tmp_path / "home", spec).splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"{named} (split train) cannot be loaded: ")
        for hint in ("the name", "the network", "HF_TOKEN", "give files instead"):
            assert hint in message


COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a dataset `me/set` needs; it cuts the first download of `files` off half-way."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    requests: list[tuple[str, str, str | None]]
    broken: bool

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes, size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if size is None else size)} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], type(self)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith(tree := f"/api/datasets/me/set/tree/{COMMIT}"):
            folder = path.removeprefix(tree).strip("/")
            listed: list[dict[str, Any]] = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
                if str(Path(name).parent) == (folder or ".") or "recursive=true" in self.path.lower()
            ]
            listed += [] if folder else [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
            self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        elif path.startswith("/api/datasets/me/set"):
            self.answer(200, json.dumps({"id": "me/set", "sha": COMMIT, "siblings": []}).encode())
        elif not path.startswith("/datasets/me/set/resolve/"):
            self.answer(404, b"")
        elif (name := path.split("/", 6)[6]) not in hub.files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            data, asked = hub.files[name], self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            cut = self.command == "GET" and hub.broken and name.endswith(".parquet")
            end = len(data) // 2 if cut else len(data)
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206 if asked else 200, data[start:end], len(data) - start, **headers)
            if cut:
                hub.broken, self.close_connection = False, True

    do_HEAD = do_GET


AT_HUB = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_evaluation_data_of_the_hub_is_read_as_a_folder_of_it(tmp_path: Path) -> None:
    """A bundle of CORE as it is, as a folder or zip within a data set, and the folders of other tasks beside it;
    without a network what was downloaded before."""
    entry = "{label: one, dataset_uri: one.jsonl, num_fewshot: [0], icl_task_type: language_modeling}"
    bundle = {
        "core.yaml": f"icl_tasks: [{entry}]".encode(),
        "eval_meta_data.csv": b"Eval Task,Random baseline\none,0\n",
        "eval_data/one.jsonl": b'{"context": "a", "continuation": "b"}\n' * 3,
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, data in bundle.items():
            file.writestr(name, data)
    question = b'{"question": "Which?", "choices": ["a", "b"], "answer": 1}\n'
    Hub.files = {f"data/core/{name}": data for name, data in bundle.items()}
    Hub.files |= {"packed.zip": packed.getvalue(), "data/mmlu/test.jsonl": question}
    Hub.requests, Hub.broken = [], False
    program = (
        "from tasks.suite import suite\n"
        "for place in ('', '/data', '/data/core', '/packed.zip'):\n"
        "    [task] = suite(['core'], f'hub:me/set{place}').tasks; print(task.name, task.stamp)\n"
        "print(suite(['MMLU'], 'hub:me/set/data').tasks[0].source)\n"
        "for wrong in ('hub:me/other', 'hub:me/set/none'):\n"
        "    try: suite(['core'], wrong)\n"
        "    except (ValueError, OSError) as error: print(error)"
    )
    with served(Hub) as endpoint:
        env = AT_HUB | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
        *stamps, mmlu, unknown, absent = run_python(program, **env).splitlines()
    assert len(stamps) == 4 and len(set(stamps)) == 1
    assert mmlu.endswith(f"{COMMIT}/data/mmlu/test.jsonl")
    assert unknown.startswith("hub:me/other cannot be downloaded: ") and "give files instead" in unknown
    assert absent.startswith("hub:me/set/none is not there; --eval-data is a folder")
    assert offline("from tasks.suite import suite; print(suite(['core'], 'hub:me/set/data').tasks[0].name)", tmp_path)


def test_remote_files_are_pinned_downloaded_once_and_resumed(tmp_path: Path) -> None:
    big = [random.Random(i).randbytes(15_000).hex() for i in range(1_000)]  # more than two of the library's chunks
    texts = {"data/train-00000-of-00002.parquet": big, "data/train-00001-of-00002.parquet": ["last"]}
    Hub.files, Hub.requests, Hub.broken = {"README.md": b"---\nlicense: mit\n---\n"}, [], True
    for name, column in texts.items():
        path = write_parquet(tmp_path / "made" / name, {"text": column}, row_group_size=100)
        Hub.files[name] = path.read_bytes()
    program = (
        "found = units('hub:me/set'); documents = [d for unit in found for d in read_unit(unit)]\n"
        "import hashlib; digest = hashlib.sha256(''.join(d.text for d in documents).encode()).hexdigest()\n"
        "print(json.dumps([found, digest, documents[-1], count_records('hub:me/set')]))"
    )
    with served(Hub) as endpoint:
        env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
        found, digest, last, count = json.loads(run_python(program, **env, **AT_HUB))
    uris = [f"hf://datasets/me/set@{COMMIT}/{name}" for name in texts]
    assert [unit["uri"] for unit in found] == uris
    assert digest == hashlib.sha256("".join([*big, "last"]).encode()).hexdigest()
    assert last == ["last", uris[1], 1, True] and count == 1_001
    assert all(COMMIT in path for _, path, _ in Hub.requests if path.endswith(".parquet"))
    ranges = [asked for command, path, asked in Hub.requests if command == "GET" and path.endswith(".parquet")]
    assert ranges[0] is None and ranges[2] is None and len(ranges) == 3
    assert ranges[1] and int(ranges[1].removeprefix("bytes=").rstrip("-")) > 0


class Code:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("nested", [False, True])
def test_no_code_in_a_parquet_file_runs(tmp_path: Path, nested: bool) -> None:
    """Once Ray Data is imported, as where documents are made, its columns of objects unpickle when they are read."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    ran = tmp_path / "ran"
    column: Any = ArrowPythonObjectArray.from_objects([Code(ran)])  # type: ignore[arg-type]
    if nested:
        column = pa.StructArray.from_arrays([column], ["inner"])
    path = write_parquet(tmp_path / "a.parquet", {"question": column})
    with pytest.raises(ValueError, match=r"a\.parquet keeps Python objects in question.*plain columns"):
        list(read_records(str(path)))
    assert not ran.exists(), "it ran"
