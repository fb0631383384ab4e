"""Define the settings of MM1 and its named sizes.

The MM1 paper (arXiv 2403.09611) publishes the encoder's kind, the connector's kind and token count, the number and
placement of experts and the parameter totals, but not widths and depths. Comments give the source of inferred numbers.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

from mm1.engine.layers.config import POOL_HEADS, Connector, Decoder, Vision
from mm1.engine.models.image_input import ImageInput
from mm1.engine.settings import Count, MayChange, OneOf, check
from mm1.errors import require


@dataclass(frozen=True)
class MM1Config:
    """Configure vision encoder, connector and decoder, and the resizing of images."""

    vision: Vision
    connector: Connector
    decoder: Decoder
    image_mode: Annotated[str, OneOf("squash", "native"), MayChange()] = "squash"
    """Resizing of images: "squash" to image_size², as MM1 does, or "native": own aspect ratio within image_patches."""
    image_size: Annotated[Count, MayChange()] = 378
    """Side in pixels that images are squashed to, a multiple of vision.patch; MM1's pre-training has 378."""
    image_patches: Annotated[Count, MayChange()] = 729
    """Largest number of patches of an image if image_mode is "native"; 729 is 27 × 27, an image of 378 pixels."""
    image_parts: Annotated[Count, MayChange()] = 1
    """k: an image is seen whole and as k × k parts, each squashed to image_size²; 1: whole only. MM1's fine-tuning has
    2. Values above 1 need image_mode "squash"."""
    context: Annotated[Count | None, MayChange()] = None
    """Tokens of the longest document in training, prompt and answer together, which limits generation. A run writes its
    data.tokens here, or the context of train.init if it is longer; none: unknown."""
    kind: Annotated[str, OneOf("mm1")] = "mm1"
    """Kind of the model, a key of REGISTRY in mm1/engine/models/registry.py."""

    def __post_init__(self):
        check(self, "model")
        squash, patch = self.image_mode == "squash", self.vision.patch
        require(self.image_parts == 1 or squash, "setting model.image_parts", self.image_parts,
                "1 if image_mode is native")  # fmt: skip
        require(not squash or self.image_size % patch == 0, "setting model.image_size", self.image_size,
                f"a multiple of the patch size {patch}")  # fmt: skip
        pooled, width = self.connector.kind == "attention", self.decoder.width
        require(not pooled or width % POOL_HEADS == 0, "setting model.decoder.width", width,
                f"a multiple of the attention connector's {POOL_HEADS} heads")  # fmt: skip

    @property
    def images(self) -> ImageInput:
        """Return how the model takes images."""
        return ImageInput(
            self.vision.patch, self.image_mode, self.image_size, self.image_patches, self.image_parts,
            self.connector.tokens,
        )  # fmt: skip

    @property
    def vocabulary(self) -> int:
        """Return the rows of the token embedding."""
        return self.decoder.vocabulary


def peak_lr(parameters: int) -> float:
    """Return MM1's peak learning rate: exp(-0.4214 ln N - 0.5535) for N non-embedding parameters of the decoder.

    Source: the MM1 paper, section 4.
    """
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


VIT_L_336 = Vision(width=1024, layers=24, heads=16, ffn=4096, table=(24, 24))  # OpenAI CLIP ViT-L/14-336
VIT_H_378 = Vision(width=1280, layers=32, heads=16, ffn=5120, table=(27, 27))  # open_clip's ViT-H-14-378-quickgelu
# Honeybee's C-Abstractor, width and depth; the paper gives kind and token count.
ABSTRACTOR_144 = Connector(position_grid=(27, 27))

# Paper: 1.2B. Inferred: the 3B's proportions (head width 128, ffn/width 2.625) at 1.2 B non-embedding parameters.
D_1B = Decoder(vocabulary=49_152, width=2048, layers=24, heads=16, kv_heads=16, ffn=5376)
# Paper: 3B, of which 64B with 64 experts every 2nd layer. Inferred: width, layers, heads, ffn, vocabulary, theta and
# q/k norm from the AFM on-device config (huggingface/transformers#32515); kv_heads = heads because that gives the 2.9B
# and 64B the paper names.
D_3B = Decoder(vocabulary=49_152, width=3072, layers=26, heads=24, kv_heads=24, ffn=8064)
# Paper: 7B, of which 47B with 32 experts every 4th layer, which implies 5.2B parameters in the dense MLPs. Inferred
# from that: 32 × 4096 with ffn 13,312; grouped-query attention keeps the total at 7B.
D_7B = Decoder(vocabulary=49_152, width=4096, layers=32, heads=32, kv_heads=8, ffn=13_312)
# Paper: 30B. Inferred: the 7B's ffn/width 3.25 and grouped queries, scaled to 30 B.
D_30B = Decoder(vocabulary=49_152, width=7168, layers=48, heads=56, kv_heads=8, ffn=23_296)


def _mm1(decoder: Decoder) -> MM1Config:
    return MM1Config(VIT_H_378, ABSTRACTOR_144, decoder)


DIGITS = MM1Config(
    vision=Vision(
        width=96, layers=3, heads=3, ffn=256, patch=4, table=(6, 6), activation="gelu", class_token=False,
        pre_norm=False, interpolation="bilinear", mean=(0.34, 0.34, 0.34), std=(0.3, 0.3, 0.3),
    ),
    connector=Connector(tokens=16, hidden=96, depth=1, position_grid=None),
    decoder=Decoder(
        vocabulary=384, width=96, layers=4, heads=3, kv_heads=3, head_width=32, ffn=192, rope_theta=10_000.0,
        experts=4,
    ),
    image_mode="native", image_size=24, image_patches=24,
)  # fmt: skip

MODELS: dict[str, MM1Config] = {
    "digits": DIGITS,
    "mm1-1b": _mm1(D_1B),
    "mm1-3b": _mm1(D_3B),
    "mm1-7b": _mm1(D_7B),
    "mm1-30b": _mm1(D_30B),
    "mm1-3b-moe": _mm1(dataclasses.replace(D_3B, experts=64, moe_every=2)),
    "mm1-7b-moe": _mm1(dataclasses.replace(D_7B, experts=32, moe_every=4)),
    # The paper's ablation base: ViT-L/14 at 336 px and the 1.2B decoder.
    "mm1-1b-vit-l-336": MM1Config(
        VIT_L_336, Connector(position_grid=(24, 24)), D_1B, image_size=336, image_patches=576
    ),
}  # fmt: skip
