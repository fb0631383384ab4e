"""One record of training data, and the two ways data can be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

FEW = 512  # records of a source below which a sort shuffles it


class DataError(ValueError):
    """The user's settings or paths are wrong. One clear line: the CLI prints it and exits with 2."""


class Unreadable(ValueError):
    """One record or image cannot be used: `reason` in one line, its shard and key there. A run skips and counts it."""

    def __init__(self, reason: str, shard: str = "", key: str = ""):
        super().__init__(reason, shard, key)  # all, or the exception would not survive the way back from a worker
        self.reason = " ".join(reason.split())[:300]
        self.shard, self.key = shard, key

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.reason) if part)


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


def at_least(least: int, **settings: int | None) -> None:
    """Raise DataError for a setting below it."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise DataError(f"{name} is {value}, expected ≥ {least}")
