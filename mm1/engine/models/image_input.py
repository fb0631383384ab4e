"""Describe how a model takes images, for the data package and inference."""

import math
from typing import NamedTuple

ROWS = 16  # the number of target rows is a multiple of this, for the tiles of products


class ImageDraws(NamedTuple):
    """Describe what training draws for each image of a model that takes images alone."""

    crop: tuple[float, float]  # smallest and largest share of the image's area that is cropped; (1, 1): the whole image
    flip: bool  # mirror every second image, at random
    prefix: str  # "uniform": of 1 to K - 1 of K patches, "causal": of 1 patch
    area: tuple[int, int] | None = None  # smallest and largest number of patches of an image

    def target_rows(self, patches: int, largest: int) -> int:
        """Return the rows of the head that a sequence of `patches` patches needs for images of at most `largest`.

        With uniform prefixes, N full images of P patches together have P/2 targets in the mean, with a standard
        deviation of P / √(12 N). The result is √3 of them more, P/2 · (1 + 1/√N), which a single image never exceeds.
        """
        rows = patches if self.prefix == "causal" else (patches + math.sqrt(patches * largest)) / 2
        return math.ceil(rows / ROWS) * ROWS


class ImageInput(NamedTuple):
    """Describe images as a model takes them, and the tokens of each."""

    patch: int  # side in pixels
    mode: str  # "squash" to size², or "native": own aspect ratio, at most `patches` patches
    size: int  # pixels of a side
    patches: int
    parts: int  # k: k × k parts of the image are added to the whole one
    slots: int  # tokens of one view of an image; 0: the model takes no images among texts
    draws: ImageDraws | None = None  # of a model that takes images alone


TEXT_ONLY = ImageInput(patch=1, mode="native", size=1, patches=1, parts=1, slots=0)  # of a model without images
