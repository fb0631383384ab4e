"""Convolve packed images depthwise, 3×3, and compute the next steps of conv_block before the result is stored.

    u2[p] = Σ over the 9 neighbours q of p in its image of w2[q - p] · a[q];   b = silu(norm2(u2))

A program walks down a few columns of a strip (grids.py) with all channels in registers, so that it can apply norm2. It
loads each row at three shifts and adds it to the output rows above, at and below its own: three loads for each output
instead of nine. The window's weights [9, C] are loaded from L1 for each row: in registers they would take 72 of a
thread's 255 at C = 1024. The sums of an image are those of its walks, [walks, C], added in order. Values outside an
image are zeros, and so are results in rows of no image.

    walk "value"      b, and Σ b                                            forward
    walk "gated"      b · gate, and Σ b · dc                                backward: gate's gradient, operand of dw3
    walk "backward"   du2 from db = dc · gate + dmean / area                and the sums for gamma2, beta2
    walk "input"      du1 from da, the transposed convolution of du2        and the sums for gamma1, beta1
    taps              dw2[i] = Σ du2[p] · a[neighbour i of p]

The taps' gradient has a kernel of its own, because it needs no norm: its programs work on few channels, and loads of a
row serve three rows of outputs there too. Within "input" its nine sums left registers for one program a multiprocessor.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.abstractor import rows
from mm1.kernels.abstractor.rows import (
    Config,
    RowShape,
    config_of,
    load_row,
    normalised,
    over_rows,
    programs,
    silu,
    silu_slope,
)
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv, device_of, launch, power_of_2
from mm1.kernels.language import tl, triton
from mm1.kernels.patches.grids import STRIP_COLUMNS, STRIP_ROWS, image_of, load_image

HEIGHT, WIDTH = tl.constexpr(STRIP_ROWS), tl.constexpr(STRIP_COLUMNS)
SEARCH = tl.constexpr(128)  # images that one step of the search for a strip's image compares
SUM_ROWS, SUM_COLUMNS = 16, 128  # tile in which an image's sums are added
TAP_CHANNELS = 128  # channels of a program that adds the taps' gradient; with 256 some Tritons spill registers
TAP_PROGRAMS = 5  # programs of it on each multiprocessor


class Geometry(NamedTuple):
    """Hold the tensors of Grids that these kernels read."""

    table: Tensor
    owner: Tensor
    strips: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Return the tensors as arguments of a kernel."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


@triton.jit
def _walk_of(walk, table_ptr, strips_ptr, N, PER_STRIP: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the walk's image, that image's first row, rows, h and w, and the walk's top and left in the image."""
    strip = walk // PER_STRIP
    image = 0
    for start in range(0, N, SEARCH):
        n = start + tl.arange(0, SEARCH)
        end = tl.load(strips_ptr + 1 + n, n < N, other=0x7FFFFFFF)
        image += tl.sum((end <= strip).to(tl.int32), 0)
    within = strip - tl.load(strips_ptr + image)
    first, rows, h, w = load_image(table_ptr, image)
    across = tl.cdiv(w, WIDTH)
    left = within % across * WIDTH + walk % PER_STRIP * COLUMNS
    return image, first, rows, h, w, within // across * HEIGHT, left


@triton.jit
def _load(ptr, first, r, c, rows, w, offs_c, C):
    """Load fp32 [columns, C] at row r and columns c of an image, zeros outside it."""
    at = r * w + c
    inside = (r >= 0) & (c >= 0) & (c < w) & (at < rows)
    places = (first + at).to(tl.int64)[:, None] * C + offs_c[None, :]
    return tl.load(ptr + places, inside[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _mixed(w_ptr, before, here, after, offs_c, C):
    """Return a row's part of the outputs for which it is the window's row with the three weights at w_ptr."""
    w0, w1, w2 = load_row(w_ptr, offs_c, C), load_row(w_ptr + C, offs_c, C), load_row(w_ptr + 2 * C, offs_c, C)
    return before * w0[None, :] + here * w1[None, :] + after * w2[None, :]


@triton.jit
def _zero_tail(y_ptr, owner_ptr, table_ptr, offs_c, P, C, ROWS: tl.constexpr):
    """Store zeros in y's rows of no image."""
    for row in range(tl.program_id(0) * ROWS, P, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        _, _, _, _, valid = image_of(owner_ptr, table_ptr, rows, P)
        padding = ((rows < P) & (valid == 0))[:, None] & (offs_c < C)[None, :]
        zeros = tl.zeros((ROWS, offs_c.shape[0]), y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :], zeros, padding)


@triton.jit(do_not_specialize=["P", "N", "walks"])
def _walk_kernel(
    a_ptr, dc_ptr, w_ptr, gamma_ptr, beta_ptr, gate_ptr, dmean_ptr, table_ptr, owner_ptr, strips_ptr, y_ptr, sums_ptr,
    P, N, C, walks, MODE: tl.constexpr, STORE: tl.constexpr, PER_STRIP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the results of the walks of this MODE, which the table at the head of this file lists.

    "input": a_ptr is du2, whose convolution is transposed by the order of the taps, and dc_ptr is u1.
    """
    FLIPPED: tl.constexpr = MODE == "input"
    LAST: tl.constexpr = 6 - 6 * FLIPPED  # the window's row that the output row below does not share
    NORM_SUMS: tl.constexpr = MODE == "backward" or MODE == "input"
    offs_c = tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    gamma, beta = load_row(gamma_ptr, offs_c, C), load_row(beta_ptr, offs_c, C)
    gate = tl.zeros((BLOCK_C,), tl.float32)
    spread = tl.zeros((BLOCK_C,), tl.float32)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.minimum(tl.load(strips_ptr + N) * PER_STRIP, walks)
    for walk in range(tl.program_id(0), total, tl.num_programs(0)):
        image, first, rows, h, w, top, left = _walk_of(walk, table_ptr, strips_ptr, N, PER_STRIP, COLUMNS)
        c = left + tl.arange(0, COLUMNS)
        if MODE == "gated" or MODE == "backward":
            gate = load_row(gate_ptr + image.to(tl.int64) * C, offs_c, C)
        if MODE == "backward":
            spread = load_row(dmean_ptr + image.to(tl.int64) * C, offs_c, C) / rows
        sums = tl.zeros((BLOCK_C,), tl.float32)
        above = tl.zeros((COLUMNS, BLOCK_C), tl.float32)  # the sum for row r - 1, then for r
        below = tl.zeros((COLUMNS, BLOCK_C), tl.float32)  # for r, then for r + 1
        bottom = tl.minimum(top + HEIGHT, h)
        for r in range(top - 1, bottom + 1):
            before = _load(a_ptr, first, r, c - 1 + 2 * FLIPPED, rows, w, offs_c, C)
            here = _load(a_ptr, first, r, c, rows, w, offs_c, C)
            after = _load(a_ptr, first, r, c + 1 - 2 * FLIPPED, rows, w, offs_c, C)
            if r > top:
                u = above + _mixed(w_ptr + LAST * C, before, here, after, offs_c, C)
                at = (r - 1) * w + c
                valid = (c < w) & (at < rows)
                inside = valid[:, None] & in_c[None, :]
                places = (first + at).to(tl.int64)[:, None] * C + offs_c[None, :]
                da = u
                if MODE == "input":
                    u = tl.load(dc_ptr + places, inside, other=0.0).to(tl.float32)
                unit, rstd = normalised(u, in_c[None, :], C)
                z = unit * gamma[None, :] + beta[None, :]
                if MODE == "value":
                    y = silu(z).to(y_ptr.dtype.element_ty)
                    sums += tl.sum(tl.where(inside, y.to(tl.float32), 0.0), 0)
                    tl.store(y_ptr + places, y, inside)
                elif MODE == "gated":
                    dc = tl.load(dc_ptr + places, inside, other=0.0).to(tl.float32)
                    y = silu(z).to(dc_ptr.dtype.element_ty).to(tl.float32)
                    sums += tl.sum(y * dc, 0)
                    if STORE:
                        tl.store(y_ptr + places, (y * gate[None, :]).to(y_ptr.dtype.element_ty), inside)
                else:
                    if MODE == "backward":
                        dc = tl.load(dc_ptr + places, inside, other=0.0).to(tl.float32)
                        da = dc * gate[None, :] + spread[None, :]
                    dz = tl.where(inside, da * silu_slope(z), 0.0)
                    dgamma += tl.sum(dz * unit, 0)
                    dbeta += tl.sum(dz, 0)
                    # The norm's gradient, both sums in one reduction with three barriers instead of two with six.
                    d = dz * gamma[None, :]
                    mean, slope = tl.split(tl.sum(tl.join(d, d * unit), 1) * (rstd / C)[:, None])
                    du = d * rstd[:, None] - mean[:, None] - unit * slope[:, None]
                    tl.store(y_ptr + places, du.to(y_ptr.dtype.element_ty), inside)
            above = below + _mixed(w_ptr + 3 * C, before, here, after, offs_c, C)
            below = _mixed(w_ptr + (6 - LAST) * C, before, here, after, offs_c, C)
        if not NORM_SUMS:
            tl.store(sums_ptr + tl.cast(walk, tl.int64) * C + offs_c, sums, in_c)
    if NORM_SUMS:
        sums_ptr += tl.program_id(0) * 2 * C + offs_c
        tl.store(sums_ptr, dgamma, in_c)
        tl.store(sums_ptr + C, dbeta, in_c)
    if STORE and MODE != "backward":
        _zero_tail(y_ptr, owner_ptr, table_ptr, offs_c, P, C, COLUMNS)


@triton.jit
def _sums_kernel(
    walks_ptr, strips_ptr, table_ptr, gate_ptr, y_ptr, C, walks, GATED: tl.constexpr, PER_STRIP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store for each image Σ of its walks / its rows; GATED: Σ · gate (1 - gate), the gradient before the sigmoid."""
    image = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum(tl.load(strips_ptr + image + 1) * PER_STRIP, walks)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(tl.load(strips_ptr + image) * PER_STRIP, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (offs_c < C)[None, :]
        acc += tl.sum(tl.load(walks_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :], inside, other=0.0), 0)
    places = image.to(tl.int64) * C + offs_c
    if GATED:
        gate = tl.load(gate_ptr + places, offs_c < C, other=0.0).to(tl.float32)
        acc = acc * gate * (1 - gate)
    else:
        acc = acc / tl.maximum(tl.load(table_ptr + image * 4 + 1), 1)
    tl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), offs_c < C)


@triton.jit(do_not_specialize=["N", "strips"])
def _taps_kernel(
    a_ptr, du_ptr, table_ptr, strips_ptr, sums_ptr, N, C, strips, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store each program's sums fp32 [9, C] of du[p] · a[neighbour i of p], over its strips and a block of channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // blocks
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    zeros = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    taps = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    total = tl.minimum(tl.load(strips_ptr + N), strips)
    for strip in range(program, total, tl.num_programs(0) // blocks):
        _, first, rows, h, w, top, left = _walk_of(strip, table_ptr, strips_ptr, N, 1, COLUMNS)
        c = left + tl.arange(0, COLUMNS)
        bottom = tl.minimum(top + HEIGHT, h)
        above, here = zeros, zeros  # the rows r - 1 and r of du, zero outside the strip
        for r in range(top - 1, bottom + 1):
            below = _load(du_ptr, first, r + 1, c, tl.minimum(rows, bottom * w), w, offs_c, C)
            sums = ()
            for i in tl.static_range(9):
                du = below if i < 3 else (here if i < 6 else above)
                sums = sums + (taps[i] + du * _load(a_ptr, first, r, c + i % 3 - 1, rows, w, offs_c, C),)
            taps = sums
            above, here = here, below
    sums_ptr += program * 9 * C + offs_c
    for i in tl.static_range(9):
        tl.store(sums_ptr + i * C, tl.sum(taps[i], 0), offs_c < C)


def _strips(P: int, N: int) -> int:
    """Return an upper bound of the strips of N images: one has ⌈h/16⌉·⌈w/4⌉ ≤ h·w/4 + 1 of them."""
    return min(P, P // STRIP_COLUMNS + N)


def _default(columns: int, shape: RowShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose `columns` columns in a walk, 1 beyond 2048 channels, and the warps of a row."""
    warps = min(rows.default(shape, dtype, device).warps, 16)
    narrow = power_of_2(shape.channels) <= 2048
    return Config(rows=columns if narrow else 1, warps=warps, programs=max(1, 8 // warps))


def _legal(registers: int, config: Config, shape: RowShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the kernel fits; registers: those of a thread for each of its values of a row."""
    values = power_of_2(shape.channels) / (device.warp * config.warps)
    few = config.rows <= STRIP_COLUMNS and values * (registers + 6 * config.rows) <= 190
    return few and rows.legal(config, shape, dtype, device)


# tensors, registers of a value, columns of the default, and registers of a value that limit them
WALKS = {
    "value": over_rows("conv_walk_value", 2, 11, True, partial(_default, 2), partial(_legal, 6)),
    "gated": over_rows("conv_walk_gated", 3, 11, True, partial(_default, 2), partial(_legal, 8)),
    "backward": over_rows("conv_walk_backward", 3, 18, True, partial(_default, 1), partial(_legal, 12)),
    "input": over_rows("conv_walk_input", 3, 18, True, partial(_default, 1), partial(_legal, 12)),
}


def _walk(
    mode: str, a: Tensor, dc: Tensor | None, w: Tensor, gamma: Tensor, beta: Tensor, gate: Tensor | None,
    dmean: Tensor | None, geometry: Geometry, store: bool,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Launch a walk; return its result, its sums in fp32, and the number of walks of a strip."""
    (P, C), N = a.shape, len(geometry.table)
    config = config_of(WALKS[mode], a)
    walks = _strips(P, N) * (STRIP_COLUMNS // config.rows)
    grid = programs(walks, config, a)
    y = torch.empty_like(a) if store else a.new_empty(0, C)
    shape = (grid, 2, C) if mode in ("backward", "input") else (walks, C)
    sums = a.new_empty(shape, dtype=torch.float32)
    launch(
        _walk_kernel, grid, a_ptr=a, dc_ptr=dc, w_ptr=w, gamma_ptr=gamma, beta_ptr=beta, gate_ptr=gate,
        dmean_ptr=dmean, **geometry.arguments, y_ptr=y, sums_ptr=sums, P=P, N=N, C=C, walks=walks, MODE=mode,
        STORE=store, PER_STRIP=STRIP_COLUMNS // config.rows, COLUMNS=config.rows, BLOCK_C=power_of_2(C),
        num_warps=config.warps,
    )  # fmt: skip
    return y, sums, STRIP_COLUMNS // config.rows


def _image_sums(sums: Tensor, per_strip: int, gate: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Add the sums of walks [walks, C] by image -> [N, C]."""
    walks, C = sums.shape
    N = len(geometry.table)
    y = sums.new_empty(N, C, dtype=dtype)
    launch(
        _sums_kernel, N * cdiv(C, SUM_COLUMNS), walks_ptr=sums, strips_ptr=geometry.strips, table_ptr=geometry.table,
        gate_ptr=gate, y_ptr=y, C=C, walks=walks, GATED=gate is not None, PER_STRIP=per_strip, ROWS=SUM_ROWS,
        BLOCK_C=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
    return y


def forward(a: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return b [P, C] and its mean by image [N, C], zero for an absent image. w: [9, C]."""
    b, sums, per_strip = _walk("value", a, None, w, gamma, beta, None, None, geometry, True)
    return b, _image_sums(sums, per_strip, None, geometry, a.dtype)


def gated(
    a: Tensor, dc: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, gate: Tensor, geometry: Geometry, store: bool
) -> tuple[Tensor, Tensor]:
    """Return b · gate [P, C] (empty unless `store`), and the gradient [N, C] before the gate's sigmoid."""
    c, sums, per_strip = _walk("gated", a, dc, w, gamma, beta, gate, None, geometry, store)
    return c, _image_sums(sums, per_strip, gate, geometry, a.dtype)


def backward(
    a: Tensor, dc: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, gate: Tensor, dmean: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return du2 [P, C], undefined in rows of no image, and the gradients fp32 [2, C] of gamma and beta."""
    du2, sums, _ = _walk("backward", a, dc, w, gamma, beta, gate, dmean, geometry, True)
    return du2, sums.sum(0)


def input_gradient(
    u: Tensor, du2: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return du1 [P, C], and the gradients fp32 [2, C] of gamma and beta."""
    du1, sums, _ = _walk("input", du2, u, w, gamma, beta, None, None, geometry, True)
    return du1, sums.sum(0)


def taps_gradient(a: Tensor, du2: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient fp32 [9, C] of the nine taps."""
    (P, C), N = a.shape, len(geometry.table)
    strips, block_c = _strips(P, N), min(power_of_2(C), TAP_CHANNELS)
    blocks = cdiv(C, block_c)
    parts = min(strips, cdiv(TAP_PROGRAMS * device_of(a).units, blocks))
    sums = a.new_empty(parts, 9, C, dtype=torch.float32)
    launch(
        _taps_kernel, parts * blocks, a_ptr=a, du_ptr=du2, table_ptr=geometry.table, strips_ptr=geometry.strips,
        sums_ptr=sums, N=N, C=C, strips=strips, COLUMNS=STRIP_COLUMNS, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)
