"""Records: what a source reads, before it becomes tokens and values; and the media in them, encoded and decoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALL_SOURCE = 512  # a source of fewer records is shuffled by sorting hashes (mixture.shuffled)


class Answer(str):
    """A text that the model learns to generate. It ends with <eos>; in a record with answers only they are targets."""


class Choice(str):
    """The first of several equivalent texts, such as the captions of one image. A run draws one of them each epoch."""

    texts: tuple[str, ...]

    def __new__(cls, texts: Sequence[str]):
        choice = super().__new__(cls, texts[0])
        choice.texts = tuple(texts)
        return choice

    def __reduce__(self):
        return Choice, (self.texts,)


@dataclass(frozen=True)
class Media:
    """One encoded medium. kind: a key of codecs.CODECS, such as "image"; data: the bytes of a file, such as a PNG."""

    kind: str
    data: bytes


@dataclass(frozen=True, eq=False)
class View:
    """One plane of values of a decoded medium, for which a model has a fixed number of token slots.

    An image is one view, or several where its parts are shown beside it. values [H, W, C]: both sides are multiples of
    the model's patch size; of an image uint8 pixels [H, W, 3].
    """

    kind: str
    values: np.ndarray

    def patches(self, patch: int) -> int:
        """Return the number of patches of patch x patch values."""
        return self.values.shape[0] * self.values.shape[1] // patch**2


NO_IMAGE = View("image", np.zeros((0, 0, 3), np.uint8))  # kind, channels and dtype of a batch of images without any


def view_digest(view: View) -> bytes:
    """Return 32 bytes that name a view by its kind, dtype, shape and values (SHA-256)."""
    head = repr((view.kind, view.values.dtype.str, view.values.shape))
    return hashlib.sha256(head.encode() + view.values.tobytes()).digest()


@dataclass(frozen=True)
class Record:
    """Texts and encoded media in reading order. key: its place in the file: tar basename, line or row number."""

    parts: tuple[str | Media, ...]
    key: str
    shard: str
