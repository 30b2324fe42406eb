"""Begin from a model that exists: what the tokenizer and base stages do where `--init` names one.

They make what they make of a corpus, so all stages after them are the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import hub
from corpus.conversation import render, render_prompt
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, META_FILE, SPECIAL_TOKENS, Tokenizer
from models.hf import check_weights, grown, read_spec
from models.spec import ModelSpec
from stages.config import InitConfig
from stages.context import StageContext
from stages.training.state import export

BLOCKS, BLOCK_BYTES, MOST_HEAD = 64, 4_096, 100 << 20  # of a file of weights, that its digest is of
# What a model's own chat format is tried with: transformers must give the same ids.
TRIED: tuple[dict[str, str], ...] = (
    {"role": "user", "content": "Wie groß ist\n\n 12 * 7?"},
    {"role": "assistant", "content": "It's 84: $\\pi$ \U0001f600"},
    {"role": "user", "content": "  Why? "},
    {"role": "assistant", "content": "def f():\n    return 12*7"},
)


@dataclass(frozen=True)
class Found:
    """A model to begin from: its shape with the vocabulary it will have, the commit of one of the hub, the digest of a
    directory, and whether it has learned a chat format that is kept."""

    spec: ModelSpec
    revision: str | None
    digest: str | None
    chats: bool


def look(config: InitConfig) -> Found:
    """What can be known of the model without its weights. Raises ValueError or OSError where it cannot be used."""
    assert config.source is not None
    of_hub = config.source.startswith(hub.HUB)
    directory = hub.fetch(config.source, weights=False) if of_hub else Path(config.source)
    if not directory.is_dir():
        raise FileNotFoundError("there is no such directory; a model of the hub is named hub:OWNER/NAME")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError("it is no Hugging Face model, as it has no config.json")
    spec = read_spec(directory)
    tokenizer = Tokenizer.of_model(directory, spec.vocab_size, config.own_chat)
    if not of_hub:
        _check_safetensors(directory)
        check_weights(directory)
    try:
        ends = json.loads((directory / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        ends = None
    learned = {ends} if isinstance(ends, int) else {*(ends or [])}
    return Found(
        replace(spec, vocab_size=max(spec.vocab_size, tokenizer.vocab_size)),
        directory.name if of_hub else None,
        None if of_hub else digest_of(directory),
        tokenizer.own is not None or tokenizer.special(ANSWER_ENDS[0]) in learned,
    )


def directory_of(config: InitConfig) -> Path:
    """The model's directory on this machine, with its weights. Raises ValueError where it is not what it was."""
    assert config.source is not None
    if config.source.startswith(hub.HUB):
        directory = hub.fetch(config.source, config.revision)
    else:
        directory = Path(config.source)
        if not directory.is_dir():
            raise FileNotFoundError(f"--init {config.source} is not on this machine, where it is needed now")
        if config.digest is not None and digest_of(directory) != config.digest:
            raise ValueError(
                f"--init {config.source} is not what it was where the run was started: all machines need the same, and "
                "it must not change before base is done"
            )
    _check_safetensors(directory)
    return directory


def make_tokenizer(context: StageContext, config: InitConfig) -> None:
    """The model's own tokenizer, with the tokens of our chat format where it has none of its own."""
    began, directory = time.monotonic(), directory_of(config)
    tokenizer = Tokenizer.of_model(directory, read_spec(directory).vocab_size, config.own_chat)
    with context.scratch() as made:
        tokenizer.save(made)
        if tokenizer.own is not None:
            check_chat(tokenizer, made)
        context.publish(made, {"vocab_size": tokenizer.vocab_size}, time.monotonic() - began)


def check_chat(tokenizer: Tokenizer, directory: Path) -> None:
    """Raises ValueError where transformers, with the tokenizer saved in `directory`, writes a chat otherwise."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for go_on in (False, True):
        chat: list[dict[str, Any]] = [*TRIED[: 3 if go_on else 4]]
        ids = theirs.apply_chat_template(chat, add_generation_prompt=go_on, return_dict=False)
        if go_on:
            ours = render_prompt(chat, tokenizer)
        else:
            ours = render({"messages": chat}, tokenizer, len(ids) + 1)[0].tolist()
        if ours != ids[: len(ours)] or (go_on and len(ours) != len(ids)):
            raise ValueError(
                "the model's chat template cannot be followed, as transformers reads what it writes otherwise: take "
                "our format in its place with --set init.own_chat=false"
            )


def make_base(context: StageContext, config: InitConfig, sequence_len: int) -> None:
    """The model's weights in our layout, with rows for the tokens that are new to it."""
    began, directory = time.monotonic(), directory_of(config)
    tokenizer, theirs = Tokenizer.load(context.fetch("tokenizer")), read_spec(directory)
    size = max(theirs.vocab_size, tokenizer.vocab_size)
    spec = replace(theirs, vocab_size=size, sequence_len=min(sequence_len, theirs.places), positions=theirs.places)
    ours = (directory / META_FILE).is_file()  # which knows all tokens
    names = [] if ours else [n for n in SPECIAL_TOKENS if n in tokenizer.special_ids and n not in tokenizer.aliases]
    added = [tokenizer.special(name) for name in names]
    model = grown(directory, spec, added)
    figures = {"parameters": spec.parameters, "new_tokens": len(added)}
    with context.scratch(4 * spec.parameters) as made:
        export(model, tokenizer, made, DOCUMENT_ENDS)
        context.publish(made, figures, time.monotonic() - began)


def _check_safetensors(directory: Path) -> None:
    """Raises ValueError for a model that has no weights, or has them as pickles only."""
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for kind in ("bin", "pt", "pth", "ckpt") for path in directory.glob(f"*.{kind}"))
    if pickles:
        raise ValueError(
            f"{directory} has its weights as {pickles[0]} only, a pickle, which can run any code as it is read: take a "
            "revision with model.safetensors, or, where you trust who made it, have transformers write one: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{directory} has no weights: put model.safetensors, or all of its shards, beside config.json")


def digest_of(directory: Path) -> str:
    """SHA-256 over what a model is read from: small files as a whole, of weights the size, the head and BLOCKS blocks,
    as reading all would take minutes."""
    digest = hashlib.sha256()
    kinds = (*hub.SMALL_FILES, *hub.WEIGHTS)
    for path in sorted({path for kind in kinds for path in directory.glob(kind)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for part in _parts(path):
            digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    if path.suffix != ".safetensors":
        yield path.read_bytes()
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        yield head + file.read(min(int.from_bytes(head, "little"), MOST_HEAD))
        for block in range(BLOCKS):
            file.seek(block * max(0, size - BLOCK_BYTES) // max(1, BLOCKS - 1))
            yield file.read(BLOCK_BYTES)
