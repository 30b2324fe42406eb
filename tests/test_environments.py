"""A user's environment: the example works, and a bug in it ends the call, not the caller, with its place."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SETTINGS, flags
from runs import ROOT, Run, environment, fathom, one_clear_message

from cluster import manifest as manifests
from cluster.manifest import Manifest
from cluster.resources import Devices
from corpus.conversation import from_record, render_prompt
from corpus.tokenizers import Tokenizer
from pipeline.artifacts import RunStore
from pipeline.config import Config, ConfigError, identity_of, load_config, stage_names
from pipeline.dag import plan, submit
from pipeline.status import run_states
from tasks.arithmetic import Arithmetic
from tasks.base import Environment, Problem
from tasks.environments import GRACE, LONGEST, EnvironmentFault, EnvironmentFile, FileEnvironment, check

EXAMPLE = ROOT / "docs/examples/countdown.py"
GUIDE = ROOT / "docs/environments.md"
PROBLEM = Problem("question", "answer")
HEAD = "from tasks.base import Problem\ndef problems(split):\n    return [Problem('question', 'answer')]\n"
GOOD = HEAD + "def grade(problem, completion):\n    return {'reward': 1}\n"
TIMEOUT = 1.5


@contextmanager
def written(text: str, timeout: float = 30.0) -> Iterator[FileEnvironment]:
    """The environment of this text, which is in no file."""
    with closing(FileEnvironment(EnvironmentFile(path="mine/own.py", text=text), timeout)) as environment:
        yield environment


def grade(environment: Environment) -> Any:
    return environment.grade(PROBLEM, "completion")


def with_grade(*lines: str) -> str:
    return HEAD + "def grade(problem, completion):\n" + "".join(f"    {line}\n" for line in lines)


def problems(environment: Environment) -> Any:
    return environment.problems("train")


def call_tool(environment: Environment) -> Any:
    return environment.tools["python"]("1 + 1")


def render(environment: Environment) -> Any:
    return environment.render(PROBLEM)


@pytest.mark.parametrize(
    ("text", "call", "line", "said"),
    [
        (with_grade("import json", "return json.loads('{')"), grade, 6, "JSONDecodeError"),
        (with_grade("raise SystemExit(0)"), grade, 5, "SystemExit"),
        (with_grade("return 1.0"), grade, 4, 'must return {"reward": a finite number}'),
        (with_grade("return {'score': 1.0}"), grade, 4, "it returned {'score': 1.0}"),
        (with_grade("return {'reward': None}"), grade, 4, "it returned {'reward': None}"),
        (with_grade("return {'reward': float('nan')}"), grade, 4, "it returned {'reward': nan}"),
        (with_grade("import os; os._exit(3)"), grade, 4, "its process ended, with status 3"),
        (with_grade("import ctypes", "ctypes.string_at(0)"), grade, 6, "its process ended, with status -11"),
        (GOOD.replace("Problem('question', 'answer')", "'question'"), problems, 2, "a list of one Problem or more"),
        (GOOD.replace("[Problem('question', 'answer')]", "[]"), problems, 2, "it returned []"),
        (GOOD + "def render(problem):\n    return [{'role': 'me', 'content': ''}]\n", render, 6, "system, user"),
        (GOOD + "tools = {'python': lambda call: 3}\n", call_tool, 6, "it returned 3"),
        (GOOD + "tools = [print]\n", grade, 1, "tools must be"),
        (HEAD, grade, 1, "there is no function grade(problem, completion)"),
        (GOOD + "x = (\n", grade, 6, "SyntaxError: '(' was never closed"),
    ],
)
def test_a_bug_is_named_with_its_file_and_line(
    text: str, call: Callable[[Environment], Any], line: int, said: str
) -> None:
    with written(text) as environment, pytest.raises(EnvironmentFault) as fault:
        call(environment)
    first, *source = str(fault.value).splitlines()
    assert first.startswith(f"mine/own.py, line {line}, ") and said in first
    assert source == [f"    {text.splitlines()[line - 1].strip()}"]


@pytest.mark.parametrize(
    ("text", "call", "line"),
    [
        # one call into C that never lets go of the GIL
        (with_grade("import re", "return re.match('(a+)+$', 'a' * 60 + 'b')"), grade, 6),
        (with_grade("import time", "return helper(time)") + "def helper(time):\n    time.sleep(1000)\n", grade, 8),
        (GOOD + "import time\ntime.sleep(1000)\n", grade, 7),
        (GOOD + "def think(call):\n    while True: pass\ntools = {'python': think}\n", call_tool, 7),
    ],
)
def test_a_call_that_never_returns_ends_in_time(text: str, call: Callable[[Environment], Any], line: int) -> None:
    began = time.monotonic()
    with written(text, TIMEOUT) as environment, pytest.raises(EnvironmentFault) as fault:
        call(environment)
    assert time.monotonic() - began < TIMEOUT + GRACE
    assert str(fault.value).startswith(f"mine/own.py, line {line}, ")
    assert f"there is no answer within {TIMEOUT:g} s" in str(fault.value)


def test_even_a_stopped_process_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.environments.GRACE", 1.0)
    text = with_grade("import os, signal", "os.kill(os.getpid(), signal.SIGSTOP)")
    with written(text, 1.0) as environment, pytest.raises(EnvironmentFault, match=r"line 4, grade: there is no answer"):
        grade(environment)


def test_after_a_fault_the_environment_goes_on() -> None:
    text = with_grade(
        "if completion == 'raise': raise ValueError('no')",
        "if completion == 'end': import os; os._exit(1)",
        "if completion == 'hang': import time; time.sleep(1000)",
        "return {'reward': len(completion)}",
    )
    with written(text, TIMEOUT) as environment:
        for bad in ("raise", "end", "hang"):
            with pytest.raises(EnvironmentFault):
                environment.grade(PROBLEM, bad)
            assert environment.grade(PROBLEM, "12345") == {"reward": 5.0}


def test_figures_must_always_be_the_same() -> None:
    with written(with_grade("return {'reward': 1, 'x' + completion: 1}")) as environment:
        assert environment.grade(PROBLEM, "1") == {"reward": 1.0, "x1": 1.0}
        with pytest.raises(EnvironmentFault, match="the same figures always"):
            environment.grade(PROBLEM, "2")


def test_what_a_file_prints_and_leaves_out_does_no_harm() -> None:
    text = "import os\nprint('read')\nos.write(1, b'raw')\n" + GOOD.replace(
        "    return", "    print('called')\n    return"
    )
    with written(text) as environment:
        assert environment.problems("train") == [PROBLEM]
        assert grade(environment) == {"reward": 1.0}
        assert environment.render(PROBLEM) == [{"role": "user", "content": "question"}]
        assert environment.answer("#### 3") is None
        assert dict(environment.tools) == {}


def test_a_copy_and_its_tools_work_in_a_process_of_their_own() -> None:
    with written(GOOD + "import os\ntools = {'python': lambda call: f'{call} {os.getpid()}'}\n") as environment:
        first = environment.tools["python"]("2")
        second = pickle.loads(pickle.dumps(environment.tools))["python"]("2")
        copy = pickle.loads(pickle.dumps(environment))
        with closing(copy):
            assert grade(copy) == {"reward": 1.0}
    assert first is not None and second is not None and first.startswith("2 ") and second.startswith("2 ")
    assert len({first, second, f"2 {os.getpid()}"}) == 3


def test_its_process_ends_with_whoever_started_it() -> None:
    program = """
import sys, time
from tasks.environments import EnvironmentFile, FileEnvironment
from tasks.base import Problem
e = FileEnvironment(EnvironmentFile(path="own.py", text=sys.argv[1]))
e.grade(Problem("", ""), "")
print(e._child.process.pid, flush=True)
time.sleep(1000)
"""
    text = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n" + GOOD
    command = [sys.executable, "-c", program, text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        child.wait(timeout=20)


def test_gsm8k_and_arithmetic_are_environments_too() -> None:
    environment: Environment = Arithmetic(10, 10)
    problem = environment.problems("train")[0]
    assert environment.render(problem) == [{"role": "user", "content": problem.question}]
    assert environment.grade(problem, problem.answer)["reward"] == 1.0
    assert pickle.loads(pickle.dumps(environment.tools))["python"]("2*3") == "6"


# --- the guide and its example ---------------------------------------------------------------------------------------


def test_the_example_rewards_its_own_solutions_and_nothing_else() -> None:
    with closing(FileEnvironment(EnvironmentFile.read(str(EXAMPLE)))) as environment:
        train, test = environment.problems("train"), environment.problems("test")
        assert len(train) == 2_000 and len(test) == 200
        assert not {p.question for p in train} & {p.question for p in test}
        for problem in test[:50]:
            completion = f"Let me see.\n#### {problem.answer}"
            assert environment.grade(problem, completion) == {"reward": 1.0, "fair": 1.0}
            assert environment.answer(completion) == problem.answer
            assert environment.grade(problem, completion + "+1") == {"reward": 0.0, "fair": 0.0}
            assert environment.grade(problem, problem.answer) == {"reward": 0.0, "fair": 0.0}
        unfair = Problem("", "2+3*4")
        assert environment.grade(unfair, "#### 4*2+3") == {"reward": 0.1, "fair": 1.0}
        assert environment.grade(unfair, "#### 7+7") == {"reward": 0.0, "fair": 0.0}
        assert environment.tools["python"]("2+3*4") == "14"
        tokenizer = Tokenizer.train([p.question for p in train], 300)
        prompt = tokenizer.decode(render_prompt(environment.render(test[0]), tokenizer))
        assert test[0].question in prompt and "End with ####" in prompt


def test_the_example_prints_conversations_for_sft() -> None:
    printed = subprocess.run(
        [sys.executable, str(EXAMPLE)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    conversations = [from_record(json.loads(line)) for line in printed]
    assert len(conversations) == 2_000
    assert [m["role"] for m in conversations[0]["messages"]] == ["system", "user", "assistant"]


def test_the_file_in_the_guide_works_and_its_bug_reads_as_shown() -> None:
    text = GUIDE.read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    file = EnvironmentFile(path="backwards.py", text=code)
    check(file, timeout=30)
    with closing(FileEnvironment(file)) as environment:
        [problem] = [p for p in environment.problems("test") if p.question == "Say 1023 backwards."]
        assert environment.grade(problem, " 3201\n") == {"reward": 1.0}
        assert environment.grade(problem, "1023") == {"reward": 0.0}
    *before, _ = code.splitlines(keepends=True)
    shown = re.search(r"( *)(backwards\.py, line .*\n *(return .*)\n)", text)
    assert shown is not None
    broken = EnvironmentFile(path="backwards.py", text="".join(before) + f"    {shown[3]}\n")
    with pytest.raises(EnvironmentFault) as fault:
        check(broken, timeout=30)
    assert str(fault.value).split() == shown[2].split()


# --- in a run --------------------------------------------------------------------------------------------------------


def config_with(path: Path, *sets: str) -> Config:
    return load_config("demo", {"with_rl": True}, [f"rl.environment={path}", *sets])


def test_what_the_file_says_is_part_of_what_rl_and_evaluation_make(tmp_path: Path) -> None:
    one, moved, other = tmp_path / "one.py", tmp_path / "moved.py", tmp_path / "other.py"
    one.write_text(GOOD)
    moved.write_text(GOOD)
    other.write_text(GOOD + "\n")
    first, second, third = map(config_with, (one, moved, other))
    plain = load_config("demo", {"with_rl": True})
    one.unlink()  # what it says has been read
    assert Config.model_validate_json(first.model_dump_json()) == first
    for stage in stage_names(first):
        asks = stage in ("evaluate_mid", "evaluate_sft", "rl", "evaluate_rl")
        assert identity_of(stage, first) == identity_of(stage, second)
        assert (identity_of(stage, first) != identity_of(stage, third)) == asks, stage
        assert (identity_of(stage, first) != identity_of(stage, plain)) == asks, stage


def test_an_environment_of_its_own_needs_no_other_problems() -> None:
    config = config_with(EXAMPLE, "data.gsm8k=none", "data.chat=chats.jsonl")
    assert stage_names(config)[-4:] == ["sft", "evaluate_sft", "rl", "evaluate_rl"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl\.environment = '.*nowhere\.py': .* No such file"):
        config_with(tmp_path / "nowhere.py")


def test_only_a_text_in_a_regular_file_is_an_environment(tmp_path: Path) -> None:
    large, latin = tmp_path / "large.py", tmp_path / "latin.py"
    large.write_text("#" * (LONGEST + 1))
    latin.write_bytes("# é".encode("latin-1"))
    for place, said in ((tmp_path, "no regular file"), (Path("/dev/null"), "no regular file")):
        with pytest.raises(ConfigError, match=rf"rl\.environment = '{place}': .*{said}"):
            config_with(place)
    for place, said in ((large, "more than 1,048,576 characters"), (latin, "can't decode")):
        with pytest.raises(ConfigError, match=said):
            config_with(place)


def test_a_pipe_in_place_of_an_environment_is_not_waited_for(tmp_path: Path) -> None:
    """Neither where the user gives it nor where a config.json in storage names it."""
    pipe, folder = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)
    asked = fathom("plan", "--preset", "demo", "--set", f"rl.environment={pipe}", seconds=60)
    assert asked.code == 1 and f"rl.environment = '{pipe}'" in asked.output and "no regular file" in asked.output
    stored = load_config("demo", {"name": "run"}).model_dump(mode="json")
    stored["rl"]["environment"] = str(pipe)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    status = fathom("status", "run", "--storage", str(tmp_path), seconds=60)
    assert "Traceback" not in status.output and "tokenizer" in status.stdout


def test_status_tells_nothing_of_a_file_that_a_stored_configuration_names(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "run"
    secret.write_text("hunter2")
    stored = load_config("demo", {"name": "run", "with_rl": True}).model_dump(mode="json")
    stored["rl"]["environment"] = str(secret)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    store = RunStore(str(tmp_path), "run")
    before = Manifest("run", "rl", [], identity_of("rl", load_config("demo", {"with_rl": True})))
    manifests.write(store.stage("rl"), before)
    shown = [line for state in run_states(store) for line in state.drift]
    assert hashlib.sha256(b"hunter2").hexdigest() not in " ".join(shown)
    assert store.recorded() is None


def test_a_run_whose_environment_does_not_work_does_not_begin(tmp_path: Path) -> None:
    file, store = tmp_path / "own.py", RunStore(str(tmp_path), "run")
    file.write_text(with_grade("return {'reward': None}"))
    config = config_with(file)
    names = stage_names(config)
    with pytest.raises(EnvironmentFault, match=r"own\.py, line 4, grade: it must return"):
        submit(store, config, plan(store, config, names, names, []), Devices("cpu", cpus=1, gpus=0), [], "token")
    assert not store.storage.exists()


def test_a_bug_that_comes_with_an_answer_fails_rl_and_harms_nothing(line: Run, tmp_path: Path) -> None:
    made = ("tokenizer", "ingest", "base", "conversations", "mid", "sft")
    run = line.branch(tmp_path, *made)
    before = run.manifests()
    file = tmp_path / "own.py"
    hangs = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"
    file.write_text(with_grade("if not completion:", "    return {'reward': 0}", hangs))
    settings = {"rl.environment": file, "rl.environment_timeout": 3, "rl.engine": "torch"}
    result = run.go("--only", "rl", *flags(settings), seconds=300)
    one_clear_message(result, "stage rl failed", f"{file}, line 7, grade: there is no answer within 3 s")
    assert run.manifests() == before
    states = run.states()
    assert [states[name] for name in made] == ["done"] * len(made) and states["rl"] == "failed"


def test_problems_without_room_for_an_answer_are_neither_trained_on_nor_measured(line: Run, tmp_path: Path) -> None:
    """And the user is told."""
    run, file = line.branch(tmp_path, "tokenizer", "ingest", "base", "conversations", "mid", "sft"), tmp_path / "own.py"
    head = HEAD.replace("[Problem('question', 'answer')]", "[Problem(f'{n} ' * n**2, '') for n in range(16)]")
    file.write_text(head + "def grade(problem, completion):\n    return {'reward': float(problem.question == '')}\n")
    settings = {"rl.environment": file, "rl.prompts_per_step": 2, "rl.require_signal": False}
    settings |= {"rl.engine": "torch", "evaluate.engine": "torch", "evaluate.problems": 16}
    settings |= {"rl.eval_every": 1, "rl.eval_problems": 16, "rl.max_new_tokens": 4, "evaluate.max_new_tokens": 4}
    run = replace(run, settings=[*run.settings, *flags(settings)])
    for stage in ("evaluate_sft", "rl"):
        result = run.go("--only", stage, seconds=300)
        assert result.code == 0, result.output
        assert "of 16 problems are left out, as they leave no room for an answer" in result.output
    metrics = {stage["name"]: stage["metrics"] for stage in run.status()["stages"]}
    left = metrics["evaluate_sft"]["problems"]
    assert 4 <= left == 16 - metrics["evaluate_sft"]["problems_left_out"] < 16
    records = run.records("rl")
    assert {record["val_problems"] for record in records if "val_problems" in record} == {left}
    assert len([record for record in records if "reward" in record]) == SETTINGS["rl.steps"]
