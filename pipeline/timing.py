"""How long a run takes: model FLOPs over what the devices are known, or were measured, to achieve. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.hardware import Gpus, Hardware, find
from models.spec import ModelSpec
from pipeline.memory import Layout
from stages.config import TrainConfig

SECONDS = 3600.0

# Share of the dense bf16 peak that training achieves, by parameters, and whose figure it is on which hardware. Between
# two sizes it is linear in the logarithm of the parameters.
SMALL = "assumed, as no figure is published: kernels of so small a model do not fill the device"
DATA_CENTRE = (
    (50e6, 0.30, "", SMALL),
    (561e6, 0.48, "H100-SXM", "47-49% of nanochat d20 on 8 x H100"),
    (8e9, 0.39, "H100-SXM", "torchtitan's Llama-3.1-8B, FSDP and compiled, 6,667 tokens/s a H100"),
)
OTHERS = (
    (50e6, 0.20, "", SMALL),
    (1.3e9, 0.30, "A6000", "28-31% of 1.3-1.8 B models on 2 x A6000 with ZeRO-1"),
)
FP8 = (800e6, 0.59, "H100-SXM", "nanochat d24 in fp8 on 8 x H100, 983 k tokens/s, against the bf16 peak")
NEAR = 1.6  # times as many parameters or fewer: still the size that a figure is of
IS_DATA_CENTRE = ("A100", "H100", "H200", "B200", "MI300")

# FLOPs that are done, of those a model counts. Full checkpointing is one more forward pass, a third; selective computes
# norms and activations again, which costs memory traffic.
RECOMPUTED = {"none": 1.0, "selective": 1.06, "full": 4 / 3}
FORWARD = 1 / 3  # of the FLOPs of training
NEWTON_SCHULZ_STEPS = 5  # of kernels.muon
LOGIT_BYTES = 8  # moved for each logit

ENGINE_SEQUENCES = 256  # that one engine samples at once: stages.rl.rollout
DECODE_SECONDS = 0.005  # of a step of the engine beyond its traffic: launches, scheduling, drawing of tokens
DECODE_BANDWIDTH = 0.6  # of the memory's that decoding achieves
EAGER = 0.5  # of training's MFU: RL's learner is not compiled, and pads
SYNC_BYTES = 1e9  # bytes/s from the learner through the object store into the engines
PROMPT_TOKENS = 150  # a GSM8K question


@dataclass(frozen=True)
class Work:
    """What one device does for a token: FLOPs, and bytes that elementwise operations move."""

    flops: float
    traffic: float


@dataclass(frozen=True)
class Point:
    """A measurement: the seconds that a device took for a token."""

    work: Work
    seconds: float
    compiled: bool


@dataclass(frozen=True)
class Calibration:
    """What was measured; `sampled` are tokens a second that an engine on one device samples in full batches."""

    points: tuple[Point, ...]
    sampled: float | None = None


@dataclass(frozen=True)
class Rate:
    """How fast one device trains, and where that is from: FLOP/s, of those that a model counts where `of_model`, else
    of all that are done; and the bytes/s beside them."""

    flops: float
    source: str
    of_model: bool = False
    bandwidth: float = math.inf

    def tokens_per_second(self, spec: ModelSpec, layout: Layout) -> float:
        """Of all devices."""
        if self.of_model:
            return layout.world * self.flops / spec.flops_per_token
        work = work_of(spec, layout)
        return layout.world / (work.flops / self.flops + work.traffic / self.bandwidth)


def work_of(spec: ModelSpec, layout: Layout) -> Work:
    """What a token costs a device: the model's FLOPs, what checkpointing computes again, and a share of the optimizer's
    own; the bytes that blocks keep and those of the logits, which stand for what is read and written elementwise."""
    per_step = layout.device_batch_size * layout.grad_accum_steps * spec.sequence_len
    flops = RECOMPUTED[layout.checkpointing] * spec.flops_per_token
    if layout.optimizer == "muon":
        shared = layout.world if layout.parallel != "ddp" else 1
        flops += muon_flops(spec) / shared / per_step
    element = 4 if layout.precision == "fp32" else 2
    # without the fp32 copies that eager norms keep: they take room, but hardly time
    kept = spec.activation_bytes("none", compiled=True, element=element)
    return Work(flops, spec.layers * kept + LOGIT_BYTES * spec.padded_vocab)


def muon_flops(spec: ModelSpec) -> float:
    """FLOPs of one update of all matrices: for each of m by n, m <= n, and each Newton-Schulz step, X X^T, its square
    and the product with X (https://kellerjordan.github.io/posts/muon)."""
    sizes = [(min(shape), max(shape), count) for shape, count in spec.matrix_shapes.items()]
    return float(sum(count * NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3) for m, n, count in sizes))


def default_mfu(hardware: Hardware, parameters: int, precision: str) -> tuple[float, str]:
    """Share of the bf16 peak, and whose figure it is; "assumed" where that is of another size or other hardware."""
    table: Sequence[tuple[float, float, str, str]] = DATA_CENTRE if hardware.name.startswith(IS_DATA_CENTRE) else OTHERS
    if precision == "fp8" and hardware.fp8_flops is not None and parameters >= FP8[0]:
        table = (FP8,)
    nearest = min(table, key=lambda row: abs(math.log(parameters / row[0])))
    _, _, measured_on, source = nearest
    place = math.log(max(parameters, 1))
    share = on_lines(place, [(math.log(row[0]), row[1]) for row in table])
    known = hardware.name == measured_on and 1 / NEAR <= parameters / nearest[0] <= NEAR
    return share, source if known or source is SMALL else f"assumed from {source}"


def on_lines(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at x on the lines between the points, which are in order; beyond them the nearest's."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x < x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return points[-1][1]


def rate(
    spec: ModelSpec,
    gpus: Gpus,
    precision: str,
    compiled: bool,
    mfu: float | None = None,
    calibration: Calibration | None = None,
) -> Rate | None:
    """What a device achieves: as measured, else at `mfu`, else at the usual one; None for a CPU nobody measured, and
    for fp32."""
    if calibration:
        alike = [p for p in calibration.points if p.compiled == compiled]
        source = "measured" if alike else f"measured {'without' if compiled else 'with'} torch.compile"
        return fitted(alike or calibration.points, source)
    if gpus.hardware is None:
        return None
    if mfu is not None:
        return Rate(mfu * gpus.hardware.bf16_flops, "--mfu", of_model=True)
    if precision == "fp32":  # outside the tensor cores, whose peak is in the table
        return None
    share, source = default_mfu(gpus.hardware, spec.parameters, precision)
    return Rate(share * gpus.hardware.bf16_flops, source)


def fitted(points: Sequence[Point], source: str) -> Rate:
    """The FLOP/s and bytes/s that come nearest to all measurements, as shares of their seconds (least squares); FLOP/s
    alone where that leaves no positive bytes/s, as with a single one."""
    rows = [(p.work.flops / p.seconds, p.work.traffic / p.seconds) for p in points]
    ff, ft, tt = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    f, t = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = ff * tt - ft * ft
    if len(rows) > 1 and determinant > 1e-9 * ff * tt:
        per_flop, per_byte = (f * tt - t * ft) / determinant, (t * ff - f * ft) / determinant
        if per_flop > 0 and per_byte > 0:
            return Rate(1 / per_flop, source, bandwidth=1 / per_byte)
    return Rate(ff / f, source)


def read_calibration(paths: Sequence[Path], gpus: Gpus) -> Calibration:
    """Measurements on such devices as `gpus`, from files that `fathom probe --json FILE` or `bench/` wrote.

    A file holds "hardware", the device's name, "kind" (cuda or cpu), and "rows", each with "model" (of ModelSpec),
    "tokens_per_second", "device_batch_size", "grad_accum_steps", "checkpointing", "compile", and where they are not 1,
    ddp and muon "workers", "parallel" and "optimizer"; in a probe's file what all rows share is beside them. Rows
    without a speed do not count. A row may have "rollout_tokens_per_second" instead, what one engine samples on one
    device; the last such one counts.
    Raises ValueError for anything else, and for other hardware.
    """
    points: list[Point] = []
    sampled = None
    for path in paths:
        try:
            record = json.loads(path.read_text())
            rows = record["rows"]
            if "best" in record:  # of a probe's settings, the fastest with and without torch.compile
                shared = {k: record[k] for k in ("model", "workers", "optimizer")}
                rows = sorted((shared | row for row in rows), key=lambda row: float(row["tokens_per_second"]))
                rows = list({row["compile"]: row for row in rows}.values())
            found = [point_of(row) for row in rows if row.get("tokens_per_second")]
            rollouts = [float(r["rollout_tokens_per_second"]) for r in rows if r.get("rollout_tokens_per_second")]
            if not found and not rollouts:
                raise ValueError("no measurement in it")
            if not all(0 < r < math.inf for r in rollouts):
                raise ValueError(f"{rollouts[-1]} tokens a second is no measurement")
            measured_on, kind = record["hardware"], record["kind"]
            if not isinstance(measured_on, str):
                raise ValueError("its hardware has no name")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
            why = error if isinstance(error, OSError | ValueError) else "no measurement in it"
            raise ValueError(f"--calibrate {path}: {why}; it takes what `fathom probe --json FILE` writes") from error
        if (find(measured_on), kind) != (gpus.hardware, "cuda" if gpus.hardware else "cpu"):
            raise ValueError(f"--calibrate {path}: measured on {measured_on}, which is not {gpus.name}: measure there")
        points += found
        sampled = rollouts[-1] if rollouts else sampled
    if not points:
        raise ValueError("--calibrate: how fast training is, is in none of the files; see `fathom probe --json FILE`")
    return Calibration(tuple(points), sampled)


def point_of(row: dict[str, Any]) -> Point:
    """The point of a row of a calibration file; ValueError for figures that cannot be."""
    spec = ModelSpec(**{k: v for k, v in row["model"].items() if k in ModelSpec.__dataclass_fields__})
    speed, workers = row["tokens_per_second"], row.get("workers", 1)
    if not 0 < speed < math.inf or not 1 <= workers < math.inf:
        raise ValueError(f"{speed} tokens a second on {workers} worker(s) is no measurement")
    if min(row["device_batch_size"], row["grad_accum_steps"]) < 1:
        raise ValueError("a batch without sequences is no measurement")
    layout = Layout(
        device_batch_size=row["device_batch_size"],
        grad_accum_steps=row["grad_accum_steps"],
        world=workers,
        parallel=row.get("parallel", "ddp"),
        checkpointing=row["checkpointing"],
        compiled=row["compile"],
        optimizer=row.get("optimizer", "muon"),
    )
    return Point(work_of(spec, layout), workers / speed, layout.compiled)


def training_seconds(config: TrainConfig, tokens: float, tokens_per_second: float, spec: ModelSpec) -> float:
    """Steps and the validations between them."""
    assert config.total_batch_size is not None
    steps = tokens / config.total_batch_size
    passes = 1 + (steps // config.eval_every if config.eval_every else 0)
    return (tokens + FORWARD * passes * config.eval_rows * spec.sequence_len) / tokens_per_second


def sampling_seconds(
    spec: ModelSpec, gpus: Gpus, devices: int, sequences: int, new_tokens: int, sampled: float | None = None
) -> float | None:
    """An engine on every device, each of whose steps reads all weights and what is cached; or at a measured `sampled`
    tokens/s a device. None on a CPU without such a measurement.

    Completions are counted at their longest, so this is an upper bound.
    """
    each = math.ceil(sequences / devices)
    if sampled is not None:
        return each * new_tokens / sampled
    if gpus.hardware is None:
        return None
    waves, at_once = math.ceil(each / ENGINE_SEQUENCES), min(each, ENGINE_SEQUENCES)
    cache = spec.kv_bytes_per_token / 2 * at_once * (PROMPT_TOKENS + new_tokens / 2)  # bf16, half as long on average
    traffic = (2 * spec.parameters + cache) / (DECODE_BANDWIDTH * gpus.hardware.bandwidth)
    return waves * new_tokens * (DECODE_SECONDS + traffic)


@dataclass(frozen=True)
class RLTime:
    """Seconds of the parts of a step; `hours` is of `steps` of them, with an evaluation every so often."""

    steps: int
    rollout: float
    learner: float
    sync: float
    evaluations: float = 0.0

    @property
    def hours(self) -> float:
        return (self.steps * (self.rollout + self.learner + self.sync) + self.evaluations) / SECONDS


def rl_time(
    spec: ModelSpec,
    gpus: Gpus,
    layout: Layout,
    achieved: Rate,
    steps: int,
    prompts_per_step: int,
    samples_per_prompt: int,
    max_new_tokens: int,
    eval_every: int = 0,
    eval_samples: int = 0,
    sampled: float | None = None,
) -> RLTime | None:
    """Reinforcement learning, where rollout and learner take turns; None where `sampling_seconds` is. `eval_samples`
    completions are sampled every `eval_every` steps (0: never)."""
    sequences = prompts_per_step * samples_per_prompt
    rollout = sampling_seconds(spec, gpus, layout.world, sequences, max_new_tokens, sampled)
    if rollout is None:
        return None
    tokens = sequences * (PROMPT_TOKENS + max_new_tokens)
    learner = tokens / (EAGER * achieved.tokens_per_second(spec, layout))
    sync = 4 * spec.parameters / SYNC_BYTES
    passes = math.ceil(steps / eval_every) + 1 if eval_every else 0
    evaluation = sampling_seconds(spec, gpus, layout.world, eval_samples, max_new_tokens, sampled) if passes else 0.0
    return RLTime(steps, rollout, learner, sync, passes * (evaluation or 0.0))
