"""A small model that knows a few conversations by heart, for what talks to models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from corpus.conversation import render
from corpus.tokenizers import ANSWER_ENDS, Tokenizer
from models.build import build
from models.spec import Family, ModelSpec
from stages.config import TrainConfig
from stages.training.loop import accumulate_gradients
from stages.training.optimizer import build_optimizer
from stages.training.parallel import World
from stages.training.state import export

CONTEXT = 96
ALONE = World(0, 1, torch.device("cpu"), threads=1)
SUM, CALL = "12 boxes of 34?", [("text", "So "), ("python", "12*34"), ("python_output", "408"), ("text", "#### 408")]
LETTERS = "Größe: ∞ 🙂"  # of two, three and four bytes
HOSTILE = "a\x1b[2J\x1b]0;b\x07\r\u202ec"
KNOWN = {SUM: CALL, "letters?": [("text", LETTERS)], "hostile?": [("text", HOSTILE)]}


def parts(answer: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for kind, text in answer]


def taught(directory: Path, family: Family = "depth", steps: int = 150, heads: int = 4) -> Tokenizer:
    """Exports the model into `directory`, as a training stage does. vLLM has heads of size 32 and more: 2 of them."""
    tokenizer = Tokenizer.train(["Tom buys 12 boxes of 34 pens, and we count boxes and boxes of pens. " * 20], 300)
    kv_heads = heads if family == "gpt2" else heads // 2
    spec = ModelSpec(family, 2, 64, heads, kv_heads, 256, tokenizer.vocab_size, CONTEXT, biases=family == "gpt2")
    model = build(spec)
    model.init_weights(0)
    tokens, mask = np.full((len(KNOWN), CONTEXT + 1), tokenizer.bos), np.zeros((len(KNOWN), CONTEXT + 1), np.uint8)
    for row, (question, answer) in enumerate(KNOWN.items()):
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": parts(answer)})
        ids, weights = render({"messages": messages}, tokenizer, CONTEXT)
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, weights
    optimizer = build_optimizer(model, TrainConfig(embedding_lr=0.05), "fp32", ALONE)
    targets = torch.from_numpy(tokens), torch.from_numpy(mask[:, 1:]).float()
    for _ in range(steps):
        loss = accumulate_gradients(model, *targets, len(KNOWN), "fp32", ALONE)
        optimizer.reduce()
        optimizer.step(1.0, grad_clip=1.0)
    assert loss is not None and loss < 0.05, f"the model has not learnt its lines: {loss}"
    export(model, tokenizer, directory, ANSWER_ENDS)
    return tokenizer


def endless(model: Path, directory: Path, places: int) -> Path:
    """A copy in `directory` of the taught model that never ends an answer, and has a context of so many tokens."""
    shutil.copytree(model, directory)
    config, weights = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": places}))
    weights["lm_head.weight"][Tokenizer.load(model).special(ANSWER_ENDS[0])] = 0  # so it never is the likeliest
    save_file(weights, directory / "model.safetensors")
    return directory
