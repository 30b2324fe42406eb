"""The line on text, conversations and problems that people wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import flags
from runs import Run, one_clear_message

from tasks.gsm8k import GSM8K

SETTINGS = {
    "model.vocab_size": 512,
    "model.sequence_len": 256,
    "tokenizer.max_chars": 1_000_000,
    "data.max_documents": 200,
    "data.mid.chat.rows": 100,
    "data.sft.chat.rows": 100,
    "data.validation_conversations": 16,
    "base.steps": 30,
    "mid.steps": 4,
    "sft.steps": 4,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 2,
    "rl.signal_prompts": 4,
    "rl.max_new_tokens": 1,  # no room for an answer, so that none is right by luck
    "evaluate.problems": 4,
    "evaluate.samples": 2,
    "evaluate.max_new_tokens": 64,
}
for stage in ("base", "mid", "sft"):
    SETTINGS |= {f"{stage}.total_batch_size": 2048, f"{stage}.eval_every": 10, f"{stage}.eval_rows": 32}
PRETRAINING = ["tokenizer", "ingest", "base", "evaluate_base"]
BEFORE_RL = [*PRETRAINING, "conversations", "mid", "evaluate_mid", "sft", "evaluate_sft"]


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command of the README on real files; a model this small solves nothing, and RL says so."""
    settings = [
        *("--depth", "1", "--with-rl", "--corpus", str(shared_data / "novels/train_*.parquet")),
        *("--chat", str(shared_data / "chat/dolly_1000.jsonl"), "--gsm8k", str(shared_data / "gsm8k")),
        *flags(SETTINGS),
    ]
    run = Run(tmp_path_factory.mktemp("real"), "real", settings)
    return Run(run.storage, run.name, run.settings, run.go(seconds=400))


def test_rl_says_that_there_is_nothing_to_learn_from(real: Run) -> None:
    assert real.result is not None
    one_clear_message(real.result, "stage rl failed: no signal", "rl.require_signal=false")
    states = real.states()
    assert [name for name, state in states.items() if state == "done"] == BEFORE_RL
    assert states["rl"] == "failed" and states["evaluate_rl"] == "fresh"


def test_base_learns_novels(real: Run) -> None:
    measured = [record["val_bpb"] for record in real.records("base") if "val_bpb" in record]
    assert len(measured) == 4
    assert measured == sorted(measured, reverse=True) and measured[-1] < measured[0] - 1
    metrics = {stage["name"]: stage["metrics"] for stage in real.status()["stages"]}
    assert 180 <= metrics["ingest"]["documents"] <= 220


def test_what_rl_trains_on_and_is_asked_is_gsm8k_as_published(real: Run, shared_data: Path) -> None:
    for split in ("train", "test"):
        lines = (shared_data / f"gsm8k/{split}.jsonl").read_text().splitlines()
        kept = [vars(problem) for problem in GSM8K(str(real.path / "conversations/task")).problems(split)]
        assert kept == [json.loads(text) for text in lines]
    test = {problem.question for problem in GSM8K(str(real.path / "conversations/task")).problems("test")}
    asked = (real.path / "evaluate_sft/completions.jsonl").read_text().splitlines()
    assert len(asked) == 4 and all(json.loads(text)["question"] in test for text in asked)
