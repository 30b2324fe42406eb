"""The mathematics of the RL stage.

Three policies meet in a step: the *sampler* drew the tokens, with its own kernels and, under overlap, the weights of a
step before; the *old* policy is the trainer's before the step's first update; the *present* one has the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """rewards (prompts, samples) → advantages of the same shape, each against the other samples of its prompt.

    "mean" and "dr_grpo": r - mean (Dr. GRPO, arXiv 2503.20783, which also has a denominator of its own: see
    `denominator`). "grpo": that over the group's deviation (arXiv 2402.03300, section 4.1.2).
    "rloo": r - the mean of the others (arXiv 2402.14740).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred * mixed(rewards)[:, None]  # a group that agrees has none at all, whatever rounding leaves
    if kind == "grpo":
        return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)
    if kind == "rloo":
        return centred * (rewards.size(1) / (rewards.size(1) - 1))
    return centred


def mixed(rewards: Tensor) -> Tensor:
    """Of rewards (prompts, samples), whether a prompt's (prompts,) differ: only such a group teaches anything."""
    return (rewards != rewards[:, :1]).any(dim=1)


def denominator(kind: str, tokens: Tensor, sequences: Tensor, max_new_tokens: int) -> Tensor:
    """What the summed loss of an update is divided by, from the sampled tokens and sequences of all ranks.

    The tokens (DAPO, arXiv 2503.14476, section 3.3): every token weighs the same, in whatever sequence and micro-batch.
    "dr_grpo": the tokens there could have been, so that a sequence's length changes no other's weight (arXiv
    2503.20783, section 3.2).
    """
    return (sequences * max_new_tokens if kind == "dr_grpo" else tokens).clamp(min=1)


def truncated_ratio(old: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """Importance ratio of each token between trainer and sampler, at most `cap`; 1 for a cap of 0.

    Both compute the same weights with other kernels, and their small differences bias the gradient (truncated
    importance sampling, https://fengyao.notion.site/off-policy-rl). It has no gradient itself.
    """
    return (old - sampler).detach().exp().clamp(max=cap) if cap else torch.ones_like(old)


def policy_loss(
    logprobs: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, kind: str, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(loss, clipped), both (B, T): a sampled token's loss, and whether the clip takes its gradient away.

    logprobs, old and mask are (B, T), advantage is (B,). A is the advantage, r = present / old.
    "reinforce": -A · log p (Williams 1992).
    "ppo_clip": -min(r · A, clip(r, 1 - low, 1 + high) · A) (arXiv 1707.06347, equation 7; high > low is the
    asymmetric clip of DAPO, arXiv 2503.14476, section 3.1).
    "gspo": the same of the sequence's ratio s = exp(mean of log r over its sampled tokens), in the token form
    sg[s] · p / sg[p], whose gradient is that of the sequence form where a sequence has one advantage (arXiv 2507.18071,
    equations 7 and 14); here it counts by its length, as every loss is summed over tokens.
    """
    a = advantage[:, None]
    if kind == "reinforce":
        return -a * logprobs, torch.zeros_like(mask, dtype=torch.bool)
    log_ratio = logprobs - old
    if kind == "gspo":
        mean = (log_ratio.detach() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * a, bounded * a), bounded * a < ratio * a


def kl_loss(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Each token's estimate of KL(policy ‖ reference), of the shape of its arguments, to be added to the loss.

    With d = log p - log q of a sampled token: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d
    (http://joschu.net/blog/kl-approx.html). The gradient of k1 as a loss is zero in the mean, whatever the reference;
    so k1 enters as in PPO, as a cost within the reward, with the gradient d · ∇log p. k2 has that gradient by itself,
    k3 (GRPO's) about it, for small d (arXiv 2510.01555).
    """
    d = logprobs - reference
    if kind == "k1":
        return d.detach() * (1 + logprobs - logprobs.detach())
    return d.square() / 2 if kind == "k2" else torch.expm1(-d) + d  # expm1: d is often below what 1 - exp(-d) resolves
