"""A chat in which the server itself computes what the model asks of the calculator, and the model goes on.

It asks the engine as a client with tools would, one request after each call, until the turn is over. What was computed
stands beside the text, as `calculator`: a list of `expression` and `result` in a message, and in what is new of one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from serving.protocol import (
    END,
    Answer,
    ApiError,
    Call,
    Called,
    ChatRequest,
    Engine,
    Function,
    Message,
    StreamOptions,
    Tool,
    event,
)
from tasks.calculator import calculate

CALCULATOR = Tool(type="function", function=Function(name="calculator"))
NO_RESULT = "not arithmetic"

Chunk = dict[str, Any]


async def chat(engine: Engine, request: ChatRequest) -> Answer:
    """The answer to `request`, as `engine.chat` gives it. Raises ApiError or ValueError where its first turn does."""
    turns = [_Turn(engine, request, n) for n in range(request.n or 1)]
    for turn in turns:
        await turn.begin()
    head: Chunk = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    def usage() -> dict[str, int]:
        prompt, sampled = turns[0].prompted, sum(turn.sampled for turn in turns)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    async def events() -> AsyncIterator[str]:
        async with aclosing(_together(turns)) as chunks:
            async for chunk in chunks:
                yield event(chunk | ({} if "error" in chunk else head))
        if request.usage_in_stream:
            model = {"object": "chat.completion.chunk", "model": turns[0].model}
            yield event(head | model | {"choices": [], "usage": usage()})
        yield END

    if request.stream:
        return events()
    choices: list[dict[str, Any]] = [
        {"index": n, "message": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        for n in range(len(turns))
    ]
    async with aclosing(_together(turns)) as chunks:
        async for chunk in chunks:
            if "error" in chunk:
                raise ApiError(500, str(chunk["error"].get("message")))
            for new in chunk["choices"]:
                _add(choices[new["index"]], new)
    return head | {"object": "chat.completion", "model": turns[0].model, "choices": choices, "usage": usage()}


def _add(choice: dict[str, Any], new: dict[str, Any]) -> None:
    """What is new of a choice."""
    message, delta = choice["message"], new["delta"]
    message["content"] += delta.get("content") or ""
    if computed := delta.get("calculator"):
        message["calculator"] = [*message.get("calculator", []), *computed]
    if logprobs := new.get("logprobs"):
        before = choice["logprobs"] or {"content": []}
        choice["logprobs"] = {"content": before["content"] + logprobs["content"]}
    choice["finish_reason"] = new.get("finish_reason") or choice["finish_reason"]


class _Turn:
    """One choice: the assistant's turn, over all its calls."""

    def __init__(self, engine: Engine, request: ChatRequest, number: int) -> None:
        self._engine, self._number = engine, number
        seed = None if request.seed is None else min(request.seed + number, 2**63 - 1)  # as vLLM seeds its choices
        own = {"n": 1, "seed": seed, "stream": True, "tools": [CALCULATOR], "tool_choice": None, "run_tools": None}
        self._asked = request.model_copy(update=own | {"stream_options": StreamOptions(include_usage=True)})
        self._limit = request.max_completion_tokens or request.max_tokens
        self.prompted = self.sampled = 0
        self.model = ""

    async def begin(self) -> None:
        answer = await self._engine.chat(self._asked)
        assert not isinstance(answer, dict)
        self._stream = answer

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """As they come from the engine, but for calls: of these there is what was computed."""
        while True:
            text, call, last = "", None, None
            async for line in self._stream:
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    yield chunk
                    return
                self.model = chunk["model"]
                if used := chunk.pop("usage", None):
                    self.prompted = self.prompted or used["prompt_tokens"]
                    self.sampled += used["completion_tokens"] if not chunk["choices"] else 0
                for new in chunk["choices"]:
                    new["index"], last = self._number, chunk
                    text += new["delta"].get("content") or ""
                    for made in new["delta"].pop("tool_calls", None) or ():
                        call = made["function"]
                    if call is not None:
                        new["finish_reason"] = None
                if chunk["choices"]:
                    yield chunk
            if call is None or last is None:
                return
            expression = str(next(iter(json.loads(call["arguments"]).values())))
            result = calculate(expression)
            yield _only(last, self._number, {"calculator": [{"expression": expression, "result": result}]}, None)
            if not await self._go_on(text, call, result or NO_RESULT):
                yield _only(last, self._number, {}, "length")
                return

    async def _go_on(self, text: str, call: dict[str, str], result: str) -> bool:
        """Whether there is room for more."""
        called = Call(id="call_0", function=Called(**call))
        said = [Message(role="assistant", content=text or None, tool_calls=[called])]
        said += [Message(role="tool", content=result, tool_call_id="call_0")]
        own: dict[str, Any] = {"messages": [*self._asked.messages, *said]}
        if self._limit is not None:
            if self._limit <= self.sampled:
                return False
            own |= {"max_tokens": self._limit - self.sampled, "max_completion_tokens": None}
        self._asked = self._asked.model_copy(update=own)
        try:
            await self.begin()
        except (ApiError, ValueError):  # the context is full
            return False
        return True


def _only(like: Chunk, number: int, delta: dict[str, Any], reason: str | None) -> Chunk:
    return like | {"choices": [{"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}]}


async def _together(turns: list[_Turn]) -> AsyncGenerator[Chunk, None]:
    """The chunks of all, as they come."""
    news: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()

    async def pass_on(turn: _Turn) -> None:
        try:
            async with aclosing(turn.chunks()) as chunks:
                async for chunk in chunks:
                    news.put_nowait(chunk)
            news.put_nowait(None)
        except Exception as error:  # it is raised where the chunks are awaited
            news.put_nowait(error)

    tasks = [asyncio.create_task(pass_on(turn)) for turn in turns]
    try:
        left = len(tasks)
        while left:
            new = await news.get()
            if isinstance(new, BaseException):
                raise new
            if new is None:
                left -= 1
            else:
                yield new
    finally:
        for task in tasks:
            task.cancel()
