"""Models that others could have made: tiny random checkpoints by transformers, each with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SHAPE = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 3}
SHAPE |= {"max_position_embeddings": 512}
LLAMA31_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA31_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = (
    "{%- for m in messages -%}{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
# The last answer is written otherwise, as Qwen3 does it, and today is said.
CHATML = (
    "{{- '<|im_start|>system\nToday is ' + strftime_now('%Y') + '.<|im_end|>\n' -}}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# model type, settings of transformers' config beside the vocabulary, special tokens, those that it knows by a name,
# chat template, and rows of the embedding without a token
MODELS: dict[str, tuple[str, dict[str, Any], list[str], dict[str, str], str | None, int]] = {
    "gpt2": (
        "gpt2",
        {"n_layer": 2, "n_embd": 96, "n_head": 3, "n_positions": 512},
        ["<|endoftext|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        None,
        0,
    ),
    "llama": (
        "llama",
        SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA31_ROPE},
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA3,
        0,
    ),
    "qwen3": (
        "qwen3",
        SHAPE | {"num_key_value_heads": 1, "head_dim": 64},
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        CHATML,
        100,
    ),
}


def write_tokenizer(folder: Path, special: Sequence[str], config: dict[str, Any]) -> int:
    """A byte-level BPE of its own; returns how many tokens it has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = ["How many apples are left? There are 12 of them, and the answer is 7."] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_tokens([AddedToken(name, normalized=False, special=name[1] == "|") for name in special])
    made.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return int(made.get_vocab_size())


def checkpoint(name: str, folder: Path) -> Any:
    """Writes the model `name` into `folder`, in shards; returns transformers' own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings, special, named, template, unused = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, special, named)
    ids = {f"{role}_token_id": size - len(special) + special.index(named[f"{role}_token"]) for role in ("eos",)}
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    ids["bos_token_id"] = size - len(special)
    config = AutoConfig.for_model(model_type, vocab_size=size + unused, pad_token_id=None, **settings, **ids)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight_name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            p.copy_(draw / 8 if p.ndim == 2 else 0.3 * draw + (not weight_name.endswith("bias")))
    model.save_pretrained(folder, max_shard_size="200KB")
    return model
