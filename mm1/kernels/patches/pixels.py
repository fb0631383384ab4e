"""Cut the packed pixels of images into patches, one operand of a product with the patch weight.

A row of a patch is 3p neighbouring bytes, read in words of 4, 2 or 1 bytes, the widest that divide 3p. Bytes u become
u - 128, which every dtype represents exactly; mean and std are folded into the weight and the bias:

    W · ((u / 255 - mean) / std) + b = W' · (u - 128) + b',   W' = W · scale, b' = b + Σ W · shift,
    scale = 1 / (255 std), shift = (128 / 255 - mean) / std   by channel; of floats: 1 / std and -mean / std

and for their gradients dW = scale · dW' + shift · db.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from mm1.kernels.dispatch import cdiv, expect, launch, strides
from mm1.kernels.language import tl, triton
from mm1.kernels.patches.grids import image_of
from mm1.kernels.patches.position_tables import SIDES, empty_taps, place_of, store_taps

CENTRE = 128  # is subtracted from bytes
CUT_ROWS, CUT_VALUES = 32, 128  # the tile of cut patches that one program stores
BLOCK = 1024  # values of a patch that one step of a program reads


@triton.jit
def _channel(k, c0, c1, c2):
    """Return the value of the channel of k."""
    return tl.where(k % 3 == 0, c0, tl.where(k % 3 == 1, c1, c2))


@triton.jit
def _fold_kernel(
    w_ptr, bias_ptr, folded_ptr, folded_bias_ptr, stride_n, stride_k, K, K_PADDED, scale0, scale1, scale2, shift0,
    shift1, shift2, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store W' [Dv, K_PADDED], zeros past K, and b' fp32 [Dv]; a program computes a row."""
    n = tl.program_id(0).to(tl.int64)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K_PADDED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + n * stride_n + k * stride_k, k < K, other=0.0).to(tl.float32)
        folded = w * _channel(k, scale0, scale1, scale2)
        tl.store(folded_ptr + n * K_PADDED + k, folded.to(folded_ptr.dtype.element_ty), k < K_PADDED)
        bias += w * _channel(k, shift0, shift1, shift2)
    total = tl.sum(bias, 0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(folded_bias_ptr + n, total)


@triton.jit
def _unfold_kernel(
    part_ptr, bias_ptr, dw_ptr, db_ptr, N, K, splits, scale0, scale1, scale2, shift0, shift1, shift2,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store dW = scale · Σ of the splits + shift · db and db = Σ of the splits; a program computes a row."""
    n = tl.program_id(0).to(tl.int64)
    db = 0.0
    for split in range(splits):
        db += tl.load(bias_ptr + split * N + n)
    tl.store(db_ptr + n, db)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dw = tl.zeros((BLOCK_K,), tl.float32)
        for split in range(splits):
            dw += tl.load(part_ptr + (split * N + n) * K + k, k < K, other=0.0)
        dw = dw * _channel(k, scale0, scale1, scale2) + db * _channel(k, shift0, shift1, shift2)
        tl.store(dw_ptr + n * K + k, dw.to(dw_ptr.dtype.element_ty), k < K)


@triton.jit
def _place(first, row, column, w, valid, PATCH: tl.constexpr, WORD: tl.constexpr):
    """Return where each patch's pixels begin (-1: a row of no image) and the distance of its rows, in words."""
    line = w * (PATCH * 3) // WORD
    begin = first.to(tl.int64) * (PATCH * PATCH * 3) // WORD
    word = begin + row * PATCH * line.to(tl.int64) + column * (PATCH * 3 // WORD)
    return tl.where(valid, word, -1), line


@triton.jit
def _words(x_ptr, word, stride, q, last, ROW: tl.constexpr):
    """Load words q of each patch, zeros past `last`."""
    places = word[:, None] + (q // ROW)[None, :] * stride[:, None] + (q % ROW)[None, :]
    return tl.load(x_ptr + places, (word >= 0)[:, None] & (q < last)[None, :], other=0)


@triton.jit
def _gather(x_ptr, word, stride, q, last, ROW: tl.constexpr, WORD: tl.constexpr):
    """Load groups q of each patch, [rows, len(q)]: an int32 of 4 pixel values, or one value where words are of 1 byte.

    last: the number of the patch's words. Two 2-byte words are combined to one int32, which takes 15 % fewer
    instructions than separate words.
    """
    if WORD == 2:
        low = _words(x_ptr, word, stride, 2 * q, last, ROW).to(tl.int32)
        return (low & 0xFFFF) | (_words(x_ptr, word, stride, 2 * q + 1, last, ROW).to(tl.int32) << 16)
    else:
        return _words(x_ptr, word, stride, q, last, ROW)


@triton.jit
def _centred(byte):
    """Return byte - 128 in fp32."""
    # Build 2²³ + byte in fp32 by its bits, minus 2²³ + 128: integer conversion has an eighth of this throughput.
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _values(groups, WORD: tl.constexpr):
    """Return the pixel values fp32 [M, 4 Q] of groups [M, Q] from `_gather`, or [M, Q] where words are of 1 byte."""
    M: tl.constexpr = groups.shape[0]
    Q: tl.constexpr = groups.shape[1]
    if WORD > 1:
        even = tl.join(_centred(groups & 0xFF), _centred((groups >> 16) & 0xFF))
        odd = tl.join(_centred((groups >> 8) & 0xFF), _centred((groups >> 24) & 0xFF))
        return tl.reshape(tl.join(even, odd), (M, Q * 4))
    elif groups.dtype == tl.uint8:
        return _centred(groups.to(tl.int32))
    else:
        return groups.to(tl.float32)


@triton.jit(do_not_specialize=["P", *SIDES])
def _cut_kernel(
    x_ptr, owner_ptr, images_ptr, cut_ptr, taps_ptr, P, Gh, Gw, PATCH: tl.constexpr, WORD: tl.constexpr,
    MERGE: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr,
    K_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store a tile of cut [P, K_PADDED], zeros past K and in rows of no image, and the taps of its rows."""
    K: tl.constexpr = PATCH * PATCH * 3
    STEPS: tl.constexpr = (K_PADDED + BLOCK_K - 1) // BLOCK_K
    rows = tl.program_id(0) // STEPS * BLOCK_M + tl.arange(0, BLOCK_M)
    step = tl.program_id(0) % STEPS
    _, first, h, w, valid = image_of(owner_ptr, images_ptr, rows, P)
    row, column = place_of(rows - first, w, MERGE)
    if step == 0:
        store_taps(taps_ptr, rows, P, row, column, h, w, valid, Gh, Gw, HAS_TABLE, MODE, ANTIALIAS, ALIGN)
    word, line = _place(first, row, column, w, valid, PATCH, WORD)
    GROUP: tl.constexpr = 4 if WORD > 1 else 1
    q = step * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    x = _values(_gather(x_ptr, word, line, q, K // WORD, PATCH * 3 // WORD, WORD), WORD)
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.where(valid[:, None] & (k < K)[None, :], x, 0.0).to(cut_ptr.dtype.element_ty)
    places = rows.to(tl.int64)[:, None] * K_PADDED + k[None, :]
    tl.store(cut_ptr + places, x, (rows < P)[:, None] & (k < K_PADDED)[None, :])


@triton.jit
def _scatter_kernel(
    patches_ptr, owner_ptr, images_ptr, x_ptr, stride, P, PATCH: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store each patch's values at its pixels; every pixel belongs to one patch at most."""
    at = tl.program_id(0).to(tl.int64)
    _, first, _, w, valid = image_of(owner_ptr, images_ptr, at, P)
    row, column = place_of(at - first, w, MERGE)
    word, line = _place(first, row, column, w, valid, PATCH, 1)
    for start in range(0, PATCH * PATCH * 3, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < tl.where(valid, PATCH * PATCH * 3, 0)
        value = tl.load(patches_ptr + at * stride + k, inside, other=0.0)
        pixels = x_ptr + word + k // (PATCH * 3) * line + k % (PATCH * 3)
        tl.store(pixels, value.to(x_ptr.dtype.element_ty), inside)


def normalisation(
    op: str, of_bytes: bool, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int = 3
) -> tuple[list[float], list[float]]:
    """Return scale and shift of each channel, from mean and std (None: 0 and 1)."""
    mean, std = (0.0,) * channels if mean is None else mean, (1.0,) * channels if std is None else std
    fits = len(mean) == channels and all(isfinite(m) for m in mean)
    expect(fits, op, "mean", mean, f"{channels} finite values")
    fits = len(std) == channels and all(isfinite(s) and s > 0 for s in std)
    expect(fits, op, "std", std, f"{channels} positive values")
    unit, centre = (255, CENTRE / 255) if of_bytes else (1, 0)
    return [1 / (unit * s) for s in std], [(centre - m) / s for m, s in zip(mean, std)]


def word_bytes(x: Tensor, patch: int) -> int:
    """Return the widest word, in bytes, in which a patch's rows can be read; float pixels are read one by one."""
    if x.dtype != torch.uint8:
        return 1
    return next(n for n in (4, 2, 1) if patch * 3 % n == 0 and x.data_ptr() % n == 0 and x.numel() % n == 0)


def as_words(x: Tensor, word: int) -> Tensor:
    """View bytes as integers of `word` bytes."""
    return x if word == 1 else x.view(-1).view(torch.int32 if word == 4 else torch.int16)


def fold(weight: Tensor, bias: Tensor | None, scale: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return W' [Dv, K rounded up to 16] and b' fp32 [Dv]."""
    N, K = weight.shape
    folded = weight.new_empty(N, cdiv(K, 16) * 16)  # bulk copies need rows of a multiple of 32 bytes
    folded_bias = weight.new_empty(N, dtype=torch.float32)
    launch(
        _fold_kernel, N, w_ptr=weight, bias_ptr=bias, folded_ptr=folded, folded_bias_ptr=folded_bias,
        **strides(weight, "stride_n", "stride_k"), K=K, K_PADDED=folded.shape[1],
        **_by_channel(scale, shift), HAS_BIAS=bias is not None, BLOCK_K=BLOCK, num_warps=4,
    )  # fmt: skip
    return folded, folded_bias


def cut(
    x: Tensor, table: Tensor | None, images: Tensor, owner: Tensor, patch: int, merge: int, mode: str,
    antialias: bool, align: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cut pixels x [ΣHW, 3] into patches [P, K rounded up to 16], zeros past K; return them and the patches' taps.

    Bytes are shifted to -128 … 127. taps: those of `taps_of` for the table, of one field without a table.
    """
    word, P, padded = word_bytes(x, patch), len(owner), cdiv(3 * patch * patch, 16) * 16
    patches, taps = owner.new_empty(P, padded, dtype=dtype), empty_taps(owner, table)
    Gh, Gw = (1, 1) if table is None else table.shape[:2]
    launch(
        _cut_kernel, cdiv(P, CUT_ROWS) * cdiv(padded, CUT_VALUES), x_ptr=as_words(x, word), owner_ptr=owner,
        images_ptr=images, cut_ptr=patches, taps_ptr=taps, P=P, Gh=Gh, Gw=Gw, PATCH=patch, WORD=word, MERGE=merge,
        HAS_TABLE=table is not None, MODE=mode, ANTIALIAS=antialias, ALIGN=align, K_PADDED=padded, BLOCK_M=CUT_ROWS,
        BLOCK_K=CUT_VALUES, num_warps=4,
    )  # fmt: skip
    return patches, taps


def unfold(part: Tensor, sums: Tensor, dw: Tensor, db: Tensor, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Store dw [Dv, K] and db [Dv], from fp32 parts [S, Dv, K] and sums [S, Dv] of S splits."""
    splits, N, K = part.shape
    launch(
        _unfold_kernel, N, part_ptr=part, bias_ptr=sums, dw_ptr=dw, db_ptr=db, N=N, K=K, splits=splits,
        **_by_channel(scale, shift), BLOCK_K=BLOCK, num_warps=4,
    )  # fmt: skip


def scatter(patches: Tensor, images: Tensor, owner: Tensor, patch: int, merge: int, x: Tensor) -> None:
    """Store the first 3·patch² columns of patches [P, …] at their pixels in x [ΣHW, 3]."""
    launch(
        _scatter_kernel, len(patches), patches_ptr=patches, owner_ptr=owner, images_ptr=images, x_ptr=x,
        stride=patches.stride(0), P=len(patches), PATCH=patch, MERGE=merge, BLOCK_K=BLOCK, num_warps=4,
    )  # fmt: skip


def _by_channel(scale: Sequence[float], shift: Sequence[float]) -> dict[str, float]:
    """Return the arguments of kernels for the values of the three channels."""
    return {**{f"scale{c}": s for c, s in enumerate(scale)}, **{f"shift{c}": s for c, s in enumerate(shift)}}
