"""A model's own chat format, read from its Jinja template: how a turn begins, and what ends what the assistant says.

The template never sees what is said. It is given places, which the texts are put into once it is done: so no text can
change the format, and what the template writes is told apart from texts, in which a special token spelled out is text.
Calls of the calculator and their results stand in the assistant's text, between four tokens that are added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from corpus.left_out import UnusableError

if TYPE_CHECKING:
    from corpus.tokenizers import Tokenizer

CALL, RESULT = ("<|python_start|>", "<|python_end|>"), ("<|output_start|>", "<|output_end|>")
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around the number of a place; noncharacters, of which no template has any
PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")

Turns = Sequence[tuple[str, list[tuple[str, str]]]]  # of each turn the role, and (type, text) of its parts


class NoFormatError(ValueError):
    """A template whose turns cannot be told apart."""


@dataclass(frozen=True)
class OwnChat:
    """`names` has the tokens that the template knows by names (bos_token), `today` the day that it takes for today,
    `header` what it writes before the assistant speaks, `end` the special token that ends what the assistant says."""

    template: str
    names: dict[str, str]
    today: str
    header: str = ""
    end: str = ""

    @staticmethod
    def of(template: str, names: dict[str, str], special: Sequence[str]) -> OwnChat:
        """Raises NoFormatError where the template's turns cannot be told apart."""
        chat = OwnChat(template, names, date.today().isoformat())
        turns = [(role, [("text", role)]) for role in ("user", "assistant") * 2]
        try:
            asked, prompt = (chat._render(turns[:1], go_on)[0] for go_on in (False, True))
            whole, _, places = chat._render(turns, False)
        except UnusableError as error:
            raise NoFormatError(str(error)) from error
        if not prompt.startswith(asked):
            raise NoFormatError("what it writes before an answer is not what follows the question")
        found, any_token = list(PLACE.finditer(whole)), "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        ends = [re.search(any_token, whole[found[place].end() :]) for (place,) in places[1::2]]
        names_of_ends = {end[0] for end in ends if end is not None}
        if None in ends or len(names_of_ends) != 1:
            raise NoFormatError("no special token ends what the assistant says")
        chat = OwnChat(template, names, chat.today, prompt[len(asked) :], names_of_ends.pop())
        try:
            chat._regions(whole, places, [role for role, _ in turns])
        except UnusableError as error:
            raise NoFormatError(str(error)) from error
        return chat

    def conversation(self, turns: Turns, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Ids and loss mask, which is 1 on what the assistant writes: text, calls, and what ends it."""
        whole, texts, places = self._render(turns, False)
        return self._encode(whole, texts, self._regions(whole, places, [role for role, _ in turns]), tokenizer)

    def prompt(self, turns: Turns, tokenizer: Tokenizer, unfinished: bool) -> list[int]:
        """Ids up to where the assistant speaks; `unfinished` says that the last turn, its own, goes on after a result
        of the calculator."""
        whole, texts, places = self._render(turns, not unfinished)
        regions = self._regions(whole, places, [role for role, _ in turns])
        if unfinished:
            whole = whole[: whole.rindex(RESULT[1]) + len(RESULT[1])]
        return self._encode(whole, texts, [(a, min(b, len(whole))) for a, b in regions], tokenizer)[0]

    @cached_property
    def _program(self) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template  # runs it in Jinja's sandbox

        day = date.fromisoformat(self.today)
        return partial(render_jinja_template, chat_template=self.template, strftime_now=day.strftime, **self.names)

    def _render(self, turns: Turns, go_on: bool) -> tuple[str, list[str], list[list[int]]]:
        """What the template writes, with a place for each text; the texts; and the places of each turn."""
        texts: list[str] = []
        places: list[list[int]] = []

        def place(text: str) -> str:
            core = text.strip()  # a template may take away what is around it
            if not core:
                return text
            texts.append(core)
            places[-1].append(len(texts) - 1)
            return text.replace(core, f"{OPEN}{len(texts) - 1}{CLOSE}")

        messages = []
        for role, parts in turns:
            places.append([])
            marks = {"text": ("", ""), "python": CALL, "python_output": RESULT}
            said = [place(text).join(marks[kind]) for kind, text in parts]
            messages.append({"role": role, "content": "".join(said)})
        try:
            [whole], _ = self._program([messages], add_generation_prompt=go_on)
        except Exception as error:  # a template is a program, and raises what it likes
            raise UnusableError("template", f"the model's chat template refuses it: {error}") from error
        if [int(match[1]) for match in PLACE.finditer(whole)] != [*range(len(texts))]:
            raise UnusableError("template", "the model's chat template leaves a message out, or takes it apart")
        return whole, texts, places

    def _regions(self, whole: str, places: list[list[int]], roles: Sequence[str]) -> list[tuple[int, int]]:
        """Where what the assistant writes begins and ends; in a turn of nothing but white space that is nowhere."""
        found, regions = list(PLACE.finditer(whole)), []
        for of_turn, role in zip(places, roles, strict=True):
            if role != "assistant" or not of_turn:
                continue
            before = found[of_turn[0] - 1].end() if of_turn[0] else 0
            first, last = found[of_turn[0]].start(), found[of_turn[-1]].end()
            at, end = whole.rfind(self.header, before, first), whole.find(self.end, last)
            if at < 0 or end < 0:
                raise UnusableError("template", "the model's chat template writes no turn as it writes others")
            start = at + len(self.header)
            regions.append((start - len(CALL[0]) * (whole[:start].endswith(CALL[0])), end + len(self.end)))
        return regions

    @staticmethod
    def _encode(
        whole: str, texts: list[str], regions: list[tuple[int, int]], tokenizer: Tokenizer
    ) -> tuple[list[int], list[int]]:
        """Special tokens are those that the template wrote, or that stand around a call; what is between two of them is
        encoded at once, except where a prompt ends."""
        ids: list[int] = []
        mask: list[int] = []

        def add(new: list[int], written: bool) -> None:
            ids.extend(new)
            mask.extend([int(written)] * len(new))

        bounds = [0, *(bound for region in regions for bound in region), len(whole)]
        for n, (start, stop) in enumerate(pairwise(bounds)):
            written, text, put_in = n % 2 == 1, "", False
            for part in tokenizer.special_or_place.split(whole[start:stop]):
                if (place := PLACE.fullmatch(part)) is not None:
                    text += texts[int(place[1])]
                elif part in tokenizer.special_ids:
                    put_in = put_in or part == RESULT[0]
                    add(tokenizer.encode(text), written and not (put_in and part == RESULT[1]))
                    add([tokenizer.special_ids[part]], written and not put_in)
                    put_in, text = put_in and part != RESULT[1], ""
                else:
                    text += part
            add(tokenizer.encode(text), written)
        return ids, mask
