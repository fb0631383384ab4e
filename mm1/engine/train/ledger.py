"""Count the floating-point operations of a training step from its sizes: useful ones, padding and recomputation.

The ledger counts products alone (matrices, convolutions, attention), two operations a multiplication; it leaves out
norms, activations, softmax, pooling, interpolation, sorting and the optimizer.

useful       operations that the documents, images and targets themselves need, once. Backward takes twice forward, but
             once for the patch embedding, as pixels have no gradient. A causal document of n tokens has n(n + 1)/2
             pairs, an image of p patches and a class token (p + 1)². The head counts rows with a target.
padding      operations on rows of the budgets that no token, patch or image fills, on rows of a head without a target,
             and on pairs that a dense attention computes to mask them.
recompute    forward operations that run again: attention's scores in backward, which makes 2.5 times forward of it (Dao
             et al. 2022), and every block of which only the input is kept.

MFU = useful / (seconds · peak), HFU = all three / (seconds · peak), as Chowdhery et al. 2022 (PaLM), appendix B, define
them; but their 6N + 12LHQT a token counts all n² pairs of causal attention, masked ones as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mm1.engine.data.batch import Batch
from mm1.engine.layers.config import is_moe
from mm1.engine.models.mm1_config import Model
from mm1.kernels import linear_cross_entropy
from mm1.kernels.abstractor import bottleneck as conv_block
from mm1.kernels.attention import Full, varlen
from mm1.kernels.moe import experts
from mm1.kernels.patches import embedding as patch_embed

IN_BLOCKS = ("vision linear", "vision attention", "decoder linear", "decoder attention", "router", "experts")


@dataclass(frozen=True)
class Load:
    """Sizes of a step: lengths of documents, grids (h, w) of images in patches, rows with a target; and the budgets.

    tokens, images, patches: rows that are computed, filled or not. pairs, patch_pairs: query-key pairs that attention
    computes in one layer of the decoder and of the encoder; routed, heads: rows that reach experts and the head. None
    stands for the numbers that the documents, images and targets themselves need.
    """

    documents: Sequence[int]
    grids: Sequence[tuple[int, int]]
    targets: int
    tokens: int
    images: int
    patches: int
    pairs: int | None = None
    patch_pairs: int | None = None
    routed: int | None = None
    heads: int | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Load":
        """Return the sizes of a packed batch; this waits for its device."""
        documents = [n for n in batch.cu_seqlens.diff().tolist() if n]
        return cls(
            documents, batch.media.grids.sizes or (), batch.target_count, len(batch.tokens), batch.media.grids.images,
            batch.media.grids.patches,
        )  # fmt: skip


@dataclass(frozen=True)
class Ledger:
    """Operations of one step by part. forward and backward are useful; padding and recompute cover both passes."""

    forward: dict[str, int]
    backward: dict[str, int]
    padding: dict[str, int]
    recompute: dict[str, int]

    @cached_property
    def useful(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())

    @cached_property
    def executed(self) -> int:
        return self.useful + sum(self.padding.values()) + sum(self.recompute.values())

    def mfu(self, seconds: float, peak: float) -> float:
        """Return the share of `peak` (operations/s) that useful operations reached."""
        return self.useful / (seconds * peak)

    def hfu(self, seconds: float, peak: float) -> float:
        """Return the share of `peak` (operations/s) that all executed operations reached."""
        return self.executed / (seconds * peak)

    def totals(self) -> dict[str, int]:
        """Return the useful operations of forward and backward by part, and the three totals."""
        parts = {part: self.forward[part] + self.backward[part] for part in self.forward}
        padding, recompute = sum(self.padding.values()), sum(self.recompute.values())
        return {**parts, "useful": self.useful, "padding": padding, "recompute": recompute}


class _Rows(NamedTuple):
    patches: int
    visual: int  # rows of the encoder: patches and class tokens
    visual_pairs: int
    keys: int  # patches that a pooling attention looks at
    images: int
    tokens: int
    pairs: int
    routed: int
    targets: int


def ledger(c: Model, load: Load | Batch, *, recompute: str = "none") -> Ledger:
    """Return the operations of a training step on `load`.

    recompute: as train.recompute; of its values only "blocks" runs matrix products again.
    """
    load = Load.of(load) if isinstance(load, Batch) else load
    kept, patches = int(c.vision.class_token), [h * w for h, w in load.grids]
    used = sum(load.documents)
    own = _Rows(
        patches=sum(patches),
        visual=sum(patches) + kept * len(patches),
        visual_pairs=sum((n + kept) ** 2 for n in patches),
        keys=sum(patches),
        images=len(patches),
        tokens=used,
        pairs=sum(n * (n + 1) // 2 for n in load.documents),
        routed=used,
        targets=load.targets,
    )
    absent = load.images - len(patches)  # their class tokens see themselves
    computed = _Rows(
        patches=load.patches,
        visual=load.patches + kept * load.images,
        visual_pairs=own.visual_pairs + kept * absent if load.patch_pairs is None else load.patch_pairs,
        keys=own.keys,
        images=load.images,
        tokens=load.tokens,
        pairs=own.pairs if load.pairs is None else load.pairs,
        routed=used if load.routed is None else load.routed,
        targets=load.targets if load.heads is None else load.heads,
    )
    forward, whole = _forward(c, own), _forward(c, computed)
    backward = {part: _backward(part) * n for part, n in forward.items()}
    padding = {part: (1 + _backward(part)) * (whole[part] - n) for part, n in forward.items()}
    again = {part: n // 2 for part, n in whole.items() if part.endswith("attention")}
    if recompute == "blocks":
        again |= {part: whole[part] + again.get(part, 0) for part in IN_BLOCKS}
    return Ledger(forward, backward, padding, again)


def _backward(part: str) -> int:
    return 1 if part == "patch embedding" else 2


def _forward(c: Model, n: _Rows) -> dict[str, int]:
    v, d = c.vision, c.decoder
    mixtures = sum(is_moe(d, layer) for layer in range(d.layers))
    projections = 2 * d.width * (d.heads + d.kv_heads) * d.head_width
    mlp = 3 * d.width * d.ffn
    routed = experts.cost(n.routed, d.experts_per_token, d.experts, d.width, d.ffn).flops
    return {
        "patch embedding": patch_embed.cost(n.patches, v.width, 3 * v.patch**2).flops,
        "vision linear": v.layers * 2 * n.visual * (4 * v.width**2 + 2 * v.width * v.ffn),
        "vision attention": v.layers * n.visual_pairs * _pair(v.heads, v.width // v.heads),
        "connector": _connector(c, n),
        "decoder linear": 2 * n.tokens * (d.layers * projections + (d.layers - mixtures) * mlp),
        "decoder attention": d.layers * n.pairs * _pair(d.heads, d.head_width),
        "router": mixtures * 2 * n.tokens * d.width * d.experts,
        "experts": mixtures * routed,
        "head": linear_cross_entropy.cost(n.targets, d.width, d.vocabulary).flops,
    }


def _pair(heads: int, width: int) -> int:
    """Return the operations of one query with one key."""
    return varlen.cost([1], heads, heads, width, mask=Full()).flops


def _connector(c: Model, n: _Rows) -> int:
    k, width, out = c.connector, c.vision.width, c.decoder.width
    rows = n.images * k.tokens
    if k.kind == "attention":
        queries = 2 * k.tokens * out**2 * min(n.images, 1)  # the same for all images
        keys = 4 * n.patches * width * out
        return queries + keys + n.keys * k.tokens * _pair(1, out) + 2 * rows * 9 * out**2
    blocks = 0
    if k.kind == "c-abstractor" and k.depth:
        widths = [width] + [k.hidden] * (k.depth - 1)
        before = (conv_block.cost(n.patches, n.images, w, k.hidden).flops for w in widths)
        blocks = sum(before) + k.depth * conv_block.cost(rows, n.images, k.hidden, k.hidden).flops
        width = k.hidden
    return blocks + 2 * rows * (width * out + (k.readout_depth - 1) * out**2)
