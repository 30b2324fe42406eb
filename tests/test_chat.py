"""`fathom chat` and `fathom sample`, in a pipe and in a terminal, on a model that knows its answers by heart; and how
tokens are drawn for them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, environment
from taught import CALL, CONTEXT, HOSTILE, KNOWN, LETTERS, SUM, endless, parts, taught

from corpus.conversation import from_record, render
from corpus.tokenizers import DOCUMENT_ENDS, Tokenizer
from models.generate import Sampling, TorchEngine, shaped
from models.hf import from_pretrained
from pipeline import cli
from pipeline.terminal import plain
from serving.speaker import Say, Speaker, StoppedError
from stages.training.state import export

SHOWN = "So [12*34 = 408]#### 408"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taught")
    taught(path)
    return path


@pytest.fixture(scope="module")
def speaker(model: Path) -> Speaker:
    return Speaker(model, TorchEngine(model, on_gpu=False))


def asked(question: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}]


@dataclass
class Piped:
    """A command in this process whose input is no terminal."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *command: object, lines: str = "") -> tuple[int, str, str]:
        """Its exit status, stdout and stderr."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = cli.main([*map(str, command)])
        return code, *self.capsys.readouterr()


@pytest.fixture
def piped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Piped:
    return Piped(capsys, monkeypatch)


@pytest.mark.parametrize("question", KNOWN)
def test_an_answer_comes_in_whole_letters_and_in_parts(speaker: Speaker, question: str) -> None:
    """The pieces are the answer, none with a piece of a letter, and say which part they are of."""
    pieces: list[tuple[str, str]] = []
    said, left_out = speaker.answer(asked(question), GREEDY, 0, lambda kind, piece: pieces.append((kind, piece)))
    assert said == parts(KNOWN[question]) and left_out == 0
    assert [kind for kind in dict.fromkeys(kind for kind, _ in pieces)] == list(
        dict.fromkeys(k for k, _ in KNOWN[question])
    )
    assert "".join(piece for _, piece in pieces) == "".join(text for _, text in KNOWN[question])
    assert len(pieces) > 3 and not any("\ufffd" in piece for _, piece in pieces)


def stopping_after(pieces: int) -> Say:
    left = iter(range(pieces))

    def told(kind: str, piece: str) -> None:
        if next(left, None) is None:
            raise StoppedError

    return told


def test_an_answer_may_be_stopped_anywhere(speaker: Speaker) -> None:
    """What was said until then is the answer, without a call that has no result; the next one is whole."""
    whole = "".join(text for _, text in CALL)
    for pieces in range(8):
        said, _ = speaker.answer(asked(SUM), GREEDY, 0, stopping_after(pieces))
        assert whole.startswith("".join(part["text"] for part in said))
        assert not said or said[-1]["type"] != "python"
    assert speaker.answer(asked(SUM), GREEDY, 0, lambda *_: None)[0] == parts(CALL)


def test_the_oldest_messages_are_left_out_where_the_context_is_full(speaker: Speaker) -> None:
    """And nothing else: the last question is answered as if it stood alone; one that is too long itself is refused."""
    before = [{"role": role, "content": "qwertyzxk " * 6} for role in ("user", "assistant") * 2]
    said, left_out = speaker.answer([*before, *asked(SUM)], GREEDY, 0, lambda *_: None)
    assert left_out == 4 and said == parts(CALL)
    with pytest.raises(ValueError, match=f"context of {CONTEXT} keeps {CONTEXT // 4} for the answer"):
        speaker.answer(asked("qwertyzxk " * 40), GREEDY, 0, lambda *_: None)


def test_tokens_are_drawn_by_temperature_and_from_the_nucleus(speaker: Speaker) -> None:
    """As often as they should be, by the definition of each; a chat and RL's own sampling share a batch unharmed."""
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    warm, cold = Sampling(temperature=0.5), Sampling(temperature=1.0, top_p=0.7)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025]).double()
    torch.testing.assert_close(shaped(logprobs, warm), squares / squares.sum(), atol=1e-6, rtol=0)
    assert shaped(logprobs, cold).count_nonzero() == 2 and shaped(logprobs, Sampling(1.0, 0.01)).count_nonzero() == 1
    assert shaped(logprobs, Sampling(2.0)).count_nonzero() == 4
    prompt, engine = [1, 2, 3], speaker.engine
    assert isinstance(engine, TorchEngine)
    with torch.no_grad():
        alone = engine.model.logits(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    sampler, kinds = engine.sampler([], 8), [Sampling(0.6, 0.9), Sampling()]
    for key in range(1_000):
        sampler.add(key, prompt, 1, key, kinds[key % 2])
    while len(drawn[0] + drawn[1]) < 1_000:
        for key, [token], _ in sampler.step():
            drawn[key % 2].append(token)
    for kind, tokens in drawn.items():
        assert len(tokens) == 500
        expected = shaped(alone, kinds[kind])
        expected = (expected / expected.sum()).numpy()
        counts = np.bincount(tokens, minlength=len(expected))
        assert (np.abs(counts - 500 * expected) < 5 * np.sqrt(500 * expected) + 1).all()
        assert counts[expected == 0].sum() == 0


def test_lines_of_a_pipe_are_answered(model: Path, tmp_path: Path, piped: Piped) -> None:
    """One after the other, with nothing else among the answers; what is saved is a conversation to train on."""
    file = tmp_path / "saved.jsonl"
    lines = f"{SUM}\n\n/retry\n/save {file}\n/new\nhostile?\n/undo\nletters?\n/help\n/temperature\n"
    code, out, told = piped("chat", model, "--temperature", "0", lines=lines)
    assert code == 0, told
    assert out == f"{SHOWN}\n{SHOWN}\n{plain(HOSTILE)}\n{LETTERS}\n"
    assert "(temperature 0)" in told and "/retry" in told
    saved = json.loads(file.read_text())
    assert saved["messages"] == [*asked(SUM), {"role": "assistant", "content": parts(CALL)}]
    _, mask = render(from_record(saved), Tokenizer.load(model), CONTEXT)
    assert mask.any()


def test_what_cannot_be_done_is_told_and_the_conversation_goes_on(model: Path, tmp_path: Path, piped: Piped) -> None:
    (tmp_path / "there").touch()
    wrong = ["/sav x", "/undo", "/retry", "/temperature warm", "/save x", "qwertyzxk " * 40]
    lines = [*wrong, SUM, f"/save {tmp_path}/there", f"/save {tmp_path}/no/folder", ""]
    code, out, told = piped("chat", model, "--temperature", "0", lines="\n".join(lines))
    assert code == 1 and out == f"{SHOWN}\n"
    faults = ["no /sav", "nothing was said", "nothing was asked", "warm is no number", "nothing was said"]
    faults += ["fewer words", "File exists", "No such file"]
    for fault, line in zip(faults, told.splitlines(), strict=True):
        assert fault in line


def test_the_same_seed_says_the_same(model: Path, piped: Piped) -> None:
    said = [piped("sample", model, "Tom", "--seed", seed, "--max-tokens", 20)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("Tom") and said[0].endswith("\n")


def test_base_goes_on_with_text_and_does_not_chat(model: Path, tmp_path: Path, piped: Piped) -> None:
    export(from_pretrained(model), Tokenizer.load(model), tmp_path / "base", DOCUMENT_ENDS)
    code, out, _ = piped("sample", tmp_path / "base", "-n", 3, "--max-tokens", 4, "--temperature", 0)
    texts = re.split(r"--- \d of 3\n", out)[1:]
    assert code == 0 and len(texts) == 3 and len(set(texts)) == 1, "what is likeliest is the same every time"
    code, _, told = piped("chat", tmp_path / "base")
    assert code == 1 and "has not learned to chat" in told and "fathom sample" in told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "3"], "temperature 3 is no number from 0 to 2"),
        (["--top-p", "0"], "--top-p 0 is no number from 0.01 to 1"),
        (["-n", "0"], "-n 0: from 1"),
        (["--max-tokens", "0"], "--max-tokens 0: at least 1"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
        (["--engine", "vllm"], "there is no GPU here; take --engine torch"),
    ],
)
def test_flags_out_of_range_are_told(model: Path, flags: list[str], said: str, piped: Piped) -> None:
    if torch.cuda.is_available() and "vllm" in flags:
        pytest.skip("there is a GPU here")
    code, _, told = piped("sample", model, "Tom", *flags)
    assert code == 1 and said in told


class Screen:
    """`fathom chat` in a terminal of its own, with what it shows."""

    def __init__(self, model: Path, home: Path) -> None:
        self.shown = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            command = [sys.executable, "-m", "pipeline.chat", str(model), "--temperature", "0"]
            os.execve(sys.executable, command, environment(HOME=str(home), TERM="xterm", LANG="C.UTF-8"))

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown up to the next `text`, which is taken off the screen."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                self.shown += os.read(self.terminal, 65_536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def prompted(self, prompt: str = "> ", seconds: float = 60) -> str:
        """What is shown up to the next prompt, before which readline asks for pasted text to be marked. So the same
        letters within an answer are no prompt."""
        return self.until(f"\x1b[?2004h{prompt}", seconds)

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_in_a_terminal(model: Path, tmp_path: Path) -> None:
    """Streamed, with colours that are ours alone; lines are edited and remembered, pasted ones are one message, Ctrl-C
    takes back what was typed, and Ctrl-D ends it."""
    screen = Screen(model, tmp_path)
    try:
        screen.prompted()
        screen.type(f"{SUM}\r")
        screen.until("#### 408")
        screen.prompted()
        screen.type("half\x03")
        screen.prompted()
        screen.type("/new\r")
        screen.prompted()
        screen.type("\x1b[A\x1b[A\r")  # what was asked before
        screen.until("#### 408")
        screen.prompted()
        screen.type("/new\r")
        screen.prompted()
        screen.type("hostile?\r")
        screen.until("hostile?")
        shown = screen.prompted()
        colours = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?2004[hl]|\r\n|\r")
        assert plain(HOSTILE) in shown and plain(colours.sub("", shown)) == colours.sub("", shown)
        screen.type("\x1b[200~one\ntwo\x1b[201~\r")
        screen.until("two")
        screen.prompted()
        screen.type("letters\\\r")
        screen.prompted(". ")
        screen.type("?\r")
        screen.prompted()
        screen.type(f"/save {tmp_path}/saved.jsonl\r")
        screen.prompted()
        screen.type("\x04")
        assert screen.end() == 0
    finally:
        os.close(screen.terminal)
    messages = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked == ["hostile?", "one\ntwo", "letters\n?"]
    history = tmp_path / ".cache/fathom/chat_history"
    assert SUM in history.read_text() and history.stat().st_mode & 0o77 == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(model: Path, tmp_path: Path) -> None:
    """What was said until then stays said."""
    screen = Screen(endless(model, tmp_path / "endless", 8_192), tmp_path)
    try:
        screen.prompted()
        screen.type(f"{SUM}\r")
        screen.until("408")
        screen.type("\x03")
        screen.prompted(seconds=10)
        screen.type(f"/save {tmp_path}/saved.jsonl\r")
        screen.prompted()
        screen.type("\x04")
        assert screen.end() == 0
    finally:
        os.close(screen.terminal)
    _, answer = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert answer["content"][:3] == parts(CALL)[:3]
    assert len(Tokenizer.load(model).encode("".join(part["text"] for part in answer["content"]))) < 4_000
