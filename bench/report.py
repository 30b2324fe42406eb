"""What every benchmark's record holds: its rows, and the hardware they were measured on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from stages.training.measure import device_name


def hardware_name() -> str:
    """The GPU's name, or the CPU's model and how many of its threads PyTorch uses."""
    return device_name() if torch.cuda.is_available() else f"{device_name()}, {torch.get_num_threads()} threads"


def write(name: str, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes {"benchmark", "hardware", "kind", "torch", "rows"} as JSON to the file `out`."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"hardware": hardware_name(), "kind": kind, "torch": torch.__version__}
    record = {"benchmark": name, **found, "rows": list(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


@contextmanager
def watching_memory() -> Iterator[dict[str, float]]:
    """The most memory there was meanwhile, in GiB: `largest_gib`, resident, of any process below this one, and `gib`,
    of all these and this one together without what processes share."""
    peak, stop = {"largest_gib": 0.0, "gib": 0.0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            largest = total = 0
            own = psutil.Process()
            for process in [own, *own.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                total += memory.rss - memory.shared
                largest = max(largest, memory.rss if process != own else 0)
            for name, size in (("largest_gib", largest), ("gib", total)):
                peak[name] = max(peak[name], size / (1 << 30))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
