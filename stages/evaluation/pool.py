"""The scorer on every device of the cluster: one queue of batches, of one task after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.resources import Devices
from models.hf import from_pretrained, read_spec
from models.spec import ModelSpec
from stages.evaluation.score import TOKENS_AT_ONCE, Request, Score, Tree, batches, grow, score
from stages.rl.rollout import Places

AHEAD = 2  # batches that an actor has, so that none waits for the next
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolved(precision: str, devices: Devices) -> str:
    """What "auto" stands for: bf16 on GPUs, fp32 on CPUs."""
    if precision != "auto":
        return precision
    return "bf16" if devices.kind == "cuda" else "fp32"


@ray.remote(max_restarts=2, max_task_retries=2)
class ScoreActor:
    """One copy of the model on one device; a batch that it dies with is scored again."""

    def __init__(self, fetch: Callable[[], Path], on_gpu: bool, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        self.model = from_pretrained(fetch(), TYPES[precision]).to("cuda" if on_gpu else "cpu")

    def score(self, batch: Sequence[Tree]) -> dict[int, Score]:
        return score(self.model, batch)


class ScorePool:
    """Scores requests under the model that `fetch` brings to a machine, in `actors` of `devices`, at `places`.

    `precision` is "fp32", "bf16" or "auto".
    """

    def __init__(
        self, fetch: Callable[[], Path], devices: Devices, actors: int, places: Places, precision: str = "auto"
    ) -> None:
        self.spec: ModelSpec = read_spec(fetch())
        on_gpu = devices.kind == "cuda"
        self._tokens_at_once = TOKENS_AT_ONCE[devices.kind]
        threads = devices.threads(1 if on_gpu else actors)
        precision = resolved(precision, devices)
        options = {"num_gpus": int(on_gpu), "num_cpus": 0, "scheduling_strategy": places}
        remote = ScoreActor.options(**options)  # type: ignore[attr-defined]
        self._actors = [remote.remote(fetch, on_gpu, threads, precision) for _ in range(actors)]

    def __enter__(self) -> ScorePool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def scores(self, jobs: Iterable[tuple[Any, Sequence[Request]]]) -> Iterator[tuple[Any, list[Score]]]:
        """Each job's key with the scores of its requests, in their order, as jobs end. The next job is begun while the
        last batches of the one before are under way."""
        idle = deque(actor for _ in range(AHEAD) for actor in self._actors)
        under_way: dict[ray.ObjectRef[dict[int, Score]], tuple[int, Any]] = {}  # its job and its actor
        open_jobs: dict[int, tuple[Any, list[Score | None], int]] = {}  # key, scores, batches not yet begun or back

        def collect() -> Iterator[tuple[Any, list[Score]]]:
            (ready, *_), _ = ray.wait([*under_way], num_returns=1)
            number, actor = under_way.pop(ready)
            idle.append(actor)
            key, found, left = open_jobs[number]
            for i, of_one in ray.get(ready).items():
                found[i] = of_one
            open_jobs[number] = (key, found, left - 1)
            if left == 1:
                del open_jobs[number]
                yield key, [of_one for of_one in found if of_one is not None]

        for number, (key, requests) in enumerate(jobs):
            todo = list(batches(grow(requests, self.spec), self._tokens_at_once))
            open_jobs[number] = (key, [None] * len(requests), len(todo))
            if not todo:
                del open_jobs[number]
                yield key, []
            for batch in todo:
                while not idle:
                    yield from collect()
                actor = idle.popleft()
                under_way[actor.score.remote(batch)] = (number, actor)
        while under_way:
            yield from collect()
