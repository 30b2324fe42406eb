"""How fast a model trains on this machine: the training loop itself, on random rows, in a directory that goes away.

`python -m stages.training.measure REQUEST.json` measures in a process of its own, which `torchrun` may multiply. Beside
the request the first rank writes the figures (.answer), the first rank to fail its reason in one line (.error).
`--hardware` prints what there is to measure on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cluster.hardware import cpu_name
from cluster.storage import Storage
from corpus.rows import Rows, RowWriter
from models.build import build
from models.spec import ModelSpec
from stages.config import TrainConfig
from stages.training.loop import out_of_memory, train
from stages.training.metrics import Reporter
from stages.training.optimizer import Optimizer
from stages.training.parallel import World, computes_in
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints, Progress

WARM_UP = 4  # steps that compile, allocate and fill caches
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}  # where a product of square matrices is about as fast as it gets


@dataclass(frozen=True)
class Measured:
    """Medians over `steps` steps after the warm-up. `product_flops` is the rate of a large matrix product in the
    compute type, on one device, in this process; `device_batch_size` what was left of the one asked for. `memory_gb`
    is the peak of the first rank's device, on a CPU of its process."""

    steps: int
    tokens_per_second: float
    step_ms: float
    flops: float
    product_flops: float
    mfu: float | None
    memory_gb: float
    device_batch_size: int
    shares: dict[str, float]
    notes: list[str]

    @property
    def of_product(self) -> float:
        """Model FLOP/s of a device as a fraction of its matrix products'."""
        return self.flops / self.product_flops


@dataclass(frozen=True)
class Bounded(Schedule):
    """Ends after `limit` seconds, too, though not before a step that follows the first one's compilation."""

    limit: float = math.inf

    def over(self, step: int, elapsed: float, step_seconds: float) -> bool:
        return super().over(step, elapsed, step_seconds) or (step > 1 and elapsed > self.limit)


class NoCheckpoints(Checkpoints):
    """Saves nothing: ranks that measure share no storage, and a large model would take longer to save than to time."""

    def __init__(self) -> None:
        self.best_step = -1

    def restore(self, model: nn.Module, optimizer: Optimizer, check: Any = None) -> Progress:
        return Progress()

    def save(self, progress: Progress, model: nn.Module, optimizer: Optimizer, stage_state: Any = None) -> None:
        pass

    def wait(self) -> None:
        pass


def measure(
    spec: ModelSpec,
    config: TrainConfig,
    steps: int,
    world: World,
    limit: float = math.inf,
    scratch: Path | None = None,
) -> Measured:
    """Trains `steps` steps after the warm-up, fewer when `limit` seconds have passed; every rank takes part, and the
    first gets the figures. What has to lie on disk does so below `scratch`."""
    tokens = config.total_batch_size
    assert tokens is not None
    config = config.model_copy(update={"eval_every": 0})
    torch.set_num_threads(world.threads)
    precision = computes_in(world.device, config.precision)
    before = product_flops(world.device, precision)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with tempfile.TemporaryDirectory(prefix="fathom-measure-", dir=scratch) as directory:
        path = Path(directory)
        write_rows(path / "rows", spec, tokens // spec.sequence_len)
        reporter = Reporter(Storage(path / "run"), WARM_UP + steps, quiet=world.rank > 0)
        model = build(spec)
        model.init_weights(0)
        schedule = Bounded(WARM_UP + steps, limit=limit)
        rows = Rows(path / "rows")
        train(model, rows, config, schedule, 0, world, NoCheckpoints(), reporter, lambda _: {"val_bpb": math.nan})
        reporter.close()
    after = product_flops(world.device, precision)
    every = [r for r in reporter.records if "step_ms" in r] or [{"step_ms": math.nan, "memory_gb": math.nan}]
    records = every[WARM_UP:] or every[-1:]

    def median(key: str) -> float:
        return statistics.median(r[key] for r in records)

    rate = tokens / median("step_ms") * 1e3
    halved = sum(incident.kind == "out of memory" for incident in reporter.incidents)
    return Measured(
        steps=len(records),
        tokens_per_second=rate,
        step_ms=median("step_ms"),
        flops=rate * spec.flops_per_token / world.size,
        product_flops=max(before, after),
        mfu=median("mfu") if "mfu" in records[0] else None,
        memory_gb=max(r["memory_gb"] for r in every),
        device_batch_size=config.device_batch_size >> halved or 1,
        shares={key: median(key) for key in records[0] if key.endswith("_share")},
        notes=reporter.notes,
    )


def write_rows(directory: Path, spec: ModelSpec, count: int) -> None:
    """`count` rows of random tokens."""
    writer = RowWriter(directory, spec.sequence_len + 1, spec.vocab_size, masked=False)
    rng = np.random.default_rng(0)
    for _ in range(count):
        writer.add(rng.integers(spec.vocab_size, size=spec.sequence_len + 1))
    writer.close()


def product_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several; bf16 unless `precision` is fp32."""
    size, dtype = PRODUCT_SIZE[device.type], torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        began = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name() -> str:
    """The GPU's name, or the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()


def hardware() -> dict[str, Any]:
    """{"hardware": its name, "kind": "cpu" or "cuda", "devices": how many, "torch": version}; CPUs are one device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = "cuda" if gpus else "cpu"
    return {"hardware": device_name(), "kind": kind, "devices": gpus or 1, "torch": torch.__version__}


def reason(error: Exception) -> str:
    """An exception in one line, which says "out of memory" where that is what it is."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return first if first.startswith("out of memory") else f"out of memory: {first.partition('. GPU')[0]}"
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


def main(path: Path) -> None:
    importlib.import_module("stages.train")  # with Ray and its libraries, as the workers of a run have them in memory
    request: dict[str, Any] = json.loads(path.read_text())
    try:
        if "LOCAL_WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        world = World.current(request["cpus"])
        spec, config = ModelSpec(**request["spec"]), TrainConfig(**request["config"])
        found = measure(spec, config, request["steps"], world, request["limit"], path.parent)
        if world.rank == 0:
            path.with_suffix(".answer").write_text(json.dumps(asdict(found) | {"of_product": found.of_product}))
    except Exception as error:
        # Only the first to fail tells the cause: the others fail since it is gone.
        with contextlib.suppress(FileExistsError), path.with_suffix(".error").open("x") as file:
            file.write(reason(error))
        raise  # so that torchrun ends the other ranks, which wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["--hardware"]:
        print(json.dumps(hardware()))
    else:
        main(Path(sys.argv[1]))
