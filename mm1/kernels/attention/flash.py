"""Attention inside each segment of a packed sequence, never storing the scores; forward and backward in Triton.

    s[i, j] = q[i, h] · k[j, g] · scale;   y[i, h] = Σ_j exp(s[i, j] - lse[i]) v[j, g],   lse[i] = log Σ_j exp(s[i, j])

q [T, H, Dh], k and v [S, G, Dh], H a multiple of G; j and i as attention.py says. Forward keeps lse fp32 [H, T].

Backward recomputes p = exp(s - lse) tile by tile, twice, so that nothing is added by atomics and bits are the same:
    Δ[i] = ⟨dy[i], y[i]⟩;   ds = p (dy·vᵀ - Δ);   dq = ds · k · scale      a program a tile of queries, which stores Δ
    dv = pᵀ · dy;   dk = dsᵀ · q · scale                                   a program a tile of keys, for a group's heads
4·Dh operations a pair of rows and a head forward, 14·Dh backward.

Products want powers of two. A head's width is cut into pieces that are (80 = 64 + 16) instead of being padded to the
next one (128, 60 % more work): scores are summed over pieces, each piece of a result has its own accumulator.

Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2.
"""

# pyright: reportArgumentType=false
# It takes len(P) for the length of a constexpr, not of the tuple in it.

import math

import torch
from torch import Tensor

from mm1.kernels.attention.tiles import DKV, DQ, FLASH, FlashShape
from mm1.kernels.dispatch import FLOATS, INTERPRETED, cdiv, device_of, expect, launch, refuse_second_order
from mm1.kernels.language import tl, triton
from mm1.kernels.tiles import dot
from mm1.kernels.tuning import config_for

WIDTHS = range(16, 129, 16)
MAP_TILES, MAP_SEGMENTS = 32, 64  # tiles one program of the map places, segments it compares them with at once


def pieces(width: int) -> tuple[tuple[int, int], ...]:
    """(first column, columns) of each power of two in the width, the largest first."""
    found, first = [], 0
    for bit in reversed(range(width.bit_length())):
        if width >> bit & 1:
            found.append((first, 1 << bit))
            first += 1 << bit
    return tuple(found)


@triton.jit
def _map_kernel(
    own_ptr, other_ptr, used_ptr, map_ptr, rows, other_rows, B, tiles, KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Of each tile: the first tile of its segment (-1: no tile), the segment's first row and end, and the other side's.

    Rows past the last segment are one more, with nothing on the other side. used: how many keys of a segment count.
    Offsets outside the rows, which nobody refuses here, are cut to them, so that no kernel reads beyond its tensors.
    """
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    before = tl.zeros((), tl.int32)
    first = tl.full((BLOCK_T,), -1, tl.int32)
    begin = tl.zeros((BLOCK_T,), tl.int32)
    end = tl.zeros((BLOCK_T,), tl.int32)
    other_begin = tl.zeros((BLOCK_T,), tl.int32)
    other_end = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, B + 1, BLOCK_B):
        s = start + tl.arange(0, BLOCK_B)
        real = s < B
        s_begin = tl.load(own_ptr + s, s <= B, other=0)
        s_end = tl.load(own_ptr + s + 1, real, other=rows)
        o_begin = tl.load(other_ptr + s, real, other=0)
        o_end = tl.load(other_ptr + s + 1, real, other=0)
        if used_ptr is not None:
            used = tl.load(used_ptr + s, real, other=0)
            if KEYS:
                s_end = tl.where(real, s_begin + used, s_end)
            else:
                o_end = o_begin + used
        s_begin = tl.maximum(s_begin, 0)
        o_begin = tl.maximum(o_begin, 0)
        s_end = tl.minimum(s_end, rows)
        o_end = tl.minimum(o_end, other_rows)
        count = tl.where(s <= B, tl.cdiv(tl.maximum(s_end - s_begin, 0), BLOCK_M), 0)
        until = before + tl.cumsum(count, 0)
        mine = (tile[:, None] >= (until - count)[None, :]) & (tile[:, None] < until[None, :])
        first += tl.sum(tl.where(mine, (until - count + 1)[None, :], 0), 1)
        begin += tl.sum(tl.where(mine, s_begin[None, :], 0), 1)
        end += tl.sum(tl.where(mine, s_end[None, :], 0), 1)
        other_begin += tl.sum(tl.where(mine, o_begin[None, :], 0), 1)
        other_end += tl.sum(tl.where(mine, o_end[None, :], 0), 1)
        before += tl.sum(count, 0)
    inside = tile < tiles
    tl.store(map_ptr + tile, first, inside)
    tl.store(map_ptr + tiles + tile, begin, inside)
    tl.store(map_ptr + 2 * tiles + tile, end, inside)
    tl.store(map_ptr + 3 * tiles + tile, other_begin, inside)
    tl.store(map_ptr + 4 * tiles + tile, other_end, inside)


@triton.jit
def _place(map_ptr, tiles, heads, LAST_FIRST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head (-1: no tile), first row and end of this program's tile, and the other side's first row and end.

    Programs go segment by segment, head by head, tile by tile, so that those which share rows meet in L2; LAST_FIRST:
    the segment's last tile, which under a causal mask sees most, before the others.
    """
    pid = tl.program_id(0)
    place = map_ptr + pid // heads
    first = tl.load(place)
    begin = tl.load(place + tiles)
    end = tl.load(place + 2 * tiles)
    other_begin = tl.load(place + 3 * tiles)
    other_end = tl.load(place + 4 * tiles)
    count = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 1)
    local = pid - first * heads
    m = local % count
    if LAST_FIRST:
        m = count - 1 - m
    head = tl.where(first < 0, -1, local // count)
    return head, begin + m * BLOCK_M, end, other_begin, other_end


# What follows is for each piece (first column, columns) of P; tensors come as tuples, a piece each.


@triton.jit
def _piece(ptr, rows, stride, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + FIRST + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _load(ptr, rows, stride, P: tl.constexpr):
    x = ()
    for i in tl.static_range(len(P)):
        x = x + (_piece(ptr, rows, stride, P[i][0], P[i][1]),)
    return x


@triton.jit
def _zero(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _zeros(ROWS: tl.constexpr, P: tl.constexpr):
    x = ()
    for i in tl.static_range(len(P)):
        x = x + (_zero(ROWS, P[i][1]),)
    return x


@triton.jit
def _scores(a, b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr):
    """Σ a bᵀ fp32 [BLOCK_M, BLOCK_N]."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(P)):
        s = dot(a[i], b[i].T, s)
    return s


@triton.jit
def _add(weights, x, acc, P: tl.constexpr):
    """acc + weights · x, weights rounded to the dtype of x."""
    y = ()
    for i in tl.static_range(len(P)):
        y = y + (dot(weights.to(x[i].dtype), x[i], acc[i]),)
    return y


@triton.jit
def _scaled(x, factor, P: tl.constexpr):
    """Rows of x times their factors."""
    y = ()
    for i in tl.static_range(len(P)):
        y = y + (x[i] * factor[:, None],)
    return y


@triton.jit
def _products(a, b, BLOCK_M: tl.constexpr, P: tl.constexpr):
    """⟨a, b⟩ of each row in fp32."""
    s = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(P)):
        s += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return s


@triton.jit
def _store_piece(ptr, rows, inside, stride, x, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * stride + FIRST + tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + places, x.to(ptr.dtype.element_ty), inside[:, None])


@triton.jit
def _store(ptr, rows, inside, stride, x, P: tl.constexpr):
    for i in tl.static_range(len(P)):
        _store_piece(ptr, rows, inside, stride, x[i], P[i][0], P[i][1])


@triton.jit
def _key_ranges(row, end, begin_k, end_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of queries sees keys up to `whole` in whole blocks, and up to `stop` behind a mask: j ≤ i + shift."""
    shift = end_k - end
    stop = end_k
    whole = end_k
    if CAUSAL:
        stop = tl.maximum(tl.minimum(end_k, row + BLOCK_M + shift), begin_k)
        whole = tl.maximum(tl.minimum(end_k, row + 1 + shift), begin_k)
    return begin_k + (whole - begin_k) // BLOCK_N * BLOCK_N, stop, shift


@triton.jit
def _seen(rows, keys, end_k, shift, CAUSAL: tl.constexpr):
    seen = (keys < end_k)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= (rows + shift)[:, None])
    return seen


@triton.jit
def _forward_range(
    acc, top, total, q, rows, k_ptr, v_ptr, stride_k, stride_v, low, high, end_k, shift, scale, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One pass over keys low … high: the sums, their largest score so far (base 2) and total weight."""
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        places = tl.minimum(keys, end_k - 1) if MASKED else keys
        k = _load(k_ptr, places, stride_k, P)
        s = _scores(q, k, BLOCK_M, BLOCK_N, P)
        if MASKED:
            s = tl.where(_seen(rows, keys, end_k, shift, CAUSAL), s, float("-inf"))
        larger = tl.maximum(top, tl.max(s, 1) * scale)
        # A row that has seen nothing yet would compute -inf - -inf.
        shown = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
        p = tl.exp2(s * scale - shown[:, None])
        factor = tl.exp2(top - shown)
        total = total * factor + tl.sum(p, 1)
        v = _load(v_ptr, places, stride_v, P)
        acc = _add(p, v, _scaled(acc, factor, P), P)
        top = larger
    return acc, top, total


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, map_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    tiles, T, H, GROUP, scale, CAUSAL: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, row, end, begin_k, end_k = _place(map_ptr, tiles, H, CAUSAL, BLOCK_M)
    if head >= 0:
        rows = row + tl.arange(0, BLOCK_M)
        q = _load(q_ptr + head.to(tl.int64) * stride_qh, tl.minimum(rows, end - 1), stride_qt, P)
        k_ptr += (head // GROUP).to(tl.int64) * stride_kh
        v_ptr += (head // GROUP).to(tl.int64) * stride_vh
        acc = _zeros(BLOCK_M, P)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        whole, stop, shift = _key_ranges(row, end, begin_k, end_k, CAUSAL, BLOCK_M, BLOCK_N)
        acc, top, total = _forward_range(
            acc, top, total, q, rows, k_ptr, v_ptr, stride_kt, stride_vt, begin_k, whole, end_k, shift, scale, False,
            CAUSAL, BLOCK_M, BLOCK_N, P,
        )  # fmt: skip
        acc, top, total = _forward_range(
            acc, top, total, q, rows, k_ptr, v_ptr, stride_kt, stride_vt, whole, stop, end_k, shift, scale, True,
            CAUSAL, BLOCK_M, BLOCK_N, P,
        )  # fmt: skip
        # A row that sees nothing: y = 0, and +inf, which makes its weights 0 in backward too.
        some = total > 0.0
        acc = _scaled(acc, 1.0 / tl.where(some, total, 1.0), P)
        inside = rows < end
        _store(y_ptr + head.to(tl.int64) * WIDTH, rows, inside, H * WIDTH, acc, P)
        lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse * 0.6931471805599453, inside)


@triton.jit
def _dq_range(
    dq, q, dy, lse, delta, rows, k_ptr, v_ptr, stride_k, stride_v, low, high, end_k, shift, scale, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        places = tl.minimum(keys, end_k - 1) if MASKED else keys
        k = _load(k_ptr, places, stride_k, P)
        v = _load(v_ptr, places, stride_v, P)
        p = tl.exp2(_scores(q, k, BLOCK_M, BLOCK_N, P) * scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(rows, keys, end_k, shift, CAUSAL), p, 0.0)
        ds = p * (_scores(dy, v, BLOCK_M, BLOCK_N, P) - delta[:, None])
        dq = _add(ds, k, dq, P)
    return dq


@triton.jit
def _dq_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, delta_ptr, dq_ptr, map_ptr, stride_dt, stride_dh, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, tiles, T, H, GROUP, scale, CAUSAL: tl.constexpr, P: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, row, end, begin_k, end_k = _place(map_ptr, tiles, H, CAUSAL, BLOCK_M)
    if head >= 0:
        rows = row + tl.arange(0, BLOCK_M)
        inside = rows < end
        places = tl.minimum(rows, end - 1)
        q = _load(q_ptr + head.to(tl.int64) * stride_qh, places, stride_qt, P)
        dy = _load(dy_ptr + head.to(tl.int64) * stride_dh, places, stride_dt, P)
        k_ptr += (head // GROUP).to(tl.int64) * stride_kh
        v_ptr += (head // GROUP).to(tl.int64) * stride_vh
        y = _load(y_ptr + head.to(tl.int64) * WIDTH, places, H * WIDTH, P)
        delta = _products(dy, y, BLOCK_M, P)
        tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta, inside)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + places) * 1.4426950408889634
        dq = _zeros(BLOCK_M, P)
        whole, stop, shift = _key_ranges(row, end, begin_k, end_k, CAUSAL, BLOCK_M, BLOCK_N)
        dq = _dq_range(
            dq, q, dy, lse, delta, rows, k_ptr, v_ptr, stride_kt, stride_vt, begin_k, whole, end_k, shift, scale, False,
            CAUSAL, BLOCK_M, BLOCK_N, P,
        )  # fmt: skip
        dq = _dq_range(
            dq, q, dy, lse, delta, rows, k_ptr, v_ptr, stride_kt, stride_vt, whole, stop, end_k, shift, scale, True,
            CAUSAL, BLOCK_M, BLOCK_N, P,
        )  # fmt: skip
        factor = tl.full((BLOCK_M,), 0.6931471805599453, tl.float32) * scale
        _store(dq_ptr + head.to(tl.int64) * WIDTH, rows, inside, H * WIDTH, _scaled(dq, factor, P), P)


@triton.jit
def _dkv_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, map_ptr, stride_dt, stride_dh, stride_qt,
    stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, tiles, T, G, GROUP, scale, CAUSAL: tl.constexpr,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, row, end, begin_q, end_q = _place(map_ptr, tiles, G, False, BLOCK_M)
    if group >= 0:
        keys = row + tl.arange(0, BLOCK_M)
        key_places = tl.minimum(keys, end - 1)
        k = _load(k_ptr + group.to(tl.int64) * stride_kh, key_places, stride_kt, P)
        v = _load(v_ptr + group.to(tl.int64) * stride_vh, key_places, stride_vt, P)
        dk = _zeros(BLOCK_M, P)
        dv = _zeros(BLOCK_M, P)
        shift = end - end_q
        low = begin_q
        if CAUSAL:
            low = tl.maximum(begin_q, row - shift)  # the first query that sees one of these keys
        # One loop over heads and tiles: two, one inside the other, spill 200 registers at 128 columns.
        blocks = tl.maximum(tl.cdiv(end_q - low, BLOCK_N), 0)
        for i in range(GROUP * blocks):
            head = (group * GROUP + i // blocks).to(tl.int64)
            rows = low + i % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            places = tl.minimum(rows, end_q - 1)
            q = _load(q_ptr + head * stride_qh, places, stride_qt, P)
            dy = _load(dy_ptr + head * stride_dh, places, stride_dt, P)
            delta = tl.load(delta_ptr + head * T + places)
            # Queries past the end weigh exp(-inf), and keys past theirs are not stored: neither needs a mask.
            lse = tl.load(lse_ptr + head * T + rows, rows < end_q, other=float("inf")) * 1.4426950408889634
            p = tl.exp2(_scores(k, q, BLOCK_M, BLOCK_N, P) * scale - lse[None, :])
            if CAUSAL:  # in all tiles: a second loop for those on the diagonal spills registers
                p = tl.where(keys[:, None] <= (rows + shift)[None, :], p, 0.0)
            dv = _add(p, dy, dv, P)
            ds = p * (_scores(v, dy, BLOCK_M, BLOCK_N, P) - delta[None, :])
            dk = _add(ds, q, dk, P)
        inside = keys < end
        factor = tl.full((BLOCK_M,), 0.6931471805599453, tl.float32) * scale
        _store(dk_ptr + group.to(tl.int64) * WIDTH, keys, inside, G * WIDTH, _scaled(dk, factor, P), P)
        _store(dv_ptr + group.to(tl.int64) * WIDTH, keys, inside, G * WIDTH, dv, P)


def _tiles(
    own: Tensor, other: Tensor, used: Tensor | None, rows: int, other_rows: int, block: int, keys: bool
) -> tuple[Tensor, int]:
    """The map int32 [5, tiles], and how many tiles there are at most: no segment wastes more than one."""
    B = len(own) - 1
    tiles = min(cdiv(rows, block) + B + 1, rows)
    found = own.new_empty(5, tiles)
    launch(
        _map_kernel, cdiv(tiles, MAP_TILES), own, other, used, found, rows, other_rows, B, tiles, keys, block,
        MAP_TILES, MAP_SEGMENTS, num_warps=4,
    )  # fmt: skip
    return found, tiles


def _rows(x: Tensor) -> Tensor:
    """Any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """y [T, H, Dh] and logsumexp fp32 [H, T], +inf where a row sees nothing."""
    (T, H, width), G = q.shape, k.shape[1]
    y, lse = q.new_empty(T, H, width), q.new_empty(H, T, dtype=torch.float32)
    config = config_for(FLASH, FlashShape(T, H, G, width, causal), q.dtype, device_of(q))
    q, k, v = _rows(q), _rows(k), _rows(v)
    found, tiles = _tiles(cu_q, cu_k, used_k, T, len(k), config.block_m, False)
    launch(
        _forward_kernel, tiles * H, q, k, v, y, lse, found, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], tiles, T,
        H, H // G, width**-0.5 / math.log(2), causal, pieces(width), width, config.block_m, config.block_n,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    (T, H, width), (S, G, _) = q.shape, k.shape
    dy, q, k, v = _rows(dy), _rows(q), _rows(k), _rows(v)
    dq, delta = q.new_empty(T, H, width), torch.empty_like(lse)
    # Keys that do not count are in no tile.
    dk, dv = ((x.new_empty if used_k is None else x.new_zeros)(S, G, width) for x in (k, v))
    strides = *dy.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    scale = width**-0.5 / math.log(2)
    shape, device = FlashShape(T, H, G, width, causal), device_of(q)
    config = config_for(DQ, shape, q.dtype, device)
    found, tiles = _tiles(cu_q, cu_k, used_k, T, len(k), config.block_m, False)
    launch(
        _dq_kernel, tiles * H, dy, q, k, v, y, lse, delta, dq, found, *strides, tiles, T, H, H // G, scale, causal,
        pieces(width), width, config.block_m, config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    config = config_for(DKV, shape, q.dtype, device)
    found, tiles = _tiles(cu_k, cu_q, used_k, S, T, config.block_m, True)
    launch(
        _dkv_kernel, tiles * G, dy, q, k, v, lse, delta, dk, dv, found, *strides, tiles, T, G, H // G, scale, causal,
        pieces(width), width, config.block_m, config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dq, dk, dv


_forward = torch.library.custom_op("mm1::flash", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::flash_backward", backward, mutates_args=())


@_forward.register_fake
def _(q, k, v, cu_q, cu_k, used_k, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_backward.register_fake
def _(dy, q, k, v, y, lse, cu_q, cu_k, used_k, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, used_k, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, used_k)


def _gradients(ctx, dy: Tensor, _):
    return *_backward(dy, *ctx.saved_tensors, ctx.causal), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "attention")


def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, causal: bool) -> Tensor:
    """q [T, H, Dh], k and v [S, G, Dh], cu_q and cu_k int32 [B+1], used_k int32 [B] -> [T, H, Dh].

    Dh a multiple of 16 up to 128; bf16, fp16 or fp32; q, k and v of any strides but the last. Keys that do not count
    get zeros as gradient.
    """
    expect(INTERPRETED or q.device.type != "cpu", "flash", "device", q.device, "a GPU, or TRITON_INTERPRET=1")
    expect(q.shape[2] in WIDTHS, "flash", "head width", q.shape[2], "a multiple of 16 up to 128")
    expect(q.dtype in FLOATS and q.dtype == k.dtype == v.dtype, "flash", "dtypes", (q.dtype, k.dtype, v.dtype),
           f"one of {FLOATS}")  # fmt: skip
    used_k = None if used_k is None else used_k.contiguous()
    return _forward(q, k, v, cu_q.contiguous(), cu_k.contiguous(), used_k, causal)[0]
