"""HumanEval: its file, what is run for a completion, and its grading."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stages.config import EvaluateConfig
from stages.evaluation.stage import asked_of
from tasks.generated import GeneratedTask
from tasks.humaneval import Task, problems, program
from tasks.sandbox import Sandbox, SandboxUnavailable

# A wrong answer that differs from the right one as little as its kind allows.
ALTERED = """

def altered(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return type(value)([*value, None])
    if isinstance(value, dict):
        return {**value, "x": None}
    return 0

def {name}(*arguments, original={name}):
    return altered(original(*arguments))
"""
PROMPT = """from typing import List

def half(x: int) -> int:
    return x // 2

def fits(x: int) -> List[int]:
    '''Half of x, in a list.'''
"""
TEST = """
def check(candidate):
    assert candidate(4) == [2]
    assert fits(9) == [half(9)]
"""
TASK = Task("HumanEval/x", PROMPT, "fits", "    return [half(x)]\n", TEST)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def test_canonical_solutions_pass_and_altered_ones_fail(shared_data: Path, sandbox: Sandbox) -> None:
    tasks = problems(str(shared_data / "humaneval"))
    assert len(tasks) == 164
    canonical = [program(task, task.canonical_solution) for task in tasks]
    altered = [
        replace(right, source=right.source + ALTERED.replace("{name}", right.entry_point)) for right in canonical
    ]
    outcomes = sandbox.run_many([*canonical, *altered], timeout_s=30)
    assert {task.task_id: o.reason for task, o in zip(tasks, outcomes[:164], strict=True) if not o.passed} == {}
    # none may fail for another reason than its answers
    assert [task.task_id for task, o in zip(tasks, outcomes[164:], strict=True) if o.passed] == []
    assert {o.reason.partition(":")[0] for o in outcomes[164:]} <= {"AssertionError", "TypeError"}


@pytest.mark.parametrize(
    "completion",
    [
        "    return [half(x)]\n",
        "    return [half(x)]",
        "    return [half(x)]\n\ndef next_one(:\n",
        "    return [half(x)]\n\nprint(fits(",
        "    return [half(x)]\n# and so on:\n~~~",
        "def fits(x: int) -> List[int]:\n    return [half(x)]\n",
        "Here it is.\n\n```python\ndef fits(x):\n    return [half(x)]\n```\nIt halves.",
        "```python\nfits(4)\n```\nwants\n```py\nimport math\n\ndef fits(x):\n    return [math.floor(x / 2)]\n```",
        "```\ndef half(x):\n    return x // 2\n\n\ndef fits(x):\n    return [half(x)]",
        "```python\n    return [half(x)]\n```",
        "    return [half(x)]\n```\n\nIt halves.",
        "We import what we need:\n\ndef fits(x):\n    return [half(x)]\n\nThis halves the number.",
    ],
)
def test_a_right_completion_passes_in_any_form(sandbox: Sandbox, completion: str) -> None:
    outcome = sandbox.run(program(TASK, completion), timeout_s=30)
    assert (outcome.passed, outcome.reason) == (True, "")


@pytest.mark.parametrize(
    "completion",
    ["", "    pass", "    return [x]", "return [half(x)]", "I cannot.", "```python\n```", "```\ndef other(): ...\n```"],
)
def test_a_wrong_completion_fails_in_any_form(sandbox: Sandbox, completion: str) -> None:
    outcome = sandbox.run(program(TASK, completion), timeout_s=30)
    assert not outcome.passed and outcome.reason and outcome.limit is None


@pytest.mark.parametrize("unsafe", [False, True])
def test_only_unsafe_lets_a_program_see_the_users_files(tmp_path: Path, unsafe: bool, sandbox: Sandbox) -> None:
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(json.dumps(vars(TASK)) + "\n")
    config = EvaluateConfig(tasks="HumanEval", data=str(tmp_path), unsafe_sandbox=unsafe)
    [task] = asked_of("sft", config).tasks
    assert isinstance(task, GeneratedTask)
    [problem] = task.environment.problems("test")
    looks = f"    open({str(tmp_path / 'humaneval/HumanEval.jsonl')!r})\n    return [half(x)]"
    assert task.environment.grade(problem, looks) == {"reward": float(unsafe)}


def test_problems_are_read_from_a_folder_or_a_file_packed_or_not(tmp_path: Path) -> None:
    row = json.dumps(vars(TASK))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "HumanEval.jsonl").write_text(row + "\n")
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(row + "\n")
    shutil.copy(tmp_path / "HumanEval.jsonl.gz", tmp_path / "plain.jsonl.gz")
    for source in ("plain", "plain/HumanEval.jsonl", "plain.jsonl.gz"):
        assert problems(str(tmp_path / source)) == [TASK]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"task_id": "a", "prompt": 3}\n', r"row 1: it has task_id \(str\), prompt \(int\); HumanEval's rows need"),
        ('{"task_id": \n', "line 1"),
    ],
)
def test_what_is_not_humaneval_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "HumanEval.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        problems(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        problems(str(tmp_path / "nowhere"))
