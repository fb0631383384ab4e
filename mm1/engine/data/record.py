"""Define records, which sources read, and the media in them, encoded and decoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mm1.engine.data.images import ImagePolicy
    from mm1.engine.models.image_input import ImageInput

SMALL_SOURCE = 512  # sources with fewer records are shuffled by sorting hashes (mixture.shuffled)


class Answer(str):
    """Mark a text that the model learns to generate, with <eos>. In a record with answers, only they are targets."""


class Alternatives(str):
    """Hold several equivalent texts, such as the captions of one image. As a str it is the first; an epoch uses one."""

    texts: tuple[str, ...]

    def __new__(cls, texts: Sequence[str]):
        first = super().__new__(cls, texts[0])
        first.texts = tuple(texts)
        return first

    def __reduce__(self):
        return Alternatives, (self.texts,)


class Label(str):
    """Hold the class of an image, which is no text to learn."""


@dataclass(frozen=True)
class Media:
    """Hold one encoded medium. kind: a key of codecs.CODECS, such as "image"; data: the content of a file (PNG, …)."""

    kind: str
    data: bytes


@dataclass(frozen=True, eq=False)
class View:
    """Hold one plane of values of a decoded medium, for which a model has a fixed number of token slots.

    An image is one view, or several where its parts are added to it. values [H, W, C]: both sides are multiples of the
    model's patch size; an image has uint8 pixels [H, W, 3].
    """

    kind: str
    values: np.ndarray

    def patches(self, patch: int) -> int:
        """Return the number of patches of patch x patch values."""
        return self.values.shape[0] * self.values.shape[1] // patch**2


EMPTY_IMAGE = View("image", np.zeros((0, 0, 3), np.uint8))  # kind, channels and dtype of a batch without images


def max_patches(images: "ImageInput | ImagePolicy") -> int:
    """Return the largest number of patches of one view of an image, for a model's settings or its codec."""
    return images.patches if images.mode == "native" else (images.size // images.patch) ** 2


def view_digest(view: View) -> bytes:
    """Return 32 bytes that identify a view by its kind, dtype, shape and values (SHA-256)."""
    head = repr((view.kind, view.values.dtype.str, view.values.shape))
    return hashlib.sha256(head.encode() + view.values.tobytes()).digest()


@dataclass(frozen=True)
class Record:
    """Hold texts and encoded media in reading order. key: the tar basename, line number or row number in the shard.

    draw: a random 64-bit number of this reading of the record, from which crops are drawn.
    """

    parts: tuple[str | Media, ...]
    key: str
    shard: str
    draw: int = 0
