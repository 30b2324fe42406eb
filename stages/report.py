"""Pages to look at, each one file that needs no other: the curves of a run, and completions with their grades."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

# title, unit, names of the metrics: a panel is drawn where the records have one of them
PANELS = (
    ("Held-out problems, with 95% intervals", "share solved", r"val_(greedy|(pass|maj)_at_\d+)"),
    ("Reward of the training samples", "mean reward", r"reward(_(?!group|ms)\w+)?"),
    ("Reward by prompt", "mean reward of a prompt", r"reward_group_(min|max|std)"),
    ("Mixed groups: prompts whose rewards differ; completions that ended", "share", r"mixed_groups|finished"),
    ("Length of completions", "tokens", r"completion_tokens(_max)?"),
    ("Entropy of the policy", "nats a token", r"entropy"),
    ("Divergence from the SFT model", "nats a token", r"kl_(sft|penalty)"),
    ("Sampler against trainer: divergence", "nats a token", r"kl_sampler"),
    ("Sampler against trainer: |difference of logprobs|", "nats a token", r"logprob_difference(_max)?"),
    ("Importance ratio", "trainer / sampler", r"ratio_(mean|max)"),
    ("Tokens whose gradient is clipped", "share", r"clip_share"),
    ("Gradient norm", "before clipping", r"grad_norm"),
    ("Where a step's time goes", "seconds", r"\w+_ms"),
    ("Throughput", "tokens a second", r"completion_tokens_per_second"),
)
HEADLINES = ("greedy", "val_greedy", "val_pass_at_1", "reward")  # what a page is headed with, the first there is
CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.DOTALL)
LOGARITHMIC = r"logprob_difference(_max)?|kl_sampler"
COLUMNS, PANEL_INCHES = 2, (6.4, 3.2)
SMOOTH_FROM = 40  # points: from here on the mean of neighbours, a tenth of them, is drawn over the points themselves

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222 }
svg { width: 100%; height: auto }
details { border-top: 1px solid #ddd; padding: .5rem 0 } summary { cursor: pointer }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
td, th { border: 1px solid #ddd; padding: .3rem .5rem; text-align: left; vertical-align: top }
td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; width: 70% }
.right { background: #e8f5e9 } .share { font-variant-numeric: tabular-nums; color: #555; margin-right: .6rem }
form { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; gap: .8rem }
input { flex: 1; font: inherit; padding: .2rem .4rem }
"""

FILTER = """
const form = document.querySelector("form"), rows = [...document.querySelectorAll("details")];
const texts = rows.map(row => row.textContent.toLowerCase());
form.oninput = () => {
  const { solved, words } = Object.fromEntries(new FormData(form)), sought = words.toLowerCase();
  rows.forEach((row, i) => row.hidden = (solved && row.dataset.solved != solved) || !texts[i].includes(sought));
  document.querySelector("output").value = rows.filter(row => !row.hidden).length + " of " + rows.length;
};
form.onsubmit = () => false;
form.oninput();
"""


def titled(run: str, stage: str, figures: Mapping[str, Any]) -> str:
    """What a page is of: run, stage, today's date and the figure that matters most."""
    date = datetime.now(UTC).date().isoformat()
    name = next((name for name in HEADLINES if name in figures), None)
    asked = f" of {figures['problems']:,} problems" if name == "greedy" else ""
    return f"{run}, {stage}, {date}" + (f": {name} {figures[name]:.3g}{asked}" if name else "")


def plots(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """A page with the curves of `records`, the rows of an RL stage's metrics.jsonl.

    Where a curve is thin and thick, the thick one is a mean of neighbours.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # takes long to import

    curves = {name: _curve(records, name) for name in dict.fromkeys(name for r in records for name in r)}
    panels = [(t, unit, names) for t, unit, p in PANELS if (names := [n for n in curves if re.fullmatch(p, n)])]
    rows, svg = math.ceil(len(panels) / COLUMNS), io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fathom", "font.family": "sans-serif"}):
        width, height = PANEL_INCHES
        figure = Figure(figsize=(COLUMNS * width, rows * height), layout="constrained")
        for i, (heading, unit, names) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, COLUMNS, i)
            for name in names:
                _draw(axes, name, curves)
            axes.set_title(heading, fontsize=11)
            axes.set(xlabel="step", ylabel=unit)
            axes.grid(alpha=0.3)
            if re.fullmatch(LOGARITHMIC, names[0]) and any((curves[n][1] > 0).any() for n in names):
                axes.set_yscale("log")
            else:
                axes.ticklabel_format(useOffset=False)
            if len(names) > 1:
                axes.legend(fontsize=8, ncols=2 if len(names) > 4 else 1)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    drawing = svg.getvalue()
    _page(path, title, drawing[drawing.index("<svg") :])


def _curve(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), both (n,), of the records that have a number there; milliseconds become seconds."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values / 1e3 if name.endswith("_ms") else values


def _draw(axes: Any, name: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    steps, values = curves[name]
    label = name.removesuffix("_ms")
    if len(steps) < SMOOTH_FROM:
        [line] = axes.plot(steps, values, marker=".", label=label)
    else:
        [line] = axes.plot(steps, values, linewidth=0.8, alpha=0.35)
        window = len(steps) // 10
        smooth, first = np.convolve(values, np.ones(window) / window, mode="valid"), window // 2
        axes.plot(steps[first : first + len(smooth)], smooth, color=line.get_color(), label=label)
    if f"{name}_low" in curves:
        low, high = curves[f"{name}_low"][1], curves[f"{name}_high"][1]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def table(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """A page with the problems and completions of `stages.evaluate.measure`, to search and to open one by one."""
    choices = "".join(
        f'<label><input type="radio" name="solved" value="{value}"{" checked" * (not value)}> {name}</label>'
        for value, name in (("", "all"), ("yes", "solved"), ("some", "sometimes"), ("no", "unsolved"))
    )
    search = '<input type="search" name="words" placeholder="search questions and completions">'
    rows = "".join(map(_problem, records))
    _page(path, title, f"<form>{choices}{search}<output></output></form>{rows}<script>{FILTER}</script>")


def _problem(record: dict[str, Any]) -> str:
    drawn = [("greedy", c) for c in record["greedy"]] + [("sample", c) for c in record["samples"]]
    right = [c["grades"]["reward"] >= 1 for _, c in drawn]
    solved = "yes" if all(right) else "some" if any(right) else "no"
    grades = list(drawn[0][1]["grades"])
    rows = [_cells("th", ["completion", "drawn", "tokens", *grades])]
    for (how, c), ok in zip(drawn, right, strict=True):
        ended = how if c["finished"] else f"{how}, cut off"
        figures = [f"{c['grades'][name]:g}" for name in grades]
        rows.append(_cells("td", [readable(c["text"]), ended, c["tokens"], *figures], " class=right" if ok else ""))
    return (
        f'<details data-solved="{solved}"><summary><span class="share">{sum(right)}/{len(right)}</span>'
        f"{html.escape(record['question'])}</summary><p>Reference: {html.escape(record['answer'])}</p>"
        f"<table>{''.join(rows)}</table></details>\n"
    )


def readable(text: str) -> str:
    """A completion as a person reads it: calls of the calculator with what it said, and no mark for the turn's end. Any
    other special tokens stay, as the model should not have written them."""
    said = CALL.sub(lambda m: f"[calculator: {m[1]}{'' if m[2] is None else f' → {m[2]}'}]", text)
    return said.removesuffix("<|assistant_end|>")


def _cells(tag: str, values: list[Any], attributes: str = "") -> str:
    return f"<tr{attributes}>{''.join(f'<{tag}>{html.escape(str(value))}</{tag}>' for value in values)}</tr>"


def _page(path: Path, title: str, body: str) -> None:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path.write_text(f"<!doctype html>\n<html>{head}<h1>{title}</h1>\n{body}\n</html>\n", encoding="utf-8")
