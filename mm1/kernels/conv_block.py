"""One RegNet bottleneck of the C-Abstractor on packed images of any grids, channels last.

    a = silu(norm1(W1 x))                          1×1
    b = silu(norm2(depthwise3x3(a)))               zero halo at each image's own border
    c = b · sigmoid(U2 silu(U1 mean(b) + u1) + u2) squeeze-excite, the mean over each image's own patches
    y = silu(norm3(W3 c) + shortcut(x))            1×1; shortcut: identity, or 1×1 and norm where the width changes

x [P, Cin] -> y [P, C]. norm is LayerNorm over channels, eps 1e-5. About 4·P·C² operations. Source: Cha et al. 2024
(Honeybee), section 3.2; Radosavovic et al. 2020 (RegNet); the block is that of timm's RegStage.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect
from mm1.kernels.grids import Grids, as_grids

EPS = 1e-5


def conv_block(x: Tensor, grids: "Grids | Sequence[tuple[int, int]]", weights: Mapping[str, Tensor]) -> Tensor:
    """x [P, Cin] -> [P, C]. weights: timm's names, `conv1.conv.weight` [C, Cin, 1, 1] … `downsample.bn.bias` [C]."""
    grids = as_grids(grids)
    width = weights["conv1.conv.weight"].shape[1]
    expect(x.shape == (grids.patches, width), "conv_block", "x", tuple(x.shape), (grids.patches, width))
    return reference(
        x, grids.neighbours(x.device), grids.membership(x.device), grids.areas(x.device), weights
    )  # tensors alone from here on, so that a compiled caller sees constant shapes


def reference(
    x: Tensor, neighbours: Tensor, membership: Tensor, areas: Tensor, weights: Mapping[str, Tensor]
) -> Tensor:
    """The block over tensors alone; neighbours [9, P], membership [P, N], areas [N] as Grids makes them."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)

    def conv1x1(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"].flatten(1), bias)

    a = F.silu(norm(conv1x1(x, "conv1.conv"), "conv1.bn"))
    b = depthwise(a, weights["conv2.conv.weight"].flatten(1).t().contiguous(), neighbours)
    b = F.silu(norm(b, "conv2.bn"))
    mean = (membership.t().to(b.dtype) @ b) / areas[:, None].to(b.dtype)  # (N, C)
    squeezed = F.silu(conv1x1(mean, "se.fc1", weights["se.fc1.bias"]))
    gate = torch.sigmoid(conv1x1(squeezed, "se.fc2", weights["se.fc2.bias"]))
    c = b * (membership.to(b.dtype) @ gate)
    y = norm(conv1x1(c, "conv3.conv"), "conv3.bn")
    if "downsample.conv.weight" in weights:
        x = norm(conv1x1(x, "downsample.conv"), "downsample.bn")
    return F.silu(y + x)


@torch.library.custom_op("mm1::depthwise3x3", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    """Depthwise 3×3: x [P, C], weight [9, C], neighbours int64 [9, P] (P = outside) -> [P, C].

    An op of its own because its gradient is the same op with the window turned round: a gather, where autograd
    would scatter with atomics.
    """
    padded = F.pad(x, (0, 0, 0, 1))
    out = padded[neighbours[0]].mul_(weight[0])
    for tap in range(1, 9):
        out.addcmul_(padded.index_select(0, neighbours[tap]), weight[tap])
    return out


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mm1::depthwise3x3_dw", mutates_args=())
def depthwise_dw(x: Tensor, dy: Tensor, neighbours: Tensor) -> Tensor:
    """Gradient of the weight [9, C]."""
    padded = F.pad(x, (0, 0, 0, 1))
    return torch.stack([(padded.index_select(0, taps) * dy).sum(0) for taps in neighbours])


@depthwise_dw.register_fake
def _(x: Tensor, dy: Tensor, neighbours: Tensor) -> Tensor:
    return x.new_empty(9, x.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    x, weight, neighbours = ctx.saved_tensors
    dy = dy.contiguous()
    dx = depthwise(dy, weight.flip(0), neighbours) if ctx.needs_input_grad[0] else None
    dw = depthwise_dw(x, dy, neighbours) if ctx.needs_input_grad[1] else None
    return dx, dw, None


depthwise.register_autograd(_backward, setup_context=_save)


def cost(patches: int, images: int, width_in: int, width: int, *, itemsize: int = 2) -> Cost:
    squeeze = round(0.25 * width_in)
    gemm = patches * width_in * width + patches * width * width + images * 2 * width * squeeze
    if width_in != width:
        gemm += patches * width_in * width
    weights = width_in * width + width * width + 9 * width + 2 * width * squeeze
    return Cost(2 * gemm + 18 * patches * width, (patches * (width_in + width) + weights) * itemsize)
