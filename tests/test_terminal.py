"""Lines and tables fit a narrow terminal, and a file gets them whole."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import manifest as manifests
from cluster.manifest import Manifest
from pipeline import cli, doctor, evaluate, status
from pipeline.artifacts import RunStore
from pipeline.config import identity_of, load_config, stage_names
from pipeline.data import show_stats
from pipeline.probe import Machine, Probe, Row, Setting, View
from pipeline.terminal import TOGETHER, Terminal, fitted, plain, say, show
from pipeline.tokenizer import print_table
from pipeline.tracking import LiveView
from tasks.ranking import accuracy

FIGURES = {
    "problems": 1_200,
    "greedy": 0.965123,
    "pass_at_1": 0.9512,
    "val_bpb_full": 1.23456,
    "tokens_per_second": 51e3,
}
NARROW = 60


@given(
    st.lists(st.text("ab1,.-/", min_size=1, max_size=30), min_size=1, max_size=30).map(" ".join),
    st.sampled_from(["", "  ", "name           ", "! "]),
    st.integers(20, 100),
)
def test_a_line_is_broken_between_words_and_nowhere_else(text: str, head: str, width: int) -> None:
    lines = fitted(head + text, width).split("\n")
    assert " ".join(lines).split() == (head + text).split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines[1:])
    assert lines[0].startswith(head.rstrip())
    assert fitted(head + text, None) == head + text


@given(st.text(st.characters() | st.sampled_from("\x1b\x07\x9b\u202e\ud800\r"), max_size=30))
def test_no_text_steers_the_terminal(text: str) -> None:
    """Whatever is shown can be written, and has no character that a terminal obeys but those of the console's own."""
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, color_system="truecolor", width=200)
    say(console, text, "red")
    table = Table(text.replace("[", ""))
    table.add_row(Text(text, "green"))
    show(console, table, [])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).encode().decode()  # without colours, which are ours
    assert plain(shown) == shown
    assert plain(text) == text or "\\" in plain(text)


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "\x1b]0;owned\x07", "--storage", "."]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert cli.main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_what_belongs_together_is_not_parted_and_what_follows_stands_below() -> None:
    assert fitted(f"cost    base{TOGETHER}31.2, total{TOGETHER}31.4", 22) == "cost    base 31.2,\n        total 31.4"
    assert fitted("! give more text, or fewer steps", 20) == "! give more text, or\n  fewer steps"


def test_what_doctor_and_probe_say_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))
    checks = [
        doctor.check_port(1, "a run by itself does not need it, but a cluster of several machines does, see its log")
    ]
    checks.append(
        replace(checks[0], state="warn", advice="name another one with --port, or end what has taken this one")
    )
    monkeypatch.setattr(doctor, "examine", lambda storage: iter(checks))
    assert doctor.main(["--storage", str(tmp_path)]) == 0
    probe = Probe(load_config("demo"), Machine("CPU", "cpu", 2, "2.13"), 1, 1.0, tmp_path)
    probe.rows = [Row(Setting(8, False, "none", "auto", "zero1"), "out of memory: more than there is on this machine")]
    with View(probe, {"compile"}, Console()) as view:
        view.say("a machine of two cores, with a name that is so long that it never fits into one line")
    shown = capsys.readouterr().out
    assert "on this machine" in " ".join(shown.split()) and "name another one" in shown
    assert all(len(line) <= NARROW for line in shown.splitlines()), shown


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store, config = RunStore(str(tmp_path), "r"), load_config("demo", {"name": "r", "with_rl": True})
    store.record(config)
    for name in stage_names(config):
        stats = {"read": {"corpus": {"read": 12_000, "kept": 11_700, "left_out": {"empty": 100, "duplicates": 200}}}}
        done = Manifest("r", name, [], identity_of(name, config), metrics=FIGURES, seconds=7_620.0, stats=stats)
        manifests.write(store.stage(name), done)
    return store


def whole(text: str) -> list[str]:
    """The figures of a text with their names, in order."""
    return re.findall(r"[a-z]\w+ [\d,.]+\d", text)


def narrow(text: str, *but: str) -> bool:
    """Whether all lines fit, but those that have one of the words `but`, such as a path."""
    return all(len(line) <= NARROW for line in text.splitlines() if not any(word in line for word in but))


def test_status_fits_and_says_the_same(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["r", "--storage", str(Path(store.storage.uri).parent)]
    assert status.main(argv) == 0
    whole_lines = capsys.readouterr().out
    assert any(line.startswith("base ") and "2h07m" in line and str(store.stage("base").uri) in line
               for line in whole_lines.splitlines())  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(NARROW))
    assert status.main(argv) == 0
    out = capsys.readouterr().out
    assert narrow(out, store.storage.uri) and "…" not in out
    assert whole(re.sub(r"\n\s+", " ", out)) == whole(whole_lines), "each figure in one piece, beside its name"
    assert all(f"{name} 0.9651" in line for name in ["greedy"] for line in out.splitlines() if name in line)
    assert f"{store.storage.uri}/STAGE" in out.split(), "a path in one piece"


def test_the_live_table_leaves_out_columns_rather_than_parts_of_figures(store: RunStore) -> None:
    store.remove("base")
    out = io.StringIO()
    with LiveView(store, ["base", "mid"], Console(file=out, force_terminal=True, width=NARROW)) as view:
        metrics = {"loss": 2.25123, "tokens_per_second": 1_051_234.5}
        progress = {"state": "running", "step": 12_345, "steps": 21_400, "metrics": metrics, "seconds_left": 7_620.0}
        store.stage("base").write_json("progress.json", progress)
        view.poll()
        view.live.refresh()
    shown = out.getvalue()
    assert "12345/21400" in shown and "loss 2.251" in shown and "2h07m left" in shown
    assert "…" not in shown and "1,051" not in shown


def test_what_ingest_counted_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))
    lengths = {1 << i: 1_000_000 * i for i in range(4, 20)}
    reasons = {"empty": 123_456, "duplicates": 654_321, "not_utf8": 1_000}
    counts = {"read": 2_000_000, "kept": 1_221_223, "left_out": reasons}
    stats = {"documents": 12, "cropped_share": 0.01, "tokens_below": lengths, "read": {"mid.smoltalk": counts}}
    out = io.StringIO()
    show_stats(stats, Console(file=out))
    said = out.getvalue()
    assert narrow(said) and "…" not in said and "262,144–524,287" in said
    assert "mid.smoltalk: 2,000,000 read, 1,221,223 used;" in said
    assert all(f"{count:,}" in said for count in reasons.values())


@pytest.mark.parametrize(
    "command", ["plan --depth 20 --gpus 8xH100 --usd-per-gpu-hour 4", "presets", "run --preset demo --dry-run"]
)
def test_plans_fit(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    wide = capsys.readouterr().out
    assert not narrow(wide, "run demo in"), "there is something to break"
    monkeypatch.setenv("COLUMNS", str(NARROW))
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert narrow(out, str(tmp_path)) and "…" not in out
    assert {*re.findall(r"[\d,.]+\d", out)} >= {*re.findall(r"[\d,.]+\d", wide)}


def test_the_tokenizers_table_fits_and_a_table_that_fits_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"run": 3.012, "gpt2": 2.954, "cl100k_base": 3.301}
    texts = [{"kind": "held-out text of the run", "bytes": 1_234_567, "bytes_per_token": values}]
    result = {"run": "r", "vocab_size": 512, "texts": texts, "notes": []}
    for columns in (200, NARROW):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_table(result, Console(file=(out := io.StringIO())))
        assert all(figure in out.getvalue() for figure in ("1,234,567", "3.01", "2.95", "+2.0%", "3.30", "-8.8%"))
        assert "…" not in out.getvalue()
    assert narrow(out.getvalue())
    table = Table("a", "b", box=None)
    table.add_row("1", "2")
    show(Console(file=(out := io.StringIO())), table, ["a 1, b 2"])
    assert out.getvalue().split() == ["a", "b", "1", "2"]


@pytest.mark.parametrize("columns", [200, 80, 60])
@pytest.mark.parametrize("names", [["r:base"], ["/a/r/base", "/a/r/sft"], ["r:base", "r:sft", "r:rl"]])
def test_models_side_by_side_fit(monkeypatch: pytest.MonkeyPatch, columns: int, names: list[str]) -> None:
    """Every figure in one piece, in the line of its task; two models in a terminal of 80 columns are a line a task."""
    monkeypatch.setenv("COLUMNS", str(columns))
    tasks = ("bigbench_language_identification", "boolq")
    measured = accuracy([True, False, False, False], 0.5)
    reports = [
        evaluate.Report(
            evaluate.Model(name, lambda: Path(), ""),
            {task: measured | {"examples": 4} for task in tasks}
            | {"perplexity": {"bpb": 1.25, "low": 1.2, "high": 1.4}},
            {task: [{"index": i, "correct": not i} for i in range(4)] for task in tasks},
        )
        for name in names
    ]
    evaluate.show_table(reports, 4, Console(file=(out := io.StringIO())))
    shown = out.getvalue()
    assert "…" not in shown and "at most 4 examples a task" in shown
    assert all(len(line) <= columns for line in shown.splitlines())
    if len(names) == 2 and columns >= 80:
        [row] = [line for line in shown.splitlines() if "boolq" in line]
        assert row.split()[0] == "boolq" and row.split()[-2:] == ["+0.0000", "1.000"]
        assert ("(0.046-0.699)" in row) == (columns > 80)
    flat = " ".join(shown.split())
    assert flat.count("0.2500") == 2 * len(names) and flat.count("-0.5000") == (3 if len(names) == 1 else len(names))
    assert flat.count(" 1.000") == (len(names) - 1) * 3
