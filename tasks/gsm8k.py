"""GSM8K grade-school word problems (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

from collections.abc import Iterator

from corpus.sources import below, read_records
from corpus.synthetic import Split
from tasks.base import NumberProblems, Problem

HUB = "hub:openai/gsm8k"


class GSM8K(NumberProblems):
    def __init__(self, source: str = HUB) -> None:
        """`source`: a folder or URI with train.jsonl and test.jsonl, one file that is the split, or
        `hub:openai/gsm8k`."""
        self._source = source

    def spec(self, split: str) -> str:
        """What `corpus.sources` reads the split from."""
        if self._source.startswith("hub:"):
            return f"{HUB}:main" if self._source == HUB else self._source
        if self._source.partition("?")[0].lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")):
            return self._source
        return below(self._source, f"{split}.jsonl")

    def stream(self, split: str) -> Iterator[Problem]:
        """The problems of a split, read as they are asked for. Raises FileNotFoundError or ValueError."""
        spec = self.spec(split)
        for number, row in enumerate(read_records(spec, split), 1):
            if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
                has = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "nothing"
                raise ValueError(
                    f"{spec}, row {number}: it has {has}; a GSM8K row needs `question` and `answer`, texts"
                )
            yield Problem(row["question"], row["answer"])

    def problems(self, split: Split) -> list[Problem]:
        """The problems of "train" or "test". Raises FileNotFoundError or ValueError when they cannot be read."""
        return list(self.stream(split))
