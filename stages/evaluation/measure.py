"""A model asked all of a suite of tasks.

Each task's answers are kept as soon as the last of them is known, so that what ends half-way asks no task again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.manifest import informing
from cluster.resources import Devices
from cluster.storage import Storage
from models.hf import read_spec
from stages.config import EvaluateConfig
from stages.evaluate import graded, sampling
from stages.evaluation.pool import ScorePool
from stages.evaluation.ranked import Asked, ask
from stages.evaluation.text import open_text
from stages.rl.rollout import RolloutPool, reserved
from tasks.base import NumberProblems
from tasks.estimates import interval_of_core
from tasks.generated import GeneratedTask
from tasks.ranking import SCORES, accuracy
from tasks.sandbox import SandboxUnavailable
from tasks.suite import CHATCORE, Task

logger = logging.getLogger(__name__)

TOOLS = NumberProblems.tools  # that a model may call while it answers
VERSION = 1  # of how tasks are asked and graded
MOST = 1e308  # that a figure can be
SEED = 0  # of greedy completions, which draw nothing

FAULTS = (OSError, ValueError, SandboxUnavailable)  # of one task, after which the others can be asked

Figures = dict[str, Any]  # of one task
Examples = list[dict[str, Any]]  # one a question


def summary(figures: dict[str, Figures], incomplete: dict[str, str], faults: dict[str, str]) -> dict[str, Any]:
    """The figures of all tasks with what they come to. A score that lacks one of its tasks is of those that it has,
    which `core_labels` and `chatcore_tasks` name; `core_incomplete` says what is missing of the data, `faults` why a
    task could not be asked."""
    labels = sorted(name for name, f in figures.items() if name not in CHATCORE and "accuracy" in f)
    chat = [name for name in CHATCORE if name in figures]
    found: dict[str, Any] = {"tasks": figures}
    for score, names, parts in (("core", labels, "core_labels"), ("chatcore", chat, "chatcore_tasks")):
        mean = low = high = None
        if names:
            mean = sum(figures[name]["centered"] for name in names) / len(names)
            low, high = interval_of_core([figures[name] for name in names])
        found |= {score: mean, f"{score}_low": low, f"{score}_high": high, parts: names}
    bpb = figures["perplexity"]["bpb"] if "perplexity" in figures else None
    return found | {"core_incomplete": incomplete, "bpb": bpb, "faults": faults}


class KeptExample(BaseModel):
    """What is kept of a question; `scores` has a number an option, or the reward of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    index: int = Field(ge=0)
    correct: bool
    scores: list[float]


class KeptTask(BaseModel):
    """What is kept of a task; a file that is no such thing is as none, and the task is asked again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    figures: dict[str, int | Annotated[float, Field(allow_inf_nan=False)]]
    examples: list[KeptExample]

    @model_validator(mode="after")
    def _whole(self) -> KeptTask:
        scores = SCORES if "accuracy" in self.figures else ("bpb", "word_perplexity")
        if missing := {*scores, "few_shot", "seconds"} - self.figures.keys():
            raise ValueError(f"the figures lack {', '.join(sorted(missing))}")
        shares = [self.figures[name] for name in scores if name in ("accuracy", "low", "high", "baseline")]
        if not all(0 <= share <= 1 for share in shares) or self.figures.get("baseline") == 1:
            raise ValueError("a share is from 0 to 1, and guessing is not always right")
        if any(abs(figure) > MOST for figure in self.figures.values()):
            raise ValueError(f"a figure is above {MOST:g}")
        if ("low" in self.figures) != ("high" in self.figures):
            raise ValueError("an interval has two ends")
        if not self.examples or self.figures.get("examples") != len(self.examples):
            raise ValueError("the examples are not as many as the figures say")
        return self


class Kept:
    """The answers of one model, a file a task, below a storage. They are known by all that they depend on: the `model`,
    what it computes in, what writes, the most examples a task, and this code."""

    def __init__(self, storage: Storage, model: str, precision: str, engine: str, limit: int | None) -> None:
        self._wanted = {"model": model, "precision": precision, "engine": engine, "limit": limit, "version": VERSION}
        self._storage = storage

    def _path(self, task: Task) -> str:
        named = json.dumps([self._wanted, task.name, task.few_shot, task.stamp], sort_keys=True)
        return f"{hashlib.sha256(named.encode()).hexdigest()[:24]}.json"

    def read(self, task: Task) -> tuple[Figures, Examples] | None:
        kept = informing(self._storage, self._path(task), KeptTask)
        return None if kept is None else (kept.figures, [example.model_dump() for example in kept.examples])

    def write(self, task: Task, figures: Figures, examples: Examples) -> None:
        self._storage.write_json(self._path(task), {"figures": figures, "examples": examples})


def measure(
    fetch: Callable[[], Path],
    tasks: Sequence[Task],
    limit: int | None,
    kept: Kept,
    devices: Devices,
    actors: int,
    config: EvaluateConfig,
    precision: str = "auto",
    say: Callable[[str], None] = logger.warning,
    writers: RolloutPool | None = None,
    progress: Callable[[str, int, int | None], None] = lambda task, done, of: None,
) -> Iterator[tuple[str, Figures | str, Examples]]:
    """Each task's name with its figures and examples, as they are known; a text in the place of figures says why the
    task cannot be asked.

    `fetch` brings the model to a machine, `limit` is the most examples a task, `actors` so many score at once.
    `writers` sample from the model and may call TOOLS; without them some are started where they are needed. `progress`
    is told of each task how many are answered.
    """
    new: list[Task] = []
    for task in tasks:
        try:
            known = kept.read(task)
        except FAULTS as error:  # of its data, of which answers know the state
            yield task.name, str(error), []
            continue
        if known is None:
            new.append(task)
        else:
            progress(task.name, known[0]["examples"], known[0]["examples"])
            yield task.name, *known

    def told(asked: Asked) -> None:
        progress(asked.task.name, len(asked.answers), asked.questions)

    ranked = [task for task in new if not isinstance(task, GeneratedTask)]
    generated = [task for task in new if isinstance(task, GeneratedTask)]
    if ranked:
        with (
            reserved(devices, actors) as places,
            ScorePool(fetch, devices, actors, places, precision) as pool,
        ):
            for asked in ask(pool, ranked, open_text(fetch()), limit, told):
                if asked.fault is not None:
                    yield asked.task.name, asked.fault, []
                    continue
                figures, examples = asked.figures(), asked.examples()
                kept.write(asked.task, figures, examples)
                yield asked.task.name, figures, examples
    if generated:
        with ExitStack() as stack:
            if writers is None:
                writers, _ = stack.enter_context(sampling(fetch, TOOLS, config, devices, say))
            for task in generated:
                try:
                    figures, examples = _written(writers, fetch(), task, limit, say)
                except FAULTS as error:
                    yield task.name, str(error), []
                    continue
                kept.write(task, figures, examples)
                progress(task.name, len(examples), len(examples))
                yield task.name, figures, examples


def _written(
    pool: RolloutPool, model: Path, task: GeneratedTask, limit: int | None, say: Callable[[str], None]
) -> tuple[Figures, Examples]:
    """Figures and examples of a task whose answers `pool` writes. A problem that leaves no room for an answer in the
    model's context counts as not solved. Raises FileNotFoundError, ValueError or SandboxUnavailable."""
    began, environment = time.monotonic(), task.environment
    text, room = open_text(model), read_spec(model).sequence_len
    problems = environment.problems("test")[:limit]
    environment.grade(problems[0], "")  # what cannot be graded need not be written
    prompts = {i: text.prompt(environment.render(problem)) for i, problem in enumerate(problems)}
    fitting = [i for i, prompt in prompts.items() if len(prompt) < room]
    if len(fitting) < len(problems):
        say(f"{task.name}: {len(problems) - len(fitting)} of {len(problems)} problems leave no room for an answer")
    seeds = [(SEED, i) for i in fitting]
    completions = pool.sample([prompts[i] for i in fitting], seeds, 1, task.max_new_tokens, greedy=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # which wait, where a sandbox grades
        asked = [problems[i] for i in fitting]
        records = threads.map(lambda p, c: graded(environment, p, c[0], text.decode), asked, completions)
        rewards = dict(zip(fitting, (record["grades"]["reward"] for record in records), strict=True))
    scores = [rewards.get(i, 0.0) for i in prompts]
    named = {"task": task.name}
    examples = [named | {"index": i, "correct": score >= 1, "scores": [score]} for i, score in enumerate(scores)]
    measured = accuracy([score >= 1 for score in scores], task.baseline)
    counted = {"examples": len(examples), "few_shot": task.few_shot, "seconds": time.monotonic() - began}
    return measured | counted, examples
