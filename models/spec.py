"""What a model is, as plain arithmetic: no tensor is built here and torch is not imported."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder-only transformer.

    `width` is the residual width, `ffn_width` the hidden width of the MLP, `sequence_len` the longest
    training context in tokens, `softcap` the bound on logits (0 for none).
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocab_size: int
    sequence_len: int
    rope_base: float = 10_000.0
    softcap: float = 15.0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "ffn_width", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    @staticmethod
    def from_depth(depth: int, vocab_size: int, sequence_len: int) -> ModelSpec:
        """The depth family's rule: width = 64·depth; the fewest heads ≥ width/128 whose size is a multiple of 8."""
        if not 1 <= depth <= 64:
            raise ValueError(f"depth must be between 1 and 64, got {depth}")
        width = 64 * depth
        heads = math.ceil(width / 128)
        while width % heads or (width // heads) % 8:
            heads += 1
        return ModelSpec(depth, width, heads, heads, 4 * width, vocab_size, sequence_len)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output head."""
        return 2 * self.vocab_size * self.width

    @property
    def matrix_parameters(self) -> int:
        """All weights of the blocks: query, key, value and output projections, and the two MLP matrices."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 2 * self.width * self.ffn_width)

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.matrix_parameters

    @property
    def flops_per_token(self) -> int:
        """Forward and backward FLOPs a token: 6 a weight that multiplies, plus attention's 12·L·T·width.

        The convention of PaLM (arXiv 2204.02311, appendix B): the embedding look-up costs nothing.
        """
        weights = self.matrix_parameters + self.vocab_size * self.width
        return 6 * weights + 12 * self.layers * self.width * self.sequence_len

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in an fp32 cache."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim
