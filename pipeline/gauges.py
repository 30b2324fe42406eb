"""Ray's metrics of a run: the figures of its stages as gauges, for Prometheus and the board in cluster/grafana.json.

The driver sets them from what it reads of every stage's progress anyway, so that nothing that trains knows of them. A
gauge is named `fathom_` and the figure of docs/metrics.md; Ray puts `ray_` before it. Its tags are the run, the stage
and the rank whose figure it is: 0 for what is the stage's as a whole, `actor0` for a rollout actor.
"""

from __future__ import annotations

import logging
import math
import re

from ray.util.metrics import Gauge

from stages.context import Progress

TAGS = ("run", "stage", "rank")
PROGRESS = ("step", "steps", "seconds", "seconds_left")  # what every stage may say besides its figures
OF_ONE = re.compile(r"((?:rank\d+_)?(?:actor\d+_)?)(\w+)")  # whose figure it is, and its name
log = logging.getLogger(__name__)

Figures = dict[tuple[str, str], float]  # by gauge and rank


def figures(progress: Progress) -> Figures:
    """What a stage says of itself, by the gauge that shows it and the rank it is of."""
    said = {name: value for name in PROGRESS if (value := getattr(progress, name)) is not None}
    found: Figures = {}
    for name, value in (progress.metrics | progress.record | said).items():
        whose, of = OF_ONE.fullmatch(re.sub(r"\W", "_", name, flags=re.ASCII)).groups()  # type: ignore[union-attr]
        found[f"fathom_{of}", whose.removeprefix("rank").rstrip("_") or "0"] = float(value)
    return found


class Gauges:
    """The gauges of one run. Whatever goes wrong with them is logged once, and they are left alone from then on."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        self._shown: dict[str, Figures] = {}  # by stage
        self._failed = False

    def show(self, stage: str, progress: Progress | None) -> None:
        """Sets the gauges of a stage; those of one that has ended (None) to nan, which ends their curves."""
        if self._failed:
            return
        before = self._shown.get(stage, {})
        try:
            self._shown[stage] = now = figures(progress) if progress else {}
            for (name, rank), value in (dict.fromkeys(before, math.nan) | now).items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, "see docs/metrics.md", TAGS)
                self._gauges[name].set(value, {"run": self.run, "stage": stage, "rank": rank})
        except Exception as error:  # a run does not end for what only shows it
            log.warning("Ray's metrics show no more of this run: %s", error)
            self._failed = True
