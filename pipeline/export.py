"""`fathom export WHAT PLACE`: give a model away, as a folder or hub:OWNER/NAME that other programs load, with a card
that says how it was made and how good it is.

WHAT is a run (its last model), RUN:STAGE, or RUN:STAGE@STEP (a checkpoint).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import yaml
from pydantic import BaseModel, ValidationError

from cluster.hub import HUB
from cluster.scratch import scratch
from cluster.storage import sync_folder
from corpus.sources import CORPORA, is_named
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, Tokenizer
from models.hf import from_pretrained
from models.spec import ModelSpec
from pipeline.artifacts import RunStore
from pipeline.config import STAGE_NAMES, Config, add_storage_flag
from pipeline.model import find, is_run
from pipeline.reporting.blocks import Block, Code, Document, Section, Table, Text
from pipeline.reporting.document import data, evaluations, trained
from pipeline.reporting.facts import RunFacts, collect
from pipeline.reporting.markdown import markdown
from pipeline.terminal import Terminal, say
from serving.speaker import TEMPERATURE
from stages.training.state import export

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, ABOUT = "README.md", "fathom.json"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ATTRIBUTES = ".gitattributes"  # which the hub itself writes
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # as the hub writes their names
PARTIAL = ".partial-"  # in the name of a folder that is not whole yet, before the process that makes it


class About(BaseModel):
    """What an export says of itself: its model, and the SHA-256 of each other file of it."""

    model: str
    digest: str
    files: dict[str, str]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom export", description=__doc__)
    parser.add_argument("what", metavar="WHAT", help="the model: RUN, RUN:STAGE or RUN:STAGE@STEP")
    parser.add_argument("place", metavar="PLACE", help="a folder that is made, or hub:OWNER/NAME")
    parser.add_argument("--dtype", choices=TYPES, default="bf16", help="type of the weights (default bf16)")
    parser.add_argument("--license", metavar="NAME", help="licence in the card, as the hub writes it, such as mit")
    parser.add_argument("--public", action="store_true", help="of a new repository: everyone may read it")
    parser.add_argument(
        "--force", action="store_true", help="also where something else is; a folder's content moves to FOLDER.before"
    )
    add_storage_flag(parser)
    args = parser.parse_args(argv)
    if not is_run(args.what):
        raise ValueError(f"{args.what} is no run: a folder or repository can be given away as it is")
    if args.license is not None and not LICENCE.fullmatch(args.license):
        raise ValueError(f"--license {args.license}: the hub's names are like mit, apache-2.0 or cc-by-4.0")
    repository = args.place.removeprefix("hub:") if args.place.startswith("hub:") else None
    target = Path(args.place).expanduser().resolve()
    api = _hub(repository, args.force) if repository is not None else None
    if api is None:
        _check_free(target, args.force)
    model = find(args.what, args.storage)
    directory, stage = model.fetch(), model.name.partition(":")[2].partition("@")[0]
    run = collect(RunStore(args.storage, args.what.partition(":")[0]))

    def write(folder: Path) -> None:
        made, tokenizer = from_pretrained(directory), Tokenizer.load(directory)
        ends, temperature = (DOCUMENT_ENDS, 1.0) if stage == "base" else (ANSWER_ENDS, TEMPERATURE)
        export(made, tokenizer, folder, ends, TYPES[args.dtype], temperature)
        text = card(
            model.name, made.spec, args.dtype, until(run, stage), args.license, repository or f"./{target.name}"
        )
        (folder / CARD).write_text(text, encoding="utf-8")
        about = About(model=model.name, digest=model.digest, files=_hashes(folder))
        (folder / ABOUT).write_text(about.model_dump_json(indent=1) + "\n", encoding="utf-8")

    if api is not None and repository is not None:
        with scratch("export") as folder:
            write(folder)
            where = _upload(api, folder, repository, args.public, model.name)
    else:
        where = str(_write_whole(target, write))
    say(Terminal(), f"{model.name} in {args.dtype}: {where}")
    return 0


# --- the card ---


def until(run: RunFacts, stage: str) -> RunFacts:
    """What is known of a run once `stage` was evaluated, without paths of the machine it ran on."""
    last = STAGE_NAMES.index(f"evaluate_{stage}")
    stages = [facts for facts in run.stages if STAGE_NAMES.index(facts.name) <= last]
    return replace(run, stages=stages, config=_until(run.config, last) if run.config else None)


def _until(config: Config, last: int) -> Config:
    """The configuration with what was read up to the stage STAGE_NAMES[last], files by their names alone."""

    def named(place: str) -> str:
        return place if is_named(place) else place.rstrip("/").rpartition("/")[2]

    init, read = config.init, dict[str, Any](corpus=named(config.data.corpus))
    if init.source is not None:
        init = init.model_copy(update={"source": named(init.source)})
    for stage, parts in (("mid", config.data.mid), ("sft", config.data.sft)):
        there = parts if STAGE_NAMES.index(stage) <= last else {}
        read[stage] = {name: part.model_copy(update={"source": named(part.source)}) for name, part in there.items()}
    return config.model_copy(update={"init": init, "data": config.data.model_copy(update=read)})


def card(name: str, spec: ModelSpec, dtype: str, run: RunFacts, licence: str | None, place: str) -> str:
    """README.md of an export, as the hub reads it; `place` is where readers have the model, in their code."""
    base = name.partition(":")[2].startswith("base")
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fathom"]}
    if licence is not None:
        head["license"] = licence
    if datasets := _datasets(run.config):
        head["datasets"] = datasets
    begun = run.config.init.source if run.config else None
    if begun is not None and begun.startswith(HUB):
        head["base_model"] = begun.removeprefix(HUB)
    what = "goes on with text" if base else "answers in chats, and calls a calculator"
    unlicensed = "" if licence else " Who made it has named no licence for it."
    sections = [
        Section(
            "What it is",
            [
                Text(f"A language model that {what}, trained with Fathom: {name}, weights in {dtype}.{unlicensed}"),
                Table(["", ""], trained(run) or [["parameters", f"{spec.parameters:,}"]]),
            ],
        ),
        Section("How to load it", _uses(base, place)),
        Section("Evaluations", evaluations(run)),
        Section("Data", data(run)),
        Section("Limits", [Text("It says what is likely after all that it has read: neither truth nor kindness.")]),
    ]
    document = Document(place.rpartition("/")[2], f"{spec.parameters:,} parameters, {spec.family}", sections)
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{markdown(document)}"


def _datasets(config: Config | None) -> list[str]:
    """The hub's names of what the model has read."""
    if config is None:
        return []
    parts = [*config.data.mid.values(), *config.data.sft.values()]
    places = [part.source for part in parts] + ([config.data.corpus] if config.init.source is None else [])
    named = [f"hub:{CORPORA[place].hub}" if place in CORPORA else place for place in places]
    return sorted({re.split("[:@]", place)[1] for place in named if place.startswith("hub:")})


def _uses(base: bool, place: str) -> list[Block]:
    asked = '"Once upon a time"' if base else '[{"role": "user", "content": "Why is the sky blue?"}]'
    answer = "" if base else '[-1]["content"]'
    python = (
        f"from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", {json.dumps(place)})\n'
        f'print(generate({asked}, max_new_tokens=200)[0]["generated_text"]{answer})'
    )
    talk = f"fathom {'sample' if base else 'chat'} {shlex.quote(place if place.startswith('./') else f'hub:{place}')}"
    tool = (
        "A call of the calculator ends what it writes, until the caller has put in the result as a message of the role "
        "tool; fathom chat does that by itself."
    )
    return [Code(python, "In Python", "python"), Code(talk, "In a terminal", "sh"), *([] if base else [Text(tool)])]


# --- a folder ---


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _is_export(folder: Path) -> bool:
    """Whether all that is there is an export, as it was written."""
    try:
        about = About.model_validate_json((folder / ABOUT).read_bytes())
    except (OSError, ValidationError):
        return False
    found = _hashes(folder)
    return found.pop(ABOUT, None) is not None and found == about.files


def _check_free(target: Path, force: bool) -> None:
    """Raises ValueError where `target` must not be written to."""
    if not target.exists() or (target.is_dir() and (not any(target.iterdir()) or _is_export(target))):
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder")
    before = target.with_name(f"{target.name}.before")
    if not force:
        raise ValueError(
            f"{target} has other files than those of an export, or an export that was changed: name another folder, or "
            f"add --force, which moves them to {before}"
        )
    if before.exists():
        raise ValueError(f"{before} is there already, from an earlier --force: move it away")


def _write_whole(target: Path, write: Callable[[Path], None]) -> Path:
    """Has `write` make the folder `target`, which is there once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{target.name}{PARTIAL}"
    for left in [path for path in target.parent.iterdir() if path.name.startswith(hidden)]:
        owner = left.name.rpartition("-")[2]
        if not (owner.isdecimal() and psutil.pid_exists(int(owner))):  # it was killed
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f"{hidden}{os.getpid()}")
    partial.mkdir()
    try:
        write(partial)
        for path in partial.rglob("*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(partial)
        if target.exists() and any(target.iterdir()):
            earlier = _is_export(target)
            moved = target.rename(
                target.with_name(f"{hidden}old-{os.getpid()}" if earlier else f"{target.name}.before")
            )
            try:
                partial.rename(target)
            except OSError:
                moved.rename(target)
                raise
            if earlier:
                shutil.rmtree(moved)
        else:
            partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


# --- the hub ---


def _hub(repository: str, force: bool) -> HfApi:
    """What uploads to a repository of the hub. Raises ValueError where it could not, before anything is made."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"hub:{repository} names no repository: it is hub:OWNER/NAME")
    api = HfApi()
    with _told(repository):
        if get_token() is None:
            raise ValueError("there is no token")
        try:
            there = {*api.list_repo_files(repository)} - {ATTRIBUTES}
        except RepositoryNotFoundError:  # not made yet
            there = set()
    if there and ABOUT not in there and not force:
        raise ValueError(
            f"hub:{repository} has other files than those of an export: name another repository, or add --force, which "
            "replaces them (its history keeps them)"
        )
    return api


def _upload(api: HfApi, folder: Path, repository: str, public: bool, name: str) -> str:
    """Makes `folder` what the repository has, in one commit; where people find it. Raises ValueError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    with _told(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        gone = {*api.list_repo_files(repository)} - {ATTRIBUTES, *files}
        added = [CommitOperationAdd(file, folder / file) for file in files]
        removed = [CommitOperationDelete(file) for file in sorted(gone)]
        commit = api.create_commit(repository, [*added, *removed], commit_message=f"{name}, exported by Fathom")
    return str(commit.repo_url)


@contextlib.contextmanager
def _told(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"hub:{repository} cannot be written to: {' '.join(str(error).split())}; check the name and the network, "
            "and set HF_TOKEN to a token that may write there (or: hf auth login)"
        ) from error


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["export", *sys.argv[1:]]))
