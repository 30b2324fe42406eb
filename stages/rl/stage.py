"""The RL stage: from an SFT model and problems to a policy, on Ray Train workers with rollout actors beside them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cluster.resources import Devices
from corpus.tokenizers import Tokenizer
from models.hf import from_pretrained
from stages import report
from stages.config import RLConfig
from stages.context import StageContext
from stages.evaluate import opened, with_room
from stages.rl.loop import reinforce
from stages.rl.rollout import RolloutPool, choose
from stages.training.launch import launch
from stages.training.metrics import Reporter
from stages.training.parallel import World, initial_device
from stages.training.state import Checkpoints, publish_model, scratch_bytes


def run(context: StageContext, config: RLConfig, seed: int, workers: tuple[int, int], devices: Devices) -> None:
    arguments = {"context": context, "config": config, "seed": seed, "devices": devices}
    launch(work, arguments, context, workers, devices)


def work(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker does."""
    context: StageContext = arguments["context"]
    config: RLConfig = arguments["config"]
    devices: Devices = arguments["devices"]
    world = World.current(devices.cpus)
    torch.set_num_threads(world.threads)
    source = context.fetch("sft")
    tokenizer = Tokenizer.load(source)
    begun_with = functools.partial(from_pretrained, source, device=initial_device(config, world))
    model = begun_with()
    reporter = Reporter(context.storage, config.steps, quiet=world.rank > 0)
    engine, placement = choose(config.engine, config.placement, devices, world.size)
    with (
        context.scratch(scratch_bytes(model, world)) as scratch,
        opened(context, config.environment, config.environment_timeout) as environment,
        RolloutPool(
            functools.partial(context.fetch, "sft"),
            devices,
            config.actors or actors_for(config, placement, devices, world),
            engine=engine,
            placement=placement,
            tools=environment.tools,
            world=world,
            timeout=config.call_timeout,
            health_timeout=config.health_timeout,
            say=reporter.note,
        ) as pool,
    ):
        fitting = functools.partial(
            with_room, environment, tokenizer=tokenizer, sequence_len=model.spec.sequence_len, say=reporter.note
        )
        problems, held_out = fitting(environment.problems("train")), environment.problems("test")
        if config.eval_every:
            held_out = fitting(held_out[: config.evaluation.problems])
        steps = reporter.steps = config.steps or max(1, len(problems) // config.prompts_per_step)
        checkpoints = Checkpoints(context, world, scratch, reporter, config.keep_last)
        task = (environment, problems, held_out, config, steps, arguments["seed"])
        reinforce(model, begun_with, tokenizer, *task, world, pool, checkpoints, reporter)
        reporter.close()
        figures = {name: figure for record in reporter.records for name, figure in record.items()}  # the last of each
        page = functools.partial(report.plots, reporter.records, report.titled(context.run, context.stage, figures))
        publish_model(context, model, tokenizer, reporter, world, scratch, page)


def actors_for(config: RLConfig, placement: str, devices: Devices, world: World) -> int:
    """As many as the devices, or cores, that this rank's pool has to itself."""
    shared, cores, prompts = placement == "shared", world.threads, config.prompts_per_step
    if world.device.type == "cuda" and shared:
        return 1
    if world.device.type == "cuda":
        spare = devices.gpus - world.size
        if not 1 <= (asked := config.rollout_devices or spare) <= spare:
            raise ValueError(
                f"rl.placement=split: {world.size} of {devices.gpus} GPUs train, so {max(spare, 0)} could sample, not "
                f"{asked} (rl.rollout_devices): take fewer --workers, or rl.placement=shared"
            )
        return asked
    return max(1, min(cores, prompts // world.size) if shared else min(cores * world.size, prompts))
