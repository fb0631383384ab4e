"""Patch embedding of images of different sizes in one packed batch.

    tokens[p] = W · (pixels of patch p / 255 - mean) / std + b + resample(table, grid of p's image)[place of p]

uint8 or float pixels [ΣHW, 3] -> tokens [P, Dv], K = p·p·3 values a patch in (row, column, channel) order. Reads ΣHW·3
pixels, the weight and the table once, writes P·Dv; 2·P·K·Dv operations.
Source: Dosovitskiy et al. 2021 (ViT), section 3.1 and 3.2 (resampled positions).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect
from mm1.kernels.grids import Grids, as_grids

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", None)


def patch_embed(
    pixels: Tensor | Sequence[Tensor],
    sizes: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Embed the patches of N images.

    pixels: list of uint8 or float [H, W, 3], or one packed [ΣHW, 3]. sizes: host list of (H, W) in pixels, or the Grids
    of the batch. weight [Dv, p·p·3], bias [Dv], pos_embed [Gh, Gw, Dv]. uint8 pixels are divided by 255; mean and
    std, one value a channel, are those of the result. Returns tokens [P, Dv] and cu_seqlens int32 [N+1].
    """
    p = patch_size
    if isinstance(sizes, Grids):
        grids = sizes
    else:
        for height, width in sizes:
            expect(height % p == 0 and width % p == 0, "patch_embed", "sizes", (height, width), f"multiples of {p}")
        grids = Grids([(height // p, width // p) for height, width in sizes])
    if not isinstance(pixels, Tensor):
        shapes = [tuple(image.shape) for image in pixels]
        wanted = [(h * p, w * p, 3) for h, w in grids.sizes]
        expect(shapes == wanted, "patch_embed", "pixels", shapes, wanted)
        rows = [image.reshape(-1, 3) for image in pixels]
        pixels = torch.cat(rows) if rows else weight.new_zeros(0, 3)
    expect(
        pixels.shape == (grids.used * p * p, 3), "patch_embed", "pixels", tuple(pixels.shape), (grids.used * p * p, 3)
    )
    patches = _cut(pixels, grids, p).to(weight.dtype)
    if pixels.dtype == torch.uint8:
        patches = patches / 255
    if mean is not None or std is not None:
        shift = torch.tensor(mean or (0.0,) * 3, dtype=patches.dtype, device=patches.device)
        scale = torch.tensor(std or (1.0,) * 3, dtype=patches.dtype, device=patches.device)
        patches = ((patches.view(-1, p * p, 3) - shift) / scale).view(-1, p * p * 3)
    patches = F.pad(patches, (0, 0, 0, grids.patches - grids.used))
    tokens = embed_patches(
        patches,
        grids,
        weight,
        bias,
        pos_embed,
        interpolation=interpolation,
        antialias=antialias,
        align_corners=align_corners,
    )
    return tokens, grids.cu_seqlens(tokens.device)


def embed_patches(
    patches: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """The same for patches [P, p·p·3] that are already cut. Returns tokens [P, Dv]."""
    grids = as_grids(grids)
    expect(patches.ndim == 2 and patches.shape[0] == grids.patches, "embed_patches", "patches",
           tuple(patches.shape), f"[{grids.patches}, p·p·3]")  # fmt: skip
    expect(weight.ndim == 2 and weight.shape[1] == patches.shape[1], "embed_patches", "weight",
           tuple(weight.shape), f"[Dv, {patches.shape[1]}]")  # fmt: skip
    expect(interpolation in INTERPOLATIONS, "embed_patches", "interpolation", interpolation, INTERPOLATIONS)
    tokens = F.linear(patches, weight, bias)
    if pos_embed is None or interpolation is None:
        return tokens
    return tokens + positions(pos_embed, grids, interpolation, antialias, align_corners).to(tokens.dtype)


def positions(table: Tensor, grids: Grids, interpolation: str, antialias: bool, align_corners: bool) -> Tensor:
    """Table [Gh, Gw, Dv] resampled to each image's grid -> [P, Dv], zeros in padding rows.

    Resampling is linear and separable, so one small matrix an axis does what F.interpolate does; equal grids share.
    """
    rows, columns, _ = table.shape
    matrix = resample_matrix if torch.compiler.is_compiling() else _kept_matrix
    resampled = {}
    for h, w in dict.fromkeys(grids.sizes):
        vertical = matrix(rows, h, interpolation, antialias, align_corners).to(table)
        horizontal = matrix(columns, w, interpolation, antialias, align_corners).to(table)
        resampled[h, w] = torch.einsum("hr,rcd,wc->hwd", vertical, table, horizontal).reshape(h * w, -1)
    if not resampled:
        return 0 * table.sum() + table.new_zeros(grids.patches, table.shape[2])  # a zero gradient, not none
    padding = table.new_zeros(grids.patches - grids.used, table.shape[2])
    return torch.cat([*(resampled[size] for size in grids.sizes), padding])


def resample_matrix(size: int, out: int, mode: str, antialias: bool, align_corners: bool) -> Tensor:
    """fp32 [out, size]: what F.interpolate does along one axis, read off by giving it the identity."""
    options = {} if mode == "nearest" else {"align_corners": align_corners, "antialias": antialias}
    identity = torch.eye(size, device="cpu")[None, None]
    return F.interpolate(identity, (out, size), mode=mode, **options)[0, 0]


@lru_cache(maxsize=4096)
def _kept_matrix(*arguments) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return resample_matrix(*arguments)


def _cut(pixels: Tensor, grids: Grids, p: int) -> Tensor:
    """Packed pixels [ΣHW, 3] -> patches [used, p·p·3]."""
    images = pixels.split([h * w * p * p for h, w in grids.sizes])
    cut = [
        image.view(h, p, w, p, 3).transpose(1, 2).reshape(h * w, p * p * 3)
        for image, (h, w) in zip(images, grids.sizes)
    ]
    return torch.cat(cut) if cut else pixels.new_zeros(0, p * p * 3)


def cost(patches: int, width: int, patch_size: int, *, table: int = 0, itemsize: int = 2) -> Cost:
    """table: entries Gh·Gw of the position table. Forward, uint8 pixels."""
    k = patch_size**2 * 3
    return Cost(2 * patches * k * width, patches * k + (k * width + table * width + patches * width) * itemsize)
