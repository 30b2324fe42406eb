"""`python tests/readme.py FOLDER`: every command of README.md in a fresh clone in FOLDER, each block in a fresh shell.

Where a command would take hours or needs data of one's own, flags are added and names replaced, as SMALLER and PLACES
have it; all of these must be found in README.md. Prints each command with its exit status and time. Exit status 0 when
all are 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
from begun import checkpoint
from conftest import SETTINGS, flags
from runs import ROOT
from test_scoring import make_bundle

SERVERS = ("fathom serve ", "vllm.entrypoints.openai.api_server")  # each at port 8000, until the next one starts
SHORT = " ".join(flags(SETTINGS))
# What is written → what is run.
SMALLER = {
    "make demo ": f"make demo ARGS='{SHORT} --set rl.eval_every=0' ",
    "make test ": "make test ARGS='tests/test_mixture.py' ",
    "--depth 4 --name mine": f"--preset smoke --name mine {SHORT} --set rl.require_signal=false",
    "--init /models/Qwen3-0.6B --name": "--preset smoke --set model.sequence_len=256 --init MODEL --name",
    "fathom run ...": ".venv/bin/fathom run --preset smoke --chat CHAT --gsm8k none --dry-run",
    "--set data.sft.smoltalk=none": "--set data.sft.chat=none --set data.sft.own.source=CHAT",
    "--preset demo --json probe.json": "--preset smoke --device-batch 1,2 --json probe.json",
    "probe --preset demo ": "probe --preset smoke --device-batch 1,2 ",
    "plan --preset demo --gpus cpu": "plan --preset smoke --gpus cpu",
    "--depth 4 --vocab 8192 --seq 512 --device-batch 16": "--depth 1 --vocab 512 --seq 64 --steps 2",
    "bench.kernels ": "bench.kernels --tokens 512 --vocab 512 --width 64 ",
    "bench.checkpoint ": "bench.checkpoint --depth 1 --vocab 512 --seq 64 --device-batch 1 --steps-between 2 ",
    "bench.plan_vs_measured ": "bench.plan_vs_measured --steps 1 --rounds 1 ",
    "bench.ingest ": "bench.ingest --megabytes 4 --vocab 512 --seq 128 --out ingest.json ",
    "bench.rl ": "bench.rl --depth 1 --vocab 512 --seq 128 --prompts 2 --samples 2 --new-tokens 16 --calls 1 ",
    "--tasks chatcore ": "--tasks GSM8K,Spelling ",
    "--tasks word_problems ": "--tasks word_problems --limit 4 --gen_kwargs max_gen_toks=32 ",
    "--preset demo --name job1": f"--preset demo --name job1 {SHORT} --until base",
}
PLACES = {
    "/data/books/*.parquet": "BOOKS",
    "/data/chat.jsonl": "CHAT",
    "/data/gsm8k": "PROBLEMS",
    "/data/eval_bundle.zip": "BUNDLE",
    "/data/core": "BUNDLE",
    "/data/evaluation": "EVALUATION",
    "identity.jsonl": "CHAT",
    "/models/Qwen3-0.6B": "MODEL",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every block of README.md that somebody could paste."""
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_data(folder: Path) -> dict[str, Path]:
    """Where what stands for one's own data lies."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from corpus import synthetic
    from tasks.arithmetic import Arithmetic

    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": list(synthetic.documents(0, 1_500, 0))}), folder / "books.parquet")
    chats = [{"prompt": p.question, "response": p.answer} for p in Arithmetic(2_000, seed=0).problems("train")]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for split in ("train", "test"):
        problems = Arithmetic(2_000, seed=0).problems("train" if split == "train" else "test")
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in problems))
    checkpoint("qwen3", folder / "model")
    own = {"BOOKS": folder / "books.parquet", "CHAT": folder / "chat.jsonl", "PROBLEMS": folder}
    own |= {"MODEL": folder / "model"}
    shutil.copytree(folder, folder / "evaluation/gsm8k", ignore=shutil.ignore_patterns("evaluation", "model"))
    return own | {"EVALUATION": folder / "evaluation", "BUNDLE": make_bundle(folder / "bundle")}


def made_small(text: str, places: dict[str, Path], left: set[str]) -> str:
    for written, run in (SMALLER | PLACES).items():
        if written in text:
            text = text.replace(written, run)
            left.discard(written)
    for name, place in places.items():
        text = text.replace(name, str(place))
    return text


def wait_for(address: str, seconds: float) -> None:
    """Returns once a server answers there."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends a server, and waits until its port is free."""
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(120)
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:8000/health", timeout=5):
            time.sleep(1)
            continue
        return


def main() -> int:
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        print("give the name of a folder that does not exist yet", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).resolve()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    places = write_data(folder / "data")
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HF_"))}
    failed, left = 0, {*SMALLER, *PLACES}
    server = None
    try:
        for language, content in blocks((ROOT / "README.md").read_text()):
            text = made_small(content, places, left)
            if language == "python":
                (folder / "clone" / "pasted.py").write_text(text)
                text = ".venv/bin/python pasted.py"
            serves = any(name in text for name in SERVERS)
            if serves and server is not None:
                stop(server)
            began = time.monotonic()
            shell = ["bash", "-e", "-o", "pipefail", "-c", text]
            output = folder / "output.txt"
            with output.open("w") as file:
                process = subprocess.Popen(
                    shell, cwd=folder / "clone", env=environment, stdout=file, stderr=file, start_new_session=True
                )
            if serves:
                server = process
                wait_for("http://localhost:8000/health", 300)
            code = 0 if process is server else process.wait(3_600)
            print(f"== exit status {code}, {time.monotonic() - began:.0f} s\n{text.strip()}", flush=True)
            if code:
                failed += 1
                print(output.read_text()[-3_000:], flush=True)
    finally:
        if server is not None:
            stop(server)
        for process in psutil.process_iter():  # what the commands left running, such as `ray start`
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(folder):
                    process.kill()
    if left:
        print(f"no longer in README.md, so out of date here: {', '.join(sorted(left))}")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
