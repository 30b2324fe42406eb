"""What storage holds of a run, as plain values: what a report is made from. Nothing here is shown yet.

A run that failed, or that has not ended, has facts, too: of a stage under way those of its newest checkpoint. What
cannot be read is named in `unread` and left out, so that a damaged file costs a report no more than its own part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster import manifest as manifests
from cluster.manifest import METRICS, SAMPLES, Incident, Stats
from cluster.storage import Storage, StorageError
from pipeline.artifacts import RunStore, StageState
from pipeline.attempts import Attempt, attempts
from pipeline.config import Config
from pipeline.status import overall, run_states

Columns = dict[str, tuple[np.ndarray, np.ndarray]]  # of each figure of a record (steps, values), both (n,) float64
ENDLESS = 1e300  # from here on a figure is as good as infinite: a sum of such would be
Value = TypeVar("Value")


class Completion(BaseModel):
    """An answer of a model, as stages.evaluate keeps it."""

    model_config = ConfigDict(extra="ignore")

    text: str
    tokens: int
    finished: bool
    grades: dict[str, float]

    @property
    def right(self) -> bool:
        return self.grades.get("reward", 0.0) >= 1


class Answered(BaseModel):
    """A problem with all that a model said to it."""

    model_config = ConfigDict(extra="ignore")

    question: str
    answer: str
    greedy: list[Completion] = []
    samples: list[Completion] = []

    @property
    def share(self) -> float:
        """Of the samples, or else of the greedy completion, that solve it."""
        drawn = self.samples or self.greedy
        return sum(completion.right for completion in drawn) / len(drawn) if drawn else 0.0


class Sample(BaseModel):
    """What a model had to say to a prompt, after so many steps of its stage."""

    model_config = ConfigDict(extra="ignore")

    step: int
    prompt: str
    text: str


class Example(BaseModel):
    """The outcome of one question of a task."""

    model_config = ConfigDict(extra="ignore")

    task: str
    index: int
    correct: bool


class Baseline(BaseModel):
    """What guessing scores in a task."""

    baseline: float = Field(0.0, ge=0, lt=1)


class TasksAsked(BaseModel):
    """The tasks of an evaluation by name, and of which of them its scores are means."""

    core_labels: list[str] = []
    chatcore_tasks: list[str] = []
    tasks: dict[str, Baseline] = {}


@dataclass
class StageFacts:
    """One stage: where it stands, its figures and its record. `hours` (n,) and `tokens` (n,) belong to `steps` (n,),
    the steps that were taken, and grow with them."""

    name: str
    state: str
    seconds: float | None = None
    created: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    steps_planned: int | None = None
    error: str | None = None
    incidents: list[Incident] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)
    lost_values: dict[str, list[int]] = field(default_factory=dict)  # steps at which a figure was not finite
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))
    hours: np.ndarray = field(default_factory=lambda: np.zeros(0))
    answered: list[Answered] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    asked: TasksAsked = field(default_factory=lambda: TasksAsked())

    def last(self, name: str, share: float = 0.05) -> float | None:
        """The mean of the last values of a figure, a twentieth of them."""
        if name not in self.columns:
            return None
        values = self.columns[name][1]
        return float(values[-max(1, int(len(values) * share)) :].mean()) if len(values) else None

    def middle(self, name: str) -> float | None:
        """The median of a figure without the first tenth, in which a stage warms up."""
        if name not in self.columns:
            return None
        values = self.columns[name][1]
        return float(np.median(values[len(values) // 10 :])) if len(values) else None


@dataclass
class RunFacts:
    """All of one run, the stages in order."""

    name: str
    uri: str
    config: Config | None
    stages: list[StageFacts]
    attempts: list[Attempt] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def stage(self, name: str) -> StageFacts | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def state(self) -> str:
        return overall(stage.state for stage in self.stages)

    @property
    def seconds(self) -> float:
        """The work of all stages, one after another."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def collect(store: RunStore) -> RunFacts:
    """The facts of a run. Raises FileNotFoundError for one that storage does not know."""
    states, unread = run_states(store), list[str]()
    config = store.recorded()
    try:
        float(config.model.spec().parameters if config else 0)
    except (ValueError, OverflowError) as error:  # it was written by somebody, or by another version
        unread.append(f"the configuration is of no model that can be: {str(error)[:200]}")
        config = None
    stages = [_stage(store, state, config, unread) for state in states]
    return RunFacts(store.run, store.storage.uri, config, stages, attempts(store.storage), unread)


def _stage(store: RunStore, state: StageState, config: Config | None, unread: list[str]) -> StageFacts:
    facts = StageFacts(state.name, state.state, error=state.error)
    progress, made, place = state.progress, state.manifest, store.stage(state.name)
    if progress is not None:
        facts.seconds, facts.incidents = progress.seconds, progress.incidents
        facts.step, facts.steps_planned = progress.step, progress.steps
        facts.metrics = _numbers(progress.metrics)
    if made is not None:
        facts.seconds, facts.created, facts.error = made.seconds, made.created, None
        facts.stats, facts.versions, facts.metrics = made.stats, made.versions, _numbers(made.metrics)
        facts.step = facts.steps_planned = None
        facts.incidents = Stats.model_validate(made.stats).incidents
    elif state.checkpoint_step is not None:
        facts.step = max(facts.step or 0, state.checkpoint_step)
    facts.error = facts.error or ("; ".join(state.drift) if state.state == "drifted" else None)
    wanted = [place]  # of a stage under way its record may be newer than its checkpoint's
    if state.checkpoint_step is not None:
        wanted.append(place.at(manifests.checkpoint_path(state.checkpoint_step)))
    found = ((where, text) for where in wanted if (text := _text(where, METRICS, unread)) is not None)
    if (record := next(found, None)) is not None:
        where, text = record
        facts.samples = _lines(where, SAMPLES, Sample, unread)
        facts.columns, facts.lost_values, bad = columns_of(text)
        if bad:
            unread.append(f"{state.name}: {bad:,} lines of {METRICS} are no records")
        _lay_axes(facts, config)
    if made is not None and state.name.startswith("evaluate_"):
        facts.answered = _lines(place, "completions.jsonl", Answered, unread)
        facts.examples = _lines(place, "examples.jsonl", Example, unread)
        facts.asked = _asked(place, unread)
    return facts


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those that are finite numbers, whole ones whole."""
    return {name: value for name, value in values.items() if (n := _number(value)) is not None and abs(n) < ENDLESS}


def _number(value: Any) -> float | None:
    """A value of a record as a number, infinite where it is too large for one; None for what is none."""
    if type(value) not in (int, float, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def columns_of(text: str) -> tuple[Columns, dict[str, list[int]], int]:
    """A record, of which each line is a flat JSON object with its `step`, by figure; the steps at which a figure was
    not finite; and how many lines were no such object."""
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    lost: dict[str, list[int]] = {}
    bad = 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            step = record.pop("step")
            if type(step) is not int or not 0 <= step < 1 << 53:
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            bad += 1
            continue
        for name, value in record.items():
            if (number := _number(value)) is None:
                continue
            if abs(number) < ENDLESS:  # nan is not
                steps.setdefault(name, []).append(step)
                values.setdefault(name, []).append(number)
            else:
                lost.setdefault(name, []).append(step)
    found: Columns = {}
    for name in steps:
        at, of = np.array(steps[name], dtype=float), np.array(values[name], dtype=float)
        order = np.argsort(at, kind="stable")  # a record of steps in order stays as it is
        found[name] = at[order], of[order]
    return found, lost, bad


def _lay_axes(facts: StageFacts, config: Config | None) -> None:
    """Tokens and hours by step: of what the record counts, else of what the configuration says."""
    if "step_ms" not in facts.columns:
        return
    facts.steps, milliseconds = facts.columns["step_ms"]
    facts.hours = np.cumsum(milliseconds) / 3.6e6
    counted = next((name for name in ("completion_tokens_sum", "tokens") if name in facts.columns), None)
    if facts.name == "rl" and counted is not None and len(facts.columns[counted][1]) == len(facts.steps):
        facts.tokens = np.cumsum(facts.columns[counted][1])
    else:
        batch = getattr(getattr(config, facts.name, None), "total_batch_size", None)
        facts.tokens = (facts.steps + 1) * batch if batch else np.zeros(0)


def _text(place: Storage, path: str, unread: list[str]) -> str | None:
    try:
        return place.read_bytes(path).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, StorageError) as error:
        unread.append(f"{place.uri}/{path} cannot be read: {error}")
        return None


def _asked(place: Storage, unread: list[str]) -> TasksAsked:
    text = _text(place, "tasks.json", unread)
    try:
        return TasksAsked.model_validate_json(text) if text is not None else TasksAsked()
    except ValidationError:
        unread.append(f"{place.uri}/tasks.json is of another form")
        return TasksAsked()


def _lines(place: Storage, path: str, kind: type[Value], unread: list[str]) -> list[Value]:
    """What a file of JSON lines holds; those that are of another form are counted in `unread`."""
    text = _text(place, path, unread)
    return _parsed(text, TypeAdapter(kind).validate_json, f"{place.uri}/{path}", unread) if text else []


def _parsed(text: str, parse: Callable[[str], Value], where: str, unread: list[str]) -> list[Value]:
    found, bad = list[Value](), 0
    for line in text.splitlines():
        try:
            found.append(parse(line))
        except ValidationError:
            bad += 1
    if bad:
        unread.append(f"{bad:,} lines of {where} are of another form")
    return found
