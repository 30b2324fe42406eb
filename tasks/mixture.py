"""What mid and SFT train on: named parts, each a source of conversations, woven into one stream."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from corpus.conversation import from_record
from corpus.left_out import UnusableError
from corpus.sources import ROW_KINDS, SYNTHETIC, count_records, local_files, records_and_faults
from corpus.synthetic import Split
from tasks import base, choices, spelling
from tasks.arithmetic import Arithmetic
from tasks.gsm8k import GSM8K

Found = dict[str, Any] | UnusableError  # a conversation, or what is wrong with the record in its place

SYNTHETIC_ROWS = 40_000
SMALL = 256 << 20  # bytes, which are hashed in a second


class Part(BaseModel):
    """One part of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_min_length=1)

    source: str = Field(
        description="JSONL, Parquet, hub:<dataset>[:config]; gsm8k: or a folder, or synthetic; spelling: a word list"
    )
    format: Literal["chat", "gsm8k", "choices", "spelling"] = Field(
        "chat", description="what a record is: a conversation, a GSM8K problem, a multiple-choice question, a word"
    )
    split: str = Field("train", description="split of a hub dataset; gsm8k: of a folder")
    rows: int | None = Field(None, ge=1, strict=True, description="use the first N records")
    repeats: int = Field(1, ge=1, strict=True, description="times each record is used")
    weight: float | None = Field(
        None,
        gt=0,
        strict=True,
        description="share of the mixture beside the other parts' weights; all parts have one, or none",
    )


def digest_of(part: Part) -> str | None:
    """SHA-256 of what the part's source says, wherever it lies, where that is a small file on this machine, or GSM8K's
    two; None for all else, which is known by its name."""
    place = Path(part.source)
    files = [place]
    if part.format == "gsm8k" and place.is_dir():
        files = [place / f"{split}.jsonl" for split in get_args(Split)]
    if not all(file.is_file() for file in files) or sum(file.stat().st_size for file in files) > SMALL:
        return None
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def conversations(part: Part, seed: int) -> Iterator[Found]:
    """The part's conversations in the order of its source, pass after pass, streamed; in the place of a record that is
    not of the part's format stands what is wrong with it.

    `seed` matters to what is generated: synthetic problems, the order and wording of spelling.
    """
    for _ in range(part.repeats):
        yield from islice(_one_pass(part, seed), part.rows)


def mixture(parts: dict[str, Part], seed: int) -> Iterator[tuple[str, Found]]:
    """(part, conversation) of all parts, each spread evenly over the whole length; streamed, the same every time.

    Raises ValueError, before the first one, when a part is empty or some parts have a weight and others none.
    """
    counts = sizes(parts)
    streams = [_placed(name, part, counts[name], seed) for name, part in parts.items()]
    # of equal positions merge takes the earlier part's first
    return ((name, conversation) for _, name, conversation in heapq.merge(*streams, key=itemgetter(0)))


def check_weights(parts: dict[str, Part]) -> None:
    """Raises ValueError where some parts have a weight and others none."""
    unweighted = [name for name, part in parts.items() if part.weight is None]
    if unweighted and len(unweighted) < len(parts):
        raise ValueError(
            f"parts without a weight: {', '.join(unweighted)}, while others have one; give all parts one, or none"
        )


def sizes(parts: dict[str, Part]) -> dict[str, int]:
    """Conversations that each part gives to the mixture; records that cannot be read make it fewer.

    Without weights all there are, times `repeats`; with weights as many as possible in proportion to them.
    """
    check_weights(parts)
    most = {name: _records(part) * part.repeats for name, part in parts.items()}
    if empty := [f"{name} ({parts[name].source})" for name, count in most.items() if not count]:
        raise ValueError(f"parts without records: {', '.join(empty)}; take them out or correct their source")
    # by its decimals: the float 0.3 is less than three times the float 0.1
    weights = {name: Fraction(str(part.weight)) for name, part in parts.items() if part.weight is not None}
    if not weights:
        return most
    per_weight = min(most[name] / weight for name, weight in weights.items())
    counts = {name: int(per_weight * weight) for name, weight in weights.items()}
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(f"parts whose weight is too small for even one record: {', '.join(empty)}")
    return counts


def spec_of(part: Part) -> str | None:
    """Where the records of a part are; None where they are made here, or from a list of words."""
    if part.format == "spelling" or part.source == SYNTHETIC:
        return None
    return GSM8K(part.source).spec(part.split) if part.format == "gsm8k" else part.source


def beyond(part: Part) -> int:
    """How many records a part's `rows` leaves out, of those its files on this machine have: elsewhere they would all be
    fetched to be counted."""
    spec = spec_of(part)
    if part.rows is None or spec is None or local_files(spec, part.split, ROW_KINDS) is None:
        return 0
    return part.repeats * max(0, count_records(spec, part.split) - part.rows)


def _placed(name: str, part: Part, count: int, seed: int) -> Iterator[tuple[float, str, Found]]:
    """The part's first `count` conversations with their positions in the mixture, which runs from 0 to 1."""
    for k, conversation in enumerate(islice(conversations(part, seed), count)):
        yield (k + 0.5) / count, name, conversation


def _records(part: Part) -> int:
    """Records that one pass uses."""
    if part.format == "gsm8k" and part.source == SYNTHETIC:
        return part.rows or SYNTHETIC_ROWS
    if part.format == "spelling":
        count = len(spelling.read_words(part.source))
    else:
        count = count_records(spec_of(part) or part.source, part.split, part.rows)
    return min(count, part.rows or count)


def _one_pass(part: Part, seed: int) -> Iterator[Found]:
    if part.format == "spelling":
        yield from spelling.conversations(part.source, seed)
    elif part.format == "gsm8k":
        if part.source == SYNTHETIC:
            problems = iter(Arithmetic(part.rows or SYNTHETIC_ROWS, seed=seed).problems("train"))
        else:
            problems = GSM8K(part.source).stream(part.split)
        yield from map(base.conversation_of, problems)
    else:
        convert = from_record if part.format == "chat" else choices.conversation_of
        for number, record in enumerate(records_and_faults(part.source, part.split), 1):
            if isinstance(record, UnusableError):
                yield record
                continue
            try:
                yield convert(record)
            except UnusableError as error:
                yield UnusableError(error.reason, f"{part.source}, record {number}: {error}")
