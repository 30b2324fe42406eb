"""The depth family: nanochat's architecture of October 2025.

RoPE, then QK-norm; relu² MLP; RMSNorm without weights, once more after the embedding; untied output head; logits
capped at ±softcap by a tanh. Weight names are those of transformers' `NanoChatForCausalLM`, so a checkpoint is an
export.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spec import ModelSpec

NORM_EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a weight (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rope_tables(spec: ModelSpec, positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding (arXiv 2104.09864), each (positions, head_dim/2), fp32."""
    inv_freq = spec.rope_base ** -(
        torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    )
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inv_freq)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + head_dim/2) of x (B, T, H, D) by the tables (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q_proj = nn.Linear(spec.width, spec.heads * spec.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(spec.heads * spec.head_dim, spec.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.fc2 = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = Attention(spec)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(norm(x), cos, sin)
        x = x + self.mlp(norm(x))
        return x


class Trunk(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.width)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))


class NanoChat(nn.Module):
    """`forward` gives the loss of every position, `logits` the fp32 scores."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.lm_head = nn.Linear(spec.width, spec.vocab_size, bias=False)
        cos, sin = rope_tables(spec, spec.sequence_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, seed: int) -> None:
        """Fills every weight from `seed`: projections into the residual stream and the head start at zero.

        Matrices are normal with deviation min(1, sqrt(out/in)) / sqrt(in), the spectral condition of arXiv 2310.17813.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
                    p.zero_()
                elif name.endswith("embed_tokens.weight"):
                    p.copy_(torch.randn(p.shape, generator=generator))
                else:
                    fan_out, fan_in = p.shape
                    std = min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
                    p.copy_(torch.randn(p.shape, generator=generator) * std)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) → normalised residual (B, T, width)."""
        cos, sin = self.cos[: ids.size(1)], self.sin[: ids.size(1)]  # type: ignore[index]
        x = norm(self.model.embed_tokens(ids))
        for block in self.model.layers:
            x = block(x, cos, sin)
        return norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) → capped scores (B, T, vocab), fp32."""
        scores = self.lm_head(self.hidden(ids)).float()
        cap = self.spec.softcap
        return cap * torch.tanh(scores / cap) if cap else scores

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids and targets (B, T) → negative log-likelihood of each target (B, T), fp32, in nats."""
        logits = self.logits(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
