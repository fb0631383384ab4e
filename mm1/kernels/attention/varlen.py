"""Compute attention inside each segment of a packed sequence, by any backend.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] / √Dh) v[j, g],   j in i's segment, where the mask lets i see j

q [T, H, Dh], k and v [S, G, Dh], H a multiple of G -> [T, H, Dh]. cu_seqlens cuts the rows into segments. Where a
segment's numbers of queries and keys differ, causal and prefix masks are aligned to its end: the last query has the
place of the last key, and queries before the first key see only a prefix. Rows that see nothing, and rows past the last
segment, are zeros. 4·pairs·H·Dh operations, with the mask's visible pairs (`masks.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm1.kernels.attention.backends import BACKENDS, Inputs, choose_backend, gpu_name, run
from mm1.kernels.attention.cpu import checked_lengths
from mm1.kernels.attention.masks import Causal, Full, Mask, Prefix
from mm1.kernels.dispatch import Cost, autocast_dtype, expect, expect_alike, expect_integers, expect_read
from mm1.kernels.tuning import pinned_or


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Mask,
    cu_seqlens_k: Tensor | None = None,
    used_k: Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return attention of q [T, H, Dh] to k and v [S, G, Dh] inside the segments cu_seqlens int [B + 1]: [T, H, Dh].

    mask: Full(), Causal() or Prefix(lengths int [B]). cu_seqlens_k int [B + 1]: the segments of the keys, where they
    differ from those of the queries. used_k int [B]: the number of valid keys of each segment, for a cache that is not
    full. max_length: an upper bound of a segment's rows, if the host knows one; torch's and flash-attn's kernels launch
    programs for that many rows of every segment; without it, for as many as all rows together. backend: one of
    BACKENDS, or "auto": "segments" on a CPU, the one measured to be fastest on a GPU (backends.choose_backend).

    q, k and v have one dtype, which the result gets; under autocast they are cast to its dtype, except fp64.

    Raises TypeError for a mask that is none of the three and for arguments that are no tensors; ValueError for wrong
    shapes, dtypes and devices, and on a CPU for offsets that decrease or exceed the rows (offsets on a GPU are not
    checked, to avoid a synchronization); ImportError where the backend's package is not installed; RuntimeError for
    gradients of gradients and forward-mode derivatives.
    """
    if not isinstance(mask, (Full, Causal, Prefix)):
        raise TypeError(f"attention: mask is {mask!r}, expected Full(), Causal() or Prefix(lengths)")
    prefix = mask.lengths if isinstance(mask, Prefix) else None
    integers = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "used_k": used_k, "mask.lengths": prefix}
    expect_alike("attention", q=q, k=k, v=v, **integers)
    q, k, v = (x.to(autocast_dtype(x) or x.dtype) for x in (q, k, v))  # as torch's own attention does
    _check(q, k, v, *integers.values())
    expect(backend == "auto" or backend in BACKENDS, "attention", "backend", backend, ("auto", *BACKENDS))
    if prefix is not None:
        # Lengths beyond 32 bits must not wrap around.
        mask = Prefix((prefix.clamp(0, 2**31 - 1) if prefix.dtype == torch.int64 else prefix).int())
    cu_q, cu_k = (x.int() for x in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
    inputs = Inputs(q, k, v, cu_q, cu_k, None if used_k is None else used_k.int(), mask, max_length)
    if backend == "auto":
        backend = pinned_or("attention", lambda: _auto(inputs))
    # "segments" checks the offsets itself, also in compiled code.
    if q.device.type == "cpu" and backend != "segments" and not torch.compiler.is_compiling():
        checked_lengths(cu_q, cu_k, inputs.used_k, q.shape[0], k.shape[0])
    return run(backend, inputs)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, used_k: Tensor | None, prefix: Tensor | None
) -> None:
    op = "attention"
    expect(q.ndim == 3 and k.ndim == 3, op, "q and k", (tuple(q.shape), tuple(k.shape)), "3 dimensions")
    expect(k.shape == v.shape, op, "v", tuple(v.shape), tuple(k.shape))
    expect(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, op, "heads of q", q.shape[1], f"a multiple of {k.shape[1]}")
    expect(q.shape[2] == k.shape[2], op, "head width of k", k.shape[2], q.shape[2])
    expect(cu_k is not None or q.shape[0] == k.shape[0], op, "k", tuple(k.shape), [q.shape[0], "G", "Dh"])
    expect_read(op, "q", q)
    for name, x in (("k", k), ("v", v)):
        expect(x.dtype == q.dtype, op, f"dtype of {name}", x.dtype, f"{q.dtype}, that of q")
    expect_integers(op, "cu_seqlens", cu_q, 1)
    expect(cu_q.shape[0] > 0, op, "cu_seqlens", tuple(cu_q.shape), "[B + 1]")
    B = cu_q.shape[0] - 1
    for name, x, size in (("cu_seqlens_k", cu_k, B + 1), ("used_k", used_k, B), ("mask.lengths", prefix, B)):
        if x is not None:
            expect_integers(op, name, x, 1)
            expect(x.shape[0] == size, op, name, tuple(x.shape), (size,))


def _auto(x: Inputs) -> str:
    """Return the backend that "auto" takes for a call."""
    if x.q.device.type in ("cpu", "meta"):
        return "segments"
    backward = torch.is_grad_enabled() and (x.q.requires_grad or x.k.requires_grad or x.v.requires_grad)
    mask, dtype = type(x.mask).__name__, str(x.q.dtype).removeprefix("torch.")
    return choose_backend(gpu_name(x.q.device.index), x.q.shape[2], mask, dtype, backward, x.used_k is not None)


def cost(
    lengths: Sequence[int], heads: int, kv_heads: int, head_width: int, *, mask: Mask, itemsize: int = 2,
    backward: bool = False,
) -> Cost:  # fmt: skip
    """Return the operations and bytes of segments with these lengths, the same for queries and keys.

    itemsize: bytes of an element. backward: count only the gradients, which are five products (Dao et al. 2022).
    """
    rows = sum(lengths)
    tensors = 4 if backward else 2  # read q, dy, k, v, y; write dq, dk, dv
    return Cost(
        (10 if backward else 4) * mask.pairs(lengths) * heads * head_width,
        tensors * rows * (heads + kv_heads) * head_width * itemsize,
    )
