"""Arithmetic word problems from templates: no download, and train and test share no (template, operands)."""

from __future__ import annotations

from corpus.synthetic import Split, problems
from tasks.base import NumberProblems, Problem


class Arithmetic(NumberProblems):
    def __init__(self, train_count: int = 40_000, test_count: int = 1_000, seed: int = 0) -> None:
        self._counts = {"train": train_count, "test": test_count}
        self._seed = seed

    def problems(self, split: Split) -> list[Problem]:
        """The problems of "train" or "test", the same for the same seed."""
        return [Problem(**row) for row in problems(split, self._counts[split], self._seed)]
