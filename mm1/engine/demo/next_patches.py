"""Predict patches of images with AIM: each from the true ones before it, or from its own predictions before it.

AIM predicts normalised pixels, (patch - mean) / √(variance + 1e-6), and says nothing about a patch's mean and variance.
Pictures of predictions therefore take both from the true patch. Images here are of one size, uint8 [N, H, W, 3], and
patches are predicted row by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.engine.models.aim import AIM
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.reference import cut

EPS = 1e-6


@torch.no_grad()
def predicted(model: AIM, images: Tensor, prefix: int) -> Tensor:
    """Return the normalised patches fp32 [N, K, 3·patch²] that are predicted from the true ones before them.

    prefix: patches that see each other, from 1 to K - 1; these have no prediction, and are 0.
    """
    pixels, grids = _packed(model, images)
    count, (h, w) = len(images), (grids.sizes or ())[0]
    rows = torch.arange(count * h * w, device=pixels.device).view(count, h * w)[:, prefix - 1 : -1]
    lengths = torch.full((count,), prefix, dtype=torch.int32, device=pixels.device)
    features = model.features(pixels, grids, lengths)[rows.flatten()]
    values = model.head.output(model.head(features, grids, rows.flatten())).float()
    return F.pad(values.view(count, h * w - prefix, -1), (0, 0, prefix, 0))


def normalised(model: AIM, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised patches fp32 [N, K, 3·patch²] of images, and what was subtracted and divided by."""
    c, (pixels, grids) = model.config.vision, _packed(model, images)
    patches = cut(pixels, grids, c.patch, c.mean, c.std).unflatten(0, (len(images), -1))
    mean, scale = patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + EPS).sqrt()
    return (patches - mean) / scale, mean, scale


def losses(model: AIM, images: Tensor) -> Tensor:
    """Return the mean loss fp32 [K - 1] of the second patch to the last, each predicted from all true ones before."""
    errors = predicted(model, images, 1) - normalised(model, images)[0]
    return errors.square().mean((0, 2))[1:]


def reconstructed(model: AIM, images: Tensor) -> Tensor:
    """Return images of predictions, each patch from the true ones before it; the first patch is the true one."""
    truth, mean, scale = normalised(model, images)
    values = predicted(model, images, 1)
    values[:, 0] = truth[:, 0]
    return _drawn(model, images, values * scale + mean)


def completed(model: AIM, images: Tensor, prefix: int) -> Tensor:
    """Return images whose patches after the first `prefix` are predicted from these and from predictions alone."""
    _, mean, scale = normalised(model, images)
    result = images.clone()
    for patch in range(prefix, mean.shape[1]):
        # Later patches do not matter to this one: the mask is causal behind the prefix.
        values = predicted(model, result, prefix) * scale + mean
        drawn = _drawn(model, images, values)
        side, columns = model.config.vision.patch, images.shape[2] // model.config.vision.patch
        top, left = patch // columns * side, patch % columns * side
        area = slice(None), slice(top, top + side), slice(left, left + side)
        result[area] = drawn[area]
    return result


def _packed(model: AIM, images: Tensor) -> tuple[Tensor, Grids]:
    count, height, width, _ = images.shape
    patch = model.config.vision.patch
    return images.reshape(-1, 3), Grids([(height // patch, width // patch)] * count).to(images.device)


def _drawn(model: AIM, images: Tensor, patches: Tensor) -> Tensor:
    """Return patches [N, K, 3·patch²] of pixels that are normalised as the model's as images uint8."""
    c, (count, height, width, _) = model.config.vision, images.shape
    p = c.patch
    x = patches.view(count, height // p, width // p, p, p, 3).transpose(2, 3).reshape(images.shape)
    x = 255 * (x * x.new_tensor(c.std) + x.new_tensor(c.mean))
    return x.round().clamp(0, 255).to(torch.uint8)
