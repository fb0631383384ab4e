"""Call mm1_grouped_gemm from JAX: `xla_ffi.py libmm1_xla.so`. The exit status is 77 without JAX or without a GPU."""

import ctypes
import sys

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    sys.exit(77)


def grouped_gemm(a, b, offsets, workspace: int):
    """Return the grouped product [M, N] of a [M, K], b [E, K, N] and offsets int32 [E]. workspace: bytes."""
    y = jax.ShapeDtypeStruct((a.shape[0], b.shape[2]), a.dtype)
    call = jax.ffi.ffi_call("mm1_grouped_gemm", (y, jax.ShapeDtypeStruct((workspace,), jnp.uint8)))
    return call(a, b, offsets)[0]


library = ctypes.CDLL(sys.argv[1])
jax.ffi.register_ffi_target("mm1_grouped_gemm", jax.ffi.pycapsule(library.mm1_xla_grouped_gemm), platform="CUDA")
M, E, K, N = 200, 4, 64, 48
library.mm1_grouped_gemm_workspace.restype = ctypes.c_size_t
workspace = library.mm1_grouped_gemm_workspace(ctypes.c_int64(M), ctypes.c_int64(E))
a = (jnp.arange(M * K) * 7 % 11 - 5).reshape(M, K).astype(jnp.bfloat16)
b = (jnp.arange(E * K * N) * 5 % 13 - 6).reshape(E, K, N).astype(jnp.bfloat16)
offsets = jnp.array([30, 30, 170, 190], jnp.int32)
lowered = jax.jit(grouped_gemm, static_argnums=3).trace(a, b, offsets, workspace).lower(lowering_platforms=("cuda",))
assert "mm1_grouped_gemm" in lowered.as_text()
if jax.default_backend() != "gpu":
    sys.exit(77)
y = jax.jit(grouped_gemm, static_argnums=3)(a, b, offsets, workspace)
expert = jnp.searchsorted(offsets, jnp.arange(M), side="right")
truth = jnp.einsum("mk,mkn->mn", a, b[jnp.minimum(expert, E - 1)], preferred_element_type=jnp.float32)
truth = jnp.where((expert < E)[:, None], truth, 0).astype(jnp.bfloat16)
assert (y == truth).all(), jnp.abs(y - truth).max()
