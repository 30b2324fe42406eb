"""Linear layers whose fp32 products run in oneDNN, for CPUs on which torch's own, in MKL, are slow.

PyTorch takes bf16 products on CPUs from oneDNN and fp32 ones from MKL, which on AMD's CPUs reaches less than half of
what oneDNN does there, to the same precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def faster(device: torch.device) -> bool:
    """Whether this is a CPU of AMD, and torch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return device.type == "cpu" and amd and torch.backends.mkldnn.is_available()


class OneDNNLinear(nn.Linear):
    """nn.Linear with products in oneDNN; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Linear.apply(x.flatten(0, -2), self.weight)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def convert(module: nn.Module) -> None:
    """Turns the nn.Linear submodules into `OneDNNLinear`, in place. Parameters stay the same under the same names."""
    for linear in module.modules():
        if type(linear) is nn.Linear:
            linear.__class__ = OneDNNLinear


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · bᵀ, b (N, K) → (M, N), fp32; b may have any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        if x.size(1) < grad.size(1):  # the first factor must lie row by row: the smaller is copied
            return dx, product(x.T.contiguous(), grad.T).T
        return dx, product(grad.T.contiguous(), x.T)
