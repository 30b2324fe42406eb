"""One command makes everything, once; what it leaves can be read by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SEQUENCE_LEN
from runs import Run, explanations, fathom
from shown import plain, tensorboard_rows, wandb_rows
from test_report import SECTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus.synthetic import documents
from corpus.tokenizers import SPECIAL_TOKENS, Tokenizer
from models.hf import from_pretrained
from stages.evaluate import VALIDATED
from stages.evaluation.spoken import PROMPTS, Speaker
from stages.training.parallel import World

STAGES = [
    "tokenizer", "ingest", "base", "evaluate_base",
    "conversations", "mid", "evaluate_mid", "sft", "evaluate_sft", "rl", "evaluate_rl",
]  # fmt: skip
EXPECTED_STEPS = {"base": 40, "mid": 50, "sft": 30, "rl": 6}


def test_every_stage_is_done_and_says_what_it_reached(line: Run) -> None:
    status = line.status()
    assert set(status) == {"run", "stages"} and status["run"] == "line"
    assert [stage["name"] for stage in status["stages"]] == STAGES
    for stage in status["stages"]:
        assert set(stage) == {"name", "state", "seconds", "metrics", "notes", "uri"}
        assert stage["state"] == "done" and stage["seconds"] > 0
        assert stage["uri"] == str(line.path / stage["name"])
    metrics = {stage["name"]: stage["metrics"] for stage in status["stages"]}
    for stage, name in (("base", "val_bpb"), ("evaluate_base", "val_bpb_full"), ("mid", "val_bpb_mid")):
        assert 0 < metrics[stage][name] < 3
    assert 0 < metrics["sft"]["val_bpb_sft"] != metrics["sft"]["val_bpb_sft_whole"] > 0
    for name in ("evaluate_mid", "evaluate_sft", "evaluate_rl"):
        assert 0 <= metrics[name]["greedy"] <= 1 and 0 <= metrics[name]["pass_at_1"] <= metrics[name]["pass_at_2"] <= 1
        assert metrics[name]["problems"] == 8
    assert 0 < metrics["rl"]["reward"] <= 1 and metrics["rl"]["kl_sft"] > 0


def test_the_last_table_has_every_stage_with_its_figures(line: Run) -> None:
    assert line.result is not None
    table = line.result.output[line.result.output.rindex("artifact") :]
    rows = {row.split()[0]: row for row in table.splitlines()[1:] if row.strip()}
    told = [name for name in rows if name.endswith(":")]  # below the table, what a stage has to say
    assert list(rows) == [*STAGES, *told]
    assert all(str(line.path / name) in rows[name] for name in STAGES)
    assert "val_bpb_full" in rows["evaluate_base"] and "greedy" in rows["evaluate_rl"]


def test_every_figure_is_explained_in_the_docs_and_no_two_have_one_name(line: Run) -> None:
    """A name that two kinds of stages show would have two explanations, or one for both."""
    for stage in line.status()["stages"]:
        assert stage["metrics"]
        for name in stage["metrics"]:
            assert len(explanations(stage["name"], name)) == 1, (stage["name"], name)
    for stage in EXPECTED_STEPS:
        for name in {name for record in line.records(stage) for name in record}:
            assert explanations(stage, name, records=True), (stage, name)


@pytest.mark.parametrize("stage", EXPECTED_STEPS)
def test_every_step_is_on_record(line: Run, stage: str) -> None:
    records = line.records(stage)
    stepped = [record for record in records if "loss" in record or "reward" in record]
    assert [record["step"] for record in stepped] == list(range(EXPECTED_STEPS[stage]))
    speed = "completion_tokens_per_second" if stage == "rl" else "tokens_per_second"
    assert all(speed in record for record in stepped)
    assert all(isinstance(value, (int, float)) for record in records for value in record.values())
    if stage != "rl":
        measured = [record["step"] for record in records if VALIDATED[stage][0] in record]
        assert measured == [*range(0, EXPECTED_STEPS[stage], 20), EXPECTED_STEPS[stage]]


@pytest.mark.parametrize("stage", EXPECTED_STEPS)
def test_what_the_model_says_is_kept_at_every_evaluation(line: Run, stage: str) -> None:
    """To the same prompts all along; and what base says last is what its artifact says."""
    said = [json.loads(text) for text in (line.path / stage / "samples.jsonl").read_text().splitlines()]
    steps, first, every = EXPECTED_STEPS[stage], *((15, 15) if stage == "base" else (0, 20))
    prompts = PROMPTS[stage != "base" :]
    expected = [(step, prompt) for step in [*range(first, steps, every), steps] for prompt in prompts]
    assert [(one["step"], one["prompt"]) for one in said] == expected
    if stage == "base":
        model, tokenizer = from_pretrained(line.path / stage), Tokenizer.load(line.path / stage)
        alone = Speaker(tokenizer, model.spec, World(0, 1, torch.device("cpu"), 1), "fp32", chat=False)(model)
        assert [one["text"] for one in said[-len(prompts) :]] == [one["text"] for one in alone]


@pytest.mark.parametrize("stage", EXPECTED_STEPS)
def test_trackers_show_what_is_on_record(line: Run, stage: str) -> None:
    folder = line.storage / "fathom-tracking"
    ours = wandb_rows(folder, "job_type")
    assert set(ours) == set(STAGES) and len(wandb_rows(folder)) == len(STAGES), "one wandb run a stage"
    assert plain(ours[stage]) == plain(line.records(stage)) == plain(tensorboard_rows(folder, "line", stage))
    assert line.result is not None and line.result.output.count("wandb sync") == 1


def test_base_learns(line: Run) -> None:
    measured = [record["val_bpb"] for record in line.records("base") if "val_bpb" in record]
    assert measured == sorted(measured, reverse=True) and measured[-1] < 0.6 * measured[0]


def test_rl_has_rewards_to_tell_apart(line: Run) -> None:
    """Else nothing that is said of RL's steps here or in test_resume.py would mean anything."""
    records = [record for record in line.records("rl") if "reward" in record]
    assert sum(record["trained_tokens"] > 0 for record in records) >= 3
    assert sum(record["reward"] > 0 for record in records) >= 3
    assert all(record.get("logprob_difference", 0.0) < 1e-5 for record in records)
    assert (line.path / "rl/model.safetensors").read_bytes() != (line.path / "sft/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["tokenizer", "base", "rl"])
def test_transformers_reads_the_tokenizer(line: Run, stage: str) -> None:
    ours, theirs = Tokenizer.load(line.path / stage), AutoTokenizer.from_pretrained(line.path / stage)
    assert ours.vocab_size == len(theirs) == 512
    for text in [*documents(90, 20, 1), "Ünïcode, 中文 and 🙂\n\n  1234567 3.5\tdon't"]:
        assert theirs.encode(text) == [ours.bos, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    assert [theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == list(map(ours.special, SPECIAL_TOKENS))


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_transformers_reads_the_model(line: Run, stage: str) -> None:
    ours = from_pretrained(line.path / stage)
    theirs = AutoModelForCausalLM.from_pretrained(line.path / stage, dtype=torch.float32)
    ids = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours.logits(ids) - theirs(ids).logits).abs().max().item()
    assert difference < 1e-4


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_transformers_generates_in_batches_and_stops_where_the_model_does(line: Run, stage: str) -> None:
    ours = Tokenizer.load(line.path / stage)
    tokenizer = AutoTokenizer.from_pretrained(line.path / stage)
    model = AutoModelForCausalLM.from_pretrained(line.path / stage, dtype=torch.float32)
    assert tokenizer.model_max_length == SEQUENCE_LEN
    ends = [ours.bos] if stage == "base" else [ours.special("<|assistant_end|>"), ours.special("<|python_end|>")]
    assert model.generation_config.eos_token_id == ends and tokenizer.eos_token_id == model.config.eos_token_id
    assert ends[0] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == model.config.pad_token_id
    texts = [text[:length] for text, length in zip(documents(90, 4, 1), (5, 60, 20, 33), strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=40)[:, batch["input_ids"].shape[1] :].tolist()
    for text, found in zip(texts, together, strict=True):
        ids = torch.tensor([[ours.bos, *ours.encode(text)]])
        [alone] = model.generate(ids, max_new_tokens=40)[:, ids.shape[1] :].tolist()
        assert found[: len(alone)] == alone and set(found[len(alone) :]) <= {tokenizer.pad_token_id}
        assert alone[-1] in ends or len(alone) == 40
        assert not set(alone[:-1]) & set(ends)


def test_what_was_asked_and_answered_is_kept(line: Run) -> None:
    lines = (line.path / "evaluate_rl/completions.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    assert len(records) == 8 and all(len(record["samples"]) == 2 for record in records)
    trained_on = (line.path / "conversations/task/train.jsonl").read_text()
    assert not any(json.dumps(record["question"]) in trained_on for record in records)


def test_the_run_ends_with_its_report(line: Run) -> None:
    """Which says what happened to it, too: how it was called, on what, and that nothing went wrong."""
    assert line.result is not None and f"report: {line.path}/report/report.html" in line.result.output
    page, text = ((line.path / "report" / name).read_text() for name in ("report.html", "report.md"))
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in page and f"\n## {section}\n" in text
    assert "every stage is done, with no incident on record" in page and "None on record." in page
    assert "CPU cores" in page and "fathom run --name line" in page
    assert page.count('class="chart"') > 30 and len(page) < 3_000_000
    assert "after rl: " in page and ", p " in page


def test_nothing_is_left_behind(line: Run) -> None:
    assert line.result is not None
    assert line.result.left_behind == []
    beside = [".fathom-run", "config.json", "attempts.json", "report"]
    assert sorted(path.name for path in line.path.iterdir()) == sorted([*STAGES, *beside])
    for stage in STAGES:
        listed = {entry["path"] for entry in json.loads((line.path / stage / "manifest.json").read_text())["files"]}
        there = {str(p.relative_to(line.path / stage)) for p in (line.path / stage).rglob("*") if p.is_file()}
        assert there == listed | {"manifest.json"}


def test_the_same_command_again_skips_everything(line: Run) -> None:
    before = line.manifests()
    again = line.go(seconds=120)
    assert again.code == 0, again.output
    assert again.seconds < 20
    assert line.manifests() == before
    assert "running" not in again.output and again.output.count(" done ") == len(STAGES)


def test_a_dry_run_shows_the_plan_and_makes_nothing(line: Run, tmp_path: Path) -> None:
    fresh = Run(tmp_path / "runs", "fresh", line.settings).go("--dry-run", "--until", "sft", seconds=120)
    assert fresh.code == 0, fresh.output
    rows = [row.split() for row in fresh.output.splitlines()]
    assert ["base", "fresh", "run"] in rows and ["rl", "fresh", "not", "asked", "for"] in rows
    assert not (tmp_path / "runs").exists()
    made = line.go("--dry-run", seconds=120)
    assert all([stage, "done", "skip"] in [row.split() for row in made.output.splitlines()] for stage in STAGES)


def test_another_run_takes_what_it_would_make_the_same(line: Run, tmp_path: Path) -> None:
    """All of it without Ray; with another seed for SFT's data order nothing could be taken."""
    taken = Run(line.storage, "taken", line.settings)
    result = taken.go("--reuse-from", "line", seconds=120)
    assert result.code == 0, result.output
    assert taken.manifests() == line.manifests()
    other = Run(line.storage, "other", [*line.settings, "--set", "base.matrix_lr=0.03"])
    result = other.go("--reuse-from", "line", "--until", "ingest", seconds=120)
    assert result.code == 0, result.output
    assert set(other.manifests()) == {"tokenizer", "ingest", "conversations"}


def test_status_of_a_run_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = fathom("status", "nothing", "--storage", str(tmp_path))
    assert result.code == 1 and "Traceback" not in result.output and "no run 'nothing'" in result.output
