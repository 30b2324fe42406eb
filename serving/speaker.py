"""A model that answers in this process, token by token: in a chat, where it may call the calculator, and by going on
with a text. Without Ray, so that the first answer is there within seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError

from models.generate import Engine, Sampling, TorchEngine, Turns, complete
from models.hf import read_spec
from models.vllm_engine import GPU_ENV, VLLMEngine
from stages.evaluation.text import Chat, open_text
from tasks.base import NumberProblems

TEMPERATURE = 0.7  # of a chat, unless another is asked for
ROOM = 4  # a chat's answer has at least this part of the context for itself

Message = dict[str, Any]
Say = Callable[
    [str, str], None
]  # told the type of a part, and a piece of its text; of a call or a result first an empty one


class StoppedError(Exception):
    """Raised by who is told of an answer, to end it; what was said until then is the answer."""


def open_engine(directory: Path, wanted: str) -> Engine:
    """vLLM where there is a GPU and it is installed, else plain torch; `wanted` is one of these, or auto.

    Changes this process's environment where that is vLLM. ValueError where vLLM is wanted and cannot be had.
    """
    on_gpu, installed = torch.cuda.is_available(), importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not (on_gpu and installed):
        raise ValueError(
            f"--engine vllm: {'vLLM is not installed' if on_gpu else 'there is no GPU here'}; take --engine torch"
        )
    if on_gpu and installed and wanted != "torch":
        os.environ.update(GPU_ENV)
        return VLLMEngine(directory, on_gpu=True, shared=False)
    return TorchEngine(directory, on_gpu)


class Voice:
    """How the model in `directory` is spoken to: its tokenizer, its turns, what ends what it writes, and how it is
    sampled where nobody says. `context` is in tokens."""

    def __init__(self, directory: Path) -> None:
        self.text = open_text(directory)
        self.turns = self.text.turns(NumberProblems.tools)
        spec = read_spec(directory)
        self.context, self.vocab_size = spec.sequence_len, spec.vocab_size
        generation = _generation(directory / "generation_config.json")
        ends = generation.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        self.sampling = Sampling(generation.temperature, generation.top_p)

    def encoded(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text to go on with; a list of tokens is such a text already. ValueError for what this model
        has no tokens for."""
        if isinstance(prompt, str):
            return [self.text.bos, *self.text.encode(prompt)]
        if max(prompt) >= self.vocab_size:
            raise ValueError(f"the tokens of this model go from 0 to {self.vocab_size - 1}, and {max(prompt)} is none")
        return prompt

    @cached_property
    def chats(self) -> bool:
        """Whether it has learned to end a turn, as a model of base has not."""
        with suppress(ValueError):
            self.text.prompt([{"role": "user", "content": ""}])
            return not self.ends or not self.ends.isdisjoint(self.turns.ends)
        return False

    @property
    def calculates(self) -> bool:
        """Whether it has learned to call the calculator."""
        return self.chats and self.turns.call is not None


class Speaker(Voice):
    """The model in `directory`, run by `engine`."""

    def __init__(self, directory: Path, engine: Engine) -> None:
        super().__init__(directory)
        self.engine = engine

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, seed: int, say: Say
    ) -> tuple[list[dict[str, str]], int]:
        """The parts of what the assistant says next, and how many of the first messages were left out, as the context
        has no room for them. `messages` end with one of the user; a temperature of 0 is greedy.

        A part is of the type text, python (a call of the calculator) or python_output (its result), as in
        `corpus.conversation`; `say` is given pieces of text with the type of their part. ValueError where not even the
        last message leaves room, or where the model's tokenizer cannot write it.
        """
        first = 0
        while len(prompt := self.text.prompt([*messages[first:]])) > self.context - max(1, self.context // ROOM):
            later = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
            if not later:
                raise ValueError(
                    f"this message has {len(prompt):,} tokens with what goes with it, and the context of "
                    f"{self.context:,} keeps {self.context // ROOM:,} for the answer: say it in fewer words"
                )
            first = later[0]
        parts = Parts(self.text, self.turns, say)
        with suppress(StoppedError):
            self._complete(self.turns, prompt, sampling, seed, self.context, [parts])
        with suppress(StoppedError):
            parts.end()
        while parts.parts and parts.parts[-1]["type"] == "python":  # cut off before it had a result
            parts.parts.pop()
        return parts.parts, first

    def go_on(
        self, text: str, samples: int, sampling: Sampling, seed: int, max_tokens: int, say: Callable[[str], None]
    ) -> list[str]:
        """How the model goes on with `text`, `samples` times; `say` is given pieces of the first one as it comes.
        ValueError where the context has no room."""
        prompt = self.encoded(text)
        if len(prompt) >= self.context:
            raise ValueError(f"the text has {len(prompt):,} tokens, and the context of the model is {self.context:,}")
        turns = Turns(tuple({*self.ends, *self.turns.ends, self.text.bos}), None, lambda call: [])
        several = [Parts(self.text, turns, lambda kind, piece: None) for _ in range(samples)]
        several[0].say = lambda kind, piece: say(piece)
        self._complete(turns, prompt, sampling, seed, max_tokens, several)
        for parts in several:
            parts.end()
        return ["".join(part["text"] for part in parts.parts) for parts in several]

    def _complete(
        self, turns: Turns, prompt: list[int], sampling: Sampling, seed: int, most: int, several: list[Parts]
    ) -> None:
        def watch(number: int, tokens: list[int], sampled: bool) -> None:
            several[number].add(tokens, sampled)

        asked = ([prompt], [(seed,)], len(several), most, self.context, sampling.temperature == 0)
        complete(self.engine.sampler, turns, *asked, sampling, watch)


class _Generation(BaseModel):
    eos_token_id: int | list[int] | None = None
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


def _generation(path: Path) -> _Generation:
    """What a model's generation_config.json says; nothing where there is no such file."""
    try:
        return _Generation.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Generation()
    except ValidationError as error:
        raise ValueError(f"{path} does not say what ends a text and how it is sampled; get it again") from error


class Parts:
    """An answer's tokens as they come, as parts of text. `say` is given what is new of a part once its letters are
    whole: a token may hold some of a letter's bytes."""

    def __init__(self, text: Chat, turns: Turns, say: Say) -> None:
        self.text, self.turns, self.say = text, turns, say
        self.parts: list[dict[str, str]] = []
        # Of the part under way, what was shown is of the tokens before `_shown`; those from `_start` on are decoded, as
        # a token's text may depend on the one before it.
        self.kind, self._ids = "text", list[int]()
        self._start = self._shown = 0

    def add(self, tokens: list[int], sampled: bool) -> None:
        if not sampled:  # a tool's result, between its two marks
            self._begin("python_output")
            self._token(*tokens[1:-1])
            self._begin("text")
            return
        for token in tokens:
            if token in self.turns.ends:
                self.end()
            elif self.turns.call is not None and token in self.turns.call:
                self._begin("python" if token == self.turns.call[0] else "text")
            else:
                self._token(token)

    def end(self) -> None:
        """Says what is left, whole letters or not."""
        new = self._unshown()
        self._ids, self._start, self._shown = [], 0, 0
        self._show(new)

    def _begin(self, kind: str) -> None:
        self.end()
        self.kind = kind
        if kind != "text":
            self.parts.append({"type": kind, "text": ""})
            self.say(kind, "")

    def _token(self, *tokens: int) -> None:
        for token in tokens:
            self._ids.append(token)
            new = self._unshown()
            if not new.endswith("\ufffd"):
                self._start, self._shown = self._shown, len(self._ids)
                self._show(new)

    def _unshown(self) -> str:
        before = self.text.decode(self._ids[self._start : self._shown])
        return self.text.decode(self._ids[self._start :])[len(before) :]

    def _show(self, new: str) -> None:
        if not new:
            return
        if not self.parts or self.parts[-1]["type"] != self.kind:
            self.parts.append({"type": self.kind, "text": ""})
        self.parts[-1]["text"] += new
        self.say(self.kind, new)
