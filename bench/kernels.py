"""Each kernel against its plain reference: `python -m bench.kernels [--out kernels.json]`.

Times are the best of a few repetitions of forward and backward together, or of one update. Memory is the peak above
what the inputs hold, measured for the loss in a process of its own on CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import report
from cluster.hardware import peak_memory
from kernels import adamw, cross_entropy, fp8, muon
from kernels.attention import BACKENDS, attention, choose

SOFTCAP = 15.0
Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    tokens: int
    sequence_len: int
    width: int
    heads: int
    vocab: int
    repeats: int


DEFAULTS = {
    "cpu": Sizes(tokens=2048, sequence_len=512, width=256, heads=2, vocab=8192, repeats=5),
    "cuda": Sizes(tokens=32_768, sequence_len=2048, width=1280, heads=10, vocab=65_536, repeats=10),
}


@dataclass(frozen=True)
class Case:
    """A kernel and its reference on one shape; `setup` makes the pair once its inputs are worth their memory."""

    kernel: str
    shape: str
    setup: Callable[[], tuple[Run, Run]]
    memory: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Times each kernel against its plain reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--tokens", type=int, help="rows of the loss and of attention (default: by device)")
    parser.add_argument("--vocab", type=int, help="vocabulary of the loss (default: by device)")
    parser.add_argument("--width", type=int, help="width of the model (default: by device)")
    parser.add_argument("--out", type=Path, help="also write the rows and the hardware's name there, as JSON")
    arguments = parser.parse_args()
    default = DEFAULTS[arguments.device]
    sizes = Sizes(
        tokens=arguments.tokens or default.tokens,
        sequence_len=default.sequence_len,
        width=arguments.width or default.width,
        heads=default.heads,
        vocab=arguments.vocab or default.vocab,
        repeats=default.repeats,
    )
    if sizes.tokens % sizes.sequence_len or sizes.width % (16 * sizes.heads):
        parser.error(f"--tokens must be a multiple of {sizes.sequence_len}, --width of {16 * sizes.heads}")
    print(report.hardware_name(), flush=True)
    print(f"{'kernel':26} {'shape':32} {'plain ms':>10} {'ours ms':>10} {'speed-up':>9} {'memory':>8}", flush=True)
    rows = []
    for case in cases(sizes, torch.device(arguments.device)):
        if arguments.only in case.kernel:
            row = measure(case, sizes, torch.device(arguments.device))
            rows.append(row)
            memory = f"{row['memory_ratio']:8.3f}" if "memory_ratio" in row else f"{'':8}"
            print(
                f"{case.kernel:26} {case.shape:32} {row['plain_ms']:10.2f} {row['ours_ms']:10.2f} "
                f"{row['speed_up']:8.2f}x {memory}",
                flush=True,
            )
    if arguments.out:
        report.write("kernels", rows, arguments.out)


def measure(case: Case, sizes: Sizes, device: torch.device) -> dict[str, str | float]:
    plain, ours = case.setup()
    plain_ms, ours_ms = (best_ms(run, sizes.repeats, device) for run in (plain, ours))
    row: dict[str, str | float] = {"kernel": case.kernel, "shape": case.shape, "plain_ms": plain_ms, "ours_ms": ours_ms}
    row["speed_up"] = plain_ms / ours_ms
    if case.memory:
        if device.type == "cuda":
            peaks = [cuda_peak(run) for run in (plain, ours)]
        else:
            del plain, ours
            peaks = [cpu_peak(case, sizes, which) for which in (0, 1)]
        row |= {"plain_peak_bytes": peaks[0], "ours_peak_bytes": peaks[1], "memory_ratio": peaks[1] / peaks[0]}
    return row


def best_ms(run: Run, repeats: int, device: torch.device) -> float:
    """Milliseconds of the fastest repetition, after one that warms up and compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * 1000


def cuda_peak(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(case: Case, sizes: Sizes, which: int) -> int:
    """Bytes that the resident memory of a process rises by at its highest."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_cpu_peak, args=(sender, case.kernel, sizes, which))
    process.start()
    sender.close()
    try:
        peak: int = receiver.recv()  # EOFError if the process died
    finally:
        process.join()
    return peak


def _send_cpu_peak(sender: multiprocessing.connection.Connection, kernel: str, sizes: Sizes, which: int) -> None:
    case = next(case for case in cases(sizes, torch.device("cpu")) if case.kernel == kernel)
    run = case.setup()[which]
    torch.compiler.set_stance("force_eager")  # the compiler's own memory would hide the kernel's
    before = peak_memory()
    run()
    sender.send(peak_memory() - before)


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    yield from attention_cases(sizes, device)
    for mode in ("summed", "per token"):
        shape = f"{sizes.tokens} x {sizes.width} x {sizes.vocab}"
        yield Case(f"cross-entropy, {mode}", shape, partial(loss_pair, sizes, device, mode), memory=True)
    matrices = (12, sizes.width, 4 * sizes.width)
    yield Case("muon", " x ".join(map(str, matrices)), lambda: muon_pair(matrices, device))
    yield Case("adamw", f"{sizes.vocab} x {sizes.width}", lambda: adamw_pair(sizes, device))
    if fp8.supported(device)[0]:
        shape = f"{sizes.tokens} x {sizes.width} x {4 * sizes.width}"
        yield Case("fp8 linear (plain: bf16)", shape, lambda: fp8_pair(sizes, device))


def attention_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    head_dim = sizes.width // sizes.heads
    b, t = sizes.tokens // sizes.sequence_len, sizes.sequence_len
    shape = f"{b} x {t} x {sizes.heads} x {head_dim}"
    for backend in BACKENDS[:-1]:
        # What this device cannot run has no row.
        with contextlib.suppress(ValueError):
            choose(backend, device, torch.bfloat16, head_dim)
            yield Case(f"attention, {backend}", shape, partial(attention_pair, sizes, device, backend))


def attention_pair(sizes: Sizes, device: torch.device, backend: str) -> tuple[Run, Run]:
    shape = (sizes.tokens // sizes.sequence_len, sizes.sequence_len, sizes.heads, sizes.width // sizes.heads)
    q, k, v, g = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]

    compiled = torch.compile(attention, dynamic=False)  # as blocks are trained; what is compared with it is, too

    def run(name: str) -> object:
        return torch.autograd.grad(compiled(q, k, v, name), inputs, g)

    return lambda: run("reference"), lambda: run(backend)


def loss_pair(sizes: Sizes, device: torch.device, mode: str) -> tuple[Run, Run]:
    x = torch.randn(sizes.tokens, sizes.width, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(sizes.vocab, sizes.width, device=device) * sizes.width**-0.5).requires_grad_()
    targets = torch.randint(sizes.vocab, (sizes.tokens,), device=device)
    each = torch.full((sizes.tokens,), 1 / sizes.tokens, device=device)
    token_weight = each if mode == "summed" else None

    def run(f: Callable[..., Tensor]) -> object:
        loss = f(x, weight, targets, vocab_size=sizes.vocab, softcap=SOFTCAP, token_weight=token_weight)
        return torch.autograd.grad(loss, (x, weight), each if mode == "per token" else None)

    return lambda: run(cross_entropy.reference), lambda: run(cross_entropy.linear_cross_entropy)


def muon_pair(shape: tuple[int, int, int], device: torch.device) -> tuple[Run, Run]:
    """Against one matrix at a time, in fp32: the stack and bf16 are what ours gains by."""
    grads = torch.randn(shape, device=device)
    momentum, ok = torch.zeros_like(grads), torch.tensor(True, device=device)
    return (
        lambda: [muon.orthogonalize(g[None], torch.float32) for g in grads],
        lambda: muon.muon_update(grads, momentum, ok=ok),
    )


def adamw_pair(sizes: Sizes, device: torch.device) -> tuple[Run, Run]:
    tensors = [[torch.rand(sizes.vocab, sizes.width, device=device)] for _ in range(4)]
    steps = [torch.zeros((), device=device)]
    scale, ok = torch.ones((), device=device), torch.tensor(True, device=device)

    def run(f: Callable[..., None]) -> None:
        f(*tensors, steps, lr=1e-4, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, grad_scale=scale, ok=ok)

    return lambda: run(adamw.reference), lambda: run(adamw.adamw_update)


def fp8_pair(sizes: Sizes, device: torch.device) -> tuple[Run, Run]:
    x = torch.randn(sizes.tokens, sizes.width, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(4 * sizes.width, sizes.width, device=device, dtype=torch.bfloat16).requires_grad_()
    g = torch.randn(sizes.tokens, 4 * sizes.width, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(fp8.fp8_linear, dynamic=False)

    def run(f: Callable[[Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad(f(x, weight), (x, weight), g)

    return lambda: run(torch.nn.functional.linear), lambda: run(compiled)


if __name__ == "__main__":
    main()
