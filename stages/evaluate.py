"""What a model can do: bits per byte on held-out text, and problems solved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.resources import Devices, resources
from corpus.conversation import render_prompt
from corpus.rows import Rows
from corpus.tokenizers import Tokenizer, UnknownCharacterError, lacking
from corpus.utf8 import valid
from models.generate import Completion
from models.hf import from_pretrained, read_spec
from models.layers import LanguageModel
from stages.config import EvaluateConfig
from stages.context import Say, StageContext
from stages.evaluation.text import Tools
from stages.growing import open_rows
from stages.rl.rollout import Completions, RolloutPool, choose, reserved
from stages.training.parallel import World, autocast
from tasks.base import Environment, Problem
from tasks.environments import EnvironmentFile, FileEnvironment
from tasks.estimates import interval, maj_at_k, pass_at_k
from tasks.gsm8k import GSM8K

# What validation of each stage is called: bits a byte of the targets that the loss counts, and of all where SFT learns
# only some. Each is of another text, so none may be taken for another's.
VALIDATED = {"base": ("val_bpb",), "mid": ("val_bpb_mid",), "sft": ("val_bpb_sft", "val_bpb_sft_whole")}
ROWS_AT_ONCE = 16
HELD_OUT = 2  # part of the seed of what is sampled here; RL has other numbers


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    rows: Rows,
    token_bytes: np.ndarray,
    world: World,
    precision: str,
    limit: int,
    rows_at_once: int = ROWS_AT_ONCE,
) -> tuple[float, float]:
    """Bits to code one byte of the text in the first `limit` rows: total nats / (ln 2 · total bytes). The first figure
    is of the targets that the loss counts, the second of all; they are one where rows have no mask.

    Comparable across tokenizers. Special tokens stand for no text and count neither above nor below.
    """
    sizes = torch.from_numpy(token_bytes).to(world.device)
    totals = torch.zeros(2, 2, dtype=torch.float64, device=world.device)  # (learned or all, nats or bytes)
    count = min(limit, rows.num_rows)
    mine = np.arange(count)[world.rank :: world.size]
    # every rank runs the model equally often, as sharded weights need, on rows that some of them do not count
    passes = math.ceil(math.ceil(count / world.size) / rows_at_once)
    for i in range(passes):
        chosen = mine[i * rows_at_once : (i + 1) * rows_at_once]
        ids, mask = rows.read(chosen if len(chosen) else np.zeros(1, dtype=int))
        tokens = torch.from_numpy(ids).to(world.device)
        with autocast(world.device, precision):
            losses = model(tokens[:, :-1], tokens[:, 1:])
        if len(chosen):
            size = sizes[tokens[:, 1:]]
            learned = size if mask is None else size * torch.from_numpy(mask[:, 1:]).to(world.device)
            for total, of in zip(totals, (learned, size), strict=True):
                total += torch.stack(((losses * (of > 0)).double().sum(), of.double().sum()))
    (learned_nats, learned_bytes), (nats, size_sum) = world.sum(totals).tolist()
    return _bits(learned_nats, learned_bytes), _bits(nats, size_sum)


def _bits(nats: float, size: float) -> float:
    return nats / (math.log(2) * size) if size else math.nan


@contextmanager
def opened(context: StageContext, file: EnvironmentFile | None, timeout: float) -> Iterator[Environment]:
    """What RL and evaluation ask: the environment of the user's file, else the problems of `--gsm8k`.

    `timeout` is in seconds a call of the file's code. Raises EnvironmentFault.
    """
    if file is None:
        yield GSM8K(str(context.fetch("conversations", "task")))
        return
    environment = FileEnvironment(file, timeout)
    try:
        yield environment
    finally:
        environment.close()


def with_room(
    environment: Environment,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    sequence_len: int,
    say: Callable[[str], None],
) -> list[Problem]:
    """Those whose prompt leaves room for an answer in a context of `sequence_len` tokens: the others could only be
    sampled as empty, and would count as wrong. `say` is told how many these are; ValueError when none is left, or for
    a character that the tokenizer lacks."""
    lengths = []
    for number, problem in enumerate(problems, 1):
        try:
            lengths.append(len(render_prompt(environment.render(problem), tokenizer)))
        except UnknownCharacterError as error:
            raise ValueError(lacking(tokenizer.alphabet, {error.character: f"problem {number:,}"})) from error
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length < sequence_len]
    if len(kept) < len(problems):
        room = f"room for an answer in a context of {sequence_len} tokens (the shortest prompt has {min(lengths)})"
        if not kept:
            raise ValueError(
                f"none of {len(problems)} problems leaves {room}: train with a larger model.sequence_len, or give "
                "problems with shorter questions"
            )
        say(f"{len(problems) - len(kept)} of {len(problems)} problems are left out, as they leave no {room}")
    return kept


def measure_text(context: StageContext, source: str, devices: Devices) -> dict[str, float]:
    """Bits per byte of the model of stage `source`, over all held-out rows of what it was trained on."""
    torch.set_num_threads(devices.threads(1))
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), devices.threads(1))
    model = from_pretrained(context.fetch(source)).to(world.device)
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    rows = open_rows(context, f"{source}/val", tokenizer.vocab_size)
    figures = bits_per_byte(model, rows, tokenizer.token_bytes, world, "auto", rows.num_rows)
    return {f"{name}_full": figure for name, figure in zip(VALIDATED[source], figures, strict=False)}


@contextmanager
def sampling(
    fetch: Callable[[], Path], tools: Tools, config: EvaluateConfig, devices: Devices, say: Say
) -> Iterator[tuple[RolloutPool, World]]:
    """What samples from the model that `fetch` brings to a machine, which may call `tools`, and the world of one
    process that asks it."""
    world = World(0, 1, torch.device("cpu"), devices.threads(1))
    engine, _ = choose(config.engine, "split", devices, world.size)
    gpus = min(devices.gpus, resources().gpus or 1)  # machines may have gone since the run began
    actors = config.actors(gpus, devices.cpus)
    with (
        reserved(devices, actors) as places,
        RolloutPool(
            fetch,
            devices,
            actors,
            engine=engine,
            placement="split",
            places=places,
            tools=tools,
            world=world,
            timeout=config.call_timeout,
            say=say,
        ) as pool,
    ):
        yield pool, world


def measure_task(
    context: StageContext,
    source: str,
    environment: Environment,
    config: EvaluateConfig,
    seed: int,
    pool: RolloutPool,
    world: World,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`measure` of the model of stage `source`, from which `pool` samples, on the held-out problems that leave room for
    an answer."""
    model = context.fetch(source)
    tokenizer, asked = Tokenizer.load(model), environment.problems("test")[: config.problems]
    problems = with_room(environment, asked, tokenizer, read_spec(model).sequence_len, context.note)
    metrics, records = measure(pool, environment, problems, tokenizer, config, seed, world)
    return metrics | {"problems_left_out": len(asked) - len(problems)}, records


def measure(
    pool: RolloutPool,
    environment: Environment,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    seed: int,
    world: World,
    greedy: bool = True,
    on_the_way: Callable[[list[list[int]], Completions], dict[str, float]] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures of the policy that `pool` samples from, over the first `config.problems` problems; every rank takes part.

    `greedy` is the share that greedy completions solve, where these are asked for. Of `config.samples` at temperature 1
    come pass_at_k for k = 1, 2, 4, ... and all, and maj_at_k for the same but 1; each share has a 95% interval in _low
    and _high. What the environment grades is in sampled_reward and so on. maj_at_k is left out where no completion has
    an answer. Beside the figures, this rank's problems with their completions and grades.

    An evaluation on the way of RL gives `on_the_way`, what it has to say of prompts and samples itself. All other names
    then begin with val_: they are of fewer problems and samples than what the evaluation stages say.
    """
    problems = problems[: config.problems]
    mine = list(world.slice(range(len(problems))))
    prompts = [render_prompt(environment.render(problems[i]), tokenizer) for i in mine]
    seeds = [(seed, HELD_OUT, i) for i in mine]
    first = pool.sample(prompts, seeds, 1, config.max_new_tokens, greedy=True) if greedy else [[] for _ in mine]
    sampled = pool.sample(prompts, seeds, config.samples, config.max_new_tokens)
    records = [
        {
            "question": valid(problems[i].question),  # the tokenizer reads it so, too
            "answer": valid(problems[i].answer),
            "greedy": [graded(environment, problems[i], c, tokenizer.decode) for c in firsts],
            "samples": [graded(environment, problems[i], c, tokenizer.decode) for c in samples],
        }
        for i, firsts, samples in zip(mine, first, sampled, strict=True)
    ]
    ks = sorted({2**i for i in range(config.samples.bit_length())} | {config.samples})
    shares = ["greedy"] * greedy + [*(f"pass_at_{k}" for k in ks), *(f"maj_at_{k}" for k in ks[1:])]
    grades = sorted(environment.grade(problems[0], ""))
    rows = torch.tensor([estimates(r, ks, grades) for r in records], dtype=torch.float64)
    means = world.gather(rows.view(len(mine), len(shares) + 1 + len(grades))).mean(0).tolist()
    plain = dict(zip([f"sampled_{name}" for name in ("answered", *grades)], means[len(shares) :], strict=True))
    metrics: dict[str, float] = {"problems": len(problems)}
    for name, mean in zip(shares, means, strict=False):
        if not name.startswith("maj") or plain["sampled_answered"]:
            low, high = interval(mean, len(problems))
            metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    metrics |= plain
    if on_the_way is None:
        return metrics, records
    return {f"val_{name}": figure for name, figure in metrics.items()} | on_the_way(prompts, sampled), records


def estimates(record: dict[str, Any], ks: list[int], grades: list[str]) -> list[float]:
    """Of one problem: whether its greedy completion, if there is one, is right; of its samples pass@k for all of `ks`,
    maj@k for all but the first, the share with an answer, and the mean of each of `grades`."""
    samples, answers = record["samples"], [s["answer"] for s in record["samples"]]
    right = [s["grades"]["reward"] >= 1 for s in samples]
    return [
        *(float(c["grades"]["reward"] >= 1) for c in record["greedy"]),
        *(pass_at_k(len(right), sum(right), k) for k in ks),
        *(maj_at_k(answers, right, k) for k in ks[1:]),
        sum(a is not None for a in answers) / len(answers),
        *(sum(s["grades"][name] for s in samples) / len(samples) for name in grades),
    ]


def graded(
    environment: Environment, problem: Problem, completion: Completion, decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """A completion as text, with its answer and its grades; one that was cut off has no answer and earns nothing."""
    text = decode(completion.tokens)
    grades = environment.grade(problem, text)
    return {
        "text": text,
        "tokens": len(completion.tokens),
        "finished": completion.finished,
        "answer": environment.answer(text) if completion.finished else None,
        "grades": {name: figure if completion.finished else min(0.0, figure) for name, figure in grades.items()},
    }
