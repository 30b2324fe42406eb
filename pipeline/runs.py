"""`fathom runs`: every run in a storage, how far it is, how good, and how long ago it last got further."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster import manifest as manifests
from cluster.storage import Storage, StorageError
from pipeline.artifacts import RunStore
from pipeline.attempts import attempts
from pipeline.config import add_storage_flag
from pipeline.status import overall, run_names, run_states
from pipeline.terminal import Terminal, say, show
from pipeline.tracking import STYLES, duration, key_metrics


@dataclass(frozen=True)
class Listed:
    """A run: its state, the stages that are done of all, the figures of the last one, seconds since it last got
    further, and why it cannot be read."""

    name: str
    state: str
    done: int
    stages: int
    at: str  # the stage that runs, failed or comes next, else the last
    metrics: dict[str, Any]
    seconds_ago: float | None
    error: str | None = None


def listed(storage_uri: str, name: str) -> Listed:
    try:
        store = RunStore(storage_uri, name)
        states = run_states(store)
        moments = [state.manifest.created for state in states if state.manifest]
        for state in states:
            if state.checkpoint_step is not None:
                place = store.stage(state.name).at(manifests.checkpoint_path(state.checkpoint_step))
                moments += [saved.created] if (saved := manifests.read(place)) else []
        moments += [moment for a in attempts(store.storage) for moment in (a.began, a.ended) if moment]
    except (OSError, StorageError, ValueError) as error:  # such as a copy of a run whose name no run can have
        return Listed(name, "unread", 0, 0, "", {}, None, str(error))
    done = [state for state in states if state.state == "done"]
    whole = overall(state.state for state in states)
    under_way = [s for s in states if s.state == whole != "done"] or [s for s in states if s.state != "done"]
    at = (under_way or states)[0 if under_way else -1]
    figures = at.progress.metrics if at.progress and at.state != "done" else {}
    evaluated = [state for state in done if state.name.startswith("evaluate_") and state.manifest]
    if not figures and (last := (evaluated or done)[-1:]) and last[0].manifest:
        figures = last[0].manifest.metrics
    fault = next((state.error for state in states if state.error), None)
    return Listed(name, whole, len(done), len(states), at.name, figures, _ago(moments), fault)


def _ago(moments: list[str]) -> float | None:
    """Seconds since the latest of some moments, of which those that are none are left out."""
    seconds = []
    for moment in moments:
        try:
            seconds.append((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
        except (ValueError, TypeError):
            continue
    return max(0.0, min(seconds)) if seconds else None


def age(seconds: float | None) -> str:
    """For people: 3m05s, 2h07m, 5 days; empty when not known."""
    return f"{seconds // 86_400:,.0f} days" if seconds is not None and seconds >= 2 * 86_400 else duration(seconds)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, the run that last got further first, or with --json a list of `Listed`."""
    parser = argparse.ArgumentParser(prog="fathom runs", description=__doc__)
    add_storage_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    runs = [listed(args.storage, name) for name in run_names(args.storage)]
    runs.sort(key=lambda run: (run.seconds_ago is None, run.seconds_ago or 0.0))
    if args.json:
        print(json.dumps({"runs": [asdict(run) for run in runs]}, indent=1))
        return 0
    console, lines, table = Terminal(), [], Table(box=None, pad_edge=False)
    if not runs:
        say(console, f"no runs in {Storage(args.storage).uri}")
        return 0
    for column in ("run", "state", "stages", "at", "figures", "age"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        stages, figures = f"{run.done}/{run.stages}", key_metrics(run.metrics, most=3)
        state, at = Text(run.state, STYLES.get(run.state, "dim")), Text(run.at)
        table.add_row(Text(run.name), state, stages, at, Text(figures), age(run.seconds_ago))
        words = [f"{run.state}, {stages} stages", run.at, figures.replace("  ", ", "), age(run.seconds_ago)]
        lines += [run.name, f"  {', '.join(filter(None, words))}"]
    show(console, table, lines)
    for run in runs:
        if run.error:
            say(console, f"{run.name}: {run.error}")
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["runs", *sys.argv[1:]]))
