"""The benchmarks run, at a tiny size, and write what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from bench import plan_vs_measured
from cluster.hardware import parse_gpus
from models.spec import ModelSpec
from pipeline.timing import read_calibration

SIZE = ["--depth", "1", "--vocab", "512", "--seq", "64", "--device-batch", "4"]


def use_one_core() -> None:
    """Steps this small take seconds on two threads that others keep from running at once."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def bench(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=use_one_core)
    assert result.returncode == 0, result.stderr
    return result.stdout


def written(name: str, file: Path, shown: str) -> dict[str, Any]:
    """The one row of a record, which names the hardware that the table names."""
    record = json.loads(file.read_text())
    assert record["benchmark"] == name and record["torch"] and record["hardware"]
    assert shown.startswith(record["hardware"].split(",")[0])
    [row] = record["rows"]
    return dict(row)


def test_training_speed_agrees_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "new" / "train.json"
    shown = bench("train", *SIZE, "--accumulate", "2", "--steps", "5", "--no-compile", "--out", str(file))
    row = written("train", file, shown)
    spec = ModelSpec.from_dial("depth", 1, 512, 64)
    assert row["steps"] == 5 and row["device_batch_size"] == 4
    assert row["tokens_per_second"] * row["step_ms"] / 1e3 == pytest.approx(4 * 2 * 64)
    assert row["flops"] == pytest.approx(row["tokens_per_second"] * spec.flops_per_token)
    assert row["of_product"] == pytest.approx(row["flops"] / row["product_flops"]) and 0 < row["of_product"] < 1
    assert row["memory_gb"] > 0.05 and row["mfu"] is None
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.2)
    assert f"{row['tokens_per_second']:,.0f}" in shown and "MFU" in shown


def test_checkpoint_costs_agree_with_themselves(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    shown = bench("checkpoint", *SIZE, "--saves", "2", "--steps-between", "5", "--out", str(file))
    row = written("checkpoint", file, shown)
    spec = ModelSpec.from_dial("depth", 1, 512, 64)
    assert row["steps_between"] == 5 and len(row["saves"]) == 2
    assert all(saved["blocked_ms"] > 0 and saved["late_ms"] >= 0 for saved in row["saves"])
    # weights and one or two moments of each, in fp32
    assert 8 * spec.parameters < row["gigabytes"] * 1e9 < 13 * spec.parameters + 500_000
    parts = [saved["blocked_ms"] + saved["slowed_ms"] + saved["late_ms"] for saved in row["saves"]]
    assert row["cost_ms"] == pytest.approx(sum(parts) / 2)
    assert row["cost_share"] == pytest.approx(row["cost_ms"] / 60e3)
    assert 0 < row["blocked_share"] == pytest.approx(row["blocked_ms"] / 60e3)
    assert row["restore_seconds"] > 0 and row["alone_seconds"] > row["blocked_ms"] / 1e3 / 10
    assert f"{row['cost_share']:.2%}" in shown and "a save a minute" in shown


def test_trackers_are_halted_in_every_other_block_and_have_all_in_the_end(tmp_path: Path) -> None:
    file, more = tmp_path / "trackers.json", ("--pairs", "2", "--seconds", "0.5", "--save-every", "20")
    shown = bench("trackers", *SIZE, *more, "--out", str(file))
    row = written("trackers", file, shown)
    assert row["steps"] % 20 == 0 and len(row["without"]) == len(row["with"]) == len(row["slowdowns"]) == 2
    for without, with_, slower in zip(row["without"], row["with"], row["slowdowns"], strict=True):
        assert without > 0 and slower == pytest.approx(1 - with_ / without)
    assert row["slowdown_share"] == pytest.approx(sum(row["slowdowns"]) / 2) and f"{row['slowdown_share']:.2%}" in shown


def test_kernels_say_how_they_are_run() -> None:
    assert "--out" in bench("kernels", "--help")


def test_the_plan_is_compared_with_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (plan_vs_measured.Case(1, 2, calibrates=True), plan_vs_measured.Case(2, 2, "llama", grad_accum_steps=2))
    monkeypatch.setitem(plan_vs_measured.CASES, "cpu", cases)
    monkeypatch.setitem(plan_vs_measured.SHAPES, "cpu", (512, 64))
    file = tmp_path / "new" / "plan.json"
    monkeypatch.setattr(sys, "argv", ["bench.plan_vs_measured", "--steps", "3", "--rounds", "2", "--out", str(file)])
    plan_vs_measured.main()
    given, predicted = json.loads(file.read_text())["rows"]
    assert given["predicted_tokens_per_second"] == pytest.approx(given["tokens_per_second"])
    for row in (given, predicted):
        assert row["memory_error"] == pytest.approx(row["predicted_memory_gb"] / row["memory_gb"] - 1)
        assert abs(row["memory_error"]) < 0.3, "libraries, mostly, and of a process of its own"
    shown = capsys.readouterr().out
    assert f"{given['memory_gb']:.2f}" in shown and f"{abs(predicted['time_error']):.1%} at most" in shown
    calibration = read_calibration([file], parse_gpus("cpu"))
    assert [p.seconds for p in calibration.points] == [1 / row["tokens_per_second"] for row in (given, predicted)]
