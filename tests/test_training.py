"""The training loop with real rows, storage and checkpoints, in this process and in gloo groups, without Ray."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cluster import manifest
from cluster.storage import DamagedError, FileEntry, Storage, StorageError
from corpus.rows import Rows, RowWriter
from corpus.tokenizers import Tokenizer
from models.build import build
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.config import RLConfig, TrainConfig
from stages.context import STOP as STOP_FILE
from stages.context import StageContext, Stopped
from stages.evaluate import bits_per_byte
from stages.rl.groups import check_drawn
from stages.training.loop import accumulate_gradients, train
from stages.training.metrics import Reporter
from stages.training.optimizer import build_optimizer, group_weights
from stages.training.parallel import World
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints, Progress, export_checkpoint

SPEC = ModelSpec(
    "depth", layers=2, width=32, heads=2, kv_heads=2, ffn_width=64, vocab_size=64, sequence_len=16, softcap=15.0
)
STEPS, STOP = 12, 5
CONFIG = TrainConfig(
    total_batch_size=8 * SPEC.sequence_len,
    device_batch_size=4,
    precision="fp32",
    lr_scale=0.3,
    warmup_ratio=0.25,
    warmdown_ratio=0.5,
    eval_every=STOP,
    save_every=STOP,
)
ALONE = World(0, 1, torch.device("cpu"), threads=1)


FIRST_TWO = Schedule(2, warmup_ratio=1.5, warmdown_ratio=0.0)  # as the first two steps of STEPS


class Killed(Exception):
    """What ends a run in the middle here."""


def fresh_model(seed: int = 0) -> LanguageModel:
    model = build(SPEC)
    model.init_weights(seed)
    return model


def write_rows(directory: Path, masked: bool = False, count: int = 40, vocab_size: int = SPEC.vocab_size) -> Rows:
    """Rows that count upwards in a stride of their own, so that there is something to learn."""
    rng = np.random.default_rng(0)
    writer = RowWriter(directory, SPEC.sequence_len + 1, vocab_size, masked)
    for _ in range(count):
        ids = (rng.integers(vocab_size) + rng.integers(1, 4) * np.arange(SPEC.sequence_len + 1)) % vocab_size
        writer.add(ids, (rng.random(len(ids)) < 0.3) if masked else None)
    writer.close()
    return Rows(directory)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return write_rows(tmp_path / "rows")


def stage(path: Path) -> StageContext:
    return StageContext("test", "base", Storage(path), upstream={}, identity={}, upstream_digests={})


def run(
    path: Path,
    rows: Rows,
    config: TrainConfig = CONFIG,
    world: World = ALONE,
    stop_at: int | None = None,
    model: LanguageModel | None = None,
    validate: Callable[[LanguageModel], float | dict[str, float]] = lambda _: math.nan,
    schedule: Schedule | None = None,
    speak: tuple[Callable[[int], bool], Callable[[LanguageModel], list[dict[str, str]]]] | None = None,
) -> tuple[LanguageModel, Reporter]:
    """One attempt of a run whose stage lies at `path`; `validate` gives val_bpb. Raises Killed in the validation of
    step `stop_at`."""
    model = model or fresh_model()
    reporter = Reporter(Storage(path), STEPS, quiet=world.rank > 0, max_skipped=config.max_skipped)
    checkpoints = Checkpoints(stage(path), world, path.with_name(f"scratch-{world.rank}"), reporter, config.keep_last)
    validations: list[int] = []

    def count(model: LanguageModel) -> dict[str, float]:
        validations.append(len(validations) * config.eval_every)
        if validations[-1] == stop_at:
            checkpoints.wait()
            raise Killed
        found = validate(model)
        return found if isinstance(found, dict) else {"val_bpb": found}

    schedule = schedule or Schedule(
        STEPS, warmup_ratio=config.warmup_ratio, warmdown_ratio=config.warmdown_ratio, shape=config.schedule or "wsd"
    )
    train(model, rows, config, schedule, 0, world, checkpoints, reporter, count, speak=speak)
    reporter.close()
    return model, reporter


def losses(reporter: Reporter) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in reporter.records if "loss" in r}


def same_weights(a: LanguageModel, b: LanguageModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(
    model: LanguageModel, tokens: np.ndarray, mask: np.ndarray | None, device_batch_size: int
) -> dict[str, Tensor]:
    """The step's loss under "loss", and every gradient."""
    model.zero_grad()
    ids = torch.from_numpy(tokens)
    weights = torch.ones(ids[:, 1:].shape) if mask is None else torch.from_numpy(mask[:, 1:]).float()
    loss = accumulate_gradients(model, ids, weights, device_batch_size, "fp32", ALONE)
    assert loss is not None
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained_model(rows: Rows, path: Path) -> LanguageModel:
    """A few steps from the start, where the head is no longer zero and every weight has a gradient."""
    return run(path / "warm", rows)[0]


def test_the_loss_falls_and_every_step_is_recorded(rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"lr_scale": 1.0})
    _, reporter = run(tmp_path / "run", rows, config, validate=lambda _: 1.0)
    found = losses(reporter)
    assert list(found) == list(range(STEPS))
    assert found[0] == pytest.approx(math.log(SPEC.vocab_size), abs=1e-4)
    assert found[STEPS - 1] < 0.7 * found[0]
    assert [r["step"] for r in reporter.records if "val_bpb" in r] == [0, 5, 10, 12]


@pytest.mark.parametrize("masked", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, masked: bool) -> None:
    rows = write_rows(tmp_path / "rows", masked)
    whole, record = run(tmp_path / "whole", rows)
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=STOP)
    assert [step for step, _ in manifest.checkpoints(Storage(tmp_path / "broken"))] == [STOP], "saved before validating"
    resumed, record_of_both = run(tmp_path / "broken", rows, model=fresh_model(seed=9))
    assert losses(record_of_both) == losses(record)
    assert same_weights(resumed, whole)
    steps = [r["step"] for r in record_of_both.records if "loss" in r]
    assert steps == list(range(STEPS)), "no step is recorded twice"


def test_a_run_that_died_between_its_last_save_and_its_artifact_trains_nothing_more(rows: Rows, tmp_path: Path) -> None:
    whole, record = run(tmp_path / "run", rows)
    again, record_again = run(tmp_path / "run", rows, model=fresh_model(seed=9))
    assert same_weights(whole, again)
    assert losses(record_again) == losses(record)


def test_only_the_newest_checkpoints_are_kept(rows: Rows, tmp_path: Path) -> None:
    run(tmp_path / "run", rows, CONFIG.model_copy(update={"save_every": 2, "keep_last": 3}))
    assert [step for step, _ in manifest.checkpoints(Storage(tmp_path / "run"))] == [8, 10, 12]


def test_a_checkpoint_without_a_manifest_is_ignored_and_removed(rows: Rows, tmp_path: Path) -> None:
    whole, record = run(tmp_path / "whole", rows)
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=STOP)
    storage = Storage(tmp_path / "broken")
    storage.at(manifest.checkpoint_path(10)).write_bytes("__0_0.distcp", b"half of it")
    storage.at(manifest.checkpoint_path(10)).write_json("part-1.json", {"files": []})
    with pytest.raises(Killed):  # in its first validation, which comes after the restore
        run(tmp_path / "broken", rows, stop_at=0)
    assert not storage.list(manifest.checkpoint_path(10))
    resumed, record_of_both = run(tmp_path / "broken", rows)
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)


@pytest.mark.parametrize("every", [3, STOP, 0])
def test_what_the_model_said_is_kept_once_of_each_step_whenever_it_is_killed(
    rows: Rows, tmp_path: Path, every: int
) -> None:
    """Though what was said after the checkpoint was said before the kill, too; and training is what it is without."""

    def said(model: LanguageModel) -> list[dict[str, str]]:
        return [{"prompt": "sum", "text": str(model.lm_head.weight.sum().item())}]

    speak = (lambda step: every > 0 and step % every == 0, said)
    silent, record = run(tmp_path / "silent", rows)
    whole, spoken = run(tmp_path / "whole", rows, speak=speak)
    assert losses(spoken) == losses(record) and same_weights(whole, silent)
    assert not record.samples and [s["step"] for s in spoken.samples] == [
        *(range(0, STEPS, every) if every else ()),
        STEPS,
    ]
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=2 * STOP, speak=speak)
    with pytest.raises(Killed):  # in its first validation, which comes after the restore
        run(tmp_path / "broken", rows, stop_at=0, speak=speak)
    _, resumed = run(tmp_path / "broken", rows, speak=speak)
    assert resumed.samples == spoken.samples


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over(rows: Rows, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    whole, record = run(tmp_path / "whole", rows)
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=2 * STOP)
    [weights] = (tmp_path / "broken" / manifest.checkpoint_path(2 * STOP)).glob("*.distcp")
    damage(weights)
    resumed, record_of_both = run(tmp_path / "broken", rows, model=fresh_model(seed=9))
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)


def test_the_user_is_told_when_every_checkpoint_is_damaged(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", rows, stop_at=2 * STOP)
    for weights in (tmp_path / "run").rglob("*.distcp"):
        flip_a_bit(weights)
    _, reporter = run(tmp_path / "run", rows, model=fresh_model(seed=9))
    passed = [note for note in reporter.notes if "passed over" in note]
    assert [note.split(":")[0] for note in passed] == [
        "checkpoint 10 is passed over, training goes on from step 5",
        "checkpoint 5 is passed over, training begins again at step 0",
    ]
    assert all("distcp has" in note and "--force" not in note for note in passed), passed
    assert list(losses(reporter)) == list(range(STEPS))


def replace_in_storage(checkpoint: Storage, name: str, data: bytes) -> None:
    """Puts `data` in the place of a file, and has the manifest say so, as whoever can write to the storage can."""
    checkpoint.write_bytes(name, data)
    saved = manifest.read(checkpoint)
    assert saved is not None
    entry = FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
    manifest.write(checkpoint, replace(saved, files=[entry if f.path == name else f for f in saved.files]))


def of_another_model(checkpoint: Storage) -> None:
    dcp.save({"model": {"x": torch.zeros(3)}}, checkpoint_id=checkpoint.uri)
    for name in (".metadata", "__0_0.distcp"):
        replace_in_storage(checkpoint, name, checkpoint.read_bytes(name))


def of_no_tensors(checkpoint: Storage) -> None:
    replace_in_storage(checkpoint, "__0_0.distcp", bytes(len(checkpoint.read_bytes("__0_0.distcp"))))


def of_no_progress(checkpoint: Storage) -> None:
    """The step is overwritten where it lies."""
    shard, step = checkpoint.read_bytes("__0_0.distcp"), int(checkpoint.uri[-6:])
    progress = struct.pack("<dd", step, math.inf)
    assert shard.count(progress) == 1
    replace_in_storage(checkpoint, "__0_0.distcp", shard.replace(progress, struct.pack("<dd", math.nan, math.inf)))


def of_parts_that_are_not_all(checkpoint: Storage) -> None:
    metadata = pickle.loads(checkpoint.read_bytes(".metadata"))
    name = next(name for name in metadata.state_dict_metadata if name.startswith("model."))
    metadata.state_dict_metadata[name].chunks.clear()
    replace_in_storage(checkpoint, ".metadata", pickle.dumps(metadata))


def with_half_a_record(checkpoint: Storage) -> None:
    replace_in_storage(checkpoint, "metrics.jsonl", b'{"step": 1')


def with_records_of_no_step(checkpoint: Storage) -> None:
    replace_in_storage(checkpoint, "metrics.jsonl", b'[]\n"x"\n')


def with_deep_records(checkpoint: Storage) -> None:
    replace_in_storage(checkpoint, "metrics.jsonl", b"[" * 100_000)


def with_binary_records(checkpoint: Storage) -> None:
    replace_in_storage(checkpoint, "metrics.jsonl", b"\xff\xfe")


@pytest.mark.parametrize(
    "change",
    [
        of_another_model,
        of_no_tensors,
        of_no_progress,
        of_parts_that_are_not_all,
        with_half_a_record,
        with_records_of_no_step,
        with_deep_records,
        with_binary_records,
    ],
    ids=lambda function: function.__name__,
)
def test_a_checkpoint_that_is_whole_but_does_not_fit_is_passed_over(
    rows: Rows, tmp_path: Path, change: Callable[[Storage], None], uninterrupted: tuple[Any, Any]
) -> None:
    whole, record = uninterrupted
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=2 * STOP)
    change(Storage(tmp_path / "broken").at(manifest.checkpoint_path(2 * STOP)))
    resumed, record_of_both = run(tmp_path / "broken", rows, model=fresh_model(seed=9))
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)
    [note] = [note for note in record_of_both.notes if "passed over" in note]
    assert note.startswith("checkpoint 10 is passed over, training goes on from step 5")
    assert [(i.kind, i.text) for i in record_of_both.incidents] == [("damaged checkpoint", note)]
    assert manifest.checkpoint_path(2 * STOP) in note and "weights_only" not in note


ANSWER = {"tokens": [1, 2], "sampled": [1, 1], "logprobs": [-1.0, -2.0]}
DRAWN = {"cursor": 8, "pending": True, "positions": [6, 7], "sampled": [[ANSWER, ANSWER]] * 2}


def drawn_with(**other: Any) -> bytes:
    return json.dumps(DRAWN | other).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"cursor": -1}',
        drawn_with(positions=[7]),
        drawn_with(positions=[7, 6]),
        drawn_with(positions=[5, 6]),
        drawn_with(sampled=[[ANSWER, ANSWER]]),
        drawn_with(sampled=[[ANSWER, ANSWER], [ANSWER]]),
        drawn_with(pending=False),
        drawn_with(sampled=[[ANSWER, ANSWER | {"logprobs": [-1.0]}]] * 2),
        drawn_with(sampled=[[ANSWER, ANSWER | {"tokens": [1, SPEC.vocab_size]}]] * 2),
        None,
    ],
)
def test_a_stage_file_that_is_none_is_passed_over(rows: Rows, tmp_path: Path, data: bytes | None) -> None:
    """Else it would end the stage, or have it draw other prompts than a run that was not interrupted."""
    context, model = stage(tmp_path / "run"), fresh_model()
    optimizer = build_optimizer(model, CONFIG, "fp32", ALONE)
    checkpoints = Checkpoints(context, ALONE, tmp_path / "scratch", Reporter(context.storage, STEPS), 2)
    for step in (1, 2):
        checkpoints.save(Progress(step=step), model, optimizer, DRAWN)
    checkpoints.wait()
    newest = context.storage.at(manifest.checkpoint_path(2))
    if data is None:
        saved = manifest.read(newest)
        assert saved is not None
        manifest.write(newest, replace(saved, files=[f for f in saved.files if not f.path.startswith("stage-")]))
    else:
        replace_in_storage(newest, "stage-00000.json", data)
    reporter = Reporter(context.storage, STEPS)
    again = Checkpoints(context, ALONE, tmp_path / "scratch", reporter, 2)
    settings = RLConfig(prompts_per_step=2, samples_per_prompt=2)
    progress = again.restore(model, optimizer, lambda states: check_drawn(states, settings, SPEC.vocab_size))
    assert progress.step == 1 and again.stage_state == [DRAWN]
    assert [note.split(":")[0] for note in reporter.notes] == [
        "checkpoint 2 is passed over, training goes on from step 1"
    ]


def test_weights_that_a_checkpoint_spoiled_are_not_trained(rows: Rows, tmp_path: Path) -> None:
    """Where none before it is left, the stage ends, and the next start begins with weights of its own."""
    whole, record = run(tmp_path / "whole", rows)
    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "run", rows, stop_at=STOP)
        of_no_progress(Storage(tmp_path / "run").at(manifest.checkpoint_path(STOP)))
        with pytest.raises(StorageError, match="run the same command again, which begins at step 0"):
            run(tmp_path / "run", rows, model=fresh_model(seed=9))
    again, record_again = run(tmp_path / "run", rows)
    assert losses(record_again) == losses(record) and same_weights(again, whole)


def test_what_another_attempt_left_in_the_cache_is_not_read(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", rows, stop_at=STOP)
    place = Storage(tmp_path / "run").at(manifest.checkpoint_path(STOP))
    place.write_json("stage-00001.json", {"of": "a larger world"})
    model, config = fresh_model(), CONFIG
    reporter = Reporter(Storage(tmp_path / "run"), STEPS)
    checkpoints = Checkpoints(stage(tmp_path / "run"), ALONE, tmp_path / "scratch", reporter, config.keep_last)
    assert checkpoints.restore(model, build_optimizer(model, config, "fp32", ALONE)).step == STOP
    assert checkpoints.stage_state == []


METADATA_MODULE = "torch.distributed.checkpoint.metadata"
NAMED = b"\x8c%c%s\x8c%c%s\x93"  # the instructions that name a member of a module
ENDLESS = b"K\x01" + b"".join(b"\x94h%c\x86" % i for i in range(60))  # and those that make pairs of pairs, 2^60 places


def named(module: str, name: str) -> bytes:
    return NAMED % (len(module), module.encode(), len(name), name.encode())


class Code:
    """Touches a file when it is unpickled, alone or within something that looks right."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def bare(code: Code, metadata: Metadata) -> Any:
    return code


def within(code: Code, metadata: Metadata) -> Any:
    return replace(metadata, planner_data=code)


def as_a_value(code: Code, metadata: Metadata) -> Any:
    """DCP unpickles what is no tensor."""
    index = next(iter(metadata.storage_data))
    return replace(metadata, state_dict_metadata=metadata.state_dict_metadata | {index.fqn: BytesStorageMetadata()})


def from_elsewhere(code: Code, metadata: Metadata) -> Any:
    outside = {i: replace(info, relative_path="/etc/passwd") for i, info in metadata.storage_data.items()}
    return replace(metadata, storage_data=outside)


def by_a_name(code: Code, metadata: Metadata) -> Any:
    return replace(metadata, storage_meta=torch.load)


def on_a_class(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04" + named("pathlib", "PosixPath") + b"}\x8c\x04_str\x8c\x02/bsb."


def of_endless_words(code: Code, metadata: Metadata) -> bytes:
    """Sets an attribute of pairs of pairs, of 2^64 places: who tells of them never ends."""
    return b"\x80\x04" + ENDLESS + b"}b."


def at_an_endless_path(code: Code, metadata: Metadata) -> Any:
    path: Any = ()
    for _ in range(64):
        path = (path, path)
    return replace(
        metadata, storage_data={i: replace(info, relative_path=path) for i, info in metadata.storage_data.items()}
    )


def with_an_endless_key(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04}" + ENDLESS + b"K\x01s."


def with_an_endless_key_among_others(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04}(" + ENDLESS + b"K\x01u."


def with_a_bottomless_key(code: Code, metadata: Metadata) -> bytes:
    """To hash it overflows the stack."""
    return b"\x80\x04}K\x01" + b"\x85" * 2_000_000 + b"K\x01s."


def with_an_endless_set(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04\x8f(" + ENDLESS + b"\x90."


def with_an_endless_layout(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04" + ENDLESS + named("torch.serialization", "_get_layout") + b"h\x3b\x85R."


def with_an_endless_memory_format(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04" + ENDLESS + named(METADATA_MODULE, "_MEM_FORMAT_ENCODING") + b"h\x3b\x85R."


def with_a_new_endless_memory_format(code: Code, metadata: Metadata) -> bytes:
    return b"\x80\x04" + ENDLESS + named(METADATA_MODULE, "_MEM_FORMAT_ENCODING") + b"h\x3b\x85\x81."


def appended_by_a_call(code: Code, metadata: Metadata) -> bytes:
    """What is appended to goes by an attribute of that name."""
    made = named(METADATA_MODULE, "Metadata") + b")\x81}\x8c\x06append"
    enum = named(METADATA_MODULE, "_MEM_FORMAT_ENCODING")
    return b"\x80\x04" + ENDLESS + made + enum + b"sb" + b"h\x3ba."


def of_endless_properties(code: Code, metadata: Metadata) -> bytes:
    """Which are put into words where they are none."""
    return b"\x80\x04" + ENDLESS + named(METADATA_MODULE, "TensorProperties") + b")\x81(\x88\x88\x88h\x3b\x88tb."


def of_endless_parts(code: Code, metadata: Metadata) -> Any:
    path: Any = ()
    for _ in range(64):
        path = (path, path)
    name = next(iter(metadata.state_dict_metadata))
    entry: Any = metadata.state_dict_metadata[name]
    chunks = [replace(chunk, offsets=path) for chunk in entry.chunks]
    return replace(metadata, state_dict_metadata={**metadata.state_dict_metadata, name: replace(entry, chunks=chunks)})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder / "run", write_rows(folder / "rows"))


@pytest.mark.parametrize(
    "attack",
    [
        bare,
        within,
        as_a_value,
        from_elsewhere,
        by_a_name,
        on_a_class,
        of_endless_words,
        at_an_endless_path,
        with_an_endless_key,
        with_an_endless_key_among_others,
        with_a_bottomless_key,
        with_an_endless_set,
        with_an_endless_layout,
        with_an_endless_memory_format,
        with_a_new_endless_memory_format,
        appended_by_a_call,
        of_endless_properties,
        of_endless_parts,
    ],
    ids=lambda function: function.__name__,
)
def test_no_code_in_a_checkpoint_runs(
    rows: Rows, tmp_path: Path, attack: Callable[[Code, Metadata], Any], uninterrupted: tuple[Any, Any]
) -> None:
    whole, record = uninterrupted
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=2 * STOP)
    checkpoint = Storage(tmp_path / "broken").at(manifest.checkpoint_path(2 * STOP))
    ran = tmp_path / "ran"
    metadata = pickle.loads(checkpoint.read_bytes(".metadata"))
    written = attack(Code(ran), metadata)
    replace_in_storage(checkpoint, ".metadata", written if isinstance(written, bytes) else pickle.dumps(written))
    resumed, record_of_both = run(tmp_path / "broken", rows, model=fresh_model(seed=9))
    assert not ran.exists(), "it ran"
    assert str(PosixPath("/a")) == "/a", "it changed a class"
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)
    [note] = [note for note in record_of_both.notes if "passed over" in note]
    assert note.startswith("checkpoint 10 is passed over, training goes on from step 5") and ".metadata" in note


def test_the_micro_batch_changes_nothing(rows: Rows, tmp_path: Path) -> None:
    model = trained_model(rows, tmp_path)
    tokens, _ = rows.read(np.arange(8))
    mask = (np.random.default_rng(0).random(tokens.shape) < 0.3).astype(np.uint8)
    mask[:3] = 0  # a micro-batch without targets
    for weights in (None, mask):
        whole = gradients(model, tokens, weights, device_batch_size=8)
        for size in (1, 3, 100):
            torch.testing.assert_close(gradients(model, tokens, weights, size), whole, atol=1e-5, rtol=0)


def test_a_masked_target_contributes_nothing(rows: Rows, tmp_path: Path) -> None:
    model = trained_model(rows, tmp_path)
    tokens, _ = rows.read(np.arange(4))
    mask = np.ones(tokens.shape, dtype=np.uint8)
    mask[:, -1] = 0
    other = tokens.copy()
    other[:, -1] = (tokens[:, -1] + 5) % SPEC.vocab_size  # the last token of a row is a target and no input
    torch.testing.assert_close(gradients(model, tokens, mask, 4), gradients(model, other, mask, 4), atol=0, rtol=0)
    assert gradients(model, tokens, None, 4)["loss"] != gradients(model, other, None, 4)["loss"]

    mask[1:] = 0
    mask[0, :9] = 0
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        by_hand = model(ids[:1, :-1], ids[:1, 1:])[0, 8:15].mean()
    torch.testing.assert_close(gradients(model, tokens, mask, 4)["loss"], by_hand)


def test_a_step_without_targets_has_loss_zero(rows: Rows) -> None:
    tokens, _ = rows.read(np.arange(4))
    found = gradients(fresh_model(), tokens, np.zeros(tokens.shape, dtype=np.uint8), 2)
    assert all((value == 0).all() for value in found.values())


def break_a_weight(model: LanguageModel) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight[3, 4] = math.nan  # type: ignore[union-attr, index]


def break_a_gradient(model: LanguageModel) -> None:
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("fault", [break_a_weight, break_a_gradient], ids=lambda f: f.__name__)
@pytest.mark.parametrize("save_every", [1, STOP])
def test_numbers_that_are_not_finite_stop_the_run_and_reach_no_checkpoint(
    rows: Rows, tmp_path: Path, save_every: int, fault: Callable[[LanguageModel], None]
) -> None:
    validations: list[int] = []

    def validate(model: LanguageModel) -> float:
        validations.append(1)
        if len(validations) == 2:  # before step STOP
            fault(model)
        return math.nan

    config = CONFIG.model_copy(update={"save_every": save_every, "max_skipped": 2})
    with pytest.raises(
        FloatingPointError, match=r"gradient of 3 steps in a row.* up to step 7 .*lower this stage's lr"
    ):
        run(tmp_path / "run", rows, config, validate=validate)
    deadline = time.monotonic() + 20  # a save that was under way may finish
    while not (found := manifest.latest_checkpoint(Storage(tmp_path / "run"))) or found[0] != STOP:
        assert time.monotonic() < deadline and (not found or found[0] < STOP), "weights that are broken were saved"
        time.sleep(0.05)
    resumed, reporter = run(tmp_path / "run", rows)
    assert all(p.isfinite().all() for p in resumed.parameters())
    assert list(losses(reporter)) == list(range(STEPS))


def test_the_schedule_warms_up_from_the_first_step_and_decays_to_the_last() -> None:
    def rates(steps: int, warmup_ratio: float, warmdown_ratio: float) -> list[float]:
        schedule = Schedule(steps, warmup_ratio=warmup_ratio, warmdown_ratio=warmdown_ratio)
        return [schedule.multiplier(step) for step in range(steps)]

    assert rates(10, 0.4, 0.2) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5])
    assert rates(4, 0.0, 1.0) == [1, 0.75, 0.5, 0.25]
    assert rates(4, 0.0, 0.0) == [1, 1, 1, 1]
    assert rates(1, 0.9, 1.0)[0] > 0, "a run of one step moves"


def test_cosine_falls_from_the_warm_up_to_the_final_rate() -> None:
    schedule = Schedule(12, shape="cosine", warmup_steps=2, final_lr_ratio=0.1)
    found = [schedule.multiplier(step) for step in range(13)]
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert found[7] == pytest.approx(0.1 + 0.9 * 0.5), "half-way down after half the steps"
    assert found[12] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)


def test_a_run_by_time_ends_with_its_decay_whatever_the_pace() -> None:
    schedule = Schedule(None, seconds=100.0, warmup_ratio=0.1, warmdown_ratio=0.4)
    for pace in (0.7, 9.0):
        elapsed, step, seen = 0.0, 0, []
        while not schedule.over(step, elapsed, pace):
            seen.append(schedule.multiplier(step, elapsed, pace))
            elapsed, step = elapsed + pace, step + 1
        assert abs(elapsed - 100) <= pace / 2
        assert max(seen) == 1.0 and seen[0] == pytest.approx(min(1.0, pace / 10))
        assert seen[-1] <= 1.5 * pace / 40, "the last step is at the end of the decay"


def test_every_weight_has_one_rule_with_its_own_rate(rows: Rows, tmp_path: Path) -> None:
    model = fresh_model()
    config = CONFIG.model_copy(update={"lr_scale": 0.5})
    scale = 0.5 * (SPEC.width / 768) ** -0.5
    groups = group_weights(model, config)
    assert [group.lr for group in groups] == pytest.approx([0.2 * scale, 0.004 * scale, 0.01])
    assert [group.muon for group in groups] == [False, False, True]
    assert sorted(n for g in groups for n in g.names) == sorted(n for n, _ in model.named_parameters())
    own = config.model_copy(update={"unembedding_lr": 0.01, "embedding_lr": 0.3, "beta1": 0.7, "beta2": 0.9})
    assert [group.lr for group in group_weights(model, own)] == pytest.approx([0.3 * scale, 0.01 * scale, 0.01])
    assert [group.betas for group in group_weights(model, own)[:2]] == [(0.7, 0.9)] * 2
    other = build(replace(SPEC, family="llama", softcap=0.0))  # its embedding has the head's rate unless one is given
    assert [group.lr for group in group_weights(other, own.model_copy(update={"embedding_lr": None}))] == pytest.approx(
        [0.01 * scale, 0.01 * scale, 0.01]
    )
    decayed, vectors = group_weights(
        build(replace(SPEC, family="llama", softcap=0.0)),
        config.model_copy(update={"optimizer": "adamw", "weight_decay": 0.1}),
    )
    assert decayed.lr == vectors.lr == pytest.approx(1.5e-4)
    assert (decayed.weight_decay, vectors.weight_decay) == (0.1, 0.0)
    assert all("norm" in name for name in vectors.names) and len(vectors.names) == 2 * SPEC.layers + 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_with_cuda_graphs_gradients_stay_where_they_are_and_weights_learn_the_same(
    rows: Rows, cuda_graphs: bool
) -> None:
    """As a graph writes to the same memory step after step; what replays it needs a GPU."""

    def trained(config: TrainConfig) -> tuple[LanguageModel, list[dict[str, int]]]:
        model, places = fresh_model(), []
        optimizer = build_optimizer(model, config, "fp32", ALONE)
        for step in range(4):
            tokens = torch.from_numpy(rows.read(np.arange(8 * step, 8 * step + 8))[0])
            mask = torch.ones(tokens[:, 1:].shape)
            optimizer.overlap()
            accumulate_gradients(model, tokens, mask, 4, "fp32", ALONE)
            optimizer.reduce()
            optimizer.step(1.0, 1.0)
            places.append({n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None})
        return model, places

    plain, _ = trained(CONFIG)
    model, places = trained(CONFIG.model_copy(update={"cuda_graphs": cuda_graphs}))
    assert same_weights(model, plain) and not same_weights(model, fresh_model())
    assert places == [places[0]] * 4
    assert len(places[0]) == (len(list(model.parameters())) if cuda_graphs else 0)


def test_the_rate_of_every_step_is_recorded(rows: Rows, tmp_path: Path) -> None:
    _, reporter = run(tmp_path / "run", rows)
    logged = [r["lr_multiplier"] for r in reporter.records if "loss" in r]
    assert logged == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


class Clock:
    """Stands in for `time` in the loop: only computing and validating take time, the same on every machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("loop", "metrics"):
            monkeypatch.setattr(f"stages.training.{module}.time", self)

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def model(self) -> LanguageModel:
        """A model that takes ten milliseconds for each micro-batch, of which there are two a step."""
        model = fresh_model()
        model.register_forward_hook(lambda *_: self.take(0.01))
        return model

    def take(self, seconds: float) -> None:
        self.now += seconds


def test_a_run_by_time_stops_when_the_time_is_over_and_goes_on_with_what_is_left(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, schedule = Clock(monkeypatch), Schedule(None, seconds=4.0, warmdown_ratio=0.5)

    def finish(path: Path) -> list[dict[str, Any]]:
        return [r for r in run(path, rows, model=clock.model(), schedule=schedule)[1].records if "loss" in r]

    records = finish(tmp_path / "whole")
    assert clock.now == pytest.approx(4.0, abs=0.03)
    assert records[0]["lr_multiplier"] == 1.0 and records[-1]["lr_multiplier"] < 0.02
    assert len(records) == pytest.approx(200, abs=2)

    clock.now = 0.0
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, stop_at=2 * STOP, model=clock.model(), schedule=schedule)
    assert clock.now == pytest.approx(2 * STOP * 0.02)
    records = finish(tmp_path / "broken")
    assert clock.now == pytest.approx(4.0, abs=0.03)
    assert [r["step"] for r in records] == list(range(len(records)))


def test_a_long_validation_does_not_cut_the_decay_off(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def validate(_: LanguageModel) -> float:
        clock.take(1.0)
        return math.nan

    config = CONFIG.model_copy(update={"eval_every": 50})
    schedule = Schedule(None, seconds=4.0, warmdown_ratio=0.3)
    _, reporter = run(tmp_path / "run", rows, config, model=clock.model(), validate=validate, schedule=schedule)
    records = [r for r in reporter.records if "loss" in r]
    assert len(records) > 50, "no validation came between"
    assert records[-1]["lr_multiplier"] < 0.02


def test_a_stop_that_is_asked_for_saves_first(rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"save_every": 10**6, "eval_every": 0})
    storage = Storage(tmp_path / "stopped")
    storage.write_json(STOP_FILE, {})
    with pytest.raises(Stopped, match=r"up to step \d+ is saved"):
        run(tmp_path / "stopped", rows, config, schedule=Schedule(10**6, warmdown_ratio=0.0))
    [(step, _)] = manifest.checkpoints(storage)
    storage.delete(STOP_FILE)
    schedule = Schedule(step + 5, warmdown_ratio=0.0)
    resumed, record_of_both = run(tmp_path / "stopped", rows, config, schedule=schedule)
    whole, record = run(tmp_path / "whole", rows, config, schedule=schedule)
    assert len(losses(record)) == step + 5 > 5
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)


def test_early_stopping_ends_the_run_and_the_best_weights_are_kept(rows: Rows, tmp_path: Path) -> None:
    scores = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 0.0])
    config = CONFIG.model_copy(
        update={"eval_every": 1, "save_every": 100, "keep_last": 1, "early_stopping": 3, "keep_best": True}
    )
    model, reporter = run(tmp_path / "run", rows, config, validate=lambda _: next(scores))
    assert [r["val_bpb"] for r in reporter.records if "val_bpb" in r] == [5.0, 4.0, 3.0, 3.5, 3.2, 3.1]
    assert any("early stopping: val_bpb was lowest at step 2" in note for note in reporter.notes)
    assert [incident.kind for incident in reporter.incidents] == ["early stopping"]
    short, _ = run(tmp_path / "short", rows, config.model_copy(update={"early_stopping": 0}), schedule=FIRST_TWO)
    assert same_weights(model, short), "the weights are not those of step 2"
    assert [step for step, _ in manifest.checkpoints(Storage(tmp_path / "run"))] == [2, 5]


def test_where_the_best_weights_are_damaged_the_last_are_taken_and_the_user_is_told(rows: Rows, tmp_path: Path) -> None:
    """Else a stage that has trained to its end would fail there in every attempt."""
    config = CONFIG.model_copy(update={"eval_every": 1, "save_every": 100, "keep_best": True})
    checkpoint = Storage(tmp_path / "run").at(manifest.checkpoint_path(2))
    seen: list[int] = []

    def validate(_: LanguageModel) -> float:
        seen.append(len(seen))
        if seen[-1] == 4:  # whose checkpoint is being written at most, and that of step 2 is whole
            name = next(name for name in checkpoint.list() if name.endswith(".distcp"))
            data = checkpoint.read_bytes(name)
            checkpoint.write_bytes(name, data[:-1] + bytes([data[-1] ^ 1]))
        return [9.0, 2.0, 1.0][seen[-1]] if seen[-1] < 3 else 5.0

    model, reporter = run(tmp_path / "run", rows, config, validate=validate)
    last, _ = run(tmp_path / "last", rows, CONFIG.model_copy(update={"eval_every": 0}))
    assert same_weights(model, last) and reporter.latest("best_step") == {"best_step": STEPS}
    [note] = [note for note in reporter.notes if "are lost" in note]
    assert note.startswith("the weights of step 2, the best, are lost") and "SHA-256" in note


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_to_measure_a_damaged_checkpoint_is_no_reason_to_make_its_stage_again(
    rows: Rows, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    """Which may have others."""
    with pytest.raises(Killed):
        run(tmp_path / "run", rows, stop_at=STOP)
    checkpoint = Storage(tmp_path / "run").at(manifest.checkpoint_path(STOP))
    name = next(name for name in checkpoint.list() if name.endswith(".distcp"))
    checkpoint.write_bytes(name, change(checkpoint.read_bytes(name)))
    tokenizer = Tokenizer.open("chars", "0123456789")
    with pytest.raises(DamagedError, match=f"{name} has ") as fault:
        export_checkpoint(checkpoint, SPEC, tokenizer, tmp_path / "exported", ("<|bos|>",))
    assert "--force" not in str(fault.value)


def test_the_first_figure_of_a_validation_says_when_to_stop_and_what_is_best(rows: Rows, tmp_path: Path) -> None:
    learned, whole = iter([5.0, 4.0, 3.0, 3.5, 3.2]), iter([9.0, 8.0, 7.0, 6.0, 5.0])
    config = CONFIG.model_copy(update={"eval_every": 1, "save_every": 100, "early_stopping": 2, "keep_best": True})
    _, reporter = run(
        tmp_path / "run", rows, config, validate=lambda _: {"val_bpb_sft": next(learned), "whole": next(whole)}
    )
    assert [r["whole"] for r in reporter.records if "val_bpb_sft" in r] == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert any("early stopping: val_bpb_sft was lowest at step 2" in note for note in reporter.notes)
    assert reporter.latest("best_step") == {"best_step": 2}


def test_the_best_so_far_survives_a_kill(rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"eval_every": 2, "save_every": 2, "keep_last": 1, "keep_best": True})
    scores = {0: 9.0, 2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 10: 5.0, 12: 6.0}
    seen: list[int] = []

    def validate(_: LanguageModel) -> float:
        seen.append(2 * len(seen))
        return scores[seen[-1]]

    whole, _ = run(tmp_path / "whole", rows, config, validate=validate)
    seen.clear()
    with pytest.raises(Killed):
        run(tmp_path / "broken", rows, config, validate=validate, stop_at=6)
    seen[:] = [0, 2, 4]
    resumed, reporter = run(tmp_path / "broken", rows, config, model=fresh_model(seed=9), validate=validate)
    assert same_weights(resumed, whole)
    assert reporter.latest("best_step") == {"best_step": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"attention": "blocked"},
        {"compile": True, "checkpointing": "selective", "attention": "blocked"},
        {"compile": True, "checkpointing": "full"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_how_a_model_is_computed_changes_no_loss(rows: Rows, tmp_path: Path, settings: dict[str, Any]) -> None:
    _, plain = run(tmp_path / "plain", rows)
    torch._dynamo.utils.counters.clear()
    computed: list[LanguageModel] = []
    _, other = run(
        tmp_path / "other",
        rows,
        CONFIG.model_copy(update=settings),
        validate=lambda model: computed.append(model) or 0.0,  # type: ignore[func-returns-value]
    )
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    block = computed[0].model.layers[0]  # type: ignore[union-attr, index]
    if "checkpointing" in settings:
        assert "checkpoint" in repr(block.forward), "nothing is computed again"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graphs > 0) == settings.get("compile", False), "what is to be compiled is not, or the other way round"
    assert block.self_attn.backend == settings.get("attention", "sdpa")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "fa3"}, r"'fa3' needs an NVIDIA device.*would do"),
        ({"cuda_graphs": True}, "cuda_graphs needs a GPU"),
        ({"precision": "fp8"}, "fp8 needs a CUDA device"),
    ],
)
def test_what_this_device_cannot_do_is_an_error(
    rows: Rows, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", rows, CONFIG.model_copy(update=settings))


def spoiled(model: LanguageModel, micro_batch: int) -> LanguageModel:
    """The model, with an infinite gradient in one of its micro-batches."""
    calls: list[int] = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) == micro_batch else 1.0)

    model.model.layers[0].mlp.fc1.weight.register_hook(spoil)  # type: ignore[union-attr, arg-type]
    return model


def test_a_skipped_step_right_before_the_best_validation_or_a_stop_is_saved(rows: Rows, tmp_path: Path) -> None:
    scores = iter([9.0, 1.0, 2.0, 3.0])
    config = CONFIG.model_copy(update={"keep_best": True, "eval_every": STOP, "save_every": 100})
    model = spoiled(fresh_model(), 2 * STOP)  # two micro-batches a step: the last step before the validation
    _, reporter = run(tmp_path / "best", rows, config, model=model, validate=lambda _: next(scores))
    assert [r["step"] for r in reporter.records if r.get("skipped")] == [STOP - 1]
    assert reporter.latest("best_step") == {"best_step": STOP}

    Storage(tmp_path / "stopped").write_json(STOP_FILE, {})

    def spoil_all(gradient: Tensor) -> Tensor:
        return gradient * math.inf

    model = fresh_model()
    model.lm_head.weight.register_hook(spoil_all)
    config = CONFIG.model_copy(update={"max_skipped": 10**6, "eval_every": 0})
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", rows, config, model=model, schedule=Schedule(10**6))
    assert len(manifest.checkpoints(Storage(tmp_path / "stopped"))) == 1


def test_saves_by_the_minute(rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"save_every": 10**6, "save_minutes": 0.5 / 60, "keep_last": 100, "eval_every": 0}
    )
    run(tmp_path / "run", rows, config, schedule=Schedule(None, seconds=3.0))
    saved = manifest.checkpoints(Storage(tmp_path / "run"))
    assert 4 <= len(saved) <= 7, saved


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(rows: Rows, tmp_path: Path) -> None:
    """The gradient of one step is infinite: weights, momentum and AdamW's count go on as if it had not been."""
    model = spoiled(fresh_model(), 3)  # two micro-batches a step: the first of step 1
    config = CONFIG.model_copy(update={"eval_every": 0, "save_every": 1, "keep_last": 100})
    _, reporter = run(tmp_path / "run", rows, config, model=model, schedule=Schedule(4, warmdown_ratio=0.0))
    assert [r["step"] for r in reporter.records if r.get("skipped")] == [1]
    assert [step for step, _ in manifest.checkpoints(Storage(tmp_path / "run"))] == [1, 3, 4], "a bad step was saved"

    class Without(Rows):
        def step_rows(self, seed: int, step: int, rows_per_step: int) -> np.ndarray:
            return super().step_rows(seed, step + (step > 0), rows_per_step)

    plain, _ = run(tmp_path / "plain", Without(tmp_path / "rows"), config, schedule=Schedule(3, warmdown_ratio=0.0))
    assert same_weights(plain, model)


OUT_OF_MEMORY = """
import resource, sys, json, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_training as t
from pathlib import Path
from dataclasses import replace
from models.build import build
torch.set_num_threads(1)
spec = replace(t.SPEC, sequence_len=256, width=64, ffn_width=2048, head_dim=0)
path = Path(sys.argv[1])
t.SPEC = spec
rows = t.write_rows(path / "rows")
def go(name, size):
    model = build(spec); model.init_weights(0)
    sizes = {{"total_batch_size": 32 * 256, "device_batch_size": size, "eval_every": 0}}
    config = t.CONFIG.model_copy(update=sizes)
    _, reporter = t.run(path / name, rows, config, model=model, schedule=t.Schedule(3))
    return [r["loss"] for r in reporter.records if "loss" in r], reporter.notes
small = go("small", 4)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
print(json.dumps([small, go("large", 32)]))
"""


def test_a_micro_batch_too_large_for_memory_is_halved_with_the_same_losses(tmp_path: Path) -> None:
    """The operating system gives the process no more memory, as a full GPU would not."""
    root, tests = str(Path(__file__).parents[1]), str(Path(__file__).parent)
    program = OUT_OF_MEMORY.format(root=root, tests=tests)
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    (small, _), (large, notes) = json.loads(result.stdout)
    assert any(note.startswith("out of memory: device_batch_size is now 16") for note in notes), notes
    assert large == pytest.approx(small, abs=1e-5)


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    """A fresh model gives each of 64 tokens 6 bits; a token's bytes share them, and a special token's do not count."""
    rows = write_rows(tmp_path / "rows", count=40)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5  # 0 for special tokens
    targets = rows.read(np.arange(37))[0][:, 1:]
    expected = 6 * (token_bytes[targets] > 0).sum() / token_bytes[targets].sum()
    found = bits_per_byte(fresh_model(), rows, token_bytes, ALONE, "fp32", limit=37)
    assert found == pytest.approx((expected, expected), rel=1e-6)

    model = trained_model(rows, tmp_path)
    tokens = torch.from_numpy(rows.read(np.arange(40))[0])
    with torch.no_grad():
        chances = model.logits(tokens[:, :-1]).softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].double()
    sizes = torch.from_numpy(token_bytes)[tokens[:, 1:]]
    expected = (-chances.log2()[sizes > 0].sum() / sizes.sum()).item()
    found = bits_per_byte(model, rows, token_bytes, ALONE, "fp32", limit=10**9)
    assert found == pytest.approx((expected, expected), rel=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 16])
def test_bits_per_byte_of_what_is_learned_count_no_other_target(tmp_path: Path, rows_at_once: int) -> None:
    """SFT reads prompts and tools' results, too: what a model makes of these says nothing of what it was taught."""
    rows = write_rows(tmp_path / "rows", masked=True)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5
    model = trained_model(rows, tmp_path)
    ids, mask = rows.read(np.arange(37))
    assert mask is not None
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(ids[:, :-1]))
        bits = -logits.log_softmax(-1).gather(-1, torch.from_numpy(ids[:, 1:, None]))[..., 0].double() / math.log(2)
    sizes = token_bytes[ids[:, 1:]]
    expected = tuple(
        bits.numpy()[counted & (sizes > 0)].sum() / sizes[counted].sum()
        for counted in (mask[:, 1:] == 1, np.ones(sizes.shape, dtype=bool))
    )
    found = bits_per_byte(model, rows, token_bytes, ALONE, "fp32", 37, rows_at_once)
    assert found == pytest.approx(expected, rel=1e-5) and abs(found[0] - found[1]) > 0.05

    empty = RowWriter(tmp_path / "none", SPEC.sequence_len + 1, SPEC.vocab_size, masked=True)
    empty.add(ids[0], np.zeros(SPEC.sequence_len + 1))
    empty.close()
    learned, whole = bits_per_byte(model, Rows(tmp_path / "none"), token_bytes, ALONE, "fp32", 37)
    assert math.isnan(learned) and whole > 0


def two_ranks(rank: int, path: Path) -> None:
    """What each of two gloo processes does: a whole run, one that stops, and its share of the validation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)
    world, rows = World.current(2), Rows(path / "rows")
    assert (world.rank, world.size) == (rank, 2)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5

    def validate(model: LanguageModel) -> float:
        return bits_per_byte(model, rows, token_bytes, world, "fp32", limit=37)[0]

    model, reporter = run(path / "both" / "run", rows, world=world, validate=validate)
    torch.save(model.state_dict(), path / f"weights-{rank}.pt")
    try:
        run(path / "begun" / "run", rows, world=world, stop_at=STOP)
    except Killed:
        dist.barrier()
    asked = Storage(path / "asked" / "run")
    if rank == 0:  # as on slow storage
        write = manifest.write
        manifest.write = lambda *given: (time.sleep(1), write(*given))[1]
        asked.write_json(STOP_FILE, {})
    dist.barrier()
    try:
        run(path / "asked" / "run", rows, world=world, schedule=Schedule(10**6, warmdown_ratio=0.0))
    except Stopped:
        assert manifest.checkpoints(asked), "the first rank to end ends the others: the save must be complete"
    else:
        raise AssertionError("it went on")
    dist.barrier()
    if rank == 0:
        (path / "both.json").write_text(json.dumps(reporter.records))
    dist.destroy_process_group()


def test_two_processes_train_like_one_and_one_goes_on_with_what_two_began(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", masked=True)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5

    def validate(model: LanguageModel) -> float:
        return bits_per_byte(model, rows, token_bytes, ALONE, "fp32", limit=37)[0]

    def values(records: list[dict[str, Any]], name: str) -> dict[int, float]:
        return {r["step"]: r[name] for r in records if name in r}

    _, alone = run(tmp_path / "alone" / "run", rows, validate=validate)
    mp.spawn(two_ranks, args=(tmp_path,), nprocs=2)
    both = json.loads((tmp_path / "both.json").read_text())
    assert len(values(both, "loss")) == STEPS and len(values(both, "val_bpb")) == 4
    for name in ("loss", "val_bpb", "grad_norm"):
        assert values(both, name) == pytest.approx(values(alone.records, name), abs=1e-4), name
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "the ranks hold different weights"

    [(step, checkpoint)] = manifest.checkpoints(Storage(tmp_path / "begun" / "run"))
    assert step == STOP
    assert {"__0_0.distcp", "__1_0.distcp"} <= checkpoint.list().keys(), "each rank wrote its part"
    _, resumed = run(tmp_path / "begun" / "run", rows, model=fresh_model(seed=9))
    assert losses(resumed) == pytest.approx(losses(alone), abs=1e-4)


class Three(World):
    """The first of three ranks, of which the others take what it does."""

    def everyone(self, value: Any) -> list[Any]:
        return [value, value, value]


def test_what_every_rank_takes_is_on_record_every_few_seconds(tmp_path: Path) -> None:
    reporter, world = Reporter(Storage(tmp_path), None), Three(0, 3, torch.device("cpu"), threads=1)
    for step, seconds in enumerate((0.0, 4.0, 6.0, 9.0, 11.5)):
        reporter.look(world, seconds, lambda: {"actor0_rss_gb": 0.25})
        reporter.log(step, loss=float(step))
    reporter.close()
    figures = {
        f"{rank}{name}" for rank in ("", "rank1_", "rank2_") for name in ("cpu_cores", "rss_gb", "actor0_rss_gb")
    }
    assert [{*record} - {"step", "loss"} for record in reporter.records] == [set(), set(), figures, set(), figures]
    assert reporter.records[2]["rss_gb"] > 0.01 and reporter.records[2]["rank2_actor0_rss_gb"] == 0.25


def test_a_run_of_the_loop_records_what_it_takes_and_learns_the_same(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, untouched = run(tmp_path / "untouched", rows)
    monkeypatch.setattr("stages.training.metrics.LOOK_SECONDS", 0.0)
    _, looked = run(tmp_path / "looked", rows)
    assert (
        sum("rss_gb" in record for record in looked.records)
        >= STEPS
        > 0
        == sum("rss_gb" in record for record in untouched.records)
    )
    assert losses(looked) == losses(untouched)


def test_what_others_see_of_a_stage_is_the_newest_of_every_figure(tmp_path: Path) -> None:
    reporter = Reporter(Storage(tmp_path), 9)
    reporter.go_on([{"step": 0, "val_bpb": 3.0, "loss": 2.0}, {"step": 1, "loss": 1.5, "skipped": True}], [], 60.0)
    reporter.log(2, loss=torch.tensor(1.25), grad_norm=0.5)
    reporter.close()
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["record"] == {"step": 2, "val_bpb": 3.0, "loss": 1.25, "grad_norm": 0.5}
    assert progress["metrics"] == {"val_bpb": 3.0, "loss": 1.25} and 60 <= progress["seconds"] < 120
