"""Sum each token's rows over its K slots.

    out[t] = Σ_k weight[t, k] · y[row of slot (t, k)]     over slots that belong to an expert

y [rows, D], weight fp32 [T, K] or None -> [T, D]; in fp32 and in the order of k, so the same bits every time. Reads
T·K·D, writes T·D.
"""

from torch import Tensor

from mm1.kernels.dispatch import cdiv, launch, power_of_2
from mm1.kernels.language import tl, triton


@triton.jit
def _combine_kernel(
    y_ptr, position_ptr, index_ptr, weight_ptr, offsets_ptr, out_ptr, D, E, K: tl.constexpr, SORTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        if SORTED:
            row = tl.load(position_ptr + slot).to(tl.int64)
            valid = row < tl.load(offsets_ptr + E - 1)
        else:
            row = slot
            expert = tl.load(index_ptr + slot)
            valid = (expert >= 0) & (expert < E)
        y = tl.load(y_ptr + row * D + offs, offs < tl.where(valid, D, 0), other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            y *= tl.where(valid, tl.load(weight_ptr + slot), 0.0)
        acc += y
    tl.store(out_ptr + token * D + offs, acc.to(out_ptr.dtype.element_ty), offs < D)


def combine_sorted(y: Tensor, position: Tensor, offsets: Tensor, weight: Tensor | None) -> Tensor:
    """Combine rows y [S, D] sorted by expert: slot (t, k) is row position[t, k], if that is before the last offset."""
    return _combine(y, position.shape, len(offsets), position, None, offsets, weight)


def combine_slots(y: Tensor, index: Tensor, experts: int, weight: Tensor) -> Tensor:
    """Combine rows y [T·K, D] in the order of slots; a slot counts if its index is one of the experts."""
    return _combine(y, index.shape, experts, None, index, None, weight)


def _combine(y, shape, experts, position, index, offsets, weight) -> Tensor:
    (T, K), D = shape, y.shape[1]
    out = y.new_empty(T, D)
    block = min(1024, power_of_2(max(D, 1)))
    launch(
        _combine_kernel, T * cdiv(D, block), y_ptr=y, position_ptr=position, index_ptr=index, weight_ptr=weight,
        offsets_ptr=offsets, out_ptr=out, D=D, E=experts, K=K, SORTED=position is not None,
        HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
