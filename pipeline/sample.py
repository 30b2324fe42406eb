"""`fathom sample WHAT [TEXT]`: how a model goes on with a text, a model of base as well; without TEXT it begins one.

WHAT is a run (its last model), RUN:STAGE, RUN:STAGE@STEP (a checkpoint), a Hugging Face directory, or hub:REPO.
"""

from __future__ import annotations

import argparse
import secrets
import sys

from models.generate import Sampling
from pipeline.config import add_storage_flag
from pipeline.model import find
from pipeline.terminal import Terminal, stream
from serving.speaker import Speaker, open_engine

HIGHEST = 2.0  # temperature
MOST_SAMPLES = 256


def a_temperature(value: str) -> float:
    """Raises ValueError for what is none."""
    return _number("temperature", value, HIGHEST)


def _number(name: str, value: str, most: float, least: float = 0.0) -> float:
    try:
        number = float(value)
        if not least <= number <= most:
            raise ValueError
    except ValueError:
        raise ValueError(f"{name} {value} is no number from {least:g} to {most:g}") from None
    return number


def add_speaker_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """What `fathom chat` has, too."""
    parser.add_argument(
        "--temperature", metavar="T", default=f"{temperature:g}", help="0: what is likeliest (default %(default)s)"
    )
    parser.add_argument(
        "--top-p", metavar="P", default="1", help="draw from the likeliest tokens that have this share (default 1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed says the same (default: drawn)")
    parser.add_argument(
        "--engine", choices=("auto", "vllm", "torch"), default="auto", help="auto: vllm where there is a GPU"
    )
    add_storage_flag(parser)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """By the flags; ValueError where they are out of range."""
    return Sampling(a_temperature(args.temperature), _number("--top-p", args.top_p, 1.0, least=0.01))


def seed_of(args: argparse.Namespace) -> int:
    if args.seed is None:
        return secrets.randbits(31)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must not be negative")
    return int(args.seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom sample", description=__doc__)
    parser.add_argument("what", metavar="WHAT", help="the model: RUN, RUN:STAGE, RUN:STAGE@STEP, a directory, hub:REPO")
    parser.add_argument("text", metavar="TEXT", nargs="?", default="", help="what to go on with")
    parser.add_argument("-n", dest="samples", type=int, default=1, help="how often, each time anew (default 1)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens to write at most (default 256)")
    add_speaker_flags(parser, 1.0)
    args = parser.parse_args(argv)
    sampling, seed = sampling_of(args), seed_of(args)
    if not 1 <= args.samples <= MOST_SAMPLES:
        raise ValueError(f"-n {args.samples}: from 1 to {MOST_SAMPLES} at a time")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens}: at least 1")
    directory = find(args.what, args.storage).fetch()
    speaker = Speaker(directory, open_engine(directory, args.engine))
    console = Terminal(highlight=False)

    def told(piece: str) -> None:
        if args.samples == 1:
            stream(console, piece)

    told(args.text)
    texts = speaker.go_on(args.text, args.samples, sampling, seed, args.max_tokens, told)
    told("\n")
    for i, text in enumerate(texts if args.samples > 1 else (), start=1):
        stream(console, f"--- {i} of {args.samples}\n", "dim")
        stream(console, f"{args.text}{text}\n")
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["sample", *sys.argv[1:]]))
