"""The configuration: one dial, exact arithmetic, and mistakes that name what would be right."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster import manifest as manifests
from cluster.manifest import Manifest
from corpus.tokenizers import Tokenizer, lacking
from pipeline import cli, plan, run
from pipeline import config as configuration
from pipeline.artifacts import RunStore
from pipeline.config import (
    PRESETS,
    Config,
    ConfigError,
    add_config_flags,
    as_found,
    check_mixtures,
    config_from_args,
    dotted_keys,
    identity_of,
    load_config,
    measures_text,
    select,
    stage_names,
)
from pipeline.dag import StageError
from pipeline.scaling import grad_accum_steps
from pipeline.status import run_states
from stages import tokenizer as tokenizer_stage
from stages.context import StageContext
from stages.conversations import check_unchanged


def parsed(*argv: str) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from_args(parser.parse_args(argv))


def test_depth_20_is_the_published_size() -> None:
    config = parsed("--depth", "20")
    assert config.name == "d20" and not config.with_rl
    assert config.model.spec().parameters == 560_988_160
    assert config.base.steps == 21_400 and config.base.total_batch_size == 524_288
    assert plan.plan(config)["tokens"] == 21_400 * 524_288
    assert plan.plan(config)["shards"] == 216  # of 1,822, at 4.8 characters a token
    assert config.data.shards == 238, "and a tenth more, as some are duplicates or held out"


@pytest.mark.parametrize("depth", range(1, 65))
def test_every_depth_builds(depth: int) -> None:
    config = load_config(flags={"model": {"depth": depth}})
    assert config.model.spec().head_dim % 8 == 0 and config.base.steps


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.toml")))
@pytest.mark.parametrize("workers", [1, 2])
def test_presets_load(preset: str, workers: int) -> None:
    config = load_config(preset, {"workers": workers})
    assert config.preset == config.name == preset
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_order_is_derived_then_preset_then_command_line() -> None:
    preset = load_config("demo")
    assert preset.with_rl and preset.base.total_batch_size == 8192
    changed = parsed("--preset", "demo", "--no-with-rl", "--name", "x", "--set", "base.total_batch_size=4096")
    assert not changed.with_rl and changed.name == "x" and changed.base.total_batch_size == 4096
    assert changed.base.steps == preset.base.steps
    assert parsed("--depth", "1", "--set", "data.corpus=/a b/*.parquet").data.corpus == "/a b/*.parquet"
    assert parsed("--set", "rl.require_signal=false").rl.require_signal is False


@pytest.mark.parametrize(
    "key", ["name", "storage", "data.corpus", "data.text_column", "data.chat", "data.gsm8k", "data.sft.mine.source",
            "data.sft.smoltalk.split", "tokenizer.source", "rl.environment"]
)  # fmt: skip
def test_what_is_empty_is_not_the_current_folder(key: str) -> None:
    """But a shell variable that is not set; as a flag, within --set and in a preset."""
    *sections, field = key.split(".")
    tree: Any = ""
    for name in [field, *reversed(sections)]:
        tree = {name: tree}
    for flags, sets in (({}, [f"{key}="]), ({}, [f'{key}=""']), (tree, [])):
        with pytest.raises(ConfigError, match=r"^[^\n]+$") as refused:
            load_config(None, flags, sets)
        assert key in str(refused.value)
        assert "is a shell variable unset" in str(refused.value) or key == "rl.environment"


@pytest.mark.parametrize("text", ["2024", "1e5", "true", "1979-05-27", "[1]", "{a = 1}", "007", "x = 1", "3\nx=4"])
def test_what_looks_like_a_number_is_text_where_a_setting_is_text(text: str) -> None:
    sets = [f"{key}={text}" for key in ("name", "data.text_column", "data.sft.mine.source")]
    config = load_config(None, {}, sets)
    assert config.name == config.data.text_column == text
    assert config.data.sft["mine"].source == str(Path(text).absolute())


@pytest.mark.parametrize("alphabet", [" 01", "01 ", "\n01\t", "0#1", "'01", "0 1"])
def test_the_white_space_of_text_is_kept(alphabet: str) -> None:
    def given(text: str) -> str:
        return parsed("--set", "tokenizer.source=chars", "--set", f"tokenizer.alphabet={text}").tokenizer.alphabet

    assert given(json.dumps(alphabet)) == alphabet, "as TOML writes it"
    assert given(alphabet) == alphabet
    assert parsed("--set", " base.schedule = cosine ", "--set", "seed= 3 ").base.schedule == "cosine"


@example("0", {"\ud800", "1"})
@given(st.text(min_size=1).map(lambda text: "".join(dict.fromkeys(text))), st.sets(st.characters(), min_size=1))
def test_the_alphabet_that_is_advised_is_read_as_it_is_meant(alphabet: str, lacks: set[str]) -> None:
    """Pasted into a shell, quotes, line breaks and all that is not printed included."""
    found = dict.fromkeys(lacks - set(alphabet), "chats.jsonl")
    *_, flag, setting = shlex.split(lacking(alphabet, found))
    read = parsed("--set", "tokenizer.source=chars", flag, setting).tokenizer.alphabet
    written = [c for c in sorted(found) if not "\ud800" <= c <= "\udfff"]  # half a surrogate pair cannot be
    assert read == alphabet + "".join(written)


def test_a_part_goes_where_one_is_there_whoever_named_it(tmp_path: Path) -> None:
    assert list(parsed("--set", "data.sft.x.source=a.jsonl", "--set", "data.sft.x=none").data.sft) == list(
        parsed().data.sft
    )
    (tmp_path / "mine.toml").write_text('[data.sft.own]\nsource = "a.jsonl"\n')
    assert "own" in parsed("--preset", str(tmp_path / "mine.toml")).data.sft
    assert "own" not in parsed("--preset", str(tmp_path / "mine.toml"), "--set", "data.sft.own=none").data.sft
    assert "gsm8k" not in parsed("--gsm8k", "none", "--set", "data.sft.gsm8k=none").data.sft
    (tmp_path / "less.toml").write_text('[data.mid]\nmmlu = "none"\n')
    assert list(parsed("--preset", str(tmp_path / "less.toml")).data.mid) == ["smoltalk", "gsm8k"]
    assert list(parsed("--preset", str(tmp_path / "less.toml"), "--chat", "a.jsonl").data.mid) == ["chat", "gsm8k"]


ODD = st.sampled_from(
    ["none", "-1", "2024", "true", "nan", "1e400", "[1]", "{}", "{a=1}", "07:32:00", " ", "3\nx=4", "9" * 5_000,
     "[" * 5_000, "\ud800", "'a'", "~", "hub:", "s3://a b", "/dev/null", "1e-320"]
)  # fmt: skip
ODD_KEYS = [
    "",
    "data",
    "evaluate",
    "tracking",
    "data.sft",
    "data.sft.x",
    "data.sft.x.source.y",
    "data.sft.arc_easy.split",
    "base",
    "name.x",
]


@settings(max_examples=300)
@given(st.sampled_from([*dotted_keys(), *ODD_KEYS]), ODD | st.text(st.characters(codec="utf-8"), max_size=8))
@example("data.sft.x.source.y", "none")
@example("seed", "9" * 5_000)
@example("data.sft", "none")
def test_any_setting_is_taken_or_refused(key: str, value: str) -> None:
    """With a message of the configuration's own, or the system's of a file that it cannot open."""
    with contextlib.suppress(ConfigError, OSError):
        load_config(None, {}, [f"{key}={value}"])


def test_some_test_names_every_setting() -> None:
    """So that none is there which nobody has tried."""
    texts = [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert not [key for key in dotted_keys() if key.rsplit(".", 1)[-1] not in words]


def test_every_command_looks_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """./runs, or where Ray would delete that with the job, ~/runs."""
    examined: list[str] = []
    monkeypatch.setattr("pipeline.doctor.examine", lambda storage: examined.append(storage) or iter(()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder, place in (("job/_ray_pkg_1", tmp_path / "home/runs"), ("mine", tmp_path / "mine/runs")):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        assert parsed().storage == str(place)
        for command in (["status"], ["tokenizer"], ["data", "verify"], ["data", "inspect"]):
            assert cli.main([*command, "nobody"]) == 1
            assert f"{place}/nobody does not exist" in capsys.readouterr().err
        assert cli.main(["doctor"]) == 0 and str(Path(examined[-1]).absolute()) == str(place)


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'base\.matrx_lr'; did you mean base\.matrix_lr, \S+, \S+\?$"):
        parsed("--set", "base.matrx_lr=0.1")
    with pytest.raises(ConfigError, match=r"'bass\.steps'.*base\.steps"):
        parsed("--set", "bass.steps=3")
    with pytest.raises(ConfigError, match=r"'seeds'.*seed"):
        parsed("--set", "seeds=3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--preset", "dmeo"), "unknown preset 'dmeo'; there are: .*demo"),
        (("--depth", "99"), r"model\.depth = 99: Input should be less than or equal to 64"),
        (("--set", "base.steps=many"), r"base\.steps = 'many': Input should be a valid integer"),
        (
            ("--set", "rl.advantage=best"),
            r"rl\.advantage = 'best': Input should be 'mean', 'grpo', 'dr_grpo' or 'rloo'",
        ),
        (("--set", "base=3"), r"base = 3: Input should be a valid dictionary"),
        (("--set", "base.steps"), "must be KEY=VALUE"),
        *[
            (("--workers", wrong), rf"workers = '{wrong}': must be a number from 1, or MIN:MAX .* such as 1:8$")
            for wrong in ("-1", "1.5", "two", "3:2", "1:2:3", "9" * 5_000)
        ],
        *[(("--set", f"workers={wrong}"), "must be a number from 1") for wrong in ("-1", "true", "[1, 2, 3]", "[]")],
        *[
            (("--set", f"{key}=true"), rf"{key} = True: (must be a number|Input should be a valid (integer|number))$")
            for key in (
                "seed",
                "base.steps",
                "rl.lr_scale",
                "base.save_minutes",
                "data.sft.gsm8k.rows",
                "data.mid.gsm8k.repeats",
                "data.mid.gsm8k.weight",
            )
        ],
        (("--set", "data.sft.nosuch=none"), r"data\.sft\.nosuch=none: .*its parts are: arc_easy, arc_challenge, gsm8k"),
        (("--chat", "none", "--gsm8k", "none", "--set", "data.mid.nosuch=none"), "nosuch=none: .*are: none$"),
        (("--set", "data.sft=none"), r"data\.sft = 'none': Input should be a valid dictionary"),
        (("--set", "preset=demo"), "unknown key 'preset'"),
        (("--workers", "3"), r"base\.total_batch_size = 524288 .* 2048 tokens .* 3 worker.*: 522240 or 528384"),
        (("--set", "mid.total_batch_size=100"), r"mid\.total_batch_size = 100 .*: 2048$"),
        (("--set", "sft.device_batch_size=6"), r"sft\.device_batch_size = 6 .* 16 rows.*: 1, 2, 4, 8, 16$"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*argv)


def test_grad_accum_steps_covers_the_batch() -> None:
    assert grad_accum_steps(524_288, 2_048, 32, 1) == 8
    assert grad_accum_steps(524_288, 2_048, 32, 8) == 1


def test_identity_leaves_out_how_a_run_is_run() -> None:
    one = load_config("demo")
    environment = {"workers": 2, "name": "b", "storage": "/x", "rl": {"actors": 2}, "base": {"device_batch_size": 4}}
    two = load_config("demo", environment)
    seeded = load_config("demo", {"seed": 1})
    for stage in stage_names(one):
        assert identity_of(stage, one) == identity_of(stage, two)
        assert (identity_of(stage, one) != identity_of(stage, seeded)) == (stage != "evaluate_base")
    assert identity_of("base", one) != identity_of("base", load_config("demo", {"base": {"matrix_lr": 0.5}}))
    assert identity_of("sft", one) == identity_of("sft", load_config("demo", {"base": {"matrix_lr": 0.5}}))
    assert "environment" not in dotted_keys()


def test_a_run_has_the_stages_it_needs() -> None:
    config = load_config("demo", {"with_rl": True})
    pretraining = ["tokenizer", "ingest", "base", "evaluate_base"]
    evaluated = [name for stage in ("mid", "sft", "rl") for name in (stage, f"evaluate_{stage}")]
    assert stage_names(config) == [*pretraining, "conversations", *evaluated]
    assert stage_names(load_config("demo", {"with_rl": False})) == [*pretraining, "conversations", *evaluated[:-2]]
    unasked = load_config("demo", {"with_rl": False, "data": {"gsm8k": "none", "chat": "chats.jsonl"}})
    assert stage_names(unasked) == [*pretraining, "conversations", *evaluated[:-2]]
    assert all(measures_text(stage, unasked) for stage in ("evaluate_base", "evaluate_mid", "evaluate_sft"))
    assert [stage for stage in stage_names(config) if measures_text(stage, config)] == ["evaluate_base"]
    alone = load_config("demo", {"with_rl": False, "data": {"gsm8k": "none", "chat": "none"}})
    assert stage_names(alone) == pretraining
    with pytest.raises(ConfigError, match=r"--until mid: this run has no such stage; .*need --chat or --gsm8k"):
        select(stage_names(alone), None, None, "mid", ())
    with pytest.raises(ConfigError, match="--with-rl goes on from SFT, which has no conversations"):
        load_config("demo", {"with_rl": True, "data": {"gsm8k": "none", "chat": "none"}})
    only_sft = load_config(None, {"data": {"gsm8k": "none", "chat": "none"}}, ["data.sft.own.source=a.jsonl"])
    check_mixtures(only_sft, select(stage_names(only_sft), None, None, "evaluate_base", ()))
    with pytest.raises(ConfigError, match=r"mid has no conversations: give --chat.*--until evaluate_base"):
        check_mixtures(only_sft, stage_names(only_sft))
    with pytest.raises(ConfigError, match="--with-rl needs problems to train on"):
        load_config("demo", {"with_rl": True, "data": {"gsm8k": "none", "chat": "chats.jsonl"}})


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pipeline.plan; print({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_plan_prints_and_reports_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--depth", "20"]) == 0
    assert "560,988,160" in capsys.readouterr().out
    assert plan.main(["--set", "base.stepz=1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: unknown key 'base.stepz'")


def test_workers_are_a_number_or_a_range() -> None:
    assert parsed("--workers", "2").workers == (2, 2)
    assert parsed("--workers", "1:8").workers == (1, 8)
    for wrong in ("0", "3:2", "two", "1:2:3", "-1"):
        with pytest.raises(ConfigError, match="workers = "):
            parsed(f"--workers={wrong}")
    with pytest.raises(ConfigError, match=r"sft\.total_batch_size is 16 rows, too few for --workers 1:32"):
        parsed("--workers", "1:32")
    assert parsed("--workers", "1:3").base.device_batch_size == 32, (
        "rows need not divide among workers that come and go"
    )


def test_how_long_base_trains_is_said_once() -> None:
    assert parsed("--depth", "4", "--set", "base.tokens=1048576").base.steps == 2
    assert plan.plan(parsed("--hours", "3"))["hours"]["base"] == 3
    by_time = parsed("--preset", "demo", "--hours", "3").base
    assert (by_time.hours, by_time.steps) == (3, None), "the command line's budget replaces the preset's"
    by_money = parsed("--budget-usd", "96", "--usd-per-worker-hour", "4", "--workers", "8")
    assert by_money.base.steps is None and plan.plan(by_money)["hours"]["base"] == 3
    for argv, message in (
        (("--budget-usd", "9", "--usd-per-worker-hour", "4", "--workers", "1:2"), "fixed number of --workers"),
        (("--hours", "3", "--set", "base.steps=5"), "give one of steps and hours"),
        (("--budget-usd", "96"), "needs usd_per_worker_hour"),
        (("--set", "base.keep_best=true", "--set", "base.eval_every=0"), "set eval_every"),
        (("--set", "rl.keep_best=true"), "set eval_every"),
    ):
        with pytest.raises(ConfigError, match=message):
            parsed(*argv)


def test_a_family_has_its_own_rule_and_single_parts_of_it_may_be_set() -> None:
    llama = parsed("--family", "llama", "--depth", "12").model.spec()
    assert (llama.family, llama.layers, llama.width, llama.ffn_width, llama.softcap) == ("llama", 12, 768, 2048, 0.0)
    assert parsed("--family", "llama").base.schedule == "cosine" and parsed("--depth", "4").base.schedule == "wsd"
    sets = ["layers=18", "width=2048", "heads=16", "kv_heads=8", "ffn_width=7168", "vocab_size=128256", "rope_base=5e5"]
    flags = [part for text in sets for part in ("--set", f"model.{text}")]
    assert parsed("--family", "llama", *flags).model.spec().parameters == 1_544_628_224
    wide = parsed("--depth", "4", "--set", "model.width=2048").model.spec()
    assert (wide.layers, wide.heads, wide.ffn_width) == (4, 16, 8192), "heads and MLP follow a width that is given"
    with pytest.raises(ConfigError, match="width 104 is not a multiple of heads"):
        parsed("--family", "llama", "--set", "model.width=104", "--set", "model.heads=3")
    with pytest.raises(ConfigError, match="only gpt2 has biases"):
        parsed("--family", "qwen3", "--set", "model.biases=true")


def test_a_tokenizer_that_is_there_settles_the_vocabulary(tmp_path: Path) -> None:
    assert load_config(None, {"tokenizer": {"source": "chars", "alphabet": "ab"}}).model.vocab_size == 32
    assert load_config(None, {"tokenizer": {"source": "gpt2"}}).model.vocab_size == 50_257 + 9
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size = 512: the tokenizer gpt2 has 50266 tokens; leave it out"
    ):
        load_config(None, {"tokenizer": {"source": "gpt2"}}, ["model.vocab_size=512"])
    with pytest.raises(ConfigError, match="neither one of"):
        load_config(None, {"tokenizer": {"source": str(tmp_path / "none")}})


def test_mixtures_are_nanochats_or_what_is_named_with_parts_on_top() -> None:
    seeds = load_config().data
    assert list(seeds.mid) == ["smoltalk", "mmlu", "gsm8k"] and seeds.mid["smoltalk"].rows == 460_000
    assert list(seeds.sft) == ["arc_easy", "arc_challenge", "gsm8k", "smoltalk"]
    own = load_config(None, {"data": {"chat": "mine.jsonl", "gsm8k": "problems"}}).data
    assert {name: part.source for name, part in own.mid.items()} == {
        "chat": str(Path("mine.jsonl").absolute()),
        "gsm8k": str(Path("problems").absolute()),
    }
    sets = ["data.mid.identity.source=me.jsonl", "data.mid.identity.repeats=2", "data.mid.mmlu=none"]
    changed = load_config(None, {"data": {"gsm8k": "none"}}, sets).data
    assert list(changed.mid) == ["smoltalk", "identity"] and changed.mid["identity"].repeats == 2
    assert list(changed.sft) == ["arc_easy", "arc_challenge", "smoltalk"]
    with pytest.raises(
        ConfigError, match=r"unknown key 'data\.mid\.smoltalk\.row'; did you mean data\.mid\.smoltalk\.rows"
    ):
        load_config(None, {}, ["data.mid.smoltalk.row=3"])
    with pytest.raises(ConfigError, match=r"data\.mid\.mine\.source"):
        load_config(None, {}, ["data.mid.mine.rows=3"])


# --- files that are given ---------------------------------------------------------------------------------------------


def tokenizer_json(folder: Path, letters: str) -> Path:
    """A tokenizer.json that knows `letters`."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models

    folder.mkdir(exist_ok=True)
    FastTokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [])).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def with_tokenizer(source: Path) -> Config:
    return load_config("demo", {"tokenizer": {"source": str(source)}})


@pytest.mark.parametrize("kind", ["tokenizer.json", "gpt2", "qwen/qwen.tiktoken"])
def test_a_tokenizers_file_is_known_by_what_it_says(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Elsewhere it is the same; edited under the same name it is another."""
    if kind == "tokenizer.json":
        source = tokenizer_json(tmp_path, LETTERS)
    else:
        source = request.getfixturevalue("shared_data") / "tokenizers" / kind
    mine = tmp_path / "mine"
    (shutil.copytree if source.is_dir() else shutil.copy)(source, mine)
    first, moved = with_tokenizer(source), with_tokenizer(mine)
    (mine / "notes.txt").write_text("what does not count") if mine.is_dir() else None
    beside = with_tokenizer(mine)
    with (mine / "vocab.bpe" if mine.is_dir() else mine).open("a") as file:
        file.write("#version: mine\n" if mine.is_dir() else "\n")
    edited = with_tokenizer(mine)
    assert identity_of("tokenizer", first) == identity_of("tokenizer", moved) == identity_of("tokenizer", beside)
    assert identity_of("tokenizer", edited) != identity_of("tokenizer", moved)
    assert edited.tokenizer.source == moved.tokenizer.source
    for stage in stage_names(first):
        assert stage == "tokenizer" or identity_of(stage, edited) == identity_of(stage, first)


def test_nobody_says_by_hand_what_a_file_says() -> None:
    for sets in (["tokenizer.digest=abc"], ["tokenizer.source=chars", "tokenizer.digest=abc"]):
        with pytest.raises(ConfigError, match=r"unknown key 'tokenizer\.digest'"):
            load_config("demo", {}, sets)
    named, trained = load_config("demo", {"tokenizer": {"source": "chars"}}), load_config("demo")
    assert set(identity_of("tokenizer", named)["tokenizer"]) == {"source", "alphabet"}
    assert set(identity_of("tokenizer", trained)["tokenizer"]) == {"source", "alphabet", "max_chars", "doc_chars"}


def stage_of(config: Config, storage: Path) -> StageContext:
    store = RunStore(str(storage), config.name)
    return StageContext(config.name, "tokenizer", store.stage("tokenizer"), {}, identity_of("tokenizer", config), {})


def test_the_stage_takes_the_file_that_the_run_was_started_with_and_no_other(tmp_path: Path) -> None:
    source = tokenizer_json(tmp_path, LETTERS)
    config = with_tokenizer(source)
    sizes = (config.ingest.shard_bytes, config.model.vocab_size, config.seed)
    tokenizer_json(tmp_path, LETTERS[::-1])
    with pytest.raises(ValueError, match=rf"tokenizer {source} is not what it was where the run was started"):
        tokenizer_stage.run(stage_of(config, tmp_path), config.data, config.tokenizer, *sizes)
    assert not (tmp_path / "demo").exists()
    tokenizer_json(tmp_path, LETTERS)
    tokenizer_stage.run(stage_of(config, tmp_path), config.data, config.tokenizer, *sizes)
    assert Tokenizer.load(tmp_path / "demo" / "tokenizer").encode("cab") == [2, 0, 1]


def test_of_a_document_the_tokenizer_sees_so_many_characters(tmp_path: Path) -> None:
    """And of the corpus, until it has enough; what comes after them it has never seen. All of them, where the corpus is
    used up anyway."""
    documents = ["".join(chr(ord("a") + (7 * i + j * j) % 23) for j in range(120)) + " zyx" * 100 for i in range(40)]
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    corpus = lines(tmp_path / "corpus.jsonl", text)

    def trained(doc_chars: int, max_chars: int = 20_000) -> tuple[Tokenizer, dict[str, Any]]:
        data = {"corpus": str(corpus)}
        setting = {"doc_chars": doc_chars, "max_chars": max_chars}
        config = load_config("demo", {"data": data, "tokenizer": setting, "model": {"vocab_size": 300}})
        context = stage_of(config, tmp_path / f"{doc_chars}-{max_chars}")
        tokenizer_stage.run(
            context, config.data, config.tokenizer, config.ingest.shard_bytes, config.model.vocab_size, config.seed
        )
        manifest = manifests.read(context.storage)
        assert manifest is not None
        return Tokenizer.load(manifests.fetch(context.storage)), manifest.metrics

    (short, few), (whole, all_) = trained(100), trained(10_000)
    assert few["documents_read"] == all_["documents_read"] > 20
    assert (
        few["characters_read"] == 100 * few["documents_read"] and all_["characters_read"] == 520 * few["documents_read"]
    )
    assert trained(100, 1_000_000)[1] == all_
    assert len(whole.encode(" zyx")) == 1 < len(short.encode(" zyx"))
    _, less = trained(100, 1_000)
    assert 1_000 <= less["characters_read"] < 1_100


def test_characters_are_those_of_the_corpus_unless_they_are_named(tmp_path: Path) -> None:
    """All of them, those of what is held out too, sorted; so no text of the corpus is refused later."""
    texts = [f"{chr(0x3B1 + i)} is letter {i}\t" for i in range(24)]
    corpus = lines(tmp_path / "corpus.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))

    def made(**tokenizer: Any) -> tuple[Config, Tokenizer]:
        config = load_config(None, {"data": {"corpus": str(corpus)}, "tokenizer": {"source": "chars", **tokenizer}})
        context = stage_of(config, tmp_path / str(tokenizer.get("alphabet")))
        shape = (config.ingest.shard_bytes, config.model.vocab_size, config.seed)
        tokenizer_stage.run(context, config.data, config.tokenizer, *shape)
        return config, Tokenizer.load(manifests.fetch(context.storage))

    config, characters = made()
    alphabet = "".join(sorted({*"".join(texts)}))
    assert characters.decode(range(len(alphabet))) == alphabet
    assert all(characters.decode(characters.encode(text)) == text for text in texts)
    other = lines(tmp_path / "other.jsonl", json.dumps({"text": "other"}))
    elsewhere = load_config(None, {"data": {"corpus": str(other)}, "tokenizer": {"source": "chars"}})
    assert identity_of("tokenizer", elsewhere) != identity_of("tokenizer", config), "it reads the corpus"
    _, named = made(alphabet=alphabet + "!")
    assert named.encode("!") == [len(alphabet)]


def test_status_needs_no_file_that_a_run_was_made_from(tmp_path: Path) -> None:
    source = tokenizer_json(tmp_path / "given", LETTERS)
    store, config = RunStore(str(tmp_path), "demo"), with_tokenizer(source)
    store.record(config)
    manifests.write(store.stage("tokenizer"), Manifest("demo", "tokenizer", [], identity_of("tokenizer", config)))
    source.unlink()
    with opened_files() as opened:
        state = run_states(store)[0]
    assert (state.state, state.drift) == ("done", [])
    assert str(source) not in opened


def lines(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_small_files_of_data_are_known_by_what_they_say(tmp_path: Path) -> None:
    """Elsewhere they are the same; edited under the same name, and only then, other rows are made."""

    def config(folder: Path) -> Config:
        data = {"corpus": str(folder / "corpus.jsonl"), "chat": str(folder / "chat.jsonl"), "gsm8k": str(folder)}
        return load_config("demo", {"data": data}, [f"data.mid.own.source={folder / 'own.jsonl'}"])

    names, folders = (
        ("corpus.jsonl", "chat.jsonl", "own.jsonl", "train.jsonl", "test.jsonl"),
        [tmp_path / name for name in "ab"],
    )
    for folder in folders:
        for name in names:
            lines(folder / name, name)
        lines(folder / "notes.txt", str(folder))
    first, moved = map(config, folders)
    for stage in stage_names(first):
        assert identity_of(stage, moved) == identity_of(stage, first)
    for name in names:
        lines(folders[1] / name, "edited")
        edited = config(folders[1])
        for stage in stage_names(first):
            reading = ("tokenizer", "ingest") if name == "corpus.jsonl" else ("conversations",)
            assert (identity_of(stage, edited) != identity_of(stage, first)) == (stage in reading), name
        lines(folders[1] / name, name)
    for stage in ("ingest", "conversations"):
        assert identity_of(stage, config(folders[1])) == identity_of(stage, first)
    assert Config.model_validate(first.model_dump(mode="json")) == first
    check_unchanged(first.data.sources(), first.data.digests)
    lines(folders[0] / "test.jsonl", "edited after the start")
    with pytest.raises(ValueError, match=rf"^{folders[0]} is not what it was where the run was started"):
        check_unchanged(first.data.sources(), first.data.digests)


def test_files_that_are_gone_are_what_an_earlier_attempt_found(tmp_path: Path) -> None:
    chat, other = lines(tmp_path / "chat.jsonl", "one"), lines(tmp_path / "other.jsonl", "two")
    sets = [f"data.mid.other.source={other}"]
    first = load_config("demo", {"data": {"chat": str(chat)}}, sets)
    chat.unlink()
    again = load_config("demo", {"data": {"chat": str(chat)}}, sets)
    assert identity_of("conversations", again) != identity_of("conversations", first)
    assert identity_of("conversations", as_found(again, lambda: first)) == identity_of("conversations", first)
    assert as_found(again, lambda: None) == again
    lines(chat, "edited"), other.unlink()
    edited = as_found(load_config("demo", {"data": {"chat": str(chat)}}, sets), lambda: first)
    drift = manifests.drift(identity_of("conversations", first), identity_of("conversations", edited))
    assert [line.partition(": ")[0] for line in drift] == ["data.chat", "data.mid.chat.source", "data.sft.chat.source"]


def test_a_run_goes_on_without_the_files_that_it_has_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, store = lines(tmp_path / "chat.jsonl", "one"), RunStore(str(tmp_path), "demo")
    argv = ["--preset", "demo", "--storage", str(tmp_path), "--chat", str(chat)]
    config = parsed(*argv)
    store.record(config)
    tokenizer = Manifest("demo", "tokenizer", [], identity_of("tokenizer", config))
    upstream = {"tokenizer": tokenizer.digest()}
    manifests.write(store.stage("tokenizer"), tokenizer)
    made = Manifest("demo", "conversations", [], identity_of("conversations", config), upstream)
    manifests.write(store.stage("conversations"), made)
    chat.unlink()
    assert run.main([*argv, "--only", "conversations", "--dry-run"]) == 0
    assert ["conversations", "done", "skip"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    lines(chat, "edited")
    with pytest.raises(StageError, match=r"conversations: data\.chat: \w{64} -> \w{64}"):
        run.main([*argv, "--only", "conversations", "--dry-run"])


def test_a_preset_is_known_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, before = (PRESETS / "demo.toml").read_text(), load_config("demo")
    monkeypatch.setattr(configuration, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "demo.toml").write_text(text.replace("[mid]", "[mid]\nmatrix_lr = 0.5"))
    same, edited = load_config("mine"), load_config("demo")
    for stage in stage_names(before):
        assert identity_of(stage, same) == identity_of(stage, before)
        assert (identity_of(stage, edited) != identity_of(stage, before)) == (stage == "mid")
    lines = manifests.drift(identity_of("mid", before), identity_of("mid", edited))
    assert lines == [f"mid.matrix_lr: {before.mid.matrix_lr} -> 0.5"]


# --- configurations from storage --------------------------------------------------------------------------------------

_opened: list[list[str]] = []  # of every `opened_files` that is entered; an audit hook cannot be taken away


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and _opened:
        _opened[-1].append(str(arguments[0]))


sys.addaudithook(_note_open)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files and folders that are opened meanwhile, by any part of this process."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


STORED = load_config("demo", {"with_rl": True}).model_dump(mode="json")
KEYS = [(section,) for section in STORED]
KEYS += [(section, key) for section, tree in STORED.items() if type(tree) is dict for key in tree]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.sampled_from([__file__, "/etc/shadow", "[/b]", "\ud800", "9" * 5_000, "1:8", "a\0b"]),
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def understood(raw: Any) -> None:
    """A configuration from storage is read or refused with ValueError, and what is read can be compared."""
    with opened_files() as opened:
        try:
            config = Config.model_validate(raw)
        except ValueError as error:
            assert str(error)
        else:
            assert all(identity_of(stage, config) is not None for stage in stage_names(config))
    assert not opened


@given(JSON)
def test_any_json_in_place_of_a_configuration_is_refused_without_opening_a_file(raw: Any) -> None:
    understood(raw)


@settings(max_examples=500)
@given(st.sampled_from(KEYS), JSON)
@example(("rl", "environment"), __file__)
@example(("rl", "environment"), {"path": __file__, "text": "\ud800"})
@example(("tokenizer", "source"), __file__)
def test_any_value_in_a_stored_configuration_is_taken_or_refused_without_opening_a_file(
    where: tuple[str, ...], value: Any
) -> None:
    raw = json.loads(json.dumps(STORED))
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    understood(raw)


def test_arrays_and_objects_that_nest_deeply_are_refused() -> None:
    array: Any = []
    tree: Any = {}
    for _ in range(100_000):
        array, tree = [array], {"a": tree}
    for where in [(), *KEYS]:
        for raw in (array, tree):
            for key in reversed(where):
                raw = {key: raw}
            with pytest.raises(ValueError, match="validation error"):
                Config.model_validate(raw)


def test_a_value_that_nests_deeply_on_the_command_line_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"^base\.steps = "):
        parsed("--set", f"base.steps={'[' * 50_000}")


def test_a_preset_of_endless_depth_gets_one_message(tmp_path: Path) -> None:
    preset = tmp_path / "deep.toml"
    for text in (f"[{'.'.join('a' * 20_000)}]\n", "a = " + "[" * 100_000):
        preset.write_text(text)
        with pytest.raises(ConfigError):
            load_config(str(preset))
