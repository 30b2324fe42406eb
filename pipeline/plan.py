"""`fathom plan`: whether a run fits, how long it takes and what it costs, before anything is spent. Imports no torch.

Counts of parameters, tokens, steps and FLOPs are exact; memory (pipeline.memory) and time (pipeline.timing) are models
that say what they count, and measurements on the machine at hand replace the second (--calibrate).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.hardware import Gpus, cpu_computes_bf16, parse_gpus
from corpus.sources import CORPORA, SYNTHETIC, shards_needed
from models.spec import ModelSpec
from pipeline.config import (
    Config,
    ConfigError,
    Parser,
    add_config_flags,
    add_stage_flags,
    check_mixtures,
    config_from_args,
    has_problems,
    load_config,
    preset_about,
    preset_values,
    select,
    stage_names,
)
from pipeline.memory import GB, Layout, Memory, memory, memory_with_engine
from pipeline.preflight import check_inputs, proportions
from pipeline.scaling import (
    RECORD_TOKENS,
    RECORDS,
    characters_per_token,
    grad_accum_steps,
    records,
    rows_per_rank,
    spare_shards,
)
from pipeline.terminal import Terminal, say
from pipeline.timing import (
    PROMPT_TOKENS,
    RECOMPUTED,
    SECONDS,
    Calibration,
    Rate,
    RLTime,
    rate,
    read_calibration,
    rl_time,
    sampling_seconds,
    training_seconds,
)
from stages.config import BaseConfig, RLConfig, TrainConfig, TuneConfig, base_hours
from tasks.mixture import Part

CHECKPOINTING = ("none", "selective", "full")  # the cheapest first
CHOSEN = ("device_batch_size", "parallel", "checkpointing")  # of base, where neither user nor preset settles them
FULL_MICRO_BATCH = 8_192  # tokens; below, kernels no longer fill a device, and saving memory otherwise is worth more
ROOM = 0.95  # of the memory is used by what is chosen, as the model may be off by some percent
BYTES_PER_CHARACTER = 0.4  # of compressed Parquet
INGEST_CHARACTERS = 12e6  # a second on one core: docs/LOG.md
# Loss of a model of N parameters on D tokens is e + a/N^alpha + b/D^beta: (e, a, alpha, b, beta).
LAWS = {
    "hoffmann": (1.69, 406.4, 0.34, 410.7, 0.28),  # arXiv 2203.15556, approach 3
    "besiroglu": (1.8172, 482.01, 0.3478, 2085.43, 0.3658),  # arXiv 2404.10102, the same data fitted again
}


def expected_loss(parameters: float, tokens: float, law: str = "hoffmann") -> float:
    """Loss in nats a token that a scaling law expects, on its own corpus and tokenizer: good for comparing plans."""
    e, a, alpha, b, beta = LAWS[law]
    return float(e + a / parameters**alpha + b / tokens**beta)


def plan(
    config: Config,
    gpus: Gpus | None = None,
    usd_per_gpu_hour: float | None = None,
    mfu: float | None = None,
    calibration: Calibration | None = None,
    law: str = "hoffmann",
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """The run in numbers. Units are in the names: GB are 1e9 bytes, of one device where they are memory; hours are of
    the whole run by stage; what cannot be known is None, and `warnings` says what would be needed.

    Device batch, parallel mode and
    checkpointing stay as they are where the preset has them, where they are not at their defaults, or `fixed` names
    them; else they are chosen, `why` says for what reason and `set` what to add to the run. Without `gpus` nothing is.
    Raises ValueError for workers, prices and shares that cannot be.
    """
    check(usd_per_gpu_hour, mfu)
    spec, first = config.model.spec(), first_trained(config)
    if first != "base":  # whose layout is chosen in base's place
        train = getattr(config, first)
        config = config.model_copy(update={"base": BaseConfig(**train.model_dump(exclude={"epochs"}))})
    base = config.base
    assert base.total_batch_size is not None
    world = config.workers[1]
    if gpus and gpus.hardware and world > gpus.count:
        raise ConfigError(f"--workers {world}, one a device, but --gpus has {gpus.count}: give --workers {gpus.count}")
    if gpus and gpus.hardware and world < gpus.count and base.budget_usd is not None:
        raise ConfigError(
            f"a budget buys all {gpus.count} GPUs, and --workers {world} use fewer: plan those that train"
        )
    layout, used, why = _layout(config, spec, gpus, world, fixed)
    warnings = []
    if config.preset and spec == load_config(config.preset).model.spec():
        warnings += preset_about(config.preset).corrections

    achieved = rate(spec, gpus, base.precision, layout.compiled, mfu, calibration) if gpus else None
    speed = achieved.tokens_per_second(spec, layout) if achieved else None
    peak = gpus.hardware.bf16_flops if gpus and gpus.hardware else None
    nothing = None, None, None
    steps, tokens, base_seconds = _base(base, spec, config.workers[0], speed) if first == "base" else nothing
    price = usd_per_gpu_hour if usd_per_gpu_hour is not None else base.usd_per_worker_hour
    devices = gpus.count if gpus else world
    available = _available(gpus, layout)
    fits = used.total <= available if available is not None else None
    if fits is False:
        warnings.append(_too_small(spec, layout, used, available or 0.0, gpus))
    settings, memory_stage = _to_set(config, layout, first), first
    speeds = {} if first == "base" else {first: speed}
    for stage in (stage for stage in _tuning_stages(config) if stage != first):
        tuned, need, changes = _tuned(config, stage, spec, layout, gpus, fixed)
        settings += changes
        if available is not None and need.total > available:
            fits = False
            warnings.append(_too_small(spec, tuned, need, available, gpus, f" in {stage}"))
        if need.total > used.total:
            used, memory_stage = need, stage
        if stage != "rl":
            speeds[stage] = achieved.tokens_per_second(spec, tuned) if achieved else None
    hours = _hours(config, spec, gpus, layout, achieved, speeds, base_seconds, calibration, warnings)
    total_hours = hours["total"]
    if fits and available is not None and used.total > ROOM * available:
        warnings.append(
            f"{memory_stage} needs {used.total / available:.0%} of the memory, which is within the plan's own error"
        )
    warnings += _notes(config, spec, gpus, layout, achieved, tokens, available)
    if enough := _enough_shards(config, tokens):
        settings.append(f"data.shards={enough}")
    for flag, limit, needed in (
        ("--hours", base.hours, total_hours),
        ("--budget-usd", base.budget_usd, total_hours * devices * price if total_hours and price else None),
    ):
        if limit is not None and needed is not None and needed > limit:
            warnings.append(
                f"{flag} {limit:g} is of base alone where the depth is given: all stages come to {needed:,.2f}"
            )
    shards = _shards(config, tokens)
    numbers: dict[str, Any] = {
        "name": config.name,
        "gpus": gpus.name if gpus else None,
        "parameters": {
            "total": spec.parameters,
            "embedding": spec.embedding_parameters,
            "matrices": spec.matrix_parameters,
        },
        "tokens": tokens,
        "steps": steps,
        "total_batch_size": base.total_batch_size,
        "workers": world,
        "device_batch_size": layout.device_batch_size,
        "grad_accum_steps": layout.grad_accum_steps,
        "parallel": layout.parallel,
        "checkpointing": layout.checkpointing,
        "why": why,
        "set": settings,
        "flops_per_token": spec.flops_per_token,
        "total_flops": spec.flops_per_token * tokens if tokens else None,
        "memory_gb": {k: v / GB for k, v in asdict(used).items() if k != "peak"}
        | {"total": used.total / GB, "available": available / GB if available is not None else None},
        "memory_stage": memory_stage,
        "memory_peak": used.peak,
        "fits": fits,
        "mfu": peak and speed and speed * spec.flops_per_token / (peak * world),
        "mfu_source": achieved.source if achieved else None,
        "tokens_per_second": speed,
        "hours": hours,
        "rl": _rl(config, spec, gpus, layout, achieved, calibration),
        "cost_usd": total_hours * devices * price if total_hours is not None and price is not None else None,
        "usd_per_gpu_hour": price,
        "shards": shards,
        "epochs": shards / CORPORA[config.data.corpus].shards if shards else None,
        "ingest_core_hours": _characters(config, tokens) / INGEST_CHARACTERS / SECONDS if tokens else None,
        "disk_gb": _disk(config, spec, tokens),
        "expected_loss": _expected(config, spec, tokens, law),
        "law": law,
        "warnings": warnings,
    }
    return numbers


def check(usd_per_gpu_hour: float | None, mfu: float | None) -> None:
    if usd_per_gpu_hour is not None and not 0 < usd_per_gpu_hour < math.inf:
        raise ConfigError(f"--usd-per-gpu-hour {usd_per_gpu_hour:g}: a price must be above 0")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: a share of the peak is above 0 and at most 1, such as 0.48")


# --- what is laid out how ---


def _layout(
    config: Config, spec: ModelSpec, gpus: Gpus | None, world: int, fixed: Collection[str]
) -> tuple[Layout, Memory, str]:
    """The first that fits of: checkpointing from cheap to dear, in each parallel mode from cheap to dear, with the
    largest device batch; a micro-batch too small to fill a device waits for what comes after it."""
    base, length = config.base, spec.sequence_len
    total = base.total_batch_size
    assert total is not None
    elastic = config.workers[0] != config.workers[1]
    rows = math.ceil(total // length / world) if elastic else rows_per_rank(total, length, world, "base")
    kind = "cpu" if gpus is not None and gpus.hardware is None else "cuda"
    bf16 = kind == "cuda" or cpu_computes_bf16()
    start = Layout(
        device_batch_size=base.device_batch_size,
        grad_accum_steps=math.ceil(rows / base.device_batch_size),
        world=world,
        parallel=base.parallel if world > 1 else "ddp",
        checkpointing=base.checkpointing,
        compiled=base.compile if base.compile is not None else kind == "cuda",
        optimizer=base.optimizer,
        cuda_graphs=base.cuda_graphs,
        precision=base.precision if base.precision != "auto" else "bf16" if bf16 else "fp32",
        kind=kind,
    )
    if gpus is None:
        return start, memory(spec, start), "as configured; --gpus chooses what fits"
    kept = _kept(config, fixed)
    batches = [n for n in range(rows, 0, -1) if elastic or rows % n == 0]
    if "device_batch_size" in kept:
        if not elastic:
            grad_accum_steps(total, length, base.device_batch_size, world, "base")
        batches = [base.device_batch_size]
    if world == 1:
        modes = ["ddp"]
    elif "parallel" in kept:
        modes = [base.parallel]
    else:  # under ddp every worker would compute every update of Muon
        modes = ["zero1", "fsdp"] if base.optimizer == "muon" else ["ddp", "zero1", "fsdp"]
    available = gpus.memory_bytes / (world if kind == "cpu" else 1)
    candidates = [
        replace(
            start,
            device_batch_size=n,
            grad_accum_steps=math.ceil(rows / n),
            parallel=parallel,
            checkpointing=checkpointing,
        )
        for checkpointing in ([base.checkpointing] if "checkpointing" in kept else CHECKPOINTING)
        for parallel in modes
        for n in batches
    ]
    needs = [(layout, memory(spec, layout)) for layout in candidates]
    for room in (ROOM * available, available):
        fitting = [(layout, used) for layout, used in needs if used.total <= room]
        full = (
            (layout, used)
            for layout, used in fitting
            if layout.device_batch_size in (batches[0], *range(math.ceil(FULL_MICRO_BATCH / length), rows))
        )
        if found := next(full, next(iter(fitting), None)):
            return *found, _why(found[0], kept, rows, modes)
    least = min(needs, key=lambda need: need[1].total)
    return *least, "nothing fits: this is what needs the least memory"


def first_trained(config: Config) -> str:
    """The first stage that trains: base, unless the run begins from a model that exists."""
    return "base" if config.init.source is None else next(iter(_tuning_stages(config)), "sft")


def _tuning_stages(config: Config) -> list[str]:
    there = stage_names(config)
    return [s for s in ("mid", "sft", "rl") if s in there and (s == "rl" or getattr(config.data, s))]


def _to_set(config: Config, layout: Layout, stage: str) -> list[str]:
    """KEY=VALUE for --set, so that the run is laid out as planned."""
    changed = {name: getattr(layout, name) for name in CHOSEN if getattr(layout, name) != getattr(config.base, name)}
    if layout.world == 1:
        changed.pop("parallel", None)
    return [f"{stage}.{name}={value}" for name, value in changed.items()]


def _tuned(
    config: Config, stage: str, spec: ModelSpec, layout: Layout, gpus: Gpus | None, fixed: Collection[str]
) -> tuple[Layout, Memory, list[str]]:
    """How mid, sft or rl is laid out: as configured, or where that does not fit like base, with the settings for it."""
    train: TuneConfig | RLConfig = getattr(config, stage)
    world, available = layout.world, _available(gpus, layout)
    if isinstance(train, RLConfig):
        spec = replace(spec, sequence_len=min(spec.sequence_len, PROMPT_TOKENS + train.max_new_tokens))
        rows = math.ceil(train.prompts_per_step * train.samples_per_prompt / world)
        precision = "fp32" if layout.kind == "cpu" else "bf16"
        layout = replace(layout, compiled=bool(train.compile), precision=precision, cuda_graphs=train.cuda_graphs)
    else:
        assert train.total_batch_size is not None
        rows = max(1, math.ceil(train.total_batch_size / spec.sequence_len / world))

    def laid_out(n: int, parallel: str, checkpointing: str) -> Layout:
        return replace(
            layout,
            device_batch_size=n,
            grad_accum_steps=math.ceil(rows / n),
            parallel=parallel if world > 1 else "ddp",
            checkpointing=checkpointing,
            optimizer=train.optimizer,
        )

    def needed(laid: Layout) -> Memory:
        shared = isinstance(train, RLConfig) and gpus is not None and _shares_devices(train, gpus, world)
        if not shared or available is None or not isinstance(train, RLConfig):
            need = memory(spec, laid)
        else:
            engines = train.actors or (1 if laid.kind == "cuda" else max(1, len(os.sched_getaffinity(0)) // world))
            need = memory_with_engine(spec, laid, available, engines)
        reference = isinstance(train, RLConfig) and train.kl_coefficient > 0
        return replace(need, weights=need.weights + 4.0 * spec.padded_parameters) if reference else need

    asked = laid_out(min(train.device_batch_size, rows), train.parallel, train.checkpointing)
    need = needed(asked)
    if available is None or need.total <= available or set(CHOSEN) <= set(fixed):
        return asked, need, []
    n = next(n for n in range(min(rows, train.device_batch_size, layout.device_batch_size), 0, -1) if rows % n == 0)
    like_base = laid_out(n, layout.parallel, layout.checkpointing)
    changed = [name for name in CHOSEN if getattr(like_base, name) != getattr(asked, name)]
    return like_base, needed(like_base), [f"{stage}.{name}={getattr(like_base, name)}" for name in changed]


def _available(gpus: Gpus | None, layout: Layout) -> float | None:
    """Bytes of memory that a worker has."""
    if gpus is None:
        return None
    return gpus.memory_bytes / (layout.world if layout.kind == "cpu" else 1)


def _shares_devices(rl: RLConfig, gpus: Gpus, world: int) -> bool:
    """Whether engines sit on the learner's devices: stages.rl.rollout."""
    if rl.placement == "auto":
        return gpus.hardware is None or gpus.count <= world
    return rl.placement == "shared"


def _kept(config: Config, fixed: Collection[str]) -> set[str]:
    """The fields of `base` that the user or a preset has settled."""
    base = config.base
    kept = set(fixed)
    if config.preset:
        kept |= set(preset_values(config.preset).get(first_trained(config), {}))
    defaults = {name: BaseConfig.model_fields[name].default for name in ("parallel", "checkpointing")}
    kept |= {name for name, default in defaults.items() if getattr(base, name) != default}
    # scaling's own choice for the workers of the configuration is none of the user's
    assert base.total_batch_size is not None
    rows = base.total_batch_size // config.model.sequence_len // config.workers[1]
    most = min(max(rows, 1), BaseConfig.model_fields["device_batch_size"].default)
    if base.device_batch_size not in (most, next(n for n in range(most, 0, -1) if rows % n == 0)):
        kept.add("device_batch_size")
    return kept


def _why(layout: Layout, kept: set[str], rows: int, modes: list[str]) -> str:
    n = layout.device_batch_size
    whole = f"all {rows} rows of a worker's step at once" if n == rows else f"the largest part of {rows} rows that fits"
    parts = ["device_batch_size as asked" if "device_batch_size" in kept else f"device_batch_size {n} is {whole}"]
    if layout.world > 1 and "parallel" not in kept:
        reason = {
            "ddp": "as everything fits whole",
            "zero1": "as Muon's updates are then shared, not repeated"
            if modes[0] == "zero1"
            else "as ddp leaves less room",
            "fsdp": "as whole weights and gradients leave too little room for micro-batches that fill a device",
        }[layout.parallel]
        parts.append(f"{layout.parallel} {reason}")
    if "checkpointing" not in kept:
        reason = "activations fit" if layout.checkpointing == "none" else "with less only smaller micro-batches fit"
        parts.append(f"checkpointing {layout.checkpointing}, as {reason}")
    return "; ".join(parts)


def _too_small(
    spec: ModelSpec, layout: Layout, used: Memory, available: float, gpus: Gpus | None, stage: str = ""
) -> str:
    where = f"each of {gpus.count} device(s)" if gpus and gpus.hardware else "this machine"
    return (
        f"does not fit{stage}: {spec.parameters:,} parameters with device_batch_size {layout.device_batch_size}, "
        f"{layout.parallel} and checkpointing {layout.checkpointing} need {used.total / GB:,.1f} GB on {where}, which "
        f"has {available / GB:,.1f}: take more or larger GPUs, a smaller --depth, or "
        "settings that save memory"
    )


# --- how long ---


def _base(
    base: BaseConfig, spec: ModelSpec, workers: int, speed: float | None
) -> tuple[int | None, int | None, float | None]:
    """Steps, tokens and seconds of base; None for what depends on a speed that is not known."""
    assert base.total_batch_size is not None
    if (hours := base_hours(base, workers)) is None:
        assert base.steps is not None
        tokens = base.steps * base.total_batch_size
        return base.steps, tokens, training_seconds(base, tokens, speed, spec) if speed else None
    if not speed:
        return None, None, hours * SECONDS
    of_training = hours * SECONDS / training_seconds(base, base.total_batch_size * 1000, speed, spec)
    steps = max(1, int(1000 * of_training))
    return steps, steps * base.total_batch_size, hours * SECONDS


def _hours(
    config: Config,
    spec: ModelSpec,
    gpus: Gpus | None,
    layout: Layout,
    achieved: Rate | None,
    speeds: dict[str, float | None],
    base_seconds: float | None,
    calibration: Calibration | None,
    warnings: list[str],
) -> dict[str, float | None]:
    hours: dict[str, float | None] = {"base": base_seconds / SECONDS if base_seconds is not None else None}
    if gpus is None or achieved is None:
        return hours | {"total": None}
    unknown = []
    for stage, speed in speeds.items():
        train = getattr(config, stage)
        tokens = _tuning_tokens(train, getattr(config.data, stage))
        hours[stage] = training_seconds(train, tokens, speed, spec) / SECONDS if tokens is not None and speed else None
        if tokens is None:
            unknown.append(stage)
    sampled = calibration.sampled if calibration else None
    if has_problems(config):
        ask = config.evaluate
        actors = ask.actors(gpus.count if gpus.hardware else 0, len(os.sched_getaffinity(0)))
        both = [  # greedy completions, and then the samples
            sampling_seconds(spec, gpus, actors, ask.problems * n, ask.max_new_tokens, sampled)
            for n in (1, ask.samples)
        ]
        once = sum(seconds for seconds in both if seconds is not None)
        times = len(set(_tuning_stages(config)) | ({"mid"} if config.init.source is None else set()))
        hours["evaluate"] = once * times / SECONDS if None not in both else None
        if None in both:
            unknown.append("evaluate")
    if config.with_rl:
        rl = _rl_time(config, spec, gpus, layout, achieved, calibration)
        hours["rl"] = rl.hours if rl else None
        if rl is None:
            unknown.append("rl")
    if unknown:
        warnings.append(
            f"hours of {', '.join(unknown)} are not in the total: how many rows there are, or how fast an engine "
            "samples here, is not known beforehand"
        )
    return hours | {"total": sum(h for h in hours.values() if h is not None)}


def _tuning_tokens(train: TuneConfig, parts: dict[str, Part]) -> float | None:
    if train.steps is not None and train.total_batch_size is not None:
        return train.steps * train.total_batch_size
    counts = [records(part) for part in parts.values()]
    known = [n * RECORD_TOKENS[p.format] for n, p in zip(counts, parts.values(), strict=True) if n is not None]
    return train.epochs * sum(known) if len(known) == len(counts) else None


def _rl_time(
    config: Config,
    spec: ModelSpec,
    gpus: Gpus,
    layout: Layout,
    achieved: Rate,
    calibration: Calibration | None,
    **changed: int,
) -> RLTime | None:
    rl, part = config.rl, config.data.sft.get("gsm8k")
    prompts = (records(part) if part else None) or RECORDS["hub:openai/gsm8k", "train"]
    values = {name: getattr(rl, name) for name in ("prompts_per_step", "samples_per_prompt", "max_new_tokens")}
    values |= {"eval_every": rl.eval_every, "eval_samples": rl.eval_problems * rl.eval_samples}
    steps = rl.steps or max(1, prompts // rl.prompts_per_step)
    sampled = calibration.sampled if calibration else None
    layout = replace(layout, checkpointing="none", compiled=False, optimizer=rl.optimizer)
    return rl_time(spec, gpus, layout, achieved, steps, **(values | changed), sampled=sampled)


def _rl(
    config: Config,
    spec: ModelSpec,
    gpus: Gpus | None,
    layout: Layout,
    achieved: Rate | None,
    calibration: Calibration | None,
) -> dict[str, Any] | None:
    """A step of RL in seconds, and what the hours would be with twice the samples or tokens, or evaluations between."""
    if not config.with_rl or gpus is None or achieved is None:
        return None
    now = _rl_time(config, spec, gpus, layout, achieved, calibration)
    if now is None:
        return None
    rl = config.rl
    every = max(1, rl.eval_every // 2 or now.steps // 10)
    changes: dict[str, int] = {
        "samples_per_prompt": 2 * rl.samples_per_prompt,
        "max_new_tokens": 2 * rl.max_new_tokens,
        "eval_every": every,
    }
    others = {
        f"{k}={v}": _rl_time(config, spec, gpus, layout, achieved, calibration, **{k: v}) for k, v in changes.items()
    }
    return {
        "steps": now.steps,
        "rollout_seconds": now.rollout,
        "learner_seconds": now.learner,
        "sync_seconds": now.sync,
        "hours": now.hours,
        "hours_with": {change: other.hours for change, other in others.items() if other},
    }


# --- what else ---


def _shards(config: Config, tokens: int | None) -> int | None:
    """Files of the corpus that hold so many tokens; None where its size is not known."""
    per_token = characters_per_token(config.tokenizer.source)
    return shards_needed(config.data.corpus, tokens, per_token) if tokens else None


def _enough_shards(config: Config, tokens: int | None) -> int | None:
    """Shards for --set where the configuration had to guess them, since time decides on the tokens; else None."""
    named, target = CORPORA.get(config.data.corpus), config.base.target_ratio * config.model.spec().parameters
    if named is None or tokens is None or base_hours(config.base, config.workers[0]) is None:
        return None
    guess, enough = (spare_shards(config.data.corpus, n, config.tokenizer.source) for n in (int(target), tokens))
    return enough if config.data.shards == guess != enough else None


def _expected(config: Config, spec: ModelSpec, tokens: int | None, law: str) -> float | None:
    """The expected loss of text; None for synthetic text and single characters, which the laws know nothing of, and
    for a model so small that knowing nothing would be better."""
    if not tokens or config.data.corpus == SYNTHETIC or config.tokenizer.source == "chars":
        return None
    loss = expected_loss(spec.parameters, tokens, law)
    return loss if loss < math.log(spec.vocab_size) else None


def _characters(config: Config, tokens: int) -> float:
    """Characters of the corpus that ingest reads."""
    named = CORPORA.get(config.data.corpus)
    if named is None or config.data.shards is None:
        return tokens * characters_per_token(config.tokenizer.source)
    return config.data.shards * named.characters


def _disk(config: Config, spec: ModelSpec, tokens: int | None) -> dict[str, float | None]:
    """The corpus as downloaded with its rows of tokens; and, while the last stage trains, its checkpoints with one more
    being written, and every stage's weights."""
    per_token = 2 if spec.vocab_size <= 1 << 16 else 4
    characters = _characters(config, tokens) if tokens else None
    data = None
    if characters is not None:
        downloaded = BYTES_PER_CHARACTER * characters if config.data.corpus in CORPORA else 0.0
        data = (downloaded + per_token * characters / characters_per_token(config.tokenizer.source)) / GB
    weights = 4 * spec.padded_parameters
    rest = spec.padded_parameters - spec.matrix_parameters
    state = 4 * spec.matrix_parameters + 8 * rest if config.base.optimizer == "muon" else 2 * weights
    stages: list[TrainConfig | RLConfig] = [config.base, config.mid, config.sft]
    stages += [config.rl] if config.with_rl else []
    kept = 1 + max(s.keep_last + (1 if s.keep_best else 0) for s in stages)
    finished = 4 if config.with_rl else 3
    return {"data": data, "checkpoints": (kept * (weights + state) + finished * weights) / GB}


def _notes(
    config: Config,
    spec: ModelSpec,
    gpus: Gpus | None,
    layout: Layout,
    achieved: Rate | None,
    tokens: int | None,
    available: float | None,
) -> Iterable[str]:
    """What a person should know before the run."""
    named = CORPORA.get(config.data.corpus)
    shards = _shards(config, tokens)
    if named and shards and tokens and shards > named.shards:
        there = named.shards * named.characters / characters_per_token(config.tokenizer.source)
        yield (
            f"{shards:,} shards hold {tokens:,} tokens, {config.data.corpus} has {named.shards:,}: "
            f"{shards / named.shards:.2f} epochs; one is {there / GB:,.1f} B tokens, "
            f"{math.floor(10 * there / spec.parameters) / 10:g} a parameter (base.target_ratio)"
        )
    given = config.data.shards if _enough_shards(config, tokens) is None else None
    if named and shards and given and given < min(shards, named.shards):
        yield f"data.shards = {given:,} of {shards:,}: {shards / given:.2f} epochs"
    if gpus is None:
        return
    if achieved is None:
        what = f"the speed of {gpus.name} in fp32" if gpus.hardware else "a CPU's speed"
        yield f"{what} is not known: measure it with `fathom probe --json FILE` and add --calibrate FILE"
    elif achieved and achieved.source.startswith("assumed"):
        yield f"the speed is {achieved.source}; `fathom probe` measures it"
    if gpus.hardware and layout.precision == "fp8" and gpus.hardware.fp8_flops is None:
        yield f"{gpus.hardware.name} has no fp8 units: set base.precision=bf16"
    if layout.checkpointing != "none" and available is not None:
        rows = layout.device_batch_size * layout.grad_accum_steps
        for n in (n for n in range(layout.device_batch_size, 0, -1) if rows % n == 0):
            other = replace(layout, device_batch_size=n, grad_accum_steps=rows // n, checkpointing="none")
            if n * spec.sequence_len >= FULL_MICRO_BATCH and memory(spec, other).total <= available:
                yield (
                    f"checkpointing {layout.checkpointing} computes {RECOMPUTED[layout.checkpointing] - 1:.0%} more; "
                    f"without it, device_batch_size {n} fits"
                )
                break


# --- the command ---


def overview(numbers: dict[str, Any]) -> str:
    """A plan for people: groups of lines, without what is not known."""
    n, parameters, m = numbers, numbers["parameters"], numbers["memory_gb"]
    steps = f"{n['steps']:,} of" if n["steps"] else "of"
    total_flops = f", {n['total_flops']:.3g} in all" if n["total_flops"] else ""
    there = "" if n["fits"] is None else f" of {m['available']:,.1f}: {'fits' if n['fits'] else 'DOES NOT FIT'}"
    moments = {"backward": "in the backward pass", "optimizer": "in the optimizer's step", "sampling": "while sampling"}
    share = f", MFU {n['mfu']:.0%}" if n["mfu"] else ""
    hours = {k: _short(h) for k, h in n["hours"].items() if h is not None}
    rl, missing = n["rl"], "a speed" if n["gpus"] else "--gpus"
    groups: dict[str, dict[str, str | None]] = {
        f"model {n['name']}": {
            "parameters": f"{parameters['total']:,}",
            "of these": f"{parameters['matrices']:,} in matrices, {parameters['embedding']:,} in embedding and head",
            "FLOPs": f"{n['flops_per_token']:,} a token{total_flops}",
            "expected loss": n["expected_loss"] and f"{n['expected_loss']:.3f} nats a token, by {n['law']}'s law",
        },
        "training": {
            "tokens": n["tokens"] and f"{n['tokens']:,}",
            "steps": f"{steps} {n['total_batch_size']:,} tokens",
            "devices": f"{n['gpus'] or 'not given'}, {n['workers']} worker(s)",
            "micro-batches": f"{n['grad_accum_steps']} a step, of {n['device_batch_size']} rows",
            "laid out": f"{n['parallel']}, checkpointing {n['checkpointing']}",
            "why": n["why"],
            "run with": n["set"] and " ".join(f"--set {setting}" for setting in n["set"]),
        },
        "memory of a device, GB": {
            "total": f"{m['total']:,.1f}{there}",
            "of these": ", ".join(f"{k} {_short(v)}" for k, v in m.items() if k not in ("total", "available")),
            "most is used": f"in {n['memory_stage']}, {moments[n['memory_peak']]}",
        },
        "time and money": {
            "speed": n["tokens_per_second"] and f"{n['tokens_per_second']:,.0f} tokens/s{share}: {n['mfu_source']}",
            "hours": ", ".join(f"{k} {h}" for k, h in hours.items()) or f"not known without {missing}",
            "step of RL": rl and ", ".join(f"{k} {rl[k + '_seconds']:.1f} s" for k in ("rollout", "learner", "sync")),
            "hours of RL": rl and f"{_short(rl['hours'])} for {rl['steps']:,} steps; with " + ", ".join(
                f"{change} {_short(h)}" for change, h in rl["hours_with"].items()
            ),
            "cost": n["cost_usd"] and f"${n['cost_usd']:,.2f} at ${n['usd_per_gpu_hour']:g} a GPU-hour",
        },
        "data": {
            "shards": n["shards"] and f"{n['shards']:,} hold the tokens",
            "ingest": n["ingest_core_hours"] and f"{_short(n['ingest_core_hours'])} hours of a CPU core",
            "disk, GB": ", ".join(f"{k} {_short(v)}" for k, v in n["disk_gb"].items() if v is not None),
        },
    }  # fmt: skip
    lines = []
    for group, rows in groups.items():
        lines += [group, *(f"  {name:<14} {value}" for name, value in rows.items() if value)]
    return "\n".join([*lines, *(f"! {warning}" for warning in n["warnings"])])


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def default_gpus(config: Config) -> Gpus | None:
    """Those that the preset is made for, as many as the configuration has workers."""
    about = preset_about(config.preset) if config.preset else None
    gpus = parse_gpus(about.gpus) if about and about.gpus else None
    return replace(gpus, count=config.workers[1]) if gpus and gpus.hardware else gpus


def outlook(config: Config, stages: Collection[str]) -> str:
    """The overview for the stages still to do, on the devices of the preset where it names some."""
    about = preset_about(config.preset) if config.preset else None
    price = about.usd_per_gpu_hour if about else None
    numbers = plan(config, default_gpus(config), price, fixed=CHOSEN)  # nothing to choose
    numbers["warnings"] += proportions(config, stages, numbers["tokens"])
    return overview(_of_stages(numbers, stages))


def _of_stages(numbers: dict[str, Any], stages: Collection[str]) -> dict[str, Any]:
    """The plan with hours and cost of these stages alone."""
    wanted = {name.partition("_")[0] for name in stages}
    hours = {k: h for k, h in numbers["hours"].items() if k in wanted}
    known = [h for h in hours.values() if h is not None]
    whole = numbers["hours"]["total"]
    total = sum(known) if whole is not None else None
    if total is not None and whole and numbers["cost_usd"] is not None:
        numbers["cost_usd"] *= total / whole
    return numbers | {"hours": hours | {"total": total}}


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", help="COUNTxNAME such as 8xH100, 1xA100-40, 8xB200:187.5GB, or cpu (default: the preset's)"
    )
    parser.add_argument("--usd-per-gpu-hour", type=float, help="price of one device an hour (default: the preset's)")
    parser.add_argument(
        "--hours", type=float, help="without --depth: the deepest model for a whole run of this; with it, base's hours"
    )
    parser.add_argument("--budget-usd", type=float, help="the same for these dollars, with --usd-per-gpu-hour")
    parser.add_argument("--mfu", type=float, help="share of the dense bf16 peak achieved, such as 0.48")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", action="append", help="take the speed from measurements; repeatable"
    )
    parser.add_argument("--law", choices=sorted(LAWS), default="hoffmann", help="scaling law of the expected loss")
    parser.add_argument("--flops", type=float, help="list the shapes of --family with the lowest loss for these FLOPs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def plan_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """The plan of a parsed command line; raises ConfigError."""
    gpus = parse_gpus(args.gpus) if args.gpus is not None else None
    if gpus and gpus.hardware and args.workers is None:
        args.workers = str(gpus.count)
    price = args.usd_per_gpu_hour
    if None not in (price, args.usd_per_worker_hour) and price != args.usd_per_worker_hour:
        raise ConfigError("--usd-per-gpu-hour and --usd-per-worker-hour are the same price: give one of them")
    if price is None and args.preset and gpus is None:
        price = preset_about(args.preset).usd_per_gpu_hour
    if args.usd_per_worker_hour is None:
        args.usd_per_worker_hour = price
    check(args.usd_per_gpu_hour, args.mfu)
    if args.mfu is not None and args.calibrate:
        raise ConfigError("give one of --mfu and --calibrate: both say how fast a device is")
    config = config_from_args(args)
    gpus = gpus or default_gpus(config)
    if gpus is None and (args.mfu is not None or args.calibrate):
        raise ConfigError("--mfu and --calibrate are of devices: add --gpus, such as 8xH100")
    calibration = read_calibration(args.calibrate, gpus) if args.calibrate and gpus else None
    first = f"{first_trained(config)}."
    fixed = {text.partition("=")[0].strip().removeprefix(first) for text in args.set if text.startswith(first)}
    numbers = plan(config, gpus, price, args.mfu, calibration, args.law, fixed)
    chosen = select(stage_names(config), args.only, args.first, args.until, ())
    check_mixtures(config, chosen)
    check_inputs(config, chosen)
    numbers["warnings"] += proportions(config, chosen, numbers["tokens"])
    return numbers if chosen == stage_names(config) else _of_stages(numbers, chosen)


def main(argv: list[str] | None = None) -> int:
    from pipeline import inverse

    parser = Parser(prog="fathom plan", description=__doc__, conflict_handler="resolve")
    add_config_flags(parser)
    parser.add_argument("--family", choices=inverse.FAMILIES, help="architecture (llama2 and llama3: with --flops)")
    add_stage_flags(parser)
    add_plan_flags(parser)
    args = parser.parse_args(argv)
    try:
        if args.flops is not None:
            used = {"flops", "family", "law", "json"}
            if others := [k for k, v in vars(args).items() if k not in used and v != parser.get_default(k)]:
                flag = {"first": "from"}.get(others[0], others[0]).replace("_", "-")
                raise ConfigError(f"--flops looks for shapes, whatever the hardware: give it without --{flag}")
            rows = inverse.shapes_for(args.flops, args.family or "depth", args.law)
            print(json.dumps({"shapes": rows}, indent=1) if args.json else inverse.shapes_table(rows, args.flops))
            return 0
        numbers = inverse.deepest(args) if inverse.wanted(args) else plan_from_args(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(numbers, indent=1))
    elif numbers["fits"] is not False:
        say(Terminal(), overview(numbers))
        if "neighbours" in numbers:
            say(Terminal(), inverse.neighbours_table(numbers))
    else:
        print(f"error: {next(w for w in numbers['warnings'] if w.startswith('does not fit'))}", file=sys.stderr)
    return 1 if numbers["fits"] is False else 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["plan", *sys.argv[1:]]))
