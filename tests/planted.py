"""`python tests/planted.py`: the demo's whole run with planted secrets.

Looks at the command lines of all processes every 20 ms, and searches the run, the caches, temporary files, Ray's folder
and what was printed, half-way and at the end. Exit status 0 when the run succeeded and showed none of the secrets.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from runs import Run, start
from test_secrets import SECRETS, files, holding, watching


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        places = {name: root / name for name in ("home", "ray", "tmp")}
        for place in places.values():
            place.mkdir()
        own = {"HOME": str(places["home"]), "RAY_TMPDIR": str(places["ray"]), "TMPDIR": str(places["tmp"])}
        run = Run(root / "runs", "demo", ["--preset", "demo"])
        with watching() as seen:
            command = start("run", *run.arguments(), **SECRETS, **own)
            command.until((run.path / "base" / "manifest.json").exists, 3600)
            half_way = holding(root)
            result = command.finish(3600)
        found = half_way + holding(root)
        last = files(root)
        logs = [path for path in last if path.name == "runtime_env_agent.log"]
    shown = [value for value in SECRETS.values() if value in result.output]
    print(
        f"exit status {result.code} after {time.monotonic() - command.began:.0f} s; {seen.samples:,} looks at the "
        f"command lines: {len(seen.lines)} with a secret; {len(last):,} files at the end, {len(logs)} of them Ray's "
        f"logs of environments: {len(found)} with a secret, {found[:3]}; {len(shown)} printed"
    )
    return 1 if result.code or seen.lines or found or shown or not logs else 0


if __name__ == "__main__":
    sys.exit(main())
