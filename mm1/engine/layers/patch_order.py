"""Define the orders in which patches are predicted: permutations of the patches of an image of any grid.

    raster        row by row
    columns       column by column
    spiral        from the centre outwards, each patch beside the one before it
    checkerboard  the patches whose row and column have an even sum, then the others, each row by row
    random        one permutation for each grid
Source: El-Nouby et al. 2024 (AIM), section 5.2, which compares them; the centre's place and the turn are not given.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

ORDERS = ("raster", "columns", "spiral", "checkerboard", "random")


def packed_order(order: str, sizes: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """Return the packed patches of images of these grids in an order, int64 [rows]; rows of no image keep their place.

    order: one of ORDERS. Element i is the row, in raster order, of the patch at place i of its image.
    """
    places, first = [], 0
    for h, w in sizes:
        places += [first + place for place in image_order(order, h, w)]
        first += h * w
    return torch.tensor([*places, *range(first, rows)])


@lru_cache(maxsize=4096)
def image_order(order: str, h: int, w: int) -> tuple[int, ...]:
    """Return the patches of an image of h rows and w columns, as numbers in raster order."""
    patches = range(h * w)
    if order == "spiral":
        return _spiral(h, w)
    random = Random(0)  # Python guarantees its sequence
    key = {
        "raster": lambda i: i,
        "columns": lambda i: (i % w, i),
        "checkerboard": lambda i: ((i // w + i % w) % 2, i),
        "random": lambda i: random.random(),
    }[order]
    return tuple(sorted(patches, key=key))


def _spiral(h: int, w: int) -> tuple[int, ...]:
    """Return the reverse of the walk along the edge, clockwise from the first patch, and then along each inner ring."""
    rows = [[r * w + c for c in range(w)] for r in range(h)]
    walk: list[int] = []
    while rows:
        walk += rows.pop(0)
        rows = [[*column] for column in zip(*rows)][::-1]  # the rest, turned so that the walk's next side is on top
    return tuple(walk[::-1])
