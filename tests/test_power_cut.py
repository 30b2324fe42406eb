"""The power goes off while stages save: what was said to be done is whole when it comes back.

Storage lies on a file system within an image file. A copy of that file at some instant is what a disk would hold had
the power gone off then: what the file system has not written yet is lost, and mounting the copy replays its journal.
`python tests/test_power_cut.py --instants 100 --seconds 60` does more of them by hand.
"""

from __future__ import annotations

import argparse
import mmap
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from runs import ROOT, environment

from cluster import manifest as manifests
from cluster.storage import StorageError
from pipeline.artifacts import RunStore

IMAGE_BYTES = 64 << 20
# Saves as stages do: checkpoints of which the newest two are kept, then the artifact, then no checkpoints. A line is
# printed once a call has returned. The files to be uploaded lie on another disk.
WRITER = """
import itertools, random, sys, time
from pathlib import Path
from cluster import manifest as manifests
from cluster.storage import Storage
from pipeline.artifacts import RunStore
from stages.context import StageContext

store, scratch, rest = RunStore(sys.argv[1], "r"), Path(sys.argv[2]), float(sys.argv[3])
rng = random.Random(0)

def made() -> Path:
    for name in ("model", "optimizer", "parts/0", "parts/1", "empty"):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(rng.randbytes(rng.randrange(200_000) if name != "empty" else 0))
    return scratch

for number in itertools.count():
    stage = f"stage{number}"
    context = StageContext("r", stage, store.stage(stage), {}, {"number": number}, {})
    for step in (1, 2, 3):
        context.storage.write_json("progress.json", {"state": "running", "step": step})
        at = context.storage.at(manifests.checkpoint_path(step))
        manifests.write(at, context.manifest(at.upload_tree(made()), {"step": step}, 0.0))
        for _, old in manifests.checkpoints(context.storage)[:-2]:
            manifests.remove(old)
        print(f"saved {number} {step}", flush=True)
        time.sleep(rng.random() * rest / 4)
    context.publish(made(), {}, 0.0)
    print(f"done {number}", flush=True)
    time.sleep(rng.random() * rest)
    if number > 3:
        print(f"removing {number - 4}", flush=True)
        store.remove(f"stage{number - 4}")
"""


@contextmanager
def mounted(image: Path, at: Path, options: str) -> Iterator[Path]:
    """The file system of an image, mounted on folder `at`."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", f"loop,{options}", str(image), str(at)], check=True, capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def disk(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A new ext4 in an image file, and where it is mounted. It commits its journal every second, so that what it has
    given a name but not yet content is soon seen."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    with ExitStack() as stack:
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
            at = stack.enter_context(mounted(image, folder / "disk", "commit=1"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs to make and mount a file system image, as root: {error}")
        yield image, at


def cut(image: Path, copy: Path) -> None:
    """Copies the image as it is at one instant: of one copy and a second one that is equal, every byte was what it is
    at the moment between the two."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as disk:
        while (first := disk[:]) != disk[:]:
            continue
    copy.unlink(missing_ok=True)  # a loop device that lets the last copy go late has blocks of that file in memory
    with copy.open("wb") as file:
        file.truncate(IMAGE_BYTES)
        for at in range(0, IMAGE_BYTES, 1 << 16):
            if (block := first[at : at + (1 << 16)]).strip(b"\0"):
                file.seek(at)
                file.write(block)


class Writer:
    """The process that saves, and the lines it has said."""

    def __init__(self, *arguments: str) -> None:
        self.said: list[str] = []
        command = [sys.executable, "-c", WRITER, *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()


def faults(root: Path, before: list[str], after: list[str]) -> list[str]:
    """What is not as it was said to be in the storage below `root`, where the power went off between the lines."""
    store, found = RunStore(str(root), "r"), []
    removed = {line.split()[1] for line in after if line.startswith("removing")}
    promised: dict[str, int] = {}  # stage: the newest checkpoint, or 0 for the artifact
    for line in before:
        if told := re.fullmatch(r"(saved|done) (\d+) ?(\d*)", line.strip()):
            promised[told[2]] = int(told[3] or 0)
    for number in sorted(promised.keys() - removed, key=int):
        name = f"stage{number}"
        try:
            state = store.state(name)
            if not promised[number] and state.state != "done":
                found.append(f"{name} was done and is {state.state}")
            if state.state != "done" and (state.checkpoint_step or 0) < promised[number]:
                found.append(f"{name} was saved at step {promised[number]} and goes on at {state.checkpoint_step}")
        except (OSError, StorageError) as error:
            found.append(f"{name}: {error}")
    for path in sorted(root.rglob(manifests.MANIFEST)):
        if path.relative_to(root).parts[1].removeprefix("stage") in removed:
            continue
        try:
            manifests.fetch(store.storage.at(str(path.parent.relative_to(root / "r"))))
        except StorageError as error:
            found.append(f"{path.parent.relative_to(root)} has a manifest: {error}")
    return found


def cuts(folder: Path, instants: int, seconds: float, rest: float, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """The last line said before each of many instants within `seconds`, and what was wrong after it."""
    rng = random.Random(seed)
    at_seconds = sorted(rng.random() * seconds for _ in range(instants))
    with disk(folder) as (image, storage):
        writer = Writer(str(storage), str(folder / "scratch"), str(rest))
        try:
            began = None
            for at in at_seconds:
                while began is None or time.monotonic() < began + at:
                    assert writer.process.poll() is None, "".join(writer.said)
                    if began is None and writer.said:
                        began = time.monotonic()
                    time.sleep(0.005)
                before = list(writer.said)
                cut(image, folder / "cut.img")
                time.sleep(0.05)  # for a line on its way that told of a removal
                after = list(writer.said)
                with mounted(folder / "cut.img", folder / "cut", "noatime") as root:
                    yield (before or ["nothing"])[-1].strip(), faults(root, before, after)
        finally:
            writer.stop()


def test_what_is_said_to_be_done_is_whole_after_a_power_cut(tmp_path: Path) -> None:
    found = list(cuts(tmp_path, instants=16, seconds=14, rest=1.6))
    assert len(found) == 16 and {line.split()[0] for line, _ in found} >= {"saved", "done"}
    assert not [fault for fault in found if fault[1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--rest", type=float, default=6, help="at most so many seconds between an artifact and the next"
    )
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as directory:
        for line, wrong in cuts(Path(directory), given.instants, given.seconds, given.rest):
            bad += bool(wrong)
            print(f"after {line!r}: {'; '.join(wrong) or 'whole'}", flush=True)
    print(f"{bad} of {given.instants} instants lost something")
    sys.exit(bad > 0)
