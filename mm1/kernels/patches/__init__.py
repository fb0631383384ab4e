"""Provide patch embedding of images of any resolution, and positional tables resampled to any grid."""

from mm1.kernels.patches.embedding import embed_patches, patch_embed
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions

__all__ = ["Grids", "embed_patches", "patch_embed", "positions"]
