"""Peak figures of known accelerators: what MFU is measured against and what a plan counts on.

Every peak is dense and accumulates in fp32, as training does. Data sheets often print another number first: with
2:4 sparsity (twice the dense peak), or for GeForce cards with fp16 accumulation (again twice). A device that is
not in the table is unknown, and stays so: a peak guessed from a similar name would make MFU meaningless.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One accelerator as sold.

    `bf16_flops` and `fp8_flops` in FLOP/s (None: no fp8 units), `memory_bytes`, `bandwidth` of that memory in bytes/s.
    Data sheets say GB where drivers count GiB. What a process sees is a little less, as the driver takes some; and a
    sixteenth where `inline_ecc` keeps its codes in the same memory.
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: int
    bandwidth: float
    inline_ecc: bool = False

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes * 15 // 16 if self.inline_ecc else self.memory_bytes


# NVIDIA RTX A6000 data sheet and GA102 white paper, appendix C. The sheet's 309.7 is with sparsity.
A6000 = Hardware("A6000", 154.8e12, None, 48 * GIB, 768e9)
# NVIDIA L4 data sheet: it prints 242 and 485 with sparsity only, halved here.
L4 = Hardware("L4", 121e12, 242.5e12, 24 * GIB, 300e9, inline_ecc=True)
# NVIDIA L40S data sheet: prints dense | sparse. The 733 often quoted for bf16 is sparse; for fp8, 733 is dense.
L40S = Hardware("L40S", 362.05e12, 733e12, 48 * GIB, 864e9, inline_ecc=True)
# NVIDIA GA102 white paper, appendix A. 142 is with fp16 accumulation or with sparsity, 285 with both.
RTX_3090 = Hardware("RTX3090", 71e12, None, 24 * GIB, 936e9)
# NVIDIA Ada white paper, appendix A. 330 (bf16) and 660 (fp8) are fp16-accumulate or sparse; 1321 is both.
RTX_4090 = Hardware("RTX4090", 165.2e12, 330.3e12, 24 * GIB, 1008e9)
# NVIDIA RTX Blackwell white paper, appendix A. 419 (bf16) and 838 (fp8) are fp16-accumulate or sparse.
RTX_5090 = Hardware("RTX5090", 209.5e12, 419e12, 32 * GIB, 1792e9)
# NVIDIA A100 data sheet; 624 is with sparsity. SXM and PCIe are one entry: their figures are the same.
A100_40 = Hardware("A100-40", 312e12, None, 40 * GIB, 1555e9)
# NVIDIA A100 80 GB data sheet: the same peak on both boards, but SXM and PCIe differ in bandwidth.
A100_80 = Hardware("A100-80", 312e12, None, 80 * GIB, 2039e9)
A100_80_PCIE = Hardware("A100-80-PCIe", 312e12, None, 80 * GIB, 1935e9)
# NVIDIA H100 data sheet and Hopper white paper. The sheet prints 1513 and 3026, with sparsity.
H100_PCIE = Hardware("H100-PCIe", 756e12, 1513e12, 80 * GIB, 2.0e12)
# The same two sources. The sheet prints 1979 and 3958, with sparsity.
H100_SXM = Hardware("H100-SXM", 989.4e12, 1978.9e12, 80 * GIB, 3.35e12)
# NVIDIA H200 data sheet, SXM: the H100's compute with more and faster memory.
H200 = Hardware("H200", 989.4e12, 1978.9e12, 141 * GIB, 4.8e12)
# NVIDIA DGX B200 data sheet, an eighth of the system: sparse peaks halved. GB200's chips are faster: not this entry.
B200 = Hardware("B200", 2250e12, 4500e12, 180 * GIB, 8.0e12)
# AMD Instinct MI300X data sheet: prints the dense peak, and 2614.9 (bf16) and 5229.8 (fp8) with sparsity.
MI300X = Hardware("MI300X", 1307.4e12, 2614.9e12, 192 * GIB, 5.3e12)

# What `parse` takes. "A100" is not here, since its memory is not known from that.
_SHORT_NAMES = {
    "A6000": A6000,
    "L4": L4,
    "L40S": L40S,
    "RTX3090": RTX_3090,
    "RTX4090": RTX_4090,
    "RTX5090": RTX_5090,
    "A100-40": A100_40,
    "A100-80": A100_80,
    "A100-80-PCIe": A100_80_PCIE,
    "H100": H100_SXM,
    "H100-SXM": H100_SXM,
    "H100-PCIe": H100_PCIE,
    "H200": H200,
    "B200": B200,
    "MI300X": MI300X,
}

# What drivers call each, with the "NVIDIA " that older ones leave out taken off. Only whole names match: a part
# of one also occurs in "H100 NVL", "RTX 4090 Laptop GPU", and in every MIG slice and virtual GPU.
_DEVICE_NAMES = {
    "RTX A6000": A6000,
    "L4": L4,
    "L40S": L40S,
    "GeForce RTX 3090": RTX_3090,
    "GeForce RTX 4090": RTX_4090,
    "GeForce RTX 5090": RTX_5090,
    "A100-SXM4-40GB": A100_40,
    "A100-PCIE-40GB": A100_40,
    "A100-SXM4-80GB": A100_80,
    "A100 80GB PCIe": A100_80_PCIE,
    "H100 PCIe": H100_PCIE,
    "H100 80GB HBM3": H100_SXM,
    "H200": H200,
    "B200": B200,
    "AMD Instinct MI300X": MI300X,
    "AMD Instinct MI300X OAM": MI300X,
    "AMD Instinct MI300X VF": MI300X,
}
# A virtual function is a whole device or a part of one, under the same name: only its memory tells.
_PERHAPS_A_PART = {"AMD Instinct MI300X VF"}
_MEMORY_SEEN = (0.9, 1.02)  # of `memory_bytes`; with ECC an L4 shows 22 of its 24 GiB


def find(device_name: str, memory_bytes: int | None = None) -> Hardware | None:
    """The entry for what `torch.cuda.get_device_name` returned; None for a device that is not known.

    With `memory_bytes`, the total the driver reports, a device with other memory than was sold under that name
    (a partition, a rebuilt card) is unknown too.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    hardware = _DEVICE_NAMES.get(name)
    if hardware is None or memory_bytes is None:
        return None if name in _PERHAPS_A_PART else hardware
    least, most = (share * hardware.memory_bytes for share in _MEMORY_SEEN)
    return hardware if least <= memory_bytes <= most else None


def parse(text: str) -> Hardware:
    """The entry for a short name a user typed: "H100" (the SXM board), "a100-80", "RTX 4090", "H100_PCIe".

    Case, spaces, dashes, underscores and a closing "GB" do not matter. Raises ValueError that lists the known names.
    """
    for name, hardware in _SHORT_NAMES.items():
        if _plain(name) == _plain(text):
            return hardware
    raise ValueError(f"unknown hardware {text!r}; known are {', '.join(_SHORT_NAMES)}")


@dataclass(frozen=True)
class Gpus:
    """What a run is planned on: `count` equal devices with `memory_bytes` each. `hardware` is None for a CPU, whose
    peak is not in any table."""

    count: int
    hardware: Hardware | None
    memory_bytes: int

    @property
    def name(self) -> str:
        return f"{self.count} x {self.hardware.name}" if self.hardware else "CPU"


def parse_gpus(text: str) -> Gpus:
    """ "8xH100", "H100" (one), "8xB200:187.5GB" (other memory than was sold, in 1e9 bytes), "cpu" (this machine).

    Raises ValueError that says what is known.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?([^:]*?)\s*(?::\s*(\d+(?:\.\d+)?)\s*GB)?", text.strip(), re.IGNORECASE)
    if found is None or not found[2]:
        raise ValueError(f"--gpus {text!r} must be COUNTxNAME, such as 8xH100, 1xA100-40, 8xB200:187.5GB, or cpu")
    count, given = int(found[1] or 1), found[3]
    if count < 1 or (given is not None and float(given) <= 0):
        raise ValueError(f"--gpus {text!r}: number and memory of the devices must be above 0")
    if _plain(found[2]) == "cpu":
        if count > 1:
            raise ValueError(f"--gpus {text!r}: say cpu, and with --workers how many processes share it")
        return Gpus(1, None, int(float(given) * 1e9) if given else machine_memory())
    try:
        hardware = parse(found[2])
    except ValueError as error:
        raise ValueError(f"--gpus {text!r}: {error}, and cpu") from error
    return Gpus(count, hardware, int(float(given) * 1e9) if given else hardware.usable_bytes)


def machine_memory() -> int:
    """Bytes of this machine's memory, or of what its control group may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(allowed)) if allowed.isdigit() else total


def peak_memory() -> int:
    """Peak resident bytes of this process. Where Linux tells, not `ru_maxrss`, which begins there with the peak of the
    process that started this one."""
    status = Path("/proc/self/status")
    _, _, found = (status.read_text() if status.exists() else "").partition("VmHWM:")
    if found:
        return 1024 * int(found.split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name() -> str:
    """The model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpu_computes_bf16() -> bool:
    """Whether this machine's CPU multiplies in bf16 natively (AVX512-BF16), and training on it does so."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower().removesuffix("gb")
