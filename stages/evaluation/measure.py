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
from typing import Annotated, Any, cast

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from cluster.manifest import informing
from cluster.resources import Devices
from cluster.storage import Storage
from models.hf import check_weights, read_spec
from stages.config import EvaluateConfig
from stages.context import Say, warn
from stages.evaluate import graded, sampling
from stages.evaluation.pool import ScorePool
from stages.evaluation.ranked import Asked, ask
from stages.evaluation.text import open_text
from stages.rl.rollout import RolloutPool, reserved
from tasks.base import NumberProblems
from tasks.core import LABELS
from tasks.estimates import interval_of_core
from tasks.generated import GeneratedTask
from tasks.perplexity import SCORES as TEXT_SCORES
from tasks.perplexity import Perplexity
from tasks.ranking import SCORES, accuracy
from tasks.sandbox import SandboxUnavailable
from tasks.suite import CHATCORE, Task

logger = logging.getLogger(__name__)

TOOLS = NumberProblems.tools  # that a model may call while it answers
VERSION = 1  # of how tasks are asked and graded
MOST = 1e308  # that a figure can be
WRITTEN_AT_ONCE = 128  # problems between two reports of progress; fewer would leave the engines' batches half empty
SEED = 0  # of greedy completions, which draw nothing

FAULTS = (OSError, ValueError, SandboxUnavailable)  # of one task, after which the others can be asked

# what the scores of tasks together are called, where a summary names their tasks, and how many there are
TOTALS = {"core": ("CORE", "core_labels", LABELS), "chatcore": ("ChatCORE", "chatcore_tasks", len(CHATCORE))}

Figures = dict[str, Any]  # of one task
Summary = dict[str, Any]  # of all
Examples = list[dict[str, Any]]  # one a question


def summary(figures: dict[str, Figures], incomplete: dict[str, str], faults: dict[str, str]) -> Summary:
    """The figures of all tasks with what they come to. A score that lacks one of its tasks is of those that it has,
    which `core_labels` and `chatcore_tasks` name; `core_incomplete` says what is missing of the data, `faults` why a
    task could not be asked."""
    labels = sorted(name for name, f in figures.items() if name not in CHATCORE and "accuracy" in f)
    chat = [name for name in CHATCORE if name in figures]
    found: Summary = {"tasks": figures}
    for score, names in (("core", labels), ("chatcore", chat)):
        mean = low = high = None
        if names:
            mean = sum(figures[name]["centered"] for name in names) / len(names)
            low, high = interval_of_core([figures[name] for name in names])
        found |= {score: mean, f"{score}_low": low, f"{score}_high": high, TOTALS[score][1]: names}
    bpb = figures["perplexity"]["bpb"] if "perplexity" in figures else None
    return found | {"core_incomplete": incomplete, "bpb": bpb, "faults": faults}


def in_words(error: Exception) -> str:
    """Of what Ray raises the last line, which says what happened; the others are a traceback."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[-1].strip() if isinstance(error, ray.exceptions.RayError) else said


def titled(found: Summary, score: str, limit: int | None) -> str:
    """What a score of TOTALS is called: with a star where it is not of all tasks and questions, as what others call by
    that name is."""
    title, parts, whole = TOTALS[score]
    missing = len(found[parts]) < whole or (score == "core" and found["core_incomplete"]) or limit
    return f"{title}*" if missing else title


def lacking(incomplete: dict[str, str]) -> str:
    """Why a star is at CORE, where it is for the bundle's sake; else empty."""
    missing = "; ".join(f"{label}: {why}" for label, why in incomplete.items())
    return f"CORE* is not CORE: {missing}" if missing else ""


class KeptExample(BaseModel):
    """What is kept of a question; `scores` has a number an option, or the reward of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    index: int = Field(ge=0)
    correct: bool
    scores: list[Annotated[float, Field(allow_inf_nan=False)]]


class KeptTask(BaseModel):
    """What is kept of a task, which is the validation's context; a file that is no such thing is as none, and the task
    is asked again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    figures: dict[str, int | Annotated[float, Field(allow_inf_nan=False)]]
    examples: list[KeptExample]

    @model_validator(mode="after")
    def _whole(self, info: ValidationInfo) -> KeptTask:
        task = cast(Task, info.context)
        if not self.examples or self.figures.get("examples") != len(self.examples):
            raise ValueError("the examples are not as many as the figures say")
        if any((example.task, example.index) != (task.name, i) for i, example in enumerate(self.examples)):
            raise ValueError(f"the examples are not those of {task.name}, each once and in order")
        is_text = isinstance(task, Perplexity)
        wanted = {*(TEXT_SCORES if is_text else SCORES), "few_shot", "seconds"}
        if missing := wanted - self.figures.keys():
            raise ValueError(f"the figures lack {', '.join(sorted(missing))}")
        if ("low" in self.figures) != ("high" in self.figures):
            raise ValueError("an interval has two ends")
        if any(abs(figure) > MOST for figure in self.figures.values()):
            raise ValueError(f"a figure is above {MOST:g}")
        if not is_text:
            measured = accuracy([example.correct for example in self.examples], task.baseline)
            if any(self.figures[name] != figure for name, figure in measured.items()):
                raise ValueError("the figures are not those of the examples")
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
        kept = informing(self._storage, self._path(task), KeptTask, task)
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
    say: Say = warn,
    writers: RolloutPool | None = None,
    progress: Callable[[str, int, int | None], None] = lambda task, done, of: None,
) -> Iterator[tuple[str, Figures | str, Examples]]:
    """Each task's name with its figures and examples, as they are known; a text in the place of figures says why the
    task cannot be asked.

    Raises FileNotFoundError or ValueError for a model that cannot be loaded, once what is kept of it is told.

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

    if new:
        check_weights(
            fetch()
        )  # told here; in an actor's constructor it would be tried again, and come with its traceback

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
                    figures, examples = _written(writers, fetch(), task, limit, say, progress)
                except FAULTS as error:
                    yield task.name, str(error), []
                    continue
                kept.write(task, figures, examples)
                yield task.name, figures, examples


def _written(
    pool: RolloutPool,
    model: Path,
    task: GeneratedTask,
    limit: int | None,
    say: Say,
    progress: Callable[[str, int, int | None], None],
) -> tuple[Figures, Examples]:
    """Figures and examples of a task whose answers `pool` writes. A problem that leaves no room for an answer in the
    model's context counts as not solved. Raises FileNotFoundError, ValueError or SandboxUnavailable."""
    began, environment = time.monotonic(), task.environment
    text, room = open_text(model), read_spec(model).sequence_len
    problems = environment.problems("test")[:limit]
    if not problems:
        raise ValueError("it has no problems")
    environment.grade(problems[0], "")  # what cannot be graded need not be written
    prompts = {i: text.prompt(environment.render(problem)) for i, problem in enumerate(problems)}
    fitting = [i for i, prompt in prompts.items() if len(prompt) < room]
    if len(fitting) < len(problems):
        say(f"{task.name}: {len(problems) - len(fitting)} of {len(problems)} problems leave no room for an answer")
    rewards: dict[int, float] = {}
    for first in range(0, len(fitting), WRITTEN_AT_ONCE):
        some = fitting[first : first + WRITTEN_AT_ONCE]
        progress(task.name, len(rewards), len(problems))
        seeds = [(SEED, i) for i in some]
        completions = pool.sample([prompts[i] for i in some], seeds, 1, task.max_new_tokens, greedy=True)
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # which wait, where a sandbox grades
            asked = [problems[i] for i in some]
            records = threads.map(lambda p, c: graded(environment, p, c[0], text.decode), asked, completions)
            rewards |= zip(some, (record["grades"]["reward"] for record in records), strict=True)
    progress(task.name, len(problems), len(problems))
    scores = [rewards.get(i, 0.0) for i in prompts]
    named = {"task": task.name}
    examples = [named | {"index": i, "correct": score >= 1, "scores": [score]} for i, score in enumerate(scores)]
    measured = accuracy([score >= 1 for score in scores], task.baseline)
    counted = {"examples": len(examples), "few_shot": task.few_shot, "seconds": time.monotonic() - began}
    return measured | counted, examples
