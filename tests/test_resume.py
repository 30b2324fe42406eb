"""Kill it at any moment and give the same command again: it goes on, and nobody can tell from the record."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TRACKED
from runs import Run, kill_at_checkpoint, one_clear_message
from shown import plain, tensorboard_rows, wandb_rows

# mid is the loop of base on the kind of rows that sft has
UPSTREAM = {
    "base": ("tokenizer", "ingest"),
    "sft": ("tokenizer", "ingest", "base", "conversations", "mid"),
    "rl": ("tokenizer", "ingest", "base", "conversations", "mid", "sft"),
}


@pytest.mark.parametrize("stage", UPSTREAM)
def test_a_killed_stage_goes_on_as_if_nothing_had_been(line: Run, tmp_path: Path, stage: str) -> None:
    run = line.branch(tmp_path, *UPSTREAM[stage])
    upstream = run.manifests()
    # after its fourth step RL has seen every problem, and begins anew with them in another order
    at = ("--set", "rl.save_every=4") if stage == "rl" else ()
    step = kill_at_checkpoint(run, stage, "--only", stage, *at, *TRACKED)
    assert stage != "rl" or step == 4
    assert run.states()[stage] == "resumable"
    recorded = (run.path / stage / f"checkpoints/step_{step:06d}/metrics.jsonl").read_text()
    plan = run.go("--only", stage, "--dry-run", seconds=120)
    assert f"resume from step {step}" in plan.output
    result = run.go("--only", stage, *TRACKED)
    assert result.code == 0, result.output
    assert not result.left_behind
    assert run.states()[stage] == "done"
    for rows in (wandb_rows(tmp_path / "fathom-tracking", "job_type")[stage],
                 tensorboard_rows(tmp_path / "fathom-tracking", run.name, stage)):  # fmt: skip
        assert plain(rows) == plain(run.records(stage)), "a tracker shows something else"
    assert run.lasting(stage) == line.lasting(stage)
    # Down to the times it took, the steps before the checkpoint are those of the killed command.
    assert recorded and (run.path / stage / "metrics.jsonl").read_text().startswith(recorded)
    said = f"{stage}/samples.jsonl"
    assert (run.path / said).read_bytes() == (line.path / said).read_bytes()
    weights = f"{stage}/model.safetensors"
    assert (run.path / weights).read_bytes() == (line.path / weights).read_bytes()
    made = run.manifests()
    assert {name: made[name] for name in upstream} == upstream
    beside = [".fathom-run", "config.json", "attempts.json", "report"]
    assert sorted(p.name for p in run.path.iterdir()) == sorted([*UPSTREAM[stage], stage, *beside])
    page = (run.path / "report/report.html").read_text()
    assert f"<td>{stage}</td><td>resumed</td><td>from step {step}</td>" in page and "ended without a word" in page


def test_a_stage_that_raises_leaves_the_others_done_and_only_it_is_made_again(line: Run, tmp_path: Path) -> None:
    run = line.branch(tmp_path, "tokenizer")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("no JSON\n")
    failed = run.go("--only", "conversations", "--chat", str(damaged))
    one_clear_message(failed, "stage conversations failed", str(damaged), "1 not JSON", "run the same command again")
    states = run.states()
    assert states["tokenizer"] == "done" and states["conversations"] == "failed" and states["base"] == "fresh"
    before = run.manifests()
    assert set(before) == {"tokenizer"}
    result = run.go("--only", "conversations")
    assert result.code == 0, result.output
    made = run.manifests()
    assert set(made) == {"tokenizer", "conversations"} and made["tokenizer"] == before["tokenizer"]
    whole = line.path / "conversations"
    for file in (path for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json"):
        assert (run.path / "conversations" / file.relative_to(whole)).read_bytes() == file.read_bytes()
