"""Checkpoints of a stage: saved beside training, uploaded with verification, complete only with their manifest.

Each rank writes its part with torch.distributed.checkpoint into a directory of its own, uploads it, and leaves a list
of what it uploaded. The first rank waits for all lists and writes the manifest. Storage is the meeting point, so saving
in the background needs no collective beyond DCP's own, which have a process group to themselves.
"""

from __future__ import annotations

import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from cluster import manifest
from cluster.storage import FileEntry, StorageError
from corpus.tokenizers import Tokenizer
from models.hf import save_pretrained
from models.nanochat import NanoChat
from stages.context import StageContext
from stages.training.metrics import Reporter
from stages.training.parallel import World

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
PART_TIMEOUT = 1800.0  # seconds the first rank waits for another rank's upload


def publish_model(
    context: StageContext, model: NanoChat, tokenizer: Tokenizer, reporter: Reporter, directory: Path
) -> None:
    """Makes weights, tokenizer and metrics this stage's artifact, by way of the local `directory`."""
    save_pretrained(model, directory, tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    tokenizer.save(directory)
    reporter.write(directory / manifest.METRICS)
    context.publish(directory, reporter.latest("loss", "val_bpb", "reward", "tokens_per_second"), reporter.seconds)


class Checkpoints:
    """Saves and restores one stage. `scratch` is a local directory of this rank."""

    def __init__(self, context: StageContext, world: World, scratch: Path, reporter: Reporter, keep_last: int) -> None:
        self.context, self.world, self.scratch, self.reporter = context, world, scratch, reporter
        self.keep_last = keep_last
        # of its own, as collectives in the background must not mix with training's; and gloo, as DCP saves from the CPU
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._publishing: Future[None] | None = None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def restore(self, model: nn.Module, optimizers: list[Optimizer]) -> int:
        """Loads the newest complete checkpoint, whatever world wrote it; returns the step to go on with, 0 if none."""
        storage = self.context.storage
        found = manifest.latest_checkpoint(storage, check=manifest.fetch)
        self.world.barrier()
        if self.world.rank == 0:  # what is newer is damaged or half uploaded, and would mix with this attempt's parts
            for name in {f.split("/")[0] for f in storage.list(manifest.CHECKPOINTS)}:
                if found is None or int(name.removeprefix("step_")) > found[0]:
                    manifest.remove(storage.at(manifest.CHECKPOINTS, name))
        self.world.barrier()
        if found is None:
            return 0
        step, place, saved = found
        directory = manifest.fetch(place)
        model_state, optimizer_state = get_state_dict(model, optimizers, options=OPTIONS)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=directory)
        set_state_dict(
            model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=OPTIONS
        )
        if not self.reporter.quiet:
            self.reporter.read(directory / manifest.METRICS)
        self.reporter.earlier_seconds = saved.seconds
        return step

    def save(self, step: int, model: nn.Module, optimizers: list[Optimizer]) -> None:
        """Starts saving the state after `step` steps; training may go on at once. Waits for the save before it."""
        self.wait()
        self.reporter.flush()
        directory = self.scratch / f"{step:08d}"
        model_state, optimizer_state = get_state_dict(model, optimizers, options=OPTIONS)
        written = dcp.async_save(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory, process_group=self._group
        )
        if not self.reporter.quiet:
            directory.mkdir(parents=True, exist_ok=True)
            self.reporter.write(directory / manifest.METRICS)
        self._publishing = self._publisher.submit(self._publish, step, directory, written, self.reporter.seconds)

    def wait(self) -> None:
        """Returns when the save under way is complete; raises what it raised."""
        if self._publishing:
            self._publishing.result()
            self._publishing = None

    def _publish(self, step: int, directory: Path, written: Any, seconds: float) -> None:
        written.result()
        target = self.context.storage.at(manifest.checkpoint_path(step))
        files = target.upload_tree(directory)
        shutil.rmtree(directory)
        if self.world.rank != 0:
            target.write_json(f"part-{self.world.rank}.json", [vars(f) for f in files])
            return
        for rank in range(1, self.world.size):
            files += [FileEntry(**f) for f in self._await_part(target, f"part-{rank}.json")]
        saved = self.context.manifest(sorted(files, key=lambda f: f.path), {"step": step}, seconds)
        manifest.write(target, saved)
        for _, old in manifest.checkpoints(self.context.storage)[: -self.keep_last]:
            manifest.remove(old)

    @staticmethod
    def _await_part(target: Any, name: str) -> Any:
        deadline = time.monotonic() + PART_TIMEOUT
        while not target.exists(name):
            if time.monotonic() > deadline:
                raise StorageError(f"{target.uri}/{name} did not appear in {PART_TIMEOUT:.0f} s: is a worker stuck?")
            time.sleep(0.1)
        return target.read_json(name)
