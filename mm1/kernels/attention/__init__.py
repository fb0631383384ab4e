"""Provide attention over packed sequences under a mask, and of new rows over a paged cache of keys and values."""

from mm1.kernels.attention.masks import Causal, Full, Mask, Prefix
from mm1.kernels.attention.paged import paged_attention
from mm1.kernels.attention.varlen import attention

__all__ = ["Causal", "Full", "Mask", "Prefix", "attention", "paged_attention"]
