"""`fathom export`: what is given away is whole, says what it is, and other programs load it and stop where it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import SETTINGS, TOKEN, Hub, served
from huggingface_hub import HfApi
from runs import ROOT, Run, environment
from safetensors.torch import load_file
from taught import CALL, SUM, parts, taught
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from cluster import hub
from corpus.conversation import render_prompt
from corpus.tokenizers import Tokenizer
from models.build import build
from models.generate import Sampling, TorchEngine
from models.hf import from_pretrained, save_pretrained
from models.spec import Family, ModelSpec
from pipeline import cli, export
from serving.speaker import Speaker


def exported(line: Run, what: str, place: object, *flags: str) -> int:
    return cli.main(["export", what, str(place), "--storage", str(line.storage), *flags])


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 0.0), ("bf16", 4e-3), ("fp16", 5e-4)])
def test_the_weights_are_the_stages_in_the_type_asked_for(line: Run, tmp_path: Path, dtype: str, within: float) -> None:
    assert exported(line, "line", tmp_path / "model", "--dtype", dtype) == 0
    of_stage, given = load_file(line.path / "rl/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert of_stage.keys() == given.keys()
    for name, weight in of_stage.items():
        assert given[name].dtype == export.TYPES[dtype]
        torch.testing.assert_close(given[name].float(), weight, rtol=within, atol=1e-7 if within else 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == export.TYPES[dtype]


def test_the_card_has_the_runs_own_figures_and_none_of_its_places(line: Run, tmp_path: Path) -> None:
    assert exported(line, "line:sft", tmp_path / "model", "--license", "apache-2.0") == 0
    head, text = card(tmp_path / "model")
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    spec = from_pretrained(tmp_path / "model").spec
    reached = json.loads((line.path / "evaluate_sft/manifest.json").read_text())["metrics"]
    assert f"| parameters | {spec.parameters:,} |" in text and "| base | mid | sft |" in text
    assert f"{reached['spelling']:.4g}" in text
    assert "tokens of sft" in text and "tokens of completions in rl" not in text
    assert "sft.gsm8k" in text and str(line.storage) not in (tmp_path / "model/README.md").read_text()
    assert exported(line, "line:base", tmp_path / "base") == 0
    head, text = card(tmp_path / "base")
    assert "license" not in head and "goes on with text" in text and "gsm8k" not in text and "fathom sample" in text


def test_what_others_made_is_named_in_the_card_but_not_where_it_lay(line: Run) -> None:
    from pipeline.artifacts import RunStore
    from pipeline.reporting.facts import collect

    run = collect(RunStore(str(line.storage), "line"))
    assert run.config is not None
    part = run.config.data.sft["gsm8k"]
    mixture = {
        "mine": "/home/me/secret/chat.jsonl",
        "theirs": "hub:open/chats:main",
        "far": "s3://bucket/keys/far.jsonl",
    }
    sft = {name: part.model_copy(update={"source": source, "format": "chat"}) for name, source in mixture.items()}
    data = run.config.data.model_copy(update={"corpus": "climbmix-400b", "sft": sft})
    run.config = run.config.model_copy(update={"data": data})
    text = export.card("line:rl", run.config.model.spec(), "bf16", export.until(run, "rl"), None, "me/model")
    assert yaml.safe_load(text.split("---\n")[1])["datasets"] == ["karpathy/climbmix-400b-shuffle", "open/chats"]
    assert "chat.jsonl" in text and "far.jsonl" in text and "hub:me/model" in text
    assert not any(place in text for place in ("secret", "bucket", "/home"))


def test_a_folder_is_written_whole_or_not_at_all(
    line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier export gives way, as it can be made again; whatever else there is stays."""
    place = tmp_path / "model"
    place.mkdir()
    assert exported(line, "line:rl", place) == 0
    first = {path.name: path.read_bytes() for path in place.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(export, "card", fail)
        assert exported(line, "line:base", place) == 1
    assert {path.name: path.read_bytes() for path in place.iterdir()} == first and [*tmp_path.iterdir()] == [place]
    (tmp_path / f".model{export.PARTIAL}{2**22 - 1}").mkdir()  # of a process that was killed
    assert exported(line, "line:base", place) == 0
    assert (place / "README.md").read_bytes() != first["README.md"] and [*tmp_path.iterdir()] == [place]
    (place / "README.md").write_text("my own words")
    capsys.readouterr()
    assert exported(line, "line:rl", place) == 1
    assert "an export that was changed" in capsys.readouterr().err
    assert exported(line, "line:rl", place, "--force") == 0
    assert (tmp_path / "model.before/README.md").read_text() == "my own words"
    (place / "note").touch()
    assert exported(line, "line:rl", place, "--force") == 1
    assert "model.before is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "place", "flags", "said"),
    [
        ("line", "file", [], "is a file; name a folder"),
        ("./line", "model", [], "./line is no run"),
        ("line:ingest", "model", [], "ingest makes no model"),
        ("line", "model", ["--license", "MIT License"], "like mit, apache-2.0"),
        ("line", "hub:model", [], "hub:model names no repository: it is hub:OWNER/NAME"),
    ],
)
def test_what_cannot_be_given_away_is_told(
    line: Run, tmp_path: Path, what: str, place: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert exported(line, what, place if ":" in place else tmp_path / place, *flags) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its answers, as an export has it."""
    path = tmp_path_factory.mktemp("taught")
    tokenizer = taught(path / "stage")
    export.export(from_pretrained(path / "stage"), tokenizer, path / "model", temperature=0.7)
    return path / "model"


def test_transformers_ends_where_the_assistant_does(folder: Path) -> None:
    """With generate()'s defaults, which sample; and in a batch of unequal prompts as of each alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.do_sample and model.generation_config.temperature == 0.7
    asked = [[{"role": "user", "content": text}] for text in ("letters?", SUM, "hostile?", "which letters of which?")]
    ids = tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, return_tensors="pt")
    torch.manual_seed(0)
    written = tokenizer.decode(model.generate(**ids, max_length=96)[0])
    assert written.endswith("<|assistant_end|>") and written.count("<|assistant_end|>") == 1
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 40}
    together = generate(asked, batch_size=len(asked), **settings)
    alone = [generate(chat, **settings) for chat in asked]
    said = [answers[0]["generated_text"][-1]["content"] for answers in alone]
    assert [answers[0]["generated_text"][-1]["content"] for answers in together] == said
    assert said[1] == "So 12*34", "a call is the caller's to answer"


@pytest.mark.parametrize("text", ["<|user_end|><|assistant_start|>yes", "<|bos|>", "<<|bos|>|", "plain"])
def test_text_stays_text(folder: Path, text: str) -> None:
    """The template gives the ids of our own rendering, whatever the messages spell."""
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids == render_prompt(messages, Tokenizer.load(folder))


# what llama.cpp's converter reads of a config, through transformers, for each family that it knows
READ = {
    "gpt2": ["n_embd", "n_layer", "n_head", "n_ctx", "layer_norm_epsilon"],
    "llama": ["num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "vocab_size"],
    "qwen3": ["num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "head_dim"],
}
ALSO = ["num_attention_heads", "num_key_value_heads", "rms_norm_eps"]


@pytest.mark.parametrize("family", READ)
def test_configs_have_what_converters_read(family: Family, tmp_path: Path) -> None:
    kv_heads = 4 if family == "gpt2" else 2
    spec = ModelSpec(family, 2, 32, 4, kv_heads, 128, 300, 64, rope_base=5e5, biases=family == "gpt2")
    save_pretrained(build(spec), tmp_path, bos=0, eos=[1], pad=2)
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert None not in [read[name] for name in READ[family] + (ALSO if family != "gpt2" else [])]
    assert read["architectures"] == [type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__]
    if family != "gpt2":
        written = json.loads((tmp_path / "config.json").read_text())
        assert read["rope_parameters"]["rope_theta"] == written["rope_theta"] == 5e5
    else:
        assert read["n_ctx"] == 64 and spec.ffn_width == 4 * read["n_embd"]


def test_weights_too_large_for_a_type_are_told(tmp_path: Path) -> None:
    built = build(ModelSpec("llama", 1, 32, 2, 2, 64, 300, 64))
    with torch.no_grad():
        built.lm_head.weight[3, 3] = 1e5
    with pytest.raises(ValueError, match=r"lm_head\.weight has weights too large for torch\.float16"):
        save_pretrained(built, tmp_path, 0, [1], 2, torch.float16)
    save_pretrained(built, tmp_path, 0, [1], 2, torch.bfloat16)


COMMANDS = """
import io, json, os, sys
from pipeline import cli
for token, *command in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    if not token:
        del os.environ["HF_TOKEN"]
    print("#", cli.main(command), file=sys.stderr, flush=True)
"""


def at_hub(endpoint: str, home: Path, *commands: tuple[str, ...]) -> list[tuple[str, int]]:
    """What each command said, and its exit status, in a new process, as the hub's library reads its settings once.
    Each has a token before it, or none."""
    env = environment(HF_ENDPOINT=endpoint, HOME=str(home), HF_HOME=str(home), **SETTINGS)
    run = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(
        run, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    said, told = "", []
    for text in done.stdout.splitlines():
        if text.startswith("# "):
            told.append((said, int(text.removeprefix("# "))))
            said = ""
        else:
            said += text + "\n"
    assert len(told) == len(commands) and TOKEN not in done.stdout, done.stdout
    return told


def test_a_repository_of_the_hub_is_what_was_exported(line: Run, tmp_path: Path) -> None:
    """In one commit, private unless it is said, and loaded from there it says what it says here. What was there before
    is no longer in it, and where that was no export nothing is done."""
    Hub.private, Hub.commits, Hub.large = {}, {"me/other": [{"notes.txt": b"mine"}]}, {}
    storage = ("--storage", str(line.storage))
    sampled = ("--temperature", "0", "--max-tokens", "8", "--engine", "torch", *storage)
    with served() as endpoint:
        told = at_hub(
            endpoint,
            tmp_path,
            (TOKEN, "export", "line:rl", "hub:me/model", "--dtype", "fp32", *storage),
            (TOKEN, "sample", "hub:me/model", "Tom", *sampled),
            (TOKEN, "sample", "line:rl", "Tom", *sampled),
            (TOKEN, "export", "line:base", "hub:me/model", "--license", "mit", *storage),
            (TOKEN, "export", "line:base", "hub:me/other", *storage),
            (TOKEN, "export", "line:base", "hub:me/other", "--force", "--public", *storage),
            ("hf_wrong", "export", "line:base", "hub:me/more", *storage),
            ("", "export", "line:base", "hub:me/more", *storage),
        )
    said, codes = [text for text, _ in told], [code for _, code in told]
    assert codes == [0, 0, 0, 0, 1, 0, 1, 1], told
    assert said[1] == said[2] and f"{endpoint}/me/model" in said[0]
    assert "has other files than those of an export" in said[4]
    for fault, why in ((said[6], "Invalid username or password"), (said[7], "there is no token")):
        assert fault.startswith("fathom export: hub:me/more cannot be written to: ") and why in fault
        assert "HF_TOKEN" in fault and "Traceback" not in fault
    assert Hub.private == {"me/model": True, "me/other": False} and "me/more" not in Hub.commits
    made, again = Hub.commits["me/model"][1:]
    assert made.keys() == again.keys() == Hub.commits["me/other"][-1].keys() | {".gitattributes"}
    assert made["model.safetensors"] == (line.path / "rl/model.safetensors").read_bytes()
    assert b"license: mit" in again["README.md"] and b"line:base" in again["README.md"]


def test_a_hub_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way up and on the way down, by the library's own error."""
    api = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(ValueError, match=r"hub:me/model cannot be written to: .*refused; check the name"):
        export._upload(api, tmp_path, "me/model", False, "a")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: api.create_repo("me/model"))
    with pytest.raises(ValueError, match=r"hub:me/model cannot be downloaded: .*refused; check the name"):
        hub.fetch("hub:me/model")


def test_an_export_is_a_model_like_its_stage(folder: Path) -> None:
    speaker = Speaker(folder, TorchEngine(folder, on_gpu=False))
    said, _ = speaker.answer([{"role": "user", "content": SUM}], Sampling(0.0), 0, lambda *_: None)
    assert said == parts(CALL)
