"""Secrets reach the processes that need them and nothing else: no command line, no log, no file, no message."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import SETTINGS, flags
from runs import Command, Run, fathom, one_clear_message, ray_directory, start
from test_job import head_node

from cluster.storage import Storage, refuse_credentials
from pipeline.config import load_config

NAMES = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
SECRETS = {name: f"planted{uuid.uuid4().hex}" for name in NAMES}  # this process's own: it looks at the whole machine
ACCOUNT = {"WANDB_API_KEY": f"planted-{uuid.uuid4().hex}"}  # of as many characters as wandb asks for
SMALL = flags(SETTINGS | {"base.steps": 2, "data.synthetic_documents": 500})
# A Ray task, and one of another runtime environment, as a stage's workers and engines are.
TELL = """
import json, os, ray
from cluster.runtime import connect
connect()
told = ray.remote(lambda: {name: os.environ.get(name) for name in %r})
print(json.dumps(ray.get([told.remote(), told.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote()])))
"""


@dataclass
class Seen:
    """`lines` are the command lines that showed a secret in one of `samples` looks at all processes of the machine."""

    samples: int = 0
    lines: list[str] = field(default_factory=list)


@contextmanager
def watching() -> Iterator[Seen]:
    """What command lines show meanwhile, looked at every 20 ms."""
    seen = Seen()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            seen.samples += 1
            for pid in psutil.pids():
                with contextlib.suppress(psutil.Error):
                    line = " ".join(psutil.Process(pid).cmdline())
                    seen.lines.extend(line for value in (SECRETS | ACCOUNT).values() if value in line)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def holding(*folders: Path) -> list[str]:
    """The files below these folders in which one of the secrets stands."""
    found = []
    for path in files(*folders):
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            found += [str(path) for value in (SECRETS | ACCOUNT).values() if value.encode() in content]
    return found


def files(*folders: Path) -> list[Path]:
    """The files below these folders, some of which may go meanwhile."""
    found = [Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def test_a_run_shows_and_keeps_no_secret(tmp_path: Path) -> None:
    home, place = tmp_path / "home", ray_directory() / "own"  # a folder of its own; short, as it holds sockets
    home.mkdir()
    run = Run(tmp_path / "runs", "secrets", ["--preset", "demo", *SMALL])
    own = SECRETS | ACCOUNT | {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(home), "RAY_TMPDIR": str(place)}
    with watching() as seen:
        command = start("run", *run.arguments("--until", "ingest", "--debug"), **own)
        ended = not command.until(lambda: (run.path / "ingest").exists(), 120)
        half_way = holding(tmp_path, place)
        result = command.finish(240)
    assert not ended and result.code == 0, result.output
    assert list(place.rglob("runtime_env_agent.log")), "Ray's logs are elsewhere"
    assert "wandb: the server took no run" in result.output, "the key was not used"
    assert not seen.lines
    assert not half_way + holding(tmp_path, place)
    assert not any(value in result.output for value in (SECRETS | ACCOUNT).values())


def test_the_workers_of_a_joined_cluster_have_the_secrets_and_nobody_else() -> None:
    place = ray_directory() / "joined"
    with head_node(place) as ports:
        with watching() as seen:
            address = f"127.0.0.1:{ports['port']}"
            result = Command(sys.executable, "-c", TELL % list(SECRETS), RAY_ADDRESS=address, **SECRETS).finish(120)
        assert result.code == 0, result.output
        assert json.loads(result.stdout.splitlines()[-1]) == [SECRETS, SECRETS]
        assert not seen.lines
        assert list(place.rglob("runtime_env_agent.log")), "Ray's logs are elsewhere"
        assert not holding(place)


def listening(pid: int) -> list[tuple[str, str]]:
    """The name of each process of this tree that listens beyond the loopback interface, and the address."""
    found = []
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for place in process.net_connections("inet"):
                address = place.laddr.ip.removeprefix("::ffff:") if place.status == psutil.CONN_LISTEN else ""
                if address and address != "::1" and not address.startswith("127."):
                    found.append((process.name(), address))
    return found


def test_a_private_cluster_listens_on_loopback_alone_and_its_heads_death_is_one_message(tmp_path: Path) -> None:
    run = Run(tmp_path, "head", ["--preset", "demo", *flags(SETTINGS)])
    command = start("run", *run.arguments("--until", "base"))
    assert command.until(lambda: (run.path / "ingest" / "progress.json").exists(), 240), command.output()
    beyond = listening(command.process.pid)
    [head] = command.named("gcs_server")
    command.look()
    head.kill()
    killed = time.monotonic()
    result = command.finish(60)
    one_clear_message(result, "gcs_server", "run the same command again")
    assert time.monotonic() - killed < 20
    assert "core_worker" not in result.output, "Ray spoke"
    assert not beyond


URIS = {
    "s3://AKPLANTED0TWO:planted0three@bucket/runs": True,
    "s3://AKPLANTED0TWO:planted0/th+re=e@bucket/runs": True,
    "https://user:planted0three@host/x.jsonl": True,
    "s3://bucket/runs?region=here&secret_key=planted0three": True,
    "s3://AKPLANTED0TWO:12/planted0three@bucket/runs": True,
    "s3://AKPLANTED0TWO%3Aplanted0three@bucket/runs": True,
    "s3://planted0three@bucket/runs": True,
    "s3:/AKPLANTED0TWO:planted0three@bucket/runs": True,
    "//AKPLANTED0TWO:planted0three@bucket/runs": True,
    "https://host/x.jsonl?X-Amz-Signature=planted0three": True,
    "abfs://files@account.dfs.core.windows.net/x?sig=planted0three": True,
    "gs://bucket/x?credentials=planted0three": True,
    "s3://bucket?secret%5Fkey=planted0three": True,
    "s3://AKPLANTED0TWO:planted0 three@bucket": True,
    "s3://bucket#secret_key=planted0three": True,
    "abfs://files@account.dfs.core.windows.net/x?account_key=planted0three": True,
    "https://planted0three@host/x.jsonl": True,
    "hf://planted0three@datasets/some/corpus": True,
    "gs://anonymous@bucket/runs": False,
    "hf://datasets/some/corpus@main/x.parquet": False,
    "s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9000": False,
    "s3://bucket/runs?endpoint_override=http://localhost:9000&scheme=http": False,
    "http://127.0.0.1:9000/bucket@1": False,
    "hub:org/corpus:config@main": False,
    "https://host/x.jsonl?design=1": False,
    "s3://bucket/runs@2/a:b@c": False,
    "/data//runs": False,
    "/home/user:group/runs@2": False,
}


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_with_credentials_is_refused_without_repeating_them(uri: str) -> None:
    if not URIS[uri]:
        refuse_credentials(uri)
        return
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as refused:
        Storage(uri)
    assert "lanted0" not in str(refused.value)


def test_a_preset_with_credentials_is_refused(tmp_path: Path) -> None:
    """Which no command line shows."""
    preset = tmp_path / "mine.toml"
    for uri in (uri for uri in URIS if URIS[uri]):
        preset.write_text(f'[data.mid.own]\nsource = "{uri}"\nformat = "chat"\n')
        with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as refused:
            load_config(str(preset))
        assert "lanted0" not in str(refused.value)


@pytest.mark.parametrize(
    "command",
    [
        ["status", "r", "--storage", "URI"],
        ["run", "--preset", "demo", "--storage=URI", "--dry-run"],
        ["plan", "--preset", "demo", "--set", "data.mid.own.source='URI'"],
        ["plan", "--preset", "demo", "--corpus", "URI", "--debug"],
    ],
)
def test_no_command_shows_the_credentials_of_a_uri(command: list[str]) -> None:
    result = fathom(*(part.replace("URI", next(iter(URIS))) for part in command), seconds=60)
    if "--debug" not in command:
        one_clear_message(result, "AWS_SECRET_ACCESS_KEY")
    assert result.code == 1
    assert "planted0" not in result.output.lower()
