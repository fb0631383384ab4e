"""Every row of the shipped tables belongs to its kernel, is legal, and compiles to sound code on its GPU."""

import json
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from mm1.autotune import predict as room
from mm1.autotune.predict import check, predict
from mm1.autotune.space import DTYPES, KERNELS, interval
from mm1.autotune.static import Compiled, Task, compile_task, fault
from mm1.autotune.tables import TABLES, read_table, static_facts, write_table
from mm1.autotune.workers import Failed
from mm1.kernels import tiles, tuning
from mm1.kernels.abstractor import gate
from mm1.kernels.attention import tiles as attention
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import power_of_2
from mm1.kernels.moe.grouped import DwShape
from mm1.kernels.patches import tiles as patches
from mm1.kernels.tiles import Config, Shape
from mm1.kernels.tuning import chain
from tests.conftest import not_interpreted

pytestmark = not_interpreted
BF16, H200 = torch.bfloat16, DEVICES["h200"]
SHIPPED = ["a100", "b200", "h100", "h200", "mi300x", "rtx4090", "rtx5090"]
CHECKED = 24  # different codes a day; all of them in the slow tests
PARTS = 80


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache, so that no rows are the user's and code is compiled anew."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path))
    tuning.clear_caches()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", SHIPPED)
def test_each_gpu_has_rows_for_each_kernel(kernel, device):
    tunable = KERNELS[kernel].tunable
    rows = read_table(TABLES, kernel, DEVICES[device])
    assert rows
    assert len(tuning.shipped(tunable, device)) == len(rows), "a row is not read"
    for shape in list(KERNELS[kernel].shapes())[::7]:
        answer = next(a for a in chain(tunable, shape, BF16, DEVICES[device]) if a.config is not None)
        assert answer.step == "shipped"
    for row in rows:
        assert row["origin"] in ("predicted", "measured")
        assert ("us" in row) == ("default_us" in row) == (row["origin"] == "measured"), "a prediction has no times"
        assert row["static"]["shared"] <= DEVICES[device].shared


def closed_form(kernel, config, shape, dtype, device):
    """Return the bytes of shared memory by the formulas of `legal`; None for a kernel over rows, which has none."""
    if kernel.startswith("flash"):
        return attention.shared_bytes(kernel, config, shape.width, dtype.itemsize, device)
    if kernel == "paged_attention":
        return attention.shared_bytes("flash", config, power_of_2(shape.width), dtype.itemsize, device)
    if kernel == "conv_gate":
        return gate.shared_bytes(config, shape, dtype, device)
    if kernel.startswith("patch_"):
        return patches.shared_bytes(config, shape, dtype, device)
    if kernel == "grouped_gemm_dw":
        return tiles.shared_bytes(config, Shape(shape.k, 1, 128, shape.n), dtype.itemsize, device, stores=False)
    stores = kernel in ("grouped_gemm", "experts_up")
    return tiles.shared_bytes(config, shape, dtype.itemsize, device, stores) if isinstance(shape, Shape) else None


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_shared_memory_of_compiled_rows_is_what_legal_expects(kernel):
    """A formula below the truth lets the tuner choose configurations that cannot be launched."""
    tunable = KERNELS[kernel].tunable
    for device in DEVICES.values():
        for source in read_table(TABLES, kernel, device):
            row = tuning.read(tunable, source)
            shape = tunable.shape(*(w[1] if isinstance(w, tuple) else w for w in row.when))
            expected = closed_form(kernel, row.config, shape, DTYPES[row.bits], device)
            assert expected is None or source["static"]["shared"] <= expected + 1024, (device.name, source)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["a100", "h200", "b200", "rtx5090", "mi300x"])
@pytest.mark.parametrize("kernel", [name for name, kernel in KERNELS.items() if kernel.multiplies])
def test_the_largest_legal_configurations_fit(kernel, device):
    tunable, device = KERNELS[kernel].tunable, DEVICES[device]
    shape = max(KERNELS[kernel].shapes(), key=lambda shape: shape[0])
    legal = list(tunable.choices(shape, BF16, device))
    legal.sort(key=lambda config: closed_form(kernel, config, shape, BF16, device))
    for config in legal[-64::16]:
        for code in compile_task(Task(kernel, tuple(shape), config, 16, device.name)):
            assert code.shared <= device.shared, config


def test_rows_of_today_compile_to_sound_code():
    today = int(time.time()) // 86400
    assert check([], [DEVICES[name] for name in SHIPPED], part=(today % PARTS, PARTS), processes=1) == []


@pytest.mark.slow
def test_all_rows_compile_to_sound_code():
    assert check([], [DEVICES[name] for name in SHIPPED]) == []


def test_static_tuning_writes_rows_that_pass_the_check(tmp_path, monkeypatch):
    some = [Shape(rows, 8, 256, 256) for rows in (512, 1024, 2048)]
    kernel = KERNELS["grouped_gemm"]._replace(shapes=lambda: iter(some))
    monkeypatch.setitem(KERNELS, "grouped_gemm", kernel)
    monkeypatch.setattr(room, "compilers", InThisProcess)
    measured = {"when": {"bits": 16, "rows": [257, 512], "experts": 8, "k": 256, "n": 256, "gated": False},
                "config": vars(Config()), "origin": "measured", "us": [1.0, 0.1], "default_us": [2.0, 0.1]}  # fmt: skip
    write_table(tmp_path, "grouped_gemm", H200, [measured])
    done = predict(["grouped_gemm"], H200, tmp_path, processes=1)
    rows = read_table(tmp_path, "grouped_gemm", H200)
    assert done["kernels"]["grouped_gemm"]["shapes"] == 3
    assert rows[0] == measured, "what was measured stays"
    assert {row["origin"] for row in rows[1:]} == {"predicted"}
    assert not any("us" in row for row in rows[1:])
    assert rows[-1]["when"]["rows"][1] == 2048
    assert check(["grouped_gemm"], [H200], tmp_path) == []


class InThisProcess(nullcontext):
    def __enter__(self):
        return self

    def each(self, tasks):
        return ((task, compile_task(task)) for task in tasks)


ROW = {"when": {"bits": 16, "rows": [1025, 2048], "experts": 8, "k": 256, "n": 256, "gated": False},
       "config": vars(Config(128, 128, 64)), "origin": "predicted", "static": {}}  # fmt: skip


def faults(tmp_path, monkeypatch, kernel="grouped_gemm", row=ROW, device=H200, **changes):
    monkeypatch.setattr(room, "compilers", InThisProcess)
    write_table(tmp_path, kernel, device, [{**row, "config": {**row["config"], **changes}}])
    return check([kernel], [device], tmp_path)


def test_a_sound_row_passes(tmp_path, monkeypatch):
    assert faults(tmp_path, monkeypatch) == []


def test_a_row_edited_to_overflow_shared_memory_is_refused(tmp_path, monkeypatch):
    (found,) = faults(tmp_path, monkeypatch, stages=9)
    assert "not legal" in found
    assert "grouped_gemm/h200.json" in found


def test_a_row_edited_to_spill_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(KERNELS, "grouped_gemm", unbounded("grouped_gemm"))
    (found,) = faults(tmp_path, monkeypatch, block_m=128, block_n=256, warps=4)
    assert "spills" in found


def test_a_row_edited_to_lose_its_matrix_instruction_is_refused(tmp_path, monkeypatch):
    (found,) = faults(tmp_path, monkeypatch, block_m=128, block_n=64, warps=2)
    assert "multiplies by mma.sync, expected wgmma" in found


@pytest.mark.parametrize(
    "fact, value, why",
    [("registers", 50, "registers"), ("shared", 1000, "shared"), ("code", 1000, "code"),
     ("matrix", {"HGMMA": 4, "QGMMA": 4}, "no QGMMA")],
)  # fmt: skip
def test_code_that_is_worse_than_when_the_row_was_written_is_refused(fact, value, why, tmp_path, monkeypatch):
    task = Task("grouped_gemm", (2048, 8, 256, 256, False), Config(128, 128, 64), 16, "h200")
    static = static_facts(compile_task(task), H200)
    assert faults(tmp_path, monkeypatch, row={**ROW, "static": static}) == []
    spoilt = {**ROW, "static": {**static, fact: value}}
    (found,) = faults(tmp_path, monkeypatch, row=spoilt)
    assert why in found
    assert faults(tmp_path, monkeypatch, row={**spoilt, "versions": {"triton": "3.0"}}) == [], "another compiler's"


def test_a_row_of_other_names_is_refused(tmp_path, monkeypatch):
    (found,) = faults(tmp_path, monkeypatch, row={**ROW, "when": {**ROW["when"], "rowz": 1}})
    assert "is not a row of grouped_gemm" in found


def unbounded(name):
    kernel = KERNELS[name]
    return kernel._replace(tunable=kernel.tunable._replace(legal=lambda *_: True))


def test_a_row_is_for_the_octave_that_holds_its_size():
    assert {n: interval(n) for n in (1, 2, 3, 1024, 1025, 3000)} == {
        1: [1, 1], 2: [2, 2], 3: [3, 4], 1024: [513, 1024], 1025: [1025, 2048], 3000: [2049, 4096]}  # fmt: skip


CODE = Compiled("_gemm_kernel", 8, 128, 0, 0, 1 << 15, 4096, Counter({"HGMMA": 4}))
TASK = Task("grouped_gemm", Shape(2048, 8, 256, 256), Config(128, 128, 64), 16, "h200")


@pytest.mark.parametrize(
    "code, why",
    [
        (CODE, None),
        (replace(CODE, spills=1), "spills"),
        (replace(CODE, shared=228 << 10), "shared memory"),
        (replace(CODE, instructions=Counter()), "no matrix instruction"),
        (replace(CODE, instructions=Counter(HMMA=4)), "mma.sync"),
        (replace(CODE, instructions=Counter(HGMMA=4, HMMA=1)), "mma.sync"),
        (replace(CODE, name="_map_kernel", instructions=Counter()), None),
    ],
)
def test_what_makes_code_unsound(code, why):
    found = fault(TASK, [code])
    assert found is None if why is None else why in found
    assert fault(TASK, Failed("took longer")) == "took longer"


def test_a_tile_of_few_rows_may_multiply_by_mma_sync():
    task = TASK._replace(config=Config(16, 128, 64))
    assert fault(task, [replace(CODE, instructions=Counter(HMMA=4))]) is None


def test_facts_of_a_launch_are_found_once_and_kept(tmp_path, monkeypatch):
    task = Task("grouped_gemm_dw", DwShape(64, 2, 64, 64), Config(16, 32, 32, tma=False, warps=4, stages=2), 16, "a100")
    (first,) = compile_task(task)
    assert first.registers > 16
    assert first.matrix
    assert first.code % 16 == 0
    assert first.facts(DEVICES["a100"])["programs"] >= 1
    monkeypatch.setattr("triton.compile", None)
    assert compile_task(task) == [first]
    (kept,) = (tmp_path / "static").iterdir()
    kept.write_text("torn")
    with pytest.raises(TypeError):
        compile_task(task)
    assert json.loads(json.dumps(first.facts(DEVICES["a100"]))) == first.facts(DEVICES["a100"])
