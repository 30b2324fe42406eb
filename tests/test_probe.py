"""`fathom probe`: real settings, measured in processes of their own; a setting that fails costs a row."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import ROOT, Command, Result

from pipeline import cli, probe
from pipeline.config import Config, load_config
from pipeline.probe import Probe, Row, Setting

TINY = ["--preset", "demo", "--depth", "1", "--set", "model.vocab_size=512", "--set", "model.sequence_len=64"]
TINY += ["--set", "base.total_batch_size=1024", "--compile", "off", "--steps", "3"]
SIZES = {"model": {"depth": 1, "vocab_size": 512, "sequence_len": 64}, "base": {"total_batch_size": 1024}}
MACHINE = probe.Machine("here", "cpu", 1, "")
SETTING = Setting(8, False, "none", "auto", "zero1")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """For what is started here: steps this small take seconds on two threads that others keep from running at once."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def command(*arguments: str) -> Command:
    with one_core():
        return Command(sys.executable, "-m", "pipeline.probe", *arguments)


def run(*arguments: str) -> Result:
    return command(*arguments).finish(120)


def config(**base: Any) -> Config:
    return load_config("demo", {**SIZES, "base": {**SIZES["base"], **base}})


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """Two batches at a backend that works, and one that needs a GPU."""
    file = tmp_path_factory.mktemp("probe") / "new" / "probe.json"
    result = run(*TINY, "--device-batch", "4,8", "--attention", "sdpa,fa4", "--json", str(file))
    assert result.code == 0, result.output
    return result, json.loads(file.read_text())


def test_batches_come_first_and_the_other_settings_at_the_fastest(swept: tuple[Result, dict[str, Any]]) -> None:
    _, record = swept
    best = record["best"]["device_batch_size"]
    tried = [(row["device_batch_size"], row["attention"]) for row in record["rows"]]
    assert tried == [(4, "sdpa"), (8, "sdpa"), (best, "fa4")]


def test_a_setting_that_fails_is_a_row_with_its_reason(swept: tuple[Result, dict[str, Any]]) -> None:
    result, record = swept
    failed = [row for row in record["rows"] if row["reason"]]
    assert [row["attention"] for row in failed] == ["fa4"]
    assert "needs an NVIDIA device" in failed[0]["reason"] and failed[0]["reason"] in result.stdout
    assert failed[0]["step_ms"] is None
    assert "Traceback" not in result.output


def test_the_record_is_complete_and_its_figures_agree(swept: tuple[Result, dict[str, Any]]) -> None:
    result, record = swept
    assert record["complete"] and record["hardware"] and record["torch"] and record["kind"] == "cpu"
    worked = [row for row in record["rows"] if row["reason"] is None]
    assert record["best"] == max(worked, key=lambda row: row["tokens_per_second"])
    for row in worked:
        assert row["grad_accum_steps"] == 1024 // (64 * row["device_batch_size"])
        assert row["tokens_per_second"] * row["step_ms"] / 1e3 == pytest.approx(1024)
        assert row["measured"]["steps"] == 3
        batch = row["device_batch_size"] * 2 * 64
        assert row["measured"]["tokens_per_second"] * row["measured"]["step_ms"] / 1e3 == pytest.approx(batch)
        assert row["mfu"] is None and 0 < row["of_product"] < 1 and row["memory_gb"] > 0.05
    base, best = record["base"], record["best"]
    assert (base["steps"], base["tokens"]) == (120, 120 * 1024)
    assert base["hours"] == pytest.approx(base["tokens"] / best["tokens_per_second"] / 3600) == best["hours"]
    assert record["set"] == [f"base.device_batch_size={best['device_batch_size']}", "base.attention=sdpa"]
    assert f"--set {record['set'][0]} --set base.attention=sdpa" in result.stdout
    assert sum(line.startswith("*") for line in result.stdout.splitlines()) == 1
    settings = dict(one.split("=") for one in record["set"])
    assert load_config("demo", None, [f"{k}={v}" for k, v in settings.items()]).base.attention == "sdpa"


def test_several_workers_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # a thread each
    two = load_config("demo", {"workers": 2, **SIZES})
    row = Probe(two, MACHINE, 3, 100.0, tmp_path).measure(SETTING)
    assert row.reason is None and row.measured is not None
    assert row.grad_accum_steps == 1  # 16 rows, 8 a worker
    assert row.measured["tokens_per_second"] * row.measured["step_ms"] / 1e3 == pytest.approx(1024)
    assert row.tokens_per_second == pytest.approx(row.measured["tokens_per_second"])


def test_a_model_too_large_is_a_row_that_says_so(tmp_path: Path) -> None:
    """With little address space, which torch meets like a machine without memory."""
    program = (
        "import sys; from pathlib import Path; from pipeline import probe\n"
        "from pipeline.config import load_config\n"
        "config = load_config('demo', {'model': {'depth': 12, 'vocab_size': 512, 'sequence_len': 64}})\n"
        "tried = probe.Probe(config, probe.Machine('here', 'cpu', 1, ''), 1, 100.0, Path(sys.argv[1]))\n"
        "row = tried.measure(probe.Setting(1, False, 'none', 'auto', 'zero1'))\n"
        "print(row.short_of_memory, row.reason)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    shown = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit
    )
    assert shown.stdout.startswith("True out of memory"), shown.stdout + shown.stderr


def test_ctrl_c_shows_what_there_is_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    # enough to do that it is not done when this process, on a busy machine, is late to see the first row
    probing = command(*TINY, "--device-batch", "1,2,4,8,16", "--steps", "300", "--json", str(file))
    assert probing.until(lambda: file.exists() and json.loads(file.read_text() or "{}").get("rows"), 60)
    before = time.monotonic()
    probing.process.send_signal(signal.SIGINT)
    result = probing.finish(60)
    assert result.code == 130 and time.monotonic() - before < 20
    assert "interrupted" in result.stdout and "add to the run" in result.stdout and not result.left_behind
    record = json.loads(file.read_text())
    assert not record["complete"] and record["best"] in record["rows"]


def test_a_process_killed_by_the_system_is_told(tmp_path: Path) -> None:
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert probe.run_alone(kill, tmp_path / "log", 30) == "killed, out of memory?"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    script = tmp_path / "kill.py"
    script.write_text(kill[-1])
    assert probe.run_alone([*torchrun, str(script)], tmp_path / "log", 60) == "killed, out of memory?"
    assert Row(SETTING, "killed, out of memory?").short_of_memory
    crash = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    assert probe.run_alone(crash, tmp_path / "log", 30) == "exit status 1: no such thing"


def test_a_setting_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '987']).wait()"
    assert "not measured within" in str(probe.run_alone([sys.executable, "-c", script], tmp_path / "log", 1.0))
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987"]]


def test_a_step_of_base_is_more_micro_batches_and_one_update() -> None:
    shares = {"data_share": 0.05, "forward_backward_share": 0.75, "communication_share": 0.1, "optimizer_share": 0.1}
    assert probe.full_step_ms(100.0, shares, 2, 2) == pytest.approx(100.0)
    assert probe.full_step_ms(100.0, shares, 2, 16) == pytest.approx(80.0 * 8 + 20.0)
    assert probe.full_step_ms(100.0, shares, 1, 4) == pytest.approx(80.0 * 4 + 20.0)


def test_a_budget_counts_steps_where_steps_are_not_given() -> None:
    timed = config(steps=None, hours=2.0)
    assert probe.base_run(timed, 10_240.0) == {"steps": 72_000, "tokens": 72_000 * 1024, "hours": 2.0}
    priced = config(steps=None, budget_usd=6.0, usd_per_worker_hour=3.0)
    assert probe.base_run(priced, 10_240.0) == {"steps": 72_000, "tokens": 72_000 * 1024, "hours": 2.0, "usd": 6.0}
    counted = probe.base_run(config(steps=1000, usd_per_worker_hour=3.0), 1024.0)
    assert counted["hours"] == pytest.approx(1000 / 3600) and counted["usd"] == pytest.approx(3000 / 3600)


@pytest.mark.parametrize(
    ("configured", "rows", "divide", "batches"),
    [
        (32, 256, True, [8, 16, 32, 64, 128]),
        (16, 16, True, [4, 8, 16]),
        (24, 96, True, [8, 16, 24, 32]),
        (5, 7, False, [2, 4, 5]),
        (1, 1, True, [1]),
    ],
)
def test_default_batches_lie_around_the_configured_and_divide(
    configured: int, rows: int, divide: bool, batches: list[int]
) -> None:
    assert probe.default_batches(configured, rows, divide) == batches


class Imagined(Probe):
    """A machine whose speed at each batch is known; None is out of memory."""

    speeds: Mapping[int, float | None] = {}

    def measure(self, setting: Setting) -> Row:
        speed = self.speeds.get(setting.device_batch_size)
        row = Row(setting, tokens_per_second=speed) if speed else Row(setting, "out of memory: imagined")
        self.rows.append(row)
        return row


@pytest.mark.parametrize(
    ("speeds", "tried"),
    [
        ({1: 1.0, 2: 2.0, 4: 3.0, 8: 4.0, 16: 5.0}, [4, 8, 16, 16]),
        ({1: 1.0, 2: 2.0, 4: 3.0, 8: None, 16: None}, [4, 8, 4]),
        ({1: 1.0, 2: 2.0, 4: 9.0, 8: 8.0, 16: 8.5}, [4, 8, 16, 4]),
        ({1: 1.0, 2: 2.0, 4: None, 8: None, 16: None}, [4, 2, 2]),
    ],
)
def test_the_sweep_stops_where_memory_does(tmp_path: Path, speeds: dict[int, float | None], tried: list[int]) -> None:
    imagined = Imagined(config(), MACHINE, 1, 60.0, tmp_path)
    imagined.speeds = speeds
    others = [SETTING, Setting(8, True, "none", "auto", "zero1")]
    assert [row.setting.device_batch_size for row in imagined.sweep([4, 8, 16], others, defaults=True)] == tried
    assert imagined.rows[-1].setting.compile and not any(row.setting.compile for row in imagined.rows[:-1])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--compile", "off,maybe"], ["--compile off,maybe", "on, off"]),
        (["--checkpointing", "some"], ["--checkpointing some", "none, selective, full"]),
        (["--attention", "fa9"], ["--attention fa9", "sdpa"]),
        (["--parallel", "pipeline"], ["--parallel pipeline", "ddp, zero1, fsdp"]),
        (["--device-batch", "3"], ["device_batch_size = 3", "1, 2, 4, 8, 16"]),
        (["--device-batch", "many"], ["--device-batch many", "8,16,32"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--minutes", "-1"], ["--minutes -1"]),
        (["--preset", "nothing"], ["unknown preset 'nothing'", "demo"]),
    ],
)
def test_a_mistake_in_the_flags_is_one_clear_message(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["probe", *TINY, *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("fathom probe: ") and len(shown.err.splitlines()) == 1 and not shown.out
    assert all(part in shown.err for part in parts)


def test_nothing_that_works_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(probe, "Probe", Imagined)
    file = tmp_path / "probe.json"
    assert cli.main(["probe", *TINY, "--json", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "no setting works here: out of memory: imagined" in shown and "--checkpointing full" in shown
    record = json.loads(file.read_text())
    assert [row["device_batch_size"] for row in record["rows"]] == [4, 2, 1]
    assert record["best"] is None and record["base"] is None and record["complete"]
