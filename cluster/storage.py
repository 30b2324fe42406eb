"""One view of local directories and object stores, on pyarrow filesystems, that cannot lose a file silently.

`Storage` is a root (a directory, `s3://bucket/prefix`, `gs://bucket/prefix`); every path below is relative to it.
Only the URI is kept, so it pickles to any worker; the filesystem is opened once a process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

CHUNK = 8 << 20  # bytes
TRIES = 3
TEMPORARY = ".tmp-"
# `user:password@` within a URI, as opposed to `host:port/...@`, or a secret among its options
CREDENTIALS = re.compile(
    r"""(\w[\w.+-]*://)(?:[^\s/?#@"']*:(?!\d+[/?#&])[^\s@"']*@|\S*[?&][\w-]*(?:secret|token|password|access_key)[\w-]*=)""",
    re.IGNORECASE,
)


class StorageError(RuntimeError):
    """Storage failed or holds something other than what was written; the message says what to do."""


@dataclass(frozen=True)
class FileEntry:
    path: str
    size: int
    sha256: str


FileEntries = list[FileEntry]  # named here because Storage has a method called list


def refuse_credentials(text: str) -> None:
    """Raises ValueError, which does not repeat them, for a URI that holds credentials: URIs are recorded with a run,
    hashed into what its artifacts are made from, and shown."""
    if found := CREDENTIALS.search(text):
        raise ValueError(
            f"a {found[1]} URI with a key or password in it would be recorded and shown: take it out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (Google: GOOGLE_APPLICATION_CREDENTIALS) in the environment"
        )


@functools.lru_cache(maxsize=64)
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a root and the root's path on it."""
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    if uri.startswith("s3://") and ("endpoint_override=" in uri or os.environ.get("AWS_ENDPOINT_URL")):
        # Servers other than AWS answer 411 to the checksum trailers newer SDKs send by default.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot open storage {uri}: {error}. Name a directory, s3:// or gs:// URI") from error
    return filesystem, root.rstrip("/")


def hash_stream(stream: Any) -> tuple[int, str]:
    """Size in bytes and SHA-256 of what is left in a binary stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


@dataclass(frozen=True, init=False)
class Storage:
    """Raises OSError (FileNotFoundError for what is absent) on plain reads and writes, StorageError where stated."""

    uri: str

    def __init__(self, uri: str | Path) -> None:
        text = str(uri).removeprefix("file://")
        refuse_credentials(text)
        # Absolute, because a Ray worker runs in another directory than the driver.
        object.__setattr__(self, "uri", text if "://" in text else os.path.abspath(os.path.expanduser(text)))

    def at(self, *parts: str) -> Storage:
        """The storage rooted at a folder below this one."""
        base, mark, query = self.uri.partition("?")
        return type(self)("/".join([base.rstrip("/"), *(p.strip("/") for p in parts if p)]) + mark + query)

    @property
    def local_path(self) -> Path | None:
        """The root as a directory of this machine; None for an object store."""
        return None if "://" in self.uri else Path(self.uri)

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow filesystem and the path of the root on it, for libraries that take those."""
        return _open(self.uri)

    def _at(self, path: str) -> tuple[fs.FileSystem, str]:
        filesystem, root = _open(self.uri)
        return filesystem, f"{root}/{path}" if path else root

    def _info(self, path: str) -> fs.FileInfo:
        filesystem, full = self._at(path)
        return filesystem.get_file_info(full)

    def exists(self, path: str = "") -> bool:
        return bool(self._info(path).type != fs.FileType.NotFound)

    def read_bytes(self, path: str) -> bytes:
        with self.open_read(path) as stream:
            return bytes(stream.read())

    def open_read(self, path: str) -> Any:
        """A binary stream, read from front to back."""
        filesystem, full = self._at(path)
        return filesystem.open_input_stream(full)

    @contextmanager
    def open_write(self, path: str) -> Iterator[Any]:
        """A binary stream whose content appears under `path` only once it is whole."""
        filesystem, full = self._at(path)
        if self.local_path is None:
            with filesystem.open_output_stream(full) as stream:
                yield stream
            return
        target = Path(full)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with filesystem.open_output_stream(str(temporary)) as stream:
                yield stream
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomic: a reader sees the old content or the new."""
        with self.open_write(path) as stream:
            stream.write(data)

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.uri}/{path} is not valid JSON: {error}") from error

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode())

    def list(self, path: str = "") -> dict[str, int]:
        """Size in bytes of every file below `path`, keyed by its path relative to `path`; {} when absent."""
        filesystem, full = self._at(path)
        found = filesystem.get_file_info(fs.FileSelector(full, recursive=True, allow_not_found=True))
        files = [i for i in found if i.type == fs.FileType.File and not i.base_name.startswith(TEMPORARY)]
        return {i.path[len(full) :].lstrip("/"): i.size for i in files}

    def delete(self, path: str = "") -> None:
        """Remove a file or a tree; what is absent is fine."""
        filesystem, full = self._at(path)
        kind = self._info(path).type
        if kind == fs.FileType.File:
            filesystem.delete_file(full)
        elif kind == fs.FileType.Directory and self.local_path is not None:
            shutil.rmtree(full)
        elif kind == fs.FileType.Directory:
            filesystem.delete_dir(full)

    def upload(self, local: Path, path: str) -> FileEntry:
        """Copy a file here, then read it back and compare size and SHA-256.

        Raises StorageError when three tries have not stored it whole.
        """
        fault = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(0.5 * attempt)
            try:
                digest, size = hashlib.sha256(), 0
                with local.open("rb") as source, self.open_write(path) as stream:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        stream.write(chunk)
                        size += len(chunk)
                with self.open_read(path) as stream:
                    back = hash_stream(stream)
                wrote = size, digest.hexdigest()
                if back == wrote:
                    return FileEntry(path, *wrote)
                fault = f"wrote {wrote[0]} bytes, SHA-256 {wrote[1][:12]}; read back {back[0]}, {back[1][:12]}"
            except OSError as error:
                if not local.exists():
                    raise
                fault = str(error)
        raise StorageError(
            f"{self.uri}/{path} could not be stored in {TRIES} tries: {fault}. "
            "Check the storage's free space and health, then run the same command again"
        )

    def upload_tree(self, local_dir: Path, prefix: str = "") -> FileEntries:
        """Upload every file below a directory; entries sorted by path."""
        below = f"{prefix.strip('/')}/" if prefix else ""
        names = sorted(f.relative_to(local_dir).as_posix() for f in local_dir.rglob("*") if f.is_file())
        return [self.upload(local_dir / name, below + name) for name in names]

    def check_writable(self) -> None:
        """Write, read and delete a small file; raises StorageError that says what to do."""
        probe, data = f".writable-{uuid.uuid4().hex}", b"fathom"
        try:
            self.write_bytes(probe, data)
            whole = self.read_bytes(probe) == data
            self.delete(probe)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"storage {self.uri} cannot be written: {error}. "
                "Name another place with --storage, or check its permissions, credentials and free space"
            ) from error
        if not whole:
            raise StorageError(f"storage {self.uri} did not give back what was written; name another with --storage")
