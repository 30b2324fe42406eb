"""`fathom tokenizer RUN`: how well a run's tokenizer compresses each kind of text, beside gpt2 and cl100k_base."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import manifest as manifests
from corpus.rows import Rows
from corpus.tokenizers import Tokenizer
from pipeline.artifacts import RunStore
from pipeline.config import add_storage_flag
from pipeline.status import run_states
from pipeline.terminal import TOGETHER, Terminal, say, show

SAMPLES = Path(__file__).parent / "samples.toml"
BESIDE = ("gpt2", "cl100k_base")
HELD_OUT_ROWS = 64


def samples() -> dict[str, list[str]]:
    """The texts that come with Fathom, by kind."""
    texts = tomllib.loads(SAMPLES.read_text(encoding="utf-8"))["texts"]
    return {kind: [text] for kind, text in texts.items()}


def held_out(store: RunStore, tokenizer: Tokenizer) -> list[str]:
    """Documents from the first held-out rows of the run's own corpus, as far as those rows hold them."""
    rows = Rows(manifests.fetch(store.stage("ingest"), "base/val"), vocab_size=tokenizer.vocab_size)
    ids, _ = rows.read(np.arange(min(HELD_OUT_ROWS, rows.num_rows)))
    documents = (document for row in ids for document in np.split(row, np.flatnonzero(row == tokenizer.bos)))
    texts = (tokenizer.decode(document[document != tokenizer.bos].tolist()) for document in documents)
    return [text for text in texts if text]


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes a token over all `texts`. Raises ValueError for a text that the tokenizer cannot write."""
    tokens = sum(len(tokenizer.encode_array(text)) for text in texts)
    return sum(len(text.encode()) for text in texts) / tokens


def compression(tokenizer: Tokenizer, kinds: dict[str, list[str]]) -> dict[str, Any]:
    """{"texts": [{"kind", "bytes", "bytes_per_token": {name: value or None}}], "notes": [why a value is None]}.

    The names are "run" for `tokenizer`, and those of the encodings beside it.
    """
    tokenizers, notes = {"run": tokenizer}, []
    for name in BESIDE:
        try:
            tokenizers[name] = Tokenizer.open(name)
        except ValueError as error:
            notes.append(str(error))
    texts = []
    for kind, documents in kinds.items():
        values: dict[str, float | None] = dict.fromkeys(["run", *BESIDE])
        for name, each in tokenizers.items():
            try:
                values[name] = bytes_per_token(each, documents)
            except ValueError as error:
                notes.append(f"{kind}: {error}")
        texts.append({"kind": kind, "bytes": sum(len(text.encode()) for text in documents), "bytes_per_token": values})
    return {"texts": texts, "notes": notes}


def report(store: RunStore) -> dict[str, Any]:
    """`compression` of a run's tokenizer on the samples and, once ingest is done, on its held-out text.

    Raises FileNotFoundError for an unknown run, ValueError while its tokenizer is not made.
    """
    states = {state.name: state for state in run_states(store)}
    state = states["tokenizer"]
    if state.manifest is None:
        reason = f" ({state.error})" if state.error else ""
        raise ValueError(
            f"the tokenizer of run {store.run} is not made, it is {state.state}{reason}: "
            f"make it with fathom run --name {store.run}"
        )
    tokenizer = Tokenizer.load(manifests.fetch(store.stage("tokenizer")))
    kinds = samples()
    if states["ingest"].manifest is not None and (texts := held_out(store, tokenizer)):
        kinds["held-out text of the run"] = texts
    return {"run": store.run, "vocab_size": tokenizer.vocab_size, **compression(tokenizer, kinds)}


def print_table(result: dict[str, Any], console: Console) -> None:
    """One line a kind of text; a dash where there is no value, and the reasons below."""
    title = (
        f"run {result['run']}, {result['vocab_size']:,} tokens: bytes of text a token (+: fewer tokens than with it)"
    )
    say(console, title)
    lines = []
    table = Table(box=None, pad_edge=False)
    table.add_column("text", no_wrap=True)
    columns = ["bytes", "run", *(column for name in BESIDE for column in (name, "run is"))]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for text in result["texts"]:
        values = text["bytes_per_token"]
        ours = values["run"]
        cells = [_value(ours)]
        for name in BESIDE:
            theirs = values[name]
            cells += [_value(theirs), f"{ours / theirs - 1:+.1%}" if ours and theirs else "-"]
        cells = [f"{text['bytes']:,}", *cells]
        table.add_row(text["kind"], *cells)
        pairs = (f"{column}{TOGETHER}{cell}" for column, cell in zip(columns, cells, strict=True))
        lines.append(f"{text['kind']}: {', '.join(pairs)}")
    show(console, table, lines)
    for note in result["notes"]:
        say(console, note)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Print the table, or with --json what `report` returns."""
    parser = argparse.ArgumentParser(prog="fathom tokenizer", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="name of the run")
    add_storage_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    result = report(RunStore(args.storage, args.run))
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print_table(result, Terminal())
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["tokenizer", *sys.argv[1:]]))
