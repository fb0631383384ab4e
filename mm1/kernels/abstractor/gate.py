"""Compute the second 1×1 product of conv_block, and multiply its operand by the image's gate as it is loaded.

    y[p] = (b[p] · gate[image of p]) · Wᵀ        b [P, K], gate [N, K], W [C, K] -> [P, C]

A separate kernel for the gate would read and write b again, 2·P·K elements: by the cost model a third of the product's
time on an H200 for K = 1024 in bf16. A tile loads two rows of gates where its rows belong to at most two images, which
is always so if images have at least 128 rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels import tiles
from mm1.kernels.cost_model import Predicted, Product, memory_seconds
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv, device_of, launch, strides
from mm1.kernels.language import tl, triton
from mm1.kernels.tiles import (
    UPCAST,
    Shape,
    descriptor,
    dot,
    load_rows,
    load_weight,
    store_tile,
    tile_of,
    weight_operands,
)
from mm1.kernels.tuning import Tunable, config_for


@dataclass(frozen=True)
class Config(tiles.Config):
    """Hold a tile, and whether the gate is part of the product."""

    fused: bool = True  # False: a separate kernel applies the gate, then cuBLAS multiplies


class GateShape(NamedTuple):
    """Hold the sizes of a gated product [rows, k] · [k, n]."""

    rows: int
    k: int
    n: int

    @property
    def product(self) -> Shape:
        """Return the shape of the product with a single weight."""
        return Shape(self.rows, 1, self.k, self.n)


def legal(config: Config, shape: GateShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the kernel is worth using and fits.

    Not fused are fp32, which cuBLAS multiplies twice as fast as Triton, and rows that cannot be loaded 16 bytes at a
    time, whose gates spill registers. Before Hopper tiles of 128 × 128 with gates spill too.
    """
    if config.fused and (dtype == torch.float32 or shape.k % 16 or config.block_n > _widest(device)):
        return False
    return (
        tiles.legal(config, shape.product, dtype, device)
        and shared_bytes(config, shape, dtype, device) <= device.shared
    )


def shared_bytes(config: Config, shape: GateShape, dtype: torch.dtype, device: Device) -> int:
    """Return the bytes of shared memory of a program: a plain product's, and a gated operand's."""
    gated = config.block_m * config.block_k * dtype.itemsize if config.fused and device.vendor == "nvidia" else 0
    return tiles.shared_bytes(config, shape.product, dtype.itemsize, device) + gated


def space(shape: GateShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not."""
    yield from (Config(**vars(c), fused=True) for c in tiles.space(shape, dtype, device))
    yield replace(default(shape, dtype, device), fused=False)


def default(shape: GateShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose the tile of a plain product, as wide as registers allow."""
    tile = tiles.default(shape.product, dtype, device)
    tile = replace(tile, block_n=min(tile.block_n, _widest(device)))
    return Config(**vars(tile), fused=dtype != torch.float32 and shape.k % 16 == 0)


def work(config: Config, shape: GateShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run; unless fused, the gated operand is written and read again."""
    again = 0 if config.fused else 2 * shape.rows * shape.k * dtype.itemsize
    return replace(tiles.work(config, shape.product, dtype, device), beside=memory_seconds(again, device))


def _widest(device: Device) -> int:
    return 256 if device.asynchronous else 64


GATE = Tunable("conv_gate", GateShape, Config, space, legal, default, Predicted(work))


@triton.jit
def _times(b, gate):
    if UPCAST:  # the interpreter multiplies bf16 wrongly
        return (b.to(tl.float32) * gate.to(tl.float32)).to(b.dtype)
    else:
        return b * gate


@triton.jit
def _gate_rows(gate_ptr, image, k, K, BLOCK_K: tl.constexpr):
    """Load the gates [BLOCK_M, BLOCK_K] of each row's image."""
    offs_k = k + tl.arange(0, BLOCK_K)
    return tl.load(gate_ptr + image.to(tl.int64)[:, None] * K + offs_k[None, :], (offs_k < K)[None, :], other=0.0)


@triton.jit
def _gemm_kernel(
    b, gate_ptr, owner_ptr, w, y_ptr, y_desc, stride_wk, stride_wn, P, K, N, B_TMA: tl.constexpr, W_TMA: tl.constexpr,
    Y_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store y [P, C] = (b · gate) · Wᵀ."""
    num_m = tl.cdiv(P, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    only = tl.full((), 0, tl.int32)  # the index of the single weight
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        row = pid_m * BLOCK_M
        n = pid_n * BLOCK_N
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), P - 1)
        image = tl.maximum(tl.load(owner_ptr + rows), 0)  # rows of no image are zeros, whatever the gate
        low = tl.min(image, 0)
        high = tl.max(image, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if tl.max(((image != low) & (image != high)).to(tl.int32), 0) == 0:
            for k in range(0, K, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                gate = tl.load(gate_ptr + low.to(tl.int64) * K + offs_k, offs_k < K, other=0.0)
                other = tl.load(gate_ptr + high.to(tl.int64) * K + offs_k, offs_k < K, other=0.0)
                gates = tl.where((image == low)[:, None], gate[None, :], other[None, :])
                tile_b = load_rows(b, rows, row, k, K, 1, K, BLOCK_K, B_TMA)
                tile_w = load_weight(w, only, k, n, 0, stride_wk, stride_wn, K, N, BLOCK_K, BLOCK_N, W_TMA)
                acc = dot(_times(tile_b, gates), tile_w, acc)
        else:
            # Images of few rows; without a pipeline, whose third operand would take all of an H200's shared memory.
            for k in tl.range(0, K, BLOCK_K, num_stages=1):
                gates = _gate_rows(gate_ptr, image, k, K, BLOCK_K)
                tile_b = load_rows(b, rows, row, k, K, 1, K, BLOCK_K, B_TMA)
                tile_w = load_weight(w, only, k, n, 0, stride_wk, stride_wn, K, N, BLOCK_K, BLOCK_N, W_TMA)
                acc = dot(_times(tile_b, gates), tile_w, acc)
        store_tile(y_ptr, y_desc, acc, row, P, n, N, N, BLOCK_M, BLOCK_N, Y_TMA)


@triton.jit
def _gate_kernel(b_ptr, gate_ptr, owner_ptr, y_ptr, P, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store y = b · gate."""
    num_k = tl.cdiv(K, BLOCK_K)
    rows = tl.program_id(0) // num_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_k * BLOCK_K
    offs_k = k + tl.arange(0, BLOCK_K)
    image = tl.maximum(tl.load(owner_ptr + rows, rows < P, other=0), 0)
    places = rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    inside = (rows < P)[:, None] & (offs_k < K)[None, :]
    y = _times(tl.load(b_ptr + places, inside, other=0.0), _gate_rows(gate_ptr, image, k, K, BLOCK_K))
    tl.store(y_ptr + places, y, inside)


def gated_mm(b: Tensor, gate: Tensor, owner: Tensor, w: Tensor) -> Tensor:
    """Return (b · gate) · wᵀ, [P, C]; b [P, K], which may be overwritten, is zero in rows of no image; w [C, K]."""
    (P, K), N = b.shape, len(w)
    device = device_of(b)
    config = config_for(GATE, GateShape(P, K, N), b.dtype, device)
    if not config.fused:
        launch(
            _gate_kernel, cdiv(P, 16) * cdiv(K, 128), b_ptr=b, gate_ptr=gate, owner_ptr=owner, y_ptr=b, P=P, K=K,
            BLOCK_M=16, BLOCK_K=128, num_warps=4,
        )  # fmt: skip
        return torch.mm(b, w.t())
    y = b.new_empty(P, N)
    b_desc = descriptor(b, [config.block_m, config.block_k], config)
    y_desc = descriptor(y, [config.block_m, config.block_n], config)
    w_any, order = weight_operands(config, w.t()[None])
    launch(
        _gemm_kernel, tiles.programs(cdiv(P, config.block_m) * cdiv(N, config.block_n), config, device),
        b=b if b_desc is None else b_desc, gate_ptr=gate, owner_ptr=owner, w=w_any, y_ptr=y, y_desc=y_desc,
        **strides(w, "stride_wn", "stride_wk"), P=P, K=K, N=N, B_TMA=b_desc is not None, W_TMA=order,
        Y_TMA=y_desc is not None, GROUP_M=config.group_m, **config.arguments,
    )  # fmt: skip
    return y
