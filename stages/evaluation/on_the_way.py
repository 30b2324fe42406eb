"""CORE of a model in training."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from corpus.tokenizers import Tokenizer
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.evaluation.score import TOKENS_AT_ONCE, Request, batches, grow, score
from stages.evaluation.text import Ours
from stages.training.parallel import World, autocast
from tasks.core import Bundle, core
from tasks.ranking import answer, within


class CoreOnTheWay:
    """Asks the first `examples` of each label of a bundle, always the same, of a model as it is; every rank takes part.

    `left_out` are the labels whose answers have no room in the model's context, which are not asked. Raises
    FileNotFoundError or ValueError for a bundle that cannot be read, ValueError where all are left out.
    """

    def __init__(
        self, data: str, examples: int, tokenizer: Tokenizer, spec: ModelSpec, world: World, precision: str
    ) -> None:
        self.world, self.precision = world, precision
        self.tasks, self.questions, requests = [], [], list[Request]()
        self.left_out: list[str] = []
        for task in Bundle(data).tasks:
            asked = list(task.questions(Ours(tokenizer), examples))
            try:
                fitting = [within(question, spec.sequence_len) for question in asked]
            except ValueError:
                self.left_out.append(task.name)
                continue
            self.tasks.append(task)
            self.questions.append(fitting)
            for question in fitting:
                pairs = zip(question.options, question.starts, strict=True)
                requests += [Request(np.array(option, dtype=np.int64), start) for option, start in pairs]
        if not self.tasks:
            raise ValueError(
                f"base.core_every: no answer of {data} has room in a context of {spec.sequence_len} tokens: set "
                "base.core_every=0, or a larger model.sequence_len"
            )
        self.count = len(requests)
        self.batches = list(batches(grow(requests, spec), TOKENS_AT_ONCE[world.device.type]))

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """`val_core`, the mean of the labels' centered accuracies."""
        found = torch.zeros(self.count, 2, dtype=torch.float64, device=self.world.device)  # losses, greedy
        eager = torch.compiler.set_stance("force_eager")  # rows of many lengths, each seen once
        with torch.no_grad(), eager, autocast(self.world.device, self.precision):
            for first in range(0, len(self.batches), self.world.size):
                place = first + self.world.rank
                # every rank runs the model equally often, as sharded weights need, on a batch that some do not count
                scores = model.run(partial(score, model, self.batches[min(place, len(self.batches) - 1)]))
                for number, scored in scores.items() if place < len(self.batches) else ():
                    found[number, 0], found[number, 1] = scored.loss, scored.greedy
        losses, greedy = self.world.sum(found).T.tolist()
        accuracies, first = {}, 0
        for task, questions in zip(self.tasks, self.questions, strict=True):
            right = 0
            for question in questions:
                mine = slice(first, first + len(question.options))
                right += answer(question, losses[mine], bool(greedy[first])).correct
                first = mine.stop
            accuracies[task.name] = right / len(questions)
        return {"val_core": core(accuracies, {task.name: 100 * task.baseline for task in self.tasks})}
