"""Learning rate as a function of progress."""

from __future__ import annotations


def lr_multiplier(step: int, steps: int, warmup_ratio: float, warmdown_ratio: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear warm-up, constant, linear decay to zero.

    The first step of a warm-up of n steps has 1/n, the last step of a decay over n steps has 1/n.
    """
    warmup, warmdown = round(warmup_ratio * steps), round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps - warmdown:
        return (steps - step) / warmdown
    return 1.0
