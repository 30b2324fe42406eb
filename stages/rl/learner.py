"""The policy's gradient steps on a batch of completions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.generate import Completion
from models.layers import LanguageModel
from stages.config import RLConfig
from stages.rl.algorithm import denominator, kl_loss, policy_loss, truncated_ratio
from stages.training.optimizer import Optimizer
from stages.training.parallel import World, autocast, is_sharded, synchronise_gradients


def collate(prompts: list[list[int]], completions: list[Completion], device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors (B, T+1) of ids, and (B, T) of the mask and sampler logprobs of the token that follows."""
    lengths = [len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)]
    ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
    mask, logprobs = np.zeros(ids.shape, dtype=np.float32), np.zeros(ids.shape, dtype=np.float32)
    for row, (prompt, completion, length) in enumerate(zip(prompts, completions, lengths, strict=True)):
        ids[row, :length] = prompt + completion.tokens
        mask[row, len(prompt) : length] = completion.sampled
        logprobs[row, len(prompt) : length] = completion.logprobs
    arrays = {"ids": ids, "mask": mask[:, 1:], "sampler_logprobs": logprobs[:, 1:]}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def micro_batches(
    prompts: list[list[int]],
    completions: list[Completion],
    advantage: Tensor,
    chosen: list[int],
    size: int,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """The `chosen` sequences and their advantages, `size` at a time; neighbours in length share a micro-batch, which
    saves padding."""
    order = sorted(chosen, key=lambda i: len(prompts[i]) + len(completions[i].tokens))
    return [
        collate([prompts[i] for i in chunk], [completions[i] for i in chunk], device)
        | {"advantage": advantage[chunk].to(device)}
        for chunk in (order[i : i + size] for i in range(0, len(order), size))
    ]


def padded(batches: list[dict[str, Tensor]], most: int, model: LanguageModel, world: World) -> list[dict[str, Tensor]]:
    """`most` micro-batches where the model is sharded, as every rank must run it equally often; a pass over no sampled
    token adds nothing."""
    if not is_sharded(model):
        return batches
    idle = micro_batches([[0, 0]], [Completion()], torch.zeros(1), [0], 1, world.device)
    return batches + idle * (most - len(batches))


def logprobs_of(policy: LanguageModel, batch: dict[str, Tensor], world: World) -> Tensor:
    """(B, T), and 0 for what was not sampled, like the sampler's: there, all ratios are 1."""
    with autocast(world.device, learner_precision(world)):
        return -policy(batch["ids"][:, :-1], batch["ids"][:, 1:]) * batch["mask"]


@torch.no_grad()
def divergence(
    reference: LanguageModel, prompts: list[list[int]], groups: list[list[Completion]], size: int, world: World
) -> float:
    """KL(policy ‖ reference), in nats a token, of the policy that sampled a group of completions for each prompt: the
    k3 estimate over the sampled tokens of all ranks, `size` sequences at a time; 0 where there are none."""
    sequences = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    completions = [c for group in groups for c in group]
    chosen = [i for i, c in enumerate(completions) if any(c.sampled)]
    batches = micro_batches(sequences, completions, torch.zeros(len(sequences)), chosen, size, world.device)
    [most] = world.agree(len(batches))
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in padded(batches, int(most), reference, world):
        apart = kl_loss(batch["sampler_logprobs"], logprobs_of(reference, batch, world), "k3")
        totals += torch.stack((apart.double().sum(), batch["mask"].double().sum()))
    nats, tokens = world.sum(totals).tolist()
    return nats / max(1.0, tokens)


def update(
    model: LanguageModel,
    optimizer: Optimizer,
    prompts: list[list[int]],
    completions: list[Completion],
    advantage: Tensor,
    config: RLConfig,
    multiplier: float,
    world: World,
    reference: LanguageModel | None = None,
) -> dict[str, float]:
    """`updates_per_step` optimizer steps on this rank's sequences (prompt and completion i belong together, advantage
    is (B,)), each on its part of them, at `multiplier` times the learning rates. Returns the metrics of all ranks.

    The loss is a sum over sampled tokens, divided by a number that is the whole update's, over all ranks: the size of a
    micro-batch changes nothing. Sequences without a gradient are not computed; with `mask_overlong` those cut off do
    not count at all (DAPO, arXiv 2503.14476, section 3.4). FloatingPointError where the gradient is not finite.
    """
    kept = [i for i, c in enumerate(completions) if c.finished or not config.mask_overlong]
    updates, size, advantages = config.updates_per_step, config.device_batch_size, advantage.tolist()
    before = int(world.gather(torch.tensor([len(kept)]))[: world.rank].sum())  # a part is the same for any world
    parts = [[i for place, i in enumerate(kept, start=before) if place % updates == u] for u in range(updates)]

    def taught(part: list[int]) -> list[int]:
        return [i for i in part if any(completions[i].sampled) and (config.kl_coefficient or advantages[i])]

    batches = [micro_batches(prompts, completions, advantage, taught(part), size, world.device) for part in parts]
    most = [int(n) for n in world.agree(*map(len, batches))]
    batches = [padded(batch, n, model, world) for batch, n in zip(batches, most, strict=True)]
    counts = [[sum(sum(completions[i].sampled) for i in part), len(part)] for part in parts]
    divisors = [
        denominator(config.advantage, tokens, sequences, config.max_new_tokens)
        for tokens, sequences in world.sum(torch.tensor(counts, dtype=torch.float32, device=world.device))
    ]

    if updates > 1:
        with torch.no_grad():
            for batch in (batch for of_update in batches for batch in of_update):
                batch["old"] = logprobs_of(model, batch, world)
    clip = config.loss, config.clip_low, config.clip_high
    sums, worst = torch.zeros(6, device=world.device), torch.zeros(2, device=world.device)
    norms = []
    for of_update, passes, divisor in zip(batches, most, divisors, strict=True):
        if passes == 0:  # every group was solved by all of its samples or by none
            continue
        for i, batch in enumerate(of_update, start=1):
            synchronise_gradients(model, i == len(of_update))
            logprobs = logprobs_of(model, batch, world)
            sampler, mask, present = batch["sampler_logprobs"], batch["mask"], logprobs.detach()
            old = batch.get("old", present)
            loss, clipped = policy_loss(logprobs, old, batch["advantage"], mask, *clip)
            kl = torch.zeros_like(present)
            if reference is not None:
                with torch.no_grad():
                    wanted = logprobs_of(reference, batch, world)
                kl = kl_loss(logprobs, wanted, config.kl_estimator)
            # what has no old policy of its own is corrected for all that the policy has moved since it was sampled
            weight = truncated_ratio(present if config.loss == "reinforce" else old, sampler, config.ratio_cap)
            ((weight * (loss + config.kl_coefficient * kl) * mask).sum() / divisor).backward()
            moved = old - sampler
            ratio = moved.exp() * mask
            figures = (mask, moved.abs(), ratio, kl_loss(sampler, old, "k3"), clipped * mask, kl.detach())
            sums += torch.stack([figure.sum() for figure in figures])
            worst = worst.maximum(torch.stack((moved.abs().max(), ratio.max())))
        optimizer.reduce()
        norm, ok = optimizer.step(multiplier, config.grad_clip)
        if not ok:
            raise FloatingPointError("the policy's gradient is not finite: lower rl.lr_scale and --force rl")
        norms.append(norm.item())
    trained, *means = world.sum(sums).tolist()
    metrics = {"grad_norm": sum(norms) / max(1, len(norms)), "trained_tokens": trained}
    if trained:
        names = ["logprob_difference", "ratio_mean", "kl_sampler", "clip_share"]
        names += ["kl_penalty"] * (reference is not None)
        metrics |= {name: value / trained for name, value in zip(names, means, strict=False)}
        metrics["logprob_difference_max"], metrics["ratio_max"] = world.agree(*worst.tolist())
    return metrics


def learner_precision(world: World) -> str:
    """fp32 on CPUs, where the sampler computes in it too, so that their logprobs agree to 1e-5."""
    return "fp32" if world.device.type == "cpu" else "bf16"
