"""One view of local directories and object stores, on pyarrow filesystems, that cannot lose a file silently.

`Storage` is a root (a directory, `s3://bucket/prefix`, `gs://bucket/prefix`); every path below is relative to it.
Only names are kept, so it pickles to any worker; the filesystem is opened once a process.

Reading is tried again by the kind of error: what is absent is absent at once, what the network or a disk did is tried
READ_TRIES times. Local writes are synced, file and folder, before they count as done. JSON files carry a hash of
their own content, so that a flipped byte is noticed where no manifest lists the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

CHUNK = 8 << 20  # bytes
TRIES = 3  # of an upload
READ_TRIES = 6
AGREEING = 3  # readings that give the same wrong content, before that counts as what is stored
PAUSE_SECONDS = 0.2  # before the second try, and longer before each one after it
TEMPORARY = ".tmp-"
JSON_BYTES = 256 << 20  # no file of JSON is as large
MANIFEST = "manifest.json"  # what makes a folder an artifact, see cluster.manifest
CHECKSUM = "sha256"  # the key of a JSON file that holds the SHA-256 of the others
# Who may write below a run, named where a process claims it. Without it storage is not what it was, such as unmounted.
MARKER = ".fathom-run"
# A secret among the options of a URI; `user:password@` in it, as opposed to `host:port/...@`; and whatever stands
# before an @ where a bucket's or host's name should, or where a slash of the URI is missing.
CREDENTIALS = re.compile(
    r"""(\w[\w.+-]*://)(?:
        \S*[?&#;](?:sig|sas|pwd|key|auth|[\w-]*(?:secret|token|passw|credential|signature|(?:access|account|api)_?key)[\w-]*)=
        |[^\s/?#@"']*:(?!\d+[/?#&])[^\s@"']*@)
    |((?:https?|hf)://)[^\s/?#"']*@
    |((?:s3a?|gc?s)://)(?!anonymous@)(?:[^/?#"']*@|[^/?#@"']*:[^@"']*@)
    |((?:\b(?:s3a?|gc?s):/|(?<![\w:/.])//)(?!/))[^/?#@"']*:[^@"']*@""",
    re.IGNORECASE | re.VERBOSE,
)

EMPTY = "is empty: is a shell variable unset that should have held it? Give it a value, or leave it out"

# What is left of a place where the shell variable within it is unset, such as hub:, s3:// and s3://?scheme=http.
NOWHERE = re.compile(r"(?:hub:|[a-z][a-z0-9+.-]*://)\s*(?:[:?].*)?", re.IGNORECASE)
ONE_SLASH = re.compile(r"(s3|gs|gcs|hf|https?):/(?!/)", re.IGNORECASE)

Value = TypeVar("Value")
log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """Storage failed or holds something other than what was written; the message says what to do."""


class UnreachableError(StorageError):
    """Reading failed in every try. What is stored may well be whole, so nothing is to be made again for it."""


class DamagedError(StorageError):
    """What is stored is not what was written: several reads agree on it."""


class FencedError(StorageError):
    """Another process has taken the run over, so this one must not write any more."""


def plain_path(path: str) -> str:
    """`path`, which came from outside, where it names a file below a folder; else ValueError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(c in path for c in "\\\0") or not path.isprintable():
        raise ValueError(f"{path!r} is not the path of a file below a folder")
    return path


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FileEntry:
    """A file of an artifact, as its manifest lists it. Raises ValueError for a path that leads elsewhere."""

    path: Annotated[str, AfterValidator(plain_path)]
    size: Annotated[int, Field(ge=0, strict=True)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


FileEntries = list[FileEntry]  # named here because Storage has a method called list


def refuse_nowhere(place: str) -> None:
    """Raises ValueError for a place that names none, and might be taken for a folder here or for all that there is."""
    refuse_credentials(place)  # which are not to be repeated
    if NOWHERE.fullmatch(place.strip()):
        raise ValueError(f"the place {place!r} {EMPTY}")
    if wrong := ONE_SLASH.match(place):
        raise ValueError(f"the place {place!r} is no URI: write {wrong[1]}://")


def refuse_credentials(text: str) -> None:
    """Raises ValueError, which does not repeat them, for a URI that holds credentials: URIs are recorded with a run,
    hashed into what its artifacts are made from, and shown."""
    if found := CREDENTIALS.search(text) or CREDENTIALS.search(unquote(text)):
        scheme = next(filter(None, found.groups()))
        raise ValueError(
            f"a {scheme} URI with a key or password in it would be recorded and shown: take it out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (Google: GOOGLE_APPLICATION_CREDENTIALS) in the environment"
        )


@functools.lru_cache(maxsize=64)
def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a root and the root's path on it."""
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    # pyarrow takes the endpoint from these, the first before the second
    elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if uri.startswith("s3://") and ("endpoint_override=" in uri or elsewhere):
        # Servers other than AWS answer 411 to the checksum trailers newer SDKs send by default.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot open storage {uri}: {error}. Name a directory, s3:// or gs:// URI") from error
    return filesystem, root.rstrip("/")


def _local_files(root: str) -> dict[str, int]:
    """Size of every file below a local folder, by path; not Arrow's list, which follows links to folders, in circles,
    too."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # removed meanwhile, or never there
            raise error

    found = {}
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                known = os.stat(path)
                if stat.S_ISREG(known.st_mode) and not name.startswith(TEMPORARY):
                    found[os.path.relpath(path, root)] = known.st_size
    return {path: found[path] for path in _utf8(found, root)}


def _utf8(names: Iterable[str], folder: str) -> list[str]:
    """Those of the names below a folder that are UTF-8; that some are not is said once."""
    named, others = [], 0
    for name in names:
        try:
            name.encode()
            named.append(name)
        except UnicodeEncodeError:
            others += 1
    if others:
        _say_unnamed(folder, others)
    return named


@functools.lru_cache(maxsize=256)
def _say_unnamed(folder: str, count: int) -> None:
    log.warning("%d file(s) below %s are passed over, as their names are not UTF-8: rename them", count, folder)


def hash_stream(stream: Any) -> tuple[int, str]:
    """Size in bytes and SHA-256 of what is left in a binary stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def agreed(read: Callable[[], Value], right: Callable[[Value], bool], where: str) -> Value:
    """The first reading that is `right`, else the wrong one that AGREEING readings agree on. Raises UnreachableError,
    which says `where`, when they all differ."""
    seen: list[Value] = []
    for _ in range(READ_TRIES):
        found = read()
        seen.append(found)
        if right(found) or seen.count(found) == AGREEING:
            return found
    raise UnreachableError(
        f"{where} reads differently in {READ_TRIES} tries: check the network and the storage, then run the same "
        "command again"
    )


def checksum(value: Any) -> str:
    """SHA-256 over a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Has the names in a local folder on the disk, not only in memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Makes a local folder and those above it, each synced into the one that holds it."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


@dataclass(frozen=True, init=False)
class Storage:
    """Raises FileNotFoundError for what is absent, UnreachableError for reads that failed in every try, OSError on
    writes, and StorageError where stated.

    `of_run` gives the storage of a run that `mark` has begun. Below it nothing is written, or removed, where the run's
    marker is not there (StorageError), or where another process has claimed the run (FencedError).
    """

    uri: str
    run: str = ""  # the root of the run that this lies in
    token: str = ""  # of the claim under which it writes

    def __init__(self, uri: str | Path, run: str = "", token: str = "") -> None:
        text = str(uri).removeprefix("file://")
        if not text.strip():
            raise StorageError(f"the name of the storage {EMPTY}")
        refuse_nowhere(text)
        # Absolute, because a Ray worker runs in another directory than the driver.
        object.__setattr__(self, "uri", text if "://" in text else os.path.abspath(os.path.expanduser(text)))
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "token", token)

    def at(self, *parts: str) -> Storage:
        """The storage rooted at a folder below this one."""
        base, mark, query = self.uri.partition("?") if self.local_path is None else (self.uri, "", "")
        below = "/".join([base.rstrip("/"), *(p.strip("/") for p in parts if p)])
        return dataclasses.replace(self, uri=below + mark + query)

    def mark(self, token: str) -> Storage:
        """Lets only those write here, as in the folder of a run, who have `token`; returns such a one."""
        dataclasses.replace(self, run="", token="").write_json(MARKER, {"token": token})
        return self.of_run(token)

    def of_run(self, token: str) -> Storage:
        """This root as that of a run that was marked with `token`."""
        return dataclasses.replace(self, run=self.uri, token=token)

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

    def reading(self, path: str, read: Callable[[], Value]) -> Value:
        """What `read`, which reads `path`, gives; UnreachableError, which names it, when every try failed."""
        for attempt in range(READ_TRIES):
            try:
                return read()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
                raise
            except (OSError, pa.ArrowException) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:  # of where it is read to
                    raise
                last = error
            time.sleep(PAUSE_SECONDS * attempt)
        raise UnreachableError(
            f"{self.uri}/{path} could not be read in {READ_TRIES} tries: {last}. Nothing is known to be damaged: check "
            "the network and the storage, then run the same command again"
        ) from last

    def _info(self, path: str) -> fs.FileInfo:
        filesystem, full = self._at(path)
        return self.reading(path, lambda: filesystem.get_file_info(full))

    def exists(self, path: str = "") -> bool:
        return bool(self._info(path).type != fs.FileType.NotFound)

    def read_bytes(self, path: str, most: int | None = None) -> bytes:
        """A whole file. Raises DamagedError for one of more than `most` bytes."""

        def read() -> bytes:
            with self.open_read(path) as stream:
                data = bytes(stream.read(None if most is None else most + 1))
            if most is not None and len(data) > most:
                raise DamagedError(f"{self.uri}/{path} is damaged: it has more than {most:,} bytes")
            return data

        return self.reading(path, read)

    def open_read(self, path: str) -> Any:
        """A binary stream, read from front to back, in one try."""
        filesystem, full = self._at(path)
        if self.local_path is not None and not stat.S_ISREG(os.stat(full).st_mode):
            raise DamagedError(f"{full} is no regular file")  # a pipe would be waited for
        return filesystem.open_input_stream(full)

    def hash(self, path: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file as it is stored."""

        def read() -> tuple[int, str]:
            with self.open_read(path) as stream:
                return hash_stream(stream)

        return self.reading(path, read)

    def check_held(self) -> None:
        """Raises StorageError where this must not write: the run's folder is gone, or another process holds the run."""
        if not self.run:
            return
        try:
            marker = Storage(self.run).read_json(MARKER)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StorageError(
                f"{self.run} is not what it was when the run began: its file {MARKER} is gone. Is a file system no "
                "longer mounted there, or is this machine without it? Mount it again, then run the same command again"
            ) from error
        if marker != {"token": self.token}:
            raise FencedError(f"another process has taken over the run {self.run}: this one stops, and writes no more")

    @contextmanager
    def open_write(self, path: str) -> Iterator[Any]:
        """A binary stream whose content appears under `path` only once it is whole, and, on a local disk, synced."""
        filesystem, full = self._at(path)
        self.check_held()
        if self.local_path is None:
            stream = filesystem.open_output_stream(full)
            try:
                yield stream
            except BaseException:  # Arrow cannot abort: closed, the stream leaves what it has under the name
                with contextlib.suppress(OSError, StorageError):
                    stream.close()
                    self.check_held()  # else it is another's by now
                    filesystem.delete_file(full)
                raise
            stream.close()
            return
        target = Path(full)
        if target.is_dir():
            raise StorageError(f"{target} is a folder, and a file of that name is to be written: move the folder away")
        _make_folder(target.parent)
        temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            self.check_held()
            os.replace(temporary, target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomic: a reader sees the old content or the new."""
        with self.open_write(path) as stream:
            stream.write(data)

    def read_json(self, path: str) -> Any:
        """What `write_json` wrote. A fault of one read is read again; DamagedError for what is stored so."""

        def parsed(data: bytes) -> tuple[Any, str]:
            try:
                value = json.loads(data)
                # files of a version that wrote no hash are taken as they are
                if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != checksum(value):
                    return None, "its content does not agree with the hash within it"
            except (ValueError, RecursionError) as error:
                return None, f"it is not valid JSON: {error}"
            return value, ""

        data = agreed(lambda: self.read_bytes(path, JSON_BYTES), lambda data: not parsed(data)[1], f"{self.uri}/{path}")
        value, fault = parsed(data)
        if fault:
            raise DamagedError(f"{self.uri}/{path} is damaged: {fault}")
        return value

    def write_json(self, path: str, value: dict[str, Any]) -> None:
        """An object with string keys, and beside them a hash of it under `sha256`."""
        plain = json.loads(json.dumps(value))
        self.write_bytes(path, json.dumps(plain | {CHECKSUM: checksum(plain)}, indent=1, sort_keys=True).encode())

    def list(self, path: str = "") -> dict[str, int]:
        """Size in bytes of every file below `path`, by its path relative to `path`; {} if there is no such folder. What
        links to folders lead to is elsewhere, and not listed."""
        filesystem, full = self._at(path)
        if self.local_path is not None:
            return self.reading(path, lambda: _local_files(full))
        selector = fs.FileSelector(full, recursive=True, allow_not_found=True)
        found = self.reading(path, lambda: filesystem.get_file_info(selector))
        files = [i for i in found if i.type == fs.FileType.File and not i.base_name.startswith(TEMPORARY)]
        return {i.path[len(full) :].lstrip("/"): i.size for i in files}

    def sweep(self) -> None:
        """Removes the unfinished files of writers that were killed; only for the one that alone writes here."""
        if (root := self.local_path) is not None:
            for left in root.rglob(f"{TEMPORARY}*"):
                if left.is_file() or left.is_symlink():
                    left.unlink(missing_ok=True)

    def folders(self) -> Iterator[str]:
        """The names of the folders right below."""
        filesystem, full = self._at("")
        if (root := self.local_path) is not None:
            there = self.reading("", lambda: [f.name for f in root.iterdir() if f.is_dir()] if root.is_dir() else [])
            return iter(_utf8(there, full))
        selector = fs.FileSelector(full, allow_not_found=True)
        found = self.reading("", lambda: filesystem.get_file_info(selector))
        return (i.base_name for i in found if i.type == fs.FileType.Directory)

    def delete(self, path: str = "") -> None:
        """Remove a file or a tree; what is absent is fine."""
        filesystem, full = self._at(path)
        kind = self._info(path).type
        if kind == fs.FileType.NotFound:
            return
        self.check_held()
        if self.local_path is None:
            (filesystem.delete_file if kind == fs.FileType.File else filesystem.delete_dir)(full)
            return
        if os.path.isdir(full) and not os.path.islink(full):
            shutil.rmtree(full)
        else:  # a pipe or a link, too
            Path(full).unlink(missing_ok=True)
        sync_folder(Path(full).parent)

    def move(self, path: str, target: str) -> None:
        """Moves an artifact to where nothing is. In an object store its files are copied and read back, its manifest
        last, and only then removed, the manifest first: at any moment one of the two is whole."""
        filesystem, full = self._at(path)
        self.check_held()
        if self.local_path is not None:
            there = Path(self._at(target)[1])
            _make_folder(there.parent)
            os.rename(full, there)
            sync_folder(there.parent)
            sync_folder(Path(full).parent)
            return
        names = sorted(self.list(path), key=lambda name: name == MANIFEST)
        for name in names:  # read and written, as a copy within the store has a limit of 5 GB
            for _ in range(TRIES):
                self.reading(f"{path}/{name}", partial(self._copy, f"{path}/{name}", f"{target}/{name}"))
                if self.hash(f"{target}/{name}") == self.hash(f"{path}/{name}"):
                    break
            else:
                raise UnreachableError(f"{self.uri}/{path}/{name} could not be copied: run the same command again")
        if MANIFEST in names:
            self.delete(f"{path}/{MANIFEST}")
        filesystem.delete_dir(full)

    def _copy(self, path: str, target: str) -> None:
        with self.open_read(path) as source, self.open_write(target) as copy:
            shutil.copyfileobj(source, copy, CHUNK)

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
                back = self.hash(path)
                wrote = size, digest.hexdigest()
                if back == wrote:
                    return FileEntry(path, *wrote)
                fault = f"wrote {wrote[0]} bytes, SHA-256 {wrote[1][:12]}; read back {back[0]}, {back[1][:12]}"
            except FencedError:
                raise
            except (OSError, UnreachableError) as error:
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
