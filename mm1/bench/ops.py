"""Define the ops that are measured: sizes, random inputs, this project's way, and plain torch's.

A problem is one op at one size. Its leaves, by the names of the op's arguments, are the tensors that get gradients. The
plain way is the family's reference: the truth if its leaves are wider (fp32 for 16 bits, fp64 for fp32), else a peer.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.engine.layers.connector import CAbstractor, ConvBlock
from mm1.kernels import linear_cross_entropy
from mm1.kernels.abstractor import bottleneck as conv
from mm1.kernels.abstractor import pooling as pool
from mm1.kernels.abstractor import reference as conv_reference
from mm1.kernels.attention import Causal, Full, paged, varlen
from mm1.kernels.dispatch import Cost, cdiv, wide
from mm1.kernels.moe import experts, routing
from mm1.kernels.moe import grouped as grouped_gemm
from mm1.kernels.moe import reference as moe_reference
from mm1.kernels.patches import embedding as patch_embed
from mm1.kernels.patches import reference as patch_reference
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.reference import runs

Sizes = list[tuple[int, int]]
Leaves = dict[str, Tensor]


class Problem(Protocol):
    shape: dict[str, int]
    leaves: Leaves
    tolerance: float  # allowed rms error, as a multiple of that of one product in this dtype

    def ours(self, leaves: Leaves) -> Tensor: ...
    def plain(self, leaves: Leaves) -> Tensor: ...
    def cost(self, backward: bool) -> Cost: ...


class Maker:
    """Makes random tensors of one device and dtype."""

    def __init__(self, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(scale)


class Layer(NamedTuple):
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


class MoeMlp:
    tolerance = 1.5

    def __init__(self, new: Maker, layer: str, tokens: int, skew: str = "uniform"):
        self.layer = L = LAYERS[layer]
        self.index, weight = routed(tokens, L.experts, L.k, skew, new.device)
        self.shape = {"tokens": tokens, "width": L.width, "ffn": L.ffn, "experts": L.experts, "k": L.k}
        self.leaves = {
            "x": new(tokens, L.width), "weight": weight,
            "gate_up": new(L.experts, 2 * L.ffn, L.width, scale=L.width**-0.5),
            "down": new(L.experts, L.width, L.ffn, scale=L.ffn**-0.5),
        }  # fmt: skip

    def ours(self, leaves: Leaves) -> Tensor:
        return experts.moe_mlp(leaves["x"], self.index, leaves["weight"], leaves["gate_up"], leaves["down"])

    def plain(self, leaves: Leaves) -> Tensor:
        return moe_reference.moe_mlp(leaves["x"], self.index, leaves["weight"], leaves["gate_up"], leaves["down"])

    def cost(self, backward: bool) -> Cost:
        L, x = self.layer, self.leaves["x"]
        used = len(self.index.unique())
        return experts.cost(len(x), L.k, used, L.width, L.ffn, itemsize=x.itemsize, backward=backward)


def routed(tokens: int, count: int, k: int, skew: str, device: str) -> tuple[Tensor, Tensor]:
    """Return index and weight of a random router.

    skew: "uniform", "zipf" (frequency 1 / rank), or "one" (every token chooses expert 0 first).
    """
    # The k largest of Gumbel noise are samples without replacement.
    logits = -torch.empty(tokens, count, device=device).exponential_().log()
    if skew == "zipf":
        logits -= torch.arange(1, count + 1, device=device).log()
    elif skew == "one":
        logits[:, 0] += 100
    chosen = routing.route(logits, k)
    return chosen.index, chosen.weight


class GroupedGemm:
    tolerance = 1.0

    def __init__(self, new: Maker, rows: int, count: int, k: int, n: int):
        self.count = count
        index, _ = routed(rows, count, 1, "uniform", new.device)
        self.offsets = routing.sort_by_expert(index, count).offsets
        self.shape = {"tokens": rows, "experts": count, "width": k, "ffn": n}
        self.leaves = {"a": new(rows, k), "b": new(count, n, k, scale=k**-0.5)}

    def ours(self, leaves: Leaves) -> Tensor:
        return grouped_gemm.grouped_gemm(leaves["a"], leaves["b"].transpose(1, 2), self.offsets)

    def plain(self, leaves: Leaves) -> Tensor:
        return moe_reference.grouped_gemm(leaves["a"], leaves["b"].transpose(1, 2), self.offsets)

    def cost(self, backward: bool) -> Cost:
        a, (count, n, k) = self.leaves["a"], self.leaves["b"].shape
        return grouped_gemm.cost(len(a), count, k, n, itemsize=a.itemsize, backward=backward)


class Route:
    tolerance = 1.0

    def __init__(self, new: Maker, tokens: int, count: int, k: int):
        self.k, self.shape = k, {"tokens": tokens, "experts": count, "k": k}
        self.leaves = {"logits": new(tokens, count)}

    def ours(self, leaves: Leaves) -> Tensor:
        return routing.route(leaves["logits"], self.k).weight

    def plain(self, leaves: Leaves) -> Tensor:
        logits = leaves["logits"]
        chosen = moe_reference.choose(logits.to(wide(logits.dtype)), None, self.k, True)
        sizes = F.one_hot(chosen.choice.flatten().long(), logits.shape[1]).sum(0)
        self.extra = chosen.choice.flatten().argsort(stable=True), sizes.cumsum(0)  # which the op returns too
        return chosen.weight

    def cost(self, backward: bool) -> Cost:
        logits = self.leaves["logits"]
        return routing.cost(len(logits), logits.shape[1], self.k, itemsize=logits.itemsize)


TABLE = 16  # side of the position table
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# 224 to 1344 pixels a side; padded to the longest image, 41.5 % of their rows are padding.
NATIVE = [(70, 51), (51, 41), (38, 75), (77, 81), (82, 77), (22, 50)]


def images_of(regime: str, count: int) -> Sizes:
    """Return (h, w) of `count` images.

    regime: "square", 378²; "native", 224 to 1344 pixels a side; "tiny", 1 to 7 patches; "mixed", eight sizes; else at
    most 256 patches, as SigLIP2's processor resizes.
    """
    draw = random.Random(0)
    if regime == "square":
        return [(27, 27)] * count
    if regime == "native":
        more = ((draw.randint(16, 96), draw.randint(16, 96)) for _ in range(count - len(NATIVE)))
        return [*NATIVE[:count], *more]
    if regime == "tiny":
        return ([(1, 1), (1, 7), (5, 1)] * count)[:count]
    if regime == "mixed":
        return ([(20, 27), (27, 20), (12, 40), (27, 27), (9, 9), (33, 14), (24, 24), (16, 31)] * count)[:count]
    heights = [round(16 * math.exp(draw.uniform(-0.5, 0.5))) for _ in range(count)]
    return [(h, 256 // h) for h in heights]


class PatchEmbed:
    """Embeds bytes, as patch_embed does, or cut and normalised patches, as other frameworks do."""

    tolerance = 1.0

    def __init__(self, new: Maker, regime: str, count: int, width: int, patch: int = 14, bytes_in: bool = True):
        self.sizes, self.patch, self.from_bytes = images_of(regime, count), patch, bytes_in
        self.grids = Grids(self.sizes, device=new.device)
        k = patch * patch * 3
        self.pixels = torch.randint(0, 256, (self.grids.patches * patch**2, 3), dtype=torch.uint8, device=new.device)
        self.patches = self.cut(new.dtype)
        self.shape = {"images": count, "patches": self.grids.patches, "k": k, "width": width}
        self.leaves = {
            "weight": new(width, k, scale=k**-0.5),
            "bias": new(width),
            "pos_embed": new(TABLE, TABLE, width),
        }

    def cut(self, dtype: torch.dtype) -> Tensor:
        """Return normalised patches [P, p·p·3]."""
        return patch_reference.cut(self.pixels, self.grids, self.patch, MEAN, STD, dtype)

    def ours(self, leaves: Leaves) -> Tensor:
        if not self.from_bytes:
            return patch_embed.embed_patches(self.patches, self.grids, *leaves.values())
        return patch_embed.patch_embed(
            self.pixels, self.grids, *leaves.values(), patch_size=self.patch, mean=MEAN, std=STD
        )[0]

    def plain(self, leaves: Leaves) -> Tensor:
        patches = self.cut(leaves["weight"].dtype) if self.from_bytes else self.patches
        return patch_reference.embed_patches(patches, self.grids, *leaves.values())

    def cost(self, backward: bool) -> Cost:
        weight = self.leaves["weight"]
        return patch_embed.cost(
            self.grids.patches, len(weight), weight.shape[1], table=TABLE**2, itemsize=weight.itemsize,
            bytes_in=1 if self.from_bytes else weight.itemsize,
        )  # fmt: skip


def embed_patches(new: Maker, regime: str, count: int, width: int, patch: int = 14) -> PatchEmbed:
    return PatchEmbed(new, regime, count, width, patch, bytes_in=False)


class QwenEmbed:
    """Embeds as Qwen-VL does: each patch twice, a frame and the next, without bias and positions."""

    tolerance = 1.0

    def __init__(self, new: Maker, regime: str, count: int, width: int, patch: int = 14):
        self.patch = patch
        self.grids = Grids(images_of(regime, count), device=new.device)
        k = 3 * 2 * patch**2
        self.patches = new(self.grids.patches, k)
        self.shape = {"images": count, "patches": self.grids.patches, "k": k, "width": width}
        self.leaves = {"weight": new(width, k, scale=k**-0.5)}

    def ours(self, leaves: Leaves) -> Tensor:
        return patch_embed.embed_patches(self.patches, self.grids, leaves["weight"])

    def plain(self, leaves: Leaves) -> Tensor:
        return patch_reference.embed_patches(self.patches, self.grids, leaves["weight"])

    def cost(self, backward: bool) -> Cost:
        width, k = self.leaves["weight"].shape
        itemsize = self.patches.itemsize
        return patch_embed.cost(len(self.patches), width, k, table=0, itemsize=itemsize, bytes_in=itemsize)


def blocks_of(leaves: Leaves, prefix: str) -> Leaves:
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}


class Packed:
    """Holds rows of packed images, and the parameters of a module if there is one."""

    def __init__(self, new: Maker, regime: str, count: int, channels: int):
        self.sizes = images_of(regime, count)
        self.grids = Grids(self.sizes, device=new.device)
        self.shape = {"images": count, "patches": self.grids.patches, "width": channels}
        self.module = self.made(channels).to(new.device, new.dtype)
        self.leaves = {"x": new(self.grids.patches, channels), **dict(self.module.named_parameters())}

    def made(self, channels: int) -> torch.nn.Module:
        return torch.nn.Identity()


class ConvBlockProblem(Packed):
    tolerance = 3.0

    def made(self, channels: int) -> torch.nn.Module:
        return ConvBlock(channels, channels)

    def ours(self, leaves: Leaves) -> Tensor:
        return conv.conv_block(leaves["x"], self.grids, {name: w for name, w in leaves.items() if name != "x"})

    def plain(self, leaves: Leaves) -> Tensor:
        return conv_reference.conv_block(leaves["x"], self.grids, leaves)

    def cost(self, backward: bool) -> Cost:
        x = self.leaves["x"]
        return conv.cost(len(x), len(self.sizes), x.shape[1], x.shape[1], itemsize=x.itemsize, backward=backward)


class CAbstractorProblem(Packed):
    """Measures three blocks, the pool and three blocks, without the readout, which is two plain products."""

    tolerance = 6.0
    side = 12

    def made(self, channels: int) -> torch.nn.Module:
        module = CAbstractor(channels, 8, hidden=channels)
        module.readout = torch.nn.Sequential()
        return module

    def ours(self, leaves: Leaves) -> Tensor:
        weights = {name: w for name, w in leaves.items() if name != "x"}
        return torch.func.functional_call(self.module, weights, (leaves["x"], self.grids))

    def plain(self, leaves: Leaves) -> Tensor:
        def net(image: Tensor) -> Tensor:
            for stage in ("0", "2"):
                for name in ("b1", "b2", "b3"):
                    image = conv_reference.block(image, blocks_of(leaves, f"net.{stage}.{name}."))
                if stage == "0":
                    image = F.adaptive_avg_pool2d(image, self.side)
            return image

        shape = len(self.sizes) * self.side**2, leaves["x"].shape[1]
        return conv_reference.by_size(leaves["x"], runs(self.sizes), shape, net)

    def cost(self, backward: bool) -> Cost:
        x, count = self.leaves["x"], len(self.sizes)
        flops = moved = 0
        for patches in (len(x), count * self.side**2):
            one = conv.cost(patches, count, x.shape[1], x.shape[1], itemsize=x.itemsize, backward=backward)
            flops, moved = flops + 3 * one.flops, moved + 3 * one.bytes
        return Cost(flops, moved)


class AdaptivePool(Packed):
    tolerance = 1.0
    side = 12

    def ours(self, leaves: Leaves) -> Tensor:
        return pool.adaptive_pool(leaves["x"], self.grids, (self.side, self.side))

    def plain(self, leaves: Leaves) -> Tensor:
        return conv_reference.adaptive_pool(leaves["x"], self.grids, (self.side, self.side))

    def cost(self, backward: bool) -> Cost:
        x = self.leaves["x"]
        return pool.cost(len(x), len(self.sizes), x.shape[1], (self.side, self.side), itemsize=x.itemsize)


class Attention:
    tolerance = 1.0

    def __init__(self, new: Maker, count: int, length: int, heads: int, kv_heads: int, width: int, causal: bool):
        self.count, self.length, self.causal = count, length, causal
        self.mask = Causal() if causal else Full()
        rows = count * length
        self.cu_seqlens = torch.arange(count + 1, device=new.device, dtype=torch.int32) * length
        self.shape = {"batch": count, "tokens": length, "heads": heads, "kv_heads": kv_heads, "width": width,
                      "causal": int(causal)}  # fmt: skip
        if heads == kv_heads:
            q, k, v = new(rows, 3, heads, width).unbind(1)  # as one projection gives them
        else:
            q, k, v = (new(rows, n, width) for n in (heads, kv_heads, kv_heads))
        self.leaves = {"q": q, "k": k, "v": v}

    def ours(self, leaves: Leaves, backend: str = "auto") -> Tensor:
        q, k, v = leaves.values()
        return varlen.attention(q, k, v, self.cu_seqlens, mask=self.mask, max_length=self.length, backend=backend)

    def plain(self, leaves: Leaves) -> Tensor:
        q, k, v = (x.view(self.count, self.length, *x.shape[1:]).transpose(1, 2) for x in leaves.values())
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    def cost(self, backward: bool) -> Cost:
        q, k, _ = self.leaves.values()
        lengths = [self.length] * self.count
        return varlen.cost(
            lengths, q.shape[1], k.shape[1], q.shape[2], mask=self.mask, itemsize=q.itemsize, backward=backward
        )


PAGE = 16  # tokens, the engine's


class PagedAttention:
    """One new token of each document behind keys in scattered pages; the first document has `most`, others a random
    number from `least` on."""

    tolerance = 1.0

    def __init__(self, new: Maker, batch: int, least: int, most: int, heads: int, kv_heads: int, width: int):
        draw = random.Random(0)
        self.lengths = [most, *(draw.randint(least, most) for _ in range(batch - 1))]
        counts = [cdiv(length, PAGE) for length in self.lengths]
        order = list(torch.randperm(sum(counts)).split(counts))
        tables = torch.nn.utils.rnn.pad_sequence(order, batch_first=True)
        self.tables = tables.to(new.device, torch.int32)
        self.used = torch.tensor(self.lengths, device=new.device, dtype=torch.int32)
        self.cu_seqlens = torch.arange(batch + 1, device=new.device, dtype=torch.int32)
        self.mask = None
        if least < most:
            self.mask = (torch.arange(most, device=new.device) < self.used[:, None])[:, None, None]
        k, v = (new(sum(counts), PAGE, kv_heads, width) for _ in range(2))
        self.leaves = {"q": new(batch, heads, width), "k": k, "v": v}
        self.shape = {"batch": batch, "keys": sum(self.lengths), "heads": heads, "kv_heads": kv_heads, "width": width}

    def ours(self, leaves: Leaves) -> Tensor:
        q, k, v = leaves.values()
        return paged.paged_attention(q, k, v, self.cu_seqlens, self.tables, self.used)

    def gathered(self, pages: Tensor) -> Tensor:
        """Return the rows of pages in order, [B, longest, G, Dh]."""
        return pages[self.tables].flatten(1, 2)[:, : self.lengths[0]]

    def attend(self, leaves: Leaves) -> Tensor:
        """Return torch's attention [B, H, Dh] over keys and values that `gathered` put in order."""
        q, k, v = leaves["q"][:, :, None], leaves["k"].transpose(1, 2), leaves["v"].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)[:, :, 0]

    def plain(self, leaves: Leaves) -> Tensor:
        return self.attend({"q": leaves["q"], "k": self.gathered(leaves["k"]), "v": self.gathered(leaves["v"])})

    def cost(self, backward: bool) -> Cost:
        q, k, _ = self.leaves.values()
        return paged.cost([1] * len(q), self.lengths, q.shape[1], k.shape[2], q.shape[2], itemsize=q.itemsize)


class LinearCrossEntropy:
    tolerance = 1.0

    def __init__(self, new: Maker, tokens: int, width: int, vocabulary: int):
        self.targets = torch.randint(0, vocabulary, (tokens,), device=new.device)
        self.shape = {"tokens": tokens, "width": width, "vocabulary": vocabulary}
        self.leaves = {"x": new(tokens, width), "weight": new(vocabulary, width, scale=width**-0.5)}

    def ours(self, leaves: Leaves) -> Tensor:
        return linear_cross_entropy.linear_cross_entropy(leaves["x"], leaves["weight"], self.targets)

    def plain(self, leaves: Leaves) -> Tensor:
        logits = F.linear(*leaves.values())
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), self.targets)

    def cost(self, backward: bool) -> Cost:
        weight = self.leaves["weight"]
        return linear_cross_entropy.cost(
            len(self.targets), weight.shape[1], len(weight), itemsize=weight.itemsize, backward=backward
        )


class Op(NamedTuple):
    problem: Callable[..., Any]
    cases: dict[str, dict[str, tuple[Any, ...]]]  # "cuda" and "cpu": by name, the most telling first
    backward: bool = True


def _named(*parts: Any) -> str:
    return " ".join(map(str, parts))


def _moe(*cases: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {_named(c[0], f"T={c[1]}", *c[2:]): c for c in cases}


def _images(*cases: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {_named(f"{c[0]} N={c[1]}", f"width={c[2]}", *(f"patch={p}" for p in c[3:])): c for c in cases}


OPS = {
    "moe_mlp": Op(MoeMlp, {
        "cuda": _moe(
            ("mm1-3b-moe", 8192), ("qwen3-30b", 8192), ("mm1-3b-moe", 16), ("mixtral-8x7b", 8192), ("olmoe", 8192),
            ("mm1-7b-moe", 8192), ("mm1-3b-moe", 256), ("mm1-3b-moe", 2048), ("mm1-3b-moe", 32768),
            ("phi-3.5-moe", 8192), ("mm1-3b-moe", 8192, "zipf"), ("mm1-3b-moe", 8192, "one"), ("qwen3-30b", 16),
            ("8 experts", 8192), ("32 experts", 8192), ("128 experts", 8192),
        ),
        "cpu": _moe(("coarse", 512), ("fine", 512), ("coarse", 16)),
    }),
    "patch_embed": Op(PatchEmbed, {
        "cuda": _images(("square", 64, 1280), ("native", 64, 1280), ("budget", 256, 1280), ("square", 16, 1280),
                        ("square", 4, 1280), ("native", 64, 1152, 16), ("budget", 256, 768, 16)),
        "cpu": _images(("budget", 16, 768), ("native", 3, 768)),
    }),
    "c_abstractor": Op(CAbstractorProblem, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024), ("square", 16, 1024)),
        "cpu": _images(("mixed", 4, 256)),
    }),
    "grouped_gemm": Op(GroupedGemm, {
        "cuda": {_named(*(f"{n}={v}" for n, v in zip("TEKN", c))): c for c in (
            (16384, 64, 3072, 16128), (65536, 128, 2048, 1536), (16384, 64, 8064, 3072), (16384, 8, 4096, 14336),
            (512, 64, 3072, 16128))},
        "cpu": {"T=1024 E=8 K=512 N=1792": (1024, 8, 512, 1792)},
    }),
    "attention": Op(Attention, {
        "cuda": {"vit-h": (64, 729, 16, 16, 80, False), "decoder": (4, 2048, 32, 8, 128, True),
                 "vit-l": (64, 576, 16, 16, 64, False), "sub-images": (20, 2304, 16, 16, 80, False),
                 "captions": (128, 192, 32, 8, 128, True)},
        "cpu": {"vit-h": (8, 196, 4, 4, 80, False), "decoder": (4, 256, 8, 2, 64, True)},
    }),
    "paged_attention": Op(PagedAttention, {
        "cuda": {f"batch={B} keys={keys}": (B, *sizes, 32, 8, 128) for B, keys, sizes in (
            (8, "2048-8192", (2048, 8192)), (64, "2048-8192", (2048, 8192)), (1, 8192, (8192, 8192)),
            (64, 4096, (4096, 4096)), (1, 2048, (2048, 2048)))},
        "cpu": {"batch=8 keys=128-512": (8, 128, 512, 8, 2, 64), "batch=1 keys=512": (1, 512, 512, 8, 2, 64)},
    }, backward=False),
    "embed_patches": Op(embed_patches, {
        "cuda": _images(("native", 64, 1152, 16), ("budget", 256, 1152, 16), ("square", 64, 1280)),
        "cpu": _images(("budget", 16, 768), ("native", 3, 768)),
    }),
    "qwen_embed": Op(QwenEmbed, {
        "cuda": _images(("native", 64, 1280), ("budget", 256, 1280)),
        "cpu": _images(("budget", 8, 768)),
    }),
    "conv_block": Op(ConvBlockProblem, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024)),
        "cpu": _images(("square", 4, 256), ("mixed", 4, 256)),
    }),
    "route": Op(Route, {
        "cuda": {f"T={T} E={E} K={k}": (T, E, k) for T, E, k in ((8192, 64, 2), (32768, 128, 8), (16, 64, 2))},
        "cpu": {"T=2048 E=64 K=2": (2048, 64, 2)},
    }),
    "adaptive_pool": Op(AdaptivePool, {
        "cuda": _images(("square", 64, 1024), ("mixed", 64, 1024)),
        "cpu": _images(("mixed", 16, 512)),
    }),
    "linear_cross_entropy": Op(LinearCrossEntropy, {
        "cuda": {f"T={T} D={D} V={V}": (T, D, V) for T, D, V in ((8192, 2048, 100352), (8192, 3072, 32000))},
        "cpu": {"T=512 D=256 V=8192": (512, 256, 8192)},
    }),
}  # fmt: skip
