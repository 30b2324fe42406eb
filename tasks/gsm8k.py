"""GSM8K grade-school word problems (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import posixpath

from corpus.sources import read_records
from corpus.synthetic import Split
from tasks.base import Problem

HUB = "hub:openai/gsm8k"


class GSM8K:
    def __init__(self, source: str = HUB) -> None:
        """`source`: a folder or URI with train.jsonl and test.jsonl, or `hub:openai/gsm8k`."""
        self._source = source

    def problems(self, split: Split) -> list[Problem]:
        """The problems of "train" or "test". Raises FileNotFoundError or ValueError when they cannot be read."""
        if self._source.startswith("hub:"):
            spec = f"{HUB}:main" if self._source == HUB else self._source
        else:
            spec = posixpath.join(self._source, f"{split}.jsonl")
        found = []
        for row in read_records(spec, split):
            if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
                raise ValueError(f"{spec}: a row has {', '.join(row)}; a GSM8K row needs `question` and `answer`")
            found.append(Problem(row["question"], row["answer"]))
        return found
