"""Compute attention inside each segment of a packed sequence in Triton, forward and backward, without storing scores.

    s[i, j] = q[i, h] · k[j, g] / √Dh;   y[i, h] = Σ_j exp(s[i, j] - lse[i]) v[j, g],   lse[i] = log Σ_j exp(s[i, j])

q [T, H, Dh], k and v [S, G, Dh], H a multiple of G; j runs over the keys of i's segment that the mask lets i see. A
causal or prefix mask is one bound for each row: j < max(i + 1, prefix), with the places i and j of masks.py. Tiles
without a visible pair are not computed. Forward saves lse fp32 [H, T] for backward.

Backward recomputes p = exp(s - lse) tile by tile, twice, so that no atomics are needed and every run gives the same
bits:
    Δ[i] = ⟨dy[i], y[i]⟩;   ds = p (dy·vᵀ - Δ);   dq = ds · k / √Dh        one program per tile of queries; it stores Δ
    dv = pᵀ · dy;   dk = dsᵀ · q / √Dh                                     one per tile of keys, for a group's heads
4·Dh operations for each visible pair of rows and head forward, 14·Dh backward.

Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2.
"""

import math

import torch
from torch import Tensor

from mm1.kernels.attention import plain
from mm1.kernels.attention.pieces import add_product, load, pieces, row_products, scaled, scores, store, zeros
from mm1.kernels.attention.tile_map import place, tile_map
from mm1.kernels.attention.tiles import DKV, DQ, FLASH, FlashShape
from mm1.kernels.dispatch import FLOATS, custom_op, device_of, expect, launch, refuse_second_order, unit_stride
from mm1.kernels.language import INTERPRETED, tl, triton
from mm1.kernels.tuning import config_for

WIDTHS = range(16, 129, 16)


@triton.jit
def _key_ranges(row, end, begin_k, end_k, prefix_end, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the end of the whole blocks that all queries of a tile see, the end of the keys that any sees, and shift.

    A query at `row` sees the keys up to max(row + shift, prefix_end - 1).
    """
    shift = end_k - end
    stop = end_k
    whole = end_k
    if MASK != "full":
        stop = tl.maximum(tl.minimum(end_k, row + BLOCK_M + shift), prefix_end)
        whole = tl.maximum(tl.minimum(end_k, row + 1 + shift), prefix_end)
    return begin_k + (whole - begin_k) // BLOCK_N * BLOCK_N, stop, shift


@triton.jit
def _seen(rows, keys, end_k, prefix_end, shift, MASK: tl.constexpr):
    """Return whether each row sees each key, bool [rows, keys]."""
    seen = (keys < end_k)[None, :]
    if MASK == "causal":
        seen = seen & (keys[None, :] <= (rows + shift)[:, None])
    if MASK == "prefix":
        seen = seen & (keys[None, :] < tl.maximum(rows + shift + 1, prefix_end)[:, None])
    return seen


@triton.jit
def _forward_range(
    acc, top, total, q, rows, k_ptr, v_ptr, stride_k, stride_v, low, high, end_k, prefix_end, shift, scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add keys low … high to the sums, the largest score so far (base 2) and the total weight; return all three."""
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        places = tl.minimum(keys, end_k - 1) if MASKED else keys
        k = load(k_ptr, places, stride_k, P)
        s = scores(q, k, BLOCK_M, BLOCK_N, P)
        if MASKED:
            s = tl.where(_seen(rows, keys, end_k, prefix_end, shift, MASK), s, float("-inf"))
        larger = tl.maximum(top, tl.max(s, 1) * scale)
        # A row that sees none of the keys so far would compute -inf - -inf.
        shown = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
        p = tl.exp2(s * scale - shown[:, None])
        factor = tl.exp2(top - shown)
        total = total * factor + tl.sum(p, 1)
        v = load(v_ptr, places, stride_v, P)
        acc = add_product(p, v, scaled(acc, factor, P), P)
        top = larger
    return acc, top, total


@triton.jit(do_not_specialize=["tiles", "T"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, map_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    tiles, T, H, GROUP, scale, MASK: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store y and lse of one tile of queries for one head."""
    head, row, end, begin_k, end_k, prefix_end = place(map_ptr, tiles, H, False, MASK, BLOCK_M)
    if head >= 0:
        rows = row + tl.arange(0, BLOCK_M)
        q = load(q_ptr + head.to(tl.int64) * stride_qh, tl.minimum(rows, end - 1), stride_qt, P)
        k_ptr += (head // GROUP).to(tl.int64) * stride_kh
        v_ptr += (head // GROUP).to(tl.int64) * stride_vh
        acc = zeros(BLOCK_M, P)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        whole, stop, shift = _key_ranges(row, end, begin_k, end_k, prefix_end, MASK, BLOCK_M, BLOCK_N)
        for masked in tl.static_range(2):  # first the blocks that all queries see
            acc, top, total = _forward_range(
                acc, top, total, q, rows, k_ptr, v_ptr, stride_kt, stride_vt, whole if masked else begin_k,
                stop if masked else whole, end_k, prefix_end, shift, scale, masked == 1, MASK, BLOCK_M, BLOCK_N, P,
            )  # fmt: skip
        # A row that sees nothing gets y = 0, and lse = +inf, which makes its weights 0 in backward.
        sees_any = total > 0.0
        acc = scaled(acc, 1.0 / tl.where(sees_any, total, 1.0), P)
        inside = rows < end
        store(y_ptr + head.to(tl.int64) * WIDTH, rows, inside, H * WIDTH, acc, P)
        lse = tl.where(sees_any, top + tl.log2(tl.where(sees_any, total, 1.0)), float("inf"))
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse * 0.6931471805599453, inside)


@triton.jit
def _dq_range(
    dq, q, dy, lse, delta, rows, k_ptr, v_ptr, stride_k, stride_v, low, high, end_k, prefix_end, shift, scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add the part of keys low … high to dq / (log 2 / √Dh), and return it."""
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        places = tl.minimum(keys, end_k - 1) if MASKED else keys
        k = load(k_ptr, places, stride_k, P)
        v = load(v_ptr, places, stride_v, P)
        p = tl.exp2(scores(q, k, BLOCK_M, BLOCK_N, P) * scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(rows, keys, end_k, prefix_end, shift, MASK), p, 0.0)
        ds = p * (scores(dy, v, BLOCK_M, BLOCK_N, P) - delta[:, None])
        dq = add_product(ds, k, dq, P)
    return dq


@triton.jit(do_not_specialize=["tiles"])
def _dq_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, delta_ptr, dq_ptr, map_ptr, stride_dt, stride_dh, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, tiles, T, H, GROUP, scale, MASK: tl.constexpr, P: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dq and Δ of one tile of queries for one head."""
    head, row, end, begin_k, end_k, prefix_end = place(map_ptr, tiles, H, False, MASK, BLOCK_M)
    if head >= 0:
        rows = row + tl.arange(0, BLOCK_M)
        inside = rows < end
        places = tl.minimum(rows, end - 1)
        q = load(q_ptr + head.to(tl.int64) * stride_qh, places, stride_qt, P)
        dy = load(dy_ptr + head.to(tl.int64) * stride_dh, places, stride_dt, P)
        k_ptr += (head // GROUP).to(tl.int64) * stride_kh
        v_ptr += (head // GROUP).to(tl.int64) * stride_vh
        y = load(y_ptr + head.to(tl.int64) * WIDTH, places, H * WIDTH, P)
        delta = row_products(dy, y, BLOCK_M, P)
        tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta, inside)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + places) * 1.4426950408889634
        dq = zeros(BLOCK_M, P)
        whole, stop, shift = _key_ranges(row, end, begin_k, end_k, prefix_end, MASK, BLOCK_M, BLOCK_N)
        for masked in tl.static_range(2):
            dq = _dq_range(
                dq, q, dy, lse, delta, rows, k_ptr, v_ptr, stride_kt, stride_vt, whole if masked else begin_k,
                stop if masked else whole, end_k, prefix_end, shift, scale, masked == 1, MASK, BLOCK_M, BLOCK_N, P,
            )  # fmt: skip
        factor = tl.full((BLOCK_M,), 0.6931471805599453, tl.float32) * scale
        store(dq_ptr + head.to(tl.int64) * WIDTH, rows, inside, H * WIDTH, scaled(dq, factor, P), P)


@triton.jit(do_not_specialize=["tiles"])
def _dkv_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, map_ptr, stride_dt, stride_dh, stride_qt,
    stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, tiles, T, G, GROUP, scale, MASK: tl.constexpr,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of one tile of keys for one key-value head."""
    group, row, end, begin_q, end_q, prefix_end = place(map_ptr, tiles, G, True, MASK, BLOCK_M)
    if group >= 0:
        keys = row + tl.arange(0, BLOCK_M)
        key_places = tl.minimum(keys, end - 1)
        k = load(k_ptr + group.to(tl.int64) * stride_kh, key_places, stride_kt, P)
        v = load(v_ptr + group.to(tl.int64) * stride_vh, key_places, stride_vt, P)
        dk = zeros(BLOCK_M, P)
        dv = zeros(BLOCK_M, P)
        shift = end - end_q
        low = begin_q
        if MASK != "full":
            low = tl.maximum(begin_q, row - shift)  # the first query that sees one of these keys
        if MASK == "prefix":
            low = tl.where(row < prefix_end, begin_q, low)
        # A single loop over heads and tiles: two nested loops spill 200 registers at 128 columns.
        blocks = tl.maximum(tl.cdiv(end_q - low, BLOCK_N), 0)
        for i in range(GROUP * blocks):
            head = (group * GROUP + i // blocks).to(tl.int64)
            rows = low + i % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            places = tl.minimum(rows, end_q - 1)
            q = load(q_ptr + head * stride_qh, places, stride_qt, P)
            dy = load(dy_ptr + head * stride_dh, places, stride_dt, P)
            delta = tl.load(delta_ptr + head * T + places)
            # Queries past their end weigh exp(-inf), and keys past theirs are not stored: neither needs a mask.
            lse = tl.load(lse_ptr + head * T + rows, rows < end_q, other=float("inf")) * 1.4426950408889634
            p = tl.exp2(scores(k, q, BLOCK_M, BLOCK_N, P) * scale - lse[None, :])
            # Applied to all tiles: a second loop for the tiles on the diagonal spills registers.
            if MASK == "causal":
                p = tl.where(keys[:, None] <= (rows + shift)[None, :], p, 0.0)
            if MASK == "prefix":
                p = tl.where(keys[:, None] < tl.maximum(rows + shift + 1, prefix_end)[None, :], p, 0.0)
            dv = add_product(p, dy, dv, P)
            ds = p * (scores(v, dy, BLOCK_M, BLOCK_N, P) - delta[None, :])
            dk = add_product(ds, q, dk, P)
        inside = keys < end
        factor = tl.full((BLOCK_M,), 0.6931471805599453, tl.float32) * scale
        store(dk_ptr + group.to(tl.int64) * WIDTH, keys, inside, G * WIDTH, scaled(dk, factor, P), P)
        store(dv_ptr + group.to(tl.int64) * WIDTH, keys, inside, G * WIDTH, dv, P)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of tensors [rows, heads, width] as arguments of a kernel: stride_qt and stride_qh for q."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")}


def _mask_name(prefix: Tensor | None, causal: bool) -> str:
    """Return the kernels' constant MASK."""
    return "prefix" if prefix is not None else "causal" if causal else "full"


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y [T, H, Dh] and lse fp32 [H, T], +inf where a row sees nothing; the arguments are those of `flash`."""
    (T, H, width), G = q.shape, k.shape[1]
    y, lse = q.new_empty(T, H, width), q.new_empty(H, T, dtype=torch.float32)
    config = config_for(FLASH, FlashShape(T, H, G, width, causal), q.dtype, device_of(q))
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    columns, tiles = tile_map(cu_q, cu_k, used_k, prefix, T, k.shape[0], config.block_m, False)
    launch(
        _forward_kernel, tiles * H, q_ptr=q, k_ptr=k, v_ptr=v, y_ptr=y, lse_ptr=lse, map_ptr=columns,
        **_strides(q=q, k=k, v=v), tiles=tiles, T=T, H=H, GROUP=H // G, scale=width**-0.5 / math.log(2),
        MASK=_mask_name(prefix, causal), P=pieces(width), WIDTH=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, prefix: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, in their shapes."""
    (T, H, width), (S, G, _) = q.shape, k.shape
    dy, q, k, v = unit_stride(dy), unit_stride(q), unit_stride(k), unit_stride(v)
    dq, delta = q.new_empty(T, H, width), torch.empty_like(lse)
    # Keys beyond used_k are in no tile, and get zeros.
    dk, dv = ((x.new_empty if used_k is None else x.new_zeros)(S, G, width) for x in (k, v))
    shape, device = FlashShape(T, H, G, width, causal), device_of(q)
    shared = {
        "dy_ptr": dy, "q_ptr": q, "k_ptr": k, "v_ptr": v, "lse_ptr": lse, "delta_ptr": delta,
        **_strides(d=dy, q=q, k=k, v=v), "T": T, "GROUP": H // G, "scale": width**-0.5 / math.log(2),
        "MASK": _mask_name(prefix, causal), "P": pieces(width), "WIDTH": width,
    }  # fmt: skip
    config = config_for(DQ, shape, q.dtype, device)
    columns, tiles = tile_map(cu_q, cu_k, used_k, prefix, T, S, config.block_m, False)
    launch(
        _dq_kernel, tiles * H, **shared, y_ptr=y, dq_ptr=dq, map_ptr=columns, tiles=tiles, H=H, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    config = config_for(DKV, shape, q.dtype, device)
    columns, tiles = tile_map(cu_k, cu_q, used_k, prefix, S, T, config.block_m, True)
    launch(
        _dkv_kernel, tiles * G, **shared, dk_ptr=dk, dv_ptr=dv, map_ptr=columns, tiles=tiles, G=G,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dq, dk, dv


_forward = custom_op("flash", forward, plain=plain.forward)
_backward = custom_op("flash_backward", backward, plain=plain.backward)
_forward.register_fake(
    lambda q, *others: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
)
_backward.register_fake(lambda dy, q, k, v, *others: tuple(x.new_empty(x.shape) for x in (q, k, v)))


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, used_k, prefix, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, used_k, prefix)


def _gradients(ctx, dy: Tensor, _):
    return *_backward(dy, *ctx.saved_tensors, ctx.causal), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "attention")


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    """Return attention [T, H, Dh] of q [T, H, Dh] to k and v [S, G, Dh], in their dtype.

    cu_q and cu_k int32 [B+1], used_k int32 [B]. causal: hide the keys after a query. prefix int32 [B] implies causal,
    and shows the first prefix[b] keys of segment b to all its queries. Dh is a multiple of 16 up to 128; q, k and v are
    bf16, fp16 or fp32, of any strides. Keys beyond used_k get a gradient of zeros. Raises ValueError for another width
    or dtype, and for a device without kernels.
    """
    expect(INTERPRETED or q.device.type != "cpu", "flash", "device", q.device, "a GPU, or TRITON_INTERPRET=1")
    expect(q.shape[2] in WIDTHS, "flash", "head width", q.shape[2], "a multiple of 16 up to 128")
    expect(q.dtype in FLOATS and q.dtype == k.dtype == v.dtype, "flash", "dtypes", (q.dtype, k.dtype, v.dtype),
           f"one of {FLOATS}")  # fmt: skip
    used_k, prefix = (None if x is None else x.contiguous() for x in (used_k, prefix))
    return _forward(q, k, v, cu_q.contiguous(), cu_k.contiguous(), used_k, prefix, causal)[0]
