"""A person's mistake is answered by one clear message, and nothing that was made is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SETTINGS, flags
from runs import Run, fathom, one_clear_message, start

Settings = list[str]
DEMO = ["--preset", "demo", *flags(SETTINGS)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--set", "base.total_batchsize=2048"], ["base.total_batchsize", "did you mean base.total_batch_size"]),
        (["--set", "base.steps=few"], ["base.steps", "few"]),
        (["--preset", "demmo"], ["demmo", "demo"]),
        (["--set", "base.total_batch_size=2000"], ["base.total_batch_size = 2000", "1920 or 2048"]),
        (["--set", "base.device_batch_size=5"], ["base.device_batch_size = 5", "1, 2, 4, 8, 16"]),
        (["--workers", "3"], ["total_batch_size = 2048", "3 worker", "1920 or 2304"]),
        (["--gsm8k", "none", "--with-rl"], ["--with-rl", "--gsm8k"]),
        (["--only", "bass"], ["--only bass", "base"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_what_was_given_wrong_is_named(tmp_path: Path, wrong: Settings, said: list[str]) -> None:
    result = fathom("run", *DEMO, "--storage", str(tmp_path / "runs"), *wrong, seconds=120)
    one_clear_message(result, *said)
    assert not (tmp_path / "runs").exists()


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = fathom("run", *DEMO, "--storage", str(tmp_path / "file/runs"), seconds=120)
    one_clear_message(result, str(tmp_path / "file/runs"), "cannot be written", "--storage")
    assert (tmp_path / "file").read_text() == "mine"


def parquet_without_text(folder: Path) -> str:
    pq.write_table(pa.table({"body": ["Once upon a time."]}), folder / "book.parquet")
    return str(folder / "*.parquet")


def documents_without_a_letter(folder: Path) -> str:
    pq.write_table(pa.table({"text": ["", " \n", ""]}), folder / "blank.parquet")
    return str(folder)


def nothing_at_all(folder: Path) -> str:
    return str(folder / "nowhere" / "*.parquet")


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        (nothing_at_all, ["matches no file", "nowhere/*.parquet"]),
        (parquet_without_text, ["book.parquet has no string column `text`", "body"]),
        (documents_without_a_letter, ["holds no documents"]),
    ],
)
def test_a_corpus_that_cannot_be_used(tmp_path: Path, corpus: Callable[[Path], str], said: list[str]) -> None:
    (tmp_path / "corpus").mkdir()
    run = Run(tmp_path / "runs", "corpus", [*DEMO, "--corpus", corpus(tmp_path / "corpus")])
    one_clear_message(run.go("--until", "base"), *said)
    assert run.manifests() == {}


def test_a_changed_setting_shows_the_field_and_loses_nothing(line: Run) -> None:
    before = line.manifests()
    result = line.go("--set", "mid.matrix_lr=0.5", "--set", "rl.ratio_cap=3", seconds=120)
    one_clear_message(
        result, "mid: mid.matrix_lr: 0.02 -> 0.5", "rl: rl.ratio_cap: 2.0 -> 3.0", "--force mid --force rl", "--name"
    )
    assert line.manifests() == before
    assert set(line.states().values()) == {"done"}


def test_a_setting_of_how_and_not_what_drifts_nothing(line: Run) -> None:
    before = line.manifests()
    result = line.go("--set", "base.save_every=7", "--set", "base.device_batch_size=4", "--workers", "2", seconds=120)
    assert result.code == 0, result.output
    assert line.manifests() == before


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_artifact_is_named_and_not_used(line: Run, tmp_path: Path, damage: str) -> None:
    run = line.branch(tmp_path, "tokenizer", "ingest", "base")
    weights = run.path / "base/model.safetensors"
    size = weights.stat().st_size
    if damage == "truncated":
        os.truncate(weights, size - 1)
        fault = f"model.safetensors has {size - 1} bytes instead of {size}"
    else:
        weights.unlink()
        fault = "model.safetensors is missing"
    before = run.manifests()
    one_clear_message(run.go("--until", "mid", seconds=120), str(run.path / "base"), fault, "--force base")
    assert run.manifests() == before
    forced = run.go("--until", "mid", "--force", "base", "--dry-run", seconds=120)
    rows = [row.split() for row in forced.output.splitlines()]
    assert ["base", "forced", "run"] in rows and ["ingest", "done", "skip"] in rows


def test_a_stage_whose_input_is_not_made(line: Run, tmp_path: Path) -> None:
    run = line.branch(tmp_path, "tokenizer", "ingest")
    one_clear_message(run.go("--only", "mid", seconds=120), "mid reads base", "--from base")
    assert set(run.manifests()) == {"tokenizer", "ingest"}


def test_a_second_run_of_the_same_name_is_told_who_holds_it(tmp_path: Path) -> None:
    run = Run(tmp_path, "held", DEMO)
    first = start("run", *run.arguments("--until", "tokenizer"))
    try:
        assert first.until((run.path / "claim.json").exists, 60), first.output()
        second = run.go("--until", "tokenizer", seconds=120)
        one_clear_message(second, "run held is held by", f"pid {first.process.pid}", "--name")
        ended = first.finish(120)
        assert ended.code == 0, ended.output
    finally:
        first.kill()
    assert run.states()["tokenizer"] == "done"
    assert not (run.path / "claim.json").exists()
