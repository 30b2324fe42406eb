"""`fathom status RUN`: where every stage of a run stands, also while it runs; with --watch, until it ends.

Exit status with --watch: 0 when the run has ended with all that its command was to do, 1 when it failed, was stopped or
is dead; Ctrl-C, which the run does not notice, gives 130.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import time
from collections.abc import Iterable, Mapping

from rich.console import Console

from cluster.storage import MARKER, Storage, StorageError
from pipeline.artifacts import REPORT, REPORT_PAGE, Holder, Pulse, RunStore, StageState
from pipeline.attempts import Attempt, attempts
from pipeline.config import STAGE_NAMES, add_storage_flag, stage_names
from pipeline.terminal import Terminal, plain, say
from pipeline.tracking import POLL_SECONDS, LiveView, final_table, summary

log = logging.getLogger(__name__)


def run_states(store: RunStore) -> list[StageState]:
    """Every stage of a run as storage shows it; a damaged artifact counts as failed, with the reason.

    Raises FileNotFoundError for a run that storage does not know.
    """
    if not store.storage.list():
        raise FileNotFoundError(f"no run {store.run!r}: {store.storage.uri} does not exist or is empty; see --storage")
    config = store.recorded()
    states = []
    for name in stage_names(config) if config else STAGE_NAMES:
        try:
            states.append(store.state(name))
        except StorageError as error:
            states.append(StageState(name, "failed", error=str(error)))
    return states


def overall(states: Iterable[str]) -> str:
    """Where a run as a whole stands by its stages: done, running, failed, drifted, or stopped before its end."""
    found = {*states}
    return "done" if found <= {"done"} else next((s for s in ("running", "failed", "drifted") if s in found), "stopped")


def run_names(storage_uri: str) -> list[str]:
    """The runs in a storage, sorted by name."""
    storage = Storage(storage_uri)
    return [name for name in sorted(storage.folders()) if storage.exists(f"{name}/{MARKER}")]


def watch(store: RunStore, console: Console) -> int:
    """Shows a run that another process runs, as that one does, from storage alone; returns when it has ended, or shows
    at once how it ended. Raises FileNotFoundError for a run that storage does not know."""
    run_states(store)
    pulse = Pulse(store)
    while (state := seen(pulse)) == "alive":
        assert pulse.holder is not None
        holder, attempt = pulse.holder, under_way(store, pulse.holder)
        if attempt is None:  # it is being started
            time.sleep(POLL_SECONDS)
            continue
        say(console, f"run {store.run}, by {holder.user}@{holder.host} pid {holder.pid} since {holder.since}")
        told: dict[str, str] = {}
        with LiveView(store, [name for name in STAGE_NAMES if name in attempt.actions], console, joining=True):
            while seen(pulse) == "alive" and pulse.holder.token == holder.token:
                places = (under_way(store, holder) or attempt).places
                tell_places({what: where for what, where in places.items() if told.get(what) != where}, holder, console)
                told |= places
                time.sleep(POLL_SECONDS)
    states, last = run_states(store), next(reversed(attempts(store.storage)), None)
    final_table(store, states, console)
    if store.stage(REPORT).exists(REPORT_PAGE):
        say(console, f"report: {store.stage(REPORT).uri}/{REPORT_PAGE}")
    if state == "dead":
        assert pulse.holder is not None
        where = f"pid {pulse.holder.pid} on {pulse.holder.host}"
        say(console, f"the process that ran it ({where}) is gone: run the same command again to go on from there")
        return 1
    if last is None or last.outcome is None:
        return 0 if overall(s.state for s in states) == "done" else 1
    say(console, f"the last attempt began {last.began} and ended {last.ended}: {last.outcome}")
    return 0 if last.outcome == "done" else 1


def seen(pulse: Pulse) -> str:
    """What `pulse.look` says; "alive" while storage does not answer, since the run may go on meanwhile."""
    try:
        return pulse.look()
    except (OSError, StorageError) as error:
        log.warning("the run's storage cannot be read: %s", error)
        return "alive"


def under_way(store: RunStore, holder: Holder) -> Attempt | None:
    """The attempt of the process that holds the run, once it has begun with its stages."""
    last = next(reversed(attempts(store.storage)), None)
    return last if last and last.ended is None and last.began >= holder.since else None


def tell_places(places: Mapping[str, str], holder: Holder, console: Console) -> None:
    """Where to look at the run; an address of its machine alone is none of another's."""
    for what, where in places.items():
        there = f" on {holder.host}" if "//127." in where and holder.host != socket.gethostname() else ""
        say(console, f"{what} {where}{there}")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or with --json {"run", "stages": [{"name", "state", "seconds", "metrics", "notes", "uri"}]}.
    Without a run, the names of those there are."""
    parser = argparse.ArgumentParser(prog="fathom status", description=__doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", help="name of the run; without it, which runs there are")
    add_storage_flag(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--watch", action="store_true", help="follow the run, wherever it runs, until it ends")
    args = parser.parse_args(argv)
    if args.watch and args.run is None:
        parser.error("--watch follows one run: name it")
    if args.run is None:
        runs = run_names(args.storage)
        print(
            json.dumps({"runs": runs})
            if args.json
            else plain("\n".join(runs)) or f"no runs in {Storage(args.storage).uri}"
        )
        return 0
    store = RunStore(args.storage, args.run)
    if args.watch:
        return watch(store, Terminal())
    states = run_states(store)
    if args.json:
        print(json.dumps({"run": args.run, "stages": [summary(store, state) for state in states]}, indent=1))
        return 0
    console, pulse = Terminal(), Pulse(store)
    final_table(store, states, console)
    if pulse.look() == "alive" and pulse.holder and (attempt := under_way(store, pulse.holder)):
        tell_places(attempt.places, pulse.holder, console)
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["status", *sys.argv[1:]]))
