"""The HTTP side of a served model, whatever its engine: paths, key, bounds, errors in OpenAI's form, the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import calculator
from serving.protocol import END, Answer, ApiError, ChatRequest, CompletionRequest, Engine, event, read

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
OPEN = ("/", "/health")  # without the key: the page asks for it
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Bounds:
    """Of a replica: the bytes of a request's body, requests at once, and the seconds one may take."""

    body: int
    at_once: int
    seconds: float


def digest(key: str) -> bytes:
    """What the server keeps of an API key."""
    return hashlib.sha256(key.encode()).digest()


def build(
    engine: Engine,
    name: str,
    bounds: Bounds,
    key: bytes | None,
    run_tools: bool,
    metrics: Callable[[], Awaitable[str]],
) -> FastAPI:
    """The app of a model `name`. `key` is the digest of the API key; None: there is none, and only this machine is
    served. `run_tools` says who computes calls of the calculator where a request does not."""
    app = FastAPI(title="Fathom", docs_url=None, redoc_url=None)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "fathom"}
    voice = engine.voice
    card |= {"max_model_len": voice.context, "chats": voice.chats, "calculates": voice.calculates}

    def asked_for(model: str | None) -> None:
        if model not in (None, name):
            raise ApiError(
                404, f"there is no model {model!a:.200}; this server has {name!a}", "model_not_found", "model"
            )

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        html, policy = _page()
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        try:
            await engine.check()
        except Exception as error:  # of whatever kind: it cannot answer
            raise ApiError(503, "the engine has failed; another takes its place") from error
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> PlainTextResponse:
        return PlainTextResponse(await metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        asked_for(model)
        return card

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat(raw: Request) -> Response:
        request = read(ChatRequest, await _body(raw))
        asked_for(request.model)
        if not voice.chats:
            raise ApiError(400, f"{name} has not learned to chat; it goes on with text: POST /v1/completions")
        if (request.tools or request.run_tools) and not voice.calculates:
            raise ApiError(400, f"{name} has not learned to call the calculator, or any tool", param="tools")
        if request.run_tools or (request.run_tools is None and not request.tools and run_tools):
            return await _response(calculator.chat(engine, request))
        return await _response(engine.chat(request))

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest))
    async def complete(raw: Request) -> Response:
        request = read(CompletionRequest, await _body(raw))
        asked_for(request.model)
        return await _response(engine.complete(request))

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return _refusal(error)

    @app.exception_handler(HTTPException)  # of the router: no such path, or not by this method
    async def no_path(raw: Request, error: HTTPException) -> JSONResponse:
        return _refusal(ApiError(error.status_code, f"{raw.method} {raw.url.path[:200]}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failed(raw: Request, error: Exception) -> JSONResponse:
        logger.error("%s failed", raw.url.path, exc_info=error)
        return _refusal(ApiError(500, "the server has failed; its log says why"))

    app.add_middleware(_Gate, bounds=bounds, key=key)
    return app


async def _body(raw: Request) -> bytes:
    # A page of another origin may send only what a form could without being asked first, which this is not.
    if raw.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    return await raw.body()


async def _response(answering: Awaitable[Answer]) -> Response:
    try:
        answer = await answering
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    if isinstance(answer, dict):
        return JSONResponse(answer)
    return Stream(answer, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class Stream(StreamingResponse):
    """Closes what it streams, whatever ends it: a generator that is left between two pieces would have the engine go on
    until it is collected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


def _refusal(error: ApiError) -> JSONResponse:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _takes(kind: Any) -> dict[str, Any]:
    """For the description of the API, as bodies are read by hand."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _flat(kind)}}}}


def _flat(kind: Any) -> dict[str, Any]:
    """The JSON schema of a model with every reference replaced by what it names."""
    schema = kind.model_json_schema()
    named = schema.pop("$defs", {})

    def put_in(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return put_in(named[part["$ref"].rpartition("/")[2]])
            return {key: put_in(value) for key, value in part.items()}
        return [put_in(value) for value in part] if isinstance(part, list) else part

    flat: dict[str, Any] = put_in(schema)
    return flat


@cache
def _page() -> tuple[str, str]:
    """The page, and the policy by which a browser runs what stands in it and asks nobody but this server."""
    html = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{each}'" for each in sums)

    allowed = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    return html, f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class _Gate:
    """Lets a request in that has the key and stays within the bounds; a stream that runs out of time ends with an
    error among its events."""

    def __init__(self, app: ASGIApp, bounds: Bounds, key: bytes | None) -> None:
        self._app, self._bounds, self._key = app, bounds, key
        self._now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
        except ApiError as error:
            await _refusal(error)(scope, receive, send)
            return
        counted = scope["method"] == "POST"
        self._now += counted
        try:
            await self._within(scope, receive, send)
        finally:
            self._now -= counted

    def _check(self, path: str, headers: dict[bytes, str]) -> None:
        if self._key is None:
            # or any page in a browser here could read answers, by a name of its own that leads to this machine
            host = headers.get(b"host", "")
            if urlsplit(f"//{host}").hostname not in LOOPBACK:
                raise ApiError(403, f"this server answers as {', '.join(LOOPBACK)}, and not as {host!a:.200}")
        elif path not in OPEN:
            given = headers.get(b"authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(digest(given), self._key):
                said = "an API key is needed, as Authorization: Bearer KEY" if not given else "the API key is wrong"
                raise ApiError(401, said, "invalid_api_key")

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, streams, got = False, False, 0

        async def count(message: Message) -> None:
            nonlocal started, streams
            if message["type"] == "http.response.start":
                started = True
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            await send(message)

        async def bounded() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._bounds.body:
                raise ApiError(413, f"the body has more than {self._bounds.body:,} bytes")
            return message

        try:
            if scope["method"] == "POST" and self._now > self._bounds.at_once:
                raise ApiError(429, f"{self._bounds.at_once} requests are under way; try again", "rate_limit_exceeded")
            for name, value in scope["headers"]:
                if name.lower() == b"content-length" and int(value) > self._bounds.body:
                    raise ApiError(413, f"the body has {int(value):,} bytes, more than {self._bounds.body:,}")
            async with asyncio.timeout(self._bounds.seconds):
                await self._app(scope, bounded, count)
        except TimeoutError:
            error = ApiError(504, f"this took more than {self._bounds.seconds:g} seconds", "timeout")
            if not started:
                await _refusal(error)(scope, receive, send)
            elif streams:
                last = (event(error.body()) + END).encode()
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except ApiError as error:
            if not started:
                await _refusal(error)(scope, receive, send)
