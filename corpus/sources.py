"""Where text comes from: Parquet, JSONL and text files on disk or in object storage, the HF hub, or a generator.

`units` turns what the user named into small JSON-able work units in a fixed order; `read_unit` reads one of them
anywhere. So ingest may read in parallel on many machines and still see the documents in one order.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from corpus import synthetic

SYNTHETIC = "synthetic"
TEXT_COLUMN = "text"
DOCUMENTS_PER_UNIT = 1_000

_KINDS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "txt": (".txt",)}
_SUFFIXES = ", ".join(suffix for suffixes in _KINDS.values() for suffix in suffixes)

Unit = dict[str, Any]


def units(spec: str, documents: int = 0, seed: int = 0) -> list[Unit]:
    """The work units of a corpus, ordered by path.

    `spec` is a file, a directory, a glob, an s3:// or gs:// URI of these, `hub:<dataset>[:config]`, or "synthetic"
    (`documents` texts of `seed`). Units of files have their size in `bytes`.
    Raises FileNotFoundError when nothing matches, ValueError when a file cannot serve.
    """
    if spec == SYNTHETIC:
        starts = range(0, documents, DOCUMENTS_PER_UNIT)
        return [
            {"kind": SYNTHETIC, "index": i, "count": min(DOCUMENTS_PER_UNIT, documents - start), "seed": seed}
            for i, start in enumerate(starts)
        ]
    if spec.startswith("hub:"):
        shards = int(getattr(_hub_dataset(spec, "train"), "num_shards", 1))
        return [{"kind": "hub", "spec": spec, "shard": i, "shards": shards} for i in range(shards)]
    found: list[Unit] = []
    for uri in _files(spec):
        if _kind(uri) == "parquet":
            with _open_parquet(uri) as file:
                _check_text_column(uri, file.schema_arrow)
                sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            found += [{"kind": "parquet", "uri": uri, "row_group": i, "bytes": n} for i, n in enumerate(sizes)]
        else:
            filesystem, path = _filesystem(uri)
            found.append({"kind": _kind(uri), "uri": uri, "bytes": filesystem.get_file_info(path).size})
    return found


def read_unit(unit: Unit) -> Iterator[str]:
    """The documents of a unit in order; empty ones are left out."""
    return (text for text in _texts(unit) if text.strip())


def read_records(spec: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Whole rows of JSONL or Parquet files, or of a hub dataset's `split`: conversations, GSM8K problems."""
    if spec.startswith("hub:"):
        yield from _hub_dataset(spec, split)
        return
    for uri in _files(spec):
        if _kind(uri) == "parquet":
            with _open_parquet(uri) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        elif _kind(uri) == "jsonl":
            yield from _json_lines(uri)
        else:
            raise ValueError(f"{uri} is plain text and has no rows; give JSONL or Parquet")


def _texts(unit: Unit) -> Iterator[str]:
    kind = unit["kind"]
    if kind == SYNTHETIC:
        yield from synthetic.documents(unit["index"], unit["count"], unit["seed"])
    elif kind == "parquet":
        with _open_parquet(unit["uri"]) as file:
            column = file.read_row_group(unit["row_group"], columns=[TEXT_COLUMN]).column(TEXT_COLUMN)
        for chunk in column.chunks:
            yield from (text for text in chunk.to_pylist() if text is not None)
    elif kind == "jsonl":
        yield from _text_of_rows(_json_lines(unit["uri"]), unit["uri"])
    elif kind == "txt":
        with _open_text(unit["uri"]) as lines:
            try:
                yield lines.read()
            except UnicodeDecodeError as error:
                raise ValueError(f"{unit['uri']} is not UTF-8 text: {error}") from error
    elif kind == "hub":
        dataset = _hub_dataset(unit["spec"], "train")
        if unit["shards"] > 1:
            dataset = dataset.shard(num_shards=unit["shards"], index=unit["shard"])
        yield from _text_of_rows(dataset, unit["spec"])
    else:
        raise ValueError(f"unknown kind of work unit: {kind!r}")


def _text_of_rows(rows: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    for row in rows:
        text = row.get(TEXT_COLUMN)
        if not isinstance(text, str):
            columns = ", ".join(row) or "none"
            raise ValueError(f"{source}: a row has no string column `{TEXT_COLUMN}`; its columns are {columns}")
        yield text


def _check_text_column(uri: str, schema: pa.Schema) -> None:
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    types = [field.type for field in schema if field.name == TEXT_COLUMN]
    if not types or not (pa.types.is_string(types[0]) or pa.types.is_large_string(types[0])):
        raise ValueError(f"{uri} has no string column `{TEXT_COLUMN}`; its columns are {columns}")


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = _filesystem(uri)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not readable Parquet: {error}") from error


def _open_text(uri: str) -> io.TextIOWrapper:
    filesystem, path = _filesystem(uri)
    # A pyarrow stream is a binary file in all but its declared type.
    return io.TextIOWrapper(cast(io.BytesIO, filesystem.open_input_stream(path)), encoding="utf-8", newline="\n")


def _json_lines(uri: str) -> Iterator[dict[str, Any]]:
    with _open_text(uri) as lines:
        number = 0
        try:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield row
        except (ValueError, OSError) as error:
            raise ValueError(f"{uri}: cannot read near line {number}: {error}") from error


def _hub_dataset(spec: str, split: str) -> Any:
    """The dataset of `hub:<dataset>[:config]`, streamed."""
    import datasets  # slow to import, and few runs need it

    name, _, config = spec.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{spec} (split {split}) cannot be loaded: {error}; check the name and the network, or give files instead"
        ) from error


def _kind(uri: str) -> str | None:
    path = _split_query(uri)[0]
    return next((kind for kind, suffixes in _KINDS.items() if path.endswith(suffixes)), None)


def _files(spec: str) -> list[str]:
    """URIs of the files `spec` names, sorted."""
    location, query = _split_query(spec)
    parts = location.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    base = "/".join(parts[:fixed]) or ("/" if location.startswith("/") else ".")
    filesystem, root = _filesystem(base + query)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File:
        if _kind(spec) is None:
            raise ValueError(f"{spec} is of no known kind; the kinds are {_SUFFIXES}")
        paths = [root]
    elif info.type == pafs.FileType.Directory:
        selector = pafs.FileSelector(root, recursive=True)
        paths = [entry.path for entry in filesystem.get_file_info(selector) if entry.type == pafs.FileType.File]
        paths = [path for path in paths if _kind(path)]
        if fixed < len(parts):
            pattern = "/".join([root.rstrip("/"), *parts[fixed:]])
            paths = [path for path in paths if _matches(path, pattern)]
    else:
        paths = []
    if not paths:
        raise FileNotFoundError(f"{spec} matches no file of a known kind ({_SUFFIXES}); check the path")
    scheme = location.partition("://")[0] + "://" if "://" in location else ""
    return [f"{scheme}{path}{query}" for path in sorted(paths)]


def _matches(path: str, pattern: str) -> bool:
    """Glob match, component by component; `**` stands for any number of directories."""
    names, globs = path.split("/"), pattern.split("/")

    def match(i: int, j: int) -> bool:
        if j == len(globs):
            return i == len(names)
        if globs[j] == "**":
            return any(match(k, j + 1) for k in range(i, len(names) + 1))
        return i < len(names) and fnmatch.fnmatchcase(names[i], globs[j]) and match(i + 1, j + 1)

    return match(0, 0)


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(uri))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a location this can read: {error}") from error


def _split_query(spec: str) -> tuple[str, str]:
    """A URI's location and its `?options`; in a plain path `?` is part of a glob."""
    location, mark, query = spec.partition("?") if "://" in spec else (spec, "", "")
    return location, mark + query
