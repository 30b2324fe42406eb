"""`data inspect` shows rows as training sees them, and `data verify` finds every file that is not what was stored."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from test_status import VALUES

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.storage import FileEntry
from corpus.conversation import render
from corpus.packing import pack
from corpus.rows import Rows, RowWriter
from corpus.tokenizers import Tokenizer
from pipeline import cli, data
from pipeline.artifacts import RunStore
from pipeline.config import load_config
from pipeline.terminal import plain
from stages.context import StageContext
from stages.growing import PLAN, note_path, open_rows

ROW_LEN = 65
TEXTS = ["The quick brown fox.\nIt jumps.", "A lazy dog sleeps.", "Twice is <|bos|> spelled in text. " * 5]
CHATS = [("Is it <|assistant_start|> here?", "No."), ("What is 1+1?", "Two, said the fox.")]
STATS = {
    "documents": 1_234,
    "characters": 5_000,
    "tokens": 2_000,
    "characters_per_token": 2.5,
    "rows": 40,
    "validation_rows": 1,
    "cropped_share": 0.125,
    "split": 0,
    "tokens_below": {"1024": 34, "64": 200, "128": 1_000},
    "read": {"corpus": {"read": 1_244, "kept": 1_234, "left_out": {"duplicates": 7, "empty": 3}}},
}
SFT_READ = {"sft.smoltalk": {"read": 11, "kept": 2, "left_out": {"too_long": 9}}}


def write(directory: Path, tokenizer: Tokenizer, rows: Any, masked: bool) -> None:
    writer = RowWriter(directory, ROW_LEN, tokenizer.vocab_size, masked)
    for ids, mask in rows:
        writer.add(np.asarray(ids), mask)
    writer.close()


def publish(store: RunStore, stage: str, directory: Path, upstream: dict[str, str], **more: Any) -> Manifest:
    made = Manifest(store.run, stage, store.stage(stage).upload_tree(directory), upstream=upstream, **more)
    manifests.write(store.stage(stage), made)
    return made


def make_run(tmp_path: Path) -> RunStore:
    """A run with tokenizer and ingest done: base in two files with documents that go on over rows, SFT padded."""
    store = RunStore(str(tmp_path / "runs"), "r")
    sets = [f"model.sequence_len={ROW_LEN - 1}", *(f"{s}.total_batch_size={4 * (ROW_LEN - 1)}" for s in data.STAGES)]
    store.record(load_config("demo", {"name": "r"}, sets))
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(tmp_path / "tokenizer")
    made = publish(store, "tokenizer", tmp_path / "tokenizer", {})
    ingest = tmp_path / "ingest"
    documents = [(np.array([tokenizer.bos, *tokenizer.encode(text)]), None) for text in TEXTS]
    write(ingest / "base/train", tokenizer, pack(documents * 20, ROW_LEN, "concat"), masked=False)
    write(ingest / "base/val", tokenizer, pack(documents * 2, ROW_LEN, "best_fit"), masked=False)
    chats = [
        render({"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}, tokenizer, ROW_LEN)
        for u, a in CHATS
    ]
    publish(store, "ingest", ingest, {"tokenizer": made.digest()}, stats=STATS)
    conversations = tmp_path / "conversations"
    write(conversations / "sft/train", tokenizer, pack(chats, ROW_LEN, "pad", tokenizer.bos), masked=True)
    publish(store, "conversations", conversations, {"tokenizer": made.digest()}, stats={"read": SFT_READ})
    return store


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The same, for a test that leaves it as it was."""
    return make_run(tmp_path_factory.mktemp("lasting"))


def in_place_of(store: RunStore, stage: str, name: str, content: bytes) -> None:
    """Puts `content` in the place of a file, and has all manifests agree, as whoever can write to the storage can."""
    place = store.stage(stage)
    place.write_bytes(name, content)
    if name == "manifest.json":
        return
    made = manifests.read(place)
    assert made is not None
    entry = FileEntry(name, len(content), hashlib.sha256(content).hexdigest())
    made = replace(made, files=[entry if f.path == name else f for f in made.files])
    manifests.write(place, made)
    for other in ("ingest", "conversations") if stage == "tokenizer" else ():
        after = manifests.read(store.stage(other))
        assert after is not None
        manifests.write(store.stage(other), replace(after, upstream={"tokenizer": made.digest()}))


@pytest.fixture
def command(store: RunStore, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`fathom data WHAT r ...` in this process: exit status, output, errors."""

    def run(what: str, *arguments: str, run: str = "r") -> tuple[int, str, str]:
        code = cli.main(["data", what, run, "--storage", str(Path(store.storage.uri).parent), *arguments])
        return code, *capsys.readouterr()

    return run


Command = Callable[..., tuple[int, str, str]]


LOOKS: list[list[str]] = [
    ["data", "inspect", "r"],
    ["data", "inspect", "r", "--json", "--step", "1"],
    ["data", "inspect", "r", "--stage", "sft", "--start", "1", "--plot", os.devnull],
    ["tokenizer", "r"],
]


@settings(
    max_examples=int(os.environ.get("FATHOM_FUZZ", "50")), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_whatever_an_artifact_says_its_rows_are_shown_or_one_message(lasting: RunStore, data: st.DataObject) -> None:
    """No traceback, and no line that steers the terminal."""
    stage, name = data.draw(
        st.sampled_from(
            [
                ("ingest", "base/train/rows.json"),
                ("ingest", "base/val/rows.json"),
                ("conversations", "sft/train/rows.json"),
                ("ingest", "manifest.json"),
                ("tokenizer", "tokenizer_meta.json"),
            ]
        )
    )
    root, out = Path(lasting.storage.uri), io.StringIO()
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    raw = json.loads(before[root / stage / name])
    raw.pop("sha256", None)
    inner = raw
    while isinstance(inner, dict) and inner and data.draw(st.booleans()):
        outer, key = inner, data.draw(st.sampled_from(sorted(inner)))
        inner = outer[key]
        if not isinstance(inner, dict) or data.draw(st.booleans()):
            outer[key] = data.draw(VALUES | st.just([[["x"], 1]]) | st.just([["00000-000", 1 << 62]]))
            break
    else:
        raw = data.draw(VALUES)
    try:
        in_place_of(lasting, stage, name, json.dumps(raw).encode())
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            patch("pipeline.tokenizer.BESIDE", ()),
        ):
            assert all(cli.main([*look, "--storage", str(root.parent)]) in (0, 1) for look in LOOKS)
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    assert plain(out.getvalue()) == out.getvalue()


@pytest.mark.parametrize(
    "listing",
    [
        "null",
        "[" * 100_000,
        {"row_len": 1},
        {"row_len": True},
        {"dtype": "O"},
        {"files": [["../x", 1]]},
        {"files": [["a", -1]]},
        {"files": [["a"]]},
    ],
)
def test_a_list_of_rows_that_is_none_is_one_message(
    store: RunStore, command: Command, listing: str | dict[str, Any]
) -> None:
    whole = json.loads(store.stage("ingest").read_bytes("base/train/rows.json"))
    text = listing if isinstance(listing, str) else json.dumps(whole | listing)
    in_place_of(store, "ingest", "base/train/rows.json", text.encode())
    code, out, err = command("inspect")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "rows.json does not list rows" in err and "again" in err


def test_ids_beyond_the_vocabulary_are_one_message(
    store: RunStore, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        name = f"base/{part}/00000-000.tokens"
        in_place_of(store, "ingest", name, b"\xff" * len(store.stage("ingest").read_bytes(name)))
    said = "holds the id 65535, and the vocabulary is 300: the rows are damaged; run the stage that made them again\n"
    code, _, err = command("inspect")
    assert code == 1 and err == f"fathom data: row 0 {said}"
    assert cli.main(["tokenizer", "r", "--storage", str(Path(store.storage.uri).parent)]) == 1
    held_out = f"{store.stage('ingest').uri}/base/val"
    assert capsys.readouterr().err == f"fathom tokenizer: {held_out} {said}"
    context = StageContext("r", "base", store.stage("base"), {"ingest": store.stage("ingest")}, {}, {})
    for part in ("base/train", "base/val"):  # as training reads them, on GPUs too, which would end in an assertion
        with pytest.raises(ValueError, match=f"{part} holds the id 65535, and the vocabulary is 300"):
            open_rows(context, part, 300).read(np.arange(1))


@pytest.mark.parametrize(
    "stats",
    [
        {"documents": "many"},
        {"tokens": True},
        {"cropped_share": math.inf},
        {"rows": -1},
        {"tokens_below": {"0": 1}},
        {"tokens_below": {"64": 1 << 62}},
    ],
)
def test_counts_that_are_none_are_one_message(store: RunStore, command: Command, stats: dict[str, Any]) -> None:
    made = manifests.read(store.stage("ingest"))
    assert made is not None
    manifests.write(store.stage("ingest"), replace(made, stats=STATS | stats))
    code, out, err = command("inspect")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "has counts that are none" in err and next(iter(stats)) in err and "--force ingest" in err


@pytest.mark.parametrize("lengths", [{"64": 0}, {"3": 5}])
def test_lengths_that_are_in_no_bar_are_left_out(store: RunStore, command: Command, lengths: dict[str, int]) -> None:
    made = manifests.read(store.stage("ingest"))
    assert made is not None
    manifests.write(store.stage("ingest"), replace(made, stats=STATS | {"tokens_below": lengths}))
    assert command("inspect")[0] == 0


def tokenizer_of(store: RunStore) -> Tokenizer:
    return Tokenizer.load(Path(store.stage("tokenizer").uri))


def test_every_bos_begins_a_document_and_spelled_out_ones_do_not(store: RunStore, command: Command) -> None:
    code, out, _ = command("inspect", "--json", "--rows", "2")
    shown, tokenizer = json.loads(out), tokenizer_of(store)
    assert code == 0 and shown["row_len"] == ROW_LEN and shown["stats"] == STATS | {"read": STATS["read"] | SFT_READ}
    assert (shown["run"], shown["stage"], shown["split"]) == ("r", "base", "train")
    lengths = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    first, second = shown["rows"]
    assert first["index"] == 0 and first["padding"] == 0 and first["tokens"] == ROW_LEN
    whole = [d["text"] for d in first["documents"]]
    assert whole[:2] == ["<|bos|>" + text for text in TEXTS[:2]] and ("<|bos|>" + TEXTS[2]).startswith(whole[2])
    assert [d["tokens"] for d in first["documents"]] == [*lengths[:2], ROW_LEN - sum(lengths[:2])]
    assert [d["continued"] for d in first["documents"]] == [False] * 3
    assert second["documents"][0]["continued"] and whole[2] + second["documents"][0]["text"] == "<|bos|>" + TEXTS[2]
    spans = first["documents"][0]["spans"]
    assert [(s["text"], s["special"], s["learned"]) for s in spans] == [
        ("<|bos|>", True, None),
        (TEXTS[0], False, None),
    ]
    assert not any(s["special"] for s in second["documents"][0]["spans"])


def test_the_mask_shows_what_is_learned_and_the_padding(store: RunStore, command: Command) -> None:
    code, out, _ = command("inspect", "--json", "--stage", "sft", "--rows", "9")
    shown, tokenizer = json.loads(out), tokenizer_of(store)
    assert code == 0 and shown["num_rows"] == len(shown["rows"])
    documents = [d for row in shown["rows"] for d in row["documents"]]
    learned = ["".join(s["text"] for s in d["spans"] if s["learned"]) for d in documents]
    assert sorted(learned) == sorted(f"{answer}<|assistant_end|>" for _, answer in CHATS)
    asked = {f"<|bos|><|user_start|>{q}<|user_end|><|assistant_start|>{a}<|assistant_end|>" for q, a in CHATS}
    assert {d["text"] for d in documents} == asked
    for row in shown["rows"]:
        assert row["padding"] > 0 and row["padding"] + sum(d["tokens"] for d in row["documents"]) == ROW_LEN
    answers = [s for d in documents for s in d["spans"] if s["learned"]]
    assert [s["special"] for s in answers] == [False, True] * len(CHATS)
    assert sum(s["tokens"] for s in answers) == sum(len(tokenizer.encode(a)) + 1 for _, a in CHATS)


def test_only_masked_rows_are_padded(store: RunStore) -> None:
    tokenizer = tokenizer_of(store)
    ids = np.array([tokenizer.bos, 65, tokenizer.bos, tokenizer.bos])
    row = data.decode_row(0, ids, np.array([1, 1, 0, 0], dtype=np.uint8), tokenizer)
    assert (row.padding, [d.tokens for d in row.documents]) == (2, [2])
    row = data.decode_row(0, ids, None, tokenizer)
    assert (row.padding, [d.tokens for d in row.documents]) == (0, [2, 1, 1])


def test_a_step_shows_the_rows_that_training_reads(store: RunStore, command: Command) -> None:
    rows = Rows(Path(store.stage("ingest").uri) / "base/train")
    for arguments, seed in (((), 0), (("--seed", "5"), 5)):
        for step in (0, rows.num_rows):  # the last is epochs on
            code, out, _ = command("inspect", "--json", "--step", str(step), "--rows", "100", *arguments)
            assert code == 0
            assert [r["index"] for r in json.loads(out)["rows"]] == rows.step_rows(seed, step, 4).tolist()


def test_piped_output_marks_documents_and_mask_without_colour(command: Command) -> None:
    _, out, _ = command("inspect", "--rows", "2")
    assert "\x1b" not in out and "⟦" not in out
    borders = re.findall(r"^── (document.*?), (\d+) tokens ──$", out, re.MULTILINE)
    assert [name for name, _ in borders[:4]] == ["document", "document", "document", "document continued"]
    _, out, _ = command("inspect", "--stage", "sft", "--rows", "9")
    for question, answer in CHATS:
        assert f"{question}<|user_end|><|assistant_start|>⟦{answer}<|assistant_end|>⟧\n" in out
    assert re.search(r"^── padding, \d+ tokens? ──$", out, re.MULTILINE)
    figures = dict(re.findall(r"^(\w[\w: ]*?) {2,}([\d,.%]+) *$", out, re.MULTILINE))
    assert figures["documents"] == "1,234" and figures["cropped: tokens in no row"] == "12.5%"
    assert re.search(r"^corpus +1,244 +1,234 +7 duplicates, 3 empty *$", out, re.MULTILINE)
    assert re.search(r"^sft\.smoltalk +11 +2 +9 too long *$", out, re.MULTILINE)
    assert "\ncorpus: 1,234 of 1,244 documents are used; left out: 7 duplicates, 3 empty\n" in out


def test_a_terminal_gets_colours_instead_of_brackets() -> None:
    spans = [data.Span("ask", 1, False, False), data.Span("answer", 2, False, True), data.Span("<|e|>", 1, True, True)]
    row = data.Row(0, 8, [data.Document(4, False, spans)], 4)

    def shown(no_color: bool) -> str:
        out = io.StringIO()
        console = Console(
            file=out, force_terminal=True, color_system="standard", width=40, no_color=no_color, _environ={}
        )
        data.show_row(row, console)
        return out.getvalue()

    assert "ask\x1b[32manswer\x1b[0m\x1b[7;32m<|e|>\x1b[0m\n" in shown(no_color=False)
    assert "⟦" not in shown(no_color=False) and "⟦answer" in shown(no_color=True)
    assert "── document, 4 tokens, 3 learned ───────" in shown(no_color=False)


def test_text_cannot_command_the_terminal() -> None:
    out = io.StringIO()
    document = data.Document(1, False, [data.Span("a\x1b[2Jb\x9bc\u202ed\n\te\r", 1, False, None)])
    data.show_row(data.Row(0, 1, [document], 0), Console(file=out))
    assert "a\\x1b[2Jb\\x9bc\\u202ed\n" in out.getvalue() and "e\\r\n" in out.getvalue()


def test_the_plot_is_a_picture_with_a_bar_for_each_power_of_two(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "lengths.png"
    code, out, _ = command("inspect", "--rows", "0", "--plot", str(file))
    assert code == 0 and f"wrote {file}" in out
    with Image.open(file) as image:
        assert image.format == "PNG" and image.size == (960, 540)
    axes = data.histogram({1024: 34, 64: 200, 128: 1_000}, "title").axes[0]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert bars == [(32, 64, 200), (64, 128, 1_000), (128, 256, 0), (256, 512, 0), (512, 1024, 34)]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "length in tokens" and axes.get_ylabel() == "documents"
    widths = {line.split()[0]: line.count("█") for line in out.splitlines() if "–" in line}
    assert widths == {"32–63": 8, "64–127": 40, "128–255": 0, "256–511": 0, "512–1,023": 1}


def test_verify_hashes_every_finished_stage(store: RunStore, command: Command) -> None:
    code, out, _ = command("verify")
    files = [
        f
        for s in ("tokenizer", "ingest", "conversations")
        for f in (manifests.read(store.stage(s)) or pytest.fail()).files
    ]
    assert code == 0 and out.splitlines()[-1].startswith(f"ok: {len(files)} files, ")
    assert "not finished, so not checked: base," in out
    code, out, _ = command("verify", "--stage", "tokenizer")
    assert code == 0 and "ingest" not in out


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_verify_names_every_file_that_is_not_what_was_stored(store: RunStore, command: Command) -> None:
    root = Path(store.stage("ingest").uri)
    flip(root / "base/train/00000-000.tokens")
    short = Path(store.stage("conversations").uri) / "sft/train/00000-000.mask"
    size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:-1])
    (root / "base/val/rows.json").unlink()
    code, out, errors = command("verify")
    assert code == 1 and "ok: " not in out and "ok, " in out  # the tokenizer is
    faults = [line for line in out.splitlines() if line.startswith(("ingest/", "conversations/"))]
    assert len(faults) == 3
    assert re.fullmatch(r"ingest/base/train/00000-000.tokens has SHA-256 \w{12} instead of \w{12}", faults[0])
    assert faults[1] == "ingest/base/val/rows.json is missing"
    assert faults[2] == f"conversations/sft/train/00000-000.mask has {size - 1:,} bytes instead of {size:,}"
    assert "--force ingest" in errors and "--force tokenizer" not in errors
    assert command("verify", "--stage", "tokenizer")[0] == 0


def test_verify_counts_an_unreadable_manifest_as_damage(store: RunStore, command: Command) -> None:
    (Path(store.stage("tokenizer").uri) / "manifest.json").write_text("{")
    code, out, errors = command("verify")
    assert code == 1 and "manifest.json is damaged: it is not valid JSON" in out and "--force tokenizer" in errors
    assert "ingest          ok, " in out


def test_damaged_rows_are_not_shown(store: RunStore, command: Command) -> None:
    flip(Path(store.stage("ingest").uri) / "base/train/00000-000.tokens")
    code, out, errors = command("inspect")
    assert code == 1 and "document" not in out and "00000-000.tokens" in errors and "--force" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "mid"], "run r has no rows in mid/train; conversations made sft/train"),
        (["--start", "5000"], "--start 5000: base/train has 2"),
        (["--seed", "1"], "--seed orders the rows of a training step: give --step too"),
        (["--split", "val", "--step", "1"], "only train rows make up steps"),
    ],
)
def test_a_mistake_is_one_message(command: Command, arguments: list[str], message: str) -> None:
    code, out, errors = command("inspect", *arguments)
    assert code == 1 and out == "" and errors.count("\n") == 1 and message in errors


def test_a_run_that_is_not_there_or_not_finished_says_how_far_it_is(store: RunStore, command: Command) -> None:
    for what in ("inspect", "verify"):
        code, _, errors = command(what, run="nope")
        assert code == 1 and errors.startswith("fathom data: no run 'nope'") and errors.count("\n") == 1
    manifests.remove(store.stage("ingest"))
    assert "(not running); go on with it: fathom run --name r" in command("inspect")[2]
    store.stage("ingest").write_json(PLAN, {"made_from": "x", "sources": "y", "shards": 8})
    for shard in (0, 3):
        store.stage("ingest").write_json(note_path(shard), {})
    store.stage("ingest").write_json("progress.json", {"state": "running", "step": 2, "steps": 8})
    assert "(not running, 2 of 8 shards done); go on" in command("inspect")[2]
    with store.claim():
        assert "(running, 2 of 8 shards done); wait for it" in command("verify", "--stage", "ingest")[2]
    store.stage("ingest").write_json("progress.json", {"state": "failed", "error": "the disk is full"})
    code, out, errors = command("inspect")
    assert code == 1 and out == "" and "failed, 2 of 8 shards done" in errors and "the disk is full" in errors
    assert command("verify")[0] == 0  # what is finished


def test_rows_of_another_tokenizer_are_not_decoded(store: RunStore, command: Command, tmp_path: Path) -> None:
    Tokenizer.train([*TEXTS, "other other other"], 280).save(tmp_path / "other")
    publish(store, "tokenizer", tmp_path / "other", {})
    code, _, errors = command("inspect")
    assert code == 1 and "another tokenizer" in errors and "--force ingest" in errors


def test_neither_torch_nor_ray_is_imported(store: RunStore, tmp_path: Path) -> None:
    storage = str(Path(store.storage.uri).parent)
    program = f"""
import sys
from pipeline.data import main
main(["inspect", "r", "--storage", {storage!r}, "--json"])
main(["verify", "r", "--storage", {storage!r}])
assert not {{"torch", "ray", "transformers", "matplotlib"}} & {{name.split(".")[0] for name in sys.modules}}
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True)
    assert result.returncode == 0, result.stderr
