"""Attention over a paged cache: what one new token of many sequences, or new rows behind a shared prefix, see.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] / √Dh) v[j, g],   j ≤ lengths[b] - n[b] + i

Segment b has n[b] new rows, the last of lengths[b]; keys and values lie in pages of one size, anywhere, which the
segment's table names in order (Kwon et al. 2023, PagedAttention). Keys are split over programs, each with a softmax of
its own, and `_merge_kernel` makes one of them (Dao et al. 2023, Flash-Decoding): a token alone would keep G programs
busy. Bound by reading keys and values once, 2·G·Dh elements a token.
"""

import math
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm1.kernels.dispatch import INTERPRETED, Cost, cdiv, device_of, expect, launch, on_cpu, power_of_2
from mm1.kernels.tiles import dot

ROWS = 16  # the least a matrix instruction takes: a group's heads, and new rows if there are several
KEYS = 64  # at once
MOST_SPLITS = 64


@triton.jit
def _paged_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, table_ptr, lengths_ptr, y_ptr, lse_ptr, stride_qt, stride_qh, stride_kp, stride_kr,
    stride_kg, stride_table, T, scale, H: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y fp32 [SPLITS, T, H, WIDTH] and lse fp32 [SPLITS, T, H], base 2: of a split's keys alone."""
    R: tl.constexpr = H // G
    pid = tl.program_id(0)
    split = pid % SPLITS
    m = pid // SPLITS % TILES
    g = pid // (SPLITS * TILES) % G
    b = pid // (SPLITS * TILES * G)
    first = tl.load(cu_ptr + b)
    n = tl.load(cu_ptr + b + 1) - first
    length = tl.load(lengths_ptr + b)
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)  # new row · R + head of the group
    inside = row < n * R
    place = (first + row // R).to(tl.int64)
    head = g * R + row % R
    d = tl.arange(0, BLOCK_D)
    wide = d < WIDTH
    q = tl.load(q_ptr + place[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
                inside[:, None] & wide[None, :], other=0.0)  # fmt: skip
    last = length - n + row // R  # the last key that a row sees
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
    stop = tl.where(m * BLOCK_M < n * R, tl.minimum((split + 1) * span, length), 0)
    for start in range(split * span, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        real = j < length
        page = tl.load(table_ptr + b * stride_table + j // PAGE, real, other=0).to(tl.int64)
        at = page * stride_kp + (j % PAGE) * stride_kr + g * stride_kg
        loaded = real[:, None] & wide[None, :]
        k = tl.load(k_ptr + at[:, None] + d[None, :], loaded, other=0.0)
        v = tl.load(v_ptr + at[:, None] + d[None, :], loaded, other=0.0)
        s = dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        s = tl.where(real[None, :] & (j[None, :] <= last[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        p = tl.exp2(s - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrunk[:, None])
        top = new
    seen = total > 0
    y = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    out = (split * T + place) * H + head
    tl.store(y_ptr + out[:, None] * WIDTH + d[None, :], y, inside[:, None] & wide[None, :])
    tl.store(lse_ptr + out, lse, inside)


@triton.jit
def _merge_kernel(
    y_ptr, lse_ptr, out_ptr, rows, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] = Σ_s y[s, row] 2^(lse[s, row]) / Σ_s 2^(lse[s, row])"""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + s * rows + row, s < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    w = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - top))
    total = tl.sum(w, 0)
    inside = (s < SPLITS)[:, None] & (d < WIDTH)[None, :]
    y = tl.load(y_ptr + (s * rows + row)[:, None] * WIDTH + d[None, :], inside, other=0.0)
    y = tl.sum(y * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * WIDTH + d, y.to(out_ptr.dtype.element_ty), d < WIDTH)


def splits(segments: int, groups: int, longest: int, units: int) -> int:
    """As many as keep every unit at work twice, but none without KEYS keys; a power of two, so few are compiled."""
    wanted = cdiv(2 * units, max(segments * groups, 1))
    return min(power_of_2(wanted), power_of_2(cdiv(longest, KEYS)), MOST_SPLITS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int
) -> Tensor:  # fmt: skip
    (T, H, width), (_, page, G, _) = q.shape, k.shape
    B, device = len(lengths), device_of(q)
    count = splits(B, G, tables.shape[1] * page, device.units)
    tiles = cdiv(rows * (H // G), ROWS)
    part = q.new_empty(count, T, H, width, dtype=torch.float32)
    lse = q.new_empty(count, T, H, dtype=torch.float32)
    out = q.new_empty(T, H, width)
    launch(
        _paged_kernel, B * G * tiles * count, q, k, v, cu_q, tables, lengths, part, lse, *q.stride()[:2],
        *k.stride()[:3], tables.stride(0), T, width**-0.5 / math.log(2), H, G, width, page, tiles, count, ROWS, KEYS,
        power_of_2(width), num_warps=4, num_stages=3,
    )  # fmt: skip
    launch(_merge_kernel, T * H, part, lse, out, T * H, width, count, power_of_2(count), power_of_2(width), num_warps=1)
    return out


_forward = torch.library.custom_op("mm1::paged_attention", forward, mutates_args=())


@_forward.register_fake
def _(q, k, v, cu_q, tables, lengths, rows):
    return q.new_empty(q.shape)


_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def on_host(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """A segment after another, or single tokens that see equally many keys at once.

    Pages side by side are read where they are, others are copied first.
    """
    page, groups, width = k.shape[1:]
    of_page, of_row, of_group, _ = k.stride()
    y = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, seen, firsts = cu_q.tolist(), lengths.tolist(), tables[:, :1].flatten().tolist()

    def tokens(start: int, count: int, first: int, step: int, length: int) -> None:
        """New rows of `count` segments of one, whose pages are side by side from `first` on, `step` apart."""
        size, strides = (count, groups, length, width), (step * of_page, of_group, of_row, 1)
        keys, values = (x.as_strided(size, strides, x.storage_offset() + first * of_page) for x in (k, v))
        # The heads of a group are rows: torch's flash attention on CPU takes no groups.
        own = q[start : start + count].view(count, groups, -1, width)
        y[start : start + count] = _on_cpu(own, keys, values, 0.0, False)[0].reshape(count, -1, width)

    masks: dict[tuple[int, int], Tensor] = {}
    used = [cdiv(length, page) for length in seen]
    even = of_page == page * of_row
    side_by_side = [even and bool((tables[b, :n].diff() == 1).all()) for b, n in enumerate(used)]
    steps = {b - a for a, b in pairwise(firsts)}
    if rows == 1 < len(seen) == len(q) and len({*seen}) == len(steps) == 1 and min(steps) > 0 and all(side_by_side):
        tokens(0, len(seen), firsts[0], min(steps), seen[0])
        return y
    for b, length in enumerate(seen):
        start, n = starts[b], starts[b + 1] - starts[b]
        if not n or not length:
            continue
        if n == 1 and side_by_side[b]:
            tokens(start, 1, firsts[b], 0, length)
            continue
        chosen = slice(firsts[b], firsts[b] + used[b]) if side_by_side[b] else tables[b, : used[b]].long()
        keys, values = (x[chosen].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v))  # [1, G, length, Dh]
        own = q[start : start + n].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, R, n, Dh]
        if (n, length) not in masks:
            mask = torch.full((n, length), float("-inf"), dtype=q.dtype).triu(length - n + 1)
            masks[n, length] = mask.repeat(own.shape[1], 1)[None, None]
        found, _ = _on_cpu(own.flatten(1, 2)[None], keys, values, 0.0, False, attn_mask=masks[n, length])
        y[start : start + n] = found[0].unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)
    return y


on_cpu(_forward, on_host)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, *, rows: int = 1
) -> Tensor:
    """q [T, H, Dh] of B packed segments -> [T, H, Dh]; no gradient.

    k, v [pages, page, G, Dh] of one layout, H a multiple of G, rows contiguous. cu_q int32 [B + 1], tables int32
    [B, M]: pages of a segment in order; lengths int32 [B]: keys it has, its own new rows, which are in the pages
    already, included. rows: at most so many new ones of a segment. A segment without rows or keys is left out.
    """
    expect(q.shape[1] % k.shape[2] == 0, "paged_attention", "heads", q.shape[1], f"a multiple of {k.shape[2]}")
    expect(k.shape == v.shape and k.stride() == v.stride(), "paged_attention", "v", tuple(v.shape), "k's layout")
    expect(q.dtype == k.dtype == v.dtype, "paged_attention", "dtypes", (q.dtype, k.dtype, v.dtype), "one")
    expect(INTERPRETED or q.device.type != "mps", "paged_attention", "device", q.device, "a GPU or a CPU")
    return _forward(q if q.stride(2) == 1 else q.contiguous(), k, v, cu_q, tables, lengths, rows)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Segment by segment, in the dtype of q."""
    y = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        start, end = cu_q[b : b + 2].tolist()
        keys, values = (x[tables[b].long()].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], 1)
                        for x in (k, v))  # fmt: skip
        s = torch.einsum("qhd,khd->hqk", q[start:end], keys) * q.shape[2] ** -0.5
        i, j = torch.arange(end - start, device=q.device), torch.arange(length, device=q.device)
        s = s.masked_fill(j > length - (end - start) + i[:, None], float("-inf"))
        y[start:end] = torch.einsum("hqk,khd->qhd", s.softmax(-1).nan_to_num(), values)
    return y


def cost(new: list[int], lengths: list[int], heads: int, groups: int, width: int, itemsize: int = 2) -> Cost:
    """4·Dh operations a visible pair and head; keys and values of all segments, queries and results once."""
    pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(new, lengths))
    return Cost(4 * pairs * heads * width, itemsize * width * (2 * groups * sum(lengths) + 2 * heads * sum(new)))
