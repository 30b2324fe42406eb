"""How likely a model finds many continuations, with what they share at their beginning computed once.

Sequences that begin alike are laid into one row as a tree: each token is there once for all sequences that have it
after the same tokens, at its own position, and attends to those tokens only. So one pass of the model gives the keys
and values of a shared context once, and every branch reads them. A row begins with its stem, the whole of one
sequence, for which causal attention serves; only what is behind it needs a mask, and is compared with the whole row.
Rows of like length make a batch of a bounded number of tokens. Only what precedes a scored token attends in the last
block, and goes through the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from models.layers import Attend, LanguageModel
from models.spec import ModelSpec

# Of a batch, padding included, by the kind of device; on a CPU few enough for its caches.
TOKENS_AT_ONCE = {"cuda": 8192, "cpu": 2048}
TREE_TOKENS = 8192
SCORES_AT_ONCE = 1 << 24  # logits in memory at a time, of 4 bytes


@dataclass(frozen=True)
class Request:
    """The tokens of one sequence, (T,) int64; those from index `start` on are scored, given all before them."""

    tokens: np.ndarray
    start: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.tokens):
            raise ValueError(f"scores begin at token {self.start} of {len(self.tokens)}: one before, one to score")


@dataclass(frozen=True)
class Score:
    """Of one request: the mean negative log-likelihood of its scored tokens in nats, and whether each of them is the
    one that the model finds likeliest."""

    loss: float
    greedy: bool


class Tree:
    """Sequences in one row. Token i has `ids[i]` at `positions[i]` of its sequences and is seen by itself and by the
    tokens up to `ends[i]`, which follow it; a tree of one sequence is that sequence."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._cut: list[tuple[np.ndarray, int]] = []  # tokens that end at that place
        self._path = np.zeros(0, dtype=np.int64)  # where the tokens of the newest sequence lie
        self._newest = self._path
        self.size = self.stem = 0  # tokens, and those of the first sequence, with which the row begins
        # of each request its number, its scored tokens, and the places of the tokens before them
        self.reads: list[tuple[int, np.ndarray, np.ndarray]] = []

    def shared(self, tokens: np.ndarray) -> int:
        """How many tokens at the beginning of `tokens` are those of the newest sequence."""
        least = min(len(self._newest), len(tokens))
        differs = self._newest[:least] != tokens[:least]
        return int(differs.argmax()) if differs.any() else least

    def add(self, number: int, request: Request) -> None:
        """Lays request `number` in; the order is lexicographic, else what is shared is computed again."""
        shared = self.shared(request.tokens)
        new = len(request.tokens) - shared
        self._cut.append((self._path[shared:], self.size))
        self._ids.append(request.tokens[shared:])
        self._positions.append(np.arange(shared, shared + new))
        self._path = np.concatenate((self._path[:shared], np.arange(self.size, self.size + new)))
        self._newest = request.tokens
        self.size += new
        self.stem = self.stem or new
        self.reads.append((number, request.tokens[request.start :], self._path[request.start - 1 : -1]))

    def laid(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, positions, ends), each (width,) int64; padding is seen by itself alone."""
        pad = (0, width - self.size)
        ends = np.arange(1, width + 1)
        ends[: self.size] = self.size
        for places, end in self._cut:
            ends[places] = end
        return np.pad(np.concatenate(self._ids), pad), np.pad(np.concatenate(self._positions), pad), ends


def grow(requests: Sequence[Request], spec: ModelSpec) -> list[Tree]:
    """Lays the requests into trees. One that shares its beginning with the one before joins its tree where the tokens
    that this saves cost more than the attention that a longer row wastes on what its tokens do not see: those behind
    the stem are compared with the whole row."""
    linear, attention = (
        2 * spec.matrix_parameters,
        4 * spec.heads * spec.head_dim * spec.layers,
    )  # FLOPs a token, and a pair

    def cost(stem: int, size: int) -> float:
        return size * linear + (stem * stem / 2 + (size - stem) * size) * attention

    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens.tolist())
    trees: list[Tree] = []
    for i in order:
        tokens = requests[i].tokens
        if trees:
            stem, size, alone = trees[-1].stem, trees[-1].size, len(tokens)
            joined = size + alone - trees[-1].shared(tokens)
        if not trees or joined > TREE_TOKENS or cost(stem, joined) > cost(stem, size) + cost(alone, alone):
            trees.append(Tree())
        trees[-1].add(i, requests[i])
    return trees


def batches(trees: Iterable[Tree], tokens_at_once: int) -> Iterator[list[Tree]]:
    """Trees of like length together, the longest first, so that what does not fit into memory fails at once."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: -tree.size):
        if batch and (len(batch) + 1) * batch[0].size > tokens_at_once:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


@torch.no_grad()
def score(model: LanguageModel, batch: Sequence[Tree]) -> dict[int, Score]:
    """The scores of the requests in these trees, by number; fp32 losses whatever the model's type."""
    device = model.lm_head.weight.device
    width = max(tree.size for tree in batch)
    laid = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*(t.laid(width) for t in batch), strict=True))
    ids, positions, ends = laid
    reads = [
        (number, targets, row * width + at) for row, tree in enumerate(batch) for number, targets, at in tree.reads
    ]
    numbers, targets, places = zip(*reads, strict=True)
    once, which = np.unique(np.concatenate(places), return_inverse=True)
    at = torch.from_numpy(once).to(device)
    stem = min((tree.stem for tree in batch if tree.stem < tree.size), default=width)
    behind = torch.arange(stem, width, device=device).expand(len(batch), -1)
    attend = partial(_attend, stem, _seen(ends, behind))
    last = _attend_at(once, ends, attend)
    hidden = model.hidden(ids, positions, [attend] * (model.spec.layers - 1) + [last], at)
    losses, greedy = _losses(model, hidden, which, np.concatenate(targets))
    splits = np.cumsum([len(of_one) for of_one in targets])[:-1]
    scored = zip(numbers, np.split(losses, splits), np.split(greedy, splits), strict=True)
    return {number: Score(float(loss.mean()), bool(likeliest.all())) for number, loss, likeliest in scored}


def _losses(
    model: LanguageModel, hidden: Tensor, which: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The loss (N,) of `targets` (N,) after the places `which` (N,) of hidden (P, width), float64 of fp32 values, and
    whether each is the argmax. A place is scored once, whatever follows it."""
    order = np.argsort(which, kind="stable")
    losses, greedy = np.zeros(len(which)), np.zeros(len(which), dtype=bool)
    step = max(1, SCORES_AT_ONCE // model.spec.vocab_size)
    for first in range(0, len(hidden), step):
        mine = order[np.searchsorted(which[order], first) : np.searchsorted(which[order], first + step)]
        scores = model.scores(hidden[first : first + step])
        rows = torch.from_numpy(which[mine] - first).to(hidden.device)
        wanted = torch.from_numpy(targets[mine]).to(hidden.device)
        losses[mine] = (scores.logsumexp(-1)[rows] - scores[rows, wanted]).double().cpu().numpy()
        greedy[mine] = (scores.argmax(-1)[rows] == wanted).cpu().numpy()
    return losses, greedy


def _seen(ends: Tensor, places: Tensor) -> Tensor:
    """Whether queries at `places` (B, Q) of rows with these `ends` (B, T) see each key, (B, 1, Q, T)."""
    there, places = torch.arange(ends.size(1), device=ends.device), places[..., None]
    return ((there <= places) & (places < ends[:, None]))[:, None]


def _attend(stem: int, seen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, T, H, D) to k and v (B, T, KV, D), causal among the first `stem` places; those behind them
    attend where `seen` (B, 1, T - stem, T) says so."""
    y = attention(q[:, :stem], k[:, :stem], v[:, :stem], "sdpa")
    return torch.cat((y, _masked(seen, q[:, stem:], k, v)), 1) if seen.size(2) else y


def _attend_at(at: np.ndarray, ends: Tensor, attend: Attend) -> Attend:
    """Attention of the queries (N, H, D) of the places `at` (N,), in order, among the B·T of rows with these `ends`
    (B, T): by `attend` where they are so many that it costs less."""
    rows, places = np.divmod(at, ends.size(1))
    numbers = np.arange(len(at)) - np.searchsorted(rows, rows)  # of a place among those of its row
    most = int(numbers.max()) + 1
    if 2 * most <= ends.size(1):
        asked = np.zeros((len(ends), most), dtype=np.int64)
        asked[rows, numbers] = places
        attend = partial(_masked, _seen(ends, torch.from_numpy(asked).to(ends.device)))
    else:
        numbers, most = places, ends.size(1)
    row, number = (torch.from_numpy(a).to(ends.device) for a in (rows, numbers))

    def laid_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q.new_zeros(len(ends), most, *q.shape[1:])
        queries[row, number] = q
        return attend(queries, k, v)[row, number]

    return laid_out


def _masked(seen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
