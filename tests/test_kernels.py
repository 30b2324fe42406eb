"""Every kernel computes what its plain reference does."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels import adamw, cross_entropy, fp8, muon, onednn
from kernels.attention import BACKENDS, attention, choose
from kernels.cross_entropy import linear_cross_entropy

ROOT = Path(__file__).parent.parent
VOCAB, PADDED = 70, 72


def fresh(program: str, **environment: str) -> str:
    """Output of a program in a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Linear layers


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_onednn_are_those_of_nn_linear(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.Tanh(), nn.Linear(80, 48, bias=bias))
    ours = copy.deepcopy(plain)
    weight = ours[0].weight
    onednn.convert(ours)
    assert [type(m).__name__ for m in ours] == ["OneDNNLinear", "Tanh", "OneDNNLinear"] and ours[0].weight is weight
    found = []
    for module in (plain, ours):
        x = torch.linspace(-1, 1, 3 * 7 * 48).reshape(3, 7, 48).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in module.parameters())])
    for expected, value in zip(*found, strict=True):
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


# Attention


def qkv(kv_heads: int, t: int = 33, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, t, heads, 16, generator=g).to(dtype).requires_grad_() for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_its_formula(monkeypatch: pytest.MonkeyPatch, kv_heads: int, backend: str) -> None:
    monkeypatch.setattr("kernels.attention.QUERIES", 8)  # several blocks, the last one short
    inputs = qkv(kv_heads)
    expected = attention(*inputs, "reference")
    got = attention(*inputs, backend)
    torch.testing.assert_close(got, expected)
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, g), torch.autograd.grad(expected, inputs, g))


def test_attention_reads_the_past_alone_and_each_query_head_its_own_keys() -> None:
    q, k, v = (t.detach() for t in qkv(2))
    before = attention(q, k, v, "reference")
    k[:, 20:] += 1
    v[:, 20:] += 1
    assert torch.equal(attention(q, k, v, "reference")[:, :20], before[:, :20])
    v[:, :, 1] += 1
    assert torch.equal(attention(q, k, v, "reference")[:, :20, :2], before[:, :20, :2])
    assert not torch.isclose(attention(q, k, v, "reference")[:, :20, 2:], before[:, :20, 2:]).any()


def test_attention_works_inside_compile() -> None:
    inputs = qkv(2)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, "sdpa"), attention(*inputs, "reference"))
    detached = [t.detach() for t in qkv(2, 128)]  # flex_attention refuses to train on CPU, as `choose` says
    torch.testing.assert_close(attention(*detached, "flex"), attention(*detached, "reference"))


def test_a_cpu_has_the_backends_that_train_on_it() -> None:
    choice = choose("auto", "cpu", torch.float32, 64)
    assert (choice.backend, choose("reference", "cpu", torch.float32, 64).backend) == ("sdpa", "reference")
    assert choose("auto", "cpu", torch.bfloat16, 64, compiled=True).backend == "blocked"
    for name in set(BACKENDS) - {"blocked", "sdpa", "reference"}:
        with pytest.raises(ValueError, match=rf"{name}.*'sdpa' would do"):
            choose(name, "cpu", torch.float32, 64)
    with pytest.raises(ValueError, match="choose auto, fa4, fa3"):
        choose("flash", "cpu", torch.float32, 64)


def with_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str]) -> list[str]:
    """Pretends to have a GPU and packages; returns the list of flash kernels that get activated."""
    activated: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr("kernels.attention.activate_flash_attention_impl", activated.append)
    return activated


FA4, FA3, FA2 = {"flash_attn", "flash_attn.cute"}, {"flash_attn_interface"}, {"flash_attn", "flash_attn_2_cuda"}


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "expected"),
    [
        ((10, 0), FA4, torch.bfloat16, 128, "fa4"),
        ((10, 0), FA2, torch.bfloat16, 128, "cudnn"),
        ((9, 0), FA4 | FA3, torch.bfloat16, 128, "fa3"),
        ((9, 0), FA4, torch.bfloat16, 128, "fa4"),
        ((9, 0), set(), torch.bfloat16, 128, "cudnn"),
        ((9, 0), FA3, torch.float32, 128, "sdpa"),
        ((9, 0), FA3, torch.bfloat16, 264, "sdpa"),
        ((8, 0), FA4 | FA3 | FA2, torch.bfloat16, 128, "fa2"),
        ((8, 0), FA4, torch.bfloat16, 128, "sdpa"),
        ((7, 5), FA2, torch.float16, 128, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: set[str],
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
) -> None:
    activated = with_device(monkeypatch, capability, installed)
    assert choose("auto", "cuda", dtype, head_dim).backend == expected
    assert activated == ([expected.upper()] if expected in ("fa3", "fa4") else [])


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    with_device(monkeypatch, (9, 0), set())
    with pytest.raises(ValueError, match=r"fa4.*not installed.*pip install flash-attn-4.*'cudnn' would do"):
        choose("fa4", "cuda", torch.bfloat16, 128)
    assert "fa3 is not installed" in choose("auto", "cuda", torch.bfloat16, 128).reason


# Cross-entropy


def problem(n: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(PADDED, 16, generator=g) * 2).to(dtype).requires_grad_()
    return x, weight, torch.randint(VOCAB, (n,), generator=g), torch.rand(n, generator=g, dtype=torch.float64).to(dtype)


def loss_and_gradients(
    f: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor, **k: object
) -> list[Tensor]:
    loss = f(x, weight, targets, vocab_size=VOCAB, **k)
    upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss).to(loss.dtype) if loss.dim() else loss.new_tensor(3.0)
    return [loss, *torch.autograd.grad(loss, (x, weight), upstream)]


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 50, 64])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("mode", ["per token", "summed", "summed with z-loss"])
def test_the_loss_and_its_gradients_are_the_plain_ones(mode: str, softcap: float, chunk_size: int | None) -> None:
    x, weight, targets, token_weight = problem()
    settings: dict[str, object] = {"softcap": softcap}
    if mode != "per token":
        settings |= {"token_weight": token_weight, "z_loss": 1e-2 if "z-loss" in mode else 0.0}
    expected = loss_and_gradients(cross_entropy.reference, x, weight, targets, **settings)
    got = loss_and_gradients(linear_cross_entropy, x, weight, targets, chunk_size=chunk_size, **settings)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[2][:VOCAB].any(1).all() and not got[2][VOCAB:].any(), "padding gets no gradient"


def test_the_gradients_are_the_derivatives() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, dtype=torch.float64, generator=g).requires_grad_()
    weight = torch.randn(6, 2, dtype=torch.float64, generator=g).requires_grad_()
    targets, token_weight = torch.tensor([0, 4, 2]), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    settings = {"vocab_size": 5, "softcap": 2.0, "chunk_size": 2}
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, **settings), (x, weight))
    settings |= {"z_loss": 1e-2, "token_weight": token_weight}
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, **settings), (x, weight))


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_near_the_exact_loss(summed: bool, autocast: bool) -> None:
    x, weight, targets, token_weight = problem()
    settings: dict[str, object] = {"softcap": 15.0}
    if summed:
        settings |= {"token_weight": token_weight, "z_loss": 1e-3}
    expected = loss_and_gradients(cross_entropy.reference, x, weight, targets, **settings)
    if not autocast:  # a bf16 x is enough, beside an fp32 weight
        x = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = loss_and_gradients(linear_cross_entropy, x, weight, targets, chunk_size=16, **settings)
    assert [t.dtype for t in got] == [torch.float32, x.dtype, torch.float32]
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, targets, token_weight = problem()
    with torch.no_grad():
        quiet = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, token_weight=token_weight)
    assert not quiet.requires_grad
    loss = linear_cross_entropy(x.detach(), weight, targets, vocab_size=VOCAB, token_weight=token_weight)
    loss.backward()
    assert torch.equal(loss, quiet) and weight.grad is not None and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_chunk_is_the_plain_one(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, PADDED) * 9).to(dtype)
    again = logits.clone()
    arguments = (torch.arange(6), torch.rand(6), VOCAB, 15.0, 1e-2, True)
    torch.testing.assert_close(
        cross_entropy._compiled_chunk()(again, *arguments), cross_entropy.plain_chunk(logits, *arguments)
    )
    torch.testing.assert_close(again, logits)


TRITON = """
import torch
from kernels.cross_entropy import plain_chunk, triton_chunk
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for rows, columns, vocab_size in ((5, 72, 70), (3, 4608, 4500), (2, 8192, 8192)):  # a kernel's block is 4,096
        for softcap, z_loss, gradient in ((15.0, 1e-2, True), (0.0, 0.0, True), (15.0, 0.0, False)):
            logits = (torch.randn(rows, columns) * 9).to(dtype)
            arguments = torch.randint(vocab_size, (rows,)), torch.rand(rows), vocab_size, softcap, z_loss, gradient
            again = logits.clone()
            torch.testing.assert_close(triton_chunk(again, *arguments), plain_chunk(logits, *arguments))
            torch.testing.assert_close(again, logits)
            assert not (gradient and again[:, vocab_size:].any()), "padding gets no gradient, however small"
print("same")
"""


def test_the_triton_kernel_is_the_plain_chunk() -> None:
    pytest.importorskip("triton")
    assert fresh(TRITON, TRITON_INTERPRET="1") == "same\n"


MEMORY = """
import sys, torch
from kernels.cross_entropy import linear_cross_entropy, reference
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])  # KiB
x = torch.randn(2048, 8, requires_grad=True)
weight = torch.randn(65536, 8, requires_grad=True)
targets, token_weight = torch.randint(65536, (2048,)), torch.full((2048,), 1 / 2048)
(torch.randn(256, 256, requires_grad=True) @ torch.randn(256, 256)).sum().backward()
before = peak()
f = {"plain": reference, "fused": linear_cross_entropy}[sys.argv[1]]
extra = {"token_weight": token_weight} if sys.argv[2] == "summed" else {}
if sys.argv[1] == "fused":
    extra["compile"] = False
f(x, weight, targets, vocab_size=65536, softcap=15.0, **extra).sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_the_fused_loss_needs_less_than_a_quarter_of_the_memory() -> None:
    plain, summed, per_token = (
        int(fresh(f"import sys; sys.argv = ['', {f!r}, {mode!r}]\n{MEMORY}")) * 1024
        for f, mode in (("plain", "summed"), ("fused", "summed"), ("fused", "per token"))
    )
    assert plain > 2 * 2048 * 65536 * 4, "the plain loss holds the logits and their gradient"
    assert max(summed, per_token) < plain / 4


def test_what_does_not_fit_is_an_error() -> None:
    x, weight, targets, token_weight = problem()
    for message, call in {
        "does not fit": lambda: linear_cross_entropy(x, weight, targets, vocab_size=PADDED + 1),
        "one for each row": lambda: linear_cross_entropy(x, weight, targets[1:], vocab_size=VOCAB),
        "needs token_weight": lambda: linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, z_loss=1.0),
        "a constant": lambda: linear_cross_entropy(
            x, weight, targets, vocab_size=VOCAB, token_weight=token_weight.requires_grad_()
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# Muon


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 128, 32), (2, 32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_goes_to_the_polar_factor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = muon.reference_orthogonalize(stack)
    near = muon.orthogonalize(stack, dtype)
    assert near.dtype == dtype and near.shape == shape
    assert (near.float() - exact).norm() < 0.13 * exact.norm()
    assert torch.linalg.svdvals(near.float()).max() < 1.13
    if dtype == torch.float32:
        assert (muon.orthogonalize(stack, dtype, steps=12) - exact).norm() < 1e-4 * exact.norm()
    for scale in (1e-4, 1e4):  # the size of a gradient does not matter
        torch.testing.assert_close(muon.orthogonalize(stack * scale, dtype), near, rtol=0.05, atol=0.02)


def test_muon_update_is_nesterov_momentum_orthogonalized() -> None:
    g = torch.Generator().manual_seed(0)
    gradients, momentum = torch.randn(2, 8, 4, generator=g), torch.randn(2, 8, 4, generator=g)
    moved = 0.9 * momentum + 0.1 * gradients
    expected = muon.orthogonalize(0.1 * gradients + 0.9 * moved, torch.float32)
    kept = gradients.clone()
    update = muon.muon_update(gradients, momentum, ok=torch.tensor(True), momentum_factor=0.9, dtype=torch.float32)
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(momentum, moved)
    assert torch.equal(gradients, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_leaves_muon_as_it_was(bad: float) -> None:
    momentum = torch.randn(2, 8, 4)
    before = momentum.clone()
    gradients = torch.full_like(momentum, bad)
    assert not muon.muon_update(gradients, momentum, ok=torch.tensor(False)).any()
    assert torch.equal(momentum, before)


# AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_its_formula_and_skips_bad_steps(weight_decay: float) -> None:
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(5, 3, generator=g), torch.randn(7, generator=g)]
    ours = [params, *([torch.zeros_like(p) for p in params] for _ in range(2)), [torch.zeros(()) for _ in params]]
    plain = copy.deepcopy(ours)
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    for step in range(6):
        gradients = [torch.randn(p.shape, generator=g) for p in params]
        ok, scale = torch.tensor(step != 2), torch.tensor(1.0 if step % 2 else 0.3)
        adamw.reference(plain[0], gradients, *plain[1:], **settings, grad_scale=scale, ok=ok)
        if step == 2:
            gradients[0][0] = float("nan")
        adamw.adamw_update(ours[0], gradients, *ours[1:], **settings, grad_scale=scale, ok=ok)
        torch.testing.assert_close(ours, plain)
    assert [int(s) for s in ours[3]] == [5, 5]


# fp8


def test_fp8_errs_by_what_its_digits_allow() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, 64, generator=g).requires_grad_()
    weight = (torch.randn(48, 64, generator=g) * 1e-3).requires_grad_()
    upstream = torch.randn(2, 13, 48, generator=g) * 1e-6
    exact, near = x @ weight.T, fp8.reference_linear(x, weight)
    # Half a last digit: 2⁻⁴ with e4m3's 3 bits of mantissa, 2⁻³ with e5m2's 2; two factors, and errors that average.
    assert 1e-3 < (near - exact).norm() / exact.norm() < 2**-4
    expected, got = (torch.autograd.grad(y, (x, weight), upstream) for y in (exact, near))
    for a, b in zip(got, expected, strict=True):
        assert 1e-3 < (a - b).norm() / b.norm() < 2**-3
    for dtype, error in ((fp8.E4M3, 2**-4), (fp8.E5M2, 2**-3)):
        small, scale = fp8.quantize(x, dtype)
        large = x.abs() > x.abs().max() / 100  # below lie subnormal numbers
        assert ((small.float() * scale - x).abs() <= error * x.abs() * 1.001)[large].all()
    assert not fp8.reference_linear(torch.zeros(16, 64), weight).any()


def test_scaled_mm_is_the_reference() -> None:
    """The product a GPU runs, on the CPU: PyTorch has it there, with the same numbers."""
    x, weight = torch.randn(2, 13, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    upstream = torch.randn(2, 13, 48)
    ours, plain = fp8.fp8_linear(x, weight), fp8.reference_linear(x, weight)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_convert_keeps_names_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 15), nn.Linear(15, 16, bias=False))
    with pytest.raises(ValueError, match=r"needs a CUDA device of compute capability 8\.9"):
        fp8.convert(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 32)
    before = model[0](x)
    monkeypatch.setattr(fp8, "supported", lambda device: (True, ""))
    assert fp8.convert(model) == ["0"]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    after = model[0](x)
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, works in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fp8.supported("cuda")[0] == works
        assert works or "A100 has 8.0" in fp8.supported("cuda")[1]
