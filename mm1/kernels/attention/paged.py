"""Attention over a paged cache, for one new token of many sequences or for several new rows behind cached ones.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] / √Dh) v[j, g],   j ≤ lengths[b] - n[b] + i

Segment b has n[b] new rows, the last of lengths[b]; keys and values lie in pages of one size, anywhere, which the
segment's table names in order (Kwon et al. 2023, PagedAttention). Keys are split over programs, each with a softmax of
its own, and `_merge_kernel` makes one of them (Dao et al. 2023, Flash-Decoding): a token alone would keep G programs
busy. Bound by reading keys and values once, 2·G·Dh elements a token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.attention import tiles as flash_tiles
from mm1.kernels.cost_model import LAUNCH, product_seconds
from mm1.kernels.device import Device
from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    cdiv,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_integers,
    launch,
    on_cpu,
    power_of_2,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.tiles import dot
from mm1.kernels.tuning import Tunable, config_for

MOST_SPLITS = 64  # parts that one program merges
PIECE = 8192  # keys that a CPU attends to at once: copies of scattered pages stay small


@dataclass(frozen=True)
class Config(flash_tiles.Config):
    """Sizes of a program: block_m rows of a group (its heads, times new rows), block_n keys at once.

    programs: how many a multiprocessor should have; keys are split until there are so many.
    """

    block_m: int = 16
    block_n: int = 64
    warps: int = 4
    programs: int = 2


class PagedShape(NamedTuple):
    """The sizes that a configuration depends on and the host knows without waiting for the device."""

    keys: int  # of a segment at most, to the next power of two
    groups: int  # of all segments
    rows: int  # of a group at most: new ones by heads
    width: int

    def tiles(self, config: Config) -> int:
        """Return how many tiles the rows of a group are."""
        return cdiv(self.rows, config.block_m)


def splits(config: Config, shape: PagedShape, device: Device) -> int:
    """Return how many programs share a tile's keys: enough to keep every unit busy, none without keys of its own.

    A power of two, so that few are compiled.
    """
    wanted = cdiv(config.programs * device.units, max(shape.groups * shape.tiles(config), 1))
    return min(power_of_2(wanted), power_of_2(cdiv(shape.keys, config.block_n)), MOST_SPLITS)


def _padded(shape: PagedShape) -> flash_tiles.FlashShape:
    """Return the shape of attention whose tiles take as much memory."""
    return flash_tiles.FlashShape(shape.keys, shape.groups, shape.groups, power_of_2(shape.width), False)


def legal(config: Config, shape: PagedShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the tiles fit the GPU, as attention's do."""
    return flash_tiles.legal("flash", config, _padded(shape), dtype, device)


def space(shape: PagedShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations that are worth measuring where they are legal."""
    axes = product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4), (1, 2, 4, 8))
    return (Config(*axis) for axis in axes if axis[0] <= max(16, power_of_2(shape.rows)))


def default(shape: PagedShape, dtype: torch.dtype, device: Device) -> Config:
    """Return a tile of all rows of a group, as far as that spills no register, and as many stages as fit."""
    most, warps = (64, 4) if shape.width <= 128 else (32, 8)
    config = Config(min(max(power_of_2(shape.rows), 16), most), warps=warps)
    if dtype == torch.float32:  # products of fp32 are made of single multiplications: small tiles in registers
        config = Config(16, 16, stages=2)
    elif config.block_m == 64 and not device.asynchronous:
        config = replace(config, block_n=32)
    while not legal(config, shape, dtype, device) and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    while not legal(config, shape, dtype, device):
        config = replace(config, block_m=max(config.block_m // 2, 16), block_n=config.block_n // 2)
    return config


def seconds(config: Config, shape: PagedShape, dtype: torch.dtype, device: Device) -> float:
    """Predict the time where all segments have `keys`: two products side by side, then the parts are merged."""
    count, width, size = splits(config, shape, device), power_of_2(shape.width), dtype.itemsize
    depth = 2 * width * cdiv(cdiv(shape.keys, config.block_n), count)
    shared = flash_tiles.shared_bytes("flash", config, width, size, device)
    parts = 0 if count == 1 else 4 * count * shape.groups * shape.rows * shape.width
    moved = 2 * shape.groups * shape.width * size * (shape.keys + shape.rows) + parts
    merging = LAUNCH + parts / (device.bandwidth * 1e9) if parts else 0.0
    return merging + product_seconds(
        shape.groups * shape.tiles(config) * count, depth, config.block_m, config.block_n, width, config.warps,
        config.stages, shared, moved, size, device,
    )  # fmt: skip


PAGED = Tunable("paged_attention", PagedShape, Config, space, legal, default, seconds, ("width",))


@triton.jit
def _paged_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, table_ptr, lengths_ptr, y_ptr, lse_ptr, stride_qt, stride_qh, stride_kp, stride_kr,
    stride_kg, stride_table, T, splits, tiles, scale, H: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y [splits, T, H, WIDTH] of a split's keys alone, and lse fp32 [splits, T, H], base 2, unless it is None."""
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
    out = (split * T + place) * H + head
    tl.store(y_ptr + out[:, None] * WIDTH + d[None, :], y.to(y_ptr.dtype.element_ty), inside[:, None] & wide[None, :])
    if lse_ptr is not None:
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + out, lse, inside)


@triton.jit
def _merge_kernel(
    y_ptr, lse_ptr, cu_ptr, out_ptr, rows, B, H: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write out[row] = Σ_s y[s, row] 2^lse[s, row] / Σ_s 2^lse[s, row], zeros behind the last of B segments."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + s * rows + row)
    top = tl.max(lse, 0)
    w = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - top))
    total = tl.sum(w, 0)
    y = tl.load(y_ptr + (s * rows + row)[:, None] * WIDTH + d[None, :], (d < WIDTH)[None, :], other=0.0)
    y = tl.sum(y * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    y = tl.where(row < tl.load(cu_ptr + B) * H, y, 0.0)  # where no program wrote, y and lse are anything
    tl.store(out_ptr + row * WIDTH + d, y.to(out_ptr.dtype.element_ty), d < WIDTH)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int
) -> Tensor:  # fmt: skip
    """Return attention [T, H, Dh] by the Triton kernels; arguments as `paged_attention` checks them."""
    (T, H, width), (_, page, G, _) = q.shape, k.shape
    B, device, block_d = len(lengths), device_of(q), power_of_2(width)
    if B == 0:
        return q.new_zeros(T, H, width)
    shape = PagedShape(power_of_2(tables.shape[1] * page), B * G, rows * (H // G), width)
    config = config_for(PAGED, shape, q.dtype, device)
    count, tiles = splits(config, shape, device), shape.tiles(config)
    out = (q.new_zeros if count == 1 else q.new_empty)(T, H, width)
    part = out if count == 1 else q.new_empty(count, T, H, width, dtype=torch.float32)
    lse = None if count == 1 else q.new_empty(count, T, H, dtype=torch.float32)
    (stride_qt, stride_qh, _), (stride_kp, stride_kr, stride_kg, _) = q.stride(), k.stride()
    launch(
        _paged_kernel, B * G * tiles * count, q_ptr=q, k_ptr=k, v_ptr=v, cu_ptr=cu_q, table_ptr=tables,
        lengths_ptr=lengths, y_ptr=part, lse_ptr=lse, stride_qt=stride_qt, stride_qh=stride_qh, stride_kp=stride_kp,
        stride_kr=stride_kr, stride_kg=stride_kg, stride_table=tables.stride(0), T=T, splits=count, tiles=tiles,
        scale=width**-0.5 / math.log(2), H=H, G=G, WIDTH=width, PAGE=page, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_D=block_d, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if count > 1:
        launch(
            _merge_kernel, T * H, y_ptr=part, lse_ptr=lse, cu_ptr=cu_q, out_ptr=out, rows=T * H, B=B, H=H, WIDTH=width,
            SPLITS=count, BLOCK_D=block_d, num_warps=cdiv(count * block_d, 2048),
        )  # fmt: skip
    return out


_forward = torch.library.custom_op("mm1::paged_attention", forward, mutates_args=())


@_forward.register_fake
def _(q, k, v, cu_q, tables, lengths, rows):
    return q.new_empty(q.shape)


_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def on_host(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int, piece: int = PIECE
) -> Tensor:
    """Return attention [T, H, Dh] by torch's flash attention for CPUs; arguments as `paged_attention` checks them.

    Rows see cached keys without a mask, `piece` keys at a time, and each other causally: no mask of all pairs is made.
    Pages that several segments begin with are attended to by all their rows at once, later keys by each segment on its
    own, equal sizes side by side. Softmaxes become one as in `_merge_kernel` (Juravsky et al. 2024, Hydragen).
    """
    page, groups = k.shape[1:3]
    starts, seen, pages = cu_q.tolist(), lengths.tolist(), tables.tolist()
    new = _expect_places(starts, seen, pages, len(q), rows, len(k), page)
    # Rows before the first key see nothing, and stay zeros.
    new = [min(n, length) for n, length in zip(new, seen)]
    starts = [end - n for n, end in zip(new, starts[1:])]
    y = torch.zeros_like(q, dtype=wide(q.dtype), memory_format=torch.contiguous_format)
    lse = y.new_empty(*q.shape[:2], 1)  # natural logarithm of each softmax's sum so far

    def gathered(chosen: list[list[int]], first: int, last: int) -> list[Tensor]:
        """Return keys and values `first` to `last` of B segments, [B, last - first, G, Dh] each."""
        used = [table[first // page : cdiv(last, page)] for table in chosen]
        low, high = used[0][0], used[0][-1]
        side_by_side = len(used) == 1 and used[0] == [*range(low, high + 1)]  # which need no copy
        whole = (x[low : high + 1] if side_by_side else x[torch.tensor(used, device=x.device)] for x in (k, v))
        inside = slice(first % page, first % page + last - first)
        return [x.reshape(len(used), -1, groups, x.shape[-1])[:, inside] for x in whole]

    def merge(at: Tensor, first: int, result: Tensor, sums: Tensor) -> None:
        """Add the results [B, n, H, Dh] of rows `at` [B, n] from key `first` on, by logarithms of sums [B, n, H, 1]."""
        if first:
            before, result = lse[at], result.to(y.dtype)
            result, sums = torch.lerp(y[at], result, (sums - before).sigmoid()), torch.logaddexp(before, sums)
        y[at], lse[at] = result.to(y.dtype), sums

    def see(at: Tensor, chosen: list[list[int]], first: int, last: int) -> None:
        """Attend with rows `at` [B, n] to all keys `first` to `last` of B segments."""
        # The heads of a group are rows: torch's flash attention on CPU takes no groups.
        queries = q[at].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R·n, Dh]
        for start in range(first, last, piece):
            keys, values = (x.transpose(1, 2) for x in gathered(chosen, start, min(start + piece, last)))
            result, sums = _on_cpu(queries, keys, values, 0.0, False)
            parts = (x.unflatten(2, (-1, at.shape[1])) for x in (result, sums[..., None]))
            merge(at, start, *(x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in parts))

    def see_own(at: Tensor, chosen: list[list[int]], first: int, last: int) -> None:
        """Attend with rows `at` [B, n] to the keys `first` to `last` that are their own, each up to itself."""
        own = (x.repeat_interleave(q.shape[1] // groups, 2) for x in gathered(chosen, first, last))
        result, sums = _on_cpu(*(x.transpose(1, 2) for x in (q[at], *own)), 0.0, True)
        merge(at, first, *(x.transpose(1, 2) for x in (result, sums[..., None])))

    beginnings: dict[int, list[int]] = {}
    for b, n in enumerate(new):
        if n:
            beginnings.setdefault(pages[b][0], []).append(b)
    for same in beginnings.values():
        before = page * _in_common([pages[b][: (seen[b] - new[b]) // page] for b in same])
        if before:
            every = torch.cat([torch.arange(starts[b], starts[b] + new[b], device=q.device) for b in same])
            see(every[None], [pages[same[0]]], 0, before)
        sizes: dict[tuple[int, int], list[int]] = {}
        for b in same:
            sizes.setdefault((new[b], seen[b]), []).append(b)
        for (n, length), alike in sizes.items():
            at = cu_q.new_tensor([starts[b] for b in alike])[:, None] + torch.arange(n, device=q.device)
            chosen = [pages[b] for b in alike]
            see(at, chosen, before, length if n == 1 else length - n)  # a token alone sees all
            if n > 1:
                see_own(at, chosen, length - n, length)
    return y.to(q.dtype)


def _expect_places(
    starts: list[int], seen: list[int], pages: list[list[int]], total: int, rows: int, count: int, page: int
) -> list[int]:
    """Return how many new rows each segment has. Raise ValueError for places outside the tensors."""
    op, new = "paged_attention", [end - start for start, end in pairwise(starts)]
    expect(starts[0] == 0 and starts[-1] <= total and min(new, default=0) >= 0, op, "cu_q", starts,
           f"offsets that rise from 0 to at most the {total} rows")  # fmt: skip
    expect(max(new, default=0) <= rows, op, "rows", rows, f"at least the largest of the segments' new rows, {new}")
    for b, (length, table) in enumerate(zip(seen, pages)):
        expect(0 <= length <= len(table) * page, op, f"lengths[{b}]", length,
               f"at most {len(table)} pages of {page} keys")  # fmt: skip
        used = table[: cdiv(length, page)]
        expect(all(0 <= p < count for p in used), op, f"tables[{b}]", used, f"pages of 0 … {count - 1}")
    return new


def _in_common(tables: list[list[int]]) -> int:
    """Return how many pages several segments all begin with; 0 for one segment."""
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*tables))) if len(tables) > 1 else 0


on_cpu(_forward, on_host)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, *, rows: int = 1
) -> Tensor:
    """Return attention of the new rows q [T, H, Dh] of B packed segments to their cached keys: [T, H, Dh]; no gradient.

    k, v [pages, page, G, Dh] of one layout, H a multiple of G, rows contiguous. cu_q int [B + 1], tables int [B, M]:
    the pages of each segment in order; lengths int [B]: the keys of each segment, its own new rows, which are in the
    pages already, included. rows: an upper bound of a segment's new rows. Rows of no segment, and rows before the first
    key of theirs, come back as zeros. q, k and v have one dtype. Raise ValueError for shapes, dtypes and devices that
    do not fit, and on a CPU for offsets, lengths and pages outside the tensors; a GPU's are not looked at.
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
    return _forward(q if q.stride(2) == 1 else q.contiguous(), k, v, *integers, rows)


def cost(new: list[int], lengths: list[int], heads: int, groups: int, width: int, itemsize: int = 2) -> Cost:
    """Return the operations and bytes for segments with `new` rows each, the last of `lengths` keys.

    4·Dh operations a visible pair and head; keys and values of all segments, queries and results once.
    """
    pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(new, lengths))
    return Cost(4 * pairs * heads * width, itemsize * width * (2 * groups * sum(lengths) + 2 * heads * sum(new)))
