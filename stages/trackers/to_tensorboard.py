"""TensorBoard's event files: one a stage, one event a record.

A record is one event with all its figures, in double precision, appended to the file in one write. So what a killed
process leaves is whole events and at most one that is cut, which is cut off before the next is written.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE
from tensorboard.summary.writer.record_writer import RecordWriter

from stages.trackers import Job, Record, Say, Settled, begins

FRAME = 12  # bytes before an event: its length and a checksum of that; another checksum follows it
SCALARS = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))


class TensorBoard:
    def __init__(self, job: Job, say: Say) -> None:
        self.folder = Path(job.folder, "tensorboard", job.run)
        self.files: dict[str, tuple[BinaryIO, list[Record]]] = {}
        say(f"tensorboard --logdir {self.folder}")

    def feed(self, settled: Settled) -> None:
        file, there = self.files.pop(settled.stage) if settled.stage in self.files else self._open(settled.stage)
        if not begins(there, settled.records):  # the record was cut back, or the stage was made again
            file.close()
            file, there = self._anew(settled.stage), []
        for record in settled.records[len(there) :]:
            write(file, event(record))
        file.flush()
        self.files[settled.stage] = file, settled.records

    def finish(self) -> None:
        for file, _ in self.files.values():
            file.close()

    def _open(self, stage: str) -> tuple[BinaryIO, list[Record]]:
        """The newest file of a stage, at the end of its last whole event, and its records."""
        there = numbered(self.folder / stage)
        if not there:
            return self._anew(stage), []
        file = there[-1].open("r+b")
        records, end = [], 0
        for after, read in events(file):
            end = after
            if read.HasField("summary"):
                figures = {value.tag: value.tensor.double_val[0] for value in read.summary.value}
                records.append({"step": read.step, **figures})
        file.truncate(end)
        file.seek(end)
        if end == 0:  # not even its beginning was written
            begin(file)
        return file, records

    def _anew(self, stage: str) -> BinaryIO:
        """Another file, which has TensorBoard forget what it has read of those before, and these are removed."""
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        before = numbered(folder)
        file = path_of(folder, number(before[-1]) + 1 if before else 1).open("w+b")
        begin(file)
        for path in before:
            path.unlink()
        return file


def path_of(folder: Path, counter: int) -> Path:
    return folder / f"events.out.tfevents.{counter:010d}.fathom"


def number(path: Path) -> int:
    return int(path.name.split(".")[3])


def numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*.fathom"))


def begin(file: BinaryIO) -> None:
    """The first events of a file: which format it has, and that what came before step 0 of it is void."""
    write(file, Event(wall_time=time.time(), file_version="brain.Event:2"))
    write(file, Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
    file.flush()


def event(record: Record) -> Event:
    values = [
        Summary.Value(tag=name, tensor=TensorProto(dtype=DT_DOUBLE, double_val=[figure]), metadata=SCALARS)
        for name, figure in record.items()
        if name != "step"
    ]
    return Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))


def write(file: BinaryIO, written: Event) -> None:
    RecordWriter(file).write(written.SerializeToString())


def events(file: BinaryIO) -> Iterator[tuple[int, Event]]:
    """Every whole event and where in the file it ends."""
    file.seek(0)
    data = file.read()
    at = 0
    while at + FRAME <= len(data):
        [size] = struct.unpack_from("<Q", data, at)
        end = at + FRAME + size + 4
        if end > len(data):
            return
        try:
            read = Event.FromString(data[at + FRAME : end - 4])
        except DecodeError:  # a power cut may leave what was never written
            return
        yield end, read
        at = end
