"""What can be known of a run's inputs before anything starts: what is not there or of another form, and what is out of
proportion.

Only files of this machine are looked at, and only their names, sizes and first records, so this takes seconds at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice

from corpus.left_out import UnusableError
from corpus.sources import KINDS, ROW_KINDS, SYNTHETIC, local_files, read_unit, units
from pipeline.config import Config, ConfigError
from pipeline.scaling import characters_per_token
from stages.config import NONE, DataConfig
from tasks.core import Bundle
from tasks.gsm8k import GSM8K
from tasks.mixture import Part, conversations, spec_of
from tasks.suite import chosen, suite

PLAIN = (".txt", ".jsonl")
COMPRESSED = 0.4  # bytes a character of compressed text, about
MOST_PASSES = 4  # over a corpus teach about as much as new text: Muennighoff et al., arXiv 2305.16264
LEAST_STEPS = 100
LONG_MID = 5  # times the tokens of base
FIRST_FILES, FIRST_RECORDS = 100, 1_000  # of a corpus, and of a set of conversations
DAMAGED = ("not_json", "invalid_utf8", "too_long")  # such records say nothing of the form of the others


def check_inputs(config: Config, stages: Collection[str]) -> None:
    """Raises ConfigError for the first input of these stages that is not there or cannot serve; it names the flag that
    gives it."""
    for flag, look in _inputs(config, stages):
        try:
            look()
        except (ValueError, OSError) as error:
            raise ConfigError(f"{flag}: {error}") from error
    if "ingest" in stages:
        check_size(config)
    if "base" in stages and config.base.core_every and config.evaluate.data is not None:
        try:
            Bundle(config.evaluate.data)
        except (ValueError, OSError) as error:
            raise ConfigError(f"base.core_every asks CORE: {error}") from error
    for stage in stages:
        if stage.startswith("evaluate_"):
            tasks, data = config.evaluate.tasks, config.evaluate.data
            try:
                suite(chosen(tasks, data, chat=stage != "evaluate_base"), data)
            except (ValueError, OSError) as error:
                raise ConfigError(f"--evals {tasks}: {error}") from error


def check_size(config: Config) -> None:
    """Raises ConfigError for text of this machine that cannot fill a row, whatever the tokenizer."""
    files, wanted = local_files(config.data.corpus, kinds=KINDS) or [], config.model.sequence_len + 1
    size = sum(os.path.getsize(file) for file in files)
    if files and size < wanted and all(file.lower().endswith(PLAIN) for file in files):
        raise ConfigError(
            f"--corpus: {config.data.corpus} holds {size:,} bytes, which do not fill one row of {wanted:,} tokens: "
            "give more text, or a smaller --set model.sequence_len"
        )


def _inputs(config: Config, stages: Collection[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what gives it, what raises ValueError or OSError where it cannot serve) of each input of these stages."""
    data = config.data
    if "ingest" in stages or ("tokenizer" in stages and config.tokenizer.learned):
        yield "--corpus", partial(_look_at_corpus, data)
    if "conversations" not in stages:
        return
    if data.gsm8k not in (NONE, SYNTHETIC):
        for split in ("train", "test"):
            yield "--gsm8k", partial(_look_at_part, Part(source=data.gsm8k, format="gsm8k", split=split))
    for stage, parts in (("mid", data.mid), ("sft", data.sft)):
        for name, part in parts.items():
            flag = {data.chat: "--chat", data.gsm8k: "--gsm8k"}.get(part.source, f"data.{stage}.{name}.source")
            yield flag, partial(_look_at_part, part)


def _look_at_corpus(data: DataConfig) -> None:
    """As ingest reads it: the columns of every Parquet file, and of the first JSONL files the first record."""
    if local_files(data.corpus) is None:
        return
    found = units(data.corpus, shards=data.shards, text_column=data.text_column)
    for unit in islice((u for u in found if u["kind"] == "jsonl" and not u.get("start")), FIRST_FILES):
        next(read_unit(unit), None)


def _look_at_part(part: Part) -> None:
    """Raises the first fault where of the first records none is of the part's format. What is damaged, and single
    records of another form, are told by the stage, which goes on with the others."""
    spec = part.source if part.format == "spelling" else spec_of(part)
    if spec is None or "://" in spec or (part.format != "spelling" and local_files(spec, part.split, ROW_KINDS) is None):
        return
    faults = []
    for found in islice(conversations(part, seed=0), FIRST_RECORDS):
        if not isinstance(found, UnusableError):
            return
        if found.reason not in DAMAGED:
            faults.append(found)
    if faults:
        raise faults[0]


def characters(spec: str, split: str = "train", kinds: tuple[str, ...] = KINDS) -> float | None:
    """About how many a place on this machine holds; None for another place, or where nothing is by now."""
    try:
        files = local_files(spec, split, kinds)
    except (ValueError, OSError):  # a stage that is done needs its input no more
        files = None
    if files is None:
        return None
    return sum(os.path.getsize(f) / (1 if f.lower().endswith(PLAIN) else COMPRESSED) for f in files)


def proportions(config: Config, stages: Collection[str], tokens: int | None = None) -> Iterator[str]:
    """What is out of proportion: base's `tokens`, by default those of its steps, beside the corpus; mid's beside
    base's."""
    base = config.base
    tokens = tokens or (base.steps * base.total_batch_size if base.steps and base.total_batch_size else None)
    per_token = characters_per_token(config.tokenizer.source)
    if "base" in stages and tokens and (held := characters(config.data.corpus)):
        there = held / per_token
        if tokens > 2 * MOST_PASSES * there:  # as the characters of a token are not known
            sensible = round(MOST_PASSES * there)
            length, workers = config.model.sequence_len, config.workers[1]
            rows = max(1, sensible // (LEAST_STEPS * length * workers))  # of each worker
            batch = (1 << rows.bit_length() - 1) * length * workers
            yield (
                f"base reads {tokens:,} tokens, about {tokens / there:,.0f} passes over your corpus of about "
                f"{there:,.0f} tokens; more than {MOST_PASSES} teach little: give more text, or "
                f"--set base.tokens={sensible} --set base.total_batch_size={batch}"
            )
    if "mid" in stages and tokens and config.mid.steps is None:
        sizes = [_part_tokens(part, per_token) for part in config.data.mid.values()]
        of_mid = config.mid.epochs * sum(size for size in sizes if size is not None)
        if of_mid > LONG_MID * tokens:
            steps = max(1, tokens // (config.mid.total_batch_size or 1))
            yield (
                f"mid reads about {of_mid:,.0f} tokens, {of_mid / tokens:,.0f} times as many as base: take fewer rows "
                f"of a part, one of its sets of conversations (data.mid.NAME.rows), or --set mid.steps={steps} for as "
                "many as base"
            )


def _part_tokens(part: Part, per_token: float) -> float | None:
    """About how many tokens a part has; None where its size is not known, or it is not used whole."""
    spec = spec_of(part)
    held = None if spec is None or part.rows else characters(spec, part.split, ROW_KINDS)
    return None if held is None else part.repeats * held / per_token
