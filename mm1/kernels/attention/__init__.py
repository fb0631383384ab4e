"""Attention over packed sequences, and of a few new rows over a paged cache of keys and values."""

from mm1.kernels.attention.paged import paged_attention
from mm1.kernels.attention.varlen import attention

__all__ = ["attention", "paged_attention"]
