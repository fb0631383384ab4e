"""Compute attention over a paged cache, for one or several new rows of each of many sequences.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] / √Dh) v[j, g],   j ≤ lengths[b] - n[b] + i

Segment b has n[b] new rows, the last of its lengths[b] rows. Keys and values are stored in pages of one size, and the
segment's table lists its pages in order (Kwon et al. 2023, PagedAttention). Keys are split over programs, each with its
own softmax, which `_merge_kernel` combines (Dao et al. 2023, Flash-Decoding); without it a single token would keep only
G programs busy. Bound by reading keys and values once, 2·G·Dh elements for each cached token.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.attention import plain, tiles
from mm1.kernels.cost_model import LAUNCH, Predicted, Product, memory_seconds
from mm1.kernels.device import Device
from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    cdiv,
    custom_op,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_integers,
    launch,
    power_of_2,
    unit_stride,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.tiles import dot
from mm1.kernels.tuning import Tunable, config_for

MAX_SPLITS = 64  # parts that one program merges
PIECE = 8192  # keys of one step on a CPU, so that copies of scattered pages stay small


@dataclass(frozen=True)
class Config(tiles.Config):
    """Hold a program's tile: block_m rows of a group (its heads times new rows), times block_n keys a step.

    programs: keys are split until each multiprocessor has this number of programs.
    """

    block_m: int = 16
    block_n: int = 64
    warps: int = 4
    programs: int = 2


class PagedShape(NamedTuple):
    """Hold the sizes that a configuration depends on; the host knows them without waiting for the device."""

    keys: int  # an upper bound of a segment's keys, a power of two
    groups: int  # of all segments
    rows: int  # an upper bound of a group's rows: new rows times heads
    width: int

    def tiles(self, config: Config) -> int:
        """Return the number of tiles of a group's rows."""
        return cdiv(self.rows, config.block_m)


def splits(config: Config, shape: PagedShape, device: Device) -> int:
    """Return the number of programs that share a tile's keys, a power of two so that few kernels are compiled.

    There are enough programs to keep every multiprocessor busy, but none without keys.
    """
    needed = cdiv(config.programs * device.units, max(shape.groups * shape.tiles(config), 1))
    return min(power_of_2(needed), power_of_2(cdiv(shape.keys, config.block_n)), MAX_SPLITS)


def _padded(shape: PagedShape) -> tiles.FlashShape:
    """Return the shape of packed attention whose tiles take the same memory."""
    return tiles.FlashShape(shape.keys, shape.groups, shape.groups, power_of_2(shape.width), False)


def legal(config: Config, shape: PagedShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the tiles fit into shared memory and registers."""
    return tiles.legal("flash", config, _padded(shape), dtype, device)


def space(shape: PagedShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not."""
    axes = product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4), (1, 2, 4, 8))
    return (Config(*axis) for axis in axes if axis[0] <= max(16, power_of_2(shape.rows)))


def default(shape: PagedShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose a tile with all rows of a group, if that spills no register, and as many stages as fit."""
    max_rows, warps = (64, 4) if shape.width <= 128 else (32, 8)
    config = Config(min(max(power_of_2(shape.rows), 16), max_rows), warps=warps)
    if dtype == torch.float32:  # no matrix units: small tiles in registers
        config = Config(16, 16, stages=2)
    elif config.block_m == 64 and not device.asynchronous:
        config = replace(config, block_n=32)
    while not legal(config, shape, dtype, device) and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    while not legal(config, shape, dtype, device):
        config = replace(config, block_m=max(config.block_m // 2, 16), block_n=config.block_n // 2)
    return config


def work(config: Config, shape: PagedShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run where all segments have `keys` keys: two products, then the merge."""
    count, width, size = splits(config, shape, device), power_of_2(shape.width), dtype.itemsize
    depth = width * cdiv(cdiv(shape.keys, config.block_n), count)
    shared = tiles.shared_bytes("flash", config, width, size, device)
    parts = 0 if count == 1 else 4 * count * shape.groups * shape.rows * shape.width
    moved = 2 * shape.groups * shape.width * size * (shape.keys + shape.rows) + parts
    merging = LAUNCH + memory_seconds(parts, device) if parts else 0.0
    # 3.4 instead of 2: a row's address takes its page number, which is loaded first.
    return Product(
        shape.groups * shape.tiles(config) * count, depth, config.block_m, config.block_n, width, config.warps,
        config.stages, shared, moved, size, 2 * config.block_n * width, 3.4 * config.block_n * width, products=2,
        beside=merging,
    )  # fmt: skip


PAGED = Tunable("paged_attention", PagedShape, Config, space, legal, default, Predicted(work), ("width",))


@triton.jit(do_not_specialize=["stride_table", "T", "splits", "tiles"])
def _paged_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, table_ptr, lengths_ptr, y_ptr, lse_ptr, stride_qt, stride_qh, stride_kp, stride_kr,
    stride_kg, stride_table, T, splits, tiles, scale, H: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store y [splits, T, H, WIDTH] over a split's keys, and lse fp32 [splits, T, H], base 2, unless it is None."""
    R: tl.constexpr = H // G
    pid = tl.program_id(0)
    split = pid % splits
    m = pid // splits % tiles
    g = pid // (splits * tiles) % G
    b = pid // (splits * tiles * G)
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
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    stop = tl.where(m * BLOCK_M < n * R, tl.minimum((split + 1) * span, length), 0)
    table_ptr += b * stride_table
    j = split * span + tl.arange(0, BLOCK_N)
    page = tl.load(table_ptr + j.to(tl.uint32) // PAGE, j < stop, other=0)
    for start in range(split * span, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        real = j < length
        # Unsigned numbers take 56 instructions fewer: shifts instead of divisions that round towards zero.
        inside_page = (j.to(tl.uint32) % PAGE).to(tl.int32)
        at = page.to(tl.uint32).to(tl.int64) * stride_kp + inside_page * stride_kr + g * stride_kg
        loaded = real[:, None] & wide[None, :]
        k = tl.load(k_ptr + at[:, None] + d[None, :], loaded, other=0.0)
        v = tl.load(v_ptr + at[:, None] + d[None, :], loaded, other=0.0)
        # Load the pages of the next step now: a load of keys that waits for its pages takes two stages of the pipeline.
        page = tl.load(table_ptr + (j + BLOCK_N).to(tl.uint32) // PAGE, j + BLOCK_N < stop, other=0)
        s = dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        s = tl.where(real[None, :] & (j[None, :] <= last[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that sees none of the keys so far
        p = tl.exp2(s - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrunk[:, None])
        top = new
    seen = total > 0
    y = acc / tl.where(seen, total, 1.0)[:, None]
    out = (split * T + place) * H + head
    tl.store(y_ptr + out[:, None] * WIDTH + d[None, :], y.to(y_ptr.dtype.element_ty), inside[:, None] & wide[None, :])
    if lse_ptr is not None:
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + out, lse, inside)


@triton.jit(do_not_specialize=["rows", "B"])
def _merge_kernel(
    y_ptr, lse_ptr, cu_ptr, out_ptr, rows, B, H: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store out[row] = Σ_s y[s, row] 2^lse[s, row] / Σ_s 2^lse[s, row], zeros past the last of B segments."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + s * rows + row)
    top = tl.max(lse, 0)
    w = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - top))
    total = tl.sum(w, 0)
    y = tl.load(y_ptr + (s * rows + row)[:, None] * WIDTH + d[None, :], (d < WIDTH)[None, :], other=0.0)
    y = tl.sum(y * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    y = tl.where(row < tl.load(cu_ptr + B) * H, y, 0.0)  # where no program stored, y and lse are undefined
    tl.store(out_ptr + row * WIDTH + d, y.to(out_ptr.dtype.element_ty), d < WIDTH)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Return attention [T, H, Dh] by the Triton kernels; the arguments are those of paged_attention."""
    (T, H, width), (_, page, G, _) = q.shape, k.shape
    B, device, block_d = len(lengths), device_of(q), power_of_2(width)
    if B == 0:
        return q.new_zeros(T, H, width)
    shape = PagedShape(power_of_2(tables.shape[1] * page), B * G, rows * (H // G), width)
    config = config_for(PAGED, shape, q.dtype, device)
    count, row_tiles = splits(config, shape, device), shape.tiles(config)
    out = (q.new_zeros if count == 1 else q.new_empty)(T, H, width)
    part = out if count == 1 else q.new_empty(count, T, H, width, dtype=torch.float32)
    lse = None if count == 1 else q.new_empty(count, T, H, dtype=torch.float32)
    (stride_qt, stride_qh, _), (stride_kp, stride_kr, stride_kg, _) = q.stride(), k.stride()
    launch(
        _paged_kernel, B * G * row_tiles * count, q_ptr=q, k_ptr=k, v_ptr=v, cu_ptr=cu_q, table_ptr=tables,
        lengths_ptr=lengths, y_ptr=part, lse_ptr=lse, stride_qt=stride_qt, stride_qh=stride_qh, stride_kp=stride_kp,
        stride_kr=stride_kr, stride_kg=stride_kg, stride_table=tables.stride(0), T=T, splits=count, tiles=row_tiles,
        scale=width**-0.5 / math.log(2), H=H, G=G, WIDTH=width, PAGE=page, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_D=block_d, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if count > 1:
        launch(
            _merge_kernel, T * H, y_ptr=part, lse_ptr=lse, cu_ptr=cu_q, out_ptr=out, rows=T * H, B=B, H=H, WIDTH=width,
            SPLITS=count, BLOCK_D=block_d, num_warps=cdiv(count * block_d, 2048),
        )  # fmt: skip
    return out


_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (q, k, v, dropout, causal)


def on_host(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int, piece: int = PIECE
) -> Tensor:
    """Return attention [T, H, Dh] by torch's flash attention for CPUs; the arguments are those of paged_attention.

    New rows see the cached keys without a mask, `piece` keys a step, and each other causally, so that no mask of all
    pairs is allocated. Pages that several segments begin with are attended to by the rows of all of them at once, later
    keys by each segment alone, with segments of equal sizes in one batch. Softmaxes are merged as in `_merge_kernel`
    (Juravsky et al. 2024, Hydragen).
    """
    page, groups = k.shape[1:3]
    starts, keys, pages = cu_q.tolist(), lengths.tolist(), tables.tolist()
    new = _checked_rows(starts, keys, pages, len(q), rows, len(k), page)
    # Rows before the first key see nothing, and stay zeros.
    new = [min(n, length) for n, length in zip(new, keys)]
    starts = [end - n for n, end in zip(new, starts[1:])]
    y = torch.zeros_like(q, dtype=wide(q.dtype), memory_format=torch.contiguous_format)
    lse = y.new_empty(*q.shape[:2], 1)  # natural logarithm of each softmax's sum so far

    def gathered(page_lists: list[list[int]], first: int, last: int) -> list[Tensor]:
        """Return keys and values `first` to `last` of B segments, [B, last - first, G, Dh] each."""
        used = [table[first // page : cdiv(last, page)] for table in page_lists]
        low, high = used[0][0], used[0][-1]
        contiguous = len(used) == 1 and used[0] == [*range(low, high + 1)]  # needs no copy
        whole = (x[low : high + 1] if contiguous else x[torch.tensor(used, device=x.device)] for x in (k, v))
        inside = slice(first % page, first % page + last - first)
        return [x.reshape(len(used), -1, groups, x.shape[-1])[:, inside] for x in whole]

    def merge(at: Tensor, first: int, result: Tensor, sums: Tensor) -> None:
        """Merge results [B, n, H, Dh] over keys from `first` on into rows `at` [B, n], by log-sums [B, n, H, 1]."""
        if first:
            before, result = lse[at], result.to(y.dtype)
            result, sums = torch.lerp(y[at], result, (sums - before).sigmoid()), torch.logaddexp(before, sums)
        y[at], lse[at] = result.to(y.dtype), sums

    def attend(at: Tensor, page_lists: list[list[int]], first: int, last: int) -> None:
        """Attend with rows `at` [B, n] to all keys `first` to `last` of B segments."""
        # The heads of a group are rows: torch's flash attention on CPU takes no groups.
        queries = q[at].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R·n, Dh]
        for start in range(first, last, piece):
            pair = (x.transpose(1, 2) for x in gathered(page_lists, start, min(start + piece, last)))
            result, sums = _on_cpu(queries, *pair, 0.0, False)
            parts = (x.unflatten(2, (-1, at.shape[1])) for x in (result, sums[..., None]))
            merge(at, start, *(x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in parts))

    def attend_own(at: Tensor, page_lists: list[list[int]], first: int, last: int) -> None:
        """Attend causally with rows `at` [B, n] to their own keys, `first` to `last`."""
        own = (x.repeat_interleave(q.shape[1] // groups, 2) for x in gathered(page_lists, first, last))
        result, sums = _on_cpu(*(x.transpose(1, 2) for x in (q[at], *own)), 0.0, True)
        merge(at, first, *(x.transpose(1, 2) for x in (result, sums[..., None])))

    by_first_page: defaultdict[int, list[int]] = defaultdict(list)
    for b, n in enumerate(new):
        if n:
            by_first_page[pages[b][0]].append(b)
    for same in by_first_page.values():
        shared = page * _common_pages([pages[b][: (keys[b] - new[b]) // page] for b in same])
        if shared:
            every = torch.cat([torch.arange(starts[b], starts[b] + new[b], device=q.device) for b in same])
            attend(every[None], [pages[same[0]]], 0, shared)
        by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for b in same:
            by_size[new[b], keys[b]].append(b)
        for (n, length), segments in by_size.items():
            at = cu_q.new_tensor([starts[b] for b in segments])[:, None] + torch.arange(n, device=q.device)
            page_lists = [pages[b] for b in segments]
            attend(at, page_lists, shared, length if n == 1 else length - n)  # a single new row sees all keys
            if n > 1:
                attend_own(at, page_lists, length - n, length)
    return y.to(q.dtype)


def _checked_rows(
    starts: list[int], lengths: list[int], pages: list[list[int]], total: int, rows: int, count: int, page: int
) -> list[int]:
    """Return the number of new rows of each segment. Raise ValueError for offsets and pages outside the tensors."""
    op, new = "paged_attention", [end - start for start, end in pairwise(starts)]
    expect(starts[0] == 0 and starts[-1] <= total and min(new, default=0) >= 0, op, "cu_q", starts,
           f"offsets that rise from 0 to at most the {total} rows")  # fmt: skip
    expect(max(new, default=0) <= rows, op, "rows", rows, f"at least the largest of the segments' new rows, {new}")
    for b, (length, table) in enumerate(zip(lengths, pages)):
        expect(0 <= length <= len(table) * page, op, f"lengths[{b}]", length,
               f"at most {len(table)} pages of {page} keys")  # fmt: skip
        used = table[: cdiv(length, page)]
        expect(all(0 <= p < count for p in used), op, f"tables[{b}]", used, f"pages of 0 … {count - 1}")
    return new


def _common_pages(tables: list[list[int]]) -> int:
    """Return the number of pages that several segments all begin with; 0 for one segment."""
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*tables))) if len(tables) > 1 else 0


_forward = custom_op("paged_attention", forward, on_host, plain=plain.paged)
_forward.register_fake(lambda q, *others: q.new_empty(q.shape))


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, *, rows: int = 1
) -> Tensor:
    """Return attention of the new rows q [T, H, Dh] of B packed segments to their cached keys: [T, H, Dh]; no gradient.

    k, v [pages, page, G, Dh] with the same strides and contiguous rows; H is a multiple of G. cu_q int [B + 1]: offsets
    of the segments. tables int [B, M]: the pages of each segment in order. lengths int [B]: the number of keys of each
    segment, including those of its new rows, which must be in the pages already. rows: an upper bound of a segment's
    new rows. Rows of no segment, and rows before their segment's first key, are zeros. q, k and v have one dtype.

    Raises TypeError for arguments that are no tensors, ValueError for wrong shapes, dtypes and devices, and on a CPU
    for offsets, lengths and pages outside the tensors; those on a GPU are not checked, to avoid a synchronization.
    """
    op = "paged_attention"
    expect_alike(op, q=q, k=k, v=v, cu_q=cu_q, tables=tables, lengths=lengths)
    expect(q.ndim == 3 and k.ndim == 4, op, "q and k", (tuple(q.shape), tuple(k.shape)), "3 and 4 dimensions")
    expect(k.shape[2] > 0 and q.shape[1] % k.shape[2] == 0, op, "heads", q.shape[1], f"a multiple of {k.shape[2]}")
    expect(q.shape[2] == k.shape[3], op, "head width of k", k.shape[3], q.shape[2])
    expect(k.shape == v.shape and k.stride() == v.stride(), op, "v", tuple(v.shape), "k's layout")
    expect(q.dtype == k.dtype == v.dtype, op, "dtypes of q, k and v", (q.dtype, k.dtype, v.dtype), "one")
    expect(k.stride(3) == 1 or k.shape[3] == 1, op, "stride of a row of k", k.stride(3), 1)
    expect_float(op, "q", q)
    for name, x, ndim in (("cu_q", cu_q, 1), ("tables", tables, 2), ("lengths", lengths, 1)):
        expect_integers(op, name, x, ndim)
    B = lengths.shape[0]
    expect(cu_q.shape[0] == B + 1, op, "cu_q", tuple(cu_q.shape), (B + 1,))
    expect(tables.shape[0] == B, op, "tables", tuple(tables.shape), [B, "M"])
    expect(INTERPRETED or q.device.type != "mps", op, "device", q.device, "a GPU or a CPU")
    integers = (x.int().contiguous() for x in (cu_q, tables, lengths))
    return _forward(unit_stride(q), k, v, *integers, rows)


def cost(new: list[int], lengths: list[int], heads: int, groups: int, width: int, itemsize: int = 2) -> Cost:
    """Return the operations and bytes of segments with `new` new rows and `lengths` keys each.

    4·Dh operations for each visible pair and head; keys and values, queries and results are moved once.
    """
    pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(new, lengths))
    return Cost(4 * pairs * heads * width, itemsize * width * (2 * groups * sum(lengths) + 2 * heads * sum(new)))
