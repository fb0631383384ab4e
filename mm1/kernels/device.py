"""Describe GPUs by the properties that configurations depend on, and identify the GPU in use.

A GPU is identified by vendor, PCI device id, multiprocessors and memory bandwidth, not by its marketing name, which
drivers spell in several ways. A slice of a GPU (MIG) has the GPU's id but fewer multiprocessors, and is another device.
"""

from dataclasses import dataclass, replace
from math import log2

# What one multiprocessor does in a clock, by architecture: operations of bf16 products, and bytes read from L2. The
# clock follows from the former and `tflops`. L2: about half of what its ports carry, measured on A100, H100, RTX 4090
# (Chips and Cheese 2022 and 2023), by analogy on others.
PER_CLOCK = {
    "sm_80": (2048, 30), "sm_89": (512, 16), "sm_90": (4096, 32), "sm_100": (8192, 64), "sm_120": (512, 16),
    "gfx942": (2048, 18), "gfx950": (4096, 18),
}  # fmt: skip


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: look-ups do it at every launch
class Device:
    """Hold the properties of one GPU; rates are the vendor's, for dense bf16 products accumulated in fp32."""

    name: str  # file name of its tables
    arch: str  # "sm_90", "gfx942"
    units: int  # streaming multiprocessors or compute units
    shared: int  # bytes of shared memory one program may use
    bandwidth: float = 2000.0  # of memory, GB/s
    tflops: float = 300.0
    pci: tuple[int, ...] = ()

    @property
    def vendor(self) -> str:
        """Return "amd" or "nvidia"."""
        return "amd" if self.arch.startswith("gfx") else "nvidia"

    @property
    def family(self) -> str:
        """Return the architecture of DEVICES whose machine code is like this one's."""
        return LIKE.get(self.arch, self.arch)

    @property
    def tma(self) -> bool:
        """Return whether the GPU has bulk tensor copies (TMA)."""
        return self.vendor == "nvidia" and int(self.arch[3:]) >= 90

    @property
    def wgmma(self) -> bool:
        """Return whether warp groups multiply together, as only Hopper's do."""
        return self.arch == "sm_90"

    @property
    def clock(self) -> float:
        """Return the clocks a second at which the vendor's rate of products holds."""
        return self.tflops * 1e12 / max(self.units, 1) / per_clock(self.arch)[0]

    @property
    def l2(self) -> float:
        """Return the bandwidth of L2, GB/s; an H200's is that of an H100, whatever its memory."""
        return per_clock(self.arch)[1] * self.clock * max(self.units, 1) / 1e9

    @property
    def warp(self) -> int:
        """Return the number of threads of a warp."""
        return 64 if self.vendor == "amd" else 32

    @property
    def asynchronous(self) -> bool:
        """Return whether products read operands from shared memory, so that a pipeline keeps all its stages there."""
        return self.family in ("sm_90", "sm_100")


# Architectures that Triton compiles as it compiles one of DEVICES: A10 and RTX 30; Jetson Orin; B300 and Jetson Thor,
# which have tcgen05 as a B200; GB10; MI350X.
LIKE = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120",
        "gfx950": "gfx942"}  # fmt: skip
# PCI ids: pci-ids.ucw.cz. Variants of a chip that differ in bandwidth may share an id.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", "sm_80", 108, 163 << 10, 2039, 312, (0x20B2, 0x20B5, 0x20F3, 0x20F5)),
        Device("a100-40gb", "sm_80", 108, 163 << 10, 1555, 312, (0x20B0, 0x20B1, 0x20F1, 0x20BD, 0x20F6)),
        Device("rtx4090", "sm_89", 128, 99 << 10, 1008, 165, (0x2684,)),
        Device("h100", "sm_90", 132, 227 << 10, 3352, 989, (0x2330, 0x2336)),
        Device("h200", "sm_90", 132, 227 << 10, 4800, 989, (0x2335, 0x233B)),
        Device("b200", "sm_100", 148, 227 << 10, 8000, 2250, (0x2901, 0x2941)),
        Device("rtx5090", "sm_120", 170, 99 << 10, 1792, 210, (0x2B85,)),
        Device("mi300x", "gfx942", 304, 64 << 10, 5300, 1307, (0x74A1, 0x74A9, 0x74B5, 0x74BD)),
    )
}


def per_clock(arch: str) -> tuple[int, int]:
    """Return the entry of PER_CLOCK of an architecture, or of the one that it is like."""
    return PER_CLOCK.get(arch) or PER_CLOCK.get(LIKE.get(arch, arch), (2048, 32))


def identify(arch: str, units: int, shared: int, pci: int | None = None, bandwidth: float | None = None) -> Device:
    """Return the GPU of DEVICES with these properties, or a new Device with rates scaled from the most similar one.

    shared: bytes of shared memory one program may use. bandwidth: in GB/s; None where the driver does not report it, to
    identify by id and units alone.
    """
    for device in DEVICES.values():
        same = device.arch == arch and device.units == units and pci in device.pci
        if same and (bandwidth is None or abs(bandwidth / device.bandwidth - 1) < 0.15):
            return device
    vendor = "amd" if arch.startswith("gfx") else "nvidia"
    name = f"{vendor}-{'unknown' if pci is None else f'{pci:04x}'}-{units}"
    similar = next(iter(nearest(arch, units, bandwidth)), Device(name, arch, units, shared))
    share = max(units, 1) / max(similar.units, 1)
    tflops = similar.tflops * share * per_clock(arch)[0] / per_clock(similar.arch)[0]
    return replace(
        similar, name=name, arch=arch, units=units, shared=shared, bandwidth=bandwidth or similar.bandwidth * share,
        tflops=tflops, pci=() if pci is None else (pci,),
    )  # fmt: skip


def nearest(arch: str, units: int, bandwidth: float | None) -> list[Device]:
    """Return the GPUs of DEVICES of an architecture's family, the most similar in units and bandwidth (GB/s) first."""
    family = LIKE.get(arch, arch)

    def distance(device: Device) -> float:
        memory = 0.0 if bandwidth is None else abs(log2(bandwidth / device.bandwidth))
        return abs(log2(max(units, 1) / device.units)) + memory

    return sorted((d for d in DEVICES.values() if d.arch == family), key=distance)
