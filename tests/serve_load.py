"""`python tests/serve_load.py MODEL`: 64 clients at once, for two minutes, against `fathom serve MODEL` with vLLM.

MODEL is a Hugging Face directory of a chat model, such as runs/demo/rl. First the same engine works alone, in a process
of its own, on the same prompts with as many at once. Exit status 0 when no request failed, none got another's answer,
and as many tokens a second were served as 0.85 of what the engine alone gives.

`--kill` has two replicas and kills one of them half way, on which the streams it has must end with an error, no request
may hang, and new ones be answered within 60 seconds; throughput is then not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from api import NAME, command

from models.vllm_engine import CPU_ENV

CLIENTS, TOKENS, LEAST, BACK_S = 64, 64, 0.85, 60
QUESTIONS = [
    f"Ivy buys {bags} bags with {plates} plates each. How many?"
    for bags, plates in zip(range(11, 75), range(75, 11, -1), strict=True)
]


def alone(model: Path, seconds: float) -> dict[str, Any]:
    """Tokens a second of the engine alone, and what it answers to each question."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from models.hf import read_spec
    from models.vllm_engine import engine_settings
    from models.vllm_plugin import register
    from serving.speaker import Voice

    register()
    voice = Voice(model)
    prompts = [voice.text.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    engine = LLM(str(model), **engine_settings(read_spec(model), on_gpu=False)).llm_engine
    params = SamplingParams(temperature=0, max_tokens=TOKENS, output_kind=RequestOutputKind.FINAL_ONLY)
    numbers = itertools.count()
    texts: dict[int, str] = {}

    def add(n: int) -> None:
        engine.add_request(f"{n}:{next(numbers)}", {"prompt_token_ids": prompts[n]}, params)

    for n in range(CLIENTS):
        add(n)
    began, tokens = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        for done in engine.step():
            n = int(done.request_id.partition(":")[0])
            tokens += len(done.outputs[0].token_ids)
            texts[n] = done.outputs[0].text
            add(n)
    return {"tokens_per_second": tokens / (time.monotonic() - began), "texts": texts}


class Load:
    """What became of all requests."""

    def __init__(self, url: str, expected: dict[str, str]) -> None:
        self.url, self.expected = url, expected
        self.tokens, self.outcomes = 0, Counter[str]()
        self.answered: list[tuple[float, float]] = []  # begun and ended, by the monotonic clock

    async def client(self, session: aiohttp.ClientSession, number: int, end: float) -> None:
        for turn in itertools.count():
            if time.monotonic() >= end:
                return
            began = time.monotonic()
            try:
                text = await self.ask(session, number, streams=(number + turn) % 2 == 0)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.outcomes[f"error: {type(error).__name__}"] += 1
                await asyncio.sleep(0.2)
                continue
            self.answered.append((began, time.monotonic()))
            others = {other for n, other in self.expected.items() if n != str(number)}
            same = text == self.expected[str(number)]
            self.outcomes[
                "same as alone" if same else "another's answer" if text in others else "differs in rounding"
            ] += 1

    async def ask(self, session: aiohttp.ClientSession, number: int, streams: bool) -> str:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTIONS[number]}], "temperature": 0}
        body |= {"model": NAME, "max_tokens": TOKENS, "stream": streams}
        if streams:
            body["stream_options"] = {"include_usage": True}
        async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise ValueError(await answer.text())
            if not streams:
                whole = await answer.json()
                self.tokens += whole["usage"]["completion_tokens"]
                return str(whole["choices"][0]["message"]["content"])
            text = ""
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                if data == "[DONE]":
                    return text
                if data:
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    self.tokens += (chunk.get("usage") or {"completion_tokens": 0})["completion_tokens"]
                    text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            raise ValueError("the stream ended without its end")


async def loaded(load: Load, seconds: float) -> None:
    limit = aiohttp.ClientTimeout(total=BACK_S * 2)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        end = time.monotonic() + seconds
        await asyncio.gather(*(load.client(session, number, end) for number in range(CLIENTS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(alone(args.model, args.seconds)))
        return 0
    own = [sys.executable, __file__, str(args.model), "--alone", "--seconds", str(args.seconds / 2)]
    from runs import environment

    said = subprocess.run(own, env=environment(**CPU_ENV), stdout=subprocess.PIPE, check=True, text=True).stdout
    reference = json.loads(said.splitlines()[-1])
    with command(args.model, "--engine", "vllm", "--replicas", "2" if args.kill else "1") as (url, server):
        load = Load(url, reference["texts"])
        began = time.monotonic()
        killed = 0.0
        if args.kill:

            async def kill() -> None:
                nonlocal killed
                await asyncio.sleep(args.seconds / 2)
                server.named("ServeReplica")[0].kill()
                killed = time.monotonic()

            async def both() -> None:
                await asyncio.gather(loaded(load, args.seconds), kill())

            asyncio.run(both())
        else:
            asyncio.run(loaded(load, args.seconds))
        rate = load.tokens / (time.monotonic() - began)
    for outcome, count in load.outcomes.most_common():
        print(f"{count:6,} {outcome}")
    errors = sum(count for outcome, count in load.outcomes.items() if outcome.startswith("error"))
    mixed = load.outcomes["another's answer"]
    print(f"{rate:,.0f} tokens/s served, {reference['tokens_per_second']:,.0f} by the engine alone")
    if args.kill:
        hung = load.outcomes["error: TimeoutError"]
        back = min((ended - killed for begun, ended in load.answered if begun > killed), default=float("inf"))
        print(f"{errors} requests ended with an error; asked after the kill, the first answer took {back:.1f} s")
        return 0 if errors and not hung and not mixed and back < BACK_S else 1
    print(f"{rate / reference['tokens_per_second']:.3f} of it")
    return 0 if not errors and not mixed and rate >= LEAST * reference["tokens_per_second"] else 1


if __name__ == "__main__":
    sys.exit(main())
