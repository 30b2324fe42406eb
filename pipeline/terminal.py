"""What the commands print fits the terminal: lines are broken between words, and a table that is too wide is told in
lines. A file has no width, so what goes there is left whole. What comes from outside cannot steer the terminal."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

TOGETHER = "\xa0"  # between words that must not be parted; shown as a space
WHOLE = 1_000_000  # columns that any table fits into
# What a terminal would obey (but not newlines and tabs), what turns the direction of writing, and half characters,
# which cannot be written at all.
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text`, which may come from outside, with what a terminal would obey shown as Python writes it, such as \\x1b."""
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class PlainFormatter(logging.Formatter):
    """The messages of a log as `plain` text."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class Terminal(Console):
    """A console that shows all text, whatever wrote it, as `plain` text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def width_of(console: Console) -> int | None:
    """The columns of a terminal, or of COLUMNS where that is set; None for a file."""
    return console.width if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else None


def fitted(text: str, width: int | None) -> str:
    """`text` with every line that is longer than `width` broken between words. What follows stands below what comes
    after the line's own first gap of two spaces, or else two spaces in. A word that is too long, such as a path, stays
    whole."""
    lines = []
    for line in text.split("\n"):
        if width is not None and len(line) > width:
            head = re.match(r"\s*\S.*?\s\s+(?=\S)", line)
            indent = len(head[0]) if head and len(head[0]) <= width // 2 else len(line) - len(line.lstrip(" ")) + 2
            line = "\n".join(
                textwrap.wrap(
                    line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
                )
            )
        lines.append(line)
    return "\n".join(lines).replace(TOGETHER, " ")


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is, fitted to the terminal."""
    console.print(Text(fitted(text, width_of(console)), style), soft_wrap=True)


def stream(console: Console, text: str, style: str = "") -> None:
    """Prints a piece of a text that comes bit by bit, as it is: neither broken nor ended."""
    console.print(Segments([Segment(text, Style.parse(style))]), end="", soft_wrap=True)


def show(console: Console, table: Table, lines: Iterable[str]) -> None:
    """Prints a table, or where it is wider than the terminal `lines`, which say the same."""
    width = width_of(console)
    wide = Measurement.get(console, console.options.update_width(WHOLE), table).maximum
    if width is not None and wide > width:
        for line in lines:
            say(console, line)
        return
    before, console.width = console.width, max(console.width, wide)
    console.print(table, highlight=False)
    console.width = before
