"""The stages of a run as Ray tasks: an ObjectRef from one to the next is an edge of the graph."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ray

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.resources import Devices
from cluster.scratch import sweep
from cluster.storage import StorageError
from pipeline.artifacts import RunStore, StageState
from pipeline.config import Config, identity_of, measures_text
from pipeline.faults import said
from stages.context import GROWING, PROGRESS, STOP, TRACEBACK, Progress, StageContext, Stopped
from tasks import environments

# What each stage reads, as `reads` says: a stage, or a folder of its artifact. Only these enter its fingerprint.
UPSTREAM = {
    "tokenizer": (),
    "ingest": ("tokenizer",),
    "base": ("tokenizer", "ingest:base"),
    "evaluate_base": ("tokenizer", "ingest:base", "base"),
    "conversations": ("tokenizer",),
    "mid": ("tokenizer", "base", "conversations:mid"),
    "evaluate_mid": ("conversations:task", "mid"),
    "sft": ("tokenizer", "mid", "conversations:sft"),
    "evaluate_sft": ("conversations:task", "sft"),
    "rl": ("conversations:task", "sft"),
    "evaluate_rl": ("conversations:task", "rl"),
}

TRAINING = ("base", "mid", "sft", "rl")  # the stages that save and end when asked to


class StageError(ValueError):
    """The stages asked for cannot run as things stand; the message says what to do."""


@dataclass(frozen=True)
class Planned:
    """A stage and what this command will do with it: "skip", "run", "resume", "check" (after what it reads is made
    again), "reuse" (of another run) or "" when it was not asked for. The state of one that is forced is "forced"."""

    state: StageState
    action: str


def reads(name: str, config: Config) -> tuple[str, ...]:
    """The parts that a stage reads; an evaluation without problems reads held-out conversations in their place."""
    source = name.removeprefix("evaluate_")
    if source != "base" and measures_text(name, config):
        return ("tokenizer", f"conversations:{source}", source)
    if config.init.source is not None and name == "base":
        return ("tokenizer",)
    if config.init.source is not None and name == "sft" and not config.init.mid:
        return ("tokenizer", "base", "conversations:sft")
    return UPSTREAM[name]


def upstream_names(name: str, config: Config) -> list[str]:
    return [part.partition(":")[0] for part in reads(name, config)]


def upstream_digests(
    store: RunStore, config: Config, name: str, reused: Mapping[str, Manifest] = MappingProxyType({})
) -> dict[str, str] | None:
    """The digest of every part that a stage reads; None while one of them is neither made nor to be `reused`."""
    digests = {}
    for part in reads(name, config):
        stage, _, prefix = part.partition(":")
        manifest = reused.get(stage) or manifests.read(store.stage(stage))
        if manifest is None:
            return None
        digests[part] = manifest.digest(prefix)
    return digests


def plan(
    store: RunStore,
    config: Config,
    names: Sequence[str],
    selected: Sequence[str],
    force: Sequence[str],
    reused: Mapping[str, Manifest] = MappingProxyType({}),
) -> list[Planned]:
    """What to do with each stage, those of `reused` being copied first. Raises StageError when one has drifted, or
    reads what neither is made nor will be."""
    planned: dict[str, Planned] = {}
    drifted: list[str] = []
    for name in names:
        if name in force:
            planned[name] = Planned(StageState(name, "forced"), "run" if name in selected else "")
            continue
        remade = any(planned[u].action in ("run", "resume", "check") for u in upstream_names(name, config))
        if name in reused:
            planned[name] = Planned(StageState(name, "fresh"), "check" if remade and name in selected else "reuse")
            continue
        digests = None if remade else upstream_digests(store, config, name, reused)
        state = store.state(name, identity_of(name, config), digests)
        if name not in selected:
            planned[name] = Planned(state, "")
            continue
        if state.state == "drifted":
            drifted += [f"  {name}: {line}" for line in state.drift]
        made = state.state == "done" or state.checkpoint_step is not None
        action = "check" if made and remade else "skip" if state.state == "done" else "resume" if made else "run"
        planned[name] = Planned(state, action)
    if drifted:
        changed = sorted({line.split(":")[0].strip() for line in drifted})
        raise StageError(
            f"run {store.run} was made with another configuration:\n" + "\n".join(drifted) + "\n"
            f"make it again with --force {' --force '.join(changed)}, or keep it and start a new run with --name NAME"
        )
    for name in selected:
        upstream = [planned[u] for u in upstream_names(name, config)]
        missing = [item.state.name for item in upstream if item.state.state != "done" and not item.action]
        if missing and planned[name].action != "skip":
            raise StageError(f"{name} reads {missing[0]}, which is not made yet: run that first (--from {missing[0]})")
    return list(planned.values())


def reusable(store: RunStore, other: RunStore, config: Config, names: Sequence[str]) -> dict[str, Manifest]:
    """Of another run, the manifest of every stage that this run lacks and would make the same.

    Raises StageError for a run that is not there.
    """
    if not other.storage.exists():
        raise StageError(f"--reuse-from {other.run}: there is no such run in {other.storage.uri}")
    found: dict[str, Manifest] = {}
    for name in names:
        digests = upstream_digests(store, config, name, found)
        manifest = manifests.read(other.stage(name))
        if digests is None or manifest is None or manifests.read(store.stage(name)) is not None:
            continue
        if manifest.identity == identity_of(name, config) and manifest.upstream == digests:
            found[name] = manifest
    return found


def reuse(store: RunStore, other: RunStore, reused: Mapping[str, Manifest]) -> None:
    """Copies from another run what is `reusable`."""
    for name, manifest in reused.items():
        directory = manifests.fetch(other.stage(name))
        for file in manifest.files:
            store.stage(name).upload(directory / file.path, file.path)
        manifests.write(store.stage(name), manifest)


def submit(
    store: RunStore, config: Config, planned: Sequence[Planned], devices: Devices, force: Sequence[str], token: str
) -> dict[str, Any]:
    """Starts every stage that has something to do, under the claim of `token`; returns the reference of each by name.

    Raises EnvironmentFault before anything is changed, where the user's environment does not even begin to work. Then
    the artifacts of the stages in `force` are set aside.
    """
    to_do = [item.state.name for item in planned if item.action not in ("", "skip")]
    asking = any("conversations:task" in reads(name, config) for name in to_do)
    if config.rl.environment and asking:
        environments.check(config.rl.environment, config.rl.environment_timeout)
    for name in force:
        store.set_aside(name)
    store.record(config)
    references: dict[str, Any] = {}
    # Ray Train asks the state API whether its controller lives, and without an address the API may answer for another
    # Ray on this machine, where there is no such actor: the workers would be taken down as orphans.
    env = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
    for name in to_do:  # what an earlier attempt said of its end
        for path in (PROGRESS, TRACEBACK):
            store.stage(name).delete(path)
    for name in to_do:
        waits = {u: references[u] for u in upstream_names(name, config) if u in references}
        overlap = config.ingest.overlap if config.ingest.overlap is not None else devices.kind == "cuda"
        if name == "base" and overlap and "ingest" in waits and may_begin_on_part(store):
            del waits["ingest"]
        task = run_stage.options(name=f"stage:{name}", num_cpus=0, max_retries=0, runtime_env=env)
        references[name] = task.remote(name, config, devices, token, *waits.values())
    return references


def may_begin_on_part(store: RunStore) -> bool:
    """Whether base may read rows while ingest makes them: there are no others, and base has used no others."""
    if any(manifests.read(store.stage(name)) is not None for name in ("ingest", "base")):
        return False
    checkpoint = manifests.latest_checkpoint(store.stage("base"))
    return checkpoint is None or checkpoint[2].upstream.get("ingest:base", "").startswith(GROWING)


def digests_on_part(store: RunStore, config: Config) -> dict[str, str]:
    """What base reads while ingest is at work: a fingerprint in place of the digest that is not known yet."""
    of_tokenizer = upstream_digests(store, config, "ingest")
    assert of_tokenizer is not None
    fingerprint = manifests.fingerprint(identity_of("ingest", config), of_tokenizer)
    return of_tokenizer | {"ingest:base": GROWING + fingerprint}


@ray.remote  # type: ignore[untyped-decorator]
def run_stage(name: str, config: Config, devices: Devices, token: str, *waits_for: None) -> None:
    """One stage, in a Ray task, which writes under the claim of `token`. `waits_for` are the stages it reads: Ray
    starts it when they are done."""
    store = RunStore(config.storage, config.name, token)
    digests = upstream_digests(store, config, name)
    if digests is None:  # base, beside an ingest that is at work
        digests = digests_on_part(store, config)
    identity = identity_of(name, config)
    state = store.state(name, identity, digests)
    if state.state == "done":
        return
    if state.drift and any(digest.startswith(GROWING) for digest in digests.values()):
        raise StageError("its checkpoints are of rows that ingest made with other settings: --force base begins anew")
    if state.drift:  # what it was made from has just been made again
        store.set_aside(name)
    context = StageContext(
        run=config.name,
        stage=name,
        storage=store.stage(name),
        upstream={u: store.stage(u) for u in upstream_names(name, config)},
        identity=identity,
        upstream_digests=digests,
    )
    began = time.monotonic()
    context.storage.write_json(PROGRESS, Progress().model_dump())
    try:
        if context.storage.exists(STOP):
            raise Stopped("stopped as asked before it began")
        sweep()
        execute(context, config, devices)
    except BaseException as error:
        outcome = "stopped" if isinstance(error, Stopped) else "failed"
        ended = {"state": outcome, "error": said(error), "seconds": time.monotonic() - began}
        try:
            if outcome == "failed":
                context.storage.write_bytes(TRACEBACK, "".join(traceback.format_exception(error)).encode())
            last = store.progress(name) or Progress()
            context.storage.write_json(PROGRESS, last.model_copy(update=ended).model_dump())
        except (OSError, StorageError) as unwritten:  # the stage's own error matters more
            logging.getLogger(__name__).warning("%s failed, and its progress is unwritten: %s", name, unwritten)
        raise


def execute(context: StageContext, config: Config, devices: Devices) -> None:
    """Calls the stage's own function. Imports are late: a process loads what its stage needs."""
    name = context.stage
    if config.init.source is not None and name in ("tokenizer", "base"):
        from stages import begin

        if name == "tokenizer":
            begin.make_tokenizer(context, config.init)
        else:
            begin.make_base(context, config.init, config.model.sequence_len)
    elif name == "tokenizer":
        from stages import tokenizer

        bytes_, vocab = config.ingest.shard_bytes, config.model.vocab_size
        tokenizer.run(context, config.data, config.tokenizer, bytes_, vocab, config.seed)
    elif name == "ingest":
        from stages import ingest

        ingest.run(context, config.data, config.ingest, config.model.sequence_len, config.seed)
    elif name == "conversations":
        from stages import conversations

        conversations.run(context, config.data, config.model.sequence_len, config.seed)
    elif name == "rl":
        from stages.rl import stage

        stage.run(context, config.rl, config.seed, config.workers, devices)
    elif name.startswith("evaluate_"):
        from stages.evaluation import stage as evaluation

        environment = config.rl.environment, config.rl.environment_timeout
        problems = None if measures_text(name, config) else environment
        evaluation.run(context, name.removeprefix("evaluate_"), config.evaluate, problems, config.seed, devices)
    else:
        from stages import train

        settings = getattr(config, name)
        train.run(context, settings, config.model, config.seed, config.workers, devices, config.evaluate.data)
