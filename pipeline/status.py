"""`fathom status RUN`: where every stage of a run stands, also while it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

from cluster.storage import MARKER, Storage, StorageError
from pipeline.artifacts import RunStore, StageState
from pipeline.config import STAGE_NAMES, add_storage_flag, stage_names
from pipeline.terminal import plain
from pipeline.tracking import final_table, summary


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


def main(argv: list[str] | None = None) -> int:
    """Print the table, or with --json {"run", "stages": [{"name", "state", "seconds", "metrics", "notes", "uri"}]}.
    Without a run, the names of those there are."""
    parser = argparse.ArgumentParser(prog="fathom status", description=__doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", help="name of the run; without it, which runs there are")
    add_storage_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.run is None:
        runs = run_names(args.storage)
        print(
            json.dumps({"runs": runs})
            if args.json
            else plain("\n".join(runs)) or f"no runs in {Storage(args.storage).uri}"
        )
        return 0
    store = RunStore(args.storage, args.run)
    states = run_states(store)
    if args.json:
        print(json.dumps({"run": args.run, "stages": [summary(store, state) for state in states]}, indent=1))
    else:
        final_table(store, states)
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["status", *sys.argv[1:]]))
