"""MMLU, questions of 57 subjects with four choices (Hendrycks et al., arXiv 2009.03300)."""

from __future__ import annotations

from tasks.choices import ChoiceTask, first_of

HUB = "hub:cais/mmlu"


def task(source: str = HUB) -> ChoiceTask:
    """`source` is the hub's data set or a folder that has test.jsonl or the data set's own all/test-*.parquet. Raises
    FileNotFoundError."""
    if source.startswith("hub:"):
        return ChoiceTask("MMLU", f"{source}:all", "test")
    return ChoiceTask("MMLU", first_of(source, ("test.jsonl", "all/test-*.parquet", "test-*.parquet")), "test")
