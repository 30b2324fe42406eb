"""What a model says to the same few prompts, from base to RL: the likeliest token every time, so that its weights alone
decide, and no random number is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import torch

from corpus.conversation import render_prompt
from corpus.tokenizers import ANSWER_ENDS, DOCUMENT_ENDS, Tokenizer, UnknownCharacterError
from models.generate import Turns, generate
from models.layers import LanguageModel
from models.spec import ModelSpec
from stages.rl.rollout import Completions, RolloutPool
from stages.training.parallel import World, autocast

PROMPTS = (
    "",
    "The capital of France is",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
    "The planets of the solar system are",
    "Once upon a time there was",
    "If 5*x + 3 = 13, then x is",
    "My favourite colour is",
)
SAMPLE_TOKENS = 48

Samples = list[dict[str, str]]  # of each prompt {"prompt", "text"}


def prompts_of(tokenizer: Tokenizer, sequence_len: int, chat: bool) -> dict[str, list[int]]:
    """PROMPTS by their tokens: the beginning of a document, or in a `chat` what the user says, which is never nothing.
    Without those that the tokenizer cannot write, or that leave no room in a context of `sequence_len` tokens."""
    found: dict[str, list[int]] = {}
    for prompt in PROMPTS[chat:]:
        with suppress(UnknownCharacterError):
            if chat:
                ids = render_prompt([{"role": "user", "content": prompt}], tokenizer)
            else:
                ids = [tokenizer.bos, *tokenizer.encode(prompt)]
            if len(ids) < sequence_len:
                found[prompt] = ids
    return found


def samples(prompts: Mapping[str, list[int]], groups: Completions, tokenizer: Tokenizer, chat: bool) -> Samples:
    """What followed each prompt, up to where its document or its turn ended."""
    end, found = tokenizer.special((ANSWER_ENDS if chat else DOCUMENT_ENDS)[0]), Samples()
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        tokens = completion.tokens
        said = tokens[: tokens.index(end)] if end in tokens else tokens
        found.append({"prompt": prompt, "text": tokenizer.decode(said)})
    return found


class Speaker:
    """Has a model in training go on from the prompts, or answer them in a `chat`; every rank takes part."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, world: World, precision: str, chat: bool) -> None:
        self._tokenizer, self._world, self._precision, self._chat = tokenizer, world, precision, chat
        self._prompts = prompts_of(tokenizer, spec.sequence_len, chat)

    def __call__(self, model: LanguageModel) -> Samples:
        # without an end, so that all ranks run the model equally often, as sharded weights need, whatever each rounds
        turns = Turns((), None, lambda call: [])
        ids, seeds = list(self._prompts.values()), [(0,)] * len(self._prompts)
        write = partial(generate, model, turns, ids, seeds, 1, SAMPLE_TOKENS, greedy=True)
        eager = torch.compiler.set_stance("force_eager")  # rows of many lengths, each seen once
        with torch.no_grad(), eager, autocast(self._world.device, self._precision):
            groups = model.run(write)
        return samples(self._prompts, groups, self._tokenizer, self._chat)


def answered(pool: RolloutPool, prompts: Mapping[str, list[int]], tokenizer: Tokenizer, world: World) -> Samples:
    """What the policy that `pool` samples from answers to its `prompts`; every rank takes part, and has it all."""
    mine = dict(world.slice(list(prompts.items())))
    groups = pool.sample(list(mine.values()), [(0,)] * len(mine), 1, SAMPLE_TOKENS, greedy=True)
    return [one for part in world.everyone(samples(mine, groups, tokenizer, chat=True)) for one in part]
