"""The gpt2 family (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).

Learned positions; LayerNorm before attention, before the MLP and at the end; GELU by its tanh formula; biases in every
linear layer and norm, or in none. Query, key and value projections are apart, unlike in the published checkpoints, as
Muon orthogonalises each matrix by itself.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import MLP, Attention, Block, LanguageModel
from models.spec import ModelSpec


class GPT2(LanguageModel):
    def __init__(self, spec: ModelSpec) -> None:
        norm = partial(nn.LayerNorm, spec.width, eps=spec.norm_eps, bias=spec.biases)
        gelu = partial(F.gelu, approximate="tanh")
        super().__init__(spec, (Block(Attention(spec), MLP(spec, gelu), norm) for _ in range(spec.layers)), norm())
        self.model.embed_positions = nn.Embedding(spec.places, spec.width)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = super().embed(ids, positions) + self.model.embed_positions(positions)
        return x
