"""The training loop with real rows, storage and checkpoints, in this process and in gloo groups, without Ray."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cluster import manifest
from cluster.storage import Storage
from corpus.rows import Rows, RowWriter
from models.nanochat import NanoChat
from models.spec import ModelSpec
from stages.config import TrainConfig
from stages.context import StageContext
from stages.evaluate import bits_per_byte
from stages.training.loop import accumulate_gradients, train
from stages.training.metrics import Reporter
from stages.training.optimizer import build_optimizers, set_learning_rates
from stages.training.parallel import World
from stages.training.schedule import lr_multiplier
from stages.training.state import Checkpoints

SPEC = ModelSpec(layers=2, width=32, heads=2, kv_heads=2, ffn_width=64, vocab_size=64, sequence_len=16)
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


class Stopped(Exception):
    """What ends a run in the middle here."""


def fresh_model(seed: int = 0) -> NanoChat:
    model = NanoChat(SPEC)
    model.init_weights(seed)
    return model


def write_rows(directory: Path, masked: bool = False, count: int = 40) -> Rows:
    """Rows that count upwards in a stride of their own, so that there is something to learn."""
    rng = np.random.default_rng(0)
    writer = RowWriter(directory, SPEC.sequence_len + 1, SPEC.vocab_size, masked)
    for _ in range(count):
        ids = (rng.integers(SPEC.vocab_size) + rng.integers(1, 4) * np.arange(SPEC.sequence_len + 1)) % SPEC.vocab_size
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
    model: NanoChat | None = None,
    validate: Callable[[NanoChat], dict[str, float]] = lambda _: {},
) -> tuple[NanoChat, Reporter]:
    """One attempt of a run whose stage lies at `path`. Raises Stopped in the validation of step `stop_at`."""
    model = model or fresh_model()
    reporter = Reporter(Storage(path), STEPS, quiet=world.rank > 0)
    checkpoints = Checkpoints(stage(path), world, path.with_name(f"scratch-{world.rank}"), reporter, config.keep_last)
    validations: list[int] = []

    def count(model: NanoChat) -> dict[str, float]:
        validations.append(len(validations) * config.eval_every)
        if validations[-1] == stop_at:
            checkpoints.wait()
            raise Stopped
        return validate(model)

    train(model, rows, config, STEPS, 0, world, checkpoints, reporter, count)
    reporter.close()
    return model, reporter


def losses(reporter: Reporter) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in reporter.records if "loss" in r}


def same_weights(a: NanoChat, b: NanoChat) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(
    model: NanoChat, tokens: np.ndarray, mask: np.ndarray | None, device_batch_size: int
) -> dict[str, Tensor]:
    """The step's loss under "loss", and every gradient."""
    config = CONFIG.model_copy(update={"device_batch_size": device_batch_size})
    model.zero_grad()
    loss = accumulate_gradients(model, tokens, mask, config, ALONE)
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained_model(rows: Rows, path: Path) -> NanoChat:
    """A few steps from the start, where the head is no longer zero and every weight has a gradient."""
    return run(path / "warm", rows)[0]


def test_the_loss_falls_and_every_step_is_recorded(rows: Rows, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"lr_scale": 1.0})
    _, reporter = run(tmp_path / "run", rows, config, validate=lambda _: {"val_bpb": 1.0})
    found = losses(reporter)
    assert list(found) == list(range(STEPS))
    assert found[0] == pytest.approx(math.log(SPEC.vocab_size), abs=1e-4)
    assert found[STEPS - 1] < 0.7 * found[0]
    assert [r["step"] for r in reporter.records if "val_bpb" in r] == [0, 5, 10, 12]


@pytest.mark.parametrize("masked", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, masked: bool) -> None:
    rows = write_rows(tmp_path / "rows", masked)
    whole, record = run(tmp_path / "whole", rows)
    with pytest.raises(Stopped):
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
    with pytest.raises(Stopped):
        run(tmp_path / "broken", rows, stop_at=STOP)
    storage = Storage(tmp_path / "broken")
    storage.at(manifest.checkpoint_path(10)).write_bytes("__0_0.distcp", b"half of it")
    storage.at(manifest.checkpoint_path(10)).write_json("part-1.json", [])
    with pytest.raises(Stopped):  # in its first validation, which comes after the restore
        run(tmp_path / "broken", rows, stop_at=0)
    assert not storage.list(manifest.checkpoint_path(10))
    resumed, record_of_both = run(tmp_path / "broken", rows)
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over(rows: Rows, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    whole, record = run(tmp_path / "whole", rows)
    with pytest.raises(Stopped):
        run(tmp_path / "broken", rows, stop_at=2 * STOP)
    [weights] = (tmp_path / "broken" / manifest.checkpoint_path(2 * STOP)).glob("*.distcp")
    damage(weights)
    resumed, record_of_both = run(tmp_path / "broken", rows, model=fresh_model(seed=9))
    assert losses(record_of_both) == losses(record) and same_weights(resumed, whole)


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


def break_a_weight(model: NanoChat) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight[3, 4] = math.nan  # type: ignore[union-attr, index]


def break_a_gradient(model: NanoChat) -> None:
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("fault", [break_a_weight, break_a_gradient], ids=lambda f: f.__name__)
@pytest.mark.parametrize("save_every", [1, STOP])
def test_numbers_that_are_not_finite_stop_the_run_and_reach_no_checkpoint(
    rows: Rows, tmp_path: Path, save_every: int, fault: Callable[[NanoChat], None]
) -> None:
    validations: list[int] = []

    def validate(model: NanoChat) -> dict[str, float]:
        validations.append(1)
        if len(validations) == 2:  # before step STOP
            fault(model)
        return {}

    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step [56]: lower this stage's lr_scale"):
        run(tmp_path / "run", rows, CONFIG.model_copy(update={"save_every": save_every}), validate=validate)
    deadline = time.monotonic() + 20  # a save that was under way may finish
    while not (found := manifest.latest_checkpoint(Storage(tmp_path / "run"))) or found[0] != STOP:
        assert time.monotonic() < deadline and (not found or found[0] < STOP), "weights that are broken were saved"
        time.sleep(0.05)
    resumed, reporter = run(tmp_path / "run", rows)
    assert all(p.isfinite().all() for p in resumed.parameters())
    assert list(losses(reporter)) == list(range(STEPS))


def test_the_schedule_warms_up_from_the_first_step_and_decays_to_the_last() -> None:
    values = [lr_multiplier(step, 10, warmup_ratio=0.4, warmdown_ratio=0.2) for step in range(10)]
    assert values == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]
    assert [lr_multiplier(step, 4, 0.0, 1.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [lr_multiplier(step, 4, 0.0, 0.0) for step in range(4)] == [1, 1, 1, 1]
    assert lr_multiplier(0, 1, 0.9, 1.0) > 0, "a run of one step moves"


def test_the_schedule_scales_every_group_from_its_own_rate_and_the_last_step_still_moves(
    rows: Rows, tmp_path: Path
) -> None:
    model = fresh_model()
    optimizers = build_optimizers(model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004)
    set_learning_rates(optimizers, 0.1)
    set_learning_rates(optimizers, 0.5)
    scale = (SPEC.width / 768) ** -0.5
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * scale, 0.002 * scale, 0.01])
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters())), "each weight has one optimizer"

    _, reporter = run(tmp_path / "run", rows)
    logged = [r["lr_multiplier"] for r in reporter.records if "loss" in r]
    assert logged == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    """A fresh model gives each of 64 tokens 6 bits; a token's bytes share them, and a special token's do not count."""
    rows = write_rows(tmp_path / "rows", count=40)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5  # 0 for special tokens
    targets = rows.read(np.arange(37))[0][:, 1:]
    expected = 6 * (token_bytes[targets] > 0).sum() / token_bytes[targets].sum()
    found = bits_per_byte(fresh_model(), rows, token_bytes, ALONE, "fp32", limit=37)
    assert found == pytest.approx(expected, rel=1e-6)

    model = trained_model(rows, tmp_path)
    tokens = torch.from_numpy(rows.read(np.arange(40))[0])
    with torch.no_grad():
        chances = model.logits(tokens[:, :-1]).softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].double()
    sizes = torch.from_numpy(token_bytes)[tokens[:, 1:]]
    expected = (-chances.log2()[sizes > 0].sum() / sizes.sum()).item()
    found = bits_per_byte(model, rows, token_bytes, ALONE, "fp32", limit=10**9)
    assert found == pytest.approx(expected, rel=1e-5)


def two_ranks(rank: int, path: Path) -> None:
    """What each of two gloo processes does: a whole run, one that stops, and its share of the validation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2)
    world, rows = World.current(threads=1), Rows(path / "rows")
    assert (world.rank, world.size) == (rank, 2)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5

    def validate(model: NanoChat) -> dict[str, float]:
        return {"val_bpb": bits_per_byte(model, rows, token_bytes, world, "fp32", limit=37)}

    model, reporter = run(path / "both" / "run", rows, world=world, validate=validate)
    torch.save(model.state_dict(), path / f"weights-{rank}.pt")
    try:
        run(path / "begun" / "run", rows, world=world, stop_at=STOP)
    except Stopped:
        dist.barrier()
    if rank == 0:
        (path / "both.json").write_text(json.dumps(reporter.records))
    dist.destroy_process_group()


def test_two_processes_train_like_one_and_one_goes_on_with_what_two_began(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", masked=True)
    token_bytes = np.arange(SPEC.vocab_size, dtype=np.int32) % 5

    def validate(model: NanoChat) -> dict[str, float]:
        return {"val_bpb": bits_per_byte(model, rows, token_bytes, ALONE, "fp32", limit=37)}

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
