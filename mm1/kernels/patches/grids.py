"""Describe the geometry of a packed batch of images in tensors that every vision kernel reads.

The patches of N images of (h, w) patches are stored image after image, row by row, in P rows. Rows past the last image
are padding, and images past the last one are absent. With both, a training loop keeps P and N constant, so that new
sizes change values in tensors but no shapes, and nothing recompiles. Kernels derive everything else (taps of an
interpolation, windows of a pool, neighbours of a convolution) from (h, w) in a few integer operations.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.language import tl, triton

# The rows and columns of the strips into which the depthwise kernels divide each image.
STRIP_ROWS, STRIP_COLUMNS = 16, 4


class Grids:
    """Hold the grids (h, w) of N images in P packed patches, on one device.

    sizes: list of (h, w). images, patches: N and P to pad to (default: no padding). longest: an upper bound of the
    patches of one image, which determines the launches of attention (default: those of the largest image, or P where
    patches is set). merge: the patches of an image are ordered in blocks of merge × merge, as in Qwen-VL, instead of
    row by row. Raises ValueError if a side is not positive or no multiple of merge, or if the images exceed a budget.

    table int32 [N, 4]: first row, rows, h, w. owner int32 [P]: image of each row; for a row of no image, -1 or an image
    that does not have the row. cu_seqlens int32 [N+1]: the first row of each image, and the end of the last. strips
    int32 [N+1]: the same for its strips.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        images: int | None = None,
        patches: int | None = None,
        longest: int | None = None,
        merge: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.sizes: tuple[tuple[int, int], ...] | None = tuple((int(h), int(w)) for h, w in sizes)
        if any(h < 1 or w < 1 for h, w in self.sizes):
            raise ValueError(f"grids: a side is not positive in {list(self.sizes)}")
        if any(h % merge or w % merge for h, w in self.sizes):
            raise ValueError(f"grids: a side is no multiple of merge {merge} in {list(self.sizes)}")
        table, first = [], 0
        for h, w in self.sizes:
            table += [first, h * w, h, w]
            first += h * w
        self.used = first
        largest = max([0, *[h * w for h, w in self.sizes]])
        self.longest = longest if longest is not None else largest if patches is None else patches
        patches = first if patches is None else patches
        images = len(self.sizes) if images is None else images
        if first > patches or len(self.sizes) > images:
            raise ValueError(
                f"grids: {len(self.sizes)} images of {first} patches exceed the budget of "
                f"{images} images and {patches} patches"
            )
        if largest > self.longest:
            raise ValueError(f"grids: an image of {largest} patches exceeds longest = {self.longest}")
        table += [first, 0, 0, 0] * (images - len(self.sizes))
        with torch.inference_mode(False):  # tensors made in inference mode could not be used in training
            rows = torch.tensor(table, dtype=torch.int32, device="cpu").view(-1, 4)
            self._fill(moved_to(rows, device), patches, merge)

    @classmethod
    def of_tensors(cls, first: Tensor, rows: Tensor, h: Tensor, w: Tensor, patches: int, *, merge: int = 1) -> "Grids":
        """Return Grids from tensors [N], whose values the host does not read; first rows ascend, and may leave gaps.

        rows: the number of an image's h·w patches that are in the batch, from its first patch on.
        """
        grids = cls.__new__(cls)
        grids.sizes = grids.used = None
        grids.longest = patches
        grids._fill(torch.stack([first, rows, h, w], 1).int(), patches, merge)
        return grids

    def _fill(self, table: Tensor, patches: int, merge: int) -> None:
        self.table, self.patches, self.images, self.merge = table, patches, table.shape[0], merge
        first, rows, h, w = table.unbind(1)
        places = torch.arange(patches, dtype=torch.int32, device=table.device)
        self.owner = torch.searchsorted(first.contiguous(), places, right=True, out_int32=True) - 1
        # Padding gives 0 without images; a branch on their number would make it a constant of a compiled program.
        self.cu_seqlens = torch.cat([first, F.pad(first + rows, (1, 0))[-1:]])
        strips = -(-h // STRIP_ROWS) * -(-w // STRIP_COLUMNS)
        self.strips = F.pad(strips.cumsum(0, dtype=torch.int32), (1, 0))
        self._elsewhere: dict[str, Grids] = {}

    def to(self, device: torch.device | str) -> "Grids":
        """Return the same grids on a device, copied once and asynchronously."""
        if torch.device(device) == self.table.device:
            return self
        if str(device) not in self._elsewhere:
            with torch.inference_mode(False):
                other = Grids.__new__(Grids)
                other.sizes, other.used, other.longest = self.sizes, self.used, self.longest
                other._fill(moved_to(self.table, device), self.patches, self.merge)
            self._elsewhere[str(device)] = other
        return self._elsewhere[str(device)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return table, owner, cu_seqlens and strips."""
        return self.table, self.owner, self.cu_seqlens, self.strips

    def with_class_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layout with a class token before each image: int64 rows of the N class tokens, int64 rows of the P
        patches, and cu_seqlens int32 [N+1]."""
        n = torch.arange(self.images + 1, dtype=torch.int32, device=self.table.device)
        rows = torch.arange(self.patches, device=self.table.device)
        cu_seqlens = self.cu_seqlens + n
        inside = rows < self.cu_seqlens[-1]
        patches = rows + torch.where(inside, self.owner + 1, self.images)
        return cu_seqlens[:-1].long(), patches.long(), cu_seqlens


def moved_to(x: Tensor, device: torch.device | str) -> Tensor:
    """Return x on a device; a copy to a GPU is asynchronous."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def as_grids(grids: "Grids | Sequence[tuple[int, int]]", device: torch.device | str) -> Grids:
    """Return Grids on a device, from Grids or a list of (h, w)."""
    return grids.to(device) if isinstance(grids, Grids) else Grids(grids, device=device)


@triton.jit
def load_image(table_ptr, image):
    """Load an image's first row, rows, h and w."""
    row = table_ptr + image * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def image_of(owner_ptr, table_ptr, rows, P):
    """Return each row's image, its first row, h and w (1 for a row of no image), and whether the row belongs to it."""
    image = tl.load(owner_ptr + rows, rows < P, other=-1)
    valid = image >= 0
    first = tl.load(table_ptr + image * 4, valid, other=0)
    valid = valid & (rows - first < tl.load(table_ptr + image * 4 + 1, valid, other=0))
    h = tl.load(table_ptr + image * 4 + 2, valid, other=1)
    w = tl.load(table_ptr + image * 4 + 3, valid, other=1)
    return image, first, h, w, valid
