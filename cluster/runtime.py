"""Ray start-up: the cluster a run was submitted to, else one on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import psutil
import ray
from ray._private import ray_constants

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # off: 127.0.0.1 stays what it is, as on those two
WORKER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits for the next: at Ray's default it costs two seconds
    "MALLOC_ARENA_MAX": "1",  # see stages.training.parallel.keep_freed_memory
}
REACH_TIMEOUT_S = 10
LOOK_SECONDS = 0.5
# Read where a process begins, before a hook could set them, and no secrets: Ray shows its env_vars to everybody.
SHOWN = ("MALLOC_", "RAY_TRAIN_")
HIDDEN = ("AWS_", "GOOGLE_", "HF_", "TIKTOKEN_")


def connect(debug: bool = False) -> str | None:
    """Connects this process to Ray and returns the dashboard's URL, None where there is no dashboard.

    `RAY_ADDRESS` names the cluster (`ray job submit` sets it); without it a private one starts here and ends with
    this process; it listens on the loopback interface alone, and when its head dies this process ends with a message.
    Credentials and endpoints of object stores go on to every worker, and into no command line and no log.
    `debug` shows here what workers print. Calling it again changes nothing.
    Raises ConnectionError when the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        return _dashboard_url(ray.worker.global_worker.node.webui_url)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Stages and actors that reserve no CPU are more processes than cores, of which Ray would warn.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    address = os.environ.get("RAY_ADDRESS") or "local"
    private = address == "local"
    local: dict[str, object] = {"include_dashboard": True} if private else {}
    runtime_env: dict[str, object] = {"env_vars": _worker_env()}
    if private:
        # As Ray does on macOS and Windows: its node is 127.0.0.1 then, which every process of it binds. An address
        # given to ray.init would not do, since Ray makes this machine's public one of a loopback address; so would the
        # processes that Ray starts, such as the dashboard's, without the variable. What is left is the store in which
        # training workers meet: torch binds it to every interface.
        os.environ[LOOPBACK] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        # For the dashboard's Train page. Elsewhere its actor would outlive the job, and not the hook below.
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    else:  # workers of a private cluster inherit this process's environment
        runtime_env["worker_process_setup_hook"] = _environment_hook()
    try:
        _check_reachable(address)
        context = ray.init(
            address=address, runtime_env=runtime_env, log_to_driver=debug, logging_level="ERROR", **local
        )
    except Exception as error:  # Ray raises bare Exceptions too, such as for a node that is slow to start
        if private:
            advice = "a leftover Ray may hold its ports: `ray stop` ends it, `fathom doctor` shows what is taken"
            raise ConnectionError(f"Ray did not start on this machine: {error}; {advice}") from error
        advice = "check that it is up and runs this Ray and Python version, or unset RAY_ADDRESS to run on this machine"
        raise ConnectionError(f"no connection to the Ray cluster RAY_ADDRESS={address}: {error}; {advice}") from error
    if private:
        threading.Thread(target=_watch_head, args=(ray.worker.global_worker.node,), daemon=True, name="head").start()
    return _dashboard_url(context.dashboard_url)


def _check_reachable(address: str) -> None:
    """Raises OSError at once where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()


def _worker_env() -> dict[str, str]:
    env = WORKER_ENV | {name: value for name, value in os.environ.items() if name.startswith(SHOWN)}
    # Ray refuses a variable that the submitted job's own runtime environment names as well.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    taken = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in env.items() if name not in taken}


def _environment_hook() -> Callable[[], None]:
    """What every worker of this job calls first. Ray sends it with the values within it through its own key-value
    store, as it sends functions, and drops it when the job ends; command lines and logs only have its key."""
    values = {name: value for name, value in os.environ.items() if name.startswith(HIDDEN)}

    def take_environment() -> None:
        os.environ.update(values)

    return take_environment


def _watch_head(node: ray._private.node.Node) -> None:
    """Ends this process and all below it when the private cluster's head has died: Ray itself would try for a minute
    to reach it and then abort."""
    head = node.all_processes[ray_constants.PROCESS_TYPE_GCS_SERVER][0].process
    while head.poll() is None:
        time.sleep(LOOK_SECONDS)
    if not ray.is_initialized() or ray.worker.global_worker.node is not node:  # Ray was shut down
        return
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which a live view may have hidden
    print(
        f"{show_cursor}\nRay's head process (gcs_server) has ended with status {head.returncode}, and this command "
        "with it. What is done stays done: run the same command again to go on from there",
        file=sys.stderr,
        flush=True,
    )
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


def token_asked() -> bool:
    """Whether the connected cluster lets nobody in without its token, the dashboard's readers neither; Ray sets the
    variable where it is unset and there is a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def metrics_url() -> str | None:
    """Where this node's agent serves Ray's metrics to Prometheus, of the processes of this node; None where it does
    not. `connect` comes first."""
    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine and (port := node.get("MetricsExportPort")):
            return f"http://{node['NodeManagerAddress']}:{port}/metrics"
    return None


def _dashboard_url(host: str | None) -> str | None:
    return f"http://{host}" if host else None
