"""The model that a command's WHAT names: RUN (its last model), RUN:STAGE, RUN:STAGE@STEP (a checkpoint), a Hugging Face
directory, or hub:REPO."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster import hub
from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.scratch import cache_folder, scratch
from cluster.storage import Storage, StorageError, checksum
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, Tokenizer
from pipeline.artifacts import EVALUATIONS, RunStore
from stages.config import ModelConfig

MODELS = ("rl", "sft", "mid", "base")  # the stages that make a model, the last one first


@dataclass(frozen=True)
class Model:
    """`fetch` brings its directory to a machine, `digest` changes with its weights."""

    name: str
    fetch: Callable[[], Path]
    digest: str


def find(what: str, storage: str) -> Model:
    """The model that WHAT names. Raises FileNotFoundError or ValueError."""
    if what.startswith(hub.HUB):
        return _of_hub(what)
    if not is_run(what):
        return _of_directory(what, Path(what).expanduser().resolve())
    run, _, stage = what.partition(":")
    stage, _, step = stage.partition("@")
    store = RunStore(storage, run)
    if not store.storage.list():
        raise FileNotFoundError(
            f"no run {run!r} in {Storage(storage).uri}; runs elsewhere need --storage, a directory is named with a "
            f"slash, such as ./{run}, and a model of the hub as hub:OWNER/NAME"
        )
    if stage and stage not in MODELS:
        raise ValueError(f"{what}: {stage} makes no model; the stages that do are {', '.join(reversed(MODELS))}")
    if step:
        return _of_checkpoint(what, store, stage, step)
    for name in (stage,) if stage else MODELS:
        made = manifests.read(store.stage(name))
        if made is not None:
            return Model(what if stage else f"{run}:{name}", partial(manifests.fetch, store.stage(name)), made.digest())
    wanted = stage or "base"
    raise FileNotFoundError(f"run {run} has no finished {wanted}; `fathom status {run}` shows what it has")


def is_run(what: str) -> bool:
    return not what.startswith(hub.HUB) and "/" not in what


def _of_directory(name: str, directory: Path) -> Model:
    if not directory.is_dir():
        raise FileNotFoundError(f"{name}: there is no such directory")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no Hugging Face model: it has no config.json")
    files = sorted(path for path in directory.iterdir() if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([str(directory), stamps]).encode()).hexdigest()
    return Model(name, lambda: directory, digest)


def _of_hub(what: str) -> Model:
    commit = hub.fetch(what).name  # every machine takes the same
    return Model(what, partial(hub.fetch, what, commit), commit)


def _of_checkpoint(what: str, store: RunStore, stage: str, step: str) -> Model:
    there = manifests.checkpoints(store.stage(stage))
    place = next((place for number, place in there if str(number) == step), None)
    saved = manifests.read(place) if place is not None else None
    config = store.recorded()
    if place is None or saved is None or config is None:
        steps = ", ".join(str(number) for number, _ in there) or "none"
        raise FileNotFoundError(
            f"{what}: there is no such checkpoint; {stage} has those of steps: {steps}. A finished stage keeps none: "
            f"name {store.run}:{stage}"
        )
    fetch = partial(_exported, place, saved.digest(), store.stage("tokenizer"), config.model, stage)
    return Model(what, fetch, saved.digest())


def _exported(place: Storage, digest: str, tokenizer_at: Storage, shape: ModelConfig, stage: str) -> Path:
    """The checkpoint at `place`, whose content is `digest`, as a directory of this machine. That is an artifact of its
    own in the cache, so what a crash or a disk left damaged is noticed, and made again."""
    tokenized = manifests.read(tokenizer_at)
    of_tokenizer = tokenized.digest() if tokenized is not None else ""
    made_of = {"checkpoint": digest, "tokenizer": of_tokenizer, "model": shape.identity(), "stage": stage}
    made = Storage(cache_folder() / "checkpoints" / checksum(made_of)[:24])
    with contextlib.suppress(StorageError):  # not made yet, or damaged
        directory = manifests.fetch(made)
        os.utime(directory)  # in use
        return directory
    from stages.training.state import export_checkpoint  # torch.distributed, which nothing else here needs

    tokenizer = Tokenizer.load(manifests.fetch(tokenizer_at))
    with scratch("evaluate") as exported:
        ends = DOCUMENT_ENDS if stage == "base" else ANSWER_ENDS
        export_checkpoint(place, shape.spec(tokenizer.vocab_size), tokenizer, exported, ends)
        manifests.write(made, Manifest(EVALUATIONS, stage, made.upload_tree(exported)))
    return manifests.fetch(made)
