"""What every benchmark's record holds: its rows, and the hardware they were measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
