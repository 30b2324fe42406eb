"""What the families share: attention, MLP, block, and the language model around the blocks.

A family is a block's parts and its start and end; the rest is here. Weights have the same names in all families, those
of transformers' Llama where it has them, so what is applied from outside (optimizer groups, sharding, compilation) need
not know the family: `model.embed_tokens`, `model.layers.N`, `lm_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from models.spec import ModelSpec

T = TypeVar("T")
Rows = TypeVar("Rows", Tensor, Tensor | None)


def rope_tables(
    head_dim: int, base: float, positions: int, scaling: tuple[float, float, float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding (arXiv 2104.09864), each (positions, head_dim/2), fp32.

    Under Llama 3.1's `scaling` (factor, low, high, before) a pair that turns round less than `low` times in `before`
    tokens is slowed down by `factor`, one that turns more than `high` times is left, and between the two it is a mean.
    """
    places = partial(torch.arange, dtype=torch.float32, device="cpu")  # also where weights are on the meta device
    inv_freq = base ** -(places(0, head_dim, 2) / head_dim)
    if scaling is not None:
        factor, low, high, before = scaling
        kept = ((before * inv_freq / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        inv_freq = kept * inv_freq + (1 - kept) * inv_freq / factor
    angles = torch.outer(places(positions), inv_freq)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (i, i + D/2) of x (..., T, H, D) by the angles of the tables (..., T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# queries (B, T, H, D), or those of some places (N, H, D), keys and values (B, T, KV, D) → what the queries gathered
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Causal attention with grouped keys. `place` gives queries or keys their position; here, none."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.backend = "sdpa"
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.width, queries, bias=spec.biases)
        self.k_proj = nn.Linear(spec.width, keys, bias=spec.biases)
        self.v_proj = nn.Linear(spec.width, keys, bias=spec.biases)
        self.o_proj = nn.Linear(queries, spec.width, bias=spec.biases)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()

    def place(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """x (..., T, H, D) as attention compares it; tables (..., T, D/2), or None."""
        return x

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        attend: Attend | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, width) → (B, T, width), or of the places `at` (N,) among the B·T alone (N, width). `attend` replaces
        attention among the tokens of x, for one that also sees a cache, or has the queries of some places only."""
        q, k, v = self.q_proj(_only(x, at)), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        q, k = self.place(self.q_norm(q), _only(cos, at), _only(sin, at)), self.place(self.k_norm(k), cos, sin)
        # autocast may compute norms in fp32, attention wants one type
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = attention(q, k, v, self.backend) if attend is None else attend(q, k, v)
        out: Tensor = self.o_proj(y.flatten(-2))
        return out


def _only(x: Rows, at: Tensor | None) -> Rows:
    """x (B, T, C), or of its places `at` (N,) among the B·T alone (N, C)."""
    return x if x is None or at is None else x.flatten(0, 1)[at]


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(spec.width, spec.ffn_width, bias=spec.biases)
        self.fc2 = nn.Linear(spec.ffn_width, spec.width, bias=spec.biases)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Block(nn.Module):
    """`norm` makes one norm over the residual."""

    def __init__(self, self_attn: Attention, mlp: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        attend: Attend | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, width) → (B, T, width), or of the places `at` (N,) among the B·T alone (N, width), where no later
        block needs the others."""
        x = _only(x, at) + self.self_attn(self.input_layernorm(x), cos, sin, attend, at)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Trunk(nn.Module):
    embed_positions: nn.Embedding  # where positions are learned

    def __init__(self, spec: ModelSpec, blocks: Iterable[Block], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.padded_vocab, spec.width)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm


class LanguageModel(nn.Module):
    """`forward` gives the loss, `logits` the fp32 scores. `z_loss` is the weight of logsumexp² in the summed loss,
    `compile_loss` lets a CPU compile the loss.

    Embedding and head have `spec.padded_vocab` rows. The rows past the vocabulary stand for no token: they are zero,
    never looked up, no part of any softmax, and get no gradient.
    """

    cos: Tensor | None
    sin: Tensor | None
    # where the weights are on the meta device: what they are to be filled with once each rank has its rows of them,
    # whole, by name, without padding rows
    source: Callable[[LanguageModel], Iterable[tuple[str, Tensor]]] | None = None

    def __init__(
        self,
        spec: ModelSpec,
        blocks: Iterable[Block],
        norm: nn.Module,
        tables: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.z_loss, self.compile_loss = 0.0, False
        self.model = Trunk(spec, blocks, norm)
        self.lm_head = nn.Linear(spec.width, spec.padded_vocab, bias=False)
        if spec.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def set_attention(self, backend: str) -> None:
        """Has every layer attend with this backend of `kernels.attention`."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def init_std(self, name: str, shape: torch.Size) -> float:
        """Standard deviation that matrix `name` starts with: GPT-2's, smaller on the way back into the residual."""
        back = name.endswith(("o_proj.weight", "fc2.weight", "down_proj.weight"))
        return 0.02 / (2 * self.spec.layers) ** 0.5 if back else 0.02

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Every weight by name as `seed` has it begin, one drawn at a time, without padding rows: norms are 1, biases
        0, matrices normal. Only shapes are looked at, so the weights themselves may be on the meta device."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            # drawn without the padding, which would move all numbers after it
            padded = name in ("model.embed_tokens.weight", "lm_head.weight")
            shape = (self.spec.vocab_size, *p.shape[1:]) if padded else p.shape
            if p.ndim == 1:
                yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
            elif std := self.init_std(name, p.shape):
                yield name, torch.randn(shape, generator=generator) * std
            else:
                yield name, torch.zeros(shape)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every weight from `seed`, the same on all devices."""
        weights = dict(self.named_parameters())
        for name, weight in self.initial_weights(seed):
            weights[name].zero_()
            weights[name][: len(weight)].copy_(weight)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B, T) at positions (T) or (B, T) → what enters the first block (B, T, width)."""
        x: Tensor = self.model.embed_tokens(ids)
        return x

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        attend: Sequence[Attend] | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """ids (B, T) → normalised residual (B, T, width), or of the places `at` (N,) among the B·T alone (N, width);
        ValueError when T is over `spec.sequence_len`.

        Rows that are no plain text from its beginning have `positions` (B, T), and what replaces attention among
        their tokens, one for each block; with `at` the last of them has the queries of those places (N, H, D).
        """
        if positions is None:
            length = ids.size(1)
            if length > self.spec.sequence_len:
                raise ValueError(f"{length} tokens are more than the model's context of {self.spec.sequence_len}")
            cos, sin = (None if table is None else table[:length] for table in (self.cos, self.sin))
            x = self.embed(ids, torch.arange(length, device=ids.device))
        else:
            cos, sin = (None if table is None else table[positions] for table in (self.cos, self.sin))
            x = self.embed(ids, positions)
        if torch.is_autocast_enabled(x.device.type):  # the residual, too: it is read and written by every product
            x = x.to(torch.get_autocast_dtype(x.device.type))
        last = len(self.model.layers) - 1
        for i, (block, own) in enumerate(zip(self.model.layers, attend or repeat(None), strict=False)):
            x = block(x, cos, sin, own) if at is None or i < last else block(x, cos, sin, own, at)
        normed: Tensor = self.model.norm(x)
        return normed

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) → capped scores (B, T, vocab), fp32."""
        return self.scores(self.hidden(ids))

    def scores(self, hidden: Tensor) -> Tensor:
        """Normalised residual (..., width) → capped scores (..., vocab), fp32."""
        scores: Tensor = self.lm_head(hidden)[..., : self.spec.vocab_size].float()
        cap = self.spec.softcap
        return cap * torch.tanh(scores / cap) if cap else scores

    def run(self, compute: Callable[[], T]) -> T:
        """`compute()`, which may use this model's parts: where ranks share its weights, these are whole meanwhile. All
        ranks run as much of the model."""
        return compute()

    def forward(self, ids: Tensor, targets: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """ids and targets (B, T) → negative log-likelihood of each target (B, T), fp32, in nats.

        With token_weight (B, T), fp32: the scalar sum of token_weight · (nll + z_loss · logsumexp²), which is cheaper,
        as its gradient is computed on the way (z-loss: arXiv 2204.02311, section 5).
        """
        loss = linear_cross_entropy(
            self.hidden(ids).flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            vocab_size=self.spec.vocab_size,
            softcap=self.spec.softcap,
            z_loss=0.0 if token_weight is None else self.z_loss,
            token_weight=None if token_weight is None else token_weight.flatten(),
            compile=self.compile_loss,
        )
        return loss.view_as(targets) if token_weight is None else loss
