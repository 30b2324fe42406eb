"""`python tests/takeover.py`: the driver of a run is stopped for a minute while the same command is given again.

Prints who holds the run at each write of a checkpoint, as the storage itself shows it, and what the stopped driver says
when it goes on. Exit status 0 when all writes after the takeover are the second command's, and the first one ended.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from conftest import SETTINGS, flags
from runs import Run, start

STOPPED_SECONDS = 60.0
LONG = {"base.steps": 4_000, "base.save_every": 20, "base.eval_every": 1_000}


def watch(run: Run, writes: list[tuple[float, str, str]], over: threading.Event) -> None:
    """Notes the time of every new manifest of a checkpoint, and whose token the run's marker had by then."""
    seen: dict[Path, tuple[int, int]] = {}
    while not over.wait(0.02):
        for path in sorted(run.path.glob("base/checkpoints/*/manifest.json")):
            try:
                found = path.stat()
                holder = json.loads((run.path / ".fathom-run").read_text())["token"][:6]
            except OSError:  # removed just now
                continue
            if seen.get(path) != (found.st_ino, found.st_mtime_ns):
                seen[path] = found.st_ino, found.st_mtime_ns
                writes.append((time.monotonic(), holder, path.parent.name))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "r", ["--preset", "demo", *flags(SETTINGS | LONG), "--until", "base"])
        writes: list[tuple[float, str, str]] = []
        over = threading.Event()
        threading.Thread(target=watch, args=(run, writes, over), daemon=True).start()
        first = start("run", *run.arguments())
        assert first.until(lambda: len(writes) > 1, 300), first.output()
        stopped = time.monotonic()
        first.process.send_signal(signal.SIGSTOP)
        first.look()
        second = start("run", *run.arguments())
        second.until(lambda: time.monotonic() - stopped > STOPPED_SECONDS, 2 * STOPPED_SECONDS)
        first.process.send_signal(signal.SIGCONT)
        ended = first.finish(60)
        second.until(lambda: len({holder for _, holder, _ in writes}) > 1, 120)
        second.until(lambda: time.monotonic() - stopped > STOPPED_SECONDS + 10, 60)
        second.kill()
        over.set()
    for when, holder, step in writes:
        print(f"{when - stopped:6.1f} s  {holder}  {step}")
    print(ended.output.splitlines()[-1])
    holders = [holder for _, holder, _ in writes]
    changes = sum(a != b for a, b in itertools.pairwise(holders))
    return 0 if ended.code == 1 and "taken over" in ended.output and changes == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
