"""Provide mixture-of-experts ops: routing, grouped matrix products, and the whole gated MLP."""

from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.grouped import grouped_gemm, grouped_gemm_dw
from mm1.kernels.moe.routing import Routing, route

__all__ = ["Routing", "grouped_gemm", "grouped_gemm_dw", "moe_mlp", "route"]
