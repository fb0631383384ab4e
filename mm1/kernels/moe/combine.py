"""Sum each token's rows over its K slots.

    out[t] = Σ_k weight[t, k] · y[row of slot (t, k)]     over slots that belong to an expert

y [rows, D], weight fp32 [T, K] or None -> [T, D]. Sums are computed in fp32 and in the order of k, so every run gives
the same bits. Reads T·K·D elements, writes T·D.
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


def combine(
    y: Tensor, slots: Tensor, weight: Tensor | None, *, offsets: Tensor | None = None, experts: int = 0
) -> Tensor:
    """Return the sums of y's rows over each token's slots, [T, D].

    With offsets int32 [E], y [S, D] is sorted by expert, and slots int32 [T, K] are rows of y; a slot counts if its row
    is before the last offset. Without offsets, y [T·K, D] is in the order of slots, and slots int [T, K] are experts; a
    slot counts if its expert is in 0 … experts - 1.
    """
    (T, K), D = slots.shape, y.shape[1]
    position, index, experts = (None, slots, experts) if offsets is None else (slots, None, len(offsets))
    out = y.new_empty(T, D)
    block = min(1024, power_of_2(max(D, 1)))
    launch(
        _combine_kernel, T * cdiv(D, block), y_ptr=y, position_ptr=position, index_ptr=index, weight_ptr=weight,
        offsets_ptr=offsets, out_ptr=out, D=D, E=experts, K=K, SORTED=index is None, HAS_WEIGHT=weight is not None,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
