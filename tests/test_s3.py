"""A real S3 server and faults on the way to it: no part of an object, no wrong content, no bad advice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import ROOT, environment
from s3 import BUCKET, artifact, proxy, s3, soak, uri
from test_training import ALONE, CONFIG, STEPS, STOP, Killed, fresh_model, losses, run, write_rows

from cluster import manifest as manifests
from cluster import storage as storage_module
from cluster.storage import Storage, StorageError
from corpus.rows import Rows
from pipeline.artifacts import CLAIM
from stages.context import StageContext
from stages.training.loop import train
from stages.training.metrics import Reporter
from stages.training.parallel import World
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints

__all__ = ["s3"]  # the fixture
FAULTS = 150  # `python tests/s3.py --faults 3000` for more
LARGE = 25 << 20  # bytes: pyarrow uploads it in three parts
CLAIMANT = """
import sys
from pipeline.artifacts import RunHeldError, RunStore
store = RunStore(sys.argv[1], "r")
store.claim_alive()  # all are connected
print("ready", flush=True)
for line in sys.stdin:
    try:
        with store.claim():
            print("held", flush=True)
            sys.stdin.readline()
    except RunHeldError as error:
        print(error, flush=True)
"""


def test_of_eight_processes_that_claim_a_run_at_once_one_holds_it(s3: int) -> None:
    """And when that one is killed, one of the seven others that come at once."""
    at = uri(s3, "claims")
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, at],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]

    def answer(claimant: subprocess.Popen[str]) -> str:
        assert claimant.stdout is not None
        return claimant.stdout.readline().strip()

    def all_claim() -> list[str]:
        for claimant in claimants:
            assert claimant.stdin is not None
            claimant.stdin.write("go\n")
            claimant.stdin.flush()
        with ThreadPoolExecutor(len(claimants)) as pool:
            return list(pool.map(answer, claimants))

    timer = threading.Timer(60, lambda: [claimant.kill() for claimant in claimants])
    timer.start()
    try:
        assert [answer(claimant) for claimant in claimants] == ["ready"] * 8
        for _ in range(2):
            said = all_claim()
            assert said.count("held") == 1, said
            [holder] = [claimant for claimant, word in zip(claimants, said, strict=True) if word == "held"]
            held = [word for word in said if word != "held"]
            assert all(word.startswith("run r is held by ") for word in held), said
            assert Storage(at).at("r").read_json(CLAIM)["pid"] == holder.pid
            holder.kill()
            holder.wait()
            claimants.remove(holder)
    finally:
        timer.cancel()
        for claimant in claimants:
            claimant.kill()
            claimant.wait()


@pytest.mark.parametrize("general", ["", "http://127.0.0.1:1"])
def test_the_endpoint_of_s3_goes_before_the_general_one(s3: int, general: str) -> None:
    """And as with that one, what is written has no trailer, to which servers other than AWS answer 411."""
    env = environment(AWS_ENDPOINT_URL=general, AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{s3}", AWS_REGION="us-east-1")
    del env["AWS_REQUEST_CHECKSUM_CALCULATION"]
    name = f"endpoint-{bool(general)}"
    program = f"from cluster.storage import Storage; Storage('s3://{BUCKET}/{name}').write_bytes('f', b'here')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert Storage(uri(s3, name)).read_bytes("f") == b"here"


@pytest.mark.parametrize("size", [1_000, LARGE])
def test_a_write_that_fails_half_way_leaves_no_object(s3: int, size: int) -> None:
    storage = Storage(uri(s3, f"partial/{size}"))
    with pytest.raises(RuntimeError, match="half-way"), storage.open_write("x") as stream:
        stream.write(bytes(size))
        raise RuntimeError("half-way")
    assert not storage.exists("x") and storage.list() == {}
    with storage.open_write("x") as stream:
        stream.write(bytes(size))
    assert storage.list() == {"x": size}


def test_reads_through_faults_are_right_and_nothing_whole_is_to_be_made_again(s3: int) -> None:
    """No object fails more than twice in a row: whoever tries three times has it."""
    found = soak(s3, FAULTS)
    assert found.faults.total() >= FAULTS and len(found.faults) == 7
    assert not found.wrong
    assert not [message for message in found.errors + found.messages if "--force" in message]
    assert not found.errors


def damage(storage: Storage, how: str) -> None:
    """Does that to the object "0/weights" itself."""
    if how == "missing":
        storage.delete("0/weights")
    else:
        storage.write_bytes("0/weights", b"W" * {"replaced": 1_000, "cut": 999}[how])


@pytest.mark.parametrize("how", ["replaced", "cut", "missing"])
def test_what_is_damaged_is_named_with_the_way_to_make_it_again(s3: int, tmp_path: Path, how: str) -> None:
    storage = Storage(uri(s3, f"damaged/{how}"))
    made = artifact(storage, {"0/weights": b"w" * 1_000, "1/weights": b"v" * 1_000})
    damage(storage, how)
    with pytest.raises(StorageError, match=r"0/weights.*--force base") as told:
        manifests.fetch(storage, cache=tmp_path)
    assert "1/weights" not in str(told.value)
    if how != "replaced":
        with pytest.raises(StorageError, match=r"0/weights.*--force base"):
            manifests.verify(storage, made)


def test_a_read_that_keeps_failing_names_the_path_and_blames_no_artifact(
    s3: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.storage.READ_TRIES", 2)  # the client has tries of its own, of seconds
    lost = {"lost/file": "0/weights", "lost/list": manifests.MANIFEST}
    for prefix in lost:
        artifact(Storage(uri(s3, prefix)), {"0/weights": b"w" * 1_000})

    def message(prefix: str) -> str:
        with pytest.raises(StorageError) as told:
            manifests.fetch(Storage(uri(between.server_port, prefix)), cache=tmp_path)
        return str(told.value)

    with proxy(s3) as between, ThreadPoolExecutor(2) as pool:
        between.plan = lambda path: "503" if path in {f"{prefix}/{name}" for prefix, name in lost.items()} else None
        for name, told in zip(lost.values(), pool.map(message, lost), strict=True):
            assert name in told and "--force" not in told
        between.plan = lambda path: None
        at = manifests.fetch(Storage(uri(between.server_port, "lost/file")), cache=tmp_path)
        assert (at / "0/weights").read_bytes() == b"w" * 1_000


def test_a_manifest_read_with_a_flipped_byte_is_never_another_manifest(s3: int) -> None:
    storage = Storage(uri(s3, "flipped"))
    made = artifact(storage, {f"{i}": bytes([i]) * 100 for i in range(8)})
    with proxy(s3) as between:
        through = Storage(uri(between.server_port, "flipped"))
        between.plan = lambda path: "flip"
        for _ in range(40):
            with contextlib.suppress(StorageError):
                assert manifests.read(through) == made


def test_processes_that_fetch_at_once_into_one_cache_read_every_file_once(s3: int, tmp_path: Path) -> None:
    """The lock files of the cache; threads open them as processes do."""
    files = {f"{i}": bytes([i]) * 100_000 for i in range(8)}
    artifact(Storage(uri(s3, "once")), files)
    with proxy(s3) as between, ThreadPoolExecutor(4) as pool:
        between.plan = lambda path: "late"
        storage = Storage(uri(between.server_port, "once"))
        [at] = set(pool.map(lambda _: manifests.fetch(storage, cache=tmp_path), range(4)))
        reads = {path.removeprefix("once/"): count for path, count in between.reads.items()}
    assert {name: reads[name] for name in files} == dict.fromkeys(files, 1)
    assert {name: (at / name).read_bytes() for name in files} == files


def attempt(storage: Storage, path: Path, world: World, stop_at: int | None = None, go_on: bool = True) -> Reporter:
    """Trains on the storage, resuming where there is a checkpoint. Raises Killed where it validates step `stop_at`, or
    once it has restored where it is not to go on."""
    context = StageContext("test", "base", storage, upstream={}, identity={}, upstream_digests={})
    reporter = Reporter(storage, STEPS, quiet=world.rank > 0, max_skipped=CONFIG.max_skipped)
    checkpoints = Checkpoints(context, world, path / f"scratch-{world.rank}", reporter, CONFIG.keep_last)
    restore, validated = checkpoints.restore, Counter[str]()

    def restored(*given: Any) -> Any:
        progress = restore(*given)
        (path / f"resumed-{world.rank}").write_text(str(progress.step))
        if not go_on:
            time.sleep(2)  # the first to end ends the other, which has to tell, too
            raise Killed
        return progress

    def validate(_: Any) -> dict[str, float]:
        if validated["times"] * CONFIG.eval_every == stop_at:
            checkpoints.wait()
            raise Killed
        validated["times"] += 1
        return {"val_bpb": math.nan}

    checkpoints.restore = restored  # type: ignore[method-assign]
    schedule = Schedule(STEPS, warmup_ratio=CONFIG.warmup_ratio, warmdown_ratio=CONFIG.warmdown_ratio)
    train(fresh_model(), Rows(path / "rows"), CONFIG, schedule, 0, world, checkpoints, reporter, validate)
    reporter.close()
    return reporter


def one_of_two(rank: int, path: Path, uris: list[str], go_on: bool) -> None:
    """A rank with a URI of its own for the storage of both."""
    os.environ["HOME"] = str(path / "home")  # of the cache
    torch.set_num_threads(1)
    if not go_on:
        storage_module.READ_TRIES = 2  # its failure is final, and the client has tries of its own, of seconds
    meet = f"file://{path / f'meet-{go_on}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    reporter = attempt(Storage(uris[rank]), path, World.current(2), go_on=go_on)
    if rank == 0:
        (path / "records.json").write_text(json.dumps(reporter.records))
    dist.destroy_process_group()


def resumed(path: Path) -> list[int | None]:
    """The step at which each rank began; None of one that did not."""
    files = [path / f"resumed-{rank}" for rank in range(2)]
    steps = [int(file.read_text()) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return steps


def test_ranks_resume_from_the_same_remote_checkpoint_whatever_one_of_them_reads(s3: int, tmp_path: Path) -> None:
    """First the newest checkpoint cannot be read by one rank at all, then every first read of it is spoilt."""
    rows = write_rows(tmp_path / "rows")
    _, alone = run(tmp_path / "alone" / "run", rows)
    newest, direct = manifests.checkpoint_path(2 * STOP), uri(s3, "resume/base")
    with pytest.raises(Killed):
        attempt(Storage(direct), tmp_path, ALONE, stop_at=2 * STOP)
    assert [step for step, _ in manifests.checkpoints(Storage(direct))] == [STOP, 2 * STOP]
    assert resumed(tmp_path) == [0, None]
    with proxy(s3) as between:
        uris = [direct, uri(between.server_port, "resume/base")]
        between.plan = lambda path: "503" if newest in path else None
        with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException)):
            mp.spawn(one_of_two, args=(tmp_path, uris, False), nprocs=2)
        assert len(set(resumed(tmp_path)) - {None}) <= 1, "the ranks go on from different steps"

        between.reads.clear()
        between.plan = lambda path: "flip" if newest in path and not between.reads[path] else None
        mp.spawn(one_of_two, args=(tmp_path, uris, True), nprocs=2)
        assert resumed(tmp_path) == [2 * STOP, 2 * STOP]
    records = json.loads((tmp_path / "records.json").read_text())
    found = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert found == pytest.approx(losses(alone), abs=1e-4)
