"""Scoring: the losses of trees of sequences, and the conventions of CORE."""

from __future__ import annotations

import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Storage
from corpus.tokenizers import META_FILE, Tokenizer
from models.build import build
from models.hf import save_pretrained
from models.layers import LanguageModel
from models.spec import Family, ModelSpec
from pipeline.faults import is_users
from stages.evaluation.measure import Kept, in_words, summary
from stages.evaluation.score import TREE_TOKENS, Request, Score, batches, grow, score
from stages.evaluation.stage import told
from stages.evaluation.text import open_text
from tasks import arc, mmlu
from tasks.calculator import calculate
from tasks.core import EXAMPLES, ORDER, Bundle, centered, core
from tasks.estimates import core_difference, interval_of_core, interval_of_ratio, same_share
from tasks.generated import GeneratedTask
from tasks.gsm8k import GSM8K
from tasks.perplexity import Perplexity
from tasks.ranking import Question, accuracy, answer, question, within
from tasks.suite import at_hand, suite

FAMILIES: tuple[Family, ...] = ("depth", "gpt2", "llama", "qwen3")
VOCABULARY, CONTEXT = 300, 64


class Bytes:
    """A tokenizer whose ids are bytes."""

    bos = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        return [self.bos, *self.encode(str(messages)), 257]


def tiny(family: Family) -> LanguageModel:
    model = build(ModelSpec.from_dial(family, 2, VOCABULARY, CONTEXT))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as some begin at zero, where attention and position say nothing
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def scored(model: LanguageModel, requests: list[Request], tokens_at_once: int = 256) -> list[Score]:
    found: dict[int, Score] = {}
    for batch in batches(grow(requests, model.spec), tokens_at_once):
        found |= score(model, batch)
    return [found[i] for i in range(len(requests))]


@torch.no_grad()
def alone(model: LanguageModel, request: Request) -> tuple[float, bool]:
    """Loss and greedy of one sequence, in a plain pass of its own."""
    ids = torch.from_numpy(request.tokens)[None]
    logits = model.logits(ids[:, :-1])[0, request.start - 1 :]
    wanted = ids[0, request.start :]
    loss = torch.nn.functional.cross_entropy(logits, wanted).item()
    return loss, bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(data=st.data())
def test_losses_are_those_of_each_sequence_alone(family: Family, data: st.DataObject) -> None:
    """Whatever the sequences share at their beginning, and however they are batched."""
    model = tiny(family)
    tokens = st.integers(0, 3) | st.integers(0, VOCABULARY - 1)  # few ids, so that much is shared
    stem = data.draw(st.lists(tokens, min_size=1, max_size=40))
    requests = []
    for _ in range(data.draw(st.integers(1, 8))):
        own = data.draw(st.lists(tokens, min_size=1, max_size=CONTEXT - len(stem)))
        sequence = [*stem[: data.draw(st.integers(1, len(stem)))], *own]
        requests.append(Request(np.array(sequence), data.draw(st.integers(1, len(sequence) - 1))))
    found = scored(model, requests, data.draw(st.sampled_from((1, 100, 10_000))))
    for request, of_one in zip(requests, found, strict=True):
        loss, greedy = alone(model, request)
        assert of_one.loss == pytest.approx(loss, abs=1e-5)
        assert of_one.greedy == greedy


def test_what_options_share_is_computed_once() -> None:
    rng = np.random.default_rng(0)
    context = rng.integers(0, VOCABULARY, 50)
    requests = [Request(np.array([*context, *rng.integers(0, VOCABULARY, 5)]), 50) for _ in range(4)]
    trees = grow(requests, ModelSpec.from_dial("depth", 2, VOCABULARY, CONTEXT))
    assert [(tree.stem, tree.size) for tree in trees] == [(50 + 5, 50 + 4 * 5)]


def test_centered_accuracies_are_those_of_the_paper() -> None:
    assert centered(0.25, 25.0) == 0.0
    assert centered(1.0, 25.0) == 1.0
    assert centered(0.0, 50.0) == -1.0
    assert centered(0.4, 0.0) == 0.4
    assert core({"a": 0.625, "b": 0.1}, {"a": 25.0, "b": 0.0}) == pytest.approx((0.5 + 0.1) / 2)
    with pytest.raises(ValueError, match="none"):
        core({}, {})


def test_equal_models_differ_by_chance_as_a_coin_does() -> None:
    assert same_share(0, 0) == 1.0
    assert same_share(3, 3) == 1.0
    assert same_share(0, 5) == pytest.approx(2 / 32)
    assert same_share(9, 1) == pytest.approx(2 * (1 + 10) / 1024)


def test_scores_of_equal_models_differ_as_often_as_p_says() -> None:
    """Of one task with many questions that is McNemar's test; a task's weight is how far guessing is from its best."""
    assert core_difference([(0.0, [0, 0])]) == (0.0, 1.0)
    assert core_difference([(0.5, [1, 0, 0, 0]), (0.0, [0, -1])])[0] == pytest.approx((0.5 - 0.5) / 2)
    gained, lost = 60, 40
    signs = [1] * gained + [-1] * lost + [0] * 900
    difference, p = core_difference([(0.25, signs)])
    assert difference == pytest.approx(0.02 / 0.75)
    assert p == pytest.approx(same_share(gained, lost), abs=0.015)
    rng = np.random.default_rng(0)
    ps = [core_difference([(0.25, rng.integers(-1, 2, 80)), (0.5, rng.integers(-1, 2, 30))])[1] for _ in range(2_000)]
    assert sum(p < 0.05 for p in ps) / len(ps) == pytest.approx(0.05, abs=0.015)


def test_the_interval_of_core_narrows_with_examples_and_labels() -> None:
    half = {"accuracy": 0.5, "baseline": 0.0, "examples": 100}
    assert interval_of_core([half]) == pytest.approx((0.5 - 1.959964 * 0.05, 0.5 + 1.959964 * 0.05))
    of_choices = half | {"baseline": 0.5}
    assert interval_of_core([of_choices]) == pytest.approx((-1.959964 * 0.1, 1.959964 * 0.1))
    low, high = interval_of_core([half] * 4)
    assert high - low == pytest.approx(1.959964 * 0.05)


ENTRIES = """icl_tasks:
- {label: choose, dataset_uri: a/choose.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,
   continuation_delimiter: "\\nAnswer: "}
- {label: refer, dataset_uri: a/refer.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: finish, dataset_uri: b/finish.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""


def make_bundle(folder: Path, count: int = 12) -> Path:
    """A bundle of three labels, one of each kind."""
    rng = random.Random(0)
    names = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew"]

    def some(n: int) -> list[str]:
        return rng.sample(names, n)

    choose = [{"query": f"Question: {i}?", "choices": some(3), "gold": rng.randrange(3)} for i in range(count)]
    refer = [
        {"context_options": [f"The {a}, as the {a}", f"The {b}, as the {b}"], "continuation": "grew.", "gold": i % 2}
        for i, (a, b) in enumerate(some(2) for _ in range(count))
    ]
    finish = [{"context": f"The tree {i} is an ", "continuation": some(1)[0]} for i in range(count)]
    for path, rows in (("a/choose", choose), ("a/refer", refer), ("b/finish", finish)):
        file = folder / "eval_data" / f"{path}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text(ENTRIES)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoose,33\nrefer,50\nfinish,0\n")
    return folder


def test_examples_before_a_question_are_drawn_as_nanochat_draws_them(tmp_path: Path) -> None:
    task = Bundle(str(make_bundle(tmp_path))).tasks[0]
    rows = [json.loads(line) for line in (tmp_path / "eval_data/a/choose.jsonl").read_text().splitlines()]
    random.Random(ORDER).shuffle(rows)
    for index, asked in enumerate(task.questions(Bytes(), None)):
        others = [i for i in range(len(rows)) if i != index]
        shots = [rows[i] for i in random.Random(EXAMPLES + index).sample(others, 2)]
        before = "".join(f"{shot['query']}\nAnswer: {shot['choices'][shot['gold']]}\n\n" for shot in shots)
        texts = [f"{before}{rows[index]['query']}\nAnswer: {choice}" for choice in rows[index]["choices"]]
        assert [bytes(option[1:]).decode() for option in asked.options] == texts
        assert all(option[0] == Bytes.bos for option in asked.options)
        assert asked.gold == rows[index]["gold"]


def test_each_kind_scores_what_the_others_do_not_share() -> None:
    text = Bytes()
    choices = question("multiple_choice", ["to be", "to bark", "to sit"], 1, text)
    assert [bytes(o[s:]) for o, s in zip(choices.options, choices.starts, strict=True)] == [b"be", b"bark", b"sit"]
    schema = question("schema", ["a cat ran.", "the dog ran."], 0, text)
    assert [bytes(o[s:]) for o, s in zip(schema.options, schema.starts, strict=True)] == [b" ran."] * 2
    finish = question("language_modeling", ["two and", "two and two"], None, text)
    assert (len(finish.options), bytes(finish.options[0][finish.starts[0] :])) == (1, b" two")
    inside = question("multiple_choice", ["yes", "yes it is"], 0, text)  # one is the beginning of the other
    assert bytes(inside.options[0][inside.starts[0] :]) == b"s"


def test_of_equal_losses_the_first_counts_and_words_have_all_to_be_the_likeliest() -> None:
    asked = Question(((1, 2), (1, 3)), (1, 1), 0)
    assert answer(asked, [1.0, 1.0], False).correct
    assert not answer(asked, [1.0, 0.5], True).correct
    assert answer(Question(((1, 2),), (1,), None), [9.0], True).correct


def test_a_long_question_keeps_its_end_and_one_without_room_is_refused() -> None:
    asked = Question((tuple(range(10)), tuple(range(8))), (7, 7), 0)
    short = within(asked, 6)
    assert short.options == (tuple(range(4, 10)), tuple(range(2, 8)))
    assert short.starts == (3, 5)
    with pytest.raises(ValueError, match=r"3 tokens does not fit into the model's context of 3"):
        within(asked, 3)


def test_perplexity_predicts_every_token_once(tmp_path: Path) -> None:
    """A model to which all tokens are alike needs log2(vocabulary) bits a byte of a tokenizer of bytes."""
    documents = ["one two three", "four " * 20, "a"]
    task = Perplexity(lambda: iter(documents), 16, "")
    questions = list(task.questions(Bytes(), None))
    assert sum(len(q.options[0]) - 1 for q in questions) == sum(map(len, documents))
    assert all(len(q.options[0]) <= 16 for q in questions)
    found = task.figures([answer(q, [math.log(VOCABULARY)], False) for q in questions])
    assert found["bpb"] == pytest.approx(math.log2(VOCABULARY))
    words, length = 3 + 20 + 1, sum(map(len, documents))
    assert found["word_perplexity"] == pytest.approx(VOCABULARY ** (length / words))
    assert found["low"] == pytest.approx(found["bpb"]) == found["high"]  # no document differs from the others
    assert "low" not in Perplexity(lambda: iter(documents[:1]), 16, "").figures([])


def test_the_interval_of_bits_a_byte_holds_the_truth_as_often_as_it_says() -> None:
    """Documents of many lengths, each with bits a byte of its own around 2."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = rng.lognormal(5, 1, 60)
        low, high = interval_of_ratio([(size * rng.normal(2, 0.4), size) for size in sizes]) or (0.0, 0.0)
        held += low <= 2 <= high
    assert 0.88 < held / 400 < 0.98


def damaged(bundle: Path, kind: str) -> str:
    """Damages a bundle; what the message has to name."""
    if kind == "line":
        with (bundle / "eval_data/a/choose.jsonl").open("a") as file:
            file.write('{"query": "cut off')
        return r"choose.jsonl, line 13 is not JSON"
    if kind == "field":
        (bundle / "eval_data/b/finish.jsonl").write_text('{"context": "no end"}\n' * 3)
        return r"finish.jsonl, line 1.* continuation"
    if kind == "gold":
        (bundle / "eval_data/a/refer.jsonl").write_text('{"context_options": ["a"], "continuation": "b", "gold": 4}\n')
        return "number 4 of 1"
    if kind == "baseline":
        (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoose,33\n")
        return "no random baseline for refer"
    if kind == "csv":
        (bundle / "eval_meta_data.csv").unlink()
        return "no eval_meta_data.csv"
    if kind == "hundred":
        (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoose,100\nrefer,50\nfinish,nan\n")
        return "baseline of choose is 100.0, and must be a percentage below 100"
    if kind == "long field":
        (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "a" * 200_000 + ",0\n")
        return "needs the columns"
    if kind == "deep":
        (bundle / "core.yaml").write_text("[" * 20_000)
        return "core.yaml is not a list of tasks"
    if kind == "yaml":
        (bundle / "core.yaml").write_text("tasks: [")
        return "core.yaml is not a list of tasks"
    (bundle / "core.yaml").unlink()
    return "is no CORE bundle: it has no core.yaml"


DAMAGES = ["line", "field", "gold", "baseline", "csv", "hundred", "long field", "deep", "yaml", "core"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_bundle_is_named_with_the_place(tmp_path: Path, kind: str) -> None:
    bundle = make_bundle(tmp_path)
    said = damaged(bundle, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        for task in Bundle(str(bundle)).tasks:
            list(task.questions(Bytes(), None))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=int(os.environ.get("FATHOM_FUZZ", 200)), deadline=None)
def test_a_damaged_zip_is_whole_or_one_message(zipped: bytes, flips: list[tuple[int, int]]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".zip") as file:
        data = bytearray(zipped)
        for place, byte in flips:
            data[place % len(data)] = byte
        file.write(data)
        file.flush()
        try:
            for task in Bundle(file.name).tasks:
                list(task.questions(Bytes(), 2))
        except Exception as error:
            if not is_users(error):
                raise


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = make_bundle(tmp_path_factory.mktemp("bundle"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in folder.rglob("*.*"):
            file.write(path, path.relative_to(folder))
    return packed.getvalue()


class FirstReadingWrong:
    """The local file system, as a network would show it that flips a byte once a file."""

    def __init__(self) -> None:
        self.local, self.read = pafs.LocalFileSystem(), set[str]()

    def get_file_info(self, what: Any) -> Any:
        return self.local.get_file_info(what)

    def open_input_stream(self, path: str) -> Any:
        data = Path(path).read_bytes()
        if path not in self.read:
            self.read.add(path)
            data = data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :]
        return pa.BufferReader(data)


def test_one_bad_reading_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole, and nobody is told to get it again."""
    bundle = str(make_bundle(tmp_path))
    expected = [(task.stamp, list(task.questions(Bytes(), 3))) for task in Bundle(bundle).tasks]
    flaky = FirstReadingWrong()
    monkeypatch.setattr("tasks.core.filesystem_of", lambda place: (flaky, place))
    assert [(task.stamp, list(task.questions(Bytes(), 3))) for task in Bundle(bundle).tasks] == expected


def test_what_is_asked_is_what_the_answers_are_known_by(tmp_path: Path) -> None:
    task = Bundle(str(make_bundle(tmp_path))).tasks[0]
    stamp = task.stamp
    (tmp_path / "eval_data/a/choose.jsonl").write_text('{"query": "other?", "choices": ["a", "b"], "gold": 0}\n' * 4)
    assert len(list(task.questions(Bytes(), None))) == 12
    assert Bundle(str(tmp_path)).tasks[0].stamp != stamp


def test_a_bundle_is_read_from_a_folder_or_a_zip_and_says_what_it_lacks(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    for source in (folder, tmp_path / "bundle.zip", f"file://{folder}"):
        bundle = Bundle(str(source))
        assert [task.name for task in bundle.tasks] == ["choose", "refer", "finish"]
        assert [len(list(task.questions(Bytes(), 5))) for task in bundle.tasks] == [5, 5, 5]
        assert not bundle.incomplete
    (folder / "eval_data/a/refer.jsonl").unlink()
    found = suite(["core"], str(folder))
    assert [task.name for task in found.tasks] == ["choose", "finish"]
    assert found.incomplete == {"refer": "no eval_data/a/refer.jsonl"}


def test_fewer_examples_than_are_shown_before_a_question_draw_on_the_others(tmp_path: Path) -> None:
    task = Bundle(str(make_bundle(tmp_path))).tasks[0]
    assert len(list(task.questions(Bytes(), 1))) == 1


def test_what_is_kept_is_known_by_how_it_was_asked(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    before = {task.name: task.stamp for task in Bundle(str(bundle)).tasks}
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoose,20\nrefer,50\nfinish,0\n")
    (bundle / "core.yaml").write_text(
        ENTRIES.replace("uri: b/finish.jsonl", "uri: b/finish.jsonl, continuation_delimiter: '-'")
    )
    after = {task.name: task.stamp for task in Bundle(str(bundle)).tasks}
    assert {name for name in before if before[name] != after[name]} == {"choose", "finish"}


def test_a_place_that_is_not_there_is_no_reason_to_go_elsewhere(tmp_path: Path) -> None:
    for ask in (lambda: suite(["MMLU"], str(tmp_path / "no")), lambda: at_hand(str(tmp_path / "no"), chat=True)):
        with pytest.raises(FileNotFoundError, match="is not there; --eval-data"):
            ask()
    (tmp_path / "arc").mkdir()
    with pytest.raises(FileNotFoundError, match="arc has none of ARC-Easy"):
        suite(["ARC-Easy"], str(tmp_path))
    assert at_hand(str(tmp_path), chat=False) == []


def test_a_row_never_has_more_tokens_than_a_batch() -> None:
    rng = np.random.default_rng(0)
    stem = rng.integers(0, VOCABULARY, 400)
    requests = [Request(np.array([*stem, *rng.integers(0, VOCABULARY, 40)]), 400) for _ in range(400)]
    trees = grow(requests, ModelSpec.from_dial("llama", 16, VOCABULARY, 2048))
    assert max(tree.size for tree in trees) <= TREE_TOKENS
    assert sum(tree.size for tree in trees) < 20_000  # of 176,000


def test_a_limit_asks_of_all_subjects(shared_data: Path) -> None:
    first = [bytes(q.options[0][1:80]) for q in mmlu.task(str(shared_data / "mmlu")).questions(Bytes(), 50)]
    with (shared_data / "mmlu/test.jsonl").open() as file:
        subjects = {json.loads(row)["question"][:20]: json.loads(row)["subject"] for row in file}
    found = {subject for start, subject in subjects.items() if any(start.encode() in text for text in first)}
    assert len(found) > 15


@pytest.mark.parametrize("name", ["cores", "mmlu", "arc_easy", "GSM8k"])
def test_an_unknown_task_is_told_the_nearest(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no task '{name}'; did you mean"):
        suite([name], str(make_bundle(tmp_path)))


def test_real_questions_parse(shared_data: Path) -> None:
    text = Bytes()
    assert sum(1 for _ in mmlu.task(str(shared_data / "mmlu")).questions(text, None)) == 14_042
    for part, count in (("ARC-Easy", 570), ("ARC-Challenge", 299)):
        questions = list(arc.task(part, str(shared_data / "arc")).questions(text, None))
        assert len(questions) == count
        assert all(q.gold is not None and q.gold < len(q.options) for q in questions)
    bundle = Bundle(str(shared_data / "core"))
    assert len(bundle.tasks) == 22
    assert set(bundle.incomplete) == {"hellaswag", "hellaswag_zeroshot", "squad"}
    for task in bundle.tasks:
        for asked in task.questions(text, 3):
            assert len({option[start:] for option, start in zip(asked.options, asked.starts, strict=True)}) >= 1


def test_transformers_reads_the_same_of_a_directory_as_we_do(tmp_path: Path) -> None:
    """What a model of other makers is asked through, on a tokenizer that both know."""
    Tokenizer.train(["one two three four five six seven " * 20], 300).save(tmp_path)
    ours = open_text(tmp_path)
    (tmp_path / META_FILE).unlink()
    theirs = open_text(tmp_path)
    assert type(ours) is not type(theirs) and theirs.bos == ours.bos
    for text in ("one two", "", " three\n\n", "<|bos|> é 😀"):
        assert theirs.encode(text) == ours.encode(text)
    chat = [{"role": "user", "content": "one <|user_end|> two"}]
    assert theirs.prompt(chat) == ours.prompt(chat)
    assert theirs.decode([*ours.encode(" three"), *ours.turns({}).ends]) == " three"
    tools = {"python": calculate}
    assert ours.turns(tools).call and not theirs.turns(tools).call  # a call of ours means nothing to others
    assert theirs.turns({}).ends == ours.turns({}).ends
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert {7, 9} < set(theirs.turns({}).ends)


def test_a_directory_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """For these transformers makes a tokenizer of nothing, which gives no ids."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 300}')
    with pytest.raises(FileNotFoundError, match="has no tokenizer that transformers can read"):
        open_text(tmp_path)


@torch.no_grad()
def test_choices_are_those_of_transformers_under_lm_evals_prompt(tmp_path: Path, shared_data: Path) -> None:
    """ARC as lm-evaluation-harness asks it: `Question: ...\\nAnswer:`, a space, and the choice whose whole text is
    likeliest; its model class computes with transformers."""
    from transformers import AutoModelForCausalLM

    model = build(ModelSpec.from_dial("llama", 2, VOCABULARY, 1024))
    model.init_weights(0)
    save_pretrained(model, tmp_path, 256, [257], 258)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = (shared_data / "arc/ARC-Easy.validation.jsonl").read_text().splitlines()[:40]
    requests, expected = [], []
    for row in map(json.loads, rows):
        context = [Bytes.bos, *f"Question: {row['question']}\nAnswer:".encode()]
        likelihoods = []
        for choice in row["choices"]["text"]:
            ids = [*context, *f" {choice}".encode()]
            requests.append(Request(np.array(ids), len(context)))
            logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        expected.append(likelihoods)
    scores = iter(zip(requests, scored(model, requests, 8192), strict=True))
    for likelihoods in expected:
        ours = [
            -score.loss * (len(request.tokens) - request.start) for request, score in islice(scores, len(likelihoods))
        ]
        assert ours == pytest.approx(likelihoods, abs=1e-3)
        assert ours.index(max(ours)) == likelihoods.index(max(likelihoods))


CODE = """
import os, sys
from pathlib import Path
from stages.evaluation.stage import told
from stages.evaluation.text import open_text
answers, out = os.pipe()
os.write(out, b"y\\n" * 8)
os.dup2(answers, 0)
try:
    open_text(Path(sys.argv[1]))
except FileNotFoundError as error:
    print(error)
"""


def test_a_directory_runs_no_code_of_its_own(tmp_path: Path) -> None:
    """Whatever the terminal answers: a tokenizer that names a class of the directory is refused."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizer as Tok\n"
    (tmp_path / "evil.py").write_text(code)
    named = {"AutoTokenizer": ["evil.Tok", None], "AutoConfig": "evil.Config"}
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": named} | shape))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tok", "auto_map": named}))
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "has no tokenizer that transformers can read" in result.stdout, result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[]"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\x00"),
        ("tokenizer.json", b'{"version": "1.0", "model": {}}'),
    ],
)
def test_a_tokenizer_of_another_shape_is_one_message(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 300}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match="has no tokenizer that transformers can read"):
        open_text(tmp_path)


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ messages.x.y }}", "{% if"])
def test_a_chat_template_that_fails_is_one_message(tmp_path: Path, template: str) -> None:
    Tokenizer.train(["one two three " * 20], 300).save(tmp_path)
    (tmp_path / META_FILE).unlink()
    for file in tmp_path.glob("*.jinja"):
        file.unlink()
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    with pytest.raises(ValueError, match="the chat template of the model's tokenizer fails"):
        open_text(tmp_path).prompt([{"role": "user", "content": "one"}])


def test_a_bundle_reads_only_files(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "core.yaml")
    with pytest.raises(FileNotFoundError, match=r"has no core\.yaml"):
        Bundle(str(tmp_path))


def test_kept_answers_of_another_shape_are_asked_again(tmp_path: Path) -> None:
    task = Bundle(str(make_bundle(tmp_path / "bundle"))).tasks[0]
    kept = Kept(Storage(tmp_path / "kept"), "model", "fp32", "torch", None)
    figures = accuracy([True, False], task.baseline) | {"examples": 2, "few_shot": 2, "seconds": 0.1}
    examples = [{"task": "choose", "index": i, "correct": not i, "scores": [0.0]} for i in range(2)]
    kept.write(task, figures, examples)
    assert kept.read(task) == (figures, examples)
    [file] = (tmp_path / "kept").glob("*.json")
    whole = json.loads(file.read_text())
    for damage in ("[]", "{", '{"figures": 3}', '{"figures": {}, "examples": {}}'):
        file.write_text(damage)
        assert kept.read(task) is None
    of_text = {"bpb": 1.0, "word_perplexity": 2.0, "examples": 2, "few_shot": 0, "seconds": 0.1}
    for wrong in (
        {"figures": figures | {"accuracy": "[/x]"}},
        {"figures": {name: value for name, value in figures.items() if name != "low"}},
        {"figures": figures | {"examples": 1}},
        {"figures": figures | {"centered": 10**400}},
        {"figures": figures | {"baseline": 1}},
        {"figures": figures | {"accuracy": 0.25}},
        {"figures": of_text},
        {"examples": [examples[0] | {"correct": 3}, examples[1]]},
        {"examples": [examples[0], examples[1] | {"correct": True}]},
        {"examples": [examples[0] | {"task": "refer"}, examples[1]]},
        {"examples": [examples[0], examples[1] | {"index": 0}]},
        {"examples": [examples[0] | {"scores": [math.nan]}, examples[1]]},
    ):
        file.write_text(json.dumps({"figures": whole["figures"], "examples": whole["examples"]} | wrong))
        assert kept.read(task) is None, wrong


def test_kept_bits_a_byte_are_of_a_text_alone(tmp_path: Path) -> None:
    """Of problems answered in writing they would say nothing, and the table would ask them for an accuracy."""
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    kept = Kept(Storage(tmp_path / "kept"), "model", "fp32", "torch", None)
    asked = GeneratedTask("GSM8K", GSM8K(str(tmp_path)))
    text = Perplexity(lambda: iter(["a"]), 8, "")
    figures = {"bpb": 1.0, "word_perplexity": 2.0, "examples": 1, "few_shot": 0, "seconds": 0.1}
    for task in (asked, text):
        kept.write(task, figures, [{"task": task.name, "index": 0, "correct": True, "scores": [0.0]}])
    assert kept.read(asked) is None
    assert kept.read(text) is not None


def test_choices_are_known_by_what_is_asked(tmp_path: Path) -> None:
    """And not by where it is: size and time of a file, or the name of a data set at the hub, may stay as they were."""
    file, row = tmp_path / "test.jsonl", '{"question": "Which?", "choices": ["a", "b"], "answer": 1}\n'
    file.write_text(row * 3)
    before, times = mmlu.task(str(tmp_path)).stamp, file.stat()
    file.write_text(row * 2 + row.replace('"answer": 1', '"answer": 0'))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert mmlu.task(str(tmp_path)).stamp != before
    file.write_text(row * 2 + '{"question": "Which?"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, row 3: not a multiple-choice question: the row has question"):
        list(mmlu.task(str(tmp_path)).questions(Bytes(), 1))


def test_a_score_of_a_part_has_a_star_and_what_is_missing_is_told() -> None:
    """Of the bundle's labels, of their questions, or of the examples asked."""
    figures = {f"label{i}": accuracy([True, False], 0.25) | {"examples": 2} for i in range(22)}
    assert told(summary(figures, {}, {}), None) == ["CORE 0.3333"]
    part = {"label1": "only subsets/label1_1000.jsonl"}
    starred = ["CORE* 0.3333", "CORE* is not CORE: label1: only subsets/label1_1000.jsonl"]
    assert told(summary(figures, part, {}), None) == starred
    assert told(summary(figures, {}, {}), 2) == ["CORE* 0.3333"]
    del figures["label1"]
    assert told(summary(figures, {}, {}), None) == ["CORE* 0.3333 of 21 of 22 tasks"]


def test_what_ray_raises_is_told_without_its_traceback() -> None:
    told_by_ray = 'ray::RolloutActor.__init__()\n  File "engine.py", line 3, in load\nValueError: no head of size 88'
    error = ray.exceptions.RayTaskError("load", told_by_ray, ValueError("no head of size 88"))
    assert in_words(error) == "ValueError: no head of size 88"
    assert in_words(ValueError("a: b\nc")) == "a: b\nc"
    assert in_words(RuntimeError()) == "RuntimeError"
