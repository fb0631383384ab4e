"""Compute one RegNet bottleneck of the C-Abstractor on packed images of any grids, channels last.

    a = silu(norm1(W1 x))                          1×1                                                  u1 = W1 x
    b = silu(norm2(depthwise3x3(a)))               zero halo at each image's own border
    c = b · sigmoid(F2 silu(F1 mean(b) + c1) + c2) squeeze-excite, the mean over each image's own patches
    y = silu(norm3(W3 c) + shortcut(x))            1×1; shortcut: identity, or 1×1 and norm where the width changes

x [P, Cin] -> y [P, C], or y pooled as by adaptive_pool, in which case y itself is never stored. norm is LayerNorm over
channels, eps 1e-5. About 4·P·C² operations forward, 8·P·C² backward.

Forward moves 11 tensors of P·C elements (eager torch: 24): 2 in each product of cuBLAS, of which the third applies the
gate as it loads (gate.py); 2 in norm1; 2 in the depthwise convolution with norm2 and the sums for the mean
(depthwise.py); 3 in the last step. x, u1, W3 c and tensors of N rows are saved for backward, which recomputes the
statistics, a and b, and moves 27 tensors:
    ds, du3      5   from dy, W3 c, x            dc = du3 W3        2       a again         2
    b · gate     3   from a, dc; dgate           dW3 = du3ᵀ c       2       du2             3   from a, dc
    du1          3   from du2, u1                dx = du1 W1 + ds   3       dW1 = du1ᵀ x    2
    dW2          2   from du2, a
Source: Cha et al. 2024 (Honeybee), section 3.2; Radosavovic et al. 2020 (RegNet); the block is that of timm's RegStage.
"""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.abstractor import cpu, depthwise, rows
from mm1.kernels.abstractor.depthwise import Geometry
from mm1.kernels.abstractor.gate import gated_mm
from mm1.kernels.dispatch import (
    Cost,
    autocast_dtype,
    custom_op,
    expect,
    expect_alike,
    expect_float,
    expect_read,
    refuse_second_order,
)
from mm1.kernels.patches.grids import Grids, as_grids

NAMES = (
    "conv1.conv.weight", "conv1.bn.weight", "conv1.bn.bias", "conv2.conv.weight", "conv2.bn.weight", "conv2.bn.bias",
    "se.fc1.weight", "se.fc1.bias", "se.fc2.weight", "se.fc2.bias", "conv3.conv.weight", "conv3.bn.weight",
    "conv3.bn.bias", "downsample.conv.weight", "downsample.bn.weight", "downsample.bn.bias",
)  # fmt: skip
REQUIRED = len(NAMES) - 3  # the last three are those of a convolved shortcut
# Tensors in the order of NAMES; convolutions are matrices, the depthwise one [C, 9].
Weights = namedtuple("Weights", "w1 g1 b1 w2 g2 b2 f1 c1 f2 c2 w3 g3 b3 wd gd bd", defaults=(None, None, None))


class Saved(NamedTuple):
    """Hold the tensors that forward saves for backward besides its arguments; all are empty without `keep`."""

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

    geometry: table, owner and strips of Grids. weights: those of Weights, 13, or 16 with a convolved shortcut. pool:
    (oh, ow), or (0, 0) for none.
    """
    w, (table, owner, _) = Weights(*weights), geometry
    if len(x) == 0 or len(table) == 0:
        return [result.zero_() for result in _empty_results(x, geometry, weights, pool, keep)]
    at, w2 = Geometry(*geometry), w.w2.t().to(x.dtype).contiguous()
    u1 = torch.mm(x, w.w1.t())
    a = rows.norm_silu(u1, w.g1, w.b1, torch.empty_like(u1) if keep else u1)
    b, mean = depthwise.forward(a, w2, w.g2, w.b2, at)
    hidden = torch.addmm(w.c1, mean, w.f1.t())
    gate = torch.sigmoid(torch.addmm(w.c2, F.silu(hidden), w.f2.t()))
    u3 = gated_mm(b, gate, owner, w.w3)
    v = x.new_empty(0) if w.wd is None else torch.mm(x, w.wd.t())
    norms, shortcut = (w.g3, w.b3, w.gd, w.bd), x if w.wd is None else v
    y = rows.join(u3, shortcut, *norms, table, owner, (pool[0], pool[1]), None if keep else u3)
    return [y, *(Saved(u1, u3, v, gate, hidden, mean) if keep else (x.new_empty(0) for _ in Saved._fields))]


def backward(
    dy: Tensor, x: Tensor, saved: Sequence[Tensor], geometry: Sequence[Tensor], weights: Sequence[Tensor],
    pool: Sequence[int], need_x: bool, need_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x and of all weights, empty ones where they are not needed."""
    w, s, (table, owner, _) = Weights(*weights), Saved(*saved), geometry
    if len(x) == 0 or len(table) == 0:
        empty = _empty_gradients(dy, x, saved, geometry, weights, pool, need_x, need_weights)
        return [gradient.zero_() for gradient in empty]
    at, w2 = Geometry(*geometry), w.w2.t().to(x.dtype).contiguous()
    norms, shortcut = (w.g3, w.b3, w.gd, w.bd), x if w.wd is None else s.v
    du3, dshortcut, sums3 = rows.join_backward(
        dy.contiguous(), s.u3, shortcut, *norms, table, owner, (pool[0], pool[1])
    )
    dc = torch.mm(du3, w.w3)
    a = rows.norm_silu(s.u1, w.g1, w.b1, torch.empty_like(s.u1))
    c, dz = depthwise.gated(a, dc, w2, w.g2, w.b2, s.gate, at, need_weights)
    dhidden = torch.ops.aten.silu_backward(torch.mm(dz, w.f2), s.hidden)
    du2, sums2 = depthwise.backward(a, dc, w2, w.g2, w.b2, s.gate, torch.mm(dhidden, w.f1), at)
    du1, sums1 = depthwise.input_gradient(s.u1, du2, w2, w.g1, w.b1, at)
    dx = x.new_empty(0)
    if need_x:
        dx = dshortcut.addmm_(du1, w.w1) if w.wd is None else torch.mm(du1, w.w1).addmm_(dshortcut, w.wd)
    if not need_weights:
        return [dx, *(x.new_empty(0) for _ in weights)]
    grads = [
        torch.mm(du1.t(), x), *sums1, depthwise.taps_gradient(a, du2, at).t(), *sums2, torch.mm(dhidden.t(), s.mean),
        dhidden.sum(0), torch.mm(dz.t(), F.silu(s.hidden)), dz.sum(0), torch.mm(du3.t(), c), sums3[0], sums3[1],
        *(() if w.wd is None else (torch.mm(dshortcut.t(), x), sums3[2], sums3[1])),
    ]  # fmt: skip
    # Copy: results must be contiguous, in the dtypes of the weights, and not share memory.
    copies = [torch.empty(p.shape, dtype=p.dtype, device=p.device).copy_(g) for g, p in zip(grads, weights)]
    return [dx, *copies]


def _empty_results(x, geometry, weights, pool, keep):
    w, (oh, ow) = Weights(*weights), pool
    P, C, N, S = x.shape[0], w.w1.shape[0], geometry[0].shape[0], w.f1.shape[0]
    saved = ((P, C), (P, C), (P, C) if w.wd is not None else (0,), (N, C), (N, S), (N, C)) if keep else [(0,)] * 6
    return [x.new_empty(shape) for shape in ((N * oh * ow if oh else P, C), *saved)]


def _empty_gradients(dy, x, saved, geometry, weights, pool, need_x, need_weights):
    gradients = (w.new_empty(w.shape) if need_weights else x.new_empty(0) for w in weights)
    return [x.new_empty(x.shape if need_x else 0), *gradients]


_forward = custom_op("conv_block", forward, cpu.forward)
_backward = custom_op("conv_block_backward", backward, cpu.backward)
_forward.register_fake(_empty_results)
_backward.register_fake(_empty_gradients)


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
    those of downsample the shortcut is x. x and the weights of products have one dtype, fp32, bf16 or fp16, on a CPU
    also fp64; under autocast they are cast to its dtype. Norms and the depthwise weight may have any float dtype. x and
    all weights have gradients. Raises ValueError with the argument's name for other shapes, dtypes or devices, and
    TypeError for arguments that are no tensors.
    """
    expect_alike("conv_block", x=x, **{name: weights.get(name) for name in NAMES})
    grids = as_grids(grids, x.device)
    names = NAMES if any(name in weights for name in NAMES[REQUIRED:]) else NAMES[:REQUIRED]
    missing = [name for name in names if name not in weights]
    expect(not missing, "conv_block", "weights", f"without {missing}", "all of timm's names")
    weights = {name: weights[name] for name in names}
    _check(x, grids, weights, pool)
    dtype = autocast_dtype(x) or x.dtype
    tensors = []
    for name, w in weights.items():
        w = w.flatten(1) if w.ndim == 4 else w
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
    expect(len(weights) > REQUIRED or width == C, "conv_block", "width of x without downsample", width, C)
    shapes = {
        "conv1.conv.weight": (C, width, 1, 1), "conv2.conv.weight": (C, 1, 3, 3), "se.fc1.weight": (squeezed, C, 1, 1),
        "se.fc1.bias": (squeezed,), "se.fc2.weight": (C, squeezed, 1, 1), "conv3.conv.weight": (C, C, 1, 1),
        "downsample.conv.weight": (C, width, 1, 1),
    }  # fmt: skip
    for name, w in weights.items():
        shape = shapes.get(name, (C,))
        expect(tuple(w.shape) == shape, "conv_block", name, tuple(w.shape), shape)
        expect_read("conv_block", name, w)
        if name in shapes and name != "conv2.conv.weight" and not autocast_dtype(x):
            expect(w.dtype == x.dtype, "conv_block", f"dtype of {name}", w.dtype, x.dtype)


def cost(patches: int, images: int, width_in: int, width: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of one block; backward: that of the gradients.

    The bytes are those of x, y and the weights, the least that any implementation moves.
    """
    squeeze = round(0.25 * width_in)
    gemm = patches * width_in * width + patches * width * width + images * 2 * width * squeeze
    if width_in != width:
        gemm += patches * width_in * width
    weights = width_in * width + width * width + 9 * width + 2 * width * squeeze
    flops, moved = 2 * gemm + 18 * patches * width, (patches * (width_in + width) + weights) * itemsize
    return Cost(2 * flops, moved + (patches * width_in + weights) * itemsize) if backward else Cost(flops, moved)
