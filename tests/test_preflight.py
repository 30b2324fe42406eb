"""What can be known of inputs is said before anything starts, with the flag that mends it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import fathom, one_clear_message

from pipeline import cli
from pipeline.artifacts import RunStore
from pipeline.config import ConfigError, identity_of, load_config, size_before
from pipeline.dag import StageError
from pipeline.preflight import check_inputs, proportions
from pipeline.run import check_device

PRETRAINING = ("tokenizer", "ingest", "base", "evaluate_base")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "plays.txt"
    path.write_text("To be, or not to be: that is the question.\n\n" * 25_000)
    return path


@pytest.mark.parametrize("command", ["run", "plan", "dry"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus", "{}/nowhere"], r"--corpus: .*/nowhere matches no file of a known kind"),
        (["--corpus", "{}/plays.pdf"], r"--corpus: .*plays\.pdf is of no kind that can serve; these can: \.parquet"),
        (["--chat", "{}/chats.jsonl", "--gsm8k", "none"], r"--chat: .*/chats\.jsonl matches no file"),
        (["--chat", "none", "--gsm8k", "{}"], r"--gsm8k: .*/train\.jsonl matches no file"),
        (
            ["--chat", "none", "--gsm8k", "none", "--set", "data.mid.own.source={}/own.jsonl", "--until", "mid"],
            r"data\.mid\.own\.source: .*/own\.jsonl matches no file",
        ),
        (
            ["--gsm8k", "synthetic", "--set", "data.mid.smoltalk.weight=0.5"],
            r"data\.mid: parts without a weight: .*gsm8k, while others have one; give all parts one, or none",
        ),
        (
            ["--corpus", "{}/books.jsonl"],
            r"--corpus: .*no string column `text`; its columns are body .*data\.text_column",
        ),
        (["--corpus", "{}/book.parquet", "--set", "data.text_column=bod"], r"--corpus: .*no string column `bod`; its"),
        (
            ["--chat", "{}/books.jsonl", "--gsm8k", "none"],
            r"--chat: .*books\.jsonl, record 1: not a conversation: .*body",
        ),
        (["--chat", "none", "--gsm8k", "{}/books.jsonl"], r"--gsm8k: .*books\.jsonl, row 1: it has body .*`question`"),
    ],
)
def test_an_input_that_is_not_there_is_named_by_its_flag_before_ray_starts(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], said: str
) -> None:
    (tmp_path / "plays.pdf").write_text("%PDF")
    (tmp_path / "books.jsonl").write_text('{"body": "Once upon a time."}\n' * 100)
    pq.write_table(pa.table({"body": ["Once upon a time."]}), tmp_path / "book.parquet")
    given = [argument.format(tmp_path) for argument in arguments]
    if "--corpus" not in given:
        given += ["--corpus", str(corpus)]
    storage = tmp_path / "runs"
    flags = [*given, "--depth", "2", "--storage", str(storage), *(["--dry-run"] if command == "dry" else [])]
    assert cli.main(["plan" if command == "plan" else "run", *flags]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(said, errors), errors
    assert not storage.exists(), "a run that is none would be listed, and drift"


def test_workers_that_are_not_there_are_told_by_a_dry_run(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what does not run need not divide among them: without conversations that is mid and SFT."""
    many = 2 * (os.cpu_count() or 1) + 1
    given = ["--depth", "2", "--corpus", str(corpus), "--chat", "none", "--gsm8k", "none", "--workers", str(many)]
    assert cli.main(["run", *given, "--storage", str(tmp_path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"! --workers {many} needs as many CPU cores; this machine has {os.cpu_count()}: add --workers" in said
    with pytest.raises(ConfigError, match=r"mid\.total_batch_size = 524288 does not divide"):
        load_config(None, {"data": {"corpus": str(corpus), "gsm8k": "none"}, "model": {"depth": 2}, "workers": 3})


@pytest.mark.parametrize("setting", ["base.precision=fp8", "mid.cuda_graphs=true", "rl.attention=fa3"])
def test_what_needs_a_gpu_is_refused_without_one_before_any_stage(setting: str) -> None:
    config, name = load_config("demo", None, [setting]), setting.partition(".")[0]
    with pytest.raises(StageError, match=rf"^{setting} needs a GPU.*there is none here: leave it out"):
        check_device(config, "cpu", ["ingest", name])
    check_device(config, "cuda", ["ingest", name])
    check_device(config, "cpu", ["ingest", f"evaluate_{name}"])


def test_what_is_made_or_lies_elsewhere_is_not_looked_at() -> None:
    for data in ({"corpus": "synthetic", "chat": "none", "gsm8k": "synthetic"}, {}, {"corpus": "s3://nowhere/x"}):
        config = load_config(None, {"data": data})
        check_inputs(config, ["tokenizer", "ingest", "conversations"])
    config = load_config(None, {"data": {"corpus": "/nowhere", "chat": "/nowhere", "gsm8k": "/nowhere"}})
    check_inputs(config, ["base", "mid", "sft"])


def test_single_records_of_another_form_and_damage_are_left_to_the_stage(tmp_path: Path) -> None:
    chats, damaged = tmp_path / "chats.jsonl", tmp_path / "damaged.jsonl"
    good = [json.dumps({"prompt": "to be?", "response": answer}) + "\n" for answer in ("or not", "that is")]
    chats.write_text('{"body": ""}\n' * 100 + "".join(good))
    damaged.write_text("no JSON\n" * 1_000 + "".join(good))
    for chat in (chats, damaged):
        config = load_config(None, {"data": {"corpus": "synthetic", "chat": str(chat), "gsm8k": "none"}})
        check_inputs(config, ["tokenizer", "ingest", "conversations"])
    damaged.write_text(good[0] * 2 + "no JSON\n" * 3)
    with pytest.raises(ConfigError, match=r"^data\.mid: two conversations .* is 1; left out are 3 not JSON: give more"):
        check_inputs(config, ["conversations"])


def test_the_passes_over_a_small_corpus_are_told_with_settings_that_mend_it(corpus: Path) -> None:
    data = {"corpus": str(corpus), "chat": "none", "gsm8k": "none"}
    config = load_config(None, {"model": {"depth": 2}, "data": data}, ["base.target_ratio=20"])
    (line,) = proportions(config, PRETRAINING)
    tokens, passes, there = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+(?= tokens| passes)", line)[:3])
    assert config.base.steps and config.base.total_batch_size
    assert tokens == config.base.steps * config.base.total_batch_size and passes == pytest.approx(
        tokens / there, rel=0.01
    )
    assert there == pytest.approx(corpus.stat().st_size / 4.8, rel=0.2)
    mended = load_config(None, {"model": {"depth": 2}, "data": data}, re.findall(r"--set (\S+)", line))
    assert not list(proportions(mended, PRETRAINING))
    assert mended.base.steps and 50 <= mended.base.steps <= 400
    assert not list(proportions(config, ["ingest"])) and not list(proportions(config, PRETRAINING, tokens=1_000_000))


def test_unless_told_base_reads_a_small_corpus_a_few_times_in_steps_enough(corpus: Path, tmp_path: Path) -> None:
    data = {"corpus": str(corpus), "chat": "none", "gsm8k": "none"}
    config = load_config(None, {"model": {"depth": 2}, "data": data})
    assert config.base.steps and config.base.total_batch_size and 100 <= config.base.steps <= 200
    assert 3.5 < config.base.steps * config.base.total_batch_size * 4.8 / corpus.stat().st_size < 4.1
    (line,) = proportions(config, PRETRAINING)
    assert re.search(r"about 4 passes over your corpus.* and not 20 a parameter \([\d,]+\).*--set base\.tokens=N", line)
    for told in ("base.target_ratio=20", "base.tokens=40000000", "base.steps=80"):
        asked = load_config(None, {"model": {"depth": 2}, "data": data}, [told])
        assert asked.base.total_batch_size == 524_288 and asked.base.steps and asked.base.steps > 50
    assert load_config(None, {"model": {"depth": 2}, "data": data}, ["base.total_batch_size=16384"]).base.steps == 55


def test_base_is_planned_once_though_the_corpus_grows_or_is_gone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.move(corpus, folder)
    flags = {"model": {"depth": 2}, "data": {"corpus": str(folder), "chat": "none", "gsm8k": "none"}}
    first = load_config(None, flags | {"storage": str(tmp_path / "runs"), "name": "r"})
    RunStore(str(tmp_path / "runs"), "r").record(first)
    (folder / "more.txt").write_text("O Romeo, Romeo, wherefore art thou Romeo?\n\n" * 25_000)
    arguments = ["--depth", "2", "--corpus", str(folder), "--chat", "none", "--gsm8k", "none", "--name", "r"]
    command = ["run", *arguments, "--storage", str(tmp_path / "runs"), "--dry-run"]
    assert cli.main(command) == 0
    assert f"{first.base.steps} of 8,192 tokens" in capsys.readouterr().out
    shutil.rmtree(folder)
    gone = load_config(None, flags)
    assert identity_of("base", gone) != identity_of("base", first)
    again = load_config(None, flags, characters=size_before(gone, first))
    assert identity_of("base", again) == identity_of("base", first)
    another = load_config(None, {"data": {"corpus": str(tmp_path)}})
    assert size_before(another, first) is None


def test_a_mid_that_dwarfs_base_is_told(tmp_path: Path, corpus: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"prompt": "to be?", "response": "or not"}) + "\n") * 200_000)
    flags = {"model": {"depth": 2}, "data": {"corpus": str(corpus), "chat": str(chats), "gsm8k": "none"}}
    sets = [
        "base.tokens=200000",
        "base.total_batch_size=8192",
        "mid.total_batch_size=8192",
        "sft.total_batch_size=8192",
    ]
    config = load_config(None, flags, sets)
    (line,) = proportions(config, [*PRETRAINING, "mid"])
    assert re.fullmatch(
        r"mid reads about [\d,]+ tokens, about [\d,]+ times as many as base: .*--set mid\.steps=2[34] .*", line
    )
    assert not list(proportions(load_config(None, flags, [*sets, "mid.steps=24"]), [*PRETRAINING, "mid"]))


def test_a_mid_of_parts_with_rows_or_made_here_is_told_in_steps_that_base_could_have(
    tmp_path: Path, corpus: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("word\n" * 10)
    data = {"corpus": str(corpus), "chat": "none", "gsm8k": "none"}
    spelling = [f"data.mid.own.source={words}", "data.mid.own.format=spelling", "data.mid.own.rows=500000"]
    for more, sets in (({"gsm8k": "synthetic"}, ["base.tokens=200000"]), ({}, spelling), ({"chat": None}, [])):
        config = load_config(None, {"model": {"depth": 2}, "data": data | more}, sets)
        (line,) = (said for said in proportions(config, ["base", "mid"]) if said.startswith("mid reads"))
        mended = load_config(
            None, {"model": {"depth": 2}, "data": data | more}, [*sets, *re.findall(r"--set (\S+)", line)]
        )
        assert mended.base.steps and mended.base.total_batch_size and mended.mid.steps and mended.mid.total_batch_size
        of_base = mended.base.steps * mended.base.total_batch_size
        assert mended.mid.steps * mended.mid.total_batch_size <= of_base
    assert not [s for s in proportions(load_config("demo"), ["base", "mid"]) if s.startswith("mid reads")]


def test_a_first_attempt_that_failed_leaves_nothing_that_drifts(tmp_path: Path, corpus: Path) -> None:
    run = ["--preset", "smoke", "--name", "first", "--storage", str(tmp_path / "runs"), "--until", "tokenizer"]
    one_clear_message(fathom("run", *run, "--corpus", str(tmp_path / "nowhere"), seconds=120), "--corpus")
    result = fathom("run", *run, "--corpus", str(corpus), "--tokenizer", "chars", "--dry-run", seconds=120)
    assert result.code == 0 and "tokenizer      fresh  run" in result.output, result.output
