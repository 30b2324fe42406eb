"""The configuration: one dial, exact arithmetic, and mistakes that name what would be right."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import plan
from pipeline.config import (
    PRESETS,
    Config,
    ConfigError,
    add_config_flags,
    config_from_args,
    dotted_keys,
    identity_of,
    load_config,
    stage_names,
)
from pipeline.scaling import grad_accum_steps


def parsed(*argv: str) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from_args(parser.parse_args(argv))


def test_depth_20_is_the_published_size() -> None:
    config = parsed("--depth", "20")
    assert config.name == "d20" and not config.with_rl
    assert config.model.spec().parameters == 560_988_160
    assert config.base.steps == 21_400 and config.base.total_batch_size == 524_288
    assert plan.plan(config)["tokens"] == 21_400 * 524_288
    assert plan.plan(config)["shards"] == 216  # of 1,822, at 4.8 characters a token
    assert config.data.shards == 238, "and a tenth more, as packing crops"


@pytest.mark.parametrize("depth", range(1, 65))
def test_every_depth_builds(depth: int) -> None:
    config = load_config(flags={"model": {"depth": depth}})
    assert config.model.spec().head_dim % 8 == 0 and config.base.steps


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.toml")))
@pytest.mark.parametrize("workers", [1, 2])
def test_presets_load(preset: str, workers: int) -> None:
    config = load_config(preset, {"workers": workers})
    assert config.preset == config.name == preset
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_order_is_derived_then_preset_then_command_line() -> None:
    preset = load_config("demo")
    assert preset.with_rl and preset.base.total_batch_size == 8192
    changed = parsed("--preset", "demo", "--no-with-rl", "--name", "x", "--set", "base.total_batch_size=4096")
    assert not changed.with_rl and changed.name == "x" and changed.base.total_batch_size == 4096
    assert changed.base.steps == preset.base.steps
    assert parsed("--depth", "1", "--set", "data.corpus=/a b/*.parquet").data.corpus == "/a b/*.parquet"
    assert parsed("--set", "rl.require_signal=false").rl.require_signal is False


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'base\.matrx_lr'; did you mean base\.matrix_lr, \S+, \S+\?$"):
        parsed("--set", "base.matrx_lr=0.1")
    with pytest.raises(ConfigError, match=r"'bass\.steps'.*base\.steps"):
        parsed("--set", "bass.steps=3")
    with pytest.raises(ConfigError, match=r"'seeds'.*seed"):
        parsed("--set", "seeds=3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--preset", "dmeo"), "unknown preset 'dmeo'; there are: .*demo"),
        (("--depth", "99"), r"model\.depth = 99: Input should be less than or equal to 64"),
        (("--set", "base.steps=many"), r"base\.steps = 'many': Input should be a valid integer"),
        (
            ("--set", "rl.advantage=best"),
            r"rl\.advantage = 'best': Input should be 'mean', 'grpo', 'dr_grpo' or 'rloo'",
        ),
        (("--set", "base=3"), r"base = 3: Input should be a valid dictionary"),
        (("--set", "base.steps"), "must be KEY=VALUE"),
        (("--workers", "3"), r"base\.total_batch_size = 524288 .* 2048 tokens .* 3 worker.*: 522240 or 528384"),
        (("--set", "mid.total_batch_size=100"), r"mid\.total_batch_size = 100 .*: 2048$"),
        (("--set", "sft.device_batch_size=6"), r"sft\.device_batch_size = 6 .* 16 rows.*: 1, 2, 4, 8, 16$"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*argv)


def test_grad_accum_steps_covers_the_batch() -> None:
    assert grad_accum_steps(524_288, 2_048, 32, 1) == 8
    assert grad_accum_steps(524_288, 2_048, 32, 8) == 1


def test_identity_leaves_out_how_a_run_is_run() -> None:
    one = load_config("demo")
    environment = {"workers": 2, "name": "b", "storage": "/x", "rl": {"actors": 2}, "base": {"device_batch_size": 4}}
    two = load_config("demo", environment)
    seeded = load_config("demo", {"seed": 1})
    for stage in stage_names(one):
        assert identity_of(stage, one) == identity_of(stage, two)
        assert (identity_of(stage, one) != identity_of(stage, seeded)) == (stage != "evaluate_base")
    assert identity_of("base", one) != identity_of("base", load_config("demo", {"base": {"matrix_lr": 0.5}}))
    assert identity_of("sft", one) == identity_of("sft", load_config("demo", {"base": {"matrix_lr": 0.5}}))
    assert "environment" not in dotted_keys()


def test_a_run_has_the_stages_it_needs() -> None:
    config = load_config("demo", {"with_rl": True})
    evaluated = [name for stage in ("base", "mid", "sft", "rl") for name in (stage, f"evaluate_{stage}")]
    assert stage_names(config) == ["tokenizer", "ingest", *evaluated]
    assert stage_names(load_config("demo", {"with_rl": False})) == ["tokenizer", "ingest", *evaluated[:-2]]
    unasked = load_config("demo", {"with_rl": False, "data": {"gsm8k": "none"}})
    assert stage_names(unasked) == ["tokenizer", "ingest", "base", "evaluate_base", "mid", "sft"]
    with pytest.raises(ConfigError, match="--with-rl needs problems to train on"):
        load_config("demo", {"with_rl": True, "data": {"gsm8k": "none"}})


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pipeline.plan; print({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_plan_prints_and_reports_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--depth", "20"]) == 0
    assert "560,988,160" in capsys.readouterr().out
    assert plan.main(["--set", "base.stepz=1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: unknown key 'base.stepz'")


def test_workers_are_a_number_or_a_range() -> None:
    assert parsed("--workers", "2").workers == (2, 2)
    assert parsed("--workers", "1:8").workers == (1, 8)
    for wrong in ("0", "3:2", "two", "1:2:3", "-1"):
        with pytest.raises(ConfigError, match="workers = "):
            parsed(f"--workers={wrong}")
    with pytest.raises(ConfigError, match=r"sft\.total_batch_size is 16 rows, too few for --workers 1:32"):
        parsed("--workers", "1:32")
    assert parsed("--workers", "1:3").base.device_batch_size == 32, (
        "rows need not divide among workers that come and go"
    )


def test_how_long_base_trains_is_said_once() -> None:
    assert parsed("--depth", "4", "--set", "base.tokens=1048576").base.steps == 2
    assert plan.plan(parsed("--hours", "3"))["hours"]["base"] == 3
    by_time = parsed("--preset", "demo", "--hours", "3").base
    assert (by_time.hours, by_time.steps) == (3, None), "the command line's budget replaces the preset's"
    by_money = parsed("--budget-usd", "96", "--usd-per-worker-hour", "4", "--workers", "8")
    assert by_money.base.steps is None and plan.plan(by_money)["hours"]["base"] == 3
    for argv, message in (
        (("--budget-usd", "9", "--usd-per-worker-hour", "4", "--workers", "1:2"), "fixed number of --workers"),
        (("--hours", "3", "--set", "base.steps=5"), "give one of steps and hours"),
        (("--budget-usd", "96"), "needs usd_per_worker_hour"),
        (("--set", "base.keep_best=true", "--set", "base.eval_every=0"), "set eval_every"),
    ):
        with pytest.raises(ConfigError, match=message):
            parsed(*argv)


def test_a_family_has_its_own_rule_and_single_parts_of_it_may_be_set() -> None:
    llama = parsed("--family", "llama", "--depth", "12").model.spec()
    assert (llama.family, llama.layers, llama.width, llama.ffn_width, llama.softcap) == ("llama", 12, 768, 2048, 0.0)
    assert parsed("--family", "llama").base.schedule == "cosine" and parsed("--depth", "4").base.schedule == "wsd"
    sets = ["layers=18", "width=2048", "heads=16", "kv_heads=8", "ffn_width=7168", "vocab_size=128256", "rope_base=5e5"]
    flags = [part for text in sets for part in ("--set", f"model.{text}")]
    assert parsed("--family", "llama", *flags).model.spec().parameters == 1_544_628_224
    wide = parsed("--depth", "4", "--set", "model.width=2048").model.spec()
    assert (wide.layers, wide.heads, wide.ffn_width) == (4, 16, 8192), "heads and MLP follow a width that is given"
    with pytest.raises(ConfigError, match="width 104 is not a multiple of heads"):
        parsed("--family", "llama", "--set", "model.width=104", "--set", "model.heads=3")
    with pytest.raises(ConfigError, match="only gpt2 has biases"):
        parsed("--family", "qwen3", "--set", "model.biases=true")


def test_a_tokenizer_that_is_there_settles_the_vocabulary(tmp_path: Path) -> None:
    assert load_config(None, {"tokenizer": {"source": "chars"}}).model.vocab_size == 32
    assert load_config(None, {"tokenizer": {"source": "gpt2"}}).model.vocab_size == 50_257 + 9
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size = 512: the tokenizer gpt2 has 50266 tokens; leave it out"
    ):
        load_config(None, {"tokenizer": {"source": "gpt2"}}, ["model.vocab_size=512"])
    with pytest.raises(ConfigError, match="neither one of"):
        load_config(None, {"tokenizer": {"source": str(tmp_path / "none")}})


def test_mixtures_are_nanochats_or_what_is_named_with_parts_on_top() -> None:
    seeds = load_config().data
    assert list(seeds.mid) == ["smoltalk", "mmlu", "gsm8k"] and seeds.mid["smoltalk"].rows == 460_000
    assert list(seeds.sft) == ["arc_easy", "arc_challenge", "gsm8k", "smoltalk"]
    own = load_config(None, {"data": {"chat": "mine.jsonl", "gsm8k": "problems"}}).data
    assert {name: part.source for name, part in own.mid.items()} == {
        "chat": str(Path("mine.jsonl").absolute()),
        "gsm8k": str(Path("problems").absolute()),
    }
    sets = ["data.mid.identity.source=me.jsonl", "data.mid.identity.repeats=2", "data.mid.mmlu=none"]
    changed = load_config(None, {"data": {"gsm8k": "none"}}, sets).data
    assert list(changed.mid) == ["smoltalk", "identity"] and changed.mid["identity"].repeats == 2
    assert list(changed.sft) == ["arc_easy", "arc_challenge", "smoltalk"]
    with pytest.raises(
        ConfigError, match=r"unknown key 'data\.mid\.smoltalk\.row'; did you mean data\.mid\.smoltalk\.rows"
    ):
        load_config(None, {}, ["data.mid.smoltalk.row=3"])
    with pytest.raises(ConfigError, match=r"data\.mid\.mine\.source"):
        load_config(None, {}, ["data.mid.mine.rows=3"])
