"""The depth family: nanochat's architecture of October 2025.

RoPE, then QK-norm; relu² MLP; RMSNorm without weights, once more after the embedding; untied output head; logits
capped at ±softcap by a tanh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import MLP, Attention, Block, LanguageModel, rope_tables, rotate
from models.spec import ModelSpec


def norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a weight (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def squared_relu(x: Tensor) -> Tensor:
    """arXiv 2109.08668"""
    return F.relu(x).square()


class NormedAttention(Attention):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.eps = spec.norm_eps

    def place(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None and sin is not None
        return norm(rotate(x, cos, sin), self.eps)


class NanoChat(LanguageModel):
    def __init__(self, spec: ModelSpec) -> None:
        def residual_norm() -> nn.Module:
            return nn.RMSNorm(spec.width, eps=spec.norm_eps, elementwise_affine=False)

        cos, sin = rope_tables(spec.head_dim, spec.rope_base, spec.sequence_len)
        blocks = (Block(NormedAttention(spec), MLP(spec, squared_relu), residual_norm) for _ in range(spec.layers))
        # nanochat turns the other way round than Llama does
        super().__init__(spec, blocks, residual_norm(), (cos, -sin))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return norm(super().embed(ids, positions), self.spec.norm_eps)

    def init_std(self, name: str, shape: torch.Size) -> float:
        """Projections into the residual stream and the head start at zero.

        Matrices have deviation min(1, sqrt(out/in)) / sqrt(in), the spectral condition of arXiv 2310.17813.
        """
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            return 0.0
        if name.endswith("embed_tokens.weight"):
            return 1.0
        fan_out, fan_in = shape
        return float(min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5)
