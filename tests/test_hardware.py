"""A known device gets its own dense peak, any other none."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hardware import GIB, Hardware, find, parse
from cluster.usage import Usage, gpu_figures

# torch.cuda.get_device_name, the memory the driver reports (MiB), and the entry.
DEVICES = [
    ("NVIDIA RTX A6000", 49140, "A6000"),
    ("NVIDIA L4", 22563, "L4"),
    ("NVIDIA L40S", 45487, "L40S"),
    ("NVIDIA GeForce RTX 3090", 24268, "RTX3090"),
    ("NVIDIA GeForce RTX 4090", 24564, "RTX4090"),
    ("NVIDIA GeForce RTX 5090", 32607, "RTX5090"),
    ("NVIDIA A100-SXM4-40GB", 40960, "A100-40"),
    ("NVIDIA A100-PCIE-40GB", 40960, "A100-40"),
    ("NVIDIA A100-SXM4-80GB", 81920, "A100-80"),
    ("NVIDIA A100 80GB PCIe", 81920, "A100-80-PCIe"),
    ("NVIDIA H100 PCIe", 81559, "H100-PCIe"),
    ("NVIDIA H100 80GB HBM3", 81559, "H100-SXM"),
    ("NVIDIA H200", 143771, "H200"),
    ("NVIDIA B200", 183359, "B200"),
    ("AMD Instinct MI300X", 196592, "MI300X"),
    ("AMD Instinct MI300X OAM", 196592, "MI300X"),
]
UNKNOWN = [
    *("", "NVIDIA", "cpu", "NVIDIA A10", "NVIDIA A10G", "NVIDIA A40", "NVIDIA L40", "NVIDIA L20", "NVIDIA T4"),
    *("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX A5000", "Quadro RTX 6000", "NVIDIA RTX A6000-48Q"),
    *("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 3080", "NVIDIA GeForce RTX 4090 D"),
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 5090 D"),
    *("NVIDIA A100", "NVIDIA A100X", "NVIDIA A800-SXM4-80GB", "NVIDIA A100-SXM-64GB", "GRID A100-40C"),
    *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H200 MIG 7g.141gb"),
    *("NVIDIA H100", "NVIDIA H100 NVL", "NVIDIA H100 96GB HBM3", "NVIDIA H800", "NVIDIA H20", "NVIDIA H200 NVL"),
    *("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA B100", "NVIDIA B300 SXM6 AC"),
    *("AMD Instinct MI300A", "AMD Instinct MI325X", "AMD Instinct MI250X", "AMD Radeon RX 7900 XTX"),
]
# SMs or CUs, dense bf16 FLOPs each does a clock (fp32 accumulation), GHz of the peak; bits of the bus, Gbit/s a pin.
CHIPS = [
    ("A6000", 84, 1024, 1.80, 384, 16.0),
    ("L4", 58, 1024, 2.04, 192, 12.5),
    ("L40S", 142, 1024, 2.49, 384, 18.0),
    ("RTX3090", 82, 512, 1.695, 384, 19.5),
    ("RTX4090", 128, 512, 2.52, 384, 21.0),
    ("RTX5090", 170, 512, 2.407, 512, 28.0),
    ("A100-40", 108, 2048, 1.41, 5120, 2.43),
    ("A100-80", 108, 2048, 1.41, 5120, 3.186),
    ("A100-80-PCIe", 108, 2048, 1.41, 5120, 3.024),
    ("H100-PCIe", 114, 4096, 1.62, 5120, 3.186),
    ("H100-SXM", 132, 4096, 1.83, 5120, 5.23),
    ("H200", 132, 4096, 1.83, 6144, 6.25),
    ("MI300X", 304, 2048, 2.10, 8192, 5.2),
]
NAMES = sorted({name for _, _, name in DEVICES})


def _name(hardware: Hardware | None) -> str | None:
    return hardware.name if hardware else None


@pytest.mark.parametrize(("device", "mib", "name"), DEVICES)
def test_the_name_torch_gives_finds_the_entry_with_or_without_memory(device: str, mib: int, name: str) -> None:
    older_driver = device.removeprefix("NVIDIA ")
    assert {_name(find(d, m)) for d in (device, older_driver) for m in (None, mib << 20)} == {name}


@pytest.mark.parametrize("device", UNKNOWN)
def test_a_device_that_is_not_in_the_table_is_unknown(device: str) -> None:
    assert find(device) is None
    assert find(device, 80 * GIB) is None


@given(st.sampled_from([d for d, _, _ in DEVICES]), st.text(min_size=1), st.booleans())
def test_no_part_of_a_name_is_enough(device: str, more: str, before: bool) -> None:
    longer = (more + device if before else device + more).strip()
    known = {d for d, _, _ in DEVICES} | {d.removeprefix("NVIDIA ") for d, _, _ in DEVICES}
    assert longer.removeprefix("NVIDIA ") in known or find(longer) is None
    assert find(device[:-1]) is None or device[:-1] in known


@pytest.mark.parametrize(("device", "mib", "name"), DEVICES)
@pytest.mark.parametrize("share", [1 / 8, 1 / 2, 0.8, 1.2, 2])
def test_other_memory_than_sold_under_the_name_is_unknown(device: str, mib: int, name: str, share: float) -> None:
    assert find(device, int(share * parse(name).memory_bytes)) is None


def test_a_virtual_function_is_known_only_when_its_memory_shows_the_whole_device() -> None:
    device = "AMD Instinct MI300X VF"
    assert find(device) is None
    assert find(device, 24 * GIB) is None
    assert _name(find(device, 196592 << 20)) == "MI300X"


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_parsed_by_its_own_name_however_it_is_spelled(name: str) -> None:
    spellings = name, name.lower(), name.upper(), name.replace("-", " "), name.replace("-", "_"), f" {name} "
    assert {parse(spelling).name for spelling in spellings} == {name}


@pytest.mark.parametrize(
    ("text", "name"),
    [("H100", "H100-SXM"), ("A100-40GB", "A100-40"), ("a100 80 gb", "A100-80"), ("RTX 4090", "RTX4090")],
)
def test_usual_short_names(text: str, name: str) -> None:
    assert parse(text).name == name


@pytest.mark.parametrize("text", ["", "A100", "4090", "H100-NVL", "L40", "A10", "GB200", "L4S", "RTX4090Ti"])
def test_an_unknown_short_name_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="unknown hardware") as error:
        parse(text)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize(("name", "units", "flops", "ghz", "bits", "gbit"), CHIPS)
def test_peaks_follow_from_the_chip(name: str, units: int, flops: int, ghz: float, bits: int, gbit: float) -> None:
    """Neither the sparse nor the fp16-accumulate figure passes: both are twice what the units can do."""
    hardware = parse(name)
    assert hardware.bf16_flops == pytest.approx(units * flops * ghz * 1e9, rel=0.005)
    assert hardware.bandwidth == pytest.approx(bits / 8 * gbit * 1e9, rel=0.02)


def test_eight_b200_are_one_dgx() -> None:
    """Its sheet: 72 petaFLOPS of fp8 and half of it in bf16, both sparse; 1440 GB at 64 TB/s."""
    b200 = parse("B200")
    sparse = 2 * 8
    assert (sparse * b200.bf16_flops, sparse * (b200.fp8_flops or 0)) == (36e15, 72e15)
    assert (8 * b200.memory_bytes, 8 * b200.bandwidth) == (1440 * GIB, 64e12)


@pytest.mark.parametrize("name", NAMES)
def test_fp8_is_twice_bf16_from_ada_hopper_and_cdna_3_on_and_absent_before(name: str) -> None:
    hardware = parse(name)
    if name.startswith(("A100", "A6000", "RTX3090")):
        assert hardware.fp8_flops is None
    else:
        assert hardware.fp8_flops == pytest.approx(2 * hardware.bf16_flops, rel=0.015)


def test_planning_answers_without_torch_or_ray() -> None:
    code = "import sys, cluster.hardware; sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_process_is_seen_with_the_cores_and_the_memory_it_takes() -> None:
    usage = Usage()
    busy, until = bytearray(200_000_000), time.process_time() + 0.3
    while time.process_time() < until:
        pass
    seen = usage.look()
    assert {*seen} == {"cpu_cores", "rss_gb"}
    assert 0.02 < seen["cpu_cores"] < 1.5 and len(busy) / 1e9 < seen["rss_gb"] < 20


def test_without_a_driver_there_are_no_figures_and_no_words(caplog: pytest.LogCaptureFixture) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    usage = Usage("GPU-1234")
    for _ in range(3):
        assert {*usage.look()} == {"cpu_cores", "rss_gb"}
        time.sleep(0.05)
    assert gpu_figures("0") == {} and not caplog.text


def test_what_a_gpu_tells_is_in_the_units_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(_: object) -> int:
        raise pynvml.NVMLError_NotSupported()  # type: ignore[no-untyped-call]

    told = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97, memory=40),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=70_500_000_000, total=85_000_000_000),
        "nvmlDeviceGetPowerUsage": lambda _: 651_250,
        "nvmlDeviceGetTemperature": lambda device, sensor: {(3, 0): 61, ("GPU-a", 0): 62}[device, sensor],
    }
    for name, function in told.items():
        monkeypatch.setattr(pynvml, name, function)
    expected = {"gpu_busy_share": 0.97, "gpu_memory_gb": 70.5, "gpu_watts": 651.25, "gpu_celsius": 61}
    assert gpu_figures("3") == expected and gpu_figures("GPU-a") == expected | {"gpu_celsius": 62}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", untold)
    del expected["gpu_watts"]
    assert gpu_figures("3") == expected


def test_a_gpu_whose_driver_hangs_or_fails_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()

    def hang(gpu: str) -> dict[str, float]:
        let_go.wait(60)
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr("cluster.usage.gpu_figures", hang)
    usage, began = Usage("0"), time.monotonic()
    for _ in range(10):
        usage.look()
    assert time.monotonic() - began < 5
    let_go.set()
    for _ in range(100):
        usage.look()
        time.sleep(0.01)
    assert caplog.text.count("the driver is gone") == 1
