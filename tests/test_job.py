"""A run submitted to a Ray cluster, the way a person with a cluster does it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import SETTINGS, flags
from runs import Command, Result, Run, ray_directory

SMALL = flags(SETTINGS | {"base.steps": 2, "data.synthetic_documents": 1_000})
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def head_node(place: Path) -> Iterator[dict[str, int]]:
    """The ports of a one-node cluster, whose sessions are below `place`."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    options = [f"--temp-dir={place}", *(f"--{name}={port}" for name, port in ports.items())]
    head = Command("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *options)
    try:
        started = head.until(lambda: "Ray runtime started" in head.output(), 60)
        assert started, head.output()
        yield ports
    finally:
        head.look()
        head.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of the dashboard of a one-node cluster on ports of its own."""
    with head_node(ray_directory() / "head") as ports:
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        for _ in range(60):
            if Command("ray", "job", "list", "--address", address).finish(60).code == 0:
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"no dashboard at {address}")
        yield address


def submit(address: str, *arguments: str) -> Result:
    command = ("ray", "job", "submit", "--address", address, "--working-dir", ".", "--")
    return Command(*command, "python", "-m", "pipeline.run", *arguments).finish(400)


def test_a_submitted_run_succeeds_and_its_tasks_are_seen(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, "job1", ["--preset", "demo", *SMALL])
    result = submit(cluster, *run.arguments("--until", "base"))
    assert result.code == 0, result.output
    assert "succeeded" in result.output
    states = run.states()
    assert [name for name, state in states.items() if state == "done"] == ["tokenizer", "ingest", "base"]
    listed = Command("ray", "list", "tasks", "--address", cluster, "--format", "json", "--limit", "1000").finish(60)
    assert listed.code == 0, listed.output
    tasks = json.loads(listed.stdout)
    stages = {task["name"]: task["state"] for task in tasks if task["name"].startswith("stage:")}
    assert stages == dict.fromkeys(["stage:tokenizer", "stage:ingest", "stage:base"], "FINISHED")


def test_a_failing_stage_fails_the_job(cluster: str, tmp_path: Path) -> None:
    run = Run(tmp_path, "job2", ["--preset", "demo", *SMALL, "--corpus", str(tmp_path / "nowhere")])
    result = submit(cluster, *run.arguments("--until", "ingest"))
    assert result.code != 0
    assert "stage tokenizer failed" in result.output and "matches no file" in result.output
    assert run.states()["tokenizer"] == "failed"
    status = Command("ray", "job", "list", "--address", cluster).finish(60).output
    assert "FAILED" in status and "SUCCEEDED" in status
