"""The ingest stage: documents to packed rows of token ids.

The corpus is cut into shards of whole work units, one row of a Ray Dataset each; a task reads, tokenizes and packs its
shard in a stream and uploads the rows itself. What a shard holds depends on nothing but the corpus, so the bytes are
the same for any number of tasks in any order. A note of each shard that is done lets a killed ingest make only the
others, and base begin meanwhile (see `stages.growing`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from cluster import manifest
from cluster.storage import READ_TRIES, FileEntry, Storage, StorageError
from corpus.left_out import counted, reasons
from corpus.packing import Document as Packed
from corpus.packing import Packing, pack
from corpus.rows import ROWS_FILE, write_index
from corpus.sources import KINDS, Document, Unit, changed_text, read_unit, units
from corpus.tokenizers import Tokenizer, UnknownCharacterError, lacking
from stages.config import DataConfig, IngestConfig
from stages.context import PROGRESS, StageContext
from stages.context import Progress as Said
from stages.conversations import check_unchanged, tell_skipped, write_rows
from stages.growing import NOTES, PLAN, SPLITS, Note, Plan, index_of, note_path, read_notes
from stages.held_out import MOST, HeldOut
from tasks.mixture import Part

LEAST = 0.01  # of a shard's tokens, below which what is held out is made up from its last documents
GROUP = 256  # shards whose duplicates are looked for together
FEW_SHARDS, SMALL_SHARD = 16, 4 << 20  # a corpus of fewer is cut into as many, none smaller: for all cores
UNITS_IN_SHARD, UNIT_BYTES = 16, 1 << 20  # of a large file that is cut up: as many units, but none smaller
CHARS_PER_TOKEN = 4  # about
HASHES, PARTITIONS = "hashes", 64


def corpus_shards(data: DataConfig, shard_bytes: int, seed: int) -> list[dict[str, Any]]:
    """The corpus in shards of about `shard_bytes`, each {units, max_documents, number, of, total}: which of how many it
    is, and how many bytes the corpus has, or None.

    Units are dealt out in an order drawn from the seed, so that each shard is a sample of the whole corpus.
    """
    found = units(
        data.corpus,
        data.synthetic_documents,
        seed,
        shards=data.shards,
        text_column=data.text_column,
        text_documents=data.text_documents,
        unit_bytes=max(shard_bytes // UNITS_IN_SHARD, UNIT_BYTES),
    )
    if not found:
        raise ValueError(f"corpus {data.corpus!r} holds no documents")
    found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    total = sum(unit.get("bytes", shard_bytes) for unit in found)
    count = min(len(found), max(1, round(total / shard_bytes), min(FEW_SHARDS, total // SMALL_SHARD)))
    share, rest = divmod(data.max_documents or 0, count)
    known = total if all("bytes" in unit for unit in found) else None
    return [
        {
            "units": found[i::count],
            "max_documents": share + (i < rest) if data.max_documents else None,
            "number": i,
            "of": count,
            "total": known,
        }
        for i in range(count)
    ]


def documents_of(shard: dict[str, Any], counts: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a shard in order; `counts` says how many were rejected, and why."""
    shard_units: list[Unit] = shard["units"]
    return islice((d for unit in shard_units for d in read_unit(unit, counts)), shard["max_documents"])


def run(context: StageContext, data: DataConfig, config: IngestConfig, sequence_len: int, seed: int) -> None:
    began = time.monotonic()
    corpus = [Part(source=data.corpus)]
    check_unchanged(corpus, data.digests)
    skipped = tell_skipped(context, [data.corpus], KINDS)
    entries, stats = ingest_corpus(context, data, config, sequence_len + 1, seed)
    stats["skipped"] = skipped
    figures = {name: stats[name] for name in ("documents", "tokens", "characters_per_token", "cropped_share", "rows")}
    if (share := stats["validation_share"]) > MOST:
        more = f"{share:.0%} of the corpus is held out for validation: whole documents, and one row at least; give more"
        stats["notes"] = [f"{more} text"]
    elif share < min(LEAST, data.validation_chars / max(1, stats["characters"]) / 2):
        less = (
            f"only {share:.2%} of the corpus is held out for validation, as documents of half a million characters are "
        )
        stats["notes"] = [less + "not: cut them up, such as with data.text_documents=paragraphs"]
    check_unchanged(corpus, data.digests)
    made = context.manifest(sorted(entries, key=lambda e: e.path), figures, time.monotonic() - began, stats)
    manifest.write(context.storage, made)
    for folder in (NOTES, HASHES):
        context.storage.delete(folder)
    for path in context.storage.list().keys() - {e.path for e in entries} - {manifest.MANIFEST}:
        context.storage.delete(path)  # what killed attempts left, too
    context.storage.sweep()


def ingest_corpus(
    context: StageContext, data: DataConfig, config: IngestConfig, row_len: int, seed: int
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Uploads base/train and base/val; returns their files and what was counted."""
    shards = corpus_shards(data, config.shard_bytes, seed)
    storage = context.storage
    sources = hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
    made_from = manifest.fingerprint(context.identity, context.upstream_digests)
    plan = Plan(made_from=made_from, sources=sources, shards=len(shards))
    if manifest.informing(storage, PLAN, Plan) != plan:
        for path in (PLAN, NOTES, HASHES, "base"):  # of another configuration, or of other files under the same names
            storage.delete(path)
        storage.write_json(PLAN, plan.model_dump())
    notes: dict[int, Note] = {}
    read_notes(storage, notes)
    with ThreadPoolExecutor(8) as pool:
        whole = dict(zip(notes, pool.map(lambda note: _is_whole(storage, note), notes.values()), strict=True))
    notes = {i: note for i, note in notes.items() if whole[i]}  # the others are made again
    progress = Progress(context, len(shards), notes)
    items = [{"index": i, "shard": json.dumps(shard)} for i, shard in enumerate(shards)]
    seen = [np.empty(0, dtype=np.uint64)] * PARTITIONS
    for start in range(0, len(items), GROUP):
        group = items[start : start + GROUP]
        if data.deduplicate:
            missing = [item for item in group if read_hashes(storage, item) is None]
            for _ in in_parallel(missing, hash_shard, (context,), config.tasks):
                pass
            hashes = [read_hashes(storage, item) for item in group]
            kept = unique_in([h for h in hashes if h is not None], seen)
            group = [item | {"kept": bits} for item, bits in zip(group, kept, strict=True)]
        todo = [item for item in group if item["index"] not in notes]
        for index, note in in_parallel(todo, pack_shard, (context, data, config.packing, row_len), config.tasks):
            notes[index] = json.loads(note)
            progress.report(notes)
    return finished(context, data, [notes[i] for i in range(len(shards))], row_len, sources)


def in_parallel(
    items: list[dict[str, Any]], function: Callable[..., str], arguments: tuple[Any, ...], tasks: int
) -> Iterator[tuple[int, str]]:
    """The index and `function(item, *arguments)` of every item, as a Ray Dataset, in the order in which they are done.

    Raises ValueError with what was wrong with the data or its place; Ray's own error would bury that.
    """
    if not items:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    compute = ray.data.TaskPoolStrategy(size=tasks) if tasks else None
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for row in dataset.map(_guarded, fn_args=(function, arguments), compute=compute, num_cpus=1).iter_rows():
        if row["fault"]:
            raise ValueError(row["fault"])
        yield row["index"], row["result"]


def _guarded(item: dict[str, Any], function: Callable[..., str], arguments: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return {"index": item["index"], "result": function(item, *arguments), "fault": ""}
    except (ValueError, OSError, StorageError) as error:
        return {"index": item["index"], "result": "", "fault": str(error) or repr(error)}


def _is_whole(storage: Storage, note: Note) -> bool:
    """Whether the files of a shard that an earlier attempt made are what it wrote."""
    entries = [FileEntry(**file) for file in note["files"]]
    return all(
        manifest.compare(entry, functools.partial(storage.hash, entry.path), f"{storage.uri}/{entry.path}") is None
        for entry in entries
    )


def hash_shard(row: dict[str, Any], context: StageContext) -> str:
    """Leaves 64 bits of a hash of every document of a shard, in order, in storage: (documents,) uint64, and behind them
    their own SHA-256."""
    digest = functools.partial(hashlib.blake2b, digest_size=8)
    hashes = b"".join(digest(d.text.encode()).digest() for d in documents_of(json.loads(row["shard"])))
    context.storage.write_bytes(f"{HASHES}/{row['index']:05d}", hashes + hashlib.sha256(hashes).digest())
    return ""


def read_hashes(storage: Storage, item: dict[str, Any]) -> np.ndarray | None:
    """What `hash_shard` left of a shard; None where that is absent or damaged, so that it is to be made."""
    path = f"{HASHES}/{item['index']:05d}"
    for _ in range(READ_TRIES):  # the fault may be that of one read
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            return None
        hashes, seal = data[:-32], data[-32:]
        if hashlib.sha256(hashes).digest() == seal:
            return np.frombuffer(hashes, dtype=np.uint64)
    return None


def unique_in(parts: list[np.ndarray], seen: list[np.ndarray]) -> list[bytes]:
    """For every shard of a group, given the hashes of its documents, which of them are the first of their kind, as
    packed bits. `seen`, the hashes of the groups before in PARTITIONS sorted arrays, grows by those of this one."""
    values, places = np.unique(np.concatenate(parts), return_index=True)
    first = np.zeros(sum(map(len, parts)), dtype=bool)
    for i, known in enumerate(seen):
        own = values % PARTITIONS == i
        at = np.searchsorted(known, values[own])
        there = at < len(known)
        there[there] = known[at[there]] == values[own][there]
        first[places[own][~there]] = True
        seen[i] = np.sort(np.concatenate([known, values[own][~there]]), kind="stable")
    ends = np.cumsum([len(part) for part in parts])
    return [np.packbits(kept).tobytes() for kept in np.split(first, ends[:-1])]


@functools.lru_cache(maxsize=1)
def load_tokenizer(directory: Path) -> Tokenizer:
    """Once a process: it takes as long as a few megabytes of text."""
    return Tokenizer.load(directory)


def held_out_of(shard: dict[str, Any], data: DataConfig) -> HeldOut:
    """What chooses the documents of a shard that are held out."""
    return HeldOut(data, shard["number"], shard["of"], shard["total"])


def pack_shard(row: dict[str, Any], context: StageContext, data: DataConfig, packing: Packing, row_len: int) -> str:
    """One shard of the corpus: packs it, uploads its rows, and notes and returns files, rows and statistics.

    `row["kept"]` has a bit for each document: whether it is no duplicate.
    """
    tokenizer = load_tokenizer(context.fetch("tokenizer"))
    shard = json.loads(row["shard"])
    kept = np.unpackbits(np.frombuffer(row["kept"], dtype=np.uint8)) if "kept" in row else None
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    held_out: list[Packed] = []
    choice = held_out_of(shard, data)

    def wanted(total: float) -> int:
        """Tokens to hold out of a corpus of so many characters."""
        return max(row_len, int(min(data.validation_share * total, data.validation_chars) / CHARS_PER_TOKEN))

    most = wanted(shard["total"] or math.inf)

    def training() -> Iterator[Packed]:
        """What is held out goes to the side as it comes by. From the first shard that is one row at least: else its
        last documents, or the end of its last one, are taken, so that a corpus of one document trains, too."""
        waiting: deque[np.ndarray] = deque()
        tokens = 0  # of what waits
        for ids in chosen():
            waiting.append(ids)
            tokens += len(ids)
            while shard["number"] or tokens - len(waiting[0]) >= most:
                tokens -= len(waiting[0])
                yield waiting.popleft(), None
                if not waiting:
                    break
        there = sum(len(ids) for ids, _ in held_out)
        # the rest is too long to be taken
        few = there < min(LEAST * counts["tokens"], choice.most / CHARS_PER_TOKEN / 2)
        total = shard["total"] or shard["of"] * counts["characters"]  # nobody knows that of the hub's
        missing = (wanted(total) if few else row_len) - there
        while waiting and missing > 0:
            ids = waiting.pop()
            if len(ids) > 2 * missing:
                waiting.append(ids[:-missing])
                ids = np.concatenate([ids[:1], ids[-missing:]])
            held_out.append((ids, None))
            missing -= len(ids)
        yield from ((ids, None) for ids in waiting)

    def chosen() -> Iterator[np.ndarray]:
        """What is trained on, but for the last that the first shard holds out."""
        for i, document in enumerate(documents_of(shard, rejected)):
            held = choice.takes(document)
            if kept is not None and i >= len(kept):  # it grows
                raise ValueError(changed_text(document.source))
            if kept is not None and not kept[i]:
                counts["duplicates"] += 1
                continue
            ids = encoded(document, tokenizer)
            counts.update(documents=1, characters=len(document.text), tokens=len(ids))
            lengths[len(ids).bit_length()] += 1
            if held:
                held_out.append((ids, None))
            else:
                yield ids

    files: list[dict[str, Any]] = []
    index: dict[str, Any] = {}
    with context.scratch() as scratch:
        for split, documents in (("train", training()), ("val", held_out)):
            cropped: Counter[str] = Counter()
            packed = pack(documents, row_len, packing, counts=cropped)
            directory = scratch / split
            index[split] = write_rows(directory, packed, row_len, tokenizer.vocab_size, f"{row['index']:05d}")
            counts[f"{split}_rows"] += sum(count for _, count in index[split]["files"])
            counts["cropped"] += cropped["cropped"]
            for name, _ in index[split]["files"]:
                uploaded = context.storage.upload(directory / f"{name}.tokens", f"base/{split}/{name}.tokens")
                files.append(vars(uploaded))
    counts["held_out"] = sum(len(ids) for ids, _ in held_out)
    note = {"files": files, "index": index, "stats": {"counts": counts, "rejected": rejected, "lengths": lengths}}
    context.storage.write_json(note_path(row["index"]), note)
    return json.dumps(note)


def encoded(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """A document's ids, `<|bos|>` first."""
    try:
        ids = tokenizer.encode_array(document.text)
    except UnknownCharacterError as error:
        unknown = {}
        for character in set(document.text) - set(tokenizer.alphabet):
            before, _, _ = document.text.partition(character)
            within = before.count("\n") if document.source.lower().endswith(".txt") else 0
            unknown[character] = f"{document.source}, line {document.line + within}"
        raise ValueError(lacking(tokenizer.alphabet, unknown)) from error
    return np.concatenate([np.array([tokenizer.bos], dtype=ids.dtype), ids])


def finished(
    context: StageContext, data: DataConfig, notes: list[Note], row_len: int, sources: str
) -> tuple[list[FileEntry], dict[str, Any]]:
    """The files of base, the indexes written now, and the statistics of all shards together."""
    entries = [FileEntry(**file) for note in notes for file in note["files"]]
    counts, rejected = (sum((Counter(n["stats"][name]) for n in notes), Counter()) for name in ("counts", "rejected"))
    split_up = rejected.pop("split", 0)  # these are kept, in pieces
    left_out = rejected + Counter({"duplicates": counts["duplicates"]})
    corpus = counted(counts["documents"] + left_out.total(), left_out)
    for split in SPLITS:
        if not counts[f"{split}_rows"]:
            why = f" (of {corpus['read']:,} documents are left out: {reasons(left_out)})" if left_out else ""
            raise ValueError(
                f"corpus {data.corpus!r} does not fill one {split} row of {row_len} tokens: give more text, or a "
                f"smaller model.sequence_len{why}"
            )
        with context.scratch() as scratch:
            write_index(scratch, index_of(dict(enumerate(notes)), len(notes), split) or {})
            entries.append(context.storage.upload(scratch / ROWS_FILE, f"base/{split}/{ROWS_FILE}"))
    lengths = sum((Counter({int(k): v for k, v in n["stats"]["lengths"].items()}) for n in notes), Counter())
    stats = {
        "sources": sources,
        "documents": counts["documents"],
        "characters": counts["characters"],
        "tokens": counts["tokens"],
        "characters_per_token": round(counts["characters"] / max(1, counts["tokens"]), 4),
        "rows": counts["train_rows"],
        "validation_rows": counts["val_rows"],
        "validation_share": round(counts["held_out"] / max(1, counts["tokens"]), 4),
        "cropped_share": round(counts["cropped"] / max(1, counts["tokens"]), 4),
        "split": split_up,
        "read": {"corpus": corpus},
        "tokens_below": {str(1 << bits): lengths[bits] for bits in sorted(lengths)},  # documents shorter than this
    }
    return entries, stats


class Progress:
    """What the terminal and status show of the shards; `notes` has those of an earlier attempt."""

    def __init__(self, context: StageContext, shards: int, notes: dict[int, Note]) -> None:
        self._context, self._shards = context, shards
        self._began, self._said = time.monotonic(), -math.inf
        self._earlier = self._tokens(notes)
        self._told = (manifest.informing(context.storage, PROGRESS, Said) or Said()).notes

    @staticmethod
    def _tokens(notes: dict[int, Note]) -> int:
        return sum(note["stats"]["counts"].get("tokens", 0) for note in notes.values())

    def report(self, notes: dict[int, Note]) -> None:
        seconds = time.monotonic() - self._began
        if seconds - self._said < 1:
            return
        self._said, tokens = seconds, self._tokens(notes)
        metrics = {"tokens": tokens, "tokens_per_second": (tokens - self._earlier) / seconds}
        progress = {"state": "running", "step": len(notes), "steps": self._shards, "metrics": metrics}
        self._context.storage.write_json(PROGRESS, progress | {"seconds": seconds, "notes": self._told})
