"""Make documents of images for a model that takes images alone: draw crop, mirroring, size and prefix of each.

All draws of an image follow from its record's number `draw`, so that a resumed or replayed run repeats them, whatever
its number of processes. Python guarantees the sequence of Random.random for a seed.
"""

import math
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mm1.engine.data.document import Document
from mm1.engine.data.record import Media, Record, View

if TYPE_CHECKING:
    from mm1.engine.data.images import ImagePolicy
    from mm1.engine.models.image_input import ImageDraws

TRIES = 10  # crops that are drawn until one fits into the image
RATIO = 4 / 3  # largest ratio of a crop's sides, either way


def random_crop(image: Image.Image, shares: tuple[float, float], random: Random) -> Image.Image:
    """Return a crop with a uniform share of the area and a log-uniform ratio of the sides, at a uniform place.

    shares: smallest and largest share; (1, 1): the image itself. Where no drawn crop fits, as in very long images, it
    is the largest central one with a legal ratio. Source: Szegedy et al. 2015, section 6.
    """
    (width, height), (smallest, largest) = image.size, shares
    if smallest == 1:
        return image
    for _ in range(TRIES):
        area = width * height * (smallest + (largest - smallest) * random.random())
        ratio = RATIO ** (2 * random.random() - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int((width - w + 1) * random.random()), int((height - h + 1) * random.random())
            return image.crop((left, top, left + w, top + h))
    w, h = min(width, round(height * RATIO)), min(height, round(width * RATIO))
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def random_area(areas: tuple[int, int], random: Random) -> int:
    """Return a number of patches 2ⁿ between the smallest and the largest of `areas`.

    n has the density of a standard normal cut off at -1 and 1, stretched to the range. Source: Fini et al. 2024
    (AIMv2), section 2.4, whose range of n is 7 to 12.
    """
    normal, (low, high) = NormalDist(), map(math.log2, areas)
    outside = normal.cdf(-1)
    place = normal.inv_cdf(outside + (1 - 2 * outside) * random.random())  # -1 to 1
    return min(max(round(2 ** (low + (high - low) * (1 + place) / 2)), areas[0]), areas[1])


@dataclass(frozen=True)
class ImageEncoder:
    """Encode records of one image as documents of one view; its patches are the tokens, its prefix is the prompt."""

    codec: "ImagePolicy"
    draws: "ImageDraws"

    def __call__(self, record: Record) -> list[Document]:
        """Return the record's document. Raises Unreadable."""
        (medium,) = (part for part in record.parts if isinstance(part, Media))
        random = Random(record.draw)
        image = random_crop(self.codec.decode(medium.data), self.draws.crop, random)
        if self.draws.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        area = random_area(self.draws.area, random) if self.draws.area else None
        view = View(self.codec.kind, self.codec.resize(image, area))
        patches = view.patches(self.codec.patch)
        prefix = 1 if self.draws.prefix == "causal" else 1 + int(max(patches - 1, 1) * random.random())
        key, places = f"{record.shard}:{record.key}", np.arange(patches)
        return [Document(np.zeros(patches, np.int32), (view,), key, places < prefix)]
