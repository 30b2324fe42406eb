"""ARC, grade-school science questions in an easy and a hard part (Clark et al., arXiv 1803.05457)."""

from __future__ import annotations

from tasks.choices import ChoiceTask, first_of

HUB = "hub:allenai/ai2_arc"
PARTS = ("ARC-Easy", "ARC-Challenge")


def task(part: str, source: str = HUB) -> ChoiceTask:
    """`part` of PARTS; `source` is the hub's data set or a folder that has PART.test.jsonl, PART.validation.jsonl or
    the data set's own PART/test-*.parquet. Raises FileNotFoundError."""
    if source.startswith("hub:"):
        return ChoiceTask(part, f"{source}:{part}", "test")
    names = (f"{part}.test.jsonl", f"{part}/test-*.parquet", f"{part}.validation.jsonl", f"{part}/validation-*.parquet")
    return ChoiceTask(part, first_of(source, names), "test")
