"""How fast text becomes rows, and rows batches: `python -m bench.ingest --corpus '/data/novels/*.parquet'`.

Four comparisons in one run: the ingest stage against tiktoken's own `encode_ordinary_batch` on the same text and
cores; training the tokenizer against rustbpe alone; reading rows from disk, and with --s3 from an object store; and
the most memory that any process took. The text is the corpus over and over, with a number before every document so
that none is a duplicate, until there is as much as --megabytes asks for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import rustbpe
import tiktoken
import torch

from bench.report import watching_memory, write
from cluster import manifest
from cluster.runtime import connect
from cluster.storage import Storage
from corpus.sources import read_unit, units
from corpus.tokenizers import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from stages import ingest
from stages.config import DataConfig, IngestConfig
from stages.context import StageContext
from stages.growing import open_rows
from stages.training.batches import Batches
from stages.training.parallel import World

FILE_BYTES = 32 << 20  # of text in one Parquet file
BATCH_BYTES = 16 << 20  # of text that tiktoken gets at once
TRAIN_BYTES = 32 << 20  # of text that tokenizers are trained on
READ_TOKENS = 50_000_000
TOTAL_BATCH_SIZE = 524_288


@dataclass(frozen=True)
class Measured:
    """One line of the table: a rate, and the one it is compared with or must reach."""

    what: str
    value: float
    unit: str
    beside: float
    ratio: float


def texts_of(corpus: str) -> Iterator[str]:
    """All documents, over and over, each time with another number before them."""
    for turn in count():
        for unit in units(corpus, documents=20_000):
            for i, document in enumerate(read_unit(unit)):
                yield f"{turn}.{i} {document.text}"


def write_corpus(corpus: str, megabytes: int, directory: Path) -> int:
    """Parquet files of varied text; returns its size in bytes as UTF-8."""
    total, size, texts, documents = 0, 0, [], texts_of(corpus)
    while total < megabytes << 20:
        text = next(documents)
        texts.append(text)
        size += len(text.encode())
        if size >= FILE_BYTES or total + size >= megabytes << 20:
            path = directory / f"{total:012d}.parquet"
            pq.write_table(pa.table({"text": texts}), path, row_group_size=1_000, compression="zstd")
            total, size, texts = total + size, 0, []
    return total


def documents_of(directory: Path, limit: int) -> Iterator[list[str]]:
    """Lists of texts of about BATCH_BYTES, `limit` bytes in all."""
    batch, size, total = [], 0, 0
    for unit in units(str(directory)):
        for document in read_unit(unit):
            batch.append(document.text)
            size += len(document.text)
            if size >= BATCH_BYTES:
                yield batch
                total += size
                batch, size = [], 0
                if total >= limit:
                    return
    if batch:
        yield batch


def tiktoken_rate(encoding: tiktoken.Encoding, directory: Path, limit: int, threads: int) -> float:
    """Bytes a second of `encode_ordinary_batch` alone, reading not counted."""
    seconds, total = 0.0, 0
    for batch in documents_of(directory, limit):
        total += sum(len(text.encode()) for text in batch)
        began = time.perf_counter()
        encoding.encode_ordinary_batch(batch, num_threads=threads)
        seconds += time.perf_counter() - began
    return total / seconds


def training_times(directory: Path, vocab_size: int) -> tuple[float, float]:
    """Seconds of our training and of rustbpe's alone, on the same texts in memory; the better of two each."""
    texts = [text for batch in documents_of(directory, TRAIN_BYTES) for text in batch]
    ours, alone = [], []
    for _ in range(2):
        began = time.perf_counter()
        rustbpe.Tokenizer().train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        Tokenizer.train(texts, vocab_size)
        ours.append(time.perf_counter() - began)
    return min(ours), min(alone)


def reader_rate(context: StageContext) -> float:
    """Tokens a second that one rank reads, as batches that training takes."""
    rows = open_rows(context, "base/train")
    batches = Batches(rows, 0, TOTAL_BATCH_SIZE // (rows.row_len - 1), World(0, 1, torch.device("cpu"), 1))
    began, read, step = time.perf_counter(), 0, 0
    while read < READ_TOKENS:
        read += batches.read(step)[0].numel()
        step += 1
    return read / (time.perf_counter() - began)


@ray.remote(num_cpus=0)
def run_ingest(context: StageContext, data: DataConfig, sequence_len: int) -> float:
    """Seconds that the corpus takes, in a process of its own, as in a run."""
    began = time.perf_counter()
    entries, stats = ingest.ingest_corpus(context, data, IngestConfig(), sequence_len + 1, 0)
    seconds = time.perf_counter() - began
    manifest.write(context.storage, context.manifest(entries, {}, seconds, stats))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.ingest", description=__doc__)
    parser.add_argument("--corpus", default="synthetic", help="text to start from: as fathom run --corpus")
    parser.add_argument("--megabytes", type=int, default=256, help="text to ingest (default 256)")
    parser.add_argument("--vocab", type=int, default=32_768, help="size of the tokenizer (default 32768)")
    parser.add_argument("--seq", type=int, default=2_048, help="tokens a row (default 2048)")
    parser.add_argument("--s3", metavar="URI", help="an empty place in an object store, to read rows from it, too")
    parser.add_argument("--out", type=Path, default=Path("bench/results/ingest-cpu.json"), help="JSON file to write")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as scratch:
        home = Path(scratch)
        (home / "text").mkdir()
        size = write_corpus(args.corpus, args.megabytes, home / "text")
        ours, alone = training_times(home / "text", args.vocab)
        texts = [text for batch in documents_of(home / "text", TRAIN_BYTES) for text in batch]
        tokenizer = Tokenizer.train(texts, args.vocab)
        del texts
        tokenizer_at = Storage(home / "run").at("tokenizer")
        made = StageContext("bench", "tokenizer", tokenizer_at, {}, {}, {})
        tokenizer.save(home / "tokenizer")
        made.publish(home / "tokenizer", {}, 0.0)
        storage = Storage(home / "run").at("ingest")
        context = StageContext("bench", "ingest", storage, {"tokenizer": tokenizer_at}, {}, {})
        data = DataConfig(corpus=str(home / "text"))
        connect(False)
        encoding_rate = tiktoken_rate(tokenizer.encoding, home / "text", size // 2, cores)
        with watching_memory() as peak:
            seconds = ray.get(run_ingest.remote(context, data, args.seq))
        encoding_rate = (encoding_rate + tiktoken_rate(tokenizer.encoding, home / "text", size // 2, cores)) / 2
        reader = StageContext("bench", "base", Storage(home / "run").at("base"), {"ingest": storage}, {}, {})
        rate, mb = size / seconds / 1e6, encoding_rate / 1e6
        results = [
            Measured("ingest, beside tiktoken's batch encoding", rate, "MB/s", mb, rate / mb),
            Measured("training the tokenizer, beside rustbpe", ours, "s", alone, ours / alone),
            Measured("memory of the largest process", peak["largest_gib"], "GiB", 1.5, peak["largest_gib"] / 1.5),
            Measured("reading rows from disk", reader_rate(reader) / 1e6, "Mtok/s", 50, 0),
        ]
        if args.s3:
            remote = Storage(args.s3).at(uuid.uuid4().hex)  # where no cache has it
            for path in storage.list():
                remote.upload(home / "run" / "ingest" / path, path)
            far = StageContext("bench", "base", remote, {"ingest": remote}, {}, {})
            results.append(Measured("reading rows from the object store", reader_rate(far) / 1e6, "Mtok/s", 20, 0))
            made_again = manifest.read(remote)
            assert made_again is not None
            shutil.rmtree(manifest.local_root(remote, made_again.fingerprint))
            remote.delete()
    rows = []
    for r in results:
        ratio = r.ratio or r.value / r.beside
        print(f"{r.what:<42} {r.value:>10.2f} {r.unit:<7} {r.beside:>10.2f} {ratio:>7.2f} x")
        rows.append({"what": r.what, "value": r.value, "unit": r.unit, "beside": r.beside, "ratio": ratio})
    write("ingest", rows, args.out)


if __name__ == "__main__":
    main()
