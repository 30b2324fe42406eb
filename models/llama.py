"""The llama family (2 and 3: arXiv 2307.09288, 2407.21783) and qwen3 (arXiv 2505.09388).

RoPE, RMSNorm with weights, SwiGLU, grouped keys; qwen3 also normalises every query and key head before RoPE.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, Block, LanguageModel, rope_tables, rotate
from models.spec import ModelSpec


class RotaryAttention(Attention):
    def place(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert cos is not None and sin is not None
        return rotate(x, cos, sin)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """In x's type: with an fp32 weight beside bf16 heads torch leaves its fused kernel."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class QKNormAttention(RotaryAttention):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.q_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps)
        self.k_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps)


class SwiGLU(nn.Module):
    """arXiv 2002.05202"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.up_proj = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.down_proj = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Llama(LanguageModel):
    def __init__(self, spec: ModelSpec) -> None:
        norm = partial(RMSNorm, spec.width, eps=spec.norm_eps)
        attend = QKNormAttention if spec.family == "qwen3" else RotaryAttention
        blocks = (Block(attend(spec), SwiGLU(spec), norm) for _ in range(spec.layers))
        tables = rope_tables(spec.head_dim, spec.rope_base, spec.sequence_len, spec.rope_scaling)
        super().__init__(spec, blocks, norm(), tables)
