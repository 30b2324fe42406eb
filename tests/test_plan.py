"""A plan is exact where it counts, consistent where it models, and one message where it cannot be."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import Gpus, parse, parse_gpus
from models.spec import ModelSpec
from pipeline import inverse, plan, timing
from pipeline.config import Config, load_config, preset_about
from pipeline.memory import Layout, memory, memory_with_engine
from pipeline.timing import Calibration, Point, Work, read_calibration

ROOT = Path(__file__).parents[1]
GUIDE = {  # shapes of a 1.3-1.8 B training guide; the loss it states, and the tokens
    2.335: ({"layers": 18, "width": 2048, "heads": 16, "kv_heads": 8, "ffn_width": 7168}, "llama", 128_256, 101.909e9),
    2.340: ({"layers": 24, "width": 2048, "heads": 16, "kv_heads": 8, "ffn_width": 6144}, "qwen3", 151_936, 81.727e9),
}


def planned(*argv: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert plan.main([*argv, "--json"]) == 0, capsys.readouterr().err
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out)
    return numbers


def at_depth(depth: int, workers: int = 1, **base: Any) -> Config:
    return load_config(flags={"model": {"depth": depth}, "workers": workers, "base": base})


def test_depth_20_on_eight_h100(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = planned("--depth", "20", "--gpus", "8xH100", "--mfu", "0.48", "--usd-per-gpu-hour", "3", capsys=capsys)
    assert numbers["parameters"] == {"total": 560_988_160, "embedding": 167_772_160, "matrices": 393_216_000}
    assert (numbers["tokens"], numbers["steps"], numbers["shards"]) == (21_400 * 524_288, 21_400, 216)
    assert numbers["total_flops"] == pytest.approx(3.92e19, rel=0.03)
    assert (numbers["workers"], numbers["device_batch_size"], numbers["grad_accum_steps"]) == (8, 32, 1)
    assert numbers["fits"] and 2.5 < numbers["hours"]["base"] < 3.5
    assert numbers["cost_usd"] == pytest.approx(numbers["hours"]["total"] * 8 * 3)
    assert numbers["hours"]["total"] == pytest.approx(sum(h for k, h in numbers["hours"].items() if k != "total"))


def test_three_and_seven_billion_on_eight_of_187_gb() -> None:
    gpus = parse_gpus("8xB200:187.5GB")
    three, seven = (plan.plan(load_config(name), gpus) for name in ("3b", "7b"))
    assert (three["shards"], three["grad_accum_steps"], three["fits"]) == (1_158, 1, True)
    assert (seven["shards"], seven["grad_accum_steps"], seven["fits"]) == (2_822, 1, True)
    assert any("1.55 epochs" in warning for warning in seven["warnings"])
    assert not any("epochs" in warning for warning in three["warnings"])
    assert three["memory_gb"]["total"] < 187.5 and seven["memory_gb"]["total"] < 187.5
    # 840 k tokens/s, which 18-22 hours would need, are 90% of the peak
    needed = 840e3 * three["flops_per_token"] / (8 * parse("B200").bf16_flops)
    assert needed == pytest.approx(0.9, abs=0.02) and three["hours"]["base"] > 2 * 22


@pytest.mark.parametrize("loss", GUIDE)
def test_expected_losses_of_the_guide(loss: float) -> None:
    shape, family, vocab_size, tokens = GUIDE[loss]
    rule = ModelSpec.from_dial("llama" if family == "llama" else "qwen3", 1, vocab_size, 2_048, 2_048)
    assert round(plan.expected_loss(replace(rule, **shape, head_dim=128).parameters, tokens), 3) == loss


def test_the_laws_agree_near_chinchilla_and_fall_with_everything() -> None:
    for law in plan.LAWS:
        losses = [plan.expected_loss(n, d, law) for n, d in ((1e9, 2e10), (2e9, 2e10), (2e9, 4e10))]
        assert losses == sorted(losses, reverse=True)
    assert plan.expected_loss(70e9, 1.4e12) == pytest.approx(plan.expected_loss(70e9, 1.4e12, "besiroglu"), abs=0.1)


def test_a_budget_becomes_the_deepest_model_that_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    money = ("--gpus", "8xH100", "--usd-per-gpu-hour", "4")
    numbers = planned("--budget-usd", "1000", *money, capsys=capsys)
    assert numbers["budget_hours"] == 31.25
    assert numbers["fits"] and numbers["hours"]["total"] <= 31.25 and numbers["cost_usd"] <= 1000
    deeper = planned("--depth", str(numbers["depth"] + 1), *money, capsys=capsys)
    assert deeper["hours"]["total"] > 31.25
    below, above = numbers["neighbours"]
    own = numbers["tokens"] / numbers["parameters"]["total"]
    assert below["tokens_per_parameter"] > own > above["tokens_per_parameter"]
    by_time = planned("--hours", "31.25", *money, capsys=capsys)
    assert by_time["depth"] == numbers["depth"]


def test_a_depth_beside_the_hours_is_trained_for_these_hours(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = planned("--depth", "12", "--hours", "2", "--gpus", "1xA100-40", capsys=capsys)
    assert numbers["hours"]["base"] == 2
    assert numbers["tokens"] == pytest.approx(2 * 3600 * numbers["tokens_per_second"], rel=0.02)


def test_flops_find_shapes_that_spend_them() -> None:
    rows = inverse.shapes_for(1.36e21, "llama3")
    losses = [row["expected_loss"] for row in rows]
    assert losses == sorted(losses) and len(rows) == inverse.LISTED and losses[0] < 2.335
    for row in rows:
        spec = ModelSpec.from_dial("llama", 1, 128_256, 8_192, row["width"])
        spec = replace(spec, layers=row["layers"], kv_heads=row["kv_heads"])
        assert spec.parameters == row["parameters"]
        assert spec.flops_per_token * row["tokens"] == pytest.approx(1.36e21, rel=1e-6)
        assert row["heads"] == 2 * row["kv_heads"], "Llama 3's groups"


DEVICES = Layout(8, 1, 8, "ddp", "none", True)


@pytest.mark.parametrize("family", ["depth", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_memory_falls_with_every_means_to_save_it(family: Any, optimizer: str) -> None:
    spec = ModelSpec.from_dial(family, 24, 65_536, 2_048)
    layout = replace(DEVICES, optimizer=optimizer)
    means = {
        "parallel": ["ddp", "zero1", "fsdp"],
        "checkpointing": ["none", "selective", "full"],
        "device_batch_size": [16, 8, 4],
    }
    for name, values in means.items():
        totals = [memory(spec, replace(layout, **{name: value})).total for value in values]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1], name


def test_memory_is_its_parts_and_holds_what_the_engine_keeps() -> None:
    spec = ModelSpec.from_dial("depth", 20, 65_536, 2_048)
    one = memory(spec, replace(DEVICES, world=1, grad_accum_steps=2))
    parts = asdict(one)
    assert parts.pop("peak") == "backward"
    assert one.total == pytest.approx(sum(parts.values()))
    assert one.weights == 4 * spec.parameters + 2 * spec.matrix_parameters
    assert one.gradients == 4 * spec.parameters
    assert one.optimizer == 4 * spec.matrix_parameters + 8 * spec.embedding_parameters
    graphs = {fixed: memory(spec, replace(DEVICES, world=1, cuda_graphs=fixed)) for fixed in (False, True)}
    assert graphs[True].gradients == 4 * spec.parameters > graphs[False].gradients, "those of a graph stay"
    as_run = [plan.plan(at_depth(20, 8, cuda_graphs=fixed, parallel="ddp"))["memory_gb"] for fixed in (False, True)]
    assert as_run[0]["gradients"] < as_run[1]["gradients"]
    longer = memory(
        replace(spec, sequence_len=4_096), replace(DEVICES, world=1, grad_accum_steps=2, device_batch_size=4)
    )
    assert longer.activations == pytest.approx(one.activations), "attention keeps no (T, T) scores"


@pytest.mark.parametrize("family", ["depth", "gpt2", "llama", "qwen3"])
def test_activations_are_what_autograd_saves(family: Any) -> None:
    """Seen in the difference one more layer makes; compiled, more is computed again, and nothing is kept in fp32."""
    import torch

    from models.build import build

    def saved(layers: int) -> tuple[ModelSpec, int]:
        spec = replace(ModelSpec.from_dial(family, 2, 64, 128, 256), layers=layers)
        model, sizes = build(spec), {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        ids = torch.zeros(2, 129, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids[:, :-1], ids[:, 1:], torch.ones(2, 128))
        for p in model.parameters():
            sizes.pop(p.untyped_storage().data_ptr(), None)
        return spec, sum(size for size, _ in sizes.values())

    (spec, two), (_, three) = saved(2), saved(3)
    copies = 2 * spec.matrix_parameters / spec.layers
    eager = spec.activation_bytes("none", compiled=False)
    assert (three - two - copies) / 256 == pytest.approx(eager, rel=0.04), "but for the statistics of norms"
    assert eager >= spec.activation_bytes("none", compiled=True) > spec.activation_bytes("selective", compiled=True)


def test_depth_64_fits_80_gb_only_sharded() -> None:
    spec = ModelSpec.from_dial("depth", 64, 32, 2_048)
    assert spec.parameters == pytest.approx(12.9e9, rel=0.01)
    available = parse("H100-PCIe").memory_bytes
    for parallel in ("ddp", "zero1", "fsdp"):
        smallest = memory(spec, Layout(1, 1, 8, parallel, "full", True))
        assert (smallest.total < available) == (parallel == "fsdp")


def test_what_is_not_fixed_is_chosen_to_fit() -> None:
    narrow, wide = (plan.plan(at_depth(32, 8), parse_gpus(f"8x{name}")) for name in ("A100-40", "H200"))
    assert narrow["fits"] and wide["fits"]
    assert wide["device_batch_size"] > narrow["device_batch_size"]
    laid_out = load_config(flags={"model": {"depth": 32}, "workers": 8}, sets=narrow["set"])
    again = plan.plan(laid_out, parse_gpus("8xA100-40"))
    assert again["memory_gb"] == narrow["memory_gb"] and again["set"] == []
    alone = plan.plan(at_depth(20), parse_gpus("1xRTX4090"))
    assert alone["fits"] and alone["parallel"] == "ddp" and 256 % alone["device_batch_size"] == 0
    fixed = plan.plan(at_depth(20, 8, device_batch_size=4, checkpointing="full"), parse_gpus("8xH100"))
    assert (fixed["device_batch_size"], fixed["checkpointing"], fixed["grad_accum_steps"]) == (4, "full", 8)
    assert "device_batch_size as asked" in fixed["why"]


def test_mid_and_sft_are_laid_out_to_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = planned("--depth", "40", "--gpus", "8xRTX4090", capsys=capsys)
    assert {"mid.parallel=fsdp", "mid.device_batch_size=1", "sft.parallel=fsdp"} <= set(numbers["set"])


def test_rl_takes_longer_with_more_samples_tokens_and_evaluations() -> None:
    config = load_config(flags={"with_rl": True, "workers": 8})
    rl = plan.plan(config, parse_gpus("8xH100"))["rl"]
    assert rl["steps"] == 7_473 // 16
    assert len(rl["hours_with"]) == 3 and all(hours > rl["hours"] for hours in rl["hours_with"].values())
    measured = Calibration((Point(Work(1e9, 1e6), 1e-5, compiled=True),), sampled=1_000.0)
    slow = plan.plan(config, parse_gpus("8xH100"), calibration=measured)["rl"]
    assert slow["rollout_seconds"] == pytest.approx(16 * 16 / 8 * 256 / 1_000)


def test_evaluations_ask_greedily_and_sample_on_all_there_is() -> None:
    config = load_config(flags={"with_rl": True, "workers": 4})
    ask, measured = config.evaluate, Calibration((Point(Work(1e9, 1e6), 1e-5, compiled=True),), sampled=1_000.0)
    for gpus, actors in (("4xH100", 4), ("8xH100", 8), ("cpu", min(4, max(1, len(os.sched_getaffinity(0)) // 2)))):
        assert actors == ask.actors(8 if gpus == "8xH100" else 4 if gpus == "4xH100" else 0, 2 * actors)
        hours = plan.plan(config, parse_gpus(gpus), calibration=measured)["hours"]["evaluate"]
        completions = math.ceil(ask.problems / actors) + math.ceil(ask.problems * ask.samples / actors)
        assert hours == pytest.approx(3 * completions * ask.max_new_tokens / 1_000 / 3600)
    assert [ask.actors(0, cpus) for cpus in (1, 2, 3, 4, 16)] == [1, 1, 1, 2, 4]
    assert ask.model_copy(update={"problems": 3}).actors(8, 0) == 3, "none would have nothing to ask"


def test_measurements_replace_the_usual_speed(tmp_path: Path) -> None:
    config = at_depth(4)
    setting = {"device_batch_size": 1, "grad_accum_steps": 256, "checkpointing": "none"}
    row = setting | {"model": asdict(config.model.spec()), "compile": False, "tokens_per_second": 4_000.0}
    of_two = {"compile": False, "tokens_per_second": 8_000.0}
    settings = [setting | of_two | other for other in ({"tokens_per_second": 5_000.0}, {}, {"compile": True})]
    probe: dict[str, Any] = {"hardware": "some CPU", "kind": "cpu", "best": settings[1], "rows": settings}
    probe |= {"model": row["model"], "workers": 2, "optimizer": "muon"}
    file, cpu = tmp_path / "measured.json", parse_gpus("cpu")
    for record in (probe, {"hardware": "some CPU", "kind": "cpu", "rows": [row, row | {"tokens_per_second": None}]}):
        file.write_text(json.dumps(record))
        numbers = plan.plan(config, cpu, calibration=read_calibration([file], cpu))
        assert numbers["checkpointing"] == "none" and numbers["tokens_per_second"] == pytest.approx(4_000, rel=0.01)
    engine = tmp_path / "engine.json"
    engine.write_text(
        json.dumps({"hardware": "some CPU", "kind": "cpu", "rows": [{"rollout_tokens_per_second": 3_000.0}]})
    )
    assert read_calibration([file, engine], cpu).sampled == 3_000.0
    with pytest.raises(ValueError, match="how fast training is"):
        read_calibration([engine], cpu)
    with pytest.raises(ValueError, match="measured on some CPU, which is not 8 x H100-SXM"):
        read_calibration([file], parse_gpus("8xH100"))
    file.write_text(json.dumps(probe | {"hardware": "Tesla T4", "kind": "cuda"}))
    with pytest.raises(ValueError, match="measured on Tesla T4, which is not CPU"):
        read_calibration([file], cpu)
    no_device = {k: v for k, v in probe.items() if k != "hardware"}
    endless = {"hardware": "some CPU", "kind": "cpu", "rows": [{"rollout_tokens_per_second": math.inf}]}
    wrong = (no_device, endless, probe | {"rows": []}, probe | {"rows": [row | {"tokens_per_second": -1.0}]})
    for text in ("[]", "{", "{}", '{"rows": []}', *map(json.dumps, wrong)):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"--calibrate .*measured\.json: .*fathom probe"):
            read_calibration([file], cpu)


def test_a_speed_is_of_models_compiled_alike_where_there_are_any() -> None:
    spec, cpu = at_depth(4).model.spec(), parse_gpus("cpu")
    work = Work(1e9, 1e6)
    points = (Point(work, 2.0, compiled=False), Point(work, 1.0, compiled=True))
    for compiled, flops in ((False, 5e8), (True, 1e9)):
        achieved = timing.rate(spec, cpu, "bf16", compiled, calibration=Calibration(points))
        assert achieved and (achieved.flops, achieved.source) == (pytest.approx(flops), "measured")
    eager = timing.rate(spec, cpu, "bf16", True, calibration=Calibration(points[:1]))
    assert eager and eager.source == "measured without torch.compile"


def test_mfu_is_that_of_the_model_whatever_is_computed_again() -> None:
    config = at_depth(20, 8, checkpointing="full", device_batch_size=4)
    asked = plan.plan(config, parse_gpus("8xH100"), mfu=0.4)
    assert asked["mfu"] == pytest.approx(0.4)
    assert plan.plan(config, parse_gpus("8xH100"))["mfu"] == pytest.approx(0.48 / timing.RECOMPUTED["full"], rel=0.01)


def test_the_usual_speed_is_of_known_hardware_size_and_precision() -> None:
    h100, l4, a6000 = parse("H100"), parse("L4"), parse("A6000")
    share, source = timing.default_mfu(h100, 561_000_000, "bf16")
    assert share == pytest.approx(0.48) and source.startswith("47-49%")
    assert timing.default_mfu(h100, 880_803_840, "fp8")[0] == 0.59
    assert timing.default_mfu(l4, 880_803_840, "fp8")[1].startswith("assumed")
    assert timing.default_mfu(a6000, 1_500_000_000, "bf16") == (
        0.3,
        "28-31% of 1.3-1.8 B models on 2 x A6000 with ZeRO-1",
    )
    assert timing.default_mfu(a6000, 7_000_000_000, "bf16")[1].startswith("assumed")
    shares = [timing.default_mfu(h100, n, "bf16")[0] for n in range(50_000_000, 561_000_000, 10_000_000)]
    assert shares == sorted(shares) and max(b - a for a, b in pairwise(shares)) < 0.02, "without a cliff"
    fp32 = plan.plan(at_depth(20, 8, precision="fp32"), parse_gpus("8xH100"))
    assert fp32["hours"]["total"] is None and any("fp32 is not known" in w for w in fp32["warnings"])


def test_the_guides_shapes_are_nearly_best_for_the_flops_it_states() -> None:
    """What the presets' corrections say."""
    for name, family, its_loss, best in (
        ("llama3-1.5b-optimal", "llama3", 2.320, 2.316),
        ("qwen3-1.8b-optimal", "qwen3", 2.304, 2.297),
    ):
        spec = replace(load_config(name).model.spec(), sequence_len=inverse.KINDS[family][2])
        loss = plan.expected_loss(spec.parameters, 1.36e21 / spec.flops_per_token)
        assert loss == pytest.approx(its_loss, abs=5e-4)
        assert inverse.shapes_for(1.36e21, family)[0]["expected_loss"] == pytest.approx(best, abs=5e-4)
        [text] = [c for c in preset_about(name).corrections if "1.36e21" in c]
        assert f"{its_loss:.3f}" in text and f"{best:.3f}" in text


def test_more_sequences_than_an_engine_holds_take_turns() -> None:
    spec, gpus = ModelSpec.from_dial("depth", 20, 65_536, 2_048), parse_gpus("8xH100")
    full = timing.sampling_seconds(spec, gpus, 8, 8 * 256, 100)
    assert full and timing.sampling_seconds(spec, gpus, 8, 8 * 257, 100) == pytest.approx(2 * full)


def test_the_disk_holds_rows_checkpoints_and_every_stages_weights() -> None:
    flags = {"model": {"depth": 12}, "data": {"corpus": "synthetic"}, "base": {"tokens": 10**9, "keep_last": 3}}
    config = load_config(flags=flags)
    spec = config.model.spec()
    disk = plan.plan(config)["disk_gb"]
    assert disk["data"] == pytest.approx(2 * 1e9 / 1e9, rel=0.01), "two bytes a token; the text was there"
    state = 4 * spec.matrix_parameters + 8 * spec.embedding_parameters
    assert disk["checkpoints"] == pytest.approx((4 * (4 * spec.parameters + state) + 3 * 4 * spec.parameters) / 1e9)


def test_a_neighbour_has_the_time_that_base_has(capsys: pytest.CaptureFixture[str]) -> None:
    """What its other stages take is gone before."""
    flags = ("--hours", "4", "--gpus", "8xH100", "--with-rl")
    best = planned(*flags, capsys=capsys)
    for other in best["neighbours"]:
        alone = planned("--depth", str(other["depth"]), "--gpus", "8xH100", "--with-rl", capsys=capsys)
        hours = other["tokens"] / alone["tokens"] * alone["hours"]["base"]
        assert hours + alone["hours"]["total"] - alone["hours"]["base"] == pytest.approx(4, rel=0.01)


def test_only_the_stages_asked_for_take_time_and_money(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--depth", "12", "--gpus", "8xH100", "--usd-per-gpu-hour", "3")
    whole, base = planned(*flags, capsys=capsys), planned(*flags, "--until", "base", capsys=capsys)
    assert set(base["hours"]) == {"base", "total"} and base["hours"]["total"] == whole["hours"]["base"]
    assert base["cost_usd"] == pytest.approx(whole["hours"]["base"] * 8 * 3)


def test_what_gpus_show_is_what_a_plan_counts_on() -> None:
    """Inline ECC takes a sixteenth: drivers show 22.5 GiB of an L4."""
    assert parse_gpus("L4").memory_bytes == 22.5 * 2**30 and parse_gpus("H100").memory_bytes == 80 * 2**30
    assert not plan.plan(at_depth(26), parse_gpus("1xL4"), fixed=plan.CHOSEN)["fits"]
    tight = plan.plan(load_config("char-d64"), parse_gpus("8xH100-PCIe"))
    assert tight["fits"] and any("of the memory" in warning for warning in tight["warnings"])


def test_no_loss_is_expected_where_the_laws_know_nothing() -> None:
    for name, known in (("smoke", False), ("demo", False), ("char-d64", False), ("d20", True)):
        config = load_config(name)
        assert (plan.plan(config, plan.default_gpus(config))["expected_loss"] is not None) == known, name


def test_time_that_decides_on_the_tokens_decides_on_the_shards(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--depth", "12", "--corpus", "fineweb-edu-100b", "--hours", "4", "--gpus", "8xH100")
    numbers = planned(*flags, capsys=capsys)
    [setting] = [s for s in numbers["set"] if s.startswith("data.shards=")]
    assert int(setting.partition("=")[2]) == pytest.approx(1.1 * numbers["shards"], abs=1)
    assert not any("epochs" in warning for warning in numbers["warnings"])
    assert planned(*flags, "--set", setting, capsys=capsys)["set"] == [s for s in numbers["set"] if s != setting]


def test_many_workers_have_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned("--depth", "20", "--gpus", "32xH100", capsys=capsys)["fits"]


def test_the_number_of_workers_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    one = planned("--depth", "8", "--gpus", "8xH100", "--workers", "1", capsys=capsys)
    assert one["workers"] == 1 and planned("--depth", "8", "--gpus", "8xH100", capsys=capsys)["workers"] == 8


def test_the_dial_replaces_the_shape_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    small = planned("--preset", "llama3-1.5b-optimal", "--depth", "4", capsys=capsys)
    spec = ModelSpec.from_dial("llama", 4, 128_256, load_config("llama3-1.5b-optimal").model.sequence_len)
    assert small["parameters"]["total"] == spec.parameters


def test_a_preset_brings_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = planned("--preset", "d20", "--budget-usd", "24", capsys=capsys)
    price = preset_about("d20").usd_per_gpu_hour
    assert price and numbers["hours"]["base"] == pytest.approx(24 / (8 * price))


def test_characters_are_tokens_where_the_tokenizer_says_so() -> None:
    def shards(**tokenizer: str) -> int:
        flags = {"model": {"depth": 12}, "data": {"corpus": "fineweb-edu-100b"}, "tokenizer": tokenizer}
        return int(plan.plan(load_config(flags=flags | {"base": {"tokens": 10**10}}))["shards"])

    assert shards() == pytest.approx(4.8 * shards(source="chars"), rel=0.05)


def test_flops_and_traffic_are_told_apart_where_the_measurements_do() -> None:
    works = [Work(2e9, 1e6), Work(4e9, 1e6), Work(9e9, 3e6)]
    true = [Point(w, w.flops / 1e12 + w.traffic / 1e9, compiled=False) for w in works]
    found = timing.fitted(true, "measured")
    assert (found.flops, found.bandwidth) == (pytest.approx(1e12), pytest.approx(1e9))
    one = timing.fitted(true[:1], "measured")
    assert one.flops == pytest.approx(2e9 / true[0].seconds) and one.bandwidth == math.inf


def test_what_a_token_costs_by_hand() -> None:
    spec = ModelSpec.from_dial("depth", 4, 8_192, 512)
    layout = Layout(4, 2, 2, "zero1", "full", False)
    muon = sum(5 * (4 * m * m * n + 2 * m**3) * k for m, n, k in ((256, 256, 16), (256, 1_024, 8)))
    work = timing.work_of(spec, layout)
    assert work.flops == pytest.approx(4 / 3 * spec.flops_per_token + muon / 2 / (8 * 512))
    assert timing.work_of(spec, replace(layout, optimizer="adamw")).flops == pytest.approx(4 / 3 * spec.flops_per_token)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gpus", "8xX900"), "unknown hardware 'X900'; known are A6000"),
        (("--gpus", "8xA100"), "unknown hardware 'A100'"),
        (("--gpus", "0xH100"), "must be above 0"),
        (("--gpus", "1xH100:1GB"), "does not fit: 560,988,160 parameters .* has 1.0: take more or larger GPUs"),
        (("--gpus", "cpu:1GB"), "does not fit: .* on this machine, which has 1.0"),
        (("--depth", "0"), "model.depth = 0"),
        (("--budget-usd", "-5", "--gpus", "H100", "--usd-per-gpu-hour", "4"), "--budget-usd -5: must be above 0"),
        (("--budget-usd", "5", "--gpus", "H100"), "--budget-usd needs --usd-per-gpu-hour"),
        (("--hours", "-1", "--gpus", "H100"), "--hours -1: must be above 0"),
        (("--hours", "1"), "add --gpus"),
        (("--hours", "1", "--gpus", "cpu"), "add --calibrate FILE"),
        (("--hours", "1e-6", "--gpus", "H100"), "even depth 1 takes"),
        (("--usd-per-gpu-hour", "-4", "--gpus", "H100"), "a price must be above 0"),
        (("--gpus", "H100", "--mfu", "48"), "such as 0.48"),
        (("--gpus", "4xH100", "--workers", "8"), "--workers 8, one a device, but --gpus has 4"),
        (("--flops", "-3"), "--flops -3"),
        (("--depth", "4", "--mfu", "0.4"), "add --gpus"),
        (("--depth", "4", "--gpus", "H100", "--mfu", "0.4", "--calibrate", "x"), "one of --mfu and --calibrate"),
        (("--hours", "1", "--gpus", "H100", "--set", "model.layers=3"), "--set model.layers"),
        (("--calibrate", "nowhere.json", "--gpus", "cpu"), "--calibrate nowhere.json"),
        (("--flops", "1e21", "--depth", "4"), "give it without --depth"),
        (("--flops", "1e21", "--gpus", "8xX900"), "give it without --gpus"),
        (("--gpus", ""), "must be COUNTxNAME"),
        (("--depth", "4", "--hours", "inf", "--gpus", "H100"), "base.hours = inf"),
        (("--depth", "4", "--set", "base.target_ratio=inf"), "base.target_ratio = inf"),
        (("--usd-per-gpu-hour", "2", "--usd-per-worker-hour", "7", "--gpus", "H100"), "are the same price"),
        (
            ("--depth", "4", "--budget-usd", "9", "--usd-per-gpu-hour", "2", "--gpus", "8xH100", "--workers", "4"),
            "a budget buys all 8 GPUs",
        ),
        (("--only", "pretrain", "--gpus", "H100"), "no such stage"),
    ],
)
def test_nonsense_gets_one_clear_message(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(list(argv)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert re.search(message, captured.err)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hardware": None},
        {"hardware": []},
        {"rows": [{}]},
        {"rows": {}},
        {"device_batch_size": 0},
        {"tokens_per_second": "x"},
    ],
)
def test_a_calibration_of_odd_shape_gets_one_clear_message(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"model": asdict(at_depth(2).model.spec()), "tokens_per_second": 1e3, "device_batch_size": 4}
    row |= {"grad_accum_steps": 1, "checkpointing": "none", "compile": False}
    record = {"hardware": "x", "kind": "cpu", "rows": [row | {k: v for k, v in wrong.items() if k in row}]}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(record | {k: v for k, v in wrong.items() if k in record}))
    assert plan.main(["--depth", "2", "--gpus", "cpu", "--calibrate", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--calibrate {file}" in error
    file.write_text("[" * 100_000)
    assert plan.main(["--depth", "2", "--gpus", "cpu", "--calibrate", str(file)]) == 1
    assert f"--calibrate {file}" in capsys.readouterr().err


def test_a_preset_brings_its_devices_and_what_its_source_got_wrong() -> None:
    config = load_config("char-d64")
    numbers = plan.plan(config, plan.default_gpus(config))
    assert numbers["fits"] and numbers["gpus"] == "8 x H100-PCIe" and numbers["parallel"] == "fsdp"
    assert any("12.9 B" in warning for warning in numbers["warnings"])
    fewer = plan.default_gpus(load_config("d20", {"workers": 4}))
    assert fewer and fewer.count == 4
    assert "560,988,160" in plan.outlook(load_config("d20"), ["base", "evaluate_base"])


def test_gpus_are_parsed() -> None:
    assert parse_gpus("8xH100") == Gpus(8, parse("H100"), parse("H100").memory_bytes)
    assert parse_gpus("RTX 4090").count == 1 and parse_gpus("2 x rtx-4090").count == 2
    assert parse_gpus("8xB200:187.5GB").memory_bytes == 187_500_000_000
    assert parse_gpus("cpu").hardware is None and parse_gpus("cpu").memory_bytes > 1e9


def test_a_plan_answers_in_about_a_second() -> None:
    command = [sys.executable, "-m", "pipeline.plan", "--budget-usd", "1000", "--gpus", "8xH100"]
    command += ["--usd-per-gpu-hour", "4", "--json"]
    before = os.times()
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    # what it computes, not how busy the machine is
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.5 and time.perf_counter() - began < 20


def test_rl_must_fit_beside_its_engine() -> None:
    config = load_config(flags={"model": {"depth": 12}, "with_rl": True, "rl": {"samples_per_prompt": 64}})
    gpus = parse_gpus("H100")
    numbers = plan.plan(config, gpus)
    assert numbers["fits"]
    spec, waiting = config.model.spec(), Layout(16, 1, 1, "ddp", "none", False)
    beside = memory_with_engine(spec, waiting, gpus.memory_bytes, 1)
    assert beside.peak == "sampling"
    resident = 4 * spec.parameters + 4 * spec.matrix_parameters + 8 * spec.embedding_parameters
    assert beside.total == pytest.approx(0.35 * gpus.memory_bytes + resident, rel=0.05)
    assert memory_with_engine(spec, waiting, 1e9, 1).total == pytest.approx(memory(spec, waiting).total + 1.2e9)
    for placement, there, engine in (("auto", "H100", True), ("split", "2xH100", False), ("auto", "2xH100", False)):
        config = load_config(flags={"model": {"depth": 12}, "with_rl": True, "rl": {"placement": placement}})
        _, need, _ = plan._tuned(config, "rl", spec, waiting, parse_gpus(there), ())
        assert (need.total > 0.35 * gpus.memory_bytes) == engine, (placement, there)
