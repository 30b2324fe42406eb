"""Models on disk: a Hugging Face directory of safetensors and config that transformers and vLLM read as it is.

depth is transformers' NanoChatForCausalLM, gpt2 GPT2LMHeadModel, llama LlamaForCausalLM and qwen3 Qwen3ForCausalLM.
Weight names are the same there and here, save gpt2's. Padding rows and a tied head are not written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.build import build
from models.layers import LanguageModel
from models.spec import Family, ModelSpec

FAMILIES: dict[str, Family] = {"nanochat": "depth", "gpt2": "gpt2", "llama": "llama", "qwen3": "qwen3"}
ARCHITECTURES = {
    "depth": ("NanoChatForCausalLM", "nanochat"),
    "gpt2": ("GPT2LMHeadModel", "gpt2"),
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
# What the modules here compute; the values a config may have for each key.
COMPUTED: dict[str, dict[str, tuple[object, ...]]] = {
    "depth": {"hidden_act": ("relu2",), "attention_bias": (False,)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of Llama 3.1
CONTEXT = "fathom_sequence_len"  # of a model that is trained on shorter texts than it has positions for
PADDED = ("model.embed_tokens.weight", "lm_head.weight")
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers that older files hold


def hf_config(spec: ModelSpec, bos: int, eos: int, pad: int) -> dict[str, Any]:
    """The `config.json` of this shape; bos, eos and pad are token ids."""
    architecture, model_type = ARCHITECTURES[spec.family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    if spec.positions:
        config[CONTEXT] = spec.sequence_len
    if spec.family == "gpt2":
        return config | {
            "n_embd": spec.width,
            "n_inner": spec.ffn_width,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_positions": spec.places,
            "n_ctx": spec.places,  # llama.cpp's name for it
            "activation_function": "gelu_new",
            "layer_norm_epsilon": spec.norm_eps,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "fathom_biases": spec.biases,  # transformers' class always has them, at zero where the model has none
        }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_base}
    if spec.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dict(zip(ROPE_SCALING, spec.rope_scaling, strict=True))}
    config |= {
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.places,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": rope,
        "rope_theta": spec.rope_base,  # its place before transformers 5
        "attention_bias": False,
    }
    if spec.family == "depth":
        return config | {"hidden_act": "relu2", "final_logit_softcapping": spec.softcap or None}
    return config | {"hidden_act": "silu", "head_dim": spec.head_dim}


def read_spec(directory: Path) -> ModelSpec:
    """The shape of the model saved in `directory`; ValueError when no family here computes what its config says."""
    path = Path(directory) / "config.json"
    try:
        return _spec(path)
    except (OSError, UnsupportedError):
        raise
    except Exception as error:  # transformers and its checks raise of every kind for values of the wrong type
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is no config of a model ({said}); get the model's directory again") from error


class UnsupportedError(ValueError):
    """A config that says what no family here computes."""


def _spec(path: Path) -> ModelSpec:
    # transformers knows what a key that is not written means; its import takes seconds, which most callers never need
    from transformers import AutoConfig

    written = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise TypeError("it is not a JSON object")

    def refuse(key: str, value: object, supported: object) -> ValueError:
        return UnsupportedError(f"{path}: {key} is {value!r}, and only {supported} is supported")

    model_type = written.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise refuse("model_type", model_type, ", ".join(FAMILIES))
    if "quantization_config" in written:
        raise refuse("quantization_config", written["quantization_config"], "a model without one")
    family = FAMILIES[model_type]
    c = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    for key, supported in COMPUTED[family].items():
        if getattr(c, key) not in supported:
            raise refuse(key, getattr(c, key), " or ".join(map(repr, supported)))
    if family == "gpt2":
        return ModelSpec(
            family=family,
            layers=c.n_layer,
            width=c.n_embd,
            heads=c.n_head,
            kv_heads=c.n_head,
            ffn_width=c.n_inner or 4 * c.n_embd,
            vocab_size=c.vocab_size,
            sequence_len=getattr(c, CONTEXT, c.n_positions),
            positions=c.n_positions,
            norm_eps=c.layer_norm_epsilon,
            tied=c.tie_word_embeddings,
            biases=getattr(c, "fathom_biases", True),
        )
    rope = c.rope_parameters
    kinds = ("default",) if family == "depth" else ("default", "llama3")
    if rope["rope_type"] not in kinds:
        raise refuse("rope_parameters.rope_type", rope["rope_type"], " or ".join(map(repr, kinds)))
    scaled = rope["rope_type"] == "llama3"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    return ModelSpec(
        family=family,
        layers=c.num_hidden_layers,
        width=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        ffn_width=c.intermediate_size,
        vocab_size=c.vocab_size,
        sequence_len=getattr(c, CONTEXT, c.max_position_embeddings),
        positions=c.max_position_embeddings,
        rope_base=float(rope["rope_theta"]),
        softcap=c.final_logit_softcapping or 0.0 if family == "depth" else 0.0,
        norm_eps=c.rms_norm_eps,
        tied=c.tie_word_embeddings,
        head_dim=getattr(c, "head_dim", None) or 0,
        rope_scaling=tuple(rope[key] for key in ROPE_SCALING) if scaled else None,
    )


def to_hf(spec: ModelSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names here → by those of the export, as views of the same memory where that is possible."""
    weights = {name: w[: spec.vocab_size] if name in PADDED else w for name, w in weights.items()}
    if spec.tied:
        weights.pop("lm_head.weight", None)
    if spec.family != "gpt2":
        return weights
    state = {theirs: weights[ours] for theirs, ours in _GPT2_TABLES.items() if ours in weights}
    for theirs, ours, linear in _gpt2_modules(spec):
        weight = _joined([weights[f"{module}.weight"] for module in ours])
        biases = [weights[f"{module}.bias"] for module in ours] if spec.biases else [weight.new_zeros(weight.size(0))]
        state[f"{theirs}.weight"] = weight.t() if linear else weight
        state[f"{theirs}.bias"] = _joined(biases)
    return state


def from_hf(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the export → by their names here, without padding rows; the inverse of `to_hf`."""
    if spec.family != "gpt2":
        return dict(state)
    weights = {ours: state[theirs] for theirs, ours in _GPT2_TABLES.items() if theirs in state}
    for theirs, ours, linear in _gpt2_modules(spec):
        weight, bias = state[f"{theirs}.weight"], state[f"{theirs}.bias"]
        if not spec.biases and bias.any():
            raise ValueError(f"{theirs}.bias is not zero, though fathom_biases in the config says there are none")
        for module, w, b in zip(
            ours, (weight.t() if linear else weight).chunk(len(ours)), bias.chunk(len(ours)), strict=True
        ):
            weights[f"{module}.weight"] = w
            if spec.biases:
                weights[f"{module}.bias"] = b
    return weights


_GPT2_TABLES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.wpe.weight": "model.embed_positions.weight",
    "lm_head.weight": "lm_head.weight",
}


def _gpt2_modules(spec: ModelSpec) -> Iterator[tuple[str, list[str], bool]]:
    """transformers' module, the modules here that it holds, and whether it is a linear layer, whose weight lies there
    transposed (Conv1D)."""
    for n in range(spec.layers):
        theirs, ours = f"transformer.h.{n}", f"model.layers.{n}"
        yield f"{theirs}.ln_1", [f"{ours}.input_layernorm"], False
        yield f"{theirs}.attn.c_attn", [f"{ours}.self_attn.{p}_proj" for p in "qkv"], True
        yield f"{theirs}.attn.c_proj", [f"{ours}.self_attn.o_proj"], True
        yield f"{theirs}.ln_2", [f"{ours}.post_attention_layernorm"], False
        yield f"{theirs}.mlp.c_fc", [f"{ours}.mlp.fc1"], True
        yield f"{theirs}.mlp.c_proj", [f"{ours}.mlp.fc2"], True
    yield "transformer.ln_f", ["model.norm"], False


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def hf_state_dict(model: LanguageModel) -> dict[str, Tensor]:
    """What the export holds."""
    return to_hf(model.spec, {name: p.detach() for name, p in model.named_parameters()})


def engine_state(spec: ModelSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a running vLLM engine reloads, from weights by their names here: the export's, and a tied head too.

    On a CPU vLLM packs the head's own copy of a tied weight, and packs again only what a reload names: with the
    export's weights alone the engine would go on with the old head.
    """
    state = to_hf(spec, {name: w.detach() for name, w in weights.items()})
    return state | {"lm_head.weight": state[_embedding(spec)]} if spec.tied else state


def _embedding(spec: ModelSpec) -> str:
    return "transformer.wte.weight" if spec.family == "gpt2" else "model.embed_tokens.weight"


@torch.no_grad()
def load_hf_state(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Fills `model`, in its own dtype, from an export's weights; ValueError when these are not all of its weights."""
    weights = _weights(model, state)
    for name, p in model.named_parameters():
        p[: len(weights[name])].copy_(weights[name])
        p[len(weights[name]) :].zero_()


def _weights(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An export's weights by their names here; ValueError when these are not all of the model's."""
    spec = model.spec
    given = {name: w for name, w in state.items() if not name.endswith(NOT_WEIGHTS)}
    if spec.family == "gpt2" and "wte.weight" in given:  # OpenAI's own files
        given = {f"transformer.{name}": w for name, w in given.items()}
    head = given.pop("lm_head.weight", None) if spec.tied else None
    if head is not None and not head.equal(given[_embedding(spec)]):
        raise ValueError("lm_head.weight differs from the embedding, though the config says that they are tied")
    shapes = to_hf(spec, {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()})
    if given.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys())
        raise ValueError(f"these are not the model's weights: missing {missing}, unknown {unknown}")
    for name, w in given.items():
        if w.shape != shapes[name].shape:
            raise ValueError(f"{name} has shape {tuple(w.shape)}, the model's has {tuple(shapes[name].shape)}")
    return from_hf(spec, given)


def save_pretrained(
    model: LanguageModel,
    directory: Path,
    bos: int,
    eos: Sequence[int],
    pad: int,
    dtype: torch.dtype = torch.float32,
    temperature: float | None = None,
) -> None:
    """Writes weights and configs into `directory`; bos, eos and pad are token ids. What it generates ends with any of
    eos, of which config.json has the first; with a `temperature` it is sampled unless the caller says otherwise.
    ValueError for a weight that is too large for `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(model.spec, bos, eos[0], pad) | {"dtype": str(dtype).removeprefix("torch.")}
    generation: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": [*eos], "pad_token_id": pad}
    if temperature is not None:
        generation |= {"do_sample": True, "temperature": temperature}
    for name, written in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(written, indent=2) + "\n")
    weights = {name: w.to("cpu", dtype).contiguous() for name, w in hf_state_dict(model).items()}
    for name, w in hf_state_dict(model).items():
        if dtype == torch.float16 and w.isfinite().all() and not weights[name].isfinite().all():
            raise ValueError(f"{name} has weights too large for {dtype}, whose largest number is 65,504: take bf16")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # else nobody but its owner may read it


def from_pretrained(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """The model saved in `directory`, in one file or in shards with an index, on the CPU with weights in `dtype`; on
    the "meta" device with `directory` as its source."""
    model = build(read_spec(directory), device)
    for p in model.parameters():  # not the rope tables, which stay fp32
        p.data = p.data.to(dtype)
    if device == "meta":
        model.source = partial(_stored, directory)
        return model
    try:
        load_hf_state(model, _read(directory))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return model


@torch.no_grad()
def grown(directory: Path, spec: ModelSpec, added: Sequence[int]) -> LanguageModel:
    """The model saved in `directory` as one of this `spec`, which may have a larger vocabulary or a shorter context, in
    fp32 on the CPU. In embedding and head the rows of the tokens `added`, and all that there were none of, are the mean
    of the others, which leaves what the model says of the others nearly as it was (Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021)."""
    theirs, model = read_spec(directory), build(spec)
    new = torch.zeros(spec.padded_vocab, dtype=torch.bool)
    new[[*added]] = True
    new[theirs.vocab_size :] = True
    weights = dict(_stored(directory, build(theirs, "meta")))
    for name, p in model.named_parameters():
        weight = weights[name]
        p[: len(weight)].copy_(weight)
        if name in PADDED:
            p[new] = p[~new].mean(0)
            p[spec.vocab_size :] = 0.0
    return model


def check_weights(directory: Path) -> None:
    """Raises what `from_pretrained` would, of files that are missing, damaged or not this model's, without a copy of
    the weights."""
    _stored(directory, build(read_spec(directory), "meta"))


def _stored(directory: Path, model: LanguageModel) -> Iterable[tuple[str, Tensor]]:
    try:
        return _weights(model, _read(directory)).items()
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _read(directory: Path) -> dict[str, Tensor]:
    """What the export in `directory` holds. The files are mapped: a weight is read from disk when it is used, once for
    all processes of a machine. Raises FileNotFoundError, or ValueError for what is damaged."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        try:
            named = _Index.model_validate_json(index.read_bytes())
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]["msg"]
            raise ValueError(f"{index.name} is no index of weights ({fault}); get it again") from error
        files = sorted(set(named.weight_map.values()))
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(directory / file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); get it again") from error
    return state


class _Index(BaseModel):
    """Of a model in shards: the file of every weight, in the same directory."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]]
