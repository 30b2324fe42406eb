"""What a process and its GPU take: CPU, memory, use, power and temperature, as the system and NVIDIA's driver tell it.

These figures only inform. A machine without the driver has none of the GPU's, and a GPU that does not tell one of them
(a slice of one knows no power) has the others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

LOOK_SECONDS = 5.0  # between two looks, of everyone who takes them again and again
log = logging.getLogger(__name__)


class Usage:
    """Looks at this process, and at the GPU named `gpu`: its UUID as NVML writes it ("GPU-..."), or its number."""

    def __init__(self, gpu: str | None = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # from here on it counts
        self._gpu = gpu
        # The driver may take its time: it is asked in a thread of its own, and its answer told at the next look.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="gpu")
        self._answer: Future[dict[str, float]] | None = None

    def look(self) -> dict[str, float]:
        """`cpu_cores` that this process kept busy since the last look and `rss_gb` that it holds now; of its GPU, as
        asked at the last look, the figures of `gpu_figures`."""
        figures = {
            "cpu_cores": self._process.cpu_percent() / 100,
            "rss_gb": self._process.memory_info().rss / 1e9,
        }
        if self._gpu is None:
            return figures
        if self._answer is None or self._answer.done():
            try:
                figures |= self._answer.result() if self._answer else {}
            except Exception as error:  # whatever it is, training does not end for what only informs
                log.warning("the GPU is not looked at any more: %s", error)
                self._gpu = None
                return figures
            self._answer = self._asking.submit(gpu_figures, self._gpu)
        return figures


def gpu_figures(gpu: str) -> dict[str, float]:
    """`gpu_busy_share` of the time, `gpu_memory_gb` taken by all processes together, `gpu_watts` and `gpu_celsius` of
    the GPU of this UUID or number; those that its driver does not tell are left out, all where there is no driver."""
    import pynvml

    def ask(what: Callable[[], float]) -> Iterator[float]:
        with contextlib.suppress(pynvml.NVMLError):
            yield what()

    try:
        pynvml.nvmlInit()
        find = pynvml.nvmlDeviceGetHandleByIndex if gpu.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
        device = find(int(gpu) if gpu.isdecimal() else gpu)
    except pynvml.NVMLError:
        return {}
    asked: dict[str, Callable[[], float]] = {
        "gpu_busy_share": lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
        "gpu_memory_gb": lambda: pynvml.nvmlDeviceGetMemoryInfo(device).used / 1e9,
        "gpu_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(device) / 1e3,  # it tells milliwatts
        "gpu_celsius": lambda: float(pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU)),
    }
    return {name: figure for name, what in asked.items() for figure in ask(what)}
