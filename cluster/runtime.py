"""Ray start-up: the cluster a run was submitted to, else one on this machine."""

from __future__ import annotations

import json
import os
import socket

import ray

WORKER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits for the next: at Ray's default it costs two seconds
    "MALLOC_ARENA_MAX": "1",  # see stages.training.parallel.keep_freed_memory
}
REACH_TIMEOUT_S = 10
FORWARDED = ("AWS_", "GOOGLE_", "HF_", "MALLOC_", "RAY_TRAIN_", "TIKTOKEN_")


def connect(debug: bool = False) -> str | None:
    """Connects this process to Ray and returns the dashboard's URL, None where there is no dashboard.

    `RAY_ADDRESS` names the cluster (`ray job submit` sets it); without it a private one starts here and ends with
    this process. Credentials and endpoints of object stores go on to every worker;
    `debug` shows here what they print. Calling it again changes nothing.
    Raises ConnectionError when the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        return _dashboard_url(ray.worker.global_worker.node.webui_url)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Stages and actors that reserve no CPU are more processes than cores, of which Ray would warn.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"include_dashboard": True} if address == "local" else {}
    try:
        _check_reachable(address)
        context = ray.init(
            address=address,
            runtime_env={"env_vars": _worker_env()},
            log_to_driver=debug,
            logging_level="ERROR",
            **local,
        )
    except Exception as error:  # Ray raises bare Exceptions too, such as for a node that is slow to start
        if address == "local":
            advice = "a leftover Ray may hold its ports: `ray stop` ends it, `fathom doctor` shows what is taken"
            raise ConnectionError(f"Ray did not start on this machine: {error}; {advice}") from error
        advice = "check that it is up and runs this Ray and Python version, or unset RAY_ADDRESS to run on this machine"
        raise ConnectionError(f"no connection to the Ray cluster RAY_ADDRESS={address}: {error}; {advice}") from error
    return _dashboard_url(context.dashboard_url)


def _check_reachable(address: str) -> None:
    """Raises OSError at once where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()


def _worker_env() -> dict[str, str]:
    env = WORKER_ENV | {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    # Ray refuses a variable that the submitted job's own runtime environment names as well.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    taken = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in env.items() if name not in taken}


def _dashboard_url(host: str | None) -> str | None:
    return f"http://{host}" if host else None
