"""What several test files share: real data, and one whole run that the others branch off from."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from runs import ROOT, Run
from xdist.scheduler import LoadFileScheduling

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SEQUENCE_LEN = 128
# Few problems, seen often: a model this small learns some of them by heart, so that RL has rewards to tell apart.
SETTINGS = {
    "model.depth": 2,
    "model.vocab_size": 512,
    "model.sequence_len": SEQUENCE_LEN,
    "data.synthetic_documents": 1_500,
    "data.synthetic_problems": 64,
    "data.validation_conversations": 32,
    "base.steps": 40,
    "base.sample_every": 15,
    "base.precision": "fp32",
    "base.device_batch_size": 8,
    "mid.steps": 50,
    "sft.steps": 30,
    "rl.steps": 6,
    "rl.prompts_per_step": 16,  # four steps see all problems
    "rl.samples_per_prompt": 4,
    "rl.save_every": 1,
    "rl.eval_problems": 8,
    "evaluate.problems": 8,
    "evaluate.samples": 2,
}
for stage in ("base", "mid", "sft"):
    SETTINGS |= {f"{stage}.total_batch_size": 16 * SEQUENCE_LEN, f"{stage}.save_every": 10, f"{stage}.eval_every": 20}
    SETTINGS |= {f"{stage}.eval_rows": 16}


def flags(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


# A shell ignores SIGINT for what it runs in the background, and commands that are interrupted here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TRACKED = ["--track", "both", *flags({"tracking.mode": "offline"})]


class ByRun(LoadFileScheduling):  # type: ignore[misc]
    """Tests of one file go to the same of `make test`'s two processes, and so do all files that branch off from one
    run. (loadgroup, which is for that, does nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file: str = nodeid.split("::")[0]
        return "line" if "line: Run" in (ROOT / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByRun:
    return ByRun(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Products this small only wait for each other on a second thread, for minutes when the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is whole: libraries that tests import set the terminal's width for the whole process."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data folder {path}")
    return path


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run, from nothing to RL; treat it as read-only."""
    run = Run(tmp_path_factory.mktemp("runs"), "line", ["--preset", "demo", "--with-rl", *flags(SETTINGS)])
    result = run.go(*TRACKED, seconds=900)
    assert result.code == 0, result.output
    return Run(run.storage, run.name, run.settings, result)
