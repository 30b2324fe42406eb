"""`fathom doctor`: what a run needs, whether this machine has it, and what to do where it does not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.storage import Storage, StorageError
from pipeline.config import add_storage_flag
from pipeline.terminal import Terminal, say

GIB = 1 << 30
VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VLLM_TIMEOUT_S = 180


@dataclass(frozen=True)
class Check:
    """One line of the report. `fail` would stop a run, `warn` would not; both say what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 when a fault would stop a run."""
    parser = argparse.ArgumentParser(prog="fathom doctor", description=__doc__)
    add_storage_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    arguments = parser.parse_args(argv)
    checks, console = [], Terminal()
    for check in examine(arguments.storage):
        checks.append(check)
        if not arguments.json:
            advice = f"\n{'':24}-> {check.advice}" if check.advice else ""
            say(console, f"{check.state:<6}{check.name:<18}{check.found}{advice}")
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    return int(any(check.state == "fail" for check in checks))


def examine(storage: str) -> Iterator[Check]:
    """Every check, the slow ones (torch and vLLM are imported, 10 s) last."""
    yield from check_versions()
    yield check_storage(storage)
    if (directory := Storage(storage).local_path) is not None:
        yield check_disk("disk of storage", directory)
    yield check_disk("disk of Ray", Path(os.environ.get("RAY_TMPDIR") or "/tmp"))
    yield check_shared_memory()
    yield check_port(8265, "Ray's dashboard takes the next free port")
    yield check_port(6379, "`ray start --head` needs it, or another --port; a run by itself does not")
    yield check_memory()
    yield from check_devices()
    yield check_vllm()


def check_versions() -> Iterator[Check]:
    """Python and every package against what the installed distribution asks for."""
    try:
        fathom = metadata.distribution("fathom")
    except metadata.PackageNotFoundError:
        yield Check("fathom", "warn", "not installed, so no version can be checked", "run `make install`")
        return
    wanted = fathom.metadata["Requires-Python"]
    state: Literal["ok", "fail"] = "ok" if platform.python_version() in SpecifierSet(wanted) else "fail"
    advice = "" if state == "ok" else "`rm -r .venv; make install PYTHON=...` with such a Python"
    yield Check("python", state, f"{platform.python_version()}, wanted {wanted}", advice)
    extra = "gpu" if _version("vllm") else "cpu"
    for requirement in map(Requirement, fathom.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield check_requirement(requirement)


def check_requirement(requirement: Requirement) -> Check:
    found = _version(requirement.name)
    wanted = str(requirement.specifier) or "any version"
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "ok", found)
    advice = "run `rm .venv/.installed; make install`"
    return Check(requirement.name, "fail", f"{found or 'not installed'}, wanted {wanted}", advice)


def check_storage(uri: str) -> Check:
    try:
        Storage(uri).check_writable()
    except StorageError as error:  # its message says what to do
        return Check("storage", "fail", str(error))
    return Check("storage", "ok", f"{uri} is writable")


def check_disk(name: str, path: Path) -> Check:
    """Ray stops spilling objects on a disk 95% full, and a run of the demo writes about 1 GB."""
    path = next(parent for parent in (path / "x").absolute().parents if parent.exists())
    usage = shutil.disk_usage(path)
    found = f"{usage.free / GIB:.0f} GiB free at {path}"
    if usage.free < 2 * GIB:
        return Check(name, "fail", found, "free at least 2 GiB, or name another with --storage (Ray: RAY_TMPDIR)")
    if usage.free < 0.05 * usage.total:
        return Check(name, "warn", f"{found}, over 95% full", "Ray spills no objects to such a disk: free some space")
    return Check(name, "ok", found)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    if not path.exists():
        return Check("shared memory", "warn", f"no {path}", "Ray uses its temporary directory instead, which is slower")
    size = shutil.disk_usage(path).total
    if size < 2 * GIB:
        advice = "Ray falls back to disk: mount more, in Docker with --shm-size=8g"
        return Check("shared memory", "warn", f"{size / GIB:.2f} GiB at {path}", advice)
    return Check("shared memory", "ok", f"{size / GIB:.0f} GiB at {path}")


def check_port(port: int, consequence: str) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(f"port {port}", "warn", str(error.strerror), f"{consequence}; `ray stop` ends a leftover Ray")
    return Check(f"port {port}", "ok", "free")


def check_memory() -> Check:
    """Memory of this machine, or of the container where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    if total < 8 * GIB:
        return Check("memory", "warn", f"{total / GIB:.1f} GiB", "the demo takes up to 8 GiB: workers may be killed")
    return Check("memory", "ok", f"{total / GIB:.0f} GiB")


def check_devices() -> Iterator[Check]:
    """What torch computes on, its memory, and whether it has bf16 arithmetic."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        yield Check("torch", "fail", f"does not import: {error}", "run `rm -r .venv; make install`")
        return
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
            advice = "`rm -r .venv; make install` installs for GPUs; else the driver is too old for this torch"
            yield Check("devices", "warn", f"torch {torch.__version__} does not see this machine's GPUs", advice)
        yield Check("devices", "ok", f"cpu, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads")
        capabilities = torch.cpu.get_capabilities()
        bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    else:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            advice = "" if free > total / 2 else "another process holds most of it: end it, or set CUDA_VISIBLE_DEVICES"
            yield Check(f"cuda:{index}", "warn" if advice else "ok", found, advice)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check("bf16", "ok", "yes" if bf16 else "no: computing in fp32, which is slower")


def check_vllm() -> Check:
    """vLLM imports, in its own process: it changes whatever imports it."""
    program = "import vllm; from vllm import LLM; print(vllm.__version__)"
    try:
        # Elsewhere than here, so that no directory of this project shadows a package of vLLM's.
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | VLLM_ENV,
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
            timeout=VLLM_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        advice = "a slow disk or a machine without free memory: try again"
        return Check("vllm imports", "fail", f"not within {VLLM_TIMEOUT_S} s", advice)
    if result.returncode == 0:
        return Check("vllm imports", "ok", result.stdout.split()[-1])
    found = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    if any(name in result.stderr for name in ("torchvision", "torchaudio", "torchcodec")):
        advice = "builds for CUDA on a CPU: `pip uninstall torchvision torchaudio torchcodec`; text models need none"
        return Check("vllm imports", "fail", found, advice)
    return Check("vllm imports", "fail", found, "run `rm -r .venv; make install`")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["doctor", *sys.argv[1:]]))
