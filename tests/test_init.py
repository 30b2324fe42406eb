"""`--init`: a run that begins from a model that exists keeps what the model knows, and its own way to chat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from begun import CHATML, LLAMA3, MODELS, checkpoint
from conftest import flags
from hub import SETTINGS as HUB_SETTINGS
from hub import Hub, served
from runs import ROOT, Run, environment

from corpus.conversation import render, render_prompt
from corpus.left_out import UnusableError
from corpus.own_chat import CALL, RESULT
from corpus.tokenizers import SPECIAL_TOKENS, Tokenizer
from models.hf import from_pretrained, grown, read_spec
from models.spec import ModelSpec
from pipeline import cli
from pipeline.config import ConfigError, load_config
from stages.begin import check_chat, look
from stages.config import InitConfig
from stages.training.state import export

CHAT = [
    {"role": "user", "content": "How many apples are left?\n\n 12 - 5, Grüße "},
    {"role": "assistant", "content": "There are 7."},
    {"role": "user", "content": "And \U0001f600?"},
    {"role": "assistant", "content": "  7\n\nof them "},
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of each model its directory and transformers' own."""
    folder = tmp_path_factory.mktemp("theirs")
    return {name: (folder / name, checkpoint(name, folder / name)) for name in MODELS}


def tokenizer_of(directory: Path, **options: bool) -> Tokenizer:
    return Tokenizer.of_model(directory, read_spec(directory).vocab_size, **options)


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_a_model_that_has_grown_says_of_its_own_tokens_what_it_said(
    name: str, theirs: dict[str, tuple[Path, Any]]
) -> None:
    directory, other = theirs[name]
    assert len([*directory.glob("*.safetensors")]) > 1, "one file would test no shards"
    found = look(InitConfig(source=str(directory)))
    known, tokenizer = read_spec(directory).vocab_size, tokenizer_of(directory)
    assert found.spec.vocab_size == tokenizer.vocab_size >= known
    assert found.chats == (MODELS[name][4] is not None)
    added = [tokenizer.special(n) for n in SPECIAL_TOKENS if n in tokenizer.special_ids]
    model = grown(directory, replace(found.spec, sequence_len=64, positions=found.spec.places), added)
    ids = torch.randint(known - 120, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model.logits(ids), other(ids).logits
    old = [i for i in range(known) if i not in added]
    assert expected.abs().max() > 0.5, "a comparison of nothing"
    torch.testing.assert_close(ours[..., old], expected[..., old], atol=1e-4, rtol=0)
    embedding = model.model.embed_tokens.weight
    torch.testing.assert_close(embedding[added[0]], embedding[old].mean(0))
    assert len(added) == (8 if name == "gpt2" else 4)


@each_model
def test_a_chat_has_the_ids_that_transformers_gives_it(
    name: str, theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """By the files of the model itself, where it has a template; and by those that are handed on."""
    from transformers import AutoTokenizer

    directory, _ = theirs[name]
    tokenizer = tokenizer_of(directory)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    ids, mask = render({"messages": CHAT}, again, 500)
    for place in [tmp_path] + [directory] * (tokenizer.own is not None):
        other = AutoTokenizer.from_pretrained(place)
        whole = other.apply_chat_template(CHAT, return_dict=False)
        asked = other.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False)
        assert ids.tolist() == whole and render_prompt(CHAT[:3], again) == asked
        if tokenizer.own is not None:
            assert other.chat_template == MODELS[name][4]
    said = "".join(again.decode(ids[mask == 1].tolist()))
    ends = {"gpt2": "<|assistant_end|>", "llama": "<|eot_id|>", "qwen3": "<|im_end|>"}[name]
    last = {"gpt2": "  7\n\nof them ", "llama": "7\n\nof them", "qwen3": "<think>\n\n</think>\n\n  7\n\nof them "}[name]
    assert said == f"There are 7.{ends}{last}{ends}"


@each_model
def test_special_tokens_that_a_message_spells_stay_text(name: str, theirs: dict[str, tuple[Path, Any]]) -> None:
    tokenizer = tokenizer_of(theirs[name][0])
    spelled = "".join(tokenizer.special_ids) + "\ufdd10\ufdd2"
    plain, hostile = (
        render({"messages": [{"role": "user", "content": text}, *CHAT[1:2]]}, tokenizer, 2_000)[0]
        for text in ("hello", spelled)
    )
    special = [*tokenizer.special_ids.values()]
    assert [i for i in plain if i in special] == [i for i in hostile if i in special]
    assert spelled in tokenizer.decode(hostile.tolist())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_calls_of_the_calculator_stand_in_the_models_own_turn(name: str, theirs: dict[str, tuple[Path, Any]]) -> None:
    tokenizer = tokenizer_of(theirs[name][0])
    parts = [("text", "It is "), ("python", "12-5"), ("python_output", "7"), ("text", " 7")]
    answer = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    ids, mask = render({"messages": [CHAT[0], answer]}, tokenizer, 500)
    text, said = tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask == 1].tolist())
    call, result = f"{CALL[0]}12-5{CALL[1]}", f"{RESULT[0]}7{RESULT[1]}"
    assert f"It is {call}{result} 7" in text and f"It is {call} 7" in said and RESULT[0] not in said
    prompt = render_prompt(
        [CHAT[0], {"role": "assistant", "content": answer["content"][:2]}, {"role": "tool", "content": "7"}], tokenizer
    )
    without_thought = tokenizer.decode(prompt).replace("<think>\n\n</think>\n\n", "")
    assert without_thought.endswith(f"It is {call}{result}")


def test_exchanges_that_do_not_fit_are_left_out_and_the_last_one_is_written_as_last(
    theirs: dict[str, tuple[Path, Any]],
) -> None:
    tokenizer = tokenizer_of(theirs["qwen3"][0])
    whole, _ = render({"messages": CHAT}, tokenizer, 500)
    first, _ = render({"messages": CHAT[:2]}, tokenizer, 500)
    shortened, _ = render({"messages": CHAT}, tokenizer, len(whole) - 1)
    assert shortened.tolist() == first.tolist() and "<think>" in tokenizer.decode(first.tolist())
    with pytest.raises(UnusableError, match="the first exchange"):
        render({"messages": CHAT}, tokenizer, 10)


def test_the_day_that_a_template_asks_for_is_that_of_the_beginning(theirs: dict[str, tuple[Path, Any]]) -> None:
    tokenizer = tokenizer_of(theirs["qwen3"][0])
    assert tokenizer.own is not None
    tokenizer.own = replace(tokenizer.own, today="1999-05-05")
    assert "Today is 1999." in tokenizer.decode(render_prompt(CHAT[:1], tokenizer))
    assert tokenizer_of(theirs["qwen3"][0]).own == replace(tokenizer.own, today=date.today().isoformat())


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "no special token ends"),
        ("{{ messages[0].content }}<|im_end|>", "leaves a message out"),
        ("{{ raise_exception('only for me') }}", "only for me"),
        ("{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "chat template"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused_and_ours_can_take_its_place(
    template: str, why: str, theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    shutil.copytree(theirs["qwen3"][0], tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=f"cannot be followed.*{why}.*init.own_chat=false"):
        load_config("demo", {"init": {"source": str(tmp_path / "model")}})
    config = load_config("demo", {"init": {"source": str(tmp_path / "model"), "own_chat": False}})
    assert config.init.mid and tokenizer_of(tmp_path / "model", own_chat=False).own is None


def test_weights_that_are_pickles_are_refused(theirs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    shutil.copytree(theirs["llama"][0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin only, a pickle.*save_pretrained"):
        load_config("demo", {"init": {"source": str(tmp_path / "model")}})
    (tmp_path / "model/pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no weights: put model.safetensors"):
        load_config("demo", {"init": {"source": str(tmp_path / "model")}})


def test_code_that_a_config_names_is_never_run(theirs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(theirs["qwen3"][0], model)
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    for file, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        config = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(config | {"auto_map": dict.fromkeys(classes, "mine.Mine")}))
    tokenizer = tokenizer_of(model)
    tokenizer.save(tmp_path / "saved")
    check_chat(tokenizer, tmp_path / "saved")
    assert load_config("demo", {"init": {"source": str(model)}}).model.found == read_spec(model)
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in (tmp_path / "saved/tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("flags_", "why"),
    [
        ({"model": {"depth": 4}}, "has its own model.depth"),
        ({"tokenizer": {"source": "gpt2"}}, "has its own tokenizer"),
        ({"model": {"sequence_len": 1_024}}, "can place 512 tokens"),
        ({"base": {"hours": 1.0}}, "nothing is pretrained"),
    ],
)
def test_what_the_model_settles_cannot_be_set(
    flags_: dict[str, Any], why: str, theirs: dict[str, tuple[Path, Any]]
) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config("demo", {"init": {"source": str(theirs["qwen3"][0])}, **flags_})


def test_a_run_is_laid_out_for_the_model_that_it_begins_from(theirs: dict[str, tuple[Path, Any]]) -> None:
    config = load_config(None, {"init": {"source": str(theirs["llama"][0])}, "with_rl": True})
    assert config.model.spec() == replace(read_spec(theirs["llama"][0]), vocab_size=config.model.vocab_size)
    assert config.sft.total_batch_size == 32_768 and config.sft.device_batch_size == 32  # of 64 rows
    assert config.sft.schedule == "cosine"
    assert {getattr(config, stage).optimizer for stage in ("mid", "sft", "rl")} == {"adamw"}
    set_by_hand = load_config(None, {"init": {"source": str(theirs["llama"][0])}}, ["sft.optimizer=muon"])
    assert set_by_hand.sft.optimizer == "muon" and set_by_hand.rl.adamw_lr == 2e-5


def test_a_plan_is_of_the_model_and_of_what_trains(
    theirs: dict[str, tuple[Path, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, other = theirs["qwen3"]
    arguments = ["plan", "--init", str(directory), "--with-rl", "--gpus", "1xA100-80", "--json"]
    assert cli.main(arguments) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["parameters"]["total"] == other.num_parameters() and numbers["fits"] is True
    assert numbers["name"] == "qwen3" and numbers["memory_stage"] in ("sft", "rl") and numbers["tokens"] is None
    assert numbers["hours"]["sft"] > 0 and numbers["hours"]["rl"] > 0 and "mid" not in numbers["hours"]
    assert cli.main(arguments[:-1]) == 0
    assert "memory of a device" in capsys.readouterr().out


def test_an_export_of_ours_begins_where_it_ended(tmp_path: Path) -> None:
    from test_models import random_model

    tokenizer = Tokenizer.train(["a little text, " * 50], 300)
    spec = ModelSpec("depth", 2, 64, 1, 1, 128, tokenizer.vocab_size, 64, softcap=15.0)
    model = random_model(spec)
    export(model, tokenizer, tmp_path)
    found = look(InitConfig(source=str(tmp_path)))
    assert found.spec == spec and found.chats
    again = grown(tmp_path, spec, [])
    assert all(w.equal(again.state_dict()[name]) for name, w in model.state_dict().items())


HUB = """
import sys
from pipeline.config import load_config
from stages.begin import directory_of
config = load_config("demo", {"init": {"source": "hub:them/model"}})
folder = directory_of(config.init)
print(config.name, config.init.revision, folder.name, sorted(path.name for path in folder.iterdir()))
"""


def test_a_repository_of_the_hub_is_begun_from_at_the_commit_that_was_planned(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in theirs["llama"][0].iterdir()} | {"pytorch_model.bin": b"pickle"}
    Hub.private, Hub.commits, Hub.large = {"them/model": False}, {"them/model": [files]}, {}
    with served() as endpoint:
        env = environment(HF_ENDPOINT=endpoint, HOME=str(tmp_path), HF_HOME=str(tmp_path), **HUB_SETTINGS)
        done = subprocess.run(
            [sys.executable, "-c", HUB], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
    kept = sorted(files.keys() - {"pytorch_model.bin"})
    assert done.stdout.strip() == f"demo {1:040x} {1:040x} {kept}", done.stderr


@pytest.mark.parametrize("which", ["Llama 3", "Qwen"])
def test_tokenizers_that_people_use_keep_their_ids_and_chat(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if which == "Llama 3":
        if (file := os.environ.get("FATHOM_LLAMA3_TOKENIZER")) is None:
            pytest.skip("set FATHOM_LLAMA3_TOKENIZER to the file tokenizer.model of Llama 3")
        ids, template = {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009, CALL[0]: 128_256}, LLAMA3
        name = "tokenizer.model"
        named = {"bos_token": {"content": "<|begin_of_text|>"}}  # and of the rest the ids alone
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [128_001, 128_009]}))
    else:
        file = str(request.getfixturevalue("shared_data") / "tokenizers/qwen/qwen.tiktoken")
        ids, template = {"<|endoftext|>": 151_643, "<|im_end|>": 151_645, CALL[0]: 151_669}, CHATML
        template = template.replace("<think>\n\n</think>\n\n", "")  # no tokens in this file of ranks
        name, named = "qwen.tiktoken", {"eos_token": "<|im_end|>"}
    shutil.copy(file, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": template}))
    tokenizer = Tokenizer.of_model(tmp_path, 152_064)
    assert tokenizer.special_ids[tokenizer.names("<|bos|>")[-1]] == (128_001 if which == "Llama 3" else 151_645)
    assert {token: tokenizer.special_ids[token] for token in ids} == ids and tokenizer.vocab_size == 152_064
    tokenizer.save(tmp_path / "saved")
    check_chat(Tokenizer.load(tmp_path / "saved"), tmp_path / "saved")


SETTINGS = {
    "model.sequence_len": 256,
    "data.synthetic_problems": 64,
    "data.validation_conversations": 16,
    "mid.steps": 2,
    "sft.steps": 3,
    "sft.adamw_lr": 1e-3,
    "rl.steps": 2,
    "rl.prompts_per_step": 2,
    "rl.samples_per_prompt": 2,
    "rl.signal_prompts": 2,
    "rl.max_new_tokens": 8,
    "rl.require_signal": False,
    "rl.engine": "torch",
    "rl.eval_every": 0,
    "evaluate.tasks": "none",
    "evaluate.problems": 2,
    "evaluate.samples": 1,
    "evaluate.max_new_tokens": 8,
    "evaluate.engine": "torch",
    **{
        f"{stage}.{key}": value
        for stage in ("mid", "sft")
        for key, value in (("total_batch_size", 1024), ("eval_rows", 8))
    },
}


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_line_goes_on_from_it_and_gives_it_away_again(
    name: str, theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """One that learns our format, with mid; and one that keeps its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = theirs[name]
    run = Run(tmp_path, name, ["--preset", "demo", "--init", str(directory), "--with-rl", *flags(SETTINGS)])
    result = run.go(seconds=600)
    assert result.code == 0, result.output
    states = run.states()
    assert ("mid" in states) == (name == "gpt2") and "ingest" not in states
    assert set(states.values()) == {"done"}, states
    assert cli.main(["export", name, str(tmp_path / "given"), "--storage", str(tmp_path), "--dtype", "fp32"]) == 0
    spec = read_spec(tmp_path / "given")
    assert (spec.sequence_len, spec.places) == (256, 512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "given")
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)])
    ours = from_pretrained(tmp_path / "given")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours.logits(ids), atol=1e-4, rtol=0)
    assert ids[0].tolist() == render_prompt(CHAT[:1], Tokenizer.load(tmp_path / "given"))
    if name == "qwen3":
        assert tokenizer.chat_template == CHATML
        assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    again = load_config("demo", {"init": {"source": str(tmp_path / "given")}})
    assert again.init.mid is False
