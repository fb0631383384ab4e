"""Define the sizes of a step, and the units in which layers say what they compute and keep on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Workload:
    """Holds the sizes of a step: lengths of documents, grids (h, w) of images in patches, rows with a target; budgets.

    tokens, images, patches: rows that are computed, filled or not. pairs, patch_pairs: query-key pairs that attention
    computes in one layer of the decoder and of the encoder; routed, heads: rows that reach experts and the head. None
    stands for the numbers that the documents, images and targets themselves need.
    """

    documents: Sequence[int]
    grids: Sequence[tuple[int, int]]
    targets: int
    tokens: int
    images: int
    patches: int
    pairs: int | None = None
    patch_pairs: int | None = None
    routed: int | None = None
    heads: int | None = None

    @property
    def useful(self) -> "Workload":
        """Return the same documents, images and targets without padding."""
        return replace(
            self, tokens=sum(self.documents), images=len(self.grids), patches=self.image_patches,
            pairs=None, patch_pairs=None, routed=None, heads=None,
        )  # fmt: skip

    @property
    def image_patches(self) -> int:
        """Return the number of patches that images have, without padding."""
        return sum(h * w for h, w in self.grids)

    @property
    def causal_pairs(self) -> int:
        """Return the query-key pairs of a causal layer: n(n + 1)/2 of a document of n tokens, unless `pairs` is set."""
        return sum(n * (n + 1) // 2 for n in self.documents) if self.pairs is None else self.pairs

    def visual_rows(self, class_token: bool) -> int:
        """Return the rows of an encoder: patches, and a class token an image if there is one."""
        return self.patches + class_token * self.images

    def visual_pairs(self, class_token: bool) -> int:
        """Return the query-key pairs of one layer of an encoder with full attention, unless `patch_pairs` is set."""
        if self.patch_pairs is not None:
            return self.patch_pairs
        absent = self.images - len(self.grids)  # their class tokens attend to themselves
        return sum((h * w + class_token) ** 2 for h, w in self.grids) + class_token * absent

    @property
    def routed_rows(self) -> int:
        """Return the rows that reach the experts of a layer."""
        return sum(self.documents) if self.routed is None else self.routed

    @property
    def head_rows(self) -> int:
        """Return the rows of which the head computes logits."""
        return self.targets if self.heads is None else self.heads


class Operations(NamedTuple):
    """Counts floating-point operations of a part of a layer, forward; a multiplication and its addition are two.

    backward: operations of backward over those of forward, 1 where the input has no gradient. attention: backward
    computes the scores again, which are half of forward. split: a tensor group divides them; it repeats all others.
    routed: they are those of experts, of which the fullest process has more than the mean.
    """

    part: str  # its name in the ledger
    forward: int
    backward: int = 2
    attention: bool = False
    split: bool = False
    routed: bool = False


def attention_operations(pairs: int, heads: int, head_width: int) -> int:
    """Return the operations of attention on so many query-key pairs: the products q·k and p·v."""
    return 4 * pairs * heads * head_width


class Layout(NamedTuple):
    """Describes how values are stored: bytes of an element of products and of the residual stream, and who shares it.

    tensor: processes that share each layer. received: rows that the fullest process receives for its experts, over the
    rows that it sends; 0 where tokens stay.
    """

    itemsize: int
    residual: int = 4
    tensor: int = 1
    received: float = 0.0


class KeptBytes(NamedTuple):
    """Counts the bytes that a block keeps for backward.

    everything: without recomputation. results: those of products, attention and experts, which selective recomputation
    keeps beside the input. input: the block's input alone.
    """

    everything: float
    results: float
    input: float


class Traffic(NamedTuple):
    """Counts bf16 bytes of one pass through a block: all-reduced by a tensor group, and of rows sent to experts."""

    reduced: float = 0.0
    routed: float = 0.0
