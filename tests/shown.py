"""What trackers have kept, read back by what is theirs: wandb's protobuf, and TensorBoard's loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from wandb.proto import wandb_internal_pb2

Records = list[dict[str, Any]]
BLOCK = 32768  # bytes, of LevelDB's log, which wandb's file is


def wandb_rows(folder: Path, by: str = "run_id") -> dict[str, Records]:
    """The history of every wandb run there, folder after folder, by its id or its `job_type`."""
    found: dict[str, Records] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                rows = found.setdefault(getattr(record.run, by), [])
            if record.WhichOneof("record_type") == "history":
                assert record.history.step.num == len(rows), "a row is missing, or is there twice"
                items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({name: value for name, value in items.items() if name[0] != "_"})
    return found


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of wandb's file: LevelDB's log format, read without regard to checksums."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if at > len(data):
            return
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def tensorboard_rows(folder: Path, run: str, stage: str) -> Records:
    """The events of a stage as TensorBoard's own loader reads them."""
    rows: Records = []
    for path in sorted(folder.glob(f"tensorboard/{run}/{stage}/*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                figures = {value.tag: make_ndarray(value.tensor).item() for value in event.summary.value}
                rows.append({"step": event.step, **figures})
    return rows


def plain(records: Records) -> list[str]:
    """To compare them by: not a number is then itself, and 2 is 2.0."""
    return [json.dumps({name: float(value) for name, value in record.items()}, sort_keys=True) for record in records]
