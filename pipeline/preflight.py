"""What can be known of a run's inputs before anything starts: what is not there or of another form, and what is out of
proportion.

Only files of this machine are looked at, and only their names, sizes and first records, so this takes seconds at most.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from typing import get_args

from corpus.left_out import UnusableError, reasons
from corpus.sources import KINDS, PLAIN, ROW_KINDS, SYNTHETIC, characters, local_files, read_unit, units
from corpus.synthetic import Split
from corpus.tokenizers import check_size, lacking
from pipeline.config import Config, ConfigError
from pipeline.scaling import (
    CHARACTERS_PER_TOKEN,
    MOST_PASSES,
    RECORD_TOKENS,
    base_tokens,
    characters_per_token,
    most_tokens,
    records,
    small_batch,
)
from stages.config import NONE, DataConfig
from stages.conversations import characters_of
from tasks.core import Bundle
from tasks.gsm8k import GSM8K
from tasks.mixture import Part, check_weights, conversations, spec_of
from tasks.suite import chosen, suite

LONG_MID = 5  # times the tokens of base
FIRST_FILES, FIRST_RECORDS = 100, 1_000  # of a corpus, and of a set of conversations
SMALL = 16 << 20  # characters of a corpus all of which may be read
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
        check_text(config)
    if "base" in stages and config.base.core_every and config.evaluate.data is not None:
        try:
            Bundle(config.evaluate.data)
        except (ValueError, OSError) as error:
            raise ConfigError(f"base.core_every asks CORE: {error}") from error
    if any(stage.startswith("evaluate_") for stage in stages):
        tasks, data = config.evaluate.tasks, config.evaluate.data
        try:  # of both kinds, as a misspelt name is of neither
            suite([name for chat in (False, True) for name in chosen(tasks, data, chat)], data)
        except (ValueError, OSError) as error:
            raise ConfigError(f"--evals {tasks}: {error}") from error


def check_text(config: Config) -> None:
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
    learned = config.tokenizer.learned and config.init.source is None
    if "ingest" in stages or ("tokenizer" in stages and learned):
        yield "--corpus", partial(_look_at_corpus, data)
    if "tokenizer" in stages and learned and config.tokenizer.source == "bpe":
        yield "--set model.vocab_size", partial(check_size, config.model.vocab_size)
    if "conversations" not in stages:
        return
    if data.gsm8k not in (NONE, SYNTHETIC):
        for split in ("train", "test"):
            yield "--gsm8k", partial(_look_at_part, Part(source=data.gsm8k, format="gsm8k", split=split))
    for stage, name, part in _parts(data):
        flag = {data.chat: "--chat", data.gsm8k: "--gsm8k"}.get(part.source, f"data.{stage}.{name}.source")
        yield flag, partial(_look_at_part, part)
    for stage, parts in (("mid", data.mid), ("sft", data.sft)):
        yield f"data.{stage}", partial(_look_at_mixture, parts)
    if config.tokenizer.source == "chars" and "tokenizer" in stages:
        yield "--tokenizer", partial(_look_at_characters, config, stages)


def _look_at_corpus(data: DataConfig) -> None:
    """As ingest reads it: the columns of every Parquet file, of the first JSONL files the first record, and of a small
    corpus as much as it takes to find a document."""
    if local_files(data.corpus) is None:
        return
    found = units(data.corpus, shards=data.shards, text_column=data.text_column)
    for unit in islice((u for u in found if u["kind"] == "jsonl" and not u.get("start")), FIRST_FILES):
        next(read_unit(unit), None)
    left_out: Counter[str] = Counter()
    if (size := characters(data.corpus, shards=data.shards)) is None or size > SMALL:
        return
    if not any(True for unit in found for _ in read_unit(unit, left_out)):
        raise ValueError(f"{data.corpus} holds no documents: all are left out, {reasons(left_out)}")


def _look_at_part(part: Part) -> None:
    """Raises the first fault where of the first records none is of the part's format. What is damaged, and single
    records of another form, are told by the stage, which goes on with the others."""
    if not _is_here(part):
        return
    faults = []
    for found in islice(conversations(part, seed=0), FIRST_RECORDS):
        if not isinstance(found, UnusableError):
            return
        if found.reason not in DAMAGED:
            faults.append(found)
    if faults:
        raise faults[0]


def _look_at_mixture(parts: dict[str, Part]) -> None:
    """Raises ValueError where only some parts have a weight, or a mixture of files of this machine has no two
    conversations that differ."""
    check_weights(parts)
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for part in parts.values():
        found = list(islice(conversations(part, seed=0), FIRST_RECORDS)) if _is_here(part) else []
        seen |= {repr(conversation) for conversation in found if not isinstance(conversation, UnusableError)}
        left_out.update(fault.reason for fault in found if isinstance(fault, UnusableError))
        if len(seen) > 1 or len(found) in (0, FIRST_RECORDS):  # or there may be more
            return
    if parts:
        why = f"; left out are {reasons(left_out)}" if left_out else ""
        raise ValueError(
            f"two conversations that differ are needed, one of them for validation, and there is {len(seen)}{why}: "
            "give more with --chat"
        )


def _parts(data: DataConfig) -> Iterator[tuple[str, str, Part]]:
    """(stage, name, part) of all that mid and SFT train on."""
    for stage, parts in (("mid", data.mid), ("sft", data.sft)):
        yield from ((stage, name, part) for name, part in parts.items())


def _is_here(part: Part) -> bool:
    """Whether the part's records are in files of this machine."""
    if part.format == "spelling":
        return "://" not in part.source
    spec = spec_of(part)
    return spec is not None and "://" not in spec and local_files(spec, part.split, ROW_KINDS) is not None


def _look_at_characters(config: Config, stages: Collection[str]) -> None:
    """Raises ValueError for characters of the first conversations, and of the problems that these stages ask, which
    `chars` will lack. The stage looks at all conversations, and at those that are not on this machine."""
    data = config.data
    alphabet = config.tokenizer.alphabet or _characters(data)
    if alphabet is None:
        return
    found: dict[str, str] = {}
    for stage, name, part in _parts(data):
        if _is_here(part) or part.source == SYNTHETIC:
            first = part.model_copy(update={"rows": min(part.rows or FIRST_RECORDS, FIRST_RECORDS), "repeats": 1})
            for number, conversation in enumerate(conversations(first, config.seed), 1):
                for character in characters_of(conversation).difference(alphabet):
                    found.setdefault(character, f"data.{stage}.{name}, conversation {number:,}")
    asking = config.rl.environment is None and not {"evaluate_mid", "evaluate_sft", "rl"}.isdisjoint(stages)
    if asking and data.gsm8k not in (NONE, SYNTHETIC) and _is_here(Part(source=data.gsm8k, format="gsm8k")):
        for split in get_args(Split):
            for number, problem in enumerate(GSM8K(data.gsm8k).stream(split), 1):
                for character in set(problem.question).difference(alphabet):
                    found.setdefault(character, f"--gsm8k, {split} problem {number:,}")
    if found:
        raise ValueError(lacking(alphabet, found))


def _characters(data: DataConfig) -> str | None:
    """Those of a small corpus of this machine, all of which is read; None of any other."""
    size = characters(data.corpus, shards=data.shards)
    if size is None or size > SMALL or data.max_documents is not None:
        return None
    found: set[str] = set()
    documents = data.text_documents  # lines have no line breaks
    for unit in units(data.corpus, shards=data.shards, text_column=data.text_column, text_documents=documents):
        for document in read_unit(unit):
            found.update(document.text)
    return "".join(sorted(found))


def proportions(config: Config, stages: Collection[str], tokens: int | None = None) -> Iterator[str]:
    """What is out of proportion: base's `tokens`, by default those of its steps, beside the corpus; mid's beside
    base's."""
    base = config.base
    tokens = tokens or (base.steps * base.total_batch_size if base.steps and base.total_batch_size else None)
    per_token = characters_per_token(config.tokenizer.source)
    if "base" in stages and tokens and (held := config.data.characters or characters(config.data.corpus)):
        source = config.tokenizer.source
        there, sensible = held / per_token, most_tokens(held, source)
        passes = f"about {tokens / there:,.0f} passes over your corpus of about {there:,.0f} tokens"
        told = f"base reads {tokens:,} tokens, {passes}"
        usual = base_tokens(config.model.spec().parameters, base.target_ratio)
        if tokens > 2 * sensible:  # as the characters of a token are not known
            batch = small_batch(sensible, config.model.sequence_len, config.workers[1])
            yield (
                f"{told}; more than {MOST_PASSES} teach little: give more text, or "
                f"--set base.tokens={sensible} --set base.total_batch_size={batch}"
            )
        elif config.data.characters is not None and sensible < usual:
            yield (
                f"{told}, and not {base.target_ratio:g} a parameter ({usual:,}), as more passes teach little: give "
                "more text, or --set base.tokens=N for another number"
            )
    if "mid" in stages and tokens and config.mid.steps is None:
        sizes = [_part_tokens(part, per_token) for part in config.data.mid.values()]
        of_mid = config.mid.epochs * sum(size for size in sizes if size is not None)
        if of_mid > LONG_MID * tokens:
            batch = min(config.mid.total_batch_size or 1, base.total_batch_size or 1)
            smaller = f" --set mid.total_batch_size={batch}" if batch != config.mid.total_batch_size else ""
            yield (
                f"mid reads about {of_mid:,.0f} tokens, about {of_mid / tokens:,.0f} times as many as base: take fewer "
                "rows of a part, one of its sets of conversations (data.mid.NAME.rows), or "
                f"--set mid.steps={max(1, tokens // batch)}{smaller} for as many as base"
            )


def _part_tokens(part: Part, per_token: float) -> float | None:
    """About how many tokens a part gives, by its files or by its number of records; None where neither is known."""
    spec, count = spec_of(part), records(part)
    held = None if spec is None else characters(spec, part.split, ROW_KINDS)
    by_size = None if held is None else part.repeats * held / per_token
    by_count = None if count is None else count * RECORD_TOKENS[part.format] * CHARACTERS_PER_TOKEN / per_token
    return min((n for n in (by_size, by_count) if n is not None), default=None)
