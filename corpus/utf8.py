"""Text that can be written: JSON may escape half a surrogate pair, and Python then holds what UTF-8 cannot."""

from __future__ import annotations


def valid(text: str) -> str:
    """`text` as UTF-8 can hold it: surrogate pairs joined, halves of one replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
