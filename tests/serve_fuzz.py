"""`python tests/serve_fuzz.py MODEL SCHEMATHESIS`: hostile and malformed requests against `fathom serve MODEL`.

SCHEMATHESIS is the program of that name, of an environment of its own (`python3 -m venv DIR; DIR/bin/pip install
schemathesis`), as it wants other versions than Ray's. It makes requests of the server's own description, valid ones and
ones that break it. Exit status 0 when none of them gave a status of 500 or more and the server's memory did not grow by
more than 5% between the first tenth of them and the last.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from api import command
from runs import Command

MOST_GROWTH = 0.05


def memory(server: Command) -> int:
    """Bytes of the replica, its engine and Serve's proxy that are theirs alone."""
    found = [each for name in ("ServeReplica", "EngineCore", "ProxyActor") for each in server.named(name)]
    assert found, "no process of the server was found"
    return sum(process.memory_full_info().uss for process in found)


def fuzz(program: str, url: str, examples: int, seed: int) -> int:
    flags = ["--mode", "all", "--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", str(seed)]
    flags += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--continue-on-failure"]
    with tempfile.TemporaryDirectory() as folder:  # where it keeps what it found
        return subprocess.run([program, "run", f"{url}/openapi.json", *flags], check=False, cwd=folder).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("schemathesis")
    parser.add_argument("--examples", type=int, default=1_000, help="of each path")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    args = parser.parse_args()
    with command(args.model, "--engine", args.engine, "--max-body-mb", "0.1") as (url, server):
        failed = fuzz(args.schemathesis, url, args.examples // 10, seed=1)
        before = memory(server)
        failed |= fuzz(args.schemathesis, url, args.examples, seed=2)
        after = memory(server)
        print(f"memory: {before / 1e6:,.0f} MB, then {after / 1e6:,.0f} MB ({after / before - 1:+.1%})")
        assert psutil.pid_exists(server.process.pid)
    return 0 if not failed and after <= before * (1 + MOST_GROWTH) else 1


if __name__ == "__main__":
    sys.exit(main())
