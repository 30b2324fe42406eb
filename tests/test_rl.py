"""Reinforcement learning: its arithmetic by hand, and the learner's step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from models.build import build
from models.generate import Completion
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.config import RLConfig
from stages.rl.algorithm import advantages, denominator, kl_loss, mixed, policy_loss, truncated_ratio
from stages.rl.groups import problems_at
from stages.rl.learner import update
from stages.training.optimizer import Optimizer, build_optimizer, group_weights
from stages.training.parallel import World, full_weights, prepare

ALONE = World(0, 1, torch.device("cpu"), threads=1)


def random_model(spec: ModelSpec, seed: int) -> LanguageModel:
    model = build(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [0.5, -0.5, 0.5, -0.5]]),
        ("dr_grpo", [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [0.5, -0.5, 0.5, -0.5]]),
        ("grpo", [[math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, [0, 0, 0, 0], [1, -1, 1, -1]]),
        ("rloo", [[1, -1 / 3, -1 / 3, -1 / 3], [0, 0, 0, 0], [2 / 3, -2 / 3, 2 / 3, -2 / 3]]),
    ],
)
def test_advantages_by_hand(kind: str, expected: list[list[float]]) -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    torch.testing.assert_close(advantages(rewards, kind), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mean", "grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("samples", range(2, 20))
def test_a_group_that_agrees_has_no_advantage_at_all(kind: str, samples: int) -> None:
    """Exactly zero, also for rewards whose mean is rounded: the learner leaves such sequences out."""
    for value in (0.0, 0.1, 1.0):
        rewards = torch.full((3, samples), value)
        assert not mixed(rewards).any() and (advantages(rewards, kind) == 0).all()


def test_the_denominator_by_hand() -> None:
    """Three sequences of 5, 1 and 4 tokens, where there could have been 10 each."""
    tokens, sequences = torch.tensor(10.0), torch.tensor(3.0)
    assert denominator("mean", tokens, sequences, 10) == 10
    assert denominator("dr_grpo", tokens, sequences, 10) == 30
    assert denominator("mean", torch.tensor(0.0), torch.tensor(0.0), 10) == 1


def test_the_truncated_ratio_by_hand() -> None:
    old, sampler = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([[0.25, 0.4, 0.1]]).log()
    old.requires_grad_()
    torch.testing.assert_close(truncated_ratio(old, sampler, 3.0), torch.tensor([[2.0, 0.5, 3.0]]))
    assert (truncated_ratio(old, sampler, 0.0) == 1).all()
    assert not truncated_ratio(old, sampler, 3.0).requires_grad


OLD = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
PRESENT = torch.tensor([[0.5, 0.7, 0.3, 0.6], [0.3, 0.7, 0.45, 0.9]])  # ratios 1, 1.4, 0.6, 1.2; 0.6, 1.4, 0.9, 1.8
MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]])
ADVANTAGE = torch.tensor([2.0, -0.5])


def gradient_of(kind: str, low: float = 0.2, high: float = 0.28) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, clipped and the gradient with respect to the logprobs, each (2, 4)."""
    logprobs = PRESENT.log().requires_grad_()
    loss, clipped = policy_loss(logprobs, OLD.log(), ADVANTAGE, MASK, kind, low, high)
    (loss * MASK).sum().backward()
    assert logprobs.grad is not None
    return loss.detach(), clipped, logprobs.grad


def test_reinforce_by_hand() -> None:
    loss, clipped, gradient = gradient_of("reinforce")
    torch.testing.assert_close(loss, -ADVANTAGE[:, None] * PRESENT.log())
    torch.testing.assert_close(gradient, -ADVANTAGE[:, None] * MASK)
    assert not clipped.any()


def test_the_clipped_ratio_by_hand() -> None:
    """A good token counts until it is 1.28 times as likely, a bad one until it is 0.8 times as likely; on the other
    side nothing is clipped."""
    loss, clipped, gradient = gradient_of("ppo_clip")
    expected = [[-2.0, -2 * 1.28, -2 * 0.6, -2 * 1.2], [0.5 * 0.8, 0.5 * 1.4, 0.5 * 0.9]]
    torch.testing.assert_close(loss[0], torch.tensor(expected[0]))
    torch.testing.assert_close(loss[1, :3], torch.tensor(expected[1]))
    assert clipped[:, :3].tolist() == [[False, True, False], [True, False, False]] and not clipped[0, 3]
    by_hand = [[-2.0, 0, -2 * 0.6, -2 * 1.2], [0, 0.5 * 1.4, 0.5 * 0.9, 0]]  # the gradient of r by log p is r
    torch.testing.assert_close(gradient, torch.tensor(by_hand))


def test_the_sequence_ratio_by_hand() -> None:
    """The geometric mean of a sequence's ratios, the tool's tokens not among them; its gradient is that of the sequence
    form, min(s · A, clip(s) · A) times the number of tokens."""
    means = [(1.4 * 0.6 * 1.2) ** 0.25, (0.6 * 1.4 * 0.9) ** (1 / 3)]  # 1.0020, 0.9110
    loss, clipped, gradient = gradient_of("gspo")
    torch.testing.assert_close((loss * MASK)[:, 0], torch.tensor([-2 * means[0], 0.5 * means[1]]))
    assert not clipped.any()
    logprobs = PRESENT.log().requires_grad_()
    lengths = MASK.sum(1)
    s = (((logprobs - OLD.log()) * MASK).sum(1) / lengths).exp()
    whole = -(lengths * torch.minimum(s * ADVANTAGE, s.clamp(0.8, 1.28) * ADVANTAGE)).sum()
    whole.backward()
    torch.testing.assert_close(gradient, logprobs.grad)
    assert gradient.abs().sum() > 1
    loss, clipped, gradient = gradient_of("gspo", low=0.05, high=0.001)  # now both are outside
    torch.testing.assert_close((loss * MASK)[:, 0], torch.tensor([-2 * 1.001, 0.5 * 0.95]))
    assert clipped.all() and not gradient.any()


def test_estimates_of_the_kl_divergence_by_hand() -> None:
    policy, reference = torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.5])
    two = math.log(2)
    for kind, values, slopes in [
        ("k1", [two, -two], [two, -two]),
        ("k2", [two**2 / 2, two**2 / 2], [two, -two]),
        ("k3", [0.5 - 1 + two, 2 - 1 - two], [0.5, -1.0]),
    ]:
        logprobs = policy.log().requires_grad_()
        estimate = kl_loss(logprobs, reference.log(), kind)
        estimate.sum().backward()
        torch.testing.assert_close(estimate.detach(), torch.tensor(values))
        torch.testing.assert_close(logprobs.grad, torch.tensor(slopes))


def test_in_the_mean_the_estimates_are_the_divergence_and_have_its_gradient() -> None:
    """Over all tokens of a distribution: k1 and k3 have the value, k1 and k2 the gradient, of the divergence itself."""
    generator = torch.Generator().manual_seed(0)
    scores, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    scores.requires_grad_()
    reference = other.log_softmax(0)
    logprobs = scores.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    [true] = torch.autograd.grad(divergence, scores, retain_graph=True)
    assert true.abs().max() > 0.1
    for kind in ("k1", "k2", "k3"):
        estimate = kl_loss(logprobs, reference, kind)
        mean = (logprobs.detach().exp() * estimate).sum()  # tokens come from the policy, which is fixed meanwhile
        [gradient] = torch.autograd.grad(mean, scores, retain_graph=True)
        assert kind == "k2" or mean.item() == pytest.approx(divergence.item(), abs=1e-12)
        assert kind == "k3" or torch.allclose(gradient, true, atol=1e-12)


def test_a_divergence_far_below_the_resolution_of_one_is_seen() -> None:
    """At a difference of 1e-6, exp(d) - 1 - d of fp32 is noise of 1e-7; the truth is 5e-13."""
    logprobs = torch.full((1,), -1.0)
    assert kl_loss(logprobs, logprobs + 1e-6, "k3").item() == pytest.approx(5e-13, rel=0.3)


@pytest.mark.parametrize(("count", "per_step"), [(10, 4), (7, 7), (3, 8), (64, 16)])
def test_the_prompts_of_a_step_cover_each_epoch_once_and_run_on_over_its_end(count: int, per_step: int) -> None:
    steps = 3 * count // math.gcd(count, per_step)
    drawn = [problems_at(count, 5, range(step * per_step, (step + 1) * per_step)) for step in range(steps)]
    epochs = np.concatenate(drawn)[: 3 * count].reshape(3, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    alone = [problems_at(count, 5, [position])[0] for position in reversed(range(steps * per_step))]
    assert alone[::-1] == np.concatenate(drawn).tolist(), "a function of (seed, position): no order of calls matters"


def test_the_order_of_prompts_is_new_each_epoch_and_for_each_seed() -> None:
    orders = [tuple(problems_at(50, seed, range(50 * epoch, 50 * epoch + 50))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


SPEC = ModelSpec(
    "depth", layers=2, width=32, heads=2, kv_heads=1, ffn_width=64, vocab_size=50, sequence_len=40, softcap=15.0
)


def rollouts(model: LanguageModel, count: int = 16) -> tuple[list[list[int]], list[Completion], Tensor]:
    """Prompts, completions of many lengths with tool results in them, some cut off, and advantages with zeros."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(SPEC.vocab_size, size=rng.integers(2, 9)).tolist() for _ in range(count)]
    completions = []
    for i, prompt in enumerate(prompts):
        tokens = rng.integers(SPEC.vocab_size, size=rng.integers(1, 30)).tolist()
        sampled = (rng.random(len(tokens)) < 0.8).astype(int).tolist()
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            true = -model(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
        noisy = true.numpy() + rng.normal(0, 0.5, len(tokens))
        logprobs = [float(lp) if s else 0.0 for lp, s in zip(noisy, sampled, strict=True)]
        completions.append(Completion(tokens, sampled, logprobs, finished=i % 4 != 2))
    advantage = torch.tensor([(-1.0, 0.0, 0.5, 0.25)[i % 4] for i in range(count)])
    return prompts, completions, advantage


class Witness(Optimizer):
    """Keeps the summed gradients of its last step."""

    def step(self, multiplier: float, grad_clip: float) -> tuple[Tensor, Tensor]:
        pairs = [pair for bucket in self.buckets for pair in zip(bucket.pieces, bucket.grads, strict=True)]
        self.gradients = {piece.name: gradient.clone() for piece, gradient in pairs}
        return super().step(multiplier, grad_clip)


def step_of(
    world: World, size: int, share: slice = slice(None), **settings: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of one step's last update in micro-batches of `size`, and its metrics."""
    model, reference = random_model(SPEC, seed=1), random_model(SPEC, seed=2)
    prompts, completions, advantage = rollouts(model)
    config = RLConfig(device_batch_size=size, **settings)
    optimizer = Witness(model, group_weights(model, config), world, "ddp", torch.float32)
    metrics = update(
        model, optimizer, prompts[share], completions[share], advantage[share], config, 1.0, world,
        reference if config.kl_coefficient else None,
    )  # fmt: skip
    return optimizer.gradients, metrics


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantage": "dr_grpo", "mask_overlong": True},
        {"loss": "ppo_clip", "updates_per_step": 2, "kl_coefficient": 0.1},
        {"loss": "gspo", "updates_per_step": 2, "clip_low": 3e-4, "clip_high": 4e-4},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_micro_batch_of_the_learner_changes_nothing(settings: dict[str, Any]) -> None:
    whole, metrics = step_of(ALONE, 16, **settings)
    assert metrics["grad_norm"] > 0.001
    for size in (1, 4):
        gradients, others = step_of(ALONE, size, **settings)
        torch.testing.assert_close(gradients, whole, atol=1e-6, rtol=0)
        assert others == pytest.approx(metrics, abs=1e-5)


def scores_of(model: LanguageModel, prompt: list[int], completion: Completion) -> list[Tensor]:
    """The logprob of every sampled token, each computed by itself."""
    ids = torch.tensor(prompt + completion.tokens)
    scores = model.logits(ids[None, :-1])[0].log_softmax(-1)
    places = [len(prompt) + t for t, sampled in enumerate(completion.sampled) if sampled]
    return [scores[at - 1, ids[at]] for at in places]


def drawn(completion: Completion) -> list[float]:
    """The sampler's logprob of every sampled token."""
    return [lp for lp, sampled in zip(completion.logprobs, completion.sampled, strict=True) if sampled]


def test_the_learners_gradient_is_that_of_the_formula() -> None:
    """Σ of ratio · advantage · logprob over sampled tokens, over the sampled tokens of all sequences."""
    model = random_model(SPEC, seed=1)
    prompts, completions, advantage = rollouts(model)
    tokens, objective = sum(sum(c.sampled) for c in completions), torch.zeros(())
    moved = []
    for prompt, c, a in zip(prompts, completions, advantage.tolist(), strict=True):
        for logprob, sampler in zip(scores_of(model, prompt, c), drawn(c), strict=True):
            ratio = math.exp(logprob.item() - sampler)
            objective = objective + min(ratio, RLConfig().ratio_cap) * a * logprob
            moved += [logprob.item() - sampler] if a else []
    (-objective / tokens).backward()
    gradients, metrics = step_of(ALONE, 4)
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)
    assert metrics["trained_tokens"] == len(moved) < tokens
    for name, values in {
        "logprob_difference": np.abs(moved),
        "ratio_mean": np.exp(moved),
        "kl_sampler": np.expm1(moved) - moved,
    }.items():
        assert metrics[name] == pytest.approx(np.mean(values), abs=1e-5), name
    assert metrics["logprob_difference_max"] == pytest.approx(np.max(np.abs(moved)), abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(np.exp(np.max(moved)), rel=1e-4)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_learner_is_held_to_the_reference_by_the_estimator_asked_for(kl_estimator: str) -> None:
    """Each in a way of its own: none of the gradients is another's."""
    model, reference = random_model(SPEC, seed=1), random_model(SPEC, seed=2)
    prompts, completions, advantage = rollouts(model)
    objective, estimates = torch.zeros(()), []
    for prompt, c, a in zip(prompts, completions, advantage.tolist(), strict=True):
        with torch.no_grad():
            wanted = scores_of(reference, prompt, c)
        for logprob, q in zip(scores_of(model, prompt, c), wanted, strict=True):
            d = logprob - q
            estimate = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kl_estimator]
            estimates.append(estimate.item())
            cost = d.detach() * logprob if kl_estimator == "k1" else estimate  # k1 is a cost within the reward
            objective = objective - a * logprob + 0.3 * cost
    (objective / len(estimates)).backward()
    gradients, metrics = step_of(ALONE, 4, kl_coefficient=0.3, kl_estimator=kl_estimator, ratio_cap=0)
    torch.testing.assert_close(gradients, {name: p.grad for name, p in model.named_parameters()}, atol=1e-6, rtol=1e-3)
    assert metrics["kl_penalty"] == pytest.approx(np.mean(estimates), rel=1e-4)


def test_a_second_update_is_clipped_against_the_policy_before_the_first() -> None:
    """With a reference, and completions that were cut off left out. Every second sequence is the second update's; old
    and reference are as they were."""
    settings = {"loss": "ppo_clip", "clip_low": 0.02, "clip_high": 0.03, "kl_coefficient": 0.1, "lr_scale": 0.5}
    config = RLConfig(updates_per_step=2, mask_overlong=True, **settings)
    model, before, reference = (random_model(SPEC, seed=seed) for seed in (1, 1, 2))
    prompts, completions, advantage = rollouts(model)
    optimizer = Witness(model, group_weights(model, config), ALONE, "ddp", torch.float32)
    metrics = update(model, optimizer, prompts, completions, advantage, config, 1.0, ALONE, reference)

    kept = [i for i, c in enumerate(completions) if c.finished]
    halves = kept[0::2], kept[1::2]
    after = random_model(SPEC, seed=1)
    first = Witness(after, group_weights(after, config), ALONE, "ddp", torch.float32)
    once = config.model_copy(update={"updates_per_step": 1, "mask_overlong": False})
    half = [[items[i] for i in halves[0]] for items in (prompts, completions)]
    update(after, first, *half, advantage[halves[0]], once, 1.0, ALONE, reference)
    total, clipped, tokens = torch.zeros(()), 0, 0
    for i in halves[1]:
        a = advantage[i].item()
        with torch.no_grad():
            old, other = (scores_of(policy, prompts[i], completions[i]) for policy in (before, reference))
        for logprob, p, q, sampler in zip(
            scores_of(after, prompts[i], completions[i]), old, other, drawn(completions[i]), strict=True
        ):
            ratio = (logprob - p).exp()
            bounded = min(max(ratio.item(), 0.98), 1.03)
            clipped += bounded * a < ratio.item() * a
            surrogate = bounded * a if bounded * a < ratio.item() * a else ratio * a
            kl = (q - logprob).exp() - 1 - (q - logprob)
            total = total + min(math.exp(p - sampler), 2.0) * (0.1 * kl - surrogate)
            tokens += 1
    assert 5 < clipped < tokens / 2, "the test's own clip does too little or too much"
    (total / tokens).backward()
    expected = {name: p.grad for name, p in after.named_parameters()}
    torch.testing.assert_close(optimizer.gradients, expected, atol=1e-6, rtol=1e-3)
    assert metrics["trained_tokens"] == sum(sum(completions[i].sampled) for i in kept)
    assert metrics["clip_share"] == pytest.approx(clipped / metrics["trained_tokens"]), "the first update clips nothing"


def test_a_step_without_advantage_leaves_the_model_alone() -> None:
    model = random_model(SPEC, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prompts, completions, advantage = rollouts(model)
    optimizer = build_optimizer(model, RLConfig(), "fp32", ALONE)
    for given in ((prompts, completions, advantage * 0), ([], [], advantage[:0])):
        metrics = update(model, optimizer, *given, RLConfig(), 1.0, ALONE)
        assert metrics == {"grad_norm": 0.0, "trained_tokens": 0.0}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def weights_after(world: World, parallel: str) -> dict[str, Tensor]:
    """Every weight after a step of two updates, whole."""
    model, reference = random_model(SPEC, seed=1), random_model(SPEC, seed=2)
    prompts, completions, advantage = rollouts(model, 12)
    config = RLConfig(device_batch_size=2, parallel=parallel, loss="ppo_clip", kl_coefficient=0.1, updates_per_step=2)
    for policy in (model, reference):
        prepare(policy, config, "fp32", world)
    optimizer = build_optimizer(model, config, "fp32", world)
    # of either update the first rank has one micro-batch and the second two
    of_rank = [range(0, 4), range(4, 12)][world.rank]
    mine = of_rank if world.size > 1 else range(12)
    chosen = [[items[i] for i in mine] for items in (prompts, completions)]
    update(model, optimizer, *chosen, advantage[list(mine)], config, 1.0, world, reference)
    return dict(full_weights(model))


def two_ranks(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)
    share, world = slice(0, 6) if rank == 0 else slice(6, 16), World.current(2)
    torch.save(step_of(world, 4, share), path / f"{rank}.pt")
    for mode in ("zero1", "fsdp"):
        torch.save(weights_after(world, mode), path / f"{rank}-{mode}.pt")
    dist.destroy_process_group()


def test_two_learners_step_like_one(tmp_path: Path) -> None:
    whole, metrics = step_of(ALONE, 4)
    mp.spawn(two_ranks, args=(tmp_path,), nprocs=2)
    (first, first_metrics), (second, second_metrics) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    assert first_metrics == second_metrics == pytest.approx(metrics, abs=1e-5), "metrics are those of all ranks"
    expected = weights_after(ALONE, "ddp")
    for mode in ("zero1", "fsdp"):  # the ranks have different numbers of micro-batches
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}-{mode}.pt"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("precision", "faster", "expected"), [("fp32", True, True), ("fp32", False, False), ("bf16", True, False)]
)
def test_the_learner_takes_fp32_products_from_onednn_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, precision: str, faster: bool, expected: bool
) -> None:
    monkeypatch.setattr("kernels.onednn.faster", lambda device: faster)
    model = build(ModelSpec.from_dial("depth", 1, 64, 32))
    prepare(model, RLConfig(), precision, World(0, 1, torch.device("cpu"), threads=1))
    kinds = {type(m).__name__ for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"OneDNNLinear" if expected else "Linear"}
