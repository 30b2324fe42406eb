"""A real S3 server on this machine, and a proxy in front of it that spoils what is read.

`python tests/s3.py --faults 3000` reads artifacts by hand through so many faults and tells what came of it.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import logging
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pyarrow import fs
from runs import ROOT

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import Storage, StorageError

TOOLS = ROOT.parent / "shared" / "tools"
PACKAGES = Path(tempfile.gettempdir()) / "fathom-rgw"  # of the server: kept, as they are a long download
BUCKET = "fathom"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "pipekey",
    "AWS_SECRET_ACCESS_KEY": "pipesecret123",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_EC2_METADATA_DISABLED": "true",
}
FAULTS = ("500", "503", "reset", "cut", "short", "flip", "late")
LATE_SECONDS = 0.2


def uri(port: int, prefix: str) -> str:
    """A folder of the bucket as it is reached by way of `port`."""
    return f"s3://{BUCKET}/{prefix}?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"


def _free_port() -> int:
    """One whose neighbours, which the server's other processes take, are free too."""
    for port in random.SystemRandom().sample(range(12_000, 20_000), 50):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for sock, at in ((one, port), (two, port + 7_696), (three, port + 11_185)):
                    sock.bind(("127.0.0.1", at))
            except OSError:
                continue
            return port
    raise OSError("no free ports for the S3 server")


@contextmanager
def server() -> Iterator[int]:
    """The port of a real S3 server that has an empty bucket; the environment has its keys. OSError or
    CalledProcessError where it cannot be started."""
    # Sockets lie in it, so that its path must be short; and the script that ends a server ends all of its folder.
    folder = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))
    before = dict(os.environ)
    try:
        (PACKAGES / "root").mkdir(parents=True, exist_ok=True)
        (folder / "root").symlink_to(PACKAGES / "root")
        port = _free_port()
        with (PACKAGES / "lock").open("w") as held:  # one downloads, where there is nothing yet
            fcntl.flock(held, fcntl.LOCK_EX)
            up = ["bash", str(TOOLS / "rgw_up.sh"), str(folder), str(port)]
            subprocess.run(up, check=True, capture_output=True, text=True, timeout=300)
        os.environ.update(ENVIRONMENT)
        filesystem = fs.S3FileSystem(
            scheme="http", endpoint_override=f"127.0.0.1:{port}", region="us-east-1", allow_bucket_creation=True
        )
        filesystem.create_dir(BUCKET)
        yield port
    finally:
        os.environ.clear()
        os.environ.update(before)
        subprocess.run(["bash", str(TOOLS / "rgw_down.sh"), str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3() -> Iterator[int]:
    """The port of a real S3 server, to be put into `uri`."""
    if not (TOOLS / "rgw_up.sh").exists():
        pytest.skip(f"needs {TOOLS}/rgw_up.sh, which starts an S3 server")
    running = server()
    try:
        port = running.__enter__()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the S3 server did not start: {error} {getattr(error, 'stderr', '')}")
    yield port
    running.__exit__(None, None, None)


class Sometimes:
    """A plan of faults: one of `kinds` at random with a chance of `p`, but never more than `in_a_row` for an object, so
    that whoever asks a third time has the right answer."""

    def __init__(self, p: float = 0.2, in_a_row: int = 2, seed: int = 0, kinds: tuple[str, ...] = FAULTS) -> None:
        self.p, self.in_a_row, self.kinds = p, in_a_row, kinds
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.row: Counter[str] = Counter()

    def __call__(self, path: str) -> str | None:
        with self.lock:
            if self.row[path] >= self.in_a_row or self.rng.random() >= self.p:
                self.row[path] = 0
                return None
            self.row[path] += 1
            return self.rng.choice(self.kinds)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server; `plan` says for the path of an object that is read what goes wrong, one of
    FAULTS or None. `reads` counts them by path, `faults` by kind."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.to, self.lock, self.rng = server_port, threading.Lock(), random.Random(0)
        self.plan: Callable[[str], str | None] = lambda path: None
        self.reads: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no concern of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def proxy(server_port: int) -> Iterator[Proxy]:
    """A proxy that spoils nothing until it is given a plan."""
    with Proxy(server_port) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one of its own to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # What was signed, the host among it, goes on as it is.
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body)
        answer = self.upstream.getresponse()
        self.answer(answer.status, answer.getheaders(), answer.read())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
        fault = None
        if self.command == "GET" and status < 300 and path and "?" not in self.path:
            fault = self.server.plan(path)
            with self.server.lock:
                self.server.reads[path] += 1
                self.server.faults.update([fault] if fault else [])
        sent = len(body)
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            status, body = int(fault), f"<Error><Code>{code}</Code></Error>".encode()
            sent = len(body)
        elif fault == "short":  # what is sent agrees with its length
            body = body[: len(body) // 2]
            sent = len(body)
        elif fault in ("reset", "cut"):
            sent = len(body) // 2
        elif fault == "flip" and body:
            with self.server.lock:
                at = self.server.rng.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        elif fault == "late":
            time.sleep(LATE_SECONDS)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        length = dict((k.lower(), v) for k, v in headers).get("content-length") if self.command == "HEAD" else len(body)
        if status != 204 and length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()
        if fault in ("reset", "cut"):
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the proxy counts."""


def artifact(storage: Storage, files: dict[str, bytes], stage: str = "base") -> Manifest:
    """A real artifact of these files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(data)
        made = Manifest("run", stage, storage.upload_tree(Path(folder)), {"seed": 0}, {"ingest:base": "d"})
    manifests.write(storage, made)
    return made


@dataclass
class Soaked:
    """What came of many reads through faults."""

    reads: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # files whose content was not what was stored
    errors: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # what was logged


class _Told(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def soak(port: int, faults: int, seed: int = 0, readers: int = 4) -> Soaked:
    """Fetches whole artifacts, one a reader, again and again until so many faults have met them."""
    found = Soaked()
    told = _Told(found.messages)
    logging.getLogger().addHandler(told)
    try:
        with proxy(port) as between, ThreadPoolExecutor(readers) as pool:
            between.plan = Sometimes(seed=seed)

            def read(reader: int) -> None:
                rng, prefix = random.Random(f"{seed} {reader}"), f"soak/{seed}-{reader}"
                files = {f"{i % 3}/{i}": rng.randbytes(rng.randrange(1, 200_000)) for i in range(16)} | {"empty": b""}
                entries = artifact(Storage(uri(port, prefix)), files).files
                storage = Storage(uri(between.server_port, prefix))
                while between.faults.total() < faults:
                    with tempfile.TemporaryDirectory() as folder:
                        try:
                            at, alone = manifests.fetch(storage, cache=Path(folder)), rng.choice(entries)
                            one = manifests.fetch_file(storage, alone, Path(folder) / "alone")
                            got = [(name, at / name) for name in files] + [(alone.path, one)]
                            found.wrong += [name for name, path in got if path.read_bytes() != files[name]]
                        except (OSError, StorageError) as error:
                            found.errors.append(f"{type(error).__name__}: {error}")

            list(pool.map(read, range(readers)))
            found.reads, found.faults = between.reads.total(), between.faults
    finally:
        logging.getLogger().removeHandler(told)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with server() as running:
        result = soak(running, given.faults, given.seed)
    for error in [*result.errors, *result.messages]:
        print(error)
    print(f"{result.reads} reads, {result.faults.total()} faults {dict(result.faults)}")
    print(f"{len(result.wrong)} wrong files, {len(result.errors)} errors, {len(result.messages)} messages")
    sys.exit(bool(result.wrong or result.errors))
