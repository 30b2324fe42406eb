"""`fathom presets`: every named run, its size, hardware, hours and cost; with a name or file all that is known of
one."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.config import load_config, preset_about, preset_names
from pipeline.plan import default_gpus, plan
from pipeline.terminal import TOGETHER, Terminal, say, show


def described(name: str) -> dict[str, Any]:
    """A preset in JSON values: its size, and its plan on the hardware and at the price it names (None for what that
    cannot know, such as the hours of a CPU), then what its [about] says."""
    config, about = load_config(name), preset_about(name)
    numbers = plan(config, default_gpus(config), about.usd_per_gpu_hour)
    return {
        "name": name,
        "parameters": numbers["parameters"]["total"],
        "tokens": numbers["tokens"],
        "fits": numbers["fits"],
        "hours": numbers["hours"]["total"],
        "cost_usd": numbers["cost_usd"],
        **about.model_dump(),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or with --json a list of what `described` gives; raises ConfigError for an unknown name."""
    parser = argparse.ArgumentParser(prog="fathom presets", description=__doc__)
    parser.add_argument(
        "name", nargs="?", metavar="NAME|FILE", help="one preset in full, with its source and corrections"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    presets = [described(name) for name in ([args.name] if args.name else preset_names())]
    presets.sort(key=lambda preset: preset["parameters"])
    if args.json:
        print(json.dumps(presets, indent=1))
        return 0
    console, lines, table = Terminal(), [], Table(box=None, pad_edge=False)
    for column in ("preset", "parameters", "tokens", "hardware", "hours", "cost", "what it is for"):
        right = column in ("parameters", "tokens", "hours", "cost")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for preset in presets:
        tokens, hours, cost = (preset[key] for key in ("tokens", "hours", "cost_usd"))
        parameters, gpus, purpose = f"{preset['parameters']:,}", preset["gpus"], preset["purpose"]
        tokens = "" if tokens is None else f"{tokens / 1e6:,.2f} M"
        hours, cost = "" if hours is None else f"{hours:,.1f}", "" if cost is None else f"${cost:,.0f}"
        table.add_row(Text(preset["name"]), parameters, tokens, Text(gpus), hours, cost, Text(purpose))
        sizes = [f"{parameters} parameters", tokens and f"{tokens} tokens", gpus, hours and f"{hours} hours", cost]
        sizes = [size.replace(" ", TOGETHER) for size in sizes if size]
        lines += [f"{preset['name']}: {purpose or 'your own'}", f"  {', '.join(sizes)}"]
    show(console, table, lines)
    if args.name:
        (preset,) = presets
        if preset["source"]:
            say(console, f"\nsource: {preset['source']}")
        for title in ("corrections", "notes", "tiers"):
            if preset[title]:
                say(console, "\n".join([f"\n{title}:", *(f"  - {line}" for line in preset[title])]))
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["presets", *sys.argv[1:]]))
