"""Define the ways to take a training step that are compared: from plain torch to everything on, one change a rung."""

from typing import NamedTuple

from mm1.engine.layers import float8
from mm1.engine.models.mm1_config import MM1Config


class Rung(NamedTuple):
    """Describe a way to take a step."""

    name: str
    change: str  # from the rung before
    plain: frozenset[str] = frozenset()  # keys of CHANGES for which plain torch is used
    compiled: bool = False
    recompute: str = "none"
    float8: bool = False
    baseline: bool = False  # another way to train the model, outside the ladder
    peer: str = ""  # attention implementation of transformers' model, which then takes the step instead of mm1's

    @property
    def packed(self) -> bool:
        """Return whether documents are packed end to end."""
        return "documents" not in self.plain


CHANGES = {
    "documents": Rung("packing", "documents end to end, not padded to the longest; a dense mask keeps them apart"),
    "attention": Rung("attention", "inside each document and image, without padding or mask"),
    "vision": Rung("vision kernels", "patch embedding and C-Abstractor of images of any size at once"),
    "experts": Rung("experts", "instead of torch's grouped_mm"),
    "casts": Rung("bf16 weights", "matrices of blocks cast once a step, not in each pass"),
    "optimizer": Rung("fused AdamW", "one pass over weights, gradients and state"),
}
FULL = Rung("torch.compile", "each kind of block compiled", compiled=True)


def peers(device: str) -> list[Rung]:
    """Return transformers' ways to take the same step, each eager and compiled. A GPU has two more attentions."""
    padded = frozenset(CHANGES)
    packed = padded - {"documents"}
    ways = [
        ("packed", "its modules and timm's; documents in one row, a mask keeps them apart; eager", packed, "sdpa"),
        ("padded", "the same, documents padded to the longest, which needs no mask; eager", padded, "sdpa"),
        ("flash", "packed, flash-attn inside each document; eager", packed, "flash_attention_2"),
        ("flex", "packed, flex_attention with a mask of blocks; eager", packed, "flex_attention"),
    ]
    rungs = [
        Rung(f"transformers {name}", about, plain, baseline=True, peer=attention)
        for name, about, plain, attention in ways
        if device == "cuda" or attention == "sdpa"
    ]
    compiled = {"compiled": True, "change": "the same by torch.compile"}
    return [way for rung in rungs for way in (rung, rung._replace(name=f"{rung.name} compiled", **compiled))]


def ladder(c: MM1Config, dtype: str = "fp32") -> list[Rung]:
    """Return the rungs from plain to FULL, then float8, two recomputations, and plain with torch.compile alone."""
    has = {"experts": c.decoder.experts > 0, "casts": dtype == "bf16"}
    parts = [part for part in CHANGES if has.get(part, True)]
    every = frozenset(parts)
    rungs = [Rung("plain", "documents padded to the longest, torch's attention, all eager", every)]
    rungs += [CHANGES[part]._replace(plain=frozenset(parts[i + 1 :])) for i, part in enumerate(parts)]
    wide = dtype == "bf16" and c.decoder.width >= float8.WIDE
    return [
        *rungs, FULL,
        *[FULL._replace(name="float8", change="the decoder's wide linears by torchao, tensorwise", float8=True)] * wide,
        FULL._replace(name="recompute selective", change="all but products again in backward", recompute="selective"),
        FULL._replace(name="recompute blocks", change="blocks again in backward, for least memory", recompute="blocks"),
        Rung("torch.compile only", "plain, with its blocks compiled", every, compiled=True, baseline=True),
    ]  # fmt: skip
