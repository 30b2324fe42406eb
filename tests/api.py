"""Servers of the API: in this process, with the torch engine and without Ray, and `fathom serve`."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from runs import Command

from serving.api import Bounds, build, digest
from serving.torch_api import TorchApi

NAME, KEY = "taught", "a key"
BOUNDS = Bounds(body=20_000, at_once=8, seconds=60)


async def no_metrics() -> str:
    return "ray_serve 1\n"


@contextlib.contextmanager
def served(engine: TorchApi, key: str | None = KEY, bounds: Bounds = BOUNDS, run_tools: bool = False) -> Iterator[str]:
    """The address of a server in this process."""
    app = build(engine, NAME, bounds, None if key is None else digest(key), run_tools, no_metrics)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def slow_and_endless(engine: TorchApi, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Has nothing end by itself, and each step take a while."""
    sampler = engine._batch._sampler
    monkeypatch.setattr(sampler, "stops", frozenset())
    monkeypatch.setattr(engine, "_ends", frozenset())
    step = sampler.step
    monkeypatch.setattr(sampler, "step", lambda: (time.sleep(seconds), step())[1])


@contextlib.contextmanager
def command(model: Path, *flags: str, **environment: str) -> Iterator[tuple[str, Command]]:
    """The address of `fathom serve`, once it answers, and the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = [sys.executable, "-m", "pipeline.serve", str(model), "--name", NAME, "--port", str(port), *flags]
    server = Command(*place, **environment)
    try:
        assert server.until(lambda: "answers at" in server.output(), 300), server.output()
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.kill()
