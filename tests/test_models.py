"""The depth family: its arithmetic, its module, and the transformers class whose checkpoints it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.hf import from_pretrained, read_spec, save_pretrained
from models.nanochat import NanoChat
from models.spec import ModelSpec

VOCAB = 65_536
PARAMETERS = {
    1: 8_437_760,
    2: 17_170_432,
    3: 26_492_928,
    4: 36_700_160,
    6: 60_948_480,
    10: 133_038_080,
    12: 185_597_952,
    20: 560_988_160,
    24: 880_803_840,
    38: 3_015_835_648,
    52: 7_347_372_032,
}
SPECS = {
    "depth 2": ModelSpec.from_depth(2, vocab_size=300, sequence_len=64),
    "depth 3, two heads of 96": ModelSpec.from_depth(3, vocab_size=300, sequence_len=64),
    "grouped keys": ModelSpec(2, 64, heads=4, kv_heads=2, ffn_width=96, vocab_size=300, sequence_len=64),
}


def random_model(spec: ModelSpec, seed: int = 0) -> NanoChat:
    """Every weight random: a fresh model's zero projections would hide what the layers do."""
    model = NanoChat(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
    return model


def random_ids(spec: ModelSpec, batch: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(spec.vocab_size, (batch, spec.sequence_len), generator=generator)


@pytest.mark.parametrize(("depth", "parameters"), PARAMETERS.items())
def test_the_depths_have_their_published_sizes(depth: int, parameters: int) -> None:
    assert ModelSpec.from_depth(depth, VOCAB, 2048).parameters == parameters


def test_every_depth_builds_and_holds_the_parameters_its_spec_counts() -> None:
    for depth in range(1, 65):
        spec = ModelSpec.from_depth(depth, VOCAB, 2048)
        with torch.device("meta"):
            model = NanoChat(spec)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        matrices = sum(n for name, n in sizes.items() if ".layers." in name)
        assert sum(sizes.values()) == spec.parameters, depth
        assert (matrices, sum(sizes.values()) - matrices) == (spec.matrix_parameters, spec.embedding_parameters), depth
        assert spec.width == 64 * depth and spec.head_dim % 8 == 0 and spec.head_dim <= 128, depth


@pytest.mark.parametrize("depth", [0, 65])
def test_a_depth_outside_the_family_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 64, got {depth}"):
        ModelSpec.from_depth(depth, VOCAB, 2048)


def test_grouped_keys_are_counted() -> None:
    spec = SPECS["grouped keys"]
    assert sum(p.numel() for p in NanoChat(spec).parameters()) == spec.parameters


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_transformers_reads_the_checkpoint_and_computes_the_same_logits(spec: ModelSpec, tmp_path: Path) -> None:
    from transformers import NanoChatForCausalLM

    model = random_model(spec)
    save_pretrained(model, tmp_path, bos=0, eos=1)
    theirs = NanoChatForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(spec, batch=2)
    with torch.no_grad():
        ours, other = model.logits(ids), theirs(ids).logits
    assert ours.abs().max() > 1, "a comparison of nothing"
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (0, 1)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_saved_model_comes_back_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    model = random_model(spec)
    save_pretrained(model, tmp_path, bos=0, eos=1)
    again = from_pretrained(tmp_path)
    assert read_spec(tmp_path) == spec == again.spec
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' is not supported, only 'nanochat'"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_later_token_leaves_earlier_losses_unchanged(spec: ModelSpec) -> None:
    model, changed = random_model(spec), 40
    row = random_ids(spec, batch=2)
    other = row.clone()
    other[:, changed] = (row[:, changed] + 7) % spec.vocab_size
    with torch.no_grad():
        before, after = (model(r[:, :-1], r[:, 1:]) for r in (row, other))
    earlier = changed - 1  # the loss at changed-1 has the changed token for its target
    assert torch.equal(before[:, :earlier], after[:, :earlier])
    assert (before[:, earlier:] != after[:, earlier:]).all()


def test_the_loss_is_the_negative_log_likelihood_of_the_capped_logits() -> None:
    spec = SPECS["depth 2"]
    model, row = random_model(spec), random_ids(spec, batch=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far into the cap
        losses, logits = model(row[:, :-1], row[:, 1:]), model.logits(row[:, :-1])
    assert 14 < logits.abs().max() < 15
    by_hand = torch.logsumexp(logits, -1) - logits.gather(-1, row[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, by_hand)


def test_initial_weights_depend_on_the_seed_alone_and_predict_evenly() -> None:
    spec = SPECS["depth 2"]
    models = [NanoChat(spec) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        model.init_weights(seed)
    first, second, other = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    row = random_ids(spec, batch=1)
    with torch.no_grad():
        losses = models[0](row[:, :-1], row[:, 1:])
    torch.testing.assert_close(losses, torch.full_like(losses, spec.vocab_size).log())
