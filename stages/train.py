"""The base, mid and sft stages: the one training loop on Ray Train workers, each from where the stage before ended."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.resources import Devices
from corpus.rows import Rows
from corpus.tokenizers import Tokenizer
from models.hf import from_pretrained
from models.nanochat import NanoChat
from models.spec import ModelSpec
from stages.config import BaseConfig, TuneConfig
from stages.context import StageContext
from stages.evaluate import bits_per_byte
from stages.training.launch import launch
from stages.training.loop import train
from stages.training.metrics import Reporter
from stages.training.parallel import World
from stages.training.state import Checkpoints, publish_model

WEIGHTS_FROM = {"base": None, "mid": "base", "sft": "mid"}


def run(
    context: StageContext,
    config: BaseConfig | TuneConfig,
    depth: int,
    sequence_len: int,
    seed: int,
    workers: int,
    devices: Devices,
) -> None:
    arguments = {
        "context": context,
        "config": config,
        "depth": depth,
        "sequence_len": sequence_len,
        "seed": seed,
        "workers": workers,
        "devices": devices,
    }
    launch(work, arguments, context, workers, devices)


def work(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker does."""
    context: StageContext = arguments["context"]
    config: BaseConfig | TuneConfig = arguments["config"]
    devices: Devices = arguments["devices"]
    seed: int = arguments["seed"]
    world = World.current(devices.threads(arguments["workers"]))
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    rows = Rows(context.fetch("ingest", f"{context.stage}/train"))
    held_out = Rows(context.fetch("ingest", f"{context.stage}/val"))
    model = initial_model(context, arguments["depth"], arguments["sequence_len"], tokenizer.vocab_size, seed)
    steps = config.steps if isinstance(config, BaseConfig) else config.steps or steps_of_epochs(config, rows)
    assert steps is not None

    def validate(model: NanoChat) -> dict[str, float]:
        args = (world, config.precision, config.eval_rows)
        return {"val_bpb": bits_per_byte(model, held_out, tokenizer.token_bytes, *args)}

    reporter = Reporter(context.storage, steps, quiet=world.rank > 0)
    with context.scratch() as scratch:
        checkpoints = Checkpoints(context, world, scratch, reporter, config.keep_last)
        train(model, rows, config, steps, seed, world, checkpoints, reporter, validate)
        reporter.close()
        if world.rank == 0:
            publish_model(context, model, tokenizer, reporter, scratch / "artifact")
        world.barrier()


def initial_model(context: StageContext, depth: int, sequence_len: int, vocab_size: int, seed: int) -> NanoChat:
    """New weights for base, those of the stage before for mid and sft."""
    source = WEIGHTS_FROM[context.stage]
    if source:
        return from_pretrained(context.fetch(source))
    model = NanoChat(ModelSpec.from_depth(depth, vocab_size, sequence_len))
    model.init_weights(seed)
    return model


def steps_of_epochs(config: TuneConfig, rows: Rows) -> int:
    """Optimizer steps of `config.epochs` passes over the rows, at least one."""
    assert config.total_batch_size is not None
    return max(1, int(config.epochs * np.int64(rows.num_rows) * (rows.row_len - 1) // config.total_batch_size))
