"""Who computes what: one process a device, each with a slice of every batch, and how a model is laid over them.

Everything here is applied from outside: the models know nothing of it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import attention, fp8, onednn
from models.layers import LanguageModel
from stages.config import EngineConfig

# What selective checkpointing keeps: the results of matrix products and attention, which cost most to compute again.
COSTLY = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class World:
    """This process among the `size` that train together. `threads` is its share of the CPU.

    `host` is a group for small values on the CPU, so that what the hosts agree on never waits for a device.
    """

    rank: int
    size: int
    device: torch.device
    threads: int
    host: Any = field(default=None, compare=False)

    @staticmethod
    def current(cpus: int) -> World:
        """The world of torch.distributed where it is initialised, else this process alone, with its share of `cpus`."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        here = min(cpus, os.cpu_count() or 1)
        threads = max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        return World(rank, size, device, threads, dist.new_group(backend="gloo") if size > 1 else None)

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension."""
        return DeviceMesh(self.device.type, list(range(self.size)))

    @functools.cached_property
    def host_mesh(self) -> DeviceMesh:
        """The same for tensors on the CPU."""
        return DeviceMesh.from_group(self.host, "cpu")

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, on the hosts alone."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.host)
        return together.tolist()

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks, joined along the first dimension; they may differ in length."""
        if self.size == 1:
            return value
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value.cpu(), group=self.host)
        return torch.cat(parts).to(value.device)

    def first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.host)
        return values[0]

    def everyone(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.host)

    def slice(self, items: Any) -> Any:
        """This rank's contiguous share of a global batch; shares differ in length by one at most."""
        n = len(items)
        return items[n * self.rank // self.size : n * (self.rank + 1) // self.size]


def keep_freed_memory() -> None:
    """Has glibc hand freed memory out again rather than return it to the system, whose pages are cleared at every
    return: eager steps become 10 to 60% faster, compiled ones 4 to 9%. In a thread with an arena of its own this holds
    for up to 64 MB, so workers share one (`cluster.runtime.WORKER_ENV`)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # elsewhere than in glibc
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


def computes_in(device: torch.device, precision: str) -> str:
    """The precision meant by "auto": "bf16" where the device computes in it natively, else "fp32"."""
    if precision != "auto":
        return precision
    on_gpu = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Compute precision of forward passes; weights stay as they are."""
    enabled = computes_in(device, precision) != "fp32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def shards(config: EngineConfig, world: World) -> bool:
    """Whether every rank is to have only its rows of the weights."""
    return config.parallel == "fsdp" and world.size > 1


def initial_device(config: EngineConfig, world: World) -> str:
    """Where a model is to be built: no rank has memory for the whole of one that is sharded, `prepare` fills it."""
    return "meta" if shards(config, world) else "cpu"


@torch.no_grad()
def _fill(model: LanguageModel, weights: Iterable[tuple[str, Tensor]], world: World) -> None:
    """Gives a sharded model on the meta device memory, and this rank's rows of `weights`, one weight after another."""
    # the rope tables are no weights and have their values already
    model._apply(lambda t: torch.empty_like(t, device=world.device) if t.is_meta else t.to(world.device))
    parameters = dict(model.named_parameters())
    for name, whole in weights:
        weight = parameters[name]
        assert isinstance(weight, DTensor)
        mine = weight.to_local()
        part = whole[math.ceil(len(weight) / world.size) * world.rank :][: len(mine)]
        mine.zero_()  # padding rows
        mine[: len(part)].copy_(part)


def prepare(model: LanguageModel, config: EngineConfig, precision: str, world: World) -> str:
    """Lays `model` over the world as `config` says, in place; returns what was chosen for it, and why.

    Raises ValueError for what this device cannot do.
    """
    precision = computes_in(world.device, precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    compiles = config.compile if config.compile is not None else world.device.type == "cuda"
    sharded = shards(config, world)
    if config.cuda_graphs and (world.device.type != "cuda" or not compiles or sharded):
        raise ValueError("cuda_graphs needs a GPU, compile, and whole weights (ddp or zero1)")
    if precision == "fp8" and not (support := fp8.supported(world.device))[0]:
        raise ValueError(support[1])
    chosen = attention.choose(config.attention, world.device, dtype, model.spec.head_dim, compiles)
    model.set_attention(chosen.backend)
    model.compile_loss = compiles
    if not sharded:  # whole, it may be too large for one device
        model.to(world.device)
    # gradients are divided by the targets of all ranks beforehand, so they are summed, not averaged; inputs stay as
    # they are, since the weights of targets among them must not be rounded
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(module: nn.Module) -> None:
        part = fully_shard(module, mesh=world.mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)

    for block in model.model.layers:
        if model.source is None:
            block.to(world.device)
        if precision == "fp8":
            fp8.convert(block)
        elif (
            precision == "fp32" and not compiles and config.checkpointing != "selective" and onednn.faster(world.device)
        ):
            onednn.convert(block)
        if config.checkpointing != "none":
            block.forward = _checkpointed(block.forward, config.checkpointing)
        if compiles:
            block.compile(mode="reduce-overhead" if config.cuda_graphs else None, dynamic=False)
        if sharded:
            shard(block)
    if sharded:
        shard(model)
        register_fsdp_forward_method(model, "run")
    if model.source is not None:
        _fill(model, model.source(model), world)
    return f"computes in {precision}; attention: {chosen.backend}, {chosen.reason}"


def _checkpointed(forward: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    def keep_costly(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_costly)

    def run(*args: Any) -> Tensor:  # a function of our own: torch.compile passes over one that is only torch's
        return checkpoint(forward, *args, **options)

    return run


def is_sharded(model: nn.Module) -> bool:
    """Whether every rank has only its rows of the weights."""
    return isinstance(model, FSDPModule)


def synchronise_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients: only that of a step's last micro-batch has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, whole, whatever the mode; every rank must run through all of them."""
    for name, p in model.named_parameters():
        whole = p.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole
