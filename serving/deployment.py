"""A model on Ray Serve: each replica is an engine with the whole API, so that no token passes through more processes
than Serve's proxy."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from models.vllm_engine import CPU_ENV, GPU_ENV
from serving.api import Bounds, build
from serving.torch_api import TorchApi
from serving.vllm_api import VLLMApi

APP = "fathom"
WAITING = 64  # requests of a replica over its bound, which it refuses itself
METRICS = ("ray_vllm", "ray_serve")
METRICS_TIMEOUT_S = 10
POLL_S = 0.2


def choose(engine: str) -> str:
    """The engine where it is auto: vllm where it is installed. ValueError where it is asked for and is not."""
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ValueError("--engine vllm: vLLM is not installed; take --engine torch")
    return engine if engine != "auto" else "vllm" if installed else "torch"


@serve.deployment(name="model", max_constructor_retry_count=1, health_check_period_s=5)
@serve.ingress()
class Replica:
    def __init__(
        self,
        fetch: Callable[[], Path],
        name: str,
        engine: str,
        on_gpu: bool,
        bounds: Bounds,
        key: bytes | None,
        run_tools: bool,
    ) -> None:
        self._engine: VLLMApi | TorchApi
        self._engine = (VLLMApi if engine == "vllm" else TorchApi)(fetch(), name, on_gpu)
        self._app = name, bounds, key, run_tools

    async def __serve_build_asgi_app__(self) -> FastAPI:
        if isinstance(self._engine, VLLMApi):
            await self._engine.open()
        return build(self._engine, *self._app, _metrics)

    async def check_health(self) -> None:
        await self._engine.check()

    def __del__(self) -> None:
        if isinstance(self._engine, VLLMApi):
            self._engine.close()


async def _metrics() -> str:
    """What Ray's agents have of all replicas, which tell them every ten seconds."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]

    def get(url: str) -> str:
        with urlopen(url, timeout=METRICS_TIMEOUT_S) as answer:
            text: str = answer.read().decode()
        return text

    texts = await asyncio.gather(*(asyncio.to_thread(get, url) for url in urls))
    lines = [
        line
        for text in texts
        for line in text.splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(METRICS)
    ]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def start(
    fetch: Callable[[], Path],
    name: str,
    engine: str,
    on_gpu: bool,
    replicas: tuple[int, int],
    bounds: Bounds,
    key: bytes | None,
    run_tools: bool,
    host: str,
    port: int,
) -> None:
    """Serves the model that `fetch` brings to a machine on the connected cluster, from here on; returns when it
    answers. RuntimeError where it does not come up, or where the cluster serves something already."""
    with suppress(ValueError):  # there is no such actor
        ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        raise RuntimeError("Ray Serve runs on this cluster already: `serve shutdown` ends it, or unset RAY_ADDRESS")
    least, most = replicas
    options: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    options["runtime_env"] = {"env_vars": GPU_ENV if on_gpu else CPU_ENV}
    scale: dict[str, Any] = {"num_replicas": least}
    if most > least:
        target = max(1, bounds.at_once // 4)
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least, max_replicas=most, target_ongoing_requests=target
            )
        }
    serve.start(
        http_options=HTTPOptions(host=host, port=port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    model = Replica.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        max_ongoing_requests=bounds.at_once + WAITING,
        graceful_shutdown_timeout_s=bounds.seconds,
        **scale,
    ).bind(fetch, name, engine, on_gpu, bounds, key, run_tools)
    try:
        serve.run(model, name=APP, route_prefix="/")
    except RuntimeError:  # of Serve's, which only says that it failed
        told = serve.status().applications[APP].deployments["model"].message.strip().splitlines()
        why = next((line.strip() for line in reversed(told) if "Error" in line), "Ray Serve does not say why")
        raise RuntimeError(f"no engine came up: {why}; --debug shows what it printed") from None


def stop() -> None:
    """Lets what streams come to its end, and takes nothing new."""
    serve.delete(APP, _blocking=False)  # which would wait for a minute at most
    while APP in serve.status().applications:
        time.sleep(POLL_S)
    serve.shutdown()
