"""A report says what storage holds of a run, in any state, as text that nothing in it can turn into anything else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import tempfile
import time
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Page, look
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_status import VALUES

from cluster import manifest as manifests
from cluster.hardware import parse_gpus
from cluster.manifest import METRICS, SAMPLES, Incident, Manifest, checkpoint_path
from cluster.storage import MARKER, FileEntry, Storage, StorageError
from pipeline import cli, run, runs
from pipeline.artifacts import RunStore
from pipeline.attempts import Diary, attempts
from pipeline.config import Config, identity_of, load_config, stage_names
from pipeline.report import keep
from pipeline.reporting import document, facts
from pipeline.reporting.blocks import Code, Document, Fold, Table, Text, Tiles, smoothed, thinned
from pipeline.reporting.comparison import comparison
from pipeline.reporting.document import Known, report
from pipeline.reporting.html import page
from pipeline.reporting.markdown import markdown
from tasks.estimates import core_difference

SECTIONS = (
    "At a glance",
    "What was trained, and what it cost",
    "Planned and measured",
    "Evaluations",
    "Curves",
    "What the model says",
    "Data",
    "Incidents",
    "Settings that differ from the defaults",
    "Doing it again",
)
SCRIPT = "<script>alert(1)</script>"
TRAINED = {"base": 120, "mid": 70, "sft": 20, "rl": 40}


def records(stage: str, steps: int, better: float = 0.0) -> str:
    """metrics.jsonl of a stage, as training writes it."""
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        if stage == "rl":
            lines.append({"step": step, "reward": step / steps, "completion_tokens_sum": 500, "step_ms": 2_000.0})
        else:
            loss = 1 + 6 / (1 + step) - better
            figures = {"loss": loss, "grad_norm": 0.5, "lr_multiplier": 1.0, "step_ms": 1_000.0}
            lines.append({"step": step, **figures, "tokens_per_second": 8_192.0, "memory_gb": 1.5})
    if stage == "base":
        lines += [{"step": steps, "val_bpb": 0.5}]
    return "".join(json.dumps(line) + "\n" for line in lines)


def spoken(stage: str) -> str:
    """samples.jsonl of a stage that has spoken ten times."""
    lines = [{"step": step, "prompt": "The capital is", "text": f" {stage} {step}"} for step in range(0, 100, 10)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def answers(right: Sequence[bool], question: str = "How many?", text: str = "#### 4") -> str:
    """completions.jsonl of an evaluation."""
    lines = []
    for i, solved in enumerate(right):
        completion = {"text": text, "tokens": 3, "finished": True, "answer": "4", "grades": {"reward": float(solved)}}
        asked = {"question": f"{question} {i}", "answer": "#### 4"}
        lines.append({**asked, "greedy": [completion], "samples": [completion, completion]})
    return "".join(json.dumps(line) + "\n" for line in lines)


class Made:
    """An artificial run in storage."""

    def __init__(self, folder: Path, name: str = "r", config: Config | None = None) -> None:
        self.config = config or load_config("demo", {"name": name, "storage": str(folder)})
        self.store = RunStore(str(folder), name)
        self.store.record(self.config)

    def done(self, stage: str, files: dict[str, str] | None = None, **told: Any) -> None:
        entries, place = [], self.store.stage(stage)
        for path, text in (files or {}).items():
            place.write_bytes(path, text.encode())
            entries.append(FileEntry(path, len(text.encode()), sha256(text.encode()).hexdigest()))
        made = Manifest("r", stage, entries, identity_of(stage, self.config), seconds=10.0, **told)
        manifests.write(place, made)

    def whole(self, right: Sequence[bool] = (True,) * 15 + (False,) * 5, better: float = 0.0) -> Made:
        read = {"corpus": {"read": 100, "kept": 93, "left_out": {"duplicates": 5, "empty": 2}}}
        for stage in stage_names(self.config):
            if stage in TRAINED:
                files = {METRICS: records(stage, TRAINED[stage], better), SAMPLES: spoken(stage)}
                self.done(stage, files, metrics={"loss": 1.0})
            elif stage == "ingest":
                counts = {"documents": 93, "tokens": 12_345, "characters_per_token": 3.5}
                self.done(stage, metrics=counts, stats={"read": read, **counts})
            elif stage == "evaluate_base":
                self.done(stage, metrics={"val_bpb_full": 0.51})
            elif stage.startswith("evaluate_"):
                solved = right if stage == "evaluate_rl" else [False] * len(right)
                share = sum(solved) / len(solved)
                figures = {"greedy": share, "greedy_low": share / 2, "greedy_high": 1.0, "problems": len(solved)}
                self.done(stage, {"completions.jsonl": answers(solved)}, metrics=figures)
            else:
                self.done(stage, versions={"torch": "2.13.0"})
        return self

    def report(self, **known: Any) -> Document:
        return report(facts.collect(self.store), Known(**known))


def words(blocks: Sequence[Any]) -> list[str]:
    """All that blocks say."""
    said: list[str] = []
    for block in blocks:
        match block:
            case Text() | Code():
                said.append(block.text)
            case Tiles():
                said += [f"{tile.title}: {tile.figure}; {tile.below}" for tile in block.tiles]
            case Table():
                said += [" | ".join(row) for row in [block.columns, *block.rows]]
            case Fold():
                said += [block.title, *words(block.blocks)]
    return said


def section(found: Document, title: str) -> str:
    return "\n".join(words(next(s for s in found.sections if s.title == title).blocks))


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_is_told_in_order(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    found = made.report(usd_per_gpu_hour=36.0)
    assert tuple(s.title for s in found.sections) == SECTIONS
    first = section(found, "At a glance")
    assert "How good: 75.0%; of 20 held-out problems solved, after rl" in first
    assert "What it cost: $1.10 in 1m50s" in first  # 11 stages of 10 s
    assert "What went wrong: nothing" in first
    assert "983,040 in 120 steps" in section(found, "What was trained, and what it cost")
    assert "20,000 in 40 steps" in section(found, "What was trained, and what it cost")
    planned = section(found, "Planned and measured")
    on_gpus = made.report(gpus=parse_gpus("8xH100"))
    assert "\nPlanned on 8 x H100-SXM (others with --gpus), " in section(on_gpus, "Planned and measured")
    assert "What it cost: 1m50s; of all stages, on 8 x H100-SXM\n" in section(on_gpus, "At a glance")
    assert "Planned on" not in planned
    assert "steps of base | 120 | 120 | 1.00" in planned and "memory of a worker in base, GB" in planned
    evaluated = section(found, "Evaluations")
    assert (
        "greedy |  | 0 (0.000–1.000) | 0 (0.000–1.000)\n+0.000, p = 1.000 | 0.75 (0.375–1.000)\n+0.750, p < 0.001"
        in (evaluated)
    )
    said = section(found, "What the model says")
    # of each stage the first, the last and some between, in order
    assert re.findall(r" (base|mid|sft|rl) (\d+)$", said, re.MULTILINE) == [
        (stage, step) for stage in TRAINED for step in ("0", "20", "40", "60", "90")
    ]
    assert said.index("Solved best: How many? 0") < said.index("Solved worst: How many? 19")
    read = section(found, "Data")
    assert "corpus | 100 | 93 | 5" in read and "corpus | empty | 2" in read and "tokens of them | 12,345" in read
    assert section(found, "Incidents") == "None on record."
    assert "torch | 2.13.0" in section(found, "Doing it again")


def test_page_and_markdown_say_the_same(tmp_path: Path) -> None:
    """Word for word, save for the curves, of which Markdown has some values."""
    found = Made(tmp_path).whole().report()
    shown, written = Elements(page(found)).text, markdown(found)
    for block in found.sections:
        for line in words(block.blocks):
            for part in line.replace("\n", " | ").replace(": ", " | ").replace("; ", " | ").split(" | "):
                assert part in shown
                assert re.sub(r"\W", "", part) in re.sub(r"\W", "", written.replace("&lt;", "<").replace("<br>", ""))
    assert "| loss | 0: " in written


def test_what_it_takes_to_do_it_again_makes_the_same_configuration(tmp_path: Path) -> None:
    """Whatever was set, and by a preset that is only here, too."""
    sets = ["base.matrix_lr=0.03", "data.sft.gsm8k.rows=50", "data.mid.more.source=hub:a/b", "rl.advantage=grpo"]
    own = tmp_path / "own.toml"
    own.write_text("[base]\nlr_scale = 0.7\n[data]\nchat = 'none'\ngsm8k = 'synthetic'\n")
    for preset, more in (("demo", sets), (None, sets[:1]), (str(own), sets[:2])):
        flags: dict[str, Any] = {"name": "r", "storage": str(tmp_path), "model": {"depth": 3}}
        config = load_config(preset, flags, more)
        line = document.command(config)
        again = run.config_from_args(run.build_parser().parse_args(shlex.split(line)[2:]))
        assert document.settings_of(again) == document.settings_of(config), line


def test_settings_name_who_set_them(tmp_path: Path) -> None:
    config = load_config("demo", {"name": "r", "storage": str(tmp_path)}, ["base.matrix_lr=0.03"])
    said = section(Made(tmp_path, config=config).whole().report(), "Settings that differ from the defaults")
    assert "base.matrix_lr | 0.03 | 0.02 | you" in said
    assert "model.vocab_size | 1024 | 65536 | preset demo" in said
    assert "base.beta1" not in said


def test_a_run_that_failed_half_way_has_a_report(tmp_path: Path) -> None:
    """With the curves up to its last checkpoint, and why it failed on the first screen."""
    made = Made(tmp_path)
    made.done("tokenizer")
    base = made.store.stage("base")
    place = base.at(checkpoint_path(60))
    text = records("base", 60)
    place.write_bytes(METRICS, text.encode())
    entry = FileEntry(METRICS, len(text), sha256(text.encode()).hexdigest())
    manifests.write(place, Manifest("r", "base", [entry], identity_of("base", made.config), metrics={"step": 60}))
    lost = {"kind": "lost worker", "text": "a worker was lost after step 30", "at": "2026-05-01T10:00:00+00:00"}
    notes = [lost["text"], "attention sdpa: the only one that is not lost on a CPU"]
    progress = {"state": "failed", "error": "disk full", "step": 63, "steps": 120, "notes": notes, "incidents": [lost]}
    base.write_json("progress.json", progress)
    found = made.report()
    assert tuple(s.title for s in found.sections) == SECTIONS
    assert "What went wrong: base failed; disk full" in section(found, "At a glance")
    happened = section(found, "Incidents")
    assert "2026-05-01 10:00:00 | base | lost worker | a worker was lost after step 30" in happened
    assert " | base | failed | disk full" in happened
    assert "attention" not in happened
    html = page(found)
    assert curves(html)["Loss"]["series"][0]["x"][-1] == 59
    assert "nothing is evaluated yet" not in section(found, "At a glance")  # the loss so far is known


def test_how_good_a_run_is_so_far_is_told_of_what_it_has_learned(tmp_path: Path) -> None:
    """And not of what a stage that has just begun was given; to be asked to stop is no failure."""
    made = Made(tmp_path)
    made.done("base", {METRICS: records("base", 120)})
    made.done("mid", {METRICS: json.dumps({"step": 0, "val_bpb_mid": 3.9})})
    Diary(made.store.storage, [], {"mid": "run"}, "").end("stage mid: stopped as asked", stopped=True)
    first = section(made.report(), "At a glance")
    assert "How good: val_bpb 0.5; bits a byte of held-out text, at step 120 of base" in first
    assert "1 stopped: stage mid: stopped as asked" in first and "failed" not in first


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    found = Made(tmp_path).report()
    assert "not finished: stopped; 0 of 11 stages are done" in section(found, "At a glance")
    assert "None on record." in section(found, "Incidents")
    assert page(found) and markdown(found)


def test_attempts_are_told_with_their_times(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    killed = Diary(made.store.storage, ["--preset", "demo"], {"base": "run"}, "2 CPU cores (X)")
    short = Incident(kind="out of memory", text="device_batch_size is now 16", at="2026-05-01T10:00:00+00:00")
    lost = Incident(kind="lost worker", text="a worker was lost after step 30", at="2026-05-01T10:05:00+00:00")
    killed.tell("base", [short])
    killed.tell("base", [short, lost])
    with Diary(made.store.storage, ["--preset", "demo"], {"base": "resume from step 30"}, "2 CPU cores (X)") as second:
        second.tell("rl", [Incident(kind="replaced actor", text="rollout actor 0 died")])
        second.end("done")
    with pytest.raises(KeyboardInterrupt), Diary(made.store.storage, [], {}, "2 CPU cores (X)"):
        raise KeyboardInterrupt
    # an artifact has them, too, and what the driver did not live to see
    unseen = Incident(kind="early stopping", text="val_bpb was lowest at step 60", at="2026-05-01T10:06:00+00:00")
    stats = {"incidents": [incident.model_dump() for incident in (short, lost, unseen)]}
    made.done("base", {METRICS: records("base", 120)}, stats=stats)
    found = made.report()
    rows = [line.split(" | ") for line in section(found, "Incidents").split("\n")[1:]]
    assert [row[1:] for row in rows] == [
        ["base", "out of memory", "device_batch_size is now 16"],
        ["base", "lost worker", "a worker was lost after step 30"],
        ["base", "early stopping", "val_bpb was lowest at step 60"],
        ["", "killed", "this attempt, begun then, ended without a word: killed, or its machine was lost"],
        ["base", "resumed", "from step 30"],
        ["rl", "replaced actor", "rollout actor 0 died"],
        ["", "stopped", "interrupted"],
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row[0]) for row in rows)
    first = section(found, "At a glance")
    assert "7 incident(s); 1 out of memory, 1 lost worker" in first and "1 resumed" in first
    assert "on 2 CPU cores (X)" in section(found, "At a glance")
    assert "fathom run --preset demo" in section(found, "Doing it again")


def test_steps_that_were_skipped_and_values_that_were_lost_are_incidents(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    lines = records("base", 120).splitlines()
    lines[7] = lines[7].replace('"loss"', '"skipped": true, "loss"')
    lines[9] = json.dumps({"step": 9, "loss": math.nan})
    lines.append("not a record")
    text = "\n".join(lines)
    made.done("base", {METRICS: text})
    said = section(made.report(), "Incidents")
    assert "base | skipped steps | 1 step(s): skipped, as the gradient was not finite: 7, the first after 8s of" in said
    assert "base | not finite | 1 step(s): loss was not finite: 9" in said
    assert f"1 lines of {METRICS} are no records" in said


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    """Wherever it stands: in what was asked and answered, in settings, names, versions, figures and errors."""
    hostile = f"{SCRIPT}</script><img src=x onerror=alert(1)>`]](http://x) \u202e"
    sets = [f"data.corpus={SCRIPT}", f"data.mid.a.source={SCRIPT}"]
    config = load_config("demo", {"name": "r", "storage": str(tmp_path)}, sets)
    made = Made(tmp_path, config=config).whole()
    record = json.dumps({"step": 1, "loss": 1.0, SCRIPT: 2.0, "half a character \ud800": 3.0, "step_ms": 1.0})
    made.done("base", {METRICS: f"{record}\n"}, metrics={SCRIPT: 1.0}, versions={SCRIPT: SCRIPT})
    completions = answers([True, False], hostile, f"{hostile}\n```\n{SCRIPT}")
    made.done("evaluate_sft", {"completions.jsonl": completions}, metrics={"greedy": 0.5, SCRIPT: 1.0})
    made.done("evaluate_rl", {"completions.jsonl": completions}, metrics={"greedy": 0.5})
    read = {SCRIPT: {"read": 2, "kept": 1, "left_out": {SCRIPT: 1}, "example": SCRIPT}}
    made.done("ingest", stats={"read": read, "notes": [SCRIPT]})
    Diary(made.store.storage, [SCRIPT], {SCRIPT: f"resume {SCRIPT}"}, SCRIPT).end(SCRIPT)
    made.store.stage("mid").delete("manifest.json")
    made.store.stage("mid").write_json("progress.json", {"state": "failed", "error": SCRIPT, "notes": [SCRIPT]})
    found = made.report()
    html, text = page(found), markdown(found)
    elements = Elements(html)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags  # the curves, and what draws them
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert html.count("<script") == html.count("</script") == 2
    assert elements.text.count(SCRIPT) > 15 and "http://x" in elements.text
    fences = re.split(r"^(`{3,})text$.*?^\1$", text, flags=re.MULTILINE | re.DOTALL)
    outside = "".join(fences[::2])
    assert "<script" not in outside and "<img" not in outside and SCRIPT in text
    assert "](http" not in outside.replace("\\]", "") and "\u202e" not in text + html
    html.encode(), text.encode()


def test_only_our_own_script_may_run_and_nothing_may_be_fetched(tmp_path: Path) -> None:
    html = page(Made(tmp_path).whole().report())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert policy and script
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    assert policy[1] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"(?:src|href)=\"(?!#)", html)


def curves(html: str) -> dict[str, Any]:
    """The charts of a page by title, the first of each."""
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', html, re.DOTALL)
    assert found
    charts: dict[str, Any] = {}
    for chart in json.loads(found[1])["charts"]:
        charts.setdefault(chart["title"], chart)
    return charts


def test_a_run_of_100_000_steps_makes_a_small_report_soon(tmp_path: Path) -> None:
    """And what stands out among them is still there."""
    made = Made(tmp_path).whole()
    rng = np.random.default_rng(0)
    shares = ("data_share", "forward_backward_share", "communication_share", "optimizer_share", "save_share")
    for stage in ("base", "mid", "sft"):
        lines = []
        for step, noise in enumerate(rng.random((100_000, 12)).round(6).tolist()):
            names = ("loss", "grad_norm", "lr_multiplier", "step_ms", "tokens_per_second", "memory_gb", "mfu", *shares)
            lines.append(json.dumps({"step": step, **dict(zip(names, noise, strict=True))}))
        lines[77_777] = json.dumps({"step": 77_777, "loss": 12.5, "step_ms": 1.0})
        made.done(stage, {METRICS: "\n".join(lines)})
    began = time.perf_counter()
    found = made.report()
    html, text = page(found), markdown(found)
    assert time.perf_counter() - began < 20
    assert len(html.encode()) < 3_000_000 and len(text.encode()) < 3_000_000
    loss = curves(html)["Loss"]["series"][0]
    assert 77_777 in loss["x"] and max(loss["y"]) == 12.5 and loss["x"][-1] == 99_999
    assert all(0.3 < value < 0.7 for value in loss["sy"])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(10, 60))
def test_thinned_curves_keep_their_ends_and_extremes(values: list[float], most: int) -> None:
    steps, of = np.arange(len(values), dtype=float), np.array(values)
    kept = thinned(steps, of, most)
    assert len(kept) <= most and sorted({*kept}) == kept.tolist()
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    assert of[kept].min() == of.min() and of[kept].max() == of.max()


@given(st.lists(st.floats(-1e3, 1e3), min_size=40, max_size=300), st.integers(0, 39))
def test_the_smoothed_line_is_a_mean_of_neighbours(values: list[float], huge: int) -> None:
    """And of nothing else: a step at which a figure was huge is not felt by others."""
    values[huge] = 1e30
    steps, of = np.arange(len(values), dtype=float), np.array(values)
    at, smooth = smoothed(steps, of) or (steps, of)
    half = max(2, len(values) // 40)
    for step, value in zip(at.astype(int), smooth, strict=True):
        reach = max(half // 4, min(half, step, len(values) - 1 - step))
        assert value == pytest.approx(of[max(0, step - reach) : step + reach + 1].mean(), abs=1e-6)
    assert smoothed(steps[:20], of[:20]) is None


def asked(right: Sequence[bool], labels: Sequence[str] = ("arc_easy", "boolq")) -> dict[str, str]:
    """tasks.json and examples.jsonl of an evaluation, each of whose labels has the same questions."""
    tasks = {"core_labels": [*labels], "tasks": {name: {"baseline": 0.25 * i} for i, name in enumerate(labels)}}
    lines = [{"task": name, "index": i, "correct": r, "scores": []} for name in labels for i, r in enumerate(right)]
    return {"tasks.json": json.dumps(tasks), "examples.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}


def test_the_difference_of_core_has_the_significance_that_evaluate_gives_it(tmp_path: Path) -> None:
    """By all its questions together; and none where it is a mean of other labels."""
    first, second = ([i % 3 > 0 for i in range(60)], [i % 3 > 0 or i < 12 for i in range(60)])
    runs = [Made(tmp_path, name) for name in ("a", "b", "c")]
    for made, right, labels in zip(runs, (first, second, second), (None, None, ("piqa", "boolq")), strict=True):
        made.done("evaluate_base", asked(right, labels) if labels else asked(right), metrics={"core": sum(right) / 60})
    text = markdown(comparison([facts.collect(made.store) for made in runs], Known()))
    signs = [after - before for before, after in zip(first, second, strict=True)]
    _, p = core_difference([(0.0, signs), (0.25, signs)])
    assert 0.001 < p < 0.1 and f"+0.067, p = {p:.3f} | 0.7333<br>+0.067 |" in text


def test_runs_are_laid_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves by run, what differs in settings, and how likely the difference of evaluations is chance."""
    Made(tmp_path, "a").whole()
    config = load_config("demo", {"name": "b", "storage": str(tmp_path)}, ["base.matrix_lr=0.03"])
    Made(tmp_path, "b", config).whole([True] * 4 + [False] * 16, better=0.1)
    out = tmp_path / "out"
    assert cli.main(["report", "a", "b", "--storage", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    loss = curves(html)["Loss"]["series"]
    assert [series["name"] for series in loss] == ["a", "b"]
    assert loss[0]["y"][0] - loss[1]["y"][0] == pytest.approx(0.1, abs=1e-3)
    axes = json.loads(re.search(r'id="curves">(.*?)</script>', html, re.DOTALL)[1])["axes"]  # type: ignore[index]
    axis = axes[loss[0]["axis"]]
    assert (axis["steps"][-1], axis["tokens"][-1]) == (120, 120 * 8_192)
    assert axis["hours"][-1] == pytest.approx(120 / 3_600, rel=1e-3)
    shown = Elements(html).text
    assert "base.matrix_lr0.020.03" in shown and "base.beta1" not in shown.split("Doing them again")[0]
    # 15 of 20 against 4: eleven that only the first solves
    assert "−0.550, p < 0.001" in shown and "| base.matrix_lr | 0.02 | 0.03 |" in text


def test_a_run_whose_settings_cannot_be_read_differs_in_none(tmp_path: Path) -> None:
    config = load_config("demo", {"name": "b", "storage": str(tmp_path)}, ["base.matrix_lr=0.03"])
    runs = [Made(tmp_path, "a").whole(), Made(tmp_path, "b", config).whole(), Made(tmp_path, "c").whole()]
    runs[2].store.storage.write_bytes("config.json", b"{")

    def said(*some: Made) -> str:
        return section(comparison([facts.collect(made.store) for made in some], Known()), "Settings that differ")

    unread = "The configuration of c cannot be read."
    assert said(*runs) == f"{unread}\nsetting | a | b\nbase.matrix_lr | 0.02 | 0.03"
    assert said(runs[0], runs[2]) == unread
    assert said(runs[0], Made(tmp_path, "d").whole()) == "None: a, d have the same settings."


def test_wrong_arguments_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Made(tmp_path)
    (tmp_path / "file").write_text("")
    storage = ["--storage", str(tmp_path)]
    for arguments, said in (
        (["r", "r"], "named twice"),
        (["nope"], "no run 'nope'"),
        (["r", "--usd-per-gpu-hour", "-1"], "must be above 0"),
        (["r", "--calibrate", "x.json"], "add --gpus"),
        (["r", "--out", str(tmp_path / "file")], "name a folder"),
    ):
        assert cli.main(["report", *arguments, *storage]) == 1
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = Made(tmp_path).whole(), io.StringIO()
    run.report(made.store, [], Console(file=out, width=300))
    assert f"report: {made.store.storage.uri}/report/report.html" in out.getvalue()
    made.store.storage.delete("report")
    made.store.storage.write_bytes("report", b"a file is in the way")
    run.report(made.store, [], Console(file=out, width=300))
    assert "! the report could not be written, which changes nothing else" in out.getvalue()


def test_what_lies_in_storage_costs_a_report_no_more_than_its_own_part(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    made.done("evaluate_rl", {"completions.jsonl": '{"question": 1}\n[]\nx\n'}, metrics={"greedy": 0.5})
    made.done(
        "base", {METRICS: '[]\n{"step": -1}\n{"step": 1e9}\n{"step": true}\n{"step": 1, "loss": 1e999}\n' + "[" * 9_999}
    )
    made.store.storage.write_json("attempts.json", {"attempts": [{"began": 3}]})
    (Path(made.store.storage.uri) / "mid" / "manifest.json").write_text("{")
    found = made.report()
    said = section(found, "Incidents")
    assert "3 lines of" in said and "completions.jsonl are of another form" in said
    assert f"5 lines of {METRICS} are no records" in said and "mid | failed" in said
    assert "Loss" in curves(page(found))  # of the other stages


def test_figures_near_the_end_of_what_a_number_can_be_have_a_report(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    lines = [{"step": step, "loss": 1.7e308, "grad_norm": 1e299, "step_ms": 1e308} for step in range(100)]
    made.done("base", {METRICS: "".join(json.dumps(line) + "\n" for line in lines)})
    made.done("evaluate_rl", metrics={"greedy": 0.5, "problems": 10**299, "val_bpb_full": 1e308})
    found = made.report()
    assert "100 step(s): loss was not finite: 0, 1, 2" in section(found, "Incidents")
    assert max(curves(page(found))["Gradient norm"]["series"][0]["sy"]) == pytest.approx(1e299)
    assert "of 1e+299 held-out problems" in section(found, "At a glance")


@pytest.mark.parametrize(("name", "value"), [("heads", 3), ("kv_heads", 10**400), ("ffn_width", 10**400)])
def test_a_configuration_of_no_model_that_can_be_costs_no_report(tmp_path: Path, name: str, value: int) -> None:
    made = Made(tmp_path).whole()
    raw = made.config.model_dump(mode="json")
    raw["model"][name] = value
    made.store.storage.write_json("config.json", raw)
    assert "the configuration is of no model that can be: " in section(made.report(), "Incidents")


FILES = {
    "base": ("manifest.json", METRICS),
    "mid": ("manifest.json", "progress.json"),
    "evaluate_sft": ("manifest.json", "completions.jsonl"),
    "sft": (SAMPLES,),
    "ingest": ("manifest.json",),
    "": ("attempts.json", "config.json"),
}


@settings(max_examples=int(os.environ.get("FATHOM_FUZZ", "40")), deadline=None)
@given(data=st.data())
def test_whatever_lies_in_storage_there_is_a_report_or_one_message(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Made(Path(folder)).whole()
        Diary(made.store.storage, ["--preset", "demo"], {"base": "run"}, "2 CPU cores").end("done")
        stage = data.draw(st.sampled_from(sorted(FILES)))
        file = Path(made.store.storage.uri) / stage / data.draw(st.sampled_from(FILES[stage]))
        lines = (
            file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()] if file.exists() else []
        )
        raw = json.loads(lines[0]) if lines else {"state": "running", "metrics": {"loss": 1.0}, "notes": []}
        inner, depth = raw, 0
        while depth < 4 and isinstance(inner, dict) and inner:
            name = data.draw(st.sampled_from(sorted(inner)))
            if not (isinstance(inner[name], dict) and data.draw(st.booleans())):
                inner[name] = data.draw(VALUES | st.floats() | st.just(10**400) | st.just(SCRIPT))
                break
            inner, depth = inner[name], depth + 1
        raw.pop("sha256", None)
        file.write_text("\n".join([json.dumps(raw), *lines[1:]]))
        out, said = Path(folder) / "out", io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["report", "r", "--storage", folder, "--out", str(out)])
        assert code in (0, 1) and (code or Elements((out / "report.html").read_text()).tags.count("script") == 2)
        assert "Traceback" not in said.getvalue()


def test_the_report_of_a_run_lies_beside_its_artifacts(tmp_path: Path) -> None:
    made = Made(tmp_path).whole()
    assert keep(made.store) == f"{made.store.storage.uri}/report/report.html"
    place = made.store.stage("report")
    assert {*place.list()} == {"manifest.json", "report.html", "report.md"}
    kept = manifests.read(place)
    assert kept is not None and kept.stage == "report" and {*kept.upstream} == {*stage_names(made.config)}
    manifests.verify(place, kept)
    keep(made.store)
    assert manifests.read(place) != kept, "it is made anew"


def test_an_unwritten_diary_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("full")

    store = Made(tmp_path).store
    monkeypatch.setattr(Storage, "write_json", full)
    with Diary(store.storage, [], {}, "") as diary:
        diary.tell("base", [Incident(kind="lost worker", text="a worker was lost")])
        diary.end("done")
    assert attempts(store.storage) == []


def test_runs_are_listed_with_what_they_have_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Made(tmp_path, "done").whole()
    failed = Made(tmp_path, "failed")
    failed.done("tokenizer")
    failed.store.stage("base").write_json(
        "progress.json", {"state": "failed", "error": "disk full", "metrics": {"loss": 2.5}}
    )
    Made(tmp_path, "fresh")
    (tmp_path / "copy(done)").mkdir()
    (tmp_path / "copy(done)" / MARKER).write_text("{}")
    for name in ("done", "failed", "fresh"):
        with RunStore(str(tmp_path), name).claim():
            pass
    assert cli.main(["runs", "--storage", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert re.search(r"done +11/11 +evaluate_rl +greedy 0.75 .*\d+s", rows["done"])
    assert re.search(r"failed +1/11 +base +loss 2.5 +\d+s", rows["failed"]) and "failed: disk full" in out
    assert re.search(r"stopped +0/11 +tokenizer", rows["fresh"])
    assert "unread" in rows["copy(done)"] and "run name 'copy(done)' must" in out
    assert cli.main(["runs", "--storage", str(tmp_path), "--json"]) == 0
    shown = {one["name"]: one for one in json.loads(capsys.readouterr().out)["runs"]}
    assert (shown["done"]["state"], shown["done"]["done"], shown["done"]["stages"]) == ("done", 11, 11)
    assert shown["failed"]["error"] == "disk full" and shown["fresh"]["seconds_ago"] is None
    assert cli.main(["runs", "--storage", str(tmp_path / "nowhere")]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert [runs.age(seconds) for seconds in (None, 12.0, 7_620.0, 200_000.0)] == ["", "12s", "2h07m", "2 days"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_in_a_browser_it_complains_of_nothing_and_asks_for_nothing(tmp_path: Path) -> None:
    """On a phone and on a desk, light and dark; and with a hostile run beside it. No page is wider than the screen."""
    config = load_config("demo", {"name": "b", "storage": str(tmp_path)}, [f"data.corpus={SCRIPT}"])
    Made(tmp_path, "a").whole()
    Made(tmp_path, "b", config).whole().done("evaluate_rl", {"completions.jsonl": answers([True], SCRIPT, SCRIPT)})
    for names in (["a"], ["b"], ["a", "b"]):
        out = tmp_path / "-".join(names)
        assert cli.main(["report", *names, "--storage", str(tmp_path), "--out", str(out)]) == 0

    async def act(shown: Page) -> None:
        papers = set()
        for folder in ("a", "b", "a-b"):
            path = tmp_path / folder / "report.html"
            for width, dark in ((1400, False), (390, False), (1400, True), (390, True)):
                await shown.open(path, width, dark)
                drawn = "[...document.querySelectorAll('figure.chart')].every(c => c.querySelector('path.curve'))"
                assert await shown.says(drawn) and await shown.says("document.querySelectorAll('svg').length") > 20
                assert await shown.says("document.documentElement.scrollWidth") <= width
                papers.add((dark, await shown.says("getComputedStyle(document.body).backgroundColor")))
        assert papers == {(False, "rgb(255, 255, 255)"), (True, "rgb(20, 23, 27)")}
        assert shown.complaints == []
        assert {*shown.asked} == {(tmp_path / f / "report.html").as_uri() for f in ("a", "b", "a-b")}
        await shown.says("new Image().src = 'http://example.org/x.png'")  # refused, and complaints are heard
        await shown.says("console.error('heard')")
        assert any("heard" in complaint for complaint in shown.complaints)

    look(act)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_curves_answer_to_keys_and_to_the_pointer(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(Made(tmp_path).whole().report()))

    async def act(shown: Page) -> None:
        await shown.open(path, 1000)
        chart = "document.querySelector('figure.chart')"
        reached = f"document.activeElement === {chart}"
        for _ in range(80):  # from the top of the page by the keyboard alone
            if await shown.says(reached):
                break
            await shown.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        assert await shown.says(reached)
        output = f"{chart}.querySelector('output').textContent"
        await shown.press("ArrowRight")
        assert re.match(r"step 5\d(\.\d+)?: 1\.1\d*, smoothed 1\.1\d*$", await shown.says(output))
        labels = f"[...{chart}.querySelectorAll('text')].map(t => t.textContent).join(' ')"
        whole = await shown.says(labels)
        await shown.press("+")
        assert await shown.says(labels) != whole
        await shown.press("Escape")
        assert await shown.says(labels) == whole
        await shown.press("l")
        assert await shown.says(f"{chart}.querySelector('button').getAttribute('aria-pressed')") == "true"
        await shown.press("l")
        for presses in (2, 60):  # close, and as close as a key that is held down goes, between two points
            for _ in range(presses):
                await shown.press("+")
            for _ in ("logarithmic", "linear"):
                await shown.press("l")
                near = (await shown.says(labels)).split()
                assert await shown.says(labels) != whole and "NaN" not in near and len({*near}) == len(near) > 6, near
        await shown.press("Escape")
        await shown.says(f"{chart}.scrollIntoView()")
        box = json.loads(await shown.says(f"JSON.stringify({chart}.querySelector('svg').getBoundingClientRect())"))
        at = [(box["x"] + share * box["width"], box["y"] + 60) for share in (0.5, 0.8)]
        await shown.pointer("mouseMoved", *at[0])
        assert (await shown.says(output)).startswith("step ")
        await shown.pointer("mousePressed", *at[0], held=True)
        await shown.pointer("mouseMoved", *at[1], held=True)
        await shown.pointer("mouseReleased", *at[1], held=True)
        assert await shown.says(labels) != whole  # zoomed in
        for axis, said in (("tokens", "tokens"), ("hours", "hours of steps")):
            await shown.says(f"document.querySelector('input[value={axis}]').click()")
            assert said in await shown.says(labels)
        assert shown.complaints == []

    look(act)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_curves_of_odd_records_are_drawn_on_every_axis(tmp_path: Path) -> None:
    """Of a stage that ended before its first step, and with an interval that begins at 0."""
    made, path = Made(tmp_path).whole(), tmp_path / "report.html"
    made.done("mid", {METRICS: json.dumps({"step": 0, "val_bpb_mid": 3.9})})
    held_out = [
        {"step": i, "val_greedy": 0.1 + i / 99, "val_greedy_low": 0.0, "val_greedy_high": 1.0} for i in range(9)
    ]
    made.done("rl", {METRICS: "".join(json.dumps(line) + "\n" for line in held_out)})
    path.write_text(page(made.report()))

    async def act(shown: Page) -> None:
        await shown.open(path, 1000)
        figures = "[...document.querySelectorAll('figure.chart')]"
        for axis in ("tokens", "hours", "steps"):
            await shown.says(f"document.querySelector('input[value={axis}]').click()")
            said = await shown.says(f"{figures}.map(f => f.querySelector('svg').textContent)")
            assert all(axis.removesuffix("s") in one for one in said), said
        await shown.says(f"{figures}.forEach(f => f.querySelector('button').click())")
        said = await shown.says(f"{figures}.map(f => f.querySelector('svg').innerHTML)")
        assert not any("NaN" in one or "Infinity" in one for one in said)
        assert shown.complaints == []

    look(act)
