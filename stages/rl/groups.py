"""Where a step's completions come from: the order of the prompts, the rollout under way, and the grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from corpus.conversation import render_prompt
from corpus.tokenizers import Tokenizer
from models.generate import Completion
from stages.config import RLConfig
from stages.rl.algorithm import mixed
from stages.rl.rollout import Rollout, RolloutPool
from stages.training.metrics import Stopwatch
from stages.training.parallel import World
from tasks.base import Environment, Problem

TRAIN, SIGNAL = 0, 1  # what a completion is drawn for: part of its seed


class NoSignal(ValueError):
    """All samples earn the same, so there is nothing to reinforce."""


@dataclass
class Group:
    """The completions of one prompt; `grades` has the figures of the environment, each with a value a completion, and
    `answered` the rewards as they were before those of completions that were cut off were taken away."""

    prompt: list[int]
    completions: list[Completion]
    grades: dict[str, list[float]]
    answered: list[float]


def problems_at(count: int, seed: int, positions: Sequence[int]) -> list[int]:
    """Which of `count` problems is at each of these positions of an endless row of passes, every pass in an order of
    its own: a function of (seed, position)."""
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in {p // count for p in positions}}
    return [int(orders[p // count][p % count]) for p in positions]


def rewards_of(groups: list[Group], samples: int) -> Tensor:
    """(groups, samples), also of none."""
    return torch.tensor([group.grades["reward"] for group in groups]).view(-1, samples)


class Drawn(BaseModel):
    """What a rank keeps of `Groups` in a checkpoint: the cursor, and what it has sampled but not taken."""

    cursor: Annotated[int, Field(strict=True, ge=0)]
    pending: Annotated[bool, Field(strict=True)]
    positions: list[Annotated[int, Field(strict=True, ge=0)]]
    sampled: list[list[Completion]]


def check_drawn(states: list[Any], config: RLConfig, vocab_size: int) -> None:
    """Raises ValueError where `states` are not what all ranks have of `Groups` by the end of a step."""
    ranks = [Drawn.model_validate(state) for state in states]
    if len({(rank.cursor, rank.pending) for rank in ranks}) != 1:
        raise ValueError("it does not say which prompts were drawn, or more than once")
    groups = [group for rank in ranks for group in rank.sampled]
    positions = [position for rank in ranks for position in rank.positions]
    first, end = ranks[0].cursor - config.prompts_per_step, ranks[0].cursor
    if ranks[0].pending and positions != [*range(first, end)]:
        raise ValueError(f"it does not have the prompts {first} to {end - 1}, which were drawn")
    if any(len(rank.sampled) != (len(rank.positions) if rank.pending else 0) for rank in ranks) or any(
        len(group) != config.samples_per_prompt for group in groups
    ):
        raise ValueError("it has not the completions of the prompts that were drawn")
    for c in (c for group in groups for c in group):
        if not len(c.tokens) == len(c.sampled) == len(c.logprobs) or not all(0 <= t < vocab_size for t in c.tokens):
            raise ValueError("it has completions that are none of this model")


class Groups:
    """Draws graded groups for one step after the other; every rank draws its slice of the same prompts.

    `cursor` counts the prompts that all ranks have drawn. `begin` starts a rollout, which is `pending` until `take`
    ends and grades it.
    """

    def __init__(
        self,
        pool: RolloutPool,
        environment: Environment,
        problems: list[Problem],
        tokenizer: Tokenizer,
        config: RLConfig,
        seed: int,
        world: World,
    ) -> None:
        self.pool, self.environment, self.problems, self.tokenizer = pool, environment, problems, tokenizer
        self.config, self.seed, self.world = config, seed, world
        self.prompts = [render_prompt(environment.render(problem), tokenizer) for problem in problems]
        self.figures = sorted(environment.grade(problems[0], ""))  # a broken grader shows before anything is sampled
        self.cursor, self.pending, self._rollout_ms = 0, False, 0.0
        self._positions: list[int] = []
        self._rollout: Rollout | None = None
        self._sampled: list[list[Completion]] = []

    def begin(self, count: int) -> None:
        """Starts sampling the next `count` prompts."""
        self._positions = list(self.world.slice(range(self.cursor, self.cursor + count)))
        self.cursor, self.pending = self.cursor + count, True
        self._rollout = self._start(problems_at(len(self.problems), self.seed, self._positions), TRAIN, self._positions)

    def _start(self, chosen: list[int], purpose: int, positions: Sequence[int]) -> Rollout:
        prompts, seeds = [self.prompts[i] for i in chosen], [(self.seed, purpose, p) for p in positions]
        return self.pool.start(prompts, seeds, self.config.samples_per_prompt, self.config.max_new_tokens)

    def wait(self, clock: Stopwatch) -> None:
        """Until no rollout is under way: only then may weights move or a checkpoint be written."""
        if self._rollout is not None:
            self._sampled, self._rollout_ms = self._rollout.result(), 1e3 * self._rollout.seconds
            self._rollout = None
        clock.mark("trainer_idle")

    def take(self, clock: Stopwatch) -> tuple[list[Group], dict[str, float]]:
        """This rank's part of the groups to learn from, and what there is to say of all that were drawn.

        Under dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups that agree are left out and new prompts
        drawn in their place, for `dynamic_sampling` rounds at most: then the step has fewer groups.
        """
        drawn: list[Group] = []
        kept: list[Group] = []
        rollout_ms = 0.0
        for extra in range(self.config.dynamic_sampling + 1):
            if extra:
                found = self.world.sum(torch.tensor(float(len(kept)), device=self.world.device))
                if (missing := self.config.prompts_per_step - int(found)) == 0:
                    break
                self.begin(missing)
            self.wait(clock)
            chosen = problems_at(len(self.problems), self.seed, self._positions)
            groups = self._grade(chosen, self._sampled)
            self._sampled, self.pending = [], False
            rollout_ms += self._rollout_ms
            drawn += groups
            kept += [g for g in groups if not self.config.dynamic_sampling or len(set(g.grades["reward"])) > 1]
            clock.mark("reward")
        return kept, self._statistics(drawn) | {"rollout_ms": rollout_ms}

    def _grade(self, chosen: list[int], sampled: list[list[Completion]]) -> list[Group]:
        """An answer that was cut off earns nothing, but keeps what it loses: else never to end would pay."""
        groups = []
        for i, completions in zip(chosen, sampled, strict=True):
            graded = [self.environment.grade(self.problems[i], self.tokenizer.decode(c.tokens)) for c in completions]
            pairs = list(zip(graded, completions, strict=True))
            grades = {n: [g[n] if c.finished else min(0.0, g[n]) for g, c in pairs] for n in self.figures}
            groups.append(Group(self.prompts[i], completions, grades, [g["reward"] for g in graded]))
        return groups

    def _statistics(self, groups: list[Group]) -> dict[str, float]:
        """Over the completions of all ranks; entropy is the mean surprise of what was sampled, in nats a token."""
        rows = [
            [len(c.tokens), c.finished, -sum(c.logprobs), sum(c.sampled), *(g.grades[n][i] for n in self.figures)]
            for g in groups
            for i, c in enumerate(g.completions)
        ]
        table = torch.tensor(rows, dtype=torch.float64).view(-1, 4 + len(self.figures))
        lengths, finished, surprise, sampled, *grades = self.world.gather(table).unbind(1)
        graded = dict(zip(self.figures, grades, strict=True))
        rewards = graded.pop("reward").view(-1, self.config.samples_per_prompt)
        return {
            "reward": rewards.mean().item(),
            "reward_group_min": rewards.mean(1).min().item(),
            "reward_group_max": rewards.mean(1).max().item(),
            "reward_group_std": rewards.std(1, correction=0).mean().item(),
            "mixed_groups": mixed(rewards).double().mean().item(),
            **{f"reward_{name}": values.mean().item() for name, values in graded.items()},
            "prompts": len(rewards),
            "completion_tokens_sum": int(lengths.sum()),
            "completion_tokens": lengths.mean().item(),
            "completion_tokens_max": int(lengths.max()),
            "finished": finished.mean().item(),
            "entropy": (surprise.sum() / sampled.sum().clamp(min=1)).item(),
        }

    def require_signal(self) -> None:
        """Raises NoSignal, on all ranks, where all samples of the first `signal_prompts` problems earn the same."""
        n, k = min(self.config.signal_prompts, len(self.problems)), self.config.samples_per_prompt
        mine = list(self.world.slice(range(n)))
        groups = self._grade(mine, self._start(mine, SIGNAL, mine).result())
        rewards = self.world.gather(rewards_of(groups, k))
        seen = [[r, c.finished] for g in groups for r, c in zip(g.answered, g.completions, strict=True)]
        graded, finished = self.world.gather(torch.tensor(seen, dtype=torch.float64).view(-1, 2)).unbind(1)
        if not (rewards != rewards[0, 0]).any():
            if rewards[0, 0] >= 1:
                advice = "These problems are solved already: give harder ones"
            elif graded.max() > rewards[0, 0]:
                room = f"rl.max_new_tokens={self.config.max_new_tokens}"
                advice = f"What is cut off earns nothing: give more room than {room} and model.sequence_len do"
            else:
                advice = "Train base, mid and sft for longer or at a greater depth"
            raise NoSignal(
                f"no signal: pass@{k} of the SFT model is {(rewards >= 1).any(1).double().mean():.2g} on {n} training "
                f"prompts, and every completion earns {rewards[0, 0]:g}: there is nothing to reinforce. They were "
                f"graded {graded.min():g} to {graded.max():g}, {graded.mean():.2g} in the mean, and "
                f"{1 - finished.mean():.0%} of them were cut off. {advice}, or go on anyway with "
                "--set rl.require_signal=false"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint, after `wait`: a `Drawn` as JSON has it."""
        sampled = [[asdict(c) for c in group] for group in self._sampled]
        return {"cursor": self.cursor, "pending": self.pending, "positions": self._positions, "sampled": sampled}

    def load(self, states: list[dict[str, Any]]) -> None:
        """Goes on from what all ranks saved, in their order, whatever their number; from nothing, at the start."""
        ranks = [Drawn.model_validate(state) for state in states]
        if ranks:
            self.cursor, self.pending = ranks[0].cursor, ranks[0].pending
            self._positions = self.world.slice([p for rank in ranks for p in rank.positions])
            self._sampled = self.world.slice([group for rank in ranks for group in rank.sampled])
