"""`fathom run`: train a language model from raw text to reinforcement learning, stage by stage.

Run the same command again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from rich.console import Console

from cluster.manifest import MANIFEST
from cluster.resources import Devices, described, resources
from cluster.runtime import connect, metrics_url, token_asked
from pipeline.artifacts import REPORT, Claim, RunStore
from pipeline.attempts import Diary
from pipeline.config import (
    Config,
    ConfigError,
    Parser,
    add_config_flags,
    add_stage_flags,
    as_found,
    check_mixtures,
    config_from_args,
    load_config,
    measures_text,
    select,
    size_before,
    stage_names,
)
from pipeline.dag import TRAINING, Planned, StageError, plan, reusable, reuse, submit
from pipeline.gauges import Gauges
from pipeline.plan import outlook
from pipeline.preflight import check_inputs, proportions
from pipeline.report import keep
from pipeline.status import run_states
from pipeline.terminal import Terminal, say
from pipeline.track import asked, check_installed, tracked
from pipeline.tracking import LiveView, final_table, plan_table
from stages.config import EngineConfig, TrainConfig
from stages.context import PROGRESS, STOP, TRACEBACK

log = logging.getLogger(__name__)
CLAIM_CHECK_SECONDS = 2.0
ON_GPUS = ("fa4", "fa3", "fa2", "cudnn", "flex")  # backends of attention
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on a CPU


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fathom run", description=__doc__)
    add_config_flags(parser)
    add_stage_flags(parser)
    parser.add_argument(
        "--shared-storage",
        action="store_true",
        default=None,
        help="--storage is a directory that all nodes of the cluster share",
    )
    parser.add_argument("--force", metavar="STAGE", action="append", default=[], help="make a stage again; repeatable")
    parser.add_argument("--reuse-from", metavar="RUN", help="take what this run would make the same from another run")
    parser.add_argument(
        "--track",
        metavar="TRACKER",
        help="show it in wandb, tensorboard, both or none (default: wandb where WANDB_API_KEY is set, else none)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and stop")
    parser.add_argument("--debug", action="store_true", help="show Ray's log and tracebacks")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when every stage asked for is done, 1 when one failed, 2 for wrong flags."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(arguments)
    config = config_from_args(args)
    store, console = RunStore(config.storage, config.name), Terminal()
    before = store.recorded()
    if before is not None and (size := size_before(config, before)) not in (None, config.data.characters):
        config = config_from_args(args, size)  # base is planned once
    config = as_found(config, lambda: before)
    say(console, f"run {config.name} in {store.storage.uri}")
    names = stage_names(config)
    selected = select(names, args.only, args.first, args.until, args.force)
    check_mixtures(config, selected)
    kinds = trackers(config, console)
    other = RunStore(config.storage, args.reuse_from) if args.reuse_from else None
    reused = reusable(store, other, config, names) if other else {}
    if args.dry_run:
        planned = plan(store, config, names, selected, args.force, reused)
        plan_table(planned, console, args.reuse_from)
        to_do = [item.state.name for item in planned if item.action not in ("", "skip", "reuse")]
        if to_do:
            check_inputs(config, to_do)
            say(console, "\n" + outlook(config, to_do))
            if not os.environ.get("RAY_ADDRESS"):
                try:  # it may be meant for another machine
                    check_workers(config, os.cpu_count() or 1, "CPU cores", "machine")
                except StageError as error:
                    say(console, f"! {error}")
        return 0
    if not store.storage.exists():  # a first attempt whose input cannot serve leaves nothing behind
        check_here(config, [name for name in selected if name not in reused])
    store.begin()
    store.storage.check_writable()
    with store.claim() as claim:
        for name in store.settle():  # an attempt that was killed before it made anything
            say(console, f"{name:<14}  the artifact from before --force is back")
        if other:
            reuse(store, other, reused := reusable(store, other, config, names))
            for name in reused:
                say(console, f"{name:<14}  taken from run {other.run}")
        planned = plan(store, config, names, selected, args.force)
        failure = execute(store, config, planned, console, args.debug, claim, arguments, args.force, kinds)
        for name in store.settle():
            say(console, f"{name:<14}  it made nothing: the artifact from before --force is back")
        states = run_states(store)
        final_table(store, [s for s in states if s.name in names], console)
        report(store, planned, console)
    if failure is not None:
        raise failure
    return 0 if all(s.state == "done" for s in states if s.name in selected) else 1


def execute(
    store: RunStore,
    config: Config,
    planned: list[Planned],
    console: Console,
    debug: bool,
    claim: Claim,
    arguments: Sequence[str] = (),
    force: Sequence[str] = (),
    kinds: Sequence[str] = (),
) -> Exception | None:
    """Runs what is planned, every branch to its end; returns the error of the first stage that failed.

    Everything that can be checked is checked before the artifacts of the stages in `force` are touched. Raises
    RunHeldError as soon as another process has taken the run over.
    """
    to_do = [item.state.name for item in planned if item.action not in ("", "skip")]
    names = [item.state.name for item in planned]
    if not to_do:
        store.record(config)
        with tracked(config, names, kinds, console):
            return None
    check_space(store, config, to_do)
    if check_here(config, to_do):
        for line in proportions(config, to_do):
            say(console, f"! {line}")
    shown_at = {"dashboard": connect(debug), "metrics": metrics_url()}
    places = {what: where for what, where in shown_at.items() if where}
    for what, where in places.items():
        asks = ", which asks for the token that `ray get-auth-token` prints" if what == "dashboard" else ""
        say(console, f"{what} {where}{asks if token_asked() else ''}")
    devices = resources()
    there, what = (devices.gpus, "GPUs") if devices.kind == "cuda" else (devices.cpus, "CPU cores")
    check_workers(config, there, what, "cluster")
    check_shared(config, devices)
    check_heads(config, devices.kind, to_do)
    check_device(config, devices.kind, to_do)
    for name in TRAINING:
        store.stage(name).delete(STOP)
    diary = Diary(store.storage, list(arguments), actions(planned), described(devices), places)
    references = submit(store, config, planned, devices, force, claim.token)
    with (
        diary,
        tracked(config, names, kinds, console, said=diary.place),
        LiveView(store, list(references), console, diary.tell, Gauges(config.name).show) as view,
        stopping_on_sigterm(store, view) as stopping,
    ):
        pending = dict(references)
        while pending and not (stopping and not pending.keys() & set(TRAINING)):
            done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=CLAIM_CHECK_SECONDS)
            for name in [name for name, reference in pending.items() if reference in done]:
                note_end(store, name, pending.pop(name))
            claim.check()
    for name, reference in references.items():
        if name in pending:  # asked to stop, it does not wait for what saves as it goes
            continue
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)
            progress, trace = store.progress(name), f"{store.stage(name).uri}/{TRACEBACK}"
            words = (progress and progress.error) or str(cause) or type(cause).__name__
            stopped = progress is not None and progress.state == "stopped"
            diary.end(f"stage {name}: {words}" if stopped else f"stage {name} failed: {words}", stopped)
            where = f"; the traceback is in {trace}" if store.stage(name).exists(TRACEBACK) else ""
            told = (
                f"stage {name} failed: {words}\nwhat is done stays done: run the same command again to go on from "
                f"there{where}"
            )
            return error if debug else StageError(told)
    diary.end("stopped as asked" if stopping else "done", stopped=bool(stopping))
    return None


def actions(planned: Sequence[Planned]) -> dict[str, str]:
    """By stage, what an attempt is to do."""
    return {
        item.state.name: f"resume from step {item.state.checkpoint_step}" if item.action == "resume" else item.action
        for item in planned
        if item.action not in ("", "skip")
    }


def report(store: RunStore, planned: Sequence[Planned], console: Console) -> None:
    """Writes the report of the run beside its artifacts, where anything was done or there is none. It only shows what
    is there, so that whatever goes wrong with it is said, and the run is what it was."""
    try:
        if actions(planned) or not store.stage(REPORT).exists(MANIFEST):
            say(console, f"report: {keep(store)}")
    except Exception as error:
        log.debug("the report is unwritten", exc_info=True)
        say(console, f"! the report could not be written, which changes nothing else: {error}", "yellow")


def trackers(config: Config, console: Console) -> tuple[str, ...]:
    """The trackers of this run; raises ConfigError for one that was named and is not installed."""
    kinds = asked(config.tracking)
    try:
        check_installed(kinds)
    except ConfigError as error:
        if config.tracking.to is not None:
            raise
        say(console, f"WANDB_API_KEY is set, and {error}")
        return ()
    return kinds


def check_here(config: Config, stages: Sequence[str]) -> bool:
    """Whether the run is on this machine and not on some cluster. If so, raises ConfigError for an input of these
    stages that cannot serve, and StageError for more workers than it could have."""
    here = not os.environ.get("RAY_ADDRESS")
    if here:
        check_workers(config, os.cpu_count() or 1, "CPU cores", "machine")  # of which there are no fewer than GPUs
        check_inputs(config, stages)
    return here


def check_workers(config: Config, there: int, what: str, where: str) -> None:
    """Raises StageError where --workers asks for more than are there."""
    asked = config.workers[0]
    if asked > there:
        of_preset = config.preset and asked == load_config(config.preset).workers[0]
        whose = f", the preset {config.preset}'s," if of_preset else ""
        raise StageError(
            f"--workers {asked}{whose} needs as many {what}; this {where} has {there}: add --workers {there}"
        )


def check_shared(config: Config, devices: Devices) -> None:
    """Raises StageError for storage in a directory of which each of several nodes would have its own."""
    if devices.nodes > 1 and "://" not in config.storage and not config.shared_storage:
        raise StageError(
            f"this cluster has {devices.nodes} nodes, and --storage {config.storage} is a directory, of which each may "
            "have its own: name an s3:// or gs:// URI, or add --shared-storage where all nodes share that directory"
        )


def note_end(store: RunStore, name: str, reference: Any) -> None:
    """Records the failure of a stage whose process could not: killed, it said nothing, and base may wait for it."""
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        progress = store.progress(name)  # None: it did not begin, as what it reads was not made
        if progress is not None and progress.state == "running":
            ended = progress.model_copy(update={"state": "failed", "error": str(error)})
            store.stage(name).write_json(PROGRESS, ended.model_dump())


def check_space(store: RunStore, config: Config, names: list[str]) -> None:
    """Raises StageError where a local disk has no room for what a training stage keeps at a time."""
    folder = store.storage.local_path
    training = [getattr(config, name) for name in names if name in TRAINING]
    if folder is None or not training:
        return
    weights = 4 * config.model.spec().parameters  # bytes, in fp32; a checkpoint has two moments of each as well
    needed = weights + 3 * weights * (1 + max(stage.keep_last for stage in training))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageError(
            f"{folder} has {free / 1e9:.1f} GB free, and a training stage of this size keeps {needed / 1e9:.1f} GB "
            "there: make room, or name another place with --storage"
        )


def check_heads(config: Config, kind: str, names: list[str]) -> None:
    """Raises StageError for a model that vLLM could not sample from once it is trained."""
    size = config.model.spec().head_dim
    samples = any(name == "rl" or (name.startswith("evaluate_") and not measures_text(name, config)) for name in names)
    vllm = {config.rl.engine, config.evaluate.engine} != {"torch"}
    if kind == "cpu" and samples and vllm and size not in CPU_HEAD_SIZES:
        raise StageError(
            f"heads of {size} train, but vLLM cannot sample from them on a CPU, only from those of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: choose another depth or model.heads, sample with "
            "--set rl.engine=torch --set evaluate.engine=torch, or only train with --until base or --gsm8k none"
        )


def check_device(config: Config, kind: str, names: list[str]) -> None:
    """Raises StageError for what a training stage of these asks of GPUs where there are none: it would say so itself,
    but only once the stages before it are done."""
    for name in names if kind == "cpu" else ():
        section = getattr(config, name, None)
        if isinstance(section, TrainConfig) and section.precision == "fp8":
            raise StageError(f"{name}.precision=fp8 needs a GPU that has it, and there is none here: leave it out")
        if isinstance(section, EngineConfig) and section.cuda_graphs:
            raise StageError(f"{name}.cuda_graphs=true needs a GPU, and there is none here: leave it out")
        if isinstance(section, EngineConfig) and section.attention in ON_GPUS:
            raise StageError(f"{name}.attention={section.attention} needs a GPU, and there is none here: leave it out")


@contextmanager
def stopping_on_sigterm(store: RunStore, view: LiveView) -> Iterator[list[str]]:
    """Meanwhile SIGTERM, which schedulers send before they take a machine away, has what trains save and end; it ends
    everything at once where nothing trains, or when it comes again. The list yielded then holds what trains."""
    stopping: list[str] = []

    def stop(signum: int, _: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        running = [name for name, row in view.rows.items() if name in TRAINING and row.state == "running"]
        if not running:
            raise KeyboardInterrupt
        for name in TRAINING:  # those to come, too
            store.stage(name).write_json(STOP, {})
        stopping.extend(running)
        view.console.print(f"SIGTERM: {', '.join(running)} will save and stop; again to end at once", highlight=False)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["run", *sys.argv[1:]]))
