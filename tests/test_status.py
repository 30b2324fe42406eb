"""Status, the live view and the final table show what storage holds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs import explanations

from cluster import manifest as manifests
from cluster.manifest import Manifest
from pipeline import cli, status, tracking
from pipeline.artifacts import RunStore
from pipeline.config import identity_of, load_config, stage_names
from pipeline.terminal import plain
from pipeline.tracking import LiveView, duration, key_metrics
from stages.evaluate import VALIDATED
from stages.training.metrics import SUMMARY


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run with the tokenizer done, base killed on the way and the rest to do."""
    store, config = RunStore(str(tmp_path), "r"), load_config("demo", {"name": "r"})
    store.record(config)
    metrics = {"vocab_size": 1024, "bytes_per_token": 3.25}
    done = Manifest("r", "tokenizer", [], identity_of("tokenizer", config), metrics=metrics, seconds=65.4)
    manifests.write(store.stage("tokenizer"), done)
    progress = {"state": "running", "step": 3, "steps": 9, "metrics": {"loss": 2.5}, "seconds": 4.0}
    store.stage("base").write_json("progress.json", progress)
    return store


def test_json_has_exactly_the_documented_shape(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["r", "--storage", str(Path(store.storage.uri).parent), "--json"]
    assert status.main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"run", "stages"} and shown["run"] == "r"
    assert [s["name"] for s in shown["stages"]] == stage_names(load_config("demo"))
    assert all(set(s) == {"name", "state", "seconds", "metrics", "notes", "uri"} for s in shown["stages"])
    stages = {s["name"]: s for s in shown["stages"]}
    assert stages["tokenizer"]["state"] == "done" and stages["tokenizer"]["seconds"] == 65.4
    assert stages["base"]["state"] == "fresh" and stages["base"]["metrics"] == {"loss": 2.5}
    assert stages["rl"]["uri"] == f"{store.storage.uri}/rl"
    with store.claim():
        assert status.main(argv) == 0
    stages = {s["name"]: s for s in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["base"]["state"] == "running"


def test_without_a_run_the_runs_are_named(store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Path(store.storage.uri).parent
    for name in ("another", "third"):
        with RunStore(str(storage), name).claim():
            pass
    (storage / "no-run").mkdir()
    with store.claim():
        pass
    assert status.main(["--storage", str(storage)]) == 0
    assert capsys.readouterr().out.split() == ["another", "r", "third"]
    assert status.main(["--storage", str(storage), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": ["another", "r", "third"]}
    assert status.main(["--storage", str(tmp_path / "nowhere")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_the_table_names_time_metrics_and_artifact(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["r", "--storage", str(Path(store.storage.uri).parent)]) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("tokenizer"))
    for part in ("done", "1m05s", "vocab_size 1,024", "bytes_per_token 3.25"):
        assert part in line


def test_a_damaged_artifact_shows_as_failed_with_why(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(store.stage("tokenizer").uri) / "manifest.json").write_text("{")
    assert status.main(["r", "--storage", str(Path(store.storage.uri).parent)]) == 0
    out = capsys.readouterr().out
    assert "failed" in out and "not valid JSON" in out


def test_an_unknown_run_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["nope", "--storage", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="no run 'nope'"):
        status.main(argv)
    assert cli.main(["status", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("fathom status: no run 'nope'")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "nope").exists()


def test_plain_lines_show_changes_and_not_what_an_earlier_attempt_left(store: RunStore) -> None:
    out = io.StringIO()
    with LiveView(store, ["tokenizer", "base", "mid"], Console(file=out)) as view:
        view.poll()
        assert out.getvalue().split()[:2] == ["tokenizer", "done"] and out.getvalue().count("\n") == 1
        metrics = {"loss": 2.25, "tokens_per_second": 5123.4}
        for step in (4, 5):
            progress = {"state": "running", "step": step, "steps": 9, "metrics": metrics, "seconds": 9.0}
            store.stage("base").write_json("progress.json", progress)
            view.poll()
        store.stage("base").write_json("progress.json", {"state": "failed", "error": "out of memory"})
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[:2] for line in lines] == [["tokenizer", "done"], ["base", "running"], ["base", "failed"]]
    assert lines[1][2:] == ["4/9", "loss", "2.25", "5,123", "tok/s"]


def test_stages_that_wait_are_not_said(store: RunStore) -> None:
    out = io.StringIO()
    with (
        patch.object(tracking, "LINE_SECONDS", 0.0),
        LiveView(store, ["mid", "evaluate_mid", "sft"], Console(file=out)) as view,
    ):
        for _ in range(3):
            view.poll()
        store.stage("mid").write_json("progress.json", {"state": "running", "step": 1, "steps": 9})
        view.poll()
    assert [line.split() for line in out.getvalue().splitlines()] == [["mid", "running", "1/9"]]


def test_a_terminal_gets_a_live_table_with_the_time_left(store: RunStore) -> None:
    out = io.StringIO()
    with LiveView(store, ["base"], Console(file=out, force_terminal=True, width=120)) as view:
        for step in (4, 5):
            store.stage("base").write_json("progress.json", {"state": "running", "step": step, "steps": 9})
            view.poll()
        view.live.refresh()
    assert "5/9" in out.getvalue() and "left" in out.getvalue()


def test_figures_for_people() -> None:
    assert [duration(s) for s in (None, 8.2, 185, 7620)] == ["", "8s", "3m05s", "2h07m"]
    metrics = {"steps": 300, "tokens_per_second": 51234.5, "val_bpb": 1.23456, "note": "x", "pass_at_1": 0.5}
    assert key_metrics(metrics, most=3) == "val_bpb 1.235  pass_at_1 0.5  tokens_per_second 51,234"


def test_every_figure_that_is_shown_while_a_stage_trains_is_explained() -> None:
    """One that a run shows only when it is done: test_line.py."""
    stages = ("base", "mid", "sft", "rl")
    assert all(any(explanations(stage, name) for stage in stages) for name in SUMMARY)
    assert all(explanations(stage, name) for stage, names in VALIDATED.items() for name in names)
    assert all(explanations("ingest", name) for name in ("tokens", "tokens_per_second"))
    assert not explanations("evaluate_base", "val_bpb") and not explanations("evaluate_rl", "kl_sft")


def test_the_greedy_share_stands_apart_from_those_of_samples() -> None:
    shares = {f"pass_at_{k}": 0.1 * k for k in (1, 2, 4, 8)}
    metrics = {"problems": 200, **shares, "maj_at_2": 0.1, "greedy": 0.52, "greedy_low": 0.4, "greedy_high": 0.6}
    assert key_metrics(metrics) == "greedy 0.52  pass_at_1 0.1  pass_at_2 0.2  pass_at_4 0.4"
    metrics = {
        "reward": 0.5,
        "val_greedy": 0.1,
        "val_pass_at_1": 0.2,
        "kl_sft": 0.03,
        "completion_tokens_per_second": 9.0,
    }
    assert key_metrics(metrics) == "reward 0.5  val_pass_at_1 0.2  kl_sft 0.03  completion_tokens_per_second 9"


TEXT = st.text(st.characters() | st.sampled_from("\x1b\x07\x9b\ud800\udfff"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["[/x]", "../e"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just("[/x]"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=int(os.environ.get("FATHOM_FUZZ", "50")))
@given(data=st.data(), path=st.sampled_from(["manifest.json", "progress.json", "../config.json", "../claim.json"]))
def test_whatever_lies_in_storage_status_shows_it_or_says_what_is_wrong(data: st.DataObject, path: str) -> None:
    """No traceback, nothing outside the run, nothing that steers the terminal, and no longer than a moment."""
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        store, config = RunStore(f"{folder}/[b]", "r"), load_config("demo", {"name": "r"})
        store.record(config)
        counts = {"read": {"corpus": {"read": 2, "kept": 1, "left_out": {"empty": 1}}}, "skipped": {"a": {"other": 1}}}
        stats = {"notes": ["n"], **counts}
        figures = {"vocab_size": 1}
        done = Manifest("r", "tokenizer", [], identity_of("tokenizer", config), {}, {}, figures, stats, 1.0)
        manifests.write(store.stage("tokenizer"), done)
        store.stage("tokenizer").write_json("progress.json", {"state": "running", "step": 1, "metrics": {"loss": 1.0}})
        file = Path(store.stage("tokenizer").uri) / path
        raw = json.loads(file.read_text()) if file.exists() else {"host": "h", "pid": 1, "token": "t", "beat": 1}
        kind = data.draw(st.sampled_from(["value", "field", "within", "cut", "deep"]))
        if kind == "value":
            raw = data.draw(VALUES)
        elif kind == "field":
            raw[data.draw(st.sampled_from(sorted(raw)))] = data.draw(VALUES)
        elif kind == "within" and (nested := sorted(name for name in raw if isinstance(raw[name], dict))):
            inner = raw[data.draw(st.sampled_from(nested))]
            name = data.draw(st.sampled_from([*sorted(inner), "[/x]"]))
            inner[name] = data.draw(VALUES | st.floats())
        text = json.dumps({k: v for k, v in raw.items() if k != "sha256"} if isinstance(raw, dict) else raw)
        text = text[: data.draw(st.integers(0, len(text)))] if kind == "cut" else text
        file.resolve().write_text("[" * 100_000 if kind == "deep" else text)
        with patch("pipeline.artifacts.BEAT_SECONDS", 0.01):
            assert cli.main(["status", "r", "--storage", f"{folder}/[b]"]) in (0, 1)
            assert cli.main(["run", "--preset", "demo", "--name", "r", "--storage", f"{folder}/[b]", "--dry-run"]) in (
                0,
                1,
            )
        assert os.listdir(folder) == ["[b]"] and os.listdir(f"{folder}/[b]") == ["r"]
    assert plain(out.getvalue()) == out.getvalue()


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", "9" * 400, '"[/x]"'])
@pytest.mark.parametrize("path", ["manifest.json", "progress.json"])
def test_figures_that_are_none_are_shown_or_refused(
    store: RunStore, path: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = store.stage("tokenizer" if path == "manifest.json" else "base")
    file = Path(stage.uri) / path
    raw = {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}
    text = json.dumps(raw | {"seconds": "HERE", "metrics": {"loss": "HERE"}}).replace('"HERE"', value)
    file.write_text(text)
    assert cli.main(["status", "r", "--storage", str(Path(store.storage.uri).parent)]) == 0
    with LiveView(store, ["tokenizer", "base"], Console(file=io.StringIO())) as view:
        view.poll()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(store: RunStore) -> None:
    file = Path(store.storage.uri) / "config.json"
    file.unlink()
    os.mkfifo(file)
    assert status.main(["r", "--storage", str(Path(store.storage.uri).parent)]) == 0
