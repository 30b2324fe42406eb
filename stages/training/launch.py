"""A function on every worker of a Ray Train group, tried again when a machine or process is lost."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import ray.exceptions
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import manifest
from cluster.resources import Devices
from stages.context import StageContext

ATTEMPTS = 4  # without a new checkpoint between them
RAY_TRAIN = ".ray_train"  # where Ray Train keeps its own state while it runs
LOST = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError, RayTrainError)


def launch(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    context: StageContext,
    workers: tuple[int, int],
    devices: Devices,
) -> Any:
    """Runs `function(arguments)` on as many workers as there is room for, between `workers[0]` and `workers[1]`;
    returns what the first of them returns. Where the two differ, workers join and leave while it runs: the function is
    then called again, and goes on from its newest checkpoint.

    Ray Train gathers the workers and the process group; it never sees a checkpoint, since the function finds its own.
    An exception of the function is raised as it is, at once. A lost worker or controller starts the group again, a few
    times where no checkpoint is reached between them: Ray Train's own retry would repeat errors that no retry mends,
    and does not cover its controller.
    """
    fewest, most = workers
    gpu = devices.kind == "cuda"
    filesystem, path = context.storage.at(RAY_TRAIN).filesystem()
    lost, newest = 0, 0
    while True:
        trainer = TorchTrainer(
            function,
            train_loop_config=arguments,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=most if fewest == most else (fewest, most), use_gpu=gpu),
            run_config=RunConfig(
                name=f"{context.run}-{context.stage}-{uuid.uuid4().hex[:8]}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            return trainer.fit().return_value
        except (TrainingFailedError, ray.exceptions.RayActorError) as error:
            failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
            if failures and not any(isinstance(f, LOST) for f in failures):
                # the others of the group fail with a RuntimeError for the connection that broke
                raise min(failures, key=_is_from_others) from error  # which has the worker's traceback
            reached = max((step for step, _ in manifest.checkpoints(context.storage)), default=0)
            lost, newest = (1 if reached > newest else lost + 1), max(reached, newest)
            if lost == ATTEMPTS:
                raise
            again = f"a worker was lost after step {reached}: starting again from the newest checkpoint"
            context.note(again, "lost worker")
        finally:
            context.storage.delete(RAY_TRAIN)


def _is_from_others(failure: Exception) -> bool:
    return isinstance(failure, RuntimeError) and not isinstance(failure, torch.OutOfMemoryError)
