"""What starts Fathom on other machines than this one: its files are what their readers take, Slurm's script runs a real
Ray, and a job takes with it what it needs and no more."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from conftest import SETTINGS, flags
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import fillout_defaults, validate_config
from runs import ROOT, Command, Run, environment

from cluster.resources import Devices
from pipeline.artifacts import RunStore
from pipeline.attempts import attempts
from pipeline.config import config_from_args, load_config
from pipeline.dag import StageError
from pipeline.run import build_parser, check_shared

KUBERAY = ROOT / "cluster/kuberay"
SRUN = """#!/bin/bash
# Starts the command once a node of the job, all on this machine; its exit status is the highest of theirs.
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$STAND_INS/tasks"
code=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    ((status > code)) && code=$status
done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo localhost; done ;;
    requeue) echo "$2" >> "$STAND_INS/requeued" ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("file", ["cluster.yaml", "cluster/gcp.yaml"])
def test_launcher_takes_the_cluster_file(file: str) -> None:
    given = yaml.safe_load((ROOT / file).read_text())
    validate_config(fillout_defaults(given))
    for local in given["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    commands = [command for key, listed in given.items() if key.endswith("_commands") for command in listed]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(fillout_defaults(given | {"max_worker": 1}))


def test_image_installs_by_the_pins_and_holds_the_code() -> None:
    dockerfile = (ROOT / "cluster/docker/Dockerfile").read_text()
    assert {"cpu", "gpu"} <= set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    allowed = re.findall(r"^!(\S+)$", (ROOT / "cluster/docker/Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in allowed)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {name.rstrip("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]}
    described = {settings["project"]["readme"], *settings["project"]["license-files"]}
    assert rooms | described | {"pyproject.toml", "scripts"} <= set(allowed)
    install = ["sh", str(ROOT / "scripts/install.sh")]
    wrong = subprocess.run(install, env=environment(DEVICE="tpu"), capture_output=True)
    assert wrong.returncode == 1 and b"give gpu or cpu" in wrong.stderr


def test_kuberay_takes_cluster_and_job() -> None:
    """By the operator's own schemas, which refuse what they do not know here as `kubectl apply` does."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, which makes the job's cluster of the other")
    built = subprocess.run(["kubectl", "kustomize", str(KUBERAY)], check=True, capture_output=True).stdout
    cluster, job = yaml.safe_load((KUBERAY / "raycluster.yaml").read_text()), yaml.safe_load(built)
    assert job["kind"] == "RayJob" and job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert cluster["spec"]["rayVersion"] == ray.__version__
    run = build_parser().parse_args(job["spec"]["entrypoint"].removeprefix("python -m pipeline.run ").split())
    assert config_from_args(run).with_rl
    given = os.environ.get("KUBERAY_CRDS")
    if given is None:
        pytest.skip("needs KUBERAY_CRDS: the folder ray-operator/config/crd/bases of a checkout of KubeRay")
    for document, file in ((cluster, "ray.io_rayclusters.yaml"), (job, "ray.io_rayjobs.yaml")):
        definition = yaml.load((Path(given) / file).read_text(), yaml.CSafeLoader)  # the other takes a minute
        versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
        schema = closed(versions["v1"])
        jsonschema.validate(document, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | {"spec": document["spec"] | {"rayVersions": "2"}}, schema)


def closed(schema: Any) -> Any:
    """A schema of Kubernetes that admits no fields but its own: it would drop others, and say so only to who asks."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    listed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if listed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes of one core each."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "STAND_INS": str(tmp_path),
        "PATH": os.pathsep.join([str(tmp_path), environment()["PATH"]]),
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(10_000)),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_ON_NODE": "1",
    }


def test_slurm_job_that_is_asked_to_stop_is_requeued_and_goes_on(slurm: dict[str, str], tmp_path: Path) -> None:
    run = Run(tmp_path / "runs", "slurm", ["--preset", "demo", *flags(SETTINGS | {"data.synthetic_documents": 500})])
    script = ("bash", "cluster/slurm/fathom.sbatch", *run.arguments("--shared-storage", "--until", "tokenizer"))
    job = Command(*script, **slurm)
    assert job.until(lambda: "run slurm in" in job.output(), 120), job.output()
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    stopped = job.finish(120)
    assert stopped.code == 75 and not stopped.left_behind, stopped.output
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]
    again = Command(*script, **slurm).finish(120)
    assert again.code == 0 and not again.left_behind, again.output
    assert len((tmp_path / "requeued").read_text().split()) == 1
    assert run.states()["tokenizer"] == "done"
    last = attempts(RunStore(str(run.storage), run.name).storage)[-1]
    assert last.outcome == "done" and str(last.hardware).startswith("2 CPU cores")  # one of each node


def test_storage_of_one_node_is_refused_on_several(tmp_path: Path) -> None:
    ours, several = {"storage": str(tmp_path)}, Devices("cpu", 0, 2, nodes=2)
    with pytest.raises(StageError, match=rf"2 nodes, and --storage {tmp_path} .* add --shared-storage"):
        check_shared(load_config("demo", ours), several)
    check_shared(load_config("demo", ours), Devices("cpu", 0, 2, nodes=1))
    check_shared(load_config("demo", {"storage": "s3://bucket/runs"}), several)
    arguments = build_parser().parse_args(["--preset", "demo", "--storage", str(tmp_path), "--shared-storage"])
    shared = config_from_args(arguments)
    assert shared == load_config("demo", ours | {"shared_storage": True})
    check_shared(shared, several)


def test_a_job_uploads_neither_runs_nor_data(tmp_path: Path) -> None:
    """A working directory with 2 GB that belong to nobody else, packed as `ray job submit` packs it."""
    own = shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__", ".*_cache", ".hypothesis")
    repository = shutil.copytree(ROOT, tmp_path / "repository", ignore=own)
    for place in ("runs/d20/base/model.safetensors", "data/books.txt", ".venv/lib/torch.so", "wandb/run.wandb"):
        (repository / place).parent.mkdir(parents=True)
        with (repository / place).open("wb") as file:
            file.truncate(500_000_000)
    packed = uploaded(repository)
    assert {"pipeline/run.py", "pipeline/presets/d20.toml", "cluster/grafana.json"} <= set(packed)
    assert not [name for name in packed if name.startswith(("runs/", "data/", ".venv/", "wandb/"))]
    assert sum(packed.values()) < 5e6


def test_runs_keep_out_of_uploads_where_there_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[model]\ndepth = 2\n")
    store = RunStore(str(tmp_path / "runs"), "mine")
    store.begin()
    store.storage.write_bytes("base/model.safetensors", b"weights")
    assert set(uploaded(tmp_path)) == {"mine.toml"}
    store = RunStore(str(tmp_path), "own")  # whoever made this folder says what of it is uploaded
    store.begin()
    assert not (tmp_path / ".gitignore").exists()


def uploaded(folder: Path) -> dict[str, int]:
    """Compressed size of every file in Ray's package of a working directory."""
    package = folder.parent / f"{folder.name}.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as files:
        return {file.filename: file.compress_size for file in files.infolist() if not file.is_dir()}
