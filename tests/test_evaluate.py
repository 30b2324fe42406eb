"""Evaluation: its estimates by counting, what `measure` makes of real completions, and the pages to look at."""

from __future__ import annotations

import html
import random
import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.conversation import render_prompt
from corpus.synthetic import Split
from corpus.tokenizers import Tokenizer
from models.build import build
from models.generate import Completion, Turns, generate
from models.spec import ModelSpec
from stages import report
from stages.config import EvaluateConfig
from stages.evaluate import graded, measure, with_room
from stages.evaluation.spoken import Speaker
from stages.evaluation.text import Ours
from stages.training.parallel import World
from tasks.arithmetic import Arithmetic
from tasks.base import NumberProblems, Problem, Tool
from tasks.estimates import interval, maj_at_k, pass_at_k

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(samples: int, k: int) -> None:
    for correct in range(samples + 1):
        subsets = [any(i < correct for i in chosen) for chosen in combinations(range(samples), k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(statistics.mean(subsets)), correct


def by_vote(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """How often a vote over all answers is right, ties decided by lot."""
    votes = Counter(a for a in answers if a is not None)
    best = [a for a, count in votes.items() if count == max(votes.values())]
    return statistics.mean([any(r for a, r in zip(answers, right, strict=True) if a == b) for b in best] or [0.0])


@pytest.mark.parametrize("seed", range(12))
def test_maj_at_k_is_the_share_of_subsets_whose_vote_is_right(seed: int) -> None:
    rng = random.Random(seed)
    answers = rng.choices(["1", "2", "3", None], [4, 3, 2, 2], k=8)
    right = [a == "1" for a in answers]
    for k in range(1, 9):
        votes = [by_vote([answers[i] for i in s], [right[i] for i in s]) for s in combinations(range(8), k)]
        assert maj_at_k(answers, right, k) == pytest.approx(statistics.mean(votes)), k


def test_maj_at_k_by_hand() -> None:
    assert maj_at_k(["7", "7", "3"], [True, True, False], 3) == 1.0
    assert maj_at_k(["7", "3", "5"], [True, False, False], 3) == pytest.approx(1 / 3)
    assert maj_at_k(["7", None, None], [True, False, False], 3) == 1.0
    assert maj_at_k([None, None], [True, True], 2) == 0.0


def test_the_interval_by_hand() -> None:
    """Against the roots of |mean - p| = 1.96 · sqrt(p (1 - p) / n), which define it."""
    assert interval(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    for mean, count in ((0.3, 50), (0.9, 200)):
        for bound in interval(mean, count):
            assert abs(mean - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / count) ** 0.5)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(p: float) -> None:
    rng, held = random.Random(0), 0
    for _ in range(2_000):
        low, high = interval(sum(rng.random() < p for _ in range(64)) / 64, 64)
        held += low <= p <= high
    assert 0.93 < held / 2_000 < 0.98


# --- measure, of a real model ----------------------------------------------------------------------------------------


class Letters:
    """Problems that a model without any training solves now and then."""

    tools: Mapping[str, Tool] = MappingProxyType({})

    def problems(self, split: Split) -> list[Problem]:
        return Arithmetic(10, 10).problems(split)

    def render(self, problem: Problem) -> list[dict[str, Any]]:
        return [{"role": "user", "content": problem.question[:20]}]

    def grade(self, problem: Problem, completion: str) -> dict[str, float]:
        return {"reward": len(completion) % 3 / 2, "long": float(len(completion) > 8)}

    def answer(self, completion: str) -> str | None:
        return str(len(completion) % 3) if len(completion) > 2 else None


class Sampler:
    """The torch engine in this process, as a pool. One token in eight ends a completion."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.model = build(ModelSpec("depth", 1, 32, 2, 2, 64, tokenizer.vocab_size, sequence_len=96, softcap=15.0))
        self.model.init_weights(0)

    def sample(self, prompts: Any, seeds: Any, samples: int, limit: int, greedy: bool = False) -> Any:
        groups = generate(self.model, Turns((0,), None, lambda call: []), prompts, seeds, samples, limit, greedy)
        for completion in (c for group in groups for c in group):
            ends = [i for i, token in enumerate(completion.tokens, 1) if token % 8 == 0]
            completion.finished = bool(ends)
            del completion.tokens[ends[0] if ends else limit :]
        return groups


CONFIG = EvaluateConfig(problems=7, samples=5, max_new_tokens=12)


def measured(
    world: World, greedy: bool = True, problems: Sequence[Problem] = ()
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    tokenizer = Tokenizer.train(["How many are there? " * 20], 280)
    problems = problems or Letters().problems("test")
    return measure(Sampler(tokenizer), Letters(), problems, tokenizer, CONFIG, 0, world, greedy)  # type: ignore[arg-type]


ALONE = World(0, 1, torch.device("cpu"), threads=1)


def test_half_a_surrogate_pair_in_a_question_is_asked_and_shown_as_the_tokenizer_reads_it(tmp_path: Path) -> None:
    _, records = measured(ALONE, problems=[Problem("cut \ud83d", "an\ude00swer")])
    assert [(r["question"], r["answer"]) for r in records] == [("cut \ufffd", "an\ufffdswer")]
    report.table(records, "a run", tmp_path / "table.html")
    assert "cut \ufffd" in (tmp_path / "table.html").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_completions() -> None:
    metrics, records = measured(ALONE)
    assert metrics["problems"] == len(records) == 7
    assert all(len(r["greedy"]) == 1 and len(r["samples"]) == 5 for r in records)
    samples = [s for r in records for s in r["samples"]]
    assert len({s["text"] for s in samples}) > 20 and {s["finished"] for s in samples} == {True, False}
    solved = [[s["grades"]["reward"] >= 1 for s in r["samples"]] for r in records]
    assert metrics["greedy"] == statistics.mean(c["grades"]["reward"] >= 1 for r in records for c in r["greedy"])
    assert 0 < metrics["pass_at_1"] == pytest.approx(statistics.mean(x for row in solved for x in row))
    assert metrics["pass_at_5"] == pytest.approx(statistics.mean(map(any, solved)))
    assert metrics["pass_at_1"] < metrics["pass_at_2"] < metrics["pass_at_4"] < metrics["pass_at_5"]
    votes = [maj_at_k([s["answer"] for s in r["samples"]], row, 5) for r, row in zip(records, solved, strict=True)]
    assert metrics["maj_at_5"] == pytest.approx(statistics.mean(votes))
    assert metrics["sampled_reward"] == pytest.approx(statistics.mean(s["grades"]["reward"] for s in samples))
    assert metrics["sampled_long"] == pytest.approx(statistics.mean(s["grades"]["long"] for s in samples))
    assert metrics["sampled_answered"] == pytest.approx(statistics.mean(s["answer"] is not None for s in samples))
    shares = [n for n in metrics if re.fullmatch(r"greedy|(pass|maj)_at_\d+", n)]
    assert len(shares) == 1 + 4 + 3
    for name in shares:
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == interval(metrics[name], 7)


def test_without_greedy_completions_only_their_figure_is_missing() -> None:
    whole, _ = measured(ALONE)
    part, records = measured(ALONE, greedy=False)
    assert part == {n: value for n, value in whole.items() if not n.startswith("greedy")}
    assert all(r["greedy"] == [] for r in records)


@dataclass(frozen=True)
class Half(World):
    """One rank of two; `gathered` is what it gives to the other."""

    gathered: list[torch.Tensor] = field(default_factory=list)

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        self.gathered.append(value)
        return value


def test_two_ranks_between_them_ask_and_find_what_one_does() -> None:
    whole = Half(0, 1, torch.device("cpu"), threads=1)
    halves = [Half(rank, 2, torch.device("cpu"), threads=1) for rank in range(2)]
    _, records = measured(whole)
    assert [r for half in halves for r in measured(half)[1]] == records
    [rows] = whole.gathered
    torch.testing.assert_close(torch.cat([half.gathered[0] for half in halves]), rows, atol=0, rtol=0)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(3, 40))
def test_a_problem_is_left_out_where_its_prompt_leaves_no_room_and_the_user_is_told(
    sizes: list[int], context: int
) -> None:
    tokenizer = Tokenizer.open("chars", "n")
    problems = [Problem("n" * size, "#### 1") for size in sizes]
    lengths = [len(render_prompt(NumberProblems().render(problem), tokenizer)) for problem in problems]
    expected, told = [p for p, n in zip(problems, lengths, strict=True) if n < context], list[str]()
    left_out = len(problems) - len(expected)

    def kept() -> list[Problem]:
        return with_room(NumberProblems(), problems, tokenizer, context, told.append)  # type: ignore[arg-type]

    if problems and not expected:
        with pytest.raises(ValueError, match=rf"none of {left_out} problems .* {context} tokens .*model\.sequence_len"):
            kept()
        return
    assert kept() == expected
    assert [text.split(",")[0] for text in told] == [f"{left_out} of {len(problems)} problems are left out"] * (
        left_out > 0
    )


def test_a_problem_that_chars_cannot_write_is_named_with_what_to_do() -> None:
    tokenizer, problems = Tokenizer.open("chars", "n"), [Problem("n", "1"), Problem("né", "1")]
    with pytest.raises(ValueError, match=r"lacks 'é' .* in problem 2: take another --tokenizer"):
        with_room(NumberProblems(), problems, tokenizer, 99, print)  # type: ignore[arg-type]


def test_what_chars_cannot_write_is_left_out_and_ends_nothing(tmp_path: Path) -> None:
    """A prompt of the samples, and a result of the calculator."""
    tokenizer = Tokenizer.open("chars", "0123456789/abcdefghijklmnopqrstuvwxyz ")
    model = build(ModelSpec("depth", 1, 32, 2, 2, 64, tokenizer.vocab_size, sequence_len=32, softcap=15.0))
    model.init_weights(0)
    for chat, expected in ((False, [""]), (True, [])):
        speaker = Speaker(tokenizer, model.spec, ALONE, "fp32", chat)
        assert [said["prompt"] for said in speaker(model)] == expected
    answer = Ours(tokenizer).turns(NumberProblems.tools).answer
    assert tokenizer.decode(answer(tokenizer.encode("12/4"))) == "<|output_start|>3<|output_end|>"
    assert answer(tokenizer.encode("1/3")) == []


def test_what_was_cut_off_earns_nothing_and_does_not_vote() -> None:
    tokenizer = Tokenizer.train(["#### 12 and so on " * 20], 300)
    problem, tokens = Problem("?", "#### 12"), tokenizer.encode("#### 12")
    for finished in (True, False):
        completion = Completion(tokens, [1] * len(tokens), [0.0] * len(tokens), finished)
        record = graded(Arithmetic(1, 1), problem, completion, tokenizer.decode)
        assert record["grades"] == dict.fromkeys(("reward", "strict", "lenient"), float(finished))
        assert record["answer"] == ("12" if finished else None)
        assert record["text"] == "#### 12"


# --- pages -----------------------------------------------------------------------------------------------------------


def steps(count: int) -> list[dict[str, Any]]:
    """Records of RL as far as the page knows their names."""
    rng = random.Random(0)
    every = ("reward", "reward_lenient", "mixed_groups", "entropy", "logprob_difference", "rollout_ms", "train_ms")
    records: list[dict[str, Any]] = []
    for step in range(count):
        if step % 10 == 0:
            name = "val_pass_at_4"
            records.append({"step": step, name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6, "kl_sft": 0.1})
        records.append({"step": step} | {name: rng.random() for name in every})
    return records


def texts(page: str) -> list[str]:
    root = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("count", [1, 12, 100])
def test_the_plots_have_titles_axes_and_the_names_of_their_curves(tmp_path: Path, count: int) -> None:
    report.plots(steps(count), "a run", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    said = texts(page)
    titles = ["Reward of the training samples", "Entropy of the policy", "Divergence from the SFT model"]
    assert all(title in said for title in titles)
    assert said.count("step") == 7, "a panel for each, and none for what was not recorded"
    assert "Throughput" not in said and "Importance ratio" not in said
    assert {"nats a token", "seconds", "share solved"} <= set(said)
    assert {"reward", "reward_lenient", "rollout", "train"} <= set(said)
    assert not re.findall(r"(?:src|href)=\"(?!#)", page), "the page needs another file"


def test_the_plots_have_the_curve_that_was_recorded(tmp_path: Path) -> None:
    records = [{"step": step, "entropy": value} for step, value in enumerate((1.0, 3.0, 2.0))]
    report.plots(records, "a run", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    [line] = re.findall(r'<g id="line2d_\d+">\s*<path d="([^"]*)" clip-path', page)[-1:]
    points = [tuple(map(float, p.split())) for p in re.findall(r"[ML] ([\d. ]+)", line)]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(2 * (y0 - y2), rel=1e-3) and y1 < y2 < y0


def test_the_page_is_the_same_for_the_same_records(tmp_path: Path) -> None:
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    for page in pages:
        report.plots(steps(30), "a run", page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


class Reader(HTMLParser):
    """The rows of a table page: attributes of every problem, and the cells of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[tuple[str | None, list[str]]] = []
        self.scripts, self.inside = 0, ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.scripts += tag == "script"
        if tag == "details":
            self.problems.append((dict(attributes)["data-solved"], []))
        elif tag == "td":
            self.problems[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "td":
            self.problems[-1][1][-1] += data


def test_the_table_shows_every_completion_with_its_grades_as_text(tmp_path: Path) -> None:
    def completion(text: str, reward: float, finished: bool = True) -> dict[str, Any]:
        return {"text": text, "tokens": 9, "finished": finished, "answer": None, "grades": {"reward": reward}}

    evil = '</td><script>alert("&lt;")</script>'
    problem = {"question": evil, "answer": "#### 4"}
    records = [
        problem | {"greedy": [completion(evil, 1.0)], "samples": [completion("a\n b", 1.0)]},
        problem | {"greedy": [completion("c", 0.0)], "samples": [completion("d", 1.0), completion("e", 0.1, False)]},
        problem | {"greedy": [], "samples": [completion("f", 0.5)]},
    ]
    report.table(records, "a run", tmp_path / "table.html")
    page = Reader()
    page.feed((tmp_path / "table.html").read_text())
    assert page.problems == [
        ("yes", [evil, "greedy", "9", "1", "a\n b", "sample", "9", "1"]),
        ("some", ["c", "greedy", "9", "0", "d", "sample", "9", "1", "e", "sample, cut off", "9", "0.1"]),
        ("no", ["f", "sample", "9", "0.5"]),
    ]
    assert page.scripts == 1


def test_a_page_is_headed_with_what_it_is_of(tmp_path: Path) -> None:
    today = datetime.now(UTC).date().isoformat()
    for figures, headline in (
        ({"problems": 1_200, "pass_at_1": 0.5, "greedy": 0.96512}, ": greedy 0.965 of 1,200 problems"),
        ({"reward": 0.25, "val_pass_at_1": 0.5, "entropy": 1.0}, ": val_pass_at_1 0.5"),
        ({"reward": 0.25}, ": reward 0.25"),
        ({}, ""),
    ):
        title = report.titled("demo<b>", "rl", figures)
        assert title == f"demo<b>, rl, {today}{headline}"
        for draw, records in ((report.plots, [{"step": 0, "reward": 0.5}]), (report.table, [])):
            draw(records, title, tmp_path / "page.html")
            page, shown = (tmp_path / "page.html").read_text(), html.escape(title)
            assert f"<title>{shown}</title>" in page and f"<h1>{shown}</h1>" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "all: <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>\n#### 36<|assistant_end|>",
            "all: [calculator: 12*3 → 36]\n#### 36",
        ),
        ("<|python_start|>1+\n1<|python_end|>", "[calculator: 1+\n1]"),
        (
            "<|python_start|>1/0<|python_end|><|output_start|><|output_end|> <|python_start|>2<|python_end|>",
            "[calculator: 1/0 → ] [calculator: 2]",
        ),
        ("<|python_start|>5*<|assistant_end|>", "<|python_start|>5*"),
        ("<|user_start|>36", "<|user_start|>36"),
    ],
)
def test_the_table_shows_calls_of_the_calculator_as_such(tmp_path: Path, text: str, shown: str) -> None:
    completion = {"text": text, "tokens": 9, "finished": True, "answer": None, "grades": {"reward": 1.0}}
    record = {"question": "?", "answer": "36", "greedy": [completion], "samples": []}
    report.table([record], "a run", tmp_path / "table.html")
    page = Reader()
    page.feed((tmp_path / "table.html").read_text())
    assert page.problems[0][1][0] == shown
