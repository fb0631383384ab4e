"""Specify the family's ops in plain torch, in the dtype of their arguments; in fp64 they are the truth of all tests.

The functions take the arguments of the public ops, and are differentiable. Neighbouring images of one size are computed
as a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.patches.grids import Grids, as_grids
from mm1.kernels.patches.reference import padded, runs


def by_size(
    x: Tensor, sizes: Sequence[tuple[int, int, int]], shape: tuple[int, int], net: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply net to images [n, C, h, w] of runs (n, h, w) of x [P, C]; return `shape`, zeros past the last image."""
    parts, first = [], 0
    for n, h, w in sizes:
        y = net(x[first : first + n * h * w].view(n, h, w, -1).permute(0, 3, 1, 2))
        parts.append(y.flatten(2).transpose(1, 2).flatten(0, 1))
        first += n * h * w
    return padded(parts, shape[0], x.new_zeros(0, shape[1]))


def block(image: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the bottleneck's result for images [n, Cin, h, w] of one size, [n, C, h, w]; weights by timm's names."""

    def normed(x: Tensor, name: str, padding: int = 0, groups: int = 1) -> Tensor:
        y = F.conv2d(x, weights[f"{name}.conv.weight"], padding=padding, groups=groups).permute(0, 2, 3, 1)
        gain, bias = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]
        return F.layer_norm(y, gain.shape, gain, bias).permute(0, 3, 1, 2)

    channels = len(weights["conv1.conv.weight"])
    y = F.silu(normed(F.silu(normed(image, "conv1")), "conv2", padding=1, groups=channels))
    hidden = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), weights["se.fc1.weight"], weights["se.fc1.bias"]))
    y = y * torch.sigmoid(F.conv2d(hidden, weights["se.fc2.weight"], weights["se.fc2.bias"]))
    shortcut = normed(image, "downsample") if "downsample.conv.weight" in weights else image
    return F.silu(normed(y, "conv3") + shortcut)


def conv_block(
    x: Tensor, grids: Grids | Sequence[tuple[int, int]], weights: Mapping[str, Tensor], *,
    pool: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return the block's result for x [P, Cin]: [P, C], or pooled to pool = (oh, ow) places an image, [N·oh·ow, C]."""
    grids = as_grids(grids, x.device)
    shape = grids.patches, len(weights["conv1.conv.weight"])
    y = by_size(x, runs(grids.sizes or ()), shape, lambda image: block(image, weights))
    return y if pool is None else adaptive_pool(y, grids, pool)


def adaptive_pool(x: Tensor, grids: Grids | Sequence[tuple[int, int]], out: tuple[int, int] = (12, 12)) -> Tensor:
    """Return the averages of out = (oh, ow) windows of each image of x [P, C], [N·oh·ow, C]; absent images: zeros."""
    grids = as_grids(grids, x.device)
    shape = grids.images * prod(out), x.shape[1]
    return by_size(x, runs(grids.sizes or ()), shape, lambda image: F.adaptive_avg_pool2d(image, out))
