"""Check the library's symbols and tables, and its answers to wrong arguments."""

import ctypes
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import harness
import torch
from harness import (
    BASE,
    CALLS,
    DRIVER,
    GEMM,
    INVALID,
    MOE,
    NO_CONTEXT,
    NO_DRIVER,
    OK,
    OPS,
    RUNS,
    UNSUPPORTED,
    call,
    choose,
    code_for,
    public,
    size,
)

import mm1
from mm1.autotune import ahead, static
from mm1.kernels.patches.grids import Grids


def symbols() -> None:
    """The library exports exactly what mm1.h declares, needs no GPU library, and has the version of the package."""
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", harness.options.library], capture_output=True, text=True, check=True
    )
    result = {line.split()[-1] for line in lines.stdout.splitlines()}
    assert result == public(), result ^ public()
    needed = subprocess.run(
        ["readelf", "-d", harness.options.library], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"NEEDED.*(cuda|hip|stdc)", needed), needed
    version = [
        int(n) for n in re.findall(r'__version__ = "(\d+)\.(\d+)\.(\d+)"', Path(mm1.__file__ or "").read_text())[0]
    ]
    assert harness.library.mm1_version() == version[0] * 10000 + version[1] * 100 + version[2]
    abi = f"{version[0]}.{version[1]}" if version[0] == 0 else version[0]
    assert re.findall(r"SONAME.*\[(.*)\]", needed) == [f"libmm1.so.{abi}"], needed


def table() -> None:
    """Every kernel has images for every architecture, and every row has the images of its variant."""
    shared = {target.number: target.device.shared for target in ahead.targets(harness.options.archs)}
    assert set(shared) == set(harness.manifest["archs"])
    have = defaultdict(set)
    for n, image in enumerate(harness.manifest["images"]):
        content = (harness.options.code / "images" / f"{n}.bin").read_bytes()
        assert content.startswith(b"\x7fELF") if image["target"] else b".target sm_80" in content, image
        assert image["shared"] <= shared[image["target"]], image
        assert image["warps"] in (1, 2, 4, 8, 16), image
        have[image["target"], image["kernel"], image["dtype"], image["variant"]].add(tuple(image["key"]))
    exact, rounded = defaultdict(set), defaultdict(lambda: defaultdict(set))
    for image in harness.manifest["images"]:
        exact[image["kernel"]].add(tuple(image["key"][:2]))
        rounded[image["kernel"]][image["target"]].add(image["key"][2])
    for row in harness.manifest["rows"]:
        variant = harness.manifest["variants"][row["variant"]]
        kernel = ahead.OPS[variant["op"]].kernel
        result = have[variant["arch"], kernel, variant["dtype"], row["variant"]]
        low, high = row["when"].get("k", ahead.ANY) if kernel == "_embed_kernel" else ahead.ANY
        assert {key[:2] for key in result} >= {key for key in exact[kernel] if low <= key[0] <= high}, variant
    for kernel, keys in rounded.items():
        assert set(keys) == set(shared), f"{kernel} is missing for an architecture"
        assert len({frozenset(k) for k in keys.values()}) == 1, (kernel, keys)
    ptx = [n for n, i in enumerate(harness.manifest["images"]) if (i["target"], i["kernel"]) == (0, "_gemm_kernel")]
    for newer in ("sm_103", "sm_110", "sm_121") * bool(ptx):
        path = harness.options.code / "images" / f"{ptx[0]}.bin"
        subprocess.run([static.nvidia_program("ptxas-blackwell"), "-arch", newer, path, "-o", "/dev/null"], check=True)
    for arch in shared:
        assert harness.library.mm1_variants(arch or 121) == sum(i["target"] == arch for i in harness.manifest["images"])


def choice() -> None:
    """Every size has a variant of the right architecture and dtype: that of the first row whose condition holds."""
    gpus = [(cc, number) for cc in RUNS if (number := code_for(cc)) is not None]
    for arch, number in gpus + [(942, 942)] * (942 in harness.manifest["archs"]):
        limit = None if arch == number else 99 << 10
        for dtype in range(3):
            sizes = [(op, (rows, E, k, n)) for op in OPS[:2] for rows in (1, 16, 130, 4096, 100_000) for E in (1, 8, 64)
                     for k in (16, 2048) for n in (128, 14336)]  # fmt: skip
            sizes += [("patch_embed", (P, k, N)) for P in (1, 300, 9999) for k in (588, 768) for N in (768, 1280)]
            sizes += [("adaptive_pool", (P, C)) for P in (1, 9999) for C in (16, 1024, 1040, 2048, 4096)]
            for op, dims in sizes:
                result = choose(op, arch, dtype, *dims)
                assert 0 <= result < len(harness.manifest["variants"]), (op, arch, dtype, dims, result)
                assert result == expected(op, number, dtype, dims, limit), (op, arch, dtype, dims)
    dims = 100, 8, 2048, 2048
    for arch in (0, 70, 75, 900, 950):
        assert choose("grouped_gemm", arch, 1, *dims) == -1
        assert harness.library.mm1_variants(arch) == 0
    arch = harness.manifest["archs"][-1]
    assert choose("grouped_gemm", arch, 3, *dims) == choose("grouped_gemm", arch, -1, *dims) == -1
    assert choose("grouped_gemm", arch, 1, 100, 0, 2048, 2048) == choose("adaptive_pool", arch, 1, 9, 8192) == -1
    refused()


def refused() -> None:
    """Sizes whose products would not fit into 64 bits have no variant."""
    good = {"grouped_gemm": (100, 8, 2048, 1024), "experts_up": (100, 8, 2048, 1024), "patch_embed": (300, 588, 1024),
            "adaptive_pool": (300, 1024)}  # fmt: skip
    arch = harness.manifest["archs"][-1]
    for op, dims in good.items():
        assert choose(op, arch, 1, *dims) >= 0
        for place in range(len(dims)):
            bad = -(1 << 63), -1, 1 << 31, 1 << 32, (1 << 62) + 16, (1 << 63) - 1, *((0, 1 << 24) if place else ())
            for value in bad:
                assert choose(op, arch, 1, *dims[:place], value, *dims[place + 1 :]) == -1, (op, place, value)
    assert (
        harness.library.mm1_choose(0, arch, 1, None)
        == harness.library.mm1_choose(-1, arch, 1, (ctypes.c_int64 * 4)())
        == -1
    )


def expected(op: str, number: int, dtype: int, dims: tuple[int, ...], limit: int | None) -> int:
    """Return the number of the variant that the manifest gives for these sizes."""
    values = dict(zip(ahead.OPS[op].dims, dims))
    values["each"] = -(-dims[0] // dims[1])
    for row in harness.manifest["rows"]:
        variant = harness.manifest["variants"][row["variant"]]
        if (variant["op"], variant["arch"], variant["dtype"]) == (op, number, dtype):
            holds = all(low <= values[name] <= high for name, (low, high) in row["when"].items())
            if holds and (limit is None or variant["shared"] <= limit):
                return row["variant"]
    raise AssertionError(f"no row of {op} for {number}, {dtype}, {dims}")


def arguments() -> None:
    """Wrong arguments are refused without a driver, and before one is loaded."""
    too_small = {
        name: size(name, *sizes) - 1
        for name, sizes in {
            "grouped_gemm": (1000, 8),
            "moe_mlp": (1, *MOE[7:12]),
            "patch_embed": (1, 1000, 1024, 14),
        }.items()
    }
    bad = 0, BASE + 8
    wrong = {
        "mm1_grouped_gemm": {0: (-1, 3), **dict.fromkeys((1, 2, 3, 4, 10), bad), 5: (-1, 1 << 31), 6: (0, -1, 1 << 24),
                             7: (0, 24, 2040, 1 << 24), 8: (0, 8, -16), 11: (0, too_small["grouped_gemm"])},
        "mm1_moe_mlp": {0: (3,), **dict.fromkeys((*range(1, 7), 12), bad), 7: (-1, 1 << 31), 8: (0, -1),
                        9: (0, 1 << 24), 10: (0, 8, 2049), 11: (0, 8, 1 << 20), 13: (0, too_small["moe_mlp"])},
        "mm1_patch_embed": {0: (3,), **dict.fromkeys((1, 2, 3, 4, 7, 15), bad), 5: (BASE + 8,), 6: (BASE + 8,),
                            8: (-1, 1 << 31), 9: (0, 1000), 10: (0, -14, 257), 11: (0,), 12: (0, 1 << 24),
                            13: (0, (float("nan"), 0.0, 0.0)), 14: (0, (1.0, 0.0, 1.0), (1.0, 1.0, float("inf"))),
                            16: (0, too_small["patch_embed"])},
        "mm1_adaptive_pool": {0: (3,), **dict.fromkeys((1, 2, 3), bad), 4: (-1,), 5: (-1, 1 << 31),
                              6: (0, 8, 1 << 24), 7: (0, 1024), 8: (0, -12)},
    }  # fmt: skip
    for name, good in CALLS.items():
        assert call(name, *good) == NO_DRIVER, name
        for place, values in wrong[name].items():
            for value in values:
                assert call(name, *good[:place], value, *good[place + 1 :]) == INVALID, (name, place, value)
        rows = {"mm1_grouped_gemm": 5, "mm1_moe_mlp": 7, "mm1_patch_embed": 8, "mm1_adaptive_pool": 5}[name]
        nothing = (*good[:rows], 0, *good[rows + 1 :])
        assert call(name, *nothing) == OK, name
    for name in too_small:
        assert size(name, -1, -1, -1, -1, -1, -1) == 0
    messages = {
        harness.library.mm1_error_string(code) for code in (OK, INVALID, UNSUPPORTED, NO_DRIVER, NO_CONTEXT, DRIVER, -1)
    }
    assert len(messages) == 7
    assert harness.library.mm1_error_string(DRIVER + 700) == harness.library.mm1_error_string(DRIVER)
    grids()


def grids() -> None:
    """mm1_grids fills the tables that Grids has in Python."""
    sizes = [(27, 27), (3, 40), (1, 1)]
    truth = Grids(sizes, patches=900)
    result = torch.full((3, 4), -7, dtype=torch.int32), torch.full((901,), -7, dtype=torch.int32)
    flat = torch.tensor(sizes, dtype=torch.int32)
    pointers = flat.data_ptr(), result[0].data_ptr(), result[1].data_ptr()
    assert call("mm1_grids", pointers[0], 3, 900, *pointers[1:]) == OK
    assert result[0].equal(truth.table)
    assert result[1][:900].equal(truth.owner)
    assert result[1][900] == -7
    assert call("mm1_grids", pointers[0], 3, 849, *pointers[1:]) == INVALID
    assert call("mm1_grids", 0, 3, 900, *pointers[1:]) == INVALID
    flat[1, 0] = 0
    assert call("mm1_grids", pointers[0], 3, 900, *pointers[1:]) == INVALID


def no_driver() -> None:
    """Without a driver a call returns MM1_NO_DRIVER."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert call("mm1_grouped_gemm", *GEMM) == NO_DRIVER
        return
    sys.exit(77)


def no_device() -> None:
    """With a driver but no device a call returns MM1_NO_DRIVER."""
    assert all(call(name, *good) == NO_DRIVER for name, good in CALLS.items())
