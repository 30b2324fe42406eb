"""`fathom evaluate WHAT...`: measure models as the field does, alone or side by side.

WHAT is a run (its last model), RUN:STAGE, RUN:STAGE@STEP (a checkpoint), a Hugging Face directory of a family that
Fathom has, or hub:REPO. Answers are kept below --storage, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import ray
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster import manifest as manifests
from cluster.resources import resources
from cluster.runtime import connect
from cluster.scratch import sweep
from cluster.storage import Storage
from corpus.sources import read_unit, units
from corpus.tokenizers import Tokenizer
from models.hf import read_spec
from pipeline.artifacts import EVALUATIONS, RunStore
from pipeline.config import add_storage_flag
from pipeline.model import Model, find, is_run
from pipeline.terminal import WHOLE, Terminal, show, width_of
from pipeline.tokenizer import held_out
from stages.config import EvaluateConfig
from stages.evaluation.measure import (
    FAULTS,
    TOTALS,
    Examples,
    Figures,
    Kept,
    Summary,
    in_words,
    lacking,
    measure,
    summary,
    titled,
)
from stages.evaluation.pool import resolved
from stages.evaluation.text import open_text
from tasks.estimates import core_difference, same_share
from tasks.suite import CHATCORE, GROUPS, Suite, suite

MOST_ACTORS = 4  # on CPUs, as each has a copy of the model in the machine's one memory


def documents_of(
    text: str | None, whats: Sequence[str], storage: str
) -> tuple[Callable[[], Iterator[str]] | None, str]:
    """The text of "perplexity" and what changes with it: that of --text, else what the first run among `whats` has held
    out of its corpus; None where there is neither. Raises FileNotFoundError or ValueError."""
    if text is not None:
        found = units(text)  # which name the size, the time of change or the hub's commit of every file
        return lambda: (document.text for unit in found for document in read_unit(unit)), json.dumps(found)
    for what in whats:
        if is_run(what):
            store = RunStore(storage, what.partition(":")[0])
            ingested = manifests.read(store.stage("ingest"))
            if ingested is not None:
                return partial(_held_out, store), ingested.digest("base/val")
    return None, ""


def _held_out(store: RunStore) -> Iterator[str]:
    return iter(held_out(store, Tokenizer.load(manifests.fetch(store.stage("tokenizer")))))


@dataclass
class Report:
    """What was measured of one model; `faults` says of tasks why they could not be asked."""

    model: Model
    figures: dict[str, Figures] = field(default_factory=dict)
    examples: dict[str, Examples] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)

    def summary(self) -> Summary:
        """What --json has of the model."""
        return {"model": self.model.name, **summary(self.figures, self.incomplete, self.faults)}


def measured(model: Model, shown: str, asked: Suite, args: argparse.Namespace, console: Console) -> Report:
    """Asks a model all of the suite, with a line of progress, headed `shown`, and one for each task under way."""
    report = Report(model, incomplete=asked.incomplete)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    config, devices = EvaluateConfig(engine=args.engine), resources()
    storage, precision = Storage(args.storage).at(EVALUATIONS), resolved(args.precision, devices)
    kept = Kept(storage, model.digest, precision, args.engine, args.limit)
    actors = devices.gpus or max(1, min(devices.cpus, MOST_ACTORS))
    with Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task(shown, total=len(asked.tasks))  # whose time left is known, other than a task's
        lines = {task.name: bars.add_task(task.name, total=None, start=False, visible=False) for task in asked.tasks}

        def progress(name: str, done: int, of: int | None) -> None:
            bars.start_task(lines[name])
            bars.update(lines[name], completed=done, total=of, visible=done != of)

        answers = measure(
            model.fetch,
            asked.tasks,
            args.limit,
            kept,
            devices,
            actors,
            config,
            args.precision,
            lambda text, kind=None: console.print(text),
            progress=progress,
        )
        try:
            for name, figures, examples in answers:
                bars.advance(whole)
                if isinstance(figures, str):
                    report.faults[name] = figures
                    continue
                report.figures[name], report.examples[name] = figures, examples
                if not console.is_terminal:
                    console.print(f"{model.name}: {_row(name, figures)} {_cell(figures)}", soft_wrap=True)
        except (RuntimeError, ray.exceptions.RayError, *FAULTS) as error:  # the other models may still be measured
            if args.debug:
                raise
            answered = report.figures | report.faults
            report.faults |= {task.name: in_words(error) for task in asked.tasks if task.name not in answered}
    order = [task.name for task in asked.tasks if task.name in report.figures]
    report.figures = {name: report.figures[name] for name in order}
    report.examples = {name: report.examples[name] for name in order}
    report.faults = {task.name: report.faults[task.name] for task in asked.tasks if task.name in report.faults}
    return report


def _cell(figures: Figures | None, interval: bool = True) -> str:
    if figures is None:
        return "-"
    between = f" ({figures['low']:.3f}-{figures['high']:.3f})" if interval and "low" in figures else ""
    return f"{figures['accuracy' if 'accuracy' in figures else 'bpb']:.4f}{between}"


def _row(name: str, figures: Figures) -> str:
    return name if "accuracy" in figures else f"{name} (bits a byte)"


def show_table(reports: Sequence[Report], limit: int | None, console: Console) -> None:
    """A line a task: of each model the figure with its 95% interval, of one model also the centered accuracy, of all
    but the first how far it is from the first, and how likely so large a difference is between equals. Intervals are
    left out of several models where only so the table fits the terminal."""
    width, whole = width_of(console), table(reports, limit, True)
    short = table(reports, limit, False)
    fits = width is None or len(reports) == 1 or _columns(console, short) > width or _columns(console, whole) <= width
    show(console, whole if fits else short, _lines(whole))


def _lines(whole: Table) -> Iterator[str]:
    """A table in lines."""
    if whole.title:
        yield str(whole.title)
    tasks, *columns = (list(column.cells) for column in whole.columns)
    heads = [column.header for column in whole.columns[1:]]
    for task, *cells in zip(tasks, *columns, strict=True):
        yield f"{task}  " + ", ".join(f"{head} {cell}" for head, cell in zip(heads, cells, strict=True) if cell)


def _columns(console: Console, found: Table) -> int:
    return Measurement.get(console, console.options.update_width(WHOLE), found).maximum


def table(reports: Sequence[Report], limit: int | None, interval: bool) -> Table:
    parts = [f"at most {limit:,} examples a task"] if limit else []
    parts += [] if interval else ["95% intervals: --json FILE"]
    out = Table(title="; ".join(parts) or None, box=None, pad_edge=False, title_justify="left")
    out.add_column("task", no_wrap=True)
    for i, name in enumerate(_short([report.model.name for report in reports])):
        out.add_column(name, justify="right", overflow="fold")
        for beside in ("difference", "p") if i else ("centered",) * (len(reports) == 1):
            out.add_column(beside, justify="right", no_wrap=True)
    first = reports[0]
    for name in dict.fromkeys(name for report in reports for name in report.figures):
        cells, some = [], next(report.figures[name] for report in reports if name in report.figures)
        for i, report in enumerate(reports):
            figures = report.figures.get(name)
            cells += [_cell(figures, interval), *(_beside(first, report, name) if i else ())]
        centered = (f"{some['centered']:.4f}" if "centered" in some else "",) * (len(reports) == 1)
        out.add_row(_row(name, some), *cells, *centered)
    summaries = [report.summary() for report in reports]
    for score, (title, parts_of, whole) in TOTALS.items():
        names = [found[parts_of] for found in summaries]
        if any(names):
            cells = []
            for i, (report, found) in enumerate(zip(reports, summaries, strict=True)):
                comparable = names[i] and names[i] == names[0]
                cells.append(_score(found, score, limit, interval))
                cells += (_beside_all(first, report, names[i]) if comparable else ("", "")) if i else ()
            counts = {len(of_one) for of_one in names if of_one}
            of = "" if counts == {whole} else f" of {', '.join(map(str, sorted(counts)))}"
            out.add_row(f"{title}{of}", *cells, style="bold")
    return out


def _short(names: Sequence[str]) -> list[str]:
    """The names without the folders that all of them have in common."""
    parts = [name.rstrip("/").split("/") for name in names]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, folders)) if len(names) > 1 else 0
    return ["/".join(part[common:]) for part in parts]


def _score(found: Summary, score: str, limit: int | None, interval: bool) -> str:
    if found[score] is None:
        return "-"
    mark = titled(found, score, limit).removeprefix(TOTALS[score][0])
    between = f" ({found[f'{score}_low']:.3f}-{found[f'{score}_high']:.3f})" if interval else ""
    return f"{found[score]:.4f}{mark}{between}"


def _signs(first: Report, report: Report, name: str) -> list[int]:
    """For every question of a task that both were asked: 1 where only the second is right, -1 where only the first is,
    0 where they agree."""
    by_index = {example["index"]: example["correct"] for example in first.examples[name]}
    return [b["correct"] - by_index[b["index"]] for b in report.examples[name] if b["index"] in by_index]


def _beside(first: Report, report: Report, name: str) -> tuple[str, str]:
    """How far a model is from the first, on the same questions with p of McNemar's exact test."""
    if name not in first.figures or name not in report.figures:
        return "", ""
    if "accuracy" not in report.figures[name]:
        return f"{report.figures[name]['bpb'] - first.figures[name]['bpb']:+.4f}", ""
    if not (signs := _signs(first, report, name)):
        return "", ""
    return f"{sum(signs) / len(signs):+.4f}", f"{same_share(signs.count(1), signs.count(-1)):.3f}"


def _beside_all(first: Report, report: Report, names: Sequence[str]) -> tuple[str, str]:
    difference, p = core_difference([(report.figures[n]["baseline"], _signs(first, report, n)) for n in names])
    return f"{difference:+.4f}", f"{p:.3f}"


def write_csv(path: Path, report: Report, limit: int | None) -> None:
    """The table of nanochat's and DCLM's evaluators: Task, Accuracy, Centered; the last line is CORE."""
    found = report.summary()
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["Task", "Accuracy", "Centered"])
        for name, figures in report.figures.items():
            if "accuracy" in figures:
                rows.writerow([name, f"{figures['accuracy']:.6f}", f"{figures['centered']:.6f}"])
        for score in TOTALS:
            if found[score] is not None:
                rows.writerow([titled(found, score, limit), "", f"{found[score]:.6f}"])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="fathom evaluate", description=__doc__)
    out.add_argument(
        "what", metavar="WHAT", nargs="+", help="models: RUN, RUN:STAGE, RUN:STAGE@STEP, a directory, hub:REPO"
    )
    known = f"{', '.join(GROUPS)}, {', '.join(CHATCORE)}, or a label of CORE"
    out.add_argument("--tasks", default="core", help=f"what to ask, with commas between: {known} (default core)")
    out.add_argument(
        "--eval-data",
        metavar="PLACE",
        help="folder, URI or hub:OWNER/NAME with a folder a data set, or CORE bundle",
    )
    out.add_argument("--text", metavar="CORPUS", help="the text of perplexity: as for fathom run --corpus")
    out.add_argument("--limit", type=int, metavar="N", help="ask at most N examples a task (default all)")
    out.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs, else fp32"
    )
    out.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="what writes answers")
    out.add_argument(
        "--unsafe-sandbox",
        action="store_true",
        help="run what models write for HumanEval with all that you may do yourself, where no sandbox can be made",
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    out.add_argument(
        "--examples", type=Path, metavar="FILE", help="write every example's outcome, a JSON object a line"
    )
    out.add_argument("--csv", type=Path, metavar="FILE", help="write Task, Accuracy, Centered, as nanochat does")
    out.add_argument("--debug", action="store_true", help="show tracebacks, and what workers print")
    add_storage_flag(out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 when some task could not be asked."""
    args = parser().parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: ask at least 1 example a task, or leave --limit out for all")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks {args.tasks} names no task; there are {', '.join((*GROUPS, *CHATCORE))}")
    console = Terminal(markup=False)  # names and messages are shown as they are
    models = [find(what, args.storage) for what in args.what]
    documents, stamp = documents_of(args.text, args.what, args.storage) if "perplexity" in names else (None, "")
    for model in models:
        open_text(model.fetch())  # refused here, it costs nothing
    contexts = [read_spec(model.fetch()).sequence_len for model in models]
    suites = [suite(names, args.eval_data, documents, stamp, n, args.unsafe_sandbox) for n in contexts]
    for path in (args.json, args.examples, args.csv):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write it into")
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
    sweep()
    connect(args.debug)
    shown = _short([model.name for model in models]) if len(models) > 1 else ["tasks"]
    reports = [measured(*each, args, console) for each in zip(models, shown, suites, strict=True)]
    if args.json is not None:
        summaries = [report.summary() for report in reports]
        text = json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.examples is not None:
        lines = (
            json.dumps({"model": report.model.name} | example if len(reports) > 1 else example)
            for report in reports
            for examples in report.examples.values()
            for example in examples
        )
        args.examples.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if args.csv is not None:
        for i, report in enumerate(reports):
            write_csv(args.csv if not i else args.csv.with_stem(f"{args.csv.stem}-{i + 1}"), report, args.limit)
    show_table(reports, args.limit, console)
    for report in reports:
        for fault in dict.fromkeys(report.faults.values()):  # what keeps a model from all tasks is said once
            names = [name for name, why in report.faults.items() if why == fault]
            said = f"{report.model.name}: {', '.join(names)} could not be asked: {fault}"
            console.print(said, style="red", soft_wrap=True)
    if missing := lacking(reports[0].incomplete):
        console.print(missing, soft_wrap=True, highlight=False)
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["evaluate", *sys.argv[1:]]))
