"""Provide the C-Abstractor's two ops: a convolution block and adaptive pooling, on packed images of any grids."""

from mm1.kernels.abstractor.bottleneck import conv_block
from mm1.kernels.abstractor.pooling import adaptive_pool

__all__ = ["adaptive_pool", "conv_block"]
