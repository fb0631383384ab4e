"""Who computes attention: this project's kernels, torch's and other libraries', one table, chosen at run time.

BACKENDS says of each what it needs and which calls it takes. A backend that computes no prefix mask itself gets two
calls, of the queries that see just the prefix and of the others (`prefix_in_two_calls`), if it allows segments without
keys. On a CPU "auto" is "segments"; on a GPU it is what `choose` says.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import cache
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
    """The checked arguments of one call of `attention`; offsets are int32."""

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
        """The prefix lengths int32 [B] of a prefix mask."""
        return self.mask.lengths if isinstance(self.mask, Prefix) else None

    @property
    def causal(self) -> bool:
        """Whether a key after a query's place may be hidden."""
        return not isinstance(self.mask, Full)

    @property
    def longest(self) -> tuple[int, int]:
        """An upper bound of the queries and of the keys of a segment."""
        return self.max_length or self.q.shape[0], self.max_length or self.k.shape[0]

    @property
    def grouped(self) -> bool:
        """Whether several heads of q share one of k and v."""
        return self.q.shape[1] != self.k.shape[1]


Attend = Callable[[Inputs], Tensor]


def _reference(x: Inputs) -> Tensor:
    return reference.attention(x.q, x.k, x.v, x.cu_q, mask=x.mask, cu_seqlens_k=x.cu_k, used_k=x.used_k)


def _segments(x: Inputs) -> Tensor:
    return segments(x.q, x.k, x.v, x.cu_q, x.cu_k, x.used_k, x.prefix, x.causal)[0]


def _triton(x: Inputs) -> Tensor:
    return flash(x.q, x.k, x.v, x.cu_q, x.cu_k, x.used_k, x.prefix, x.causal)


def _varlen(x: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if x.causal else (-1, -1)
    y = varlen_attn(
        *_packed_rows(x), x.cu_q, x.cu_k, *x.longest, window_size=window, enable_gqa=x.grouped, seqused_k=x.used_k
    )
    return zero_past(y, x.cu_q[-1])  # pyright: ignore[reportArgumentType]


def _flash_attn_2(x: Inputs) -> Tensor:
    attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    return zero_past(attend(*_packed_rows(x), x.cu_q, x.cu_k, *x.longest, causal=x.causal), x.cu_q[-1])


def _flash_attn_3(x: Inputs) -> Tensor:
    attend = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    y = attend(*_packed_rows(x), x.cu_q, x.cu_k, *x.longest, causal=x.causal)
    return zero_past(y[0] if isinstance(y, tuple) else y, x.cu_q[-1])  # early releases return the log-sums too


def _xformers(x: Inputs) -> Tensor:
    """Run xformers, whose mask wants lengths on the host: this waits for the device."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = masks.BlockDiagonalMask.from_seqlens(x.cu_q.diff().tolist(), x.cu_k.diff().tolist())
    bias = bias.make_causal_from_bottomright() if x.causal else bias
    end_q, end_k = int(x.cu_q[-1]), int(x.cu_k[-1])
    q, k, v = x.q[:end_q], repeat_heads(x.k, x.q)[:end_k], repeat_heads(x.v, x.q)[:end_k]
    y = attend(q[None], k[None], v[None], attn_bias=bias)[0]
    return F.pad(y, (0, 0, 0, 0, 0, len(x.q) - end_q))


def _flex(x: Inputs) -> Tensor:
    """Run torch's FlexAttention with a block mask that is made at every call; on a CPU it has no gradients."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v))
    expect(x.q.is_cuda or not recorded, "attention", 'device for gradients of backend "flex"', x.q.device, "a GPU")
    sees = reference.visible(x.cu_q, x.cu_k, x.used_k, x.q.shape[0], x.k.shape[0], x.mask)
    attend, make = _flex_functions(x.q.is_cuda)
    blocks = make(lambda b, h, i, j: sees(i, j), None, None, x.q.shape[0], x.k.shape[0], device=x.q.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
    return attend(q, k, v, block_mask=blocks, enable_gqa=x.grouped)[0].transpose(0, 1)


@cache
def _flex_functions(gpu: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return attention and mask maker, on a GPU compiled: as they are, all pairs' scores and mask lie in memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if gpu:
        return torch.compile(flex_attention), torch.compile(create_block_mask)
    return flex_attention, create_block_mask


def _sdpa(x: Inputs) -> Tensor:
    """Run torch's dense attention on segments that are all max_length long, queries and keys alike, and fill all rows.

    Padding behind a shorter last segment counts as part of it.
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
    """A row of the table."""

    run: Attend
    gpu: bool = False  # for GPUs only
    package: str | None = None  # the optional module it needs
    used_k: bool = True  # takes used_k
    prefix: str = "one call"  # or "two calls", or "refused"
    measured: bool = False  # a choice of "auto" where it was measured: never waits for the device


BACKENDS: dict[str, Backend] = {
    "reference": Backend(_reference),
    "segments": Backend(_segments),  # torch's flash attention for CPUs
    "varlen": Backend(_varlen, gpu=True, prefix="two calls", measured=True),  # torch's; bf16 and fp16
    "flash": Backend(_flash_attn_2, True, "flash_attn", used_k=False, prefix="two calls", measured=True),
    "flash3": Backend(_flash_attn_3, True, "flash_attn_interface", used_k=False, prefix="two calls", measured=True),
    "xformers": Backend(_xformers, True, "xformers", used_k=False, prefix="refused"),
    "flex": Backend(_flex, measured=True),
    "sdpa": Backend(_sdpa, used_k=False),  # only a caller knows whether all segments are max_length long
    "triton": Backend(_triton, measured=True),  # says itself what it needs
}


def run(name: str, x: Inputs) -> Tensor:
    """Compute a call with the named backend.

    Raise ValueError for what the table says it does not take, ImportError for a package that is not installed.
    """
    backend = BACKENDS[name]
    expect(backend.used_k or x.used_k is None, "attention", f'used_k for backend "{name}"', "a tensor", "None")
    refused = backend.prefix == "refused" and x.prefix is not None
    expect(not refused, "attention", f'mask for backend "{name}"', "Prefix", "Full or Causal")
    if backend.package:
        try:
            importlib.import_module(backend.package)
        except ImportError as error:
            needs = f'attention: backend "{name}" needs pip install "mm1-engine[gpu]" ({error})'
            raise ImportError(needs) from None
    fits = not backend.gpu or x.q.is_cuda or x.q.is_meta
    expect(fits, "attention", f'device for backend "{name}"', x.q.device, "a GPU")
    return (
        prefix_in_two_calls(backend.run, x)
        if backend.prefix == "two calls" and x.prefix is not None
        else backend.run(x)
    )


def prefix_in_two_calls(attend: Attend, x: Inputs) -> Tensor:
    """Compute a prefix mask with a backend that has none: exact, because each query belongs to one of the calls.

    The first queries of a segment see just the prefix (a full mask over its keys, which are gathered), the others all
    keys up to their own place (a causal mask). Either call has two segments for each of x, the second call's first and
    the first call's second without keys, so that queries stay where they are and the host knows all shapes.
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
    """Return x [T, H, Dh] with zeros past its first `rows` (int []) rows, for results that libraries left unwritten."""
    return torch.where((torch.arange(x.shape[0], device=x.device) < rows)[:, None, None], x, x.new_zeros(()))


class ZeroGradientPast(torch.autograd.Function):
    """Return x [T, H, Dh], whose gradient is zeros past the first `rows` (int []) rows, whatever comes back there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return zero_past(grads[0], *ctx.saved_tensors), None


def _packed_rows(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v for libraries that leave the gradients of rows past the last segment unwritten."""
    ends = x.cu_q[-1], x.cu_k[-1], x.cu_k[-1]
    q, k, v = (ZeroGradientPast.apply(t, end) for t, end in zip((x.q, x.k, x.v), ends))
    return q, k, v


def constant(function: Any) -> Any:
    """Make a function's result a constant of compiled code.

    This is what torch.compiler.assume_constant_result does, which would import Inductor with this file (a second).
    """
    function._dynamo_marked_constant = True
    return function


@constant
def choose(gpu: str, head_width: int, mask: str, dtype: str, backward: bool, used_k: bool) -> str:
    """Return the backend that "auto" takes on a GPU of this name, of those that are installed.

    mask: "Full", "Causal" or "Prefix". dtype: "bfloat16", …. backward: whether gradients will be wanted.
    """
    usable = [n for n, b in BACKENDS.items() if b.measured and installed(n) and (b.used_k or not used_k)]
    return fastest(table(gpu), usable, head_width, mask, dtype, backward)


def fastest(
    rows: Iterable[dict[str, Any]], usable: Iterable[str], head_width: int, mask: str, dtype: str, backward: bool
) -> str:
    """Return the usable backend that the rows say is fastest, or a default where no row fits.

    Rows give shares of the peak rate; backward takes 2.5 times the operations of forward. The prefix mask is not
    measured: it takes the Triton kernel where that has the head width, because it computes no hidden tile in one call.
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
    """Return whether the package that a backend needs is installed."""
    package = BACKENDS[backend].package
    return package is None or importlib.util.find_spec(package) is not None


def table(gpu: str) -> list[dict[str, Any]]:
    """Return the rows measured on a GPU of this name, as `read_table` reads them."""
    return read_table(tables() / "attention" / f"{gpu}.json")


@cache
def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file: head_width, causal, dtype, backend, and shares of the peak rate forward and backward.

    A file that does not exist has none.
    """
    return json.loads(path.read_text()) if path.is_file() else []


@constant
def gpu_name(index: int | None) -> str:
    """Return the name that tables have for the GPU which torch counts as `index` (None: the current one)."""
    return device_of_index(index).name
