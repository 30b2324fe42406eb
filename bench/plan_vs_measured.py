"""The planner against this machine: `python -m bench.plan_vs_measured [--out FILE]`.

Every specification trains for some steps in a process of its own, as `fathom probe` measures, once a round; of the
rounds the median speed counts, as other load comes and goes. Peak memory is compared with what the plan predicts. Some
specifications calibrate the planner's time, and the speed of the others is compared with what it then predicts. The
file it writes is one for `fathom plan --calibrate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.report import hardware_name, write
from cluster.hardware import Gpus, find, machine_memory
from models.spec import Family, ModelSpec
from pipeline.memory import GB, Layout, memory
from pipeline.probe import MODULE, run_alone
from pipeline.timing import Calibration, point_of, rate
from stages.config import TrainConfig
from stages.training.parallel import computes_in

SECONDS = 900.0  # for one specification


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; `calibrates` the planner's time, or is predicted from those that do."""

    depth: int
    device_batch_size: int
    family: Family = "depth"
    grad_accum_steps: int = 1
    compile: bool = False
    checkpointing: str = "none"
    calibrates: bool = False

    @property
    def name(self) -> str:
        how = f"{self.device_batch_size} rows" + (f" x {self.grad_accum_steps}" if self.grad_accum_steps > 1 else "")
        ways = ["compiled" if self.compile else "eager"]
        ways += [f"{self.checkpointing} checkpointing"] if self.checkpointing != "none" else []
        return f"{self.family} {self.depth}, {how}, {', '.join(ways)}"


CASES = {
    "cpu": (
        Case(3, 8, calibrates=True),
        Case(4, 8),
        Case(6, 8),
        Case(8, 8, calibrates=True),
        Case(6, 8, "llama", grad_accum_steps=2),
        Case(6, 8, "gpt2", checkpointing="full"),
        Case(6, 8, "qwen3"),
        Case(4, 16, compile=True, calibrates=True),
        Case(6, 8, compile=True, checkpointing="selective"),
        Case(8, 8, compile=True, calibrates=True),
    ),
    "cuda": (
        Case(12, 32, compile=True, calibrates=True),
        Case(14, 32, compile=True),
        Case(16, 16, compile=True, grad_accum_steps=2),
        Case(18, 32, compile=True, checkpointing="selective"),
        Case(20, 16, compile=True, calibrates=True),
        Case(16, 16, "llama", compile=True),
    ),
}
SHAPES = {"cpu": (8_192, 512), "cuda": (65_536, 2_048)}  # vocabulary, context


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.plan_vs_measured", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed, after the warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="times that every specification is measured")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1:
        parser.error("--steps and --rounds must be above 0")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    vocab_size, sequence_len = SHAPES[kind]
    specs = {c: ModelSpec.from_dial(c.family, c.depth, vocab_size, sequence_len) for c in CASES[kind]}
    print(f"{hardware_name()}, torch {torch.__version__}: vocabulary {vocab_size:,}, {sequence_len} tokens a row")
    measured: dict[Case, list[dict[str, Any]]] = {case: [] for case in specs}
    for i in range(args.rounds):
        for case, spec in specs.items():
            measured[case].append(measured_alone(case, spec, args.steps))
            print(f"round {i + 1}: {case.name}, {measured[case][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    rows = [row_of(case, specs[case], found) for case, found in measured.items()]
    calibration = Calibration(tuple(point_of(row) for row in rows if row["calibrates"]))
    for case, row in zip(measured, rows, strict=True):
        row |= predicted(case, specs[case], kind, calibration)
    print(f"{'':<52}{'memory, GB':>22}{'':>8}{'tokens/s':>20}")
    print(f"{'':<52}{'measured':>11}{'planned':>11}{'error':>8}{'measured':>10}{'planned':>10}{'error':>8}")
    for row in rows:
        off = {k: row[f"predicted_{k}"] / row[k] - 1 for k in ("memory_gb", "tokens_per_second")}
        row["memory_error"], row["time_error"] = off["memory_gb"], 1 / (1 + off["tokens_per_second"]) - 1
        time_error = "given" if row["calibrates"] else f"{row['time_error']:+.1%}"
        print(
            f"{row['case']:<52}{row['memory_gb']:>11.2f}{row['predicted_memory_gb']:>11.2f}"
            f"{row['memory_error']:>+8.1%}{row['tokens_per_second']:>10,.0f}"
            f"{row['predicted_tokens_per_second']:>10,.0f}{time_error:>8}"
        )
    for what, errors in (
        ("memory", [abs(r["memory_error"]) for r in rows]),
        ("time, of those predicted", [abs(r["time_error"]) for r in rows if not r["calibrates"]]),
    ):
        print(f"{what}: off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most")
    if args.out:
        write("plan_vs_measured", rows, args.out)


def training(case: Case, sequence_len: int) -> TrainConfig:
    batch = case.device_batch_size * case.grad_accum_steps * sequence_len
    values = asdict(case)
    fields = {k: values[k] for k in ("device_batch_size", "compile", "checkpointing")}
    return TrainConfig(total_batch_size=batch, **fields)


def measured_alone(case: Case, spec: ModelSpec, steps: int) -> dict[str, Any]:
    """What `stages.training.measure` found in a process of its own; SystemExit where it failed."""
    config = training(case, spec.sequence_len)
    with tempfile.TemporaryDirectory(prefix="fathom-plan-") as directory:
        request = Path(directory) / "case.json"
        cpus = len(os.sched_getaffinity(0))
        values = {"spec": asdict(spec), "config": config.model_dump(), "steps": steps, "cpus": cpus, "limit": SECONDS}
        request.write_text(json.dumps(values))
        failed = run_alone([sys.executable, "-m", MODULE, str(request)], request.with_suffix(".log"), SECONDS)
        error = request.with_suffix(".error")
        if failed:
            raise SystemExit(f"{case.name}: {error.read_text().strip() if error.exists() else failed}")
        found: dict[str, Any] = json.loads(request.with_suffix(".answer").read_text())
    if found["device_batch_size"] != case.device_batch_size:
        raise SystemExit(f"{case.name}: out of memory, trains with device_batch_size {found['device_batch_size']}")
    return found


def row_of(case: Case, spec: ModelSpec, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What is measured of a case, in the form that `fathom plan --calibrate` reads: the round of the median speed,
    of two the slower, and the largest memory of all."""
    median = sorted(rounds, key=lambda found: float(found["tokens_per_second"]))[(len(rounds) - 1) // 2]
    figures = {k: median[k] for k in ("tokens_per_second", "step_ms", "of_product")}
    figures["memory_gb"] = max(found["memory_gb"] for found in rounds)
    return {"case": case.name, "model": asdict(spec), **asdict(case), "workers": 1, **figures}


def predicted(case: Case, spec: ModelSpec, kind: str, calibration: Calibration) -> dict[str, float]:
    """What the planner says of the case."""
    hardware = find(torch.cuda.get_device_name()) if kind == "cuda" else None
    available = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else machine_memory()
    config = training(case, spec.sequence_len)
    layout = Layout(
        device_batch_size=case.device_batch_size,
        grad_accum_steps=case.grad_accum_steps,
        world=1,
        parallel="ddp",
        checkpointing=case.checkpointing,
        compiled=case.compile,
        optimizer=config.optimizer,
        precision=computes_in(torch.device(kind), config.precision),
        kind=kind,
    )
    achieved = rate(spec, Gpus(1, hardware, available), layout.precision, case.compile, calibration=calibration)
    assert achieved is not None
    return {
        "predicted_memory_gb": memory(spec, layout).total / GB,
        "predicted_tokens_per_second": achieved.tokens_per_second(spec, layout),
    }


if __name__ == "__main__":
    main()
