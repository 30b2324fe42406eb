"""The record of a stage: metrics.jsonl, and the progress others may look at while it runs."""

from __future__ import annotations

import json
import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.storage import Storage, StorageError

logger = logging.getLogger(__name__)


class Reporter:
    """Collects one flat record a line. A quiet one (every rank but the first) records nothing.

    Values may be tensors still being computed: a record is only read out when the next one comes, so logging never
    makes the device wait.
    """

    def __init__(self, storage: Storage, steps: int, quiet: bool = False) -> None:
        self.storage, self.steps, self.quiet = storage, steps, quiet
        self.records: list[dict[str, Any]] = []
        self.earlier_seconds = 0.0
        self._began = time.monotonic()
        self._first_step: int | None = None
        self._pending: dict[str, Any] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._writing: Future[None] | None = None
        self._written = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of work, those of earlier attempts included."""
        return self.earlier_seconds + time.monotonic() - self._began

    def log(self, step: int, **values: float | Tensor) -> None:
        if self.quiet:
            return
        self.flush()
        if self._first_step is None:
            self._first_step, self._began_stepping = step, time.monotonic()
        self._pending = {"step": step, **values}

    def flush(self) -> None:
        """Reads out the last record; raises FloatingPointError when its loss or gradient is not finite."""
        if self._pending is None:
            return
        record = {k: v.item() if isinstance(v, Tensor) else v for k, v in self._pending.items()}
        self._pending = None
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name} is {record[name]} at step {record['step']}: lower this stage's lr_scale and --force it"
                )
        self.records.append(record)
        self._publish_progress()

    def latest(self, *names: str) -> dict[str, Any]:
        """The newest value of each named metric there is."""
        found: dict[str, Any] = {}
        for record in reversed(self.records):
            found |= {n: record[n] for n in names if n in record and n not in found}
        return found

    def _publish_progress(self) -> None:
        now = time.monotonic()
        if now - self._written < 1.0 or (self._writing and not self._writing.done()):
            return
        self._written = now
        step = self.records[-1]["step"] + 1
        fresh = step - (self._first_step or 0) - 1  # the first step's time holds the warm-up
        left = (now - self._began_stepping) / fresh * (self.steps - step) if fresh > 0 else None
        progress = {
            "state": "running",
            "step": step,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "seconds_left": left and round(left, 1),
            "metrics": self.latest("loss", "val_bpb", "reward", "pass_at_1", "tokens_per_second"),
        }
        self._writing = self._writer.submit(self._write_progress, progress)

    def _write_progress(self, progress: dict[str, Any]) -> None:
        try:
            self.storage.write_json("progress.json", progress)
        except (OSError, StorageError) as error:  # training does not hang on what is only shown
            logger.warning("progress is unwritten: %s", error)

    def close(self) -> None:
        self.flush()
        self._writer.shutdown(wait=True)

    def write(self, path: Path) -> None:
        """metrics.jsonl: every record so far, one JSON object a line."""
        path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def read(self, path: Path) -> None:
        self.records = [json.loads(line) for line in path.read_text().splitlines()]
