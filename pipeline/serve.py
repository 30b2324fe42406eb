"""`fathom serve WHAT`: a model behind OpenAI's API, with a page to chat at, on Ray Serve.

WHAT is a run (its last model), RUN:STAGE, RUN:STAGE@STEP (a checkpoint), a Hugging Face directory, or hub:REPO.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

import ray

from cluster import runtime
from cluster.resources import resources
from pipeline.config import add_storage_flag
from pipeline.model import find
from pipeline.terminal import Terminal, say

KEY = "FATHOM_API_KEY"
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens everywhere is found from here
KEY_BYTES = 24


def replicas_of(value: str) -> tuple[int, int]:
    """N, or LEAST:MOST. ValueError for anything else."""
    if not re.fullmatch(r"[0-9]{1,4}(:[0-9]{1,4})?", value):
        raise ValueError(f"--replicas {value}: a number, such as 2, or the least and the most, such as 1:4")
    least, _, most = value.partition(":")
    found = int(least), int(most or least)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(f"--replicas {value}: at least 1, and the least before the most")
    return found


def key_of(given: str | None, loopback: bool) -> tuple[str | None, bool]:
    """The API key, and whether it was made here: none on the loopback interface unless there is one."""
    key = given or os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
        raise ValueError(f"the API key (--api-key or {KEY}) must be printable ASCII without white space around it")
    if key is None and not loopback:
        return f"sk-{secrets.token_urlsafe(KEY_BYTES)}", True
    return key, False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom serve", description=__doc__)
    parser.add_argument("what", metavar="WHAT", help="the model: RUN, RUN:STAGE, RUN:STAGE@STEP, a directory, hub:REPO")
    parser.add_argument("--name", help="what clients call the model (default: WHAT, of a directory its last part)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default %(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send (default: {KEY}, else none, or one made for --host)"
    )
    parser.add_argument("--replicas", default="1", metavar="N", help="engines at once, or as needed: 1:4 (default 1)")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="auto: vllm if installed")
    parser.add_argument(
        "--tools",
        choices=("client", "server"),
        default="client",
        help="who computes calls of the calculator: the client, which gets them as tool_calls (default), or the server",
    )
    parser.add_argument(
        "--max-body-mb", type=float, default=4.0, metavar="MB", help="of a request (default %(default)g)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=256, metavar="N", help="requests of a replica at once (default %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for a request (default %(default)g)"
    )
    parser.add_argument("--debug", action="store_true", help="show what the replicas print, and tracebacks")
    add_storage_flag(parser)
    args = parser.parse_args(argv)
    replicas = replicas_of(args.replicas)
    for flag, value, most in (
        ("--max-body-mb", args.max_body_mb, 1024),
        ("--concurrency", args.concurrency, 4096),
        ("--timeout", args.timeout, 86_400),
    ):
        if not 0 < value <= most:
            raise ValueError(f"{flag} {value:g}: above 0, and {most:,} at most")
    loopback = args.host in ("127.0.0.1", "localhost", "::1")
    key, made = key_of(args.api_key, loopback)
    check_port(args.host, args.port)
    model = find(args.what, args.storage)
    from serving import deployment  # torch, Ray Serve and FastAPI, which a wrong flag needs none of
    from serving.api import Bounds, digest
    from serving.speaker import Voice

    name = args.name or (Path(model.name).resolve().name if Path(model.name).is_dir() else model.name)
    engine = deployment.choose(args.engine)
    voice = Voice(model.fetch())  # what is wrong with its files is told here
    if args.tools == "server" and not voice.calculates:
        raise ValueError(f"--tools server: {model.name} has not learned to call the calculator; leave the flag out")
    console = Terminal(stderr=True, highlight=False)
    logging.getLogger("ray.serve").setLevel(logging.INFO if args.debug else logging.ERROR)
    runtime.connect(args.debug)
    devices = resources()
    on_gpu, room = devices.kind == "cuda", devices.gpus or devices.cpus
    if replicas[0] > room:
        raise ValueError(
            f"--replicas {args.replicas}: each takes a {'GPU' if on_gpu else 'CPU core'}, and there are {room}"
        )
    bounds = Bounds(int(args.max_body_mb * 1e6), args.concurrency, args.timeout)
    ended = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        if ended.is_set():  # asked again: at once
            os._exit(128 + number)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    say(console, f"starting {name} with {engine} on {'GPU' if on_gpu else 'CPU'}", "dim")
    arguments = (engine, on_gpu, replicas, bounds, digest(key) if key else None, args.tools == "server")
    deployment.start(model.fetch, name, *arguments, args.host, args.port)
    host = ANYWHERE.get(args.host, args.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    say(console, f"{name} answers at {url}/v1, and at {url} to a person")
    if made:
        say(console, f"API key: {key}")
    while not ended.wait(1.0):
        pass
    say(console, "ending: what streams comes to its end, and nothing new is taken; again, and it ends at once", "dim")
    deployment.stop()
    ray.shutdown()
    return 0


def check_port(host: str, port: int) -> None:
    """ValueError where nothing can listen there."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"nothing can listen at {host}, port {port}: {error}; name another with --host and --port"
        ) from error


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["serve", *sys.argv[1:]]))
