"""Ingest gives the same bytes however it is run, counts all it leaves out, and base can read while it works."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Run, start

from cluster import manifest
from cluster.manifest import Manifest
from cluster.storage import Storage
from corpus import left_out, synthetic
from corpus.packing import pack
from corpus.rows import Rows
from corpus.sources import Document, read_unit, units
from corpus.tokenizers import Tokenizer
from pipeline.artifacts import RunStore
from pipeline.run import note_end
from stages import conversations, ingest
from stages import tokenizer as tokenizer_stage
from stages.config import DataConfig, IngestConfig, TokenizerConfig
from stages.context import GROWING, PROGRESS, SOURCES, StageContext
from stages.conversations import check_characters, ingest_mixture, task_problems, write_problems
from stages.growing import NOTES, note_path, open_rows, read_notes, wait_until_made
from stages.held_out import HeldOut
from tasks.base import Problem
from tasks.gsm8k import GSM8K
from tasks.mixture import Part

ROW_LEN = 129
SHARDS = 12


def write_corpus(directory: Path, files: int = SHARDS, texts: int = 30) -> Path:
    """Files of documents no two of which are equal; a file is a shard."""
    directory.mkdir(parents=True)
    for i in range(files):
        words = [f"{i}.{j} " + "the quick brown fox jumps over the lazy dog " * (1 + (i + j) % 7) for j in range(texts)]
        (directory / f"{i:02d}.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The artifact of a tokenizer stage."""
    at = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789. "] * 50, 300).save(at / "made")
    context = StageContext("test", "tokenizer", Storage(at / "run"), {}, {}, {})
    context.publish(at / "made", {}, 0.0)
    return context.storage


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def context_of(path: Path, tokenizer: Storage) -> StageContext:
    return StageContext("test", "ingest", Storage(path), {"tokenizer": tokenizer}, {"of": "test"}, {"tokenizer": "t"})


def ingested(
    path: Path, tokenizer: Storage, corpus: Path, tasks: int = 0, shard_bytes: int = 1, **data: Any
) -> tuple[Manifest, dict]:
    """The artifact of base's rows, and what was counted."""
    context = context_of(path, tokenizer)
    config = DataConfig(corpus=str(corpus), **data)
    entries, stats = ingest.ingest_corpus(
        context, config, IngestConfig(shard_bytes=shard_bytes, tasks=tasks), ROW_LEN, 0
    )
    made = context.manifest(sorted(entries, key=lambda e: e.path), {}, 0.0, stats)
    manifest.write(context.storage, made)
    return made, stats


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, ray_here: None, tokenizer: Storage, corpus: Path) -> Manifest:
    return ingested(tmp_path_factory.mktemp("once"), tokenizer, corpus, tasks=1)[0]


@pytest.mark.parametrize("tasks", [2, 4])
def test_the_rows_are_the_same_for_any_number_of_tasks(
    tmp_path: Path, once: Manifest, tokenizer: Storage, corpus: Path, tasks: int
) -> None:
    made, stats = ingested(tmp_path, tokenizer, corpus, tasks)
    assert made.digest("base") == once.digest("base")
    assert stats["documents"] == SHARDS * 30 and not stats["read"]["corpus"]["left_out"]


def test_the_rows_are_the_same_in_any_order_of_completion(
    tmp_path: Path, once: Manifest, tokenizer: Storage, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parallel = ingest.in_parallel

    def backwards(items: list[dict[str, Any]], *rest: Any) -> Iterator[tuple[int, str]]:
        return in_parallel(items[::-1], *rest)

    monkeypatch.setattr(ingest, "in_parallel", backwards)
    made, _ = ingested(tmp_path, tokenizer, corpus, tasks=1)
    assert made.digest("base") == once.digest("base")


def test_a_killed_ingest_makes_only_the_shards_that_are_missing(tmp_path: Path, ray_here: None) -> None:
    """kill -9 once three of the shards are done: the same command finishes it, and the rows are those of an ingest
    that nothing happened to."""
    corpus = write_corpus(tmp_path / "corpus", texts=600)
    sizes = {"model.depth": 1, "model.vocab_size": 300, "model.sequence_len": ROW_LEN - 1, "ingest.shard_bytes": 1}
    sizes |= {"ingest.tasks": 1, "data.validation_conversations": 64, "data.synthetic_problems": 64, "base.steps": 1}
    sizes |= {f"{stage}.total_batch_size": 10 * (ROW_LEN - 1) for stage in ("base", "mid", "sft")}
    settings = ["--corpus", str(corpus), "--chat", "none", "--gsm8k", "synthetic", *flags(sizes), "--until", "ingest"]
    run = Run(tmp_path / "killed", "r", settings)
    command = start("run", *run.arguments())

    def done() -> list[int]:
        return sorted(int(path.stem) for path in (run.path / "ingest" / NOTES).glob("0*.json"))

    assert command.until(lambda: len(done()) >= 3, 120), command.output()
    command.kill()
    before = done()
    assert 3 <= len(before) < SHARDS
    tokens = sorted((run.path / "ingest/base/train").glob("*.tokens"))
    made_at = {path: path.stat().st_mtime_ns for path in tokens if int(path.name[:5]) in before}
    result = run.go()
    assert result.code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in made_at} == made_at and len(made_at) == len(before)
    made = manifest.read(Storage(run.path / "ingest"))
    whole, stats = ingested(tmp_path / "whole", Storage(run.path / "tokenizer"), corpus)
    assert made is not None and made.digest("base") == whole.digest("base")
    assert {name: made.stats[name] for name in stats} == stats
    listed = {entry.path for entry in made.files} | {"manifest.json"}
    assert {str(p.relative_to(run.path / "ingest")) for p in (run.path / "ingest").rglob("*") if p.is_file()} == listed


def test_every_document_is_trained_on_held_out_or_counted(tmp_path: Path, ray_here: None, tokenizer: Storage) -> None:
    good = [f"document {i} " + "fox " * 40 for i in range(40)]
    directory = tmp_path / "text"
    directory.mkdir()
    lines = [json.dumps({"text": text}).encode() for text in [*good, good[3], good[3], "", " \n", "a\x00b" * 9]]
    lines += [
        b'{"text": null}',
        b'{"text": "\xff\xfe"}',
        b"{not json",
        json.dumps({"text": "".join(f"{i:7d} " for i in range(500_000))}).encode(),
    ]
    (directory / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    pq.write_table(pa.table({"text": [good[5], None, "", "parquet " * 50]}), directory / "b.parquet")
    (directory / "c.txt").write_bytes(b"\x80 is no UTF-8")
    (directory / "d.txt").write_text("plain " * 50)
    _, stats = ingested(tmp_path / "run", tokenizer, directory, shard_bytes=64 << 20)
    pieces = 4  # of the document of 4,000,000 characters
    left_out = {"binary": 1, "duplicates": 3, "empty": 3, "invalid_utf8": 2, "not_json": 1, "null": 2}
    read = len(lines) + 4 + 2 + (pieces - 1)
    assert stats["read"] == {"corpus": {"read": read, "kept": read - 12, "left_out": left_out}} and stats["split"] == 1
    assert stats["documents"] == len(good) + 2 + pieces == sum(stats["tokens_below"].values())
    bos = Tokenizer.load(Path(tokenizer.uri)).bos
    assert all(row[0] == bos for row in rows_of(tmp_path / "run"))


def rows_of(path: Path) -> list[np.ndarray]:
    """All rows of base, whatever they are for."""
    both = [Rows(path / "base" / split) for split in ("train", "val")]
    return [ids for rows in both for ids in rows.read(np.arange(rows.num_rows))[0]]


def test_duplicates_are_found_across_groups_of_shards_and_the_first_stays(
    tmp_path: Path, ray_here: None, tokenizer: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_corpus(tmp_path / "text", files=4)
    for i in range(3):
        (directory / f"again{i}.jsonl").write_bytes((directory / f"0{i}.jsonl").read_bytes())
    _, whole = ingested(tmp_path / "whole", tokenizer, directory)
    monkeypatch.setattr(ingest, "GROUP", 2)
    _, stats = ingested(tmp_path / "run", tokenizer, directory)
    assert stats == whole and (stats["documents"], stats["read"]["corpus"]["left_out"]) == (120, {"duplicates": 90})
    lines = [row.tobytes() for row in rows_of(tmp_path / "run")]
    assert len(set(lines)) == len(lines)


def test_every_shard_is_a_sample_of_a_sorted_corpus(tmp_path: Path) -> None:
    """Large files one after the other in the folder: the first shards, and so the documents held out, are of all."""
    directory = tmp_path / "text"
    directory.mkdir()
    for name in "abc":
        line = json.dumps({"text": name * 1_000}) + "\n"
        (directory / f"{name}.jsonl").write_text(line * (24 * (1 << 20) // len(line)))
    shards = ingest.corpus_shards(DataConfig(corpus=str(directory)), 3 << 20, seed=0)
    assert len(shards) == 24
    for shard in shards[:8]:
        assert len({unit["uri"] for unit in shard["units"]}) >= 2
    found = [json.dumps(unit) for shard in shards for unit in shard["units"]]
    assert sorted(found) == sorted(map(json.dumps, units(str(directory), unit_bytes=1 << 20)))
    assert ingest.corpus_shards(DataConfig(corpus=str(directory)), 3 << 20, seed=0) == shards
    assert len(ingest.corpus_shards(DataConfig(corpus=str(directory)), 64 << 20, seed=0)) == 16, "enough for all cores"


def test_the_pieces_of_a_document_are_not_parted_by_validation(
    tmp_path: Path, ray_here: None, tokenizer: Storage
) -> None:
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "a.txt").write_text("".join(f"fox {i} " for i in range(250_000)))
    for i in range(40):
        (directory / f"b{i}.txt").write_text(f"lazy dog {i} " * 200)
    _, stats = ingested(tmp_path / "run", tokenizer, directory, text_documents="file", validation_share=0.5)
    assert (stats["documents"], stats["split"]) == (43, 1)
    ours = Tokenizer.load(Path(tokenizer.uri))
    rows = Rows(tmp_path / "run" / "base" / "val")
    assert rows.num_rows > 10 and all("lazy" in ours.decode(ids) for ids in rows.read(np.arange(rows.num_rows))[0])


@pytest.mark.parametrize("size", [199, 203])
def test_no_conversation_is_on_both_sides_though_it_is_repeated(tmp_path: Path, tokenizer: Storage, size: int) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) + "\n" for i in range(size)))
    ours = Tokenizer.load(Path(tokenizer.uri))
    parts = {"chat": Part(source=str(source), repeats=3)}
    stats = ingest_mixture(tmp_path / "sft", "sft", parts, ours, ROW_LEN, 1_000, 0)
    said = {}
    for split in ("train", "val"):
        rows = Rows(tmp_path / "sft" / split)
        text = "".join(ours.decode(ids) for ids in rows.read(np.arange(rows.num_rows))[0])
        said[split] = Counter(re.findall(r"<\|assistant_start\|>(.*?)<\|assistant_end\|>", text))
    assert set(said["val"].values()) == {1} and len(said["val"]) >= size // 10
    assert set(said["train"].values()) == {3} and not said["train"].keys() & said["val"].keys()
    assert len(said["train"]) + len(said["val"]) == size
    held_out = len(said["val"])
    kept = 3 * size - 2 * held_out
    assert stats["parts"] == {"chat": {"read": 3 * size, "kept": kept, "left_out": {"held_out_again": 2 * held_out}}}


def test_base_begins_beside_ingest_and_stays_when_its_rows_do(tmp_path: Path) -> None:
    """The whole command. Ingest made again leaves base as it is, as its rows are the same; a mixture is not asked."""
    corpus = write_corpus(tmp_path / "corpus", files=16, texts=300)
    sizes = {"model.depth": 1, "model.vocab_size": 300, "model.sequence_len": ROW_LEN - 1, "ingest.shard_bytes": 1}
    sizes |= {"ingest.tasks": 1, "data.validation_conversations": 64, "data.synthetic_problems": 64, "base.steps": 6}
    sizes |= {"base.precision": "fp32", "base.eval_every": 3, "base.eval_rows": 4}
    sizes |= {f"{stage}.total_batch_size": 10 * (ROW_LEN - 1) for stage in ("base", "mid", "sft")}
    settings = ["--corpus", str(corpus), "--chat", str(tmp_path / "none.jsonl"), *flags(sizes), "--until", "base"]
    beside = Run(tmp_path, "r", [*settings, "--set", "ingest.overlap=true"])
    result = beside.go()
    assert result.code == 0, result.output
    said = result.output
    assert said.index("base            running") < said.index("ingest          done")
    one = manifest.read(Storage(beside.path / "base"))
    made = manifest.read(Storage(beside.path / "ingest"))
    assert one is not None and made is not None and one.upstream["ingest:base"] == made.digest("base")
    assert len(beside.losses("base")) == 6
    again = beside.go("--force", "ingest", "--set", "ingest.packing=best_fit", "--chat", "none", "--gsm8k", "none")
    assert again.code == 0, again.output
    assert manifest.read(Storage(beside.path / "base")) == one


def test_without_deduplication_all_stay(tmp_path: Path, ray_here: None, tokenizer: Storage) -> None:
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "a.jsonl").write_text((json.dumps({"text": "the fox " * 40}) + "\n") * 30)
    _, kept = ingested(tmp_path / "kept", tokenizer, directory, deduplicate=False)
    assert kept["read"]["corpus"] == {"read": 30, "kept": 30, "left_out": {}}


def test_an_unknown_character_is_named_with_its_file_and_line(tmp_path: Path, ray_here: None) -> None:
    Tokenizer.open("chars", "0123456789+= \n").save(tmp_path / "made")
    chars = StageContext("test", "tokenizer", Storage(tmp_path / "chars"), {}, {}, {})
    chars.publish(tmp_path / "made", {}, 0.0)
    directory = tmp_path / "text"
    directory.mkdir()
    lines = [json.dumps({"text": f"{i}+{i}={2 * i}\n" * 9}) for i in range(30)]
    lines[20] = json.dumps({"text": "1+1=two"})
    (directory / "sums.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r" 't' \(LATIN SMALL LETTER T, U\+0074\) in /.*sums\.jsonl, line 21, 'w' "):
        ingested(tmp_path / "run", chars.storage, directory)
    (directory / "sums.jsonl").rename(directory / "unread")
    (directory / "sums.txt").write_text("1+1=2\n" * 7 + "1+1=x\n")
    with pytest.raises(ValueError, match=r"'x' .* in /.*sums\.txt, line 8: take"):
        ingested(tmp_path / "run", chars.storage, directory)


def test_all_characters_that_conversations_lack_are_told_at_once(tmp_path: Path) -> None:
    said = {"mid": ["it is", "is \u00e9", "is \u00e9 \n"], "sft": ["it", "\u00a3"]}
    mixtures = {}
    for stage, answers in said.items():
        (tmp_path / stage).with_suffix(".jsonl").write_text(
            "".join(json.dumps({"prompt": "is it", "response": answer}) + "\n" for answer in answers)
        )
        mixtures[stage] = {"own": Part(source=str((tmp_path / stage).with_suffix(".jsonl")))}
    with pytest.raises(ValueError) as caught:
        check_characters(" ist", mixtures, 0)
    assert re.findall(r"'(\S+)' \(.*?\) in (\S+ \S+ \d)", str(caught.value)) == [
        ("\\n", "data.mid.own, conversation 3"),
        ("\u00a3", "data.sft.own, conversation 2"),
        ("\u00e9", "data.mid.own, conversation 2"),
    ]
    check_characters(" ist\u00e9\u00a3\n", mixtures, 0)


def test_best_fit_on_novels_pads_nothing_and_leaves_out_only_the_last_row(shared_data: Path) -> None:
    """nanochat reports up to 35% cropped. The figure is that of the ingest stage's stats."""
    found = units(str(shared_data / "novels" / "val_*.parquet"))
    documents = [document.text for unit in found for document in read_unit(unit)]
    tokenizer = Tokenizer.train(documents[:100], 2_000)
    counts: Counter[str] = Counter()
    encoded = [np.array([tokenizer.bos, *tokenizer.encode(text)]) for text in documents]
    rows = [ids for ids, _ in pack(((ids, None) for ids in encoded), 2_049, "best_fit", counts=counts)]
    assert all(len(row) == 2_049 and row[0] == tokenizer.bos for row in rows)
    assert counts["cropped"] < 2_049
    assert sum(map(len, encoded)) + counts["repeated"] == len(rows) * 2_049 + counts["cropped"]


def test_base_reads_what_there_is_while_ingest_works(
    tmp_path: Path, once: Manifest, tokenizer: Storage, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base sees the rows that it would see after ingest, in the same order, and waits for those that are not there."""
    monkeypatch.setattr("corpus.rows.POLL_SECONDS", 0.05)
    monkeypatch.setattr("stages.growing.POLL_SECONDS", 0.05)
    context = context_of(tmp_path / "run", tokenizer)
    made_from = manifest.fingerprint(context.identity, context.upstream_digests)
    base = StageContext("test", "base", Storage(tmp_path / "base"), {"ingest": context.storage}, {}, {})
    base = replace(base, upstream_digests={"ingest:base": GROWING + made_from})
    in_parallel, go_on = ingest.in_parallel, threading.Semaphore(0)

    def one_by_one(items: list[dict[str, Any]], function: Any, *rest: Any) -> Iterator[tuple[int, str]]:
        if function is not ingest.pack_shard:
            yield from in_parallel(items, function, *rest)
            return
        for item in items:
            go_on.acquire()
            note = function(item, *rest[0])
            yield item["index"], note

    monkeypatch.setattr(ingest, "in_parallel", one_by_one)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            ingested(tmp_path / "run", tokenizer, corpus)
        except BaseException as error:
            failed.append(error)

    working = threading.Thread(target=work)
    working.start()
    opened: dict[str, Any] = {}
    opening = threading.Thread(target=lambda: opened.update(rows=open_rows(base, "base/train")))
    opening.start()
    for _ in range(7):
        go_on.release()
    time.sleep(1.0)
    assert not opened, "held-out rows come from the first eight shards"
    go_on.release()
    opening.join(30)
    assert not failed and opened
    seen = [opened["rows"].step_rows(3, 0, 8)]
    assert base.manifest([], {}, 0.0).upstream == base.upstream_digests
    for _ in range(SHARDS - 8):
        go_on.release()
    seen += [opened["rows"].step_rows(3, step, 8) for step in range(1, 40)]
    working.join(30)
    assert not failed
    wait_until_made(base)
    after = open_rows(base, "base/train")
    assert after.num_rows == opened["rows"].num_rows
    for step, indices in enumerate(seen):
        assert np.array_equal(indices, after.step_rows(3, step, 8))
        assert np.array_equal(opened["rows"].read(indices)[0], after.read(indices)[0])
    assert base.manifest([], {}, 0.0).upstream == {"ingest:base": once.digest("base")}


def test_base_says_so_when_ingest_fails_beside_it(tmp_path: Path, tokenizer: Storage) -> None:
    context = context_of(tmp_path, tokenizer)
    context.storage.write_json(PROGRESS, {"state": "failed"})
    base = StageContext("test", "base", Storage(tmp_path), {"ingest": context.storage}, {}, {"ingest:base": GROWING})
    with pytest.raises(RuntimeError, match="ingest has failed"):
        open_rows(base, "base/train")


def test_an_ingest_that_was_killed_has_failed_for_those_that_wait(tmp_path: Path, ray_here: None) -> None:
    """Its process says nothing any more, so the command does."""
    import ray

    @ray.remote(max_retries=0)
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store = RunStore(str(tmp_path), "r")
    store.stage("ingest").write_json(PROGRESS, {"state": "running", "step": 3})
    note_end(store, "ingest", killed.remote())
    progress = store.progress("ingest")
    assert progress is not None and progress.state == "failed" and progress.step == 3
    note_end(store, "evaluate_base", killed.remote())
    assert store.progress("evaluate_base") is None, "it had not begun"


def test_base_does_not_go_on_with_the_rows_of_other_files(
    tmp_path: Path, once: Manifest, tokenizer: Storage, corpus: Path
) -> None:
    made, stats = ingested(tmp_path / "run", tokenizer, corpus)
    base = StageContext("test", "base", Storage(tmp_path / "base"), {"ingest": Storage(tmp_path / "run")}, {}, {})
    base = replace(base, upstream_digests={"ingest:base": made.digest("base")})
    base.storage.write_json(SOURCES, {"sources": stats["sources"]})  # what it noted when it began beside ingest
    assert open_rows(base, "base/train").num_rows == stats["rows"]
    base.storage.write_json(SOURCES, {"sources": "others"})
    with pytest.raises(RuntimeError, match="not those that base has trained on: --force base"):
        open_rows(base, "base/train")


def test_a_corpus_that_is_all_rejected_says_why(tmp_path: Path, ray_here: None, tokenizer: Storage) -> None:
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "a.txt").write_bytes(b"\xff\xfe")
    (directory / "b.jsonl").write_text(json.dumps({"text": "the same"}) + "\n" + json.dumps({"text": "the same"}))
    (directory / "c.jsonl").write_text(json.dumps({"text": "the same"}))
    reasons = r"\(of 4 documents are left out: 2 duplicates, 1 not UTF-8\)"
    with pytest.raises(ValueError, match=rf"does not fill one train row .*{reasons}"):
        ingested(tmp_path / "run", tokenizer, directory)


def test_a_problem_with_half_a_surrogate_pair_is_ingested_as_a_chat_with_one(tmp_path: Path) -> None:
    rows = r'{"question": "\ud83d?", "answer": "#### 4\ude00"}'
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    problems = task_problems(DataConfig(gsm8k=str(tmp_path)), "test", 0)
    write_problems(tmp_path / "task" / "test.jsonl", problems)
    assert GSM8K(str(tmp_path / "task")).problems("test") == [Problem("\ufffd?", "#### 4\ufffd")]


def test_files_that_are_not_read_are_told_and_stay_told(tmp_path: Path, ray_here: None, tokenizer: Storage) -> None:
    corpus, chats = write_corpus(tmp_path / "corpus", files=1), tmp_path / "chats"
    (corpus / "._00.jsonl").write_bytes(b"\0")
    chats.mkdir()
    (chats / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (chats / "empty.parquet").write_text("")
    (chats / "readme.txt").write_text("no record")
    parts = {"chats": Part(source=str(chats))}
    context = context_of(tmp_path / "run", tokenizer)
    data = DataConfig(corpus=str(corpus), gsm8k="none", mid=parts, sft=parts, validation_conversations=1)
    with pytest.raises(ValueError, match="does not fill one"):
        ingest.run(context, data, IngestConfig(), 1 << 20, 0)
    with pytest.raises(ValueError, match="two conversations that differ"):
        conversations.run(context, data, ROW_LEN - 1, 0)
    notes = context.storage.read_json(PROGRESS)["notes"]
    assert sorted(notes) == [
        f"{chats}: 1 file of another kind, 1 file of no bytes not read",
        f"{corpus}: 1 file hidden (a name begins with . or _) not read",
    ]


def test_a_file_that_changes_between_or_within_the_passes_is_named(tmp_path: Path, tokenizer: Storage) -> None:
    """A line in front would part the documents from what is known of them."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["twice", "once", "twice", *map(str, range(9))])
    )
    context = context_of(tmp_path / "run", tokenizer)
    row: dict[str, Any] = {"index": 0, "shard": json.dumps(ingest.corpus_shards(DataConfig(corpus=str(path)), 1, 0)[0])}
    ingest.hash_shard(row, context)
    hashes = ingest.read_hashes(context.storage, row)
    assert hashes is not None and len(hashes) == 12
    (kept,) = ingest.unique_in([hashes], [np.empty(0, dtype=np.uint64)] * ingest.PARTITIONS)
    with pytest.raises(ValueError, match=r"a\.jsonl is not what it was"):  # it had fewer than in the second pass
        ingest.pack_shard(row | {"kept": kept[:1]}, context, DataConfig(), "best_fit", ROW_LEN)
    path.write_text('{"text": "new"}\n' + path.read_text())
    with pytest.raises(ValueError, match=r"a\.jsonl is not what it was"):
        ingest.pack_shard(row | {"kept": kept}, context, DataConfig(), "best_fit", ROW_LEN)


def asked(answer: Any, **more: Any) -> str:
    """A line of a chat file."""
    return json.dumps({"messages": [{"role": "user", "content": "the fox?"}, {"role": "assistant", **answer}], **more})


# A line of a chat file for each reason to leave one out, and for none.
CHATS: dict[str, list[str]] = {
    "": [asked({"content": "over the dog"}), json.dumps({"prompt": "dog?", "response": "lazy"})],
    "not_json": ["{", "[]", "3", "\x00"],
    "no_conversation": [json.dumps({"text": "the fox"}), json.dumps({"messages": None}), "{}"],
    "malformed": [json.dumps({"messages": m}) for m in ([], [3], [{"role": "fox", "content": ""}])],
    "other_tool": [asked({"content": "", "tool_calls": [{"function": {"name": "search", "arguments": "{}"}}]})],
    "no_call": [
        json.dumps(
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "fox"}, tool, last]}
        )
        for tool in [{"role": "tool", "content": "42"}]
        for last in [{"role": "assistant", "content": "42"}, {"role": "user", "content": "thanks"}]
    ]
    + [asked({"content": [{"type": "python_output", "text": "42"}]})],
    "no_result": [asked({"content": [{"type": "python", "text": "6*7"}]})],
    "empty_answer": [asked({"content": ""}), asked({"content": " \n"}), asked({"content": []})],
    "no_answer": [json.dumps({"messages": [{"role": "user", "content": "dog?"}]})],
    "too_long": [asked({"content": "the quick brown fox jumps " * 99})],
}


@settings(max_examples=40)
@given(st.lists(st.sampled_from([(reason, line) for reason, lines in CHATS.items() for line in lines]), max_size=30))
def test_every_conversation_is_used_or_counted_under_its_reason(
    tokenizer: Storage, lines: list[tuple[str, str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "chat.jsonl"
        different = [("", json.dumps({"prompt": f"{i}?", "response": "fox"})) for i in range(12)]
        lines = [*different, *lines]
        source.write_text("".join(f"{line}\n" for _, line in lines))
        parts = {"own": Part(source=str(source))}
        made = ingest_mixture(Path(folder) / "sft", "sft", parts, Tokenizer.load(Path(tokenizer.uri)), ROW_LEN, 1, 0)
    counts, reasons = made["parts"]["own"], Counter(reason for reason, _ in lines)
    kept = reasons.pop("")
    assert counts["left_out"] == reasons and (counts["read"], counts["kept"]) == (len(lines), kept)
    if reasons:
        (said,) = left_out.lines(made["parts"])
        assert said.startswith(f"own: {kept} of {len(lines)} conversations are used; left out: {max(reasons.values())}")


def test_a_part_of_which_nothing_is_of_use_is_named_with_the_largest_reason(tmp_path: Path, tokenizer: Storage) -> None:
    ours, good = Tokenizer.load(Path(tokenizer.uri)), tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps({"prompt": f"{i}?", "response": "fox"}) + "\n" for i in range(9)))
    bad = tmp_path / "bad.jsonl"
    parts = {"good": Part(source=str(good)), "bad": Part(source=str(bad))}
    for reason, advice in (
        ("too_long", "larger model.sequence_len"),
        ("no_conversation", "such as .*record 1: .*text"),
    ):
        bad.write_text("\n".join([*CHATS[reason][:1] * 3, *CHATS["not_json"][:2]]))
        message = rf"data\.mid\.bad: none of 5 conversations .*: 3 {left_out.REASONS[reason]}, 2 not JSON.*{advice}"
        with pytest.raises(ValueError, match=message):
            ingest_mixture(tmp_path / "mid", "mid", parts, ours, ROW_LEN, 1, 0)
    bad.write_text("\n".join([*CHATS[""][:1] * 5, *CHATS["no_answer"] * 7]))
    with pytest.raises(ValueError, match=r"sft needs two .*differ.* has 5, in which there are 1; .*7 without an"):
        ingest_mixture(tmp_path / "sft", "sft", {"bad": parts["bad"]}, ours, ROW_LEN, 1, 0)


def test_conversations_that_are_cut_short_are_counted(tmp_path: Path, tokenizer: Storage) -> None:
    source = tmp_path / "chat.jsonl"
    with source.open("w") as file:
        for n in (1, 2, 3, 9):
            turns = [{"role": role, "content": f"{n} the fox " * 10} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns * n}) + "\n")
    made = ingest_mixture(
        tmp_path / "sft", "sft", {"own": Part(source=str(source))}, Tokenizer.load(Path(tokenizer.uri)), ROW_LEN, 1, 0
    )
    assert 1 <= made["parts"]["own"]["shortened"] <= 3
    (said,) = left_out.lines(made["parts"])
    assert f"{made['parts']['own']['shortened']} lose their last exchanges" in said


def here(
    items: list[dict[str, Any]], function: Callable[..., str], arguments: tuple[Any, ...], _: int
) -> Iterator[tuple[int, str]]:
    """`ingest.in_parallel` without the seconds that Ray takes for each."""
    return ((item["index"], function(item, *arguments)) for item in items)


DOCUMENTS: dict[str, list[bytes]] = {
    "": [b"the fox %d " % i * 60 for i in range(3)],  # the first of each; the others are duplicates
    "empty": [b"", b" \n\t"],
    "binary": [b"PK\0\1\0\0", b"\x01\x02\x03\x04"],
    "invalid_utf8": [b"\xff\xfe the", b"\xed\xa0\x80"],
    "null": [b""],
    "not_text": [b"5", b'["a"]', b"true"],
    "no_column": [b'{"title": "a"}'],
    "not_json": [b"{", b"[]"],
}


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([(reason, text) for reason, texts in DOCUMENTS.items() for text in texts]), max_size=10),
    st.sampled_from(["jsonl", "parquet", "txt"]),
)
def test_every_document_is_kept_or_counted_under_its_reason(
    tokenizer: Storage, drawn: list[tuple[str, bytes]], kind: str
) -> None:
    only_in = {"null": ("jsonl", "parquet"), "not_json": ("jsonl",), "not_text": ("jsonl",), "no_column": ("jsonl",)}
    drawn = [(reason, text) for reason, text in drawn if kind in only_in.get(reason, (kind,))]
    documents = [*(("", b"the quick brown fox jumps over %d " % i * 20) for i in range(40)), *drawn]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "in_parallel", here)
        text = Path(folder) / "text"
        text.mkdir()
        for i, (reason, content) in enumerate(documents):
            if kind == "txt":
                (text / f"{i:02d}.txt").write_bytes(content)
            elif kind == "jsonl":
                escaped = re.sub(rb"[\x00-\x1f]", lambda match: b"\\u%04x" % match[0][0], content)
                value = {"null": b"null", "not_text": content}.get(reason, b'"%b"' % escaped)
                line = content if reason in ("not_json", "no_column") else b'{"text": %b}' % value
                with (text / "a.jsonl").open("ab") as file:
                    file.write(line + b"\n")
        if kind == "parquet":
            values = [None if reason == "null" else content for reason, content in documents]
            pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), text / "a.parquet", row_group_size=5)
        _, stats = ingested(Path(folder) / "run", tokenizer, text, shard_bytes=1 << 20)
    counts, reasons = stats["read"]["corpus"], Counter(reason for reason, _ in documents)
    reasons["duplicates"] = reasons.pop("") - (kept := len({content for reason, content in documents if not reason}))
    assert counts == {"read": len(documents), "kept": kept, "left_out": +reasons} and stats["documents"] == kept


SIZES = {"one row and a half": 1.5, "three rows": 3, "one megabyte": 3_000}


@pytest.mark.parametrize("form", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("size", SIZES)
def test_a_single_file_of_any_form_trains_and_holds_out_a_share(
    tmp_path: Path, tokenizer: Storage, monkeypatch: pytest.MonkeyPatch, form: str, size: str
) -> None:
    """One document, too, where the form has no more: its end is held out."""
    monkeypatch.setattr(ingest, "in_parallel", here)
    text = "".join(f"the quick brown fox {i}\n" + "\n" * (i % 5 == 0) for i in range(int(SIZES[size] * 11)))
    file = tmp_path / form
    if form == "a.txt":
        file.write_text(text)
    elif form == "a.jsonl":
        file.write_text(json.dumps({"text": text}))
    else:
        pq.write_table(pa.table({"text": [text]}), file)
    if SIZES[size] < 2:
        with pytest.raises(ValueError, match=r"does not fill one train row of 129 tokens: give more text"):
            ingested(tmp_path / "run", tokenizer, file, shard_bytes=1 << 20)
        return
    _, stats = ingested(tmp_path / "run", tokenizer, file, shard_bytes=1 << 20)
    assert stats["rows"] and stats["validation_rows"] and stats["tokens"] > 129 * 2
    if SIZES[size] > 100:
        assert (0.01 if form == "a.txt" else 0.001) < stats["validation_share"] < 0.1


@pytest.mark.parametrize("place", ["here", "hub"])
@pytest.mark.parametrize("lines, short", [(16_000, 0), (16_000, 40), (8_000, 0)])
def test_of_a_few_very_long_documents_a_share_is_held_out_too(
    tmp_path: Path, tokenizer: Storage, monkeypatch: pytest.MonkeyPatch, place: str, lines: int, short: int
) -> None:
    """Each a whole book, in two files; of the hub's files, which are not opened before, the size is not known."""
    monkeypatch.setattr(ingest, "in_parallel", here)
    if place == "hub":

        def unsized(*where: Any, **how: Any) -> list[dict[str, Any]]:
            known = ("bytes", "size", "changed")
            return [{key: unit[key] for key in unit if key not in known} for unit in units(*where, **how)]

        monkeypatch.setattr(ingest, "units", unsized)
    for file in range(2):
        texts = [f"the quick brown fox {i} jumps over {file}\n" * lines for i in range(4)]
        texts += [f"a fox {file} {i}" for i in range(short)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{file}.parquet")
    _, stats = ingested(tmp_path / "run", tokenizer, tmp_path / "*.parquet", shard_bytes=1 << 20)
    assert 0.01 < stats["validation_share"] < 0.1


@pytest.mark.parametrize("text", ["made here", "a novel"])
def test_a_text_file_compresses_as_its_paragraphs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, text: str
) -> None:
    """Its own tokenizer included, which sees all of either. Of about a megabyte."""
    monkeypatch.setattr(ingest, "in_parallel", here)
    if text == "a novel":
        novels = request.getfixturevalue("shared_data") / "novels"
        parts = pq.read_table(novels, filters=[("book", "==", "Woolf_Night_1919")]).sort_by("part")["text"].to_pylist()
        paragraphs = [paragraph for part in parts for paragraph in part.split("\n\n") if paragraph.strip()]
        assert len(paragraphs) > 1_000 and sum(map(len, paragraphs)) > 900_000
    else:
        paragraphs = [text.replace("\n\n", "\n") for text in synthetic.documents(0, 3_200, 0)]
    (tmp_path / "whole.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    compressed = {}
    for file in ("whole.txt", "lines.jsonl"):
        data, run = DataConfig(corpus=str(tmp_path / file), deduplicate=False), tmp_path / f"run of {file}"
        made = StageContext("test", "tokenizer", Storage(run / "tokenizer"), {}, {}, {})
        tokenizer_stage.run(made, data, TokenizerConfig(), 1 << 20, 1_024, 0)
        _, stats = ingested(run, made.storage, tmp_path / file, shard_bytes=1 << 20, deduplicate=False)
        compressed[file] = stats["characters_per_token"]
        assert 0.01 < stats["validation_share"] < 0.1
    assert compressed["whole.txt"] == pytest.approx(compressed["lines.jsonl"], rel=0.03)


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 3_000), min_size=1, max_size=300),
    st.integers(1, 20),
    st.sampled_from([0.02, 0.05, 0.2]),
    st.integers(100, 100_000),
)
def test_what_is_held_out_is_a_share_that_knows_its_bounds(
    lengths: list[int], shards: int, share: float, most: int
) -> None:
    """Of documents of any lengths in any number of shards: no more than is asked for, none that is a tenth of all, and
    where there are enough of them as large a share as is asked for."""
    data, total = DataConfig(validation_share=share, validation_chars=most), sum(lengths)
    taken = []
    for shard in range(shards):
        choice = HeldOut(data, shard, shards, total)
        taken += [n for n in lengths[shard::shards] if choice.takes(Document("x" * n, "", 1))]
    assert sum(taken) <= most + min(shards, 8) * max(lengths)
    assert all(n < total / 10 for n in taken)
    if shards <= 8 and most > total and max(lengths) < total / 10:
        assert abs(len(taken) - share * len(lengths)) <= shards


def test_what_rows_leaves_out_and_a_folder_that_grows_are_told(tmp_path: Path, tokenizer: Storage) -> None:
    chats = tmp_path / "chats"
    chats.mkdir()
    lines = [json.dumps({"prompt": f"{i}?", "response": "fox"}) + "\n" for i in range(30)]
    (chats / "a.jsonl").write_text("".join(lines))
    parts = {"own": Part(source=str(chats), rows=20, repeats=2)}
    ours = Tokenizer.load(Path(tokenizer.uri))
    made = ingest_mixture(tmp_path / "sft", "sft", parts, ours, ROW_LEN, 1, 0)["parts"]["own"]
    assert (made["read"], made["left_out"]["beyond_rows"]) == (60, 20)
    context = context_of(tmp_path / "run", tokenizer)
    data = DataConfig(corpus="synthetic", gsm8k="none", sft=parts)
    with pytest.MonkeyPatch.context() as patch:

        def grown(*arguments: Any) -> dict[str, Any]:
            (chats / "b.jsonl").write_text(lines[0])
            return ingest_mixture(*arguments)

        patch.setattr(conversations, "ingest_mixture", grown)
        with pytest.raises(ValueError, match=r"b\.jsonl is not what it was when the files were listed"):
            conversations.run(context, data, ROW_LEN - 1, 0)


def test_a_note_of_odd_shape_is_damaged_and_its_shard_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"row_len": 33, "dtype": "<u2", "masked": False, "complete": True, "files": [["00000-000", 2]]}
    whole = {
        "files": [{"path": "base/train/00000-000.tokens", "size": 132, "sha256": "0" * 64}],
        "index": {"train": rows, "val": rows | {"files": []}},
        "stats": {"counts": {"documents": 1}, "rejected": {}, "lengths": {"5": 1}},
    }
    odd = [
        5,
        {},
        whole | {"files": 5},
        whole | {"files": [{"path": "../x", "size": 1, "sha256": "0" * 64}]},
        whole | {"index": []},
        whole | {"index": {"train": rows}},
        whole | {"index": {"train": [], "val": []}},
        whole | {"index": {"train": rows | {"files": [1]}, "val": rows}},
        whole | {"index": {"train": rows | {"files": "ab"}, "val": rows}},
        whole | {"index": {"train": rows | {"row_len": 0}, "val": rows}},
        whole | {"index": {"train": rows | {"dtype": "object"}, "val": rows}},
        whole | {"stats": {}},
        whole | {"stats": {"counts": {"documents": "1"}, "rejected": {}, "lengths": {}}},
    ]
    storage = Storage(tmp_path)
    for shard, note in enumerate([whole, *odd]):
        storage.write_bytes(note_path(shard), json.dumps(note).encode())
    notes: dict[int, Any] = {}
    read_notes(storage, notes)
    assert notes == {0: whole}
    assert caplog.text.count("is damaged") == len(odd)
