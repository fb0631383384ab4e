"""Route tokens to experts, and sort their slots by expert.

    p = softmax(logits);  choice = the k largest logits, ties to the lower expert;  weight = p[choice] (/ their sum)
    load balance = E · Σ_e f_e · mean(p_e),  f_e the fraction of tokens whose first choice is e (before capacity)
    z            = mean(logsumexp(logits)²)
    order        = the T·K slots t·K + k sorted by expert: a stable counting sort

Forward and backward read logits [T, E] once each; the sort reads T·K indices twice and writes 2·T·K.
Sources: Shazeer et al. 2017; GShard (Lepikhin et al. 2021), section 2.2 and algorithm 1 for capacity; ST-MoE (Zoph et
al. 2022), equation 5 for z. MM1 weights the losses 0.01 and 0.001.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    cdiv,
    custom_op,
    expect,
    expect_alike,
    expect_integers,
    expect_read,
    expect_tensor,
    launch,
    power_of_2,
    refuse_second_order,
    strides,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.moe.reference import Chosen, choose_experts, masked

MAX_K, MAX_EXPERTS = 16, 512
SORT_BLOCK = 128  # slots that a program compares with each other at once, in registers
SORT_PROGRAMS = 128  # programs of a sort, each of which reads the counts of all


class Order(NamedTuple):
    """Hold the T·K slots sorted by expert; slots of no expert come last."""

    slots: Tensor  # int32 [T·K], the slot t·K + k of each row
    position: Tensor  # int32 [T, K], the row of each slot
    offsets: Tensor  # int32 [E], the end of each expert's rows


class Routing(NamedTuple):
    """Hold the experts of each token, their weights, the slots sorted by expert, and the auxiliary losses."""

    # The field hides tuple.index, which nobody calls.
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 [T, K], E where the slot is dropped or the token masked
    weight: Tensor  # fp32 [T, K]
    order: Order
    load_balance: Tensor  # fp32 []
    z_loss: Tensor  # fp32 []
    dropped: Tensor  # int64 [], slots over capacity

    @property
    def offsets(self) -> Tensor:
        """Return the end of each expert's rows, int32 [E]."""
        return self.order.offsets


@triton.jit
def _softmax(logits_ptr, stride_t, stride_e, rows, counted, E, BLOCK_E: tl.constexpr):
    """Return logits, softmax (0 past E) and logsumexp of these rows; a masked row counts as a row of zeros."""
    e = tl.arange(0, BLOCK_E)
    inside = (counted > 0)[:, None] & (e < E)[None, :]
    places = rows.to(tl.int64)[:, None] * stride_t + e[None, :] * stride_e
    logits = tl.load(logits_ptr + places, inside, other=0.0).to(tl.float32)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    exp = tl.exp(logits - top[:, None])
    total = tl.sum(exp, 1)
    return logits, exp / total[:, None], top + tl.log(total)


@triton.jit
def _counted(mask_ptr, rows, T, HAS_MASK: tl.constexpr):
    """Return 1.0 for rows of tokens that are not masked, else 0.0."""
    if HAS_MASK:
        return tl.load(mask_ptr + rows, rows < T, other=0).to(tl.float32)
    else:
        return (rows < T).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits_ptr, mask_ptr, choice_ptr, weight_ptr, sums_ptr, stride_t, stride_e, T, E, K: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store choice and weight [T, K], and the program's sums [2E + 1] of first choices, probabilities and lse².

    sums_ptr None: store no sums, and masked tokens have choice E and weight 0.
    """
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, BLOCK_K)
    counted = _counted(mask_ptr, rows, T, HAS_MASK)
    logits, probability, lse = _softmax(logits_ptr, stride_t, stride_e, rows, counted, E, BLOCK_E)

    # One integer holds value and expert, so that one maximum finds both, and the lower expert of equal values: its high
    # bits are the float's in two's complement order, its low bits BLOCK_E - 1 - e. 0.0 and -0.0 are one value.
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    lowest = -0x7FFFFFFFFFFFFFFF
    keys = tl.where((e < E)[None, :], bits * (1 << 32) + (BLOCK_E - 1 - e)[None, :], lowest)
    choices = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    first = tl.zeros((BLOCK_T,), tl.int32)
    for k in tl.static_range(K):
        choice = (BLOCK_E - 1 - (tl.max(keys, 1) & 0xFFFFFFFF)).to(tl.int32)
        if k == 0:
            first = choice
        hit = e[None, :] == choice[:, None]
        keys = tl.where(hit, lowest, keys)
        choices = tl.where(slots[None, :] == k, choice[:, None], choices)
        weights = tl.where(slots[None, :] == k, tl.sum(tl.where(hit, probability, 0.0), 1)[:, None], weights)
    if NORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    if HAS_MASK and sums_ptr is None:
        choices = tl.where((counted > 0)[:, None], choices, E)
        weights = tl.where((counted > 0)[:, None], weights, 0.0)
    places = rows.to(tl.int64)[:, None] * K + slots[None, :]
    inside = (rows < T)[:, None] & (slots < K)[None, :]
    tl.store(choice_ptr + places, choices, inside)
    tl.store(weight_ptr + places, weights, inside)

    if sums_ptr is not None:
        sums_ptr += pid * (2 * E + 1)
        tl.store(sums_ptr + e, tl.sum(tl.where(e[None, :] == first[:, None], counted[:, None], 0.0), 0), e < E)
        tl.store(sums_ptr + E + e, tl.sum(probability * counted[:, None], 0), e < E)
        tl.store(sums_ptr + 2 * E, tl.sum(lse * lse * counted, 0))


@triton.jit
def _route_backward_kernel(
    dweight_ptr, dbalance_ptr, dz_ptr, logits_ptr, mask_ptr, choice_ptr, first_ptr, dlogits_ptr, stride_t, stride_e, T,
    E, K: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the gradient [T, E] of the logits, from the gradients of the weights and of both losses."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    counted = _counted(mask_ptr, rows, T, HAS_MASK)
    _, probability, lse = _softmax(logits_ptr, stride_t, stride_e, rows, counted, E, BLOCK_E)
    counted = counted[:, None]
    first = tl.load(first_ptr + e, e < E, other=0.0)
    tokens = tl.maximum(tl.sum(first, 0), 1.0)

    dp = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        places = rows.to(tl.int64) * K + k
        choice = tl.load(choice_ptr + places, rows < T, other=E)
        dweight = tl.load(dweight_ptr + places, rows < T, other=0.0)
        hit = e[None, :] == choice[:, None]
        dp += tl.where(hit, dweight[:, None], 0.0)
        chosen += tl.where(hit, 1.0, 0.0)
    if NORMALIZE:
        total = tl.sum(chosen * probability, 1)
        total = tl.where(total > 0, total, 1.0)[:, None]  # rows past T have no choice
        dp = (dp - chosen * tl.sum(dp * probability, 1)[:, None] / total) / total
    dp += tl.load(dbalance_ptr) * E / (tokens * tokens) * counted * first[None, :]
    dlogits = probability * (dp - tl.sum(dp * probability, 1)[:, None])
    dlogits += tl.load(dz_ptr) * 2 / tokens * counted * lse[:, None] * probability
    places = rows.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(dlogits_ptr + places, dlogits, (rows < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["S"])
def _count_kernel(index_ptr, counts_ptr, S, E, CHUNK, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Count this program's CHUNK slots by expert; slots of no expert count as expert E."""
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(pid * CHUNK, pid * CHUNK + CHUNK, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        expert = tl.load(index_ptr + slots, slots < S, other=0)
        expert = tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)
        counts += tl.histogram(expert, BINS, mask=slots < S)
    tl.store(counts_ptr + pid * BINS + bins, counts)


@triton.jit(do_not_specialize=["S"])
def _place_kernel(
    index_ptr, counts_ptr, slots_ptr, position_ptr, offsets_ptr, S, E, CHUNK, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """Store each slot's row: the number of slots of lower experts, and of earlier slots of its own expert."""
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for p in range(tl.num_programs(0)):
        counts = tl.load(counts_ptr + p * BINS + bins)
        total += counts
        before += tl.where(p < pid, counts, 0)
    ends = tl.cumsum(total, 0)
    if pid == 0:
        tl.store(offsets_ptr + bins, ends, bins < E)
    begin = ends - total + before
    i = tl.arange(0, BLOCK)
    for start in range(pid * CHUNK, pid * CHUNK + CHUNK, BLOCK):
        slots = start + i
        expert = tl.load(index_ptr + slots, slots < S, other=0)
        expert = tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)
        earlier = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
        row = tl.gather(begin, expert, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(slots_ptr + row, slots, slots < S)
        tl.store(position_ptr + slots, row, slots < S)
        begin += tl.histogram(expert, BINS, mask=slots < S)


def _blocks(experts: int) -> tuple[int, int, int]:
    """Return BLOCK_E, the tokens of a program, and its warps.

    An fp32 tensor takes at most 16 of a thread's registers. With 32 the choice among 256 experts spilled up to 30.
    """
    block_e = power_of_2(experts)
    return block_e, max(1, min(32, 4096 // block_e)), 8 if block_e >= 128 else 4


def _choose(
    logits: Tensor, mask: Tensor | None, k: int, normalize: bool, sums: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return choice int32 [T, k] and weight fp32 [T, k], and fill `sums` if it is a tensor."""
    T, E = logits.shape
    block_e, block_t, warps = _blocks(E)
    choice = logits.new_empty(T, k, dtype=torch.int32)
    weight = logits.new_empty(T, k, dtype=torch.float32)
    launch(
        _route_kernel, cdiv(T, block_t), logits_ptr=logits, mask_ptr=mask, choice_ptr=choice, weight_ptr=weight,
        sums_ptr=sums, **strides(logits, "stride_t", "stride_e"), T=T, E=E, K=k, NORMALIZE=normalize,
        HAS_MASK=mask is not None, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=power_of_2(k), num_warps=warps,
    )  # fmt: skip
    return choice, weight


def choose_forward(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return what `choose` returns."""
    return _choose(logits, mask, k, True, None)


def route_forward(
    logits: Tensor, mask: Tensor | None, k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return choice int32 [T, k], weight fp32 [T, k], first choices fp32 [E] and both losses, fp32 []."""
    (T, E), (_, block_t, _) = logits.shape, _blocks(logits.shape[1])
    sums = logits.new_empty(cdiv(T, block_t), 2 * E + 1, dtype=torch.float32)
    choice, weight = _choose(logits, mask, k, normalize, sums)
    first, probability, z = sums.sum(0).split([E, E, 1])
    tokens = first.sum().clamp(min=1)
    load_balance = E * (first * probability).sum() / tokens.square()
    return choice, weight, first.clone(), load_balance, (z / tokens).squeeze(0)


def route_backward(
    dweight: Tensor, dbalance: Tensor, dz: Tensor, logits: Tensor, mask: Tensor | None, choice: Tensor, first: Tensor,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits, [T, E], from those of weight [T, k] and of both losses."""
    T, E = logits.shape
    block_e, block_t, warps = _blocks(E)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        _route_backward_kernel, cdiv(T, block_t), dweight_ptr=dweight.contiguous(), dbalance_ptr=dbalance, dz_ptr=dz,
        logits_ptr=logits, mask_ptr=mask, choice_ptr=choice, first_ptr=first, dlogits_ptr=dlogits,
        **strides(logits, "stride_t", "stride_e"), T=T, E=E, K=choice.shape[1], NORMALIZE=normalize,
        HAS_MASK=mask is not None, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=warps,
    )  # fmt: skip
    return dlogits


def sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots, position and offsets of an Order."""
    S = index.numel()
    slots, position = index.new_empty(S, dtype=torch.int32), index.new_empty(index.shape, dtype=torch.int32)
    offsets = index.new_zeros(experts, dtype=torch.int32)
    chunk = max(SORT_BLOCK, power_of_2(cdiv(S, SORT_PROGRAMS)))
    bins, programs = power_of_2(experts + 1), cdiv(S, chunk)
    counts = index.new_empty(programs, bins, dtype=torch.int32)
    index = index.contiguous()
    sizes = {"S": S, "E": experts, "CHUNK": chunk, "BLOCK": SORT_BLOCK, "BINS": bins}
    launch(_count_kernel, programs, index_ptr=index, counts_ptr=counts, **sizes, num_warps=4)
    launch(
        _place_kernel, programs, index_ptr=index, counts_ptr=counts, slots_ptr=slots, position_ptr=position,
        offsets_ptr=offsets, **sizes, num_warps=4,
    )  # fmt: skip
    return slots, position, offsets


def _route_cpu(logits: Tensor, mask: Tensor | None, k: int, normalize: bool):
    choice, *others = choose_experts(logits.to(wide(logits.dtype)), mask, k, normalize)
    return choice.contiguous(), *others


def _choose_cpu(logits: Tensor, mask: Tensor | None, k: int):
    choice, weight, *_ = _route_cpu(logits, mask, k, True)
    if mask is None:
        return choice, weight
    return torch.where(mask[:, None], choice, logits.shape[1]), torch.where(mask[:, None], weight, 0.0)


def _route_backward_cpu(dweight, dbalance, dz, logits, mask, choice, first, normalize):
    x = masked(logits, mask).to(first.dtype)
    counted = x.new_ones(len(x), 1) if mask is None else mask.to(x.dtype)[:, None]
    probability, tokens = x.softmax(-1), first.sum().clamp(min=1)
    dp = torch.zeros_like(x).scatter_(1, choice.long(), dweight)
    if normalize:
        chosen = torch.zeros_like(x).scatter_(1, choice.long(), 1.0)
        total = (chosen * probability).sum(1, keepdim=True)
        dp = (dp - chosen * (dp * probability).sum(1, keepdim=True) / total) / total
    dp += (dbalance * x.shape[1] / tokens.square()) * counted * first
    dlogits = probability * (dp - (dp * probability).sum(1, keepdim=True))
    return (dlogits + (dz * 2 / tokens) * counted * x.logsumexp(-1, keepdim=True) * probability).to(logits.dtype)


def sort_plain(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `sort`, computed in plain torch."""
    flat, like = index.reshape(-1).long(), {"dtype": torch.int32, "device": index.device}
    expert, order = torch.where((flat < 0) | (flat > experts), experts, flat).int().sort(stable=True)
    position = torch.empty_like(expert).scatter_(0, order, torch.arange(len(flat), **like))
    offsets = torch.searchsorted(expert, torch.arange(experts, **like), right=True, out_int32=True)
    return order.int(), position.view(index.shape), offsets


_route = custom_op("route", route_forward, _route_cpu)
_choose_op = custom_op("choose_experts", choose_forward, _choose_cpu)
_route_backward = custom_op("route_backward", route_backward, _route_backward_cpu)
_sort = custom_op("sort_by_expert", sort, sort_plain)


@_route.register_fake
def _(logits, mask, k, normalize):
    T, E = logits.shape
    on_gpu = INTERPRETED or logits.is_cuda  # kernels do not compute in fp64
    dtype = torch.float32 if on_gpu else wide(logits.dtype)
    results = (logits.new_empty(shape, dtype=dtype) for shape in ((T, k), (E,), (), ()))
    return logits.new_empty(T, k, dtype=torch.int32), *results


@_choose_op.register_fake
def _(logits, mask, k):
    return _route(logits, mask, k, True)[:2]


@_route_backward.register_fake
def _(dweight, dbalance, dz, logits, mask, choice, first, normalize):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_sort.register_fake
def _(index, experts):
    slots = index.new_empty(index.numel(), dtype=torch.int32)
    return slots, index.new_empty(index.shape, dtype=torch.int32), index.new_empty(experts, dtype=torch.int32)


def _save(ctx, inputs, output):
    logits, mask, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, mask, output[0], output[2])


def _backward(ctx, _, dweight, __, dbalance, dz):
    return _route_backward(dweight, dbalance, dz, *ctx.saved_tensors, ctx.normalize), None, None, None


_route.register_autograd(_backward, setup_context=_save)
refuse_second_order(_route_backward, "route")


def route(
    logits: Tensor, k: int, *, normalize: bool = True, capacity: int | None = None, mask: Tensor | None = None
) -> Routing:
    """Route each token to the k experts with the largest logits, and sort the slots by expert.

    logits [T, E] of any float dtype; 1 ≤ k ≤ min(E, 16), E ≤ 512. normalize: divide each token's weights by their sum.
    capacity: keep at most `capacity` slots per expert, all first choices before all second ones (GShard); None keeps
    every slot. mask bool [T]: False for padding, which is routed to no expert and counts in no loss. Computed in fp32,
    on a CPU in fp64 for fp64. weight and both losses have gradients. Raises ValueError for other shapes, dtypes,
    devices or sizes.
    """
    _check("route", logits, k, mask)
    E = logits.shape[1]
    expect(capacity is None or capacity >= 0, "route", "capacity", capacity, "0 or more")
    chosen = Chosen(*_route(logits, None if mask is None else mask.contiguous(), k, normalize))
    index = chosen.choice if mask is None else torch.where(mask[:, None], chosen.choice, E)
    dropped = index.new_zeros((), dtype=torch.int64)
    if capacity is not None:
        # With all first choices sorted before all second ones, a slot's rank is its row minus its expert's first row.
        by_choice = sort_by_expert(index.t(), E)
        begins = torch.cat([by_choice.offsets.new_zeros(1), by_choice.offsets])
        over = (by_choice.position.t() - begins[index] >= capacity) & (index < E)
        index, dropped = torch.where(over, E, index), over.sum()
    weight = chosen.weight
    if mask is not None or capacity is not None:
        weight = torch.where(index < E, weight, 0.0)
    return Routing(index, weight, sort_by_expert(index, E), chosen.load_balance, chosen.z_loss, dropped)


def choose(logits: Tensor, k: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return index int32 [T, k] and weight fp32 [T, k] of `route`, without sort, losses and gradients.

    A token that `mask` excludes has index E, which belongs to no expert, and weight 0. It takes one kernel, and so
    suits generation. Raises ValueError as `route` does.
    """
    _check("choose", logits, k, mask)
    return _choose_op(logits, None if mask is None else mask.contiguous(), k)


def _check(op: str, logits: Tensor, k: int, mask: Tensor | None) -> None:
    expect_alike(op, logits=logits, mask=mask)
    expect(logits.ndim == 2, op, "logits", tuple(logits.shape), "[T, E]")
    T, E = logits.shape
    expect_read(op, "logits", logits)
    expect(1 <= E <= MAX_EXPERTS, op, "experts", E, f"1 … {MAX_EXPERTS}")
    expect(1 <= k <= min(E, MAX_K), op, "k", k, f"1 … {min(E, MAX_K)}")
    expect_tensor(op, "mask", mask, torch.bool, T)


def sort_by_expert(index: Tensor, experts: int) -> Order:
    """Sort the slots of index int [T, K] by expert, stably; an index outside 0 … experts - 1 belongs to no expert.

    Raises ValueError unless index holds integers in two dimensions and experts is at least 1.
    """
    expect_alike("sort_by_expert", index=index)
    expect_integers("sort_by_expert", "index", index, 2)
    expect(experts >= 1, "sort_by_expert", "experts", experts, "1 or more")
    return Order(*_sort(index, experts))


def cost(tokens: int, experts: int, k: int, *, itemsize: int = 2) -> Cost:
    """Return the cost of route, with the sort; backward, which reads the logits again, costs no more."""
    return Cost(4 * tokens * experts, tokens * (experts * itemsize + k * (8 + 2 * 4 + 2 * 4)))
