"""Named runs: the sizes they say, on the machine they name, with what their sources got wrong put right."""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.hardware import parse, parse_gpus
from cluster.storage import Storage
from corpus.rows import Rows, RowWriter
from corpus.synthetic import documents
from corpus.tokenizers import Tokenizer
from models.build import build
from models.spec import Family, ModelSpec
from pipeline import config as configuration
from pipeline import run
from pipeline.cli import main
from pipeline.config import ConfigError, load_config, preset_about, preset_names
from pipeline.plan import plan
from pipeline.scaling import grad_accum_steps, rows_per_rank
from stages.context import StageContext
from stages.train import schedule_of
from stages.training.loop import train
from stages.training.metrics import Reporter
from stages.training.parallel import World
from stages.training.state import Checkpoints

# parameters, tokens a step, accumulation steps on the machine it is for
PRESETS = {
    "d20": (560_988_160, 524_288, 1),
    "d26": (1_081_999_360, 524_288, 2),
    "d32": (1_879_048_192, 524_288, 4),
    "3b": (3_015_835_648, 786_432, 1),
    "7b": (7_347_372_032, 393_216, 1),
    "a100-40-conservative": (185_597_952, 131_072, 32),
    "a100-40-balanced": (252_313_600, 258_048, 42),
    "a100-80-aggressive": (335_544_320, 524_288, 32),
    "a100-80-maximum": (437_649_408, 524_288, 32),
    "char-d64": (12_885_164_032, 524_288, 8),
    "char-d24": (679_575_552, 524_288, 16),
    "5m": (5_242_880, 32_768, 2),
    "1m": (917_504, 16_384, 1),
    "gpt2-1.3b": (1_267_322_112, 1_048_576, 16),
    "llama2-1.3b": (1_294_159_104, 1_048_576, 16),
    "llama2-1.36b": (1_364_297_728, 1_048_576, 16),
    "llama3-1.5b-optimal": (1_544_628_224, 2_097_152, 16),
    "llama3-2.2b-chinchilla": (2_224_154_624, 2_097_152, 16),
    "qwen3-1.8b-optimal": (1_829_195_776, 2_097_152, 16),
    "demo": (3_670_016, 8_192, 1),
    "smoke": (524_288, 2_048, 1),
}
SLIMPAJAMA = [name for name in PRESETS if name.startswith(("gpt2", "llama", "qwen3"))]
each_preset = pytest.mark.parametrize("name", PRESETS)


def corrections(name: str) -> str:
    return " ".join(preset_about(name).corrections)


def depth_parameters(depth: int) -> int:
    return ModelSpec.from_dial("depth", depth, 65_536, 2_048).parameters


def test_every_preset_is_known_here() -> None:
    assert preset_names() == sorted(PRESETS)


@each_preset
def test_a_preset_has_its_size_and_its_steps_divide(name: str) -> None:
    parameters, total_batch_size, accumulation = PRESETS[name]
    config = load_config(name)
    spec, base, (workers, most) = config.model.spec(), config.base, config.workers
    assert spec.parameters == parameters and base.total_batch_size == total_batch_size and workers == most
    steps = grad_accum_steps(total_batch_size, spec.sequence_len, base.device_batch_size, workers)
    assert steps == accumulation
    with torch.device("meta"):
        model = build(spec)
    padding = (1 if spec.tied else 2) * (spec.padded_vocab - spec.vocab_size) * spec.width
    assert sum(p.numel() for p in model.parameters()) == parameters + padding


@each_preset
def test_a_preset_says_what_it_is_for_and_where_it_comes_from(name: str) -> None:
    about, config = preset_about(name), load_config(name)
    assert about.purpose.endswith(".") and about.source
    gpus = parse_gpus(about.gpus)
    assert gpus.count == config.workers[0]
    assert (gpus.hardware is None) == (about.gpus == "cpu")
    assert config.name == name, "a run is named after its preset"


@pytest.mark.parametrize("name", [name for name in PRESETS if preset_about(name).gpus != "cpu"])
def test_a_preset_fits_its_machine_as_it_is_run(name: str) -> None:
    config, about = load_config(name), preset_about(name)
    as_it_is = ("device_batch_size", "parallel", "checkpointing")
    numbers = plan(config, parse_gpus(about.gpus), about.usd_per_gpu_hour, fixed=as_it_is)
    assert numbers["fits"] and numbers["hours"]["total"] > 1 and numbers["cost_usd"] > 10
    assert set(about.corrections) <= set(numbers["warnings"])


def test_every_preset_dry_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in PRESETS:
        own = "://" not in (corpus := load_config(name).data.corpus) and "/" in corpus  # which only its user has
        corpus_flag = ["--corpus", "synthetic"] if own else []
        assert run.main(["--preset", name, "--dry-run", "--storage", str(tmp_path / "runs"), *corpus_flag]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["base", "fresh", "run"] in rows, name
    assert not (tmp_path / "runs").exists()


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    listed = {preset["name"]: preset for preset in json.loads(capsys.readouterr().out)}
    assert {name: preset["parameters"] for name, preset in listed.items()} == {
        name: parameters for name, (parameters, _, _) in PRESETS.items()
    }
    assert listed["d20"]["gpus"] == "8xH100" and listed["d20"]["tokens"] == 21_400 * 524_288
    assert listed["char-d64"]["hours"] == pytest.approx(31, rel=0.01)
    assert listed["char-d64"]["cost_usd"] == pytest.approx(992, rel=0.01) and listed["3b"]["corrections"]
    assert main(["presets"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == list(listed), "in the same order, the smallest first"
    assert main(["presets", "7b"]) == 0
    assert "327680" in capsys.readouterr().out
    assert main(["presets", "8b"]) == 1
    assert "unknown preset '8b'" in capsys.readouterr().err


def test_the_wrong_claims_are_put_right() -> None:
    for name, said in {
        "char-d64": ("12.9 B parameters", "not 4.3 B", "only when sharded", "65,536 tokens a micro-step", "8 accum"),
        "3b": ('"18-22 hours"', "840 k tokens/s", "nine times", "90% of the dense bf16 peak of eight B200s"),
        "a100-40-balanced": ("262,144", "no multiple of 4 x 1,536", "258,048", "264,192"),
        "5m": ("26.5 M and 133 M", "6 M", "70 M"),
        "1m": ("26.5 M and 133 M", "6 M", "70 M"),
        "gpt2-1.3b": ("1.36 B", "1.267 B"),
        "llama2-1.3b": ("1.36 B", "1.294 B"),
    }.items():
        assert all(part in corrections(name) for part in said), name


def test_the_right_claims_are_right() -> None:
    """Every figure of a correction that arithmetic can give."""
    d64, big, bigger = (load_config(name) for name in ("char-d64", "3b", "7b"))
    pcie, b200, h100 = (parse(name).bf16_flops for name in ("H100-PCIe", "B200", "H100"))
    assert d64.base.parallel == "fsdp"
    whole = load_config("char-d64", {"base": {"parallel": "zero1"}})
    assert not plan(whole, parse_gpus("8xH100-PCIe"), fixed=("parallel", "checkpointing", "device_batch_size"))["fits"]
    an_hour = 730 * 524_288 / 3_600 * d64.model.spec().flops_per_token
    assert f"{an_hour / (8 * pcie):.0%} of the dense bf16 peak" in corrections("char-d64")
    assert f"{depth_parameters(3) / 1e6:.1f} M and {depth_parameters(10) / 1e6:.0f} M" in corrections("1m")
    with pytest.raises(ConfigError, match="262144 does not divide into rows of 1536"):
        load_config("a100-40-balanced", {"base": {"total_batch_size": 262_144}})
    assert load_config("a100-40-balanced", {"base": {"total_batch_size": 264_192}}).base.device_batch_size == 4
    tokens = 20 * big.model.spec().parameters
    assert tokens / (20 * 3_600) == pytest.approx(840e3, rel=0.01)
    assert tokens / (20 * 3_600) * big.model.spec().flops_per_token / (8 * b200) == pytest.approx(0.9, abs=0.01)
    for config, total, hours in ((big, "1.17e21", 82), (bigger, "6.9e21", 485)):
        spec, said = config.model.spec(), corrections(str(config.preset))
        flops = 20 * spec.parameters * spec.flops_per_token
        assert f"costs {spec.flops_per_token / 1e9:.1f} GFLOPs" in said
        assert float(total) == pytest.approx(flops, rel=0.01) and total in said
        assert flops / (8 * h100 / 2) / 3_600 == pytest.approx(hours, abs=1) and f"{hours} hours" in said
        rows = spec.sequence_len * config.base.device_batch_size * spec.layers
        activations = spec.activation_bytes("none", compiled=True) * rows
        assert f"{activations / 1e9:.0f} GB of activations" in said and config.base.checkpointing == "full"


@pytest.mark.parametrize(("batch", "total"), [(20, 327_680), (16, 262_144)])
def test_the_fall_backs_of_7b_need_no_accumulation(batch: int, total: int) -> None:
    config = load_config("7b", {"base": {"device_batch_size": batch, "total_batch_size": total}})
    assert rows_per_rank(total, 2_048, 8) == config.base.device_batch_size
    assert any(str(batch) in note and str(total) in note for note in preset_about("7b").notes)


def test_7b_has_two_ways_to_see_every_row_once() -> None:
    def passes(flags: dict[str, dict[str, object]]) -> float:
        base = load_config("7b", flags).base
        assert base.steps is not None and base.total_batch_size is not None
        return base.steps * base.total_batch_size * 4.8 / 250e6 / 1_822

    assert passes({}) == pytest.approx(1.55, abs=0.005)
    assert passes({"base": {"target_ratio": 13}}) == pytest.approx(1, abs=0.01)
    assert passes({"base": {"target_ratio": 12.9}}) < 1
    assert passes({"model": {"depth": 50}}) == pytest.approx(1.38, abs=0.005)
    assert 0.9 < passes({"model": {"depth": 50}, "base": {"target_ratio": 13.8}}) < 1


@pytest.mark.parametrize("name", SLIMPAJAMA)
def test_all_on_slimpajama_share_one_recipe(name: str) -> None:
    config, base = load_config(name), load_config(name).base
    assert config.data.corpus == "slimpajama-627b" and len(preset_about(name).tiers) == 3
    assert (base.optimizer, base.schedule, base.warmup_steps) == ("adamw", "cosine", 2_000)
    assert (base.adamw_lr, base.adamw_lr * base.final_lr_ratio) == (3e-4, pytest.approx(3e-5))
    assert (base.beta1, base.beta2, base.weight_decay, base.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    for tier in preset_about(name).tiers:
        sets = re.findall(r"--set (\S+=\w+)", tier)
        load_config(name, {}, sets)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("llama3-1.5b-optimal", "2.335"), ("llama3-2.2b-chinchilla", "2.351"), ("qwen3-1.8b-optimal", "2.340")],
)
def test_shapes_and_tokens_give_the_losses_of_their_source(name: str, loss: str) -> None:
    config = load_config(name)
    assert config.base.steps is not None and config.base.total_batch_size is not None
    n, d = config.model.spec().parameters, config.base.steps * config.base.total_batch_size
    assert f"{1.69 + 406.4 / n**0.34 + 410.7 / d**0.28:.3f}" == loss and loss in preset_about(name).purpose


@pytest.mark.parametrize("name", ["char-d64", "char-d24"])
def test_characters_are_32_tokens_and_training_stops_in_time(name: str) -> None:
    config = load_config(name)
    assert config.tokenizer.source == "chars" and config.model.vocab_size == 32
    assert Tokenizer.open("chars", config.tokenizer.alphabet or "").vocab_size == 32
    base = config.base
    assert base.save_minutes == 60 and base.early_stopping and base.keep_best
    assert (base.hours, base.budget_usd) == ((31, None) if name == "char-d64" else (None, 100))


def test_a_named_tokenizer_takes_the_place_of_the_presets_vocabulary() -> None:
    assert load_config("gpt2-1.3b", {"tokenizer": {"source": "gpt2"}}).model.vocab_size == 50_257 + 9
    assert load_config("gpt2-1.3b", {"tokenizer": {"source": "bpe"}}).model.vocab_size == 50_304
    with pytest.raises(ConfigError, match="leave it out"):
        load_config("gpt2-1.3b", {"tokenizer": {"source": "gpt2"}, "model": {"vocab_size": 50_304}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[about]\npurpos = "x"\n', r"preset {}: about\.purpos = 'x'"),
        (b"[about\n", "preset {} is not valid TOML"),
        (b'name = "caf\xe9"\n', "preset {} is not UTF-8: .*save it as UTF-8"),
        ("# a comment\n".encode("utf-16"), "preset {} is not UTF-8"),
        (b"seed = " + b"9" * 5_000, "preset {} is not valid TOML"),
        (b"seed = " + b"[" * 50_000, "preset {} is not valid TOML"),
        (b"[base]\nmatrx_lr = 1\n", r"unknown key 'base\.matrx_lr'; did you mean base\.matrix_lr"),
        (b'[data]\ncorpus = ""\n', r"data\.corpus = '' is empty"),
        (b'[data]\nsft = {nosuch = "none"}\n', "sft has no such part"),
    ],
)
@pytest.mark.parametrize("by_path", [False, True])
def test_a_preset_that_is_wrong_says_where(
    text: bytes, message: str, by_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_path:
        monkeypatch.setattr(configuration, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_bytes(text)
    name = str(tmp_path / "mine.toml") if by_path else "mine"
    with pytest.raises(ConfigError, match=message.replace("{}", name)):
        load_config(name)


@pytest.mark.parametrize("name", ["./mine.toml", "mine.toml", "{}/mine.toml", "~/mine.toml"])
def test_a_file_of_ones_own_is_a_preset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command, with what ours have, or without saying anything of itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file, name = tmp_path / "mine.toml", name.format(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf[model]\r\ndepth = 3\r\n[base]\r\nparallel = 'fsdp'\r\n")  # as Windows may write it
    config = load_config(name, {"seed": 4})
    assert (config.name, config.preset) == ("mine", str(file))
    assert (config.model.depth, config.base.parallel, config.seed) == (3, "fsdp", 4)
    assert load_config(config.preset) == load_config(name), "wherever it is read again"
    assert preset_about(name).gpus == "" and load_config(name, {"name": "other"}).name == "other"
    assert main(["run", "--preset", name, "--dry-run"]) == 0
    assert "run mine in " in capsys.readouterr().out
    assert main(["plan", "--preset", name, "--gpus", "8xH100"]) == 0
    assert "fsdp" in capsys.readouterr().out, "the preset's choice is kept"
    assert main(["presets", name]) == 0
    assert name in capsys.readouterr().out
    file.write_text((configuration.PRESETS / "7b.toml").read_text())
    assert load_config(name).model_copy(update={"name": "7b", "preset": "7b"}) == load_config("7b")
    assert preset_about(name) == preset_about("7b")


@pytest.mark.parametrize("name", ["./mine.toml", "mine.toml", "./demo", "folder/", "/dev/zero"])
def test_a_preset_that_is_no_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"preset {name}: there is no such file"):
        load_config(name)
    with pytest.raises(ConfigError, match=r"unknown preset 'mine'; there are: .*, such as \./mine\.toml"):
        load_config("mine")


@pytest.fixture(scope="module")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows as smoke has them: the synthetic corpus in 512 tokens."""
    config = load_config("smoke")
    texts = list(islice(documents(0, 300, 0), 300))
    tokenizer = Tokenizer.train(texts, config.model.vocab_size)
    ids = np.concatenate([tokenizer.encode_array(text) for text in texts])
    row_len = config.model.sequence_len + 1
    directory = tmp_path_factory.mktemp("rows")
    writer = RowWriter(directory, row_len, config.model.vocab_size, False)
    for start in range(0, len(ids) - row_len, row_len):
        writer.add(ids[start : start + row_len], None)
    writer.close()
    return Rows(directory)


@pytest.mark.parametrize("family", ["depth", "gpt2", "llama", "qwen3"])
def test_smoke_trains_ten_steps_of_every_family(family: Family, text_rows: Rows, tmp_path: Path) -> None:
    config = load_config("smoke", {"model": {"family": family}})
    world = World(0, 1, torch.device("cpu"), threads=1)
    model = build(config.model.spec())
    model.init_weights(config.seed)
    context = StageContext("smoke", "base", Storage(tmp_path / "run"), upstream={}, identity={}, upstream_digests={})
    schedule = schedule_of(config.base, text_rows, world)
    reporter = Reporter(context.storage, schedule.steps)
    checkpoints = Checkpoints(context, world, tmp_path / "scratch", reporter, config.base.keep_last)
    train(model, text_rows, config.base, schedule, 0, world, checkpoints, reporter, lambda _: {"val_bpb": math.nan})
    reporter.close()
    losses = [record["loss"] for record in reporter.records if "loss" in record]
    assert len(losses) == 10 and losses[-1] < losses[0] < 1.1 * math.log(512)
