"""The conversations stage: what mid and SFT train on, and the problems of RL and evaluation.

It is a stage of its own beside ingest, so that who only pretrains needs none of it, and may add it later.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from corpus.conversation import answers, render, texts
from corpus.left_out import UnusableError, counted, lines, reasons, skipped
from corpus.packing import Document as Packed
from corpus.packing import pack
from corpus.rows import Index, RowWriter
from corpus.sources import ROW_KINDS, SYNTHETIC, changed_text, skipped_files, stamps
from corpus.synthetic import Split
from corpus.tokenizers import ANSWER_ENDS, Tokenizer, lacking
from stages.config import NONE, DataConfig
from stages.context import StageContext
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.gsm8k import GSM8K
from tasks.mixture import Found, Part, beyond, digest_of, mixture, sizes

HOLD_OUT_EVERY = 10  # at most one conversation in so many is held out


def is_held_out(index: int, limit: int) -> bool:
    """Whether the conversation `index` is one of the `limit` that are kept for validation."""
    return index % HOLD_OUT_EVERY == 1 and index // HOLD_OUT_EVERY < limit


def run(context: StageContext, data: DataConfig, sequence_len: int, seed: int) -> None:
    began = time.monotonic()
    mixtures = {stage: parts for stage, parts in (("mid", data.mid), ("sft", data.sft)) if parts}
    for stage, parts in mixtures.items():
        try:
            sizes(parts)  # mistakes now, not after hours
        except (ValueError, OSError) as error:
            raise ValueError(f"data.{stage}: {error}") from error
    sources = [part for part in data.sources() if part.source != data.corpus]
    check_unchanged(sources, data.digests)
    tokenizer = Tokenizer.load(context.fetch("tokenizer"))
    if tokenizer.alphabet:
        check_characters(tokenizer.alphabet, mixtures, seed)
    own = [*data.mid.values(), *data.sft.values()]
    records = sorted({part.source for part in own if part.format in ("chat", "choices")})
    before = {source: stamps(source, kinds=ROW_KINDS) for source in records}
    stats: dict[str, Any] = {"skipped": tell_skipped(context, records, ROW_KINDS), "read": {}}
    figures: dict[str, int] = {}
    with context.scratch() as directory:
        for split in get_args(Split):
            write_problems(directory / "task" / f"{split}.jsonl", task_problems(data, split, seed))
        for stage, parts in mixtures.items():
            limit = data.validation_conversations
            made = ingest_mixture(directory / stage, stage, parts, tokenizer, sequence_len + 1, limit, seed)
            stats["read"] |= {f"{stage}.{name}": counts for name, counts in made.pop("parts").items()}
            stats[stage] = made
            figures[f"{stage}_rows"] = made["rows"]
        check_unchanged(sources, data.digests)
        for source, files in before.items():
            if changed := set(files.items()) ^ set(stamps(source, kinds=ROW_KINDS).items()):
                raise ValueError(changed_text(min(changed)[0]))
        context.publish(directory, figures, time.monotonic() - began, stats)


def check_characters(alphabet: str, mixtures: dict[str, dict[str, Part]], seed: int) -> None:
    """Raises ValueError where conversations have characters that the alphabet of `chars` lacks: for all of them, so
    that they can be added at once."""
    known, found = set(alphabet), dict[str, str]()
    for stage, parts in mixtures.items():
        read: Counter[str] = Counter()
        for name, conversation in mixture(parts, seed):
            read[name] += 1
            for character in characters_of(conversation) - known:
                found.setdefault(character, f"data.{stage}.{name}, conversation {read[name]:,}")
    if found:
        raise ValueError(lacking(alphabet, found))


def characters_of(conversation: Found) -> set[str]:
    """Those of all that is said in it; none where it cannot be used."""
    try:
        return set() if isinstance(conversation, UnusableError) else set("".join(texts(conversation)))
    except UnusableError:
        return set()


def tell_skipped(context: StageContext, sources: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, int]]:
    """The sources that are folders with files that are not read: how many, and why. The user is told."""
    found = {source: dict(files) for source in sources if (files := skipped_files(source, kinds))}
    for source, counts in found.items():
        context.note(f"{source}: {skipped(counts)} not read")
    return found


def check_unchanged(sources: Sequence[Part], digests: dict[str, str]) -> None:
    """Raises ValueError for a file that does not say what the artifact's identity has it say."""
    for part in sources:
        was = digests.get(part.source)
        if was is not None and digest_of(part) != was:
            raise ValueError(
                f"{part.source} is not what it was where the run was started, SHA-256 {was[:12]}: all machines need "
                "the same, and it must not change while it is read; run the same command again to take it as it is"
            )


def task_problems(data: DataConfig, split: Split, seed: int) -> list[Problem]:
    """The problems that RL trains on and evaluation asks."""
    if data.gsm8k == NONE:
        return []
    task = Arithmetic(data.synthetic_problems, seed=seed) if data.gsm8k == SYNTHETIC else GSM8K(data.gsm8k)
    problems = task.problems(split)
    if not problems:
        raise ValueError(f"gsm8k {data.gsm8k!r} holds no {split} problems")
    return problems


def write_problems(file: Path, problems: list[Problem]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(vars(p), ensure_ascii=False) + "\n" for p in problems)
    file.write_text("".join(lines), encoding="utf-8")


def ingest_mixture(
    directory: Path,
    stage: str,
    parts: dict[str, Part],
    tokenizer: Tokenizer,
    row_len: int,
    validation: int,
    seed: int,
) -> dict[str, Any]:
    """Writes train and val rows of a mixture, padded; returns how many these are, and the counts of each part. SFT
    learns what the assistant writes, mid every token.

    Raises ValueError where a part gives nothing, or all parts together no two conversations that differ.
    """
    read: Counter[str] = Counter()
    left_out: dict[str, Counter[str]] = {name: Counter() for name in parts}
    shortened: Counter[str] = Counter()
    examples: dict[str, dict[str, str]] = {name: {} for name in parts}  # the first fault of each reason
    held_out: dict[bytes, Packed] = {}
    trained: set[bytes] = set()  # hashes, so that no conversation is on both sides
    end = tokenizer.special(ANSWER_ENDS[0])

    def training() -> Iterator[Packed]:
        """What is held out goes to the side as it comes by."""
        fitting = 0
        for name, found in mixture(parts, seed):
            read[name] += 1
            try:
                if isinstance(found, UnusableError):
                    raise found
                ids, mask = render(found, tokenizer, row_len)
                shortened[name] += int(((ids == end) & (mask == 1)).sum()) < answers(found)
            except UnusableError as error:
                left_out[name][error.reason] += 1
                examples[name].setdefault(error.reason, f"conversation {read[name]:,}: {error}")
                continue
            item, key = (ids, mask if stage == "sft" else None), hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            if key in held_out:
                left_out[name]["held_out_again"] += 1
                continue
            if is_held_out(fitting, validation) and key not in trained:
                held_out[key] = item
            else:
                trained.add(key)
                yield item
            fitting += 1

    rows = {}
    for split, items in (("train", training()), ("val", held_out.values())):
        packed = pack(items, row_len, "pad", pad_id=tokenizer.bos)
        index = write_rows(directory / split, packed, row_len, tokenizer.vocab_size, masked=True)
        rows[split] = sum(count for _, count in index["files"])
    found = {}
    for name, part in parts.items():
        left_out[name]["beyond_rows"] = more = beyond(part)
        found[name] = counted(read[name] + more, left_out[name])
        if shortened[name]:
            found[name]["shortened"] = shortened[name]
        if found[name]["left_out"]:
            example = examples[name].get(max(left_out[name], key=left_out[name].__getitem__))
            found[name] |= {"example": example} if example else {}
        if not found[name]["kept"]:
            raise ValueError(
                f"data.{stage}.{name}: none of {read[name]:,} conversations can be used: "
                f"{reasons(left_out[name])}{advice(found[name])}"
            )
    if not (rows["train"] and rows["val"]):
        raise ValueError(
            f"{stage} needs two conversations that differ, one of them for validation, and has "
            f"{sum(counts['kept'] for counts in found.values()):,}, in which there are {len(trained | {*held_out})}"
            + "".join(f"; {line}" for line in lines(found))
        )
    return {"rows": rows["train"], "validation_rows": rows["val"], "parts": found}


def advice(counts: dict[str, Any]) -> str:
    """What to do about the commonest reason for which conversations are left out."""
    if max(counts["left_out"], key=counts["left_out"].__getitem__, default="") == "too_long":
        return ": give a larger model.sequence_len, or shorter conversations"
    return f" (such as {counts['example']})" if "example" in counts else ""


def write_rows(
    directory: Path,
    rows: Iterator[tuple[np.ndarray, np.ndarray | None]],
    row_len: int,
    vocab_size: int,
    name: str = "00000",
    masked: bool = False,
) -> Index:
    """Writes rows as files that begin with `name`; returns their index."""
    writer = RowWriter(directory, row_len, vocab_size, masked, name)
    for ids, mask in rows:
        writer.add(ids, mask)
    return writer.close()
