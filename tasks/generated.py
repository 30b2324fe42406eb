"""Tasks that are answered in writing and graded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tasks.base import Environment


@dataclass(frozen=True)
class GeneratedTask:
    """The held-out problems of an environment, each answered once and greedily; a "reward" of 1 is right. `baseline`
    is what guessing scores, from 0 to 1, `max_new_tokens` the longest answer, results of tools included."""

    name: str
    environment: Environment
    max_new_tokens: int = 256
    baseline: float = 0.0
    few_shot: int = 0

    @property
    def stamp(self) -> str:
        """Changes with what is asked."""
        problems = self.environment.problems("test")
        return hashlib.sha256(repr([self.max_new_tokens, problems]).encode("utf-8", "replace")).hexdigest()
