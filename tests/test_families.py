"""Checkpoints to and from transformers, whose classes compute the same; vLLM has tests/test_interop.py to itself, as it
changes transformers' classes for its whole process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import SPECS, each_spec, random_ids, random_model

from models.build import build
from models.hf import from_pretrained, hf_state_dict, load_hf_state, read_spec, save_pretrained
from models.spec import ModelSpec
from pipeline.faults import is_users

SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"vocab_size": 517, "max_position_embeddings": 64}
# transformers' own: model type, settings that differ from its defaults
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "nanochat": ("nanochat", SMALL),
    "nanochat, grouped keys, no cap": ("nanochat", SMALL | {"num_key_value_heads": 2, "final_logit_softcapping": None}),
    "nanochat, tied": ("nanochat", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 517, "n_positions": 64}),
    "gpt2, own head and ffn": (
        "gpt2",
        {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_inner": 96, "vocab_size": 300, "n_positions": 64}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "llama": ("llama", SMALL),
    "llama, grouped keys, tied": ("llama", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, rope base and epsilon": (
        "llama",
        SMALL | {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama, wide heads": ("llama", SMALL | {"head_dim": 32}),
    "llama, scaled as 3.1": (
        "llama",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen3": ("qwen3", SMALL | {"num_key_value_heads": 2}),
    "qwen3, wide heads, tied": (
        "qwen3",
        SMALL | {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    ),
}


def random_theirs(model_type: str, settings: dict[str, Any]) -> Any:
    """A transformers model with every weight random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            p.copy_(draw / 8 if p.ndim == 2 else 0.3 * draw + (not name.endswith("bias")))
    return model


@each_spec
def test_transformers_reads_our_checkpoint_and_computes_the_same_logits(spec: ModelSpec, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(spec)
    save_pretrained(model, tmp_path, bos=0, eos=[1], pad=1)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids(spec, batch=2)
    with torch.no_grad():
        ours, other = model.logits(ids), theirs.eval()(ids).logits
    assert ours.abs().max() > 1, "a comparison of nothing"
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (0, 1)
    assert theirs.config.vocab_size == spec.vocab_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "settings"), THEIRS.values(), ids=THEIRS)
def test_we_read_what_transformers_saved_and_compute_the_same_logits(
    model_type: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = random_theirs(model_type, settings).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)  # .float() would keep bf16 angles
    assert (tmp_path / "model.safetensors.index.json").exists(), "one file would test no shards"
    model = from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = random_ids(model.spec, batch=2)
    with torch.no_grad():
        ours, other = model.logits(ids), reloaded(ids).logits
    assert ours.abs().max() > 0.5, "a comparison of nothing"
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
    # And back: the same weights under the same names, byte for byte.
    save_pretrained(model, tmp_path / "again", bos=0, eos=[1], pad=1, dtype=dtype)
    again = load_file(tmp_path / "again" / "model.safetensors")
    given: dict[str, torch.Tensor] = {}
    for shard in tmp_path.glob("model-*.safetensors"):
        given |= load_file(shard)
    assert given.keys() == again.keys() and all(torch.equal(w, again[name]) for name, w in given.items())


@each_spec
def test_a_saved_model_comes_back_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    model = random_model(spec)
    save_pretrained(model, tmp_path, bos=0, eos=[1], pad=1)
    again = from_pretrained(tmp_path)
    assert read_spec(tmp_path) == spec == again.spec
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == spec.tied


@each_spec
def test_a_model_is_read_in_the_asked_precision(spec: ModelSpec, tmp_path: Path) -> None:
    model, ids = random_model(spec), random_ids(spec, batch=2)
    save_pretrained(model, tmp_path, bos=0, eos=[1], pad=1, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    halved = from_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in halved.buffers()} <= {torch.float32}
    with torch.no_grad():
        exact, rounded = model(ids[:, :-1], ids[:, 1:]), halved(ids[:, :-1], ids[:, 1:])
    assert (rounded - exact).abs().mean() < 0.05


@each_spec
def test_exported_weights_are_views_without_padding(spec: ModelSpec) -> None:
    model = random_model(spec)
    state = hf_state_dict(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = [name for name, w in state.items() if w.untyped_storage().data_ptr() not in own]
    allowed = ("c_attn.weight", "c_attn.bias") if spec.biases else ("c_attn.weight", ".bias")
    assert all(spec.family == "gpt2" and name.endswith(allowed) for name in copies), copies
    assert not any(w.requires_grad for w in state.values())
    assert sum(w.numel() for name, w in state.items() if spec.biases or not name.endswith(".bias")) == spec.parameters


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral', and only nanochat, gpt2, llama, qwen3 is"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type is 'linear', and only 'default'",
        ),
        (  # as transformers 4 wrote it, and Llama 3.1 has it
            "llama",
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
                "rope_theta": 500_000.0,
                "rope_parameters": None,
            },
            "rope_parameters.rope_type is 'yarn'",
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ("depth", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'relu2'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_a_config_that_no_family_computes_is_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pretrained(random_model(SPECS[name]), tmp_path, bos=0, eos=[1], pad=1)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        from_pretrained(tmp_path)


def test_a_rope_base_where_older_versions_wrote_it_is_read(tmp_path: Path) -> None:
    save_pretrained(random_model(SPECS["llama"]), tmp_path, bos=0, eos=[1], pad=1)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"rope_theta": 500_000.0, "rope_scaling": None}
    del config["rope_parameters"]
    path.write_text(json.dumps(config))
    assert read_spec(tmp_path) == replace(SPECS["llama"], rope_base=500_000.0)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    path.write_text(json.dumps(config | {"rope_scaling": {"rope_type": "llama3"} | scaling}))
    assert read_spec(tmp_path).rope_scaling == (8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '"x"', "{", "[" * 100_000, '{"model_type": []}', '{"model_type": "gpt2", "n_embd": null}']
    + [
        json.dumps({"model_type": "llama"} | wrong)
        for wrong in (
            {"hidden_size": "a"},
            {"num_attention_heads": 0},
            {"rope_parameters": []},
            {"vocab_size": -1},
        )
    ],
)
def test_a_config_of_another_shape_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        read_spec(tmp_path)
    assert is_users(raised.value) and f"{tmp_path / 'config.json'}" in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b""),
        *[
            ("model.safetensors.index.json", content.encode())
            for content in (
                "[]",
                "null",
                '{"weight_map": []}',
                '{"weight_map": {"a": 1}}',
                '{"weight_map": {"a": "../model.safetensors"}}',
                '{"weight_map": {"a": "/etc/hostname"}}',
            )
        ],
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_damaged_weights_are_one_message(tmp_path: Path, file: str, content: bytes, device: str) -> None:
    model = tmp_path / "model"
    save_pretrained(random_model(SPECS["llama"]), model, bos=0, eos=[1], pad=1)
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(model))}: {file} is ") as raised:
        found = from_pretrained(model, device=device)
        found.source(found)
    assert is_users(raised.value)


def test_weights_that_are_not_the_models_are_refused() -> None:
    model = build(SPECS["llama"])
    state = hf_state_dict(model)
    without = {name: w for name, w in state.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unknown \['extra'\]"):
        load_hf_state(model, without | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(1,\), the model's has \(128,\)"):
        load_hf_state(model, state | {"model.norm.weight": torch.ones(1)})
    tied = build(SPECS["gpt2"])
    with pytest.raises(ValueError, match="differs from the embedding, though the config says"):
        load_hf_state(tied, hf_state_dict(tied) | {"lm_head.weight": torch.zeros(333, 128)})


def test_biases_are_what_the_config_says_and_never_guessed(tmp_path: Path) -> None:
    """All at zero, they are biases still; and where there are none, others are no reason to drop them."""
    with_biases = build(SPECS["gpt2"])
    with_biases.init_weights(0)
    save_pretrained(with_biases, tmp_path, bos=0, eos=[1], pad=1)
    assert from_pretrained(tmp_path).spec.biases
    save_pretrained(random_model(SPECS["gpt2, no biases"]), tmp_path, bos=0, eos=[1], pad=1)
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.1.ln_2.bias"][3] = 1.0
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"h\.1\.ln_2\.bias is not zero, though fathom_biases"):
        from_pretrained(tmp_path)


def test_the_first_published_gpt2_files_load() -> None:
    """Without the `transformer.` prefix, and with the causal mask among the weights."""
    model, other = random_model(SPECS["gpt2"]), build(SPECS["gpt2"])
    state = {name.removeprefix("transformer."): w for name, w in hf_state_dict(model).items()}
    load_hf_state(other, state | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
