"""vLLM as an engine of models/generate.py, in this process.

vllm is imported when an engine is made: only the process that samples has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.generate import ROWS, WHOLE, Sampler, Sampling
from models.hf import read_spec
from models.spec import ModelSpec
from models.vllm_plugin import register

# what the process needs in its environment, before vllm or torch is imported
GPU_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENV = GPU_ENV | {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
CPU_KV_BYTES = 2 << 30  # at most, where two whole sequences fit; pages are taken when they are written
BLOCK = 32  # tokens, on a CPU
TABLES = ("embed_tokens", "wte")  # looked up, not multiplied with
CONV1D = ("c_attn", "c_proj", "c_fc")  # GPT-2's linear layers, which lie transposed in its export


class VLLMEngine:
    """The model saved in `directory`, in bf16 on a GPU, in fp32 on a CPU; `shared` where a trainer uses the GPU too."""

    def __init__(self, directory: Path, on_gpu: bool, shared: bool) -> None:
        from vllm import LLM

        register()  # a worker may run this package's files without its entry points
        spec = read_spec(directory)
        self.stops: list[int] = []
        # On a CPU, where every token computed costs time, a request stays open between turns and keeps its place in the
        # cache; vLLM would else compute the tokens of a block that is not full once more. Of each that is open, how
        # many tokens are computed and how many were given.
        self.cached_tokens = 0  # that the cache has room for; on a GPU no request stays open
        self.keeps_open = False
        self.open: dict[int, tuple[int, int]] = {}
        self.idle: set[int] = set()  # of these, which ended a turn and were not added since
        self.seeds: dict[str, int] = {}  # of the turns that begin with the next step
        self.watched: dict[int, Callable[[list[int]], None]] = {}  # with who is given their tokens as they come
        self.told: dict[int, int] = {}  # how many of them were given
        self.sleeps, self.asleep = on_gpu and shared, False
        settings = engine_settings(spec, on_gpu)
        if on_gpu:
            settings |= {
                "gpu_memory_utilization": 0.35 if shared else 0.9,
                "enable_sleep_mode": self.sleeps,
                "weight_transfer_config": {"backend": "ipc" if shared else "nccl"},
            }
        else:
            self.cached_tokens = settings["kv_cache_memory_bytes"] // spec.kv_bytes_per_token
        self.llm = LLM(str(directory), skip_tokenizer_init=True, **settings)

    def load(self, state: dict[str, Tensor]) -> None:
        self.call("reload_weights", weights_iterator=list(state.items()))

    def call(self, method: str, **arguments: Any) -> None:
        """Calls a method of vLLM's worker."""
        self._wake()
        self.llm.collective_rpc(method, kwargs=arguments)

    def loaded(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: completions would mix old and new weights")

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        self._wake()
        found: list[dict[str, Tensor]] = self.llm.collective_rpc(
            lambda worker: vllm_weights(worker.model_runner.get_model(), shapes)
        )
        return found[0]

    def sampler(self, stops: Sequence[int], length: int) -> Sampler:
        self._wake()
        self.idle.update(self.open, self.watched)  # left over where a tool or who watched failed
        self._close()
        self.stops = [*stops]
        # Only where all rows fit at their longest: of what waits for its next turn vLLM takes no block back.
        self.keeps_open = ROWS * (length + BLOCK) <= self.cached_tokens
        return self

    def add(
        self,
        key: int,
        tokens: list[int],
        room: int,
        seed: int | None,
        sampling: Sampling = WHOLE,
        watch: Callable[[list[int]], None] | None = None,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0 if seed is None else sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=room,
            seed=seed,
            stop_token_ids=self.stops,
            ignore_eos=True,  # of generation_config.json: calls end there even where there are no tools
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if watch is None else RequestOutputKind.CUMULATIVE,
        )
        engine, name = self.llm.llm_engine, str(key)
        computed, given = self.open.get(key, (0, 0))
        prompt: Any = {"prompt_token_ids": tokens[computed:]}
        if watch is not None:
            self.watched[key] = watch
        if not self.keeps_open or watch is not None:
            engine.add_request(name, prompt, params)
            return
        if key in self.open and seed is not None:
            self.seeds[name] = seed
        self.open[key] = len(tokens), given
        self.idle.discard(key)
        request = engine.input_processor.process_inputs(name, prompt, params, ("generate",), resumable=True)
        request.external_req_id = name
        engine.engine_core.add_request(request)
        request.prompt_token_ids = []  # both would append to one list what comes in the next turn
        engine.output_processor.add_request(request, None)

    def step(self) -> list[tuple[int, list[int], list[float]]]:
        self._close()
        if self.seeds:  # vLLM itself seeds a request once
            self.llm.collective_rpc(partial(reseed, seeds=self.seeds))
            self.seeds = {}
        ended = []
        for request in self.llm.llm_engine.step():
            key, output = int(request.request_id), request.outputs[0]
            if (watch := self.watched.get(key)) is not None:
                watch(list(output.token_ids)[self.told.get(key, 0) :])
                self.told[key] = len(output.token_ids)
                if not request.finished:
                    continue
                del self.watched[key], self.told[key]
            prompted, given = self.open.get(key, (0, 0))
            tokens = list(output.token_ids)[given:]  # of all turns
            logprobs = [s[token].logprob for token, s in zip(tokens, output.logprobs[given:], strict=True)]
            if key in self.open:
                self.open[key] = prompted + len(tokens) - 1, given + len(tokens)  # the last is not computed yet
                self.idle.add(key)
            ended.append((key, tokens, logprobs))
        return ended

    def _close(self) -> None:
        """Ends what no turn follows."""
        if self.idle:
            self.llm.llm_engine.abort_request([str(key) for key in self.idle])
            for key in self.idle:
                self.open.pop(key, None)
                self.watched.pop(key, None)
                self.told.pop(key, None)
            self.idle.clear()

    def rest(self) -> None:
        self._close()
        if self.sleeps:
            self.llm.sleep(level=1)  # level 2 forgets the weights, and a rollout may follow without new ones
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False


def engine_settings(spec: ModelSpec, on_gpu: bool) -> dict[str, Any]:
    """What every engine of vLLM's here is made with: bf16 on a GPU, fp32 on a CPU, so that sampler and trainer agree to
    1e-5."""
    settings: dict[str, Any] = {"dtype": "bfloat16"}
    if not on_gpu:  # there a fixed cache, without which vLLM does not start
        row = spec.kv_bytes_per_token * (spec.sequence_len + BLOCK)
        rows = max(2, min(ROWS, CPU_KV_BYTES // row))
        settings = {"dtype": "float32", "kv_cache_memory_bytes": rows * row, "block_size": BLOCK}
    return settings | {
        "enforce_eager": not on_gpu,
        "max_model_len": spec.sequence_len,
        "max_num_seqs": ROWS,
        "enable_chunked_prefill": on_gpu,  # with it, a request's own seed crashes the CPU engine
    }


def reseed(worker: Any, seeds: Mapping[str, int]) -> None:
    for name, seed in seeds.items():
        worker.model_runner.requests[name].generator.manual_seed(seed)


@torch.no_grad()
def vllm_weights(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of a running vLLM model by the names and `shapes` that a trainer sends: fused ones apart, GPT-2's
    transposed, without padding rows. RuntimeError where the engine has a parameter that none of these fills."""
    packed = getattr(model, "packed_modules_mapping", None) or {}
    fused = {part: (whole, parts) for whole, parts in packed.items() for part in parts}
    found, filled = {}, set()
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        whole, parts = fused.get(leaf, (leaf, [leaf]))
        path = f"{parent}.{whole}" if parent else whole
        before = [shapes[f"{parent}.{part}.{kind}"][0] for part in parts[: parts.index(leaf)]]
        layer, conv1d = model.get_submodule(path), leaf in CONV1D and kind == "weight"
        weight = _matrix(layer, shape[0 if conv1d else 1]) if _is_product(layer, leaf, kind) else getattr(layer, kind)
        found[name] = weight.T if conv1d else weight[sum(before) : sum(before) + shape[0]]
        filled.add(f"{path}.{kind}")
    if missing := {name for name, _ in model.named_parameters(remove_duplicate=False)} - filled:
        raise RuntimeError(f"the engine has parameters that the trainer never sends: {', '.join(sorted(missing))}")
    return found


def _is_product(layer: nn.Module, leaf: str, kind: str) -> bool:
    """Whether vLLM multiplies with a packed copy of this weight, as it does on CPUs: its parameter may be empty."""
    return kind == "weight" and leaf not in TABLES and hasattr(layer, "cpu_linear")


def _matrix(layer: Any, inputs: int) -> Tensor:
    """The weight (out, in) that a layer multiplies with: its product with the identity."""
    weight: Tensor = layer.cpu_linear(torch.eye(inputs, dtype=layer.weight.dtype), layer.weight, None)
    return weight.T
