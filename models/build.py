"""From a spec to its module."""

from __future__ import annotations

import torch

from models.gpt2 import GPT2
from models.layers import LanguageModel
from models.llama import Llama
from models.nanochat import NanoChat
from models.spec import ModelSpec


def build(spec: ModelSpec, device: str | None = None) -> LanguageModel:
    """A module of this shape; its weights, on `device` or else torch's default one, are to be filled by `init_weights`,
    a checkpoint or, from "meta", by its `source`."""
    family = {"depth": NanoChat, "gpt2": GPT2, "llama": Llama, "qwen3": Llama}[spec.family]
    with torch.device(device or torch.get_default_device()):
        return family(spec)
