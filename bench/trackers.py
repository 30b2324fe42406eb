"""What trackers cost training: `python -m bench.trackers --pairs 20`.

One run of the training loop, without Ray, whose trackers (wandb offline and TensorBoard, as `fathom run --track both`
has them) run in every other block of steps; in the others their processes are halted. What they miss meanwhile they
take over in the next block, so all of their work is done in half of the time. They are ready before the first begins.
Sizes are those of the demo's base stage by default. Trackers are fed from checkpoints; here are six times as many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from bench.report import hardware_name, write
from cluster.storage import Storage
from corpus.rows import Rows
from models.build import build
from models.spec import ModelSpec
from pipeline.config import load_config
from pipeline.track import check_installed, folder_of, tracked
from stages.config import TrainConfig
from stages.context import StageContext
from stages.training.loop import train
from stages.training.measure import write_rows
from stages.training.metrics import Reporter
from stages.training.parallel import World
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints

KINDS = ("wandb", "tensorboard")
WARM_UP = 20  # steps before the length of a block is known
READY_SECONDS = 120.0  # in which trackers must have begun


def trackers() -> list[psutil.Process]:
    """The processes that feed trackers, and what these have started."""
    own = psutil.Process().children()
    feeding = [process for process in own if "stages.trackers.follow" in process.cmdline()]
    return [*feeding, *(below for process in feeding for below in process.children(recursive=True))]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    used = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system
    return used


@dataclass(frozen=True)
class Until(Schedule):
    """Ends when it is `enough`."""

    enough: Callable[[], bool] = field(default=lambda: False)

    def over(self, step: int, elapsed: float, step_seconds: float) -> bool:
        return self.enough()


class Alternating(Reporter):
    """A record of steps that halts and wakes the trackers between blocks of them: without and with them, with and
    without them, and so on. `blocks` has of each whether they ran, and its steps a second; `shares` of those with them
    what part of all cores they used."""

    def __init__(
        self, storage: Storage, pairs: int, seconds: float, save_every: int, ready: Callable[[], bool]
    ) -> None:
        super().__init__(storage, None)
        self.plan = [running for pair in range(pairs) for running in (pair % 2 > 0, pair % 2 == 0)]
        self.blocks: list[tuple[bool, float]] = []
        self.shares: list[float] = []
        self.used = 0.0
        self.block_seconds, self.save_every, self.ready = seconds, save_every, ready
        self.length, self.left = 0, WARM_UP
        self.began = self.born = time.perf_counter()

    @property
    def done(self) -> bool:
        return len(self.blocks) == len(self.plan)

    def log_step(self, step: int, *arguments: Any, **values: Any) -> None:
        super().log_step(step, *arguments, **values)
        self.left -= 1
        if self.done or self.left > 0 or (step + 1) % self.save_every:  # every block has as many saves
            return
        now = time.perf_counter()
        if self.length:
            running = self.plan[len(self.blocks)]
            self.blocks.append((running, self.length / (now - self.began)))
            if running:
                cores = len(os.sched_getaffinity(0))
                self.shares.append((cpu_seconds(trackers()) - self.used) / (now - self.began) / cores)
        elif not self.ready():
            if now - self.born > READY_SECONDS:
                raise RuntimeError(f"the trackers did not begin in {READY_SECONDS:.0f} s")
            return
        else:
            wanted = self.block_seconds * (step + 1) / (now - self.born)
            self.length = max(1, round(wanted / self.save_every)) * self.save_every
        if not self.done:
            feeding = trackers()
            self.used = cpu_seconds(feeding)
            for process in feeding:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume() if self.plan[len(self.blocks)] else process.suspend()
        self.left, self.began = self.length, time.perf_counter()


def slowdowns(blocks: list[tuple[bool, float]]) -> list[float]:
    """By how much of its speed each pair of blocks is slower with trackers."""
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return [1 - dict(pair)[True] / dict(pair)[False] for pair in pairs]


def measure(spec: ModelSpec, settings: TrainConfig, pairs: int, seconds: float, place: Path) -> Alternating:
    """Trains a model below `place` for so many pairs of blocks of about `seconds` each. Raises RuntimeError where a
    tracker failed."""
    config = load_config("demo", {"name": "bench", "storage": str(place / "runs")}, ["tracking.mode=offline"])
    world, storage = World.current(len(os.sched_getaffinity(0))), Storage(config.storage).at(config.name)
    torch.set_num_threads(world.threads)
    write_rows(place / "rows", spec, settings.device_batch_size)
    kept = folder_of(config.tracking, Storage(config.storage))
    context = StageContext(config.name, "base", storage.at("base"), {}, {}, {})

    def ready() -> bool:
        return all(any(kept.glob(files)) for files in ("wandb/offline-run-*/*.wandb", "tensorboard/bench/base/*"))

    reporter = Alternating(context.storage, pairs, seconds, settings.save_every, ready)
    checkpoints = Checkpoints(context, world, place / "scratch", reporter, settings.keep_last)
    model = build(spec)
    model.init_weights(0)
    schedule = Until(10**9, enough=lambda: reporter.done)
    console = Console(stderr=True)
    with tracked(config, ["base"], KINDS, console, limit=None) as failed:
        try:
            rows = Rows(place / "rows")
            train(model, rows, settings, schedule, 0, world, checkpoints, reporter, lambda _: {"val_bpb": 0.0})
        finally:
            for process in trackers():
                process.resume()
    reporter.close()
    if failed:
        raise RuntimeError(f"{' and '.join(failed)} did not take over all that was recorded")
    return reporter


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.trackers", description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seq", type=int, default=256, help="tokens a row")
    parser.add_argument("--device-batch", type=int, default=32, help="rows a step")
    parser.add_argument(
        "--save-every", type=int, default=5, help="steps between checkpoints, which trackers are fed from"
    )
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks, one without and one with trackers")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a block, about")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    args = parser.parse_args()
    if args.pairs < 2 or args.save_every < 1 or not args.seconds > 0:
        parser.error("--pairs must be at least 2, --save-every at least 1, --seconds above 0")
    check_installed(KINDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else it would leave halted processes behind
    spec = ModelSpec.from_dial("depth", args.depth, args.vocab, args.seq)
    settings = TrainConfig(
        total_batch_size=args.device_batch * args.seq,
        device_batch_size=args.device_batch,
        compile=False,
        eval_every=0,
        save_every=args.save_every,
    )
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        found = measure(spec, settings, args.pairs, args.seconds, Path(directory))
    slower = slowdowns(found.blocks)
    error = statistics.stdev(slower) / len(slower) ** 0.5
    row: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("out", "pairs")} | {
        "steps": found.length,
        "without": [speed for running, speed in found.blocks if not running],
        "with": [speed for running, speed in found.blocks if running],
        "slowdowns": slower,
        "cpu_share": statistics.mean(found.shares),
        "slowdown_share": statistics.median(slower),
        "mean_share": statistics.mean(slower),
        "standard_error": error,
    }
    name = f"depth {args.depth}, vocab {args.vocab}, T {args.seq}, {args.device_batch} rows"
    print(f"{hardware_name()}, torch {torch.__version__}: {name}, {spec.parameters:,} parameters")
    print(f"{'pair':<8}{'without':>12}{'with':>12}{'slower':>10}   steps a second, {found.length} steps a block")
    for number, (without, with_, share) in enumerate(zip(row["without"], row["with"], slower, strict=True), start=1):
        print(f"{number:<8}{without:>12.2f}{with_:>12.2f}{share:>10.2%}")
    print(
        f"with {' and '.join(KINDS)} a step takes {row['slowdown_share']:.2%} longer in the median of {len(slower)} "
        f"pairs, {row['mean_share']:.2%} in the mean, with a standard error of {error:.2%}; meanwhile trackers use "
        f"{row['cpu_share']:.2%} of all cores"
    )
    if args.out:
        write("trackers", [row], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
