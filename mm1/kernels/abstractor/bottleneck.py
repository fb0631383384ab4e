"""One RegNet bottleneck of the C-Abstractor on packed images of any grids, channels last.

    a = silu(norm1(W1 x))                          1×1                                                  u1 = W1 x
    b = silu(norm2(depthwise3x3(a)))               zero halo at each image's own border
    c = b · sigmoid(F2 silu(F1 mean(b) + c1) + c2) squeeze-excite, the mean over each image's own patches
    y = silu(norm3(W3 c) + shortcut(x))            1×1; shortcut: identity, or 1×1 and norm where the width changes

x [P, Cin] -> y [P, C], or pooled as adaptive_pool does, when y itself is never written. norm is LayerNorm over
channels, eps 1e-5. About 4·P·C² operations, 8 backward.

Forward moves 11 tensors of P·C elements (eager: 24): the products are cuBLAS's 2 each, the third with the gate in its
loads (conv_gate.py); norm1 2; depthwise with norm2 and the sums for the mean 2 (conv_depthwise.py); the end 3. Kept
are x, u1, W3 c and tensors of N rows; statistics, a and b are computed again. Backward, 25:
    ds, du3      5   from dy, W3 c, x            dc = du3 W3        2       a again         2
    b · gate     3   from a, dc; dgate           dW3 = du3ᵀ c       2       du2             3   from a, dc
    du1          3   from du2, u1; dW2           dx = du1 W1 + ds   3       dW1 = du1ᵀ x    2
Source: Cha et al. 2024 (Honeybee), section 3.2; Radosavovic et al. 2020 (RegNet); the block is that of timm's RegStage.
"""

from collections.abc import Mapping, Sequence

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
REQUIRED = len(NAMES) - 3  # without those of a convolved shortcut


def forward(
    x: Tensor, table: Tensor, owner: Tensor, strips: Tensor, w1: Tensor, g1: Tensor, b1: Tensor, w2: Tensor,
    g2: Tensor, b2: Tensor, f1: Tensor, c1: Tensor, f2: Tensor, c2: Tensor, w3: Tensor, g3: Tensor, b3: Tensor,
    wd: Tensor | None, gd: Tensor | None, bd: Tensor | None, oh: int, ow: int, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, and with `keep` u1, u3 = W3 c, v = Wd x, gate [N, C], hidden [N, S], mean [N, C] (else empty)."""
    P, C, N = len(x), len(w1), len(table)
    if P == 0 or N == 0:
        y = x.new_zeros(N * oh * ow if oh else P, C)
        return [y, *(x.new_zeros(s) for s in kept(P, N, C, len(f1), wd is not None, keep))]
    geometry, w2 = Geometry(table, owner, strips), w2.t().to(x.dtype).contiguous()
    u1 = torch.mm(x, w1.t())
    a = conv_rows.norm_silu(u1, g1, b1, torch.empty_like(u1) if keep else u1)
    b, mean = conv_depthwise.forward(a, w2, g2, b2, geometry)
    hidden = torch.addmm(c1, mean, f1.t())
    gate = torch.sigmoid(torch.addmm(c2, F.silu(hidden), f2.t()))
    u3 = gated_mm(b, gate, owner, w3)
    v = x.new_empty(0) if wd is None else torch.mm(x, wd.t())
    y = conv_rows.join(u3, x if wd is None else v, g3, b3, gd, bd, table, owner, (oh, ow), None if keep else u3)
    return [y, *((u1, u3, v, gate, hidden, mean) if keep else (x.new_empty(0) for _ in range(6)))]


def kept(P: int, N: int, C: int, S: int, down: bool, keep: bool) -> list[tuple[int, ...]]:
    """Shapes of what forward returns after y."""
    if not keep:
        return [(0,)] * 6
    return [(P, C), (P, C), (P, C) if down else (0,), (N, C), (N, S), (N, C)]


def backward(
    dy: Tensor, x: Tensor, u1: Tensor, u3: Tensor, v: Tensor, gate: Tensor, hidden: Tensor, mean: Tensor,
    table: Tensor, owner: Tensor, strips: Tensor, w1: Tensor, g1: Tensor, b1: Tensor, w2: Tensor, g2: Tensor,
    b2: Tensor, f1: Tensor, c1: Tensor, f2: Tensor, c2: Tensor, w3: Tensor, g3: Tensor, b3: Tensor,
    wd: Tensor | None, gd: Tensor | None, bd: Tensor | None, oh: int, ow: int, inputs: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x (with `inputs`) and of the 16 weights (with `weights`), else empty."""
    given = (w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd)
    if len(x) == 0 or len(table) == 0:
        return [g.zero_() for g in gradients_of(x, given, inputs, weights)]
    geometry, w2 = Geometry(table, owner, strips), w2.t().to(x.dtype).contiguous()
    shortcut = x if wd is None else v
    du3, dshortcut, sums3 = conv_rows.join_backward(
        dy.contiguous(), u3, shortcut, g3, b3, gd, bd, table, owner, (oh, ow)
    )
    dc = torch.mm(du3, w3)
    a = conv_rows.norm_silu(u1, g1, b1, torch.empty_like(u1))
    c, dz = conv_depthwise.gated(a, dc, w2, g2, b2, gate, geometry, weights)
    dhidden = torch.ops.aten.silu_backward(torch.mm(dz, f2), hidden)
    du2, sums2 = conv_depthwise.backward(a, dc, w2, g2, b2, gate, torch.mm(dhidden, f1), geometry)
    du1, sums1 = conv_depthwise.unwalk(u1, du2, w2, g1, b1, geometry)
    dx = x.new_empty(0)
    if inputs:
        dx = dshortcut.addmm_(du1, w1) if wd is None else torch.mm(du1, w1).addmm_(dshortcut, wd)
    if not weights:
        return [dx, *(x.new_empty(0) for _ in given)]
    grads = [
        torch.mm(du1.t(), x), sums1[9], sums1[10], sums1[:9].t(), *sums2, torch.mm(dhidden.t(), mean), dhidden.sum(0),
        torch.mm(dz.t(), F.silu(hidden)), dz.sum(0), torch.mm(du3.t(), c), sums3[0], sums3[1],
        *(() if wd is None else (torch.mm(dshortcut.t(), x), sums3[2], sums3[1])),
    ]  # fmt: skip
    return [dx, *settled(grads, given)]


def settled(grads: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor]:
    """Each gradient in its weight's type, contiguous, no two the same memory; empty where there is no weight."""
    some = [w for w in given if w is not None]
    settled = [torch.empty(w.shape, dtype=w.dtype, device=w.device).copy_(g) for g, w in zip(grads, some)]
    return settled + [some[0].new_empty(0) for _ in range(len(given) - len(some))]


def gradients_of(x: Tensor, given: Sequence[Tensor | None], inputs: bool, weights: bool) -> list[Tensor]:
    """Room for what backward returns."""
    return [
        x.new_empty(x.shape if inputs else 0),
        *(x.new_empty(0) if w is None or not weights else w.new_empty(w.shape) for w in given),
    ]


_forward = torch.library.custom_op("mm1::conv_block", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::conv_block_backward", backward, mutates_args=())
on_cpu(_forward, conv_cpu.forward)
on_cpu(_backward, conv_cpu.backward)


@_forward.register_fake
def _(x, table, owner, strips, w1, g1, b1, w2, g2, b2, f1, c1, f2, c2, w3, g3, b3, wd, gd, bd, oh, ow, keep):
    P, C, N = x.shape[0], w1.shape[0], table.shape[0]
    shapes = kept(P, N, C, f1.shape[0], wd is not None, keep)
    return [x.new_empty(N * oh * ow if oh else P, C), *(x.new_empty(shape) for shape in shapes)]


@_backward.register_fake
def _(dy, x, u1, u3, v, gate, hidden, mean, table, owner, strips, *rest):
    *given, _, _, inputs, weights = rest
    return gradients_of(x, given, inputs, weights)


def _save(ctx, inputs, output):
    x, *others, ctx.oh, ctx.ow, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], *others)


def _gradients(ctx, grads: Sequence[Tensor]):
    weights = any(ctx.needs_input_grad[4:20])
    x, *saved = ctx.saved_tensors
    dx, *dw = _backward(grads[0], x, *saved, ctx.oh, ctx.ow, ctx.needs_input_grad[0], weights)
    dw = [d if weights and w is not None else None for d, w in zip(dw, saved[9:])]
    return dx if ctx.needs_input_grad[0] else None, None, None, None, *dw, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "conv_block")


def conv_block(
    x: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    weights: Mapping[str, Tensor],
    *,
    pool: tuple[int, int] | None = None,
) -> Tensor:
    """x [P, Cin] -> [P, C], zeros in rows of no image (where x may hold anything finite); with pool = (oh, ow) what
    adaptive_pool makes of it, [N·oh·ow, C].

    weights: timm's names, `conv1.conv.weight` [C, Cin, 1, 1] … `downsample.bn.bias` [C]; without those of downsample
    the shortcut is x. Under autocast x and the weights of products are cast to its dtype; norms and the depthwise
    weight may be of any float. Images must be whole: all h·w patches of each are there.
    """
    expect_alike("conv_block", x=x, **{name: weights.get(name) for name in NAMES})
    grids = as_grids(grids, x.device)
    missing = [name for name in NAMES[:REQUIRED] if name not in weights]
    if any(name in weights for name in NAMES[REQUIRED:]):
        missing += [name for name in NAMES[REQUIRED:] if name not in weights]
    expect(not missing, "conv_block", "weights", f"without {missing}", "all of timm's names")
    _check(x, grids, weights, pool)
    dtype = autocast_dtype(x) or x.dtype
    given = []
    for name in NAMES:
        w = weights.get(name)
        if w is not None and w.ndim == 4:
            w = w.flatten(1)
        if w is not None and (".conv." in name or ".fc" in name) and "conv2" not in name:
            w = w.to(dtype)
        given.append(w if w is None else w.contiguous())
    x = x.to(dtype).contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given))
    return _forward(x, grids.table, grids.owner, grids.strips, *given, *(pool or (0, 0)), keep)[0]


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
    """Bytes are those of x, y and the weights: the least any implementation moves. backward: of the gradients alone."""
    squeeze = round(0.25 * width_in)
    gemm = patches * width_in * width + patches * width * width + images * 2 * width * squeeze
    if width_in != width:
        gemm += patches * width_in * width
    weights = width_in * width + width * width + 9 * width + 2 * width * squeeze
    flops, moved = 2 * gemm + 18 * patches * width, (patches * (width_in + width) + weights) * itemsize
    return Cost(2 * flops, moved + (patches * width_in + weights) * itemsize) if backward else Cost(flops, moved)
