"""Problems, the calculator the model may call, and grading."""

from __future__ import annotations

import json
import re
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import synthetic
from corpus.conversation import render, render_prompt
from corpus.tokenizers import Tokenizer
from tasks.arithmetic import Arithmetic
from tasks.base import NumberProblems, Problem, conversation_of, final_number, last_number
from tasks.calculator import calculate
from tasks.gsm8k import GSM8K

GRADED = NumberProblems()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("1/5", "0.2"),
        (".5*3", "1.5"),
        ("5.", "5"),
        ("2/3", "0.666667"),
        ("0.1+0.2", "0.3"),
        ("1,000 + $5", "1005"),
        ("50%", "50"),
        ("-(3-10)*2", "14"),
        ("3-10", "-7"),
        ("007+1", "8"),
        ("100.05-0.05", "100"),
        ("9" * 30 + "*" + "9" * 30, str(int("9" * 30) ** 2)),
        ("1-1.0", "0"),
        ("0-0.0000001", "0"),
    ],
)
def test_the_calculator_computes(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "()", "1+", "*2", "1/0", "1/(2-2)", "2**9", "9**9**9**9", "7//2", "1 2", "(1", "1)", "1.2.3", "1e9",
        "abs(1)", "__import__('os').system('true')", "1;2", "1\n2", "0x10", "1_000", "a", "1<2", "1if 1 else 2", "1j",
        "(" * 40, "\x00", "٣+٣", "(1)(2)", "1" * 65, "-" * 64, "[1]", "'1'*9", "lambda:1", "..", "nan", "inf",
    ],
)  # fmt: skip
def test_the_calculator_refuses_what_is_not_arithmetic(expression: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calculate(expression) is None


@given(st.one_of(st.text(), st.text("0123456789.+-*/() ,$%", max_size=70)))
def test_the_calculator_survives_anything(expression: str) -> None:
    result = calculate(expression)
    assert result is None or re.fullmatch(r"-?[0-9]+(\.[0-9]{1,6})?", result)


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda e: st.tuples(e, st.sampled_from("+-*"), e).map("({0[0]}{0[1]}{0[2]})".format),
        max_leaves=6,
    )
)
def test_the_calculator_agrees_with_python(expression: str) -> None:
    expected = str(eval(expression))
    assert calculate(expression) == (expected if len(expression) <= 64 else None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("a\n#### 1\n#### 1,000", "1"),
        ("####$5.0<|assistant_end|>", "5"),
        ("#### -3", "-3"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### 50%", "50"),
        ("#### .50", "0.5"),
        ("#### 007.", "7"),
        ("#### -0", "0"),
        ("#### 12 apples", "12"),
        ("72", None),
        ("#### none", None),
        ("#### 7 ####", "7"),
        ("####\n7", None),
        ("", None),
    ],
)
def test_the_final_number_is_normalised(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 48/2 = 24 clips, so 48 + 24 = 72.", "72"),
        ("72 clips, worth $1,000.50", "1000.5"),
        ("It is -3", "-3"),
        ("It is: - $3.", "-3"),
        ("10 - 3", "3"),
        ("10-3", "3"),
        ("(4+6)-3", "3"),
        ("50% - 3", "3"),
        ("a half, 50%", "50"),
        ("5.0", "5"),
        ("#### 7 in 3 days", "3"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text_is_read_where_it_stands(text: str, number: str | None) -> None:
    assert last_number(text) == number


def original(text: str) -> str | None:
    """The extractor of the GSM8K paper's code, by what it does: the first number after a mark, without its commas."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match[1].strip().replace(",", "") if match else None


# what a model may write, the number after the mark and the last of the text
AS_ORIGINAL: list[tuple[str, str | None, str | None]] = [
    ("#### 72", "72", "72"),
    ("so 48+24 = 72\n#### 72", "72", "72"),
    ("#### 72 ####", "72", "72"),
    ("#### 72\n####", "72", "72"),
    ("#### 72\n####\n#### ", "72", "72"),
    ("#### 72\n#### none", "72", "72"),
    ("#### none\n#### 72", "72", "72"),
    ("#### 72\n#### 73", "72", "73"),
    ("#### 1\nNo:\n#### 1,000", "1", "1000"),
    ("#### 72\nThat took 3 steps.", "72", "3"),
    ("##### 72", "72", "72"),
    ("#### 72 clips", "72", "72"),
    ("#### 72, I think", "72", "72"),
    ("#### 72 (= 48 + 24)", "72", "24"),
    ("#### -3", "-3", "-3"),
    ("#### -0", "0", "0"),
    ("10 - 3 = 7\n#### 7", "7", "7"),
    ("#### 1,000", "1000", "1000"),
    ("#### 12,345,678", "12345678", "12345678"),
    ("#### -1,000", "-1000", "-1000"),
    ("#### 1,000.50", "1000.5", "1000.5"),
    ("#### 0.5", "0.5", "0.5"),
    ("#### .5", "0.5", "0.5"),
    ("#### 5.", "5", "5"),
    ("#### 007", "7", "7"),
    ("#### 50%", "50", "50"),
    ("#### 3/4", "3", "4"),
    ("#### 10:30", "10", "30"),
    ("It is 72.", None, "72"),
    ("### 72", None, "72"),
    ("####\n72", None, "72"),
    ("no number ####", None, None),
]
# here the original finds no number, or one that nobody wrote
BEYOND_ORIGINAL = [
    ("####72", "72", "72"),
    ("####  72", "72", "72"),
    ("#### $72", "72", "72"),
    ("#### -$3", "-3", "-3"),
    ("#### +3", "3", "3"),
    ("#### \u22123", "-3", "-3"),
    ("#### \u2212 $1,000", "-1000", "-1000"),
    ("#### \u20133", "-3", "-3"),
    ("#### 1,2,3", "1", "3"),
    ("#### 2020,2021", "2020", "2021"),
    ("#### 1,000,20", "1", "20"),
    ("#### 2020,100,200", "2020", "200"),
]


@pytest.mark.parametrize(("text", "strict", "lenient"), AS_ORIGINAL + BEYOND_ORIGINAL)
def test_written_forms_are_read_as_what_they_say(text: str, strict: str | None, lenient: str | None) -> None:
    assert (final_number(text), last_number(text)) == (strict, lenient)
    for reference in {"3", "-3", "72", "73", "1000", "123", strict, lenient} - {None}:
        grades = GRADED.grade(Problem("?", f"#### {reference}"), text)
        assert grades == {"reward": strict == reference, "strict": strict == reference, "lenient": lenient == reference}


def test_where_the_original_reads_a_number_that_was_written_so_do_we() -> None:
    def value(number: str | None) -> float | None:
        return None if number is None else float(number)

    assert all(value(original(text)) == value(strict) for text, strict, _ in AS_ORIGINAL)
    assert not any(value(original(text)) == value(strict) for text, strict, _ in BEYOND_ORIGINAL)


@pytest.mark.parametrize("sign", ["-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2212", "\ufe63", "\uff0d"])
def test_every_minus_is_one(sign: str) -> None:
    assert final_number(f"#### {sign}3") == final_number(f"#### ${sign}3") == last_number(f"It is {sign}3.") == "-3"
    assert last_number(f"10 {sign} 3") == last_number(f"10{sign}3") == "3"


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=5))
def test_a_comma_is_within_a_number_only_in_groups_of_three(numbers: list[int]) -> None:
    assert last_number(", ".join(f"{n:,}" for n in numbers)) == str(numbers[-1])
    if any(len(str(n)) != 3 for n in numbers[1:]):
        assert last_number(",".join(map(str, numbers))) == str(numbers[-1])


@pytest.mark.parametrize("piece", [" ", "\t", "- ", "$ ", "-", "1,", "100,", "1,000", "####", "#### -  $  "])
def test_a_long_text_is_graded_in_a_moment(piece: str) -> None:
    began = time.process_time()
    GRADED.grade(Problem("?", "#### 72"), 4_000 * piece)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("right", ["1,000", "1000", "$1000", "$1,000.00", "1000.0", "1000%", "1,000 dollars"])
@pytest.mark.parametrize("reference", ["1,000", "$1000"])
def test_a_right_number_is_right_however_it_is_written(reference: str, right: str) -> None:
    problem = Problem("?", f"#### {reference}")
    assert GRADED.grade(problem, f"so\n#### {right}") == {"reward": 1.0, "strict": 1.0, "lenient": 1.0}
    assert GRADED.grade(problem, f"it is {right}") == {"reward": 0.0, "strict": 0.0, "lenient": 1.0}
    assert GRADED.answer(f"#### {right}") == "1000" and GRADED.answer(f"it is {right}") is None
    for wrong in ("1,001", "-1,000", "10.00", "100", "0"):
        assert GRADED.grade(problem, f"{right}, so\n#### {wrong}") == {"reward": 0.0, "strict": 0.0, "lenient": 0.0}


@given(st.text())
def test_only_the_right_number_is_rewarded(text: str) -> None:
    problem = Problem("?", "#### 12345")
    grades = GRADED.grade(problem, text)
    assert grades["reward"] == grades["strict"] == float(final_number(text) == "12345")
    assert grades["lenient"] == float(last_number(text) == "12345")
    assert GRADED.grade(Problem("?", "no number"), text) == {"reward": 0.0, "strict": 0.0, "lenient": 0.0}


def test_marks_become_tool_calls() -> None:
    messages = conversation_of(Problem("Q", "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"))["messages"]
    assert messages[0] == {"role": "user", "content": "Q"}
    assert [(part["type"], part["text"]) for part in messages[1]["content"]] == [
        ("text", "She sold 48/2 = "),
        ("python", "48/2"),
        ("python_output", "24"),
        ("text", "24 clips.\n#### 24"),
    ]


def test_an_answer_without_marks_is_all_text() -> None:
    messages = conversation_of(Problem("Q", "Ten.\n#### 10"))["messages"]
    assert messages[1]["content"] == [{"type": "text", "text": "Ten.\n#### 10"}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_references_are_right_and_altered_ones_wrong(shared_data: Path, split: synthetic.Split) -> None:
    problems = GSM8K(str(shared_data / "gsm8k")).problems(split)
    assert len(problems) == {"train": 7_473, "test": 1_319}[split]
    for problem in problems:
        number = final_number(problem.answer)
        assert number is not None and number == original(problem.answer)
        assert set(GRADED.grade(problem, problem.answer).values()) == {1.0}
        altered = re.sub(r"####.*", f"#### {int(number) + 1}", problem.answer)
        assert set(GRADED.grade(problem, altered).values()) == {0.0}
        assert GRADED.grade(problem, f"It is {number}.") == {"reward": 0.0, "strict": 0.0, "lenient": 1.0}


def test_gsm8k_references_are_right_as_the_tokens_that_a_model_would_write(shared_data: Path) -> None:
    problems = GSM8K(str(shared_data / "gsm8k")).problems("test")
    tokenizer = Tokenizer.train([problem.answer for problem in problems], 1_000)
    for problem in problems:
        conversation = conversation_of(problem)
        ids, _ = render(conversation, tokenizer, 100_000)
        written = ids[len(render_prompt(GRADED.render(problem), tokenizer)) :].tolist()
        assert set(GRADED.grade(problem, tokenizer.decode(written)).values()) == {1.0}, problem


def test_the_calculator_agrees_with_gsm8k(shared_data: Path) -> None:
    calls = agreed = 0
    for problem in GSM8K(str(shared_data / "gsm8k")).problems("train"):
        parts = conversation_of(problem)["messages"][1]["content"]
        assert "<<" not in "".join(part["text"] for part in parts)
        for call, output in pairwise(parts):
            if call["type"] == "python":
                calls += 1
                agreed += calculate(call["text"]) == calculate(output["text"])
    assert calls > 20_000
    assert agreed / calls > 0.97


def test_gsm8k_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        GSM8K(str(tmp_path)).problems("train")
    (tmp_path / "test.jsonl").write_text('{"q": "x", "a": "y"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, row 1: it has q \(str\), a \(str\)"):
        GSM8K(str(tmp_path)).problems("test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_arithmetic_is_right_varied_and_the_calculator_confirms_it(split: synthetic.Split) -> None:
    problems = Arithmetic(2_000, 1_000).problems(split)
    assert len(problems) == {"train": 2_000, "test": 1_000}[split]
    assert len({problem.question for problem in problems}) > 0.9 * len(problems)
    by_head = 0
    for problem in problems:
        parts = conversation_of(problem)["messages"][1]["content"]
        text = "".join(part["text"] for part in parts)
        outputs = [part["text"] for part in parts if part["type"] == "python_output"]
        calls = [part["text"] for part in parts if part["type"] == "python"]
        if calls:
            assert outputs == [calculate(call) for call in calls]
        else:
            by_head += 1
            assert text == problem.answer and "<<" not in text
        # a line a step, right with the calculator ("left: <<48/2=24>>24") and by head ("left: 48/2=24")
        form = r"^[a-z]+: (?:<<)?([0-9]+[-+*/][0-9]+)=([0-9]+)(?:>>\2)?$"
        steps = re.findall(form, problem.answer, re.MULTILINE)
        assert 1 <= len(steps) == len(problem.answer.splitlines()) - 1 <= 3
        assert not calls or steps == list(zip(calls, outputs, strict=True))
        assert all(calculate(call) == output for call, output in steps)
        assert set(GRADED.grade(problem, problem.answer).values()) == set(GRADED.grade(problem, text).values()) == {1.0}
        assert (
            GRADED.grade(problem, re.sub(r"####.*", f"#### {int(steps[-1][1]) + 1}", problem.answer))["reward"] == 0.0
        )
        assert final_number(problem.answer) == steps[-1][1]
        # every operand is in the question or comes from an earlier step
        known = set(re.findall(r"[0-9]+", problem.question))
        for call, output in steps:
            assert set(re.findall(r"[0-9]+", call)) <= known
            known.add(output)
            assert 2 <= int(output) < 1_000
    assert by_head == 0 if split == "test" else abs(by_head / len(problems) - synthetic.BY_HEAD) < 0.05


def test_problems_with_other_line_breaks_are_read_whole(tmp_path: Path) -> None:
    problems = [Problem("How many\u2028are\u0085there?\r", "2+2\u2029\n#### 4"), Problem("Next?", "#### 5")]
    lines = [json.dumps(vars(problem), ensure_ascii=False) + "\n" for problem in problems]
    (tmp_path / "train.jsonl").write_bytes("".join(lines).encode())
    assert GSM8K(str(tmp_path)).problems("train") == problems


def test_arithmetic_is_a_function_of_its_seed() -> None:
    assert Arithmetic(50, 50, seed=1).problems("test") == Arithmetic(80, 50, seed=1).problems("test")
    assert Arithmetic(50, 50, seed=1).problems("test") != Arithmetic(50, 50, seed=2).problems("test")
    assert list(synthetic.documents(3, 20, 1)) == list(synthetic.documents(3, 20, 1))
    assert list(synthetic.documents(3, 20, 1)) != list(synthetic.documents(4, 20, 1))


def pattern_of(question: str) -> tuple[str, tuple[str, ...]]:
    """A question with names and objects blanked out, and its numbers: two problems of one kind look alike."""
    words = {
        *synthetic.NAMES,
        *synthetic.PLACES,
        *synthetic.DAYS,
        *(word for pair in synthetic.OBJECTS for word in pair),
    }
    text = re.sub(r"[A-Za-z]+", lambda match: "_" if match[0] in words else match[0], question)
    return re.sub("[0-9]+", "#", text), tuple(re.findall("[0-9]+", text))


def test_no_training_problem_is_a_held_out_one_with_other_names() -> None:
    held_out = {pattern_of(p.question) for seed in range(3) for p in Arithmetic(1, 1_000, seed).problems("test")}
    seen = {pattern_of(p.question) for seed in range(3) for p in Arithmetic(20_000, seed=seed).problems("train")}
    seen |= {pattern_of(line) for text in synthetic.documents(0, 3_000, 0) for line in text.splitlines()}
    assert len(held_out) > 1_000
    assert not held_out & seen


def test_every_template_has_problems_of_one_two_and_three_steps() -> None:
    steps = [program.count("=") for program, _ in synthetic.PROBLEMS]
    assert len(steps) >= 30
    assert set(steps) == {1, 2, 3}
    assert all(len(wordings) >= 2 for _, wordings in synthetic.PROBLEMS)
