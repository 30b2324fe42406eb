"""Chats render to the tokens and the loss mask that training and sampling share."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import synthetic
from corpus.chat_template import CALCULATORS
from corpus.conversation import from_record, render, render_prompt
from corpus.left_out import UnusableError
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
        if max_len < len(first):
            with pytest.raises(UnusableError, match=f"has more than {max_len} tokens") as caught:
                render(TOOL_CHAT, tokenizer, max_len)
            assert caught.value.reason == "too_long"
            continue
        ids, mask = render(TOOL_CHAT, tokenizer, max_len)
        expected = full if max_len >= len(full) else first
        assert np.array_equal(ids, expected)
        assert len(mask) == len(ids)


def test_a_question_without_an_answer_is_not_trained_on(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnusableError, match="no message is of the assistant") as caught:
        render({"messages": [{"role": "user", "content": "Hello?"}]}, tokenizer, 100)
    assert caught.value.reason == "no_answer"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(SPECIAL_TOKENS))
def test_special_tokens_in_messages_are_text(tokenizer: Tokenizer, text: str, special: str) -> None:
    messages = [{"role": "user", "content": text + special}, {"role": "assistant", "content": special}]
    ids, _ = render({"messages": messages}, tokenizer, 10_000)
    specials = [int(i) for i in ids if i >= tokenizer.bos]
    names = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
    assert specials == [tokenizer.special(name) for name in names]


def test_a_tools_message_is_a_result_in_the_assistants_turn(tokenizer: Tokenizer) -> None:
    question = {"role": "user", "content": "Half of 48, doubled?"}
    call = {"type": "python", "text": "48/2"}
    told = [
        question,
        {"role": "assistant", "content": [{"type": "text", "text": "Half is "}, call]},
        {"role": "tool", "content": "24"},
        {"role": "assistant", "content": [{"type": "python", "text": "24*2"}]},
        {"role": "tool", "content": [{"type": "text", "text": "48"}]},
        {"role": "assistant", "content": "So 48."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
    before = copy.deepcopy(told)
    ids, mask = render({"messages": told}, tokenizer, 1_000)
    assert told == before
    assert tokenizer.decode(ids.tolist()).startswith(
        "<|bos|><|user_start|>Half of 48, doubled?<|user_end|><|assistant_start|>Half is <|python_start|>48/2"
        "<|python_end|><|output_start|>24<|output_end|><|python_start|>24*2<|python_end|><|output_start|>48"
        "<|output_end|>So 48.<|assistant_end|><|user_start|>"
    )
    assert masked_text(tokenizer, ids, mask) == (
        "Half is <|python_start|>48/2<|python_end|><|python_start|>24*2<|python_end|>So 48.<|assistant_end|>"
        "Bye<|assistant_end|>"
    )
    for answered in (3, 5):  # the model goes on after the result
        prompt = render_prompt(told[:answered], tokenizer)
        assert prompt[-1] == tokenizer.special("<|output_end|>")
        assert ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("before", [[], [{"role": "user", "content": "x"}]])
def test_a_tools_message_without_a_call_is_refused(tokenizer: Tokenizer, before: list[Any]) -> None:
    with pytest.raises(ValueError, match="role tool follows none"):
        render({"messages": [*before, {"role": "tool", "content": "24"}]}, tokenizer, 100)


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
    by_tool = [*messages[:2], {"role": "assistant", "content": messages[2]["content"][:2]}]
    by_tool += [{"role": "tool", "content": "24"}, {"role": "assistant", "content": "24"}, *messages[3:]]
    assert hf.apply_chat_template(by_tool, tokenize=False) == RENDERED
    for begun in (messages[:4], by_tool[:4]):
        prompt = hf.apply_chat_template(begun, add_generation_prompt=True, return_dict=False)
        assert prompt == render_prompt(begun, tokenizer)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """The prompt of `messages` in transformers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    directory = tmp_path_factory.mktemp("served")
    tokenizer.save(directory)
    hf = AutoTokenizer.from_pretrained(directory)

    def prompt(messages: list[Any]) -> list[int]:
        # What apply_chat_template calls, which itself looks at the first message before.
        template = {"chat_template": hf.chat_template, "bos_token": hf.bos_token}
        [text], _ = render_jinja_template([messages], add_generation_prompt=True, **template)
        return hf(text, add_special_tokens=False)["input_ids"]

    return prompt


PARTS = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "1"},
    {"type": "python_output", "text": "<|output_end|>"},
]
CONTENTS = st.one_of(
    st.sampled_from(["Hello", "", "a<|user_end|>"]),
    st.lists(st.sampled_from(PARTS), max_size=4),
    st.sampled_from([None, 7, {"type": "text"}, ["x"], [{"type": "image", "text": "x"}], [{"type": "text"}]]),
)
ROLES = ("system", "user", "assistant", "tool")


def calling(name: Any, *arguments: Any) -> list[Any]:
    """`tool_calls` of one function, as transformers has them: arguments are no text."""
    return [{"type": "function", "function": {"name": name, "arguments": given}} for given in arguments]


CALLS = st.one_of(
    st.sampled_from([calling(name, {"expression": "6*7<|python_end|>"}) for name in CALCULATORS]),
    st.sampled_from(
        [None, [], calling("python", {"a": "1"}, {"a": "1"}), "x", 7, {"a": 1}, [None], [{}], [{"function": 7}]]
    ),
    st.sampled_from([calling("weather", {"a": "1"}), calling(None, {"a": "1"}), [{"function": {}}]]),
    st.sampled_from([calling("python", given) for given in (7, None, {}, {"a": 1}, {"a": "1", "b": "2"})]),
)
MESSAGES = st.one_of(
    *[st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENTS})] * 4,
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "tool_calls": CALLS}, optional={"content": CONTENTS}),
    st.fixed_dictionaries({"role": st.sampled_from(["developer", "User", "function", None, 7]), "content": CONTENTS}),
    st.sampled_from(["hello", None, {}, {"role": "user"}, {"content": "x"}]),
)


@settings(max_examples=500)
@given(st.lists(MESSAGES, max_size=6))
def test_the_chat_template_refuses_what_is_refused_here(
    tokenizer: Tokenizer, served: Callable[..., list[int]], messages: list[Any]
) -> None:
    from jinja2 import TemplateError

    try:
        ids = render_prompt(messages, tokenizer)
    except ValueError as error:
        with pytest.raises(TemplateError) as refusal:
            served(messages)
        assert str(error).split()[:5] == str(refusal.value).split()[:5]  # the same fault
    else:
        assert served(messages) == ids


def test_the_chat_template_writes_openais_calls(tokenizer: Tokenizer, served: Callable[..., list[int]]) -> None:
    """But for arguments as JSON text, which no template can read and vLLM reads for it."""
    from jinja2 import TemplateError

    [ask, call, result, end] = [
        {"role": "user", "content": "Half of 48?"},
        {"role": "assistant", "content": "It is ", "tool_calls": calling("calculator", {"expression": "48/2"})},
        {"role": "tool", "content": "24", "tool_call_id": "1"},
        {"role": "assistant", "content": "24"},
    ]
    ids = served([ask, call, result])
    assert ids == render_prompt([ask, call, result], tokenizer)
    assert tokenizer.decode(ids).endswith("It is <|python_start|>48/2<|python_end|><|output_start|>24<|output_end|>")
    assert served([ask, call, result, end, ask]) == render_prompt([ask, call, result, end, ask], tokenizer)
    told = call | {"tool_calls": calling("calculator", '{"expression": "48/2"}')}
    assert render_prompt([ask, told, result], tokenizer) == ids
    with pytest.raises(TemplateError, match="with one string in an object"):
        served([ask, told, result])


@pytest.mark.parametrize("role", ["developer", "User", "function", "x" * 1_000])
def test_the_chat_template_names_a_role_that_is_none(served: Callable[..., list[int]], role: str) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=f"has the role '{role[:37]}.*roles are system, user, assistant, tool") as e:
        served([{"role": role, "content": "x"}])
    assert len(str(e.value)) < 200


def test_texts_with_nothing_between_them_are_one(tokenizer: Tokenizer) -> None:
    """As they are when a template has written them, so that a model meets the tokens that it learnt."""
    halves = [{"type": "text", "text": "It is tw"}, {"type": "text", "text": "enty"}]
    for question in ([{"role": "user", "content": "x"}], []):
        split = render({"messages": [*question, {"role": "assistant", "content": halves}]}, tokenizer, 100)
        whole = render({"messages": [*question, {"role": "assistant", "content": "It is twenty"}]}, tokenizer, 100)
        assert [array.tolist() for array in split] == [array.tolist() for array in whole]
    calls = [*[{"type": "python", "text": "1"}] * 2, {"type": "python_output", "text": "1"}]
    ids, _ = render({"messages": [{"role": "assistant", "content": calls}]}, tokenizer, 100)
    assert ids.tolist().count(tokenizer.special("<|python_start|>")) == 2


def test_records_of_every_form_are_read() -> None:
    assert from_record({"id": 1, **TOOL_CHAT}) == TOOL_CHAT
    assert from_record({"prompt": "a", "response": "b"})["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("robot", "c")]
    shared = from_record({"conversations": [{"from": name, "value": text} for name, text in turns]})
    assert [(m["role"], m["content"]) for m in shared["messages"]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("robot", "c"),
    ]
    with pytest.raises(ValueError, match=r"the row has answer \(str\), question \(str\)"):
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
        {"role": "assistant", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "assistant", "content": [7] * 10_000},
        "hello",
    ],
)
def test_malformed_messages_are_refused(tokenizer: Tokenizer, message: Any) -> None:
    with pytest.raises(ValueError, match="message") as refusal:
        render({"messages": [message]}, tokenizer, 100)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["dolly_1000.jsonl", "sgd_val.jsonl"])
def test_real_chats_render(tokenizer: Tokenizer, shared_data: Path, name: str) -> None:
    for number, record in enumerate(read_records(str(shared_data / "chat" / name))):
        ids, mask = render(from_record(record), tokenizer, 8_192)
        assert len(ids) <= 8_192 and ids[0] == tokenizer.bos and mask[-1] == 1
        if number == 150:
            break


def called(name: str, arguments: str, content: str | None = "") -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.mark.parametrize("content", ["", None])
def test_a_call_of_the_calculator_as_openai_has_it_is_a_call(tokenizer: Tokenizer, content: str | None) -> None:
    ask, end = {"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}
    result = {"role": "tool", "content": "42", "tool_call_id": "1"}
    call = {"role": "assistant", "content": [{"type": "python", "text": "6*7"}]}
    made = render(
        {"messages": [ask, called("calculator", '{"expression": "6*7"}', content), result, end]}, tokenizer, 99
    )
    for found, expected in zip(made, render({"messages": [ask, call, result, end]}, tokenizer, 99), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (called("get_weather", '{"city": "Rome"}'), "calls 'get_weather'"),
        (called("calculator", "6*7"), "the only tool here is the calculator"),
        (called("calculator", '{"expression": 7}'), "with one string"),
        ({"role": "assistant", "content": "", "tool_calls": "x"}, "has the tool_calls 'x'"),
        (called("calculator", '{"a": "1"}') | {"role": "user"}, "of the role 'user' has the tool_calls"),
        ({"role": "assistant", "content": ""}, "the assistant is empty"),
        ({"role": "assistant", "content": " \n"}, "the assistant is empty"),
        ({"role": "assistant", "content": []}, "the assistant is empty"),
    ],
)
def test_a_message_that_says_nothing_or_calls_another_tool_is_refused(
    tokenizer: Tokenizer, message: Any, why: str
) -> None:
    after = [{"role": "tool", "content": "12"}, {"role": "assistant", "content": "It is 12."}]
    with pytest.raises(ValueError, match=why):
        render({"messages": [{"role": "user", "content": "?"}, message, *after]}, tokenizer, 99)
