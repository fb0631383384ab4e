"""Sizes of the layers that models are made of, as frozen dataclasses."""

import math
from dataclasses import dataclass
from typing import Annotated

from mm1.engine.settings import Count, CountOrZero, OneOf, Positive, PositiveOrZero, Range, check, expect

POOL_HEADS = 8  # of the attention connector


@dataclass(frozen=True)
class Vision:
    """A ViT encoder on packed patches of images of any grid."""

    width: Count
    layers: Count
    heads: Count
    ffn: Count
    patch: Count = 14
    table: tuple[Count, Count] = (24, 24)  # grid of the learned positions, resampled to every other grid
    activation: Annotated[str, OneOf("quick_gelu", "gelu")] = "quick_gelu"
    class_token: bool = True  # CLIP's: attends and is attended to, but is not passed on
    pre_norm: bool = True  # CLIP's LayerNorm between embedding and blocks
    patch_norm: bool = False  # AIM's bias and LayerNorm of patches, before the positions
    # "sincos": AIM's, a formula of row and column at any grid, of which nothing is learned and `table` says nothing.
    positions: Annotated[str, OneOf("table", "sincos")] = "table"
    bias: bool = True  # of the blocks' linears
    interpolation: Annotated[str, OneOf("bilinear", "bicubic", "nearest")] = "bicubic"
    eps: Positive = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as DFN5B's
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check(self, "model.vision")
        expect(self.width % self.heads == 0, "model.vision.heads", self.heads, f"a divisor of the width {self.width}")
        whole = self.positions == "table" or self.width % 4 == 0
        expect(whole, "model.vision.width", self.width, "a multiple of 4 where positions is sincos")


@dataclass(frozen=True)
class Connector:
    """Makes `tokens` tokens of an image, whatever its grid."""

    kind: Annotated[str, OneOf("c-abstractor", "attention", "average")] = "c-abstractor"
    tokens: Count = 144
    hidden: Count = 1024
    depth: CountOrZero = 3  # blocks before the pool, and again after it
    readout_depth: Count = 2
    position_grid: tuple[Count, Count] | None = (24, 24)
    output_norm: bool = True  # not Honeybee's; without it the loss of a fresh model stays on a plateau for long

    def __post_init__(self):
        check(self, "model.connector")
        square = math.isqrt(self.tokens) ** 2 == self.tokens
        expect(square or self.kind == "attention", "model.connector.tokens", self.tokens, "a square number")


@dataclass(frozen=True)
class Decoder:
    """A Llama-type decoder, every `moe_every`-th layer of which may be a mixture of experts."""

    vocabulary: Count
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    ffn: Count
    head_width: Count = 128
    rope_theta: Positive = 500_000.0
    eps: Positive = 1e-5
    tied: bool = True
    qk_norm: bool = True
    experts: Annotated[int, Range(least=0, most=512)] = 0  # as many as the routing kernels take
    experts_per_token: Annotated[int, Range(least=0, most=16)] = 2
    moe_every: Count = 2  # layers moe_every - 1, 2·moe_every - 1, … are mixtures
    # "torch" (its grouped_mm) and "megablocks" (CUDA, bf16) are there for comparison.
    moe_backend: Annotated[str, OneOf("mm1", "torch", "megablocks")] = "mm1"
    load_balance: PositiveOrZero = 0.01
    z_loss: PositiveOrZero = 0.001

    def __post_init__(self):
        check(self, "model.decoder")
        heads = f"a divisor of the {self.heads} heads"
        expect(self.heads % self.kv_heads == 0, "model.decoder.kv_heads", self.kv_heads, heads)
        expect(self.head_width % 2 == 0, "model.decoder.head_width", self.head_width, "an even number")
        if self.experts:
            experts, layers = f"at most the {self.experts} experts, at least 1", f"at most the {self.layers} layers"
            enough = 1 <= self.experts_per_token <= self.experts
            expect(enough, "model.decoder.experts_per_token", self.experts_per_token, experts)
            expect(self.moe_every <= self.layers, "model.decoder.moe_every", self.moe_every, layers)


def is_moe(decoder: Decoder, layer: int) -> bool:
    return decoder.experts > 0 and (layer + 1) % decoder.moe_every == 0
