"""`fathom doctor` reports real faults of this machine and says what to do; `fathom` dispatches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline import cli, doctor
from pipeline.config import ConfigError

ROOT = Path(__file__).parent.parent


def test_doctor_passes_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.doctor", "--json", "--storage", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"python", "ray", "storage", "shared memory", "port 8265", "memory", "bf16", "vllm imports"} <= set(checks)
    assert all(check["advice"] for check in checks.values() if check["state"] == "warn")


def test_the_console_script_reaches_the_same_command() -> None:
    script = Path(sys.executable).with_name("fathom")
    for command in ([str(script), "doctor"], [sys.executable, "-m", "pipeline.doctor"]):
        shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0
        assert shown.stdout.startswith("usage: fathom doctor")


def test_storage_that_cannot_be_written_fails(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    check = doctor.check_storage(str(blocker / "runs"))
    assert check.state == "fail"
    assert "--storage" in check.found


@pytest.mark.parametrize("requirement", ["numpy==1.0", "no-such-package-of-anyone>=2"])
def test_a_version_off_its_pin_fails_with_what_was_wanted(requirement: str) -> None:
    check = doctor.check_requirement(Requirement(requirement))
    assert check.state == "fail"
    assert str(Requirement(requirement).specifier) in check.found
    assert "make install" in check.advice


def test_a_local_build_agrees_with_its_pin() -> None:
    import torch

    pin = torch.__version__.split("+")[0]
    assert doctor.check_requirement(Requirement(f"torch=={pin}")).state == "ok"


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert doctor.check_port(port, "").state == "warn"
    assert doctor.check_port(port, "").state == "ok"


def test_an_engine_that_does_not_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_vllm()
    assert check.state == "fail"
    assert "torchvision::nms" in check.found
    assert "pip uninstall" in check.advice


def test_disk_is_measured_where_the_directory_will_be(tmp_path: Path) -> None:
    check = doctor.check_disk("disk", tmp_path / "not" / "there" / "yet")
    assert check.found.endswith(f" at {tmp_path}")


@pytest.mark.parametrize("argv", [[], ["train"]])
def test_no_or_unknown_command_prints_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("run", "plan", "status", "doctor"))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        *[(["run", flag, ""], f"what follows {flag} ") for flag in ("--corpus", "--chat", "--gsm8k", "--storage")],
        (["run", "--corpus="], "--corpus= "),
        (["run", "--reuse-from", " "], "what follows --reuse-from "),
        (["run", "--only", ""], "what follows --only "),
        (["plan", "--gpus", ""], "what follows --gpus "),
        (["probe", "--json", ""], "what follows --json "),
        (["data", "inspect", "r", "--plot", ""], "what follows --plot "),
        (["data", "verify", "r", "--stage="], "--stage= "),
        (["doctor", "--storage", ""], "what follows --storage "),
        (["status", ""], "what follows status "),
        (["run", "--set", "data.corpus="], "--set data.corpus=: the value "),
        *[(["run", flag, "hub:"], "the place 'hub:' ") for flag in ("--corpus", "--chat", "--gsm8k", "--eval-data")],
        *[(["run", flag, "s3://"], "the place 's3://' ") for flag in ("--corpus", "--storage", "--eval-data")],
        (["run", "--corpus", "hub::train"], "the place 'hub::train' "),
        (["run", "--set", "data.mid.own.source=gs://"], "the place 'gs://' "),
        (["status", "r", "--storage", "s3://?scheme=http"], "the place 's3://?scheme=http' "),
    ],
)
def test_an_argument_without_a_value_is_refused(
    argv: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command: a shell variable that is not set must not stand for the current folder."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    assert capsys.readouterr().err.startswith(f"fathom {argv[0]}: {named}is empty: is a shell variable unset")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--storage", "--corpus"])
def test_a_uri_with_one_slash_is_no_folder_here(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", flag, "s3:/bucket/x"]) == 1
    assert capsys.readouterr().err == "fathom run: the place 's3:/bucket/x' is no URI: write s3://\n"


def test_a_users_error_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(doctor, "main", broken)
    error: ValueError = ConfigError("total_batch_size 7 does not divide")
    with pytest.raises(ConfigError, match="does not divide"):
        cli.main(["doctor", "--debug"])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "fathom doctor: total_batch_size 7 does not divide\n"
    error = ValueError("cannot reshape array of size 7")  # not raised by Fathom's own code
    with pytest.raises(ValueError, match="cannot reshape"):
        cli.main(["doctor"])


def test_connects_locally_forwards_credentials_and_counts_devices() -> None:
    """In a process of its own: Ray's start-up changes the environment."""
    program = (
        "import ray; from cluster.runtime import connect; from cluster.resources import resources\n"
        "url = connect(); assert url.startswith('http://') and connect() == url\n"
        "import os; read = ray.remote(lambda: os.environ['AWS_ENDPOINT_URL'])\n"
        "print(ray.get(read.remote()), resources().cpus, os.cpu_count())"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=env | {"AWS_ENDPOINT_URL": "http://store.invalid"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    endpoint, counted, here = result.stdout.split()
    assert endpoint == "http://store.invalid"
    assert 1 <= int(counted) <= int(here)


def test_a_cluster_that_is_not_there_is_one_clear_error() -> None:
    program = "from cluster.runtime import connect; connect()"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert f"ConnectionError: no connection to the Ray cluster RAY_ADDRESS={address}" in result.stderr
