"""No import has a side effect, and planning imports no torch: both are seen from fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "serving", "stages", "models", "corpus", "tasks", "kernels", "cluster", "bench")
ENGINES_OWN = ("models.vllm_nanochat", "corpus.tool_parser")  # classes of vLLM's kinds, which it imports by name
# What the libraries do to the environment when they are imported is theirs: they come first.
LIBRARIES = (
    "torch.distributed.checkpoint",
    "ray.data",
    "ray.train.torch",
    "ray.serve",
    "transformers",
    "datasets",
    "pyarrow.fs",
    "wandb",
)

SIDE_EFFECTS = """
import importlib, os, pathlib, signal, sys, threading
for name in sys.argv[2].split():
    importlib.import_module(name)
sys.argv = ["python", "--no-module-parses-this"]
def state():
    return dict(os.environ), os.getcwd(), threading.active_count(), signal.getsignal(signal.SIGTERM), sys.argv[:]
before, files = state(), set(pathlib.Path().iterdir())
for name in {modules!r}:
    importlib.import_module(name)
assert state() == before, (before, state())
assert set(pathlib.Path().iterdir()) == files
"""


def modules() -> list[str]:
    files = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not name.endswith("__main__") and name not in ENGINES_OWN]


def fresh(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Output of a program in a new interpreter that finds the rooms wherever it runs."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_import_has_a_side_effect(tmp_path: Path) -> None:
    program = SIDE_EFFECTS.replace("{modules!r}", repr(modules()))
    assert fresh(program, "", " ".join(LIBRARIES), cwd=tmp_path) == ""


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.scaling", "pipeline.plan"])
def test_planning_imports_no_torch(module: str) -> None:
    loaded = fresh(f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})").split()
    assert not {"torch", "ray", "vllm", "transformers"} & set(loaded)


def test_only_the_generating_process_imports_vllm() -> None:
    assert "vllm" not in fresh(f"import {', '.join(modules())}, sys; print(*sys.modules)").split()
