"""Patch embedding of images of different sizes in one packed batch.

    tokens[p] = W · (pixels of patch p / 255 - mean) / std + b + resample(table, grid of p's image)[place of p]

uint8 or float pixels [ΣHW, 3] -> tokens [P, Dv], K = p·p·3 values a patch in (row, column, channel) order. Reads ΣHW·3
pixels, the weight and the table once, writes P·Dv; 2·P·K·Dv operations. No patch is ever cut out or normalised in
memory: pixels are gathered by the product itself as whole words of 1, 2 or 4 bytes, centred to -128 … 127, which every
dtype holds exactly, and mean and std go into the weight and the bias:

    tokens = W' · (u - 128) + b',   W' = W / (255 std),   b' = b + Σ W (128 / 255 - mean) / std

The reduction runs over steps of block_k and one last step no wider than what is left (588 = 9 · 64 + 12). Backward
gathers the pixels again: nothing but the arguments is kept.
Source: Dosovitskiy et al. 2021 (ViT), section 3.1 and 3.2 (resampled positions).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm1.kernels import positions as positions_module
from mm1.kernels.dispatch import Cost, Device, cdiv, device_of, expect, launch, on_cpu, power_of_2
from mm1.kernels.grids import Grids, as_grids, image_of
from mm1.kernels.patch_embed_cpu import backward_cpu, embed_cpu, forward_cpu
from mm1.kernels.positions import INTERPOLATIONS, expect_interpolation, place_of, resample
from mm1.kernels.tiles import Config, Shape, descriptor, dot, fitted, tile_of
from mm1.kernels.tuning import config_for

CENTRE = 128
PART = tl.constexpr(32)  # columns of a tile that are finished at once
ROWS = 128  # patches one program finds the places of
WAVES = 2  # of programs a split of the weight gradient aims at


def default(patches: int, k: int, width: int, dtype: torch.dtype, device: Device) -> Config:
    """Two programs a multiprocessor, so that one multiplies while the other gathers or finishes its tile."""
    config = Config(block_m=64, block_n=128, block_k=64, warps=4 if device.wgmma else 8, tma=device.tma)
    if dtype == torch.float32:  # products of fp32 are made of single multiplications: small tiles in registers
        config = replace(config, block_n=64, block_k=32, warps=8, stages=2, tma=False)
    return fitted(config, Shape(patches, 1, k, width), dtype, device)


def default_dw(patches: int, k: int, width: int, dtype: torch.dtype, device: Device) -> Config:
    config = Config(block_m=128, block_n=128, block_k=64, warps=8, stages=3, tma=False)
    if dtype == torch.float32:
        config = replace(config, block_m=64, block_n=64, block_k=32, stages=2)
    return fitted(config, Shape(patches, 1, k, width), dtype, device)


@triton.jit
def _channel(k, c0, c1, c2):
    return tl.where(k % 3 == 0, c0, tl.where(k % 3 == 1, c1, c2))


@triton.jit
def _fold_kernel(
    w_ptr, bias_ptr, folded_ptr, folded_bias_ptr, stride_n, stride_k, K, K_PADDED, scale0, scale1, scale2, shift0,
    shift1, shift2, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W' [Dv, K_PADDED], zeros past K, and b' fp32 [Dv]: a program a row."""
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
    """dW = scale · Σ of the splits + shift · db, db = Σ of the splits: a program a row."""
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
def _places_kernel(
    owner_ptr, images_ptr, word_ptr, stride_ptr, P, PATCH: tl.constexpr, WORD: tl.constexpr, MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each patch's pixels begin, and how far apart its rows are, in words; -1: a row of no image."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, _, w, there = image_of(owner_ptr, images_ptr, rows, P)
    row, column = place_of(rows - first, w, MERGE)
    line = w * (PATCH * 3) // WORD
    begin = first.to(tl.int64) * (PATCH * PATCH * 3) // WORD
    word = begin + row * PATCH * line.to(tl.int64) + column * (PATCH * 3 // WORD)
    tl.store(word_ptr + rows, tl.where(there, word, -1), rows < P)
    tl.store(stride_ptr + rows, line, rows < P)


@triton.jit
def _gather(x_ptr, word, stride, q, last, ROW: tl.constexpr, WORD: tl.constexpr):
    """Words q of each patch [rows, len(q)]; where there is none, such as are zeros once centred."""
    places = word[:, None] + (q // ROW)[None, :] * stride[:, None] + (q % ROW)[None, :]
    inside = (word >= 0)[:, None] & (q < last)[None, :]
    # The bytes 128: minus 2³¹ and so on, read with a sign.
    if WORD == 4:
        return tl.load(x_ptr + places, inside, other=-2139062144)
    elif WORD == 2:
        return tl.load(x_ptr + places, inside, other=-32640)
    elif x_ptr.dtype.element_ty == tl.uint8:
        return tl.load(x_ptr + places, inside, other=128)
    else:
        return tl.load(x_ptr + places, inside, other=0.0)


@triton.jit
def _centred(byte, DTYPE: tl.constexpr):
    # 2²³ + byte in fp32 by its bits, minus 2²³ + 128: a conversion of integers runs at an eighth of this.
    return ((byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(DTYPE)


@triton.jit
def _values(words, WORD: tl.constexpr, DTYPE: tl.constexpr):
    """[M, Q] words -> [M, Q · WORD] pixel values."""
    M: tl.constexpr = words.shape[0]
    Q: tl.constexpr = words.shape[1]
    if WORD == 4:
        even = tl.join(_centred(words & 0xFF, DTYPE), _centred((words >> 16) & 0xFF, DTYPE))
        odd = tl.join(_centred((words >> 8) & 0xFF, DTYPE), _centred((words >> 24) & 0xFF, DTYPE))
        return tl.reshape(tl.join(even, odd), (M, Q * 4))
    elif WORD == 2:
        pair = words.to(tl.int32)
        return tl.reshape(tl.join(_centred(pair & 0xFF, DTYPE), _centred((pair >> 8) & 0xFF, DTYPE)), (M, Q * 2))
    elif words.dtype == tl.uint8:
        return _centred(words.to(tl.int32), DTYPE)
    else:
        return words.to(DTYPE)


@triton.jit
def _load_w(w, w_tail, n, k, stride, K, N, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
            TAIL: tl.constexpr):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of Wᵀ; w_tail: the descriptor whose blocks are as wide as the last step."""
    if TMA:
        return w_tail.load([n, k]).T if TAIL else w.load([n, k]).T
    else:
        offs_k = k + tl.arange(0, BLOCK_K)
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        return tl.load(w + offs_k[:, None] + offs_n.to(tl.int64)[None, :] * stride, inside, other=0.0)


@triton.jit
def _part(x, p: tl.constexpr, PARTS: tl.constexpr):
    """Columns of part p of 2 or 4."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
    half = second if 2 * p >= PARTS else first
    if PARTS == 2:
        return half
    else:
        first, second = tl.split(tl.permute(tl.reshape(half, (M, 2, N // 4)), (0, 2, 1)))
        return second if p % 2 == 1 else first


@triton.jit
def _finish(
    acc, bias_ptr, table_ptr, owner_ptr, images_ptr, y_ptr, rows, n, P, N, Gh, Gw, WORD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, MERGE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Adds bias and positions to columns n on of a tile, and stores them."""
    offs_n = n + tl.arange(0, acc.shape[1])
    first, h, w, there = image_of(owner_ptr, images_ptr, rows, P)
    if HAS_TABLE:
        row, column = place_of(rows - first, w, MERGE)
        acc += resample(table_ptr, row, column, h, w, there, Gh, Gw, offs_n, N, MODE, ANTIALIAS, ALIGN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
    if WORD > 0:
        acc = tl.where(there[:, None], acc, 0.0)
    places = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), (rows < P)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _embed_kernel(
    x_ptr, word_ptr, stride_ptr, w, w_tail, bias_ptr, table_ptr, owner_ptr, images_ptr, y_ptr, P, N, Gh, Gw, stride_w,
    stride_x, K: tl.constexpr, ROW: tl.constexpr, WORD: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, MERGE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """WORD 0: x holds cut patches [P, K], every row of which is multiplied, also that of no image."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(P, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    MAIN: tl.constexpr = K // BLOCK_K * BLOCK_K
    if WORD == 0:
        pointers = x_ptr + tl.minimum(rows, P - 1).to(tl.int64)[:, None] * stride_x
        for k in range(0, MAIN, BLOCK_K):
            a = tl.load(pointers + k + tl.arange(0, BLOCK_K)[None, :]).to(DTYPE)
            acc = dot(a, _load_w(w, w_tail, n * BLOCK_N, k, stride_w, K, N, BLOCK_K, BLOCK_N, TMA, False), acc)
        if TAIL > 0:
            offs_k = MAIN + tl.arange(0, TAIL)
            a = tl.load(pointers + offs_k[None, :], (offs_k < K)[None, :], other=0.0).to(DTYPE)
            acc = dot(a, _load_w(w, w_tail, n * BLOCK_N, MAIN, stride_w, K, N, TAIL, BLOCK_N, TMA, True), acc)
    else:
        word = tl.load(word_ptr + rows, rows < P, other=-1)
        stride = tl.load(stride_ptr + rows, rows < P, other=0)
        q = tl.arange(0, BLOCK_K // WORD)
        words = _gather(x_ptr, word, stride, q, MAIN // WORD, ROW, WORD)
        for k in range(0, MAIN, BLOCK_K):
            # The words of the next step are on their way while this one is multiplied.
            after = _gather(x_ptr, word, stride, q + (k + BLOCK_K) // WORD, MAIN // WORD, ROW, WORD)
            b = _load_w(w, w_tail, n * BLOCK_N, k, stride_w, K, N, BLOCK_K, BLOCK_N, TMA, False)
            acc = dot(_values(words, WORD, DTYPE), b, acc)
            words = after
        if TAIL > 0:
            words = _gather(x_ptr, word, stride, MAIN // WORD + tl.arange(0, TAIL // WORD), K // WORD, ROW, WORD)
            b = _load_w(w, w_tail, n * BLOCK_N, MAIN, stride_w, K, N, TAIL, BLOCK_N, TMA, True)
            acc = dot(_values(words, WORD, DTYPE), b, acc)
    # Part by part, for want of registers: a tile of table entries beside a wide accumulator spilled.
    if BLOCK_N > PART:
        for p in tl.static_range(BLOCK_N // PART):
            _finish(
                _part(acc, p, BLOCK_N // PART), bias_ptr, table_ptr, owner_ptr, images_ptr, y_ptr, rows,
                n * BLOCK_N + p * PART, P, N, Gh, Gw, WORD, HAS_BIAS, HAS_TABLE, MERGE, MODE, ANTIALIAS, ALIGN,
            )  # fmt: skip
    else:
        _finish(
            acc, bias_ptr, table_ptr, owner_ptr, images_ptr, y_ptr, rows, n * BLOCK_N, P, N, Gh, Gw, WORD, HAS_BIAS,
            HAS_TABLE, MERGE, MODE, ANTIALIAS, ALIGN,
        )  # fmt: skip


@triton.jit
def _embed_dw_kernel(
    x_ptr, word_ptr, stride_ptr, dy_ptr, part_ptr, bias_ptr, P, N, stride_dm, stride_dn, share, K: tl.constexpr,
    ROW: tl.constexpr, WORD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[s] [Dv, K] = dyᵀ · pixels over `share` patches from s · share on, bias[s] = Σ dy. BLOCK_M along Dv."""
    num_m = tl.cdiv(N, BLOCK_M)
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // (num_m * num_n)
    pid_m = tl.program_id(0) % (num_m * num_n) // num_n
    pid_n = tl.program_id(0) % num_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = pid_n * (BLOCK_N // WORD) + tl.arange(0, BLOCK_N // WORD)
    begin = split * share
    end = tl.minimum(begin + share, P)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    rows = begin + tl.arange(0, BLOCK_K)
    word = tl.load(word_ptr + rows, rows < end, other=-1)
    words = _gather(x_ptr, word, tl.load(stride_ptr + rows, rows < end, other=0), q, K // WORD, ROW, WORD)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = (word >= 0)[:, None] & (offs_m < N)[None, :]
        places = rows.to(tl.int64)[:, None] * stride_dm + offs_m.to(tl.int64)[None, :] * stride_dn
        dy = tl.load(dy_ptr + places, inside, other=0.0)
        rows += BLOCK_K
        word = tl.load(word_ptr + rows, rows < end, other=-1)
        after = _gather(x_ptr, word, tl.load(stride_ptr + rows, rows < end, other=0), q, K // WORD, ROW, WORD)
        acc = dot(dy.T, _values(words, WORD, dy.dtype), acc)
        bias += tl.sum(dy.to(tl.float32), 0)
        words = after
    offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    places = (split * N + offs_m).to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(part_ptr + places, acc, (offs_m < N)[:, None] & (offs_k < K)[None, :])
    if pid_n == 0:
        tl.store(bias_ptr + split * N + offs_m, bias, offs_m < N)


@triton.jit
def _scatter_kernel(
    patches_ptr, word_ptr, stride_ptr, x_ptr, stride, K: tl.constexpr, ROW: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Values of each patch back to where its pixels lie: every pixel belongs to one patch."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.load(word_ptr + row)
    line = tl.load(stride_ptr + row)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < K) & (word >= 0)
        value = tl.load(patches_ptr + row * stride + k, inside, other=0.0)
        tl.store(x_ptr + word + k // ROW * line + k % ROW, value.to(x_ptr.dtype.element_ty), inside)


def word_bytes(x: Tensor, patch: int) -> int:
    """Widest word, in bytes, that patches' rows consist of; float pixels are taken one by one."""
    if x.dtype != torch.uint8:
        return 1
    return next(n for n in (4, 2, 1) if patch * 3 % n == 0 and x.data_ptr() % n == 0 and x.numel() % n == 0)


def _as_words(x: Tensor, word: int) -> Tensor:
    return x if word == 1 else x.view(-1).view(torch.int32 if word == 4 else torch.int16)


def _fold(weight: Tensor, bias: Tensor | None, scale: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, Tensor]:
    """W' [Dv, K up to 16] and b' fp32 [Dv]."""
    N, K = weight.shape
    folded = weight.new_empty(N, cdiv(K, 16) * 16)  # rows of whole 32 bytes, which bulk copies ask for
    folded_bias = weight.new_empty(N, dtype=torch.float32)
    launch(
        _fold_kernel, N, weight, bias, folded, folded_bias, *weight.stride(), K, folded.shape[1], *scale, *shift,
        bias is not None, 1024, num_warps=4,
    )  # fmt: skip
    return folded, folded_bias


def _places(images: Tensor, owner: Tensor, patch: int, word: int, merge: int) -> tuple[Tensor, Tensor]:
    words, strides = owner.new_empty(len(owner), dtype=torch.int64), torch.empty_like(owner)
    launch(_places_kernel, cdiv(len(owner), ROWS), owner, images, words, strides, len(owner), patch, word, merge, ROWS,
           num_warps=4)  # fmt: skip
    return words, strides


def _embed(
    x: Tensor, word: int, row: int, places: tuple[Tensor | None, Tensor | None], weight: Tensor, k: int,
    bias: Tensor | None, table: Tensor | None, images: Tensor, owner: Tensor, dtype: torch.dtype, merge: int,
    mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """The forward kernel on W' [Dv, ≥ k]; word 0: x are cut patches."""
    P, N = len(owner), len(weight)
    config = config_for("patch_embed", lambda: default(P, k, N, dtype, device_of(x)))
    y = x.new_empty(P, N, dtype=dtype)
    # A last step of at least a dot's 16, and of what words and registers hold as a power of two.
    tail = k % config.block_k and max(16, power_of_2(k % config.block_k))
    w = descriptor(weight, [config.block_n, config.block_k], config)
    w_tail = descriptor(weight, [config.block_n, tail], config) if tail else w
    Gh, Gw = table.shape[:2] if table is not None else (1, 1)
    launch(
        _embed_kernel, cdiv(P, config.block_m) * cdiv(N, config.block_n), x, *places, weight if w is None else w,
        w_tail, bias, table if table is None else table.contiguous(), owner, images, y, P, N, Gh, Gw, weight.stride(0),
        x.stride(0), k, row, word, _TYPES[dtype], bias is not None, table is not None, merge, mode, antialias, align,
        w is not None, config.block_m, config.block_n, config.block_k, tail, config.group_m, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return y


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, images: Tensor, owner: Tensor, patch: int,
    scale: Sequence[float], shift: Sequence[float], merge: int, mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """x [ΣHW, 3] -> [P, Dv]; the value of a pixel of channel c is scale[c] · (x or x - 128) + shift[c]."""
    word = word_bytes(x, patch)
    places = _places(images, owner, patch, word, merge)
    folded, folded_bias = _fold(weight, bias, scale, shift)
    return _embed(
        _as_words(x, word), word, patch * 3 // word, places, folded, weight.shape[1], folded_bias, table, images,
        owner, weight.dtype, merge, mode, antialias, align,
    )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, images: Tensor, owner: Tensor, patch: int, scale: Sequence[float],
    shift: Sequence[float], merge: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dW, db; empty where not needed."""
    (P, N), K = dy.shape, weight.shape[1]
    device = device_of(x)
    dx, dw, db = x.new_empty(0), torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(N)
    if need_weight:
        word = word_bytes(x, patch)
        config = config_for("patch_embed_dw", lambda: default_dw(P, K, N, dy.dtype, device))
        words, strides = _places(images, owner, patch, word, merge)
        tiles = cdiv(N, config.block_m) * cdiv(K, config.block_n)
        splits = max(1, min(cdiv(P, 8 * config.block_k), WAVES * device.units // max(tiles, 1)))
        share = cdiv(cdiv(P, splits), config.block_k) * config.block_k
        splits = cdiv(P, share) if P else 0
        part = dy.new_empty(splits, N, K, dtype=torch.float32)
        sums = dy.new_empty(splits, N, dtype=torch.float32)
        launch(
            _embed_dw_kernel, splits * tiles, _as_words(x, word), words, strides, dy, part, sums, P, N, *dy.stride(),
            share, K, patch * 3 // word, word, config.block_m, config.block_n, config.block_k, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        launch(_unfold_kernel, N, part, sums, dw, db, N, K, splits, *scale, *shift, 1024, num_warps=4)
    if need_x:
        words, strides = _places(images, owner, patch, 1, merge)
        dpatches = dy @ _fold(weight, None, scale, shift)[0]
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)  # pixels of no image have no gradient
        launch(_scatter_kernel, P, dpatches, words, strides, dx, dpatches.stride(0), K, patch * 3, 1024, num_warps=4)
    return dx, dw, db


def embed(
    patches: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, images: Tensor, owner: Tensor, merge: int,
    mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """patches [P, K] -> [P, Dv]."""
    K = weight.shape[1]
    if weight.stride(1) != 1 or weight.stride(0) * weight.element_size() % 16:
        weight = _fold(weight, None, (1.0,) * 3, (0.0,) * 3)[0]
    patches = patches if patches.stride(1) == 1 else patches.contiguous()
    return _embed(
        patches, 0, 1, (None, None), weight, K, bias, table, images, owner, weight.dtype, merge, mode, antialias, align
    )


_forward = torch.library.custom_op("mm1::patch_embed", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::patch_embed_backward", backward, mutates_args=())
_embed_op = torch.library.custom_op("mm1::embed_patches", embed, mutates_args=())
on_cpu(_forward, forward_cpu)
on_cpu(_backward, backward_cpu)
on_cpu(_embed_op, embed_cpu)


@_forward.register_fake
def _(x, weight, bias, table, images, owner, *settings):
    return weight.new_empty(owner.shape[0], weight.shape[0])


@_backward.register_fake
def _(dy, x, weight, images, owner, patch, scale, shift, merge, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@_embed_op.register_fake
def _(patches, weight, bias, table, images, owner, *settings):
    return weight.new_empty(owner.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, bias, table, images, owner, *ctx.settings = inputs
    ctx.table = None if table is None else (table.shape, table.dtype)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, images, owner)


def _grad(ctx, dy: Tensor):
    x, weight, images, owner = ctx.saved_tensors
    patch, scale, shift, merge, *interpolation = ctx.settings
    need_x, need_weight, need_bias, need_table = ctx.needs_input_grad[:4]
    dx = dw = db = dtable = None
    if need_x or need_weight or need_bias:
        dx, dw, db = _backward(dy, x, weight, images, owner, patch, scale, shift, merge, need_x,
                               need_weight or need_bias)  # fmt: skip
    if need_table:
        dtable = _table_gradient(dy, images, ctx.table, merge, interpolation)
    return dx if need_x else None, dw, db if ctx.has_bias else None, dtable, *(None,) * 9


def _save_embed(ctx, inputs, output):
    patches, weight, bias, table, images, _, *ctx.settings = inputs
    ctx.table, ctx.has_bias = (table.shape, table.dtype), bias is not None
    ctx.save_for_backward(patches, weight, images)


def _grad_embed(ctx, dy: Tensor):
    patches, weight, images = ctx.saved_tensors
    merge, *interpolation = ctx.settings
    need_patches, need_weight, need_bias, need_table = ctx.needs_input_grad[:4]
    return (
        dy @ weight if need_patches else None,
        dy.t() @ patches if need_weight else None,
        dy.sum(0) if need_bias and ctx.has_bias else None,
        _table_gradient(dy, images, ctx.table, merge, interpolation) if need_table else None,
        *(None,) * 6,
    )


def _table_gradient(dy: Tensor, images: Tensor, table, merge: int, interpolation) -> Tensor:
    shape, dtype = table
    return positions_module._backward(dy, images, shape, merge, *interpolation).to(dtype)


_forward.register_autograd(_grad, setup_context=_save)
_embed_op.register_autograd(_grad_embed, setup_context=_save_embed)


def patch_embed(
    pixels: Tensor | Sequence[Tensor],
    sizes: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Embed the patches of N images.

    pixels: list of uint8 or float [H, W, 3], or one packed [ΣHW, 3]. sizes: host list of (H, W) in pixels, or the Grids
    of the batch (then packed pixels may be padded to its P · patch_size²). weight [Dv, p·p·3], bias [Dv], pos_embed
    [Gh, Gw, Dv]. uint8 pixels are divided by 255; mean and std, one value a channel, are those of the result.
    Returns tokens [P, Dv] in the weight's dtype, zeros in rows of no image, and cu_seqlens int32 [N+1].
    """
    op, p = "patch_embed", patch_size
    expect(weight.ndim == 2 and weight.shape[1] == p * p * 3, op, "weight", tuple(weight.shape), f"[Dv, {p * p * 3}]")
    if isinstance(sizes, Grids):
        grids = sizes.to(weight.device)
    else:
        for height, width in sizes:
            expect(height > 0 and width > 0, op, "sizes", (height, width), "positive sides")
            expect(height % p == 0 and width % p == 0, op, "sizes", (height, width), f"multiples of {p}")
        grids = Grids([(height // p, width // p) for height, width in sizes], device=weight.device)
    if not isinstance(pixels, Tensor):
        shapes = [tuple(image.shape) for image in pixels]
        wanted = [(h * p, w * p, 3) for h, w in grids.sizes or ()]
        expect(shapes == wanted, op, "pixels", shapes, wanted)
        rows = [image.reshape(-1, 3) for image in pixels]
        pixels = torch.cat(rows) if rows else weight.new_zeros(0, 3)
    found, area = tuple(pixels.shape), p * p
    # A padded buffer is asked first, because how much of it is used must not become part of a compiled program.
    fits = found == (grids.patches * area, 3) or grids.used is None or found == (grids.used * area, 3)
    expect(fits, op, "pixels", found, (grids.patches * area, 3))
    expect(pixels.dtype == torch.uint8 or pixels.is_floating_point(), op, "dtype of pixels", pixels.dtype,
           "uint8 or a float")  # fmt: skip
    mean, std = (0.0,) * 3 if mean is None else mean, (1.0,) * 3 if std is None else std
    expect(len(mean) == 3 and all(math.isfinite(m) for m in mean), op, "mean", mean, "3 finite values")
    expect(len(std) == 3 and all(math.isfinite(s) and s > 0 for s in std), op, "std", std, "3 positive values")
    if pixels.dtype == torch.uint8:
        scale = [1 / (255 * s) for s in std]
        shift = [(CENTRE / 255 - m) / s for m, s in zip(mean, std)]
    else:
        scale = [1 / s for s in std]
        shift = [-m / s for m, s in zip(mean, std)]
    table, *settings = _table(op, pos_embed, weight, bias, interpolation, antialias, align_corners)
    tokens = _forward(
        pixels.contiguous(), weight, bias, table, grids.table, grids.owner, p, scale, shift, grids.merge, *settings
    )
    return tokens, grids.cu_seqlens


def embed_patches(
    patches: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """The same for patches [P, K] that are already cut, weight [Dv, K] -> tokens [P, Dv].

    Rows of no image are projected like any other, and get no position.
    """
    op = "embed_patches"
    grids = as_grids(grids, weight.device)
    expect(patches.ndim == 2 and patches.shape[0] == grids.patches, op, "patches",
           tuple(patches.shape), f"[{grids.patches}, K]")  # fmt: skip
    expect(weight.ndim == 2 and weight.shape[1] == patches.shape[1], op, "weight",
           tuple(weight.shape), f"[Dv, {patches.shape[1]}]")  # fmt: skip
    table, *settings = _table(op, pos_embed, weight, bias, interpolation, antialias, align_corners)
    patches = patches.to(weight.dtype)
    if table is None:
        return torch.nn.functional.linear(patches, weight, bias)
    return _embed_op(patches, weight, bias, table, grids.table, grids.owner, grids.merge, *settings)


def _table(op, table, weight, bias, interpolation, antialias, align_corners):
    """The table, or None if there is none to add, and the settings of its interpolation."""
    width = len(weight)
    expect(weight.is_floating_point(), op, "dtype of weight", weight.dtype, "a float")
    expect(bias is None or bias.shape == (width,), op, "bias", bias is not None and tuple(bias.shape), f"[{width}]")
    expect_interpolation(op, interpolation, INTERPOLATIONS)
    if table is None or interpolation is None:
        return None, "nearest", False, False
    expect(table.ndim == 3 and table.shape[2] == width and min(table.shape) > 0, op, "pos_embed", tuple(table.shape),
           f"[Gh, Gw, {width}]")  # fmt: skip
    return table, interpolation, *((False, False) if interpolation == "nearest" else (antialias, align_corners))


def cost(patches: int, width: int, patch_size: int, *, table: int = 0, itemsize: int = 2) -> Cost:
    """table: entries Gh·Gw of the position table. Forward, uint8 pixels."""
    k = patch_size**2 * 3
    return Cost(2 * patches * k * width, patches * k + (k * width + table * width + patches * width) * itemsize)
