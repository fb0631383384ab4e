"""Check several devices and threads, failures, preparation, and drivers that appear late."""

import ctypes
import os
import shutil
import sys
import threading

import harness
from harness import (
    CALLS,
    DRIVER,
    GEMM,
    MOE,
    NO_CONTEXT,
    NO_DRIVER,
    OK,
    POOL,
    UNSUPPORTED,
    call,
    code_for,
    hip,
    images_of,
    nvidia,
    records,
)


def devices() -> None:
    """With two GPUs and eight threads each device has its own code, loaded once, and launches stay in order."""
    gpus = nvidia()[0], nvidia()[-1]
    for device in (0, 1):
        harness.driver.stub_device(device, gpus[device])
    results, start = [], threading.Barrier(8)

    def work(number: int) -> None:
        harness.driver.stub_current(number % 2)
        start.wait()
        for _ in range(20):
            for name, good in CALLS.items():
                results.append(call(name, *good[:-1], number + 1))
        harness.driver.stub_current(1 - number % 2)
        results.append(call("mm1_adaptive_pool", *POOL[:-1], number + 1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [OK] * len(results)
    launched = records()
    assert len(launched) == 8 * (20 * (2 + 7 + 3 + 1) + 1), len(launched)
    cached: dict[int, list[dict]] = {}
    for record in launched:
        images = cached.setdefault(record.code, images_of(record))
        assert {i["target"] for i in images} == {code_for(gpus[record.device])}
        assert record.device == (record.stream - 1) % 2 or record.name == b"_pool_kernel"
    assert harness.driver.stub_loads() == len(cached), "an image was loaded twice"
    harness.driver.stub_device(2, gpus[0])
    harness.driver.stub_current(2)
    assert [call(name, *good) for name, good in CALLS.items()] == [OK] * len(CALLS), "another GPU of the same kind"
    assert harness.driver.stub_loads() == len(cached), "CUDA's images belong to no device"
    for number in range(8):
        mine = [r.name for r in launched if r.stream == number + 1]
        assert mine[:13] * 20 == mine[:-1], "a thread's launches are out of order"


def failures() -> None:
    """A failure is returned with the driver's code, launches nothing, and does not affect the next call."""
    harness.driver.stub_device(0, nvidia()[0])
    assert call("mm1_grouped_gemm", *GEMM) == NO_CONTEXT
    harness.driver.stub_current(0)
    harness.driver.stub_fail(209)
    assert call("mm1_grouped_gemm", *GEMM) == DRIVER + 209
    assert not records()
    harness.driver.stub_fail(0)
    assert call("mm1_grouped_gemm", *GEMM) == OK, "a failure stays"
    assert len(records()) == 2
    for cc in (75, 60, 12):
        harness.driver.stub_device(cc % 7 + 1, cc)
        harness.driver.stub_current(cc % 7 + 1)
        assert call("mm1_moe_mlp", *MOE) == UNSUPPORTED
        assert not records()
    harness.driver.stub_current(0)
    unsupported = [
        ("mm1_moe_mlp", 8, 3), ("mm1_moe_mlp", 9, 257), ("mm1_grouped_gemm", 6, 257), ("mm1_patch_embed", 10, 15),
        ("mm1_adaptive_pool", 6, 8192), ("mm1_adaptive_pool", 7, 11),
    ]  # fmt: skip
    for name, place, value in unsupported:
        good = CALLS[name]
        assert call(name, *good[:place], value, *good[place + 1 :]) == UNSUPPORTED, (name, place)
        assert not records(), f"{name} launched something"
    harness.driver.stub_current(7)
    assert call("mm1_adaptive_pool", *POOL) == UNSUPPORTED, "a device whose properties the driver does not tell"


def amd() -> None:
    """HIP's modules belong to one device, and its waves have 64 threads."""
    if 942 not in harness.manifest["archs"]:
        sys.exit(77)
    for device in (0, 1):
        harness.driver.stub_device(device, 94)
        harness.driver.stub_current(device)
        for dtype in range(3):
            for name, good in CALLS.items():
                assert call(name, dtype, *good[1:]) == OK, name
        launched = records()
        assert len(launched) == 3 * 13
        for record in launched:
            image = images_of(record)[0]
            assert image["target"] == 942
            assert list(record.block) == [64 * image["warps"], 1, 1]
    harness.driver.stub_device(2, 95)
    harness.driver.stub_current(2)
    assert call("mm1_grouped_gemm", *GEMM) == UNSUPPORTED


def prepare() -> None:
    """mm1_prepare loads everything and launches nothing, on each device, from any thread."""
    gpus = nvidia()[0], nvidia()[-1]
    for device in (0, 1):
        harness.driver.stub_device(device, gpus[device])
    assert call("mm1_prepare") == NO_CONTEXT
    harness.driver.stub_current(0)
    harness.driver.stub_fail(2)
    assert call("mm1_prepare") == DRIVER + 2
    harness.driver.stub_fail(0)
    prepared_by_all(range(2))
    least = sum(i["target"] in map(code_for, gpus) and i["shared"] <= 99 << 10 for i in harness.manifest["images"])
    assert harness.driver.stub_loads() - 1 >= least, "the first failed"
    harness.driver.stub_device(3, 70)
    harness.driver.stub_current(3)
    assert call("mm1_prepare") == UNSUPPORTED


def prepare_amd() -> None:
    """mm1_prepare loads each image on each device of HIP."""
    if 942 not in harness.manifest["archs"]:
        sys.exit(77)
    for device in (0, 1):
        harness.driver.stub_device(device, 94)
    prepared_by_all(range(2))
    assert harness.driver.stub_loads() == 2 * sum(i["target"] == 942 for i in harness.manifest["images"]), (
        "HIP's are of one device"
    )


def prepared_by_all(devices: range) -> None:
    """Prepare all devices from eight threads at once, and check that calls load nothing afterwards."""
    results, start = [], threading.Barrier(8)

    def work(number: int) -> None:
        harness.driver.stub_current(devices[number % len(devices)])
        start.wait()
        results.append(call("mm1_prepare"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [OK] * 8
    assert not records(), "something was launched"
    loads, lazy = harness.driver.stub_loads(), harness.driver.stub_lazy()
    for device in devices:
        harness.driver.stub_current(device)
        for dtype in range(3):
            assert [call(name, dtype, *good[1:]) for name, good in CALLS.items()] == [OK] * len(CALLS)
    assert len(records()) == 3 * 13 * len(devices)
    assert harness.driver.stub_loads() == loads, "a call loaded an image"
    assert hip() or harness.driver.stub_lazy() == lazy, "a launch loaded a kernel"


def late() -> None:
    """A driver that is installed while the process runs, and then a device that appears, are found by the next call."""
    if hip() and 942 not in harness.manifest["archs"]:
        sys.exit(77)
    call_it = lambda: [call(name, *good) for name, good in CALLS.items()]  # noqa: E731
    harness.options.late.unlink(missing_ok=True)
    try:
        assert call_it() == [NO_DRIVER] * len(CALLS)
        assert call("mm1_prepare") == NO_DRIVER
        harness.options.late.symlink_to(harness.options.driver)
        os.environ["STUB_NO_DEVICE"] = "1"
        assert call_it() == [NO_DRIVER] * len(CALLS)
        del os.environ["STUB_NO_DEVICE"]
        assert call_it() == [NO_CONTEXT] * len(CALLS)
        shared = ctypes.CDLL(str(harness.options.driver))
        shared.stub_device(0, 94 if hip() else nvidia()[0])
        shared.stub_current(0)
        assert call_it() == [OK] * len(CALLS)
    finally:
        harness.options.late.unlink(missing_ok=True)


def loaded_amd() -> None:
    """The HIP runtime that the process has loaded is used even if there is a newer one, which lacks its streams."""
    if 942 not in harness.manifest["archs"]:
        sys.exit(77)
    newer = harness.options.driver.parent / "newer" / "libamdhip64.so.7"
    shutil.copy(harness.options.driver, newer)
    harness.driver.stub_device(0, 94)
    harness.driver.stub_current(0)
    assert call("mm1_adaptive_pool", *POOL) == OK
    assert len(records()) == 1
    assert ctypes.CDLL("libamdhip64.so.7")._handle != harness.driver._handle, "the newer one would have been found"
