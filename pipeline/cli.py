"""`fathom COMMAND` and `python -m pipeline.COMMAND`: one way in, one way for an error out."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from itertools import pairwise

COMMANDS = {
    "run": "train: every stage from raw text to reinforcement learning",
    "plan": "what a run needs, how long it takes and what it costs",
    "presets": "every named run: what it is for, its size, hardware, hours and cost",
    "probe": "measure settings on this machine: the fastest, and how long base takes with it",
    "evaluate": "measure models: CORE, ChatCORE, perplexity; several side by side",
    "chat": "talk to a model, which may use the calculator",
    "sample": "how a model goes on with a text",
    "serve": "a model behind OpenAI's API, and a page to chat at",
    "export": "give a model away: a folder, or a repository of the hub, that other programs load",
    "tokenizer": "how well a run's tokenizer compresses each kind of text",
    "status": "the stages of a run, finished or not",
    "runs": "which runs there are, how far each is and how good",
    "report": "what a run made and what it cost, as one page; several runs laid over each other",
    "track": "show a run in wandb or TensorBoard, finished or not",
    "data": "look at the rows of a run, and hash its files again",
    "doctor": "check that this machine can run Fathom",
}
HELP = "usage: fathom COMMAND [options]\n\n" + "".join(f"  {name:<11}{what}\n" for name, what in COMMANDS.items())


def refuse_empty(name: str, arguments: Sequence[str]) -> None:
    """Raises ValueError for an argument without a value, which as a path would be the current folder."""
    from cluster.storage import EMPTY

    for before, argument in pairwise([name, *arguments]):
        flag, mark, value = argument.partition("=")
        if not argument.strip():
            raise ValueError(f"what follows {before} {EMPTY}")
        if flag.startswith("--") and mark and not value.strip():
            raise ValueError(f"{flag}= {EMPTY}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; 2 when there is no such command.

    A user's error is one message and status 1, with `--debug` a traceback; Ctrl-C gives 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        if arguments:
            print(f"fathom: there is no command {arguments[0]!a}", file=sys.stderr)
        print(HELP, end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    from cluster.storage import refuse_credentials  # not needed for the help
    from pipeline.terminal import PlainFormatter, plain

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does, whatever the terminal's encoding lacks
    warnings = logging.StreamHandler()
    warnings.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if "--debug" in rest else logging.WARNING, handlers=[warnings])
    command = importlib.import_module(f"pipeline.{name}")
    try:
        for argument in rest:
            refuse_credentials(argument)
        refuse_empty(name, rest)
        status = int(command.main(rest))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"fathom {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        from pipeline.faults import is_users

        if "--debug" in rest or not is_users(error):
            raise
        print(plain(f"fathom {name}: {error}"), file=sys.stderr)
        return 1
