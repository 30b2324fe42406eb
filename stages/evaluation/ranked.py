"""Ranked tasks, from their questions to their figures, through one queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from stages.evaluation.pool import ScorePool
from stages.evaluation.score import Request, Score
from tasks.ranking import Answer, Question, RankedTask, Text, answer, within

AT_ONCE = 256  # questions whose tokens are in memory


@dataclass
class Asked:
    """A task under way. `questions` is how many there are, once that is known; `fault` why it cannot be asked."""

    task: RankedTask
    began: float = field(default_factory=time.monotonic)
    answers: dict[int, Answer] = field(default_factory=dict)
    questions: int | None = None
    fault: str | None = None

    def grade(self, first: int, questions: Sequence[Question], scores: Sequence[Score]) -> None:
        """Grades the questions from index `first` on, by the scores of all their options in order. Raises ValueError
        for scores that rank nothing."""
        if not all(math.isfinite(score.loss) for score in scores):
            raise ValueError(
                "the model's scores are no numbers (nan or inf): its weights are damaged, or too large for what it "
                "computes in; try --precision fp32"
            )
        of_next = iter(scores)
        for index, question in enumerate(questions, first):
            mine = [next(of_next) for _ in question.options]
            self.answers[index] = answer(question, [score.loss for score in mine], mine[0].greedy)

    @property
    def done(self) -> bool:
        return self.fault is None and len(self.answers) == self.questions

    def examples(self) -> list[dict[str, Any]]:
        """One a question: whether it was answered right, and the mean log-likelihood of each option."""
        ordered = sorted(self.answers.items())
        named = {"task": self.task.name}
        return [named | {"index": i, "correct": a.correct, "scores": [-x for x in a.losses]} for i, a in ordered]

    def figures(self) -> dict[str, Any]:
        """What is reported of the task when it is done."""
        measured = self.task.figures([answer for _, answer in sorted(self.answers.items())])
        counted = {"examples": len(self.answers), "few_shot": self.task.few_shot}
        return measured | counted | {"seconds": time.monotonic() - self.began}


def ask(
    pool: ScorePool,
    tasks: Sequence[RankedTask],
    text: Text,
    limit: int | None,
    progress: Callable[[Asked], None] = lambda asked: None,
) -> Iterator[Asked]:
    """Each task as soon as all of its questions are answered, or cannot be asked: a question that the model's context
    has no room for, or data that cannot be read. `progress` is told whenever some more of a task are answered."""
    for (asked, first, questions), scores in pool.scores(_jobs(tasks, text, pool.spec.sequence_len, limit)):
        if questions and asked.fault is None:
            try:
                asked.grade(first, questions, scores)
            except ValueError as error:
                asked.fault = str(error)
                yield asked
                continue
            progress(asked)
        if asked.done or (asked.fault and not questions):
            yield asked


Job = tuple[tuple[Asked, int, list[Question]], list[Request]]


def _jobs(tasks: Sequence[RankedTask], text: Text, context: int, limit: int | None) -> Iterator[Job]:
    """Some questions of a task at a time, with a request for each of their options; none where the task is at fault."""
    for task in tasks:
        asked, first = Asked(task), 0
        try:
            coming = task.questions(text, limit)
            questions = list(islice(coming, AT_ONCE))
            if not questions:
                raise ValueError("it has no questions")
            while questions and asked.fault is None:
                following = list(islice(coming, AT_ONCE))
                if not following:
                    asked.questions = first + len(questions)
                fitting = [within(question, context) for question in questions]
                yield (asked, first, questions), [request for question in fitting for request in _requests(question)]
                first, questions = first + len(questions), following
        except (ValueError, OSError) as error:
            if asked.fault is None:
                asked.fault = str(error)
                yield (asked, first, []), []


def _requests(question: Question) -> Iterator[Request]:
    for option, start in zip(question.options, question.starts, strict=True):
        yield Request(np.array(option, dtype=np.int64), start)
