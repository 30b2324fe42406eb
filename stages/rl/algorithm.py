"""The mathematics of the RL stage."""

from __future__ import annotations

from torch import Tensor


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """rewards (prompts, samples) → advantages of the same shape, each against the other samples of its prompt.

    "mean": r - mean (Dr. GRPO, arXiv 2503.20783). "grpo": that over the group's deviation (arXiv 2402.03300).
    "rloo": r - the mean of the others (arXiv 2402.14740).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "grpo":
        return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)
    if kind == "rloo":
        return centred * (rewards.size(1) / (rewards.size(1) - 1))
    return centred


def policy_loss(logprobs: Tensor, sampler_logprobs: Tensor, advantage: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Summed policy-gradient loss of sampled tokens; divide it by the number of tokens of the whole step.

    logprobs, sampler_logprobs and mask are (B, T), advantage is (B,). Each token is weighted by the importance ratio
    between trainer and sampler, truncated at `cap` (TIS, https://fengyao.notion.site/off-policy-rl): the two compute
    the same weights with other kernels, and their small differences bias the gradient.
    """
    ratio = (logprobs.detach() - sampler_logprobs).exp().clamp(max=cap)
    return -(ratio * advantage[:, None] * logprobs * mask).sum()


def group_statistics(rewards: Tensor) -> dict[str, float]:
    """Of rewards (prompts, samples): their mean, and the share of prompts solved by some samples but not by all."""
    mixed = (rewards != rewards[:, :1]).any(dim=1)
    return {"reward": rewards.mean().item(), "mixed_groups": mixed.float().mean().item()}
