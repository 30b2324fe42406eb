"""`fathom probe`: some tens of steps of base at each of several settings on this machine, and what they come to.

The device batches are tried first, at the first of the other settings, and those then at the fastest batch. Every
setting runs in a process of its own (under torchrun with several workers), so one that runs out of memory or crashes
costs a row. A step is measured with one or two micro-batches and stretched to as many as base has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipeline.config import Config, ConfigError, Parser, add_config_flags, config_from_args
from pipeline.scaling import grad_accum_steps
from pipeline.terminal import Terminal, say, show
from pipeline.tracking import duration
from stages.config import TrainConfig

MODULE = "stages.training.measure"
MEASURED_MICRO_BATCHES = 2  # with two, gradients lie beside the activations, as they do with more
PATIENCE = 2  # larger device batches in a row that are no faster, before still larger ones are left out
GRACE_SECONDS = 40.0  # torchrun gives its workers 30 to end
ONE_ROW = "one row at a time"  # what training says when no smaller micro-batch is left
COMPILE = {"on": True, "off": False}
PER_MICRO_BATCH = ("data_share", "forward_backward_share")


@dataclass(frozen=True)
class Setting:
    """What a probe varies; the fields are those of `base`."""

    device_batch_size: int
    compile: bool
    checkpointing: str
    attention: str
    parallel: str


@dataclass(frozen=True)
class Row:
    """A setting and what base would do with it: `step_ms` and `tokens_per_second` at base's own accumulation. Without
    figures where `reason` says why there are none. `measured` is what the process measured."""

    setting: Setting
    reason: str | None = None
    grad_accum_steps: int = 0
    step_ms: float | None = None
    tokens_per_second: float = 0.0
    hours: float | None = None
    mfu: float | None = None
    of_product: float | None = None
    memory_gb: float | None = None
    measured: dict[str, Any] | None = None

    @property
    def short_of_memory(self) -> bool:
        return self.reason is not None and "out of memory" in self.reason


@dataclass(frozen=True)
class Machine:
    """What `hardware` of stages.training.measure found."""

    hardware: str
    kind: str
    devices: int
    torch: str

    def named(self, workers: int) -> str:
        return f"{workers} x {self.hardware}" if self.kind == "cuda" else f"{self.hardware}, {workers} worker(s)"


def full_step_ms(step_ms: float, shares: dict[str, float], measured: int, micro_batches: int) -> float:
    """A step of `micro_batches` from one of `measured`: reading, forward and backward recur, the rest does not."""
    recurring = sum(shares.get(name, 0.0) for name in PER_MICRO_BATCH)
    return step_ms * (1 + recurring * (micro_batches / measured - 1))


def base_run(config: Config, tokens_per_second: float) -> dict[str, float]:
    """Steps, tokens and hours of base at this speed, and dollars where a price is given."""
    base, batch = config.base, config.base.total_batch_size
    assert batch is not None
    workers = config.workers[1]
    price = base.usd_per_worker_hour * workers if base.usd_per_worker_hour else None
    if base.steps is not None:
        steps = base.steps
        hours = steps * batch / tokens_per_second / 3600
    else:
        hours = base.budget_usd / price if base.budget_usd and price else base.hours or 0.0
        steps = int(hours * 3600 * tokens_per_second / batch)
    run: dict[str, float] = {"steps": steps, "tokens": steps * batch, "hours": hours}
    return run | ({"usd": hours * price} if price else {})


def rows_of_a_rank(config: Config) -> int:
    """Rows a worker has in a step of base; the most, where they do not divide among MIN:MAX workers."""
    assert config.base.total_batch_size is not None
    return math.ceil(config.base.total_batch_size // config.model.sequence_len / config.workers[1])


def default_batches(configured: int, rows: int, divide: bool) -> list[int]:
    """The configured device batch and the powers of two from a quarter to four times it, as far as they fit `rows`."""
    powers = (2**n for n in range(rows.bit_length()))
    near = [n for n in powers if configured <= 4 * n <= 16 * configured and (rows % n == 0 or not divide)]
    return sorted({configured, *near})


class Probe:
    """Measures settings of one configuration on one machine until the time is up. `rows` are the results so far."""

    def __init__(self, config: Config, machine: Machine, steps: int, seconds: float, directory: Path) -> None:
        self.config, self.machine, self.steps, self.directory = config, machine, steps, directory
        self.deadline = time.monotonic() + seconds
        self.rows: list[Row] = []

    @property
    def best(self) -> Row | None:
        """The fastest."""
        return max((r for r in self.rows if r.reason is None), key=lambda r: r.tokens_per_second, default=None)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def sweep(self, batches: Sequence[int], others: Sequence[Setting], defaults: bool) -> Iterator[Row]:
        """The device batches at the first of `others` that works, then the rest of `others` at the fastest batch."""
        for setting in others:
            if best := self.best:
                yield self.measure(replace(setting, device_batch_size=best.setting.device_batch_size))
            else:
                yield from self._batches(batches, setting, defaults)

    def _batches(self, batches: Sequence[int], setting: Setting, defaults: bool) -> Iterator[Row]:
        """Upwards, to the first that fails. With `defaults`, those above `PATIENCE` slower ones are left out, too, and
        where not even the smallest has the memory, smaller ones are tried."""
        slower = 0
        for n in sorted(batches):
            before = self.best
            yield (row := self.measure(replace(setting, device_batch_size=n)))
            slower = slower + 1 if before and self.best is before else 0
            if row.reason is not None or (defaults and slower >= PATIENCE):
                break
        n, rows = min(batches), rows_of_a_rank(self.config)
        while defaults and self.best is None and self.rows[-1].short_of_memory and n > 1:
            if ONE_ROW in str(self.rows[-1].reason):
                break
            kept = self.rows[-1].measured or {"device_batch_size": n // 2}
            n = next(d for d in range(kept["device_batch_size"], 0, -1) if rows % d == 0)
            yield self.measure(replace(setting, device_batch_size=n))

    def measure(self, setting: Setting) -> Row:
        """One setting, in processes of its own that are gone afterwards."""
        workers, accumulation = (
            self.config.workers[1],
            math.ceil(rows_of_a_rank(self.config) / setting.device_batch_size),
        )
        micro_batches = min(MEASURED_MICRO_BATCHES, accumulation)
        sequence_len = self.config.model.sequence_len
        base = self.config.base.model_dump(include=set(TrainConfig.model_fields))
        batch = setting.device_batch_size * micro_batches * workers * sequence_len
        request = self.directory / f"{len(self.rows)}.json"
        values = {
            "spec": asdict(self.config.model.spec()),
            "config": base | asdict(setting) | {"total_batch_size": batch},
            "steps": self.steps,
            "cpus": len(os.sched_getaffinity(0)),
            "limit": self.seconds_left / 2,  # so that something is left for the others
        }
        request.write_text(json.dumps(values))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        command = [sys.executable, *(torchrun if workers > 1 else []), "-m", MODULE, str(request)]
        failed = run_alone(command, request.with_suffix(".log"), max(1.0, self.seconds_left))
        answer, error = request.with_suffix(".answer"), request.with_suffix(".error")
        row = Row(setting, grad_accum_steps=accumulation)
        if failed or not answer.exists():
            told = error.read_text().strip() if error.exists() else ""
            row = replace(row, reason=told or failed or "it ended without an answer")
        else:
            row = self.stretched(row, json.loads(answer.read_text()), micro_batches)
        self.rows.append(row)
        return row

    def stretched(self, row: Row, measured: dict[str, Any], micro_batches: int) -> Row:
        """The row with the figures of base, from those of a step of `micro_batches`."""
        total, kept = self.config.base.total_batch_size, measured["device_batch_size"]
        assert total is not None
        if kept != row.setting.device_batch_size:
            return replace(row, reason=f"out of memory; trains with device_batch_size {kept}", measured=measured)
        step_ms = full_step_ms(measured["step_ms"], measured["shares"], micro_batches, row.grad_accum_steps)
        tokens_per_second = total / step_ms * 1e3
        faster = tokens_per_second / measured["tokens_per_second"]
        return replace(
            row,
            step_ms=step_ms,
            tokens_per_second=tokens_per_second,
            hours=base_run(self.config, tokens_per_second)["hours"],
            mfu=measured["mfu"] and measured["mfu"] * faster,
            of_product=measured["of_product"] * faster,
            memory_gb=measured["memory_gb"],
            measured=measured,
        )

    def record(self, complete: bool) -> dict[str, Any]:
        """Everything, as plain values; `best` and `base` are null while nothing works."""
        base, best = self.config.base, self.best
        return {
            "benchmark": "probe",
            **asdict(self.machine),
            "complete": complete,
            "workers": self.config.workers[1],
            "model": asdict(self.config.model.spec()) | {"parameters": self.config.model.spec().parameters},
            "total_batch_size": base.total_batch_size,
            "precision": base.precision,
            "optimizer": base.optimizer,
            "rows": [plain(row) for row in self.rows],
            "best": plain(best) if best else None,
            "base": base_run(self.config, best.tokens_per_second) if best else None,
            "set": settings_to_add(self.config, best.setting, self.machine.kind) if best else [],
        }


def plain(row: Row) -> dict[str, Any]:
    values = asdict(row)
    setting: dict[str, Any] = values.pop("setting")
    return setting | values


def run_alone(command: list[str], log: Path, seconds: float) -> str | None:
    """Runs a command to its end, or the end of the time; None when it succeeded, else why not, in one line."""
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches the probe alone, which then ends all of it.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"not measured within the {duration(seconds)} that were left"
        finally:
            end(process)
    return why(code, log.read_text(errors="replace")) if code else None


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started; torchrun ends its workers itself, which are in sessions of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why(code: int, log: str) -> str:
    """One line about a process that failed without saying why itself."""
    if code == -signal.SIGKILL or re.search(r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)", log):
        return "killed, out of memory?"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"exit status {code}: {lines[-1] if lines else 'no output'}"


def settings_to_add(config: Config, setting: Setting, kind: str) -> list[str]:
    """KEY=VALUE for every field of `base` that differs from what the configuration does on this kind of device."""
    base = config.base.model_dump()
    if base["compile"] is None:
        base["compile"] = kind == "cuda"
    changed = {name: value for name, value in asdict(setting).items() if base[name] != value}
    return [f"base.{name}={json.dumps(value) if value in (True, False) else value}" for name, value in changed.items()]


class View:
    """The table as it grows: live on a terminal, a line a row elsewhere, and there the table at the end."""

    COLUMNS = ("batch", "compile", "checkpointing", "attention", "parallel")

    def __init__(self, probe: Probe, swept: set[str], console: Console) -> None:
        self.probe, self.console = probe, console
        fields = ("device_batch_size", *self.COLUMNS[1:])
        self.fields = {f: c for f, c in zip(fields, self.COLUMNS, strict=True) if f == fields[0] or f in swept}
        self.live = Live(self.table(), console=console, refresh_per_second=2)

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()
        else:
            show(self.console, self.table(), map(self.line, self.probe.rows))

    def show(self, row: Row) -> None:
        if self.console.is_terminal:
            self.live.update(self.table())
        else:
            self.say(self.line(row))

    def say(self, text: str) -> None:
        say(self.console, text)

    def line(self, row: Row) -> str:
        cells = [f"{name} {cell}" for name, cell in zip(self.names(), self.cells(row), strict=False) if cell]
        return "  ".join([*cells, row.reason or ""]).rstrip()

    def names(self) -> list[str]:
        return [*self.fields.values(), "tokens/s", "step ms", "MFU", "of matmul", "GB", "base"]

    def cells(self, row: Row) -> list[str]:
        setting = asdict(row.setting)
        shown = ["on" if setting[f] is True else "off" if setting[f] is False else str(setting[f]) for f in self.fields]
        if row.reason is not None or row.step_ms is None or row.hours is None:
            return shown + [""] * 6
        shown += [f"{row.tokens_per_second:,.0f}", f"{row.step_ms:,.0f}"]
        shown += [f"{row.mfu:.1%}" if row.mfu else "n/a", f"{row.of_product:.1%}", f"{row.memory_gb:,.1f}"]
        return [*shown, duration(3600 * row.hours)]

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for name in self.names():
            table.add_column(name, no_wrap=True, justify="right")
        table.add_column("", overflow="fold")
        best = self.probe.best
        for row in self.probe.rows:
            note = f"[red]{escape(row.reason)}[/]" if row.reason else "best" if row is best else ""
            mark, style = ("*", "bold green") if row is best else (" ", None)
            table.add_row(mark, *self.cells(row), note, style=style)
        return table


def summary(probe: Probe) -> Iterator[str]:
    """What to do with the best row, and what base then comes to."""
    config, best = probe.config, probe.best
    if best is None or best.of_product is None:
        return
    added = settings_to_add(config, best.setting, probe.machine.kind)
    yield (
        "add to the run: " + " ".join(f"--set {s}" for s in added) if added else "the settings are the best as they are"
    )
    base = base_run(config, best.tokens_per_second)
    dollars = f", ${base['usd']:,.2f}" if "usd" in base else ""
    yield (
        f"base: {base['steps']:,} steps, {base['tokens']:,} tokens: {duration(3600 * base['hours'])} at "
        f"{best.tokens_per_second:,.0f} tokens/s{dollars}, validation and checkpoints apart"
    )
    product = f"{best.of_product:.1%} of this machine's own matrix products"
    yield f"MFU {best.mfu:.1%}; {product}" if best.mfu else f"MFU n/a, as its peak is not known; {product}"


def listed(flag: str, text: str | None, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """The values of a comma-separated flag, in order and once each; raises ConfigError."""
    if text is None:
        return list(default)
    values = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if wrong := [v for v in values if v not in allowed]:
        raise ConfigError(f"{flag} {text}: {wrong[0]!r} is none of {', '.join(allowed)}")
    return values


def batches_of(config: Config, text: str | None) -> list[int]:
    """The device batches to try; ConfigError for what is none or does not divide the rows of a rank."""
    fewest, most = config.workers
    rows, total = rows_of_a_rank(config), config.base.total_batch_size
    assert total is not None
    if text is None:
        return default_batches(config.base.device_batch_size, rows, fewest == most)
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise ConfigError(f"--device-batch {text}: must be rows a micro-batch, such as 8,16,32")
    values = sorted({int(part) for part in text.split(",")})
    for n in values:
        if fewest == most:
            grad_accum_steps(total, config.model.sequence_len, n, most, "base")
        elif n > rows:
            raise ConfigError(f"--device-batch {n} is more than the {rows} rows a worker has in a step")
    return values


def choices(field: str) -> tuple[str, ...]:
    return get_args(TrainConfig.model_fields[field].annotation)


def other_settings(config: Config, args: argparse.Namespace, gpu: bool) -> list[Setting]:
    """Every combination of what is not the device batch, the configured or usual one first; raises ConfigError."""
    base = config.base
    compiles = [base.compile] if base.compile is not None else [True] if gpu else [False, True]
    parallel: list[str] = [base.parallel]
    if config.workers[1] > 1:
        parallel += [mode for mode in choices("parallel") if mode != base.parallel]
    names = {on: name for name, on in COMPILE.items()}
    combined = itertools.product(
        listed("--parallel", args.parallel, choices("parallel"), parallel),
        listed("--checkpointing", args.checkpointing, choices("checkpointing"), [base.checkpointing]),
        listed("--attention", args.attention, choices("attention"), [base.attention]),
        listed("--compile", args.compile, list(COMPILE), [names[on] for on in compiles]),
    )
    return [Setting(base.device_batch_size, COMPILE[on], how, backend, mode) for mode, how, backend, on in combined]


def this_machine() -> Machine:
    """Looked at in a process of its own: torch here would hold memory of the GPU that is to be measured."""
    result = subprocess.run([sys.executable, "-m", MODULE, "--hardware"], capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise OSError(f"torch does not start here ({last}); `fathom doctor` says more")
    return Machine(**json.loads(result.stdout.splitlines()[-1]))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="fathom probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="LIST is comma-separated. The first value is the one at which the device batches are tried.",
    )
    add_config_flags(parser)
    probing = parser.add_argument_group("what is measured")
    probing.add_argument("--steps", type=int, default=20, help="timed steps a setting (default 20)")
    probing.add_argument(
        "--device-batch", metavar="LIST", help="rows a micro-batch (default: powers of two around the configured)"
    )
    probing.add_argument("--compile", metavar="LIST", help="on, off (default: on for GPUs, off and on for a CPU)")
    probing.add_argument("--checkpointing", metavar="LIST", help=f"{', '.join(choices('checkpointing'))}")
    probing.add_argument("--attention", metavar="LIST", help=f"{', '.join(choices('attention'))}")
    probing.add_argument(
        "--parallel", metavar="LIST", help=f"{', '.join(choices('parallel'))} (default: all, with several workers)"
    )
    probing.add_argument("--minutes", type=float, default=15.0, help="stop when they are over (default 15)")
    probing.add_argument("--json", type=Path, metavar="FILE", help="write everything there, after every setting")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 < args.minutes < math.inf:
        raise ConfigError(f"--steps {args.steps} --minutes {args.minutes:g}: both must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the best setting; 1 when none works, 130 after Ctrl-C."""
    args = arguments(argv)
    config = config_from_args(args)
    batches = batches_of(config, args.device_batch)
    other_settings(config, args, gpu=False)  # a mistake in a flag is told before torch is looked for
    machine = this_machine()
    others = other_settings(config, args, machine.kind == "cuda")
    workers, spec, base = config.workers[1], config.model.spec(), config.base
    if machine.kind == "cuda" and workers > machine.devices:
        raise ConfigError(
            f"--workers {workers}, but this machine has {machine.devices} GPU(s): probe one machine, "
            f"with --workers {machine.devices}"
        )
    swept = {f for f in asdict(others[0]) if len({getattr(s, f) for s in others}) > 1}
    console = Terminal()
    name = f"{config.model.family} {config.model.depth}, {spec.parameters:,} parameters"
    fixed = {f: value for f, value in asdict(others[0]).items() if f not in {*swept, "device_batch_size"}}
    fixed["compile"] = "swept" if "compile" in swept else "on" if others[0].compile else "off"
    said = ", ".join(
        f"{f} {value}" for f, value in fixed.items() if f not in swept and (f != "parallel" or workers > 1)
    )
    heading = (
        f"{machine.named(workers)}, torch {machine.torch}: {name}, {base.total_batch_size:,} tokens a step, {said}"
    )

    with tempfile.TemporaryDirectory(prefix="fathom-probe-") as directory:
        probe = Probe(config, machine, args.steps, 60 * args.minutes, Path(directory))
        save(probe, args.json, complete=False)
        complete = interrupted = False
        view = View(probe, swept, console)
        view.say(heading)
        asked = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process may be left behind
        try:
            with view:
                for row in probe.sweep(batches, others, args.device_batch is None):
                    view.show(row)
                    save(probe, args.json, complete=False)
                    if probe.seconds_left <= 0:
                        break
                else:
                    complete = True
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGTERM, asked)
    save(probe, args.json, complete)
    if not complete:
        view.say(
            "interrupted: what is above is all there is" if interrupted else "--minutes are over: raise them for more"
        )
    for line in summary(probe):
        view.say(line)
    if interrupted:
        return 130
    if probe.best is None:
        raise ValueError(nothing_works(probe))
    return 0


def nothing_works(probe: Probe) -> str:
    last = probe.rows[-1]
    advice = (
        "try --device-batch 1 --checkpointing full, more --workers with --parallel fsdp, or a smaller --depth"
        if any(row.short_of_memory for row in probe.rows)
        else "raise --minutes, or take a smaller --depth"
        if "not measured within" in (last.reason or "")
        else "change what is at fault; `fathom doctor` checks the machine"
    )
    return f"no setting works here: {last.reason}; {advice}"


def save(probe: Probe, file: Path | None, complete: bool) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(probe.record(complete), indent=1) + "\n")


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["probe", *sys.argv[1:]]))
