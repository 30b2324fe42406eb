"""Chats as token ids. Special tokens mark who speaks; the loss mask marks what the model itself has to say.

A conversation is `{"messages": [{"role", "content"}]}` with the roles system, user, assistant and tool. The content is
a string or a list of `{"type": "text" | "python" | "python_output", "text"}`: a call of the calculator and its result.
A message of the role tool is such a result too: it stands in the turn of the assistant that called, which then goes on.
`tool_calls` of the calculator, as in OpenAI's API, are calls too; of any other tool they make a message malformed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import reprlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from corpus.chat_template import CALCULATORS
from corpus.left_out import UnusableError
from corpus.own_chat import OwnChat
from corpus.tokenizers import Tokenizer

_ROLES = ("system", "user", "assistant", "tool")
# part type: (opening token, closing token, does the model write it)
_PARTS = {
    "text": (None, None, True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
# what ShareGPT calls the roles
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """A conversation from a row; else UnusableError naming the keys that the row has.

    The row has `messages`, or `conversations` of `from` and `value` (ShareGPT), or `prompt` and `response`.
    """
    if isinstance(record.get("messages"), list):
        return {"messages": record["messages"]}
    if isinstance(record.get("conversations"), list):
        return {"messages": [_from_sharegpt(message) for message in record["conversations"]]}
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        user, assistant = record["prompt"], record["response"]
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
    keys = ", ".join(f"{name} ({type(record[name]).__name__})" for name in sorted(record, key=str)) or "no keys"
    raise UnusableError(
        "no_conversation",
        f"not a conversation: the row has {keys}; it needs `messages` or `conversations`, lists, or `prompt` and "
        "`response`, texts",
    )


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = message["from"]
    return {"role": _SHAREGPT_ROLES.get(str(role), role), "content": message.get("value")}


def render(conversation: dict[str, Any], tokenizer: Tokenizer, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n,) int64 and loss mask (n,) uint8, n <= max_len.

    The mask is 1 on what the assistant writes (text, calls, `<|assistant_end|>`), 0 on everything it is given.
    Later exchanges that do not fit are dropped whole.
    Raises UnusableError where not even the first one fits, on a malformed message, and where the assistant says nothing
    or has a message that says nothing.
    """
    for role, parts in map(_checked, conversation["messages"]):
        if role == "assistant" and not any(part["text"].strip() for part in parts):
            raise UnusableError("empty_answer", "a message of the assistant is empty")
    turns = _turns(conversation["messages"], tokenizer.own is not None)
    if not any(role == "assistant" for role, _ in turns):
        raise UnusableError("no_answer", "no message is of the assistant")
    for role, parts in turns:
        _check_calls([part["type"] for part in parts] if role == "assistant" else [])
    if tokenizer.own is not None:
        return _render_own(turns, tokenizer, tokenizer.own, max_len)
    ids, mask, kept = [tokenizer.bos], [0], 0
    for role, parts in turns:
        turn_ids, turn_mask = _render_turn(role, parts, tokenizer)
        ids += turn_ids
        mask += turn_mask
        if len(ids) > max_len:
            break
        if role == "assistant":
            kept = len(ids)
    if not kept:
        raise _too_long(max_len)
    return np.array(ids[:kept], dtype=np.int64), np.array(mask[:kept], dtype=np.uint8)


def _too_long(max_len: int) -> UnusableError:
    return UnusableError("too_long", f"the first exchange has more than {max_len} tokens")


def _render_own(
    turns: list[tuple[str, list[dict[str, str]]]], tokenizer: Tokenizer, own: OwnChat, max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """`render` in a model's own format, in which a turn may be written otherwise where another follows: so it is
    written anew without the exchanges that do not fit."""
    for last in reversed([i for i, (role, _) in enumerate(turns) if role == "assistant"]):
        ids, mask = own.conversation(_typed(turns[: last + 1]), tokenizer)
        if len(ids) <= max_len:
            return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.uint8)
    raise _too_long(max_len)


def _typed(turns: list[tuple[str, list[dict[str, str]]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(role, list(_joined(parts))) for role, parts in turns]


def _check_calls(kinds: list[str]) -> None:
    """Raises UnusableError for the parts of a turn in which a result has no call, or that ends in a call."""
    if any(kind == "python_output" and before != "python" for before, kind in zip(["", *kinds], kinds, strict=False)):
        raise UnusableError("no_call", "a tool's result follows no call")
    if kinds and kinds[-1] == "python":
        raise UnusableError("no_result", "the assistant's turn ends in a call without a result")


def texts(conversation: dict[str, Any]) -> list[str]:
    """All that is said in it. Raises UnusableError as `render` does for a malformed message."""
    return [part["text"] for _, parts in _turns(conversation["messages"]) for part in parts]


def answers(conversation: dict[str, Any]) -> int:
    """How many turns the assistant has."""
    return sum(role == "assistant" for role, _ in _turns(conversation["messages"]))


def render_prompt(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Ids of the messages up to where the model writes on: after `<|assistant_start|>`, or after a tool's result."""
    turns = _turns(messages, tokenizer.own is not None)
    unfinished = messages[-1]["role"] == "tool"
    if tokenizer.own is not None:
        return tokenizer.own.prompt(_typed(turns), tokenizer, unfinished)
    ids = [tokenizer.bos]
    for role, parts in turns:
        ids += _render_turn(role, parts, tokenizer)[0]
    if unfinished:
        return ids[:-1]  # the turn is not over
    return [*ids, tokenizer.special("<|assistant_start|>")]


def _turns(messages: list[dict[str, Any]], apart: bool = False) -> list[tuple[str, list[dict[str, str]]]]:
    """(role, parts) a turn of the user or the assistant.

    A tool's result becomes a part of the assistant's turn, and a system message the head of the user message after it,
    or `apart` a turn of its own.
    """
    turns: list[tuple[str, list[dict[str, str]]]] = []
    system, previous = "", ""
    for message in messages:
        role, parts = _checked(message)
        text = "".join(part["text"] for part in parts)
        if role == "system" and apart:
            turns.append((role, [{"type": "text", "text": text}]))
        elif role == "system":
            system += text + "\n\n"
        elif role == "user":
            turns.append((role, [{"type": "text", "text": system + text}]))
            system = ""
        elif role == "tool":
            if previous not in ("assistant", "tool"):
                raise UnusableError("malformed", "a message of the role tool follows none of the assistant")
            turns[-1][1].append({"type": "python_output", "text": text})
        elif previous == "tool":
            turns[-1][1].extend(parts)
        else:
            turns.append((role, [*parts]))
        previous = role
    if system:
        raise UnusableError("malformed", "a system message is followed by none of the user")
    if not turns:
        raise UnusableError("malformed", "there are no messages")
    return turns


def _checked(message: Any) -> tuple[str, list[dict[str, str]]]:
    """Role and parts of a message."""
    if not isinstance(message, dict):
        said = f"a message must be an object with role and content, got {reprlib.repr(message)}"
        raise UnusableError("malformed", said)
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls") or []
    if message.get("function_call"):
        raise UnusableError("other_tool", "a message has a `function_call`; calls stand in `tool_calls`")
    if not isinstance(calls, list) or len(calls) > (role == "assistant"):  # a result follows before the next call
        raise UnusableError(
            "malformed",
            f"a message of the role {reprlib.repr(role)} has the tool_calls {reprlib.repr(calls)}; one of the "
            "assistant has one at most, as a list",
        )
    if calls and content is None:
        content = []
    if role not in _ROLES:
        said = f"a message has the role {reprlib.repr(role)}; the roles are {', '.join(_ROLES)}"
        raise UnusableError("malformed", said)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
        found = reprlib.repr(content)
        said = f"a message's content is neither text nor parts of {', '.join(_PARTS)}: {found}"
        raise UnusableError("malformed", said)
    return role, [*parts, *map(_from_tool_call, calls)]


def _from_tool_call(call: Any) -> dict[str, str]:
    """The part that says the same as one of OpenAI's tool calls."""
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, dict) else (None, "")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if name not in CALCULATORS or len(values) != 1 or not isinstance(values[0], str):
        raise UnusableError(
            "other_tool",
            f"a message calls {reprlib.repr(name)} with {reprlib.repr(arguments)}; the only tool here is the "
            f"calculator ({', '.join(CALCULATORS)}), with one string",
        )
    return {"type": "python", "text": values[0]}


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")) in _PARTS and isinstance(part.get("text"), str)


def _render_turn(role: str, parts: list[dict[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids, mask = [tokenizer.special(f"<|{role}_start|>")], [0]
    written = role == "assistant"
    for kind, text in _joined(parts):
        opening, closing, by_model = _PARTS[kind]
        piece = tokenizer.encode(text)
        if opening and closing:
            piece = [tokenizer.special(opening), *piece, tokenizer.special(closing)]
        ids += piece
        mask += [int(written and by_model)] * len(piece)
    return [*ids, tokenizer.special(f"<|{role}_end|>")], [*mask, int(written)]


def _joined(parts: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """(type, text) of each part. Texts with nothing between them are one, as they are in a template's output."""
    for kind, same in itertools.groupby(parts, key=lambda part: part["type"]):
        texts = [part["text"] for part in same]
        yield from ((kind, text) for text in (["".join(texts)] if kind == "text" else texts))
