"""Provide the kernels of conv_block that work row by row on [P, C], and the windows of its pool.

A program keeps whole rows in registers, so that a norm needs no separate pass. Backward recomputes mean and deviation
from the rows that it loads anyway, instead of loading saved ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.kernels.cost_model import Predicted, Rows
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv, device_of, launch, power_of_2
from mm1.kernels.language import tl, triton
from mm1.kernels.patches.grids import image_of, load_image
from mm1.kernels.tuning import Tunable, config_for

EPS = tl.constexpr(1e-5)


@dataclass(frozen=True)
class Config:
    """Hold the rows of a program's step, its warps and, for persistent kernels, the programs of a multiprocessor."""

    rows: int = 2
    warps: int = 4
    programs: int = 4


class RowShape(NamedTuple):
    """Hold the sizes of rows [rows, channels]."""

    rows: int
    channels: int


def legal(config: Config, shape: RowShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the kernel fits.

    A thread has at most 32 values of a tile, so that 8 tiles fit into registers. A multiprocessor has 2048 threads.
    """
    values = config.rows * power_of_2(shape.channels) / (device.warp * config.warps)
    return values <= 32 and config.warps * config.programs * device.warp <= 2048 and config.warps * device.warp <= 1024


def space(shape: RowShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not."""
    return (Config(*axis) for axis in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)))


def default(shape: RowShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose 16 bytes a thread and row: 256 bf16 channels a warp, so that sums over two rows stay in a thread."""
    width = power_of_2(shape.channels)
    warps = min(max(width // 256, 1), 16)
    return Config(rows=2 if width <= 2048 else 1, warps=warps, programs=max(1, 16 // warps))


def over_rows(
    kernel: str, tensors: int, registers: float, walks: bool, default: Any = default, legal: Any = legal
) -> Tunable:
    """Return the Tunable of a kernel that moves `tensors` tensors [rows, channels].

    registers: registers of each element. walks: whether the kernel is persistent, and depends on config.programs.
    """

    def distinct_space(shape: RowShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
        programs = default(shape, dtype, device).programs
        return (c for c in space(shape, dtype, device) if walks or c.programs == programs)

    def work(config: Config, shape: RowShape, dtype: torch.dtype, device: Device) -> Rows:
        return Rows(
            shape.rows, power_of_2(shape.channels), config.rows, tensors, registers, config.warps,
            config.programs if walks else None, dtype.itemsize,
        )  # fmt: skip

    return Tunable(kernel, RowShape, Config, distinct_space, legal, default, Predicted(work), ("channels",))


NORM = over_rows("conv_norm", 2, 2, False)
JOIN = over_rows("conv_join", 3, 4, False)
JOIN_BACKWARD = over_rows("conv_join_backward", 5, 9, True)


def config_of(tunable: Tunable, x: Tensor) -> Config:
    """Return the configuration for rows x [P, C]."""
    return config_for(tunable, RowShape(*x.shape), x.dtype, device_of(x))


def programs(work: int, config: Config, x: Tensor) -> int:
    """Return the number of programs of a persistent kernel."""
    return max(1, min(work, config.programs * device_of(x).units))


@triton.jit
def load_row(ptr, offs_c, C):
    """Load [C] in fp32."""
    return tl.load(ptr + offs_c, offs_c < C, other=0.0).to(tl.float32)


@triton.jit
def load_norms(gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, offs_c, C, DOWN: tl.constexpr):
    """Load gamma and beta [C] of both norms of a block's last step; unless DOWN the shortcut has none."""
    gamma, beta = load_row(gamma_ptr, offs_c, C), load_row(beta_ptr, offs_c, C)
    gamma_x, beta_x = gamma, beta
    if DOWN:
        gamma_x, beta_x = load_row(gamma_x_ptr, offs_c, C), load_row(beta_x_ptr, offs_c, C)
    return gamma, beta, gamma_x, beta_x


@triton.jit
def normalised(u, in_c, C):
    """Return rows of u, zero past C, scaled to mean 0 and variance 1; and 1 / deviation."""
    d = tl.where(in_c, u - (tl.sum(u, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, 1) / C + EPS)
    return d * rstd[:, None], rstd


@triton.jit
def norm_backward(dz, unit, rstd, gamma, C):
    """Return the gradient of the norm's input, from that of unit · gamma + beta."""
    d = dz * gamma[None, :]
    return (d - (tl.sum(d, 1) / C)[:, None] - unit * (tl.sum(d * unit, 1) / C)[:, None]) * rstd[:, None]


@triton.jit
def silu(z):
    """Return z · sigmoid(z)."""
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z):
    """Return the derivative of silu."""
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def window_of(table_ptr, place, OH: tl.constexpr, OW: tl.constexpr):
    """Return the image's first row, rows and w, and the window's top, left, columns and places (0: no image)."""
    image = place // (OH * OW)
    i = place // OW % OH
    j = place % OW
    first, rows, h, w = load_image(table_ptr, image)
    top = i * h // OH
    left = j * w // OW
    columns = tl.cdiv((j + 1) * w, OW) - left
    return first, rows, w, top, left, columns, columns * (tl.cdiv((i + 1) * h, OH) - top)


@triton.jit
def gathered(dy_ptr, image, at, h, w, valid, offs_c, C, OH: tl.constexpr, OW: tl.constexpr):
    """Return the gradient [rows, C] of the places `at` of images, gathered from the windows that contain them."""
    r = at // w
    c = at % w
    top = r * OH // h
    left = c * OW // w
    columns = tl.cdiv((c + 1) * OW, w) - left
    count = tl.where(valid, columns * (tl.cdiv((r + 1) * OH, h) - top), 0)
    total = tl.zeros((at.shape[0], offs_c.shape[0]), tl.float32)
    for k in range(0, tl.max(count, 0)):
        i = top + k // columns
        j = left + k % columns
        size = (tl.cdiv((i + 1) * h, OH) - i * h // OH) * (tl.cdiv((j + 1) * w, OW) - j * w // OW)
        places = ((image * OH + i) * OW + j).to(tl.int64)[:, None] * C + offs_c[None, :]
        dy = tl.load(dy_ptr + places, (k < count)[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
        total += dy * (1.0 / size)[:, None]
    return total


@triton.jit
def _norm_kernel(u_ptr, gamma_ptr, beta_ptr, y_ptr, P, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store y = silu(norm(u))."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    inside = (rows < P)[:, None] & (offs_c < C)[None, :]
    places = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    unit, _ = normalised(tl.load(u_ptr + places, inside, other=0.0).to(tl.float32), (offs_c < C)[None, :], C)
    y = silu(unit * load_row(gamma_ptr, offs_c, C)[None, :] + load_row(beta_ptr, offs_c, C)[None, :])
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _joined(u_ptr, x_ptr, places, inside, norms, in_c, C, DOWN: tl.constexpr):
    """Return norm(u) + shortcut (norm(x) if DOWN, else x), and unit and 1 / deviation of both norms for backward."""
    gamma, beta, gamma_x, beta_x = norms
    unit, rstd = normalised(tl.load(u_ptr + places, inside, other=0.0).to(tl.float32), in_c, C)
    x = tl.load(x_ptr + places, inside, other=0.0).to(tl.float32)
    s = unit * gamma[None, :] + beta[None, :]
    if DOWN:
        unit_x, rstd_x = normalised(x, in_c, C)
        return s + unit_x * gamma_x[None, :] + beta_x[None, :], unit, rstd, unit_x, rstd_x
    else:
        return s + x, unit, rstd, unit, rstd


@triton.jit
def _join_kernel(
    u_ptr, x_ptr, gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, owner_ptr, table_ptr, y_ptr, P, C, DOWN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store y = silu(norm(u) + shortcut), zeros in rows of no image."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    in_c = (offs_c < C)[None, :]
    _, _, _, _, valid = image_of(owner_ptr, table_ptr, rows, P)
    norms = load_norms(gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, offs_c, C, DOWN)
    places = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    s, _, _, _, _ = _joined(u_ptr, x_ptr, places, valid[:, None] & in_c, norms, in_c, C, DOWN)
    y = tl.where(valid[:, None], silu(s), 0.0)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), (rows < P)[:, None] & in_c)


@triton.jit
def _join_pool_kernel(
    u_ptr, x_ptr, gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, table_ptr, y_ptr, C, OH: tl.constexpr,
    OW: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store one place of the pooled result of _join_kernel, which is never stored itself."""
    place = tl.program_id(0)
    first, rows, w, top, left, columns, count = window_of(table_ptr, place, OH, OW)
    offs_c = tl.arange(0, BLOCK_C)
    in_c = (offs_c < C)[None, :]
    norms = load_norms(gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, offs_c, C, DOWN)
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, count, ROWS):
        k = start + tl.arange(0, ROWS)
        at = (top + k // columns) * w + left + k % columns
        valid = (k < count) & (at < rows)
        places = (first + at).to(tl.int64)[:, None] * C + offs_c[None, :]
        s, _, _, _, _ = _joined(u_ptr, x_ptr, places, valid[:, None] & in_c, norms, in_c, C, DOWN)
        acc += tl.where(valid[:, None], silu(s), 0.0)
    y = tl.sum(acc, 0) / tl.maximum(count, 1)
    tl.store(y_ptr + place.to(tl.int64) * C + offs_c, y.to(y_ptr.dtype.element_ty), offs_c < C)


@triton.jit
def _join_backward_kernel(
    dy_ptr, u_ptr, x_ptr, gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, owner_ptr, table_ptr, du_ptr, dx_ptr,
    sums_ptr, P, C, OH: tl.constexpr, OW: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store du, the shortcut's gradient dx, and each program's sums [3, C] for gamma, beta and gamma_x.

    OH > 0: dy is the gradient of the pooled result.
    """
    offs_c = tl.arange(0, BLOCK_C)
    in_c = (offs_c < C)[None, :]
    norms = load_norms(gamma_ptr, beta_ptr, gamma_x_ptr, beta_x_ptr, offs_c, C, DOWN)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    dgamma_x = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(tl.program_id(0) * ROWS, P, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        image, first, h, w, valid = image_of(owner_ptr, table_ptr, rows, P)
        places = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        inside = valid[:, None] & in_c
        if OH > 0:
            dy = gathered(dy_ptr, image, rows - first, h, w, valid, offs_c, C, OH, OW)
        else:
            dy = tl.load(dy_ptr + places, inside, other=0.0).to(tl.float32)
        s, unit, rstd, unit_x, rstd_x = _joined(u_ptr, x_ptr, places, inside, norms, in_c, C, DOWN)
        ds = dy * silu_slope(s)
        dgamma += tl.sum(ds * unit, 0)
        dbeta += tl.sum(ds, 0)
        inside = (rows < P)[:, None] & in_c
        du = norm_backward(ds, unit, rstd, norms[0], C)
        tl.store(du_ptr + places, du.to(du_ptr.dtype.element_ty), inside)
        dx = ds
        if DOWN:
            dgamma_x += tl.sum(ds * unit_x, 0)
            dx = norm_backward(ds, unit_x, rstd_x, norms[2], C)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), inside)
    sums_ptr += tl.program_id(0) * 3 * C + offs_c
    tl.store(sums_ptr, dgamma, offs_c < C)
    tl.store(sums_ptr + C, dbeta, offs_c < C)
    tl.store(sums_ptr + 2 * C, dgamma_x, offs_c < C)


def norm_silu(u: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> Tensor:
    """Store silu(norm(u)) in out, which may be u, and return it."""
    P, C = u.shape
    config = config_of(NORM, u)
    launch(
        _norm_kernel, cdiv(P, config.rows), u_ptr=u, gamma_ptr=gamma, beta_ptr=beta, y_ptr=out, P=P, C=C,
        ROWS=config.rows, BLOCK_C=power_of_2(C), num_warps=config.warps,
    )  # fmt: skip
    return out


def join(
    u: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, gamma_x: Tensor | None, beta_x: Tensor | None,
    table: Tensor, owner: Tensor, pool: tuple[int, int], out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return silu(norm(u) + shortcut): [P, C], in `out` if it is a tensor, or pooled to (oh, ow): [N·oh·ow, C]."""
    P, C = u.shape
    config = config_of(JOIN, u)
    arguments = {
        "u_ptr": u, "x_ptr": shortcut, "gamma_ptr": gamma, "beta_ptr": beta, "gamma_x_ptr": gamma_x,
        "beta_x_ptr": beta_x, "table_ptr": table, "C": C, "DOWN": gamma_x is not None, "ROWS": config.rows,
        "BLOCK_C": power_of_2(C), "num_warps": config.warps,
    }  # fmt: skip
    if pool[0]:
        y = u.new_empty(len(table) * pool[0] * pool[1], C)
        launch(_join_pool_kernel, len(y), y_ptr=y, OH=pool[0], OW=pool[1], **arguments)
        return y
    y = torch.empty_like(u) if out is None else out
    launch(_join_kernel, cdiv(P, config.rows), owner_ptr=owner, y_ptr=y, P=P, **arguments)
    return y


def join_backward(
    dy: Tensor, u: Tensor, shortcut: Tensor, gamma: Tensor, beta: Tensor, gamma_x: Tensor | None,
    beta_x: Tensor | None, table: Tensor, owner: Tensor, pool: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u and shortcut, zeros in rows of no image, and fp32 [3, C] of gamma, beta, gamma_x."""
    P, C = u.shape
    config = config_of(JOIN_BACKWARD, u)
    grid = programs(cdiv(P, config.rows), config, u)
    du, dx = torch.empty_like(u), torch.empty_like(u)
    sums = u.new_empty(grid, 3, C, dtype=torch.float32)
    launch(
        _join_backward_kernel, grid, dy_ptr=dy, u_ptr=u, x_ptr=shortcut, gamma_ptr=gamma, beta_ptr=beta,
        gamma_x_ptr=gamma_x, beta_x_ptr=beta_x, owner_ptr=owner, table_ptr=table, du_ptr=du, dx_ptr=dx, sums_ptr=sums,
        P=P, C=C, OH=pool[0], OW=pool[1], DOWN=gamma_x is not None, ROWS=config.rows, BLOCK_C=power_of_2(C),
        num_warps=config.warps,
    )  # fmt: skip
    return du, dx, sums.sum(0)
