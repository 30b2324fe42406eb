"""From one depth to everything else: pure arithmetic, no torch.

Tokens follow a fixed ratio to parameters (Chinchilla, arXiv 2203.15556: about 20), the batch is fixed in tokens.
"""

from __future__ import annotations

import math
from typing import Any

from corpus.sources import CORPORA, SYNTHETIC, shards_needed
from stages.config import ModelConfig
from tasks.mixture import SYNTHETIC_ROWS, Part

CHARACTERS_PER_TOKEN = 4.8
SPARE_SHARDS = 1.1  # shards of a named corpus, of those that hold as many tokens: some are duplicates or held out
MOST_PASSES = 4  # over a corpus teach about as much as new text: Muennighoff et al., arXiv 2305.16264
LEAST_STEPS = 100
TOTAL_BATCH_SIZE = {"base": 524_288, "mid": 524_288, "sft": 32_768}  # tokens a step

# How what was trained elsewhere goes on, by whatever optimizer it was made: as is usual for tuning all weights, and in
# RL, whose lr_scale is 1/20, at 1e-6.
BEGUN = {"optimizer": "adamw", "adamw_lr": 2e-5}

# Records of the sources of the usual mixtures, and tokens that one comes to. The second are estimates.
RECORDS = {
    ("hub:HuggingFaceTB/smol-smoltalk", "train"): 460_341,
    ("hub:cais/mmlu:all", "auxiliary_train"): 99_842,
    ("hub:allenai/ai2_arc:ARC-Easy", "train"): 2_251,
    ("hub:allenai/ai2_arc:ARC-Challenge", "train"): 1_119,
    ("hub:openai/gsm8k", "train"): 7_473,
}
RECORD_TOKENS = {"chat": 1_000, "gsm8k": 170, "choices": 110, "spelling": 60}


class DivisionError(ValueError):
    """Sizes that do not divide; the message names values that would."""


def characters_per_token(tokenizer: str) -> float:
    """About how many characters of text a token of this tokenizer stands for."""
    return 1.0 if tokenizer == "chars" else CHARACTERS_PER_TOKEN


def spare_shards(corpus: str, tokens: int, tokenizer: str) -> int:
    """Shards of a named corpus to read for so many tokens: some more than hold them, as far as there are any."""
    needed = shards_needed(corpus, tokens, characters_per_token(tokenizer)) or 1
    return min(math.ceil(SPARE_SHARDS * needed), CORPORA[corpus].shards)


def base_tokens(parameters: int, target_ratio: float) -> int:
    """Tokens to pretrain on, before whole steps are taken of them."""
    return int(target_ratio * parameters)


def most_tokens(characters: float, tokenizer: str) -> int:
    """About how many tokens MOST_PASSES over so many characters of text are."""
    return max(1, round(MOST_PASSES * characters / characters_per_token(tokenizer)))


def small_batch(tokens: int, sequence_len: int, workers: int) -> int:
    """Tokens a step, so that `tokens` are at least LEAST_STEPS steps; a power of two of rows for each worker."""
    rows = max(1, tokens // (LEAST_STEPS * sequence_len * workers))
    return (1 << rows.bit_length() - 1) * sequence_len * workers


def records(part: Part) -> int | None:
    """Conversations that a part of a mixture gives; None where that is not known beforehand."""
    there = SYNTHETIC_ROWS if part.source == SYNTHETIC else RECORDS.get((part.source, part.split))
    one = min(n for n in (there, part.rows) if n is not None) if there or part.rows else None
    return None if one is None else part.repeats * one


def rows_per_rank(total_batch_size: int, sequence_len: int, world: int, stage: str = "") -> int:
    """Rows of `sequence_len` tokens each of `world` workers has in a step of `total_batch_size` tokens."""
    unit = sequence_len * world
    if total_batch_size % unit:
        below = total_batch_size // unit * unit
        near = " or ".join(str(v) for v in (below, below + unit) if v)
        raise DivisionError(
            f"{stage and stage + '.'}total_batch_size = {total_batch_size} does not divide into rows of "
            f"{sequence_len} tokens (model.sequence_len) on {world} worker(s); the nearest that do: {near}"
        )
    return total_batch_size // unit


def grad_accum_steps(
    total_batch_size: int, sequence_len: int, device_batch_size: int, world: int, stage: str = ""
) -> int:
    """Micro-batches of `device_batch_size` rows a worker runs in one optimizer step; `stage` names it in errors.

    Raises DivisionError naming values that divide.
    """
    rows = rows_per_rank(total_batch_size, sequence_len, world, stage)
    if rows % device_batch_size:
        valid = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise DivisionError(
            f"{stage and stage + '.'}device_batch_size = {device_batch_size} does not divide the {rows} rows "
            f"each of {world} worker(s) has in a step; these do: {valid}"
        )
    return rows // device_batch_size


def derive(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Fill what the model's shape decides in a dumped configuration; `given` holds only what was set by hand.

    Where nothing says how long base trains, and it is known how much text there is, it reads no more than MOST_PASSES.
    Raises DivisionError where batch, sequence length, workers and device batch do not divide. Between MIN and MAX
    workers rows need not divide: some have one row more.
    """
    begun = config["init"]["source"] is not None
    if begun:
        config = config | {stage: config[stage] | BEGUN for stage in ("mid", "sft", "rl")}
    shape = ModelConfig(**config["model"])
    parameters = shape.spec().parameters
    fewest, most = config["workers"]
    length = shape.sequence_len
    filled = dict(config)
    data = config["data"]
    wanted = base_tokens(parameters, config["base"]["target_ratio"])
    if (
        data["characters"] is not None
        and (most_read := most_tokens(data["characters"], config["tokenizer"]["source"])) < wanted
    ):
        wanted = most_read
        batch = min(max(1, TOTAL_BATCH_SIZE["base"] // length) * length, small_batch(wanted, length, most))
        config = config | {"base": config["base"] | {"total_batch_size": config["base"]["total_batch_size"] or batch}}
    for stage, tokens in TOTAL_BATCH_SIZE.items():
        train = dict(config[stage])
        if train["total_batch_size"] is None:
            a_row_each = most if fewest == most else 1
            train["total_batch_size"] = max(a_row_each, tokens // length) * length
        train["schedule"] = train["schedule"] or ("wsd" if shape.family == "depth" else "cosine")
        filled[stage] = train
        if begun if stage == "base" else not data[stage]:  # it has nothing to learn from, and will not run
            continue
        rows = rows_per_rank(train["total_batch_size"], length, most if fewest == most else 1, stage)
        if "device_batch_size" not in given.get(stage, {}):
            largest = min(rows if fewest == most else max(1, rows // most), train["device_batch_size"])
            train["device_batch_size"] = next(n for n in range(largest, 0, -1) if fewest != most or rows % n == 0)
        if fewest == most:
            grad_accum_steps(train["total_batch_size"], length, train["device_batch_size"], most, stage)
        elif rows < most:
            raise DivisionError(f"{stage}.total_batch_size is {rows} rows, too few for --workers {fewest}:{most}")
    base = filled["base"]
    if begun:
        return filled
    if base["steps"] is None and base["hours"] is None and base["budget_usd"] is None:
        base["steps"] = max(1, (base["tokens"] or wanted) // base["total_batch_size"])
    if data["shards"] is None and data["corpus"] in CORPORA:
        target = base_tokens(parameters, base["target_ratio"])  # a guess where time decides
        tokens = base["steps"] * base["total_batch_size"] if base["steps"] is not None else target
        filled["data"] = data | {"shards": spare_shards(data["corpus"], tokens, config["tokenizer"]["source"])}
    return filled
