"""Draw documents that write the digits of each image in one notation, which only the document itself shows.

A notation is a set of symbols, a separator and an ending: 3 x 5 x 4 = 60. Training documents use 48 of them, the test
the 12 others: any two of their three parts occur together in training, but never all three.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WRITINGS = (WORDS, tuple("0123456789"), tuple("abcdefghij"))
SEPARATORS = (" ", "-", ",", "/", "+")
ENDINGS = ("", ".", "!", ";")

TITLE = "write\n"
TURNS = (5, 12)  # minimum and maximum number of images of a training document
SIZES = (2, 3)  # digits of an image: one digit needs no separator
SHOTS = 8  # of a test question


class Notation(NamedTuple):
    """Define how the digits of an image are written: a symbol for each digit, the text between and after them."""

    symbols: tuple[str, ...]
    separator: str
    ending: str

    def write(self, digits: list[int]) -> str:
        """Return the digits in this notation: [3, 7] in numerals, "-" and "!" is "3-7!"."""
        return self.separator.join(self.symbols[digit] for digit in digits) + self.ending


def notations(held_out: bool) -> list[Notation]:
    """Return the 12 notations of the test, or the 48 of training."""
    return [
        Notation(symbols, separator, ending)
        for w, symbols in enumerate(WRITINGS)
        for s, separator in enumerate(SEPARATORS)
        for e, ending in enumerate(ENDINGS)
        if ((w + s + e) % len(SEPARATORS) == 0) == held_out
    ]


def documents(images: dict[str, list[int]], count: int, rng: random.Random) -> Iterator[dict]:
    """Yield `count` interleaved documents. images: the digits of each image by its name."""
    names = [name for name, digits in images.items() if len(digits) in SIZES]
    for _ in range(count):
        notation = rng.choice(notations(held_out=False))
        shown = rng.sample(names, rng.randint(*TURNS))
        yield interleaved(TITLE, {name: notation.write(images[name]) + "\n" for name in shown})


def interleaved(title: str, texts: dict[str, str]) -> dict:
    """Return a document in the form of OBELICS: a title, then each image (by its name) and the text after it."""
    return {
        "texts": [title] + [part for text in texts.values() for part in (None, text)],
        "images": [None] + [part for name in texts for part in (name, None)],
    }


def items(images: dict[str, list[int]], count: int, rng: random.Random) -> Iterator[dict]:
    """Yield `count` test questions, the held-out notations in turn: shots, one more image, and how it is written."""
    names = [name for name, digits in images.items() if len(digits) in SIZES]
    held_out = notations(held_out=True)
    for number in range(count):
        notation = held_out[number % len(held_out)]
        *shots, image = rng.sample(names, SHOTS + 1)
        yield {
            "shots": [{"image": name, "answer": notation.write(images[name])} for name in shots],
            "image": image,
            "answer": notation.write(images[image]),
        }
