"""The record of a stage: metrics.jsonl, and the progress others may look at while it runs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import hardware, manifest
from cluster.manifest import Incident
from cluster.storage import FencedError, Storage, StorageError
from cluster.usage import LOOK_SECONDS, Usage
from stages.context import PROGRESS, STOP, Progress, incidents_of
from stages.training.parallel import World

logger = logging.getLogger(__name__)

# the figures of a record that stand beside the stage, while it runs and when it is done: docs/metrics.md
SUMMARY = (
    "loss", "val_bpb", "val_bpb_mid", "val_bpb_sft", "val_bpb_sft_whole", "reward", "val_greedy", "val_pass_at_1",
    "kl_sft", "best_step", "tokens_per_second", "completion_tokens_per_second", "mfu",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a step of all ranks amounts to: target tokens, and FLOPs a token by `ModelSpec.flops_per_token`."""

    tokens: int
    flops_per_token: int
    world: World

    def figures(self, seconds: float) -> dict[str, float]:
        """Throughput of a step, its share of the devices' dense bf16 peak where that is known, and peak memory."""
        figures = {"tokens_per_second": self.tokens / seconds}
        device = self.world.device
        if device.type == "cpu":
            figures["memory_gb"] = hardware.peak_memory() / 1e9
            return figures
        properties = torch.cuda.get_device_properties(device)
        figures["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if known := hardware.find(properties.name, properties.total_memory):
            achieved = figures["tokens_per_second"] * self.flops_per_token
            figures["mfu"] = achieved / (known.bf16_flops * self.world.size)
        return figures


class Stopwatch:
    """Where a step's time goes: each mark ends a span. On a GPU marks are events, read when the step has long ended,
    so that measuring never waits. "communication" is what is left of it when the backward pass has ended."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        if self._on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((name, moment))

    def spans(self) -> dict[str, float]:
        """Milliseconds of every span; waits for the last mark."""
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        spans: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            milliseconds = before.elapsed_time(after) if self._on_gpu else (after - before) * 1e3
            spans[name] = spans.get(name, 0.0) + milliseconds
        return spans

    def figures(self) -> dict[str, float]:
        """The length of the step, validation apart, and the share of every span in it; waits for the last mark."""
        spans = self.spans()
        spans.pop("evaluate", None)
        total = sum(spans.values())
        return {"step_ms": total} | {f"{name}_share": span / total for name, span in spans.items()}


def uuid_of(device: torch.device) -> str | None:
    """What NVML calls a GPU; None for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


class Reporter:
    """Collects one flat record a line. A quiet one (every rank but the first) records nothing.

    Values may be tensors still being computed: a record is only read out when the next one comes, so logging never
    makes the device wait. `steps` is the length of the stage where steps count it, else `budget_seconds` is.
    `stop` turns true when somebody asks the stage to save and end.
    """

    def __init__(
        self,
        storage: Storage,
        steps: int | None,
        quiet: bool = False,
        budget_seconds: float | None = None,
        max_skipped: int = 0,
    ) -> None:
        self.storage, self.steps, self.quiet = storage, steps, quiet
        self.budget_seconds, self.max_skipped = budget_seconds, max_skipped
        self.records: list[dict[str, Any]] = []
        self._newest: dict[str, Any] = {}  # of every figure on record
        self._usage: Usage | None = None
        self._looked, self._used = 0.0, dict[str, float]()
        self.samples: list[dict[str, Any]] = []
        earlier = None if quiet else manifest.informing(storage, PROGRESS, Progress)
        self.notes: list[str] = earlier.notes if earlier else []  # such as why this is not the first attempt
        self.incidents: list[Incident] = earlier.incidents if earlier else []
        self.earlier_seconds = 0.0
        self.stop = False
        self._began = time.monotonic()
        self._first_step: int | None = None
        self._pending: tuple[dict[str, Any], tuple[Stopwatch, Work] | None] | None = None
        self._skipped = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._writing: Future[None] | None = None
        self._written = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of work, those of earlier attempts included."""
        return self.earlier_seconds + time.monotonic() - self._began

    def note(self, text: str, kind: str | None = None) -> None:
        """`stages.context.Say`: in the log, beside the progress, and if it is an incident in the artifact."""
        if not self.quiet:
            logger.info("%s", text)
            self.notes.append(text)
            self.incidents += incidents_of(text, kind)

    def log(self, step: int, **values: float | Tensor) -> None:
        """Records the values of `step`."""
        if self.quiet:
            return
        self.flush()
        if self._first_step is None:
            self._first_step, self._began_stepping = step, time.monotonic()
        self._pending = ({"step": step, **values, **self._used}, None)
        self._used = {}

    def say(self, step: int, samples: Sequence[dict[str, str]]) -> None:
        """Keeps what the model said after `step` steps."""
        if not self.quiet:
            self.samples += [{"step": step, **sample} for sample in samples]

    def log_step(self, step: int, clock: Stopwatch, work: Work, **values: float | Tensor) -> None:
        """Records the values of `step`, where its time went, and how fast it was."""
        self.log(step, **values)
        if self._pending:
            self._pending = (self._pending[0], (clock, work))

    def look(self, world: World, seconds: float, more: Callable[[], dict[str, float]] = dict) -> None:
        """Every few `seconds`, which are the same on all ranks, has the next record say what the process and the device
        of every rank take, and what `more` tells of on this one. Every rank calls it in every step."""
        if self._usage is None:
            self._usage, self._looked = Usage(uuid_of(world.device)), seconds
        if seconds - self._looked < LOOK_SECONDS:
            return
        self._looked = seconds
        ranks = world.everyone(self._usage.look() | more())
        self._used = {
            f"rank{rank}_{name}" if rank else name: value
            for rank, figures in enumerate(ranks)
            for name, value in figures.items()
        }

    def flush(self) -> None:
        """Reads out the last record; raises FloatingPointError when too many steps in a row were skipped."""
        if self._pending is None:
            return
        values, timing = self._pending
        self._pending = None
        record = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}
        if timing:
            clock, work = timing
            record |= clock.figures()
            record |= work.figures(record["step_ms"] / 1e3)
        if "skipped" in record:
            self._skipped = self._skipped + 1 if record["skipped"] else 0
            if not record["skipped"]:
                del record["skipped"]
        self.records.append(record)
        self._newest |= record
        if self._skipped > self.max_skipped:
            raise FloatingPointError(
                f"the gradient of {self._skipped} steps in a row was not finite, up to step {record['step']} (loss "
                f"{record['loss']}); the checkpoints are from before: lower this stage's lr_scale and --force it"
            )
        self._publish_progress()

    def go_on(self, records: list[dict[str, Any]], samples: list[dict[str, Any]], seconds: float) -> None:
        """Goes on from what an earlier attempt recorded, and its model said, in so many seconds of work."""
        self.earlier_seconds = seconds
        if not self.quiet:
            self.records, self.samples, self._newest = records, samples, {}
            for record in records:
                self._newest |= record

    def latest(self, *names: str) -> dict[str, Any]:
        """The newest value of each named metric there is."""
        return {name: self._newest[name] for name in names if name in self._newest}

    def _publish_progress(self) -> None:
        now = time.monotonic()
        if now - self._written < 1.0 or (self._writing and not self._writing.done()):
            return
        if self._writing:
            self._writing.result()
        self._written = now
        step = self.records[-1]["step"] + 1
        fresh = step - (self._first_step or 0) - 1  # the first step's time holds the warm-up
        pace = (now - self._began_stepping) / fresh if fresh > 0 else None
        if self.budget_seconds is None:
            steps, left = self.steps, pace and self.steps and pace * (self.steps - step)
        else:
            left = max(0.0, self.budget_seconds - self.seconds)
            steps = pace and step + round(left / pace)
        progress = {
            "state": "running",
            "step": step,
            "steps": steps,
            "seconds": round(self.seconds, 1),
            "seconds_left": left and round(left, 1),
            "metrics": self.latest(*SUMMARY),
            "record": {name: value for name, value in self._newest.items() if type(value) in (int, float)},
            "notes": self.notes,
            "incidents": self.stats()["incidents"],
        }
        self._writing = self._writer.submit(self._write_progress, progress)

    def _write_progress(self, progress: dict[str, Any]) -> None:
        try:
            self.storage.write_json(PROGRESS, progress)
            self.stop = self.storage.exists(STOP)
        except FencedError:  # another process holds the run: this one must end
            raise
        except (OSError, StorageError) as error:  # training does not hang on what is only shown
            logger.warning("progress is unwritten: %s", error)

    def stats(self) -> dict[str, Any]:
        """What of the stage's course its artifact keeps, besides records."""
        return {"incidents": [incident.model_dump() for incident in self.incidents]}

    def close(self) -> None:
        self.flush()
        self._writer.shutdown(wait=True)

    def write(self, directory: Path) -> None:
        """Every record so far in metrics.jsonl, one JSON object a line, and in samples.jsonl what the model said, where
        it said anything."""
        for name, lines in ((manifest.METRICS, self.records), (manifest.SAMPLES, self.samples)):
            if lines or name == manifest.METRICS:
                (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """A file that `Reporter.write` wrote; ValueError where it is something else."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all(type(record) is dict and type(record.get("step")) is int for record in records):
        raise ValueError(f"{path.name} does not hold a record with its step on each line")
    return records
