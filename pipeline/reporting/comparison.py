"""What a report says of several runs: each beside the first, and their curves over each other."""

from __future__ import annotations

from pipeline.config import STAGE_NAMES
from pipeline.reporting.blocks import (
    Block,
    Charts,
    Code,
    Document,
    Fold,
    Kind,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from pipeline.reporting.curves import RECORDED, overlaid, points_each
from pipeline.reporting.document import (
    MOST_SETTINGS,
    Known,
    chance,
    command,
    compact,
    compares,
    cost,
    difference,
    figures_of,
    happened,
    hardware,
    how_good,
    incidents,
    money,
    number,
    of,
    parameters,
    settings_of,
    shown,
    with_interval,
)
from pipeline.reporting.facts import RunFacts
from pipeline.tracking import duration


def comparison(runs: list[RunFacts], known: Known) -> Document:
    names = ", ".join(run.name for run in runs)
    sections = [
        Section("At a glance", [Tiles([_tile(run, known) for run in runs])]),
        Section("The runs beside each other", [_overview(runs, known)]),
        Section("Evaluations", _evaluations(runs)),
        Section("Curves", _curves(runs)),
        Section("Settings that differ", _settings(runs)),
        Section("Incidents", [block for run in runs for block in _incidents(run)]),
        Section("Doing them again", [Code(command(run.config), run.name) for run in runs if run.config]),
    ]
    return Document(f"Runs {names}", f"differences are from {runs[0].name}", sections)


def _tile(run: RunFacts, known: Known) -> Tile:
    figure, below = how_good(run)
    usd, wrong = cost(run, known), len(incidents(run))
    spent = f"{f'{money(usd)} in ' if usd is not None else ''}{duration(run.seconds)}"
    kind: Kind = "bad" if run.state == "failed" else "plain" if wrong or run.state != "done" else "good"
    return Tile(run.name, figure, f"{below}. {run.state}, {spent}, {wrong or 'no'} incident(s)", kind)


def _overview(runs: list[RunFacts], known: Known) -> Table:
    rows: list[list[str]] = [["state", *(run.state for run in runs)]]
    sizes = [parameters(run) for run in runs]
    rows.append(["parameters", *(compact(size) if size else "–" for size in sizes)])
    rows.append(["hardware", *(hardware(run, known) or "not recorded" for run in runs)])
    rows.append(["time of all stages", *(duration(run.seconds) for run in runs)])
    rows.append(["cost", *("–" if (usd := cost(run, known)) is None else money(usd) for run in runs)])
    for stage in RECORDED:
        there = [run.stage(stage) for run in runs]
        if not any(facts and facts.columns for facts in there):
            continue
        rows.append([f"time of {stage}", *(duration(facts.seconds) if facts else "" for facts in there)])
        tokens = [f"{facts.tokens[-1]:,.0f}" if facts and len(facts.tokens) else "–" for facts in there]
        rows.append([f"tokens of {stage}", *tokens])
        for name, title in (("loss", "last loss"), ("reward", "last reward"), ("tokens_per_second", "tokens a second")):
            if any(facts and name in facts.columns for facts in there):
                middle = name == "tokens_per_second"
                values = [(facts.middle(name) if middle else facts.last(name)) if facts else None for facts in there]
                rows.append([f"{title} of {stage}", *("–" if v is None else number(v) for v in values)])
    return Table(["", *(run.name for run in runs)], rows)


def _evaluations(runs: list[RunFacts]) -> list[Block]:
    blocks: list[Block] = []
    for name in (name for name in STAGE_NAMES if name.startswith("evaluate_")):
        there = [stage if (stage := run.stage(name)) and stage.state == "done" else None for run in runs]
        found = [stage for stage in there if stage]
        if not found:
            continue
        rows, first = [], there[0]
        for figure in figures_of(found):
            row = [figure]
            for stage in there:
                cell = with_interval(stage.metrics, figure) if stage and figure in stage.metrics else ""
                if cell and first and stage and stage is not first and figure in first.metrics and compares(figure):
                    gain = difference(first.metrics[figure], stage.metrics[figure])
                    cell += f"\n{gain}{chance(figure, first, stage)}"
                row.append(cell)
            rows.append(row)
        blocks.append(Table(["", *(run.name for run in runs)], rows, f"After {of(found[0])}"))
    note = (
        f"In brackets 95% intervals; below, how far a run is from {runs[0].name}, with p, how likely two equal models "
        "differ so much on the same questions (McNemar's exact test, of CORE and ChatCORE its normal approximation), "
        "where each question's outcome is kept."
    )
    return [*blocks, Text(note)] if blocks else [Text("None of these runs is evaluated yet.")]


def _curves(runs: list[RunFacts]) -> list[Block]:
    most, blocks = points_each(runs), list[Block]()
    for stage in RECORDED:
        if found := overlaid(runs, stage, most):
            blocks.append(Fold(f"{stage}: {len(found)} charts", [Charts(found)]))
    return blocks or [Text("None of these runs has a record yet.")]


def _settings(runs: list[RunFacts]) -> list[Block]:
    of_runs = {run.name: settings_of(run.config) for run in runs if run.config}
    keys = dict.fromkeys(key for settings in of_runs.values() for key in settings)
    values = {key: [settings.get(key) for settings in of_runs.values()] for key in keys}
    rows = [[key, *map(shown, row)] for key, row in values.items() if any(value != row[0] for value in row)]
    blocks: list[Block] = [
        Text(f"The configuration of {run.name} cannot be read.", "bad") for run in runs if run.config is None
    ]
    if rows:
        return [*blocks, Table(["setting", *of_runs], rows[:MOST_SETTINGS])]
    return [*blocks, Text(f"None: {', '.join(of_runs)} have the same settings.")] if len(of_runs) > 1 else blocks


def _incidents(run: RunFacts) -> list[Block]:
    return [Fold(run.name, [happened(found)]) if (found := incidents(run)) else Text(f"{run.name}: none.", "good")]
