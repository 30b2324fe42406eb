"""How fast CORE is answered: `python -m bench.evaluate MODEL --eval-data BUNDLE`.

The scorer, on all cores, beside an evaluator that asks one question at a time and computes all logits of every option,
as nanochat's does; with --nanochat FILE, its own core_eval.py. Both have the same model and examples, in one run; the
answers are compared, too. Loading and starting count for neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import watching_memory, write
from cluster.resources import resources
from cluster.runtime import connect
from models.hf import from_pretrained
from models.layers import LanguageModel
from stages.evaluation.pool import ScorePool
from stages.evaluation.ranked import ask
from stages.evaluation.score import Request
from stages.evaluation.text import open_text
from tasks.core import ORDER, Bundle, CoreTask
from tasks.ranking import Text, answer, within

Answers = dict[str, list[bool | None]]  # of each task; None for a question that an evaluator refuses


class Logits(nn.Module):
    """The model as nanochat's evaluator calls it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.max_seq_len = model, model.spec.sequence_len

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.logits(ids)


class Encode:
    """The tokenizer as nanochat's evaluator calls it."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def get_bos_token_id(self) -> int:
        return self.text.bos

    def __call__(self, prompts: Sequence[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self.text.encode(prompt)] for prompt in prompts]


def of_nanochat(
    file: Path, model: LanguageModel, text: Text, bundle: Path, tasks: list[CoreTask], limit: int
) -> Answers:
    """The answers of the evaluator in `file`, which is nanochat's core_eval.py."""
    spec = importlib.util.spec_from_file_location("core_eval", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    answers: Answers = {}
    for task in tasks:
        lines = (bundle / task.path).read_text(encoding="utf-8").split("\n")
        data = [json.loads(line) for line in lines if line.strip()]
        random.Random(ORDER).shuffle(data)
        data = data[:limit]
        meta = {"task_type": task.kind, "num_fewshot": task.few_shot, "continuation_delimiter": task.delimiter}
        asked = (Logits(model), Encode(text), data, "cpu", meta)
        answers[task.name] = []
        for i in range(len(data)):
            try:
                answers[task.name].append(bool(theirs.evaluate_example(i, *asked)))
            except AssertionError:  # of a continuation longer than the context
                answers[task.name].append(None)
    return answers


@torch.no_grad()
def one_by_one(model: LanguageModel, text: Text, tasks: list[CoreTask], limit: int) -> Answers:
    """The same, plainly: a question at a time, and all logits of every option."""
    answers: Answers = {}
    for task in tasks:
        answers[task.name] = []
        for asked in task.questions(text, limit):
            fitting = within(asked, model.spec.sequence_len)
            width = max(map(len, fitting.options))
            ids = torch.tensor([[*option, *[text.bos] * (width - len(option))] for option in fitting.options])
            scores = model.logits(ids)
            losses = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses = losses.view(len(ids), -1)
            spans = [
                slice(start - 1, len(option) - 1) for option, start in zip(fitting.options, fitting.starts, strict=True)
            ]
            likeliest = scores[0, :-1].argmax(-1) == ids[0, 1:]
            means = [float(row[span].mean()) for row, span in zip(losses, spans, strict=True)]
            answers[task.name].append(answer(fitting, means, bool(likeliest[spans[0]].all())).correct)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a model, such as runs/NAME/base")
    parser.add_argument("--eval-data", required=True, help="a CORE bundle")
    parser.add_argument("--limit", type=int, default=100, help="examples a label (default 100)")
    parser.add_argument("--labels", help="only these labels, with commas between")
    parser.add_argument(
        "--nanochat", type=Path, metavar="FILE", help="nanochat's nanochat/core_eval.py, to compare with"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/evaluate-cpu.json"), help="JSON file to write")
    args = parser.parse_args()
    bundle = Bundle(args.eval_data)
    wanted = args.labels.split(",") if args.labels else [task.name for task in bundle.tasks]
    tasks = [task for task in bundle.tasks if task.name in wanted]
    connect(False)
    devices = resources()
    text = open_text(args.model)
    with ScorePool(args.model.resolve, devices, devices.cpus, "SPREAD", "fp32") as pool:
        least = [Request(np.array([text.bos, text.bos]), 1)]
        list(pool.scores((i, least) for i in range(devices.cpus)))  # every actor has loaded its model
        with watching_memory() as peak:
            began = time.perf_counter()
            answered = list(ask(pool, tasks, text, args.limit))
            seconds = time.perf_counter() - began
    for asked in answered:
        if asked.fault:
            print(f"{asked.task.name} is left out: {asked.fault}")
    found = {a.task.name: [example["correct"] for example in a.examples()] for a in answered if not a.fault}
    tasks = [task for task in tasks if task.name in found]
    torch.set_num_threads(devices.threads(1))
    model = from_pretrained(args.model)
    began = time.perf_counter()
    if args.nanochat:
        expected = of_nanochat(args.nanochat, model, text, Path(args.eval_data), tasks, args.limit)
    else:
        expected = one_by_one(model, text, tasks, args.limit)
    beside = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    for task in tasks:
        pairs = list(zip(found[task.name], expected[task.name], strict=True))
        same, refused = sum(a == b for a, b in pairs), sum(b is None for _, b in pairs)
        right = sum(map(bool, found[task.name]))
        print(
            f"{task.name:<36} {len(pairs):>6} examples, {right:>5} right, {len(pairs) - refused - same} answered "
            f"otherwise, {refused} refused"
        )
        rows.append({"label": task.name, "examples": len(pairs), "right": right, "same": same, "refused": refused})
    other = "nanochat's evaluator" if args.nanochat else "one question at a time"
    print(
        f"{seconds:.1f} s beside {beside:.1f} s of {other}: {beside / seconds:.2f} times as fast; {peak['gib']:.2f} GiB"
    )
    rows.append({"seconds": seconds, "beside_seconds": beside, "beside": other, "ratio": beside / seconds, **peak})
    write("evaluate", rows, args.out)


if __name__ == "__main__":
    main()
