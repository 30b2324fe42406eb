"""Checkpoints of a stage: saved beside training, uploaded with verification, complete only with their manifest.

Each rank writes its part with torch.distributed.checkpoint into a directory of its own, uploads it, and leaves a list
of what it uploaded. The first rank waits for all lists and writes the manifest. Storage is the meeting point, so saving
in the background needs no collective beyond DCP's own, which have a process group to themselves.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from cluster import manifest
from cluster.manifest import Manifest
from cluster.storage import DamagedError, FileEntry, Storage, StorageError
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, PADDING, Tokenizer
from models.build import build
from models.hf import save_pretrained
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.context import StageContext
from stages.training.metrics import SUMMARY, Reporter
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
        step, best, best_step, since, evaluated = values.tolist()
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
    """Makes weights, tokenizer, metrics and the report that `page` writes this stage's artifact, by way of `scratch`.
    Every rank takes part."""
    whole = gathered(model, world)
    if whole is not None:
        directory = scratch / "artifact"
        export(whole, tokenizer, directory, DOCUMENT_ENDS if context.stage == "base" else ANSWER_ENDS)
        reporter.write(directory / manifest.METRICS)
        if page is not None:
            page(directory / manifest.REPORT)
        context.publish(directory, reporter.latest(*SUMMARY), reporter.seconds)
    world.barrier()


def export(model: LanguageModel, tokenizer: Tokenizer, directory: Path, ends: Sequence[str] = ANSWER_ENDS) -> None:
    """Writes into `directory` what transformers and vLLM load; with any of the special tokens `ends` it stops."""
    stops, pad = [tokenizer.special(name) for name in ends], tokenizer.special(PADDING)
    save_pretrained(model, directory, tokenizer.bos, stops, pad)
    tokenizer.save(directory, ends[0], model.spec.sequence_len)


def export_checkpoint(
    place: Storage, spec: ModelSpec, tokenizer: Tokenizer, directory: Path, ends: Sequence[str]
) -> None:
    """Writes into `directory`, as `export` does, the weights of the checkpoint at `place`, of a model of this shape.
    Raises StorageError."""
    model, saved = build(spec), _whole(place)
    state = {"model": weights_of(model)}
    dcp.load(state, storage_reader=_bring(place, saved, state, lambda _: False))
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


def _whole(place: Storage) -> Manifest:
    """The manifest of a checkpoint that has all its files, at their sizes."""
    saved = manifest.read(place)
    if saved is None:
        raise DamagedError(f"{place.uri} has no {manifest.MANIFEST}")
    manifest.verify(place, saved)
    return saved


def _bring(place: Storage, saved: Manifest, state: dict[str, Any], wanted: Callable[[str], bool]) -> CheckpointReader:
    """Has the files here that loading `state` reads, and those `wanted`, each hash checked; a reader of them."""
    root, entries = manifest.local_root(place, saved.fingerprint), {f.path: f for f in saved.files}
    if METADATA not in entries:
        raise DamagedError(f"{place.uri}/{manifest.MANIFEST} lists no {METADATA}")
    manifest.fetch_file(place, entries[METADATA], root)
    reader, planner = CheckpointReader(root, saved), DefaultLoadPlanner()
    planner.set_up_planner(state, reader.metadata)
    names = reader.files(planner.create_local_plan()) | {path for path in entries if wanted(path)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: manifest.fetch_file(place, entries[name], root), sorted(names)))
    return reader


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

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Loads the newest whole checkpoint there is, whatever world and mode wrote it; the same one on every rank.

        What is newer and damaged or half uploaded would mix with this attempt's parts, and is removed. StorageError
        where reading fails, as that does not mean that anything is damaged.
        """
        storage, values = self.context.storage, Progress().tensor()
        state = {"model": weights_of(model), "optimizer": optimizer.state_dict(), "progress": values}
        metrics = () if self.reporter.quiet else (manifest.METRICS,)
        there = {_step(path) for path in storage.list(manifest.CHECKPOINTS)} if self.world.rank == 0 else set()
        steps: list[int] = self.world.first([step for step, _ in manifest.checkpoints(storage)])
        removed, doubtful, found = there - {*steps}, set[int](), None
        while steps and not found:
            try:
                found = self._open(steps[-1], state, lambda path: path.startswith((STAGE_STATE, *metrics)))
            except DamagedError as error:
                step = steps.pop()
                then = f"training goes on from step {steps[-1]}" if steps else "training begins again at step 0"
                self.reporter.note(f"checkpoint {step} is passed over, {then}: {error}")
                place = storage.at(manifest.checkpoint_path(step))
                # on the word of another rank alone, whose machine may be at fault, nothing is removed
                whole = self.world.rank == 0 and _attempt(lambda: manifest.fetch(place))[1] is None  # noqa: B023
                (doubtful if whole else removed).add(step)
        if self.world.rank == 0:
            for step in doubtful:
                storage.move(manifest.checkpoint_path(step), f"{manifest.CHECKPOINTS}/passed_over_{step:06d}")
            for step in removed:
                if step > max(steps, default=-1):
                    manifest.remove(storage.at(manifest.checkpoint_path(step)))
        self.world.barrier()
        if found is None:
            return Progress()
        saved, reader = found
        dcp.load(state, storage_reader=reader)
        directory = Path(reader.path)
        parts = sorted(f.path for f in saved.files if f.path.startswith(STAGE_STATE))
        self.stage_state = [json.loads((directory / part).read_text()) for part in parts]
        if not self.reporter.quiet:
            self.reporter.read(directory / manifest.METRICS)
        self.reporter.earlier_seconds = saved.seconds
        progress = Progress.of(values)
        if progress.best_step not in steps:
            progress.best_step, progress.best = -1, math.inf
        self.best_step = progress.best_step
        self.world.barrier()
        if storage.local_path is None and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            shutil.rmtree(directory, ignore_errors=True)  # fetched to be read once, and as large as the whole state
        return progress

    def restore_weights(self, step: int, model: nn.Module) -> None:
        """Loads the weights alone of the checkpoint taken after `step` steps."""
        state = {"model": weights_of(model)}
        _, reader = self._open(step, state, lambda _: False)
        dcp.load(state, storage_reader=reader)

    def _open(
        self, step: int, state: dict[str, Any], wanted: Callable[[str], bool]
    ) -> tuple[Manifest, CheckpointReader]:
        """Manifest and reader of a checkpoint, of which every rank has what it reads: `state`, and the files `wanted`.

        Raises DamagedError on all ranks where one found it so, and StorageError on all where one could not read.
        """
        place = self.context.storage.at(manifest.checkpoint_path(step))
        saved, fault = self.world.first(_attempt(lambda: _whole(place)) if self.world.rank == 0 else (None, None))
        if fault is None:
            reader, mine = _attempt(functools.partial(_bring, place, saved, state, wanted))
            faults = [fault for fault in self.world.everyone(mine) if fault]
            if reader is not None and not faults:
                return saved, reader
            fault = min(faults)  # a failure to read before damage
        damaged, text = fault
        raise DamagedError(text) if damaged else StorageError(text)

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
            self.reporter.write(directory / manifest.METRICS)
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
