"""Weights & Biases: one run a stage, one row of its history a record.

A row's number is that of its record, so neither a resumed run nor one that was killed between two rows can have one
twice. How many there are the server says where there is one. Else the files say, which wandb writes online and offline:
an offline run that goes on has a folder of its own for every attempt, and `wandb sync` puts them one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import HistoryRecord
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.wbauth import read_netrc_auth

from cluster.storage import checksum
from stages.trackers import Job, Record, Say, Settled, begins

COMPLETE = "fathom-complete"  # in the folder of a wandb run that has all of the artifact whose version it names
INIT_SECONDS = 10.0  # in which the server must answer
LOG_BLOCK, LOG_HEADER, LOG_BEGINS = 32768, 7, 7  # bytes, of the format of LevelDB's log


class Wandb:
    def __init__(self, job: Job, say: Say) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.job, self.say = job, say
        self.folder = Path(job.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.online, self.told = wanted_online(job.mode), False
        self.open: dict[str, tuple[Any, list[Record]]] = {}  # the run of a stage, and what it was given

    def feed(self, settled: Settled) -> None:
        run, given = self.open.pop(settled.stage, (None, []))
        if run is not None and not begins(given, settled.records):
            run.finish()  # the record was cut back, or the stage was made again
            run = None
        if run is None:
            name, there = self._place(settled)
            if there is None:
                return
            run, at = self._init(settled, name, len(there))
        else:
            at = len(given)
        for number, record in enumerate(settled.records[at:], start=at):
            run.log(record, step=number, commit=True)
        if not settled.done:
            self.open[settled.stage] = run, settled.records
            return
        run.log_artifact(artifact(self.job.run, settled))
        folder = Path(run.dir).parent
        run.finish()
        (folder / COMPLETE).write_text(settled.version)

    def finish(self) -> None:
        for run, _ in self.open.values():
            run.finish()

    def _place(self, settled: Settled) -> tuple[str, list[Record] | None]:
        """The name of the wandb run that a stage goes on in, and which rows this machine has of it; None where it
        misses nothing. What wandb has cannot be taken back: a record that goes on otherwise begins another run there.
        """
        said = [self.job.storage, self.job.run, settled.stage, settled.made.identity]
        base = hashlib.sha256(checksum(said).encode()).hexdigest()[:16]
        for attempt in itertools.count(1):
            name = base if attempt == 1 else f"{base}-{attempt}"
            folders = self.folder.glob(f"wandb/*run-*-{name}")
            if any(f.joinpath(COMPLETE).is_file() and f.joinpath(COMPLETE).read_text() == settled.version
                   for f in folders):  # fmt: skip
                return name, None
            rows = logged(self.folder, name)
            if begins(rows, settled.records):
                all_there = len(rows) == len(settled.records) and not (settled.done or self.online)
                return name, None if all_there else rows
        raise AssertionError("counting does not end")

    def _init(self, settled: Settled, name: str, rows: int) -> tuple[Any, int]:
        """The wandb run, and how many rows it has."""
        made, job = settled.made, self.job
        about = {
            "run": job.run,
            "stage": settled.stage,
            "storage": job.storage,
            "upstream": made.upstream,
            "packages": made.versions,
            "hardware": job.hardware.get(settled.stage),
        }
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            # this process's own are of no interest
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        )
        given = dict(
            dir=str(self.folder),
            project=job.project,
            entity=job.entity,
            id=name,
            name=f"{job.run} {settled.stage}",
            group=job.run,
            job_type=settled.stage,
            tags=job.tags,
            config={**made.identity, "fathom": about},
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        try:
            run = wandb.init(mode="online" if self.online else "offline", **given)
        except (wandb.errors.Error, TimeoutError) as error:
            if not self.online:
                raise
            self.online = False
            self.open.clear()  # their files say how far they are; the service that has their names ends
            wandb.teardown()
            self._tell(f"the server took no run ({error}), so it goes on offline")
            run = wandb.init(mode="offline", **given)
        if self.online:
            self._tell(f"{run.url}")
            rows = run.step
        else:
            self._tell("offline")
        run.define_metric("*", step_metric="step")
        return run, rows

    def _tell(self, text: str) -> None:
        """Where the runs are, once."""
        if not self.told:
            how = f"; `wandb sync {self.folder}/wandb/offline-run-*` sends them" if not self.online else ""
            self.say(text + how)
        self.told = True


def wanted_online(mode: str) -> bool:
    """`auto` is as WANDB_MODE says, else online where there is the key of an account."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "auto"
    if mode != "auto":  # such as disabled, which is not to send anything
        return mode in ("online", "shared")
    return bool(os.environ.get("WANDB_API_KEY") or read_netrc_auth(host=wandb.Settings().base_url))


def artifact(run: str, settled: Settled) -> wandb.Artifact:
    """A reference to what the stage made: where it is and which digests it has. Nothing is uploaded, or read."""
    made = settled.made
    about = {"uri": settled.uri, "digest": made.digest(), "seconds": made.seconds}
    found = wandb.Artifact(f"{run}-{settled.stage}", type="stage", metadata=about)
    root = settled.uri if "://" in settled.uri else f"file://{quote(settled.uri)}"
    base, mark, query = root.partition("?")
    for file in made.files:
        entry = ArtifactManifestEntry(
            path=file.path, digest=file.sha256, ref=f"{base}/{file.path}{mark}{query}", size=file.size
        )
        found.manifest.add_entry(entry)
    return found


def logged(folder: Path, name: str) -> list[Record]:
    """The rows that wandb has written to `folder` of the run of this name, in order, up to the first that is missing.

    The file of an attempt that was killed, or that runs, ends somewhere."""
    rows: dict[int, Record] = {}
    for path in sorted(folder.glob(f"wandb/*run-*-{name}/run-{name}.wandb")):
        rows.update(map(row, histories(path.read_bytes())))
    return [rows[number] for number in itertools.takewhile(rows.__contains__, itertools.count())]


def row(history: HistoryRecord) -> tuple[int, Record]:
    """The number and the figures of a row, without those that wandb adds."""
    found = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
    return history.step.num, {k: float(v) for k, v in found.items() if not k.startswith("_")}


def histories(data: bytes) -> Iterator[HistoryRecord]:
    """The rows in a file of wandb's, which is a log as LevelDB has it: blocks with pieces of records, each with a
    checksum. It ends with the first that is not whole."""
    at, record = LOG_BEGINS, b""
    while at + LOG_HEADER <= len(data):
        if LOG_BLOCK - at % LOG_BLOCK < LOG_HEADER:
            at += LOG_BLOCK - at % LOG_BLOCK
            continue
        check, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + LOG_HEADER : at + LOG_HEADER + size]
        if len(piece) < size or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != check:
            return
        at += LOG_HEADER + size
        record += piece
        if kind in (1, 4):  # whole, or the last piece
            try:
                read = WandbRecord.FromString(record)
            except DecodeError:
                return
            record = b""
            if read.WhichOneof("record_type") == "history":
                yield read.history
