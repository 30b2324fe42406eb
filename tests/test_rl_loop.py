"""The RL loop in one process, with the torch engine and without Ray; and what the whole line's RL says of itself."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import TIMING, Run, start
from torch import Tensor

from cluster import manifest
from cluster.storage import Storage
from corpus.tokenizers import ANSWER_ENDS, Tokenizer
from models.build import build
from models.generate import Completion, generate
from models.hf import from_pretrained, load_hf_state
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.config import RLConfig
from stages.context import StageContext, Stopped
from stages.evaluation.text import Ours
from stages.rl.groups import Group, NoSignal, rewards_of
from stages.rl.learner import divergence
from stages.rl.loop import reinforce
from stages.training.metrics import Reporter
from stages.training.parallel import World
from stages.training.state import Checkpoints, export_checkpoint
from tasks.base import Problem, Tool

ALONE = World(0, 1, torch.device("cpu"), threads=1)
TOKENIZER = Tokenizer.open("chars", "0123456789")
SPEC = ModelSpec("depth", 2, 32, 2, 2, 64, TOKENIZER.vocab_size, sequence_len=32, softcap=15.0)
STEPS = 5
# eight problems and four a step: every second step ends an epoch
CONFIG = RLConfig(
    prompts_per_step=4, samples_per_prompt=4, max_new_tokens=12, save_every=1, lr_scale=1.0, require_signal=False,
    max_logprob_difference=1e-4,
)  # fmt: skip
EVERYTHING = {
    "overlap": True, "dynamic_sampling": 2, "eval_every": 2, "eval_problems": 3, "eval_samples": 2,
    "kl_coefficient": 0.05, "loss": "ppo_clip", "updates_per_step": 2, "mask_overlong": True, "save_every": 2,
}  # fmt: skip


class Killed(Exception):
    """What ends a run in the middle here."""


class Digits:
    """Right is what has the asked digit in it. `killed_at` says at which completion to die, `stopped_at` at which the
    user asks the stage to stop."""

    tools: Mapping[str, Tool] = {}
    reporter: Reporter

    def __init__(self, killed_at: int = -1, stopped_at: int = -1, never: bool = False) -> None:
        self.killed_at, self.stopped_at, self.never = killed_at, stopped_at, never
        self.graded = 0

    def problems(self, split: str) -> list[Problem]:
        return [Problem(f"{n}", f"{n}") for n in range(8)]

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        return [{"role": "user", "content": problem.question}]

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        self.graded += 1
        if self.graded == self.killed_at:
            raise Killed
        self.reporter.stop |= self.graded == self.stopped_at
        right = problem.answer in completion and not self.never
        return {"reward": float(right), "digits": float(len(completion))}

    def answer(self, completion: str) -> str | None:
        return completion


class Here:
    """A pool in this process: a model of its own that takes the trainer's weights, and samples when asked to."""

    replaced = 0

    def __init__(self) -> None:
        self.model, self.version = fresh_model(seed=9), -1
        self.started: list[tuple[int, int]] = []  # version and number of prompts of each rollout
        self.checked: list[int] = []  # versions of which the engine's weights were to be compared
        self.under_way: list[Rollout] = []

    def sync(self, state: Mapping[str, Tensor], version: int, check: bool = True, lasting: bool = False) -> float:
        assert not self.under_way, "weights move under a rollout"
        load_hf_state(self.model, {name: weight.clone() for name, weight in state.items()})
        self.version = version
        self.checked += [version] if check else []
        return 0.0

    def usage(self) -> dict[str, float]:
        return {"actor0_rss_gb": 1.0}

    def start(
        self, prompts: list[list[int]], seeds: Sequence[tuple[int, ...]], *arguments: Any, **more: Any
    ) -> Rollout:
        groups = generate(self.model, Ours(TOKENIZER).turns({}), prompts, seeds, *arguments, **more)
        for completion in (c for group in groups for c in group):
            completion.weight_version = self.version
        self.started.append((self.version, len(prompts)))
        rollout = Rollout(self, groups)
        self.under_way.append(rollout)
        return rollout

    def sample(self, *arguments: Any, **more: Any) -> list[list[Completion]]:
        return self.start(*arguments, **more).result()


class Rollout:
    seconds = 0.001

    def __init__(self, pool: Here, groups: list[list[Completion]]) -> None:
        self.pool, self.groups = pool, groups

    def result(self) -> list[list[Completion]]:
        self.pool.under_way.remove(self)
        return self.groups


def fresh_model(seed: int = 0) -> LanguageModel:
    model = build(SPEC)
    model.init_weights(seed)
    return model


def random_model(seed: int) -> LanguageModel:
    """One whose head is not zero, as that of a fresh one is."""
    model, generator = build(SPEC), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(-1) ** 0.5)
    return model


def attempt(
    path: Path,
    settings: Mapping[str, Any] | None = None,
    environment: Digits | None = None,
    pool: Here | None = None,
    world: World = ALONE,
    steps: int = STEPS,
    seed: int = 0,
) -> tuple[LanguageModel, list[dict[str, Any]]]:
    """One attempt of a run whose stage lies at `path`: the model, and the records without what they took."""
    config, model, environment = CONFIG.model_copy(update=dict(settings or {})), fresh_model(), environment or Digits()
    reporter = environment.reporter = Reporter(Storage(path), steps, quiet=world.rank > 0)
    context = StageContext("test", "rl", Storage(path), upstream={}, identity={}, upstream_digests={})
    checkpoints = Checkpoints(context, world, path.with_name(f"scratch-{world.rank}"), reporter, config.keep_last)
    problems = environment.problems("train")
    try:
        reinforce(
            model, fresh_model, TOKENIZER, environment, problems, problems[:3], config, steps, seed, world,
            pool or Here(), checkpoints, reporter,  # type: ignore[arg-type]
        )  # fmt: skip
    except Killed:
        checkpoints.wait()
        raise
    finally:
        reporter.close()
    lasting = [{k: v for k, v in record.items() if not k.endswith(TIMING)} for record in reporter.records]
    return model, lasting


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_run_killed_anywhere_goes_on_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Within an epoch and at its end; with everything on, also from what was sampled ahead, with the best so far."""
    whole, records = attempt(tmp_path / "whole", settings, graded := Digits())
    assert len({record["reward"] for record in records if "reward" in record}) > 2
    for part in (0.35, 0.6, 0.85):
        path = tmp_path / f"broken-{part}"
        with pytest.raises(Killed):
            attempt(path, settings, Digits(killed_at=int(part * graded.graded)))
        model, resumed = attempt(path, settings)
        assert resumed == records
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    if settings:
        assert "best_step" in records[-1]
        penalty, apart = ([record[name] for record in records if name in record] for name in ("kl_penalty", "kl_sft"))
        assert 0 < penalty[0] < penalty[-1], "the reference is the model that the stage began with"
        assert [round(value, 6) for value in apart[:1]] == [0] and apart[-1] > 1e-4 and len(apart) == 4


def test_the_divergence_from_the_sft_model_is_measured_at_evaluations(tmp_path: Path) -> None:
    """It needs no reference beside the learner, also after a restart, and is that of all that was sampled."""
    settings: dict[str, Any] = {"eval_every": 2, "eval_problems": 3, "eval_samples": 2}
    _, records = attempt(tmp_path / "whole", settings)
    far = [record["kl_sft"] for record in records if "kl_sft" in record]
    assert far[0] < 1e-6 and far[-1] > 1e-3 and len(far) == 4
    assert not any("kl_penalty" in record for record in records)
    with pytest.raises(Killed):
        attempt(tmp_path / "broken", settings, Digits(killed_at=60))
    _, resumed = attempt(tmp_path / "broken", settings)
    assert [record["kl_sft"] for record in resumed if "kl_sft" in record] == far

    model, before, pool = random_model(2), random_model(3), Here()
    pool.model = model
    prompts = [[1, 2, 3], [4, 5]]
    groups = pool.sample(prompts, [(0,), (1,)], 3, 12)
    apart = []
    for prompt, completion in ((p, c) for p, group in zip(prompts, groups, strict=True) for c in group):
        ids = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            p, q = (m.logits(ids[:, :-1])[0].log_softmax(-1) for m in (model, before))
        places = [(len(prompt) + t - 1, token) for t, token in enumerate(completion.tokens)]
        apart += [math.exp(q[at] - p[at]) - 1 - (q[at] - p[at]).item() for at in places]
    assert statistics.mean(apart) > 0.01
    for size in (1, 16):
        assert divergence(before, prompts, groups, size, ALONE) == pytest.approx(statistics.mean(apart), rel=1e-4)


def test_what_was_sampled_ahead_lies_in_the_checkpoint(tmp_path: Path) -> None:
    """A run that resumes does not sample it again, with other weights than it had."""
    with pytest.raises(Killed):
        attempt(tmp_path / "run", {"overlap": True}, Digits(killed_at=50))
    saved, place = manifest.checkpoints(Storage(tmp_path / "run"))[-1]
    [file] = manifest.fetch(place).glob("stage-*.json")
    state = json.loads(file.read_text())
    assert state["cursor"] == 4 * (saved + 1) and len(state["sampled"]) == 4
    assert {c["weight_version"] for group in state["sampled"] for c in group} == {saved - 1}
    attempt(tmp_path / "run", {"overlap": True}, pool=(pool := Here()))
    assert pool.started[0] == (saved, 4), "the first rollout is that of the step after, with the restored weights"


@pytest.mark.parametrize("published", [False, True])
def test_the_checkpoint_of_the_best_step_is_kept(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is what the stage ends with, where that is asked for."""
    scores = iter([0.9, 0.2, 0.6, 0.5, 0.4, 0.3])  # of the model before the first step, which is none of RL's, and on

    def scripted(*_: Any, **__: Any) -> tuple[dict[str, float], list[Any]]:
        return {"val_pass_at_1": next(scores)}, []

    monkeypatch.setattr("stages.rl.loop.measure", scripted)
    settings = {"eval_every": 1, "keep_last": 1, "save_every": 100, "keep_best": published}
    model, records = attempt(tmp_path / "run", settings)
    assert [record["best_step"] for record in records if "best_step" in record] == [-1, 1, 2, 2, 2, 2] + [2] * published
    assert [step for step, _ in manifest.checkpoints(Storage(tmp_path / "run"))] == [2, STEPS]
    place = Storage(tmp_path / "run").at(manifest.checkpoint_path(2 if published else STEPS))
    export_checkpoint(place, SPEC, TOKENIZER, tmp_path / "kept", ANSWER_ENDS)
    kept = from_pretrained(tmp_path / "kept")
    assert all(map(torch.equal, model.parameters(), kept.parameters()))


def test_overlap_samples_each_step_with_the_weights_of_the_step_before(tmp_path: Path) -> None:
    many = {"samples_per_prompt": 16}  # so that each step has something to learn from
    _, records = attempt(tmp_path / "ahead", many | {"overlap": True}, pool=(pool := Here()))
    assert pool.started == [(version, 4) for version in (0, 0, 1, 2, 3)]
    assert records[0]["ratio_max"] == pytest.approx(1, abs=1e-4) and records[1]["ratio_max"] > 1.001
    _, records = attempt(tmp_path / "plain", many, pool=(pool := Here()))
    assert pool.started == [(version, 4) for version in range(STEPS)]
    assert all(record["kl_sampler"] < 1e-8 and abs(record["ratio_max"] - 1) < 1e-4 for record in records)


@pytest.mark.parametrize("rounds", [1, 3])
def test_dynamic_sampling_draws_on_until_the_groups_are_mixed_or_the_bound_is_reached(
    tmp_path: Path, rounds: int
) -> None:
    _, records = attempt(tmp_path / "some", {"dynamic_sampling": rounds}, pool=(pool := Here()), steps=3)
    starts = [count for _, count in pool.started]
    for record in records:
        drawn = [starts.pop(0)]
        while sum(drawn) < record["prompts"]:
            drawn.append(starts.pop(0))
        assert drawn[0] == 4 and len(drawn) <= rounds + 1
        mixed = round(record["mixed_groups"] * record["prompts"])
        assert mixed == 4 or (mixed < 4 and len(drawn) == rounds + 1)
    assert not starts and any(record["prompts"] > 4 for record in records)
    _, records = attempt(tmp_path / "none", {"dynamic_sampling": rounds}, Digits(never=True), steps=2)
    assert [record["prompts"] for record in records] == [4 + 4 * rounds] * 2


def learned(path: Path) -> float:
    """How far the mean reward of the last five of 24 steps is above that of the first five."""
    settings = {"prompts_per_step": 8, "samples_per_prompt": 8, "save_every": 1000, "lr_scale": 3.0}
    _, records = attempt(path, settings, steps=24)
    rewards = [record["reward"] for record in records]
    return float(np.mean(rewards[-5:]) - np.mean(rewards[:5]))


def test_rewards_teach(tmp_path: Path) -> None:
    assert learned(tmp_path / "run") > 0.3


def test_shuffled_rewards_do_not_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same rewards, but of other completions."""
    rng = np.random.default_rng(0)

    def shuffled(groups: list[Group], samples: int) -> Tensor:
        return torch.from_numpy(rng.permutation(rewards_of(groups, samples).flatten().numpy())).view(-1, samples)

    monkeypatch.setattr("stages.rl.loop.rewards_of", shuffled)
    assert learned(tmp_path / "run") < 0.1


def test_without_a_signal_the_run_stops_before_the_first_step(tmp_path: Path) -> None:
    settings = {"require_signal": True, "signal_prompts": 5, "samples_per_prompt": 16}
    with pytest.raises(NoSignal, match=r"pass@16 of the SFT model is 0 on 5 training prompts.*require_signal=false"):
        attempt(tmp_path / "run", settings, Digits(never=True))
    assert not manifest.checkpoints(Storage(tmp_path / "run"))
    _, records = attempt(tmp_path / "run", settings, steps=1)
    assert len(records) == 1


class Constant(Digits):
    """Every completion has the same reward."""

    def __init__(self, reward: float) -> None:
        super().__init__()
        self.constant = reward

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        return super().grade(problem, completion) | {"reward": self.constant}


class Ending(Here):
    """Every completion ends by itself, or none does."""

    def __init__(self, finished: bool) -> None:
        super().__init__()
        self.finished = finished

    def start(self, *arguments: Any, **more: Any) -> Rollout:
        rollout = super().start(*arguments, **more)
        for completion in (c for group in rollout.groups for c in group):
            completion.finished = self.finished
        return rollout


@pytest.mark.parametrize(
    ("reward", "finished", "said"),
    [
        (1.0, False, "every completion earns 0.*graded 1 to 1, 1 in the mean, and 100% .* cut off.*max_new_tokens=12"),
        (1.0, True, "every completion earns 1.*graded 1 to 1, 1 in the mean, and 0% .* cut off.*give harder ones"),
        (0.25, True, "every completion earns 0.25.*graded 0.25 to 0.25, 0.25 in the mean, and 0%.* for longer"),
        (0.0, False, "every completion earns 0: .*graded 0 to 0, 0 in the mean, and 100% .* cut off.* for longer"),
    ],
)
def test_what_is_said_without_a_signal_is_what_was_seen(
    tmp_path: Path, reward: float, finished: bool, said: str
) -> None:
    with pytest.raises(NoSignal, match=said):
        attempt(tmp_path / "run", {"require_signal": True}, Constant(reward), Ending(finished))


class Stale(Here):
    """Says that it has the new weights and keeps the first."""

    def sync(self, state: Mapping[str, Tensor], version: int, check: bool = True, lasting: bool = False) -> float:
        if self.version < 0:
            super().sync(state, version)
        self.version = version
        return 0.0


class Forgetful(Here):
    """Loses a sync altogether."""

    def sync(self, state: Mapping[str, Tensor], version: int, check: bool = True, lasting: bool = False) -> float:
        return 0.0 if version == 2 else super().sync(state, version)


def test_an_engine_with_other_weights_stops_the_run(tmp_path: Path) -> None:
    """What the digest of the pool does not see, as it is taken only now and then."""
    with pytest.raises(RuntimeError, match=r"sampler and trainer differ by .* nats a token"):
        attempt(tmp_path / "stale", pool=Stale())
    with pytest.raises(RuntimeError, match="step 2: a rollout was sampled with the weights of another step"):
        attempt(tmp_path / "forgetful", pool=Forgetful())


@pytest.mark.parametrize("check_every", [1, 2, 3])
def test_the_engines_weights_are_compared_every_so_many_syncs_and_in_every_attempt(
    tmp_path: Path, check_every: int
) -> None:
    settings, path = {"check_every": check_every}, tmp_path / "run"
    with pytest.raises(Killed):
        attempt(path, settings, Digits(killed_at=40), pool=(pool := Here()))
    assert pool.checked == list(range(0, 3, check_every))
    attempt(path, settings, pool=(pool := Here()))
    assert pool.checked == list(range(2, STEPS, check_every))


SLOW = {"overlap": True, "dynamic_sampling": 1, "eval_every": 2, "eval_samples": 2, "lr_scale": 1e-6}


def two_ranks(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)
    with pytest.raises(Stopped):  # both of them, as soon as one of them is asked to
        attempt(path / "run", SLOW, Digits(stopped_at=60 if rank else -1), world=World.current(2))
    dist.destroy_process_group()


def test_two_ranks_draw_what_one_draws_and_one_goes_on_where_they_ended(tmp_path: Path) -> None:
    _, records = attempt(tmp_path / "alone", SLOW)
    mp.spawn(two_ranks, args=(tmp_path,), nprocs=2)
    reached, place = manifest.checkpoints(Storage(tmp_path / "run"))[-1]
    assert reached >= 2 and len(list(manifest.fetch(place).glob("stage-*.json"))) == 2
    _, resumed = attempt(tmp_path / "run", SLOW)
    assert len(resumed) == len(records)
    for ours, theirs in zip(resumed, records, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_learner_and_vllm_agree_on_every_token_of_every_step(line: Run) -> None:
    """Each step learns from what the very policy has sampled: ratios are 1 and nothing diverges, up to rounding."""
    records = [record for record in line.records("rl") if "reward" in record]
    assert len(records) == 6 and sum(record["trained_tokens"] > 0 for record in records) > 3
    for record in records:
        if record["trained_tokens"]:
            assert record["logprob_difference_max"] < 1e-4 and abs(record["ratio_max"] - 1) < 1e-4
            assert record["kl_sampler"] < 1e-8 and record["clip_share"] == 0


def test_rl_recovers_from_a_lost_learner_a_dead_actor_and_one_that_hangs(line: Run, tmp_path: Path) -> None:
    """All in one run, and nobody can tell from its record."""
    run = line.branch(tmp_path, "tokenizer", "ingest", "base", "conversations", "mid", "sft")
    settings = ("rl.actors=2", "rl.health_timeout=8", "rl.save_every=1")
    command = start("run", *run.arguments("--only", "rl", *(part for s in settings for part in ("--set", s))))

    def saved() -> int:
        found = sorted((run.path / "rl/checkpoints").glob("step_*/manifest.json"))
        return int(found[-1].parent.name.removeprefix("step_")) if found else 0

    assert command.until(lambda: saved() >= 1, 300), command.output()
    [learner] = command.named("RayTrainWorker")
    learner.kill()
    reached = saved()
    assert command.until(lambda: saved() > reached, 300), command.output()
    reached = saved()
    dead, hung = command.named("RolloutActor")
    dead.kill()
    hung.suspend()
    assert reached < 6 and command.until(lambda: saved() > reached, 300), command.output()
    result = command.finish(300)
    assert result.code == 0, result.output
    assert "a worker was lost" in result.output and "a new one takes over" in result.output
    kept = json.loads(run.manifests()["rl"])["stats"]["incidents"]
    assert [incident["kind"] for incident in kept] == ["lost worker", "replaced actor", "replaced actor"]
    assert not result.left_behind
    assert not learner.is_running() and not dead.is_running() and not hung.is_running()
    records, undisturbed = run.lasting("rl"), line.lasting("rl")
    replaced = [record.pop("actors_replaced") for record in records if "reward" in record]
    assert replaced[0] == 0 and replaced[-1] == 2
    assert records == [{k: v for k, v in record.items() if k != "actors_replaced"} for record in undisturbed]
    weights = "rl/model.safetensors"
    assert (run.path / weights).read_bytes() == (line.path / weights).read_bytes()
