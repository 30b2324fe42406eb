"""Sampling, in plain torch and with real vLLM, in Ray actors, against the trainer's own model; and actors that die,
hang, or compute with other weights than they should."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from openai import OpenAI
from runs import ROOT, environment
from served import serving

from cluster import manifest as manifests
from cluster import runtime
from cluster.manifest import Manifest
from cluster.resources import Devices, resources
from cluster.storage import Storage
from corpus.conversation import render, render_prompt
from corpus.tokenizers import Tokenizer
from models.build import build
from models.generate import Completion, Turns, generate
from models.hf import engine_state
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.config import EvaluateConfig, RLConfig, TrainConfig
from stages.context import StageContext
from stages.evaluate import measure_task, sampling
from stages.evaluation import stage as evaluation
from stages.rl.learner import collate, update
from stages.rl.rollout import RolloutPool
from stages.rl.stage import actors_for, work
from stages.training.loop import accumulate_gradients
from stages.training.optimizer import build_optimizer
from stages.training.parallel import World
from stages.training.state import export
from tasks.arithmetic import Arithmetic
from tasks.base import NumberProblems, Problem, conversation_of
from tasks.environments import EnvironmentFile

ALONE = World(0, 1, torch.device("cpu"), threads=1)
CONTEXT = 96
HEALTH_TIMEOUT = 4.0
WORDS = "Tom buys 12 boxes of 34 pens. How many pens are there? There are pens, so we count boxes and boxes of pens.\n"
PROBLEM = Problem("Tom buys 12 boxes of 34 pens.", "So <<12*34=408>>408.\n#### 408")
TASK = NumberProblems()


def random_model(spec: ModelSpec, seed: int) -> LanguageModel:
    model = build(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
    return model


SHAPE = {"layers": 2, "width": 64, "heads": 4, "ffn_width": 96, "vocab_size": 24, "sequence_len": CONTEXT}
FAMILIES = {
    "depth": ModelSpec("depth", kv_heads=2, softcap=15.0, **SHAPE),
    "gpt2": ModelSpec("gpt2", kv_heads=4, biases=True, tied=True, **SHAPE),
    "llama": ModelSpec("llama", kv_heads=1, tied=True, **SHAPE),
    "qwen3": ModelSpec("qwen3", kv_heads=2, head_dim=24, **SHAPE),
}
END, CALL, RESULT = 3, (4, 5), (6, 7)
CALLS = Turns((END,), CALL, lambda ids: [RESULT[0], *reversed(ids), RESULT[1]])


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_cached_generation_gives_the_models_own_logprobs(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of many lengths, over turns with tools' results, in batches that end and are filled up again."""
    monkeypatch.setattr("models.generate.ROWS", 10)
    model = random_model(spec, seed=0)
    prompts = [np.random.default_rng(n).integers(24, size=n).tolist() for n in (1, 5, 20, 33, 90, CONTEXT, 7)]
    groups = generate(model, CALLS, prompts, seeds(prompts, 0), 6, 40)
    assert disagreement(model, prompts[:5] + prompts[6:], groups[:5] + groups[6:]) < 1e-4
    assert groups[5] == [Completion()] * 6, "there is no room after a prompt that fills the context"
    completions = [c for group in groups for c in group]
    assert {len(c.tokens) for c in completions} > {6, 40}, "some end at the context, some at the limit"
    assert any(c.finished for c in completions) and len({tuple(c.tokens) for c in completions}) > 30
    for c in completions:
        assert c.finished == (END in c.tokens)
        for t in (t for t, s in enumerate(c.sampled[:-1]) if s and not c.sampled[t + 1]):
            assert c.tokens[t] == CALL[1], "a result follows nothing but a call"
    assert sum(1 - s for c in completions for s in c.sampled) > 10, "no tool was called"


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_greedy_generation_takes_the_most_likely_token(spec: ModelSpec) -> None:
    model, prompts = random_model(spec, seed=1), [[8, 9, 10], [11] * 12]
    turns = Turns((END,), None, list)
    for prompt, [completion] in zip(prompts, generate(model, turns, prompts, seeds(prompts), 1, 12, True), strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            with torch.no_grad():
                assert model.logits(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    model = random_model(FAMILIES["depth"], seed=2)
    with torch.no_grad():
        expected = model.logits(torch.tensor([[8, 9]]))[0, -1].softmax(-1).numpy()
    [group] = generate(model, Turns((END,), None, list), [[8, 9]], [(0,)], 4000, 1)
    counts = np.bincount([c.tokens[0] for c in group], minlength=len(expected))
    # each count is binomial; 50 of them all lie within 5 deviations but once in 50,000 runs
    assert (np.abs(counts - 4000 * expected) < 5 * np.sqrt(4000 * expected) + 1).all()


# --- where evaluation samples -----------------------------------------------------------------------------------------


GPUS_TOGETHER = """
import threading, time, ray
from cluster.resources import Devices
from stages.rl.rollout import reserved

@ray.remote(num_cpus=0, num_gpus=1)
class Holder:
    def gpus(self):
        return ray.get_gpu_ids()

def free():
    return ray.available_resources().get("GPU", 0)

def evaluate():
    with reserved(Devices("cuda", 2, 1), 2) as places:
        own = [Holder.options(scheduling_strategy=places).remote() for _ in range(2)]
        found.extend(sorted(gpu for actor in own for gpu in ray.get(actor.gpus.remote())))

ray.init("local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
found, other = [], Holder.remote()
ray.get(other.gpus.remote())
thread = threading.Thread(target=evaluate)
thread.start()
time.sleep(2)
assert free() == 1 and not found, "it holds a GPU and waits for another"
ray.kill(other)
thread.join(60)
assert found == [0, 1], found
deadline = time.monotonic() + 30
while free() != 2:
    assert time.monotonic() < deadline, "what it had is not given back"
    time.sleep(0.1)
"""


def test_evaluation_takes_all_gpus_or_none_and_gives_them_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GPUS_TOGETHER], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_evaluation_says_the_same_of_any_number_of_actors(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    class Counted(RolloutPool):
        def __init__(self, fetch: Any, devices: Devices, actors: int, **more: Any) -> None:
            counts.append(actors)
            super().__init__(fetch, devices, actors, **more)

    monkeypatch.setattr("stages.evaluate.RolloutPool", Counted)
    made = Storage(tmp_path / "sft")
    StageContext("test", "sft", made, {}, {}, {}).publish(directory, {}, 0.0)
    context = StageContext("test", "evaluate_sft", Storage(tmp_path / "evaluate_sft"), {"sft": made}, {}, {})
    config = EvaluateConfig(problems=5, samples=3, max_new_tokens=24, engine="torch")

    def measured(cores: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        asked, devices = Arithmetic(8, 8), Devices("cpu", 0, cores)
        fetch = partial(context.fetch, "sft")
        with sampling(fetch, asked.tools, config, devices, context.note) as (pool, world):
            return measure_task(context, "sft", asked, config, 0, pool, world)

    one, three = measured(2), measured(6)
    assert counts == [1, 3] and one == three
    assert len({s["text"] for record in one[1] for s in record["samples"]}) > 10


# --- pools of one actor, of either engine ---------------------------------------------------------------------------


def seeds(prompts: list[list[int]], *parts: int) -> list[tuple[int, ...]]:
    return [(*parts, i) for i in range(len(prompts))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([WORDS * 20], 300)


@pytest.fixture(scope="module")
def spec(tokenizer: Tokenizer) -> ModelSpec:
    return ModelSpec("depth", 2, 64, 2, 2, 128, tokenizer.vocab_size, sequence_len=CONTEXT, softcap=15.0)


def short_prompt(tokenizer: Tokenizer) -> list[int]:
    return render_prompt(conversation_of(PROBLEM)["messages"][:1], tokenizer)


def call_of(tokenizer: Tokenizer) -> list[int]:
    """What the model writes first: text and a complete call."""
    ids, _ = render(conversation_of(PROBLEM), tokenizer, CONTEXT)
    answer = ids.tolist()[len(short_prompt(tokenizer)) :]
    return answer[: answer.index(tokenizer.special("<|python_end|>")) + 1]


def long_prompt(tokenizer: Tokenizer) -> list[int]:
    """A prompt after which the call ends one token before the context does."""
    room = CONTEXT - 1 - len(call_of(tokenizer)) - 2
    user = (tokenizer.encode(WORDS) * 9)[: room - 1]
    ends = [tokenizer.special("<|user_end|>"), tokenizer.special("<|assistant_start|>")]
    return [tokenizer.bos, *user, *ends]


@pytest.fixture(scope="module")
def taught(tokenizer: Tokenizer, spec: ModelSpec) -> LanguageModel:
    """A model that knows one conversation by heart: it calls the calculator, reads the result and ends."""
    model = build(spec)
    model.init_weights(0)
    tokens = np.full((2, CONTEXT + 1), tokenizer.bos)
    mask = np.zeros(tokens.shape, dtype=np.uint8)
    ids, weights = render(conversation_of(PROBLEM), tokenizer, CONTEXT)
    tokens[0, : len(ids)], mask[0, : len(ids)] = ids, weights
    prompt = long_prompt(tokenizer)
    tokens[1, : CONTEXT - 1] = prompt + call_of(tokenizer)
    mask[1, len(prompt) : CONTEXT - 1] = 1
    optimizer = build_optimizer(model, TrainConfig(embedding_lr=0.05), "fp32", ALONE)
    for _ in range(100):
        loss = accumulate_gradients(
            model, torch.from_numpy(tokens), torch.from_numpy(mask[:, 1:]).float(), 2, "fp32", ALONE
        )
        optimizer.reduce()
        optimizer.step(1.0, grad_clip=1.0)
    assert loss is not None and loss < 0.05, "the test's own model has not learnt its line"
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, spec: ModelSpec) -> Iterator[Path]:
    """A saved model, and Ray."""
    path = tmp_path_factory.mktemp("model")
    export(random_model(spec, seed=0), tokenizer, path)
    runtime.connect()
    yield path
    ray.shutdown()


@pytest.fixture(scope="module", params=["vllm", "torch"])
def pool(request: pytest.FixtureRequest, directory: Path) -> Iterator[RolloutPool]:
    with pool_of(directory, request.param) as pool:
        yield pool


def pool_of(directory: Path, engine: str) -> RolloutPool:
    fetch, limit = partial(Path, directory), HEALTH_TIMEOUT
    return RolloutPool(fetch, resources(), actors=1, tools=TASK.tools, engine=engine, health_timeout=limit)


def inside(pool: RolloutPool, change: Any) -> Any:
    """What `change` returns of the pool's one actor, in its process."""
    [member] = pool._members
    return ray.get(member.handle.__ray_call__.remote(change))


def runs_vllm(pool: RolloutPool) -> bool:
    return bool(inside(pool, lambda actor: type(actor.engine).__name__ == "VLLMEngine"))


def push(pool: RolloutPool, model: LanguageModel, version: int) -> None:
    pool.sync(engine_state(model.spec, dict(model.named_parameters())), version)


def prompts_of(spec: ModelSpec, count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(length).integers(256, size=(count, length)).tolist()


def disagreement(model: LanguageModel, prompts: list[list[int]], groups: list[list[Completion]]) -> float:
    """The largest difference between the sampler's logprob of a sampled token and the model's own."""
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    batch = collate([p for p, _ in pairs], [c for _, c in pairs], ALONE.device)
    assert batch["mask"].sum() == sum(sum(c.sampled) for _, c in pairs) > 0
    with torch.no_grad():
        logprobs = -model(batch["ids"][:, :-1], batch["ids"][:, 1:])
    return ((logprobs - batch["sampler_logprobs"]) * batch["mask"]).abs().max().item()


def test_sampler_and_trainer_agree_on_every_sampled_token(pool: RolloutPool, spec: ModelSpec) -> None:
    prompts = prompts_of(spec, 4, 10) + prompts_of(spec, 4, 33)
    groups = pool.sample(prompts, seeds(prompts, 1), 4, 40)
    assert [len(g) for g in groups] == [4] * 8
    surprise = -np.mean([lp for group in groups for c in group for lp in c.logprobs])
    assert surprise > 0.5, "logprobs of a certain model would agree with anything"
    assert disagreement(random_model(spec, seed=0), prompts, groups) < 1e-4


def test_the_same_seed_gives_the_same_completions_alone_or_in_a_batch(pool: RolloutPool, spec: ModelSpec) -> None:
    prompts = prompts_of(spec, 6, 20)
    first = pool.sample(prompts, seeds(prompts, 1, 2), 3, 24)
    assert pool.sample(prompts, seeds(prompts, 1, 2), 3, 24) == first
    assert [[c.tokens for c in g] for g in pool.sample(prompts[:1], seeds(prompts[:1], 1, 2), 3, 24)] == [
        [c.tokens for c in first[0]]
    ]
    assert pool.sample(prompts, seeds(prompts, 1, 3), 3, 24) != first
    drawn = {tuple(c.tokens) for group in first for c in group}
    assert len(drawn) == 18, "samples of one prompt, or of two, share their random numbers"


def test_new_weights_answer_at_once_also_for_a_prompt_seen_before(pool: RolloutPool, spec: ModelSpec) -> None:
    """The prompt fills two blocks of the prefix cache, which holds what the old weights computed."""
    prompts = prompts_of(spec, 2, 70)
    for version in (3, 4):
        model = random_model(spec, seed=version)
        push(pool, model, version)
        groups = pool.sample(prompts, seeds(prompts, 0), 3, 20)
        assert disagreement(model, prompts, groups) < 1e-4
        assert {c.weight_version for group in groups for c in group} == {version}


def test_a_call_of_the_calculator_is_answered_and_generation_goes_on(
    pool: RolloutPool, tokenizer: Tokenizer, taught: LanguageModel
) -> None:
    push(pool, taught, 5)
    prompt, config = short_prompt(tokenizer), RLConfig(lr_scale=0.01)
    ids, mask = render(conversation_of(PROBLEM), tokenizer, CONTEXT)
    for greedy in (True, False):
        [[completion]] = groups = pool.sample([prompt], seeds([prompt], 0), 1, 60, greedy=greedy)
        assert tokenizer.decode(completion.tokens) == (
            "So <|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>408.\n#### 408<|assistant_end|>"
        )
        assert prompt + completion.tokens == ids.tolist(), "what the model was taught and what it sees are one format"
        assert completion.sampled == mask.tolist()[len(prompt) :]
        inserted = [lp for lp, s in zip(completion.logprobs, completion.sampled, strict=True) if not s]
        assert len(inserted) >= 3 and set(inserted) == {0.0}
        assert completion.finished and completion.weight_version == 5
        assert TASK.grade(PROBLEM, tokenizer.decode(completion.tokens))["reward"] == 1.0
        assert disagreement(taught, [prompt], groups) < 1e-4, "the tokens after the result are scored with it in view"
    model = build(taught.spec)
    model.load_state_dict(taught.state_dict())
    optimizer = build_optimizer(model, config, "fp32", ALONE)
    metrics = update(model, optimizer, [prompt], [completion], torch.ones(1), config, 1.0, ALONE)
    assert metrics["trained_tokens"] == sum(completion.sampled)
    assert metrics["logprob_difference_max"] < 1e-4


def test_calls_within_a_batch_leave_no_trace_in_the_other_completions(
    pool: RolloutPool, tokenizer: Tokenizer, spec: ModelSpec
) -> None:
    model = random_model(spec, seed=6)
    with torch.no_grad():  # every eighth token or so ends a call, and nothing else ends a turn
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[tokenizer.special("<|python_end|>"), 0] = 3.0
        model.lm_head.weight[tokenizer.special("<|assistant_end|>"), 0] = -20.0
    push(pool, model, 6)
    prompts = prompts_of(spec, 6, 20)
    groups = pool.sample(prompts, seeds(prompts, 1), 4, 50)
    calls = [c.tokens[:-1].count(tokenizer.special("<|python_end|>")) for group in groups for c in group]
    assert sum(calls) > 24 and min(calls) < max(calls)
    assert {len(c.tokens) for group in groups for c in group} == {50}
    assert disagreement(model, prompts, groups) < 1e-4
    [alone] = pool.sample(prompts[2:3], seeds(prompts, 1)[2:3], 4, 50)
    assert [c.tokens for c in alone] == [c.tokens for c in groups[2]]
    if runs_vllm(pool):  # whether requests stay open between turns must not be seen
        room = inside(pool, lambda actor: (actor.engine.cached_tokens, setattr(actor.engine, "cached_tokens", 0))[0])
        assert room > 256 * (70 + 32)
        again = pool.sample(prompts, seeds(prompts, 1), 4, 50)
        inside(pool, lambda actor: setattr(actor.engine, "cached_tokens", room))
        assert [[c.tokens for c in group] for group in again] == [[c.tokens for c in group] for group in groups]


def test_the_limit_on_new_tokens_holds_with_a_result_in_the_way(
    pool: RolloutPool, tokenizer: Tokenizer, taught: LanguageModel
) -> None:
    push(pool, taught, 5)
    prompt = short_prompt(tokenizer)
    [[whole]] = pool.sample([prompt], seeds([prompt], 0), 1, 60, greedy=True)
    for limit in range(1, len(whole.tokens) + 1):
        [[cut]] = pool.sample([prompt], seeds([prompt], 0), 1, limit, greedy=True)
        assert (cut.tokens, cut.sampled) == (whole.tokens[:limit], whole.sampled[:limit]), limit
        assert len(cut.logprobs) == limit
        assert cut.finished == (limit == len(whole.tokens))


def test_a_result_does_not_run_past_the_context(pool: RolloutPool, tokenizer: Tokenizer, taught: LanguageModel) -> None:
    push(pool, taught, 5)
    prompt = long_prompt(tokenizer)
    [[completion]] = pool.sample([prompt], seeds([prompt], 0), 1, 60, greedy=True)
    assert completion.tokens[: len(call_of(tokenizer))] == call_of(tokenizer), "the call was not made"
    assert len(prompt) + len(completion.tokens) <= CONTEXT
    config = RLConfig(lr_scale=1e-9)
    optimizer = build_optimizer(taught, config, "fp32", ALONE)
    metrics = update(taught, optimizer, [prompt], [completion], torch.ones(1), config, 1.0, ALONE)
    assert metrics["trained_tokens"] > 0


def test_a_prompt_that_fills_the_context_gets_no_answer(pool: RolloutPool, spec: ModelSpec) -> None:
    prompts = [*prompts_of(spec, 1, CONTEXT), *prompts_of(spec, 1, CONTEXT - 1), *prompts_of(spec, 1, CONTEXT + 5)]
    lengths = [len(c.tokens) for [c] in pool.sample(prompts, seeds(prompts, 0), 1, 10)]
    assert lengths == [0, 1, 0]


def test_sampler_and_trainer_still_agree_after_twenty_updates(pool: RolloutPool, spec: ModelSpec) -> None:
    model = random_model(spec, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = RLConfig(lr_scale=0.1, device_batch_size=16)
    optimizer = build_optimizer(model, config, "fp32", ALONE)
    prompts = prompts_of(spec, 4, 12)
    for version in range(21):
        push(pool, model, version)
        groups = pool.sample(prompts, seeds(prompts, version), 4, 16)
        assert disagreement(model, prompts, groups) < 1e-4, version
        assert {c.weight_version for group in groups for c in group} == {version}
        advantage = torch.tensor([1.0, -0.5, 0.5, -1.0] * 4)
        sequences = [prompt for prompt in prompts for _ in range(4)]
        update(model, optimizer, sequences, [c for group in groups for c in group], advantage, config, 1.0, ALONE)
    moved = max((p - before[name]).abs().max().item() for name, p in model.named_parameters())
    assert moved > 0.01, "the updates changed nothing"


def test_an_engine_with_other_weights_than_it_was_sent_is_caught(pool: RolloutPool, spec: ModelSpec) -> None:
    """Whether it kept the old ones, or has one number of one fused matrix wrong."""
    push(pool, random_model(spec, seed=0), 1)

    def keep(actor: Any) -> None:
        actor.kept, actor.engine.load = actor.engine.load, lambda state: None

    def spoil(actor: Any) -> None:
        def load(state: dict[str, torch.Tensor]) -> None:
            wrong = state["model.layers.1.self_attn.k_proj.weight"].clone()
            wrong[3, 5] += 1e-6
            actor.kept(state | {"model.layers.1.self_attn.k_proj.weight": wrong})

        actor.engine.load = load

    def mend(actor: Any) -> None:
        actor.engine.load = actor.kept

    for change in (keep, spoil):
        inside(pool, change)
        with pytest.raises(RuntimeError, match="computes with weights"):
            push(pool, random_model(spec, seed=2), 2)
    inside(pool, mend)
    push(pool, random_model(spec, seed=2), 2)


def test_without_a_new_prefix_cache_the_logprobs_tell(pool: RolloutPool, spec: ModelSpec) -> None:
    """Of a prompt seen before, vLLM keeps what the old weights computed: the learner's comparison must show it."""
    if runs_vllm(pool):
        prompts = prompts_of(spec, 2, 70)

        def forget(actor: Any) -> None:
            actor.kept, actor.engine.loaded = actor.engine.loaded, lambda: None

        def mend(actor: Any) -> None:
            actor.engine.loaded = actor.kept

        for version, change in ((8, forget), (9, mend)):
            push(pool, random_model(spec, seed=0), 7)
            pool.sample(prompts, seeds(prompts, 0), 3, 20)
            inside(pool, change)
            model = random_model(spec, seed=version)
            push(pool, model, version)
            groups = pool.sample(prompts, seeds(prompts, 0), 3, 20)
            stale = disagreement(model, prompts, groups) > RLConfig().max_logprob_difference
            assert stale == (change is forget)


def test_an_actor_lost_while_it_samples_is_replaced_and_its_prompts_sampled_again(
    pool: RolloutPool, spec: ModelSpec
) -> None:
    """By one with the current weights, which are not those it started with; the completions are the same. vLLM's is
    killed, the other stopped, so that it hangs."""
    how = signal.SIGKILL if runs_vllm(pool) else signal.SIGSTOP
    model = random_model(spec, seed=6)
    push(pool, model, 6)
    prompts = prompts_of(spec, 12, 40)
    before = pool.sample(prompts, seeds(prompts, 7), 64, 50)
    pid = inside(pool, lambda _: os.getpid())
    assert pid != os.getpid()
    rollout = pool.start(prompts, seeds(prompts, 7), 64, 50)
    time.sleep(0.1)
    began = time.monotonic()
    os.kill(pid, how)
    after = rollout.result()
    assert time.monotonic() - began > HEALTH_TIMEOUT * (how == signal.SIGSTOP)
    assert inside(pool, lambda _: os.getpid()) != pid, "the rollout was over before the actor was lost"
    assert {c.weight_version for group in after for c in group} == {6}
    assert disagreement(model, prompts, after) < 1e-4
    assert [[(c.tokens, c.sampled, c.finished) for c in g] for g in after] == [
        [(c.tokens, c.sampled, c.finished) for c in g] for g in before
    ]


class CutTransfer:
    """A transfer in whose midst an actor dies."""

    def __init__(self, actors: list[Any], shared: bool, timeout: float) -> None:
        self.actor = actors[0]

    def send(self, weights: Any) -> None:
        ray.kill(self.actor)
        ray.get(self.actor.alive.remote())


def test_an_actor_lost_in_a_weight_transfer_is_replaced_with_the_new_weights(
    directory: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.rl.rollout.Transfer", CutTransfer)
    with pool_of(directory, "torch") as pool:
        pool._direct = True
        model = random_model(spec, seed=7)
        push(pool, model, 7)
        assert pool.replaced == 1
        prompts = prompts_of(spec, 2, 12)
        groups = pool.sample(prompts, seeds(prompts, 0), 2, 20)
        assert {c.weight_version for group in groups for c in group} == {7}
        assert disagreement(model, prompts, groups) < 1e-4


class WholeTransfer:
    """A transfer that arrives."""

    def __init__(self, actors: list[Any], shared: bool, timeout: float) -> None:
        self.actors = actors

    def send(self, weights: Any) -> None:
        ray.get([actor.load.remote(weights, 0) for actor in self.actors])


@pytest.mark.parametrize("lasting", [True, False])
def test_weights_cross_the_host_only_when_they_must(
    directory: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """Those that last, for an actor that is replaced; those that change while actors sample, at once."""
    monkeypatch.setattr("stages.rl.rollout.Transfer", WholeTransfer)
    put, stored = ray.put, []
    monkeypatch.setattr("stages.rl.rollout.ray.put", lambda value: stored.append(1) or put(value))
    with pool_of(directory, "torch") as pool:
        pool._direct = True
        model, sent = random_model(spec, seed=8), random_model(spec, seed=8)
        pool.sync(engine_state(model.spec, dict(model.named_parameters())), 8, lasting=lasting)
        assert len(stored) == (0 if lasting else 1)
        if not lasting:
            for p in model.parameters():
                p.data.zero_()
        ray.kill(pool._members[0].handle)
        prompts = prompts_of(spec, 2, 12)
        groups = pool.sample(prompts, seeds(prompts, 0), 2, 20)
        assert pool.replaced == 1 and len(stored) == 1
        assert {c.weight_version for group in groups for c in group} == {8}
        assert disagreement(sent, prompts, groups) < 1e-4


OWN = (
    "from tasks.base import Problem\ndef problems(split):\n    return [Problem('Is it?', 'yes')] * 16\n"
    "def grade(problem, completion):\n    return {'reward': float(len(completion) % 2)}\n"
)


@pytest.mark.parametrize("stage", ["rl", "evaluate_sft"])
def test_a_stage_ends_where_calls_take_longer_than_they_may(directory: Path, tmp_path: Path, stage: str) -> None:
    """No engine starts within a hundredth of a second; with the time there is by default evaluation is done."""
    sft = Storage(tmp_path / "sft")
    manifests.write(sft, Manifest("r", "sft", sft.upload_tree(directory)))
    context = StageContext("r", stage, Storage(tmp_path / stage), {"sft": sft}, {}, {})
    own, devices = EnvironmentFile(path="own.py", text=OWN), resources()

    def go(**settings: Any) -> None:
        if stage == "rl":
            config = RLConfig(engine="torch", actors=1, environment=own, **settings)
            work({"context": context, "config": config, "seed": 0, "devices": devices})
        else:
            shape = EvaluateConfig(engine="torch", problems=1, samples=1, max_new_tokens=2, **settings)
            evaluation.run(context, "sft", shape, (own, 30.0), 0, devices)

    with pytest.raises(RuntimeError, match=r"rollout actor 0 is overdue: one call took .* for the 3\. time"):
        go(call_timeout=0.01)
    assert manifests.read(context.storage) is None
    if stage != "rl":
        go()
        assert manifests.read(context.storage) is not None


def test_devices_that_do_not_train_sample_unless_fewer_are_asked_for() -> None:
    eight, world = Devices("cuda", gpus=8, cpus=16), World(0, 2, torch.device("cuda"), threads=1)

    def actors(asked: int, placement: str = "split") -> int:
        return actors_for(RLConfig(rollout_devices=asked), placement, eight, world)

    assert [actors(asked) for asked in (0, 1, 4, 6)] == [6, 1, 4, 6]
    assert actors(4, "shared") == 1, "each learner has one beside itself"
    with pytest.raises(ValueError, match=r"so 6 could sample, not 7 \(rl\.rollout_devices\)"):
        actors(7)


def test_an_actor_that_cannot_start_is_not_tried_again(directory: Path) -> None:
    with pool_of(directory / "missing", "torch") as pool, pytest.raises(ray.exceptions.ActorDiedError, match="missing"):
        pool.sample([[1]], [(0,)], 1, 4)
    assert pool.replaced == 0


@pytest.fixture(scope="module")
def api(taught: LanguageModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of vLLM's server, started as README says."""
    path = tmp_path_factory.mktemp("served")
    export(taught, tokenizer, path)
    with serving(path, "64M") as client:
        yield client


def test_a_client_of_openais_api_answers_the_calls(api: OpenAI) -> None:
    example = runpy.run_path(str(ROOT / "docs/examples/calculator_client.py"))
    question = [{"role": "user", "content": PROBLEM.question}]
    asked: dict[str, Any] = {"model": api.models.list().data[0].id, "messages": question, "temperature": 0}
    call, result, end = example["answer"](api, question, temperature=0)
    assert (call["content"], end["content"]) == ("So ", "408.\n#### 408")
    assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression": "12*34"}'}
    assert result == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "408"}

    stream = [c.choices[0] for c in api.chat.completions.create(**asked, tools=[example["CALCULATOR"]], stream=True)]
    assert "".join(choice.delta.content or "" for choice in stream) == "So "
    [[function]] = [[c.function for c in choice.delta.tool_calls] for choice in stream if choice.delta.tool_calls]
    assert (function.name, function.arguments) == ("calculator", '{"expression": "12*34"}')
    assert stream[-1].finish_reason == "tool_calls"

    [alone] = api.chat.completions.create(**asked).choices
    assert (alone.message.content, alone.finish_reason) == ("So 12*34", "stop"), "without tools the call is the end"
    [cut] = api.chat.completions.create(**asked, tools=[example["CALCULATOR"]], max_tokens=3).choices
    assert cut.finish_reason == "length" and not cut.message.tool_calls
