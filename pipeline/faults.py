"""Whose fault an error is: the user's, who is told what to do, or the program's, whose traceback is needed."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from cluster.storage import StorageError

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "serving", "stages", "models", "corpus", "tasks", "kernels", "cluster", "bench")


FRAME = re.compile(r'File "([^"]+)", line \d+, in .*\n +(.*)')  # its file and source line


def is_users(error: BaseException) -> bool:
    """Whether the message of `error` was written for the user: a type of our own, an OSError, or a ValueError (or
    RuntimeError, FloatingPointError) that a `raise` of our own code raised, rather than a library deep inside."""
    if isinstance(error, OSError | StorageError) or type(error).__module__.partition(".")[0] in ROOMS:
        return True
    # what a Ray Train worker raised comes without its frames; they are in the text of the error that brought it
    own = "".join(traceback.format_tb(error.__traceback__))
    file, line = [("", ""), *(FRAME.findall(str(error.__cause__)) or FRAME.findall(own))][-1]
    ours = line.startswith("raise ") and any(Path(file).is_relative_to(ROOT / room) for room in ROOMS)
    return ours and isinstance(error, ValueError | RuntimeError | FloatingPointError)


def said(error: BaseException) -> str:
    """An error in words: its message, and its type before it where the message was not written for the user."""
    message = str(error)
    return message if message and is_users(error) else f"{type(error).__name__}: {message}".removesuffix(": ")
