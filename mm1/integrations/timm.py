"""Use mm1's patch embedding in timm: one kernel projects NaFlexVit's patches of all images and adds positions.

    accelerate(model)
    restore(model)    # undoes it

This covers learned positions, bilinear or bicubic. NaFlexEmbeds itself computes every other call.
Interface: timm 1.0.31, models/naflexvit.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mm1.integrations.swap import FLOATS, Swapped, compute_dtype, missing, plain, restore, swap, weights
from mm1.kernels.patches.embedding import embed_patches
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module) -> list[str]:
    """Swap the NaFlexEmbeds of a model in place; return the names of the swapped modules.

    Call it before the model is sharded or compiled. Calling it again changes nothing. Raises ImportError without timm.
    """
    try:
        import timm.models.naflexvit  # noqa: F401
    except ImportError as error:
        raise missing("timm>=1.0.31", error) from error
    return swap(model, _choose)


def _choose(original: type, module: Any) -> "type[Swapped] | None":
    matches = original.__module__ == "timm.models.naflexvit" and original.__name__ == "NaFlexEmbeds"
    return Embeds if matches and hasattr(module, "pos_embed_align_corners") and _resamples(module) else None


def _resamples(embeds: Any) -> bool:
    """Return whether the positions are F.interpolate's over the whole grid of an image, which the kernel computes."""
    return (
        embeds.pos_embed_type == "learned"
        and embeds.pos_embed_interp_mode in ("bilinear", "bicubic")
        and not embeds.pos_embed_ar_preserving
        and embeds.pos_embed.dtype in FLOATS
    )


class Embeds(Swapped):
    """Replace methods of NaFlexEmbeds."""

    def forward(
        self: Any, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Return embeddings [B, prefix + N, D], and (h, w) for images, None for patches.

        x: images [B, C, H, W], or patches [B, N, ...] with patch_coord [B, N, 2].
        """
        if not self.is_linear:
            patch_coord = None  # a convolution takes only whole images
        if not self.fuses(x, patch_coord is None):
            return super().forward(x, patch_coord=patch_coord, patch_valid=patch_valid)
        size = None
        if patch_coord is None:
            x, size = self.patchify(x)
            h, w = (torch.full(x.shape[:1], side, device=x.device) for side in size)
        else:
            h, w = (patch_coord.amax(1) + 1).unbind(1)
        patches = x.flatten(2)
        if self.norm_input is not None:
            patches = self.norm_input(patches)
        weight, bias = weights(self.proj, compute_dtype(self.proj.weight))
        y = embed_patches(
            patches.flatten(0, 1), _grids(h, w, *x.shape[:2]), weight, bias, self.pos_embed[0], **self.interpolation()
        ).view(*x.shape[:2], weight.shape[0])
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return self.pos_drop(torch.cat([*prefix, y], 1) if prefix else y), size

    def fuses(self: Any, x: Tensor, of_images: bool) -> bool:
        """Return whether the kernel can compute this call."""
        simple = plain(self.proj, nn.Linear if self.is_linear else nn.Conv2d) and plain(self.norm, nn.Identity)
        if not simple or not _resamples(self) or self.proj.weight.dtype not in FLOATS:
            return False
        if of_images:
            return x.ndim == 4 and all(side >= p for side, p in zip(x.shape[2:], self.patch_size))
        # For other patch sizes timm interpolates the weight; grid sampling treats borders differently.
        return not (self.enable_patch_interpolator and x.ndim == 5) and not self.pos_embed_use_grid_sample

    def patchify(self: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the patches [B, N, K] of images [B, C, H, W], in the order of the weight, and their grid (h, w)."""
        from timm.models.naflexvit import batch_patchify

        if not self.is_linear and not self.dynamic_img_pad:  # a convolution ignores a border that fills no patch
            x = x[..., : x.shape[2] // self.patch_size[0] * self.patch_size[0], :]
            x = x[..., : x.shape[3] // self.patch_size[1] * self.patch_size[1]]
        return batch_patchify(x, self.patch_size, self.dynamic_img_pad, self.is_linear and self.channels_last)

    def _apply_learned_naflex_pos_embed(self: Any, x: Tensor, patch_coord: Tensor) -> None:
        """Add positions to x [B, N, D]; timm calls this where the projection is not fused."""
        if not _resamples(self):
            original: Any = super()
            return original._apply_learned_naflex_pos_embed(x, patch_coord)
        h, w = (patch_coord.amax(1) + 1).unbind(1)
        x += positions(self.pos_embed[0], _grids(h, w, *x.shape[:2]), **self.interpolation()).view(x.shape)

    def interpolation(self: Any) -> dict[str, Any]:
        """Return the settings of resampling the positions."""
        return {
            "interpolation": self.pos_embed_interp_mode,
            "antialias": self.pos_embed_antialias,
            "align_corners": self.pos_embed_align_corners,
        }


def _grids(h: Tensor, w: Tensor, images: int, rows: int) -> Grids:
    """Return the grids of images with `rows` rows each. As in timm, row i has the position (i // w, i % w)."""
    first = torch.arange(images, device=h.device) * rows
    return Grids.of_tensors(first, (h * w).clamp(max=rows), h, w, images * rows)
