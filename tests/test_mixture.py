"""Mixtures: parts of every format, woven evenly, in bounded memory, the same every time."""

from __future__ import annotations

import json
import re
import tomllib
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT

from corpus import synthetic
from corpus.conversation import render
from corpus.left_out import UnusableError
from corpus.sources import read_records
from corpus.tokenizers import Tokenizer
from tasks import choices, spelling
from tasks.base import NumberProblems, Problem, conversation_of
from tasks.gsm8k import GSM8K
from tasks.mixture import Part, beyond, conversations, mixture, sizes

RECORDS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(synthetic.documents(0, 200, 0), 500)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """JSONL of conversations that say their number."""
    path = tmp_path_factory.mktemp("data") / "numbered.jsonl"
    write(path, [{"prompt": "Which?", "response": str(i)} for i in range(RECORDS)])
    return str(path)


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def said(conversation: dict[str, Any], turn: int = -1) -> str:
    content = conversation["messages"][turn]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, RECORDS), st.integers(1, 3)), min_size=1, max_size=4))
def test_every_part_is_spread_evenly(numbered: str, shape: list[tuple[int, int]]) -> None:
    parts = {f"p{i}": Part(source=numbered, rows=rows, repeats=repeats) for i, (rows, repeats) in enumerate(shape)}
    woven = list(mixture(parts, 0))
    assert woven == list(mixture(parts, 0))
    counts = sizes(parts)
    assert counts == {f"p{i}": rows * repeats for i, (rows, repeats) in enumerate(shape)}
    for name, part in parts.items():
        assert [said(c) for n, c in woven if n == name] == [str(i) for i in range(part.rows or 0)] * part.repeats
    for length in range(len(woven) + 1):
        seen = Counter(name for name, _ in woven[:length])
        # Up to any position of the whole each part has given its share to within half a conversation. Compared with
        # what all parts have given, that is half a conversation for two parts, and a little more for many.
        for name, count in counts.items():
            share = count / len(woven)
            assert abs(seen[name] - length * share) <= 0.5 + (len(parts) - 2) * share / 2 + 1e-9


def test_of_equal_positions_the_earlier_part_comes_first(numbered: str) -> None:
    parts = {"b": Part(source=numbered, rows=2), "a": Part(source=numbered, rows=2)}
    assert [name for name, _ in mixture(parts, 0)] == ["b", "a", "b", "a"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, RECORDS), st.integers(1, 3), st.integers(1, 50)), min_size=1, max_size=4))
def test_weights_give_the_largest_mixture_in_their_proportion(numbered: str, shape: list[tuple[int, int, int]]) -> None:
    parts = {
        f"p{i}": Part(source=numbered, rows=rows, repeats=repeats, weight=weight / 10)
        for i, (rows, repeats, weight) in enumerate(shape)
    }
    most = [rows * repeats for rows, repeats, _ in shape]
    largest = min(available / weight for available, (_, _, weight) in zip(most, shape, strict=True))
    if any(largest * weight < 1 - 1e-9 for _, _, weight in shape):
        with pytest.raises(ValueError, match="too small for even one record"):
            sizes(parts)
        return
    counts = list(sizes(parts).values())
    assert all(count <= available for count, available in zip(counts, most, strict=True))
    assert any(count == available for count, available in zip(counts, most, strict=True))
    weights = [weight for _, _, weight in shape]
    share = max(count / weight for count, weight in zip(counts, weights, strict=True))
    assert counts == [int(share * weight + 1e-9) for weight in weights]


def test_a_weight_is_of_use_only_beside_others(numbered: str) -> None:
    parts = {"a": Part(source=numbered, weight=1), "b": Part(source=numbered), "c": Part(source=numbered)}
    with pytest.raises(ValueError, match="parts without a weight: b, c"):
        mixture(parts, 0)


def test_what_a_source_lacks_is_named(tmp_path: Path, numbered: str) -> None:
    rows = tmp_path / "rows.jsonl"
    write(rows, [{"instruction": "a", "output": "b"}])
    for format_, lacking, reason in (("chat", "messages", "no_conversation"), ("choices", "answerKey", "malformed")):
        part = Part(source=str(rows), format=format_)
        (fault,) = (found for name, found in mixture({"ok": Part(source=numbered), "x": part}, 0) if name == "x")
        assert isinstance(fault, UnusableError) and fault.reason == reason
        assert re.search(rf"rows\.jsonl, record 1: not a .*instruction.*, output.*{lacking}", str(fault))
    with pytest.raises(ValueError, match=r"without records: x \(.*rows"):
        mixture({"ok": Part(source=numbered), "x": Part(source=str(rows), format="spelling")}, 0)
    write(tmp_path / "train.jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match=r"train\.jsonl, row 1: it has question \(str\);"):
        list(mixture({"x": Part(source=str(tmp_path), format="gsm8k")}, 0))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"without records: x \(.*empty\.jsonl"):
        mixture({"ok": Part(source=numbered), "x": Part(source=str(tmp_path / "empty.jsonl"))}, 0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        mixture({"x": Part(source=str(tmp_path / "nowhere.jsonl"))}, 0)


def test_parts_are_streamed(tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": "x" * 5_000, "response": str(i)} for i in range(4_000)])
        sources.append(tmp_path / f"{name}.jsonl")
    tracemalloc.start()
    try:
        count = sum(1 for _ in mixture({path.stem: Part(source=str(path), repeats=2) for path in sources}, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 16_000
    assert peak < sum(path.stat().st_size for path in sources) / 3


def test_synthetic_problems_are_as_many_as_asked() -> None:
    part = Part(source="synthetic", format="gsm8k", rows=30)
    made = list(conversations(part, 1))
    assert sizes({"x": part}) == {"x": 30}
    assert len(made) == 30
    assert made == list(conversations(part, 1)) != list(conversations(part, 2))
    assert sizes({"x": Part(source="synthetic", format="gsm8k")}) == {"x": 40_000}


ARC = {"question": "Why?", "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "2"}
MMLU = {"question": "Why?", "choices": ["w", "x", "y"], "answer": 1, "subject": ""}


@pytest.mark.parametrize("record", [ARC, MMLU, {"train": MMLU}])
def test_a_choice_is_answered_by_its_letter(record: dict[str, Any]) -> None:
    question, answer = choices.conversation_of(record)["messages"]
    assert answer == {"role": "assistant", "content": "B"}
    assert question["content"].startswith("Why?\n\nA. w\nB. x\nC. y\n")


def test_choices_come_from_a_hub_dataset_by_configuration_and_split(tmp_path: Path) -> None:
    """In the hub's own layout, as the default mixtures name it."""
    layout = {
        "all": ("auxiliary_train", MMLU),
        "auxiliary_train": ("train", {"train": MMLU}),
        "ARC-Easy": ("train", ARC),
    }
    card = ["---", "configs:"]
    for config, (split, record) in layout.items():
        (tmp_path / config).mkdir()
        pq.write_table(pa.Table.from_pylist([record] * 3), tmp_path / config / f"{split}-00000-of-00001.parquet")
        card += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}/{split}-*"]
    (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
    for config, (split, _) in layout.items():
        part = Part(source=f"hub:{tmp_path}:{config}", split=split, format="choices", rows=2)
        assert [said(c) for c in conversations(part, 0)] == ["B", "B"]
        assert sizes({"x": part}) == {"x": 2}


@pytest.mark.parametrize(
    "record", [ARC | {"answerKey": "4"}, MMLU | {"answer": 3}, MMLU | {"answer": -1}, MMLU | {"choices": []}]
)
def test_a_question_whose_answer_is_no_choice_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no right answer among its choices: 'Why"):
        choices.conversation_of(record)


@pytest.mark.parametrize("name", ["arc/ARC-Easy.validation", "arc/ARC-Challenge.validation", "mmlu/validation"])
def test_real_choices_keep_their_answers(shared_data: Path, tokenizer: Tokenizer, name: str) -> None:
    source = str(shared_data / f"{name}.jsonl")
    part = Part(source=source, format="choices")
    rendered = list(conversations(part, 0))
    records = list(read_records(source))
    assert len(rendered) == len(records) == sizes({"x": part})["x"]
    for record, conversation in zip(records, rendered, strict=True):
        texts = record["choices"] if "answer" in record else record["choices"]["text"]
        right = record["answer"] if "answer" in record else record["choices"]["label"].index(record["answerKey"])
        asked, letter = said(conversation, 0), said(conversation)
        assert asked.startswith(record["question"])
        assert f"\n{letter}. {texts[right]}\n" in asked
        assert len(letter) == 1 and letter in ascii_uppercase[: len(texts)]
    # the answer's token is one of those that the question shows
    ids, mask = render(rendered[0], tokenizer, 2_048)
    answer = ids[mask == 1].tolist()
    assert answer == [*tokenizer.encode(said(rendered[0])), tokenizer.special("<|assistant_end|>")]
    assert len(answer) == 2 and answer[0] in ids[mask == 0]


def test_every_mark_of_gsm8k_becomes_a_call_and_its_result(shared_data: Path, tokenizer: Tokenizer) -> None:
    part = Part(source=str(shared_data / "gsm8k"), format="gsm8k")
    problems = GSM8K(part.source).problems("train")
    solved = list(conversations(part, 0))
    assert solved == [conversation_of(problem) for problem in problems]
    assert sizes({"x": part}) == {"x": len(solved)} == {"x": 7_473}
    without = 0
    for problem, conversation in zip(problems, solved, strict=True):
        parts = conversation["messages"][1]["content"]
        marks = re.findall(r"<<([^<>]*)=([^<>=]*)>>", problem.answer)
        calls = [(call, output) for call, output in pairwise(parts) if call["type"] == "python"]
        assert [(call["text"], output["text"]) for call, output in calls] == marks
        assert all(output["type"] == "python_output" for _, output in calls)
        assert "<<" not in said(conversation)
        without += not calls
    assert without == 95
    ids, mask = render(solved[0], tokenizer, 2_048)
    written = tokenizer.decode(ids[mask == 1].tolist())
    assert "<|python_start|>48/2<|python_end|>24 clips" in written
    assert "<|output_start|>" not in written


def test_words_are_spelled_and_letters_counted(shared_data: Path) -> None:
    source = str(shared_data / "wordlist" / "american-english")
    part = Part(source=source, format="spelling", rows=2_000)
    made = list(conversations(part, 3))
    assert made == list(conversations(part, 3)) != list(conversations(part, 4))
    words = set(spelling.read_words(source))
    assert "strawberry" in words and not any("'" in word for word in words)
    lower = {word.lower() for word in words}
    wordings, initials, absent = set(), set(), 0
    for conversation in made:
        question, answer = said(conversation, 0), said(conversation)
        spelled, _, count = answer.partition("\n")
        word = re.sub(r"\([0-9]+\)|-", "", spelled)
        assert word in question
        assert re.sub(r"\([0-9]+\)", "", spelled) == "-".join(word)
        wordings.add(re.sub(r"\b[a-z]\b", "#", question.replace(word, "@")))
        initials.add(word[0].lower())
        if not count:
            assert word in words
            continue
        assert word in lower
        # what is counted as it goes is one letter, and the last count is the answer
        marked = re.findall(r"([^-])\(([0-9]+)\)", spelled)
        assert [int(number) for _, number in marked] == list(range(1, len(marked) + 1))
        assert count == f"#### {len(marked)}"
        assert {word.count(letter) for letter, _ in marked} <= {len(marked)}
        assert not marked or re.search(rf"\b{marked[0][0]}\b", question)
        assert NumberProblems().grade(Problem(question, count), answer)["reward"] == 1.0
        absent += not marked
    assert len(initials) > 20  # not the first words of a sorted list
    assert len(wordings) >= len(spelling.SPELL) + len(spelling.COUNT)
    assert 0 < absent < len(made) / 8


def test_real_chats_are_a_part(shared_data: Path, tokenizer: Tokenizer) -> None:
    parts = {
        "sgd": Part(source=str(shared_data / "chat" / "sgd_train.jsonl"), rows=300),
        "dolly": Part(source=str(shared_data / "chat" / "dolly_1000.jsonl"), rows=100),
    }
    woven = list(mixture(parts, 0))
    assert Counter(name for name, _ in woven) == {"sgd": 300, "dolly": 100}
    for _, conversation in woven[:100]:
        ids, mask = render(conversation, tokenizer, 20_000)
        assert len(ids) and mask[-1] == 1


def test_the_default_mixtures_are_nanochats(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = tomllib.loads((ROOT / "pipeline" / "mixtures" / "nanochat.toml").read_text(encoding="utf-8"))
    parts = {stage: {name: Part(**part) for name, part in stages[stage].items()} for stage in stages}
    # the sizes of the data sets, from their cards
    rows = {
        "smol-smoltalk": 460_341,
        "mmlu:all": 99_842,
        "gsm8k:main": 7_473,
        "ARC-Easy": 2_251,
        "ARC-Challenge": 1_119,
    }

    def count(spec: str, split: str, limit: int | None) -> int:
        return next(n for name, n in rows.items() if spec.endswith(name))

    monkeypatch.setattr("tasks.mixture.count_records", count)
    assert {stage: sizes(named) for stage, named in parts.items()} == {
        "mid": {"smoltalk": 460_000, "mmlu": 99_842, "gsm8k": 7_473},
        "sft": {"arc_easy": 2_251, "arc_challenge": 1_119, "gsm8k": 7_473, "smoltalk": 10_000},
    }


def test_what_rows_leaves_out_is_counted_only_where_nothing_must_be_fetched(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}] * 5)
    assert beyond(Part(source=str(tmp_path / "a.jsonl"), rows=2, repeats=3)) == 9
    assert beyond(Part(source="hub:nobody/nothing", rows=2)) == beyond(Part(source="s3://nowhere/a.jsonl", rows=2)) == 0
