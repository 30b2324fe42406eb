"""`fathom plan`: what a configuration amounts to, before anything is spent. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys

from pipeline.config import Config, ConfigError, add_config_flags, config_from_args
from pipeline.scaling import grad_accum_steps, model_spec


def plan(config: Config) -> dict[str, int]:
    """Base training in numbers: parameters, tokens, optimizer steps, micro-batches a step, FLOPs."""
    spec, base = model_spec(config), config.base
    if base.steps is None or base.total_batch_size is None:
        raise ConfigError("base.steps and base.total_batch_size are not derived: use load_config")
    tokens = base.steps * base.total_batch_size
    return {
        "parameters": spec.parameters,
        "tokens": tokens,
        "steps": base.steps,
        "grad_accum_steps": grad_accum_steps(
            base.total_batch_size, spec.sequence_len, base.device_batch_size, config.workers, "base"
        ),
        "flops_per_token": spec.flops_per_token,
        "total_flops": spec.flops_per_token * tokens,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom plan", description=__doc__)
    add_config_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        numbers = plan(config_from_args(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(numbers, indent=1))
    else:
        for name, value in numbers.items():
            print(f"{name:<18} {value:>28,}")
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["plan", *sys.argv[1:]]))
