"""What the connected cluster has to run on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import ray


@dataclass(frozen=True)
class Devices:
    """Totals over all nodes of the cluster."""

    kind: Literal["cpu", "cuda"]
    gpus: int
    cpus: int

    def threads(self, workers: int) -> int:
        """CPU threads for each of `workers` processes that compute at the same time on one node."""
        return max(1, min(self.cpus, os.cpu_count() or 1) // workers)


def resources() -> Devices:
    """The cluster's devices. `cluster.runtime.connect` comes first."""
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    return Devices("cuda" if gpus else "cpu", gpus, int(total.get("CPU", 0)))
