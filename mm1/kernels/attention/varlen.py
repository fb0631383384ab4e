"""Attention inside each segment of a packed sequence.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] · scale) v[j, g],   j in i's segment, and j ≤ i where causal

q [T, H, Dh], k and v [S, G, Dh], H a multiple of G -> [T, H, Dh]. Segments are cu_seqlens' slices. Where a segment has
other numbers of queries and keys, causal is aligned to the end: its last query sees its last key, and queries before
its first key see nothing. Rows that see nothing, and rows past the last segment, come back as zeros.
4·Σ Lq·Lk·H·Dh operations (half where causal).
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.attention.flash import WIDTHS, flash
from mm1.kernels.dispatch import (
    Cost,
    autocast_dtype,
    device_of_index,
    expect,
    expect_alike,
    expect_integers,
    expect_read,
    refuse_second_order,
)
from mm1.kernels.tuning import pinned_or


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    cu_seqlens_k: Tensor | None = None,
    used_k: Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """q [T, H, Dh], k and v [S, G, Dh], cu_seqlens int [B+1] -> [T, H, Dh].

    cu_seqlens_k int [B+1]: the keys' own segments where they differ from the queries'. used_k int [B]: how many keys of
    each segment count (a cache that is not full). max_length: no segment is longer, if the host knows; torch's and
    flash-attn's kernels launch programs for that many rows of every segment, without it for all rows. backend: one of
    BACKENDS, or "auto": on CPU "segments", on a GPU what was measured to be fastest there (see choose).

    q, k and v are of one dtype, which is the result's, or under autocast are cast to its dtype (fp64 is not). Offsets
    that fall, or reach past the rows, raise ValueError on a CPU; a GPU's are not looked at, because that would wait for
    it. Gradients of gradients and forward-mode derivatives raise RuntimeError.
    """
    expect_alike("attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, used_k=used_k)
    q, k, v = (x.to(autocast_dtype(x) or x.dtype) for x in (q, k, v))  # as torch's own attention does
    _check(q, k, v, cu_seqlens, cu_seqlens_k, used_k)
    expect(backend == "auto" or backend in BACKENDS, "attention", "backend", backend, ("auto", *BACKENDS))
    cu_q, cu_k = (x.int() for x in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
    used_k = None if used_k is None else used_k.int()
    if backend == "auto":
        backend = pinned_or("attention", lambda: _auto(q, k, v, used_k, causal))
    # "segments" looks at the offsets itself, also in compiled code.
    if q.device.type == "cpu" and backend != "segments" and not torch.compiler.is_compiling():
        _lengths(cu_q, cu_k, used_k, q.shape[0], k.shape[0])
    return BACKENDS[backend](q, k, v, cu_q, cu_k, used_k, causal, max_length)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, used_k: Tensor | None) -> None:
    op = "attention"
    expect(q.ndim == 3 and k.ndim == 3, op, "q and k", (tuple(q.shape), tuple(k.shape)), "3 dimensions")
    expect(k.shape == v.shape, op, "v", tuple(v.shape), tuple(k.shape))
    expect(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, op, "heads of q", q.shape[1], f"a multiple of {k.shape[1]}")
    expect(q.shape[2] == k.shape[2], op, "head width of k", k.shape[2], q.shape[2])
    expect(cu_k is not None or q.shape[0] == k.shape[0], op, "k", tuple(k.shape), [q.shape[0], "G", "Dh"])
    expect_read(op, "q", q)
    for name, x in (("k", k), ("v", v)):
        expect(x.dtype == q.dtype, op, f"dtype of {name}", x.dtype, f"{q.dtype}, that of q")
    for name, x in (("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k), ("used_k", used_k)):
        if x is not None:
            expect_integers(op, name, x, 1)
    expect(cu_q.shape[0] > 0, op, "cu_seqlens", tuple(cu_q.shape), "[B + 1]")
    expect(cu_k is None or cu_k.shape == cu_q.shape, op, "cu_seqlens_k", cu_k is not None and tuple(cu_k.shape),
           tuple(cu_q.shape))  # fmt: skip
    B = cu_q.shape[0] - 1
    expect(used_k is None or used_k.shape[0] == B, op, "used_k", used_k is not None and tuple(used_k.shape), (B,))


def _auto(q: Tensor, k: Tensor, v: Tensor, used_k: Tensor | None, causal: bool) -> str:
    if q.device.type in ("cpu", "meta"):
        return "segments"
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return choose(
        gpu_name(q.device.index), q.shape[2], causal, str(q.dtype).removeprefix("torch."), grad, used_k is not None
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, causal: bool
) -> Tensor:
    """One dense product over all pairs, masked, in fp32 or fp64: O(T·S) memory, no host synchronisation, any device."""
    wide = torch.promote_types(q.dtype, torch.float32)
    y = q.to(wide)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    row, column = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
    seen = _mask(cu_q, cu_k, used_k, q.shape[0], k.shape[0], causal)(row[:, None], column[None, :])
    scores = torch.einsum("qhd,khd->hqk", y, k) * q.shape[2] ** -0.5
    # Not -inf: where a row sees nothing, softmax would be NaN, and so would its gradient.
    weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def _mask(
    cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, rows: int, keys: int, causal: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether row i sees key j, as a function of (i, j)."""
    segment_q, place_q = _places(cu_q, rows)
    segment_k, place_k = _places(cu_k, keys)
    length_q, length_k = cu_q.diff(), cu_k.diff() if used_k is None else used_k
    length_q, length_k = F.pad(length_q, (0, 1)), F.pad(length_k, (0, 1))  # rows past the last segment: none

    def seen(i: Tensor, j: Tensor) -> Tensor:
        segment = segment_q[i]
        inside = (segment == segment_k[j]) & (place_k[j] < length_k[segment])
        return inside & (place_k[j] - place_q[i] <= length_k[segment] - length_q[segment]) if causal else inside

    return seen


def _places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Segment of each row (B past the last one) and its place there."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return segment, row - cu_seqlens[segment]


@torch.library.custom_op("mm1::attention_segments", mutates_args=())
def segments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Neighbouring segments of equal lengths run as one batch of torch's CPU flash attention.

    Returns y and logsumexp [T, H], fp32 or fp64. Whoever packs does well to put equal lengths side by side.
    """
    q, k, v = _rows(q), _rows(_repeat(k, q)), _rows(_repeat(v, q))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(*q.shape[:2], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    end = 0
    for run in _runs(cu_q, cu_k, used_k, causal, len(q), len(k)):
        # Rows before the run that no segment has; in the run only where some see nothing.
        out[end : run.start_q if run.step_q == run.length_q else run.end_q].zero_()
        y, z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            run.queries(q), run.keys(k), run.keys(v), 0.0, run.causal, attn_mask=run.bias(q)
        )
        run.queries(out).copy_(y)
        run.queries(lse).copy_(z.unsqueeze(3))
        end = run.end_q
    out[end:].zero_()
    return out, lse.squeeze(2)


@segments.register_fake
def _(q, k, v, cu_q, cu_k, used_k, causal):
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("mm1::attention_segments_backward", mutates_args=())
def segments_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, run by run as forward."""
    groups = k.shape[1]
    q, k, v, lse = _rows(q), _rows(_repeat(k, q)), _rows(_repeat(v, q)), lse.unsqueeze(2)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for run in _runs(cu_q, cu_k, used_k, causal, len(q), len(k)):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            run.queries(dy), run.queries(q), run.keys(k), run.keys(v), run.queries(y),
            run.queries(lse).squeeze(3).contiguous(), 0.0, run.causal, attn_mask=run.bias(q),
        )  # fmt: skip
        run.queries(dq).copy_(grads[0])
        run.keys(dk).copy_(grads[1])
        run.keys(dv).copy_(grads[2])
    if groups != q.shape[1]:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


@segments_backward.register_fake
def _(dy, q, k, v, y, lse, cu_q, cu_k, used_k, causal):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, used_k, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, used_k)


def _backward(ctx, dy: Tensor, _):
    q, k, v, y, lse, cu_q, cu_k, used_k = ctx.saved_tensors
    grads = segments_backward(dy.contiguous(), q, k, v, y, lse, cu_q, cu_k, used_k, ctx.causal)
    return *grads, None, None, None, None


segments.register_autograd(_backward, setup_context=_save)
refuse_second_order(segments_backward, "attention")


class _Run(NamedTuple):
    """`count` neighbouring segments of the same lengths, which begin `step_q` and `step_k` rows apart."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    start_q: int
    length_q: int  # of those queries that see anything
    step_q: int
    start_k: int
    length_k: int
    step_k: int
    causal: bool
    masked: bool  # causal, with fewer queries than keys: the queries are the last ones

    @property
    def end_q(self) -> int:
        return self.start_q + (self.count - 1) * self.step_q + self.length_q

    def queries(self, x: Tensor) -> Tensor:
        """View [n, H, Lq, Dh] of the queries' rows of x [T, H, Dh]."""
        return self._view(x, self.start_q, self.length_q, self.step_q)

    def keys(self, x: Tensor) -> Tensor:
        """View [n, H, Lk, Dh] of the keys' rows of x [S, H, Dh]."""
        return self._view(x, self.start_k, self.length_k, self.step_k)

    def _view(self, x: Tensor, start: int, length: int, step: int) -> Tensor:
        # One call instead of slice, unflatten and transpose: with short segments their overhead is what counts.
        row, head, item = x.stride()
        size = (self.count, x.shape[1], length, x.shape[2])
        return x.as_strided(size, (step * row, head, row, item), x.storage_offset() + start * row)

    def bias(self, q: Tensor) -> Tensor | None:
        if not self.masked:
            return None
        hidden = q.new_ones(self.length_q, self.length_k, dtype=torch.bool).triu(self.length_k - self.length_q + 1)
        return q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[None, None]


def _rows(x: Tensor) -> Tensor:
    """x of any strides but the last: torch's flash attention on a CPU takes that for 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Each key-value head of x [S, G, Dh] repeated to [S, H, Dh]: flash attention on CPU takes no groups."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _lengths(
    cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, rows: int, keys: int
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Where each segment's queries and keys begin, and how many of each it has. ValueError for what cannot be."""
    starts = []
    for name, cu, most in (("cu_seqlens", cu_q, rows), ("cu_seqlens_k", cu_k, keys)):
        found = cu.tolist()
        rises = found[0] >= 0 and found[-1] <= most and all(a <= b for a, b in pairwise(found))
        expect(rises, "attention", name, found, f"offsets that rise from 0 to at most the {most} rows")
        starts.append(found)
    lengths_q, lengths_k = ([end - start for start, end in pairwise(found)] for found in starts)
    if used_k is not None:
        used = used_k.tolist()
        fits = all(0 <= n <= most for n, most in zip(used, lengths_k))
        expect(fits, "attention", "used_k", used, f"at most the segments' numbers of keys, {lengths_k}")
        lengths_k = used
    return *starts, list(zip(lengths_q, lengths_k))


def _runs(cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, causal: bool, rows: int, keys: int) -> Iterator[_Run]:
    starts_q, starts_k, lengths = _lengths(cu_q, cu_k, used_k, rows, keys)
    first = 0
    while first < len(lengths):
        (length_q, length_k), step = lengths[first], starts_k[first + 1] - starts_k[first]
        last = first + 1
        while last < len(lengths) and lengths[last] == lengths[first] and starts_k[last] - starts_k[last - 1] == step:
            last += 1
        if length_q and length_k:
            blind = max(length_q - length_k, 0) if causal else 0  # queries before the first key
            yield _Run(
                last - first, starts_q[first] + blind, length_q - blind, length_q, starts_k[first], length_k, step,
                causal and length_q >= length_k, causal and 1 < length_q < length_k,
            )  # fmt: skip
        first = last


def _varlen(q, k, v, cu_q, cu_k, used_k, causal, max_length):
    """torch's variable-length flash attention: CUDA, bf16 and fp16."""
    from torch.nn.attention.varlen import varlen_attn

    _expect_gpu(q, "varlen")
    y = varlen_attn(
        q, k, v, cu_q, cu_k, max_length or q.shape[0], max_length or k.shape[0], window_size=(-1, 0 if causal else -1),
        enable_gqa=q.shape[1] != k.shape[1], seqused_k=used_k,
    )  # fmt: skip
    return _inside(y, cu_q)


def _flash_attn(q, k, v, cu_q, cu_k, used_k, causal, max_length):
    """The flash-attn package: CUDA, bf16 and fp16."""
    _refuse_used(used_k, "flash")
    run = _package("flash_attn", "flash").flash_attn_varlen_func
    _expect_gpu(q, "flash")
    return _inside(run(q, k, v, cu_q, cu_k, max_length or q.shape[0], max_length or k.shape[0], causal=causal), cu_q)


def _xformers(q, k, v, cu_q, cu_k, used_k, causal, max_length):
    """Its mask wants lengths on the host: this waits for the device, so that "auto" never takes it."""
    _refuse_used(used_k, "xformers")
    package, masks = _package("xformers.ops", "xformers"), _package("xformers.ops.fmha.attn_bias", "xformers")
    _expect_gpu(q, "xformers")
    mask = masks.BlockDiagonalMask.from_seqlens(cu_q.diff().tolist(), cu_k.diff().tolist())
    mask = mask.make_causal_from_bottomright() if causal else mask
    ends = int(cu_q[-1]), int(cu_k[-1])
    q, k, v, padding = q[: ends[0]], _repeat(k, q)[: ends[1]], _repeat(v, q)[: ends[1]], len(q) - ends[0]
    y = package.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    return F.pad(y, (0, 0, 0, 0, 0, padding))


def _flex(q, k, v, cu_q, cu_k, used_k, causal, max_length):
    """torch's FlexAttention with a mask of segments, made at every call; on a CPU without gradients."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    expect(q.is_cuda or not recorded, "attention", 'device for gradients of backend "flex"', q.device, "a GPU")
    mask = _mask(cu_q, cu_k, used_k, q.shape[0], k.shape[0], causal)
    attend, make = _flex_functions(q.is_cuda)
    blocks = make(lambda b, h, i, j: mask(i, j), None, None, q.shape[0], k.shape[0], device=q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


@cache
def _flex_functions(gpu: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """On a GPU compiled: as they are, scores and mask of all pairs would lie in memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (
        (torch.compile(flex_attention), torch.compile(create_block_mask))
        if gpu
        else (flex_attention, create_block_mask)
    )


def _sdpa(q, k, v, cu_q, cu_k, used_k, causal, max_length):
    """torch's dense attention, for segments that are all max_length long, queries and keys alike, and fill all rows.

    Only the caller can know that: "auto" never takes it. Padding behind a shorter last segment counts as part of it.
    """
    _refuse_used(used_k, "sdpa")
    B = len(cu_q) - 1
    expect(len(q) == len(k) == B * (max_length or 0), "attention", 'max_length for backend "sdpa"', max_length,
           f"the length of each of {B} segments in {len(q)} rows")  # fmt: skip
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, cu in (("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k)):
            begins = cu.tolist()[:-1]
            alike = begins == [b * (max_length or 0) for b in range(B)]
            expect(alike, "attention", f'begins in {name} for backend "sdpa"', begins, f"one each {max_length} rows")
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(0, 1)


def _inside(y: Any, cu_q: Tensor) -> Tensor:
    """Zeros in the rows past the last segment, which these kernels never write."""
    return torch.where((torch.arange(len(y), device=y.device) < cu_q[-1])[:, None, None], y, y.new_zeros(()))


def _expect_gpu(q: Tensor, backend: str) -> None:
    expect(q.is_cuda or q.is_meta, "attention", f'device for backend "{backend}"', q.device, "a GPU")


def _refuse_used(used_k: Tensor | None, backend: str) -> None:
    expect(used_k is None, "attention", f'used_k for backend "{backend}"', "given", "None")


def _package(name: str, backend: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'attention: backend "{backend}" needs pip install "mm1-engine[gpu]" ({error})') from None


Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, int | None], Tensor]
BACKENDS: dict[str, Backend] = {
    "reference": lambda *given: reference(*given[:7]),
    "segments": lambda *given: segments(*given[:7])[0],
    "varlen": _varlen,
    "flash": _flash_attn,
    "xformers": _xformers,
    "flex": _flex,
    "sdpa": _sdpa,
    "triton": lambda *given: flash(*given[:7]),
}
MEASURED = ("varlen", "flash", "flex", "triton")  # what "auto" may take: no lengths on the host
NEEDS = {"flash": "flash_attn"}


def _constant(function: Any) -> Any:
    """What torch.compiler.assume_constant_result does, which would import Inductor with this file (a second)."""
    function._dynamo_marked_constant = True
    return function


@_constant
def choose(gpu: str, head_width: int, causal: bool, dtype: str, backward: bool, used: bool) -> str:
    """The fastest back-end that is installed, by the rows measured on this GPU; without any, a default.

    Rows give shares of the peak; backward does 2.5 times the operations of forward. used: with used_k.
    """
    wanted = {"head_width": head_width, "causal": causal, "dtype": dtype}
    rows = [row for row in table(gpu) if wanted.items() <= row.items() and row["backend"] in MEASURED]
    rows = [row for row in rows if _installed(row["backend"]) and not (used and row["backend"] == "flash")]
    if rows:
        return min(rows, key=lambda row: 1 / row["forward"] + backward * 2.5 / row["backward"])["backend"]
    if dtype in ("bfloat16", "float16"):
        return "varlen"
    return "triton" if head_width in WIDTHS and dtype == "float32" else "reference"


@cache
def _installed(backend: str) -> bool:
    return backend not in NEEDS or importlib.util.find_spec(NEEDS[backend]) is not None


@cache
def table(gpu: str) -> list[dict[str, Any]]:
    """Rows of head_width, causal, dtype, backend, and shares of the bf16 peak forward and backward."""
    path = files("mm1") / "autotune" / "tables" / "attention" / f"{gpu}.json"
    return json.loads(path.read_text()) if path.is_file() else []


@_constant
def gpu_name(index: int | None) -> str:
    """Of its tables."""
    return device_of_index(index).name


def cost(
    lengths: Sequence[int], heads: int, kv_heads: int, head_width: int, *, causal: bool, itemsize: int = 2,
    backward: bool = False,
) -> Cost:  # fmt: skip
    """Segments of these lengths. backward: of the gradients alone, five products to forward's two (Dao et al. 2022)."""
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    rows = sum(lengths)
    tensors = 4 if backward else 2  # read q, dy, k, v, y; write dq, dk, dv
    return Cost(
        (10 if backward else 4) * pairs * heads * head_width,
        tensors * rows * (heads + kv_heads) * head_width * itemsize,
    )
