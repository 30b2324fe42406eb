"""Planning backwards: from hours or dollars to a depth, and from FLOPs to a shape. Imports no torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from cluster.hardware import Gpus, parse_gpus
from models.spec import Family, ModelSpec
from pipeline import plan as planning
from pipeline.config import ConfigError
from stages.config import BUDGETS

DEPTHS = range(1, 65)
ASPECTS = (24, 160)  # width / layers; within, the loss hardly depends on it (arXiv 2001.08361, figure 5)
# The family, vocabulary, context and query heads to a key head that its name stands for in a search of shapes.
KINDS: dict[str, tuple[Family, int, int, int]] = {
    "depth": ("depth", 65_536, 2_048, 1),
    "gpt2": ("gpt2", 50_257, 1_024, 1),
    "llama": ("llama", 32_000, 4_096, 1),
    "llama2": ("llama", 32_000, 4_096, 1),
    "llama3": ("llama", 128_256, 8_192, 2),
    "qwen3": ("qwen3", 151_936, 4_096, 2),
}
FAMILIES = tuple(KINDS)
LISTED = 10
SETTLED = {"model.depth", "model.layers", "model.width", *(f"base.{name}" for name in BUDGETS)}  # by `deepest`


def wanted(args: argparse.Namespace) -> bool:
    """Whether a command line gives time or money and leaves the depth open."""
    return (args.hours is not None or args.budget_usd is not None) and args.depth is None and args.preset is None


def deepest(args: argparse.Namespace) -> dict[str, Any]:
    """The plan of the deepest model that fits the devices and that the whole run trains to its token target in the time
    there is, with `budget_hours`, `depth` and `neighbours`: models trained for just that time, with more or fewer
    tokens a parameter.

    Raises ConfigError where nothing does.
    """
    if args.gpus is None:
        raise ConfigError(
            "--hours and --budget-usd without --depth look for one, on devices: add --gpus, such as 8xH100"
        )
    for key in (text.partition("=")[0].strip() for text in args.set):
        if key in SETTLED:
            raise ConfigError(
                f"--set {key}: --hours and --budget-usd without --depth settle it; give --depth beside it"
            )
    gpus = parse_gpus(args.gpus)
    if args.usd_per_gpu_hour is None:
        args.usd_per_gpu_hour = args.usd_per_worker_hour
    hours = _hours(args, gpus)
    usd = args.budget_usd
    args.hours = args.budget_usd = None
    plans: dict[int, dict[str, Any]] = {}
    for depth in DEPTHS:
        args.depth = depth
        plans[depth] = found = planning.plan_from_args(args)
        if found["hours"]["total"] is None:
            raise ConfigError(
                "how fast a CPU trains is not known: add --calibrate FILE, see `fathom probe --json FILE`"
            )
    good = [d for d, p in plans.items() if p["fits"] and p["hours"]["total"] <= hours]
    if not good:
        first = plans[1]
        why = f"takes {first['hours']['total']:.2g} hours" if first["fits"] else "does not fit the memory"
        raise ConfigError(f"nothing can be trained in {hours:g} hours on {gpus.name}: even depth 1 {why}")
    best = max(good)
    return plans[best] | {
        "budget_hours": hours,
        "budget_usd": usd,
        "depth": best,
        "neighbours": [n for d in _around(best) if (n := _neighbour(args, d, hours, plans[best]))],
    }


def _hours(args: argparse.Namespace, gpus: Gpus) -> float:
    for flag, value in (("--hours", args.hours), ("--budget-usd", args.budget_usd)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{flag} {value:g}: must be above 0")
    if args.hours is not None and args.budget_usd is not None:
        raise ConfigError("give one of --hours and --budget-usd")
    if args.hours is not None:
        return float(args.hours)
    if args.usd_per_gpu_hour is None:
        raise ConfigError("--budget-usd needs --usd-per-gpu-hour, the price of one device an hour")
    planning.check(args.usd_per_gpu_hour, args.mfu)
    return float(args.budget_usd / (args.usd_per_gpu_hour * gpus.count))


def _around(depth: int) -> list[int]:
    step = max(1, round(depth / 10))
    return [d for d in (depth - step, depth + step) if d in DEPTHS]


def _neighbour(args: argparse.Namespace, depth: int, hours: float, best: dict[str, Any]) -> dict[str, Any] | None:
    """A model of another depth trained for the same time; None where it does not fit."""
    args.depth = depth
    found = planning.plan_from_args(args)
    if not found["fits"]:
        return None
    others = found["hours"]["total"] - found["hours"]["base"]
    tokens = max(0.0, hours - others) / found["hours"]["base"] * found["tokens"]
    if tokens < found["total_batch_size"]:
        return None
    ratio = tokens / found["parameters"]["total"]
    return {
        "depth": depth,
        "parameters": found["parameters"]["total"],
        "tokens": int(tokens),
        "tokens_per_parameter": ratio,
        "expected_loss": planning.expected_loss(found["parameters"]["total"], tokens, args.law),
    }


def neighbours_table(numbers: dict[str, Any]) -> str:
    total, tokens = numbers["parameters"]["total"], numbers["tokens"]
    lines = [f"budget               {numbers['budget_hours']:,.2f} hours: depth {numbers['depth']}"]
    this = {
        "depth": numbers["depth"],
        "parameters": total,
        "tokens_per_parameter": tokens / total,
        "expected_loss": numbers["expected_loss"],
    }
    for row in sorted([*numbers["neighbours"], this], key=lambda r: int(r["depth"])):
        trained = "" if row is this else ", trained for all of the time"
        lines.append(
            f"  depth {row['depth']:<12} {row['parameters'] / 1e9:.2f} B parameters, "
            f"{row['tokens_per_parameter']:.0f} tokens a parameter, expected loss {row['expected_loss']:.3f}{trained}"
        )
    return "\n".join(lines)


def shapes_for(flops: float, family: str, law: str = "hoffmann") -> list[dict[str, Any]]:
    """The shapes of a family with the lowest expected loss when trained for `flops`, best first.

    Every shape spends all of it, so tokens are flops / flops_per_token. Heads are of 128, or 64 in narrow models.
    Raises ConfigError for FLOPs that train nothing.
    """
    if not 1e12 <= flops < 1e30:
        raise ConfigError(f"--flops {flops:g}: must be between 1e12 and 1e30, such as 1.36e21")
    if law not in planning.LAWS:
        raise ConfigError(f"--law {law!r}: must be one of {', '.join(sorted(planning.LAWS))}")
    found: list[dict[str, Any]] = []
    for layers in range(2, 129, 2):
        for width in range(128, 16_385, 128):
            if ASPECTS[0] <= width / layers <= ASPECTS[1]:
                spec = _shape(family, layers, width)
                if spec is None:
                    continue
                tokens = flops / spec.flops_per_token
                found.append(
                    {
                        "layers": layers,
                        "width": width,
                        "heads": spec.heads,
                        "kv_heads": spec.kv_heads,
                        "ffn_width": spec.ffn_width,
                        "parameters": spec.parameters,
                        "tokens": int(tokens),
                        "tokens_per_parameter": tokens / spec.parameters,
                        "expected_loss": planning.expected_loss(spec.parameters, tokens, law),
                    }
                )
    return sorted(found, key=lambda row: float(row["expected_loss"]))[:LISTED]


def _shape(family: str, layers: int, width: int) -> ModelSpec | None:
    """None where the family's groups of heads do not divide."""
    kind, vocab_size, sequence_len, group = KINDS[family]
    spec = ModelSpec.from_dial(kind, 1, vocab_size, sequence_len, width)
    return replace(spec, layers=layers, kv_heads=spec.heads // group) if spec.heads % group == 0 else None


def shapes_table(rows: list[dict[str, Any]], flops: float) -> str:
    lines = [f"{flops:.3g} FLOPs", "  layers  width  heads  kv    ffn  parameters    tokens  a parameter   loss"]
    for r in rows:
        lines.append(
            f"  {r['layers']:>6} {r['width']:>6} {r['heads']:>6} {r['kv_heads']:>3} {r['ffn_width']:>6} "
            f"{r['parameters'] / 1e9:>9.3f} B {r['tokens'] / 1e9:>7.1f} B {r['tokens_per_parameter']:>12.1f} "
            f"{r['expected_loss']:>6.3f}"
        )
    return "\n".join(lines)
