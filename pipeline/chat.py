"""`fathom chat WHAT`: talk to a model, which may use the calculator. Without a terminal each line of the input is
answered.

WHAT is a run (its last model), RUN:STAGE, RUN:STAGE@STEP (a checkpoint), a Hugging Face directory, or hub:REPO.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.scratch import cache_folder
from models.generate import Sampling
from pipeline.model import find
from pipeline.sample import a_temperature, add_speaker_flags, sampling_of, seed_of
from pipeline.terminal import Terminal, say, stream
from serving.speaker import TEMPERATURE, Message, Speaker, StoppedError, open_engine

HELP = """\
/new              begin again, with nothing said
/undo             take the last question and its answer back
/retry            answer the last question anew
/temperature T    how freely it speaks: 0 says what is likeliest, 1 speaks as it has learned
/save FILE        write the conversation as a line of JSON, which `fathom run --chat FILE` trains on
/help             this
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
KEPT_LINES = 1_000  # of what was typed


@dataclass
class Conversation:
    """What was said, and what a line that was typed does to it. Answers go to `console`, what is no answer to `aside`;
    `stopped` says whether the answer that comes is no longer wanted."""

    speaker: Speaker
    console: Terminal
    aside: Terminal
    sampling: Sampling
    seed: int
    stopped: Callable[[], bool]
    messages: list[Message] = field(default_factory=list)
    left_out: int = 0
    answers: int = 0

    def take(self, line: str) -> None:
        """Answers what was typed, or does what it asks for. Raises ValueError or OSError, and then nothing has
        changed."""
        word, _, value = line.strip().partition(" ")
        if not line.strip():
            return
        if not (word.startswith("/") and word[1:].isalpha()):
            self._answer([*self.messages, {"role": "user", "content": line}])
            return
        if word not in COMMANDS:
            raise ValueError(f"there is no {word}; there are {', '.join(COMMANDS)}")
        COMMANDS[word](self, value.strip())

    def _answer(self, messages: list[Message]) -> None:
        """Keeps `messages`, which end with a question, with the answer to it, where there is one."""
        before = ""

        def told(kind: str, piece: str) -> None:
            nonlocal before
            if self.stopped():
                raise StoppedError
            if kind != before:
                stream(self.console, MARKS.get((before, kind), ""), "dim")
            before = kind
            stream(self.console, piece, "" if kind == "text" else "cyan")

        self.answers += 1
        parts, left_out = self.speaker.answer(messages, self.sampling, self.seed + self.answers, told)
        if before.startswith("python"):
            stream(self.console, "]", "dim")
        stream(self.console, "\n")
        if not parts:
            self._note("(no answer)")
            return
        if left_out > self.left_out:
            self._note(f"(the first {left_out} messages no longer fit into the context and are left out)")
        only_text = all(part["type"] == "text" for part in parts)
        content: Any = "".join(part["text"] for part in parts) if only_text else parts
        self.messages, self.left_out = [*messages, {"role": "assistant", "content": content}], left_out

    def _note(self, text: str) -> None:
        say(self.aside, text, "dim")

    def new(self, _: str) -> None:
        self.messages, self.left_out = [], 0

    def undo(self, _: str) -> None:
        if not self.messages:
            raise ValueError("nothing was said yet")
        self.messages = self.messages[:-2]
        self._note(f"({len(self.messages) // 2} questions are left)")

    def retry(self, _: str) -> None:
        if not self.messages:
            raise ValueError("nothing was asked yet")
        self._answer(self.messages[:-1])

    def temperature(self, value: str) -> None:
        if value:
            self.sampling = Sampling(a_temperature(value), self.sampling.top_p)
        self._note(f"(temperature {self.sampling.temperature:g})")

    def save(self, value: str) -> None:
        if not value or not self.messages:
            raise ValueError("nothing was said yet" if value else "/save FILE: name a file")
        path = Path(value).expanduser()
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        self._note(f"(saved: {path})")

    def help(self, _: str) -> None:
        self._note(HELP)


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/new": Conversation.new,
    "/undo": Conversation.undo,
    "/retry": Conversation.retry,
    "/temperature": Conversation.temperature,
    "/save": Conversation.save,
    "/help": Conversation.help,
}
# what stands between two parts of an answer: a call reads [19*7 = 133]
MARKS = {
    ("", "python"): "[",
    ("text", "python"): "[",
    ("python", "python"): "][",
    ("python", "text"): "]",
    ("python", "python_output"): " = ",
    ("python_output", "text"): "]",
    ("python_output", "python"): "][",
}


def typed(ask: Callable[[str], str]) -> str:
    """One message of what `ask` reads: a line, and more while lines end in a backslash. Raises EOFError at the end."""
    lines = [ask("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(ask(". "))
        except EOFError:
            break
    return "\n".join(lines)


def piped(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


class Interrupts:
    """Ctrl-C while an answer comes: it stops that, and nothing else."""

    pressed = False

    def __enter__(self) -> None:
        def press(*_: object) -> None:
            self.pressed = True

        self.pressed, self._before = False, signal.signal(signal.SIGINT, press)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


@contextlib.contextmanager
def remembered(history: Path) -> Iterator[None]:
    """Within it `input` knows the lines that were typed before, of which the last are kept."""
    import readline  # `input` then edits lines, which only a terminal needs

    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message, lines and all
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(KEPT_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it only helps
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.write_history_file(history)


def talk(conversation: Conversation, interrupts: Interrupts) -> None:
    """The conversation of a terminal, to its end."""
    while True:
        try:
            line = typed(input)
        except EOFError:
            stream(conversation.console, "\n")
            return
        except KeyboardInterrupt:  # what was typed is forgotten
            stream(conversation.console, "\n")
            continue
        try:
            with interrupts:
                conversation.take(line)
        except (ValueError, OSError) as error:
            say(conversation.aside, str(error), "red")


def answer_all(conversation: Conversation) -> int:
    """Answers every line of the input; 1 where one of them could not be."""
    status = 0
    while True:
        try:
            conversation.take(typed(piped))
        except EOFError:
            return status
        except (ValueError, FileExistsError, FileNotFoundError) as error:
            say(conversation.aside, str(error), "red")
            status = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom chat", description=__doc__)
    parser.add_argument("what", metavar="WHAT", help="the model: RUN, RUN:STAGE, RUN:STAGE@STEP, a directory, hub:REPO")
    add_speaker_flags(parser, TEMPERATURE)
    args = parser.parse_args(argv)
    sampling = sampling_of(args)
    model = find(args.what, args.storage)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    console = Terminal(highlight=False)
    aside = console if terminal else Terminal(stderr=True, highlight=False)
    directory = model.fetch()
    speaker = Speaker(directory, open_engine(directory, args.engine))
    if not speaker.chats:
        raise ValueError(f'{model.name} has not learned to chat; it goes on with text: fathom sample {args.what} "..."')
    interrupts = Interrupts()
    conversation = Conversation(speaker, console, aside, sampling, seed_of(args), lambda: interrupts.pressed)
    if not terminal:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        return answer_all(conversation)
    say(console, f"{model.name}, with a context of {speaker.context:,} tokens. /help says what else there is.", "dim")
    with remembered(cache_folder() / "chat_history"):
        talk(conversation, interrupts)
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["chat", *sys.argv[1:]]))
