"""`python -m stages.trackers.follow`: the process that feeds one tracker, for a run that goes on or has ended.

It is told its `Job` in the first line of standard input, and by that input's end to take over the rest and end. So it
also ends when the one who started it was killed. What it writes to standard output is for the user; what libraries say
goes to standard error, a log, which is locked meanwhile: two processes that feed one tracker would double its records.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from cluster.storage import Storage, StorageError
from stages.trackers import SAID, Job, Say, Tracker, settled

NICE = 10
POLL_SECONDS = 5.0
LOCK_SECONDS = 10.0  # for what a killed one had started, which writes out what it was given


def open_tracker(job: Job, say: Say) -> Tracker:
    """Imports are late: each process loads the one library that it feeds."""
    if job.kind == "wandb":
        from stages.trackers.to_wandb import Wandb

        return Wandb(job, say)
    from stages.trackers.to_tensorboard import TensorBoard

    return TensorBoard(job, say)


def follow(job: Job, tracker: Tracker, say: Say, ended: Callable[[float], bool]) -> None:
    """Feeds what is settled of every stage until `ended`, which waits for so many seconds; then all of it once more."""
    root, known, last = Storage(job.storage).at(job.run), dict[str, str](), ended(0)
    while True:
        for stage in job.stages:
            try:
                found = settled(root.at(stage), stage, known.get(stage))
            except (OSError, StorageError) as error:  # such as a checkpoint that is just being removed
                if last:
                    say(f"{stage} could not be read to its end: {error}")
                continue
            if found is not None:
                tracker.feed(found)
                known[stage] = found.version
        if last:
            break
        last = ended(POLL_SECONDS)
    tracker.finish()


def lock(say: Say, ended: Callable[[float], bool]) -> bool:
    """Whether this process alone may feed the tracker: standard error, and all it starts inherits that, is locked."""
    waited = 0.0
    while True:
        try:
            fcntl.flock(2, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if waited >= LOCK_SECONDS and ended(0):
                say("another process feeds it, which is left to it")
                return False
        threading.Event().wait(0.5)
        waited += 0.5


def give_way() -> None:
    """Training comes first. A nice value counts within a session only where Linux shares the CPU among sessions before
    it does so among their processes (autogroup), and this process has a session of its own, which so is nice, too."""
    os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE))


def main() -> int:
    give_way()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job.model_validate_json(sys.stdin.readline())
    stdin = sys.stdin.fileno()

    def say(text: str) -> None:
        out.write(" ".join(text.split()) + "\n")

    def ended(seconds: float) -> bool:
        if not select.select([stdin], [], [], seconds)[0]:
            return False
        if job.limit is not None:  # for when nobody is left to end it
            timer = threading.Timer(2 * job.limit, os._exit, [1])
            timer.daemon = True
            timer.start()
        return True

    try:
        if not lock(say, ended):
            return SAID
        follow(job, open_tracker(job, say), say, ended)
    except Exception as error:  # whatever a library raises: this process does nothing else
        traceback.print_exc()
        sys.stderr.flush()
        later = f"`fathom track {job.run} --to {job.kind}` gives it what is missing"
        say(f"failed, and the run goes on without it: {type(error).__name__}: {error}; {later}")
        os._exit(SAID)  # without what the library would still do at the end
    return 0


if __name__ == "__main__":
    sys.exit(main())
