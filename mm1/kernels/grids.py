"""The geometry of a packed batch of images, computed once on the host.

N images of (h, w) patches stand one after another, row by row, in P rows. Rows past the last image are padding, and
images past the last one are absent: both let a training loop keep P and N constant, so that nothing recompiles.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Grids:
    """Grids (h, w) of N images in P packed patches; index tensors are built on first use and kept.

    sizes: host list of (h, w). images, patches: N and P to pad to (default: exactly as many as there are).
    Raises ValueError if a side is not positive or the images exceed the budget.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, images: int | None = None, patches: int | None = None):
        self.sizes = tuple((int(h), int(w)) for h, w in sizes)
        if any(h < 1 or w < 1 for h, w in self.sizes):
            raise ValueError(f"grids: a side is not positive in {list(self.sizes)}")
        ends = np.cumsum([h * w for h, w in self.sizes], dtype=np.int64)
        self.used = int(ends[-1]) if len(ends) else 0
        self.patches = self.used if patches is None else patches
        self.images = len(self.sizes) if images is None else images
        if self.used > self.patches or len(self.sizes) > self.images:
            raise ValueError(
                f"grids: {len(self.sizes)} images of {self.used} patches exceed the budget of "
                f"{self.images} images and {self.patches} patches"
            )
        absent = np.full(self.images - len(self.sizes), self.used)
        self.ends = np.concatenate([ends, absent]).astype(np.int64)
        self._tensors: dict[tuple, Tensor] = {}

    def _tensor(self, name: str, device: torch.device | str, make) -> Tensor:
        key = (name, str(device))
        if key not in self._tensors:
            with torch.inference_mode(False):  # what is kept must serve training too
                self._tensors[key] = torch.from_numpy(np.ascontiguousarray(make())).to(device, non_blocking=True)
        return self._tensors[key]

    def _places(self) -> tuple[np.ndarray, ...]:
        """(h, w, row, column) of the image and place of each of the used patches."""
        areas = np.array([h * w for h, w in self.sizes], dtype=np.int64)
        sides = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        h, w = np.repeat(sides, areas, axis=0).T
        inside = np.arange(self.used) - np.repeat(self.ends[: len(areas)] - areas, areas)
        return h, w, inside // w, inside % w

    def cu_seqlens(self, device) -> Tensor:
        """int32 [N+1], where each image's patches begin; absent images are empty."""
        return self._tensor("cu_seqlens", device, lambda: np.concatenate([[0], self.ends]).astype(np.int32))

    def membership(self, device) -> Tensor:
        """fp32 [P, N], 1 where the patch belongs to the image.

        A matrix rather than an index: sums over an image and the way back are both matrix products, so that neither
        direction needs atomics.
        """

        def make():
            starts = np.concatenate([[0], self.ends[:-1]])
            rows = np.arange(self.patches)[:, None]
            return ((rows >= starts) & (rows < self.ends)).astype(np.float32)

        return self._tensor("membership", device, make)

    def areas(self, device) -> Tensor:
        """fp32 [N], patches of each image, 1 for an absent one."""
        return self._tensor("areas", device, lambda: np.maximum(np.diff(self.ends, prepend=0), 1).astype(np.float32))

    def neighbours(self, device) -> Tensor:
        """int64 [9, P], the patch at (row - 1 … row + 1, column - 1 … column + 1) or P where the image ends."""

        def make():
            h, w, row, column = self._places()
            table = np.full((9, self.patches), self.patches, dtype=np.int64)
            here = np.arange(self.used)
            for k, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                inside = (row + dy >= 0) & (row + dy < h) & (column + dx >= 0) & (column + dx < w)
                table[k, : self.used] = np.where(inside, here + dy * w + dx, self.patches)
            return table

        return self._tensor("neighbours", device, make)

    def class_order(self, device) -> Tensor:
        """int64 [N+P]: rows of [N class tokens; P patches] such that each image's class token precedes its patches."""

        def make():
            order, start = [], 0
            for image, end in enumerate(self.ends):
                order += [np.array([image]), self.images + np.arange(start, end)]
                start = end
            return np.concatenate([*order, self.images + np.arange(self.used, self.patches)]).astype(np.int64)

        return self._tensor("class_order", device, make)

    def class_cu_seqlens(self, device) -> Tensor:
        """int32 [N+1], as cu_seqlens with one class token more an image."""
        return self._tensor(
            "class_cu_seqlens",
            device,
            lambda: (np.concatenate([[0], self.ends]) + np.arange(self.images + 1)).astype(np.int32),
        )

    def windows(self, out: tuple[int, int], device) -> tuple[Tensor, Tensor]:
        """Windows of torch.nn.AdaptiveAvgPool2d: output i of n covers floor(i·h/n) … ceil((i+1)·h/n).

        Returns int64 [M], the patches of all windows, and int64 [N·oh·ow + 1], where each window begins.
        """
        patches, ends = [], [np.zeros(1, np.int64)]
        for (h, w), end in zip(self.sizes, self.ends):
            inside, lengths = _windows(h, w, *out)
            patches.append(inside + (end - h * w))
            ends.append(lengths)
        absent = np.zeros((self.images - len(self.sizes)) * out[0] * out[1], np.int64)
        members = self._tensor(f"windows{out}", device, lambda: np.concatenate([np.zeros(0, np.int64), *patches]))
        starts = self._tensor(f"starts{out}", device, lambda: np.cumsum(np.concatenate([*ends, absent])))
        return members, starts


@lru_cache(maxsize=4096)
def _windows(h: int, w: int, oh: int, ow: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches of every window of one h × w image, and the number of patches of each window."""
    rows = [np.arange(i * h // oh, -(-(i + 1) * h // oh)) for i in range(oh)]
    columns = [np.arange(j * w // ow, -(-(j + 1) * w // ow)) for j in range(ow)]
    members = [(r[:, None] * w + c[None, :]).ravel() for r in rows for c in columns]
    return np.concatenate(members).astype(np.int64), np.array([len(m) for m in members], dtype=np.int64)


def as_grids(grids: "Grids | Sequence[tuple[int, int]]") -> Grids:
    return grids if isinstance(grids, Grids) else Grids(grids)
