"""`fathom report RUN [RUN...]`: what a run made, what it cost and what went wrong, as one page and as Markdown; several
runs are laid over each other.

The page is one HTML file that needs no other and no network.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cluster import manifest as manifests
from cluster.hardware import parse_gpus
from cluster.manifest import MANIFEST, Manifest
from cluster.scratch import scratch
from pipeline.artifacts import REPORT, REPORT_PAGE, RunStore
from pipeline.config import add_storage_flag
from pipeline.plan import check
from pipeline.reporting.blocks import Document
from pipeline.reporting.comparison import comparison
from pipeline.reporting.document import Known, report
from pipeline.reporting.facts import collect
from pipeline.reporting.html import page
from pipeline.reporting.markdown import markdown
from pipeline.terminal import Terminal, say
from pipeline.timing import read_calibration

TEXT = "report.md"


def written(document: Document) -> dict[str, bytes]:
    """The files of a report, by name."""
    return {REPORT_PAGE: page(document).encode(), TEXT: markdown(document).encode()}


def keep(store: RunStore) -> str:
    """Makes the report of a run an artifact beside the others, in place of an earlier one; where its page lies."""
    began, place, run = time.monotonic(), store.stage(REPORT), collect(store)
    with scratch(REPORT) as directory:
        for name, content in written(report(run, Known())).items():
            (directory / name).write_bytes(content)
        place.delete(MANIFEST)
        files = place.upload_tree(directory)
    made = {stage.name: manifests.read(store.stage(stage.name)) for stage in run.stages if stage.state == "done"}
    upstream = {name: manifest.digest() for name, manifest in made.items() if manifest}
    manifests.write(place, Manifest(store.run, REPORT, files, upstream=upstream, seconds=time.monotonic() - began))
    return f"{place.uri}/{REPORT_PAGE}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fathom report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names of runs")
    add_storage_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write it (default ./report-RUN)")
    parser.add_argument("--gpus", help="what the run was on, such as 8xH100 or cpu (default: the preset's)")
    parser.add_argument("--usd-per-gpu-hour", type=float, help="price of one device an hour (default: the preset's)")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        action="append",
        help="plan with the speed that `fathom probe --json FILE` measured; repeatable",
    )
    args = parser.parse_args(argv)
    check(args.usd_per_gpu_hour, None)
    if twice := [name for name in args.runs if args.runs.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice: a run is compared with others, not with itself")
    gpus = parse_gpus(args.gpus) if args.gpus is not None else None
    if args.calibrate and gpus is None:
        raise ValueError("--calibrate is of devices: add --gpus, such as cpu or 8xH100")
    calibration = read_calibration(args.calibrate, gpus) if args.calibrate and gpus else None
    known = Known(gpus, args.usd_per_gpu_hour, calibration)
    runs = [collect(RunStore(args.storage, name)) for name in args.runs]
    folder = args.out or Path(f"report-{'-'.join(args.runs)}"[:200])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"--out {folder}: that is a file; name a folder") from error
    for name, content in written(report(runs[0], known) if len(runs) == 1 else comparison(runs, known)).items():
        (folder / name).write_bytes(content)
    say(Terminal(), str(folder / REPORT_PAGE))
    return 0


if __name__ == "__main__":
    from pipeline.cli import main as cli

    sys.exit(cli(["report", *sys.argv[1:]]))
