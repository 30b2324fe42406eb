"""A report as Markdown (GitHub's), which says the same as the page; of a curve it has some of the values."""

from __future__ import annotations

import re

import numpy as np

from pipeline.reporting.blocks import (
    Block,
    Chart,
    Charts,
    Code,
    Document,
    Fold,
    Section,
    Series,
    Table,
    Text,
    Tiles,
)
from pipeline.terminal import plain

VALUES = 6  # of a curve, from its first to its last
# what would begin markup: anywhere, beside a word (an underscore within one is none), and at the beginning of a line
SPECIAL = re.compile(r"[\\`*{}\[\]!|~$@]|(?<!\w)_|_(?!\w)|^[-+#=](?=\s|[-+#=]|$)", re.MULTILINE)
NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)", re.MULTILINE)


def markdown(document: Document) -> str:
    parts = [f"# {text(document.title)}", text(document.below), *(_section(section) for section in document.sections)]
    return "\n\n".join(parts) + "\n"


def text(value: str) -> str:
    """Text from anywhere, which Markdown shows as it is: no markup of its own, no HTML, no link, in one line."""
    kept = NUMBERED.sub(r"\1\\\2", SPECIAL.sub(r"\\\g<0>", plain(value)))
    return kept.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")


def _section(section: Section) -> str:
    return "\n\n".join([f"## {text(section.title)}", *(_block(block) for block in section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Text():
            return text(block.text)
        case Tiles():
            return "\n".join(f"- **{text(t.title)}**: {text(t.figure)} ({text(t.below)})" for t in block.tiles)
        case Table():
            return _table(block)
        case Code():
            longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            title = f"{text(block.title)}:\n\n" if block.title else ""
            return f"{title}{fence}{block.language}\n{plain(block.text)}\n{fence}"
        case Charts():
            return "\n\n".join(_chart(chart) for chart in block.charts)
        case Fold():
            return "\n\n".join([f"### {text(block.title)}", *(_block(one) for one in block.blocks)])


def _table(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = [f"| {' | '.join(cell if i == 1 else text(cell) for cell in row)} |" for i, row in enumerate(rows)]
    return "\n".join([*([f"{text(table.caption)}:\n"] if table.caption else []), *lines])


def _chart(chart: Chart) -> str:
    columns, rows = [f"{chart.title} ({chart.unit})", "step: value", *[""] * (VALUES - 1)], []
    for series in chart.series:
        values = _values(series)
        rows.append([series.name, *values, *[""] * (VALUES - len(values))])
    return _table(Table(columns, rows))


def _values(series: Series) -> list[str]:
    steps, values = series.smooth or series.points
    at = np.unique(np.linspace(0, len(steps) - 1, VALUES).astype(int))
    return [f"{steps[i]:,.0f}: {values[i]:.4g}" for i in at]
