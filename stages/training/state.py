"""Checkpoints of a stage: saved beside training, uploaded with verification, complete only with their manifest.

Each rank writes its part with torch.distributed.checkpoint into a directory of its own, uploads it, and leaves a list
of what it uploaded. The first rank waits for all lists and writes the manifest. Storage is the meeting point, so saving
in the background needs no collective beyond DCP's own, which have a process group to themselves.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from cluster import manifest
from cluster.manifest import Manifest
from cluster.storage import DamagedError, FileEntry, Storage, StorageError
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, Tokenizer
from models.build import build
from models.hf import save_pretrained
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.context import StageContext
from stages.training.metrics import SUMMARY, Reporter, read_records
from stages.training.optimizer import Optimizer
from stages.training.parallel import World, full_weights, is_sharded
from stages.training.reader import METADATA, CheckpointReader

STAGE_STATE = "stage-"  # files of a checkpoint, one a rank, with what only the stage itself knows of
PART_TIMEOUT = 1800.0  # seconds the first rank waits for another rank's upload


@dataclass
class Progress:
    """How far training is, and the best validation so far. A checkpoint holds it.

    What is validated is better when it is lower: bits a byte, or in RL the share of samples that do not solve.
    """

    step: int = 0
    best: float = math.inf
    best_step: int = -1
    evaluations_since_best: int = 0
    evaluated_step: int = -1

    def evaluated(self, value: float) -> None:
        """Takes note of a validation at the present step. Weights that are not trained are never best."""
        self.evaluated_step = self.step
        if self.step == 0:
            return
        self.evaluations_since_best += 1
        if value < self.best:
            self.best, self.best_step, self.evaluations_since_best = value, self.step, 0

    def tensor(self) -> Tensor:
        return torch.tensor(astuple(self), dtype=torch.float64)

    @staticmethod
    def of(values: Tensor) -> Progress:
        """What `tensor` made; ValueError where it is something else."""
        step, best, best_step, since, evaluated = values.tolist()
        if math.isnan(best) or not all(value.is_integer() for value in (step, best_step, since, evaluated)):
            raise ValueError("its progress counts nothing")
        return Progress(int(step), best, int(best_step), int(since), int(evaluated))


def publish_model(
    context: StageContext,
    model: LanguageModel,
    tokenizer: Tokenizer,
    reporter: Reporter,
    world: World,
    scratch: Path,
    page: Callable[[Path], None] | None = None,
) -> None:
    """Makes weights, tokenizer, metrics, samples and the report that `page` writes this stage's artifact, by way of
    `scratch`. Every rank takes part."""
    whole = gathered(model, world)
    if whole is not None:
        directory = scratch / "artifact"
        export(whole, tokenizer, directory, DOCUMENT_ENDS if context.stage == "base" else ANSWER_ENDS)
        reporter.write(directory)
        if page is not None:
            page(directory / manifest.REPORT)
        context.publish(directory, reporter.latest(*SUMMARY), reporter.seconds, reporter.stats())
    world.barrier()


def export(
    model: LanguageModel,
    tokenizer: Tokenizer,
    directory: Path,
    ends: Sequence[str] = ANSWER_ENDS,
    dtype: torch.dtype = torch.float32,
    temperature: float | None = None,
) -> None:
    """Writes into `directory` what transformers and vLLM load; with any of the special tokens `ends` it stops, and with
    a `temperature` it is sampled unless the caller says otherwise."""
    stops, pad = [i for name in ends for i in tokenizer.ids(name)], tokenizer.padding
    save_pretrained(model, directory, tokenizer.bos, stops, pad, dtype, temperature)
    tokenizer.save(directory, ends[0], model.spec.places)


def export_checkpoint(
    place: Storage, spec: ModelSpec, tokenizer: Tokenizer, directory: Path, ends: Sequence[str]
) -> None:
    """Writes into `directory`, as `export` does, the weights of the checkpoint at `place`, of a model of this shape.
    Raises StorageError."""
    model = build(spec)
    state = {"model": weights_of(model)}
    _, fault = _attempt(lambda: _load(place, state, _bring(place, _whole(place), state)))
    if fault is not None:
        raise _error(fault)
    export(model, tokenizer, directory, ends)


def gathered(model: LanguageModel, world: World) -> LanguageModel | None:
    """On the first rank the model with whole weights, on the CPU where they were sharded; None on the others."""
    if not is_sharded(model):
        return model if world.rank == 0 else None
    whole = build(model.spec) if world.rank == 0 else None
    target = dict(whole.named_parameters()) if whole else {}
    for name, weight in full_weights(model):
        if name in target:
            target[name].data.copy_(weight)
    return whole


def _step(path: str) -> int:
    """The step of the checkpoint that a file below their folder belongs to; -1 where that is none."""
    name = path.split("/")[0].removeprefix("step_")
    return int(name) if name.isdecimal() else -1


def scratch_bytes(model: LanguageModel, world: World) -> int:
    """What the ranks of a machine write to disk at a time: their parts of weights and two moments, and the artifact."""
    weights, here = 4 * model.spec.parameters, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 3 * weights * here // world.size + weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


Fault = tuple[bool, str]  # whether something is damaged, which a failure to read does not prove; and what is wrong
T = TypeVar("T")


def _attempt(function: Callable[[], T]) -> tuple[T | None, Fault | None]:
    """What `function` gives, or what was wrong with the storage."""
    try:
        return function(), None
    except (StorageError, OSError) as error:
        damaged = isinstance(error, DamagedError | FileNotFoundError)
        return None, (damaged, str(error).partition(" Make it again")[0])  # an artifact would have to be


def _error(fault: Fault) -> StorageError:
    damaged, text = fault
    return DamagedError(text) if damaged else StorageError(text)


def _whole(place: Storage) -> Manifest:
    """The manifest of a checkpoint that has all its files, at their sizes."""
    saved = manifest.read(place)
    if saved is None:
        raise DamagedError(f"{place.uri} has no {manifest.MANIFEST}")
    manifest.verify(place, saved)
    return saved


def _bring(
    place: Storage, saved: Manifest, state: dict[str, Any], wanted: Callable[[str], bool] = lambda _: False
) -> CheckpointReader:
    """Has the files here that loading `state` reads, and those `wanted`, each hash checked; a reader of them. Raises
    DamagedError where the checkpoint is of another state."""
    root, entries = manifest.local_root(place, saved.fingerprint), {f.path: f for f in saved.files}
    if METADATA not in entries:
        raise DamagedError(f"{place.uri}/{manifest.MANIFEST} lists no {METADATA}")
    manifest.fetch_file(place, entries[METADATA], root)
    reader, planner = CheckpointReader(root, saved), DefaultLoadPlanner()
    with _as_damage(place):
        planner.set_up_planner(state, reader.metadata)
        plan = planner.create_local_plan()
    names = reader.files(plan) | {path for path in entries if wanted(path)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: manifest.fetch_file(place, entries[name], root), sorted(names)))
    return reader


@contextlib.contextmanager
def _as_damage(place: Storage) -> Iterator[None]:
    """Whatever does not fit in a checkpoint whose files are as they were written is damage all the same."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedError(f"{place.uri} does not hold what is to be loaded: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _load(place: Storage, state: dict[str, Any], reader: CheckpointReader) -> None:
    """Loads `state`, in place, from what `_bring` gave for it. Raises on all ranks what failed on one; DamagedError
    where that was the content. Part of `state` is overwritten by then."""
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as failed:  # no Exception, so it would pass all who handle one
        causes = [cause for cause, _ in failed.failures.values()]
        for cause in causes:
            if isinstance(cause, (OSError, MemoryError, torch.OutOfMemoryError)) or not isinstance(cause, Exception):
                raise cause from failed
        # the words of torch would advise to let it run code
        why = "no tensor" if isinstance(causes[0], pickle.UnpicklingError) else _line(causes[0])
        raise DamagedError(f"{place.uri} could not be loaded, its files hold something else: {why}") from failed


def _progress(place: Storage, values: Tensor, step: int) -> Progress:
    """That of the checkpoint of `step`; raises DamagedError where `values`, which it held, are none."""
    with _as_damage(place):
        progress = Progress.of(values)
        if progress.step != step:
            raise ValueError(f"its progress is that of step {progress.step}")
    return progress


@dataclass
class _Found:
    """A checkpoint that fits by all that can be told before it is loaded."""

    saved: Manifest
    reader: CheckpointReader
    stage_state: list[Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]


class Checkpoints:
    """Saves and restores one stage. `scratch` is a local directory of this rank; `best_step` is kept, too.

    `stage_state` is what every rank, in order, had given to the `save` that was restored.
    """

    def __init__(self, context: StageContext, world: World, scratch: Path, reporter: Reporter, keep_last: int) -> None:
        self.context, self.world, self.scratch, self.reporter = context, world, scratch, reporter
        self.keep_last, self.best_step = keep_last, -1
        self.stage_state: list[Any] = []
        # of its own, as collectives in the background must not mix with training's; and gloo, as DCP saves from the CPU
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._publishing: Future[None] | None = None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def restore(
        self, model: nn.Module, optimizer: Optimizer, check: Callable[[list[Any]], object] = lambda _: None
    ) -> Progress:
        """Loads the newest whole checkpoint there is, whatever world and mode wrote it; the same one on every rank.
        `check` raises ValueError for a `stage_state` that no ranks' `save` was given.

        What is newer and damaged or half uploaded would mix with this attempt's parts, and is removed. StorageError
        where reading fails, as that does not mean that anything is damaged, and where none is left after weights were
        overwritten by one that turned out not to fit.
        """
        storage, values = self.context.storage, Progress().tensor()
        state = {"model": weights_of(model), "optimizer": optimizer.state_dict(), "progress": values}
        there, steps = self._first(
            lambda: (
                {_step(path) for path in storage.list(manifest.CHECKPOINTS)},
                [step for step, _ in manifest.checkpoints(storage)],
            )
        )
        removed, doubtful, spoiled = there - {*steps}, set[int](), False
        found, progress = None, Progress()
        while steps and not found:
            step = steps[-1]
            place = storage.at(manifest.checkpoint_path(step))
            try:
                fits = self._open(step, lambda place, saved: self._fitting(place, saved, state, check))
                spoiled = True
                _load(place, state, fits.reader)
                progress = self._together(functools.partial(_progress, place, values, step))
                found = fits
            except DamagedError as error:
                steps.pop()
                then = f"training goes on from step {steps[-1]}" if steps else "training begins again at step 0"
                self.reporter.note(f"checkpoint {step} is passed over, {then}: {error}", "damaged checkpoint")
                # on the word of another rank alone, whose machine may be at fault, nothing is removed
                whole = self.world.rank == 0 and _attempt(lambda: manifest.fetch(place))[1] is None  # noqa: B023
                (doubtful if whole else removed).add(step)
        if self.world.rank == 0:
            for step in doubtful:
                aside = f"{manifest.CHECKPOINTS}/passed_over_{step:06d}"
                storage.delete(aside)  # of an earlier time
                storage.move(manifest.checkpoint_path(step), aside)
            for step in removed:
                if step > max(steps, default=-1):
                    manifest.remove(storage.at(manifest.checkpoint_path(step)))
        self.world.barrier()
        if found is None:
            if spoiled:
                raise StorageError(
                    f"no checkpoint in {storage.uri}/{manifest.CHECKPOINTS} could be loaded, and the weights hold part "
                    "of one: run the same command again, which begins at step 0"
                )
            return Progress()
        self.stage_state = found.stage_state
        self.reporter.go_on(found.records, found.samples, found.saved.seconds)
        if progress.best_step not in steps:
            progress.best_step, progress.best = -1, math.inf
        self.best_step = progress.best_step
        self.world.barrier()
        if storage.local_path is None and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            # fetched to be read once, and as large as the whole state
            shutil.rmtree(found.reader.path, ignore_errors=True)
        return progress

    def restore_weights(self, step: int, model: nn.Module) -> None:
        """Loads the weights alone of the checkpoint taken after `step` steps."""
        state = {"model": weights_of(model)}
        reader = self._open(step, lambda place, saved: _bring(place, saved, state))
        _load(self.context.storage.at(manifest.checkpoint_path(step)), state, reader)

    def restore_best(self, progress: Progress, model: nn.Module) -> int:
        """Loads the best weights of `progress`, or where they are damaged, as else no attempt could ever end, those of
        its last step, and notes that. Returns the step that they are of."""
        try:
            self.restore_weights(progress.best_step, model)
            return progress.best_step
        except DamagedError as error:
            lost = f"the weights of step {progress.best_step}, the best, are lost, and those of the last step taken"
            self.reporter.note(f"{lost}: {error}")
            self.restore_weights(progress.step, model)
            return progress.step

    def _fitting(
        self, place: Storage, saved: Manifest, state: dict[str, Any], check: Callable[[list[Any]], object]
    ) -> _Found:
        """A checkpoint of which this rank has all that it reads, each file parsed. Raises DamagedError."""
        record = () if self.reporter.quiet else (manifest.METRICS, manifest.SAMPLES)
        reader = _bring(place, saved, state, lambda path: path.startswith((STAGE_STATE, *record)))
        directory, there = Path(reader.path), {f.path for f in saved.files}
        parts = sorted(path for path in there if path.startswith(STAGE_STATE))
        with _as_damage(place):
            stage_state = [json.loads((directory / part).read_text(encoding="utf-8")) for part in parts]
            check(stage_state)
            records = read_records(directory / manifest.METRICS) if record else []
            samples = read_records(directory / manifest.SAMPLES) if {manifest.SAMPLES} & there & {*record} else []
        return _Found(saved, reader, stage_state, records, samples)

    def _open(self, step: int, bring: Callable[[Storage, Manifest], T]) -> T:
        """What `bring` gives of a checkpoint, once it has on every rank. Raises as `_together` does."""
        place = self.context.storage.at(manifest.checkpoint_path(step))
        saved = self._first(lambda: _whole(place))
        return self._together(lambda: bring(place, saved))

    def _first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first rank, which alone calls it, on every rank. Raises on all what it raised
        there, as `_together` does."""
        found, fault = self.world.first(_attempt(function) if self.world.rank == 0 else (None, None))
        if fault is not None:
            raise _error(fault)
        return cast(T, found)

    def _together(self, function: Callable[[], T]) -> T:
        """What `function` gives here, once it has on every rank. Raises DamagedError on all ranks where one found
        damage, and StorageError on all where one could not read."""
        found, mine = _attempt(function)
        if faults := [fault for fault in self.world.everyone(mine) if fault]:
            raise _error(min(faults))  # a failure to read before damage
        return cast(T, found)

    def save(self, progress: Progress, model: nn.Module, optimizer: Optimizer, stage_state: Any = None) -> None:
        """Starts saving the present state, and with it `stage_state` as JSON; training may go on at once. Waits for the
        save before it."""
        self.wait()
        self.reporter.flush()
        directory = self.scratch / f"{progress.step:08d}"
        state = {
            "model": self._own(weights_of(model), replicated=True),
            "optimizer": self._own(optimizer.state_dict(), replicated=optimizer.mode == "ddp"),
            "progress": progress.tensor(),
        }
        state = tree_map_only(Tensor, self._copy, state)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        directory.mkdir(parents=True, exist_ok=True)
        if not self.reporter.quiet:
            self.reporter.write(directory)
        if stage_state is not None:
            (directory / f"{STAGE_STATE}{self.world.rank:05d}.json").write_text(json.dumps(stage_state))
        self._publishing = self._publisher.submit(self._publish, progress.step, directory, state, self.reporter.seconds)

    def wait(self) -> None:
        """Returns when the save under way is complete; raises what it raised."""
        if self._publishing:
            self._publishing.result()
            self._publishing = None

    def _own(self, tensors: dict[str, Tensor], replicated: bool) -> dict[str, Tensor]:
        """What this rank writes: its part of what is sharded, its share of what all ranks have."""
        rank, size = self.world.rank, self.world.size
        return {
            name: tensor
            for i, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or not replicated or i % size == rank
        }

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU of this rank's part, which training does not touch."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copy.copy_(local, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return copy
        mesh, shape, stride = self.world.host_mesh, tensor.shape, tensor.stride()
        return DTensor.from_local(copy, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)

    def _publish(self, step: int, directory: Path, state: dict[str, Any], seconds: float) -> None:
        dcp.save(state, checkpoint_id=directory, process_group=self._group)
        target = self.context.storage.at(manifest.checkpoint_path(step))
        files = target.upload_tree(directory)
        shutil.rmtree(directory)
        if self.world.rank != 0:
            target.write_json(f"part-{self.world.rank}.json", {"files": [vars(f) for f in files]})
            return
        for rank in range(1, self.world.size):
            files += [FileEntry(**f) for f in self._await_part(target, f"part-{rank}.json")]
        saved = self.context.manifest(sorted(files, key=lambda f: f.path), {"step": step}, seconds)
        manifest.write(target, saved)
        for old_step, old in manifest.checkpoints(self.context.storage)[: -self.keep_last]:
            if old_step != self.best_step:
                manifest.remove(old)

    @staticmethod
    def _await_part(target: Any, name: str) -> Any:
        deadline = time.monotonic() + PART_TIMEOUT
        while not target.exists(name):
            if time.monotonic() > deadline:
                raise StorageError(f"{target.uri}/{name} did not appear in {PART_TIMEOUT:.0f} s: is a worker stuck?")
            time.sleep(0.1)
        return target.read_json(name)["files"]
