"""The stages evaluate_base, evaluate_mid, evaluate_sft and evaluate_rl."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from cluster import manifest
from cluster.resources import Devices, resources
from stages import report
from stages.config import EvaluateConfig
from stages.context import ANSWERS, StageContext
from stages.evaluate import measure_task, measure_text, opened, sampling
from stages.evaluation.measure import (
    FAULTS,
    TOOLS,
    TOTALS,
    Examples,
    Figures,
    Kept,
    Summary,
    in_words,
    lacking,
    measure,
    summary,
    titled,
)
from stages.evaluation.pool import resolved
from stages.rl.rollout import RolloutPool
from tasks.environments import EnvironmentFile
from tasks.generated import GeneratedTask
from tasks.suite import CHATCORE, Suite, Task, chosen, suite

TELL_SECONDS = 2.0  # between two reports of progress

Problems = tuple[EnvironmentFile | None, float]  # as `stages.evaluate.opened` takes them


def run(
    context: StageContext,
    source: str,
    config: EvaluateConfig,
    problems: Problems | None,
    seed: int,
    devices: Devices,
) -> None:
    """Measures the model of stage `source` and publishes the figures: how well it solves `problems`, or, without any,
    how well it predicts held-out text, and what else `config` has it asked."""
    began = time.monotonic()
    fetch = partial(context.fetch, source)
    asked = asked_of(source, config)
    answers = Answers(context, source, config, devices)
    stats: dict[str, Any] = {}
    with context.scratch() as directory:
        if problems is None:
            on_device = ray.remote(num_cpus=0, num_gpus=int(devices.kind == "cuda"))
            metrics = ray.get(on_device(measure_text).remote(context, source, devices))
        else:
            with (
                opened(context, *problems) as environment,
                sampling(fetch, environment.tools, config, devices, context.note) as (pool, world),
            ):
                metrics, records = measure_task(context, source, environment, config, seed, pool, world)
                if environment.tools == TOOLS:  # with others the engines are others, too
                    answers.ask([task for task in asked.tasks if isinstance(task, GeneratedTask)], pool)
            _write_lines(directory / "completions.jsonl", records)
            report.table(records, report.titled(context.run, context.stage, metrics), directory / "completions.html")
        answers.ask([task for task in asked.tasks if task.name not in answers.figures | answers.faults])
        if answers.figures:
            found = summary(answers.figures, asked.incomplete, answers.faults)
            (directory / "tasks.json").write_text(json.dumps(found, indent=1) + "\n")
            _write_lines(directory / "examples.jsonl", answers.examples)
            metrics |= headline(found)
            stats = {"notes": told(found, config.limit)}
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        context.publish(directory, metrics, time.monotonic() - began, stats)
    context.storage.delete(ANSWERS)


def asked_of(source: str, config: EvaluateConfig) -> Suite:
    """What the model of stage `source` is asked beside the run's own problems."""
    names = chosen(config.tasks, config.data, chat=source != "base")
    return suite(names, config.data, unsafe=config.unsafe_sandbox)


class Answers:
    """What the model of stage `source` has answered beside the run's own problems. `faults` says of tasks why they
    could not be asked, which is noted, too."""

    def __init__(self, context: StageContext, source: str, config: EvaluateConfig, devices: Devices) -> None:
        model = manifest.read(context.upstream[source])
        assert model is not None  # the stage has been started because it is there
        precision = resolved("auto", devices)
        self._kept = Kept(context.storage.at(ANSWERS), model.digest(), precision, config.engine, config.limit)
        self._fetch, self._context = partial(context.fetch, source), context
        self._config, self._devices = config, devices
        self.figures: dict[str, Figures] = {}
        self.faults: dict[str, str] = {}
        self.examples: Examples = []

    def ask(self, tasks: Sequence[Task], writers: RolloutPool | None = None) -> None:
        """Asks these; `writers` write, where they are given. What else goes wrong is a fault of all that are not
        answered, as the run's own problems are by then."""
        gpus = min(self._devices.gpus, resources().gpus or 1)  # machines may have gone since the run began
        actors = self._config.actors(gpus, self._devices.cpus)
        limit, precision = self._config.limit, "auto"
        questions, last = dict[str, int](), time.monotonic()
        of = len(self.figures) + len(self.faults) + len(tasks)

        def progress(name: str, done: int, _: int | None) -> None:
            nonlocal last
            questions[name] = done
            if time.monotonic() - last > TELL_SECONDS:
                answered = len(self.figures) + len(self.faults)
                with contextlib.suppress(OSError):  # evaluation does not fail on what is only shown
                    self._context.progress(answered, of, {"questions": sum(questions.values())})
                last = time.monotonic()

        try:
            for name, found, examples in measure(
                self._fetch,
                tasks,
                limit,
                self._kept,
                self._devices,
                actors,
                self._config,
                precision,
                self._context.note,
                writers,
                progress,
            ):
                if isinstance(found, str):
                    self.faults[name] = found
                else:
                    self.figures[name] = found
                    self.examples += examples
        except (RuntimeError, ray.exceptions.RayError, *FAULTS) as error:
            answered = self.figures | self.faults
            self.faults |= {task.name: in_words(error) for task in tasks if task.name not in answered}
        for task in tasks:
            if task.name in self.faults:
                self._context.note(f"{task.name} could not be asked: {self.faults[task.name]}", "not asked")


def headline(found: Summary) -> dict[str, float]:
    """What `fathom status` shows."""
    metrics: dict[str, float] = {}
    for score, (_, parts, _) in TOTALS.items():
        if found[score] is not None:
            of_parts = {parts: len(found[parts])}
            metrics |= {name: found[name] for name in (score, f"{score}_low", f"{score}_high")} | of_parts
    for name in CHATCORE:
        if name in found["tasks"]:
            figures = found["tasks"][name]
            shown = name.lower().replace("-", "_")
            metrics |= {shown: figures["accuracy"], f"{shown}_low": figures["low"], f"{shown}_high": figures["high"]}
    return metrics


def told(found: Summary, limit: int | None) -> list[str]:
    """In words: the scores, the tasks of ChatCORE one by one, and what of CORE's data is missing."""
    words = []
    for score, (_, parts, whole) in TOTALS.items():
        if found[score] is not None:
            of = f" of {len(found[parts])} of {whole} tasks" if len(found[parts]) < whole else ""
            words.append(f"{titled(found, score, limit)} {found[score]:.4f}{of}")
    for name in found["chatcore_tasks"]:
        figures = found["tasks"][name]
        words.append(f"{name} {figures['accuracy']:.3f} ({figures['low']:.3f}-{figures['high']:.3f})")
    missing = lacking(found["core_incomplete"])
    return [", ".join(words), *([missing] if missing else [])]


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
