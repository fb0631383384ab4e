"""Define the ops that are measured: sizes, random inputs, mm1's implementation, and plain torch's.

Plain torch's implementation is the op family's reference. With wider leaves it is the truth (fp32 for 16 bits, fp64 for
fp32), with the same ones a peer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.autotune.space import Inputs
from mm1.bench.image_sizes import images_of
from mm1.engine.layers.connector import CAbstractor, ConvBlock
from mm1.kernels import linear_cross_entropy
from mm1.kernels.abstractor import bottleneck, pooling
from mm1.kernels.abstractor import reference as abstractor_reference
from mm1.kernels.attention import Causal, Full, paged, varlen
from mm1.kernels.dispatch import Cost, cdiv, wide
from mm1.kernels.moe import experts, grouped, routing
from mm1.kernels.moe import reference as moe_reference
from mm1.kernels.patches import embedding, loss
from mm1.kernels.patches import reference as patch_reference
from mm1.kernels.patches.grids import Grids

Leaves = dict[str, Any]  # tensors by the names of an op's arguments


@dataclass
class Problem:
    """Hold one op at one size."""

    shape: dict[str, int]  # sizes by name, for the record
    leaves: Leaves  # the inputs that get gradients
    ours: Callable[..., Tensor]  # mm1's implementation, called with leaves
    plain: Callable[[Leaves], Tensor]  # plain torch's
    costs: tuple[Cost, Cost]  # of forward and of backward
    tolerance: float = 1.0  # allowed rms error, as a multiple of the error of one product in this dtype
    inputs: SimpleNamespace = field(default_factory=SimpleNamespace)  # other inputs, which peers need


def calls(op: Callable[..., Tensor], **inputs: Any) -> Callable[[Leaves], Tensor]:
    """Return a function that calls the op with leaves and these inputs by name."""
    return lambda leaves: op(**leaves, **inputs)


def both(cost: Callable[..., Cost], *sizes: Any, **options: Any) -> tuple[Cost, Cost]:
    """Return an op's costs of forward and of backward."""
    return cost(*sizes, **options, backward=False), cost(*sizes, **options, backward=True)


class Layer(NamedTuple):
    """Hold the sizes of a mixture layer: width D, feed-forward width F, experts E, experts per token K."""

    name: str
    width: int
    ffn: int
    experts: int
    k: int


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("mm1-3b-moe", 3072, 8064, 64, 2), Layer("mm1-7b-moe", 4096, 13312, 32, 2),
        Layer("mixtral-8x7b", 4096, 14336, 8, 2), Layer("phi-3.5-moe", 4096, 6400, 16, 2),
        Layer("olmoe", 2048, 1024, 64, 8), Layer("qwen3-30b", 2048, 768, 128, 8),
        *(Layer(f"{E} experts", 2048, 1024, E, 2) for E in (8, 32, 128)),
        Layer("coarse", 512, 1792, 8, 2), Layer("fine", 256, 128, 64, 8),
    )
}  # fmt: skip


def moe_mlp(new: Inputs, layer: str, tokens: int, skew: str = "uniform") -> Problem:
    """Return a mixture layer, whose tokens choose experts with a skew as in `routed`."""
    L = LAYERS[layer]
    index, weight = routed(tokens, L.experts, L.k, skew, new.device)
    used, itemsize = len(index.unique()), new.dtype.itemsize
    return Problem(
        shape={"tokens": tokens, "width": L.width, "ffn": L.ffn, "experts": L.experts, "k": L.k},
        leaves={
            "x": new.floats(tokens, L.width), "weight": weight,
            "gate_up": new.floats(L.experts, 2 * L.ffn, L.width, scale=L.width**-0.5),
            "down": new.floats(L.experts, L.width, L.ffn, scale=L.ffn**-0.5),
        },
        ours=calls(experts.moe_mlp, index=index), plain=calls(moe_reference.moe_mlp, index=index),
        costs=both(experts.cost, tokens, L.k, used, L.width, L.ffn, itemsize=itemsize), tolerance=1.5,
        inputs=SimpleNamespace(layer=L, index=index),
    )  # fmt: skip


def routed(tokens: int, count: int, k: int, skew: str, device: str) -> tuple[Tensor, Tensor]:
    """Return index and weight of a random router.

    skew: "uniform", "zipf" (frequency 1 / rank), or "one" (every token chooses expert 0 first).
    """
    # The k largest of logits with Gumbel noise are samples without replacement.
    logits = -torch.empty(tokens, count, device=device).exponential_().log()
    if skew == "zipf":
        logits -= torch.arange(1, count + 1, device=device).log()
    elif skew == "one":
        logits[:, 0] += 100
    routing_of = routing.route(logits, k)
    return routing_of.index, routing_of.weight


def grouped_gemm(new: Inputs, rows: int, count: int, k: int, n: int) -> Problem:
    """Return the product of rows, sorted by group, with the matrix [k, n] of their group."""
    index, _ = routed(rows, count, 1, "uniform", new.device)
    offsets = routing.sort_by_expert(index, count).offsets
    return Problem(
        shape={"tokens": rows, "experts": count, "width": k, "ffn": n},
        leaves={"a": new.floats(rows, k), "b": new.floats(count, n, k, scale=k**-0.5)},
        ours=lambda w: grouped.grouped_gemm(w["a"], w["b"].transpose(1, 2), offsets),
        plain=lambda w: moe_reference.grouped_gemm(w["a"], w["b"].transpose(1, 2), offsets),
        costs=both(grouped.cost, rows, count, k, n, itemsize=new.dtype.itemsize),
        inputs=SimpleNamespace(offsets=offsets),
    )


def route(new: Inputs, tokens: int, count: int, k: int) -> Problem:
    """Return the choice of k among `count` experts for each token."""
    inputs, cost = SimpleNamespace(), routing.cost(tokens, count, k, itemsize=new.dtype.itemsize)

    def plain(leaves: Leaves) -> Tensor:
        logits = leaves["logits"]
        chosen = moe_reference.choose_experts(logits.to(wide(logits.dtype)), None, k, True)
        # The op returns the order and the end offsets too, so they belong to the time.
        sizes = F.one_hot(chosen.choice.flatten().long(), count).sum(0)
        inputs.order = chosen.choice.flatten().argsort(stable=True), sizes.cumsum(0)
        return chosen.weight

    return Problem(
        shape={"tokens": tokens, "experts": count, "k": k}, leaves={"logits": new.floats(tokens, count)},
        ours=lambda w: routing.route(w["logits"], k).weight, plain=plain,
        costs=(cost, cost), inputs=inputs,
    )  # fmt: skip


TABLE = 16  # side of the position table
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def patch_embed(new: Inputs, regime: str, count: int, width: int, patch: int = 14, pixels_in: bool = True) -> Problem:
    """Return the embedding of uint8 pixels, or of patches that are cut and normalised already."""
    sizes = images_of(regime, count)
    grids, k, itemsize = Grids(sizes, device=new.device), 3 * patch**2, new.dtype.itemsize
    pixels = torch.randint(0, 256, (grids.patches * patch**2, 3), dtype=torch.uint8, device=new.device)

    def cut(dtype: torch.dtype) -> Tensor:
        """Return normalised patches [P, p·p·3]."""
        return patch_reference.cut(pixels, grids, patch, MEAN, STD, dtype)

    patches = cut(new.dtype)

    def ours(leaves: Leaves) -> Tensor:
        if not pixels_in:
            return embedding.embed_patches(patches, grids, **leaves)
        return embedding.patch_embed(pixels, grids, **leaves, patch_size=patch, mean=MEAN, std=STD)[0]

    def plain(leaves: Leaves) -> Tensor:
        inputs = cut(leaves["weight"].dtype) if pixels_in else patches
        return patch_reference.embed_patches(inputs, grids, **leaves)

    bytes_in = 1 if pixels_in else itemsize
    cost = embedding.cost(grids.patches, width, k, table=TABLE**2, itemsize=itemsize, bytes_in=bytes_in)
    return Problem(
        shape={"images": count, "patches": grids.patches, "k": k, "width": width},
        leaves={"weight": new.floats(width, k, scale=k**-0.5), "bias": new.floats(width),
                "pos_embed": new.floats(TABLE, TABLE, width)},
        ours=ours, plain=plain, costs=(cost, cost),
        inputs=SimpleNamespace(sizes=sizes, patch=patch, patches=patches, cut=cut if pixels_in else None),
    )  # fmt: skip


def embed_patches(new: Inputs, *sizes: Any) -> Problem:
    """Return the embedding of patches that are cut and normalised already."""
    return patch_embed(new, *sizes, pixels_in=False)


def qwen_embed(new: Inputs, regime: str, count: int, width: int, patch: int = 14) -> Problem:
    """Return Qwen-VL's embedding: each patch holds two frames, and there are no bias and no positions."""
    grids, k, itemsize = Grids(images_of(regime, count), device=new.device), 3 * 2 * patch**2, new.dtype.itemsize
    cost = embedding.cost(grids.patches, width, k, table=0, itemsize=itemsize, bytes_in=itemsize)
    inputs: dict[str, Any] = {"patches": new.floats(grids.patches, k), "grids": grids}
    return Problem(
        shape={"images": count, "patches": grids.patches, "k": k, "width": width},
        leaves={"weight": new.floats(width, k, scale=k**-0.5)},
        ours=calls(embedding.embed_patches, **inputs), plain=calls(patch_reference.embed_patches, **inputs),
        costs=(cost, cost), inputs=SimpleNamespace(patch=patch, **inputs),
    )  # fmt: skip


def patch_loss(new: Inputs, regime: str, count: int, width: int, patch: int = 14) -> Problem:
    """Return the loss of predictions of every second patch."""
    grids, k, itemsize = Grids(images_of(regime, count), device=new.device), 3 * patch**2, new.dtype.itemsize
    rows = torch.arange(1, grids.patches, 2, device=new.device)
    pixels = torch.randint(0, 256, (grids.patches * patch**2, 3), dtype=torch.uint8, device=new.device)
    inputs: dict[str, Any] = {"pixels": pixels, "rows": rows, "grids": grids, "patch_size": patch, "mean": MEAN,
                              "std": STD}  # fmt: skip
    return Problem(
        shape={"images": count, "patches": grids.patches, "tokens": len(rows), "k": k, "width": width},
        leaves={"x": new.floats(len(rows), width), "weight": new.floats(k, width, scale=width**-0.5),
                "bias": new.floats(k)},
        ours=calls(loss.patch_loss, **inputs), plain=calls(patch_reference.patch_loss, **inputs),
        costs=both(loss.cost, len(rows), width, k, itemsize=itemsize),
    )  # fmt: skip


def packed(
    new: Inputs, regime: str, count: int, width: int, module: torch.nn.Module
) -> tuple[Any, Grids, dict, Leaves]:
    """Return inputs, grids, shape and leaves of packed rows [P, width] and the parameters of a module."""
    sizes = images_of(regime, count)
    grids, module = Grids(sizes, device=new.device), module.to(new.device, new.dtype)
    leaves = {"x": new.floats(grids.patches, width), **dict(module.named_parameters())}
    shape = {"images": count, "patches": grids.patches, "width": width}
    return SimpleNamespace(sizes=sizes, module=module, side=None), grids, shape, leaves


def below(prefix: str, leaves: Leaves) -> Leaves:
    """Return the leaves whose names begin with the prefix, by the rest of their names; x is never among them."""
    return {name.removeprefix(prefix): w for name, w in leaves.items() if name.startswith(prefix) and name != "x"}


def conv_block(new: Inputs, regime: str, count: int, width: int) -> Problem:
    """Return one convolutional block."""
    inputs, grids, shape, leaves = packed(new, regime, count, width, ConvBlock(width, width))
    costs = both(bottleneck.cost, grids.patches, count, width, width, itemsize=new.dtype.itemsize)
    return Problem(
        shape, leaves, lambda w: bottleneck.conv_block(w["x"], grids, below("", w)),
        lambda w: abstractor_reference.conv_block(w["x"], grids, w), costs, 3.0, inputs,
    )  # fmt: skip


def c_abstractor(new: Inputs, regime: str, count: int, width: int) -> Problem:
    """Return three blocks, the pool and three blocks, without the readout, which is two plain products."""
    module, side = CAbstractor(width, 8, hidden=width), 12
    module.readout = torch.nn.Sequential()
    inputs, grids, shape, leaves = packed(new, regime, count, width, module)
    inputs.side = side

    def plain(leaves: Leaves) -> Tensor:
        def net(image: Tensor) -> Tensor:
            for stage in ("0", "2"):
                for name in ("b1", "b2", "b3"):
                    image = abstractor_reference.block(image, below(f"net.{stage}.{name}.", leaves))
                if stage == "0":
                    image = F.adaptive_avg_pool2d(image, side)
            return image

        rows = count * side**2, width
        return abstractor_reference.by_size(leaves["x"], patch_reference.runs(inputs.sizes), rows, net)

    stages = [both(bottleneck.cost, rows, count, width, width, itemsize=new.dtype.itemsize)
              for rows in (grids.patches, count * side**2)]  # fmt: skip
    forward, backward = (Cost(3 * (a.flops + b.flops), 3 * (a.bytes + b.bytes)) for a, b in zip(*stages))
    return Problem(
        shape, leaves, lambda w: torch.func.functional_call(module, below("", w), (w["x"], grids)), plain,
        (forward, backward), 6.0, inputs,
    )  # fmt: skip


def adaptive_pool(new: Inputs, regime: str, count: int, width: int) -> Problem:
    """Return the pool to 12 × 12."""
    inputs, grids, shape, leaves = packed(new, regime, count, width, torch.nn.Identity())
    options: dict[str, Any] = {"grids": grids, "out": (12, 12)}
    cost = pooling.cost(grids.patches, count, width, options["out"], itemsize=new.dtype.itemsize)
    return Problem(shape, leaves, calls(pooling.adaptive_pool, **options),
                   calls(abstractor_reference.adaptive_pool, **options), (cost, cost), inputs=inputs)  # fmt: skip


def attention(new: Inputs, count: int, length: int, heads: int, kv_heads: int, width: int, causal: bool) -> Problem:
    """Return attention in `count` segments of one length, full or causal."""
    mask, rows = Causal() if causal else Full(), count * length
    cu_seqlens = torch.arange(count + 1, device=new.device, dtype=torch.int32) * length
    if heads == kv_heads:
        q, k, v = new.floats(rows, 3, heads, width).unbind(
            1
        )  # views of one tensor, as after one projection for all three
    else:
        q, k, v = (new.floats(rows, n, width) for n in (heads, kv_heads, kv_heads))

    def ours(leaves: Leaves, backend: str = "auto") -> Tensor:
        return varlen.attention(**leaves, cu_seqlens=cu_seqlens, mask=mask, max_length=length, backend=backend)

    def plain(leaves: Leaves) -> Tensor:
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in leaves.values())
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    shape = {"batch": count, "tokens": length, "heads": heads, "kv_heads": kv_heads, "width": width}
    costs = both(varlen.cost, [length] * count, heads, kv_heads, width, mask=mask, itemsize=q.itemsize)
    return Problem(shape | {"causal": int(causal)}, {"q": q, "k": k, "v": v}, ours, plain, costs)


PAGE = 16  # tokens in a page, as in the engine


def paged_attention(
    new: Inputs, batch: int, shortest: int, longest: int, heads: int, kv_heads: int, width: int
) -> Problem:  # fmt: skip
    """Return attention of one new token of each document to keys in scattered pages.

    The first document has `longest` keys, the others have random numbers from `shortest` on.
    """
    draw = random.Random(0)
    lengths = [longest, *(draw.randint(shortest, longest) for _ in range(batch - 1))]
    counts = [cdiv(length, PAGE) for length in lengths]
    order = list(torch.randperm(sum(counts)).split(counts))
    tables = torch.nn.utils.rnn.pad_sequence(order, batch_first=True).to(new.device, torch.int32)
    used = torch.tensor(lengths, device=new.device, dtype=torch.int32)
    cu_seqlens = torch.arange(batch + 1, device=new.device, dtype=torch.int32)
    mask = None
    if shortest < longest:
        mask = (torch.arange(longest, device=new.device) < used[:, None])[:, None, None]

    def gathered(pages: Tensor) -> Tensor:
        """Return the rows of pages in order, [B, longest, G, Dh]."""
        return pages[tables].flatten(1, 2)[:, :longest]

    def attend(leaves: Leaves) -> Tensor:
        """Return torch's attention [B, H, Dh] over keys and values that `gathered` put in order."""
        q, k, v = leaves["q"][:, :, None], leaves["k"].transpose(1, 2), leaves["v"].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

    k, v = (new.floats(sum(counts), PAGE, kv_heads, width) for _ in range(2))
    cost = paged.cost([1] * batch, lengths, heads, kv_heads, width, itemsize=new.dtype.itemsize)
    return Problem(
        shape={"batch": batch, "keys": sum(lengths), "heads": heads, "kv_heads": kv_heads, "width": width},
        leaves={"q": new.floats(batch, heads, width), "k": k, "v": v},
        ours=calls(paged.paged_attention, cu_q=cu_seqlens, tables=tables, lengths=used),
        plain=lambda w: attend({"q": w["q"], "k": gathered(w["k"]), "v": gathered(w["v"])}), costs=(cost, cost),
        inputs=SimpleNamespace(lengths=lengths, used=used, cu_seqlens=cu_seqlens, gathered=gathered, attend=attend),
    )  # fmt: skip


def cross_entropy(new: Inputs, tokens: int, width: int, vocabulary: int) -> Problem:
    """Return the mean cross-entropy of a linear layer's logits."""
    targets = torch.randint(0, vocabulary, (tokens,), device=new.device)

    def plain(leaves: Leaves) -> Tensor:
        logits = F.linear(leaves["x"], leaves["weight"])
        return F.cross_entropy(logits.to(wide(logits.dtype)), targets)

    return Problem(
        shape={"tokens": tokens, "width": width, "vocabulary": vocabulary},
        leaves={"x": new.floats(tokens, width), "weight": new.floats(vocabulary, width, scale=width**-0.5)},
        ours=calls(linear_cross_entropy.linear_cross_entropy, targets=targets), plain=plain,
        costs=both(linear_cross_entropy.cost, tokens, width, vocabulary, itemsize=new.dtype.itemsize),
        inputs=SimpleNamespace(targets=targets),
    )  # fmt: skip


class Op(NamedTuple):
    """Hold an op's problem and the cases to measure."""

    problem: Callable[..., Problem]
    cases: dict[str, dict[str, tuple[Any, ...]]]  # for "cuda" and "cpu": sizes by name, the most informative case first
    backward: bool = True  # whether gradients are measured


def _moe(*cases: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {" ".join((c[0], f"T={c[1]}", *c[2:])): c for c in cases}


def _images(*cases: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {" ".join((f"{c[0]} N={c[1]} width={c[2]}", *(f"patch={p}" for p in c[3:]))): c for c in cases}


OPS = {
    "moe_mlp": Op(moe_mlp, {
        "cuda": _moe(
            ("mm1-3b-moe", 8192), ("qwen3-30b", 8192), ("mm1-3b-moe", 16), ("mixtral-8x7b", 8192), ("olmoe", 8192),
            ("mm1-7b-moe", 8192), ("mm1-3b-moe", 256), ("mm1-3b-moe", 2048), ("mm1-3b-moe", 32768),
            ("phi-3.5-moe", 8192), ("mm1-3b-moe", 8192, "zipf"), ("mm1-3b-moe", 8192, "one"), ("qwen3-30b", 16),
            ("8 experts", 8192), ("32 experts", 8192), ("128 experts", 8192),
        ),
        "cpu": _moe(("coarse", 512), ("fine", 512), ("coarse", 16)),
    }),
    "patch_embed": Op(patch_embed, {
        "cuda": _images(("square", 64, 1280), ("native", 64, 1280), ("budget", 256, 1280), ("square", 16, 1280),
                        ("square", 4, 1280), ("native", 64, 1152, 16), ("budget", 256, 768, 16)),
        "cpu": _images(("budget", 16, 768), ("native", 3, 768)),
    }),
    "c_abstractor": Op(c_abstractor, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024), ("square", 16, 1024)),
        "cpu": _images(("mixed", 4, 256)),
    }),
    "grouped_gemm": Op(grouped_gemm, {
        "cuda": {" ".join(f"{n}={v}" for n, v in zip("TEKN", c)): c for c in (
            (16384, 64, 3072, 16128), (65536, 128, 2048, 1536), (16384, 64, 8064, 3072), (16384, 8, 4096, 14336),
            (512, 64, 3072, 16128))},
        "cpu": {"T=1024 E=8 K=512 N=1792": (1024, 8, 512, 1792)},
    }),
    "attention": Op(attention, {
        "cuda": {"vit-h": (64, 729, 16, 16, 80, False), "decoder": (4, 2048, 32, 8, 128, True),
                 "vit-l": (64, 576, 16, 16, 64, False), "sub-images": (20, 2304, 16, 16, 80, False),
                 "captions": (128, 192, 32, 8, 128, True)},
        "cpu": {"vit-h": (8, 196, 4, 4, 80, False), "decoder": (4, 256, 8, 2, 64, True)},
    }),
    "paged_attention": Op(paged_attention, {
        "cuda": {f"batch={B} keys={keys}": (B, *sizes, 32, 8, 128) for B, keys, sizes in (
            (8, "2048-8192", (2048, 8192)), (64, "2048-8192", (2048, 8192)), (1, 8192, (8192, 8192)),
            (64, 4096, (4096, 4096)), (1, 2048, (2048, 2048)))},
        "cpu": {"batch=8 keys=128-512": (8, 128, 512, 8, 2, 64), "batch=1 keys=512": (1, 512, 512, 8, 2, 64)},
    }, backward=False),
    "embed_patches": Op(embed_patches, {
        "cuda": _images(("native", 64, 1152, 16), ("budget", 256, 1152, 16), ("square", 64, 1280)),
        "cpu": _images(("budget", 16, 768), ("native", 3, 768)),
    }),
    "patch_loss": Op(patch_loss, {
        "cuda": _images(("square", 64, 2048), ("budget", 256, 2048), ("native", 64, 1024)),
        "cpu": _images(("budget", 16, 2048), ("mixed", 8, 192, 4)),
    }),
    "qwen_embed": Op(qwen_embed, {
        "cuda": _images(("native", 64, 1280), ("budget", 256, 1280)),
        "cpu": _images(("budget", 8, 768)),
    }),
    "conv_block": Op(conv_block, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024)),
        "cpu": _images(("square", 4, 256), ("mixed", 4, 256)),
    }),
    "route": Op(route, {
        "cuda": {f"T={T} E={E} K={k}": (T, E, k) for T, E, k in ((8192, 64, 2), (32768, 128, 8), (16, 64, 2))},
        "cpu": {"T=2048 E=64 K=2": (2048, 64, 2)},
    }),
    "adaptive_pool": Op(adaptive_pool, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024)),
        "cpu": _images(("mixed", 16, 512)),
    }),
    "linear_cross_entropy": Op(cross_entropy, {
        "cuda": {f"T={T} D={D} V={V}": (T, D, V) for T, D, V in ((8192, 2048, 100352), (8192, 3072, 32000))},
        "cpu": {"T=512 D=256 V=8192": (512, 256, 8192)},
    }),
}  # fmt: skip
