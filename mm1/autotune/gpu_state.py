"""Read a GPU's state while something is measured: clocks, power, temperature, throttling, energy.

The values come from NVML, through the optional package nvidia-ml-py. A value that cannot be read is None, a note gives
the reason, and measurements continue without it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

REASONS = {
    0x1: "idle", 0x2: "application_clocks", 0x4: "power_cap", 0x8: "hardware_slowdown", 0x10: "sync_boost",
    0x20: "thermal", 0x40: "hardware_thermal", 0x80: "hardware_power_brake", 0x100: "display_clocks",
    0x200: "board_limit", 0x400: "reliability",
}  # fmt: skip
SLOWDOWNS = {"power_cap", "hardware_slowdown", "thermal", "hardware_thermal", "hardware_power_brake"}
# A GPU that was limited for a smaller share of the time does not count as throttled: every GPU that boosts reaches its
# limits for moments (NVIDIA/DCGM#285).
THROTTLED_SHARE = 0.01


def read(index: int | None = None) -> dict[str, Any]:
    """Return the state of a GPU now, by torch's index (None: the current one), or {"note": why} without NVML.

    sm_mhz, memory_mhz, power_w, power_cap_w, celsius; reasons: names of what limits the clocks now; energy_mj,
    power_limited_ns, heat_limited_ns: counters of millijoules and of nanoseconds under a limit; gpu_percent: percent of
    the last sampling period, a fraction of a second, in which a kernel ran; memory_used: bytes; ecc, mig, persistence:
    bool; others: number of other processes that compute on this GPU; driver: version.
    """
    nvml = _start()
    if isinstance(nvml, str):
        return {"note": nvml}
    index = torch.cuda.current_device() if index is None else index
    try:
        return _state(nvml, nvml.nvmlDeviceGetHandleByPciBusId(pci_slot(index)), index)
    except nvml.NVMLError as error:
        return {"note": f"NVML finds no GPU at {pci_slot(index)} ({error})"}
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def throttled(state: dict[str, Any]) -> bool | None:
    """Return whether power, heat or the hardware limited the clocks when the state was read; None if unknown."""
    reasons = state.get("reasons")
    return None if reasons is None else not SLOWDOWNS.isdisjoint(reasons)


@contextmanager
def watch(index: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield a dict that is filled when the block, with its work on the device, ends without an exception.

    before, after: results of `read`; seconds: of the block; joules: from a counter that is too coarse for a block of
    milliseconds; throttled: True if the GPU was throttled at either end or, by the counters, for over THROTTLED_SHARE
    of the block; note: names of values that could not be read, and reasons. Unknown values are None.
    """
    watched: dict[str, Any] = {}
    _wait(index)
    before, begin = read(index), time.perf_counter()
    yield watched
    _wait(index)
    seconds, after = time.perf_counter() - begin, read(index)

    def rise(counter: str) -> int | None:
        first, last = before.get(counter), after.get(counter)
        return None if first is None or last is None or last < first else last - first

    limited = [n for name in ("power_limited_ns", "heat_limited_ns") if (n := rise(name)) is not None]
    signs = {throttled(before), throttled(after), *(n > THROTTLED_SHARE * seconds * 1e9 for n in limited)} - {None}
    notes = dict.fromkeys(state["note"] for state in (before, after) if "note" in state)
    energy = rise("energy_mj")
    watched.update(
        before=before, after=after, seconds=seconds, joules=energy and energy / 1e3,
        throttled=any(signs) if signs else None, note="; ".join(notes) or None,
    )  # fmt: skip


def pci_slot(index: int) -> str:
    """Return a GPU's PCI slot as NVML and /sys write it. torch may number the GPUs differently, or see fewer."""
    p = torch.cuda.get_device_properties(index)
    return f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"


def _start() -> Any:
    """Return the module pynvml, initialised, or a string with the reason why it cannot be used."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip:
        return "NVML does not read AMD GPUs; amd-smi shows their state"
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return "NVML cannot be read: pip install nvidia-ml-py"
    except Exception as error:
        return f"NVML does not start ({error}): pip install -U nvidia-ml-py; nvidia-smi must work"
    return pynvml


def _state(nvml: Any, gpu: Any, index: int) -> dict[str, Any]:
    queries = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "power_cap_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        "celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "reasons": lambda: _reasons(nvml, gpu),
        "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu),
        "power_limited_ns": lambda: nvml.nvmlDeviceGetViolationStatus(gpu, nvml.NVML_PERF_POLICY_POWER).violationTime,
        "heat_limited_ns": lambda: nvml.nvmlDeviceGetViolationStatus(gpu, nvml.NVML_PERF_POLICY_THERMAL).violationTime,
        "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
        "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(gpu)),
        "others": lambda: _others(nvml, gpu, index),
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
    }
    state, unread = {}, []
    for name, query in queries.items():
        try:
            state[name] = query()
        except (nvml.NVMLError, AttributeError) as error:  # AttributeError if nvidia-ml-py is older than the function
            state[name] = None
            unread.append(f"{name} ({error})")
    return state | ({"note": f"not read: {', '.join(unread)}"} if unread else {})


def _reasons(nvml: Any, gpu: Any) -> list[str]:
    try:
        mask = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except (nvml.NVMLError, AttributeError):
        mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # its name before driver 535
    bits = (1 << i for i in range(mask.bit_length()) if mask >> i & 1)
    return sorted(REASONS.get(bit, hex(bit)) for bit in bits)


def _others(nvml: Any, gpu: Any, index: int) -> int:
    pids = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    # In a container this process has another number than on the host, which NVML lists.
    listed = os.getpid() in pids or torch.cuda.memory_reserved(index) > 0
    return max(len(pids) - listed, 0)


def _wait(index: int | None) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(index)
