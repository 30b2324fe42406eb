"""The one training loop: base, mid and SFT differ in their rows, their settings and where their weights come from.

Nothing here knows of Ray: a process calls `train` with its place in the world. The rows of a step are a function of
(seed, step) and no random number is drawn, so the step is all that resuming needs besides weights and optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from corpus.rows import Rows
from models.layers import LanguageModel
from stages.config import TrainConfig
from stages.context import Stopped
from stages.training.batches import Batches
from stages.training.metrics import Reporter, Stopwatch, Work
from stages.training.optimizer import Optimizer, build_optimizer
from stages.training.parallel import World, autocast, is_sharded, prepare, synchronise_gradients
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints, Progress

FIRST_STEPS = 3  # steps after a start in which running out of memory makes the micro-batch smaller


def train(
    model: LanguageModel,
    rows: Rows,
    config: TrainConfig,
    schedule: Schedule,
    seed: int,
    world: World,
    checkpoints: Checkpoints,
    reporter: Reporter,
    validate: Callable[[LanguageModel], dict[str, float]],
    benchmark: tuple[int, Callable[[LanguageModel], dict[str, float]]] | None = None,
    speak: tuple[Callable[[int], bool], Callable[[LanguageModel], list[dict[str, str]]]] | None = None,
) -> None:
    """Trains `model` in place to the end of `schedule`, going on from the newest checkpoint.

    Validation runs before step 0, every `eval_every` steps and at the end, always after the save of the same step. Of
    the figures that `validate` gives, the first says which weights are best: those where it is lowest. A `benchmark` is
    measured every so many steps besides, after the save of that step, too. What the second of `speak` has the model say
    is kept, before each step that the first wants it of and after the last. Raises Stopped once `reporter.stop` is set,
    FloatingPointError after too many steps in a row that are not finite.
    """
    assert config.total_batch_size is not None
    torch.set_num_threads(world.threads)
    reporter.note(prepare(model, config, config.precision, world))
    model.z_loss = config.z_loss
    optimizer = build_optimizer(model, config, config.precision, world)
    progress = checkpoints.restore(model, optimizer)
    start = saved = progress.step
    ok = torch.tensor(True)  # whether the last step was finite
    batches = Batches(rows, seed, config.total_batch_size // (rows.row_len - 1), world)
    work = Work(config.total_batch_size, model.spec.flops_per_token, world)
    batch_size, step_seconds, saved_at = config.device_batch_size, 0.0, reporter.seconds
    save_seconds = 60 * config.save_minutes if config.save_minutes else math.inf
    while True:
        clock, step = Stopwatch(world.device), progress.step
        elapsed, unsaved, step_seconds, stop = world.agree(
            *((reporter.seconds, reporter.seconds - saved_at, step_seconds) if world.rank == 0 else (0.0, 0.0, 0.0)),
            reporter.stop,
        )
        reporter.look(world, elapsed)
        ending = bool(stop) or schedule.over(step, elapsed, step_seconds)
        evaluating = not ending and config.eval_every > 0 and step % config.eval_every == 0
        measuring = not ending and benchmark is not None and step > 0 and step % benchmark[0] == 0
        speaking = not ending and speak is not None and speak[0](step)
        due = ending or step % config.save_every == 0 or unsaved > save_seconds or (evaluating and config.keep_best)
        # after a step that was skipped a save that is only due can wait
        if step > saved and (due or measuring) and (ok or ending or (evaluating and config.keep_best)):
            checkpoints.save(progress, model, optimizer)
            saved, saved_at = step, reporter.seconds
            clock.mark("save")
        if ending:
            break
        if evaluating:
            figures = validated(model, validate, progress)
            reporter.log(step, **figures)
            checkpoints.best_step = progress.best_step
            if config.early_stopping and progress.evaluations_since_best >= config.early_stopping:
                best = f"early stopping: {next(iter(figures))} was lowest at step {progress.best_step}"
                reporter.note(best, "early stopping")
                break
            clock.mark("evaluate")
        if measuring and benchmark is not None:
            reporter.log(step, **benchmark[1](model))
            clock.mark("evaluate")
        if speaking and speak is not None:
            reporter.say(step, speak[1](model))
            clock.mark("evaluate")

        began = time.perf_counter()
        ids, weights = batches.read(step)
        clock.mark("data")
        careful = step < start + FIRST_STEPS
        while True:
            loss = accumulate_gradients(model, ids, weights, batch_size, config.precision, world, optimizer, careful)
            if loss is not None:
                break
            if batch_size == 1:
                raise torch.OutOfMemoryError(
                    "out of memory with one row at a time: set checkpointing=full or parallel=fsdp, or a smaller model"
                )
            batch_size = max(1, batch_size // 2)
            smaller = f"out of memory: device_batch_size is now {batch_size}, with more accumulation"
            reporter.note(smaller, "out of memory")
        clock.mark("forward_backward")
        optimizer.reduce()
        clock.mark("communication")
        multiplier = schedule.multiplier(step, elapsed, step_seconds)
        norm, ok = optimizer.step(multiplier, config.grad_clip)
        clock.mark("optimizer")
        progress.step += 1
        reporter.log_step(
            step, clock, work, loss=world.sum(loss), grad_norm=norm, skipped=~ok, lr_multiplier=multiplier
        )
        step_seconds = time.perf_counter() - began  # the record of the step before waited for the device
    checkpoints.wait()
    world.barrier()  # the first rank completes the checkpoint, and the first error of any ends them all
    if stop:
        raise Stopped(f"stopped as asked; everything up to step {progress.step} is saved")
    if progress.evaluated_step != progress.step:
        reporter.log(progress.step, **validated(model, validate, progress))
    if speak is not None:
        reporter.say(progress.step, speak[1](model))
    if config.keep_best and 0 <= progress.best_step != progress.step:
        kept = checkpoints.restore_best(progress, model)
        reporter.log(progress.step, best_step=kept)


def validated(
    model: LanguageModel, validate: Callable[[LanguageModel], dict[str, float]], progress: Progress
) -> dict[str, float]:
    """The figures of the model as it is, of which `progress` takes note of the first."""
    figures = validate(model)
    progress.evaluated(next(iter(figures.values())))
    return figures


def accumulate_gradients(
    model: LanguageModel,
    ids: Tensor,
    weights: Tensor,
    batch_size: int,
    precision: str,
    world: World,
    optimizer: Optimizer | None = None,
    careful: bool = False,
) -> Tensor | None:
    """Gradients of the mean loss over the whole step's targets; returns this rank's part of that mean, in nats.

    ids (rows, T+1) and weights (rows, T) are this rank's share, as long as every other rank's. The sum is divided by
    the weights of all micro-batches of all ranks, so neither their sizes nor the number of ranks changes the loss.

    When `careful`, running out of memory on any rank leaves no gradients on all and returns None; otherwise `optimizer`
    may reduce gradients before the pass has ended.
    """
    weights = weights / world.sum(weights.sum()).clamp(min=1)
    total = torch.zeros((), device=world.device)
    micro_batches = list(zip(ids.split(batch_size), weights.split(batch_size), strict=True))
    short = False
    try:
        for i, (batch, weight) in enumerate(micro_batches, start=1):
            last = i == len(micro_batches)
            synchronise_gradients(model, last)
            if last and optimizer and not careful:
                optimizer.overlap()
            torch.compiler.cudagraph_mark_step_begin()  # what earlier graphs gave is used up; nothing without graphs
            with autocast(world.device, precision):
                loss = model(batch[:, :-1], batch[:, 1:], weight)
            loss.backward()
            total += loss.detach()
    except RuntimeError as error:  # within FSDP's collectives, the others would wait for this rank for ever
        short = careful and not (world.size > 1 and is_sharded(model)) and out_of_memory(error)
        if not short:
            raise
    if careful and world.agree(short)[0]:
        assert optimizer
        optimizer.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    return total


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
