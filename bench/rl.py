"""What sampling for RL costs beside vLLM alone: `python -m bench.rl`, by default at about 10 M parameters.

One actor on one device, or on one core; the runs compared alternate. The bare engine is the pool's own, given the same
prompts at once through `LLM.generate`, without seeds, turns or Ray. The model knows nothing, but writes as many calls
of a tool as asked for; what these cost is told from a pool whose model may call none.

With `--trl PYTHON`, an interpreter whose environment has TRL, a whole step (sampling, learning, sync; on all cores) is
compared with one of TRL's GRPOTrainer, which generates by itself: same model, prompts, samples and tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from bench.report import hardware_name, write
from cluster import runtime
from cluster.resources import resources
from corpus.tokenizers import Tokenizer
from models.build import build
from models.generate import Completion
from models.hf import engine_state
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.config import RLConfig
from stages.rl.algorithm import advantages
from stages.rl.learner import learner_precision, update
from stages.rl.rollout import RolloutPool
from stages.training.optimizer import build_optimizer
from stages.training.parallel import World, prepare
from stages.training.state import export

TEXT = "The model of this benchmark reads and writes words that mean nothing to it. "


def caller(spec: ModelSpec, tokenizer: Tokenizer, calls: float, tokens: int) -> LanguageModel:
    """A model whose every token is drawn alike, but for one that begins a call (a tenth), one that ends it (so many in
    `tokens` tokens as asked for) and the one that ends the completion (never)."""
    model = build(spec)
    model.init_weights(0)  # with a head of zeros, that scores all tokens alike
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0  # so that one number of the residual is known
        hidden = 10.0 / (1 + 99 / spec.width) ** 0.5
        shares = {"<|python_start|>": 0.1, "<|python_end|>": calls / tokens, "<|assistant_end|>": 1e-9}
        others = (1 - sum(shares.values())) / (spec.vocab_size - len(shares))  # of one of the other tokens
        for name, share in shares.items():
            score = spec.softcap * np.arctanh(np.clip(np.log(share / others) / spec.softcap, -0.9, 0.9))
            model.lm_head.weight[tokenizer.special(name), 0] = float(score / hidden)
    return model


def tool(_: str) -> str:
    return "408"


def seconds(what: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = what()
    return result, time.perf_counter() - began


def bare(prompts: list[list[int]], samples: int, new_tokens: int, actor: Any) -> tuple[int, float]:
    """Tokens and seconds of the engine of `actor`; runs in its process."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=samples, temperature=1.0, max_tokens=new_tokens, logprobs=0, detokenize=False, ignore_eos=True
    )
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    found, took = seconds(lambda: actor.engine.llm.generate(inputs, params, use_tqdm=False))
    actor.engine.loaded()  # the next run shall find no prefix in the cache
    return sum(len(sample.token_ids) for request in found for sample in request.outputs), took


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.rl", description=__doc__)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seq", type=int, default=512, help="the model's context")
    parser.add_argument("--prompts", type=int, default=RLConfig().prompts_per_step)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=RLConfig().samples_per_prompt, help="completions a prompt")
    parser.add_argument("--new-tokens", type=int, default=RLConfig().max_new_tokens, help="tokens a completion")
    parser.add_argument("--calls", type=float, default=3.0, help="calls of a tool a completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter that has TRL, to compare a whole step with")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    args = parser.parse_args()

    if args.trl:
        trl(args.trl, "-c", "from trl import GRPOTrainer")  # before anything is measured for it
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train([TEXT + " ".join(map(str, range(20_000)))], args.vocab)
    spec = ModelSpec.from_dial("depth", args.depth, tokenizer.vocab_size, args.seq)
    model = caller(spec, tokenizer, args.calls, args.new_tokens)
    prompts = np.random.default_rng(0).integers(256, size=(args.prompts, args.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        export(model, tokenizer, Path(directory))
        runtime.connect()
        try:
            row = measure(Path(directory), model, prompts, args)
            if args.trl:
                row |= compare(Path(directory), model, tokenizer, args)
        finally:
            ray.shutdown()
    print(
        f"{hardware_name()}, torch {torch.__version__}: depth {args.depth}, {spec.parameters:,} parameters, one actor"
    )
    print(f"{args.prompts} prompts of {args.prompt_tokens} tokens, {args.samples} x {args.new_tokens} tokens each")
    shown = {
        "vLLM alone": f"{row['bare_tokens_per_second']:,.0f} tokens/s",
        "pool, vLLM": f"{row['rollout_tokens_per_second']:,.0f} tokens/s, {row['of_bare']:.1%} of vLLM alone",
        "with calls": f"{row['calls_tokens_per_second']:,.0f} tokens/s, {row['call_cost']:.1%} less; "
        f"{row['calls_a_completion']:.1f} calls a completion",
        "pool, torch": f"{row['torch_tokens_per_second']:,.0f} tokens/s",
        "weight sync": f"{row['sync_seconds']:.3f} s, {row['checked_sync_seconds']:.3f} s with the digest",
    }
    if args.trl:
        shown["a step"] = f"{row['step_seconds']:.2f} s, on all cores"
        shown["TRL's step"] = f"{row['trl_step_seconds']:.2f} s, {row['times_trl']:.1f} times as long"
    for name, value in shown.items():
        print(f"{name:<14}{value}")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        write("rl", [settings | {"parameters": spec.parameters} | row], args.out)


def measure(
    directory: Path, model: LanguageModel, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, float]:
    """Medians over the repeats, after one run of each kind to warm up. A tool's results count among the tokens, as they
    do in `completion_tokens_per_second` of the RL stage."""
    pool_of = partial(RolloutPool, partial(Path, directory), resources(), 1)
    state = engine_state(model.spec, dict(model.named_parameters()))
    rates: dict[str, list[float]] = {"bare": [], "rollout": [], "calls": [], "torch": []}
    syncs: dict[bool, list[float]] = {False: [], True: []}
    calls = 0.0
    alone = partial(bare, prompts, args.samples, args.new_tokens)
    with (
        pool_of(tools={}) as pool,
        pool_of(tools={"python": tool}) as calling,
        pool_of(tools={}, engine="torch") as plain,
    ):
        for repeat in range(args.repeats + 1):
            tokens, took = ray.get(pool._members[0].handle.__ray_call__.remote(alone))
            found = {"bare": tokens / took}
            for name, which in (("rollout", pool), ("calls", calling), ("torch", plain)):
                seeds = [(repeat, i) for i in range(len(prompts))]
                sample = partial(which.sample, prompts, seeds, args.samples, args.new_tokens)
                groups, took = seconds(sample)
                completions = [c for group in groups for c in group]
                found[name] = sum(len(c.tokens) for c in completions) / took
                for check in (False, True):
                    spent = which.sync(state, repeat, check)  # drops what the cache holds of the prompts, too
                    if repeat and which is pool:
                        syncs[check].append(spent)
                if which is calling:
                    calls = sum(map(answered, completions)) / len(completions)
            if repeat:
                for name, rate in found.items():
                    rates[name].append(rate)
    row = {f"{name}_tokens_per_second": statistics.median(of_kind) for name, of_kind in rates.items()}
    return row | {
        "of_bare": row["rollout_tokens_per_second"] / row["bare_tokens_per_second"],
        "call_cost": 1 - row["calls_tokens_per_second"] / row["rollout_tokens_per_second"],
        "calls_a_completion": calls,
        "sync_seconds": statistics.median(syncs[False]),
        "checked_sync_seconds": statistics.median(syncs[True]),
    }


def answered(completion: Completion) -> int:
    """Calls after which a result was put in."""
    return sum(before > after for before, after in itertools.pairwise(completion.sampled))


def compare(directory: Path, model: LanguageModel, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """Medians of the seconds of a step, ours and TRL's, after one to warm up."""
    words = (TEXT * args.prompt_tokens).split()
    texts = [" ".join(words[i : i + args.prompt_tokens // 2]) for i in range(args.prompts)]
    ours = statistics.median(own_steps(directory, model, [tokenizer.encode(text) for text in texts], args)[1:])
    request = {
        "model": str(directory),
        "prompts": texts,
        "samples": args.samples,
        "new_tokens": args.new_tokens,
        "device_batch_size": RLConfig().device_batch_size,
        "steps": args.repeats + 1,
        "threads": len(os.sched_getaffinity(0)),
    }
    (file := directory / "trl.json").write_text(json.dumps(request))
    theirs = json.loads(trl(args.trl, str(Path(__file__).parent / "trl_step.py"), str(file)).splitlines()[-1])
    if min(theirs["lengths"]) < args.new_tokens:
        raise SystemExit(
            f"TRL's completions have {min(theirs['lengths'])} tokens, not {args.new_tokens}: no comparison"
        )
    seconds_of_trl = statistics.median(theirs["seconds"][1:])
    return {"step_seconds": ours, "trl_step_seconds": seconds_of_trl, "times_trl": seconds_of_trl / ours}


def trl(*command: str) -> str:
    """What the interpreter of TRL's environment prints; SystemExit where it fails. Its modules shall not be ours."""
    done = subprocess.run([command[0], "-P", *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def own_steps(directory: Path, model: LanguageModel, prompts: list[list[int]], args: argparse.Namespace) -> list[float]:
    """Seconds of each step: sampling with an actor a device or core, an update with rewards by chance, the sync."""
    devices, world = resources(), World.current(len(os.sched_getaffinity(0)))
    torch.set_num_threads(world.threads)
    config, rng = RLConfig(max_new_tokens=args.new_tokens), np.random.default_rng(0)
    prepare(model, config, learner_precision(world), world)
    optimizer = build_optimizer(model, config, learner_precision(world), world)
    actors = 1 if devices.kind == "cuda" else world.threads
    took = []
    with RolloutPool(partial(Path, directory), devices, actors, tools={}) as pool:
        for step in range(args.repeats + 1):
            began = time.perf_counter()
            seeds = [(step, i) for i in range(len(prompts))]
            groups = pool.sample(prompts, seeds, args.samples, args.new_tokens)
            rewards = torch.from_numpy(rng.integers(2, size=(len(prompts), args.samples))).float().to(world.device)
            sequences = [prompt for prompt in prompts for _ in range(args.samples)]
            completions = [c for group in groups for c in group]
            update(model, optimizer, sequences, completions, advantages(rewards, "mean").flatten(), config, 1e-3, world)
            pool.sync(engine_state(model.spec, dict(model.named_parameters())), step, check=False)
            took.append(time.perf_counter() - began)
    return took


if __name__ == "__main__":
    main()
