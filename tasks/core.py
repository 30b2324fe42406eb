"""CORE, the DCLM paper's score of a base model (arXiv 2406.11794): 22 tasks, answered without writing.

The bundle is read as it is published: `core.yaml`, `eval_meta_data.csv` and `eval_data/`. What is asked is what
nanochat's evaluator asks, so that figures compare: the examples of a task in the order of `random.Random(1337)`, of
these the first `limit`; for example i as many others as examples before it as the task says, drawn by
`random.Random(1234 + i)`; and bos before everything.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import posixpath
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import yaml

from corpus.sources import fetched, filesystem_of
from tasks.ranking import Answer, Kind, Question, Text, accuracy, question

Parsed = TypeVar("Parsed")

LABELS = 22
ORDER, EXAMPLES = 1337, 1234  # seeds: of a task's order, and of the examples before question 0
# what zipfile raises for archives that are damaged, encrypted, or packed in a way that it does not know
ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError)
_FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


def centered(accuracy: float, baseline_percent: float) -> float:
    """Accuracy on the scale on which guessing is 0 and knowing is 1; `accuracy` from 0 to 1, the baseline in percent,
    as `eval_meta_data.csv` has it."""
    return (accuracy - 0.01 * baseline_percent) / (1 - 0.01 * baseline_percent)


def core(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> float:
    """The mean of the centered accuracies; of 22 labels it is CORE. Raises ValueError for none at all."""
    if not accuracies:
        raise ValueError("CORE is a mean of tasks, and there is none")
    return sum(centered(accuracy, baselines[label]) for label, accuracy in accuracies.items()) / len(accuracies)


class Bundle:
    """A CORE bundle: a folder, a `.zip` file, or the URI or `hub:OWNER/NAME[/PATH]` of either.

    Raises FileNotFoundError or ValueError.

    `tasks` are those whose data is there. `incomplete` says of every other label of `core.yaml` what is missing; a
    label whose data is a part, `subsets/NAME_*.jsonl`, is among both.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._files = _Files(source)
        config, baselines = self._config(), self._baselines()
        self.tasks: list[CoreTask] = []
        self.incomplete: dict[str, str] = {}
        names = self._files.names
        for entry in config:
            label, uri = entry["label"], entry["dataset_uri"]
            if label not in baselines:
                raise ValueError(
                    f"{source}: eval_meta_data.csv has no random baseline for {label}, which core.yaml lists"
                )
            path = f"eval_data/{uri}"
            if path not in names:
                stem = posixpath.splitext(posixpath.basename(uri))[0]
                part = next((name for name in sorted(names) if name.startswith(f"subsets/{stem}_")), None)
                self.incomplete[label] = f"only {part}" if part else f"no {path}"
                if part is None:
                    continue
                path = part
            self.tasks.append(
                CoreTask(
                    label,
                    baselines[label] / 100,
                    entry["num_fewshot"][0],
                    entry["icl_task_type"],
                    entry.get("continuation_delimiter", " "),
                    self._files,
                    path,
                )
            )
        if not self.tasks:
            raise FileNotFoundError(f"{source} has none of the data that core.yaml lists; get the bundle again")

    def _config(self) -> list[dict[str, Any]]:
        return self._files.read("core.yaml", self._entries)[1]

    def _entries(self, data: bytes) -> list[dict[str, Any]]:
        try:
            entries = yaml.safe_load(data)["icl_tasks"]
            for entry in entries:
                kind, shots = entry["icl_task_type"], entry["num_fewshot"][0]
                known = kind in _FIELDS and isinstance(shots, int) and shots >= 0
                if not (known and isinstance(entry["label"], str) and isinstance(entry["dataset_uri"], str)):
                    raise ValueError(f"task {entry.get('label')!r} is of kind {kind!r} with {shots!r} examples")
        except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.source}: core.yaml is not a list of tasks under `icl_tasks` ({error})") from error
        except ValueError as error:
            raise ValueError(f"{self.source}: core.yaml: {error}; the kinds are {', '.join(_FIELDS)}") from error
        return list(entries)

    def _baselines(self) -> dict[str, float]:
        return self._files.read("eval_meta_data.csv", self._percentages)[1]

    def _percentages(self, data: bytes) -> dict[str, float]:
        try:
            rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
            found = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"{self.source}: eval_meta_data.csv needs the columns `Eval Task` and `Random baseline` ({error!r})"
            ) from error
        if wrong := [label for label, baseline in found.items() if not 0 <= baseline < 100]:
            raise ValueError(
                f"{self.source}: eval_meta_data.csv: the random baseline of {wrong[0]} is {found[wrong[0]]}, and must "
                "be a percentage below 100"
            )
        return found


@dataclass(frozen=True)
class CoreTask:
    """One label of a bundle; a `tasks.ranking.RankedTask`."""

    name: str
    baseline: float
    few_shot: int
    kind: Kind
    delimiter: str
    files: _Files = field(repr=False)
    path: str

    @property
    def stamp(self) -> str:
        return hashlib.sha256(repr((self.kind, self.delimiter, self.baseline, self._content[0])).encode()).hexdigest()

    def questions(self, text: Text, limit: int | None) -> Iterator[Question]:
        """The first `limit` examples as questions, in the order of this module's head."""
        examples = self._examples()[:limit]
        # so small a limit would leave too few others
        pool = self._examples()[: self.few_shot + 1] if len(examples) <= self.few_shot else examples
        if len(pool) <= self.few_shot:
            raise ValueError(f"{self.path} has {len(pool)} examples; {self.name} shows {self.few_shot} before each")
        for index, example in enumerate(examples):
            others = [i for i in range(len(pool)) if i != index]
            chosen = random.Random(EXAMPLES + index).sample(others, self.few_shot)
            shots = "".join(f"{self._whole(pool[i])}\n\n" for i in chosen)
            yield question(self.kind, self._prompts(example, shots), example.get("gold"), text)

    def figures(self, answers: Sequence[Answer]) -> dict[str, float]:
        return accuracy([given.correct for given in answers], self.baseline)

    def _whole(self, example: dict[str, Any]) -> str:
        """An example with its answer, as it is shown before a question."""
        if self.kind == "multiple_choice":
            return f"{example['query']}{self.delimiter}{example['choices'][example['gold']]}"
        if self.kind == "schema":
            return f"{example['context_options'][example['gold']]}{self.delimiter}{example['continuation']}"
        return f"{example['context'].strip()}{self.delimiter}{example['continuation']}"

    def _prompts(self, example: dict[str, Any], shots: str) -> list[str]:
        if self.kind == "multiple_choice":
            return [f"{shots}{example['query']}{self.delimiter}{choice}" for choice in example["choices"]]
        if self.kind == "schema":
            return [f"{shots}{c}{self.delimiter}{example['continuation']}" for c in example["context_options"]]
        context = f"{shots}{example['context'].strip()}{self.delimiter}"
        # no white space before the continuation: it belongs to the continuation's first token
        return [context.strip(), context + example["continuation"]]

    def _examples(self) -> list[dict[str, Any]]:
        rows = self._content[1]
        order = list(range(len(rows)))
        random.Random(ORDER).shuffle(order)
        return [rows[i] for i in order]

    @cached_property
    def _content(self) -> tuple[str, list[dict[str, Any]]]:
        """SHA-256 of the file of questions, and these; read once, so that the answers are known by what was asked."""
        return self.files.read(self.path, self._rows)

    def _rows(self, data: bytes) -> list[dict[str, Any]]:
        try:
            lines = data.decode().split("\n")  # a line of JSON may hold other line breaks
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8: {error}; get that file again") from error
        return [self._checked(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _checked(self, number: int, line: str) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}; get that file again") from error
        wanted = _FIELDS[self.kind]
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in wanted.items()):
            raise ValueError(f"{where}: a question of kind {self.kind} has {', '.join(wanted)}; get that file again")
        options: list[Any] = row.get("choices") or row.get("context_options") or []
        if "gold" in wanted and not 0 <= row["gold"] < len(options):
            raise ValueError(f"{where}: the right answer is number {row['gold']} of {len(options)}")
        return row


class _Files:
    """The files of a bundle by their path within it, wherever they lie; a bundle may be one folder down."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._filesystem, self._root = filesystem_of(fetched(source))
        self._zip = None
        if source.partition("?")[0].lower().endswith(".zip"):
            try:
                self._zip = zipfile.ZipFile(self._filesystem.open_input_file(self._root))
            except ZIP_FAULTS as error:
                raise ValueError(f"{source} is no zip file ({error}); get it again") from error
            paths = [name for name in self._zip.namelist() if not name.endswith("/")]
        else:
            selector = pafs.FileSelector(self._root, recursive=True)
            infos = self._filesystem.get_file_info(selector)
            paths = [posixpath.relpath(i.path, self._root) for i in infos if i.type == pafs.FileType.File]
        heads = sorted((path for path in paths if Path(path).name == "core.yaml"), key=lambda path: path.count("/"))
        if not heads:
            raise FileNotFoundError(
                f"{source} is no CORE bundle: it has no core.yaml; give the folder or .zip that holds core.yaml, "
                "eval_meta_data.csv and eval_data/"
            )
        self._head = heads[0].removesuffix("core.yaml")
        self.names = {path.removeprefix(self._head) for path in paths if path.startswith(self._head)}

    def read(self, name: str, parse: Callable[[bytes], Parsed]) -> tuple[str, Parsed]:
        """SHA-256 of a file, and what `parse` makes of it. Raises FileNotFoundError, or `parse`'s ValueError where two
        readings agree, as a single one may be at fault where the file is whole."""
        if name not in self.names:
            raise FileNotFoundError(f"{self._source} has no {name}; get the bundle again")
        before = ""
        while True:
            try:
                data = self._bytes(name)
                return hashlib.sha256(data).hexdigest(), parse(data)
            except ValueError as error:
                if str(error) == before:
                    raise
                before = str(error)

    def _bytes(self, name: str) -> bytes:
        if self._zip is not None:
            try:
                return self._zip.read(self._head + name)
            except ZIP_FAULTS as error:
                raise ValueError(f"{self._source}: {name} cannot be read ({error}); get the zip file again") from error
        with self._filesystem.open_input_stream(posixpath.join(self._root, self._head + name)) as stream:
            return bytes(stream.readall())
