"""Checks of libmm1 without a GPU: `check.py --library libmm1.so --code build/code [--driver stub] <name>`."""

import argparse
import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch

import mm1
from mm1.autotune import ahead
from mm1.autotune.static import BINARIES
from mm1.kernels.abstractor import pooling as adaptive_pool
from mm1.kernels.moe import grouped as grouped_gemm
from mm1.kernels.patches import embedding as patch_embed
from mm1.kernels.device import DEVICES
from mm1.kernels.patches.grids import Grids

OK, INVALID, UNSUPPORTED, NO_DRIVER, NO_CONTEXT, DRIVER = 0, 1, 2, 3, 4, 1000
OPS = list(ahead.OPS)
HEADER = Path(__file__).parents[1] / "mm1.h"
BASE = 1 << 32  # where the device memory of these tests begins; none of it exists
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDED = ("BLOCK_E", "CHUNK", "BINS", "BLOCK_C", "BLOCK")  # constants that may be larger than a size needs


class Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("code", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("device", ctypes.c_int), ("count", ctypes.c_int), ("stream", ctypes.c_void_p),
        ("args", ctypes.c_uint64 * 64),
    ]  # fmt: skip


options: argparse.Namespace
library: ctypes.CDLL
driver: ctypes.CDLL
manifest: dict


def begin() -> None:
    global library, manifest, driver
    library = ctypes.CDLL(str(options.library))
    manifest = json.loads((options.code / "manifest.json").read_text())
    for name in public():
        if name.endswith("_workspace"):
            getattr(library, name).restype = ctypes.c_size_t
    library.mm1_error_string.restype = ctypes.c_char_p
    if options.driver and not options.late:
        driver = ctypes.CDLL(str(options.driver))
        driver.stub_record.restype = ctypes.POINTER(Record)


def public() -> set[str]:
    return set(re.findall(r"^MM1_API .*?\b(mm1_\w+)\(", HEADER.read_text(), re.MULTILINE))


def call(name: str, *arguments) -> int:
    """Integers of 64 bits, which also hold pointers and pass for an int."""
    passed = [(ctypes.c_double * 3)(*a) if isinstance(a, tuple) else ctypes.c_int64(a or 0) for a in arguments]
    return getattr(library, name)(*passed)


def size(op: str, *dims: int) -> int:
    return getattr(library, f"mm1_{op}_workspace")(*map(ctypes.c_int64, dims))


def choose(op: str, arch: int, dtype: int, *dims: int) -> int:
    return library.mm1_choose(OPS.index(op), arch, dtype, (ctypes.c_int64 * 4)(*dims))


def records() -> list[Record]:
    found = [Record.from_buffer_copy(driver.stub_record(i).contents) for i in range(driver.stub_count())]
    driver.stub_clear()
    return found


def images_of(record: Record) -> list[dict]:
    """Configurations that differ by name alone, as stages of a loop without loads, give the same bytes."""
    found = []
    for n, image in enumerate(manifest["images"]):
        if image["symbol"].encode() == record.name:
            content = (options.code / "images" / f"{n}.bin").read_bytes()
            if ctypes.string_at(record.code, len(content)) == content:
                found.append(image)
    assert found, f"{record.name} is no image of the manifest"
    return found


def symbols() -> None:
    lines = subprocess.run(["nm", "-D", "--defined-only", options.library], capture_output=True, text=True, check=True)
    found = {line.split()[-1] for line in lines.stdout.splitlines()}
    assert found == public(), found ^ public()
    needed = subprocess.run(["readelf", "-d", options.library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|hip|stdc)", needed), needed
    version = [
        int(n) for n in re.findall(r'__version__ = "(\d+)\.(\d+)\.(\d+)"', Path(mm1.__file__ or "").read_text())[0]
    ]
    assert library.mm1_version() == version[0] * 10000 + version[1] * 100 + version[2]
    abi = f"{version[0]}.{version[1]}" if version[0] == 0 else version[0]
    assert re.findall(r"SONAME.*\[(.*)\]", needed) == [f"libmm1.so.{abi}"], needed


def table() -> None:
    shared = {target.number: target.device.shared for target in ahead.targets(options.archs)}
    assert set(shared) == set(manifest["archs"])
    have = defaultdict(set)
    for n, image in enumerate(manifest["images"]):
        content = (options.code / "images" / f"{n}.bin").read_bytes()
        assert content.startswith(b"\x7fELF") if image["target"] else b".target sm_80" in content, image
        assert image["shared"] <= shared[image["target"]], image
        assert image["warps"] in (1, 2, 4, 8, 16), image
        have[image["target"], image["kernel"], image["dtype"], image["variant"]].add(tuple(image["key"]))
    exact, rounded = defaultdict(set), defaultdict(lambda: defaultdict(set))
    for image in manifest["images"]:
        exact[image["kernel"]].add(tuple(image["key"][:2]))
        rounded[image["kernel"]][image["target"]].add(image["key"][2])
    for row in manifest["rows"]:
        variant = manifest["variants"][row["variant"]]
        kernel = ahead.OPS[variant["op"]].kernel
        found = have[variant["arch"], kernel, variant["dtype"], row["variant"]]
        low, high = row["when"].get("k", ahead.ANY) if kernel == "_embed_kernel" else ahead.ANY
        assert {key[:2] for key in found} >= {key for key in exact[kernel] if low <= key[0] <= high}, variant
    for kernel, keys in rounded.items():
        assert set(keys) == set(shared), f"{kernel} is missing for an architecture"
        assert len({frozenset(k) for k in keys.values()}) == 1, (kernel, keys)
    ptx = [n for n, i in enumerate(manifest["images"]) if (i["target"], i["kernel"]) == (0, "_gemm_kernel")]
    for newer in ("sm_103", "sm_110", "sm_121") * bool(ptx):
        path = options.code / "images" / f"{ptx[0]}.bin"
        subprocess.run([BINARIES / "ptxas-blackwell", "-arch", newer, path, "-o", "/dev/null"], check=True)
    for arch in shared:
        assert library.mm1_variants(arch or 121) == sum(i["target"] == arch for i in manifest["images"])


RUNS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 0, 110: 0, 120: 120, 121: 0}


def code_for(cc: int) -> int | None:
    """The architecture whose code runs on this compute capability, of those that were compiled."""
    archs = manifest["archs"]
    return RUNS[cc] if RUNS[cc] in archs else 0 if 0 in archs and cc > 80 else None


def nvidia() -> list[int]:
    """Compute capabilities that some code runs on; the test is skipped where there is none."""
    found = [cc for cc in RUNS if code_for(cc) is not None]
    return found or sys.exit(77)


def choice() -> None:
    """Every size has a variant, of the right architecture and dtype, by the first row that holds."""
    gpus = [(cc, number) for cc in RUNS if (number := code_for(cc)) is not None]
    for arch, number in gpus + [(942, 942)] * (942 in manifest["archs"]):
        limit = None if arch == number else 99 << 10
        for dtype in range(3):
            sizes = [(op, (rows, E, k, n)) for op in OPS[:2] for rows in (1, 16, 130, 4096, 100_000) for E in (1, 8, 64)
                     for k in (16, 2048) for n in (128, 14336)]  # fmt: skip
            sizes += [("patch_embed", (P, k, N)) for P in (1, 300, 9999) for k in (588, 768) for N in (768, 1280)]
            sizes += [("adaptive_pool", (P, C)) for P in (1, 9999) for C in (16, 1024, 1040, 2048, 4096)]
            for op, dims in sizes:
                found = choose(op, arch, dtype, *dims)
                assert 0 <= found < len(manifest["variants"]), (op, arch, dtype, dims, found)
                assert found == expected(op, number, dtype, dims, limit), (op, arch, dtype, dims)
    dims = 100, 8, 2048, 2048
    for arch in (0, 70, 75, 900, 950):
        assert choose("grouped_gemm", arch, 1, *dims) == -1
        assert library.mm1_variants(arch) == 0
    arch = manifest["archs"][-1]
    assert choose("grouped_gemm", arch, 3, *dims) == choose("grouped_gemm", arch, -1, *dims) == -1
    assert choose("grouped_gemm", arch, 1, 100, 0, 2048, 2048) == choose("adaptive_pool", arch, 1, 9, 8192) == -1
    refused()


def refused() -> None:
    """Sizes that no call may have: their products would not fit into 64 bits."""
    good = {"grouped_gemm": (100, 8, 2048, 1024), "experts_up": (100, 8, 2048, 1024), "patch_embed": (300, 588, 1024),
            "adaptive_pool": (300, 1024)}  # fmt: skip
    arch = manifest["archs"][-1]
    for op, dims in good.items():
        assert choose(op, arch, 1, *dims) >= 0
        for place in range(len(dims)):
            bad = -(1 << 63), -1, 1 << 31, 1 << 32, (1 << 62) + 16, (1 << 63) - 1, *((0, 1 << 24) if place else ())
            for value in bad:
                assert choose(op, arch, 1, *dims[:place], value, *dims[place + 1 :]) == -1, (op, place, value)
    assert library.mm1_choose(0, arch, 1, None) == library.mm1_choose(-1, arch, 1, (ctypes.c_int64 * 4)()) == -1


def expected(op: str, number: int, dtype: int, dims: tuple[int, ...], limit: int | None) -> int:
    values = dict(zip(ahead.OPS[op].dims, dims))
    values["each"] = -(-dims[0] // dims[1])
    for row in manifest["rows"]:
        variant = manifest["variants"][row["variant"]]
        if (variant["op"], variant["arch"], variant["dtype"]) == (op, number, dtype):
            holds = all(low <= values[name] <= high for name, (low, high) in row["when"].items())
            if holds and (limit is None or variant["shared"] <= limit):
                return row["variant"]
    raise AssertionError(f"no row of {op} for {number}, {dtype}, {dims}")


GEMM = 1, BASE, 2 * BASE, 3 * BASE, 4 * BASE, 1000, 8, 2048, 1024, 1, 5 * BASE, 1 << 30, 0
MOE = 1, *(i * BASE for i in range(1, 7)), 1000, 2, 8, 2048, 1024, 7 * BASE, 1 << 31, 0
EMBED = 1, *(i * BASE for i in range(1, 8)), 1000, 1024, 14, 27, 27, MEAN, STD, 8 * BASE, 1 << 30, 0
POOL = 1, BASE, 2 * BASE, 3 * BASE, 1000, 5, 2048, 12, 12, 0
CALLS = {"mm1_grouped_gemm": GEMM, "mm1_moe_mlp": MOE, "mm1_patch_embed": EMBED, "mm1_adaptive_pool": POOL}


def arguments() -> None:
    """What is wrong is told without a driver, and before one is looked for."""
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
        library.mm1_error_string(code) for code in (OK, INVALID, UNSUPPORTED, NO_DRIVER, NO_CONTEXT, DRIVER, -1)
    }
    assert len(messages) == 7
    assert library.mm1_error_string(DRIVER + 700) == library.mm1_error_string(DRIVER)
    grids()


def grids() -> None:
    sizes = [(27, 27), (3, 40), (1, 1)]
    truth = Grids(sizes, patches=900)
    found = torch.full((3, 4), -7, dtype=torch.int32), torch.full((901,), -7, dtype=torch.int32)
    flat = torch.tensor(sizes, dtype=torch.int32)
    pointers = flat.data_ptr(), found[0].data_ptr(), found[1].data_ptr()
    assert call("mm1_grids", pointers[0], 3, 900, *pointers[1:]) == OK
    assert found[0].equal(truth.table)
    assert found[1][:900].equal(truth.owner)
    assert found[1][900] == -7
    assert call("mm1_grids", pointers[0], 3, 849, *pointers[1:]) == INVALID
    assert call("mm1_grids", 0, 3, 900, *pointers[1:]) == INVALID
    flat[1, 0] = 0
    assert call("mm1_grids", pointers[0], 3, 900, *pointers[1:]) == INVALID


def no_driver() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert call("mm1_grouped_gemm", *GEMM) == NO_DRIVER
        return
    sys.exit(77)


def no_device() -> None:
    assert all(call(name, *good) == NO_DRIVER for name, good in CALLS.items())


def dispatch() -> None:
    """Each compute capability runs the code that it can."""
    nvidia()
    for device, cc in enumerate(RUNS):
        driver.stub_device(device, cc)
        driver.stub_current(device)
        number = code_for(cc)
        if number is None:
            assert call("mm1_grouped_gemm", *GEMM) == UNSUPPORTED
            continue
        for dtype in range(3):
            for name, good in CALLS.items():
                assert call(name, dtype, *good[1:]) == OK, (name, cc)
            for record in records():
                found = [i for i in images_of(record) if i["target"] == number and i["dtype"] in (0, dtype)]
                assert found, (record.name, cc)
                assert record.shared == found[0]["shared"] <= (227 << 10 if number == cc else 99 << 10)
                assert record.device == device
                assert list(record.block) == [32 * found[0]["warps"], 1, 1]


def ints(*shape: int) -> torch.Tensor:
    return ahead.empty(*shape)


class Case:
    """One call of C and of Python, with the same tensors: where Python's lie is where C is told that they are."""

    def __init__(self, name: str, dtype: int, arch: int):
        self.name, self.dtype, self.arch, self.given, self.keep = name, dtype, arch, {}, []

    def at(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        self.keep.append(tensor)
        place = BASE * (1 + len(self.given))
        self.given[tensor.untyped_storage()._cdata] = place
        return place

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return ahead.empty(*shape, dtype=dtype or ahead.DTYPES[self.dtype])

    def pins(self, **dims: tuple[int, ...]) -> dict:
        configs = {}
        for op, sizes in dims.items():
            number = choose(op, self.arch, self.dtype, *sizes)
            assert number >= 0, (op, sizes)
            configs[op] = ahead.OPS[op].config(**manifest["variants"][number]["config"])
        return configs

    def check(self, arguments: list, workspace: int, size: int, python, pins: dict) -> None:
        assert call(self.name, *arguments) == OK, self.name
        found, gpu = records(), DEVICES[ahead.GPUS.get(str(self.arch), "a100")]
        wanted = ahead.recorded(gpu, python, **pins)
        names = [launch.kernel.fn.__name__ for launch in wanted]
        assert [r.name.decode() for r in found] == names, (names, [r.name for r in found])
        places, stretches = dict(self.given), {}
        for record, launch in zip(found, wanted):
            self.check_launch(record, launch, places, stretches)
        for name, (low, high) in stretches.items():
            assert workspace <= low <= high <= workspace + size, f"{name} reaches out of the workspace"
        spans = sorted(stretches.values())
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"stretches of the workspace overlap: {stretches}"

    def check_launch(self, record: Record, launch, places: dict, stretches: dict) -> None:
        values, kernel = ahead.values_of(launch), launch.kernel.fn.__name__
        assert list(record.grid) == [launch.grid, 1, 1], (kernel, list(record.grid), launch.grid)
        image = next(i for i in images_of(record) if self.same(i, values))
        assert list(record.block) == [32 * values["num_warps"], 1, 1], kernel
        assert record.count == len(image["args"]) + 2
        assert record.args[record.count - 1] == record.args[record.count - 2] == 0
        passed = dict(zip(image["args"], record.args))
        for name, value in values.items():
            if name not in passed and name not in image["constants"]:
                continue
            if isinstance(value, torch.Tensor):
                self.check_pointer(f"{kernel} {name}", value, passed[name], places, stretches)
            elif isinstance(value, float) and name in passed:
                bits = struct.unpack("I", struct.pack("f", value))[0]
                assert passed[name] == bits, (kernel, name, value)
            elif name in passed:
                assert passed[name] == value, (kernel, name, passed[name], value)

    def same(self, image: dict, values: dict) -> bool:
        """Whether what is compiled into the image is what Python would have compiled in."""
        return all(
            values[k] <= v if k in ROUNDED else values[k] == v or str(values[k]) == v
            for k, v in image["constants"].items()
        )

    def check_pointer(self, name: str, tensor: torch.Tensor, address: int, places: dict, stretches: dict) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        base = address - tensor.storage_offset() * tensor.element_size()
        assert places.setdefault(storage._cdata, base) == base, f"{name} is another tensor than before"
        if storage._cdata not in self.given:
            end = max(base + storage.nbytes(), stretches.get(base, (base, base))[1])
            stretches[base] = base, end


def case_gemm(arch: int, dtype: int, rows: int, E: int, k: int, n: int, transposed: bool) -> None:
    c = Case("mm1_grouped_gemm", dtype, arch)
    a, offsets = c.new(rows, k), ints(E)
    b = c.new(E, n, k) if transposed else c.new(E, k, n)
    y, ws = 90 * BASE, 91 * BASE
    room = size("grouped_gemm", rows, E)
    out = []

    def python():
        out.append(grouped_gemm.gemm(a, b.transpose(1, 2) if transposed else b, offsets, tail=True))
        c.given[out[0].untyped_storage()._cdata] = y

    arguments = [dtype, c.at(a), c.at(b), c.at(offsets), y, rows, E, k, n, transposed, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(grouped_gemm=(rows, E, k, n)))


def case_moe(arch: int, dtype: int, T: int, K: int, E: int, D: int, F: int) -> None:
    from mm1.kernels.moe import experts
    from mm1.kernels.moe import routing as route

    c = Case("mm1_moe_mlp", dtype, arch)
    x, index, weight = c.new(T, D), ints(T, K), c.new(T, K, dtype=torch.float32)
    gate_up, down = c.new(E, 2 * F, D), c.new(E, D, F)
    y, ws = 90 * BASE, 91 * BASE
    room = size("moe_mlp", dtype, T, K, E, D, F)
    kept = []

    def python():
        order = route.sort(index, E)
        out = experts.forward(x, *order, weight, gate_up, None, down, None, None, "silu", None, 0.0, False, False)[0]
        kept.append(out)
        c.given[out.untyped_storage()._cdata] = y

    arguments = [dtype, *map(c.at, (x, index, weight, gate_up, down)), y, T, K, E, D, F, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(experts_up=(T * K, E, D, F), grouped_gemm=(T * K, E, F, D)))


def case_embed(arch: int, dtype: int, P: int, width: int, patch: int, has_table: bool, has_bias: bool) -> None:
    c = Case("mm1_patch_embed", dtype, arch)
    pixels, weight = c.new(P * patch**2, 3, dtype=torch.uint8), c.new(width, 3 * patch**2)
    bias, table = c.new(width) if has_bias else None, c.new(24, 27, width) if has_table else None
    images, owner = ints(3, 4), ints(P)
    y, ws = 90 * BASE, 91 * BASE
    room = size("patch_embed", dtype, P, width, patch)
    scale = [1 / (255 * s) for s in STD]
    shift = [(patch_embed.CENTRE / 255 - m) / s for m, s in zip(MEAN, STD)]
    mode = ("bilinear", True, False) if has_table else ("nearest", False, False)
    kept = []

    def python():
        kept.append(patch_embed.forward(pixels, weight, bias, table, images, owner, patch, scale, shift, 1, *mode))
        c.given[kept[0].untyped_storage()._cdata] = y

    pointers = map(c.at, (pixels, images, owner, weight, bias, table))
    arguments = [dtype, *pointers, y, P, width, patch, 24, 27, MEAN, STD, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(patch_embed=(P, 3 * patch**2, width)))


def case_pool(arch: int, dtype: int, P: int, N: int, C: int, oh: int, ow: int) -> None:
    c = Case("mm1_adaptive_pool", dtype, arch)
    x, table, owner, y = c.new(P, C), ints(N, 4), ints(P), 90 * BASE
    kept = []

    def python():
        kept.append(adaptive_pool.forward(x, table, owner, oh, ow))
        c.given[kept[0].untyped_storage()._cdata] = y

    arguments = [dtype, c.at(x), c.at(table), y, P, N, C, oh, ow, 0]
    c.check(arguments, 0, 0, python, c.pins(adaptive_pool=(P, C)))


def launches() -> None:
    """C makes the launches that Python records, with the same grids and arguments."""
    for device, arch in enumerate(nvidia()):
        driver.stub_device(device, arch)
        driver.stub_current(device)
        for dtype in range(3):
            for rows, E in ((1, 1), (7, 8), (100, 3), (256, 8), (300, 64), (4096, 8), (8192, 200)):
                case_gemm(arch, dtype, rows, E, 2048, 1408, True)
                case_gemm(arch, dtype, rows, E, 16, 48, False)
            for T, K, E, D, F in ((1, 2, 8, 4096, 14336), (300, 8, 128, 2048, 768), (8192, 2, 64, 3072, 8064),
                                  (5000, 8, 256, 512, 256)):  # fmt: skip
                case_moe(arch, dtype, T, K, E, D, F)
            for P, width, patch in ((1, 768, 14), (729, 1152, 14), (5000, 1280, 16)):
                case_embed(arch, dtype, P, width, patch, True, True)
                case_embed(arch, dtype, P, width, patch, False, True)
                case_embed(arch, dtype, P, width, patch, True, False)
            for P, N, C, side in ((729, 1, 1024, 12), (4096, 5, 1280, 12), (100, 3, 768, 8), (999, 2, 4096, 12)):
                case_pool(arch, dtype, P, N, C, side, side)


def devices() -> None:
    """Two GPUs and eight threads: each device has its own code, prepared once, and nothing is mixed up."""
    gpus = nvidia()[0], nvidia()[-1]
    for device in (0, 1):
        driver.stub_device(device, gpus[device])
    results, start = [], threading.Barrier(8)

    def work(number: int) -> None:
        driver.stub_current(number % 2)
        start.wait()
        for _ in range(20):
            for name, good in CALLS.items():
                results.append(call(name, *good[:-1], number + 1))
        driver.stub_current(1 - number % 2)
        results.append(call("mm1_adaptive_pool", *POOL[:-1], number + 1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [OK] * len(results)
    found = records()
    assert len(found) == 8 * (20 * (2 + 7 + 3 + 1) + 1), len(found)
    cached: dict[int, list[dict]] = {}
    for record in found:
        images = cached.setdefault(record.code, images_of(record))
        assert {i["target"] for i in images} == {code_for(gpus[record.device])}
        assert record.device == (record.stream - 1) % 2 or record.name == b"_pool_kernel"
    assert driver.stub_loads() == len(cached), "an image was loaded twice"
    driver.stub_device(2, gpus[0])
    driver.stub_current(2)
    assert [call(name, *good) for name, good in CALLS.items()] == [OK] * len(CALLS), "another GPU of the same kind"
    assert driver.stub_loads() == len(cached), "CUDA's images belong to no device"
    for number in range(8):
        mine = [r.name for r in found if r.stream == number + 1]
        assert mine[:13] * 20 == mine[:-1], "a thread's launches are out of order"


def failures() -> None:
    driver.stub_device(0, nvidia()[0])
    assert call("mm1_grouped_gemm", *GEMM) == NO_CONTEXT
    driver.stub_current(0)
    driver.stub_fail(209)
    assert call("mm1_grouped_gemm", *GEMM) == DRIVER + 209
    assert not records()
    driver.stub_fail(0)
    assert call("mm1_grouped_gemm", *GEMM) == OK, "a failure stays"
    assert len(records()) == 2
    for cc in (75, 60, 12):
        driver.stub_device(cc % 7 + 1, cc)
        driver.stub_current(cc % 7 + 1)
        assert call("mm1_moe_mlp", *MOE) == UNSUPPORTED
        assert not records()
    driver.stub_current(0)
    unsupported = [
        ("mm1_moe_mlp", 8, 3), ("mm1_moe_mlp", 9, 257), ("mm1_grouped_gemm", 6, 257), ("mm1_patch_embed", 10, 15),
        ("mm1_adaptive_pool", 6, 8192), ("mm1_adaptive_pool", 7, 11),
    ]  # fmt: skip
    for name, place, value in unsupported:
        good = CALLS[name]
        assert call(name, *good[:place], value, *good[place + 1 :]) == UNSUPPORTED, (name, place)
        assert not records(), f"{name} launched something"
    driver.stub_current(7)
    assert call("mm1_adaptive_pool", *POOL) == UNSUPPORTED, "a device whose properties the driver does not tell"


def amd() -> None:
    """HIP's modules are of one device, and its waves have 64 threads."""
    if 942 not in manifest["archs"]:
        sys.exit(77)
    for device in (0, 1):
        driver.stub_device(device, 94)
        driver.stub_current(device)
        for dtype in range(3):
            for name, good in CALLS.items():
                assert call(name, dtype, *good[1:]) == OK, name
        found = records()
        assert len(found) == 3 * 13
        for record in found:
            image = images_of(record)[0]
            assert image["target"] == 942
            assert list(record.block) == [64 * image["warps"], 1, 1]
    driver.stub_device(2, 95)
    driver.stub_current(2)
    assert call("mm1_grouped_gemm", *GEMM) == UNSUPPORTED


def prepare() -> None:
    """Everything is loaded ahead, and nothing launched; each device of each thread, whoever comes first."""
    gpus = nvidia()[0], nvidia()[-1]
    for device in (0, 1):
        driver.stub_device(device, gpus[device])
    assert call("mm1_prepare") == NO_CONTEXT
    driver.stub_current(0)
    driver.stub_fail(2)
    assert call("mm1_prepare") == DRIVER + 2
    driver.stub_fail(0)
    prepared_by_all(range(2))
    least = sum(i["target"] in map(code_for, gpus) and i["shared"] <= 99 << 10 for i in manifest["images"])
    assert driver.stub_loads() - 1 >= least, "the first failed"
    driver.stub_device(3, 70)
    driver.stub_current(3)
    assert call("mm1_prepare") == UNSUPPORTED


def prepare_amd() -> None:
    if 942 not in manifest["archs"]:
        sys.exit(77)
    for device in (0, 1):
        driver.stub_device(device, 94)
    prepared_by_all(range(2))
    assert driver.stub_loads() == 2 * sum(i["target"] == 942 for i in manifest["images"]), "HIP's are of one device"


def prepared_by_all(devices: range) -> None:
    results, start = [], threading.Barrier(8)

    def work(number: int) -> None:
        driver.stub_current(devices[number % len(devices)])
        start.wait()
        results.append(call("mm1_prepare"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [OK] * 8
    assert not records(), "something was launched"
    loads, lazy = driver.stub_loads(), driver.stub_lazy()
    for device in devices:
        driver.stub_current(device)
        for dtype in range(3):
            assert [call(name, dtype, *good[1:]) for name, good in CALLS.items()] == [OK] * len(CALLS)
    assert len(records()) == 3 * 13 * len(devices)
    assert driver.stub_loads() == loads, "a call loaded an image"
    assert hip() or driver.stub_lazy() == lazy, "a launch loaded a kernel"


def hip() -> bool:
    return "amdhip64" in str(options.driver)


def late() -> None:
    """A driver that is installed while the process runs, and then a device that appears, are found by the next call."""
    if hip() and 942 not in manifest["archs"]:
        sys.exit(77)
    call_it = lambda: [call(name, *good) for name, good in CALLS.items()]  # noqa: E731
    options.late.unlink(missing_ok=True)
    try:
        assert call_it() == [NO_DRIVER] * len(CALLS)
        assert call("mm1_prepare") == NO_DRIVER
        options.late.symlink_to(options.driver)
        os.environ["STUB_NO_DEVICE"] = "1"
        assert call_it() == [NO_DRIVER] * len(CALLS)
        del os.environ["STUB_NO_DEVICE"]
        assert call_it() == [NO_CONTEXT] * len(CALLS)
        shared = ctypes.CDLL(str(options.driver))
        shared.stub_device(0, 94 if hip() else nvidia()[0])
        shared.stub_current(0)
        assert call_it() == [OK] * len(CALLS)
    finally:
        options.late.unlink(missing_ok=True)


def loaded_amd() -> None:
    """The HIP runtime that the process has is used where a newer one is found: it alone knows the process's streams."""
    if 942 not in manifest["archs"]:
        sys.exit(77)
    newer = options.driver.parent / "newer" / "libamdhip64.so.7"
    shutil.copy(options.driver, newer)
    driver.stub_device(0, 94)
    driver.stub_current(0)
    assert call("mm1_adaptive_pool", *POOL) == OK
    assert len(records()) == 1
    assert ctypes.CDLL("libamdhip64.so.7")._handle != driver._handle, "the newer one would have been found"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--archs", type=lambda archs: archs.split(","), default=list(ahead.GPUS))
    parser.add_argument("--driver", type=Path)
    parser.add_argument("--late", type=Path, help="where the driver is put while the process runs")
    parser.add_argument("name")
    options = parser.parse_args()
    begin()
    globals()[options.name]()
