"""`fathom data inspect RUN` shows the rows a run trains on; `fathom data verify RUN` hashes its files again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from rich.bar import Bar
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from cluster import manifest as manifests
from cluster.manifest import MANIFEST, Manifest
from cluster.storage import FileEntry, Storage, StorageError, hash_stream
from corpus import left_out
from corpus.rows import ROWS_FILE, Rows, check_ids
from corpus.tokenizers import Tokenizer
from pipeline.artifacts import RunStore
from pipeline.config import STAGE_NAMES, add_storage_flag, stage_names
from pipeline.terminal import Terminal, say, show, width_of
from stages.context import StageContext
from stages.growing import NOTES, PLAN, SPLITS, Plan, holder_of, open_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("base", "mid", "sft")
FIGURES = {
    "documents": "documents",
    "characters": "characters",
    "tokens": "tokens",
    "characters_per_token": "characters a token",
    "rows": "rows",
    "validation_rows": "validation rows",
    "validation_share": "validation tokens",
    "cropped_share": "cropped: tokens in no row",
    "split": "long documents split",
}
COUNTS = TypeAdapter(dict[str, Annotated[float, Field(strict=True, ge=0, lt=1e18)]])  # of FIGURES
Lengths = dict[Annotated[int, Field(gt=0, lt=1 << 62)], Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]]
LENGTHS = TypeAdapter(dict[str, Lengths])
BORDER, LEARNED, SPECIAL = "bold cyan", "green", "reverse"
READERS = 8  # files hashed at once


@dataclass(frozen=True)
class Span:
    """Ids in a line that are alike: `learned` is their loss mask, None in rows without one."""

    text: str
    tokens: int
    special: bool
    learned: bool | None


@dataclass(frozen=True)
class Document:
    """What stands between one `<|bos|>` and the next; `continued`: its beginning is in another row."""

    tokens: int
    continued: bool
    spans: list[Span]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Row:
    """A row decoded; `padding` tokens at its end belong to no document."""

    index: int
    tokens: int
    documents: list[Document]
    padding: int

    def json(self) -> dict[str, Any]:
        documents = [{**asdict(document), "text": document.text} for document in self.documents]
        return {**asdict(self), "documents": documents}


def decode_row(index: int, ids: np.ndarray, mask: np.ndarray | None, tokenizer: Tokenizer) -> Row:
    """A row of ids (row_len,) and its loss mask (row_len,), or None, as text. ValueError for ids that are no tokens."""
    check_ids(ids, tokenizer.vocab_size, f"row {index:,}")
    begins = ids == tokenizer.bos
    end = len(ids)
    if mask is not None:  # such rows are padded with `<|bos|>`, and no conversation is that alone
        end = int(np.flatnonzero(~begins).max(initial=-1)) + 1
    special = tokenizer.token_bytes[ids] == 0
    learned = np.zeros_like(special) if mask is None else mask == 1

    def spans(start: int, stop: int) -> Iterator[Span]:
        kind = 2 * learned[start:stop] + special[start:stop]
        for first, last in pairwise([start, *(np.flatnonzero(np.diff(kind)) + start + 1), stop]):
            text = tokenizer.decode(ids[first:last].tolist())
            yield Span(text, int(last - first), bool(special[first]), None if mask is None else bool(learned[first]))

    borders = sorted({0, *map(int, np.flatnonzero(begins[:end])), end})
    documents = [
        Document(stop - start, not begins[start], list(spans(start, stop))) for start, stop in pairwise(borders)
    ]
    return Row(index, len(ids), documents, len(ids) - end)


def bins(tokens_below: dict[int, int]) -> list[tuple[int, int]]:
    """(limit, documents with fewer tokens and at least half as many), the limit doubling from bin to bin."""
    exponents = range(min(tokens_below).bit_length() - 1, max(tokens_below).bit_length())
    return [(1 << e, tokens_below.get(1 << e, 0)) for e in exponents]


def histogram(tokens_below: dict[int, int], title: str) -> Figure:
    """The lengths of documents as bars over a base-2 logarithmic axis."""
    from matplotlib.figure import Figure  # takes as long to import as all else here

    limits, counts = (np.array(column) for column in zip(*bins(tokens_below), strict=True))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(limits / 2, counts, width=limits / 2, align="edge", edgecolor="white", color="tab:blue")
    axes.set_xscale("log", base=2)
    edges = [limits[0] / 2, *limits]
    axes.set_xticks(edges, [f"{edge:,g}" if edge < 1 << 20 else f"{edge / (1 << 20):g}M" for edge in edges])
    axes.tick_params(axis="x", rotation=30 if len(edges) > 12 else 0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(xlabel="length in tokens", ylabel="documents", title=title)
    return figure


def inspect(store: RunStore, args: argparse.Namespace, console: Console) -> None:
    """Prints what `args` asks for, and writes the plot.

    Raises FileNotFoundError for what is not made, ValueError for rows that there are not.
    """
    part = f"{args.stage}/{args.split}"
    holder = holder_of(part)
    made = _finished(store, holder)
    if not made.below(part):
        there = sorted(f.path.removesuffix(f"/{ROWS_FILE}") for f in made.files if f.path.endswith(f"/{ROWS_FILE}"))
        raise FileNotFoundError(f"run {store.run} has no rows in {part}; {holder} made {', '.join(there) or 'none'}")
    stats = _stats(store)
    lengths: dict[int, int] = stats.get("tokens_below", {})
    if args.plot and not lengths:
        raise ValueError(f"--plot: ingest of run {store.run} recorded no lengths of documents to draw")
    tokenizer = _tokenizer(store, made)
    upstream = {holder: store.stage(holder)}
    rows = open_rows(StageContext(store.run, args.stage, store.stage(args.stage), upstream, {}, {}), part)
    indices, what = _indices(store, rows, part, args)

    def decoded() -> Iterator[Row]:
        for i in indices:
            ids, mask = rows.read(np.array([i]))
            yield decode_row(int(i), ids[0], None if mask is None else mask[0], tokenizer)

    if args.json:
        head = {"run": store.run, "stage": args.stage, "split": args.split, "row_len": rows.row_len}
        shown = [row.json() for row in decoded()]
        print(json.dumps({**head, "num_rows": rows.num_rows, "rows": shown, "stats": stats}, indent=1))
    else:
        say(console, f"run {store.run}, {part}: {what}", "bold")
        if rows.masked:
            console.print(_legend(console), highlight=False)
        for row in decoded():
            show_row(row, console)
        show_stats(stats, console)
    if args.plot:
        title = f"{store.run}: {sum(lengths.values()):,} documents by length"
        histogram(lengths, title).savefig(args.plot, format="png")
        if not args.json:
            say(console, f"wrote {args.plot}")


def _stats(store: RunStore) -> dict[str, Any]:
    """What ingest counted, and conversations where that is done; `read` and `skipped` of both."""
    stats: dict[str, Any] = {}
    for name in ("ingest", "conversations"):
        made = manifests.read(store.stage(name))
        for key, value in (made.stats if made else {}).items():
            stats[key] = stats.get(key, {}) | value if key in ("read", "skipped") else value
    try:
        COUNTS.validate_python({key: stats[key] for key in FIGURES if key in stats})
        lengths = LENGTHS.validate_python({"tokens_below": stats.get("tokens_below", {})})["tokens_below"]
    except ValidationError as error:
        raise ValueError(
            f"{store.stage('ingest').uri}/{MANIFEST} has counts that are none ({manifests.faults(error)}): "
            "make it again with --force ingest"
        ) from error
    drawn = {limit: count for limit, count in lengths.items() if count and limit.bit_count() == 1}
    return stats | {"tokens_below": drawn} if lengths else stats


def _indices(store: RunStore, rows: Rows, part: str, args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Which rows to show, and what they are, in words."""
    if args.step is None:
        if args.seed is not None:
            raise ValueError("--seed orders the rows of a training step: give --step too")
        indices = np.arange(args.start, min(args.start + args.rows, rows.num_rows))
        if args.rows and not len(indices):
            raise ValueError(f"--start {args.start}: {part} has {rows.num_rows:,} rows, numbered from 0")
        return indices, f"{len(indices):,} of {rows.num_rows:,} rows of {rows.row_len:,} tokens"
    config = store.recorded()
    if args.split != "train" or config is None:
        why = "only train rows make up steps" if config else "the run has no configuration that this version can read"
        raise ValueError(f"--step {args.step}: {why}; give --start instead")
    batch: int = getattr(config, args.stage).total_batch_size
    count, seed = batch // (rows.row_len - 1), config.seed if args.seed is None else args.seed
    if not count:
        raise ValueError(
            f"--step {args.step}: the run's {args.stage}.total_batch_size is less than a row of {part} has"
        )
    shown = rows.step_rows(seed, args.step, count)[: args.rows]
    return shown, f"{len(shown):,} of {count:,} rows of step {args.step:,}, seed {seed}"


def _tokenizer(store: RunStore, ingest: Manifest) -> Tokenizer:
    manifest = _finished(store, "tokenizer")
    if ingest.upstream.get("tokenizer") != manifest.digest():
        raise ValueError(
            f"the rows of run {store.run} were made with another tokenizer than it has now; make them again with "
            f"--force {ingest.stage}"
        )
    return Tokenizer.load(manifests.fetch(store.stage("tokenizer")))


def _finished(store: RunStore, stage: str) -> Manifest:
    """The manifest of a stage; raises FileNotFoundError that says how far the stage is."""
    storage = store.stage(stage)
    manifest = manifests.read(storage)
    if manifest is not None:
        return manifest
    state = store.state(stage)
    known = [state.state] if state.state in ("running", "failed") else ["not running"]
    if storage.exists(PLAN):
        plan = manifests.informing(storage, PLAN, Plan)
        known += [f"{len(storage.list(NOTES))} of {plan.shards} shards done"] if plan else []
    advice = "wait for it" if state.state == "running" else f"go on with it: fathom run --name {store.run}"
    error = f". It said: {state.error}" if state.error else ""
    raise FileNotFoundError(f"{stage} of run {store.run} is not finished ({', '.join(known)}); {advice}{error}")


def _colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _legend(console: Console) -> Text:
    learned = ("learned", LEARNED) if _colours(console) else "⟦learned⟧"
    return Text.assemble("mask: ", learned, ", only read")


def show_row(row: Row, console: Console) -> None:
    """Prints a row, a line at the head of each document; without colours ⟦ ⟧ enclose what is learned."""

    def border(text: str, style: str) -> None:
        line = f"── {text} ──"
        say(console, line.ljust(console.width, "─") if console.is_terminal else line, style)

    say(console, f"\nrow {row.index:,}", "bold")
    for document in row.documents:
        learned = [span.tokens for span in document.spans if span.learned]
        masked = any(span.learned is not None for span in document.spans)
        counted = _tokens(document.tokens) + (f", {sum(learned):,} learned" if masked else "")
        border(f"document{' continued' if document.continued else ''}, {counted}", BORDER)
        console.print(_text(document, _colours(console)), soft_wrap=True)
    if row.padding:
        border(f"padding, {_tokens(row.padding)}", "dim")


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _text(document: Document, colours: bool) -> Text:
    text, inside = Text(), False
    for span in document.spans:
        if not colours and bool(span.learned) != inside:
            text.append("⟧" if inside else "⟦")
            inside = not inside
        styles = [SPECIAL] * span.special + [LEARNED] * bool(span.learned)
        text.append(_visible(span.text), " ".join(styles))
    return text.append("⟧") if inside else text


def _visible(text: str) -> str:
    """`text` with what a terminal would obey or hide, such as an escape or a zero-width space, spelled out."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def show_stats(stats: dict[str, Any], console: Console) -> None:
    """Prints what was counted: the corpus, the lengths of its documents, and what each source gave."""
    say(console, "\ncorpus", "bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in FIGURES.items():
        if name in stats:
            value = f"{stats[name]:.1%}" if name.endswith("_share") else f"{stats[name]:,}"
            table.add_row(label, value)
    console.print(table, highlight=False)
    if lengths := stats.get("tokens_below"):
        say(console, "\ndocuments by length", "bold")
        console.print(_bars(bins(lengths), width_of(console)), highlight=False)
    if read := stats.get("read"):
        say(console, "\nread", "bold")
        table = Table(box=None, pad_edge=False)
        for column in ("source", "read", "used", "left out"):
            table.add_column(column, justify="right" if column in ("read", "used") else "left", no_wrap=True)
        lines = []
        for source, counts in read.items():
            there, used = (f"{counts[key]:,}" for key in ("read", "kept"))
            without = left_out.reasons(counts["left_out"]) or "none"
            table.add_row(Text(source), there, used, without)
            lines.append(f"{source}: {there} read, {used} used; left out: {without}")
        show(console, table, lines)
        for line in left_out.lines(read):
            say(console, line)


def _bars(lengths: list[tuple[int, int]], width: int | None) -> Table:
    total, most = sum(count for _, count in lengths), max(count for _, count in lengths)
    bar = max(4, min(40, (width or 80) - 40))  # the figures beside it take up to 40 columns
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column(width=bar)
    table.add_column("documents", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for limit, count in lengths:
        fewest = limit // 2
        of = f"{fewest:,}–{limit - 1:,}" if fewest < limit - 1 else f"{fewest}"
        table.add_row(of, Bar(most, 0, count, width=bar), f"{count:,}", f"{count / total:.1%}")
    return table


def verify(store: RunStore, only: str | None, console: Console) -> None:
    """Hashes every file of `only`, or of every finished stage, and compares; prints a line a stage and a fault.

    Raises FileNotFoundError where nothing is finished, StorageError when a file is missing or damaged.
    """
    every = STAGE_NAMES
    if only and only not in every:
        raise ValueError(f"--stage {only}: there is no such stage; there are {', '.join(every)}")
    there = [name for name in every if store.stage(name).exists(MANIFEST)]
    stages = [only] if only else there or [*every[:1]]
    began, files, size, damaged = time.monotonic(), 0, 0, []
    for stage in stages:
        try:
            manifest = _finished(store, stage)
        except StorageError as error:
            say(console, f"{stage}: {error}")
            damaged.append(stage)
            continue
        if faults := _verify_stage(store.stage(stage), manifest, console):
            damaged.append(stage)
        bytes_ = sum(file.size for file in manifest.files)
        counted = f"{len(manifest.files):,} files, {decimal(bytes_)}"
        say(console, f"{stage:<14}  {f'{faults:,} damaged of ' if faults else 'ok, '}{counted}")
        files, size = files + len(manifest.files), size + bytes_
    wanted = [] if only else stage_names(config) if (config := store.recorded()) else every
    if missing := [name for name in wanted if name not in there]:
        say(console, f"not finished, so not checked: {', '.join(missing)}")
    if damaged:
        again = " ".join(f"--force {stage}" for stage in damaged)
        raise StorageError(
            f"{store.storage.uri} is damaged in {', '.join(damaged)}. Make it again: "
            f"fathom run --name {store.run} {again}, with the settings it was made with"
        )
    rate = size / max(time.monotonic() - began, 1e-3)
    say(console, f"ok: {files:,} files, {decimal(size)}, {decimal(int(rate))}/s")


def _verify_stage(storage: Storage, manifest: Manifest, console: Console) -> int:
    """Prints a line for each file that is not as the manifest has it; returns how many there are."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    faults = 0
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(READERS, thread_name_prefix="verify") as pool,
    ):
        total = sum(file.size for file in manifest.files)
        task = progress.add_task(manifest.stage, total=total)

        def fault(entry: FileEntry) -> str | None:
            def read() -> tuple[int, str]:
                with storage.open_read(entry.path) as stream:
                    return hash_stream(progress.wrap_file(stream, total=total, task_id=task))

            where = f"{storage.uri}/{entry.path}"
            return manifests.compare(entry, lambda: storage.reading(entry.path, read), where)

        for found in filter(None, pool.map(fault, manifest.files)):
            faults += 1
            say(console, f"{manifest.stage}/{found}")
    return faults


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """With `inspect --json` {"run", "stage", "split", "row_len", "num_rows", "rows", "stats"}, the rows as `Row` has
    them and each document's text."""
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("run", metavar="RUN", help="name of the run")
    add_storage_flag(run)
    parser = argparse.ArgumentParser(prog="fathom data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    looking = commands.add_parser("inspect", parents=[run], help="rows as text, and what ingest counted")
    looking.add_argument("--stage", choices=STAGES, default="base", help="whose rows (default base)")
    looking.add_argument("--split", choices=SPLITS, default="train", help="train (default) or val")
    looking.add_argument("--rows", type=_number, default=3, metavar="N", help="show this many rows (default 3)")
    which = looking.add_mutually_exclusive_group()
    which.add_argument("--start", type=_number, default=0, metavar="I", help="first row to show, from 0 (default 0)")
    which.add_argument("--step", type=_number, metavar="S", help="show rows that training sees at this step, from 0")
    looking.add_argument("--seed", type=_number, help="order of the steps' rows (default: the run's)")
    looking.add_argument("--plot", type=Path, metavar="FILE", help="write the lengths of documents as a PNG")
    looking.add_argument("--json", action="store_true", help="print JSON")
    checking = commands.add_parser("verify", parents=[run], help="hash every file again and compare")
    checking.add_argument("--stage", help="only this stage (default: every finished one)")
    args = parser.parse_args(argv)
    store = RunStore(args.storage, args.run)
    if not store.storage.exists():
        raise FileNotFoundError(f"no run {store.run!r}: {store.storage.uri} does not exist; see --storage")
    if args.command == "inspect":
        inspect(store, args, Terminal())
    else:
        verify(store, args.stage, Terminal())
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["data", *sys.argv[1:]]))
