"""The number of workers changes nothing but speed; it may even change half-way."""

from __future__ import annotations

from pathlib import Path

from pytest import approx
from runs import Run, kill_at_checkpoint

BASE = ("--only", "base")


def test_two_workers_lose_what_one_does(line: Run, tmp_path: Path) -> None:
    """The whole run trained base in fp32 with one worker, so that its losses are comparable."""
    run = line.branch(tmp_path, "tokenizer", "ingest")
    result = run.go(*BASE, "--workers", "2")
    assert result.code == 0, result.output
    assert not result.left_behind
    assert len(run.losses("base")) == len(line.losses("base")) == 40
    assert run.losses("base") == approx(line.losses("base"), abs=1e-4, rel=0)


def test_a_run_begun_with_two_workers_goes_on_with_one(line: Run, tmp_path: Path) -> None:
    run = line.branch(tmp_path, "tokenizer", "ingest")
    step = kill_at_checkpoint(run, "base", *BASE, "--workers", "2")
    saved = run.path / f"base/checkpoints/step_{step:06d}"
    assert (saved / "part-1.json").exists() and not (saved / "part-2.json").exists()  # two did the work
    recorded = (saved / "metrics.jsonl").read_text()
    result = run.go(*BASE)
    assert result.code == 0, result.output
    assert recorded and (run.path / "base/metrics.jsonl").read_text().startswith(recorded)
    assert len(run.losses("base")) == 40
    assert run.losses("base") == approx(line.losses("base"), abs=1e-4, rel=0)
