"""Storage cannot lose a file silently, and a manifest tells a whole artifact from a broken one."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch.distributed.checkpoint import CheckpointException

from cluster import manifest as manifests
from cluster import scratch
from cluster.manifest import MANIFEST, Manifest, drift
from cluster.storage import DamagedError, FencedError, Storage, StorageError, UnreachableError


def artifact(root: Path, files: dict[str, bytes], stage: str = "base") -> tuple[Storage, Manifest]:
    source = root / "source"
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    storage = Storage(root / "run").at(stage)
    manifest = Manifest("run", stage, storage.upload_tree(source), {"seed": 0}, {"ingest:base": "d"})
    manifests.write(storage, manifest)
    return storage, manifest


class LosesTheTail(Storage):
    """A disk that reports success and keeps all but the last byte, `faults` times."""

    faults = 99

    @contextmanager
    def open_write(self, path: str) -> Iterator[Any]:
        with super().open_write(path) as stream:
            yield stream
        if type(self).faults:
            type(self).faults -= 1
            target = Path(self.uri) / path
            target.write_bytes(target.read_bytes()[:-1])


class FlipsAByte(LosesTheTail):
    @contextmanager
    def open_write(self, path: str) -> Iterator[Any]:
        with Storage.open_write(self, path) as stream:
            yield stream
        target = Path(self.uri) / path
        target.write_bytes(b"\xff" + target.read_bytes()[1:])


@pytest.mark.parametrize("kind", [LosesTheTail, FlipsAByte])
def test_upload_read_back_detects_corruption(tmp_path: Path, kind: type[Storage], monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    with pytest.raises(StorageError, match=r"x/weights could not be stored in 3 tries.*free space"):
        kind(str(tmp_path / "out")).upload(tmp_path / "weights", "x/weights")


def test_upload_survives_one_fault(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(LosesTheTail, "faults", 1)
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    entry = LosesTheTail(str(tmp_path / "out")).upload(tmp_path / "weights", "x/weights")
    assert entry.size == 1000 and (tmp_path / "out/x/weights").read_bytes() == b"w" * 1000


def test_round_trip_list_and_delete(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "with space")
    assert storage.list() == {} and not storage.exists("a")
    storage.write_json("a/b.json", {"x": [1, 2]})
    storage.write_bytes("a/c", b"123")
    assert storage.list("a") == {"b.json": len(storage.read_bytes("a/b.json")), "c": 3}
    assert pickle.loads(pickle.dumps(storage)).at("a").read_json("b.json") == {"x": [1, 2]}
    storage.delete("a/c")
    storage.delete("absent")
    storage.delete("a")
    assert storage.list() == {}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/c")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("f", b"old")
    with pytest.raises(RuntimeError), storage.open_write("f") as stream:
        stream.write(b"new")
        raise RuntimeError("killed half-way")
    assert storage.read_bytes("f") == b"old" and storage.list() == {"f": 3}


def test_uris() -> None:
    assert Storage("runs").uri == str(Path.cwd() / "runs")
    assert Storage("file:///tmp/x").local_path == Path("/tmp/x")
    remote = Storage("s3://bucket/runs?scheme=http").at("demo", "base")
    assert remote.uri == "s3://bucket/runs/demo/base?scheme=http" and remote.local_path is None
    with pytest.raises(StorageError, match="nowhere://"):
        Storage("nowhere://x").exists()


@pytest.mark.parametrize("name", ["a?b", "a?scheme=http", "a#b", "a%20b", "a b", " a", "[1]", "*", "ü", "a\nb", "{}"])
def test_a_local_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    for uri in (tmp_path / name, f"file://{tmp_path}/{name}"):
        Storage(uri).at("run", "base").write_bytes("f", b"here")
        assert (tmp_path / name / "run/base/f").read_bytes() == b"here"
        assert Storage(uri).list() == {"run/base/f": 4}
        Storage(uri).at("run").delete("base")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["", " ", "file://"])
def test_storage_without_a_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(StorageError, match="empty: is a shell variable unset"):
        Storage(name)


def test_storage_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written.*--storage"):
        Storage(tmp_path / "file" / "runs").check_writable()
    Storage(tmp_path / "new").check_writable()
    assert Storage(tmp_path / "new").list() == {}


def test_manifest_detects_truncated_and_missing_files(tmp_path: Path) -> None:
    storage, manifest = artifact(tmp_path, {"model.safetensors": b"m" * 100, "meta.json": b"{}"})
    assert manifests.read(storage) == manifest
    manifests.verify(storage, manifest)
    (tmp_path / "run/base/model.safetensors").write_bytes(b"m" * 99)
    (tmp_path / "run/base/meta.json").unlink()
    with pytest.raises(StorageError) as error:
        manifests.verify(storage, manifest)
    for part in ("model.safetensors has 99 bytes instead of 100", "meta.json is missing", "--force base"):
        assert part in str(error.value)


def test_fetch_checks_every_hash(tmp_path: Path) -> None:
    storage, _ = artifact(tmp_path, {"base/0": b"a" * 10, "mid/0": b"b" * 10})
    assert (manifests.fetch(storage, "base") / "0").read_bytes() == b"a" * 10
    (tmp_path / "run/base/mid/0").write_bytes(b"c" * 10)
    assert manifests.fetch(storage, "base")
    with pytest.raises(StorageError, match=r"mid/0 has SHA-256 .* instead of .*--force base"):
        manifests.fetch(storage)
    with pytest.raises(StorageError, match="no files in rl"):
        manifests.fetch(storage, "rl")
    with pytest.raises(StorageError, match="no complete artifact"):
        manifests.fetch(Storage(tmp_path / "empty"))


class Remote(Storage):
    """A local directory treated as an object store: nothing is used in place."""

    @property
    def local_path(self) -> Path | None:
        return None


def test_fetch_downloads_what_is_missing_or_wrong_and_keeps_the_rest(tmp_path: Path) -> None:
    storage, _ = artifact(tmp_path, {"base/0": b"a" * 10, "base/1": b"b" * 10, "mid/0": b"c"})
    remote, cache = Remote(storage.uri), tmp_path / "cache"
    at = manifests.fetch(remote, "base", cache)
    assert at.is_relative_to(cache) and sorted(p.name for p in at.iterdir()) == ["0", "1"]
    kept = (at / "0").stat().st_mtime_ns
    (at / "1").write_bytes(b"half")
    assert manifests.fetch(remote, "base", cache) == at
    assert (at / "1").read_bytes() == b"b" * 10 and (at / "0").stat().st_mtime_ns == kept
    (tmp_path / "run/base/mid/0").write_bytes(b"d")
    with pytest.raises(StorageError, match="mid/0 has SHA-256"):
        manifests.fetch(remote, "mid", cache)
    assert not list(cache.rglob(".tmp-*"))


def test_digest_covers_content_but_not_timings(tmp_path: Path) -> None:
    _, one = artifact(tmp_path / "1", {"base/0": b"a", "base/metrics.jsonl": b"1 s", "mid/0": b"b"})
    _, two = artifact(tmp_path / "2", {"base/0": b"a", "base/metrics.jsonl": b"2 s", "mid/0": b"c"})
    assert one.digest("base") == two.digest("base") and one.digest() != two.digest()
    assert one.fingerprint == two.fingerprint
    two.upstream["ingest:base"] = "other"
    assert one.fingerprint != two.fingerprint


def test_a_half_written_manifest_is_an_error(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert manifests.read(storage) is None
    storage.write_bytes("manifest.json", b'{"run": "x"')
    with pytest.raises(StorageError, match=r"manifest\.json is damaged: it is not valid JSON"):
        manifests.read(storage)
    storage.write_json("manifest.json", {"files": [], "colour": "red"})
    with pytest.raises(StorageError, match="colour"):
        manifests.read(storage)


def test_latest_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    stage = Storage(tmp_path)
    assert manifests.latest_checkpoint(stage) is None
    (tmp_path / "w").write_bytes(b"12345")
    for step in (5, 10, 15, 20):
        at = stage.at(manifests.checkpoint_path(step))
        files = [at.upload(tmp_path / "w", "w")]
        if step != 20:  # killed before the manifest
            manifests.write(at, Manifest("run", "base", files))
    (tmp_path / "checkpoints/step_000015/w").write_bytes(b"1234")
    latest = manifests.latest_checkpoint(stage)
    assert latest is not None and latest[0] == 10 and latest[1].read_bytes("w") == b"12345"
    manifests.remove(latest[1])
    assert [step for step, _ in manifests.checkpoints(stage)] == [5, 15]


def test_drift_shows_white_space_by_its_value() -> None:
    old, new = {"alphabet": "01\n", "name": "a", "end": "a"}, {"alphabet": " 01", "name": "b", "end": None}
    assert drift(old, new) == [r"alphabet: '01\n' -> ' 01'", "end: a -> None", "name: a -> b"]


def test_drift_names_fields() -> None:
    old = {"seed": 0, "base": {"matrix_lr": 0.02, "steps": 10, "gone": 1}}
    new = {"seed": 0, "base": {"matrix_lr": 0.03, "steps": 10, "come": None}}
    assert drift(old, new) == ["base.come: unset -> None", "base.gone: 1 -> unset", "base.matrix_lr: 0.02 -> 0.03"]
    assert drift(old, old) == []


@pytest.mark.parametrize(
    "path", ["../evil", "/etc/passwd", "a/../../x", "a\\b", "a\0b", "", ".", "a//b", "a/", "./a", "a\nb"]
)
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, path: str) -> None:
    storage, _ = artifact(tmp_path, {"weights": b"w"})
    raw = storage.read_json("manifest.json")
    raw["files"][0]["path"] = path
    storage.write_json("manifest.json", raw)
    remote, cache = Remote(storage.uri), tmp_path / "cache"
    with pytest.raises(StorageError, match=r"not a manifest of this version: files\.0\.path"):
        manifests.fetch(remote, "", cache)
    assert not cache.exists()


@pytest.mark.parametrize("wrong", [{"size": -1}, {"size": "1"}, {"sha256": "0"}, {"sha256": 5}, {"colour": "red"}])
def test_a_manifest_lists_sizes_and_hashes(tmp_path: Path, wrong: dict[str, Any]) -> None:
    storage, _ = artifact(tmp_path, {"weights": b"w"})
    raw = storage.read_json("manifest.json")
    storage.write_json("manifest.json", raw | {"files": [raw["files"][0] | wrong]})
    with pytest.raises(StorageError, match="not a manifest of this version"):
        manifests.read(storage)
    storage.write_json("manifest.json", raw | {"files": raw["files"] * 2})
    with pytest.raises(StorageError, match="listed twice"):
        manifests.read(storage)


class Unsteady(Remote):
    """A network that spoils the reads that `faults` names, one after the other: "error" or "flip"."""

    faults: ClassVar[list[str]] = []

    def open_read(self, path: str) -> Any:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            raise OSError("connection reset")
        stream = super().open_read(path)
        if fault == "flip":
            data = bytearray(stream.read())
            data[len(data) // 2] ^= len(self.faults) + 1
            return io.BytesIO(data)
        return stream


@pytest.fixture
def unsteady(tmp_path: Path, monkeypatch: Any) -> Unsteady:
    monkeypatch.setattr("cluster.storage.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Unsteady, "faults", [])
    storage, _ = artifact(tmp_path, {"weights": b"w" * 100})
    return Unsteady(storage.uri)


@pytest.mark.parametrize("faults", [["flip"], ["error"], ["error", "flip", "error", "flip"], ["flip"] * 3])
def test_a_fault_of_a_read_is_read_again(unsteady: Unsteady, tmp_path: Path, faults: list[str]) -> None:
    unsteady.faults[:] = [*faults]
    assert manifests.read(unsteady) is not None
    unsteady.faults[:] = ["", *faults]  # the manifest as it is, then the weights
    assert (manifests.fetch(unsteady, "", tmp_path / "cache") / "weights").read_bytes() == b"w" * 100


@pytest.mark.parametrize("fault", ["flip", "error"])
def test_reads_that_always_fail_give_no_advice_to_make_again_what_is_whole(
    unsteady: Unsteady, tmp_path: Path, fault: str
) -> None:
    unsteady.faults[:] = ["", *[fault] * 99]
    with pytest.raises(UnreachableError, match="weights") as error:
        manifests.fetch(unsteady, "", tmp_path / "cache")
    assert "--force" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob("weights")]


def test_what_is_damaged_says_so_after_reads_that_agree(unsteady: Unsteady, tmp_path: Path) -> None:
    (Path(unsteady.uri) / "weights").write_bytes(b"v" * 100)
    unsteady.faults[:] = ["", "error", "flip"]
    with pytest.raises(DamagedError, match=r"weights has SHA-256.*--force base"):
        manifests.fetch(unsteady, "", tmp_path / "cache")


def test_a_flipped_byte_in_json_that_no_manifest_lists_is_noticed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_json("plan.json", {"shards": 10, "of": {"b": 1.5, "a": [None, "x"]}})
    assert storage.read_json("plan.json") == {"shards": 10, "of": {"b": 1.5, "a": [None, "x"]}}
    file = tmp_path / "plan.json"
    file.write_bytes(file.read_bytes().replace(b"10", b"11"))
    with pytest.raises(DamagedError, match=r"plan\.json is damaged"):
        storage.read_json("plan.json")


def test_storage_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "mounted/runs/r").mark("token")
    storage.at("base").write_bytes("a", b"1")
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    for change in (lambda: storage.at("base").write_bytes("b", b"2"), lambda: storage.write_json("c", {})):
        with pytest.raises(StorageError, match="no longer mounted"):
            change()
    assert not (tmp_path / "mounted").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "mounted")
    storage.at("base").write_bytes("b", b"2")


def test_who_lost_the_claim_writes_no_more(tmp_path: Path) -> None:
    mine = Storage(tmp_path / "r").mark("mine")
    mine.at("base").write_bytes("a", b"mine")
    with pytest.raises(FencedError), mine.at("base").open_write("b") as stream:
        stream.write(b"mine")
        other = Storage(tmp_path / "r").mark("other")  # while it writes
    for change in (lambda: mine.write_bytes("c", b""), lambda: mine.at("base").delete("a"), mine.delete):
        with pytest.raises(FencedError, match="taken over"):
            change()
    assert mine.list().keys() == {".fathom-run", "base/a"}
    other.at("base").write_bytes("a", b"other")


def test_every_local_write_is_synced_before_it_counts(tmp_path: Path, monkeypatch: Any) -> None:
    """The order that a disk needs: the content, then the name; strace would show the same calls."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition("-")[0])
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        calls.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    Storage(tmp_path / "s").write_bytes("new/file", b"1")
    assert calls == ["sync s", "sync " + tmp_path.name.partition("-")[0], "sync .tmp", "name file", "sync new"]


KILLED = """
import os, sys, signal
from cluster.scratch import scratch
with scratch("base") as folder:
    (folder / "checkpoint").write_bytes(b"1")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_temporary_folders_of_killed_processes_are_removed_and_others_are_not(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "YOUNG_SECONDS", -1.0)
    env = os.environ | {"TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=pipe, stdout=pipe, text=True, env=env) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        (tmp_path / "fathom-of-somebody").mkdir()
        scratch.sweep()
        assert (folder / "checkpoint").exists()
        process.kill()
        process.wait()
    scratch.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["fathom-of-somebody"]


def test_the_cache_is_bounded_and_what_is_in_use_stays(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FATHOM_CACHE_GB", "2e-6")
    for days, name in ((0, "new"), (2, "old"), (3, "older"), (4, "oldest")):
        folder = scratch.cache_folder() / "storage" / name
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w" * 900)
        os.utime(folder, (time.time() - 86_400 * days,) * 2)
    scratch.sweep()
    assert sorted(path.name for path in (scratch.cache_folder() / "storage").iterdir()) == ["new", "old"]
    monkeypatch.setenv("FATHOM_CACHE_GB", "0")
    scratch.sweep()
    assert [path.name for path in (scratch.cache_folder() / "storage").iterdir()] == ["new"]


def test_a_temporary_folder_without_room_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StorageError, match=r"has .* GB free, and base needs 1000000000.0 GB.*TMPDIR"):
        scratch.scratch("base", needed=10**18).__enter__()
    monkeypatch.setattr(scratch, "FULL_BYTES", 1 << 62)  # as if nothing were left
    with pytest.raises(StorageError, match=r"is full: base has .*TMPDIR"), scratch.scratch("base"):
        raise CheckpointException("save", {0: (RuntimeError("unexpected pos"), traceback.StackSummary())})


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "stage")
    storage.write_bytes("deep/kept", b"1")
    program = (
        "import os, signal, sys\nfrom cluster.storage import Storage\n"
        "with Storage(sys.argv[1]).open_write('deep/lost') as file:\n"
        "    file.write(b'2'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, storage.uri], cwd=Path(__file__).parent.parent, check=False)
    there = [path for path in (tmp_path / "stage").rglob("*") if path.is_file()]
    assert len(there) == 2, "the file that was being written"
    storage.sweep()
    assert [path for path in (tmp_path / "stage").rglob("*") if path.is_file()] == [tmp_path / "stage/deep/kept"]


def test_json_almost_too_deep_is_damaged(tmp_path: Path) -> None:
    """Deep enough that it can be read, and not be hashed."""
    storage = Storage(tmp_path)
    for depth in range(960, 1010, 4):
        deep = "[" * depth + "]" * depth
        (tmp_path / "deep.json").write_text(f'{{"sha256": "{"0" * 64}", "a": {deep}}}')
        with pytest.raises(DamagedError, match=r"deep\.json is damaged"):
            storage.read_json("deep.json")


def test_names_that_are_not_utf8_are_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").write_text("x")
    (tmp_path / "run" / os.fsdecode(b"\xff.txt")).write_text("x")
    (tmp_path / os.fsdecode(b"\xfe")).mkdir()
    storage = Storage(tmp_path)
    assert storage.list("run") == {"kept": 1} and list(storage.folders()) == ["run"]
    assert caplog.text.count("names are not UTF-8: rename them") == 2


def test_a_folder_in_place_of_a_file_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json" / "mine").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"config\.json is a folder, .*: move the folder away"):
        Storage(tmp_path).write_json("config.json", {})
    assert (tmp_path / "config.json" / "mine").exists()


def test_what_links_to_folders_lead_to_is_not_listed(tmp_path: Path) -> None:
    """It is outside the run, and would be removed with what nobody knows; and a circle would have no end."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years")
    stage = tmp_path / "run" / "ingest"
    stage.mkdir(parents=True)
    (stage / "kept").write_text("x")
    (stage / "notes").symlink_to(tmp_path / "home")
    for name in "ab":
        (stage / name).symlink_to(stage)
    (stage / "file").symlink_to(tmp_path / "home" / "thesis")
    assert Storage(stage).list() == {"kept": 1, "file": 5}
    (tmp_path / "link").symlink_to(stage)
    assert Storage(tmp_path / "link").list() == {"kept": 1, "file": 5}, "the place itself may be a link"


def test_json_of_no_sensible_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="has more than"):
        manifests.read(Storage(tmp_path))


@pytest.mark.parametrize("faults", [["error"], ["", "", "flip"], ["flip"]])
def test_a_fault_amid_a_move_in_an_object_store_is_read_again(
    unsteady: Unsteady, tmp_path: Path, faults: list[str]
) -> None:
    (tmp_path / "run" / "aside").mkdir()
    run = Unsteady(tmp_path / "run")
    run.faults[:] = faults
    run.move("base", "aside")
    aside = Storage(tmp_path / "run" / "aside")
    made = manifests.read(aside)
    assert made is not None
    manifests.verify(aside, made)
    assert aside.read_bytes("weights") == b"w" * 100


def test_a_pipe_in_place_of_a_folder_holds_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "runs")
    assert Storage(tmp_path).list("runs") == {}


def test_a_pipe_is_removed_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("stop", "link"):
        Storage(tmp_path).delete(name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    lock = tmp_path / "fathom-x" / ".held"
    lock.parent.mkdir()
    os.mkfifo(lock)
    os.utime(lock, (0, 0))
    scratch.sweep()


@pytest.mark.parametrize(
    "stats",
    [
        {"read": {"corpus": {"read": "2", "kept": 1, "left_out": {}}}},
        {"read": {"corpus": {"read": 2, "kept": 1, "left_out": {"empty": "1"}}}},
        {"skipped": {"corpus": {"other": "1"}}},
    ],
)
def test_counts_of_a_manifest_are_numbers(tmp_path: Path, stats: dict[str, Any]) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"run": "r", "stage": "s", "files": [], "stats": stats}))
    with pytest.raises(DamagedError, match="is not a manifest of this version"):
        manifests.read(Storage(tmp_path))


def test_a_manifest_lists_no_file_within_a_file(tmp_path: Path) -> None:
    files = [{"path": path, "size": 1, "sha256": "0" * 64} for path in ("w", "w/x")]
    (tmp_path / MANIFEST).write_text(json.dumps({"run": "r", "stage": "s", "files": files}))
    with pytest.raises(DamagedError, match="listed as a folder, too"):
        manifests.read(Storage(tmp_path))


def test_a_path_as_long_as_storage_admits_can_be_fetched(tmp_path: Path) -> None:
    name = "/".join(["d" * 100] * 5)
    storage, _ = artifact(tmp_path, {name: b"x"})
    assert (manifests.fetch(Remote(storage.uri), "", tmp_path / "cache") / name).read_bytes() == b"x"
