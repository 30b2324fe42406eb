"""The base, mid and sft stages: the one training loop on Ray Train workers, each from where the stage before ended."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cluster.resources import Devices
from corpus.rows import Rows
from corpus.tokenizers import Tokenizer
from models.build import build
from models.hf import from_pretrained
from models.layers import LanguageModel
from stages.config import BaseConfig, ModelConfig, TuneConfig, base_hours
from stages.context import StageContext
from stages.evaluate import VALIDATED, bits_per_byte
from stages.evaluation.on_the_way import CoreOnTheWay
from stages.evaluation.spoken import Speaker
from stages.growing import open_rows, wait_until_made
from stages.training.launch import launch
from stages.training.loop import train
from stages.training.metrics import Reporter
from stages.training.parallel import World, initial_device
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints, publish_model, scratch_bytes

MODELS = ("mid", "base")  # the stages that another may begin with the weights of


def run(
    context: StageContext,
    config: BaseConfig | TuneConfig,
    shape: ModelConfig,
    seed: int,
    workers: tuple[int, int],
    devices: Devices,
    eval_data: str | None = None,
) -> None:
    """Trains on between `workers[0]` and `workers[1]` workers, with half the device batch when memory runs out.

    `eval_data` is the CORE bundle that base is asked on the way, where `core_every` says so."""
    arguments = {"context": context, "shape": shape, "seed": seed, "devices": devices, "eval_data": eval_data}
    while True:
        try:
            launch(work, arguments | {"config": config}, context, workers, devices)
            return
        except torch.OutOfMemoryError as error:  # where the loop could not go on by itself
            if config.device_batch_size == 1:
                raise
            config = config.model_copy(update={"device_batch_size": config.device_batch_size // 2})
            smaller = f"{error}; starting again with device_batch_size {config.device_batch_size}"
            context.note(smaller, "out of memory")


def work(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker does."""
    context: StageContext = arguments["context"]
    config: BaseConfig | TuneConfig = arguments["config"]
    seed: int = arguments["seed"]
    world = World.current(arguments["devices"].cpus)
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    rows, held_out = (
        open_rows(context, f"{context.stage}/{split}", tokenizer.vocab_size) for split in ("train", "val")
    )
    device = initial_device(config, world)
    model = initial_model(context, arguments["shape"], tokenizer.vocab_size, seed, device)
    schedule = schedule_of(config, rows, world)

    def validate(model: LanguageModel) -> dict[str, float]:
        size, limit = config.device_batch_size, config.eval_rows
        figures = bits_per_byte(model, held_out, tokenizer.token_bytes, world, config.precision, limit, size)
        return dict(zip(VALIDATED[context.stage], figures, strict=False))

    benchmark = None
    if isinstance(config, BaseConfig) and config.core_every:
        assert arguments["eval_data"] is not None  # else the configuration was refused
        asked = CoreOnTheWay(
            arguments["eval_data"], config.core_examples, tokenizer, model.spec, world, config.precision
        )
        benchmark = (config.core_every, asked)
    speaker = Speaker(tokenizer, model.spec, world, config.precision, chat=context.stage != "base")
    silent = isinstance(config, BaseConfig) and not config.sample_every
    speak = None if silent else (functools.partial(speaks, config), speaker)
    reporter = Reporter(context.storage, schedule.steps, world.rank > 0, schedule.seconds, config.max_skipped)
    if benchmark is not None and (left_out := benchmark[1].left_out):
        reporter.note(f"CORE on the way is without {', '.join(left_out)}, whose answers do not fit into the context")
    with context.scratch(scratch_bytes(model, world)) as scratch:
        checkpoints = Checkpoints(context, world, scratch, reporter, config.keep_last)
        train(model, rows, config, schedule, seed, world, checkpoints, reporter, validate, benchmark, speak)
        reporter.close()
        wait_until_made(context)
        publish_model(context, model, tokenizer, reporter, world, scratch)


def speaks(config: BaseConfig | TuneConfig, step: int) -> bool:
    """Whether what the model says is kept before this step: in mid and sft at every validation, in base from time to
    time, and never of weights that have not learned anything."""
    if isinstance(config, BaseConfig):
        return step > 0 and step % config.sample_every == 0
    return config.eval_every > 0 and step % config.eval_every == 0


def initial_model(
    context: StageContext, shape: ModelConfig, vocab_size: int, seed: int, device: str = "cpu"
) -> LanguageModel:
    """New weights for base, those of the stage before for mid and sft; on the "meta" device these are its source."""
    source = next((stage for stage in MODELS if stage in context.upstream), None)
    if source is not None:
        return from_pretrained(context.fetch(source), device=device)
    model = build(shape.spec(vocab_size), device)
    if device == "meta":
        model.source = functools.partial(LanguageModel.initial_weights, seed=seed)
    else:
        model.init_weights(seed)
    return model


def schedule_of(config: BaseConfig | TuneConfig, rows: Rows, world: World) -> Schedule:
    """How long to train: base by what its budget was made into, mid and sft for `epochs` unless `steps` is set."""
    assert config.total_batch_size is not None and config.schedule is not None
    steps, hours = config.steps, None
    if isinstance(config, TuneConfig):
        epoch = rows.num_rows * (rows.row_len - 1)
        steps = steps or max(1, int(config.epochs * epoch // config.total_batch_size))
    else:
        hours = base_hours(config, world.size)
    return Schedule(
        steps,
        3600 * hours if hours is not None else None,
        config.schedule,
        config.warmup_ratio,
        config.warmup_steps,
        config.warmdown_ratio,
        config.final_lr_ratio,
    )
