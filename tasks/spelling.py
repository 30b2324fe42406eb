"""Spelling words and counting their letters, which a model that sees tokens has to be taught.

`Spelling` asks for the number of a letter in a word, as nanochat's SpellingBee does.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Any

import pyarrow.fs as pafs

from corpus.sources import below, filesystem_of
from corpus.synthetic import JOBS, OBJECTS, PLACES, WEATHER, Split
from tasks.base import NumberProblems, Problem

SPELL = (
    "Spell the word: {word}",
    "Spell {word}.",
    'How do you spell "{word}"?',
    "What are the letters of {word}?",
    "Write {word} letter by letter.",
)
COUNT = (
    "How many {letter} are in {word}?",
    'How many times does "{letter}" occur in "{word}"?',
    "Count the letter {letter} in {word}.",
    "How often is {letter} in the word {word}?",
    'What is the number of {letter}\'s in "{word}"?',
)
ABSENT = 0.2  # share of the counting questions whose letter is any of the alphabet, and so most often not in the word


def read_words(source: str) -> list[str]:
    """The words of a word list, a path or URI, one a line; those with anything but letters are left out."""
    filesystem, path = filesystem_of(source)
    with io.TextIOWrapper(filesystem.open_input_stream(path), encoding="utf-8", errors="replace") as lines:
        return [word for word in map(str.strip, lines) if word.isalpha()]


def word_list(folder: str) -> str:
    """The first file of a folder or URI, by name. Raises FileNotFoundError."""
    filesystem, path = filesystem_of(folder)
    found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    files = sorted(info.base_name for info in found if info.type == pafs.FileType.File)
    if not files:
        raise FileNotFoundError(f"{folder} has no word list")
    return below(folder, files[0])


def conversations(source: str, seed: int) -> Iterator[dict[str, Any]]:
    """One conversation a word, half of them to spell it and half to count a letter in it.

    In an order drawn by `seed`: word lists are sorted, and a mixture may use no more than the first few.
    """
    rng = random.Random(seed)
    words = read_words(source)
    rng.shuffle(words)
    for word in words:
        question, answer = _spell(word, rng) if rng.random() < 0.5 else _count(word.lower(), rng)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _spell(word: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(SPELL).format(word=word), "-".join(word)


def _count(word: str, rng: random.Random) -> tuple[str, str]:
    """The answer counts along as it spells, so that no step asks for more than the one before."""
    letter = rng.choice(ascii_lowercase if rng.random() < ABSENT else word)
    spelled, count = [], 0
    for character in word:
        count += character == letter
        spelled.append(f"{character}({count})" if character == letter else character)
    return rng.choice(COUNT).format(letter=letter, word=word), f"{'-'.join(spelled)}\n#### {count}"


class Spelling(NumberProblems):
    """How often a letter is in a word. `source` is a word list; "" stands for the words of the synthetic corpus."""

    def __init__(self, source: str = "", count: int = 128) -> None:
        self._source, self._count = source, count

    def problems(self, split: Split) -> list[Problem]:
        """`count` problems, the same every time. Raises FileNotFoundError or ValueError."""
        known = {*JOBS, *PLACES, *WEATHER, *(noun for both in OBJECTS for noun in both)}
        words = read_words(self._source) if self._source else sorted(known)
        if not words:
            raise ValueError(f"{self._source} has no words, which are lines of letters alone")
        rng = random.Random(split)
        return [Problem(*_count(rng.choice(words).lower(), rng)) for _ in range(self._count)]
