"""The one training loop: base, mid and SFT differ in their rows, their settings and where their weights come from.

Nothing here knows of Ray: a process calls `train` with its place in the world. The rows of a step are a function of
(seed, step) and no random number is drawn, so the step is all that resuming needs besides weights and optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from corpus.rows import Rows
from models.nanochat import NanoChat
from stages.config import TrainConfig
from stages.training.metrics import Reporter
from stages.training.optimizer import build_optimizers, set_learning_rates, step_optimizers
from stages.training.parallel import World, autocast
from stages.training.schedule import lr_multiplier
from stages.training.state import Checkpoints


def train(
    model: NanoChat,
    rows: Rows,
    config: TrainConfig,
    steps: int,
    seed: int,
    world: World,
    checkpoints: Checkpoints,
    reporter: Reporter,
    validate: Callable[[NanoChat], dict[str, float]],
) -> None:
    """Trains `model` in place for `steps` optimizer steps, going on from the newest checkpoint.

    Validation runs before step 0, every `eval_every` steps and at the end, always after the save of the same step.
    """
    torch.set_num_threads(world.threads)
    model.to(world.device)
    optimizers = build_optimizers(
        model,
        matrix_lr=config.matrix_lr * config.lr_scale,
        embedding_lr=config.embedding_lr * config.lr_scale,
        unembedding_lr=config.unembedding_lr * config.lr_scale,
        weight_decay=config.weight_decay,
    )
    start = checkpoints.restore(model, optimizers)
    assert config.total_batch_size is not None
    rows_per_step = config.total_batch_size // (rows.row_len - 1)
    for step in range(start, steps):
        if config.eval_every and step % config.eval_every == 0:
            reporter.log(step, **validate(model))
        began = time.perf_counter()
        multiplier = lr_multiplier(step, steps, config.warmup_ratio, config.warmdown_ratio)
        set_learning_rates(optimizers, multiplier)
        tokens, mask = rows.read(world.slice(rows.step_rows(seed, step, rows_per_step)))
        loss = accumulate_gradients(model, tokens, mask, config, world)
        grad_norm = step_optimizers(model, optimizers, config.grad_clip)
        seconds = time.perf_counter() - began
        reporter.log(
            step,
            loss=loss,
            grad_norm=grad_norm,
            lr_multiplier=multiplier,
            step_ms=seconds * 1e3,
            tokens_per_second=config.total_batch_size / seconds,
        )
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1, model, optimizers)
    checkpoints.wait()
    reporter.log(steps, **validate(model))


def accumulate_gradients(
    model: nn.Module, tokens: np.ndarray, mask: np.ndarray | None, config: TrainConfig, world: World
) -> Tensor:
    """Gradients of the mean loss over the whole step's targets; returns that mean, in nats.

    tokens (rows, T+1) and mask (rows, T+1) are this rank's share. The sum is divided by the number of targets of all
    micro-batches of all ranks, so neither their sizes nor the number of ranks changes the loss.
    """
    ids = torch.from_numpy(tokens).to(world.device, non_blocking=True)
    weights = torch.ones_like(ids[:, 1:]) if mask is None else torch.from_numpy(mask[:, 1:]).to(world.device)
    targets = world.sum(weights.sum()).clamp(min=1)
    total = torch.zeros((), device=world.device)
    size = config.device_batch_size
    for batch, weight in zip(ids.split(size), weights.split(size), strict=True):
        with autocast(world.device, config.precision):
            losses = model(batch[:, :-1], batch[:, 1:])
        loss = (losses * weight).sum() / targets
        loss.backward()
        total += loss.detach()
    world.sum_gradients(model)
    return world.sum(total)
