"""What is read and not used: why, how often, and how that is said. What is read is what is kept and the sum of these.

The counts of a source are a plain dictionary, as it stands in a manifest: `read` and `kept`, `left_out` by reason, and
where they are known `example`, one of the faults, and `shortened`, conversations that are kept without their last
exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS = {
    "beyond_rows": "beyond the first data.*.rows",
    "binary": "binary",
    "duplicates": "duplicates",
    "empty": "empty",
    "empty_answer": "with an empty answer",
    "held_out_again": "equal to one that is held out",
    "invalid_utf8": "not UTF-8",
    "malformed": "malformed",
    "no_answer": "without an answer",
    "no_call": "with a result of no call",
    "no_column": "without the column of the text",
    "no_conversation": "no conversation",
    "no_result": "ending in a call without a result",
    "not_json": "not JSON",
    "not_text": "not text",
    "null": "null",
    "other_tool": "with a tool that is not the calculator",
    "template": "that the model's chat template refuses",
    "too_long": "too long",
}


class UnusableError(ValueError):
    """A record that nothing can be learned from; `reason` is one of REASONS."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnusableError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def counted(read: int, left_out: Mapping[str, int]) -> dict[str, Any]:
    """The counts of a source."""
    reasons = {reason: left_out[reason] for reason in sorted(left_out) if left_out[reason]}
    return {"read": read, "kept": read - sum(reasons.values()), "left_out": reasons}


def reasons(left_out: Mapping[str, int]) -> str:
    """How many for each reason, the commonest first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {REASONS.get(reason, reason)}" for reason, count in ordered)


def skipped(files: Mapping[str, int]) -> str:
    """How many files of a folder are not read, and why."""
    why = {
        "hidden": "hidden (a name begins with . or _)",
        "empty": "of no bytes",
        "broken": "missing, behind a link",
        "other": "of another kind",
    }
    counted = {why.get(name, name): count for name, count in files.items()}
    return ", ".join(f"{count:,} {'file' if count == 1 else 'files'} {reason}" for reason, count in counted.items())


def lines(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What there is to say of sources of which anything was left out; a line for each."""
    said = []
    for name, counts in sources.items():
        what = "documents" if name == "corpus" else "conversations"
        parts = []
        if counts["left_out"]:
            example = f" (such as {counts['example']})" if counts.get("example") else ""
            parts.append(f"left out: {reasons(counts['left_out'])}{example}")
        if counts.get("shortened"):
            parts.append(f"{counts['shortened']:,} lose their last exchanges, which do not fit into a row")
        if parts:
            said.append(f"{name}: {counts['kept']:,} of {counts['read']:,} {what} are used; {'; '.join(parts)}")
    return said
