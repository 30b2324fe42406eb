"""The number of workers changes nothing but speed; it may even change half-way."""

from __future__ import annotations

import json
from pathlib import Path

from pytest import approx
from runs import Run, one_clear_message, start

BASE = ("--only", "base")


def test_two_workers_save_at_sigterm_and_one_goes_on(line: Run, tmp_path: Path) -> None:
    """What schedulers send before they take a machine away. No checkpoint is due for long."""
    run = line.branch(tmp_path, "tokenizer", "ingest")
    command = start("run", *run.arguments(*BASE, "--workers", "2", "--set", "base.save_every=1000"))

    def trains() -> bool:
        progress = run.path / "base/progress.json"
        return progress.exists() and bool((json.loads(progress.read_text()).get("step") or 0) > 2)

    assert command.until(trains, 300), command.output()
    command.process.terminate()
    one_clear_message(
        command.finish(120), "SIGTERM: base will save and stop", "stopped as asked; everything up to step"
    )
    assert run.states()["base"] == "resumable"
    [saved] = (run.path / "base/checkpoints").iterdir()
    assert (saved / "part-1.json").exists() and not (saved / "part-2.json").exists()  # two did the work
    recorded = (saved / "metrics.jsonl").read_text()
    result = run.go(*BASE)
    assert result.code == 0, result.output
    assert recorded and (run.path / "base/metrics.jsonl").read_text().startswith(recorded)
    assert len(run.losses("base")) == 40
    assert run.losses("base") == approx(line.losses("base"), abs=1e-4, rel=0)


def test_a_lost_worker_is_replaced_and_as_many_work_as_there_is_room_for(line: Run, tmp_path: Path) -> None:
    """kill -9 of one of the processes that train: the same command goes on by itself from the newest checkpoint, and
    loses what one worker does. The whole run trained base in fp32, so that its losses are comparable."""
    run = line.branch(tmp_path, "tokenizer", "ingest")
    command = start("run", *run.arguments(*BASE, "--workers", "1:2", "--set", "base.parallel=fsdp"))
    saved = run.path / "base/checkpoints"

    def second_part() -> bool:
        return any(saved.glob("step_*/part-1.json"))

    assert command.until(second_part, 300), command.output()
    workers = command.named("RayTrainWorker")
    assert len(workers) == 2, "there is room for two"
    workers[1].kill()
    result = command.finish(300)
    assert result.code == 0, result.output
    assert "a worker was lost after step" in result.output
    assert not result.left_behind
    assert run.losses("base") == approx(line.losses("base"), abs=1e-4, rel=0)
