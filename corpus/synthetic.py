"""Text and word problems about quantities from templates: nothing to download, and the same for the same seed.

A template is a line of steps ("all=a*b; left=r-c": operands a to d, r the last result, s the one before) and wordings.
Whether a problem is for training or held out depends on its template and operands alone, so no split can leak.
"""

from __future__ import annotations

import operator
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

Split = Literal["train", "test"]

BY_HEAD = 0.6

NAMES = (
    "Maya", "Ben", "Lia", "Omar", "Nina", "Tom", "Sara", "Leo", "Ada", "Sam", "Ivy", "Max",
    "Rosa", "Jack", "Mina", "Paul", "Eva", "Hugo", "Anna", "Kofi", "Lucy", "Finn", "Zoe", "Carl",
)  # fmt: skip
# singular, plural
OBJECTS = (
    ("apple", "apples"), ("book", "books"), ("pen", "pens"), ("card", "cards"), ("egg", "eggs"), ("cup", "cups"),
    ("stone", "stones"), ("coin", "coins"), ("shell", "shells"), ("ball", "balls"), ("stamp", "stamps"),
    ("cake", "cakes"), ("toy", "toys"), ("flower", "flowers"), ("ticket", "tickets"), ("orange", "oranges"),
    ("pencil", "pencils"), ("plate", "plates"), ("candle", "candles"), ("button", "buttons"),
)  # fmt: skip
PLACES = ("market", "school", "library", "farm", "station", "museum", "shop", "park", "bakery", "harbor")
TOWNS = ("Ashford", "Milltown", "Northport", "Green Hill", "Lakeside", "Old Bridge", "Stonefield", "River Bend")
JOBS = ("baker", "teacher", "farmer", "driver", "doctor", "gardener", "painter", "sailor", "student", "clerk")
WEATHER = ("cold", "warm", "rainy", "windy", "bright", "quiet", "busy", "long")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

PROBLEMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("total=a+b", (
        "{n} has {a} {o}. {m} has {b} {o}. How many {o} do they have together?",
        "{n} has {a} {o} and {m} has {b}. How many {o} is that in all?",
    )),
    ("total=a+b", (
        "{n} had {a} {o} and bought {b} more. How many {o} does {n} have now?",
        "There were {a} {o} on the table. {n} put {b} more there. How many {o} are there now?",
    )),
    ("total=a+b", (
        "{n} sold {a} {o} on {w} and {b} the day after. How many {o} did {n} sell?",
        "In the morning {n} made {a} {o}, and in the evening {b}. How many {o} did {n} make?",
    )),
    ("age=a+b", (
        "{n} is {a} years old. How old will {n} be in {b} years?",
        "{m} is {a}. {n} is {b} years older. How old is {n}?",
    )),
    ("left=a-b", (
        "{n} had {a} {o} and gave {b} to {m}. How many {o} are left?",
        "{n} had {a} {o}. {n} lost {b} of them. How many {o} does {n} still have?",
    )),
    ("more=a-b", (
        "{n} has {a} {o} and {m} has {b}. How many more {o} does {n} have?",
        "{m} found {b} {o}. {n} found {a}. How many more did {n} find?",
    )),
    ("free=a-b", (
        "A bus has {a} seats and {b} are taken. How many seats are free?",
        "There are {a} rooms and people sleep in {b} of them. How many rooms are free?",
    )),
    ("rest=a-b", (
        "A rope is {a} meters long. {n} cuts off {b} meters. How long is the rest?",
        "The way to the {p} is {a} miles. {n} has walked {b} miles. How many miles are the rest?",
    )),
    ("missing=a-b", (
        "{n} needs {a} dollars and has {b}. How many dollars are missing?",
        "A {s} costs {a} dollars. {n} has {b} dollars. How many more dollars are needed?",
    )),
    ("all=a*b", (
        "There are {a} boxes with {b} {o} in each. How many {o} are there?",
        "{n} fills {a} bags with {b} {o} each. How many {o} is that?",
    )),
    ("cost=a*b", (
        "One {s} costs {b} dollars. {n} buys {a} {o}. How much does {n} pay?",
        "{n} buys {a} {o} for {b} dollars each. What is the cost?",
    )),
    ("pages=a*b", (
        "{n} reads {a} pages a day. How many pages does {n} read in {b} days?",
        "For {b} days {n} writes {a} pages every day. How many pages is that?",
    )),
    ("miles=a*b", (
        "A train goes {a} miles an hour. How far does it go in {b} hours?",
        "{n} drives for {b} hours at {a} miles an hour. How many miles is that?",
    )),
    ("all=a*b", (
        "A garden has {a} rows of {b} trees. How many trees are there?",
        "The {p} has {a} rows with {b} seats. How many seats are there?",
    )),
    ("each=a/b", (
        "{n} shares {a} {o} among {b} friends. How many {o} does each get?",
        "{b} children share {a} {o}. How many {o} for each?",
    )),
    ("boxes=a/b", (
        "{n} packs {a} {o} in boxes of {b}. How many boxes are needed?",
        "{b} {o} fit in a box. How many boxes are needed for {a} {o}?",
    )),
    ("price=a/b", (
        "{b} {o} cost {a} dollars. What is the price of one {s}?",
        "{n} pays {a} dollars for {b} {o}. What is the price of each?",
    )),
    ("days=a/b", (
        "A book has {a} pages. {n} reads {b} pages a day. How many days does it take?",
        "{n} has {a} {o} and sells {b} a day. How many days will they last?",
    )),
    ("total=a+b; left=r-c", (
        "{n} had {a} {o}, bought {b} and gave away {c}. How many {o} are left?",
        "{n} has {a} {o}. {m} gives {n} {b} more, and {n} loses {c}. How many {o} are left?",
    )),
    ("left=a-b; total=r+c", (
        "{n} had {a} {o}, lost {b} and found {c}. How many {o} does {n} have now?",
        "There were {a} people at the {p}. {b} left and {c} came. How many are there now?",
    )),
    ("all=a*b; total=r+c", (
        "{n} has {a} boxes of {b} {o} and {c} more {o}. How many {o} in all?",
        "{n} buys {a} bags with {b} {o} each. {n} had {c} {o} before. How many {o} now?",
    )),
    ("all=a*b; left=r-c", (
        "{n} has {a} boxes of {b} {o} and sells {c} {o}. How many {o} are left?",
        "A shop gets {a} bags of {b} {o}. {c} {o} are bad. How many are good?",
    )),
    ("all=a+b; each=r/c", (
        "{n} has {a} {o} and {m} has {b}. They share them among {c} friends. How many for each?",
        "{a} red and {b} blue {o} are put in {c} equal bags. How many {o} are in each bag?",
    )),
    ("left=a-b; each=r/c", (
        "{n} had {a} {o}, kept {b} and shared the rest among {c} friends. How many for each?",
        "Of {a} {o}, {b} broke. The rest go in {c} equal boxes. How many are in each box?",
    )),
    ("other=a*b; total=r+a", (
        "{n} has {a} {o}. {m} has {b} times as many. How many {o} do they have together?",
        "{m} has {b} times as many {o} as {n}, who has {a}. How many {o} in all?",
    )),
    ("other=a+b; total=r+a", (
        "{n} has {a} {o}. {m} has {b} more than {n}. How many {o} do they have together?",
        "On {w} {n} sold {a} {o}, and {b} more than that the day after. How many in all?",
    )),
    ("other=a-b; total=r+a", (
        "{n} has {a} {o}. {m} has {b} fewer than {n}. How many {o} do they have together?",
        "On {w} {n} sold {a} {o}, and {b} fewer the day after. How many in all?",
    )),
    ("cost=a*b; change=c-r", (
        "{n} buys {a} {o} for {b} dollars each and pays with {c} dollars. How much is the change?",
        "{n} has {c} dollars and buys {a} {o} at {b} dollars each. How many dollars remain?",
    )),
    ("pay=a*b; left=r-c", (
        "{n} earns {a} dollars a day for {b} days and spends {c} dollars. How much is left?",
        "For {b} days {n} gets {a} dollars a day. {n} gives {c} dollars to {m}. How much is left?",
    )),
    ("each=a/b; total=r+c", (
        "{n} shares {a} {o} among {b} children. Each had {c} before. How many has each now?",
        "{b} friends split {a} {o}. {n}, one of them, finds {c} more. How many {o} does {n} have?",
    )),
    ("price=a/b; cost=r*c", (
        "{b} {o} cost {a} dollars. How much do {c} {o} cost?",
        "{n} paid {a} dollars for {b} {o}. What would {n} pay for {c}?",
    )),
    ("cost=a*b; other=c*d; total=r+s", (
        "{n} buys {a} {o} at {b} dollars and {c} cups at {d} dollars. What does {n} pay in all?",
        "{n} has {a} boxes of {b} {o}, and {m} has {c} boxes of {d}. How many {o} in all?",
    )),
    ("all=a*b; left=r-c; each=r/d", (
        "{n} has {a} boxes of {b} {o}, sells {c} and puts the rest in {d} equal bags. How many in each?",
        "{n} buys {a} bags of {b} {o}. {c} are bad. {d} friends share the good ones. How many for each?",
    )),
    ("total=a+b; left=r-c; each=r/d", (
        "{n} has {a} {o} and {m} has {b}. They lose {c}, and {d} friends share the rest. How many for each?",
        "{a} red and {b} blue {o} came. {c} broke. The rest fill {d} equal boxes. How many in each?",
    )),
    ("other=a*b; total=r+a; left=r-c", (
        "{n} has {a} {o}. {m} has {b} times as many. Together they sell {c}. How many are left?",
        "{m} has {b} times as many {o} as {n}, who has {a}. They lose {c}. How many are left in all?",
    )),
    ("each=a/b; other=c/d; total=r+s", (
        "{n} gets one of {b} equal parts of {a} {o} and one of {d} equal parts of {c}. How many in all?",
        "{a} {o} are split in {b} bags and {c} cups in {d} bags. {n} takes one bag of each. How many in all?",
    )),
)  # fmt: skip

# Sentences of the corpus, with at most one step; `r` is its result.
SENTENCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("total=a+b", (
        "{n} had {a} {o} and found {b} more near the {p}, so now there were {r}.",
        "{a} {o} and {b} {o} make {r} {o}.",
        "On {w} {n} counted {a} {o}, and {m} brought {b}. Together that is {a} + {b} = {r}.",
    )),
    ("left=a-b", (
        "{n} had {a} {o} and gave {b} to {m}. There were {r} left, because {a} - {b} = {r}.",
        "{m} has {b} {o} and {n} has {a}, which is {r} more.",
        "From {a} {o} {n} took away {b}, and {r} remained.",
    )),
    ("all=a*b", (
        "{n} filled {a} boxes with {b} {o} each. That is {a} * {b} = {r} {o} in all.",
        "A {s} costs {b} dollars at the {p}, so {a} {o} cost {r} dollars.",
        "{n} walks {b} miles a day, which makes {r} miles in {a} days.",
    )),
    ("each=a/b", (
        "{n} shared {a} {o} among {b} friends, and each of them got {a} / {b} = {r}.",
        "{b} {o} cost {a} dollars, so the price of one {s} is {r} dollars.",
        "With {b} {o} in a bag, {n} needs {r} bags for {a} {o}.",
    )),
    ("", (
        "{n} is a {j} and lives near the {p} in {t}.",
        "It was a {v} {w} in {t}.",
        "{m} and {n} are friends; they often meet at the {p}.",
        "The {p} in {t} opens at {e} in the morning.",
        "{n} likes {o} and keeps them in a box by the door.",
        "Many people come to the {p} to buy {o}.",
        "{n} was in no hurry, for the day was {v} and the road to {t} was short.",
        "Every {w} the {j} of {t} tells the children a story about a lost {s}.",
    )),
)  # fmt: skip

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda x, y: x // y if x % y == 0 else 0,
}


def documents(index: int, count: int, seed: int) -> Iterator[str]:
    """`count` documents of prose and worked problems, about 300 characters; a pure function of (seed, index)."""
    rng = random.Random(f"documents:{seed}:{index}")
    for _ in range(count):
        cast = _cast(rng)
        paragraphs = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                question, steps = _problem(rng, "train", cast)
                paragraphs.append("\n".join([question, *_solution(steps, marked=False)]))
            else:
                paragraphs.append(" ".join(_sentence(rng, cast) for _ in range(rng.randint(2, 5))))
        yield "\n\n".join(paragraphs)


def problems(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `question` and `answer` in GSM8K's form: a line a step with `<<48/2=24>>`, last `#### 24`.

    Operands are 2 to 99, results are whole numbers from 2 to 999. Of the training answers a share of BY_HEAD carries no
    mark, so the calculator is not called: who imitates them reckons by head and errs, and RL can find out what pays.
    """
    rng = random.Random(f"problems:{split}:{seed}")
    rows = []
    for _ in range(count):
        question, steps = _problem(rng, split, _cast(rng))
        marked = split == "test" or rng.random() >= BY_HEAD
        rows.append({"question": question, "answer": "\n".join(_solution(steps, marked))})
    return rows


def held_out(template: int, operands: dict[str, int]) -> bool:
    """Whether a template with these operands is for testing only: one in ten, by a hash stable across machines."""
    return zlib.crc32(f"{template}:{sorted(operands.items())}".encode()) % 10 == 0


Step = tuple[str, int, str, int, int]  # label, left, operator, right, result


def _solution(steps: list[Step], marked: bool) -> list[str]:
    form = "{0}: <<{1}{2}{3}={4}>>{4}" if marked else "{0}: {1}{2}{3}={4}"
    return [*(form.format(*step) for step in steps), f"#### {steps[-1][-1]}"]


def _problem(rng: random.Random, split: Split, cast: dict[str, str]) -> tuple[str, list[Step]]:
    template = rng.randrange(len(PROBLEMS))
    program, wordings = PROBLEMS[template]
    while True:
        operands, steps = _solve(rng, program)
        if held_out(template, operands) == (split == "test"):
            return rng.choice(wordings).format(**cast, **operands), steps


def _sentence(rng: random.Random, cast: dict[str, str]) -> str:
    program, wordings = rng.choice(SENTENCES)
    wording = rng.choice(wordings)
    if not program:
        return wording.format(**cast)
    operands, steps = _solve(rng, program)
    return wording.format(**cast, **operands, r=steps[-1][-1])


def _solve(rng: random.Random, program: str) -> tuple[dict[str, int], list[Step]]:
    """Draw operands until every step gives a whole number from 2 to 999."""
    parsed = [(line.partition("=")[0], *line.partition("=")[2]) for line in program.split("; ")]
    names = sorted({name for _, *expression in parsed for name in expression if name in "abcd"})
    while True:
        # Half of the operands are small, or products and quotients would hardly ever fit.
        operands = {name: rng.randint(2, rng.choice((12, 99))) for name in names}
        values, steps = dict(operands), []
        for label, left, op, right in parsed:
            value = _OPERATORS[op](values[left], values[right])
            if not 2 <= value < 1000:
                break
            steps.append((label, values[left], op, values[right], value))
            values["s"], values["r"] = values.get("r", 0), value
        if len(steps) == len(parsed):
            return operands, steps


def _cast(rng: random.Random) -> dict[str, str]:
    """Who and what a text is about."""
    first, second = rng.sample(NAMES, 2)
    one, many = rng.choice(OBJECTS)
    return {
        "n": first, "m": second, "s": one, "o": many, "p": rng.choice(PLACES), "t": rng.choice(TOWNS),
        "j": rng.choice(JOBS), "v": rng.choice(WEATHER), "w": rng.choice(DAYS), "e": str(rng.randint(6, 10)),
    }  # fmt: skip
