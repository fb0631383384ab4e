"""The engine's functions as plain torch writes them, to be put in their places: same arguments, same results."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.attention import Mask, attention
from mm1.kernels.attention.reference import places
from mm1.kernels.patches.grids import Grids


def batched_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, max_length: int = 0
) -> Tensor:
    """Return torch's dense attention on segments of one length, which fill all rows."""
    length = max_length or len(q) // (len(cu_seqlens) - 1)
    return attention(q, k, v, cu_seqlens, mask=mask, max_length=length, backend="sdpa")


class MaskedAttention:
    """Torch's causal attention over all pairs of rows, with a mask that is made once for all layers of a step."""

    seen: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask) -> Tensor:
        if self.seen is None:
            segment = places(cu_seqlens, len(q))[0]
            self.seen = (segment[:, None] == segment[None]).tril()
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.seen, enable_gqa=grouped)[0].transpose(0, 1)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, max_length: int) -> Tensor:
    """Return torch's full attention with each segment padded to max_length, and a mask of the padding."""
    segments = len(cu_seqlens) - 1
    segment, place = places(cu_seqlens, len(q))
    inside = torch.arange(len(q), device=q.device) < cu_seqlens[-1]
    at = torch.where(inside, segment * max_length + place, segments * max_length)
    # A segment without rows sees one of zeros: softmax of nothing is NaN.
    seen = torch.arange(max_length, device=q.device) < cu_seqlens.diff().clamp(min=1)[:, None]
    q, k, v = (
        x.new_zeros(segments * max_length + 1, *x.shape[1:]).index_copy(0, at, x)[:-1].unflatten(0, (segments, -1))
        for x in (q, k, v)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, seen[:, None, None])
    return F.pad(y.transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, 1)).index_select(0, at)


def patch_embed(
    pixels, grids: Grids, weight, bias, table, *, patch_size: int, mean, std, interpolation: str
) -> tuple[Tensor, Tensor]:
    """A convolution and resampled positions for each size."""
    p, (mean, std) = patch_size, (torch.tensor(v, device=pixels.device) for v in (mean, std))
    kernel = weight.view(-1, p, p, 3).permute(0, 3, 1, 2)
    tokens = []
    for first, n, h, w in _present(grids):
        x = pixels[first * p * p : (first + n * h * w) * p * p].view(n, h * p, w * p, 3)
        y = F.conv2d(((x / 255 - mean) / std).permute(0, 3, 1, 2), kernel, bias, stride=p)
        place = F.interpolate(table.permute(2, 0, 1)[None], (h, w), mode=interpolation, antialias=True)
        tokens.append((y + place).flatten(2).transpose(1, 2).flatten(0, 1))
    return _filled(tokens, weight.new_empty(grids.patches, len(weight))), grids.cu_seqlens


def conv_block(x: Tensor, grids: Grids, weights: dict[str, Tensor], *, pool: tuple[int, int] | None = None) -> Tensor:
    """Convolutions for each size."""
    channels, parts = len(weights["conv1.conv.weight"]), []
    for first, n, h, w in _sizes(grids):
        y = block(x[first : first + n * h * w].view(n, h, w, -1).permute(0, 3, 1, 2), weights)
        y = y if pool is None else F.adaptive_avg_pool2d(y, pool)
        parts.append(y.flatten(2).transpose(1, 2).flatten(0, 1))
    rows = grids.patches if pool is None else grids.images * math.prod(pool)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return _filled(parts, x.new_empty(rows, channels, dtype=dtype))


def block(image: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """One bottleneck of the C-Abstractor on images [N, C, h, w] of one size."""

    def normed(x: Tensor, name: str, padding: int = 0, groups: int = 1) -> Tensor:
        y = F.conv2d(x, weights[f"{name}.conv.weight"], padding=padding, groups=groups).permute(0, 2, 3, 1)
        gain, bias = weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"]
        return F.layer_norm(y, gain.shape, gain, bias).permute(0, 3, 1, 2)

    channels = len(weights["conv1.conv.weight"])
    y = F.silu(normed(F.silu(normed(image, "conv1")), "conv2", padding=1, groups=channels))
    gate = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), weights["se.fc1.weight"], weights["se.fc1.bias"]))
    y = y * torch.sigmoid(F.conv2d(gate, weights["se.fc2.weight"], weights["se.fc2.bias"]))
    shortcut = normed(image, "downsample") if "downsample.conv.weight" in weights else image
    return F.silu(normed(y, "conv3") + shortcut)


def _present(grids: Grids) -> list[tuple[int, int, int, int]]:
    """First row, number, h and w of images of one size side by side."""
    runs, first, sizes = [], 0, grids.sizes or ()
    for size in dict.fromkeys(sizes):
        n = sizes.count(size)
        runs.append((first, n, *size))
        first += n * math.prod(size)
    return runs


def _sizes(grids: Grids) -> list[tuple[int, int, int, int]]:
    """The same; with the absent ones if all are equal, so that every batch is of one shape."""
    if grids.sizes is None:  # after the pool
        side = math.isqrt(grids.patches // grids.images)
        return [(0, grids.images, side, side)]
    same = len(set(grids.sizes)) == 1 and grids.patches == grids.images * math.prod(grids.sizes[0])
    return [(0, grids.images, *grids.sizes[0])] if same else _present(grids)


def _filled(parts: list[Tensor], like: Tensor) -> Tensor:
    """The parts, and zeros up to as many rows as `like`, in its dtype."""
    absent = like.new_zeros(len(like) - sum(map(len, parts)), like.shape[1])
    return torch.cat([*(part.to(like.dtype) for part in parts), absent])
