"""A stage is done if and only if its manifest verifies; one living process holds a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import TEMPORARY, FencedError, Storage, StorageError
from pipeline import artifacts
from pipeline.artifacts import CLAIM, RunHeldError, RunStore
from pipeline.config import identity_of, load_config

HOLDER = """
import sys, time
from pipeline.artifacts import RunStore
with RunStore(sys.argv[1], "r").claim():
    print("held", flush=True)
    time.sleep(60)
"""


def finish(
    store: RunStore,
    stage: str,
    identity: dict[str, Any],
    upstream: dict[str, str],
    path: str = "",
    data: bytes = b"w" * 64,
) -> None:
    """Write a real artifact (or checkpoint, below `path`) of one file."""
    at = store.stage(stage).at(path)
    at.write_bytes("weights", data)
    source = Path(at.uri) / "weights"
    manifests.write(at, Manifest(store.run, stage, [at.upload(source, "weights")], identity, upstream))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path), "r")


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_states_follow_a_stage_through_its_life(store: RunStore) -> None:
    identity, upstream = {"base": {"matrix_lr": 0.02}}, {"ingest:base": "a"}
    assert store.state("base", identity, upstream).state == "fresh"
    store.stage("base").write_json("progress.json", {"state": "running", "step": 3, "steps": 9})
    assert store.state("base", identity, upstream).state == "fresh"  # nobody holds the run: it was killed
    onlooker = RunStore(str(Path(store.storage.uri).parent), store.run)
    with store.claim():
        assert onlooker.state("base", identity, upstream).state == "running"
        assert store.state("base", identity, upstream).state == "fresh"  # its own claim makes no stage run
    finish(store, "base", identity, upstream, manifests.checkpoint_path(5))
    resumable = store.state("base", identity, upstream)
    assert (resumable.state, resumable.checkpoint_step) == ("resumable", 5)
    assert store.state("base", {"base": {"matrix_lr": 0.03}}, upstream).state == "drifted"
    store.stage("base").write_json("progress.json", {"state": "failed", "error": "loss is not finite"})
    failed = store.state("base", identity, upstream)
    assert (failed.state, failed.error, failed.checkpoint_step) == ("failed", "loss is not finite", 5)
    finish(store, "base", identity, upstream)
    assert store.state("base", identity, upstream).state == "done"
    drifted = store.state("base", {"base": {"matrix_lr": 0.03}}, {"ingest:base": "b"})
    assert drifted.state == "drifted"
    assert drifted.drift == ["base.matrix_lr: 0.02 -> 0.03", "upstream ingest:base changed"]


def test_a_truncated_file_is_not_done(store: RunStore) -> None:
    finish(store, "base", {}, {})
    (Path(store.stage("base").uri) / "weights").write_bytes(b"w" * 63)
    with pytest.raises(StorageError, match=r"truncated: weights has 63 bytes instead of 64.*--force base"):
        store.state("base", {}, {})


def test_the_recorded_configuration_stands_in_for_a_missing_identity(store: RunStore) -> None:
    config = load_config("demo", {"name": "r"})
    finish(store, "sft", identity_of("sft", config), {"mid": "a"})
    assert store.state("sft").state == "done"
    store.record(load_config("demo", {"name": "r", "sft": {"matrix_lr": 0.5}}))
    assert store.state("sft").drift == ["sft.matrix_lr: 0.02 -> 0.5"]
    store.storage.write_json("config.json", {"from": "another version"})
    assert store.state("sft").state == "done"


def test_a_live_holder_is_refused_and_named(store: RunStore, holder: Any) -> None:
    assert store.claim_alive()
    with pytest.raises(RunHeldError, match=rf"run r is held by \S+@\S+ pid {holder.pid} since .*--name"), store.claim():
        pytest.fail("two processes hold one run")
    assert holder.poll() is None


def test_the_claim_of_a_killed_holder_lapses_at_once(store: RunStore, holder: Any) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store.storage.exists(CLAIM) and not store.claim_alive()
    began = time.monotonic()
    with store.claim() as claim:
        assert time.monotonic() - began < 3
        claim.check()
    assert not store.storage.exists(CLAIM)


def test_a_claim_from_elsewhere_lapses_only_when_it_stops_beating(store: RunStore, monkeypatch: Any) -> None:
    monkeypatch.setattr(artifacts, "LAPSE_SECONDS", 1.0)
    elsewhere = {"host": "elsewhere", "pid": 1, "user": "u", "since": "then", "token": "t", "beat": 7}
    store.storage.write_json(CLAIM, elsewhere)
    with store.claim():
        assert store.storage.read_json(CLAIM)["token"] != "t"


def test_a_claim_taken_over_is_noticed_and_left_alone(store: RunStore, monkeypatch: Any) -> None:
    monkeypatch.setattr(artifacts, "BEAT_SECONDS", 0.1)
    other = {"host": "elsewhere", "pid": 1, "user": "u", "since": "then", "token": "t", "beat": 7}
    with store.claim() as claim:
        # The write may land between the holder's read and its beat; a real taker confirms and would lose then.
        for _ in range(20):
            store.storage.write_json(CLAIM, other)
            time.sleep(0.15)
            if claim.lost:
                break
        with pytest.raises(RunHeldError, match="u@elsewhere pid 1"):
            claim.check()
    assert store.storage.read_json(CLAIM) == other


def test_names_that_are_no_folder_are_refused(tmp_path: Path) -> None:
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="run name"):
            RunStore(str(tmp_path), name)
    with pytest.raises(ValueError, match="no run can be named 'evaluations'"):
        RunStore(str(tmp_path), "evaluations")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"token": 5}', b"{"])
@pytest.mark.parametrize("path", [CLAIM, "config.json", "base/progress.json"])
def test_what_only_informs_is_as_good_as_absent_when_it_cannot_be_read(
    store: RunStore, path: str, content: bytes, caplog: Any
) -> None:
    finish(store, "base", {}, {})
    store.storage.write_bytes(path, content)
    assert store.state("base", {}, {}).state == "done" and not store.claim_alive()
    assert store.progress("base") is None or content in (b"{}", b'{"token": 5}')
    assert store.recorded() is None or content == b"{}"
    if path == CLAIM:
        with store.claim() as claim:
            claim.check()
    if path == CLAIM:
        assert caplog.text.count("goes on without it") == 1


def test_only_one_of_many_that_claim_at_once_holds_a_run(tmp_path: Path) -> None:
    holder = HOLDER.replace("time.sleep(60)", "sys.stdin.read()")
    command = [sys.executable, "-c", holder, str(tmp_path)]
    pipe = subprocess.PIPE
    claiming = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    try:
        deadline = time.monotonic() + 60
        while sum(p.poll() is None for p in claiming) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        outputs = [p.communicate("", timeout=60) for p in claiming]
    finally:
        for process in claiming:
            process.kill()
    assert sorted(out for out, _ in outputs) == ["", "", "", "held\n"]
    assert all("RunHeldError" in error for out, error in outputs if not out)


def test_what_force_replaces_stays_until_its_successor_is_there(store: RunStore) -> None:
    finish(store, "base", {"n": 1}, {})
    with store.claim():
        store.set_aside("base")
        assert manifests.read(store.stage("base")) is None
        store.stage("base").write_bytes("traceback.txt", b"ValueError")
        assert store.settle() == ["base"]  # it made nothing
    assert store.state("base", {"n": 1}, {}).state == "done"
    with store.claim():
        store.set_aside("base")
        finish(store, "base", {"n": 2}, {}, manifests.checkpoint_path(5))
        assert store.settle() == []  # what is resumable waits, and so does its predecessor
        store.set_aside("base")
        assert store.settle() == ["base"]
        store.set_aside("base")
        finish(store, "base", {"n": 2}, {})
        assert store.settle() == []
    assert store.state("base", {"n": 2}, {}).state == "done"
    assert not store.storage.list(".set-aside")


def test_what_is_set_aside_comes_back_only_to_what_it_is_made_of(store: RunStore) -> None:
    """Else it waits until its successor is there: nothing of a run is removed for what then fails."""
    finish(store, "ingest", {"n": 1}, {})
    made = manifests.read(store.stage("ingest"))
    assert made is not None
    of_ingest = {"ingest": made.digest()}
    finish(store, "base", {}, of_ingest)
    with store.claim():
        store.set_aside("base")
        assert store.settle() == ["base"], "a failed attempt"
        store.set_aside("base")
        store.remove("ingest")
        finish(store, "ingest", {"n": 2}, {}, data=b"other")
        assert store.settle() == [] and not store.stage("base").exists()
        aside = manifests.read(store.storage.at(".set-aside/base"))
        assert aside is not None and aside.upstream == of_ingest
        finish(store, "base", {}, {})
        assert store.settle() == [] and not store.storage.list(".set-aside")


def test_only_stages_come_back_from_aside_and_from_nowhere_else(store: RunStore, tmp_path: Path) -> None:
    run = Path(store.storage.uri)
    with store.claim():
        store.storage.write_bytes(".set-aside/.fathom-run/x", b"")
        store.storage.write_bytes(".set-aside/config.json", b"{}")
        before = (run / ".fathom-run").read_bytes()
        assert store.settle() == [] and (run / ".fathom-run").read_bytes() == before
        store.storage.delete(".set-aside")
        (tmp_path / "home" / "base").mkdir(parents=True)
        (tmp_path / "home" / "base" / "thesis").write_text("years")
        (run / ".set-aside").symlink_to(tmp_path / "home")
        with pytest.raises(StorageError, match="remove the link"):
            store.settle()
        with pytest.raises(StorageError, match="remove the link"):
            store.set_aside("ingest")
    assert (tmp_path / "home" / "base" / "thesis").exists()


def test_a_claim_sweeps_what_a_killed_process_was_writing(store: RunStore) -> None:
    folder = Path(store.storage.uri)
    (folder / "base").mkdir(parents=True)
    left = [folder / f"{TEMPORARY}1", folder / "base" / f"{TEMPORARY}2"]
    for path in left:
        path.write_text("{")
    (folder / f"{TEMPORARY}folder").mkdir()  # nobody's unfinished file
    with store.claim():
        assert not any(path.exists() for path in left)


@pytest.mark.parametrize(("stage", "made"), [("ingest", "shards/000000.json"), ("evaluate_base", "answers/core.json")])
def test_a_forced_stage_keeps_what_it_has_made_so_far(store: RunStore, stage: str, made: str) -> None:
    finish(store, stage, {}, {})
    with store.claim():
        store.set_aside(stage)
        store.stage(stage).write_json(made, {"files": []})
        assert store.settle() == [] and store.stage(stage).exists(made)


def test_force_replaces_what_is_damaged_as_well(store: RunStore) -> None:
    finish(store, "base", {}, {})
    (Path(store.stage("base").uri) / "manifest.json").write_bytes(bytes(100))
    with store.claim():
        store.set_aside("base")
        assert store.state("base", {}, {}).state == "fresh" and store.settle() == []


def test_who_was_held_up_writes_nothing_when_the_next_has_come_and_gone(store: RunStore, tmp_path: Path) -> None:
    with store.claim():
        stage, other = store.stage("base"), RunStore(str(tmp_path), "r")
        store.storage.delete(CLAIM)  # as if no beat had been seen for long
        with other.claim():
            other.stage("base").write_bytes("weights", b"other")
        with pytest.raises(FencedError):
            stage.write_bytes("weights", b"mine")
    assert stage.read_bytes("weights") == b"other"


class Halting(Storage):
    """An object store, of files, that ends the process at the write it is told."""

    left: ClassVar[list[int]] = []

    @property
    def local_path(self) -> Path | None:
        return None

    @contextmanager
    def open_write(self, path: str) -> Iterator[Any]:
        Halting.left[0] -= 1
        if not Halting.left[0]:
            raise KeyboardInterrupt
        with Storage(self.uri).open_write(path) as stream:
            yield stream


@pytest.mark.parametrize("halt", range(1, 5))
def test_a_move_in_an_object_store_that_is_killed_leaves_one_whole(tmp_path: Path, halt: int) -> None:
    """Files are copied one by one, and what is half copied has no manifest."""
    stage = Storage(tmp_path / "run/base")
    for name in ("a", "z", "weights"):
        stage.write_bytes(name, name.encode())
    (tmp_path / "f").write_bytes(b"w")
    files = [stage.upload(tmp_path / "f", name) for name in ("a", "z", "weights")]
    manifests.write(stage, Manifest("run", "base", files))
    Halting.left[:] = [halt]
    with pytest.raises(KeyboardInterrupt):
        Halting(tmp_path / "run").move("base", "aside")
    aside, made = Storage(tmp_path / "run/aside"), manifests.read(stage)
    assert made is not None and manifests.read(aside) is None
    manifests.verify(stage, made)
    Halting.left[:] = [99]
    Halting(tmp_path / "run").move("base", "aside")
    manifests.verify(aside, made)
    assert manifests.read(aside) == made
    assert not stage.exists("manifest.json")
