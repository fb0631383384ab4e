"""One record of training data."""

from collections.abc import Sequence
from dataclasses import dataclass

FEW = 512  # records of a source below which a sort shuffles it


class Answer(str):
    """A text that ends where it ends; beside one, only answers are trained on."""


class Choice(str):
    """The first of several texts that say the same, such as captions of an image. A run draws one of them each pass."""

    texts: tuple[str, ...]

    def __new__(cls, texts: Sequence[str]):
        choice = super().__new__(cls, texts[0])
        choice.texts = tuple(texts)
        return choice

    def __reduce__(self):
        return Choice, (self.texts,)


@dataclass(frozen=True)
class Record:
    """Texts and encoded images in reading order. `key` inside the shard: tar basename, line or row number."""

    parts: tuple[str | bytes, ...]
    key: str
    shard: str
