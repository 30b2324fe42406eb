"""Temporary folders and the cache of fetched files on this machine, neither of which may fill its disk.

A temporary folder holds a lock for as long as its process lives, so that the next start knows which folders nobody owns
any more: a killed process removes nothing itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage import StorageError

PREFIX, LOCK = "fathom-", ".held"
YOUNG_SECONDS = 60.0  # a folder may not have its lock yet
FULL_BYTES = 32 << 20  # with less left a disk counts as full
CACHE_GB = 50.0  # unless FATHOM_CACHE_GB says otherwise
IN_USE_SECONDS = 24 * 3600.0  # what was used since may be in use


def cache_folder() -> Path:
    """Where files of remote storage are kept once they were fetched."""
    return Path.home() / ".cache" / "fathom"


@contextmanager
def scratch(name: str, needed: int = 0) -> Iterator[Path]:
    """A temporary folder of this process. Raises StorageError where its disk has no room for `needed` bytes, or is full
    when something in the block fails."""
    place = Path(tempfile.gettempdir())
    advice = "make room there, or name another place with the variable TMPDIR"
    if (free := shutil.disk_usage(place).free) < needed:
        raise StorageError(
            f"the temporary folder {place} has {free / 1e9:.1f} GB free, and {name} needs {needed / 1e9:.1f} GB: "
            f"{advice}"
        )
    with (
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}{name}-", ignore_cleanup_errors=True) as folder,
        (Path(folder) / LOCK).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = Path(folder) / "files"  # all of them may be uploaded, and the lock is none of them
        files.mkdir()
        try:
            yield files
        except BaseException as error:  # DCP's is no Exception
            ended = isinstance(error, StorageError | KeyboardInterrupt | SystemExit | GeneratorExit)
            if ended or shutil.disk_usage(place).free >= FULL_BYTES:
                raise
            needs = f" and needs {needed / 1e9:.1f}" if needed else ""
            raise StorageError(
                f"the disk of the temporary folder {place} is full: {name} has {_size(files) / 1e9:.1f} GB there"
                f"{needs}; {advice}"
            ) from error


def sweep() -> None:
    """Removes the temporary folders of processes that are gone, and what was not used for longest from a cache that has
    outgrown its bound."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = folder / LOCK
        with contextlib.suppress(OSError):  # another process may sweep as well
            if time.time() - lock.stat().st_mtime > YOUNG_SECONDS and _unowned(lock):
                shutil.rmtree(folder, ignore_errors=True)
    given = os.environ.get("FATHOM_CACHE_GB", str(CACHE_GB))
    try:
        most = 1e9 * float(given)
        if not most >= 0:  # NaN, too
            raise ValueError
    except ValueError:
        raise StorageError(f"FATHOM_CACHE_GB={given!r} must be a number of gigabytes, such as 50") from None
    kept = []
    for folder in cache_folder().glob("*/*"):
        with contextlib.suppress(OSError):
            kept.append((folder.stat().st_mtime, _size(folder), folder))
    total = sum(size for _, size, _ in kept)
    for used, size, folder in sorted(kept, key=lambda entry: entry[0]):
        if total <= most or time.time() - used < IN_USE_SECONDS:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= size


def _unowned(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # whoever made it: no pipe is waited for
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total
