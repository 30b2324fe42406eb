"""A run is watched from elsewhere: `status --watch` by storage alone, and Ray's metrics by whoever asks for them."""

from __future__ import annotations

import io
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console
from runs import ROOT, Run, explanations, start

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import Storage, StorageError
from pipeline import artifacts, cli, gauges, status
from pipeline.artifacts import Pulse, RunStore
from pipeline.attempts import Diary, attempts
from pipeline.config import identity_of, load_config
from pipeline.gauges import Gauges, figures
from stages.context import Progress

TRAINING = ("base", "mid", "sft", "rl")
ON_GPUS = {"mfu", "gpu_busy_share", "gpu_memory_gb", "gpu_watts", "gpu_celsius"}
# so many that it is killed before it is done
LONG = ("--only", "base", "--set", "base.steps=100000", "--set", "base.eval_every=0")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run of which the tokenizer is done."""
    store, config = RunStore(str(tmp_path), "r"), load_config("demo", {"name": "r"})
    store.record(config)
    manifests.write(store.stage("tokenizer"), Manifest("r", "tokenizer", [], identity_of("tokenizer", config)))
    return store


def watched(store: RunStore) -> tuple[int, str]:
    out = io.StringIO()
    with patch.multiple(status, POLL_SECONDS=0.05), patch("pipeline.tracking.POLL_SECONDS", 0.05):
        code = status.watch(RunStore(str(Path(store.storage.uri).parent), "r"), Console(file=out, width=500))
    return code, out.getvalue()


def claimed(store: RunStore, pid: int, host: str = "") -> dict[str, Any]:
    held = {"host": host or socket.gethostname(), "pid": pid, "user": "u", "since": "2026-01-01T00:00:00+00:00"}
    held |= {"token": "t", "beat": 1}
    store.storage.write_json("claim.json", held)
    return held


def test_a_run_that_is_watched_tells_what_its_driver_tells_until_it_ends(store: RunStore) -> None:
    base = store.stage("base")

    def drive() -> None:
        with store.claim():
            time.sleep(0.3)  # it is being started
            with Diary(store.storage, [], {"base": "run"}, "2 CPU cores", {"dashboard": "http://h:1"}) as diary:
                for step in (1, 2):
                    base.write_json("progress.json", {"state": "running", "step": step, "steps": 2, "notes": ["said"]})
                    time.sleep(0.4)
                diary.place("tensorboard", "tensorboard --logdir there")
                time.sleep(0.3)
                base.write_json("progress.json", {"state": "failed", "error": "disk full"})
                diary.end("stage base failed: disk full")
            store.storage.write_bytes("report/report.html", b"x")

    driver = threading.Thread(target=drive)
    driver.start()
    while not store.storage.exists("claim.json"):
        time.sleep(0.01)
    code, said = watched(store)
    driver.join()
    assert code == 1
    shown, table = said.split("run r\n")
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["dashboard", "http://h:1"],
        ["base", "running", "1/2"],
        ["base", "said"],
        ["tensorboard", "tensorboard", "--logdir"],
        ["base", "failed"],
    ]
    assert "base: disk full" in table and f"report: {store.storage.uri}/report/report.html" in table
    assert table.splitlines()[-1].endswith(": stage base failed: disk full")


@pytest.mark.parametrize(("outcome", "code"), [("done", 0), ("stopped as asked", 1), (None, 1)])
def test_the_exit_status_is_how_the_last_command_ended(store: RunStore, outcome: str | None, code: int) -> None:
    with Diary(store.storage, [], {"tokenizer": "run"}, "2 CPU cores") as diary:
        if outcome:
            diary.end(outcome)
    found, said = watched(store)
    assert found == code and (outcome is None or f": {outcome}" in said)


def test_a_dead_run_is_said_to_be_dead(store: RunStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store.stage("base").write_json("progress.json", {"state": "running", "step": 3, "steps": 9})
    claimed(store, gone.pid)
    began = time.monotonic()
    code, said = watched(store)
    assert code == 1 and f"pid {gone.pid} on" in said and "is gone: run the same command again" in said
    assert " running" not in said and time.monotonic() - began < 5


def test_on_another_host_a_claim_that_does_not_change_is_dead_and_one_that_does_is_not(store: RunStore) -> None:
    held = claimed(store, 1, host="elsewhere")
    with patch.object(artifacts, "LAPSE_SECONDS", 0.3):
        pulse = Pulse(store)
        for beat in range(2, 6):
            assert pulse.look() == "alive"
            time.sleep(0.15)
            store.storage.write_json("claim.json", held | {"beat": beat})
        assert pulse.look() == "alive"
        time.sleep(0.35)
        assert pulse.look() == "dead"
        store.storage.delete("claim.json")
        assert pulse.look() == "over"


def test_a_storage_that_does_not_answer_ends_no_watch(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise StorageError("away")

    pulse = Pulse(store)
    monkeypatch.setattr(Storage, "read_json", away)
    assert status.seen(pulse) == "alive"


def test_addresses_of_another_machine_alone_are_told_with_its_name(store: RunStore) -> None:
    claimed(store, 1, host="elsewhere")
    pulse, out = Pulse(store), io.StringIO()
    pulse.look()
    assert pulse.holder is not None
    places = {"dashboard": "http://127.0.0.1:8265", "wandb": "https://wandb.ai/x"}
    status.tell_places(places, pulse.holder, Console(file=out, width=200))
    assert out.getvalue() == "dashboard http://127.0.0.1:8265 on elsewhere\nwandb https://wandb.ai/x\n"


def test_watch_needs_a_run_and_goes_with_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--watch"], ["r", "--watch", "--json"]):
        with pytest.raises(SystemExit):
            status.main(["--storage", str(tmp_path), *flags])
    assert cli.main(["status", "nope", "--watch", "--storage", str(tmp_path)]) == 1
    assert "no run 'nope'" in capsys.readouterr().err


class Recording:
    """What Ray's Gauge is given."""

    values: dict[tuple[str, str, str], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags["run"] == "r"
        self.values[self.name, tags["stage"], tags["rank"]] = value


def test_gauges_have_the_rank_of_their_figure_and_end_with_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    Recording.values = {}
    monkeypatch.setattr(gauges, "Gauge", Recording)
    record = {"loss": 2.5, "rss_gb": 1.0, "rank3_gpu_watts": 690.0, "actor0_rss_gb": 2.0, "rank1_actor2_rss_gb": 3.0}
    shown = Gauges("r")
    shown.show("rl", Progress(step=4, metrics={"loss": 2.5}, record={**record, "reward_a-b": 0.5}))
    assert Recording.values == {
        ("fathom_loss", "rl", "0"): 2.5,
        ("fathom_step", "rl", "0"): 4,
        ("fathom_rss_gb", "rl", "0"): 1,
        ("fathom_gpu_watts", "rl", "3"): 690,
        ("fathom_rss_gb", "rl", "actor0"): 2,
        ("fathom_rss_gb", "rl", "1_actor2"): 3,
        ("fathom_reward_a_b", "rl", "0"): 0.5,
    }
    shown.show("rl", None)
    assert len(Recording.values) == 7 and all(map(math.isnan, Recording.values.values()))


def test_gauges_that_fail_are_said_once_and_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no Ray")

    monkeypatch.setattr(gauges, "Gauge", broken)
    shown = Gauges("r")
    for step in range(3):
        shown.show("base", Progress(step=step))
    assert caplog.text.count("no Ray") == 1
    nameless = Gauges("r")
    for _ in range(3):
        nameless.show("base", Progress(record={"": 1.0}))
    assert caplog.text.count("show no more of this run") == 2


def test_the_dashboard_asks_for_gauges_that_runs_have(line: Run) -> None:
    board = json.loads((ROOT / "cluster/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"ray_(fathom_\w+)", query)}
    assert len(queries) > 30 and all("$run" in query and "$stage" in query for query in queries)
    had = {name for name, _ in figures(Progress(step=0, steps=1, seconds=1.0, seconds_left=1.0))}
    for stage in TRAINING:
        for record in line.records(stage):
            had |= {name for name, _ in figures(Progress(record={k: v for k, v in record.items() if k != "skipped"}))}
    # what an evaluation counts, what only GPUs have, and what a stage of less than five seconds has not been asked
    had |= {f"fathom_{name}" for name in {"questions", "cpu_cores", "rss_gb"} | ON_GPUS}
    assert asked <= had, asked - had
    stages = (*TRAINING, "evaluate_rl")
    for name in asked - {f"fathom_{name}" for name in gauges.PROGRESS}:
        assert any(explanations(stage, name.removeprefix("fathom_"), records=True) for stage in stages), name


def test_ray_serves_the_gauges_of_a_run_and_who_watches_it_is_told_of_its_death(line: Run, tmp_path: Path) -> None:
    run = replace(line.branch(tmp_path, "tokenizer", "ingest"), settings=[*line.settings, *LONG])
    command = start("run", *run.arguments())
    recorded = RunStore(str(tmp_path), run.name).storage
    assert command.until(lambda: any(a.places.get("metrics") for a in attempts(recorded)), 120), command.output()
    url = attempts(recorded)[-1].places["metrics"]
    assert f"metrics {url}" in command.output() and url.startswith("http://127.0.0.1:")
    watch = start("status", run.name, "--storage", str(tmp_path), "--watch")
    served = ""

    def has_gauges() -> bool:
        nonlocal served
        served = urllib.request.urlopen(url, timeout=30).read().decode() if "base" in watch.output() else ""
        return bool(re.search(r"^ray_fathom_rss_gb\{", served, re.MULTILINE)) or bool(time.sleep(1))

    assert command.until(has_gauges, 120), command.output()
    for name in ("loss", "tokens_per_second", "grad_norm", "step", "cpu_cores"):
        [series] = re.findall(rf"^ray_fathom_{name}(\{{.*\}}) \S+$", served, re.MULTILINE)
        assert all(tag in series for tag in (f'run="{run.name}"', 'stage="base"', 'rank="0"'))
    command.kill()
    result = watch.finish(60)
    assert result.code == 1, result.output
    assert url in result.output and "base            running" in result.output
    assert f"pid {command.process.pid} on" in result.output and "is gone" in result.output
