"""The API's engine where vLLM is not installed: plain torch. One thread samples for all requests in one batch."""

from __future__ import annotations

import asyncio
import itertools
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from models.generate import Sampling, TorchEngine, TorchSampler
from serving.protocol import (
    END,
    ENGINES_OWN,
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Request,
    calculator,
    event,
    too_long,
    tool_call,
)
from serving.speaker import Parts, Voice

COLDEST = 1e-5  # below it a temperature is greedy, as it is for vLLM
COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class Token:
    """One that was sampled; logprobs are in nats. `top` are the likeliest ones where they were asked for."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Work:
    """A list of tokens to continue. `told` is given each new token, or why no more come, in the batch's thread."""

    prompt: list[int]
    room: int
    seed: int | None
    sampling: Sampling
    top: int
    told: Callable[[Token | Exception], None]


class Batch:
    """A thread that continues whatever it is given, in one batch."""

    def __init__(self, sampler: TorchSampler) -> None:
        self._sampler, self._keys = sampler, itertools.count()
        self._asked: queue.SimpleQueue[tuple[int, Work | None]] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._seen: tuple[int, Tensor] | None = None
        self.failure: Exception | None = None
        sampler.look = self._look
        threading.Thread(target=self._run, daemon=True, name="torch engine").start()

    def begin(self, work: Work) -> int:
        key = next(self._keys)
        self._asked.put((key, work))
        return key

    def drop(self, key: int) -> None:
        """Whatever it still has under way for this key."""
        self._asked.put((key, None))

    def _run(self) -> None:
        while True:
            self._take()
            try:
                for key, _, _ in self._sampler.step():
                    self._works.pop(key, None)
            except Exception as error:  # whatever it is, those who wait must be told
                self.failure = error
                for work in self._works.values():
                    work.told(error)
                self._works.clear()

    def _take(self) -> None:
        """What was asked meanwhile; waits where there is nothing to do."""
        while not self._works or not self._asked.empty():
            key, work = self._asked.get()
            if work is None:
                if self._works.pop(key, None) is not None:
                    self._sampler.drop(key)
                continue
            if self.failure is not None:
                work.told(self.failure)
                continue
            self._works[key] = work
            tell = partial(self._tell, work)
            self._sampler.add(key, work.prompt, work.room, work.seed, work.sampling, tell)

    def _look(self, key: int, logprobs: Tensor) -> None:
        self._seen = key, logprobs

    def _tell(self, work: Work, tokens: list[int]) -> None:
        assert self._seen is not None
        _, logprobs = self._seen
        likeliest = logprobs.topk(work.top) if work.top else None
        top = [] if likeliest is None else list(zip(likeliest[1].tolist(), likeliest[0].tolist(), strict=True))
        work.told(Token(tokens[0], float(logprobs[tokens[0]]), top))


@dataclass
class Piece:
    """What is new of a choice. `reason` is why it ended; `call` what it then asks of the calculator."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    call: str | None = None


class Choice:
    """One answer under way: tokens come, text goes, with whole letters and nothing of a stop string."""

    def __init__(self, voice: Voice, ends: frozenset[int], room: int, stops: Sequence[str], calls: bool) -> None:
        self._parts = Parts(voice.text, voice.turns, self._say)
        self._call, self._ends, self.room, self._stops = voice.turns.call, ends, room, stops
        self._calls = calls  # whether a call of the calculator is the client's to answer
        self._text, self._shown, self._expression = "", 0, ""
        self._tokens: list[Token] = []
        self.sampled = 0

    def add(self, token: Token) -> Piece:
        self.sampled += 1
        self._tokens.append(token)
        ended = token.id in self._ends
        called = self._call is not None and token.id == self._call[1]
        if ended and not called:
            self._parts.end()
        elif not called:
            self._parts.add([token.id], True)
        else:
            self._parts.end()
            if self._calls and self._parts.kind == "python":
                return self._piece("tool_calls", self._expression)
        reason = "stop" if ended else "length" if self.sampled == self.room else None
        if reason == "length":
            self._parts.end()
        if reason:
            self._text, self._expression = self._text + self._expression, ""
        return self._piece(reason, None)

    def _say(self, kind: str, piece: str) -> None:
        if kind == "python" and self._calls:
            self._expression += piece
        else:
            self._text += piece

    def _piece(self, reason: str | None, call: str | None) -> Piece:
        longest = max(map(len, self._stops), default=0)
        found = [at for stop in self._stops if (at := self._text.find(stop, max(0, self._shown - longest))) >= 0]
        if found:
            self._text, reason, call = self._text[: min(found)], "stop", None
        kept = (
            0
            if reason
            else max(
                (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0
            )
        )
        new = self._text[self._shown : len(self._text) - kept]
        self._shown += len(new)
        if not new and not reason:
            return Piece()
        tokens, self._tokens = self._tokens, []
        return Piece(new, tokens, reason, call)


class TorchApi:
    """The model in `directory`, as `name`."""

    def __init__(self, directory: Path, name: str, on_gpu: bool) -> None:
        self.voice, self._name = (voice := Voice(directory)), name
        self._ends = frozenset({*voice.ends, *voice.turns.stops, voice.text.bos})
        sampler = TorchEngine(directory, on_gpu).sampler([*self._ends], voice.context)
        assert isinstance(sampler, TorchSampler)
        self._batch = Batch(sampler)

    async def check(self) -> None:
        if self._batch.failure is not None:
            raise RuntimeError("the engine has failed") from self._batch.failure

    async def chat(self, request: ChatRequest) -> Answer:
        prompt = self.voice.text.prompt([message.rendered() for message in request.messages])
        tool = calculator(request) if self.voice.calculates else None
        room = self._room(request, len(prompt), request.max_completion_tokens or request.max_tokens)
        choices = self._choices(request, [room], calls=tool is not None)

        def said(n: int, piece: Piece, first: bool) -> dict[str, Any]:
            message: dict[str, Any] = {"role": "assistant"} if first else {}
            if piece.text or piece.call is None:
                message["content"] = piece.text
            if piece.call is not None and tool is not None:
                message["tool_calls"] = [tool_call(tool, piece.call)]
            logs = {"content": [self._logprob(token) for token in piece.tokens]} if request.logprobs else None
            part = "delta" if request.stream else "message"
            return {"index": n, part: message, "logprobs": logs, "finish_reason": piece.reason}

        top = request.top_logprobs or 0 if request.logprobs else 0
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        pieces = self._pieces(request, [prompt], choices, top)
        return await self._answer("chatcmpl", kind, request, choices, len(prompt), pieces, said)

    async def complete(self, request: CompletionRequest) -> Answer:
        prompts = [self.voice.encoded(prompt) for prompt in request.prompts]
        rooms = [self._room(request, len(prompt), request.max_tokens) for prompt in prompts]
        if request.max_tokens is None:
            rooms = [min(room, COMPLETION_TOKENS) for room in rooms]
        choices = self._choices(request, rooms, calls=False)
        offsets = [0] * len(choices)
        decode = self.voice.text.decode

        def said(n: int, piece: Piece, first: bool) -> dict[str, Any]:
            logs: dict[str, Any] | None = None
            if request.logprobs is not None:
                logs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
                for token in piece.tokens:
                    logs["tokens"].append(decode([token.id]))
                    logs["token_logprobs"].append(token.logprob)
                    logs["top_logprobs"].append({decode([i]): p for i, p in [*token.top, (token.id, token.logprob)]})
                    logs["text_offset"].append(offsets[n])
                    offsets[n] += len(logs["tokens"][-1])
            return {"index": n, "text": piece.text, "logprobs": logs, "finish_reason": piece.reason}

        pieces = self._pieces(request, prompts, choices, request.logprobs or 0)
        given = sum(map(len, prompts))
        return await self._answer("cmpl", "text_completion", request, choices, given, pieces, said)

    def _room(self, request: Request, prompt: int, wanted: int | None) -> int:
        """How many tokens may follow a prompt of this length."""
        for name in ENGINES_OWN:
            if getattr(request, name) is not None:
                raise ApiError(400, f"{name} needs vLLM, and this server runs the engine torch", param=name)
        if prompt >= self.voice.context or prompt + (wanted or 0) > self.voice.context:
            raise too_long(prompt, self.voice.context, wanted)
        return wanted or self.voice.context - prompt

    def _choices(self, request: Request, rooms: list[int], calls: bool) -> list[Choice]:
        every = [room for room in rooms for _ in range(request.n or 1)]
        return [Choice(self.voice, self._ends, room, request.stops, calls) for room in every]

    async def _pieces(
        self, request: Request, prompts: list[list[int]], choices: list[Choice], top: int
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """What is new of each choice as it comes; whatever ends this ends the work on them."""
        default = self.voice.sampling
        temperature = default.temperature if request.temperature is None else request.temperature
        sampling = Sampling(max(temperature, COLDEST), default.top_p if request.top_p is None else request.top_p)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        news: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def told(n: int, token: Token | Exception) -> None:
            if not loop.is_closed():  # as of a server that has ended
                loop.call_soon_threadsafe(news.put_nowait, (n, token))

        keys = {}
        try:
            for n, choice in enumerate(choices):
                drawn = None if temperature < COLDEST else (seed + n) % 2**64
                prompt = prompts[n // (request.n or 1)]
                keys[n] = self._batch.begin(Work(prompt, choice.room, drawn, sampling, top, partial(told, n)))
            while keys:
                n, token = await news.get()
                if isinstance(token, Exception):
                    raise ApiError(500, "the engine has failed") from token
                if n not in keys:  # it was on its way when the choice ended at a stop string
                    continue
                piece = choices[n].add(token)
                if piece.reason:
                    self._batch.drop(keys.pop(n))
                if piece.text or piece.reason:
                    yield n, piece
        finally:
            for key in keys.values():
                self._batch.drop(key)

    async def _answer(
        self,
        prefix: str,
        kind: str,
        request: Request,
        choices: list[Choice],
        prompted: int,
        pieces: AsyncGenerator[tuple[int, Piece], None],
        said: Callable[[int, Piece, bool], dict[str, Any]],
    ) -> Answer:
        head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        head |= {"model": self._name}

        def usage() -> dict[str, int]:
            sampled = sum(choice.sampled for choice in choices)
            return {"prompt_tokens": prompted, "completion_tokens": sampled, "total_tokens": prompted + sampled}

        async def events() -> AsyncIterator[str]:
            begun: set[int] = set()
            try:
                async with aclosing(pieces):
                    async for n, piece in pieces:
                        yield event(head | {"choices": [said(n, piece, n not in begun)]})
                        begun.add(n)
            except ApiError as error:
                yield event(error.body())
            else:
                if request.usage_in_stream:
                    yield event(head | {"choices": [], "usage": usage()})
            yield END

        if request.stream:
            return events()
        whole = [Piece() for _ in choices]
        async with aclosing(pieces):
            async for n, piece in pieces:
                text, tokens = whole[n].text + piece.text, whole[n].tokens + piece.tokens
                whole[n] = Piece(text, tokens, piece.reason, piece.call)
        return head | {"choices": [said(n, piece, True) for n, piece in enumerate(whole)], "usage": usage()}

    def _logprob(self, token: Token) -> dict[str, Any]:
        def one(number: int, logprob: float) -> dict[str, Any]:
            text = self.voice.text.decode([number])
            return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

        return one(token.id, token.logprob) | {"top_logprobs": [one(number, logprob) for number, logprob in token.top]}
