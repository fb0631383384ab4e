"""Compute one RegNet bottleneck of the C-Abstractor on packed images of any grids, channels last.

    a = silu(norm1(W1 x))                          1×1                                                  u1 = W1 x
    b = silu(norm2(depthwise3x3(a)))               zero halo at each image's own border
    c = b · sigmoid(F2 silu(F1 mean(b) + c1) + c2) squeeze-excite, the mean over each image's own patches
    y = silu(norm3(W3 c) + shortcut(x))            1×1; shortcut: identity, or 1×1 and norm where the width changes

x [P, Cin] -> y [P, C], or y pooled as adaptive_pool does, in which case y itself is never written. norm is LayerNorm
over channels, eps 1e-5. About 4·P·C² operations, 8 backward.

Forward moves 11 tensors of P·C elements (eager torch: 24): each product of cuBLAS 2, the third applies the gate as it
loads (gate.py); norm1 2; depthwise with norm2 and the sums for the mean 2 (depthwise.py); the end 3. Saved for
backward are x, u1, W3 c and tensors of N rows; statistics, a and b are computed again. Backward moves 25:
    ds, du3      5   from dy, W3 c, x            dc = du3 W3        2       a again         2
    b · gate     3   from a, dc; dgate           dW3 = du3ᵀ c       2       du2             3   from a, dc
    du1          3   from du2, u1; dW2           dx = du1 W1 + ds   3       dW1 = du1ᵀ x    2
Source: Cha et al. 2024 (Honeybee), section 3.2; Radosavovic et al. 2020 (RegNet); the block is that of timm's RegStage.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.abstractor import cpu as conv_cpu
from mm1.kernels.abstractor import depthwise as conv_depthwise
from mm1.kernels.abstractor import rows as conv_rows
from mm1.kernels.abstractor.depthwise import Geometry
from mm1.kernels.abstractor.gate import gated_mm
from mm1.kernels.dispatch import (
    Cost,
    autocast_dtype,
    expect,
    expect_alike,
    expect_float,
    expect_read,
    on_cpu,
    refuse_second_order,
)
from mm1.kernels.patches.grids import Grids, as_grids

NAMES = (
    "conv1.conv.weight", "conv1.bn.weight", "conv1.bn.bias", "conv2.conv.weight", "conv2.bn.weight", "conv2.bn.bias",
    "se.fc1.weight", "se.fc1.bias", "se.fc2.weight", "se.fc2.bias", "conv3.conv.weight", "conv3.bn.weight",
    "conv3.bn.bias", "downsample.conv.weight", "downsample.bn.weight", "downsample.bn.bias",
)  # fmt: skip
REQUIRED = len(NAMES) - 3  # the last three belong to a convolved shortcut


class Weights(NamedTuple):
    """Holds the weights in the order of NAMES; convolutions are matrices, depthwise [C, 9]."""

    w1: Tensor
    g1: Tensor
    b1: Tensor
    w2: Tensor
    g2: Tensor
    b2: Tensor
    f1: Tensor
    c1: Tensor
    f2: Tensor
    c2: Tensor
    w3: Tensor
    g3: Tensor
    b3: Tensor
    wd: Tensor | None = None
    gd: Tensor | None = None
    bd: Tensor | None = None


class Saved(NamedTuple):
    """Holds what forward saves for backward beside its arguments; all are empty without `keep`."""

    u1: Tensor  # [P, C], W1 x
    u3: Tensor  # [P, C], W3 c
    v: Tensor  # [P, C], Wd x; empty without a convolved shortcut
    gate: Tensor  # [N, C]
    hidden: Tensor  # [N, S], before its silu
    mean: Tensor  # [N, C]


def forward(
    x: Tensor, geometry: Sequence[Tensor], weights: Sequence[Tensor], pool: Sequence[int], keep: bool
) -> list[Tensor]:
    """Return y and the six tensors of Saved.

    geometry: table, owner and strips of Grids. weights: 13, or 16 with a convolved shortcut, as in Weights. pool:
    (oh, ow), or (0, 0) for none.
    """
    w, (table, owner, _), (oh, ow) = Weights(*weights), geometry, pool
    P, C, N = len(x), len(w.w1), len(table)
    if P == 0 or N == 0:
        y = x.new_zeros(N * oh * ow if oh else P, C)
        return [y, *(x.new_zeros(s) for s in saved_shapes(P, N, C, len(w.f1), w.wd is not None, keep))]
    at, w2 = Geometry(*geometry), w.w2.t().to(x.dtype).contiguous()
    u1 = torch.mm(x, w.w1.t())
    a = conv_rows.norm_silu(u1, w.g1, w.b1, torch.empty_like(u1) if keep else u1)
    b, mean = conv_depthwise.forward(a, w2, w.g2, w.b2, at)
    hidden = torch.addmm(w.c1, mean, w.f1.t())
    gate = torch.sigmoid(torch.addmm(w.c2, F.silu(hidden), w.f2.t()))
    u3 = gated_mm(b, gate, owner, w.w3)
    v = x.new_empty(0) if w.wd is None else torch.mm(x, w.wd.t())
    norms, shortcut = (w.g3, w.b3, w.gd, w.bd), x if w.wd is None else v
    y = conv_rows.join(u3, shortcut, *norms, table, owner, (oh, ow), None if keep else u3)
    return [y, *(Saved(u1, u3, v, gate, hidden, mean) if keep else (x.new_empty(0) for _ in Saved._fields))]


def saved_shapes(P: int, N: int, C: int, S: int, down: bool, keep: bool) -> list[tuple[int, ...]]:
    """Return the shapes of forward's results after y."""
    if not keep:
        return [(0,)] * len(Saved._fields)
    return [(P, C), (P, C), (P, C) if down else (0,), (N, C), (N, S), (N, C)]


def backward(
    dy: Tensor, x: Tensor, saved: Sequence[Tensor], geometry: Sequence[Tensor], weights: Sequence[Tensor],
    pool: Sequence[int], need_x: bool, need_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x and of all weights, empty ones where they are not needed."""
    w, s, (table, owner, _) = Weights(*weights), Saved(*saved), geometry
    if len(x) == 0 or len(table) == 0:
        return [g.zero_() for g in empty_gradients(x, weights, need_x, need_weights)]
    at, w2 = Geometry(*geometry), w.w2.t().to(x.dtype).contiguous()
    norms, shortcut = (w.g3, w.b3, w.gd, w.bd), x if w.wd is None else s.v
    du3, dshortcut, sums3 = conv_rows.join_backward(
        dy.contiguous(), s.u3, shortcut, *norms, table, owner, (pool[0], pool[1])
    )
    dc = torch.mm(du3, w.w3)
    a = conv_rows.norm_silu(s.u1, w.g1, w.b1, torch.empty_like(s.u1))
    c, dz = conv_depthwise.gated(a, dc, w2, w.g2, w.b2, s.gate, at, need_weights)
    dhidden = torch.ops.aten.silu_backward(torch.mm(dz, w.f2), s.hidden)
    du2, sums2 = conv_depthwise.backward(a, dc, w2, w.g2, w.b2, s.gate, torch.mm(dhidden, w.f1), at)
    du1, sums1 = conv_depthwise.unwalk(s.u1, du2, w2, w.g1, w.b1, at)
    dx = x.new_empty(0)
    if need_x:
        dx = dshortcut.addmm_(du1, w.w1) if w.wd is None else torch.mm(du1, w.w1).addmm_(dshortcut, w.wd)
    if not need_weights:
        return [dx, *(x.new_empty(0) for _ in weights)]
    grads = [
        torch.mm(du1.t(), x), sums1[9], sums1[10], sums1[:9].t(), *sums2, torch.mm(dhidden.t(), s.mean),
        dhidden.sum(0), torch.mm(dz.t(), F.silu(s.hidden)), dz.sum(0), torch.mm(du3.t(), c), sums3[0], sums3[1],
        *(() if w.wd is None else (torch.mm(dshortcut.t(), x), sums3[2], sums3[1])),
    ]  # fmt: skip
    # Copies: contiguous, each in its weight's dtype, no two in the same memory.
    copies = [torch.empty(p.shape, dtype=p.dtype, device=p.device).copy_(g) for g, p in zip(grads, weights)]
    return [dx, *copies]


def empty_gradients(x: Tensor, weights: Sequence[Tensor], need_x: bool, need_weights: bool) -> list[Tensor]:
    """Allocate what backward returns."""
    return [
        x.new_empty(x.shape if need_x else 0),
        *(w.new_empty(w.shape) if need_weights else x.new_empty(0) for w in weights),
    ]


_forward = torch.library.custom_op("mm1::conv_block", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::conv_block_backward", backward, mutates_args=())
on_cpu(_forward, conv_cpu.forward)
on_cpu(_backward, conv_cpu.backward)


@_forward.register_fake
def _(x, geometry, weights, pool, keep):
    w, (oh, ow) = Weights(*weights), pool
    P, C, N = x.shape[0], w.w1.shape[0], geometry[0].shape[0]
    shapes = saved_shapes(P, N, C, w.f1.shape[0], w.wd is not None, keep)
    return [x.new_empty(N * oh * ow if oh else P, C), *(x.new_empty(shape) for shape in shapes)]


@_backward.register_fake
def _(dy, x, saved, geometry, weights, pool, need_x, need_weights):
    return empty_gradients(x, weights, need_x, need_weights)


def _save(ctx, inputs, output):
    x, geometry, weights, ctx.pool, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], *geometry, *weights)


def _gradients(ctx, grads: Sequence[Tensor]):
    need_x, _, need_weight, *_ = ctx.needs_input_grad
    x, *tensors = ctx.saved_tensors
    saved, geometry, weights = tensors[:6], tensors[6:9], tensors[9:]
    dx, *dw = _backward(grads[0], x, saved, geometry, weights, ctx.pool, need_x, any(need_weight))
    dw = dw if any(need_weight) else [None] * len(weights)
    return dx if need_x else None, [None] * 3, dw, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "conv_block")


def conv_block(
    x: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    weights: Mapping[str, Tensor],
    *,
    pool: tuple[int, int] | None = None,
) -> Tensor:
    """Return the block's result for x [P, Cin]: [P, C], or pooled to pool = (oh, ow) places an image, [N·oh·ow, C].

    grids: the images' (h, w), or Grids; all h·w patches of each image must be in x. Rows of no image give zeros; x must
    be finite there. weights: by timm's names, `conv1.conv.weight` [C, Cin, 1, 1] … `downsample.bn.bias` [C]; without
    those of downsample the shortcut is x. x and the weights of products are of one dtype, fp32, bf16 or fp16, on a CPU
    also fp64; under autocast they are cast to its dtype. Norms and the depthwise weight may be of any float dtype. x
    and all weights have gradients. Raises ValueError for other shapes, dtypes or devices, naming the argument.
    """
    expect_alike("conv_block", x=x, **{name: weights.get(name) for name in NAMES})
    grids = as_grids(grids, x.device)
    missing = [name for name in NAMES[:REQUIRED] if name not in weights]
    if any(name in weights for name in NAMES[REQUIRED:]):
        missing += [name for name in NAMES[REQUIRED:] if name not in weights]
    expect(not missing, "conv_block", "weights", f"without {missing}", "all of timm's names")
    _check(x, grids, weights, pool)
    dtype = autocast_dtype(x) or x.dtype
    tensors = []
    for name in NAMES:
        if name in weights:
            w = weights[name].flatten(1) if weights[name].ndim == 4 else weights[name]
            multiplies = (".conv." in name or ".fc" in name) and "conv2" not in name
            tensors.append((w.to(dtype) if multiplies else w).contiguous())
    x = x.to(dtype).contiguous()
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    return _forward(x, [grids.table, grids.owner, grids.strips], tensors, pool or (0, 0), keep)[0]


def _check(x: Tensor, grids: Grids, weights: Mapping[str, Tensor], pool: tuple[int, int] | None) -> None:
    first = weights["conv1.conv.weight"]
    C, width, squeezed = first.shape[0], first.shape[1], weights["se.fc1.weight"].shape[0]
    expect(tuple(x.shape) == (grids.patches, width), "conv_block", "x", tuple(x.shape), (grids.patches, width))
    expect_float("conv_block", "x", x)
    expect(grids.merge == 1, "conv_block", "merge of grids", grids.merge, 1)
    expect(pool is None or min(pool) > 0, "conv_block", "pool", pool, "positive sides")
    down = NAMES[REQUIRED] in weights
    expect(down or width == C, "conv_block", "width of x without downsample", width, C)
    shapes = {
        "conv1.conv.weight": (C, width, 1, 1), "conv2.conv.weight": (C, 1, 3, 3), "se.fc1.weight": (squeezed, C, 1, 1),
        "se.fc1.bias": (squeezed,), "se.fc2.weight": (C, squeezed, 1, 1), "conv3.conv.weight": (C, C, 1, 1),
        "downsample.conv.weight": (C, width, 1, 1),
    }  # fmt: skip
    for name in NAMES if down else NAMES[:REQUIRED]:
        w, shape = weights[name], shapes.get(name, (C,))
        expect(tuple(w.shape) == shape, "conv_block", name, tuple(w.shape), shape)
        expect_read("conv_block", name, w)
        if name in shapes and name != "conv2.conv.weight" and not autocast_dtype(x):
            expect(w.dtype == x.dtype, "conv_block", f"dtype of {name}", w.dtype, x.dtype)


def cost(patches: int, images: int, width_in: int, width: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of one block; backward: of the gradients alone.

    Bytes are those of x, y and the weights, the least that any implementation moves.
    """
    squeeze = round(0.25 * width_in)
    gemm = patches * width_in * width + patches * width * width + images * 2 * width * squeeze
    if width_in != width:
        gemm += patches * width_in * width
    weights = width_in * width + width * width + 9 * width + 2 * width * squeeze
    flops, moved = 2 * gemm + 18 * patches * width, (patches * (width_in + width) + weights) * itemsize
    return Cost(2 * flops, moved + (patches * width_in + weights) * itemsize) if backward else Cost(flops, moved)
