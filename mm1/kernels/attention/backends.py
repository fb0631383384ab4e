"""Compute attention by one of several backends: this project's kernels, torch's, and those of other libraries.

BACKENDS declares what each backend needs and which calls it takes. A call with a prefix mask to a backend without one
is split by `prefix_in_two_calls` into the queries that see only the prefix and the others, if the backend allows
segments without keys. "auto" is "segments" on a CPU, and what `choose_backend` returns on a GPU.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.attention import reference
from mm1.kernels.attention.cpu import repeat_heads, segments
from mm1.kernels.attention.flash import WIDTHS, flash
from mm1.kernels.attention.masks import Causal, Full, Mask, Prefix
from mm1.kernels.dispatch import device_of_index, expect
from mm1.kernels.tuning import tables


class Inputs(NamedTuple):
    """Hold the checked arguments of one call of `attention`; offsets are int32."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    used_k: Tensor | None
    mask: Mask
    max_length: int | None

    @property
    def prefix(self) -> Tensor | None:
        """Return the prefix lengths int32 [B] of a prefix mask."""
        return self.mask.lengths if isinstance(self.mask, Prefix) else None

    @property
    def causal(self) -> bool:
        """Return whether the mask may hide keys after a query's place."""
        return not isinstance(self.mask, Full)

    @property
    def max_lengths(self) -> tuple[int, int]:
        """Return upper bounds of the queries and of the keys of a segment."""
        return self.max_length or self.q.shape[0], self.max_length or self.k.shape[0]

    @property
    def grouped(self) -> bool:
        """Return whether several heads of q share one of k and v."""
        return self.q.shape[1] != self.k.shape[1]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of `segments` and `flash`."""
        return self.q, self.k, self.v, self.cu_q, self.cu_k, self.used_k, self.prefix, self.causal


def _reference(x: Inputs) -> Tensor:
    return reference.attention(x.q, x.k, x.v, x.cu_q, mask=x.mask, cu_seqlens_k=x.cu_k, used_k=x.used_k)


def _varlen(x: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if x.causal else (-1, -1)
    y: Any = varlen_attn(
        *_packed_rows(x), x.cu_q, x.cu_k, *x.max_lengths, window_size=window, enable_gqa=x.grouped, seqused_k=x.used_k
    )
    return zero_past(y, x.cu_q[-1])


def _flash_attn(module: str, x: Inputs) -> Tensor:
    attend = importlib.import_module(module).flash_attn_varlen_func
    y = attend(*_packed_rows(x), x.cu_q, x.cu_k, *x.max_lengths, causal=x.causal)
    return zero_past(y[0] if isinstance(y, tuple) else y, x.cu_q[-1])  # early releases of 3 return the log-sums too


def _xformers(x: Inputs) -> Tensor:
    """Compute attention by xformers, whose mask needs the lengths on the host: this waits for the device."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = masks.BlockDiagonalMask.from_seqlens(x.cu_q.diff().tolist(), x.cu_k.diff().tolist())
    bias = bias.make_causal_from_bottomright() if x.causal else bias
    end_q, end_k = int(x.cu_q[-1]), int(x.cu_k[-1])
    q, k, v = x.q[:end_q], repeat_heads(x.k, x.q)[:end_k], repeat_heads(x.v, x.q)[:end_k]
    y = attend(q[None], k[None], v[None], attn_bias=bias)[0]
    return F.pad(y, (0, 0, 0, 0, 0, len(x.q) - end_q))


def _flex(x: Inputs) -> Tensor:
    """Compute attention by torch's FlexAttention, with a new block mask at every call; on a CPU without gradients."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v))
    expect(x.q.is_cuda or not recorded, "attention", 'device for gradients of backend "flex"', x.q.device, "a GPU")
    sees = reference.visible(x.cu_q, x.cu_k, x.used_k, x.q.shape[0], x.k.shape[0], x.mask)
    attend, make = _flex_functions(x.q.is_cuda)
    blocks = make(lambda b, h, i, j: sees(i, j), None, None, x.q.shape[0], x.k.shape[0], device=x.q.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
    return attend(q, k, v, block_mask=blocks, enable_gqa=x.grouped)[0].transpose(0, 1)


@cache
def _flex_functions(gpu: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return attention and mask maker, compiled on a GPU: uncompiled they store the scores and mask of all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if gpu:
        return torch.compile(flex_attention), torch.compile(create_block_mask)
    return flex_attention, create_block_mask


def _sdpa(x: Inputs) -> Tensor:
    """Compute torch's dense attention of segments that all have max_length queries and keys, and fill all rows.

    Padding after a shorter last segment counts as part of it.
    """
    B, length = x.cu_q.shape[0] - 1, x.max_length or 0
    fits = x.q.shape[0] == x.k.shape[0] == B * length
    expect(fits, "attention", 'max_length for backend "sdpa"', x.max_length,
           f"the length of each of {B} segments in {x.q.shape[0]} rows")  # fmt: skip
    if x.q.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, cu in (("cu_seqlens", x.cu_q), ("cu_seqlens_k", x.cu_k)):
            begins = cu.tolist()[:-1]
            alike = begins == [b * length for b in range(B)]
            expect(alike, "attention", f'begins in {name} for backend "sdpa"', begins, f"one each {length} rows")
    q, k, v = (t.unflatten(0, (B, -1)).transpose(1, 2) for t in (x.q, x.k, x.v))
    sees = None
    if x.prefix is not None:
        place = torch.arange(length, device=q.device)
        sees = (place <= place[:, None]) | (place < x.prefix[:, None, None, None])
    y = F.scaled_dot_product_attention(q, k, v, sees, is_causal=x.causal and sees is None, enable_gqa=x.grouped)
    return y.transpose(1, 2).flatten(0, 1)


class Backend(NamedTuple):
    """Hold what a backend needs and which calls it takes."""

    run: Callable[[Inputs], Tensor]
    gpu: bool = False  # only GPUs
    module: str | None = None  # the optional module that it imports
    used_k: bool = True  # takes used_k
    prefix: str = "one call"  # or "two calls", or "refused"
    auto: bool = False  # "auto" may choose it; it never waits for the device


# The backends that need an optional package have its name.
BACKENDS: dict[str, Backend] = {
    "reference": Backend(_reference),
    "segments": Backend(lambda x: segments(*x.arguments)[0]),  # torch's flash attention for CPUs
    "varlen": Backend(_varlen, gpu=True, prefix="two calls", auto=True),  # torch's; bf16 and fp16
    **{
        name: Backend(partial(_flash_attn, module), True, module, used_k=False, prefix="two calls", auto=True)
        for name, module in (("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface"))
    },
    "xformers": Backend(_xformers, True, "xformers", used_k=False, prefix="refused"),
    "flex": Backend(_flex, auto=True),
    "sdpa": Backend(_sdpa, used_k=False),  # only a caller knows whether all segments are max_length long
    "triton": Backend(lambda x: flash(*x.arguments), auto=True),  # checks itself what it needs
}


def run(name: str, x: Inputs) -> Tensor:
    """Compute a call with the named backend.

    Raises ValueError for arguments that the backend does not take, ImportError where its package is not installed.
    """
    backend = BACKENDS[name]
    expect(backend.used_k or x.used_k is None, "attention", f'used_k for backend "{name}"', "a tensor", "None")
    refused = backend.prefix == "refused" and x.prefix is not None
    expect(not refused, "attention", f'mask for backend "{name}"', "Prefix", "Full or Causal")
    if backend.module:
        try:
            importlib.import_module(backend.module)
        except ImportError as error:
            raise ImportError(f'attention: backend "{name}" needs the Python package {name}: {error}') from None
    fits = not backend.gpu or x.q.is_cuda or x.q.is_meta
    expect(fits, "attention", f'device for backend "{name}"', x.q.device, "a GPU")
    split = backend.prefix == "two calls" and x.prefix is not None
    return prefix_in_two_calls(backend.run, x) if split else backend.run(x)


def prefix_in_two_calls(attend: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    """Compute a prefix mask with a backend that has none: exact, because each query belongs to one of the calls.

    The first queries of a segment see only the prefix (a full mask over its keys, which are gathered), the others all
    keys up to their own place (a causal mask). Each call has two segments for every segment of x, one of them without
    keys, so that queries keep their rows and the host knows all shapes.
    """
    assert x.prefix is not None
    length_q, length_k = x.cu_q.diff(), x.cu_k.diff() if x.used_k is None else x.used_k
    seen = x.prefix.clamp(min=0).minimum(length_k)
    first = (seen - (length_k - length_q)).clamp(min=0).minimum(length_q)  # queries whose last key is the prefix's
    none = torch.zeros_like(seen)

    def offsets(begins: Tensor, then: Tensor, end: Tensor) -> Tensor:
        return torch.cat([torch.stack([begins, then], 1).flatten(), end])

    begins, keys = x.cu_q[:-1], x.cu_k[:-1]
    cu_q = offsets(begins, begins + first, x.cu_q[-1:])
    used_k = None if x.used_k is None else torch.stack([none, x.used_k], 1).flatten()
    rest = attend(x._replace(cu_q=cu_q, cu_k=offsets(keys, keys, x.cu_k[-1:]), used_k=used_k, mask=Causal()))

    segment, place = reference.places(x.cu_k, x.k.shape[0])
    inside = place < F.pad(seen, (0, 1))[segment]
    order = torch.argsort(~inside, stable=True)  # the keys of all prefixes before all others
    k, v = (t.index_select(0, order) for t in (x.k, x.v))
    cu_k = F.pad(torch.stack([seen, none], 1).flatten().cumsum(0), (1, 0)).int()
    prefix = attend(Inputs(x.q, k, v, cu_q, cu_k, None, Full(), x.max_length))

    segment, place = reference.places(x.cu_q, x.q.shape[0])
    return torch.where((place < F.pad(first, (0, 1))[segment])[:, None, None], prefix, rest)


def zero_past(x: Tensor, rows: Tensor) -> Tensor:
    """Return x [T, H, Dh] with zeros past its first `rows` (int []) rows, which some libraries leave unwritten."""
    return torch.where((torch.arange(x.shape[0], device=x.device) < rows)[:, None, None], x, x.new_zeros(()))


class ZeroGradientPast(torch.autograd.Function):
    """Return x [T, H, Dh], and replace its gradient by zeros past the first `rows` (int []) rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return zero_past(grads[0], *ctx.saved_tensors), None


def _packed_rows(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v for libraries that leave the gradients of rows past the last segment unwritten."""
    q, k, v = (ZeroGradientPast.apply(t, cu[-1]) for t, cu in ((x.q, x.cu_q), (x.k, x.cu_k), (x.v, x.cu_k)))
    return q, k, v


def constant(function: Any) -> Any:
    """Make a function's result a constant of compiled code.

    This is what torch.compiler.assume_constant_result does, which would import Inductor with this file (a second).
    """
    function._dynamo_marked_constant = True
    return function


@constant
def choose_backend(gpu: str, head_width: int, mask: str, dtype: str, backward: bool, used_k: bool) -> str:
    """Return the installed backend that "auto" takes on the GPU of this name.

    mask: "Full", "Causal" or "Prefix". dtype: "bfloat16", …. backward: whether gradients will be needed.
    """
    usable = [n for n, b in BACKENDS.items() if b.auto and installed(n) and (b.used_k or not used_k)]
    return fastest(read_table(tables() / "attention" / f"{gpu}.json"), usable, head_width, mask, dtype, backward)


def fastest(
    rows: Iterable[dict[str, Any]], usable: Iterable[str], head_width: int, mask: str, dtype: str, backward: bool
) -> str:
    """Return the usable backend that is fastest by the rows of a table, or a default where no row fits.

    Rows hold shares of the peak rate; backward takes 2.5 times the operations of forward. The prefix mask is not
    measured: it runs on the Triton kernel where that has the head width, which skips hidden tiles in a single call.
    """
    fits = {"head_width": head_width, "causal": mask == "Causal", "dtype": dtype}
    candidates = [row for row in rows if fits.items() <= row.items() and row["backend"] in usable]
    triton = "triton" if head_width in WIDTHS and dtype in ("float32", "bfloat16", "float16") else None
    if mask == "Prefix":
        return triton or ("varlen" if dtype in ("bfloat16", "float16") else "reference")
    if candidates:
        return min(candidates, key=lambda row: 1 / row["forward"] + backward * 2.5 / row["backward"])["backend"]
    if dtype in ("bfloat16", "float16"):
        return "varlen"
    return triton or "reference"


@cache
def installed(backend: str) -> bool:
    """Return whether the module that a backend imports is installed."""
    module = BACKENDS[backend].module
    return module is None or importlib.util.find_spec(module) is not None


@cache
def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file: head_width, causal, dtype, backend, and shares of the peak rate forward and backward.

    A missing file has no rows.
    """
    return json.loads(path.read_text()) if path.is_file() else []


@constant
def gpu_name(index: int | None) -> str:
    """Return the name in tables of the GPU with this index in torch (None: the current one)."""
    return device_of_index(index).name
