"""Models on disk: a Hugging Face directory of safetensors, config and tokenizer that vLLM serves as it is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from models.nanochat import NORM_EPS, NanoChat
from models.spec import ModelSpec


def hf_config(spec: ModelSpec, bos: int, eos: int) -> dict[str, object]:
    """The `config.json` of transformers' NanoChatForCausalLM; bos and eos are token ids."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_base},
        "final_logit_softcapping": spec.softcap,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": bos,
    }


def read_spec(directory: Path) -> ModelSpec:
    """The shape of the model saved in `directory`; ValueError when it is not a NanoChat."""
    c = json.loads((directory / "config.json").read_text())
    if c["model_type"] != "nanochat":
        raise ValueError(f"{directory}/config.json: model_type {c['model_type']!r} is not supported, only 'nanochat'")
    return ModelSpec(
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        ffn_width=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        sequence_len=c["max_position_embeddings"],
        rope_base=c["rope_parameters"]["rope_theta"],
        softcap=c["final_logit_softcapping"],
    )


def save_pretrained(model: NanoChat, directory: Path, bos: int, eos: int) -> None:
    """Writes weights (fp32) and config into `directory`; bos and eos are token ids."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(model.spec, bos, eos), indent=2) + "\n")
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def from_pretrained(directory: Path) -> NanoChat:
    """The model saved in `directory`, on the CPU."""
    model = NanoChat(read_spec(directory))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model
