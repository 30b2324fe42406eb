"""The API of a served model, asked by OpenAI's own client: with vLLM on Ray Serve, and with the torch engine."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from api import BOUNDS, KEY, NAME, command, served, slow_and_endless
from openai import OpenAI
from taught import CONTEXT, HOSTILE, KNOWN, LETTERS, SUM, endless, taught

from corpus.tokenizers import DOCUMENT_ENDS, Tokenizer
from models.hf import from_pretrained
from serving.api import Bounds, Stream
from serving.torch_api import TorchApi
from stages.training.state import export

CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taught")
    taught(path, heads=2)
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> TorchApi:
    return TorchApi(model, NAME, on_gpu=False)


@pytest.fixture(scope="module", params=["torch", "vllm"])
def url(request: pytest.FixtureRequest, model: Path) -> Iterator[str]:
    """A server with each engine: torch in this process, vLLM as `fathom serve` has it, on Ray Serve."""
    if request.param == "torch":
        with served(request.getfixturevalue("engine")) as address:
            yield address
        return
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with command(model, "--engine", "vllm", "--max-body-mb", str(BOUNDS.body / 1e6), FATHOM_API_KEY=KEY) as (
        address,
        _,
    ):
        yield address


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def asked(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def test_a_chat_is_answered_whole_and_in_pieces(client: OpenAI) -> None:
    """The same text, letters whole, with the tokens counted."""
    for question, text in (("letters?", LETTERS), ("hostile?", HOSTILE)):
        whole = client.chat.completions.create(model=NAME, messages=asked(question), temperature=0)
        assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "stop"
        options: Any = {"include_usage": True}
        *pieces, last = client.chat.completions.create(
            model=NAME, messages=asked(question), temperature=0, stream=True, stream_options=options
        )
        told = [piece.choices[0].delta.content or "" for piece in pieces]
        assert "".join(told) == text and len(told) > 2 and "\ufffd" not in "".join(told)
        assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason == "stop"
        assert not last.choices and last.usage == whole.usage
        assert whole.usage is not None and 0 < whole.usage.completion_tokens < whole.usage.total_tokens


def test_a_call_is_the_clients_to_answer_and_then_the_turn_goes_on(client: OpenAI) -> None:
    said = client.chat.completions.create(model=NAME, messages=asked(SUM), temperature=0, tools=[CALCULATOR])
    assert said.choices[0].finish_reason == "tool_calls"
    message = said.choices[0].message
    [call] = message.tool_calls or []
    assert message.content == "So " and json.loads(call.function.arguments) == {"expression": "12*34"}  # type: ignore[union-attr]
    pieces = list(
        client.chat.completions.create(model=NAME, messages=asked(SUM), temperature=0, tools=[CALCULATOR], stream=True)
    )
    [streamed] = [made for piece in pieces for made in piece.choices[0].delta.tool_calls or []]
    assert streamed.function is not None and streamed.function.arguments == call.function.arguments  # type: ignore[union-attr]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "408"}
    turn = [*asked(SUM), message, result]
    rest = client.chat.completions.create(model=NAME, messages=turn, temperature=0, tools=[CALCULATOR])
    assert rest.choices[0].message.content == "#### 408" and rest.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model=NAME, messages=asked(SUM), temperature=0)
    assert cut.choices[0].message.content == "So 12*34", "without tools the text ends with the first call"


def test_the_server_computes_where_it_is_asked_to(client: OpenAI) -> None:
    """With each result beside the text; a tool call never reaches the client."""
    asks: Any = {"model": NAME, "messages": asked(SUM), "temperature": 0, "n": 2, "extra_body": {"run_tools": True}}
    computed = [{"expression": "12*34", "result": "408"}]
    whole = client.chat.completions.create(**asks)
    for choice in whole.choices:
        assert choice.message.content == "So #### 408" and choice.finish_reason == "stop"
        assert choice.message.calculator == computed and not choice.message.tool_calls
    texts, seen, reasons = ["", ""], 0, []
    for piece in client.chat.completions.create(**asks, stream=True):
        [choice] = piece.choices
        texts[choice.index] += choice.delta.content or ""
        seen += getattr(choice.delta, "calculator", None) == computed
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == ["So #### 408"] * 2 and seen == 2 and reasons == ["stop"] * 2


def test_a_seed_says_the_same_and_choices_differ(client: OpenAI) -> None:
    def said(seed: int, **more: Any) -> list[str]:
        asks: Any = {"model": NAME, "prompt": "Tom", "max_tokens": 12, "seed": seed} | more
        return [choice.text for choice in client.completions.create(**asks).choices]

    four = said(7, n=4)
    assert four == said(7, n=4) and len(set(four)) > 1
    assert [said(7 + n)[0] for n in range(4)] == four, "choice n is that of the n-th next seed"
    assert said(-1) == said(-1) and said(2**63 - 1, n=2)


def test_stop_strings_end_an_answer_before_themselves(client: OpenAI) -> None:
    asks: Any = {"model": NAME, "messages": asked("letters?"), "temperature": 0}
    for stops in ("e: ", "∞", ["zzz", "öß", "ße: "], "🙂!"):
        several = [stops] if isinstance(stops, str) else stops
        found = [LETTERS.find(each) for each in several if each in LETTERS]
        text = LETTERS[: min(found)] if found else LETTERS  # what only begins a stop string is said
        assert client.chat.completions.create(**asks, stop=stops).choices[0].message.content == text
        pieces = client.chat.completions.create(**asks, stop=stops, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text


def test_logprobs_are_those_of_the_model(client: OpenAI, model: Path) -> None:
    trained, tokenizer = from_pretrained(model), Tokenizer.load(model)
    ids = [tokenizer.bos, *tokenizer.encode("Tom buys")]
    done = client.completions.create(model=NAME, prompt="Tom buys", max_tokens=8, seed=3, logprobs=2).choices[0]
    logs = done.logprobs
    assert logs is not None and logs.token_logprobs and logs.top_logprobs and logs.text_offset
    for logprob, top in zip(logs.token_logprobs, logs.top_logprobs, strict=True):
        with torch.no_grad():
            expected = trained.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
        token = int((expected - logprob).abs().argmin())  # no two are equal
        assert abs(float(expected[token]) - logprob) < 1e-3 and abs(max(top.values()) - float(expected.max())) < 1e-3
        ids.append(token)
    chat = client.chat.completions.create(
        model=NAME, messages=asked("letters?"), temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and chat.usage and len(content) == chat.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)


def test_what_cannot_be_answered_is_told_in_openais_form(client: OpenAI, url: str) -> None:
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as unknown:
        chat(model="other", messages=asked(SUM))
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=f"context.* {CONTEXT}") as long:
        chat(model=NAME, messages=asked("qwertyzxk " * 60))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError, match="wrong"):
        OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(model=NAME, messages=asked(SUM), temperature=3)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=NAME, prompt="Tom", best_of=2)
    with pytest.raises(openai.BadRequestError, match="system"):
        chat(model=NAME, messages=[{"role": "system", "content": "alone"}])
    with pytest.raises(openai.BadRequestError, match="64 at most"):
        client.completions.create(model=NAME, prompt=["a", "b"], n=33)
    with pytest.raises(openai.BadRequestError, match="tokens of this model"):
        client.completions.create(model=NAME, prompt=[5, 10**6])
    headers = {"Authorization": f"Bearer {KEY}"}
    for method, path, body, status in [
        ("GET", "/v1/nothing", b"", 404),
        ("PUT", "/v1/models", b"", 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": ' + b"[" * 5_000, 400),
        ("POST", "/v1/completions", json.dumps({"prompt": "a" * BOUNDS.body}).encode(), 413),
    ]:
        answer = httpx.request(
            method, url + path, content=body, headers=headers | {"Content-Type": "application/json"}, timeout=30
        )
        assert answer.status_code == status, answer.text
        assert {"message", "type", "param", "code"} == answer.json()["error"].keys()
    assert httpx.post(f"{url}/v1/completions", content=b"prompt=a", headers=headers).status_code == 415

    def endless() -> Iterator[bytes]:
        for _ in range(1_000):
            yield b" " * 1_000

    unsized = httpx.post(
        f"{url}/v1/completions", content=endless(), headers=headers | {"Content-Type": "application/json"}
    )
    assert unsized.status_code == 413


def test_models_health_and_metrics(client: OpenAI, url: str) -> None:
    [card] = client.models.list().data
    assert card.id == NAME and card.max_model_len == CONTEXT and card.chats and card.calculates  # type: ignore[attr-defined]
    assert client.models.retrieve(NAME).id == NAME
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert "ray_serve" in httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text


def test_without_a_key_only_this_machine_is_served(engine: TorchApi) -> None:
    """A page of another origin neither reads answers nor has the model work."""
    with served(engine, key=None) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.post(f"{url}/v1/completions", content=b'{"prompt": "a"}').status_code == 415


def test_requests_beyond_the_bound_and_the_time_are_refused(engine: TorchApi, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_and_endless(engine, monkeypatch, 0.1)
    body = {"prompt": "Tom", "max_tokens": 90, "temperature": 0}
    with served(engine, None, Bounds(10_000, 2, 1.5)) as url, ThreadPoolExecutor(3) as pool:
        path = f"{url}/v1/completions"
        both = [pool.submit(httpx.post, path, json=body | {"stream": stream}, timeout=30) for stream in (True, False)]
        time.sleep(0.7)
        third = httpx.post(path, json=body)
        assert third.status_code == 429 and third.json()["error"]["code"] == "rate_limit_exceeded"
        streamed, whole = (each.result() for each in both)
    assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
    *events, last = streamed.text.strip().split("\n\n")
    assert last == "data: [DONE]" and json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(events) > 2 and not wait_for_idle(engine)


def wait_for_idle(engine: TorchApi) -> dict[int, Any]:
    """What is still under way after a moment."""
    deadline = time.monotonic() + 10
    while engine._batch._works and time.monotonic() < deadline:
        time.sleep(0.05)
    return engine._batch._works


def test_a_client_that_leaves_ends_its_work(engine: TorchApi, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_and_endless(engine, monkeypatch, 0.1)
    with served(engine, None) as url:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "Tom", "max_tokens": 90, "stream": True}
        ) as got:
            next(got.iter_lines())
            assert engine._batch._works
        assert not wait_for_idle(engine)


def test_a_stream_that_is_cut_off_closes_what_it_streams() -> None:
    """Also where it is cut off while a piece is sent, and something still holds what makes the pieces."""
    closed: list[bool] = []

    async def pieces() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "piece"
        finally:
            closed.append(True)

    async def never(message: Any = None) -> Any:
        await asyncio.sleep(60 if message is None or "body" in message else 0)

    async def cut_off() -> None:
        made = pieces()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await Stream(made)({"type": "http", "asgi": {"spec_version": "2.4"}}, never, never)
        assert closed

    asyncio.run(cut_off())


def test_requests_at_once_are_not_mixed_up(client: OpenAI) -> None:
    """Each gets what it gets alone."""
    questions = [*KNOWN] * 2

    def said(question: str) -> str | None:
        return (
            client.chat.completions.create(model=NAME, messages=asked(question), temperature=0)
            .choices[0]
            .message.content
        )

    alone = {question: said(question) for question in KNOWN}
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(said, questions)) == [alone[question] for question in questions]


def test_base_goes_on_with_text_and_does_not_chat(model: Path, tmp_path: Path) -> None:
    export(from_pretrained(model), Tokenizer.load(model), tmp_path, DOCUMENT_ENDS)
    with served(TorchApi(tmp_path, NAME, on_gpu=False), None) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        first, second = client.completions.create(model=NAME, prompt=["Tom", "Tom"], temperature=0).choices
        assert first.text == second.text
        with pytest.raises(openai.BadRequestError, match="not learned to chat"):
            client.chat.completions.create(model=NAME, messages=asked(SUM))


def test_an_engine_that_fails_tells_everybody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchApi(model, NAME, on_gpu=False)
    monkeypatch.setattr(engine._batch._sampler, "step", lambda: 1 / 0)
    with served(engine, None) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Tom"})
        assert answer.status_code == 500 and answer.json()["error"]["message"] == "the engine has failed"
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "Tom"}).status_code == 500
    with pytest.raises(RuntimeError):
        asyncio.run(engine.check())


def test_the_torch_engine_says_what_it_lacks(engine: TorchApi) -> None:
    with served(engine, key=None) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Tom", "top_k": 3})
        assert answer.status_code == 400 and "top_k needs vLLM" in answer.text


def test_sigterm_lets_what_streams_come_to_its_end(model: Path, tmp_path: Path) -> None:
    """And the command ends well, with nothing left behind."""
    with command(endless(model, tmp_path / "endless", 2_048), "--engine", "torch") as (url, server):
        body = {"messages": asked("letters?"), "temperature": 0, "stream": True, "max_tokens": 1_000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.terminate()
            *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert server.process.wait(60) == 0 and not server.alive()
