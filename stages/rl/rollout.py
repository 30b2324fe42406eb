"""Sampling: engines in Ray actors, and what happens when one of these dies or hangs.

An actor holds one engine, vLLM or plain torch, in its own process and drives it itself (models/generate.py), so that a
completion which called a tool goes on in the very next engine step, in one batch with all others. Draws are seeded by
caller, prompt and sample: the same weights give the same completions with any number of actors, and when some are lost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import ray
import torch
import torch.distributed as dist
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch import Tensor

from cluster.resources import Devices
from cluster.usage import Usage
from models.generate import Completion, Engine, TorchEngine, complete
from models.hf import read_spec
from models.vllm_engine import CPU_ENV, GPU_ENV, VLLMEngine
from stages.context import Say, warn
from stages.evaluation.text import Tools, open_text
from stages.rl.weights import Transfer, digest
from stages.training.parallel import World, keep_freed_memory

logger = logging.getLogger(__name__)

Completions = list[list[Completion]]  # of each prompt its samples
Places: TypeAlias = PlacementGroupSchedulingStrategy | Literal["SPREAD"]  # of actors

TRIES = 3
TICK_S = 1.0  # between two looks at how the actors are
LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)


def choose(engine: str, placement: str, devices: Devices, workers: int) -> tuple[str, str]:
    """Engine and placement where these are "auto": vLLM if it is installed; split where GPUs are left beside the
    learner's workers."""
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "torch"
    if placement == "auto":
        placement = "split" if devices.gpus > workers else "shared"
    return engine, placement


@contextmanager
def reserved(devices: Devices, actors: int) -> Iterator[Places]:
    """Places for `actors` on all nodes. GPUs are taken together, once there are enough: an actor that held one while
    another waits could keep the stage beside from what both wait for."""
    if devices.kind == "cpu":
        yield "SPREAD"
        return
    group = placement_group([{"GPU": 1}] * actors)
    try:
        ray.get(group.ready())
        yield PlacementGroupSchedulingStrategy(group)
    finally:
        remove_placement_group(group)


@ray.remote(max_restarts=0, concurrency_groups={"health": 1})
class RolloutActor:
    def __init__(self, fetch: Callable[[], Path], engine: str, on_gpu: bool, shared: bool, tools: Tools) -> None:
        if not on_gpu:
            keep_freed_memory()
        directory = fetch()
        self.turns = open_text(directory).turns(tools)
        self.context = read_spec(directory).sequence_len
        self.engine: Engine = (
            VLLMEngine(directory, on_gpu, shared) if engine == "vllm" else TorchEngine(directory, on_gpu)
        )
        self.version = 0
        # a shared device is told by the learner
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if on_gpu and not shared else None
        self.usage = Usage(own)

    @ray.method(concurrency_group="health")
    def alive(self) -> dict[str, float]:
        """Answers beside whatever else the actor does, with what it takes."""
        return self.usage.look()

    def load(self, state: dict[str, Tensor], version: int) -> None:
        self.engine.load(state)
        self.loaded(version)

    def loaded(self, version: int) -> None:
        self.engine.loaded()
        self.version = version

    def transfer(self, method: str, arguments: dict[str, Any]) -> None:
        """A step of vLLM's weight transfer."""
        assert isinstance(self.engine, VLLMEngine)
        self.engine.call(method, **arguments)

    def digest(self, shapes: dict[str, torch.Size]) -> str:
        return digest(self.engine.weights(shapes))

    def generate(
        self, prompts: list[list[int]], seeds: list[tuple[int, ...]], samples: int, max_new_tokens: int, greedy: bool
    ) -> Completions:
        engine = self.engine.sampler
        groups = complete(engine, self.turns, prompts, seeds, samples, max_new_tokens, self.context, greedy)
        for completion in (c for group in groups for c in group):
            completion.weight_version = self.version
        self.engine.rest()
        return groups


class _Member:
    """An actor of the pool, how long it has been silent, and what it said last that it takes."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.started = handle, False
        self.usage: dict[str, float] = {}
        self._ask()

    def _ask(self) -> None:
        self._question, self._asked = self.handle.alive.remote(), time.monotonic()

    def silence(self) -> float:
        """Seconds for which a question was left without an answer. Asks the next one when there was one."""
        if ray.wait([self._question], timeout=0)[0]:
            self.started = True
            with contextlib.suppress(ray.exceptions.RayError):  # it died, which its next call tells
                self.usage = ray.get(self._question)
            self._ask()
        return time.monotonic() - self._asked


class Rollout:
    """Completions under way; the `seconds` that sampling took are known with them."""

    seconds: float

    def __init__(self, job: Future[tuple[Completions, float]] | None, shares: list[int], world: World | None):
        self._job, self._shares, self._world = job, shares, world

    def result(self) -> Completions:
        """The completions of each prompt, in order; to be called once, and by every rank of a split pool."""
        groups, self.seconds = self._job.result() if self._job else ([], 0.0)
        if self._world is None:
            return groups
        parts: list[Any] = []
        for share in self._shares:
            parts.append((groups[:share], self.seconds))
            groups = groups[share:]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts or None, group=self._world.host)
        groups, self.seconds = mine[0]
        return groups


class RolloutPool:
    """Actors that share out every batch of prompts.

    Shared, each rank of the learner has a pool beside itself, on its own device. Split, the first rank's pool has
    devices of its own, in `places` where there are such, and samples for all ranks.

    An actor that dies, leaves the question whether it is alive unanswered for `health_timeout` seconds, or works on one
    call for more than `timeout` seconds is replaced by one with the current weights, and its prompts are sampled again.
    After TRIES such losses in one call the pool gives up with RuntimeError. `replaced` counts them and `say` tells of
    each.
    """

    def __init__(
        self,
        fetch: Callable[[], Path],
        devices: Devices,
        actors: int,
        *,
        tools: Tools,
        engine: str = "vllm",
        placement: str = "shared",
        places: Places | None = None,
        world: World | None = None,
        timeout: float = 600.0,
        health_timeout: float = 30.0,
        say: Say = warn,
    ) -> None:
        on_gpu, self._shared = devices.kind == "cuda", placement == "shared"
        self._world = world if world is not None and world.size > 1 and not self._shared else None
        self._on_gpu, self._direct = on_gpu, on_gpu and engine == "vllm"
        self._places = places
        self._arguments = (fetch, engine, on_gpu, self._shared, tools)
        self._timeout, self._health_timeout, self._say = timeout, health_timeout, say
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        # what gives the weights in the object store, and their version
        self._current: tuple[Callable[[], Any], int] | None = None
        self._transfer: Transfer | None = None
        self._closed, self.replaced = False, 0
        # sampling and syncs, one after the other; CUDA's current device is a thread's own
        on_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._jobs = ThreadPoolExecutor(1, initializer=on_device)
        self._members = [self._start() for _ in range(actors if self._world is None or self._world.rank == 0 else 0)]

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for member in self._members:
            ray.kill(member.handle)
        self._jobs.shutdown(cancel_futures=True)

    def _start(self) -> _Member:
        env = GPU_ENV if self._on_gpu else CPU_ENV
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": self._places or here}
        if self._on_gpu and self._shared:  # the trainer's own device, which Ray hides from an actor that asks for none
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
            env = env | {"CUDA_VISIBLE_DEVICES": visible[int(os.environ.get("LOCAL_RANK", 0)) % len(visible)]}
        elif self._on_gpu:
            options |= {"num_gpus": 1, "scheduling_strategy": self._places or "SPREAD"}
        options["runtime_env"] = {"env_vars": env}
        return _Member(RolloutActor.options(**options).remote(*self._arguments))  # type: ignore[attr-defined]

    def sync(self, state: Mapping[str, Tensor], version: int, check: bool = True, lasting: bool = False) -> float:
        """Gives every actor these weights (`models.hf.engine_state`); returns the seconds it took. `lasting` says that
        the caller leaves them as they are until the pool samples no more with them, and has the memory for them.

        With `check`, RuntimeError where an engine then computes with other weights, found by reading its own.
        """
        began = time.perf_counter()
        if self._on_gpu and self._shared:
            torch.cuda.empty_cache()  # what the trainer only keeps in reserve, the engine needs
        if self._members:
            self._jobs.submit(self._sync, state, version, check, lasting).result()
        return time.perf_counter() - began

    def usage(self) -> dict[str, float]:
        """What each actor takes, by its last answer: `actor0_rss_gb` and others of `cluster.usage`."""
        for member in self._members:
            member.silence()
        return {f"actor{a}_{name}": v for a, member in enumerate(self._members) for name, v in member.usage.items()}

    def _sync(self, state: Mapping[str, Tensor], version: int, check: bool, lasting: bool) -> None:
        def store() -> Any:
            # copies, as a view into a larger buffer would be sent with all of it
            return ray.put({n: weight.detach().to("cpu", self._dtype, copy=True) for n, weight in state.items()})

        if self._direct and lasting:  # only an actor that is replaced needs them by way of the host
            self._current = (functools.cache(store), version)
        else:
            reference = store()
            self._current = (lambda: reference, version)
        if self._direct:
            self._each(lambda actor, _: actor.alive.remote())  # a transfer waits for all of its engines
            try:
                if self._transfer is None:
                    self._transfer = Transfer([m.handle for m in self._members], self._shared, self._timeout)
                self._transfer.send({name: weight.detach().to(self._dtype) for name, weight in state.items()})
                self._each(lambda actor, _: actor.loaded.remote(version))
            except (*LOST, ray.exceptions.GetTimeoutError) as error:
                for a in range(len(self._members)):  # the others wait within the transfer
                    self._replace(a, f"did not take new weights ({type(error).__name__})", losses=1)
        else:
            self._each(lambda actor, _: self._load(actor))
        if check:
            shapes = {name: weight.shape for name, weight in state.items()}
            expected = digest({name: weight.detach().to(self._dtype) for name, weight in state.items()})
            for a, held in enumerate(self._each(lambda actor, _: actor.digest.remote(shapes))):
                if held != expected:
                    raise RuntimeError(
                        f"rollout actor {a} computes with weights {held[:12]}, the trainer sent {expected[:12]}"
                    )

    def _load(self, actor: Any) -> Any:
        assert self._current is not None
        stored, version = self._current
        return actor.load.remote(stored(), version)

    def sample(self, *arguments: Any, **options: Any) -> Completions:
        """`start` and its result."""
        return self.start(*arguments, **options).result()

    def start(
        self,
        prompts: list[list[int]],
        seeds: Sequence[tuple[int, ...]],
        samples: int,
        max_new_tokens: int,
        greedy: bool = False,
    ) -> Rollout:
        """Begins `samples` completions of each prompt at temperature 1 over the whole vocabulary; `seeds` has a seed
        for each prompt. Every rank of a split pool calls it, with its own prompts."""
        shares: list[Any] = []
        if self._world is not None:
            shares = [None] * self._world.size if self._world.rank == 0 else []
            dist.gather_object((prompts, list(seeds)), shares or None, group=self._world.host)
            prompts, seeds = [p for share in shares for p in share[0]], [s for share in shares for s in share[1]]
        arguments = (prompts, seeds, samples, max_new_tokens, greedy)
        job = self._jobs.submit(self._sample, *arguments) if self._members else None
        return Rollout(job, [len(share[0]) for share in shares], self._world)

    def _sample(
        self, prompts: list[list[int]], seeds: Sequence[tuple[int, ...]], *arguments: Any
    ) -> tuple[Completions, float]:
        began, n = time.perf_counter(), len(self._members)
        parts = self._each(lambda actor, a: actor.generate.remote(prompts[a::n], seeds[a::n], *arguments))
        groups = [parts[i % n][i // n] for i in range(len(prompts))]
        version = self._current[1] if self._current else 0
        if any(c.weight_version != version for group in groups for c in group):
            raise RuntimeError(f"a rollout was sampled with other weights than those of version {version}")
        return groups, time.perf_counter() - began

    def _each(self, call: Callable[[Any, int], Any]) -> list[Any]:
        """The results of one call to every actor; calls to lost actors are made again to their replacements."""
        results: dict[int, Any] = {}
        losses: Counter[int] = Counter()
        made = {a: (call(member.handle, a), time.monotonic()) for a, member in enumerate(self._members)}
        while made:
            ray.wait([reference for reference, _ in made.values()], timeout=TICK_S)
            for a, (reference, since) in list(made.items()):
                problem = ""
                if ray.wait([reference], timeout=0)[0]:
                    try:
                        results[a] = ray.get(reference)
                        del made[a]
                    except LOST as error:
                        if getattr(error, "actor_init_failed", False):
                            raise
                        problem = f"died ({type(error).__name__})"
                else:
                    problem = self._problem(self._members[a], time.monotonic() - since)
                if problem:
                    losses[a] += 1
                    self._replace(a, problem, losses[a])
                    made[a] = (call(self._members[a].handle, a), time.monotonic())
        return [results[a] for a in range(len(self._members))]

    def _problem(self, member: _Member, seconds: float) -> str:
        """Why an actor that has worked on one call for `seconds` is lost; empty when it is not."""
        silence = member.silence()
        if member.started and silence > self._health_timeout:
            return f"hangs: no answer for {silence:.0f} s"
        return f"is overdue: one call took more than {self._timeout:.0f} s" if seconds > self._timeout else ""

    def _replace(self, a: int, problem: str, losses: int) -> None:
        if self._closed or losses == TRIES:
            raise RuntimeError(f"rollout actor {a} {problem}, for the {losses}. time in one call")
        self._say(f"rollout actor {a} {problem}; a new one takes over", "replaced actor")
        ray.kill(self._members[a].handle)
        self._members[a] = self._start()
        self.replaced += 1
        self._transfer = None  # its group had the old actor in it
        if self._current:
            self._load(self._members[a].handle)  # calls to an actor run in order, so it loads before it samples
