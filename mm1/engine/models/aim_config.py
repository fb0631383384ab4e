"""Define the settings of AIM and its named sizes.

Widths, depths and heads are those of table 1 of the paper (arXiv 2401.08541); the head is that of its section 4.3.
"""

from dataclasses import dataclass
from typing import Annotated

from mm1.engine.layers.config import PixelHead, Vision
from mm1.engine.models.image_input import ImageDraws, ImageInput
from mm1.engine.settings import Count, CountOrZero, MayChange, OneOf, Range, check
from mm1.errors import require

Share = Annotated[float, Range(above=0, maximum=1)]


@dataclass(frozen=True)
class AIMConfig:
    """Configure the encoder and the pixel head of AIM, and how images are cropped, resized and masked in training."""

    vision: Vision
    head: PixelHead
    image_mode: Annotated[str, OneOf("squash", "native"), MayChange()] = "squash"
    """Resizing of images: "squash" to image_size², as AIM does, or "native": own aspect ratio within image_patches."""
    image_size: Annotated[Count, MayChange()] = 224
    """Side in pixels that images are squashed to, a multiple of vision.patch; AIM's pre-training has 224."""
    image_patches: Annotated[Count, MayChange()] = 256
    """Largest number of patches of an image if image_mode is "native"; 256 is 16 × 16, an image of 224 pixels."""
    image_min_patches: Annotated[CountOrZero, MayChange()] = 0
    """Smallest number of patches if image_mode is "native" and each image is resized to a random number of patches up
    to image_patches in training, as in AIMv2, where they are 128 and 4096; 0: images keep their size if it fits."""
    image_crop: Annotated[tuple[Share, Share], MayChange()] = (0.4, 1.0)
    """Smallest and largest share of an image's area that a crop has in training; its sides have a ratio of 3/4 to 4/3.
    [1.0, 1.0]: no crop. AIM's pre-training has 0.4 to 1."""
    image_flip: Annotated[bool, MayChange()] = True
    """Mirror each image with probability 1/2 in training, as AIM does; letters and digits should not be."""
    prefix: Annotated[str, OneOf("uniform", "causal"), MayChange()] = "uniform"
    """Length of the prefix of an image of K patches, which all patches see and which is not predicted: "uniform" draws
    it from 1 to K - 1 for each image, as AIM does; "causal": 1."""
    average: Annotated[str, OneOf("patches", "images"), MayChange()] = "patches"
    """What counts alike in the gradient: all predicted "patches", as in AIM, or all "images", however many of their
    patches are predicted. The logged loss is the mean over patches."""
    order: Annotated[str, OneOf("raster", "columns", "spiral", "checkerboard", "random")] = "raster"
    """Order in which the patches of an image are predicted: AIM's "raster" (row by row), "columns", "spiral" (from the
    centre), "checkerboard" (every second patch first), or "random" (one permutation for each grid)."""
    kind: Annotated[str, OneOf("aim")] = "aim"
    """Kind of the model, a key of REGISTRY in mm1/engine/models/registry.py."""

    def __post_init__(self):
        check(self, "model")
        squash, patch, (smallest, largest) = self.image_mode == "squash", self.vision.patch, self.image_crop
        require(not squash or self.image_size % patch == 0, "setting model.image_size", self.image_size,
                f"a multiple of the patch size {patch}")  # fmt: skip
        limit = 0 if squash else self.image_patches
        require(self.image_min_patches <= limit, "setting model.image_min_patches", self.image_min_patches,
                f"at most {limit}" + " if model.image_mode is squash" * squash)  # fmt: skip
        require(smallest <= largest, "setting model.image_crop", self.image_crop, "the smaller share first")

    @property
    def images(self) -> ImageInput:
        """Return how the model takes images."""
        area = (self.image_min_patches, self.image_patches) if self.image_min_patches else None
        draws = ImageDraws(self.image_crop, self.image_flip, self.prefix, area)
        return ImageInput(self.vision.patch, self.image_mode, self.image_size, self.image_patches, 1, 0, draws)

    @property
    def vocabulary(self) -> int:
        """Return 0: the model takes images alone."""
        return 0

    @property
    def context(self) -> None:
        """Return None: there are no documents of tokens."""
        return None


def _vision(width: int, layers: int, head_width: int = 128, patch: int = 14) -> Vision:
    # eps is that of the published inference code; its training configuration has 1e-5.
    return Vision(
        width, layers, width // head_width, 4 * width, patch, activation="gelu", class_token=False, pre_norm=False,
        patch_norm=True, final_norm=True, positions="sincos", bias=False, eps=1e-6, mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )  # fmt: skip


MODELS: dict[str, AIMConfig] = {
    "aim-0.6b": AIMConfig(_vision(1536, 24), PixelHead()),
    "aim-1b": AIMConfig(_vision(2048, 24), PixelHead()),
    "aim-3b": AIMConfig(_vision(3072, 24), PixelHead()),
    "aim-7b": AIMConfig(_vision(4096, 32), PixelHead()),
    # For small pictures and a few minutes on a CPU.
    "aim-clipart": AIMConfig(
        _vision(128, 4, head_width=64, patch=4), PixelHead(128, 2, 512), image_size=32, image_patches=64
    ),
}
