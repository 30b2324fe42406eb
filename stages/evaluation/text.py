"""What is asked of a model's tokenizer, whoever made the model: `tasks.ranking.Text` of a model's directory, and how
the model answers in a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from corpus.conversation import render_prompt
from corpus.tokenizers import ANSWER_ENDS, META_FILE, Tokenizer, UnknownCharacterError
from models.generate import Turns
from tasks.base import Tool
from tasks.ranking import Text

Tools = Mapping[str, Tool]


class Chat(Text, Protocol):
    def decode(self, ids: Sequence[int]) -> str:
        """An answer as text."""

    def turns(self, tools: Tools) -> Turns:
        """The turns of a conversation in which the model may call the tool `python`; none where `tools` lacks it, or
        the model's maker has taught it other calls."""


def open_text(directory: Path) -> Chat:
    """Of a model made here, else of any Hugging Face directory. FileNotFoundError where there is no tokenizer."""
    if (directory / META_FILE).is_file():
        return Ours(Tokenizer.load(directory))
    return _Theirs(directory)


class Ours:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        return render_prompt(messages, self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def turns(self, tools: Tools) -> Turns:
        special, tool = self.tokenizer.special, tools.get("python")

        def answer(call: list[int]) -> list[int]:
            result = tool(self.decode(call)) if tool else None
            if result is None:  # nothing that the tool understands; the model goes on without a result
                return []
            try:
                return [special("<|output_start|>"), *self.encode(result), special("<|output_end|>")]
            except UnknownCharacterError:  # `chars` may lack the point of 1/3, which is as good as no result
                return []

        call = (special("<|python_start|>"), special("<|python_end|>")) if tool else None
        return Turns(tuple(self.tokenizer.ids(ANSWER_ENDS[0])), call, answer)


class _Theirs:
    """transformers' tokenizer; a text begins with its bos, or with its eos where, as for GPT-2, that parts texts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        from transformers import AutoTokenizer  # seconds, which a model made here does not need

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            why = "" if self.encode("a") else "it makes nothing of a text"  # as where transformers found no vocabulary
        except Exception as error:  # of every kind, for files that are not what transformers takes them for
            why = (str(error) or type(error).__name__).splitlines()[0]
        if why:
            raise FileNotFoundError(
                f"{directory} has no tokenizer that transformers can read ({why}); put tokenizer.json and "
                "tokenizer_config.json of the model beside its weights"
            )

    @cached_property
    def bos(self) -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the model's tokenizer has neither a bos nor an eos token, of which one begins every text")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise ValueError(
                "the model's tokenizer has no chat template, so it cannot be asked in a chat; a base model is measured "
                "with --tasks core or --tasks perplexity"
            )
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"the chat template of the model's tokenizer fails: {error}") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def turns(self, tools: Tools) -> Turns:
        from transformers import GenerationConfig

        try:
            ends = GenerationConfig.from_pretrained(self._directory, local_files_only=True).eos_token_id
        except OSError:  # no generation_config.json
            ends = None
        ends = [ends] if isinstance(ends, int) else ends or []
        return Turns(tuple({*ends, self._tokenizer.eos_token_id} - {None}), None, lambda call: [])
