"""What the terminal shows of a run: live progress read from storage, and the table at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster import manifest as manifests
from cluster.manifest import Incident
from cluster.storage import StorageError
from corpus import left_out
from pipeline.artifacts import RunStore, StageState
from pipeline.terminal import TOGETHER, Terminal, say, show
from stages.context import Progress

POLL_SECONDS = 1.0
LINE_SECONDS = 10.0
STYLES = {"done": "green", "running": "cyan", "failed": "red", "drifted": "yellow", "resumable": "blue"}
SPEEDS = ("tokens_per_second", "completion_tokens_per_second")
SHOWN = ("val_bpb", "core", "greedy", "pass", "reward", "val_pass", "kl_sft", "loss", "mfu", *SPEEDS)
log = logging.getLogger(__name__)


@dataclass
class Row:
    """One stage as last seen, and when which line about it was printed."""

    state: str = "waiting"
    progress: Progress | None = None
    line: str = ""
    said: float = 0.0
    told: int = 0  # notes printed
    left_out: list[str] = field(default_factory=list)  # of a stage that is done

    def cells(self) -> list[str]:
        """Step; loss, reward or questions answered; tokens a second; time left. Empty where unknown or not running."""
        if self.state != "running" or self.progress is None:
            return ["", "", "", ""]
        step, steps, metrics = self.progress.step or 0, self.progress.steps, self.progress.metrics
        shown = next((f"{name} {metrics[name]:.4g}" for name in ("reward", "loss", "questions") if name in metrics), "")
        speed = next((f"{metrics[name]:,.0f} tok/s" for name in SPEEDS if name in metrics), "")
        seconds = self.progress.seconds_left
        left = f"{duration(seconds)} left" if seconds is not None else ""
        return [f"{step}/{steps}" if steps else str(step or ""), shown, speed, left]


class LiveView:
    """Shows the stages of a run while the block runs: a live table on a terminal, else plain lines.

    A progress report left by an earlier attempt is not shown as running: only one that changes is, unless one is
    `joining` a run that is under way.
    """

    def __init__(
        self,
        store: RunStore,
        stages: list[str],
        console: Console | None = None,
        tell: Callable[[str, Sequence[Incident]], None] = lambda stage, incidents: None,
        show: Callable[[str, Progress | None], None] = lambda stage, progress: None,
        joining: bool = False,
    ) -> None:
        """`tell` is given all incidents of a stage so far, and `show` its progress when it changes: None once the stage
        has ended."""
        self.store, self.console, self.tell, self.show = store, console or Terminal(), tell, show
        self.rows = {name: Row() for name in stages}
        self.stale = {} if joining else {name: store.progress(name) for name in stages}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="live view")
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveView:
        if self.console.is_terminal:
            self.live.start()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()
        self.poll()
        if self.console.is_terminal:
            self.live.stop()

    def _watch(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self.poll()

    def poll(self) -> None:
        """Read every unfinished stage once and show what is new."""
        now = time.monotonic()
        for name, row in self.rows.items():
            if row.state != "done":
                before, progress = row.state, row.progress
                try:
                    row.state = self._look(name, row)
                except (OSError, StorageError) as error:
                    log.debug("progress of %s is unread: %s", name, error)  # storage may hiccup; the run goes on
                    continue
                if row.state == "running" and row.progress != progress:
                    self.show(name, row.progress)
                elif row.state != before == "running":
                    self.show(name, None)
                if not self.console.is_terminal:
                    self._say(name, row, before != row.state, now)
                notes = row.progress.notes if row.progress else []
                row.told = row.told if row.told <= len(notes) else 0  # a new attempt has begun
                for note in [*notes[row.told :], *row.left_out]:
                    say(self.console, f"{name:<14}  {note}")
                row.told = len(notes)
                self.tell(name, row.progress.incidents if row.progress else [])
        if self.console.is_terminal:
            self.live.update(self._table())

    def _look(self, name: str, row: Row) -> str:
        if (made := manifests.read(self.store.stage(name))) is not None:
            row.left_out = noted(made)
            return "done"
        progress = self.store.progress(name)
        if progress is None:
            return "waiting"
        if progress == self.stale.get(name):
            return row.state
        row.progress = progress
        return progress.state

    def _say(self, name: str, row: Row, changed: bool, now: float) -> None:
        line = "  ".join([f"{name:<14}", row.state, *filter(None, row.cells())])
        if row.state == "waiting":
            return
        if changed or (line != row.line and now - row.said >= LINE_SECONDS):
            row.line, row.said = line, now
            say(self.console, line)

    def _table(self) -> Table:
        rows = [[name, row.state, *row.cells()] for name, row in self.rows.items()]
        columns = ["stage", "state", "step", "metric", "speed", "time left"]
        widths = [max(map(len, column)) + 2 for column in zip(columns, *rows, strict=True)]
        shown = {*range(len(columns))}
        for least in (4, 3, 5):  # what a narrow terminal has no room for
            if sum(widths[i] for i in shown) - 2 > self.console.width:
                shown.remove(least)
        table = Table(box=None, pad_edge=False, title=Text(f"run {self.store.run}"), title_justify="left")
        for i in sorted(shown):
            table.add_column(columns[i], no_wrap=True)
        for row in rows:
            styled = [Text(cell, STYLES.get(cell, "dim") if i == 1 else "") for i, cell in enumerate(row)]
            table.add_row(*(styled[i] for i in sorted(shown)))
        return table


def duration(seconds: float | None) -> str:
    """Seconds for people: 8s, 3m05s, 2h07m; empty when not known."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def key_metrics(metrics: dict[str, Any], most: int = 4) -> str:
    """The few metrics worth a table cell, best known first."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    numbers = {k: v for k, v in numbers.items() if not k.endswith(("_low", "_high"))}  # bounds of an interval
    order = {name: next((i for i, p in enumerate(SHOWN) if name.startswith(p)), len(SHOWN)) for name in numbers}
    first = sorted(numbers, key=order.__getitem__)[:most]
    return "  ".join(f"{name} {_number(numbers[name])}" for name in first)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def noted(made: manifests.Manifest) -> list[str]:
    """What a stage that is done has to say of its data: what was left out, and why."""
    return [*made.stats.get("notes", []), *left_out.lines(made.stats.get("read", {}))]


def summary(store: RunStore, state: StageState) -> dict[str, Any]:
    """One stage as plain values: name, state, seconds, metrics, notes (what was left out, and why), uri."""
    made = state.manifest or state.progress
    notes = state.progress.notes if state.progress else []
    if state.manifest is not None:
        stats = state.manifest.stats
        skipped = stats.get("skipped", {}).items()
        notes = [f"{source}: {left_out.skipped(files)} not read" for source, files in skipped]
        notes += noted(state.manifest)
    return {
        "name": state.name,
        "state": state.state,
        "seconds": made.seconds if made else None,
        "metrics": made.metrics if made else {},
        "notes": notes,
        "uri": store.stage(state.name).uri,
    }


def final_table(store: RunStore, states: list[StageState], console: Console | None = None) -> None:
    """Print every stage with its state, time, key metrics and where its artifact is."""
    console = console or Terminal()
    say(console, f"run {store.run}")
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "time", "metrics", "artifact"):
        table.add_column(column, no_wrap=True)
    lines: list[str] = []
    for state in states:
        row, style = summary(store, state), STYLES.get(state.state, "dim")
        took, metrics = duration(row["seconds"]), key_metrics(row["metrics"])
        artifact = row["uri"] if state.manifest is not None else ""
        table.add_row(state.name, Text(state.state, style), took, Text(metrics), Text(artifact))
        lines.append(f"{state.name:<14} {state.state:<9} {took}".rstrip())
        if metrics:
            lines.append("  " + ", ".join(figure.replace(" ", TOGETHER) for figure in metrics.split("  ")))
    show(console, table, [*lines, f"artifacts: {store.storage.uri}/STAGE"])
    for state in states:
        trace = [f"the whole traceback is in {state.traceback}"] if state.traceback else []
        for line in [*summary(store, state)["notes"], *state.drift, *([state.error] if state.error else []), *trace]:
            say(console, f"{state.name}: {line}")


def plan_table(planned: list[Any], console: Console, other: str | None = None) -> None:
    """Print what a run would do with each stage (--dry-run); `other` is the run that some may be copied from."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "action"):
        table.add_column(column, no_wrap=True)
    lines = []
    for item in planned:
        froms = {"resume": f" from step {item.state.checkpoint_step}", "reuse": f" from run {other}"}
        action = (item.action or "not asked for") + froms.get(item.action, "")
        table.add_row(item.state.name, item.state.state, Text(action))
        lines.append(f"{item.state.name:<14} {item.state.state}: {action}")
    show(console, table, lines)
