"""Map the programs of attention's kernels to rows: a map from tiles to segments, made on the device.

A segment's rows are cut into tiles of BLOCK_M; no tile has rows of two segments. The host computes only an upper bound
of the number of tiles, so that nothing waits for the device.
"""

from torch import Tensor

from mm1.kernels.dispatch import cdiv, launch
from mm1.kernels.language import tl, triton

TILES, SEGMENTS = 32, 64  # tiles of one program, and segments that it compares them with in one step


@triton.jit(do_not_specialize=["rows", "other_rows", "B", "tiles"])
def map_kernel(
    own_ptr, other_ptr, used_ptr, prefix_ptr, map_ptr, rows, other_rows, B, tiles, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Store the map, int32 [5 or 6, tiles], which `tile_map` describes.

    KEYS: the tiles' own rows are keys. Rows past the last segment are one more segment, with no rows on the other side.
    Offsets are clamped to the rows, so that no kernel reads outside its tensors.
    """
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    before = tl.zeros((), tl.int32)
    COLUMNS: tl.constexpr = 5 if prefix_ptr is None else 6
    zeros = tl.zeros((BLOCK_T,), tl.int32)
    columns = (zeros - 1, zeros, zeros, zeros, zeros, zeros)[:COLUMNS]
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
        prefix_end = s_begin
        if prefix_ptr is not None:
            prefix = tl.maximum(tl.load(prefix_ptr + s, real, other=0), 0)
            if KEYS:
                prefix_end = s_begin + tl.minimum(prefix, tl.maximum(s_end - s_begin, 0))
            else:
                prefix_end = o_begin + tl.minimum(prefix, tl.maximum(o_end - o_begin, 0))
        values = (until - count + 1, s_begin, s_end, o_begin, o_end, prefix_end)
        sums = ()
        for i in tl.static_range(COLUMNS):
            sums = sums + (columns[i] + tl.sum(tl.where(mine, values[i][None, :], 0), 1),)
        columns = sums
        before += tl.sum(count, 0)
    for i in tl.static_range(COLUMNS):
        tl.store(map_ptr + i * tiles + tile, columns[i], tile < tiles)


@triton.jit
def place(map_ptr, tiles, heads, KEYS: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return this program's head (-1: no tile), its tile's first row and end, the other side's, and the prefix's end.

    Programs are ordered by segment, head and tile, so that programs with the same rows share them in L2. Tiles of
    queries run from the segment's last tile, which sees the most keys under a causal mask, to its first.
    """
    pid = tl.program_id(0)
    column = map_ptr + pid // heads
    first = tl.load(column)
    begin = tl.load(column + tiles)
    end = tl.load(column + 2 * tiles)
    other_begin = tl.load(column + 3 * tiles)
    other_end = tl.load(column + 4 * tiles)
    prefix_end = begin if KEYS else other_begin
    if MASK == "prefix":
        prefix_end = tl.load(column + 5 * tiles)
    count = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 1)
    local = pid - first * heads
    m = local % count
    if not KEYS and MASK != "full":
        m = count - 1 - m
    head = tl.where(first < 0, -1, local // count)
    return head, begin + m * BLOCK_M, end, other_begin, other_end, prefix_end


def tile_map(
    own: Tensor, other: Tensor, used_k: Tensor | None, prefix: Tensor | None, rows: int, other_rows: int, block: int,
    keys: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return the map int32 [5 or 6, tiles] and an upper bound of the number of tiles.

    The map has for each tile: the first tile of its segment (-1: no tile), the segment's first row and end, the first
    row and end on the other side, and with prefix int32 [B] the end of the keys that all queries of the segment see.
    own, other int32 [B + 1]: offsets of the tiles' rows (keys: whether these are keys) and of the rows on the other
    side. used_k int32 [B].
    """
    B = own.shape[0] - 1
    tiles = min(cdiv(rows, block) + B + 1, rows)
    columns = own.new_empty(5 if prefix is None else 6, tiles)
    launch(
        map_kernel, cdiv(tiles, TILES), own_ptr=own, other_ptr=other, used_ptr=used_k, prefix_ptr=prefix,
        map_ptr=columns, rows=rows, other_rows=other_rows, B=B, tiles=tiles, KEYS=keys, BLOCK_M=block, BLOCK_T=TILES,
        BLOCK_B=SEGMENTS, num_warps=4,
    )  # fmt: skip
    return columns, tiles
