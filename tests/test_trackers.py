"""What trackers show is what is on record, whatever is killed; and whatever they do, a run goes on without them."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import ROOT, fathom, one_clear_message
from shown import Records, plain, tensorboard_rows, wandb_records, wandb_rows

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import Storage
from pipeline.artifacts import RunStore
from pipeline.attempts import Diary
from pipeline.config import Config, ConfigError, identity_of, load_config
from pipeline.track import asked, check_installed, folder_of, tracked


def some(steps: int, first: int = 0, slower: float = 1.0) -> Records:
    """Records as base's are: validation beside steps, a step that was skipped, figures with and without a fraction."""
    records: Records = []
    for step in range(first, steps):
        if step % 100 == 0:
            records.append({"step": step, "val_bpb": 3 / (step + 1)})
        records.append({"step": step, "loss": 7 / (step + 3), "step_ms": 12.5 * slower, "lr_multiplier": 1, "mfu": 0.1})
    if steps > 7 > first:
        records[8] |= {"loss": math.nan, "skipped": True}
    return records


def keep(storage: Path, stage: str, records: Records, step: int | None = None) -> None:
    """Settles these records of a stage: in its checkpoint of `step`, else in its artifact."""
    place = Storage(storage).at("r", stage)
    place = place if step is None else place.at(manifests.checkpoint_path(step))
    place.write_bytes(manifests.METRICS, "".join(json.dumps(r) + "\n" for r in records).encode())
    file = storage / "kept.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    entry = place.upload(file, manifests.METRICS)
    config = load_config("demo")
    identity = identity_of(stage, config)
    manifests.write(place, Manifest("r", stage, [entry], identity, versions={"torch": "2"}, metrics={"loss": 0.5}))
    if step is None:
        Storage(storage).at("r", stage).delete(manifests.CHECKPOINTS)


def job(storage: Path, kind: str, limit: float = 60) -> str:
    """As `pipeline.track` tells it."""
    told = {"kind": kind, "run": "r", "storage": str(storage), "stages": ["base"], "folder": str(storage / "shown")}
    account = {"project": "p", "entity": None, "tags": ["t"], "mode": "offline"}
    return json.dumps({**told, **account, "hardware": {"base": "2 CPU cores"}, "limit": limit}) + "\n"


@contextmanager
def following(storage: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """The process that feeds a tracker; when the block ends, it is to end."""
    log = (storage / "log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.trackers.follow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,
    )
    log.close()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(job(storage, kind))
    process.stdin.flush()
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def feed(storage: Path, kind: str) -> None:
    with following(storage, kind) as process:
        pass
    assert process.returncode == 0, (storage / "log").read_text()


def shown(kind: str, folder: Path) -> Records:
    """What the newest attempt has of base."""
    if kind == "tensorboard":
        return tensorboard_rows(folder, "r", "base")
    rows = wandb_rows(folder)
    return rows[max(rows, key=len)] if rows else []


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


KINDS = pytest.mark.parametrize("kind", ["wandb", "tensorboard"])


@KINDS
def test_history_is_the_record(kind: str, tmp_path: Path) -> None:
    """First a checkpoint's, then what the next added, then the artifact's, by a process each and by one for all."""
    records = some(300)
    keep(tmp_path, "base", records[:100], 99)
    feed(tmp_path, kind)
    assert plain(shown(kind, tmp_path / "shown")) == plain(records[:100])
    with following(tmp_path, kind):
        keep(tmp_path, "base", records[:200], 198)
        again = tmp_path / "shown/wandb"
        until(lambda: len([*again.glob("offline*")]) == 2 or len(shown("tensorboard", tmp_path / "shown")) >= 199)
        keep(tmp_path, "base", records)
    assert plain(shown(kind, tmp_path / "shown")) == plain(records)
    before = {path: path.read_bytes() for path in tmp_path.glob("shown/[tw]*/*/*/*") if path.is_file()}
    feed(tmp_path, kind)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("shown/[tw]*/*/*/*") if path.is_file()}


@KINDS
def test_killed_between_records_it_goes_on_without_one_missing_or_twice(kind: str, tmp_path: Path) -> None:
    """Where this process, on a busy machine, was late for the kill, all begins anew."""
    records, ends = some(4000), list[int]()
    for place in (tmp_path / str(attempt) for attempt in range(10)):
        keep(place, "base", records[:3000], 2970)
        reached, ends = 0, []
        for _ in range(4):
            with following(place, kind) as process:
                until(lambda: len(shown(kind, place / "shown")) > reached or process.poll() is not None)  # noqa: B023
                process.kill()
            assert process.returncode == -signal.SIGKILL
            until(lambda: not alive_below(place))  # noqa: B023
            reached = len(shown(kind, place / "shown"))
            ends.append(reached)
            if reached == 3000:
                break
        keep(place, "base", records)
        feed(place, kind)
        assert plain(shown(kind, place / "shown")) == plain(records)
        if 0 < ends[0] < 3000:
            return
    raise AssertionError("it was never killed between two records")


def alive_below(storage: Path) -> bool:
    """Whether what a killed feeder had started still holds its log."""
    with (storage / "log").open("ab") as log:
        held = subprocess.run(["flock", "--nonblock", str(log.fileno())], pass_fds=[log.fileno()]).returncode
    return held != 0


@KINDS
def test_a_record_that_was_cut_back_is_shown_as_it_then_went_on(kind: str, tmp_path: Path) -> None:
    """As a resume does where the newest checkpoint is damaged: the steps come again, with other times."""
    keep(tmp_path, "base", some(200), 200)
    feed(tmp_path, kind)
    again = [*some(100), *some(250, first=100, slower=2)]
    keep(tmp_path, "base", some(100), 100)
    (tmp_path / "r/base/checkpoints/step_000200/manifest.json").unlink()
    with following(tmp_path, kind):
        until(lambda: any(tmp_path.glob("shown/wandb/*-2/*.wandb")) or any(tmp_path.glob("shown/*/r/base/*2.fathom")))
        keep(tmp_path, "base", again)
    assert plain(newest(kind, tmp_path / "shown")) == plain(again)
    if kind == "wandb":
        old, new = wandb_rows(tmp_path / "shown")
        assert new == f"{old}-2"


def newest(kind: str, folder: Path) -> Records:
    if kind == "tensorboard":
        return tensorboard_rows(folder, "r", "base")
    return list(wandb_rows(folder).values())[-1]


def test_a_wandb_run_says_what_it_is(tmp_path: Path) -> None:
    keep(tmp_path, "base", some(20))
    feed(tmp_path, "wandb")
    [path] = tmp_path.glob("shown/wandb/offline-run-*/*.wandb")
    records = {record.WhichOneof("record_type"): record for record in wandb_records(path)}
    run = records["run"].run
    assert (run.project, run.run_group, run.job_type, list(run.tags)) == ("p", "r", "base", ["t"])
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["base"] == identity_of("base", load_config("demo"))["base"]
    assert config["fathom"]["packages"] == {"torch": "2"} and config["fathom"]["hardware"] == "2 CPU cores"
    artifact = records["artifact"].artifact
    made = manifests.read(Storage(tmp_path).at("r", "base"))
    assert made is not None and json.loads(artifact.metadata)["digest"] == made.digest()
    [reference] = artifact.manifest.contents
    assert reference.ref == f"file://{tmp_path}/r/base/metrics.jsonl" and reference.digest == made.files[0].sha256


def test_a_run_that_is_tracked_afterwards_says_on_what_each_stage_was_made(tmp_path: Path) -> None:
    RunStore(str(tmp_path), "r").record(load_config("demo", {"name": "r", "storage": str(tmp_path)}))
    for stage, hardware in (("base", "8 GPUs (H100)"), ("mid", "1 GPUs (A100)")):
        keep(tmp_path, stage, some(3))
        with Diary(Storage(tmp_path).at("r"), [], {stage: "run"}, hardware) as diary:
            diary.end("done")
    result = fathom("track", "r", "--to", "wandb", "--storage", str(tmp_path), seconds=60)
    assert result.code == 0, result.output
    found = {}
    for path in tmp_path.glob("fathom-tracking/wandb/offline-run-*/*.wandb"):
        run = next(r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run")
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        found[run.job_type] = config["fathom"]["hardware"]
    assert found == {"base": "8 GPUs (H100)", "mid": "1 GPUs (A100)"}


# Read by every Python that begins with it on its path; of wandb, one function fails.
PLANTED = """
import sys
if "stages.trackers.follow" in sys.orig_argv:
    import time, wandb
    def planted(*arguments, **more):
        if {hangs}:
            time.sleep(1e6)
        raise RuntimeError("planted")
    setattr(wandb if {where!r} == "init" else wandb.Run, {where!r}, planted)
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_message_and_soon_over(
    where: str, hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED.format(where=where, hangs=hangs))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keep(tmp_path, "base", some(20))
    out = io.StringIO()
    config = load_config("demo", {"name": "r", "storage": str(tmp_path), "tracking": {"mode": "offline"}})
    with tracked(config, ["base"], ["wandb"], Console(file=out, width=500), limit=5) as failed:
        time.sleep(2)
        began = time.monotonic()
    assert failed == ["wandb"] and time.monotonic() - began < 8
    said = [line for line in out.getvalue().splitlines() if "wandb sync" not in line]
    assert len(said) == 1 and ("not ready in time" if hangs else "RuntimeError: planted") in said[0], out.getvalue()


def test_a_tracker_that_hangs_takes_no_time_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED.format(where="finish", hangs=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records, out = some(60), io.StringIO()
    keep(tmp_path, "base", records[:20], 18)
    config = load_config("demo", {"name": "r", "storage": str(tmp_path), "tracking": {"mode": "offline"}})
    with tracked(config, ["base"], ["wandb", "tensorboard"], Console(file=out, width=500), limit=8) as failed:
        until(lambda: len(shown("tensorboard", tmp_path / "fathom-tracking")) == 20)
        keep(tmp_path, "base", records)
    assert failed == ["wandb"] and out.getvalue().count("not ready in time") == 1, out.getvalue()
    assert plain(shown("tensorboard", tmp_path / "fathom-tracking")) == plain(records)


def test_a_tracker_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    wrong = fathom("run", "--preset", "demo", "--storage", str(tmp_path), "--track", "wandbb", "--dry-run", seconds=60)
    one_clear_message(wrong, "wandbb", "did you mean wandb?")
    one_clear_message(fathom("track", "r", "--to", "tensorbord", seconds=60), "did you mean tensorboard?")
    with pytest.raises(ConfigError, match=r"pip install 'fathom\[track\]'"):
        check_installed(["no-such-library"])


@pytest.mark.parametrize(
    ("mode", "environment", "online"),
    [("auto", "", True), ("auto", "offline", False), ("auto", "disabled", False), ("online", "disabled", True)],
)
def test_wandb_is_online_where_nothing_says_otherwise(
    mode: str, environment: str, online: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.trackers.to_wandb import wanted_online

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", environment)
    assert wanted_online(mode) is online


def test_which_trackers_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def config(**tracking: Any) -> Config:
        return load_config("demo", {"storage": str(tmp_path), "tracking": tracking})

    assert asked(config().tracking) == ()
    assert asked(config(to="tensorboard, wandb").tracking) == asked(config(to="both").tracking)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert asked(config().tracking) == ("wandb",) and asked(config(to="none").tracking) == ()
    other = config(to="both", project="other", entity="team", tags="a,b", mode="online", folder="/elsewhere")
    assert other.tracking.tags == ("a", "b")
    for stage in ("base", "rl", "evaluate_rl"):
        assert identity_of(stage, other) == identity_of(stage, config())
    assert Config.model_validate_json(other.model_dump_json()) == other
    assert folder_of(config().tracking, Storage(tmp_path)) == tmp_path / "fathom-tracking"
    assert folder_of(other.tracking, Storage(tmp_path)) == Path("/elsewhere")
    remote = folder_of(config().tracking, Storage("s3://bucket/runs?scheme=http"))
    assert remote == Path(os.getcwd(), "fathom-tracking", "bucket", "runs")


def test_a_tracker_gives_way_to_training() -> None:
    """By its own nice value, and by that of its session where the kernel has such."""
    said = "from stages.trackers.follow import give_way; give_way(); import os; print(os.nice(0))"
    sessions = (
        "from pathlib import Path; there = Path('/proc/self/autogroup'); print(there.exists() and there.read_text())"
    )
    code = [sys.executable, "-c", f"{said}; {sessions}"]
    ran = subprocess.run(code, start_new_session=True, capture_output=True, text=True, check=True, cwd=ROOT)
    own, session = ran.stdout.split(maxsplit=1)
    assert int(own) >= 10
    if session.strip() not in ("", "False"):
        assert session.split()[-2:] == ["nice", "10"]
