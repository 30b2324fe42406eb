"""What samples say of a model: estimates without bias, and how far they can be trusted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NORMAL_95 = 1.959964  # standard deviations that hold 95% of a normal distribution


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from `correct` of `samples` (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Unbiased estimate of maj@k: how often the most frequent answer of k samples is right (arXiv 2203.11171).

    The mean over all sets of k of the samples, counted and not drawn. A tie is decided by lot, None has no vote, and
    where nobody votes nothing is right. An answer that is right in some samples only counts by their share.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    silent, total = len(answers) - counts.total(), 0.0
    for answer, count in counts.items():
        correct = sum(r for a, r in zip(answers, right, strict=True) if a == answer)
        others = [c for a, c in counts.items() if a != answer]
        for votes in range(1, min(count, k) + 1) if correct else ():
            sets = math.comb(count, votes) * _won(votes, others, silent, k - votes)
            total += correct / count * sets
    return total / math.comb(len(answers), k)


def _won(votes: int, others: list[int], silent: int, rest: int) -> float:
    """The ways to take `rest` of the other samples so that `votes` win; with t others in a tie, 1 / (t + 1) each."""
    ways = {(0, 0): 1}  # (samples taken, answers with as many votes) → ways
    for count in others:
        more: Counter[tuple[int, int]] = Counter()
        for (taken, ties), so_far in ways.items():
            for n in range(min(count, votes, rest - taken) + 1):
                more[taken + n, ties + (n == votes)] += so_far * math.comb(count, n)
        ways = more
    return sum(w * math.comb(silent, rest - taken) / (ties + 1) for (taken, ties), w in ways.items())


def interval(mean: float, count: int) -> tuple[float, float]:
    """95% confidence interval of a mean over `count` problems of values from 0 to 1 (Wilson 1927, score interval).

    It is made for zeros and ones. Other values of the same mean vary less (Bhatia and Davis 2000), so for pass@k with
    many samples it is too wide rather than too narrow; and it has a width where all values agree.
    """
    z2 = NORMAL_95**2 / count
    centre = (mean + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_of_ratio(parts: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """95% confidence interval of the sum of the first numbers over the sum of the second, by how its independent parts
    differ (Cochran 1977, section 2.11, linearised); None for a single part, which says nothing of it."""
    count, below = len(parts), sum(b for _, b in parts)
    if count < 2 or not below:
        return None
    ratio = sum(a for a, _ in parts) / below
    squares = sum((a - ratio * b) ** 2 for a, b in parts)
    half = NORMAL_95 * math.sqrt(squares * count / (count - 1)) / below
    return ratio - half, ratio + half


def same_share(gained: int, lost: int) -> float:
    """How likely two equal models differ by at least as much on the same questions (McNemar 1947, the exact two-sided
    form): `gained` only the second answers right, `lost` only the first."""
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**differing)


def core_difference(tasks: Sequence[tuple[float, Sequence[int]]]) -> tuple[float, float]:
    """How much higher the second of two models scores in a mean of centered accuracies, and how likely equal models
    differ by at least as much (the normal approximation of McNemar's test, summed over tasks). `tasks` has of each its
    baseline, from 0 to 1, and for every question that both were asked 1, -1 or 0: answered by the second alone, by the
    first alone, or alike."""
    weights = [1 / ((1 - baseline) * len(signs)) for baseline, signs in tasks]
    total = sum(weight * sum(signs) for weight, (_, signs) in zip(weights, tasks, strict=True))
    variance = sum(weight**2 * sum(map(abs, signs)) for weight, (_, signs) in zip(weights, tasks, strict=True))
    return total / len(tasks), math.erfc(abs(total) / math.sqrt(2 * variance)) if variance else 1.0


def interval_of_core(tasks: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """95% confidence interval of a mean of centered accuracies, by normal approximation: each of `tasks` has its
    `accuracy`, `baseline` (0 to 1) and number of `examples`."""
    mean = sum((t["accuracy"] - t["baseline"]) / (1 - t["baseline"]) for t in tasks) / len(tasks)
    errors = (t["accuracy"] * (1 - t["accuracy"]) / t["examples"] / (1 - t["baseline"]) ** 2 for t in tasks)
    half = NORMAL_95 * math.sqrt(sum(errors)) / len(tasks)
    return mean - half, mean + half


def paired(before: Mapping[Any, bool], after: Mapping[Any, bool]) -> tuple[float, float] | None:
    """How far the second of two models is from the first in the share of questions it answers right, and p of
    `same_share`; of the questions that both were asked, None where there are none."""
    asked = before.keys() & after.keys()
    if not asked:
        return None
    gained = sum(after[question] and not before[question] for question in asked)
    lost = sum(before[question] and not after[question] for question in asked)
    return (gained - lost) / len(asked), same_share(gained, lost)
