"""Chats render to the tokens and the loss mask that training and sampling share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import synthetic
from corpus.conversation import from_record, render, render_prompt
from corpus.sources import read_records
from corpus.tokenizers import SPECIAL_TOKENS, Tokenizer

TOOL_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Half of 48?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "48/2"},
                {"type": "python_output", "text": "24"},
                {"type": "text", "text": "24"},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}
RENDERED = (
    "<|bos|><|user_start|>Be brief.\n\nHalf of 48?<|user_end|><|assistant_start|>It is <|python_start|>48/2"
    "<|python_end|><|output_start|>24<|output_end|>24<|assistant_end|><|user_start|>Thanks<|user_end|>"
    "<|assistant_start|>Bye<|assistant_end|>"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(synthetic.documents(0, 200, 0), 500)


def masked_text(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    return tokenizer.decode(ids[mask == 1].tolist())


def test_the_mask_covers_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    ids, mask = render(TOOL_CHAT, tokenizer, 1_000)
    assert tokenizer.decode(ids.tolist()) == RENDERED
    assert masked_text(tokenizer, ids, mask) == (
        "It is <|python_start|>48/2<|python_end|>24<|assistant_end|>Bye<|assistant_end|>"
    )
    assert (ids.dtype, mask.dtype) == (np.int64, np.uint8)


def test_exchanges_that_do_not_fit_are_dropped_whole(tokenizer: Tokenizer) -> None:
    full, _ = render(TOOL_CHAT, tokenizer, 1_000)
    first, _ = render({"messages": TOOL_CHAT["messages"][:3]}, tokenizer, 1_000)
    for max_len in range(len(full) + 2):
        ids, mask = render(TOOL_CHAT, tokenizer, max_len)
        expected = full if max_len >= len(full) else first if max_len >= len(first) else full[:0]
        assert np.array_equal(ids, expected)
        assert len(mask) == len(ids)


def test_a_question_without_an_answer_is_not_trained_on(tokenizer: Tokenizer) -> None:
    ids, mask = render({"messages": [{"role": "user", "content": "Hello?"}]}, tokenizer, 100)
    assert len(ids) == len(mask) == 0


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(SPECIAL_TOKENS))
def test_special_tokens_in_messages_are_text(tokenizer: Tokenizer, text: str, special: str) -> None:
    messages = [{"role": "user", "content": text + special}, {"role": "assistant", "content": special}]
    ids, _ = render({"messages": messages}, tokenizer, 10_000)
    specials = [int(i) for i in ids if i >= tokenizer.bos]
    names = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
    assert specials == [tokenizer.special(name) for name in names]


def test_the_prompt_is_the_head_of_the_conversation(tokenizer: Tokenizer) -> None:
    ids, _ = render(TOOL_CHAT, tokenizer, 1_000)
    for asked in (2, 4):
        prompt = render_prompt(TOOL_CHAT["messages"][:asked], tokenizer)
        assert ids[: len(prompt)].tolist() == prompt
        assert prompt[-1] == tokenizer.special("<|assistant_start|>")


def test_the_chat_template_writes_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    messages = TOOL_CHAT["messages"]
    assert hf.apply_chat_template(messages, tokenize=False) == RENDERED
    ids = hf.apply_chat_template(messages, return_dict=False)
    assert ids == render(TOOL_CHAT, tokenizer, 1_000)[0].tolist()
    prompt = hf.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(messages[:4], tokenizer)


def test_records_of_both_forms_are_read() -> None:
    assert from_record({"id": 1, **TOOL_CHAT}) == TOOL_CHAT
    assert from_record({"prompt": "a", "response": "b"})["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(ValueError, match="the row has answer, question"):
        from_record({"question": "a", "answer": "b"})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["x"]},
        {"role": "assistant", "content": [{"type": "image", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "text"}]},
        "hello",
    ],
)
def test_malformed_messages_are_refused(tokenizer: Tokenizer, message: Any) -> None:
    with pytest.raises(ValueError, match="message"):
        render({"messages": [message]}, tokenizer, 100)


@pytest.mark.parametrize("name", ["dolly_1000.jsonl", "sgd_val.jsonl"])
def test_real_chats_render(tokenizer: Tokenizer, shared_data: Path, name: str) -> None:
    for number, record in enumerate(read_records(str(shared_data / "chat" / name))):
        ids, mask = render(from_record(record), tokenizer, 2_048)
        assert len(ids) <= 2_048
        assert not len(ids) or (ids[0] == tokenizer.bos and mask[-1] == 1)
        if number == 150:
            break
