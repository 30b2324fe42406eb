"""The first commands of a stranger: each trains, or is answered in one message that says what to give instead."""

from __future__ import annotations

import json
import re
import shlex
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import NoReturn

import pytest
import ray
from conftest import flags
from runs import Run, explanations, start

from corpus.synthetic import documents
from pipeline import cli, run

SMALL = {"model.sequence_len": 128}
for stage, steps in (("base", 20), ("mid", 6), ("sft", 6)):
    SMALL |= {f"{stage}.steps": steps, f"{stage}.total_batch_size": 2_048, f"{stage}.device_batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stranger has: a text of a megabyte, a note, and chats."""
    path = tmp_path_factory.mktemp("mine")
    (path / "plays.txt").write_text("\n\n".join(documents(0, 3_200, 0)))
    (path / "note.txt").write_text("To be, or not to be.\n")
    (path / "chat.json").write_text(json.dumps([{"prompt": "to be?", "response": "or not"}]))
    lines = ({"prompt": f"How many are {i} and 1?", "response": f"It is {i + 1}."} for i in range(200))
    (path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ({"prompt": "A word?", "response": word} for word in ("tea", "caf\u00e9"))
    (path / "accents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in words))
    (path / "one.jsonl").write_text(json.dumps({"prompt": "A word?", "response": "tea"}))
    (path / "latin.txt").write_bytes("na\u00efve caf\u00e9\n\n".encode("latin-1") * 1_000)
    return path


def test_the_text_is_of_a_megabyte(folder: Path) -> None:
    assert 0.9e6 < (folder / "plays.txt").stat().st_size < 1.2e6


# Exit status, and what the message says; the last is of a command that has nothing wrong with it.
ANSWERED: dict[str, tuple[int, str]] = {
    "train --depth 2 --corpus plays.txt": (2, r"no command 'train'(.|\n)*\n  run  +train: every stage"),
    "run demo": (2, r"there is no demo: a preset is given as --preset demo"),
    "run --depth 2 --corpus plays.txt --epochs 3": (2, r"no --epochs: .*--set KEY=VALUE.* mid\.epochs, sft\.epochs"),
    "run --depth 2 --corpus plays.txt --lr=0.1": (2, r"no --lr=0\.1: .*--set KEY=VALUE.* base\.matrix_lr"),
    "plan --depth 2 --batch-size 32": (2, r"no --batch-size: .*--set KEY=VALUE.* base\.total_batch_size"),
    "run --depht 2": (2, r"no --depht: did you mean --depth\?"),
    "plan --depth 2 --curpus=plays.txt": (2, r"no --curpus=plays\.txt: did you mean --corpus\?"),
    "run --depth 2 --corpus plays.txt --only base --until sft": (
        1,
        r"--only base contradicts --until sft: give --only",
    ),
    "run --depth two": (2, r"argument --depth: invalid int value: 'two'"),
    "run --depth 2 --corpus note.txt": (1, r"--corpus: .*note\.txt holds 21 bytes, .*--set model\.sequence_len"),
    "run --depth 2 --corpus latin.txt": (1, r"--corpus: .*latin\.txt holds no documents: .*not UTF-8"),
    "run --depth 2 --corpus plays.txt --set model.sequence_len=9000000": (1, r"--corpus: .*--set model\.sequence_len"),
    "run --depth 2 --corpus plays.txt --set model.vocab_size=99": (1, r"--set model\.vocab_size: .* at least 265"),
    "run --depth 2 --corpus plays.txt --workers 256": (1, r"--workers 256 needs .*: add --workers \d+"),
    "run --depth 2 --corpus plays.txt --chat one.jsonl --gsm8k none": (
        1,
        r"two conversations .* there is 1: give more with --chat",
    ),
    "run --depth 2 --corpus plays.txt --chat chat.json": (1, r"--chat: .*chat\.json is of no kind .*\.jsonl"),
    "run --depth 2 --corpus plays.txt --chat accents.jsonl --gsm8k none --tokenizer chars": (
        1,
        r"--tokenizer: .* 'é' \(LATIN SMALL LETTER E WITH ACUTE, U\+00E9\) in data\.mid\.chat, conversation 2: take .* "
        r"--tokenizer, .* --name or with --force tokenizer --force base, as --set 'tokenizer\.alphabet=.*é\"'",
    ),
    "run --depth 2 --corpus plays.txt --until rl": (1, r"--until rl: this run has no such stage; .*RL --with-rl"),
    "data inspect plays": (1, r"no run 'plays': .*see --storage"),
    "run --depth 2 --corpus plays.txt --chat none --gsm8k none --dry-run": (
        0,
        r"base +fresh +run(.|\n)*about 4 passes over your corpus .*--set base\.tokens=N",
    ),
    "run --depth 2 --corpus plays.txt --chat none --gsm8k none --dry-run --set base.target_ratio=20": (
        0,
        r"base +fresh +run(.|\n)*about [\d,]+ passes over your corpus .*--set base\.tokens=\d+",
    ),
}


@pytest.mark.parametrize("command", ANSWERED)
def test_what_is_wrong_is_answered_at_once_with_what_mends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def started(debug: bool = False) -> NoReturn:
        pytest.fail("Ray is started, which takes longer than the answer")

    monkeypatch.setattr(run, "connect", started)
    monkeypatch.chdir(folder)
    status, said = ANSWERED[command]
    try:
        found = cli.main(command.split())
    except SystemExit as ended:  # argparse's way
        found = int(str(ended.code))
    out, err = capsys.readouterr()
    assert found == status and re.search(said, err if status else out), out + err
    assert not ray.is_initialized()
    if status and not command.startswith("train"):
        assert err.count("\n") == 1, "one message"


def trained(url: str, token: str) -> list[str]:
    """The names on the dashboard's page of trainings; none before the first begins."""
    request = urllib.request.Request(f"{url}/api/train/v2/runs/v1", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return [shown["name"] for shown in json.load(answer)["train_runs"]]
    except urllib.error.HTTPError as error:
        if error.code == 500 and b"Train state data is not available" in error.read():
            return []
        raise


def test_a_text_file_alone_trains_and_the_dashboard_shows_it(folder: Path, tmp_path: Path) -> None:
    """To who has the token that it asks for."""
    settings = ["--depth", "2", "--corpus", str(folder / "plays.txt"), "--chat", "none", "--gsm8k", "none"]
    made, token = Run(tmp_path, "plays", [*settings, *flags(SMALL | {"model.vocab_size": 512})]), uuid.uuid4().hex
    command, asks = start("run", *made.arguments(), RAY_AUTH_TOKEN=token), r"dashboard (http://\S+), which asks for"
    names: list[str] = []
    try:
        assert command.until(lambda: bool(re.search(asks, command.output())), 120), command.output()
        [url] = re.findall(asks, command.output())
        assert command.until(lambda: bool(names.extend(trained(url, token)) or names), 300), command.output()
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            trained(url, "")
        result = command.finish(300)
    finally:
        command.kill()
    assert result.code == 0, result.output
    assert [name.rsplit("-", 1)[0] for name in names] == ["plays-base"]
    assert made.states() == dict.fromkeys(("tokenizer", "ingest", "base", "evaluate_base"), "done")
    figures = {stage["name"]: stage["metrics"] for stage in made.status()["stages"]}
    first = next(record["val_bpb"] for record in made.records("base") if "val_bpb" in record)
    assert figures["evaluate_base"]["val_bpb_full"] < first - 0.5
    assert 0.01 < validation_share(made) < 0.1


def test_characters_and_chats_without_problems_train_and_are_measured(folder: Path, tmp_path: Path) -> None:
    """What the last validation says, where it reads all rows, is what evaluation says of the finished model."""
    chats = ["--chat", str(folder / "chats.jsonl"), "--gsm8k", "none", "--tokenizer", "chars"]
    made = Run(tmp_path, "chats", ["--depth", "2", "--corpus", str(folder / "plays.txt"), *chats, *flags(SMALL)])
    result = made.go()
    assert result.code == 0, result.output
    assert set(made.states().values()) == {"done"} and 0.01 < validation_share(made) < 0.1
    figures = {stage["name"]: stage["metrics"] for stage in made.status()["stages"]}
    for stage, names in (("mid", ["val_bpb_mid"]), ("sft", ["val_bpb_sft", "val_bpb_sft_whole"])):
        expected = {f"{name}_full": pytest.approx(figures[stage][name], rel=1e-4) for name in names}
        assert figures[f"evaluate_{stage}"] == expected
        assert all(len(explanations(f"evaluate_{stage}", name)) == 1 for name in expected)
    assert figures["evaluate_sft"]["val_bpb_sft_full"] != figures["evaluate_sft"]["val_bpb_sft_whole_full"]
    assert "val_bpb_sft_full" in result.output


def test_what_is_told_of_a_lacking_character_mends_a_run_that_has_begun(folder: Path, tmp_path: Path) -> None:
    """It is behind those that are read before Ray starts; base is made by then, and made again."""
    lines = [{"prompt": f"How many are {i} and 1?", "response": f"It is {i + 1}."} for i in range(1_000)]
    lines.append({"prompt": "A word?", "response": "It is caf\u00e9."})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = ["--chat", str(tmp_path / "chats.jsonl"), "--gsm8k", "none", "--tokenizer", "chars"]
    until = ["--until", "conversations", *flags(SMALL)]
    made = Run(tmp_path, "word", ["--depth", "2", "--corpus", str(folder / "plays.txt"), *chats, *until])
    failed = made.go()
    assert failed.code == 1 and made.states()["base"] == "done", failed.output
    *_, told = re.findall(r"lacks 'é' .* conversation 1,001: .* --force base, as (--set '.*')", failed.output)
    mended = made.go(*shlex.split(told), "--force", "tokenizer", "--force", "base")
    assert mended.code == 0, mended.output
    states = made.states()
    assert all(states[stage] == "done" for stage in ("tokenizer", "ingest", "base", "evaluate_base", "conversations"))


def validation_share(made: Run) -> float:
    """The share of the corpus's tokens that is held out."""
    return float(json.loads((made.path / "ingest/manifest.json").read_text())["stats"]["validation_share"])
