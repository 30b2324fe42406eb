"""`fathom evaluate` as a user runs it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Result, Run, fathom, kill_at_checkpoint, one_clear_message, start
from safetensors.torch import load_file, save_file
from test_scoring import make_bundle

from corpus.tokenizers import META_FILE
from pipeline.config import ConfigError, load_config
from pipeline.preflight import check_inputs
from tasks.core import core
from tasks.suite import CHATCORE


def evaluate(*arguments: object, seconds: float = 300) -> Result:
    return fathom("evaluate", *map(str, arguments), seconds=seconds)


def test_a_run_a_stage_and_its_directory_are_one_model(line: Run, tmp_path: Path) -> None:
    """Side by side, with what is written for programs; guessing is what so small a model does."""
    bundle, out = make_bundle(tmp_path / "bundle"), tmp_path / "out"
    out.mkdir()
    asked = ("--tasks", "core,perplexity,Spelling", "--eval-data", bundle, "--limit", 8, "--storage", line.storage)
    files = ("--json", out / "all.json", "--examples", out / "examples.jsonl", "--csv", out / "table.csv")
    result = evaluate("line:base", line.path / "base", *asked, *files)
    assert result.code == 0, result.output
    assert "CORE of 3" in result.stdout and result.stdout.count("+0.0000") == 7, "each task, CORE and ChatCORE"
    first, second = json.loads((out / "all.json").read_text())
    assert (first.pop("model"), second.pop("model")) == ("line:base", str(line.path / "base"))
    for summary in (first, second):
        for figures in summary["tasks"].values():
            assert figures.pop("seconds") > 0
    assert first == second
    assert list(first["tasks"]) == ["choose", "refer", "finish", "perplexity", "Spelling"]
    assert first["core_labels"] == ["choose", "finish", "refer"] and first["chatcore_tasks"] == ["Spelling"]
    labels = {name: first["tasks"][name]["accuracy"] for name in first["core_labels"]}
    assert first["core"] == pytest.approx(core(labels, {"choose": 33, "refer": 50, "finish": 0}))
    assert 0 < first["bpb"] < 8
    examples = [json.loads(row) for row in (out / "examples.jsonl").read_text().splitlines()]
    mine = [row["correct"] for row in examples if row["model"] == "line:base" and row["task"] == "choose"]
    assert len(mine) == 8 and sum(mine) / 8 == labels["choose"]
    rows = (out / "table.csv").read_text().splitlines()
    assert rows[0] == "Task,Accuracy,Centered"
    assert rows[1].startswith(f"choose,{labels['choose']:.6f},")
    assert [row.split(",")[0] for row in rows[-2:]] == ["CORE*", "ChatCORE*"], "of some labels, and few examples each"


def test_a_model_of_other_makers_answers_in_its_own_chat_format(line: Run, tmp_path: Path) -> None:
    """As a model of ours without what only we write beside it."""
    theirs = tmp_path / "theirs"
    shutil.copytree(line.path / "sft", theirs)
    (theirs / META_FILE).unlink()
    asked = ("--tasks", "chatcore", "--eval-data", tmp_path, "--limit", 8, "--storage", tmp_path)
    for name in ("arc", "mmlu", "gsm8k", "humaneval"):
        (tmp_path / name).mkdir()
    problem = {"task_id": "0", "prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n"}
    solved = problem | {"test": "def check(f):\n    assert f() == 1\n"}
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(json.dumps(solved) + "\n")
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    choice = {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"}
    for part in ("ARC-Easy", "ARC-Challenge"):
        (tmp_path / f"arc/{part}.test.jsonl").write_text(f"{json.dumps(choice)}\n" * 3)
    (tmp_path / "mmlu/test.jsonl").write_text('{"question": "Which?", "choices": ["a", "b"], "answer": 1}\n' * 3)
    files = ("--json", tmp_path / "all.json", "--examples", tmp_path / "examples.jsonl")
    result = evaluate(line.path / "sft", theirs, *asked, *files)
    assert result.code == 0, result.output
    ours, other = json.loads((tmp_path / "all.json").read_text())
    assert list(ours["tasks"]) == list(other["tasks"]) == list(CHATCORE)
    rows = [json.loads(row) for row in (tmp_path / "examples.jsonl").read_text().splitlines()]
    for mine, its in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        assert (mine.pop("model"), its.pop("model")) == (ours["model"], other["model"])
        assert mine.pop("scores") == pytest.approx(its.pop("scores"), abs=1e-5)
        assert mine == its


def test_each_model_is_measured_for_itself(line: Run, tmp_path: Path) -> None:
    """In bf16, side by side: one as it is, one with a shorter context, one whose weights are damaged and one whose
    weights are no numbers, of which both are told and keep none of the others from its figures."""
    bundle = make_bundle(tmp_path / "bundle")
    for name in ("short", "broken", "nan"):
        shutil.copytree(line.path / "base", tmp_path / name)
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    (tmp_path / "broken/model.safetensors").write_bytes(b"\xff" * 100)
    weights = load_file(tmp_path / "nan/model.safetensors")
    save_file(
        {name: torch.full_like(weight, math.nan) for name, weight in weights.items()},
        tmp_path / "nan/model.safetensors",
    )
    models = [line.path / "base", tmp_path / "broken", tmp_path / "short", tmp_path / "nan"]
    asked = ("--tasks", "core,perplexity", "--eval-data", bundle, "--text", bundle / "text.txt")
    (bundle / "text.txt").write_text("The ash grew beside the oak. " * 200)
    more = ("--storage", tmp_path, "--precision", "bf16", "--json", tmp_path / "all.json")
    result = evaluate(*models, *asked, *more)
    all_of_them = "choose, refer, finish, perplexity could not be asked"
    one_clear_message(result, f"{tmp_path}/broken: {all_of_them}: {tmp_path}/broken: model.safetensors is damaged")
    assert f"{tmp_path}/nan: {all_of_them}: the model's scores are no numbers" in result.output
    assert "Retrying" not in result.output
    whole, broken, short, nan = json.loads((tmp_path / "all.json").read_text())
    for nothing in (broken, nan):
        assert nothing["tasks"] == {} and set(nothing["faults"]) == {"choose", "refer", "finish", "perplexity"}
    assert list(whole["tasks"]) == list(short["tasks"]) == ["choose", "refer", "finish", "perplexity"]
    assert short["tasks"]["perplexity"]["examples"] > whole["tasks"]["perplexity"]["examples"]  # more windows
    assert short["bpb"] > whole["bpb"]
    plain = evaluate(models[0], *asked, "--storage", tmp_path, "--json", tmp_path / "fp32.json")
    assert plain.code == 0, plain.output
    bpb = json.loads((tmp_path / "fp32.json").read_text())["bpb"]
    assert bpb != whole["bpb"] and bpb == pytest.approx(whole["bpb"], rel=0.01)


@pytest.mark.parametrize("tasks", ["core", "GSM8K,Spelling"])
def test_what_is_killed_goes_on_and_asks_no_task_again(line: Run, tmp_path: Path, tasks: str) -> None:
    """Whether they are ranked or written; the figures are an unbroken run's."""
    data = make_bundle(tmp_path / "data", count=400)
    (data / "gsm8k").mkdir()
    (data / "gsm8k/test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    shutil.copytree(line.path / ("base" if tasks == "core" else "rl"), tmp_path / "model")
    arguments = [tmp_path / "model", "--tasks", tasks, "--eval-data", data]

    def answers(storage: str) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / storage).glob("evaluations/*.json")}

    def shown(storage: str) -> dict[str, Any]:
        file = tmp_path / f"{storage}.json"
        result = evaluate(*arguments, "--storage", tmp_path / storage, "--json", file)
        assert result.code == 0, result.output
        tasks = json.loads(file.read_text())["tasks"]
        return {name: {k: v for k, v in of_task.items() if k != "seconds"} for name, of_task in tasks.items()}

    command = start("evaluate", *map(str, arguments), "--storage", str(tmp_path / "broken"))
    assert command.until(lambda: len(answers("broken")) > 0, 300), command.output()
    command.kill()
    kept = answers("broken")
    assert 0 < len(kept) < (3 if tasks == "core" else 2), "it was over before it could be killed"
    assert shown("broken") == shown("unbroken")
    assert {name: answers("broken")[name] for name in kept} == kept


def test_a_checkpoint_is_measured_and_what_is_kept_of_it_may_be_damaged(line: Run, tmp_path: Path) -> None:
    """As its stage's model is once it is done; the exported files in the cache are checked like all others."""
    run = line.branch(tmp_path, "tokenizer", "ingest")
    step = kill_at_checkpoint(run, "base", "--from", "base", "--until", "base")
    asked = (f"branch:base@{step}", "--tasks", "perplexity", "--limit", "8", "--json", str(tmp_path / "all.json"))

    def figures() -> dict[str, float]:
        result = start("evaluate", *asked, "--storage", str(run.storage), HOME=str(tmp_path)).finish(300)
        assert result.code == 0, result.output
        found = json.loads((tmp_path / "all.json").read_text())["tasks"]["perplexity"]
        return {name: found[name] for name in ("bpb", "word_perplexity")}

    first = figures()
    [weights] = (tmp_path / ".cache/fathom/checkpoints").glob("*/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x00")
    shutil.rmtree(run.storage / "evaluations")
    assert figures() == first
    assert weights.read_bytes() == whole


def unusable(line: Run, tmp_path: Path, kind: str) -> tuple[list[object], str]:
    """Arguments of `fathom evaluate` that cannot serve, and what its message has to say."""
    model = tmp_path / "model"
    shutil.copytree(line.path / "base", model)
    bundle = make_bundle(tmp_path / "bundle")
    asked: list[object] = ["--eval-data", bundle]
    if kind == "run":
        return ["no-such-run", *asked], "no run 'no-such-run'"
    if kind == "stage":
        return ["line:ingest", *asked], "ingest makes no model"
    if kind == "step":
        return ["line:base@7", *asked], "there is no such checkpoint"
    if kind == "limit":
        return [model, *asked, "--limit", 0], "--limit 0"
    if kind == "file":
        return [model, *asked, "--json", tmp_path], "is a folder; give the name of a file"
    if kind == "no task":
        return [model, *asked, "--tasks", ","], "names no task; there are core, chatcore"
    if kind == "no problems":
        (bundle / "gsm8k").mkdir()
        (bundle / "gsm8k/test.jsonl").touch()
        return [model, *asked, "--tasks", "GSM8K"], "GSM8K could not be asked: it has no problems"
    if kind == "task":
        return [model, *asked, "--tasks", "cor"], "no task 'cor'; did you mean core"
    if kind == "no bundle":
        return [model], "give --eval-data"
    if kind == "family":
        config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba"}
        (model / "config.json").write_text(json.dumps(config))
        return [model, *asked], "mamba"
    if kind == "tokenizer":
        for path in [*model.glob("tokenizer*"), *model.glob("*.tiktoken")]:
            path.unlink()
        return [model, *asked], "has no tokenizer"
    long = {"context": "a", "continuation": "b " * 400}
    (bundle / "eval_data/b/finish.jsonl").write_text(f"{json.dumps(long)}\n" * 3)
    return [model, *asked, "--tasks", "finish"], "does not fit into the model's context"


KINDS = [
    "run",
    "stage",
    "step",
    "limit",
    "file",
    "no task",
    "no problems",
    "task",
    "no bundle",
    "family",
    "tokenizer",
    "context",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_measured_is_one_clear_message(line: Run, tmp_path: Path, kind: str) -> None:
    arguments, said = unusable(line, tmp_path, kind)
    one_clear_message(evaluate(*arguments, "--storage", line.storage), said)


def test_a_run_asks_core_after_base_and_on_the_way(line: Run, tmp_path: Path) -> None:
    """With the answers of `fathom evaluate`, and base learns what it learns without being asked."""
    bundle = make_bundle(tmp_path / "bundle")
    run = line.branch(tmp_path, "tokenizer", "ingest")
    on_the_way = ("--set", "base.core_every=20", "--set", "base.core_examples=6", "--set", "evaluate.limit=6")
    result = run.go("--from", "base", "--until", "evaluate_base", "--eval-data", str(bundle), *on_the_way)
    assert result.code == 0, result.output
    assert "CORE* " in result.output and "of 3 of 22 tasks" in " ".join(result.output.split())
    assert (run.path / "base/model.safetensors").read_bytes() == (line.path / "base/model.safetensors").read_bytes()
    asked = {record["step"]: record["val_core"] for record in run.records("base") if "val_core" in record}
    assert list(asked) == [20]
    [shown] = [stage["metrics"] for stage in run.status()["stages"] if stage["name"] == "evaluate_base"]
    assert shown["core_labels"] == 3 and shown["core_low"] < shown["core"] < shown["core_high"]
    found = json.loads((run.path / "evaluate_base/tasks.json").read_text())
    file = tmp_path / "all.json"
    arguments = ("--storage", run.storage, "--tasks", "core", "--eval-data", bundle, "--limit", 6, "--json", file)
    result = evaluate("branch:base", *arguments)
    assert result.code == 0, result.output
    alone = json.loads(file.read_text())
    for of_task in [*found["tasks"].values(), *alone["tasks"].values()]:
        del of_task["seconds"]
    assert found["tasks"] == alone["tasks"] and found["core"] == alone["core"] == shown["core"]


def test_mistakes_of_evaluations_are_told_before_anything_starts(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    for more, said in (
        (["--evals", "cor", "--eval-data", str(bundle)], "--evals cor: there is no task 'cor'; did you mean core"),
        (["--evals", "core"], "--evals core: CORE needs its bundle: give --eval-data"),
        (["--set", "base.core_every=5"], "base.core_every asks CORE, whose bundle is missing: give --eval-data"),
    ):
        result = fathom("run", "--preset", "demo", "--storage", str(tmp_path), *more, "--dry-run", seconds=120)
        assert result.code == 1 and said in result.output.replace("\n", " "), result.output
    with pytest.raises(ConfigError, match="there is no task 'Speling'; did you mean Spelling"):
        check_inputs(load_config("demo", sets=["evaluate.tasks=Speling"]), ["evaluate_sft"])
