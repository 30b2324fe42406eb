"""Who computes what: one process a device, each with a slice of every batch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among the `size` that train together. `threads` is its share of the CPU."""

    rank: int
    size: int
    device: torch.device
    threads: int

    @staticmethod
    def current(threads: int) -> World:
        """The world of torch.distributed where it is initialised, else this process alone."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return World(rank, size, device, threads)

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks, joined along the first dimension; they must have one shape."""
        if self.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value)
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def slice(self, items: Any) -> Any:
        """This rank's contiguous share of a global batch whose length divides by `size`."""
        share = len(items) // self.size
        return items[self.rank * share : (self.rank + 1) * share]

    def sum_gradients(self, model: nn.Module) -> None:
        """Adds up the gradients of all ranks; call it once a step, after the last micro-batch."""
        if self.size > 1:
            handles = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None]
            for handle in handles:
                handle.wait()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Compute precision: "bf16", "fp32", or "auto" for bf16 where the device computes in it natively."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    enabled = precision == "bf16" or (precision == "auto" and native)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
