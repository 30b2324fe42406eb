"""The ingest stage: documents and conversations to packed rows of token ids.

The corpus is cut into shards of whole work units, one row of a Ray Dataset each; a task reads, tokenizes and packs its
shard and uploads the rows itself. What a shard holds depends on nothing but the corpus, so the bytes are the same for
any number of tasks in any order.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import ray.data

from cluster import manifest
from cluster.storage import FileEntry
from corpus.conversation import from_record, render
from corpus.packing import pack
from corpus.rows import ROWS_FILE, RowWriter
from corpus.sources import Unit, read_records, read_unit, units
from corpus.synthetic import Split
from corpus.tokenizers import Tokenizer
from stages.config import DataConfig, IngestConfig
from stages.context import StageContext
from tasks.arithmetic import Arithmetic
from tasks.base import Problem, conversation_of
from tasks.gsm8k import GSM8K

NONE, SYNTHETIC = "none", "synthetic"
HELD_OUT_SHARE = 0.1  # at most this share of a shard's documents is held out


def corpus_shards(data: DataConfig, shard_bytes: int, seed: int) -> list[list[Unit]]:
    """The corpus's work units in groups of about `shard_bytes`; a unit of unknown size is a group of its own."""
    shards: list[list[Unit]] = []
    room = 0
    for unit in units(data.corpus, data.synthetic_documents, seed):
        size = unit.get("bytes", shard_bytes)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(unit)
        room -= size
    if not shards:
        raise ValueError(f"corpus {data.corpus!r} holds no documents")
    share, rest = divmod(data.max_documents or 0, len(shards))
    held_out = math.ceil(data.validation_documents / len(shards))
    return [
        [u | {"max_documents": share + (i < rest), "held_out": held_out} for u in shard]
        for i, shard in enumerate(shards)
    ]


def split_documents(shard: list[Unit], data: DataConfig) -> tuple[list[str], list[str]]:
    """Training and held-out documents of a shard: the first few are held out, so both come from all over the corpus."""
    documents = [text for unit in shard for text in read_unit(unit)]
    if data.max_documents:
        documents = documents[: shard[0]["max_documents"]]
    held_out = min(shard[0]["held_out"], math.ceil(len(documents) * HELD_OUT_SHARE), max(0, len(documents) - 1))
    return documents[held_out:], documents[:held_out]


def run(context: StageContext, data: DataConfig, config: IngestConfig, sequence_len: int, seed: int) -> None:
    began = time.monotonic()
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    entries, stats = ingest_corpus(context, data, config, sequence_len + 1, seed)
    with context.scratch() as directory:
        problems = {split: task_problems(data, split, seed) for split in get_args(Split)}
        write_problems(directory / "task", problems)
        stats |= write_conversations(directory, data, problems["train"], tokenizer, sequence_len + 1, seed)
        entries += context.storage.upload_tree(directory)
    manifest.write(context.storage, context.manifest(entries, stats, time.monotonic() - began))
    context.storage.delete("progress.json")


def ingest_corpus(
    context: StageContext, data: DataConfig, config: IngestConfig, row_len: int, seed: int
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Uploads base/train and base/val; returns their files and what was counted."""
    shards = corpus_shards(data, config.shard_bytes, seed)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"index": i, "shard": json.dumps(shard)} for i, shard in enumerate(shards)]
    compute = ray.data.TaskPoolStrategy(size=config.tasks) if config.tasks else None
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    made = dataset.map(pack_shard, fn_args=(context, data, row_len), compute=compute, num_cpus=1).take_all()
    made = [json.loads(row["result"]) for row in sorted(made, key=lambda row: row["index"])]
    entries = [FileEntry(**entry) for shard in made for entry in shard["files"]]
    for split in ("train", "val"):
        index = made[0]["index"][split] | {"shards": [s for shard in made for s in shard["index"][split]["shards"]]}
        if not sum(index["shards"]):
            raise ValueError(
                f"corpus {data.corpus!r} does not fill one {split} row of {row_len} tokens: give more text in at least "
                "two documents, as some are held out, or a smaller model.sequence_len"
            )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / ROWS_FILE
            path.write_text(json.dumps(index) + "\n")
            entries.append(context.storage.upload(path, f"base/{split}/{ROWS_FILE}"))
    totals = {name: sum(shard["stats"][name] for shard in made) for name in made[0]["stats"]}
    return entries, totals


def pack_shard(row: dict[str, Any], context: StageContext, data: DataConfig, row_len: int) -> dict[str, Any]:
    """One shard of the corpus: packs it and uploads its rows; returns files, row counts and statistics as JSON."""
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    train, held_out = split_documents(json.loads(row["shard"]), data)
    stats = {"documents": len(train) + len(held_out), "characters": sum(map(len, train)) + sum(map(len, held_out))}
    stats |= {"tokens": 0, "rows": 0}
    files: list[dict[str, Any]] = []
    index: dict[str, Any] = {}
    for split, documents in (("train", train), ("val", held_out)):
        with tempfile.TemporaryDirectory(prefix="fathom-ingest-") as name:
            directory = Path(name)
            packed = pack(encoded(documents, tokenizer, stats), row_len)
            stats["rows"] += write_rows(directory, ((ids, None) for ids, _ in packed), row_len, tokenizer.vocab_size)
            index[split] = json.loads((directory / ROWS_FILE).read_text())
            tokens = directory / "00000.tokens"
            files.append(vars(context.storage.upload(tokens, f"base/{split}/{row['index']:05d}.tokens")))
    return {"index": row["index"], "result": json.dumps({"files": files, "index": index, "stats": stats})}


def encoded(documents: list[str], tokenizer: Tokenizer, stats: dict[str, int]) -> Iterator[tuple[np.ndarray, None]]:
    """Each document's ids, `<|bos|>` first; counts its tokens."""
    for document in documents:
        ids = tokenizer.encode(document)
        stats["tokens"] += len(ids) + 1
        yield np.array([tokenizer.bos, *ids]), None


def write_rows(
    directory: Path,
    rows: Iterable[tuple[np.ndarray, np.ndarray | None]],
    row_len: int,
    vocab_size: int,
    masked: bool = False,
) -> int:
    """Writes one shard of rows; returns how many."""
    writer, count = RowWriter(directory, row_len, vocab_size, masked), 0
    for ids, mask in rows:
        writer.add(ids, mask)
        count += 1
    writer.close()
    return count


def task_problems(data: DataConfig, split: Split, seed: int) -> list[Problem]:
    """The problems that RL trains on and evaluation asks."""
    if data.gsm8k == NONE:
        return []
    task = Arithmetic(data.synthetic_problems, seed=seed) if data.gsm8k == SYNTHETIC else GSM8K(data.gsm8k)
    problems = task.problems(split)
    if not problems:
        raise ValueError(f"gsm8k {data.gsm8k!r} holds no {split} problems")
    return problems


def write_problems(directory: Path, problems: dict[str, list[Problem]]) -> None:
    directory.mkdir(parents=True)
    for split, items in problems.items():
        lines = "".join(json.dumps(vars(p), ensure_ascii=False) + "\n" for p in items)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_conversations(
    directory: Path, data: DataConfig, problems: list[Problem], tokenizer: Tokenizer, row_len: int, seed: int
) -> dict[str, int]:
    """Rows of mid (all conversations, every token counts) and sft (problems and as many chats, masked, padded)."""
    records = islice(read_records(data.chat), data.max_chat) if data.chat != NONE else ()
    chats = [from_record(record) for record in records]
    solved = [conversation_of(p) for p in problems]
    if not chats and not solved:
        raise ValueError("there are no conversations for mid and sft: give --chat, --gsm8k or both")
    mixtures = {"mid": chats + solved, "sft": solved + chats[: len(solved) or None]}
    stats: dict[str, int] = {}
    for stage, mixture in mixtures.items():
        order = np.random.default_rng((seed, *stage.encode())).permutation(len(mixture))
        rendered = [render(mixture[i], tokenizer, row_len) for i in order]
        fitting = [r for r in rendered if len(r[0])]
        stats |= {f"{stage}_conversations": len(fitting), f"{stage}_too_long": len(rendered) - len(fitting)}
        if len(fitting) < 2:
            raise ValueError(
                f"{stage}: {len(fitting)} conversations fit into rows of {row_len} tokens; at least 2 are needed"
            )
        held_out = min(data.validation_documents, math.ceil(len(fitting) * HELD_OUT_SHARE))
        for split, part in (("train", fitting[held_out:]), ("val", fitting[:held_out])):
            masked = ((ids, mask if stage == "sft" else None) for ids, mask in part)
            rows = pack(masked, row_len, pad_id=tokenizer.bos)
            target = directory / stage / split
            stats[f"{stage}_{split}_rows"] = write_rows(target, rows, row_len, tokenizer.vocab_size, masked=True)
    return stats
