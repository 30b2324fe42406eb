"""Linear layers whose three products run in 8-bit floats (arXiv 2209.05433), on GPUs that have them.

Each tensor gets one scale, which brings its largest magnitude to the format's: e4m3 for activations and weights, whose
products need the digits, e5m2 for gradients, which need the range. The master weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the hardware's products want every dimension but the first one of the result to be a multiple

# (a (M, K) fp8, b (K, N) fp8 with K contiguous, their scales () fp32, dtype) → (M, N) of dtype
Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def supported(device: torch.device | str) -> tuple[bool, str]:
    """Whether the device multiplies fp8, and what it would take if not."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return False, f"fp8 needs a CUDA device of compute capability 8.9 or newer (Ada, Hopper), not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return False, f"fp8 needs compute capability 8.9 or newer (Ada, Hopper); {name} has {major}.{minor}"
    return True, f"compute capability {major}.{minor} multiplies fp8"


class Fp8Linear(nn.Linear):
    """nn.Linear with fp8 products; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.bias)


def convert(module: nn.Module) -> list[str]:
    """Turns the nn.Linear submodules whose dimensions fit into `Fp8Linear`, in place; returns their names.

    Parameters stay the same tensors under the same names. Raises ValueError if their device, where they have one yet,
    has no fp8.
    """
    linears = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    fitting = {n: m for n, m in linears.items() if m.in_features % MULTIPLE == 0 and m.out_features % MULTIPLE == 0}
    for device in {m.weight.device for m in fitting.values() if not m.weight.is_meta}:
        works, reason = supported(device)
        if not works:
            raise ValueError(reason)
    for linear in fitting.values():
        linear.__class__ = Fp8Linear
    return list(fitting)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) → (..., N), of the autocast dtype if autocast is on, else of x's.

    K and N must be multiples of 16.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, dtype, scaled_product)
    out = out.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias.to(dtype)


def reference_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`fp8_linear` with the same rounding to fp8, the products in fp32: runs anywhere."""
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, x.dtype, reference_product)
    return out.unflatten(0, x.shape[:-1])


def quantize(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t → (fp8 of t / scale, scale () fp32); scale·fp8 is about t."""
    # A scale of zero, or one whose inverse overflows, would make NaN of a tensor of zeros.
    scale = (t.abs().amax().float() / torch.finfo(dtype).max).clamp(min=1e-30)
    largest = torch.finfo(dtype).max
    return (t.float() / scale).clamp(-largest, largest).to(dtype), scale


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    # Sums of e4m3 × e4m3 may be kept shorter for speed; a gradient's range needs the full ones.
    fast = a.dtype == b.dtype == E4M3
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def reference_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return ((a.float() @ b.float()) * (scale_a * scale_b)).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, product: Product) -> Tensor:
        x8, x_scale = quantize(x, E4M3)
        w8, w_scale = quantize(weight, E4M3)
        # The 8-bit copies are half the memory of what autocast would keep.
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.product, ctx.dtypes = product, (x.dtype, weight.dtype)
        return product(x8, w8.T, x_scale, w_scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = quantize(grad, E5M2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            # .T.contiguous().T: the second factor must lie column by column.
            dx = ctx.product(g8, w8.T.contiguous().T, g_scale, w_scale, grad.dtype).to(x_dtype)
        if ctx.needs_input_grad[1]:
            short = -x8.size(0) % MULTIPLE  # rows of zeros change no sum
            g_t, x_t = (F.pad(t.T, (0, short)) if short else t.T.contiguous() for t in (g8, x8))
            dw = ctx.product(g_t, x_t.T, g_scale, x_scale, grad.dtype).to(w_dtype)
        return dx, dw, None, None
