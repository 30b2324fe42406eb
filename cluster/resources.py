"""What the connected cluster has to run on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import ray

from cluster.hardware import cpu_name


@dataclass(frozen=True)
class Devices:
    """Totals over all nodes of the cluster."""

    kind: Literal["cpu", "cuda"]
    gpus: int
    cpus: int
    nodes: int = 1

    def threads(self, workers: int) -> int:
        """CPU threads for each of `workers` processes that compute at the same time on one node."""
        return max(1, min(self.cpus, os.cpu_count() or 1) // workers)


def resources() -> Devices:
    """The cluster's devices. `cluster.runtime.connect` comes first."""
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Devices("cuda" if gpus else "cpu", gpus, int(total.get("CPU", 0)), nodes)


def described(devices: Devices) -> str:
    """The devices in words: how many GPUs of which kind, as Ray names it, or the CPU cores of which model."""
    if devices.kind == "cpu":
        return f"{devices.cpus} CPU cores ({cpu_name()})"
    marks = (name for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    kinds = ", ".join(sorted(name.partition(":")[2] for name in marks))
    return f"{devices.gpus} GPUs" + (f" ({kinds})" if kinds else "")
