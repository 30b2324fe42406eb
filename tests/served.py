"""`python tests/served.py RUN`: the RL model of a run (runs/demo) behind vLLM's OpenAI server.

The `openai` client asks the first 40 problems of the run's own evaluation and computes the calls of the calculator
itself. Exit status 0 when it solves at least 0.9 of those that the run's evaluation solved.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import APIConnectionError, BadRequestError, OpenAI
from runs import ROOT, Command

from models.vllm_engine import CPU_ENV
from tasks.base import NumberProblems, Problem

PROBLEMS, LEAST = 40, 0.9


@contextlib.contextmanager
def serving(model: Path, memory: str) -> Iterator[OpenAI]:
    """A client of vLLM's server, started as README says, on a CPU with as much `memory` for its cache."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--enable-auto-tool-choice", "--tool-call-parser", "fathom"]
    options += ["--enforce-eager", "--kv-cache-memory-bytes", memory]
    module = "vllm.entrypoints.openai.api_server"
    server = Command(sys.executable, "-m", module, "--model", str(model), *options, **CPU_ENV)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)

    def answers() -> bool:
        with contextlib.suppress(APIConnectionError):
            return bool(client.models.list().data)
        return False

    try:
        assert server.until(answers, 300), server.output()
        yield client
    finally:
        server.kill()


def written(turn: list[Any]) -> str:
    """The assistant's turn as the run's evaluation writes it, but for special tokens."""
    parts = []
    for message in turn:
        parts.append(message.get("content") or "")
        parts += [json.loads(call["function"]["arguments"])["expression"] for call in message.get("tool_calls", [])]
    return "".join(parts)


def main() -> int:
    run = Path(sys.argv[1])
    answer = runpy.run_path(str(ROOT / "docs/examples/calculator_client.py"))["answer"]
    records = [json.loads(line) for line in (run / "evaluate_rl/completions.jsonl").read_text().splitlines()][:PROBLEMS]
    solved = 0
    with serving(run / "rl", "1G") as client:
        for record in records:
            question = [{"role": "user", "content": record["question"]}]
            try:
                text = written(answer(client, question, temperature=0))
            except BadRequestError as error:  # its turn fills the context
                text = str(error)
            problem = Problem(record["question"], record["answer"])
            solved += NumberProblems().grade(problem, text)["reward"] >= 1
    expected = sum(record["greedy"][0]["grades"]["reward"] >= 1 for record in records)
    told = f"of {len(records)} problems the client solves {solved}, the run's evaluation {expected}"
    print(f"{told}: {solved / expected:.3f} of it")
    return 0 if solved >= LEAST * expected else 1


if __name__ == "__main__":
    sys.exit(main())
