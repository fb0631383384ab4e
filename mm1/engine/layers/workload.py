"""Define the sizes of a step, and the units in which layers report operations and memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Workload:
    """Hold the sizes of a step: lengths of documents, grids (h, w) of images in patches, number of targets; budgets.

    tokens, images, patches: rows computed, padding included. computed_…: query-key pairs that attention computes in one
    layer of the decoder and of the encoder, rows that reach the experts of a layer, and rows of the head; None: derived
    from documents, grids and targets. prefixes: of the images, behind which the encoder's attention is causal; None: it
    is full.
    """

    documents: Sequence[int]
    grids: Sequence[tuple[int, int]]
    targets: int
    tokens: int
    images: int
    patches: int
    computed_pairs: int | None = None
    computed_patch_pairs: int | None = None
    computed_expert_rows: int | None = None
    computed_head_rows: int | None = None
    prefixes: Sequence[int] | None = None

    @property
    def useful(self) -> "Workload":
        """Return the same documents, images and targets without padding."""
        return replace(
            self, tokens=sum(self.documents), images=len(self.grids), patches=self.image_patches, computed_pairs=None,
            computed_patch_pairs=None, computed_expert_rows=None, computed_head_rows=None,
        )  # fmt: skip

    @property
    def image_patches(self) -> int:
        """Return the number of patches without padding."""
        return sum(h * w for h, w in self.grids)

    @property
    def causal_pairs(self) -> int:
        """Return the query-key pairs of a causal layer, n(n + 1)/2 for a document of n tokens."""
        computed = self.computed_pairs
        return sum(n * (n + 1) // 2 for n in self.documents) if computed is None else computed

    def visual_rows(self, class_token: bool) -> int:
        """Return the rows of an encoder: patches, and with class tokens one more per image."""
        return self.patches + class_token * self.images

    def visual_pairs(self, class_token: bool) -> int:
        """Return the query-key pairs of one layer of an encoder with attention inside each image."""
        if self.computed_patch_pairs is not None:
            return self.computed_patch_pairs
        lengths = [h * w + class_token for h, w in self.grids]
        seen = lengths if self.prefixes is None else [s + class_token for s in self.prefixes]
        return sum(s * s + (n * (n + 1) - s * (s + 1)) // 2 for s, n in zip(seen, lengths, strict=True))

    @property
    def expert_rows(self) -> int:
        """Return the rows that reach the experts of a layer."""
        return sum(self.documents) if self.computed_expert_rows is None else self.computed_expert_rows

    @property
    def head_rows(self) -> int:
        """Return the rows for which the head computes logits."""
        return self.targets if self.computed_head_rows is None else self.computed_head_rows


class Operations(NamedTuple):
    """Count the forward floating-point operations of a part of a layer; a multiply-add is two.

    backward: ratio of backward to forward operations, 1 if the input has no gradient. attention: backward computes the
    scores again, which are half of forward. split: a tensor group divides them; it repeats all others. routed: they
    belong to experts, of which the fullest process computes more than the mean.
    """

    part: str  # its name in the ledger
    forward: int
    backward: int = 2
    attention: bool = False
    split: bool = False
    routed: bool = False


def attention_operations(pairs: int, heads: int, head_width: int) -> int:
    """Return the forward operations of attention: the products q·k and p·v of all query-key pairs."""
    return 4 * pairs * heads * head_width


class Layout(NamedTuple):
    """Describe how values are stored: bytes per element of products and of the residual stream, and parallelism.

    tensor: processes that divide each layer. received: rows that the fullest process receives for its experts, over the
    rows that it sends; 0 without expert parallelism.
    """

    itemsize: int
    residual: int = 4
    tensor: int = 1
    received: float = 0.0


class KeptBytes(NamedTuple):
    """Count the bytes that a block stores for backward.

    everything: without recomputation. results: results of products, attention and experts, which selective
    recomputation stores in addition to the input. input: the block's input alone.
    """

    everything: float
    results: float
    input: float


class Traffic(NamedTuple):
    """Count the bf16 bytes of one pass through a block: all-reduced by a tensor group, and sent to experts."""

    reduced: float = 0.0
    routed: float = 0.0
