"""The parallel modes: two and three gloo processes against one, in each mode and from each mode to each other."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_scoring import make_bundle
from test_training import CONFIG, SPEC, STOP, Killed, flip_a_bit, replace_in_storage, run, stage, write_rows
from torch.distributed.tensor import DTensor

from cluster import manifest
from cluster.storage import Storage, StorageError
from corpus.tokenizers import Tokenizer
from models.build import build
from models.hf import from_pretrained, save_pretrained
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.evaluation import spoken
from stages.evaluation.on_the_way import CoreOnTheWay
from stages.training.metrics import Reporter
from stages.training.optimizer import build_optimizer
from stages.training.parallel import World, initial_device, prepare
from stages.training.schedule import Schedule
from stages.training.state import Checkpoints

MODES = ("ddp", "zero1", "fsdp")
# 20 steps of fp32, orthogonalisation too; 8 rows a step do not divide among three ranks
LONG = CONFIG.model_copy(update={"eval_every": STOP, "save_every": STOP, "device_batch_size": 2})
SCHEDULE = Schedule(20, warmdown_ratio=0.5)
# tied, with biases and norms, and rows that divide neither by two nor by three
GPT2 = ModelSpec(
    "gpt2",
    layers=3,
    width=24,
    heads=3,
    kv_heads=3,
    ffn_width=50,
    vocab_size=61,
    sequence_len=16,
    tied=True,
    biases=True,
)
FAULTS = {"damaged": "ddp", "unreadable": "zero1", "unused": "fsdp"}  # of one rank's view of the storage
UNFIT = {"empty": "fsdp"}  # what one rank reads holds no tensors, in storage itself
SPECS = {"depth": replace(SPEC, vocab_size=61), "gpt2": GPT2}
FAMILIES = SPECS | {"qwen3": replace(SPECS["depth"], family="qwen3", softcap=0.0, kv_heads=1)}


def attempt(
    path: Path, family: str, mode: str, world: World, stop_at: int | None = None, **settings: Any
) -> tuple[dict[int, float], torch.Tensor]:
    """Losses by step (on the first rank), and what the model makes of one row."""
    rows = write_rows(path.parent / f"rows-{os.getpid()}", masked=True, vocab_size=61)
    config = LONG.model_copy(update={"parallel": mode, "optimizer": "muon", **settings})
    model = build(SPECS[family], initial_device(config, world))
    model.source = partial(LanguageModel.initial_weights, seed=0)
    if not next(model.parameters()).is_meta:
        model.source = None
        model.init_weights(0)
    model, reporter = run(path / "run", rows, config, world, stop_at, model, schedule=SCHEDULE)
    ids = torch.arange(17)[None] % 61
    return {r["step"]: r["loss"] for r in reporter.records if "loss" in r}, model(ids[:, :-1], ids[:, 1:]).detach()


def work(rank: int, size: int, path: Path, todo: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / f'meet-{size}'}", rank=rank, world_size=size)
    world = World.current(2)
    results = []
    for job in todo:
        settings = job.get("settings", {})
        try:
            losses, output = attempt(
                path / job["name"], job["family"], job["mode"], world, job.get("stop_at"), **settings
            )
            results.append({"name": job["name"], "losses": losses, "output": output.flatten().tolist()})
        except Killed:
            dist.barrier()
    (path / f"results-{size}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def together(path: Path, size: int, todo: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Does every job on `size` processes; results by name. All ranks must have come to the same weights."""
    mp.spawn(work, args=(size, path, todo), nprocs=size)
    by_rank = [json.loads((path / f"results-{size}-{rank}.json").read_text()) for rank in range(size)]
    for other in by_rank[1:]:
        for mine, theirs in zip(by_rank[0], other, strict=True):
            assert mine["output"] == theirs["output"], f"{mine['name']}: the ranks hold different weights"
    return {r["name"]: {**r, "losses": {int(k): v for k, v in r["losses"].items()}} for r in by_rank[0]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    world = World(0, 1, torch.device("cpu"), threads=1)
    path = tmp_path_factory.mktemp("alone")
    return {family: attempt(path / family, family, "ddp", world)[0] for family in SPECS}


def test_every_mode_trains_like_one_process_and_resumes_every_other(
    tmp_path: Path, alone: dict[str, dict[int, float]]
) -> None:
    whole = [{"name": f"{f}-{m}", "family": f, "mode": m} for m in MODES for f in SPECS]
    begun = [
        {"name": f"{f}-{a}-{b}", "family": f, "mode": a, "stop_at": 2 * STOP}
        for f in SPECS
        for a in MODES
        for b in MODES
        if f == "depth" or a != b
    ]
    resumed = [{**job, "mode": job["name"].split("-")[2], "stop_at": None} for job in begun]
    results = together(tmp_path, 2, [*whole, *begun, *resumed])
    for job in whole:
        found = results[job["name"]]["losses"]
        assert len(found) == 20
        assert found == pytest.approx(alone[job["family"]], abs=1e-4), job["name"]
    for job in resumed:
        found = results[job["name"]]["losses"]
        assert list(found) == list(range(20))
        assert found == pytest.approx(alone[job["family"]], abs=1e-4), job["name"]
        family, before, after = job["name"].split("-")
        if before == after:
            unbroken = results[f"{family}-{after}"]
            assert found == unbroken["losses"], f"{after}: not bit for bit"
            assert results[job["name"]]["output"] == unbroken["output"]


def test_three_processes_take_over_from_two_and_one_from_three(
    tmp_path: Path, alone: dict[str, dict[int, float]]
) -> None:
    jobs = [{"name": f"{family}-{mode}", "family": family, "mode": mode} for family in SPECS for mode in MODES]
    together(tmp_path, 2, [{**job, "stop_at": STOP} for job in jobs])
    together(tmp_path, 3, [{**job, "stop_at": 2 * STOP} for job in jobs])
    world = World(0, 1, torch.device("cpu"), threads=1)
    for job in jobs:
        found, _ = attempt(tmp_path / job["name"], job["family"], job["mode"], world)
        assert found == pytest.approx(alone[job["family"]], abs=1e-4), job["name"]


def test_adamw_for_all_and_no_clipping_agree_too(tmp_path: Path) -> None:
    settings = {"optimizer": "adamw", "adamw_lr": 1e-2, "weight_decay": 0.1, "grad_clip": 0.0}
    jobs = [{"name": mode, "family": "gpt2", "mode": mode, "settings": settings} for mode in MODES]
    world = World(0, 1, torch.device("cpu"), threads=1)
    one, _ = attempt(tmp_path / "one", "gpt2", "ddp", world, **settings)
    assert one[19] < 0.9 * one[0]
    for name, result in together(tmp_path, 2, jobs).items():
        assert result["losses"] == pytest.approx(one, abs=1e-4), name


def test_the_modes_compute_the_same_loss_in_bf16(tmp_path: Path) -> None:
    """What weighs the targets must not be rounded on its way through FSDP's mixed precision."""
    settings = {"precision": "bf16", "checkpointing": "full"}
    jobs = [{"name": m, "family": "depth", "mode": m, "settings": settings} for m in MODES]
    found = {name: result["losses"] for name, result in together(tmp_path, 2, jobs).items()}
    for mode in MODES:
        assert found[mode][0] == pytest.approx(found["ddp"][0], rel=1e-4), mode
        assert found[mode][19] == pytest.approx(found["ddp"][19], rel=0.02), mode


def fills(rank: int, path: Path) -> None:
    """Every way to a sharded model, by way of the whole on each rank and of its rows alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet-to-fill'}", rank=rank, world_size=2)
    world, config = World.current(2), LONG.model_copy(update={"parallel": "fsdp"})
    ids = torch.arange(17)[None] % 61
    for name, spec in FAMILIES.items():
        new = build(spec)
        new.init_weights(0)
        lazy = build(spec, "meta")
        lazy.source = partial(LanguageModel.initial_weights, seed=0)
        stored = path / name
        pairs = [(new, lazy), (from_pretrained(stored), from_pretrained(stored, device="meta"))]
        for whole, rows in pairs:
            assert all(p.is_meta for p in rows.parameters()), "it took the memory of the whole"
            gradients = []
            for model in (whole, rows):
                prepare(model, config, "fp32", world)
                model(ids[:, :-1], ids[:, 1:]).sum().backward()
                gradients.append({n: p.grad.to_local() for n, p in model.named_parameters()})  # type: ignore[union-attr]
            ours, theirs = (dict(m.state_dict(), cos=m.cos, sin=m.sin) for m in (rows, whole))
            assert ours.keys() == theirs.keys()
            for n, values in theirs.items():
                mine = ours[n]
                assert (values is None) == (mine is None)
                if values is not None:
                    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (values, mine))
                    assert torch.equal(a, b), f"{name}: {n}"
            assert gradients[0].keys() == gradients[1].keys()
            assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
            assert (rows.lm_head.weight is rows.model.embed_tokens.weight) == spec.tied
    dist.destroy_process_group()


def test_a_sharded_model_is_the_same_when_no_rank_ever_has_the_whole(tmp_path: Path) -> None:
    for name, spec in FAMILIES.items():
        model = build(spec)
        model.init_weights(7)
        save_pretrained(model, tmp_path / name, 0, [1], 1)
    mp.spawn(fills, args=(tmp_path,), nprocs=2)


def restores(rank: int, path: Path, jobs: list[dict[str, str]]) -> None:
    """What each of two ranks comes to, reading its own copy of the storage: the step, or why there is none."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'meet-again'}", rank=rank, world_size=2)
    world, found = World.current(2), {}
    for job in jobs:
        model = build(SPECS[job["family"]])
        model.init_weights(9)
        config = LONG.model_copy(update={"parallel": job["mode"], "optimizer": "muon"})
        prepare(model, config, "fp32", world)
        optimizer = build_optimizer(model, config, "fp32", world)
        storage = Storage(path / job["name"] / ("run" if rank == 0 else "other"))
        reporter = Reporter(storage, 20, quiet=rank > 0)
        checkpoints = Checkpoints(stage(Path(storage.uri)), world, path / f"scratch-{rank}", reporter, 2)
        try:
            found[job["name"]] = [checkpoints.restore(model, optimizer).step, *reporter.notes]
        except StorageError as error:
            found[job["name"]] = ["error", str(error)]
    (path / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_resume_from_the_same_step_whatever_one_of_them_cannot_read(tmp_path: Path) -> None:
    jobs = [{"name": n, "family": "gpt2", "mode": m} for n, m in (FAULTS | UNFIT).items()]
    together(tmp_path, 2, [{**job, "stop_at": 2 * STOP} for job in jobs])
    newest = manifest.checkpoint_path(2 * STOP)
    place = Storage(tmp_path / "empty" / "run").at(newest)
    replace_in_storage(place, "__0_0.distcp", bytes(len(place.read_bytes("__0_0.distcp"))))
    for job in jobs:
        shutil.copytree(tmp_path / job["name"] / "run", tmp_path / job["name"] / "other")
    flip_a_bit(tmp_path / "damaged" / "other" / newest / "__0_0.distcp")
    flip_a_bit(tmp_path / "unused" / "other" / newest / "__0_0.distcp")
    unreadable = tmp_path / "unreadable" / "other" / newest / "__0_0.distcp"
    unreadable.unlink()
    unreadable.symlink_to(unreadable)  # the system refuses to follow it, as it would a disk that fails
    mp.spawn(restores, args=(tmp_path, jobs), nprocs=2)
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    [step, *notes], [other] = first["damaged"], second["damaged"]
    passed = "checkpoint 10 is passed over, training goes on from step 5"
    assert step == other == STOP and any(note.startswith(passed) for note in notes)
    run = tmp_path / "damaged" / "run"
    assert not (run / newest).exists(), "it would mix with the parts of the next save"
    kept = Storage(run).at(manifest.CHECKPOINTS, "passed_over_000010")
    assert manifest.fetch(kept), "only what the other rank read was damaged"
    assert first["unreadable"] == second["unreadable"] and "__0_0.distcp" in first["unreadable"][1]
    assert (tmp_path / "unreadable" / "run" / newest / "manifest.json").exists(), "nothing was wrong with it"
    assert first["empty"][0] == second["empty"][0] == STOP and any(
        note.startswith(passed) for note in first["empty"][1:]
    )
    assert first["unused"][0] == second["unused"][0] == 2 * STOP, "what it reads lies in the other file"


def asks(rank: int, path: Path) -> None:
    """CORE of a model in each mode, before it has trained and after, and what it says; the batches do not divide among
    the ranks."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=100)  # for a rank that waits for another one's pass
    meeting = f"file://{path / 'meet-to-ask'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=limit)
    tokenizer = Tokenizer.load(path / "tokenizer")
    spoken.SAMPLE_TOKENS = 12
    found = {}
    for name, spec in FAMILIES.items():
        for mode in ("ddp", "fsdp"):
            model = build(replace(spec, vocab_size=tokenizer.vocab_size, sequence_len=64))
            model.init_weights(0)
            world, config = World.current(3), LONG.model_copy(update={"parallel": mode})
            prepare(model, config, "fp32", world)
            core = CoreOnTheWay(str(path / "bundle"), 12, tokenizer, model.spec, world, "fp32")
            speakers = [spoken.Speaker(tokenizer, model.spec, world, "fp32", chat) for chat in (False, True)]
            figures = [core(model)["val_core"], *(speaker(model) for speaker in speakers)]
            ids = torch.arange(17)[None] % 61
            model(ids[:, :-1], ids[:, 1:]).sum().backward()
            found[f"{name} {mode}"] = [*figures, core(model)["val_core"], speakers[1](model)]
    (path / f"asked-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_what_is_asked_on_the_way_is_the_same_whatever_the_ranks_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken, "SAMPLE_TOKENS", 12)
    make_bundle(tmp_path / "bundle")
    tokenizer = Tokenizer.train(["The ash grew. Question: 1? Answer: oak, as the elm and the yew " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer")
    mp.spawn(asks, args=(tmp_path,), nprocs=3)
    one, *others = [json.loads((tmp_path / f"asked-{rank}.json").read_text()) for rank in range(3)]
    assert all(other == one for other in others)
    for name, spec in FAMILIES.items():
        model = build(replace(spec, vocab_size=tokenizer.vocab_size, sequence_len=64))
        model.init_weights(0)
        core = CoreOnTheWay(
            str(tmp_path / "bundle"), 12, tokenizer, model.spec, World(0, 1, torch.device("cpu"), 1), "fp32"
        )
        assert len(core.batches) % 3, "they divide among the ranks"
        speakers = [spoken.Speaker(tokenizer, model.spec, core.world, "fp32", chat) for chat in (False, True)]
        before = torch.get_rng_state()
        gone_on, replies = (speaker(model) for speaker in speakers)
        assert torch.equal(torch.get_rng_state(), before), "training draws other numbers"
        expected = [core(model)["val_core"], gone_on, replies, core(model)["val_core"], replies]
        assert [said["prompt"] for said in replies] == [said["prompt"] for said in gone_on[1:]] and len(gone_on) > 4
        if name != "depth":  # whose head begins with zeros, so that all tokens are alike
            assert len({said["text"] for said in gone_on + replies}) > 4
        rounded = spoken.Speaker(tokenizer, model.spec, core.world, "bf16", chat=False)(model)
        assert [said["prompt"] for said in rounded] == [said["prompt"] for said in gone_on]
        assert one[f"{name} ddp"] == expected
        assert one[f"{name} fsdp"] == expected
    with pytest.raises(ValueError, match=r"no answer of .* has room in a context of 1 tokens: set base\.core_every=0"):
        tiny = replace(model.spec, sequence_len=1)
        CoreOnTheWay(str(tmp_path / "bundle"), 12, tokenizer, tiny, World(0, 1, torch.device("cpu"), 1), "fp32")
