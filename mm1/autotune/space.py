"""List the kernels that have configurations, the shapes of the shipped tables, and example calls to try them with.

The shapes are those of MM1 and of widely used models. Their first size runs through octaves: the row of a table for
513 … 1024 rows is tried with 1024.
"""

from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.kernels.abstractor import depthwise, pooling
from mm1.kernels.abstractor.gate import GATE, GateShape, gated_mm
from mm1.kernels.abstractor.rows import JOIN, JOIN_BACKWARD, NORM, RowShape, join, join_backward, norm_silu
from mm1.kernels.attention import flash, paged
from mm1.kernels.attention.tiles import DKV, DQ, FLASH, FlashShape
from mm1.kernels.dispatch import cdiv, power_of_2
from mm1.kernels.moe import experts, few_tokens, grouped
from mm1.kernels.moe.grouped import DwShape
from mm1.kernels.moe.routing import sort_by_expert
from mm1.kernels.patches import embedding, loss
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.tiles import EMBED, EMBED_DW, LOSS, PatchShape
from mm1.kernels.tiles import Shape
from mm1.kernels.tuning import Tunable, TuneError

DTYPES = {16: torch.bfloat16, 32: torch.float32}  # by the bits of an element
FAN = 2  # experts per token
SIDE = 27  # patches per side of an image: 378 pixels in patches of 14
POOL = (12, 12)
PAGE = 16  # tokens
BOOLS = {"0": False, "false": False, "1": True, "true": True}
NORMALISE = [0.0167, 0.0175, 0.0175], [0.1, 0.2, 0.3]  # about 1 / (255 · std)


class Inputs(NamedTuple):
    """Make inputs of example calls: random values, or none on the device "meta"."""

    device: str
    dtype: torch.dtype
    widen: bool = False  # return the same values in fp32

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed values with the standard deviation `scale`."""
        x = torch.empty(*shape, device=self.device, dtype=dtype or self.dtype)
        if self.device != "meta":
            x.normal_(std=scale)
        return x.float() if self.widen else x

    def choices(self, rows: int, fan: int, count: int) -> Tensor:
        """Return each row's choice of `fan` among `count` experts, int32 [rows, fan], as uneven as a router's."""
        if self.device == "meta":
            return torch.empty(rows, fan, device="meta", dtype=torch.int32)
        noise = -torch.empty(rows, count, device=self.device).exponential_().log()
        noise += 0.5 * torch.randn(count, device=self.device)
        return noise.topk(fan).indices.int()

    def order(self, slots: int, experts: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return what `sort_by_expert` returns for random choices, and the number of slots per token."""
        fan = FAN if slots % FAN == 0 and experts >= FAN else 1
        index = self.choices(slots // fan, fan, experts)
        if self.device == "meta":
            return torch.empty(slots, device="meta", dtype=torch.int32), index, index.new_empty(experts), fan
        order = sort_by_expert(index, experts)
        return order[0], order[1], order[2], fan

    def grids(self, patches: int) -> Grids:
        """Return the grids of square images, and of one row of patches for the remainder."""
        whole, rest = divmod(patches, SIDE * SIDE)
        return Grids([(SIDE, SIDE)] * whole + [(1, rest)] * (rest > 0), device=self.device)


Example = Callable[[Any, Inputs], Callable[[], Any]]  # makes inputs for a shape, and returns the call to try


class Kernel(NamedTuple):
    """Describe a kernel to the tuner."""

    tunable: Tunable
    launched: tuple[str, ...]  # names of the Triton functions that a configuration applies to
    multiplies: bool  # whether their machine code must have matrix instructions
    modelled: bool  # whether a prediction alone may replace the default
    shapes: Callable[[], Iterator[Any]]  # shapes of the shipped tables
    example: Example


def octaves(low: int, high: int) -> list[int]:
    """Return the powers of 2 from low to high."""
    return [1 << i for i in range(low.bit_length() - 1, high.bit_length())]


def interval(size: int) -> list[int]:
    """Return the octave that contains `size`, as 513 … 1024 for 700."""
    high = power_of_2(size)
    return [high // 2 + 1, high]


# (D, F, E): MM1-3B-MoE and MM1-7B-MoE; Mixtral 8×7B, Phi-3.5-MoE, OLMoE, Qwen3-30B-A3B
LAYERS = ((3072, 8064, 64), (4096, 13312, 32), (4096, 14336, 8), (4096, 6400, 16), (2048, 1024, 64), (2048, 768, 128))
# (width, K): ViT-L, SO400M, ViT-H with patches of 14 pixels; ViT-B, ViT-L, SO400M with 16; Qwen-VL's cut patches
EMBEDDINGS = (
    (1024, 588), (1152, 588), (1280, 588), (768, 768), (1024, 768), (1152, 768), (1280, 1176), (1152, 1536),
)  # fmt: skip
PIXELS = (588, 768)  # values of a patch that is cut from pixels
HEADS_OF_PIXELS = (2048, 1024)  # widths of AIM's and AIMv2's heads, which predict patches of 588 values
CHANNELS = (768, 1024)  # of C-Abstractors
HEADS = ((16, 16, 80, False), (16, 16, 64, False), (32, 8, 128, True))  # (H, G, Dh, causal)
# (key-value heads, query heads for each) of MM1-3B, MM1-7B and Qwen3-30B-A3B, all of width 128
DECODERS = ((24, 1), (8, 4), (4, 8))
STEPS = ((1, 1), (4, 1), (16, 1), (64, 1), (256, 1), (1, 256), (8, 256))  # (segments, new tokens of each)
CACHED = 1 << 23  # maximum rows of keys: with their values 4 GB in bf16
ROWS = octaves(512, 131072)


def _layers(*shapes: Callable[[int, int, int, int], Any], rows: Iterable[int] = ROWS) -> Callable[[], Iterator[Any]]:
    """Return a function that yields shape(rows, E, D, F) of each layer in LAYERS, for each of the shapes."""
    return lambda: (shape(n, E, D, F) for D, F, E in LAYERS for n in rows for shape in shapes)


def _row_shapes() -> Iterator[RowShape]:
    return (RowShape(rows, C) for C in CHANNELS for rows in ROWS)


def _embed_shapes() -> Iterator[PatchShape]:
    return (PatchShape(patches, k, width) for width, k in EMBEDDINGS for patches in octaves(256, 262144))


def _loss_shapes() -> Iterator[PatchShape]:
    return (PatchShape(rows, width, PIXELS[0]) for width in HEADS_OF_PIXELS for rows in octaves(256, 131072))


def _flash_shapes() -> Iterator[FlashShape]:
    return (FlashShape(rows, *heads) for heads in HEADS for rows in octaves(1024, 131072))


def _paged_shapes() -> Iterator[paged.PagedShape]:
    for groups, heads in DECODERS:
        for segments, new in STEPS:
            for keys in octaves(256, 32768):
                if segments * groups * keys <= CACHED:
                    yield paged.PagedShape(keys, segments * groups, new * heads, 128)


def _gemm(s: Shape, new: Inputs) -> Callable[[], Any]:
    _, _, offsets, _ = new.order(s.rows, s.experts)
    a, b = new.floats(s.rows, s.k), new.floats(s.experts, s.n, s.k, scale=s.k**-0.5).transpose(1, 2)
    return lambda: grouped.gemm(a, b, offsets)


def _dw(s: DwShape, new: Inputs) -> Callable[[], Any]:
    slots, _, offsets, fan = new.order(s.rows, s.experts)
    a, b = new.floats(s.rows, s.k), new.floats(s.rows // fan if s.gathered else s.rows, s.n)
    fan = fan if s.gathered else 0

    def run():
        out, bias = a.new_empty(s.experts, s.k, s.n), a.new_empty(s.experts, s.k) if s.bias else None
        grouped.dw(a, b, offsets, out, slots=slots, b_fan=fan, bias=bias)
        if new.device == "meta" and fan:  # the gradient of `down`, for which a is gathered and sums are weighted
            dy, rows, scale = a[: s.rows // fan], b.new_empty(s.rows, s.n), new.floats(s.rows, dtype=torch.float32)
            grouped.dw(dy, rows, offsets, out, slots=slots, a_fan=fan, bias=bias, scale=scale)
        return out if bias is None else (out, bias)

    return run


def _up(s: Shape, new: Inputs) -> Callable[[], Any]:
    slots, _, offsets, fan = new.order(s.rows, s.experts)
    x = new.floats(s.rows // fan, s.k)
    gate_up = new.floats(s.experts, s.n * s.sums, s.k, scale=s.k**-0.5)

    return lambda: experts.up_rows(x, slots, offsets, fan, gate_up, None, s.n, None, "silu", None, 0.0, False, True)


def _dh(s: Shape, new: Inputs) -> Callable[[], Any]:
    slots, _, offsets, fan = new.order(s.rows, s.experts)
    dy, h, down = new.floats(s.rows // fan, s.k), new.floats(s.rows, 2 * s.n), new.floats(s.experts, s.k, s.n)
    weight = new.floats(s.rows // fan, fan, dtype=torch.float32)

    def run():
        dh, ws, dots = experts.gradient_of_h(dy, h, slots, offsets, fan, weight, down, None, "silu", None, 0.0, True)
        return dh, ws, dots.sum(0)  # each tile has a partial sum

    return run


def _few(s: Shape, new: Inputs) -> Callable[[], Any]:
    fan = FAN if s.gated and s.rows % FAN == 0 else 1
    index = new.choices(s.rows // fan, fan, s.experts)
    a, gate = new.floats(s.rows // fan, s.k), new.floats(s.experts, s.n, s.k, scale=s.k**-0.5)
    up, act = (new.floats(s.experts, s.n, s.k, scale=s.k**-0.5), "silu") if s.gated else (None, None)
    return lambda: few_tokens.by_slot(a, index, fan, gate, up, None, None, act, None, 0.0)


def _embed(s: PatchShape, new: Inputs) -> Callable[[], Any]:
    grids = new.grids(s.patches)
    weight, bias, table = new.floats(s.width, s.k), new.floats(s.width), new.floats(SIDE, SIDE, s.width)
    # Machine code is judged in the mode that needs the most registers.
    mode = "bicubic" if new.device == "meta" else "bilinear"
    geometry, modes = (grids.table, grids.owner), (1, mode, True, False)
    if s.k not in PIXELS:
        patches = new.floats(s.patches, s.k)
        return lambda: embedding.embed(patches, weight, bias, table, *geometry, *modes)
    pixels, side = _pixels(s.patches, s.k, new), round((s.k // 3) ** 0.5)
    return lambda: embedding.forward(pixels, weight, bias, table, *geometry, side, *NORMALISE, *modes)


def _embed_dw(s: PatchShape, new: Inputs) -> Callable[[], Any]:
    grids, dy, weight = new.grids(s.patches), new.floats(s.patches, s.width), new.floats(s.width, s.k)
    pixels = _pixels(s.patches, s.k, new)
    return lambda: embedding.backward(
        dy, pixels, weight, grids.table, grids.owner, round((s.k // 3) ** 0.5), *NORMALISE, 1, False, True
    )


def _loss(s: PatchShape, new: Inputs) -> Callable[[], Any]:
    grids, side = new.grids(s.patches), round((s.width // 3) ** 0.5)
    x, weight, bias = new.floats(s.patches, s.k), new.floats(s.width, s.k, scale=s.k**-0.5), new.floats(s.width)
    rows = torch.arange(s.patches, device=new.device, dtype=torch.int32)
    of = (
        x,
        weight,
        bias,
        _pixels(s.patches, s.width, new),
        rows,
        [grids.table, grids.owner],
        [side, side, 1],
        *NORMALISE,
        1e-6,
        x.dtype,
    )

    def run():
        if new.device == "meta":  # the kernel of the gradients, whose time is mainly that of torch's products
            loss.backward(new.floats(s.patches, dtype=torch.float32), *of, [True] * 3)
        return loss.forward(*of)

    return run


def _pixels(patches: int, values: int, new: Inputs) -> Tensor:
    x = torch.empty(patches * values // 3, 3, device=new.device, dtype=torch.uint8)
    return x if new.device == "meta" else x.random_(0, 256)


def _norms(s: RowShape, new: Inputs) -> tuple[Tensor, Tensor]:
    return new.floats(s.channels), new.floats(s.channels)


def _norm(s: RowShape, new: Inputs) -> Callable[[], Any]:
    u, norms = new.floats(*s), _norms(s, new)
    return lambda: norm_silu(u, *norms, torch.empty_like(u))


def _join(s: RowShape, new: Inputs) -> Callable[[], Any]:
    u, x, grids, norms = new.floats(*s), new.floats(*s), new.grids(s.rows), _norms(s, new)
    geometry = grids.table, grids.owner

    def run():
        pooled = join(u, x, *norms, None, None, *geometry, POOL, None)
        return pooled, join(u, x, *norms, *norms, *geometry, (0, 0), None)

    return run


def _join_backward(s: RowShape, new: Inputs) -> Callable[[], Any]:
    u, x, grids, norms = new.floats(*s), new.floats(*s), new.grids(s.rows), _norms(s, new)
    geometry, pooled = (grids.table, grids.owner), new.floats(grids.images * POOL[0] * POOL[1], s.channels)

    def run():
        first = join_backward(pooled, u, x, *norms, None, None, *geometry, POOL)
        return *first, *join_backward(x, u, x, *norms, *norms, *geometry, (0, 0))

    return run


def _depthwise(call: Callable[..., Any]) -> Example:
    """Return the example that calls call(a, dc, w, gamma, beta, gate, geometry)."""

    def example(s: RowShape, new: Inputs) -> Callable[[], Any]:
        grids, a, dc, w = new.grids(s.rows), new.floats(*s), new.floats(*s), new.floats(9, s.channels)
        geometry = depthwise.Geometry(grids.table, grids.owner, grids.strips)
        gate, norms = new.floats(grids.images, s.channels), _norms(s, new)
        return lambda: call(a, dc, w, *norms, gate, geometry)

    return example


def _gate(s: GateShape, new: Inputs) -> Callable[[], Any]:
    grids = new.grids(s.rows)
    b, gate, w = new.floats(s.rows, s.k), new.floats(grids.images, s.k), new.floats(s.n, s.k, scale=s.k**-0.5)
    return lambda: gated_mm(b.clone(), gate, grids.owner, w)  # it may overwrite b


def _pool(s: RowShape, new: Inputs) -> Callable[[], Any]:
    x, grids = new.floats(*s), new.grids(s.rows)
    dy = new.floats(grids.images * POOL[0] * POOL[1], s.channels)
    geometry = grids.table, grids.owner
    return lambda: (pooling.forward(x, *geometry, *POOL), pooling.backward(dy, *geometry, *POOL))


def _segments(s: FlashShape, new: Inputs) -> Tensor:
    length = min(s.rows, 2048 if s.causal else SIDE * SIDE)
    ends = [min(i * length, s.rows) for i in range(cdiv(s.rows, length) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device="cpu").to(new.device)


def _flash(s: FlashShape, new: Inputs) -> Callable[[], Any]:
    q, k, v = (new.floats(s.rows, heads, s.width) for heads in (s.heads, s.kv_heads, s.kv_heads))
    cu = _segments(s, new)
    return lambda: flash.forward(q, k, v, cu, cu, None, None, s.causal)


def _flash_backward(s: FlashShape, new: Inputs) -> Callable[[], Any]:
    q, k, v, dy = (new.floats(s.rows, heads, s.width) for heads in (s.heads, s.kv_heads, s.kv_heads, s.heads))
    cu = _segments(s, new)
    y, lse = flash.forward(q, k, v, cu, cu, None, None, s.causal)
    return lambda: flash.backward(dy, q, k, v, y, lse, cu, cu, None, None, s.causal)


def _paged(s: paged.PagedShape, new: Inputs) -> Callable[[], Any]:
    """Return a call with scattered pages and, where the shape allows it, 8 key-value heads for 4 query heads each."""
    groups, heads, pages = gcd(s.groups, 8), gcd(s.rows, 4), cdiv(s.keys, PAGE)
    segments, rows = s.groups // groups, s.rows // heads
    k, v = (new.floats(segments * pages, PAGE, groups, s.width) for _ in range(2))
    q = new.floats(segments * rows, groups * heads, s.width)
    starts, tables = torch.arange(0, len(q) + 1, rows), torch.randperm(segments * pages).view(segments, pages)
    lengths = torch.full((segments,), s.keys)
    cu_q, tables, lengths = (x.to(new.device, torch.int32) for x in (starts, tables, lengths))
    return lambda: paged.forward(q, k, v, cu_q, tables, lengths, rows)


WALKS = depthwise.WALKS
_BY_ROWS = [
    Kernel(tunable, launched, False, False, _row_shapes, example)
    for tunable, launched, example in (
        (NORM, ("_norm_kernel",), _norm),
        (JOIN, ("_join_kernel", "_join_pool_kernel"), _join),
        (JOIN_BACKWARD, ("_join_backward_kernel",), _join_backward),
        (WALKS["value"], ("_walk_kernel",),
         _depthwise(lambda a, dc, w, gamma, beta, gate, at: depthwise.forward(a, w, gamma, beta, at))),
        (WALKS["gated"], ("_walk_kernel",),
         _depthwise(lambda a, dc, w, gamma, beta, gate, at: depthwise.gated(a, dc, w, gamma, beta, gate, at, True))),
        (WALKS["backward"], ("_walk_kernel",),
         _depthwise(lambda a, dc, w, gamma, beta, gate, at: depthwise.backward(a, dc, w, gamma, beta, gate, gate, at))),
        (WALKS["input"], ("_walk_kernel",),
         _depthwise(lambda a, dc, w, gamma, beta, gate, at: depthwise.input_gradient(a, dc, w, gamma, beta, at))),
        (pooling.POOL, ("_pool_kernel", "_pool_backward_kernel"), _pool),
    )
]  # fmt: skip
KERNELS = {
    kernel.tunable.kernel: kernel
    for kernel in (
        Kernel(grouped.GEMM, ("_gemm_kernel",), True, True,
               _layers(lambda n, E, D, F: Shape(n, E, F, D), lambda n, E, D, F: Shape(n, E, 2 * F, D)), _gemm),
        Kernel(grouped.DW, ("_dw_kernel",), True, True,
               _layers(lambda n, E, D, F: DwShape(n, E, 2 * F, D, True), lambda n, E, D, F: DwShape(n, E, D, F, True)),
               _dw),
        Kernel(experts.UP, ("_up_kernel",), True, True, _layers(lambda n, E, D, F: Shape(n, E, D, F, True)), _up),
        Kernel(experts.DH, ("_dh_kernel",), True, True, _layers(lambda n, E, D, F: Shape(n, E, D, F)), _dh),
        Kernel(few_tokens.FEW, ("_few_kernel",), True, True,
               _layers(lambda n, E, D, F: Shape(n, E, D, F, True), lambda n, E, D, F: Shape(n, E, F, D),
                       rows=octaves(1, few_tokens.MAX_SLOTS)), _few),
        Kernel(EMBED, ("_embed_kernel",), True, True, _embed_shapes, _embed),
        Kernel(EMBED_DW, ("_embed_dw_kernel",), True, True,
               lambda: (s for s in _embed_shapes() if s.k in PIXELS), _embed_dw),
        Kernel(LOSS, ("_error_kernel",), True, True, _loss_shapes, _loss),
        Kernel(GATE, ("_gemm_kernel", "_gate_kernel"), True, True,
               lambda: (GateShape(rows, C, C) for C in CHANNELS for rows in ROWS), _gate),
        *_BY_ROWS,
        Kernel(FLASH, ("_forward_kernel",), True, False, _flash_shapes, _flash),
        Kernel(DQ, ("_dq_kernel",), True, False, _flash_shapes, _flash_backward),
        Kernel(DKV, ("_dkv_kernel",), True, False, _flash_shapes, _flash_backward),
        Kernel(paged.PAGED, ("_paged_kernel", "_merge_kernel"), True, False, _paged_shapes, _paged),
    )
}  # fmt: skip


def chosen(names: Iterable[str]) -> list[Tunable]:
    """Return the kernels with these names, or all kernels for no names. Raises TuneError for an unknown name."""
    names = list(names)
    if unknown := [name for name in names if name not in KERNELS]:
        raise TuneError(f"unknown kernel {unknown[0]!r}; known: {', '.join(KERNELS)}")
    return [KERNELS[name].tunable for name in names or KERNELS]


def shape_named(tunable: Tunable, text: str) -> Any:
    """Parse a shape such as "rows=4096 experts=64". Raises TuneError if it is not a shape of this kernel."""
    pairs = [part.partition("=") for part in text.replace(",", " ").split()]
    texts = {name: value for name, _, value in pairs}
    fields, types = tunable.shape._fields, tunable.shape.__annotations__
    defaults = tunable.shape._field_defaults
    unknown, absent = [n for n in texts if n not in fields], [n for n in fields if n not in texts and n not in defaults]
    if unknown or absent:
        raise TuneError(f"{tunable.kernel}: {'unknown' if unknown else 'missing'} {(unknown or absent)[0]!r} in the "
                        f"shape; it takes {', '.join(fields)}")  # fmt: skip
    try:
        values = {n: BOOLS[text.lower()] if types[n] is bool else int(text) for n, text in texts.items()}
    except (ValueError, KeyError):
        values = {}
    if len(values) < len(pairs) or any(v < 0 for v in values.values()):
        raise TuneError(f"{tunable.kernel}: {text!r} is not a shape: sizes are whole numbers, flags are 0 or 1")
    return tunable.shape(**values)


def short(values: Any) -> str:
    """Return a shape or configuration as name=value pairs."""
    pairs = values._asdict() if isinstance(values, tuple) else vars(values)  # pyright: ignore[reportAttributeAccessIssue]
    return " ".join(f"{name}={value}" for name, value in pairs.items())
