"""One matrix product an expert, over rows sorted by expert.

    y[r] = a[r] · b[e]   for rows r of expert e: offsets[e-1] ≤ r < offsets[e];  y[r] = 0 past the last offset
    dw[e] = a[rows of e]ᵀ · dy[rows of e],  exact zeros for an expert without rows

a [M, K], b [E, K, N] of any strides (so that both layouts of a weight are views) -> y [M, N]. 2·M·K·N operations.
What runs is the reference, a product for each expert that has rows; on a GPU it waits for the offsets.
"""

import torch
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [M, K], b [E, K, N], offsets int32 [E] (end of each expert's rows, on the device) -> [M, N]."""
    expect(
        a.ndim == 2 and b.ndim == 3, "grouped_gemm", "a and b", (tuple(a.shape), tuple(b.shape)), "[M, K], [E, K, N]"
    )
    expect(a.shape[1] == b.shape[1], "grouped_gemm", "b", tuple(b.shape), f"[E, {a.shape[1]}, N]")
    expect(offsets.shape == (b.shape[0],), "grouped_gemm", "offsets", tuple(offsets.shape), (b.shape[0],))
    expect(a.dtype == b.dtype, "grouped_gemm", "dtype of b", b.dtype, a.dtype)
    return _forward(a, b, offsets)


def grouped_gemm_dw(a: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """a [M, K], dy [M, N], offsets int32 [E] -> [E, K, N]."""
    expect(a.shape[0] == dy.shape[0], "grouped_gemm_dw", "dy", tuple(dy.shape), f"[{a.shape[0]}, N]")
    return _dw(a, dy, offsets)


@torch.library.custom_op("mm1::grouped_gemm", mutates_args=())
def _forward(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(a[start:end], b[expert], out=out[start:end])
        start = end
    out[start:].zero_()
    return out


@_forward.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("mm1::grouped_gemm_dw", mutates_args=())
def _dw(a: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_empty(offsets.shape[0], a.shape[1], dy.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        torch.mm(a[start:end].t(), dy[start:end], out=out[expert])  # of no rows: zeros
        start = end
    return out


@_dw.register_fake
def _(a: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[1], dy.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    a, b, offsets = ctx.saved_tensors
    da = _forward(dy, b.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    db = _dw(a, dy, offsets) if ctx.needs_input_grad[1] else None
    return da, db, None


def _backward_dw(ctx, dw: Tensor):
    a, dy, offsets = ctx.saved_tensors
    da = _forward(dy, dw.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    ddy = _forward(a, dw, offsets) if ctx.needs_input_grad[1] else None
    return da, ddy, None


_forward.register_autograd(_backward, setup_context=_save)
_dw.register_autograd(_backward_dw, setup_context=_save)


def cost(rows: int, experts: int, k: int, n: int, *, itemsize: int = 2) -> Cost:
    """experts: those with at least one row, whose weights must be read."""
    return Cost(2 * rows * k * n, (rows * (k + n) + experts * k * n) * itemsize)
