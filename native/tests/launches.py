"""Check that the library makes the launches that Python makes."""

import struct
from itertools import pairwise

import harness
import torch
from harness import (
    BASE,
    CALLS,
    GEMM,
    MEAN,
    OK,
    ROUNDED,
    RUNS,
    STD,
    UNSUPPORTED,
    Record,
    call,
    choose,
    code_for,
    images_of,
    ints,
    nvidia,
    records,
    size,
)

from mm1.autotune import ahead
from mm1.kernels.abstractor import pooling
from mm1.kernels.device import DEVICES
from mm1.kernels.moe import experts, grouped, routing
from mm1.kernels.patches import embedding


def dispatch() -> None:
    """Each compute capability runs the code that was compiled for it."""
    nvidia()
    for device, cc in enumerate(RUNS):
        harness.driver.stub_device(device, cc)
        harness.driver.stub_current(device)
        number = code_for(cc)
        if number is None:
            assert call("mm1_grouped_gemm", *GEMM) == UNSUPPORTED
            continue
        for dtype in range(3):
            for name, good in CALLS.items():
                assert call(name, dtype, *good[1:]) == OK, (name, cc)
            for record in records():
                images = [i for i in images_of(record) if i["target"] == number and i["dtype"] in (0, dtype)]
                assert images, (record.name, cc)
                assert record.shared == images[0]["shared"] <= (227 << 10 if number == cc else 99 << 10)
                assert record.device == device
                assert list(record.block) == [32 * images[0]["warps"], 1, 1]


class Case:
    """Compare a call of the library with Python's, for the same tensors: each has the address that C gets."""

    def __init__(self, name: str, dtype: int, arch: int):
        self.name, self.dtype, self.arch, self.addresses, self.keep = name, dtype, arch, {}, []

    def at(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        self.keep.append(tensor)
        place = BASE * (1 + len(self.addresses))
        self.addresses[tensor.untyped_storage()._cdata] = place
        return place

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return ahead.empty(*shape, dtype=dtype or ahead.DTYPES[self.dtype])

    def pins(self, **dims: tuple[int, ...]) -> dict:
        configs = {}
        for op, sizes in dims.items():
            number = choose(op, self.arch, self.dtype, *sizes)
            assert number >= 0, (op, sizes)
            configs[op] = ahead.OPS[op].config(**harness.manifest["variants"][number]["config"])
        return configs

    def check(self, arguments: list, workspace: int, size: int, python, pins: dict) -> None:
        assert call(self.name, *arguments) == OK, self.name
        launched, gpu = records(), DEVICES[ahead.GPUS.get(str(self.arch), "a100")]
        wanted = ahead.recorded(gpu, python, **pins)
        names = [launch.name for launch in wanted]
        assert [r.name.decode() for r in launched] == names, (names, [r.name for r in launched])
        places, stretches = dict(self.addresses), {}
        for record, launch in zip(launched, wanted):
            self.check_launch(record, launch, places, stretches)
        for name, (low, high) in stretches.items():
            assert workspace <= low <= high <= workspace + size, f"{name} reaches out of the workspace"
        spans = sorted(stretches.values())
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"stretches of the workspace overlap: {stretches}"

    def check_launch(self, record: Record, launch, places: dict, stretches: dict) -> None:
        values, kernel = launch.arguments, launch.name
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
        """Return whether the image has the constants that Python would compile."""
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
        if storage._cdata not in self.addresses:
            end = max(base + storage.nbytes(), stretches.get(base, (base, base))[1])
            stretches[base] = base, end


def case_gemm(arch: int, dtype: int, rows: int, E: int, k: int, n: int, transposed: bool) -> None:
    """Compare mm1_grouped_gemm."""
    c = Case("mm1_grouped_gemm", dtype, arch)
    a, offsets = c.new(rows, k), ints(E)
    b = c.new(E, n, k) if transposed else c.new(E, k, n)
    y, ws = 90 * BASE, 91 * BASE
    room = size("grouped_gemm", rows, E)
    out = []

    def python():
        out.append(grouped.gemm(a, b.transpose(1, 2) if transposed else b, offsets, tail=True))
        c.addresses[out[0].untyped_storage()._cdata] = y

    arguments = [dtype, c.at(a), c.at(b), c.at(offsets), y, rows, E, k, n, transposed, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(grouped_gemm=(rows, E, k, n)))


def case_moe(arch: int, dtype: int, T: int, K: int, E: int, D: int, F: int) -> None:
    """Compare mm1_moe_mlp."""
    c = Case("mm1_moe_mlp", dtype, arch)
    x, index, weight = c.new(T, D), ints(T, K), c.new(T, K, dtype=torch.float32)
    gate_up, down = c.new(E, 2 * F, D), c.new(E, D, F)
    y, ws = 90 * BASE, 91 * BASE
    room = size("moe_mlp", dtype, T, K, E, D, F)
    kept = []

    def python():
        order = routing.sort(index, E)
        gate = "silu", None, 0.0, False
        out = experts.moe_mlp_forward(x, order, weight, gate_up, None, down, None, None, *gate, False)[0]
        kept.append(out)
        c.addresses[out.untyped_storage()._cdata] = y

    arguments = [dtype, *map(c.at, (x, index, weight, gate_up, down)), y, T, K, E, D, F, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(experts_up=(T * K, E, D, F), grouped_gemm=(T * K, E, F, D)))


def case_embed(arch: int, dtype: int, P: int, width: int, patch: int, has_table: bool, has_bias: bool) -> None:
    """Compare mm1_patch_embed."""
    c = Case("mm1_patch_embed", dtype, arch)
    pixels, weight = c.new(P * patch**2, 3, dtype=torch.uint8), c.new(width, 3 * patch**2)
    bias, table = c.new(width) if has_bias else None, c.new(24, 27, width) if has_table else None
    images, owner = ints(3, 4), ints(P)
    y, ws = 90 * BASE, 91 * BASE
    room = size("patch_embed", dtype, P, width, patch)
    scale = [1 / (255 * s) for s in STD]
    shift = [(128 / 255 - m) / s for m, s in zip(MEAN, STD)]
    mode = ("bilinear", True, False) if has_table else ("nearest", False, False)
    kept = []

    def python():
        kept.append(embedding.forward(pixels, weight, bias, table, images, owner, patch, scale, shift, 1, *mode))
        c.addresses[kept[0].untyped_storage()._cdata] = y

    pointers = map(c.at, (pixels, images, owner, weight, bias, table))
    arguments = [dtype, *pointers, y, P, width, patch, 24, 27, MEAN, STD, ws, room, 0]
    c.check(arguments, ws, room, python, c.pins(patch_embed=(P, 3 * patch**2, width)))


def case_pool(arch: int, dtype: int, P: int, N: int, C: int, oh: int, ow: int) -> None:
    """Compare mm1_adaptive_pool."""
    c = Case("mm1_adaptive_pool", dtype, arch)
    x, table, owner, y = c.new(P, C), ints(N, 4), ints(P), 90 * BASE
    kept = []

    def python():
        kept.append(pooling.forward(x, table, owner, oh, ow))
        c.addresses[kept[0].untyped_storage()._cdata] = y

    arguments = [dtype, c.at(x), c.at(table), y, P, N, C, oh, ow, 0]
    c.check(arguments, 0, 0, python, c.pins(adaptive_pool=(P, C)))


def launches() -> None:
    """C makes the launches that Python records, with the same grids and arguments."""
    for device, arch in enumerate(nvidia()):
        harness.driver.stub_device(device, arch)
        harness.driver.stub_current(device)
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
