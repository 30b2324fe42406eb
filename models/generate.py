"""Sampling without vLLM, and the turns that every engine takes.

A completion goes turn by turn: the engine samples until a stop token; after a call of a tool the tool's answer is put
in, and the engine goes on in the same batch as all others. `complete` keeps these rules for every engine, a `Sampler`
only continues lists of tokens. `TorchSampler` is one in plain torch, with a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.hf import engine_state, from_pretrained, load_hf_state
from models.layers import LanguageModel

ROWS = 256  # sequences that are sampled at once
CACHE_BYTES = 1 << 30  # of keys and values; fewer rows where these would need more


@dataclass
class Completion:
    """What followed a prompt. `sampled` is 1 where the model chose the token, 0 where a tool's result was put in.

    `logprobs` are the sampler's, in nats, at temperature 1 over the whole vocabulary; 0 where nothing was chosen.
    `finished` says that the model ended it itself.
    """

    tokens: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    weight_version: int = 0

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> None:
        self.tokens += tokens
        self.sampled += [int(logprobs is not None)] * len(tokens)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(tokens)


@dataclass(frozen=True)
class Turns:
    """When the model's turn is over: at one of `ends`, which end the completion, and at `call[1]`, which ends a call.

    `answer` maps the ids within a call to those put in after it; `call` is None where there are no tools.
    """

    ends: tuple[int, ...]
    call: tuple[int, int] | None
    answer: Callable[[list[int]], list[int]]

    @property
    def stops(self) -> list[int]:
        return [*self.ends] if self.call is None else [*self.ends, self.call[1]]

    def reply(self, tokens: list[int]) -> list[int] | None:
        """What is put in after these tokens of a completion before it goes on; None when they do not end in a call."""
        if self.call is None or tokens[-1:] != [self.call[1]]:
            return None
        if self.call[0] not in tokens:  # an end without a beginning
            return []
        start = len(tokens) - tokens[::-1].index(self.call[0])
        return self.answer(tokens[start:-1])


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the model's distribution at `temperature`, above 0, cut to the likeliest tokens that
    together have `top_p` of it. RL samples at 1 and 1, as its trainer scores the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0


WHOLE = Sampling()
# told of a completion's number, of tokens that have come to it, and whether the model chose them
Watch = Callable[[int, list[int], bool], None]


class Sampler(Protocol):
    """Continues lists of tokens, all in one batch."""

    def add(
        self,
        key: int,
        tokens: list[int],
        room: int,
        seed: int | None,
        sampling: Sampling = WHOLE,
        watch: Callable[[list[int]], None] | None = None,
    ) -> None:
        """Has `tokens` continued by at most `room` more; greedily where `seed` is None. A key may come again, with a
        list that continues what came out for it. `watch` is given new tokens as they come, and ends `step` with what
        it raises; the engine's next sampler knows nothing of this one."""

    def step(self) -> list[tuple[int, list[int], list[float]]]:
        """Goes on with every list; (key, new tokens, their logprobs) of those that reached a stop or their room."""


class Engine(Protocol):
    """A model that samples, on one device."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Replaces all weights (by their names in `models.hf.engine_state`)."""

    def loaded(self) -> None:
        """Drops what was computed with other weights."""

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The weights that the engine computes with, by the names and shapes of `load`."""

    def sampler(self, stops: Sequence[int], length: int) -> Sampler:
        """Continues lists to at most `length` tokens, new ones included, stopping after each of `stops`."""

    def rest(self) -> None:
        """Leaves the device's memory to the trainer until the next call."""


def complete(
    sampler_of: Callable[[Sequence[int], int], Sampler],
    turns: Turns,
    prompts: Sequence[list[int]],
    seeds: Sequence[tuple[int, ...]],
    samples: int,
    max_new_tokens: int,
    context: int,
    greedy: bool = False,
    sampling: Sampling = WHOLE,
    watch: Watch | None = None,
) -> list[list[Completion]]:
    """`samples` completions of each prompt, none longer than `max_new_tokens` (tools' results included) or the
    `context`. Every turn's random numbers come from the prompt's seed, the sample's number and the turn's place, so
    the same weights give the same completions whatever else is in the batch. `sampler_of` is an engine's `sampler`.
    `watch` is called as tokens come, with the number prompt · samples + sample; what it raises ends the call."""
    done = [[Completion() for _ in range(samples)] for _ in prompts]
    limits = [max(0, min(max_new_tokens, context - len(prompt))) for prompt in prompts]
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    sampler, pending = sampler_of(turns.stops, longest), 0

    def go_on(i: int, j: int) -> int:
        tokens = done[i][j].tokens
        room = limits[i] - len(tokens)
        if room > 0:
            seed, key = None if greedy else _seed(*seeds[i], j, len(tokens)), i * samples + j
            watched = None if watch is None else lambda new: watch(key, new, True)
            sampler.add(key, prompts[i] + tokens, room, seed, sampling, watched)
        return int(room > 0)

    for i, j in product(range(len(prompts)), range(samples)):
        pending += go_on(i, j)
    while pending:
        for key, tokens, logprobs in sampler.step():
            i, j = divmod(key, samples)
            completion = done[i][j]
            completion.extend(tokens, logprobs)
            completion.finished = tokens[-1] in turns.ends
            pending -= 1
            reply = turns.reply(completion.tokens)
            if reply is not None:
                completion.extend(reply, None)
                if watch is not None:
                    watch(key, reply, False)
                pending += go_on(i, j)
    for limit, group in zip(limits, done, strict=True):
        for completion in group:  # a tool's result may run past the limit
            del completion.tokens[limit:], completion.sampled[limit:], completion.logprobs[limit:]
    return done


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass
class _Row:
    """A list of tokens at its place in the cache, which holds the first `cached` of them. Idle when `room` is 0."""

    key: int
    tokens: list[int]
    cached: int
    room: int = 0
    draws: np.ndarray | None = None  # uniform numbers of the turn's tokens; None: greedy
    logprobs: list[float] = field(default_factory=list)  # of the turn's tokens
    sampling: Sampling = WHOLE
    watch: Callable[[list[int]], None] | None = None

    def begin(self, tokens: list[int], room: int, seed: int | None) -> None:
        self.tokens, self.room, self.logprobs = [*tokens], room, []
        self.draws = None if seed is None else np.random.default_rng(seed).random(room)


class TorchSampler:
    """Continues lists of at most `length` tokens, new ones included.

    Each step feeds one token of every row: a token just sampled, or the next of what was put in. Prompts are computed
    in one pass, each only once however many samples it has. Rows that are idle leave when a quarter are, or when others
    come in.
    """

    def __init__(self, model: LanguageModel, stops: Sequence[int], length: int) -> None:
        self.model, self.stops, self.length = model, frozenset(stops), length
        self.device = model.lm_head.weight.device
        self.most = max(1, min(ROWS, CACHE_BYTES // (model.spec.kv_bytes_per_token * max(1, length))))
        self.waiting: list[_Row] = []
        self.rows: list[_Row] = []
        # given a key and the logprobs (V,), in nats, that its next token is drawn from, before `watch` has that token
        self.look: Callable[[int, Tensor], None] | None = None
        # of each layer, keys and values (rows, length, kv_heads, head_dim)
        self.cache: list[tuple[Tensor, Tensor]] = [self._empty(0) for _ in range(model.spec.layers)]

    def add(
        self,
        key: int,
        tokens: list[int],
        room: int,
        seed: int | None,
        sampling: Sampling = WHOLE,
        watch: Callable[[list[int]], None] | None = None,
    ) -> None:
        row = next((row for row in self.rows if row.key == key), None)
        if row is None:
            row = _Row(key, [], 0)
            self.waiting.append(row)
        row.begin(tokens, room, seed)
        row.sampling, row.watch = sampling, watch

    @torch.no_grad()
    def step(self) -> list[tuple[int, list[int], list[float]]]:
        self._regroup()
        rows = self.rows
        fed = torch.tensor([[row.tokens[row.cached] for row in rows]], device=self.device).T
        positions = torch.tensor([[row.cached for row in rows]], device=self.device).T
        logprobs = self.model.scores(self._hidden(self.cache, fed, positions))[:, 0].log_softmax(-1)
        # Greedy, or the token in whose share of the distribution the row's number falls.
        due = [row.room > 0 and row.cached == len(row.tokens) - 1 for row in rows]
        drawn = [
            row.draws[len(row.logprobs)] if now and row.draws is not None else -1.0
            for row, now in zip(rows, due, strict=True)
        ]
        uniform = torch.tensor(drawn, dtype=torch.float64, device=self.device)[:, None]
        weights = logprobs.double().exp()
        for n, row in enumerate(rows):
            if row.sampling != WHOLE and drawn[n] >= 0:
                weights[n] = shaped(logprobs[n], row.sampling)
        shares = weights.cumsum(-1)
        chosen = torch.searchsorted(shares, uniform * shares[:, -1:], right=True).clamp(max=logprobs.size(-1) - 1)
        chosen = torch.where(uniform < 0, logprobs.argmax(-1, keepdim=True), chosen)
        ended = []
        values = zip(rows, due, chosen[:, 0].tolist(), logprobs.gather(1, chosen)[:, 0].tolist(), strict=True)
        for n, (row, now, token, logprob) in enumerate(values):
            row.cached = min(row.cached + 1, len(row.tokens) - 1 + now)
            if now:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.room = 0 if token in self.stops else row.room - 1
                if self.look is not None:
                    self.look(row.key, logprobs[n])
                if row.watch is not None:
                    row.watch([token])
                if not row.room:
                    ended.append((row.key, row.tokens[-len(row.logprobs) :], row.logprobs))
        return ended

    def drop(self, key: int) -> None:
        """Forgets a list that is under way; it does not end in `step`."""
        self.waiting = [row for row in self.waiting if row.key != key]
        for row in self.rows:
            if row.key == key:
                row.room = 0

    def _regroup(self) -> None:
        """Lets rows that are idle go and those that wait come in, where that is worth a copy of the cache."""
        kept = [n for n, row in enumerate(self.rows) if row.room]
        if 4 * len(kept) > 3 * len(self.rows) and not (self.waiting and len(self.rows) < self.most):
            return
        new, self.waiting = self.waiting[: self.most - len(kept)], self.waiting[self.most - len(kept) :]
        prompts = {tuple(row.tokens[:-1]): None for row in new}  # the last token is fed by the next step
        places = {prompt: n for n, prompt in enumerate(prompts)}
        computed = self._prefill([list(prompt) for prompt in prompts])
        copies = [places[tuple(row.tokens[:-1])] for row in new]
        self.cache = [
            (torch.cat((k[kept], new_k[copies])), torch.cat((v[kept], new_v[copies])))
            for (k, v), (new_k, new_v) in zip(self.cache, computed, strict=True)
        ]
        for row in new:
            row.cached = len(row.tokens) - 1
        self.rows = [self.rows[n] for n in kept] + new

    def _prefill(self, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """The cache of these prompts."""
        cache = [self._empty(len(prompts)) for _ in range(self.model.spec.layers)]
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest:
            ids = torch.zeros(len(prompts), longest, dtype=torch.long)
            for row, prompt in zip(ids, prompts, strict=True):
                row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
            self._hidden(cache, ids.to(self.device), torch.arange(longest, device=self.device).expand_as(ids))
        return cache

    def _hidden(self, cache: list[tuple[Tensor, Tensor]], ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions (B, T) → normalised residual (B, T, width), with all that lies before in the cache in view;
        their keys and values are added to the cache."""
        used = int(positions.max()) + 1
        # what lies behind a row's own position is of an earlier row, or padding
        mask = (torch.arange(used, device=self.device) <= positions[..., None])[:, None]  # (B, 1, T, used)
        attend = [partial(_attend, keys, values, positions, mask) for keys, values in cache]
        return self.model.hidden(ids, positions, attend)

    def _empty(self, rows: int) -> tuple[Tensor, Tensor]:
        spec, kind = self.model.spec, self.device.type
        shape = (rows, self.length, spec.kv_heads, spec.head_dim)
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else self.model.lm_head.weight.dtype
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        return keys, values


def shaped(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (V,), in fp64, that a token is drawn from whose logprobs (V,), in nats, are these. Nucleus
    sampling is of arXiv 1904.09751; the likeliest token always stays."""
    weights = (logprobs.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        likeliest, order = weights.sort(descending=True)
        weights[order[likeliest.cumsum(-1) - likeliest >= sampling.top_p]] = 0.0
    return weights


def _attend(keys: Tensor, values: Tensor, positions: Tensor, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, T, H, D) to the cache, once k and v (B, T, KV, D) lie in it at `positions` (B, T)."""
    rows = torch.arange(len(q), device=q.device)[:, None]
    keys[rows, positions], values[rows, positions] = k, v
    used = mask.size(-1)
    q, k, v = (t.transpose(1, 2) for t in (q, keys[:, :used], values[:, :used]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


class TorchEngine:
    """The model saved in `directory`, in bf16 on a GPU, in fp32 on a CPU."""

    def __init__(self, directory: Path, on_gpu: bool) -> None:
        device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        self.model = from_pretrained(directory, dtype).to(device)

    def load(self, state: dict[str, Tensor]) -> None:
        load_hf_state(self.model, state)

    def loaded(self) -> None:
        pass

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        return engine_state(self.model.spec, dict(self.model.named_parameters()))

    def sampler(self, stops: Sequence[int], length: int) -> Sampler:
        return TorchSampler(self.model, stops, length)

    def rest(self) -> None:
        pass


def generate(
    model: LanguageModel,
    turns: Turns,
    prompts: Sequence[list[int]],
    seeds: Sequence[tuple[int, ...]],
    samples: int,
    max_new_tokens: int,
    greedy: bool = False,
) -> list[list[Completion]]:
    """`samples` completions of each prompt by `model`, on its device and in its dtype; `seeds` has one for each prompt.

    Sampled at temperature 1 from the whole vocabulary.
    """
    sampler_of = partial(TorchSampler, model)
    return complete(sampler_of, turns, prompts, seeds, samples, max_new_tokens, model.spec.sequence_len, greedy)
