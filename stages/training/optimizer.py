"""Muon for the matrices of the blocks, AdamW for the embedding and the output head."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def build_optimizers(
    model: nn.Module, *, matrix_lr: float, embedding_lr: float, unembedding_lr: float, weight_decay: float = 0.0
) -> list[Optimizer]:
    """Optimizers whose groups remember their `base_lr`.

    AdamW's rates are scaled by (width/768)^-0.5. Muon (https://kellerjordan.github.io/posts/muon/) orthogonalises the
    momentum of each matrix and scales its rate by sqrt(max(1, rows/columns)).
    """
    matrices: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (embedding if "embed_tokens" in name else head if "lm_head" in name else matrices).append(p)
    scale = (embedding[0].size(1) / 768) ** -0.5
    groups = [
        {"params": embedding, "lr": embedding_lr * scale},
        {"params": head, "lr": unembedding_lr * scale},
    ]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
        torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="original"),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[Optimizer], multiplier: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier


def step_optimizers(model: nn.Module, optimizers: list[Optimizer], grad_clip: float) -> torch.Tensor:
    """Clips the global gradient norm, applies one update, clears the gradients; returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return norm
