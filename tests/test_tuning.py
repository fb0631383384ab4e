"""Test the look-up of configurations: its steps, intervals and devices; nothing is measured."""

import json
import os
import subprocess
import sys
import timeit
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from conftest import compiles

from mm1.autotune.space import KERNELS
from mm1.kernels import device as devices
from mm1.kernels import tuning
from mm1.kernels.device import DEVICES, Device, identify
from mm1.kernels.tuning import Tunable, chain, config_for, listening, pinned
from tests.conftest import not_interpreted

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = not_interpreted


@dataclass(frozen=True)
class Config:
    block: int = 16


class Shape(NamedTuple):
    rows: int
    width: int
    gated: bool = False


TOY = Tunable(
    "toy", Shape, Config, lambda *_: iter([Config(16), Config(32)]), lambda config, *_: config.block <= 64,
    lambda *_: Config(8), lambda config, *_: 1.0 / config.block,
)  # fmt: skip


def source(rows, block, origin="predicted", width=64, gated=False, bits=16, **more):
    when = {"bits": bits, "rows": rows, "width": width, "gated": gated}
    return {"when": when, "config": {"block": block}, "origin": origin, **more}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Use temporary tables and cache; return a function that writes either."""
    monkeypatch.setattr(tuning, "tables", lambda: tmp_path / "tables")
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    tuning.clear_caches()

    def write(where, device, *rows):
        if where == "tables":
            path = tmp_path / "tables" / "toy" / f"{device}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"schema": 1, "rows": list(rows)}))
        else:
            folder = tmp_path / "cache" / "configs" / "toy" / device
            folder.mkdir(parents=True, exist_ok=True)
            for i, row in enumerate(rows):
                (folder / f"{i}.json").write_text(row if isinstance(row, str) else json.dumps({"schema": 1, **row}))
        tuning.clear_caches()

    yield write
    tuning.clear_caches()


def answer(shape=Shape(100, 64), dtype=BF16, device="h200"):
    device = DEVICES[device] if isinstance(device, str) else device
    actual = next(a for a in chain(TOY, shape, dtype, device) if a.config is not None)
    assert config_for(TOY, shape, dtype, device) == actual.config
    return actual.step, actual.config.block


def test_each_step_is_asked_in_its_turn(folders):
    assert answer() == ("default", 8)
    folders("tables", "h200", source([1000, 2000], 16))
    assert answer() == ("model", 16)
    folders("tables", "h100", source([65, 128], 24))
    assert answer() == ("borrowed", 24)
    folders("tables", "h200", source([129, 256], 32))
    assert answer() == ("neighbour", 32)
    folders("tables", "h200", source([129, 256], 32), source([65, 128], 40))
    assert answer() == ("shipped", 40)
    folders("cache", "h200", source([65, 128], 48))
    assert answer() == ("user", 48)
    with pinned(toy=Config(56)):
        assert config_for(TOY, Shape(100, 64), BF16, DEVICES["h200"]).block == 56
    assert answer() == ("user", 48)


def test_intervals_hold_both_their_ends_and_nothing_beyond(folders):
    folders("tables", "h200", source([65, 128], 16), source([129, 256], 32))
    actual = {rows: answer(Shape(rows, 64)) for rows in (65, 128, 129, 256)}
    assert actual == {65: ("shipped", 16), 128: ("shipped", 16), 129: ("shipped", 32), 256: ("shipped", 32)}
    assert answer(Shape(512, 64)) == ("neighbour", 32)
    assert answer(Shape(33, 64)) == ("neighbour", 16)
    assert answer(Shape(513, 64))[0] == "model", "more than an octave away"
    assert answer(Shape(32, 64))[0] == "model"
    assert answer(Shape(0, 64))[0] == "model"


def test_the_nearest_neighbour_answers(folders):
    folders("tables", "h200", source([65, 128], 16, width=64), source([65, 128], 32, width=128))
    assert answer(Shape(100, 80)) == ("neighbour", 16)
    assert answer(Shape(100, 110)) == ("neighbour", 32)


def test_what_is_no_size_must_be_equal(folders):
    folders("tables", "h200", source([65, 128], 16, gated=True))
    assert answer(Shape(100, 64, False))[0] == "default"
    assert answer(Shape(100, 64, True)) == ("shipped", 16)
    assert answer(Shape(100, 64, True), FP32) == ("default", 8), "rows of 16 bits say nothing of 32"
    assert answer(Shape(100, 64, True), torch.float16) == ("shipped", 16)


def test_sizes_that_code_is_compiled_for_must_be_equal(folders, monkeypatch):
    """Code compiled for another size may spill, which a row of this size does not show."""
    monkeypatch.setattr(sys.modules[__name__], "TOY", TOY._replace(constants=("width",)))
    folders("tables", "h200", source([65, 128], 16))
    assert answer(Shape(200, 64)) == ("neighbour", 16)
    assert answer(Shape(4000, 64)) == ("model", 16)
    assert answer(Shape(100, 65))[0] == "default"


def test_a_row_that_is_not_legal_for_the_shape_is_passed_over(folders):
    folders("tables", "h200", source([65, 128], 128), source([65, 128], 32))
    assert answer() == ("shipped", 32)


def test_rows_are_borrowed_from_the_most_alike_of_the_same_architecture(folders):
    folders("tables", "h100", source([65, 128], 16))
    folders("tables", "h200", source([65, 128], 32))
    folders("tables", "a100", source([65, 128], 48))
    slice_of_it = identify("sm_90", 60, 227 << 10, 0x2330, 1700.0)  # half of an H100, by MIG
    assert slice_of_it.name == "nvidia-2330-60"
    step, block = answer(device=slice_of_it)
    assert (step, block) == ("borrowed", 16)
    assert answer(device=identify("sm_90", 132, 227 << 10, 0x9999, 4900.0)) == ("borrowed", 32)
    assert answer(device=identify("sm_75", 72, 64 << 10)) == ("default", 8)
    borrowed = next(a for a in chain(TOY, Shape(100, 64), BF16, slice_of_it) if a.config is not None)
    assert "h100.json" in borrowed.why
    assert "predicted" in borrowed.why


def test_the_model_chooses_only_what_was_judged_and_is_clearly_better(folders):
    folders("tables", "h200", source([1 << 20, 1 << 21], 16))
    assert answer() == ("model", 16)
    near = TOY._replace(seconds=lambda config, *_: 0.96 if config.block == 16 else 1.0)
    actual = {a.step: a for a in chain(near, Shape(100, 64), BF16, DEVICES["h200"])}
    assert actual["model"].config is None
    assert "0.96" in actual["model"].why


CORRUPT = ["", "{", "[]", '"row"', '{"when": {}}', json.dumps(source([65, 128], 16)),
           json.dumps({"schema": 1, **source([65], 16)}), json.dumps({"schema": 1, **source(["a", "b"], 16)}),
           json.dumps({"schema": 1, **source([65, 128], 16), "config": {"blocks": 16}}),
           json.dumps({"schema": 1, **source([65, 128], 16), "when": {"bits": 16, "rows": [65, 128]}}),
           json.dumps({"schema": 2, **source([65, 128], 16)})]  # fmt: skip


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_row_of_the_cache_is_as_if_it_were_not_there(folders, text):
    folders("cache", "h200", text, json.dumps({"schema": 1, **source([65, 128], 32)}))
    assert answer() == ("user", 32)


def test_a_cache_that_cannot_be_read_is_as_if_it_were_empty(folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "file"))
    tuning.clear_caches()
    assert answer() == ("default", 8)


def test_a_table_of_another_schema_is_ignored(folders, tmp_path):
    folders("tables", "h200", source([65, 128], 16))
    path = tmp_path / "tables" / "toy" / "h200.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    tuning.clear_caches()
    assert answer() == ("default", 8)


def test_a_warm_look_up_asks_nobody(folders, monkeypatch):
    folders("tables", "h200", source([65, 128], 16))
    args = TOY, Shape(100, 64), BF16, DEVICES["h200"]
    first = config_for(*args)
    monkeypatch.setattr(tuning, "chain", None)
    assert config_for(*args) is first


def test_the_number_of_cached_answers_is_bounded(monkeypatch):
    monkeypatch.setattr(tuning, "CACHED_ANSWERS", 10)
    for rows in range(50):
        config_for(TOY, Shape(rows, 64), BF16, DEVICES["h200"])
    assert len(tuning._answers) <= 10


def test_listeners_hear_every_look_up():
    with listening() as actual:
        config_for(TOY, Shape(1, 2), BF16, DEVICES["h200"])
        config_for(TOY, Shape(1, 2), FP32, DEVICES["a100"])
    config_for(TOY, Shape(3, 2), BF16, DEVICES["h200"])
    assert actual == [("toy", Shape(1, 2), 16, "h200", Config(8)), ("toy", Shape(1, 2), 32, "a100", Config(8))]


def test_the_look_up_imports_no_torch():
    code = "import sys, mm1.kernels.tuning, mm1.kernels.cost_model; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


COMPILED = """
import torch
from mm1.kernels.moe.grouped import grouped_gemm
from mm1.kernels.tuning import listening
a, b = torch.randn(20, 16, requires_grad=True), torch.randn(3, 16, 16, requires_grad=True)
offsets = torch.tensor([5, 5, 20], dtype=torch.int32)
compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
actual = []
for run in (grouped_gemm, compiled, compiled):
    with listening() as looked_up:
        run(a, b, offsets).sum().backward()
    actual.append(looked_up)
assert [look_up.kernel for look_up in actual[0]] == ["grouped_gemm", "grouped_gemm", "grouped_gemm_dw"], actual
assert actual[0] == actual[1] == actual[2], actual
"""


@compiles
def test_compiled_code_looks_up_what_eager_code_does():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=env)


def test_the_digest_tells_other_rows_apart(folders):
    empty = tuning.digest([TOY], DEVICES["h200"])
    folders("cache", "h200", source([65, 128], 16))
    mine = tuning.digest([TOY], DEVICES["h200"])
    folders("cache", "h200", source([65, 128], 32))
    assert len({empty, mine, tuning.digest([TOY], DEVICES["h200"])}) == 3


def test_who_is_who():
    for device in DEVICES.values():
        for pci in device.pci:
            assert identify(device.arch, device.units, device.shared, pci, device.bandwidth * 1.02) is device
    assert identify("sm_90", 132, 227 << 10, 0x2335) is DEVICES["h200"], "a driver that tells no bandwidth"
    assert identify("sm_80", 108, 163 << 10, 0x20B0, 1555) is DEVICES["a100-40gb"]
    unknown = identify("sm_90", 114, 227 << 10, 0x2331, 2039)  # H100 PCIe
    assert (unknown.name, unknown.bandwidth, unknown.units) == ("nvidia-2331-114", 2039, 114)
    assert unknown.tflops == pytest.approx(989 * 114 / 132)
    assert identify("gfx90a", 104, 64 << 10).name == "amd-unknown-104"
    assert [d.name for d in devices.nearest("sm_90", 132, 4700)] == ["h200", "h100"]


def test_an_architecture_without_devices_is_judged_as_the_one_that_it_is_compiled_like():
    """B300, Thor, GB10, RTX 3090, Orin and MI350X: their code, their tables, their rates."""
    for arch, name in (("sm_103", "b200"), ("sm_110", "b200"), ("sm_121", "rtx5090"), ("sm_86", "rtx4090"),
                       ("sm_87", "a100"), ("gfx950", "mi300x")):  # fmt: skip
        like, device = DEVICES[name], identify(arch, 100, DEVICES[name].shared, 0x9999, 3000.0)
        assert (device.arch, device.family) == (arch, like.arch)
        for judged in ("asynchronous", "wgmma", "tma", "warp", "vendor"):
            assert getattr(device, judged) == getattr(like, judged), (arch, judged)
        assert device.clock == pytest.approx(like.clock)
        assert devices.nearest(arch, like.units, like.bandwidth)[0] is like
    assert devices.nearest("sm_75", 40, 300.0) == []


@pytest.mark.parametrize(
    "name, properties, shared",
    [("h200", {"major": 9, "minor": 0, "memory_clock_rate": 3201000, "memory_bus_width": 6144}, 227 << 10),
     ("mi300x", {"gcnArchName": "gfx942:sramecc+:xnack-", "memory_clock_rate": 1300000, "memory_bus_width": 8192},
      64 << 10)],
)  # fmt: skip
def test_a_gpu_is_known_by_its_slot_in_the_machine(name, properties, shared, monkeypatch):
    from types import SimpleNamespace

    from mm1.kernels import dispatch

    device = DEVICES[name]
    amd = device.vendor == "amd"
    properties = SimpleNamespace(
        multi_processor_count=device.units, pci_domain_id=0, pci_bus_id=0x4A, pci_device_id=0, **properties,
        **{"shared_memory_per_block" + ("" if amd else "_optin"): shared},
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    paths = []
    monkeypatch.setattr(dispatch.Path, "read_text", lambda path: paths.append(str(path)) or f"{device.pci[0]:#x}\n")
    dispatch.device_of_index.cache_clear()
    assert dispatch.device_of_index(0) is device
    assert paths == ["/sys/bus/pci/devices/0000:4a:00.0/device"]
    dispatch.device_of_index.cache_clear()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_defaults_are_legal_and_space_holds_legal_configurations_alone(kernel, name):
    tunable, device = KERNELS[kernel].tunable, DEVICES[name]
    shapes = list(KERNELS[kernel].shapes())
    for dtype in (BF16, FP32):
        for shape in shapes[:: max(1, len(shapes) // 4)]:
            default = tunable.default(shape, dtype, device)
            assert tunable.legal(default, shape, dtype, device), (shape, default)
            actual = list(tunable.choices(shape, dtype, device))
            assert actual or dtype == FP32
            assert all(tunable.legal(config, shape, dtype, device) for config in actual)
            assert len(set(actual)) == len(actual)
            assert all(tunable.seconds(config, shape, dtype, device) > 0 for config in actual[:20])


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_of_the_tables_is_what_its_example_looks_up(kernel):
    from mm1.autotune.space import Inputs
    from mm1.kernels.dispatch import recording

    tunable = KERNELS[kernel].tunable
    shapes = list(KERNELS[kernel].shapes())
    for shape in (shapes[0], shapes[-1]):
        with recording(DEVICES["h200"]) as launches, listening() as looked:
            KERNELS[kernel].example(shape, Inputs("meta", BF16))()
        assert {look_up.shape for look_up in looked if look_up.kernel == tunable.kernel} == {shape}
        assert set(KERNELS[kernel].launched[:1]) <= {launch.kernel.fn.__name__ for launch in launches}


def test_a_tensor_on_a_small_gpu_is_no_known_device():
    assert isinstance(identify("sm_86", 84, 99 << 10, 0x2204, 936.0), Device)
    assert identify("sm_86", 84, 99 << 10, 0x2204, 936.0).name == "nvidia-2204-84"


if __name__ == "__main__":  # what a warm look-up costs
    args = TOY, Shape(100, 64), BF16, DEVICES["h200"]
    config_for(*args)
    print(f"{1e6 * min(timeit.repeat(lambda: config_for(*args), number=100000, repeat=5)) / 1e5:.2f} us")
