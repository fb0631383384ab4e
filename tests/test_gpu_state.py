"""The state of a GPU is read from a fake NVML, before and after a block."""

import builtins
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mm1.autotune import gpu_state
from mm1.autotune.gpu_state import read, throttled, watch

SLOTS = ["0000:17:00.0", "0000:65:00.0", "0001:ca:00.0"]  # in NVML's order


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    """Stand for NVML with three GPUs, whose handles are indices of SLOTS.

    Functions in `broken` raise, and counters rise at every reading.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
    NVMLError = NVMLError

    def __init__(self):
        super().__init__("pynvml")
        self.open, self.broken, self.mask, self.pids = 0, {}, 0, []
        self.energy = iter(range(1_000_000, 10_000_000, 2500))
        self.limited = {0: iter([7] * 100), 1: iter([9] * 100)}

    def __getattribute__(self, name):
        if name.startswith("nvml"):
            error = self.broken.get(name)
            if isinstance(error, AttributeError):
                raise error
            if error:
                return lambda *_: (_ for _ in ()).throw(error)
            assert name in ("nvmlInit", "nvmlShutdown") or self.open == 1, f"{name} outside of nvmlInit … nvmlShutdown"
        return super().__getattribute__(name)

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, slot):
        if slot not in SLOTS:
            raise NVMLError("Not Found")
        return SLOTS.index(slot)

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[kind] - 10 * gpu

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 612_345

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 55

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return self.mask

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return self.mask

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return next(self.energy)

    def nvmlDeviceGetViolationStatus(self, gpu, policy):
        return SimpleNamespace(violationTime=next(self.limited[policy]))

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=3 << 30, total=141 << 30)

    def nvmlDeviceGetEccMode(self, gpu):
        return [1, 0]

    def nvmlDeviceGetMigMode(self, gpu):
        return [0, 1]

    def nvmlDeviceGetPersistenceMode(self, gpu):
        return 1

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlSystemGetDriverVersion(self):
        return "580.95.05"


@pytest.fixture
def nvml(monkeypatch):
    """Let torch see the last and the first GPU of NVML, in this order; the last one is current."""
    visible = [(1, 0xCA), (0, 0x17)]

    def properties(index):
        return SimpleNamespace(pci_domain_id=visible[index][0], pci_bus_id=visible[index][1], pci_device_id=0)

    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    yield module
    assert module.open == 0, "nvmlInit without nvmlShutdown"


def test_all_values(nvml):
    nvml.mask, nvml.pids = 0x4 | 0x1, [1, 2]
    state = read(1)
    assert state == {
        "sm_mhz": 1980, "memory_mhz": 3201, "power_w": 612.345, "power_cap_w": 700.0, "celsius": 55,
        "reasons": ["idle", "power_cap"], "energy_mj": 1_000_000, "power_limited_ns": 7, "heat_limited_ns": 9,
        "gpu_percent": 97, "memory_used": 3 << 30, "ecc": True, "mig": False, "persistence": True, "others": 2,
        "driver": "580.95.05",
    }  # fmt: skip
    assert json.loads(json.dumps(state)) == state


def test_the_gpu_is_found_by_its_pci_slot_and_not_by_torchs_index(nvml):
    assert read(0)["sm_mhz"] == read()["sm_mhz"] == 1960
    assert read(1)["sm_mhz"] == 1980


def test_what_cannot_be_read_is_none_and_noted(nvml):
    nvml.broken = {"nvmlDeviceGetMigMode": NVMLError("Not Supported"),
                   "nvmlDeviceGetTotalEnergyConsumption": AttributeError("no such function")}  # fmt: skip
    state = read(0)
    assert state["mig"] is None
    assert state["energy_mj"] is None
    assert state["note"] == "not read: energy_mj (no such function), mig (Not Supported)"
    assert state["power_w"] == 612.345


@pytest.mark.parametrize("error", [NVMLError("Function Not Found"), AttributeError("old")])
def test_old_drivers_know_the_reasons_by_another_name(nvml, error):
    nvml.broken, nvml.mask = {"nvmlDeviceGetCurrentClocksEventReasons": error}, 0x20
    assert read(0)["reasons"] == ["thermal"]


@pytest.mark.parametrize(
    "mask, names, slow",
    [
        (0, [], False), (0x1, ["idle"], False), (0x2, ["application_clocks"], False), (0x4, ["power_cap"], True),
        (0x8, ["hardware_slowdown"], True), (0x10, ["sync_boost"], False), (0x20, ["thermal"], True),
        (0x40, ["hardware_thermal"], True), (0x80, ["hardware_power_brake"], True), (0x100, ["display_clocks"], False),
        (0x200, ["board_limit"], False), (0x400, ["reliability"], False), (0x800, ["0x800"], False),
        (0x3, ["application_clocks", "idle"], False), (0x26, ["application_clocks", "power_cap", "thermal"], True),
    ],
)  # fmt: skip
def test_reasons(nvml, mask, names, slow):
    nvml.mask = mask
    state = read(0)
    assert state["reasons"] == names
    assert throttled(state) is slow


def test_others_are_without_this_process(nvml, monkeypatch):
    nvml.pids = [os.getpid(), 5, 5]  # MIG lists one process for every slice
    assert read(0)["others"] == 1
    nvml.pids = [5, 6]
    assert read(0)["others"] == 2
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 1 << 20)  # in a container: here by another number
    assert read(0)["others"] == 1
    nvml.pids = []
    assert read(0)["others"] == 0


def test_without_nvml_there_is_a_note(nvml, monkeypatch):
    nvml.broken = {"nvmlInit": NVMLError("Driver/library version mismatch")}
    assert read(0) == {"note": "NVML does not start (Driver/library version mismatch): "
                               "pip install -U nvidia-ml-py; nvidia-smi must work"}  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read(0) == {"note": "NVML cannot be read: pip install nvidia-ml-py"}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "amd-smi" in read(0)["note"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read() == {"note": "torch sees no GPU"}


def test_a_gpu_that_nvml_does_not_know(nvml, monkeypatch):
    monkeypatch.setattr(gpu_state, "pci_slot", lambda index: "0009:01:00.0")
    assert read(0) == {"note": "NVML finds no GPU at 0009:01:00.0 (Not Found)"}


def test_a_shutdown_that_fails_is_no_error(nvml):
    nvml.broken = {"nvmlShutdown": NVMLError("GPU is lost")}
    assert read(0)["driver"] == "580.95.05"
    nvml.open = 0


@pytest.fixture
def clock(monkeypatch):
    """Advance time by one second at every reading."""
    ticks = iter(range(100))
    monkeypatch.setattr(gpu_state.time, "perf_counter", lambda: next(ticks))


def test_watch(nvml, clock, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    with watch(1) as found:
        assert found == {}
        assert waits == [1]
    assert waits == [1, 1]
    assert found["before"]["energy_mj"] == 1_000_000
    assert found["after"]["energy_mj"] == 1_002_500
    assert found["before"]["sm_mhz"] == 1980
    assert (found["seconds"], found["joules"], found["throttled"], found["note"]) == (1, 2.5, False, None)
    json.dumps(found)


@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("nanoseconds, slow", [(10_000_000, False), (10_000_001, True)])
def test_watch_sees_limits_that_held_inside_the_block_only(nvml, clock, policy, nanoseconds, slow):
    nvml.limited[policy] = iter([500, 500 + nanoseconds])
    with watch(0) as found:
        pass
    assert found["throttled"] is slow


@pytest.mark.parametrize("masks", [(0x4, 0), (0, 0x40)])
def test_watch_sees_reasons_at_both_ends(nvml, masks):
    nvml.mask = masks[0]
    with watch(0) as found:
        nvml.mask = masks[1]
    assert found["throttled"] is True


def test_watch_without_counters(nvml):
    missing = NVMLError("Not Supported")
    nvml.broken = dict.fromkeys(["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetViolationStatus"], missing)
    with watch(0) as found:
        pass
    assert found["joules"] is None
    assert found["throttled"] is False  # by the reasons
    assert found["note"].count("energy_mj (Not Supported)") == 1
    nvml.broken |= dict.fromkeys([f"nvmlDeviceGetCurrentClocks{x}Reasons" for x in ("Event", "Throttle")], missing)
    with watch(0) as found:
        pass
    assert found["throttled"] is None


def test_a_counter_that_was_reset_gives_no_joules(nvml):
    nvml.energy = iter([5_000_000, 100])
    with watch(0) as found:
        pass
    assert found["joules"] is None


def test_watch_where_nothing_can_be_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with watch() as found:
        pass
    note = {"note": "torch sees no GPU"}
    assert found["seconds"] > 0
    del found["seconds"]
    assert found == {"before": note, "after": note, "joules": None, "throttled": None, **note}


def test_an_exception_in_the_block_goes_on(nvml):
    with pytest.raises(RuntimeError, match="illegal access"), watch(0) as found:
        raise RuntimeError("illegal access")
    assert found == {}


def test_the_real_module_has_all_of_these():
    real = pytest.importorskip("pynvml")
    asked = [name for name in vars(Nvml) if name.lower().startswith("nvml")]
    assert len(asked) > 20
    assert [name for name in asked if not hasattr(real, name)] == []
    assert [r for r, name in gpu_state.REASONS.items() if not r & real.nvmlClocksThrottleReasonAll] == []


def test_a_cpu_needs_no_nvml(monkeypatch):
    def refuse(name, *rest):
        assert name != "pynvml"
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read() == {"note": "torch sees no GPU"}
