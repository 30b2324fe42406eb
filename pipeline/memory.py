"""Memory of one device while it trains, part by part, at the moment when most of it is in use. Imports no torch.

Three moments compete: the loss has just been computed and every activation waits for the backward pass; that pass has
come to the first block and has all gradients; or the optimizer works on them. What is counted is what the engine keeps:

    weights      fp32 masters, and the copies products run in: bf16 copies that autograd keeps from the forward pass, or
                 under fsdp the gathered embedding, head and two blocks
    gradients    fp32, whole under ddp and zero1. Under fsdp whole, too, with several micro-batches a step, since FSDP2
                 adds them up unsharded until the last. When the backward pass of a step's only micro-batch begins,
                 that of the head alone
    optimizer    fp32 momentum of the matrices under Muon, two fp32 moments of everything else; in the optimizer's
                 moment also the stacks it computes with
    activations  what each block keeps for its backward pass (models.spec), and the block being computed backwards
    logits       a chunk of them, a bf16 copy of the head and a summand of its gradient (kernels.cross_entropy)
    overhead     the process: context, libraries, buffers of collectives, what an allocator rounds up

Bytes are of one device; a GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from models.spec import ModelSpec

GB = 1e9
MIB = 1 << 20
BUCKET_BYTES = 32 * MIB  # of stages.training.optimizer
CHUNK_BYTES = {"cuda": 256 * MIB, "cpu": 4 * MIB}  # of kernels.cross_entropy
FEWEST_ROWS = 256  # likewise
MUON_STACKS = 5  # fp32 copies of a stack of matrices alive while its update is computed: kernels.muon
# Of a GPU: CUDA's context with the kernels loaded, about 0.6 GB, and buffers of NCCL and cuBLAS. Of a CPU: Python,
# torch and its libraries, 0.64 GB, and 0.12 GB of Ray and its libraries; measured.
PROCESS_BYTES = {"cuda": 1.2e9, "cpu": 0.76e9}
COMPILER_BYTES = {"cuda": 0.0, "cpu": 0.06e9}  # where it compiles; on a GPU that is the host's memory; measured
# Of an engine beside RL's learner (models.vllm_engine): its share of a GPU while it samples; its process on a CPU,
# measured, and at most so much for keys and values of so many rows.
ENGINE_SHARE = 0.35
CPU_ENGINE_BYTES, CPU_CACHE_BYTES, ENGINE_ROWS = 0.7e9, 2 << 30, 256
# Of the rest, what is rounded up or does not fit what is asked for. On a CPU fitted to the peaks of ten small models
# (bench.plan_vs_measured): operations there have fp32 temporaries, and freed blocks are kept.
ALLOCATOR = {"cuda": 0.03, "cpu": 0.33}


@dataclass(frozen=True)
class Layout:
    """How a model is laid over `world` devices for training."""

    device_batch_size: int
    grad_accum_steps: int
    world: int
    parallel: str
    checkpointing: str
    compiled: bool
    optimizer: str = "muon"
    precision: str = "bf16"
    kind: str = "cuda"
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak: in the "backward" pass, in the "optimizer", or while RL is "sampling"."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float
    peak: str

    @property
    def total(self) -> float:
        return float(sum(astuple(self)[:-1]))


def memory(spec: ModelSpec, layout: Layout) -> Memory:
    """The largest of the moments."""
    return max(_backward(spec, layout), _end(spec, layout), _step(spec, layout), key=lambda m: m.total)


def memory_with_engine(spec: ModelSpec, layout: Layout, available: float, engines: int) -> Memory:
    """RL where learner and `engines` share the device, of `available` bytes. On a GPU the engine sleeps while the
    learner works, and takes its share while weights and optimizer wait; on a CPU it stays as it is.
    """
    learner = memory(spec, layout)
    if layout.kind == "cpu":
        cache = min(CPU_CACHE_BYTES, ENGINE_ROWS * spec.kv_bytes_per_token * spec.sequence_len)
        each = CPU_ENGINE_BYTES + 4 * spec.parameters + cache
        return replace(learner, overhead=learner.overhead + engines * each)
    waiting = _with_overhead(layout, _masters(spec, layout), 0.0, _state(spec, layout), 0.0, 0.0, "sampling")
    sampling = replace(waiting, overhead=waiting.overhead + ENGINE_SHARE * available)
    asleep = replace(learner, overhead=learner.overhead + PROCESS_BYTES["cuda"])
    return max(asleep, sampling, key=lambda m: m.total)


def _backward(spec: ModelSpec, layout: Layout) -> Memory:
    """When the backward pass begins."""
    sharded = layout.parallel == "fsdp" and layout.world > 1
    accumulates = layout.grad_accum_steps > 1
    element = 4 if layout.precision == "fp32" else 2
    tokens = layout.device_batch_size * spec.sequence_len
    head = spec.padded_vocab * spec.width
    block = spec.matrix_parameters / spec.layers

    # CUDA graphs write to the same gradients step after step
    gradients = 4.0 * (spec.padded_parameters if accumulates or layout.cuda_graphs else head)
    if sharded and accumulates:
        gradients += 4 * spec.padded_parameters / layout.world

    rows = min(tokens, max(FEWEST_ROWS, CHUNK_BYTES[layout.kind] // (spec.padded_vocab * element)))
    # a kernel of its own works in place on a GPU; on a CPU scores, their tanh and its slope are fp32 beside them
    chunk = rows * spec.padded_vocab * (element + (0 if layout.kind == "cuda" else 12))
    summand = 4 if layout.kind == "cuda" or element == 4 else 2
    logits = chunk + head * (summand + (0 if element == 4 or sharded else 2) + (4 if accumulates else 0))

    kept = spec.activation_bytes(layout.checkpointing, layout.compiled, element)
    around = (2 * 4 + 2 * element) * spec.width + 16  # embedding, last norm and its gradient; ids and targets
    activations: float = tokens * (spec.layers * kept + around)
    activations += max(0.0, _working(spec, layout) + 4 * block - logits)  # the logits are gone by then
    weights, state = _weights(spec, layout), _state(spec, layout)
    return _with_overhead(layout, weights, gradients, state, activations, logits, "backward")


def _end(spec: ModelSpec, layout: Layout) -> Memory:
    """When the first block is computed backwards, and all gradients but its own are there."""
    gradients = 4.0 * spec.padded_parameters / (layout.world if layout.parallel == "fsdp" else 1)
    activations = _working(spec, layout)
    return _with_overhead(layout, _weights(spec, layout), gradients, _state(spec, layout), activations, 0.0, "backward")


def _weights(spec: ModelSpec, layout: Layout) -> float:
    """The masters, and what products run in."""
    element = 4 if layout.precision == "fp32" else 2
    block = spec.matrix_parameters / spec.layers
    if layout.parallel == "fsdp" and layout.world > 1:
        gathered = (1 if spec.tied else 2) * spec.padded_vocab * spec.width + 2 * block
        return _masters(spec, layout) + element * gathered
    if element == 4:
        return _masters(spec, layout)
    # compiled, a block that is computed again casts its weights again; eager, autocast remembers its casts
    again = layout.compiled and layout.checkpointing != "none"
    return _masters(spec, layout) + 2 * (block if again else spec.matrix_parameters)


def _working(spec: ModelSpec, layout: Layout) -> float:
    """What the block being computed backwards needs beside what it kept: gradients, and what it computes again."""
    element = 4 if layout.precision == "fp32" else 2
    working: float = element * (6 * spec.width + 2 * spec.ffn_width)
    if layout.checkpointing != "none":
        working += spec.activation_bytes("none", layout.compiled, element)
        working -= spec.activation_bytes(layout.checkpointing, layout.compiled, element)
    return layout.device_batch_size * spec.sequence_len * working


def _step(spec: ModelSpec, layout: Layout) -> Memory:
    """When the optimizer has all gradients."""
    world, parallel = layout.world, layout.parallel if layout.world > 1 else "ddp"
    gradients = 4.0 * spec.padded_parameters / (world if parallel == "fsdp" else 1)
    state = _state(spec, layout)
    if parallel == "zero1":
        state += gradients / world  # what this rank's share is reduced to, before the whole is let go
    elif layout.optimizer == "muon":
        state += MUON_STACKS * max(
            4.0 * min(n, _bucket(shape, n, world)) * math.prod(shape) / (world if parallel == "fsdp" else 1)
            for shape, n in spec.matrix_shapes.items()
        )
    return _with_overhead(layout, _masters(spec, layout), gradients, state, 0.0, 0.0, "optimizer")


def _with_overhead(
    layout: Layout,
    weights: float,
    gradients: float,
    optimizer: float,
    activations: float,
    logits: float,
    peak: str,
) -> Memory:
    parts = weights + gradients + optimizer + activations + logits
    overhead = PROCESS_BYTES[layout.kind] + ALLOCATOR[layout.kind] * parts
    overhead += COMPILER_BYTES[layout.kind] if layout.compiled else 0
    return Memory(weights, gradients, optimizer, activations, logits, overhead, peak)


def _masters(spec: ModelSpec, layout: Layout) -> float:
    if layout.parallel == "fsdp":
        return 4.0 * spec.padded_parameters / layout.world
    return 4.0 * (spec.padded_parameters + _padding(spec, layout))


def _state(spec: ModelSpec, layout: Layout) -> float:
    rest = spec.padded_parameters - spec.matrix_parameters
    matrices = spec.matrix_parameters + _padding(spec, layout)
    state = 4 * matrices + 8 * rest if layout.optimizer == "muon" else 8 * (matrices + rest)
    return state / (layout.world if layout.parallel != "ddp" else 1)


def _padding(spec: ModelSpec, layout: Layout) -> float:
    """Parameters that zero1 adds so that every rank's share of a bucket of matrices is as long."""
    if layout.parallel != "zero1" or layout.world == 1 or layout.optimizer != "muon":
        return 0
    return sum(-n % layout.world * math.prod(shape) for shape, n in spec.matrix_shapes.items())


def _bucket(shape: tuple[int, int], n: int, world: int) -> int:
    """Matrices of one shape that are updated together."""
    if world == 1:
        return n
    return math.ceil(math.ceil(BUCKET_BYTES / (4 * math.prod(shape))) / world) * world
