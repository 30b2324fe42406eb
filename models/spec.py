"""What a model is, as plain arithmetic: no tensor is built here and torch is not imported."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Family = Literal["depth", "gpt2", "llama", "qwen3"]


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder-only transformer.

    `width` is the residual width, `ffn_width` the hidden width of the MLP, `sequence_len` the longest training context
    in tokens, `softcap` the bound on logits (0 for none), `tied` says that the output head is the token embedding,
    `biases` that linear layers and norms have one, `head_dim` is the size of a head (0 for width / heads), `positions`
    how many tokens of a text the model can place where that is more than `sequence_len` (else 0), `rope_scaling` that
    of Llama 3.1 for long texts: (factor, low_freq_factor, high_freq_factor, positions before).
    """

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocab_size: int
    sequence_len: int
    rope_base: float = 10_000.0
    softcap: float = 0.0
    norm_eps: float = 1e-6
    tied: bool = False
    biases: bool = False
    head_dim: int = 0
    positions: int = 0
    rope_scaling: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "ffn_width", "vocab_size", "sequence_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.positions == self.sequence_len:
            object.__setattr__(self, "positions", 0)
        if self.sequence_len > self.places:
            raise ValueError(f"sequence_len {self.sequence_len} is more than the model's {self.positions} positions")
        if not self.head_dim:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        # What the family's Hugging Face class cannot say could be trained here and then served nowhere.
        if self.family == "gpt2":
            if self.kv_heads != self.heads:
                raise ValueError(f"gpt2 has as many kv_heads as heads, got {self.kv_heads} and {self.heads}")
        elif self.head_dim % 2:
            raise ValueError(f"rotary embedding turns pairs, so head_dim must be even, got {self.head_dim}")
        if self.family in ("depth", "gpt2") and self.head_dim * self.heads != self.width:
            raise ValueError(f"{self.family} has heads of width / heads, got head_dim {self.head_dim}")
        if self.biases and self.family != "gpt2":
            raise ValueError(f"only gpt2 has biases, not {self.family}")
        if self.softcap and self.family != "depth":
            raise ValueError(f"only the depth family caps its logits, not {self.family}")

    @staticmethod
    def from_dial(
        family: Family, depth: int, vocab_size: int, sequence_len: int, width: int | None = None
    ) -> ModelSpec:
        """The dial's rule: width = 64·depth unless given; the fewest heads ≥ width/128 whose size is a multiple of 8.

        The MLP is 4·width wide, that of llama and qwen3, which have a third matrix there, 8/3·width rounded up to a
        multiple of 64. Llama's rope base is that of Llama 2; Llama 3 has 500,000.
        """
        if not 1 <= depth <= 64:
            raise ValueError(f"depth must be between 1 and 64, got {depth}")
        width = width or 64 * depth
        if width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        heads = math.ceil(width / 128)
        while width % heads or (width // heads) % 8:
            heads += 1
        gated = family in ("llama", "qwen3")
        return ModelSpec(
            family=family,
            layers=depth,
            width=width,
            heads=heads,
            kv_heads=heads,
            ffn_width=_round_up(math.ceil(8 * width / 3), 64) if gated else 4 * width,
            vocab_size=vocab_size,
            sequence_len=sequence_len,
            rope_base=1_000_000.0 if family == "qwen3" else 10_000.0,
            softcap=15.0 if family == "depth" else 0.0,
            norm_eps=1e-5 if family in ("gpt2", "llama") else 1e-6,
            tied=family == "gpt2",
            biases=family == "gpt2",
        )

    @property
    def places(self) -> int:
        """How many tokens of a text the model can place."""
        return self.positions or self.sequence_len

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the head as they lie in memory: tensor cores want multiples of 64."""
        return _round_up(self.vocab_size, 64)

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output head, which are one matrix when tied; padding rows do not count."""
        return (1 if self.tied else 2) * self.vocab_size * self.width

    @property
    def matrix_parameters(self) -> int:
        """All matrices of the blocks: query, key, value and output projections, and the two or three of the MLP."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = (3 if self.family in ("llama", "qwen3") else 2) * self.width * self.ffn_width
        return self.layers * (attention + mlp)

    @property
    def other_parameters(self) -> int:
        """Norms, biases and learned positions."""
        if self.family == "depth":
            return 0
        norms = (2 * self.layers + 1) * self.width
        if self.family == "qwen3":
            norms += self.layers * 2 * self.head_dim
        if self.family != "gpt2":
            return norms
        # query, key, value, output and second MLP biases are width wide, the first MLP bias ffn_width
        biases = norms + self.layers * (5 * self.width + self.ffn_width) if self.biases else 0
        return norms + biases + self.places * self.width

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.matrix_parameters + self.other_parameters

    @property
    def flops_per_token(self) -> int:
        """Forward and backward FLOPs a token: 6 a weight that multiplies, plus 12·L·T·heads·head_dim of attention.

        The convention of PaLM (arXiv 2204.02311, appendix B): the embedding look-up costs nothing, the head does, tied
        or not.
        """
        weights = self.matrix_parameters + self.vocab_size * self.width
        return 6 * weights + 12 * self.layers * self.heads * self.head_dim * self.sequence_len

    @property
    def padded_parameters(self) -> int:
        """Parameters as they lie in memory, with the padding rows of embedding and head."""
        return self.parameters + (1 if self.tied else 2) * (self.padded_vocab - self.vocab_size) * self.width

    @property
    def matrix_shapes(self) -> dict[tuple[int, int], int]:
        """How many matrices of each shape (out, in) the blocks have: what is updated together is of one shape."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(queries, self.width), (keys, self.width), (keys, self.width), (self.width, queries)]
        shapes += [(self.ffn_width, self.width)] * (2 if self.gated else 1) + [(self.width, self.ffn_width)]
        return {shape: self.layers * n for shape, n in Counter(shapes).items()}

    @property
    def gated(self) -> bool:
        """Whether the MLP has a third matrix."""
        return self.family in ("llama", "qwen3")

    def activation_bytes(self, checkpointing: str, compiled: bool, element: int = 2) -> int:
        """Bytes a token that one block keeps for its backward pass, where `element` is the size of computed values.

        Counted in the tensors autograd saves. Attention is of a kernel that keeps no (T, T) scores. Full checkpointing
        keeps the block's input, selective what matrix products and attention gave, none also what entered them.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        heads = queries + 2 * keys
        if checkpointing == "full":
            return element * self.width
        statistics = 4 * self.heads  # log-sum-exp of attention
        if checkpointing == "selective":
            # the input, the two projections back into the residual (compiled the second is not kept), queries, keys,
            # values, what attention gave, and the hidden layer of the MLP before its activation
            products = (2 if compiled else 3) * self.width + heads + queries
            return element * (products + (2 if self.gated else 1) * self.ffn_width) + statistics
        normed_heads = queries + keys if self.family in ("depth", "qwen3") else 0
        if compiled:
            values = 4 * self.width + heads + queries + normed_heads + (3 if self.gated else 2) * self.ffn_width
            return element * values + statistics
        # eager, every operation keeps its own inputs, and norms under autocast fp32 ones
        fp32 = {"depth": 2, "gpt2": 0, "llama": 4, "qwen3": 4}[self.family] * self.width
        fp32 += {"depth": 1, "qwen3": 2}.get(self.family, 0) * normed_heads
        values = (5 if self.family == "gpt2" else 3) * self.width + heads + (4 if self.gated else 2) * self.ffn_width
        return element * values + 4 * fp32 + statistics

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in an fp32 cache."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
