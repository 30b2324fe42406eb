"""Which curves are drawn of a stage's record, under which heading and in which unit."""

from __future__ import annotations

import re

import numpy as np

from pipeline.reporting.blocks import FEWEST, MOST, MOST_POINTS, Axis, Chart, Series, smoothed, thinned
from pipeline.reporting.facts import RunFacts, StageFacts
from stages.report import LOGARITHMIC, PANELS

# title, unit, names of the figures; the first that fits takes a figure
TRAINING = (
    ("Loss", "nats a token", r"loss"),
    ("Held-out text", "bits a byte", r"val_bpb\w*"),
    ("CORE on the way", "score", r"val_core"),
    ("Learning rate", "factor on all rates", r"lr_multiplier"),
    ("Gradient norm", "before clipping", r"grad_norm"),
    ("Throughput", "tokens a second", r"tokens_per_second"),
    ("Model FLOPs", "share of the devices' peak (MFU)", r"mfu"),
    ("Where a step's time goes", "share of the step", r"(?!\w*gpu_)\w+_share"),
    ("Length of a step", "seconds", r"step_ms"),
)
# what processes and devices take, of every training stage; the ranks together
TAKEN = (
    ("Memory", "GB", r"\w*(memory|rss)_gb"),
    ("CPU", "cores kept busy", r"\w*cpu_cores"),
    ("GPU in use", "share of the time", r"\w*gpu_busy_share"),
    ("Power", "W", r"\w*gpu_watts"),
    ("Temperature", "°C", r"\w*gpu_celsius"),
)
KNOTS = 200  # steps at which tokens and hours are said
# They are bounds of another figure, or count what the sections say in words.
UNDRAWN = re.compile(
    r"\w*_(low|high)|best_step|skipped|prompts|weight_version|actors_replaced|trained_tokens|tokens|"
    r"completion_tokens_sum|val_problems|val_sampled_\w+"
)
RECORDED = ("base", "mid", "sft", "rl")


def panels(stage: StageFacts) -> list[tuple[str, str, list[str]]]:
    """(title, unit, names) of the charts of a stage; what no heading is known for has a chart of its own."""
    known = [*(PANELS if stage.name == "rl" else TRAINING), *TAKEN]
    names = [name for name in stage.columns if not UNDRAWN.fullmatch(name)]
    found: list[tuple[str, str, list[str]]] = []
    for title, unit, pattern in known:
        mine = [name for name in names if re.fullmatch(pattern, name)]
        names = [name for name in names if name not in mine]
        if mine:
            found.append((title, unit, mine))
    return found + [(name.removesuffix("_ms"), _unit(name), [name]) for name in names]


def _unit(name: str) -> str:
    ends = {"_ms": "seconds", "_share": "share", "_gb": "GB", "_watts": "W", "_celsius": "°C", "per_second": "a second"}
    return next((unit for end, unit in ends.items() if name.endswith(end)), name.rpartition("_")[2])


def charts(stage: StageFacts, most: int) -> list[Chart]:
    """The charts of one stage, with at most `most` points a curve."""
    found = []
    for title, unit, names in panels(stage):
        series = [_series(stage, name, name.removesuffix("_ms").removesuffix("_share"), most) for name in names]
        found.append(Chart(title, unit, series, _logarithmic(names[0], series)))
    return found


def overlaid(runs: list[RunFacts], stage: str, most: int) -> list[Chart]:
    """The charts of a stage of several runs: one a figure that at least one of them has, a curve a run."""
    having = [(run, facts) for run in runs if (facts := run.stage(stage)) is not None and facts.columns]
    wanted: dict[str, tuple[str, str]] = {}
    for _, facts in having:
        for title, unit, names in panels(facts):
            for name in names:
                alone = name.removesuffix("_ms").removesuffix("_share")
                wanted.setdefault(name, (title if len(names) == 1 else f"{title}: {alone}", unit))
    found = []
    for name, (title, unit) in wanted.items():
        series = [_series(facts, name, run.name, most) for run, facts in having if name in facts.columns]
        found.append(Chart(title, unit, series, _logarithmic(name, series)))
    return found


def points_each(runs: list[RunFacts]) -> int:
    """How many points a curve may have, so that all of them together stay within MOST_POINTS."""
    curves = sum(len(names) for run in runs for stage in run.stages for _, _, names in panels(stage))
    return max(FEWEST, min(MOST, MOST_POINTS // max(1, curves)))


def _series(stage: StageFacts, name: str, title: str, most: int) -> Series:
    steps, values = stage.columns[name]
    if name.endswith("_ms"):
        values = values / 1e3
    kept = thinned(steps, values, most)
    bounds = [stage.columns.get(f"{name}_{end}") for end in ("low", "high")]
    low, high = (b[1][kept] if b is not None and len(b[1]) == len(steps) else None for b in bounds)
    return Series(title, _axis(stage), (steps[kept], values[kept]), smoothed(steps, values), low, high)


def _axis(stage: StageFacts) -> Axis:
    if not len(stage.steps):
        return Axis(stage.steps, stage.tokens, stage.hours)
    at = np.unique(np.linspace(0, len(stage.steps) - 1, KNOTS).astype(int))
    # a figure of step n that was taken before the step stands where the steps before it end
    ends, hours = np.concatenate(([0.0], stage.steps[at] + 1)), np.concatenate(([0.0], stage.hours[at]))
    tokens = np.concatenate(([0.0], stage.tokens[at])) if len(stage.tokens) else stage.tokens
    return Axis(ends, tokens, hours)


def _logarithmic(name: str, series: list[Series]) -> bool:
    """Where most values span more than a factor of twenty, or are known to; never where some are not above 0. Beyond a
    million, the least are zeros but for rounding."""
    values = np.concatenate([s.points[1] for s in series])
    if not len(values) or values.min() <= 0:
        return False
    if name.endswith(("_share", "_ms", "per_second")) or "pass_at" in name:
        return False
    body = np.quantile(values, (0.02, 0.98))
    return bool(re.fullmatch(LOGARITHMIC, name) or 20 * body[0] < body[1] < 1e6 * body[0])
