"""Define the settings of the layers that models are made of."""

import math
from dataclasses import dataclass
from typing import Annotated

from mm1.engine.settings import (
    Count,
    CountOrZero,
    MayChange,
    OneOf,
    Positive,
    PositiveOrZero,
    Range,
    check,
)
from mm1.errors import require

POOL_HEADS = 8  # attention heads of the attention connector


@dataclass(frozen=True)
class Vision:
    """Configure a ViT encoder on packed patches of images of any grid."""

    width: Count
    """Width of the residual stream, a multiple of vision.heads."""
    layers: Count
    """Transformer blocks."""
    heads: Count
    """Attention heads of a block."""
    ffn: Count
    """Hidden width of a block's MLP."""
    patch: Count = 14
    """Side of a square patch in pixels; 14 is that of ViT-L/14 and ViT-H/14."""
    table: tuple[Count, Count] = (24, 24)
    """Rows and columns of the learned position table, which is resampled to every other grid; 24 × 24 is CLIP's at 336
    pixels."""
    activation: Annotated[str, OneOf("quick_gelu", "gelu")] = "quick_gelu"
    """Activation of the MLP; "quick_gelu" (x · sigmoid(1.702 x)) is OpenAI CLIP's."""
    class_token: bool = True
    """Prepend a learned class token, as CLIP does; it takes part in attention, but is not part of the output."""
    pre_norm: bool = True
    """Apply a LayerNorm between the patch embedding and the first block, as CLIP does."""
    patch_norm: bool = False
    """Add a bias and apply a LayerNorm to the patches before the positions, as AIM does."""
    final_norm: bool = False
    """Apply a LayerNorm after the last block, as AIM does before its pixel head; CLIP's features have none."""
    positions: Annotated[str, OneOf("table", "sincos")] = "table"
    """Position embedding: "table" is learned; "sincos" is AIM's fixed formula of row and column, which needs no table
    and a vision.width that is a multiple of 4."""
    bias: bool = True
    """Give the linear layers of the blocks biases; CLIP has them, AIM does not."""
    interpolation: Annotated[str, OneOf("bilinear", "bicubic", "nearest")] = "bicubic"
    """Interpolation by which the position table is resampled to another grid."""
    eps: Positive = 1e-5
    """Number added to the variance in LayerNorm; 1e-5 is CLIP's."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the red, green and blue pixel values, between 0 and 1, subtracted from the input; OpenAI CLIP's."""
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the red, green and blue pixel values, by which the input is divided; OpenAI CLIP's."""

    def __post_init__(self):
        check(self, "model.vision")
        require(self.width % self.heads == 0, "setting model.vision.heads", self.heads,
                f"a divisor of the width {self.width}")  # fmt: skip
        require(self.positions == "table" or self.width % 4 == 0, "setting model.vision.width", self.width,
                "a multiple of 4 if positions is sincos")  # fmt: skip


@dataclass(frozen=True)
class PixelHead:
    """Configure the head that predicts the pixels of the next patch from the encoder's rows."""

    width: Count = 2048
    """Width of the head's residual stream, a multiple of 4; AIM's is 2048."""
    blocks: CountOrZero = 12
    """MLP blocks of the head; AIM has 12."""
    ffn: Count = 8192
    """Hidden width of a block's MLP; AIM's is 4 times the width."""

    def __post_init__(self):
        check(self, "model.head")
        require(self.width % 4 == 0, "setting model.head.width", self.width, "a multiple of 4")


@dataclass(frozen=True)
class Connector:
    """Configure the connector, which maps the patches of an image, of any grid, to a fixed number of decoder tokens."""

    kind: Annotated[str, OneOf("c-abstractor", "attention", "average")] = "c-abstractor"
    """Layer type: Honeybee's C-Abstractor (convolutions around an average pool), attention pooling, or average
    pooling; MM1's choice is the C-Abstractor."""
    tokens: Count = 144
    """Tokens of an image, or of a part of it; a square number unless kind is "attention". MM1's choice is 144."""
    hidden: Count = 1024
    """Width of the C-Abstractor's convolutions; Honeybee's is 1024."""
    depth: CountOrZero = 3
    """Convolution blocks before the C-Abstractor's pool, and again after it; Honeybee has 3."""
    readout_depth: Count = 2
    """Linear layers of the MLP that maps the pooled tokens to the decoder's width; Honeybee has 2."""
    position_grid: tuple[Count, Count] | None = (24, 24)
    """Rows and columns of the C-Abstractor's learned position table, which is resampled to other grids; none: no
    positions."""
    output_norm: bool = True
    """Apply an RMSNorm to the connector's output. Honeybee has none, but without it the loss of a new model stays on a
    plateau for long."""

    def __post_init__(self):
        check(self, "model.connector")
        square = math.isqrt(self.tokens) ** 2 == self.tokens
        require(square or self.kind == "attention", "setting model.connector.tokens", self.tokens, "a square number")


@dataclass(frozen=True)
class Decoder:
    """Configure a Llama-type decoder; every `moe_every`-th layer may be a mixture of experts (MoE)."""

    vocabulary: Count
    """Rows of the token embedding, at least the tokenizer's tokens; `mm1 tokenizer` prints the recommended number."""
    width: Count
    """Width of the residual stream."""
    layers: Count
    """Transformer blocks."""
    heads: Count
    """Query heads of a block."""
    kv_heads: Count
    """Key and value heads of a block, a divisor of decoder.heads; fewer than heads is grouped-query attention."""
    ffn: Count
    """Hidden width of a block's gated MLP, or of each expert."""
    head_width: Count = 128
    """Width of a head, an even number; GPU attention kernels are fastest at 128."""
    rope_theta: Positive = 500_000.0
    """Base of the rotary position embedding; 500,000 is that of Apple's AFM on-device model."""
    eps: Positive = 1e-5
    """Number added to the mean square in RMSNorm."""
    tied: bool = True
    """Use the token embedding as the output layer's weight too."""
    qk_norm: bool = True
    """Normalise queries and keys per head with an RMSNorm before the rotation, which keeps attention logits small."""
    experts: Annotated[int, Range(minimum=0, maximum=512)] = 0
    """Experts of a MoE layer; 0: all layers are dense. 512 is the routing kernels' limit."""
    experts_per_token: Annotated[int, Range(minimum=0, maximum=16)] = 2
    """Experts that each token is routed to, at least 1 where there are experts; MM1 routes to 2."""
    moe_every: Count = 2
    """Interval n of MoE layers: layers n, 2n, 3n, …, counted from 1, are MoE layers."""
    moe_backend: Annotated[str, OneOf("mm1", "torch", "megablocks"), MayChange()] = "mm1"
    """Implementation of the experts in training: this project's kernels; "torch" (its grouped_mm) and "megablocks"
    (CUDA, bf16) are for comparison. Generation uses this project's kernels."""
    load_balance: Annotated[PositiveOrZero, MayChange()] = 0.01
    """Weight of the load-balancing loss of MoE layers; MM1's is 0.01."""
    z_loss: Annotated[PositiveOrZero, MayChange()] = 0.001
    """Weight of the router's z-loss, which keeps its logits small; MM1's is 0.001."""

    def __post_init__(self):
        check(self, "model.decoder")
        require(self.heads % self.kv_heads == 0, "setting model.decoder.kv_heads", self.kv_heads,
                f"a divisor of the {self.heads} heads")  # fmt: skip
        require(self.head_width % 2 == 0, "setting model.decoder.head_width", self.head_width, "an even number")
        if self.experts:
            require(1 <= self.experts_per_token <= self.experts, "setting model.decoder.experts_per_token",
                    self.experts_per_token, f"at most the {self.experts} experts, at least 1")  # fmt: skip
            require(self.moe_every <= self.layers, "setting model.decoder.moe_every", self.moe_every,
                    f"at most the {self.layers} layers")  # fmt: skip


def is_moe(decoder: Decoder, layer: int) -> bool:
    """Return whether a layer, counted from 0, is a mixture of experts."""
    return decoder.experts > 0 and (layer + 1) % decoder.moe_every == 0
