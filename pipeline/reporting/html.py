"""A report as one HTML file that needs no other and no network.

All text is escaped, and a policy in the page lets no script run but ours, which is found by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from pipeline.reporting.blocks import (
    Axis,
    Block,
    Chart,
    Charts,
    Code,
    Document,
    Fold,
    Series,
    Table,
    Text,
    Tiles,
)
from pipeline.terminal import plain

DIGITS = 5  # of a figure of a curve
LONG = 32  # characters of a cell that may be broken into lines


def page(document: Document) -> str:
    curves = Curves()
    parts = []
    for i, section in enumerate(document.sections):
        inner = "\n".join(_block(block, curves) for block in section.blocks)
        parts.append(f'<section id="s{i}"><h2>{text(section.title)}</h2>\n{inner}\n</section>')
    links = "".join(f'<li><a href="#s{i}">{text(s.title)}</a></li>' for i, s in enumerate(document.sections))
    style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(document.title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        f"<header><h1>{text(document.title)}</h1><p>{text(document.below)}</p></header>\n"
        f"<nav><ul>{links}</ul></nav>\n<main>\n{chr(10).join(parts)}\n</main>\n"
        f'<script type="application/json" id="curves">{embedded(curves.values())}</script>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )


def text(value: str) -> str:
    """Text from anywhere as HTML shows it, in an element or in quotes."""
    return escape(plain(value))


def embedded(value: Any) -> str:
    """JSON that cannot end the element it is in."""
    written = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Curves:
    """The charts of a page in the order of their places, for the script; an axis is written once."""

    def __init__(self) -> None:
        self._charts: list[dict[str, Any]] = []
        self._axes: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}

    def add(self, chart: Chart) -> int:
        series = [self._series(one) for one in chart.series]
        self._charts.append(
            {"title": plain(chart.title), "unit": chart.unit, "log": chart.logarithmic, "series": series}
        )
        return len(self._charts) - 1

    def values(self) -> dict[str, Any]:
        return {"charts": self._charts, "axes": self._axes}

    def _series(self, one: Series) -> dict[str, Any]:
        found = {
            "name": plain(one.name),
            "axis": self._axis(one.axis),
            "x": numbers(one.points[0]),
            "y": numbers(one.points[1]),
        }
        if one.smooth is not None:
            found |= {"sx": numbers(one.smooth[0]), "sy": numbers(one.smooth[1])}
        if one.low is not None and one.high is not None:
            found |= {"low": numbers(one.low), "high": numbers(one.high)}
        return found

    def _axis(self, axis: Axis) -> int:
        written = {"steps": numbers(axis.steps), "tokens": numbers(axis.tokens), "hours": numbers(axis.hours)}
        if written not in self._axes:
            self._axes.append(written)
        return self._axes.index(written)


def numbers(values: np.ndarray) -> list[float | int]:
    """Figures with as many digits as can be seen; whole numbers whole."""
    short = (float(f"{value:.{DIGITS}g}") if value % 1 else value for value in values.tolist())
    return [int(value) if value % 1 == 0 and abs(value) < 1e15 else value for value in short]


def _block(block: Block, curves: Curves) -> str:
    match block:
        case Text():
            return f'<p class="{block.kind}">{text(block.text)}</p>'
        case Tiles():
            tiles = (
                f'<div class="tile {t.kind}"><h3>{text(t.title)}</h3><p class="figure">{text(t.figure)}</p>'
                f"<p>{text(t.below)}</p></div>"
                for t in block.tiles
            )
            return f'<div class="tiles">{"".join(tiles)}</div>'
        case Table():
            return _table(block)
        case Code():
            title = f"<figcaption>{text(block.title)}</figcaption>" if block.title else ""
            return f'<figure class="code">{title}<pre tabindex="0">{text(block.text)}</pre></figure>'
        case Charts():
            return f'<div class="charts">{"".join(_chart(chart, curves.add(chart)) for chart in block.charts)}</div>'
        case Fold():
            inner = "\n".join(_block(one, curves) for one in block.blocks)
            # charts are what a report is looked at for; the rest waits to be asked
            opened = " open" if any(isinstance(one, Charts) for one in block.blocks) else ""
            return f"<details{opened}><summary>{text(block.title)}</summary>\n{inner}</details>"


def _table(table: Table) -> str:
    head = ""
    if any(table.columns):
        head = f"<thead><tr>{''.join(f'<th scope=col>{text(name)}</th>' for name in table.columns)}</tr></thead>"
    rows = "".join(
        f"<tr><th scope=row>{text(first)}</th>{''.join(map(_cell, rest))}</tr>" for first, *rest in table.rows
    )
    caption = f"<caption>{text(table.caption)}</caption>" if table.caption else ""
    # it scrolls by itself where it is too wide, with the keyboard, too
    return f'<div class="wide" tabindex="0"><table>{caption}{head}<tbody>{rows}</tbody></table></div>'


def _cell(value: str) -> str:
    return f"<td{' class=long' if len(value) > LONG else ''}>{text(value)}</td>"


def _chart(chart: Chart, number: int) -> str:
    names = "".join(f'<li class="c{i % 8}">{text(series.name)}</li>' for i, series in enumerate(chart.series))
    legend = f"<ul>{names}</ul>" if len(chart.series) > 1 else ""
    label = text(f"{chart.title}, {chart.unit}")
    return (
        f'<figure class="chart" data-chart="{number}" tabindex="0" aria-label="{label}">'
        f"<figcaption><b>{text(chart.title)}</b> <span>{text(chart.unit)}</span></figcaption>{legend}"
        f'<div class="plot"></div><output></output></figure>'
    )
