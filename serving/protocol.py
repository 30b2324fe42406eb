"""OpenAI's API as it is served here: what a request may ask, whatever the engine, and how an error is told.

A field that is not here is refused, as OpenAI does it, and not left unheard. What the lists and numbers of a request
may be is bounded, as every request is read before it is known whether it can be answered.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from corpus.chat_template import CALCULATORS
from serving.speaker import Voice

MOST_CHOICES = 64  # of one request: prompts · n
MOST_LOGPROBS = 20

# from 0 on, as vLLM draws a seed of its own where it is given -1
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(lambda seed: seed % 2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class ApiError(Exception):
    """An error that the client is told of, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def too_long(tokens: int, context: int, wanted: int | None = None) -> ApiError:
    """For a prompt of `tokens` tokens, of which `wanted` more were asked for."""
    more = "" if wanted is None else f" and max_tokens asks for {wanted:,} more"
    message = f"the prompt has {tokens:,} tokens{more}, and the context of the model is {context:,}: shorten it"
    return ApiError(400, message, "context_length_exceeded", "messages")


class _Open(BaseModel):
    """What clients send back to us as they got it, and more with it."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Function(_Open):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    type: Literal["function"]
    function: Function


class Called(_Open):
    name: str
    arguments: str


class Call(_Open):
    id: str
    type: Literal["function"] = "function"
    function: Called


class Part(_Open):
    type: Literal["text"]
    text: str


class Message(_Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def rendered(self) -> dict[str, Any]:
        """As chat templates know it."""
        fields = self.model_dump(exclude_none=True)
        return fields | {"role": "system" if self.role == "developer" else self.role}


class StreamOptions(_Open):
    include_usage: bool | None = None


class Request(BaseModel):
    """What both kinds of request have. None is as good as a field that is left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    # what the torch engine does not have
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def fields(self) -> dict[str, Any]:
        """Of those that have a value, the ones that vLLM's own requests have."""
        return self.model_dump(exclude_none=True)


ENGINES_OWN = ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p")  # of vLLM


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    # Not OpenAI's: the server computes what the model asks of the calculator, and the model goes on.
    run_tools: bool | None = None

    def fields(self) -> dict[str, Any]:
        fields = super().fields()
        fields.pop("run_tools", None)
        return fields | {"messages": [message.rendered() for message in self.messages]}


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


Kind = TypeVar("Kind", bound=Request)


def read(kind: type[Kind], body: bytes) -> Kind:
    """A request's body; ApiError where it is none, which names the first of its faults."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))[:200]
        said = f"{place}: {fault['msg']}" if place else fault["msg"]
        raise ApiError(400, said[:500], param=place or None) from None
    if isinstance(request, CompletionRequest) and len(request.prompts) * (request.n or 1) > MOST_CHOICES:
        raise ApiError(400, f"prompts times n: {MOST_CHOICES} at most in one request", param="prompt")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return request


def calculator(request: ChatRequest) -> Function | None:
    """The client's tool that calls of the calculator go to."""
    tools = [] if request.tool_choice == "none" else request.tools or []
    return next((tool.function for tool in tools if tool.function.name in CALCULATORS), None)


def tool_call(tool: Function, expression: str) -> dict[str, Any]:
    """A call of it, in a message or in what is new of one."""
    parameters = (tool.parameters or {}).get("properties")
    name = next(iter(parameters), "expression") if isinstance(parameters, dict) else "expression"
    function = {"name": tool.name, "arguments": json.dumps({name: expression}, ensure_ascii=False)}
    return {"index": 0, "id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function}


Answer = dict[str, Any] | AsyncIterator[str]  # of a stream its events


class Engine(Protocol):
    """A model that answers requests."""

    voice: Voice

    async def chat(self, request: ChatRequest) -> Answer:
        """Raises ApiError, of a stream before it begins; ValueError for what this model cannot be asked."""

    async def complete(self, request: CompletionRequest) -> Answer:
        """As `chat`."""

    async def check(self) -> None:
        """Raises an error where it can answer no more."""


END = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
