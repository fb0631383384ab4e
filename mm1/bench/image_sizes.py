"""Name the sizes of images that ops are measured with."""

import math
import random

Sizes = list[tuple[int, int]]  # (h, w) in patches
# Images of 224 to 1344 pixels a side. Padded to the longest image, 41.5 % of their rows are padding.
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
