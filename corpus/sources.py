"""Where text comes from: Parquet, JSONL and text files on disk or in object storage, the HF hub, or a generator.

`units` turns what the user named into small JSON-able work units in a fixed order; `read_unit` streams one of them
anywhere. So ingest may read in parallel on many machines and still see the documents in one order. What the hub keeps
is read file by file, like files on disk.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from corpus import synthetic
from corpus.left_out import UnusableError
from corpus.left_out import skipped as skipped_text
from corpus.utf8 import valid

SYNTHETIC = "synthetic"
TEXT_COLUMN = "text"
DOCUMENTS_PER_UNIT = 1_000
MAX_DOCUMENT = 1_000_000  # characters; a longer document comes in pieces
MAX_LINE = 128 << 20  # bytes of JSONL; a longer line is rejected, because it must be in memory to be parsed
MAX_CONTROL = 0.1  # a text with a larger share of control characters is binary
BATCH_BYTES = 8 << 20  # about as much of a Parquet file is in memory as Python objects
READ_BYTES = 4 << 20
PLAIN = (".txt", ".jsonl")
COMPRESSED = 0.4  # bytes a character of compressed text, about
TEXT_CHARS = 4_000  # of the paragraphs of a text file that make a document together: about a thousand tokens

_KINDS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "txt": (".txt",)}
KINDS = tuple(_KINDS)
ROW_KINDS = ("parquet", "jsonl")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_HIDDEN = (".", "_")  # what begins so was left by an editor, a file system or an unfinished job
_TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.null(),
)
_IN_URI = "/!$&'()*+,;=:@"  # what the path of a URI may have besides letters, digits and -._~
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # escaped, or as UTF-8 would be if it had any
_BLANK_LINE, _BLANK_LINES = re.compile(r"\n[ \t\r]*\n"), re.compile(r"(?:[ \t\r]*\n)*")
_CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\f"))

Unit = dict[str, Any]


class Document(NamedTuple):
    """`line` is the 1-based line of `source` where it begins; in Parquet the row, in the synthetic corpus the index.
    `first` is False for the pieces of a long document after its first."""

    text: str
    source: str
    line: int
    first: bool = True


class Corpus(NamedTuple):
    """A public data set by name. `characters` is about what one of its `shards` (files) holds."""

    hub: str
    column: str
    shards: int
    characters: int
    licence: str


_SLIMPAJAMA_LICENCE = "Apache-2.0 for the compilation; each source keeps its own licence"
CORPORA = {
    # Each of the two shuffles has one file more, the last, on which nanochat validates.
    "fineweb-edu-100b": Corpus("karpathy/fineweb-edu-100b-shuffle", "text", 1_822, 250_000_000, "ODC-By 1.0"),
    "climbmix-400b": Corpus("karpathy/climbmix-400b-shuffle", "text", 6_542, 250_000_000, "CC BY-NC 4.0"),
    "slimpajama-6b": Corpus("DKYoon/SlimPajama-6B", "text", 48, 493_000_000, _SLIMPAJAMA_LICENCE),
    # 627e9 tokens at the 3.9 characters a token of its 6B sample
    "slimpajama-627b": Corpus("cerebras/SlimPajama-627B", "text", 59_166, 42_000_000, _SLIMPAJAMA_LICENCE),
}


def shards_needed(corpus: str, tokens: int, characters_per_token: float) -> int | None:
    """How many shards of a named corpus hold `tokens`, which may be more than it has; None for any other corpus."""
    named = CORPORA.get(corpus)
    return math.ceil(tokens * characters_per_token / named.characters) if named else None


def units(
    spec: str,
    documents: int = 0,
    seed: int = 0,
    *,
    shards: int | None = None,
    text_column: str | None = None,
    text_documents: str = "paragraphs",
    unit_bytes: int = 64 << 20,
) -> list[Unit]:
    """The work units of a corpus, ordered by path.

    `spec` is a name in CORPORA, a file, a directory, a glob, an s3:// or gs:// URI of these, `hub:<dataset>[:config]`
    (its train split), or "synthetic" (`documents` texts of `seed`). `shards` takes the first so many files.
    `text_documents` says what a document of a text file is: paragraphs, lines or file.
    A unit is a Parquet row group, about `unit_bytes` of plain JSONL, or else a file; `bytes` is its size, `size` its
    file's and `changed` when that last was, where known.
    Raises FileNotFoundError when nothing matches, ValueError when a file cannot serve.
    """
    if spec == SYNTHETIC:
        starts = range(0, documents, DOCUMENTS_PER_UNIT)[:shards]
        return [
            {"kind": SYNTHETIC, "index": i, "count": min(DOCUMENTS_PER_UNIT, documents - start), "seed": seed}
            for i, start in enumerate(starts)
        ]
    uris = _files(spec)
    if shards is not None and shards > len(uris):
        raise ValueError(f"{shards} shards are asked for, but {spec} has {len(uris)}; ask for at most {len(uris)}")
    column = text_column or (CORPORA[spec].column if spec in CORPORA else TEXT_COLUMN)
    with ThreadPoolExecutor(16) as pool:  # footers in object storage take a round trip each
        found = pool.map(lambda uri: _units_of_file(uri, column, text_documents, unit_bytes), uris[:shards])
        return [unit for file in found for unit in file]


def read_unit(unit: Unit, counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a unit, streamed in order; the same each time.

    One longer than MAX_DOCUMENT comes in pieces that put together are the document. Each that is left out is counted
    in `counts` under why: empty, null, binary, invalid_utf8, not_json or too_long; those cut into pieces under split.
    Lines of a part of a file count from where the part begins, which `source` then names.
    Raises ValueError for a file that is damaged, whose first record has no text column, or that is not what it was
    when the units were made.
    """
    counts = Counter() if counts is None else counts
    with _unchanged(unit):
        yield from _documents(unit, counts)


def _documents(unit: Unit, counts: Counter[str]) -> Iterator[Document]:
    source = str(unit.get("uri", unit["kind"]))
    if unit.get("start"):
        source += f" (from byte {unit['start']:,})"
    for i, (line, value) in enumerate(_values(unit, counts)):
        text, fault = _judge(value)
        if fault:
            counts[fault] += 1
            continue
        if len(text) > MAX_DOCUMENT:
            counts["split"] += 1
        start = 0
        while start < len(text):
            end = _piece_end(text, start)
            yield Document(text[start:end], source, line, not start and not (i and unit.get("documents") == "file"))
            start = end


def read_records(spec: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Whole rows of JSONL or Parquet files, or of a hub dataset's `split`. Raises ValueError for a damaged file or row.

    Half a surrogate pair in a row, as where a text was cut within an emoji, is U+FFFD, as it is to every tokenizer: a
    record is too dear to be left out for it.
    """
    for record in records_and_faults(spec, split):
        if isinstance(record, UnusableError):
            raise record
        yield record


def records_and_faults(spec: str, split: str = "train") -> Iterator[dict[str, Any] | UnusableError]:
    """As `read_records`, with what is wrong with a line or row in the place of its record.

    Raises ValueError for a damaged file.
    """
    for uri in _files(spec, split, ROW_KINDS):
        if _kind(uri) == "parquet":
            with _open_parquet(uri) as file:
                _check_once(uri, file.schema_arrow, file.schema_arrow.names)
                for batch in _batches(file, range(file.num_row_groups)):
                    yield from _rows(uri, batch)
            continue
        for number, line in _lines(uri):
            if line is None:
                yield UnusableError("too_long", f"{uri}, line {number} has more than {MAX_LINE:,} bytes")
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "surrogatepass"))
                if _MAYBE_SURROGATE.search(line):
                    row = json.loads(valid(json.dumps(row, ensure_ascii=False)))
            except UnicodeDecodeError as error:
                yield UnusableError("invalid_utf8", f"{uri}, line {number} is not UTF-8: {error}")
                continue
            except (ValueError, RecursionError) as error:
                yield UnusableError("not_json", f"{uri}, line {number} is not JSON: {error}")
                continue
            fault = UnusableError("not_json", f"{uri}, line {number} is not a JSON object")
            yield row if isinstance(row, dict) else fault


def _rows(uri: str, batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnusableError]:
    """The rows of a batch, each by itself where a value of one is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield UnusableError("invalid_utf8", f"{uri}: a row has a value that is not UTF-8: {error}")


def count_records(spec: str, split: str = "train", limit: int | None = None) -> int:
    """How many records `read_records` gives, or `limit` where there are more; their content is not looked at."""
    count = 0
    for uri in _files(spec, split, ROW_KINDS):
        if limit is not None and count >= limit:
            break
        if _kind(uri) == "parquet":
            with _open_parquet(uri) as file:
                count += file.metadata.num_rows
        else:
            count += sum(1 for _ in islice(_lines(uri), limit and limit - count))
    return count if limit is None else min(count, limit)


def local_files(spec: str, split: str = "train", kinds: Sequence[str] = KINDS) -> list[str] | None:
    """The files of this machine that a corpus or records are read from; None for what lies elsewhere or is made here.

    Raises FileNotFoundError when nothing matches, ValueError for a file of another kind.
    """
    return None if is_named(spec) or "://" in spec else _files(spec, split, kinds)


def characters(
    spec: str, split: str = "train", kinds: Sequence[str] = KINDS, shards: int | None = None
) -> float | None:
    """About how many a place on this machine holds, in its first `shards` files; None for another place, or where
    nothing is by now."""
    try:
        files = local_files(spec, split, kinds)
    except (ValueError, OSError):  # a stage that is done needs its input no more
        files = None
    if files is None:
        return None
    return sum(os.path.getsize(f) / (1 if f.lower().endswith(PLAIN) else COMPRESSED) for f in files[:shards])


def is_named(spec: str) -> bool:
    """Whether it names no place: what is made here, or a data set of the hub."""
    return spec == SYNTHETIC or spec in CORPORA or spec.startswith("hub:")


def stamps(spec: str, split: str = "train", kinds: Sequence[str] = KINDS) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file that records are read from; {} for what is made here or the hub keeps."""
    if is_named(spec):
        return {}
    found = {}
    for uri in _files(spec, split, kinds):
        filesystem, path = filesystem_of(uri)
        info = filesystem.get_file_info(path)
        found[uri] = (info.size, info.mtime_ns)
    return found


def skipped_files(spec: str, kinds: Sequence[str] = KINDS) -> Counter[str]:
    """How many files of a folder or glob are not read, by why: `hidden`, as their name or that of a folder below `spec`
    begins with a dot or an underscore, `empty`, as Parquet or JSONL of no bytes holds no record, `broken`, a link to
    nothing, or `other`, of a kind that cannot serve."""
    skipped: Counter[str] = Counter()
    if not is_named(spec):
        _files(spec, kinds=kinds, skipped=skipped)
    return skipped


@contextmanager
def _unchanged(unit: Unit) -> Iterator[None]:
    """Raises ValueError where a unit's file is not what it was when the units were made, whatever that leads to."""
    _check_unchanged(unit)
    try:
        yield
    except (ValueError, IndexError):
        _check_unchanged(unit)
        raise
    _check_unchanged(unit)


def _check_unchanged(unit: Unit) -> None:
    if "changed" not in unit:  # made here, or of the hub, where a file is named with its commit
        return
    filesystem, path = filesystem_of(unit["uri"])
    info = filesystem.get_file_info(path)
    if (info.size, info.mtime_ns) != (unit["size"], unit["changed"]):
        raise ValueError(changed_text(unit["uri"]))


def changed_text(uri: str) -> str:
    """What there is to say of a file that changes while it is read."""
    return (
        f"{uri} is not what it was when the files were listed: each is read more than once, on any machine, so none "
        "may change meanwhile; run the same command again to take it as it is"
    )


def _units_of_file(uri: str, column: str, text_documents: str, unit_bytes: int) -> list[Unit]:
    unit = {"kind": _kind(uri), "uri": uri}
    unit |= {"documents": text_documents} if unit["kind"] == "txt" else {"column": column}
    if uri.startswith("hf://"):
        return [unit]
    filesystem, path = filesystem_of(uri)
    info = filesystem.get_file_info(path)
    size = info.size
    unit |= {"size": size, "changed": info.mtime_ns}
    if unit["kind"] == "parquet":
        with _open_parquet(uri) as file:
            _check_text_column(uri, file.schema_arrow, column)
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        return [unit | {"row_group": i, "bytes": size} for i, size in enumerate(sizes)]
    if not path.lower().endswith(".jsonl") or size <= unit_bytes:
        return [unit | {"bytes": size}]
    parts = [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]
    return [unit | {"start": start, "stop": stop, "bytes": stop - start} for start, stop in parts]


def _values(unit: Unit, counts: Counter[str]) -> Iterator[tuple[int, object]]:
    """What stands where a unit's texts should be, each after its line or row."""
    kind = unit["kind"]
    if kind == SYNTHETIC:
        texts = synthetic.documents(unit["index"], unit["count"], unit["seed"])
        yield from enumerate(texts, unit["index"] * DOCUMENTS_PER_UNIT + 1)
    elif kind == "parquet":
        yield from _parquet_values(unit["uri"], unit["column"], unit.get("row_group"))
    elif kind == "jsonl":
        yield from _jsonl_values(unit, counts)
    elif kind == "txt":
        yield from _txt_values(unit["uri"], unit["documents"], counts)
    else:
        raise ValueError(f"unknown kind of work unit: {kind!r}")


def _parquet_values(uri: str, column: str, row_group: int | None) -> Iterator[tuple[int, object]]:
    with _open_parquet(uri, plain=True) as file:
        _check_text_column(uri, file.schema_arrow, column)
        groups = range(file.num_row_groups) if row_group is None else range(row_group, row_group + 1)
        row = 1 + sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        for batch in _batches(file, groups, [column]):
            try:
                values = batch.column(column).to_pylist()
            except UnicodeDecodeError:  # some value is not UTF-8: each is decoded by itself
                values = batch.column(column).cast(pa.large_binary()).to_pylist()
            yield from enumerate(values, row)
            row += len(values)


def _jsonl_values(unit: Unit, counts: Counter[str]) -> Iterator[tuple[int, object]]:
    uri, column, first = unit["uri"], unit["column"], not unit.get("start")
    for number, line in _lines(uri, unit.get("start", 0), unit.get("stop")):
        try:
            row = json.loads(line.decode("utf-8-sig", "surrogatepass")) if line else None
        except UnicodeDecodeError:
            counts["invalid_utf8"] += 1
            continue
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            counts["too_long" if line is None else "not_json"] += 1
            continue
        value = row.get(column)
        if first and (column not in row or not isinstance(value, str | None)):
            raise _no_text_column(uri, column, {name: type(value).__name__ for name, value in row.items()})
        first = False
        if column not in row:
            counts["no_column"] += 1
            continue
        yield number, value


def _txt_values(uri: str, documents: str, counts: Counter[str]) -> Iterator[tuple[int, object]]:
    """The documents of a text file, a long one in pieces: each is judged by itself, so a bad byte costs no more."""
    whole, most = documents == "file", TEXT_CHARS if documents == "paragraphs" else MAX_DOCUMENT
    with _open_lines(uri) as stream:
        # An invalid byte becomes a lone surrogate, which is not UTF-8 either.
        reader = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        text, start, line, found, more = "", 0, 1, False, True
        while True:
            if more and len(text) - start <= most:
                more = bool(read := reader.read(MAX_DOCUMENT + 1))
                text, start = text[start:] + read, 0
            if start == len(text):
                break
            if whole and not found and len(text) > MAX_DOCUMENT:
                counts["split"] += 1
            end = _text_end(text, start, documents, most)
            value = text[start:end]
            if whole or not value.isspace():
                blank = 0 if whole else len(_BLANK_LINES.match(value)[0])  # type: ignore[index]  # it always matches
                yield line + value.count("\n", 0, blank), value if whole else value[blank:].rstrip()
                found = True
            line += text.count("\n", start, end)
            start = end
        if not found:
            yield 1, ""


def _text_end(text: str, start: int, documents: str, most: int) -> int:
    """Where the document, or piece of one, from `start` ends, with the blank lines behind it."""
    if documents == "lines" and (end := text.find("\n", start, start + most) + 1):
        return end
    if documents == "paragraphs" and len(text) - start > most:
        blank = [match.end() for match in _BLANK_LINE.finditer(text, start, start + most)]
        if blank:
            return blank[-1]
    return _piece_end(text, start, most)


def _judge(value: object) -> tuple[str, str]:
    """The text of a document, and why it is rejected, if it is."""
    if not isinstance(value, str | bytes):
        return "", "null" if value is None else "not_text"
    try:
        text, data = (value, value.encode()) if isinstance(value, str) else (value.decode(), value)
    except UnicodeError:
        return "", "invalid_utf8"
    if not text or text.isspace():
        return "", "empty"
    control = len(data) - len(data.translate(None, _CONTROL))
    return text, "binary" if b"\0" in data or control > MAX_CONTROL * len(text) else ""


def _piece_end(text: str, start: int, most: int | None = None) -> int:
    """Where the piece from `start` ends: after the last line end, or else space, in its second half, if it is longer
    than `most` characters, MAX_DOCUMENT by default."""
    most = most or MAX_DOCUMENT
    if len(text) - start <= most:
        return len(text)
    middle, stop = start + most // 2, start + most
    return text.rfind("\n", middle, stop) + 1 or text.rfind(" ", middle, stop) + 1 or stop


def _check_text_column(uri: str, schema: pa.Schema, column: str) -> None:
    _check_once(uri, schema, [column])
    types = {field.name: field.type for field in schema}
    kind = types.get(column)
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    if kind not in _TEXT_TYPES:
        raise _no_text_column(uri, column, types)


def _check_once(uri: str, schema: pa.Schema, columns: Iterable[str]) -> None:
    """Raises ValueError where several columns have the same of these names."""
    if twice := sorted(name for name in set(columns) if len(schema.get_all_field_indices(name)) > 1):
        raise ValueError(
            f"{uri} has several columns named {', '.join(twice)}, so it does not say which one is meant: write it "
            "again with a name for each"
        )


def _no_text_column(uri: str, column: str, types: Mapping[str, object]) -> ValueError:
    columns = ", ".join(f"{name} ({type_})" for name, type_ in types.items()) or "none"
    return ValueError(
        f"{uri} has no string column `{column}`; its columns are {columns}: "
        "set data.text_column to the one that holds the text"
    )


@contextmanager
def _open_parquet(uri: str, plain: bool = False) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what goes wrong while it is open names it.

    `plain` leaves out which Arrow types its columns had, so that a dictionary's values are read one by one: as a whole
    it is refused for a single one that is not UTF-8.
    """
    filesystem, path = filesystem_of(uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem, buffer_size=READ_BYTES) as file:
            if objects := [field.name for field in file.schema_arrow if _holds_objects(field.type)]:
                raise ValueError(
                    f"{uri} keeps Python objects in {', '.join(objects)}, and reading these would run code that comes "
                    "with the file: write it again with plain columns"
                )
            if plain and any(pa.types.is_dictionary(field.type) for field in file.schema_arrow):
                metadata = _without_arrow_schema(filesystem, path)
                with pq.ParquetFile(path, filesystem=filesystem, buffer_size=READ_BYTES, metadata=metadata) as columns:
                    yield columns
            else:
                yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{uri} is not readable Parquet: {error}") from error


def _without_arrow_schema(filesystem: pafs.FileSystem, path: str) -> pq.FileMetaData:
    """What a Parquet file's footer says, but for the Arrow schema in it, which readers would follow."""
    with filesystem.open_input_file(path) as stream:
        size = stream.size()
        length = int.from_bytes(stream.read_at(4, size - 8), "little")
        footer: bytes = stream.read_at(length + 8, size - length - 8)
    renamed = footer.replace(b"ARROW:schema", b"arrow:schema")  # a key of metadata; none of that name is known
    return pq.read_metadata(pa.BufferReader(b"PAR1" + renamed))


def _holds_objects(kind: pa.DataType) -> bool:
    """Whether values of this type are made by a class that some library registered: Ray Data's unpickles them."""
    if isinstance(kind, pa.ExtensionType):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_objects(kind.storage_type)
    parts = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(i).type for i in range(kind.num_fields)]
    return any(map(_holds_objects, parts))


def _batches(file: pq.ParquetFile, row_groups: range, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    for i in row_groups:
        group = file.metadata.row_group(i)
        rows = group.num_rows * BATCH_BYTES // max(group.total_byte_size, 1)
        yield from file.iter_batches(min(max(rows, 1), 1_000), row_groups=[i], columns=columns)


@contextmanager
def _open_lines(uri: str, start: int = 0) -> Iterator[BinaryIO]:
    """A file of lines, decompressed, from byte `start`; what goes wrong while it is open names it."""
    filesystem, path = filesystem_of(uri)
    try:
        if start:
            raw = filesystem.open_input_file(path)
            raw.seek(start)
        else:
            codec = _COMPRESSIONS.get(os.path.splitext(path)[1].lower())
            raw = filesystem.open_input_stream(path, compression=codec, buffer_size=READ_BYTES)
        # A pyarrow stream is a binary file in all but its declared type.
        with io.BufferedReader(cast(io.RawIOBase, raw), READ_BYTES) as stream:
            yield cast(BinaryIO, stream)
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {error}") from error


def _lines(uri: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in the bytes [start, stop) of a file, numbered from 1, without the blank ones.

    Only "\\n" ends a line. In place of one longer than MAX_LINE comes None.
    """
    with _open_lines(uri, max(start - 1, 0)) as stream:
        position = start - 1 + _skip_line(stream) if start else 0
        number = 0
        while (stop is None or position < stop) and (line := stream.readline(MAX_LINE)):
            position, number = position + len(line), number + 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                position += _skip_line(stream)
                yield number, None
            elif not line.isspace():
                yield number, line


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of a line, however long; how many bytes that was."""
    skipped = 0
    while part := stream.readline(READ_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _kind(uri: str) -> str | None:
    path = _split_query(uri)[0].lower()
    return next((kind for kind, suffixes in _KINDS.items() if path.endswith(suffixes)), None)


def _files(
    spec: str, split: str = "train", kinds: Sequence[str] = KINDS, skipped: Counter[str] | None = None
) -> list[str]:
    """URIs of the files of these kinds that `spec` names, sorted; `split` chooses among those of a hub dataset.

    Of a folder or glob, those that `skipped_files` tells of are left out and counted in `skipped`.
    """
    skipped = Counter() if skipped is None else skipped
    if spec in CORPORA:
        spec = f"hub:{CORPORA[spec].hub}"
    if spec.startswith("hub:"):
        return _hub_files(spec, split)
    suffixes = ", ".join(suffix for kind in kinds for suffix in _KINDS[kind])
    location, query = _split_query(spec)
    parts = location.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    base = "/".join(parts[:fixed]) or ("/" if location.startswith("/") else ".")
    filesystem, root = filesystem_of(base + query)
    while fixed < len(parts):  # what is there under just this name is no glob
        literal = f"{root.rstrip('/')}/{parts[fixed]}"
        if filesystem.get_file_info(literal).type == pafs.FileType.NotFound:
            break
        root, fixed = literal, fixed + 1
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File:
        if _kind(spec) not in kinds:
            raise ValueError(f"{spec} is of no kind that can serve; these can: {suffixes}")
        paths = [root]
    elif info.type == pafs.FileType.Directory:
        pattern = parts[fixed:] or ["**"]
        paths = []
        for path, size in _walk(filesystem, root):
            names = path.removeprefix(root.rstrip("/")).lstrip("/").split("/")
            if not _matches(names, pattern):
                continue
            if not _matches(names, pattern, hidden=False):
                skipped["hidden"] += _kind(path) in kinds
            elif _kind(path) not in kinds:
                skipped["other"] += 1
            elif size is None:
                skipped["broken"] += 1
            elif not size and _kind(path) in ROW_KINDS:  # an empty text is a document, which is counted as one
                skipped["empty"] += 1
            else:
                paths.append(path)
    else:
        paths = []
    if not paths:
        named = f"; the named corpora are {', '.join(CORPORA)}" if "/" not in spec else ""
        besides = f" besides {skipped_text(skipped)}" if skipped else ""
        raise FileNotFoundError(f"{spec} matches no file of a known kind ({suffixes}){besides}; check the path{named}")
    if "://" not in location:
        return sorted(paths)
    scheme = location.partition("://")[0]
    return [f"{scheme}://{quote(path, safe=_IN_URI)}{query}" for path in sorted(paths)]


def _hub_files(spec: str, split: str) -> list[str]:
    """The data files of a split: hf:// URIs that name the commit, or paths where the dataset is a local directory."""
    import datasets  # slow to import, and few runs need it

    name, _, config = spec.removeprefix("hub:").partition(":")
    with _hub_errors(f"{spec} (split {split}) cannot be loaded"):
        builder = datasets.load_dataset_builder(name, config or None)
    splits = {str(name): sorted(files) for name, files in (builder.config.data_files or {}).items()}
    if split not in splits:
        raise ValueError(f"{spec} has no split {split}; its splits are {', '.join(splits) or 'none'}")
    for uri in splits[split]:
        if _kind(uri) not in ROW_KINDS:
            raise ValueError(f"{spec} keeps {uri}, which is neither Parquet nor JSONL; convert it and give the files")
    return splits[split]


def _download(uri: str) -> str:
    """A hub file's path in the hub's cache, where a broken download goes on."""
    from huggingface_hub import hf_hub_download

    found = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", uri)
    if not found:
        raise ValueError(f"{uri} does not name a file of a dataset at a commit; give hub:<dataset>[:config]")
    with _hub_errors(f"{uri} cannot be downloaded"):
        return hf_hub_download(found[1], found[3], repo_type="dataset", revision=found[2])


def fetched(place: str) -> str:
    """A place as files: `hub:OWNER/NAME[/PATH]`, a dataset of the hub or what PATH names within it, is downloaded and
    is the same commit for all of this process; every other place is returned as it is. Raises ValueError."""
    return _snapshot(place) if place.startswith("hub:") else place


@functools.cache
def _snapshot(place: str) -> str:
    from huggingface_hub import snapshot_download

    owner, _, rest = place.removeprefix("hub:").strip("/").partition("/")
    name, _, path = rest.partition("/")
    wanted = [path, f"{path}/*"] if path else None
    with _hub_errors(f"{place} cannot be downloaded"):
        root = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=wanted)
    return posixpath.join(root, path)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise ValueError(
            f"{what}: {' '.join(str(error).split())}; check the name (hub:<dataset>[:config]) and the network, set "
            "HF_TOKEN for a gated dataset, or give files instead"
        ) from error


def _walk(filesystem: pafs.FileSystem, root: str) -> Iterator[tuple[str, int | None]]:
    """Path and size of every file below a folder; no size for a link to nothing."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from _walk_here(root, ())
        return
    for entry in filesystem.get_file_info(pafs.FileSelector(root, recursive=True)):
        if entry.type == pafs.FileType.File:
            yield entry.path, entry.size


def _walk_here(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, int | None]]:
    """Links are followed, but not to a folder that is being read: `above`, by their real paths."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = os.listdir(folder)
    except PermissionError:
        if os.path.basename(folder).startswith(_HIDDEN):  # what a file system keeps to itself, such as .Trashes
            return
        raise
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isdir(path):
            yield from _walk_here(path, (*above, real))
        elif os.path.isfile(path):
            yield path, os.path.getsize(path)
        elif os.path.islink(path) and not os.path.exists(path):
            yield path, None


def _matches(names: Sequence[str], globs: Sequence[str], hidden: bool = True) -> bool:
    """Glob match, component by component; `**` stands for any number of directories, or for all that is below.

    Without `hidden` a wildcard stands for no name that begins as a hidden one does, as in a shell; a glob that begins
    so itself means these.
    """

    def fits(name: str, glob: str) -> bool:
        seen = hidden or not name.startswith(_HIDDEN) or glob.startswith(_HIDDEN)
        return seen and (glob == "**" or fnmatch.fnmatchcase(name, glob))

    def match(i: int, j: int) -> bool:
        if j == len(globs):
            return i == len(names)
        if globs[j] == "**" and match(i, j + 1):
            return True
        return i < len(names) and fits(names[i], globs[j]) and match(i + 1, j + (globs[j] != "**"))

    return match(0, 0)


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it. Raises ValueError for a URI that cannot be read."""
    if uri.startswith("hf://"):
        uri = _download(uri)
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(uri))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a location this can read: {error}") from error


def below(place: str, name: str) -> str:
    """What is called `name` in a folder, a path or a URI."""
    location, query = _split_query(place)
    return posixpath.join(location, name) + query


def _split_query(spec: str) -> tuple[str, str]:
    """A URI's location and its `?options`; in a plain path `?` is part of a glob."""
    location, mark, query = spec.partition("?") if "://" in spec else (spec, "", "")
    return location, mark + query
