"""What a report is made of, before it is HTML or Markdown: sections of blocks of plain text, not yet escaped."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

MOST_POINTS = 120_000  # of all curves together, which keeps a page below 2 MB
FEWEST, MOST = 60, 800  # points of one curve
SMOOTH_FROM = 40  # points: from here on a mean of neighbours is drawn over them
SMOOTH_POINTS = 150

Kind = Literal["plain", "good", "bad"]


@dataclass(frozen=True)
class Text:
    text: str
    kind: Kind = "plain"


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first: what it is, the figure, and a line below it."""

    title: str
    figure: str
    below: str = ""
    kind: Kind = "plain"


@dataclass(frozen=True)
class Tiles:
    tiles: list[Tile]


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Shown as it is, in lines of its own."""

    text: str
    title: str = ""
    language: str = "text"


@dataclass(frozen=True)
class Axis:
    """How many tokens and hours there were by some steps of a stage, all (n,) and growing."""

    steps: np.ndarray
    tokens: np.ndarray
    hours: np.ndarray


@dataclass(frozen=True)
class Series:
    """A curve: its points, the smoothed line over them (both (n,) steps and values), and where there is one its
    interval, at the steps of the points."""

    name: str
    axis: Axis
    points: tuple[np.ndarray, np.ndarray]
    smooth: tuple[np.ndarray, np.ndarray] | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: list[Series]
    logarithmic: bool = False


@dataclass(frozen=True)
class Charts:
    charts: list[Chart]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    title: str
    blocks: list[Block]


Block = Text | Tiles | Table | Code | Charts | Fold


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    title: str
    below: str  # one line under the title
    sections: list[Section] = field(default_factory=list)


def thinned(steps: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """The indices of at most `most` points that look like all: of each stretch its least and its largest value, and the
    first and the last point."""
    count = len(steps)
    if count <= most:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, (most - 2) // 2) + 1).astype(int)
    kept = {0, count - 1}
    for first, end in pairwise(edges.tolist()):
        if end > first:
            kept |= {first + int(values[first:end].argmin()), first + int(values[first:end].argmax())}
    return np.array(sorted(kept))


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The mean of neighbours, a twentieth of all points, at no more than SMOOTH_POINTS steps and always at the last;
    None for so few points that they speak for themselves. Towards the ends there are fewer, as many on either side, so
    that a slope is no bias; at the ends themselves those of one side that an eighth of these steps holds."""
    count = len(steps)
    if count < SMOOTH_FROM:
        return None
    half = max(2, count // 40)
    at = np.unique(np.linspace(0, count - 1, min(count, SMOOTH_POINTS)).astype(int))
    reach = np.maximum(half // 4, np.minimum(half, np.minimum(at, count - 1 - at)))
    first, end = np.maximum(0, at - reach), np.minimum(count, at + reach + 1)
    # each by itself: a difference of running sums would lose whatever is small beside one value that was huge before
    return steps[at], np.array([values[a:b].mean() for a, b in zip(first, end, strict=True)])
