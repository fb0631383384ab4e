"""Provide patch embedding of images of any resolution, positions on any grid, and the loss of predicted patches."""

from mm1.kernels.patches.embedding import embed_patches, patch_embed
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.loss import patch_loss
from mm1.kernels.patches.position_tables import positions

__all__ = ["Grids", "embed_patches", "patch_embed", "patch_loss", "positions"]
