"""Weights on their way from the trainer to the engines, and the proof that they arrived.

They go by the names of `models.hf.engine_state`: on CPUs through Ray's object store into vLLM's `reload_weights`, on
GPUs by vLLM's weight transfer, CUDA IPC where engine and trainer share a device and NCCL where they do not.

The proof is a digest of what an engine computes with, read back out of it and compared with what the trainer sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from torch import Tensor


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of the weights, in order of their names; 0 and -0 count as the same."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update((weights[name].detach().cpu() + 0).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Transfer:
    """vLLM's weight transfer from this process to the engines of `actors`, on GPUs."""

    def __init__(self, actors: Sequence[Any], shared: bool, timeout: float) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        self.source = _Source()
        where = ray.util.get_node_ip_address()
        nccl = NCCLTrainerInitInfo(where, get_open_port(), world_size=1 + len(actors), rank=0)
        self.engine = WeightTransferTrainerFactory.trainer_init(
            IPCTrainerInitInfo(rank=0) if shared else nccl, client=_Client(actors, timeout), source=self.source
        )

    def send(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces the weights of every engine by these, which lie on this process's device."""
        self.source.weights = weights
        self.engine.send_weights()


class _Source:
    """What vLLM's `WeightSource` asks for: the names, types and shapes of the weights, and the weights."""

    weights: Mapping[str, Tensor]

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class _Client:
    """What vLLM's `VLLMWeightSyncClient` asks for: the steps of an update, taken by all engines at once."""

    def __init__(self, actors: Sequence[Any], timeout: float) -> None:
        self.actors, self.timeout = actors, timeout

    def _all(self, method: str, **arguments: Any) -> None:
        ray.get([actor.transfer.remote(method, arguments) for actor in self.actors], timeout=self.timeout)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.actors]
        if "rank_offset" in init_info:  # NCCL: each engine is a rank of its own, after the trainer's
            infos = [info | {"rank_offset": 1 + n} for n, info in enumerate(infos)]
        calls = [
            actor.transfer.remote("init_weight_transfer_engine", {"init_info": info})
            for actor, info in zip(self.actors, infos, strict=True)
        ]
        ray.get(calls, timeout=self.timeout)

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")
