"""Provide the parts that all grouped products share: tile sizes, the map from tiles to experts, loads and stores.

The offsets of experts stay on the device: a kernel computes the map from tiles to experts there, for a static upper
bound of tiles, and programs without a tile end at once. The map orders experts by decreasing size, so that the last
programs to run work on the smallest experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.kernels.cost_model import Predicted, Product, expert_tiles
from mm1.kernels.device import Device
from mm1.kernels.dispatch import INTERPRETED, cdiv, device_of, launch, power_of_2
from mm1.kernels.language import INSTALLED, TensorDescriptor, tl, triton

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies bf16 incorrectly
# On sm_120 Triton 3.6 spills registers for each descriptor in a loop, and issues up to 36 % more instructions than with
# addresses.
SPILLS_DESCRIPTORS = INSTALLED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
PART = tl.constexpr(32)  # columns of a tile that get bias and positions, or lose their targets, in one step
MAP_SIDE = 32  # tiles that a program of the map kernel assigns, and experts that it compares with all others at once
MAP_PAIRS = 16384  # pairs of them and experts: of more, or of as many with 4 warps, registers spilled


@dataclass(frozen=True)
class Config:
    """Hold the tile sizes of the result and of the reduction, and the order in which programs compute tiles."""

    block_m: int = 128  # rows of one expert; for a weight gradient, rows of the result
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8  # neighbouring tiles along m that run at the same time, so that their columns of b stay in L2
    warps: int = 8
    stages: int = 3
    tma: bool = True  # bulk tensor copies, for operands whose layout allows them
    persistent: bool = False  # one program a multiprocessor, which computes several tiles

    @property
    def arguments(self) -> dict[str, int]:
        """Return the tile sizes and Triton's options, as arguments of a launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
                "num_warps": self.warps, "num_stages": self.stages}  # fmt: skip


class Shape(NamedTuple):
    """Hold the sizes of a grouped product [rows, k] · [experts, k, n]."""

    rows: int
    experts: int
    k: int
    n: int
    gated: bool = False  # gate and up are computed in the same program

    @property
    def sums(self) -> int:
        """Return the number of accumulators that a program keeps."""
        return 1 + self.gated


def shared_bytes(config: Config, shape: Shape, itemsize: int, device: Device, stores: bool = True) -> int:
    """Return the bytes of shared memory that a program uses at most, without barriers and reductions (up to 1 KB).

    Where products read their operands from registers, the pipeline keeps one stage fewer. stores: whether the kernel
    stores its result by bulk copies, for which a tile of it passes through shared memory.
    """
    tile = (config.block_m + shape.sums * config.block_n) * config.block_k * itemsize
    stored = config.block_m * config.block_n * itemsize if stores and config.tma else 0
    return tile * (config.stages if device.asynchronous else max(1, config.stages - 1)) + stored


def legal(config: Config, shape: Shape, dtype: torch.dtype, device: Device, stores: bool = True) -> bool:
    """Tell whether a kernel of this configuration fits into shared memory, and its accumulators into registers."""
    sums = config.block_m * config.block_n * shape.sums / (device.warp * config.warps)
    fits = shared_bytes(config, shape, dtype.itemsize, device, stores) <= device.shared
    return fits and sums <= 128 and (device.tma or not config.tma) and min(config.block_k, config.block_n) >= 16


def space(shape: Any, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not; none for fp32, which always uses the default."""
    if dtype == torch.float32:
        return
    sides = (16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128)
    yield from (Config(*axis) for axis in product(*sides, (8, 16), (4, 8), (2, 3, 4, 5), (True, False), (False, True)))


def default(shape: Shape, dtype: torch.dtype, device: Device) -> Config:
    """Choose a configuration by rows per expert and element size, with as many stages as fit."""
    rows = shape.rows / max(shape.experts, 1)
    block_m = next((m for m in (16, 32, 64) if rows <= m), 128)
    wide = block_m == 128 and shape.n * shape.sums > 128 and device.wgmma
    config = Config(
        block_m=block_m,
        block_n=(256 if wide else 128) // shape.sums,
        block_k=128 // dtype.itemsize if block_m >= 64 else 256 // dtype.itemsize,
        warps=8 if block_m == 128 else 4,
        stages=4 if block_m < 128 else 3,
        tma=device.tma,
    )
    if dtype == torch.float32:  # without matrix units: small tiles in registers
        config = replace(config, block_m=min(block_m, 64), block_n=64, block_k=16, warps=8, stages=2, tma=False)
    return fitted(config, shape, dtype, device)


def fitted(config: Config, shape: Shape, dtype: torch.dtype, device: Device) -> Config:
    """Reduce the stages, then block_k, until the configuration is legal."""
    while config.stages > 2 and not legal(config, shape, dtype, device):
        config = replace(config, stages=config.stages - 1)
    while not legal(config, shape, dtype, device):
        config = replace(config, block_k=config.block_k // 2)
    return config


def work(
    config: Config, shape: Shape, dtype: torch.dtype, device: Device, *, gathered: bool = False, stores: bool = True,
    finish: float = 1.0, finishing: float = 2.2, stored: float = 1.0,
) -> Product:  # fmt: skip
    """Describe the work of one run, with rows spread over experts as a router spreads them.

    gathered: whether rows of a are loaded by addresses even with descriptors; stores: as in shared_bytes. For each
    result: finish, elements that a program moves; finishing, instructions of a thread; stored, elements of memory.
    """
    tall, used = expert_tiles(shape.rows, shape.experts, config.block_m)
    m, n, k, size = config.block_m, config.block_n * shape.sums, config.block_k, dtype.itemsize
    by_addresses = m * k * (gathered or not config.tma) + n * k * (not config.tma)
    moved = shape.rows * (shape.k + shape.n * shape.sums * stored) + used * shape.k * shape.n * shape.sums
    return Product(
        tall * cdiv(shape.n, config.block_n), shape.k, m, n, k, config.warps, config.stages,
        shared_bytes(config, shape, size, device, stores), moved * size, size,
        addressed=by_addresses, finish=finish, finishing=finishing, programs=1 if config.persistent else None,
    )  # fmt: skip


seconds = Predicted(work)


@triton.jit
def dot(a, b, acc):
    """Return acc + a · b; fp32 operands are multiplied exactly (IEEE), not as TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def split_columns(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of a tile [BLOCK_M, BLOCK_N]; every thread keeps its sums of products."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def part_of(x, p: tl.constexpr, PARTS: tl.constexpr):
    """Return the columns of part p of 1, 2 or 4."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if PARTS == 1:
        return x
    else:
        first, second = split_columns(x, M, N)
        half = second if 2 * p >= PARTS else first
        if PARTS == 2:
            return half
        else:
            first, second = split_columns(half, M, N // 2)
            return second if p % 2 == 1 else first


@triton.jit
def tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return (m, n) of a tile; tiles are numbered in groups of GROUP_M rows of tiles, by columns within a group."""
    group = tile // (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * num_n)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def mapped_tile(tiles_ptr, tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return a tile's expert (-1: none), its first row, the end of the expert's rows, and its position along n."""
    pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
    tiles_ptr += pid_m
    expert, row, end = tl.load(tiles_ptr), tl.load(tiles_ptr + num_m), tl.load(tiles_ptr + 2 * num_m)
    # Row and end are 0 without an expert. As the caller's branch depends on all three, they are loaded at once.
    return tl.where(row < end, expert, -1), row, end, pid_n


@triton.jit
def load_rows(a, rows, row, k, stride_m, stride_k, K, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Load [BLOCK_M, BLOCK_K] of a: with a descriptor the rows from `row` on, else the rows in `rows`."""
    if TMA:
        return a.load([row, k])
    else:
        offs_k = k + tl.arange(0, BLOCK_K)
        places = rows.to(tl.int64)[:, None] * stride_m + offs_k.to(tl.int64)[None, :] * stride_k
        return tl.load(a + places, (offs_k < K)[None, :], other=0.0)


@triton.jit
def load_weight(
    b, expert, k, n, stride_e, stride_k, stride_n, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK_K, BLOCK_N] of b[expert]; TMA: the order of the descriptor's last two axes, "" without descriptor."""
    if TMA == "kn":
        return tl.reshape(b.load([expert, k, n]), (BLOCK_K, BLOCK_N))
    elif TMA == "nk":
        return tl.reshape(b.load([expert, n, k]), (BLOCK_N, BLOCK_K)).T
    else:
        offs_k = k + tl.arange(0, BLOCK_K)
        offs_n = n + tl.arange(0, BLOCK_N)
        places = offs_k.to(tl.int64)[:, None] * stride_k + offs_n.to(tl.int64)[None, :] * stride_n
        inside = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        return tl.load(b + expert.to(tl.int64) * stride_e + places, inside, other=0.0)


@triton.jit
def store_tile(
    y_ptr, y_desc, value, row, end, n, stride_m, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr
):
    """Store rows row … end - 1 of a tile in y, whose last axis is contiguous; TMA: whole tiles by descriptor."""
    value = value.to(y_ptr.dtype.element_ty)
    rows = row + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    places = rows.to(tl.int64)[:, None] * stride_m + offs_n[None, :]
    inside = (rows < end)[:, None] & (offs_n < N)[None, :]
    if TMA:
        if row + BLOCK_M <= end:
            y_desc.store([row, n], value)
        else:
            tl.store(y_ptr + places, value, inside)
    else:
        tl.store(y_ptr + places, value, inside)


@triton.jit(do_not_specialize=["M", "num_m"])
def _map_kernel(
    offsets_ptr, tiles_ptr, by_size_ptr, M, E, num_m, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store expert (-1: none), first row and end of each of num_m tiles, experts by decreasing size.

    TAIL: tiles of expert E follow, for the rows past the last offset.
    """
    pid = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + e - 1, (e > 0) & (e < E), other=0)
    end = tl.load(offsets_ptr + e, e < E, other=0)
    rows = tl.where(e < E, end - begin, -1)
    first = tl.zeros((BLOCK_E,), tl.int32)  # tiles of larger experts
    rank = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, E, CHUNK):
        o = start + tl.arange(0, CHUNK)
        o_begin = tl.load(offsets_ptr + o - 1, (o > 0) & (o < E), other=0)
        o_rows = tl.where(o < E, tl.load(offsets_ptr + o, o < E, other=0) - o_begin, -1)
        larger = (o_rows[None, :] > rows[:, None]) | ((o_rows[None, :] == rows[:, None]) & (o[None, :] < e[:, None]))
        larger = larger & (o < E)[None, :]
        rank += tl.sum(larger.to(tl.int32), 1)
        first += tl.sum(tl.where(larger, tl.cdiv(o_rows, BLOCK_M)[None, :], 0), 1)
    if pid == 0:
        tl.store(by_size_ptr + rank, e, e < E)
    count = tl.where(e < E, tl.cdiv(rows, BLOCK_M), 0)
    tile = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = (tile[:, None] >= first[None, :]) & (tile[:, None] < (first + count)[None, :])
    expert = tl.sum(tl.where(mine, e[None, :] + 1, 0), 1) - 1
    row = tl.sum(tl.where(mine, begin[None, :] + (tile[:, None] - first[None, :]) * BLOCK_M, 0), 1)
    last = tl.sum(tl.where(mine, end[None, :], 0), 1)
    if TAIL:
        used = tl.max(end, 0)
        past = used + (tile - tl.sum(count, 0)) * BLOCK_M
        tail = (tile >= tl.sum(count, 0)) & (past < M)
        expert = tl.where(tail, E, expert)
        row = tl.where(tail, past, row)
        last = tl.where(tail, M, last)
    tl.store(tiles_ptr + tile, expert, tile < num_m)
    tl.store(tiles_ptr + num_m + tile, row, tile < num_m)
    tl.store(tiles_ptr + 2 * num_m + tile, last, tile < num_m)


def programs(tiles: int, config: Config, device: Device) -> int:
    """Return the number of programs to launch for this number of tiles."""
    return min(tiles, device.units) if config.persistent else tiles


def tile_map(offsets: Tensor, rows: int, block_m: int, *, tail: bool = False) -> tuple[Tensor, Tensor, int]:
    """Return the map of tiles, the experts by decreasing size (int32 [E]), and the number of tiles.

    The map int32 [3, tiles] holds each tile's expert (-1: none), first row and end. The number of tiles is an upper
    bound that depends on shapes alone. offsets: int32 [E], end of each expert's rows. tail: the rows past the last
    offset have tiles too, of expert E.
    """
    E = len(offsets)
    # Each expert has at most one tile that is not full; and there are never more tiles than rows.
    num_m = min(cdiv(rows, block_m) + E + tail, rows)
    tiles = offsets.new_empty(3, num_m)
    by_size = torch.empty_like(offsets)
    block_e = power_of_2(E)
    side = max(1, min(MAP_SIDE, MAP_PAIRS // block_e))
    launch(
        _map_kernel, max(cdiv(num_m, side), min(E, 1)), offsets_ptr=offsets, tiles_ptr=tiles, by_size_ptr=by_size,
        M=rows, E=E, num_m=num_m, TAIL=tail, BLOCK_M=block_m, BLOCK_E=block_e, BLOCK_T=side, CHUNK=min(side, block_e),
        num_warps=8 if block_e >= 512 else 4,
    )  # fmt: skip
    return tiles, by_size, num_m


class Maps:
    """Hold the maps of rows sorted by expert, so that the products of an op share them. offsets: as of tile_map."""

    def __init__(self, offsets: Tensor):
        self.offsets = offsets
        self.made: dict[tuple[int, int, bool], tuple[Tensor, Tensor, int]] = {}

    def of(self, rows: int, block_m: int, tail: bool = False) -> tuple[Tensor, Tensor, int]:
        """Return tile_map(offsets, rows, block_m, tail=tail), which is computed once."""
        key = rows, block_m, tail
        if key not in self.made:
            self.made[key] = tile_map(self.offsets, rows, block_m, tail=tail)
        return self.made[key]

    @property
    def by_size(self) -> Tensor:
        """Return the experts by decreasing size, int32 [E], which come with any map."""
        return self.of(*next(iter(self.made), (0, 128, False)))[1]


def descriptor(x: Tensor, block: list[int], config: Config) -> Any:
    """Return a descriptor of x for bulk copies of `block`; None where layout or configuration do not allow it."""
    if SPILLS_DESCRIPTORS and device_of(x).family == "sm_120":
        return None
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in x.stride()[:-1])
    if not config.tma or x.stride(-1) != 1 or not aligned or x.numel() == 0:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def weight_operands(config: Config, *weights: Tensor) -> tuple[Any, ...]:
    """Return the operands of load_weight for weights [E, K, N] of one layout, and its argument TMA.

    The operands are descriptors, and TMA is the order of their last two axes; or the weights themselves, and "".
    """
    for order, axes, block in (
        ("kn", (0, 1, 2), [1, config.block_k, config.block_n]),
        ("nk", (0, 2, 1), [1, config.block_n, config.block_k]),
    ):
        descriptors = [descriptor(w.permute(axes), block, config) for w in weights]
        if all(d is not None for d in descriptors):
            return *descriptors, order
    return *weights, ""


def narrowed(config: Config, order: str, sums: int = 1) -> Config:
    """Return the configuration for weights without descriptors (order ""), which has at most 128 columns of sums.

    Addresses take registers that sums need: with 256 columns Triton 3.6 spilled up to 368 bytes.
    """
    return replace(config, block_n=min(config.block_n, 128 // sums)) if config.tma and not order else config
