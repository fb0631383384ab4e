"""Records into documents of tokens and images, ready to pack. Knows no torch: loader processes start fast.

Nor PIL and tokenizers before a text or an encoded image is met: who packs documents of ready tokens needs neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mm1.engine.data.record import DataError, Record, Unreadable

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer

    from mm1.engine.data.images import ImagePolicy

Unit = tuple[list[int], list[np.ndarray]]  # token ids, and the views of an image if these are their slots
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")


@dataclass(frozen=True)
class Document:
    """tokens int32 [n], where each image holds its slots; images uint8 [H, W, 3] in order; where it came from."""

    tokens: np.ndarray
    images: tuple[np.ndarray, ...]
    key: str

    def patches(self, patch: int) -> int:
        return sum(image.shape[0] * image.shape[1] for image in self.images) // patch**2


class TextTokenizer:
    """A tokenizer.json with the four special tokens. Raises DataError if it is not there, not one, or lacks them."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not Path(path).is_file():
            raise DataError(f"no such tokenizer file: {path}")
        try:
            missing = [token for token in SPECIAL if self._tokenizer.token_to_id(token) is None]
        except Exception as error:  # the tokenizers library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        if missing:
            raise DataError(f"{path} lacks the special tokens {', '.join(missing)}")
        self.pad, self.bos, self.eos, self.image = (int(self._tokenizer.token_to_id(token) or 0) for token in SPECIAL)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(self.path)
        tokenizer.encode_special_tokens = True  # "<image>" in a text stays text
        return tokenizer

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}  # reopened in each process

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class Budget:
    """What one packed sequence holds at most."""

    tokens: int
    images: int
    patches: int
    documents: int
    longest: int | None = None  # patches of one image; None: no bound but that of all


@dataclass(frozen=True)
class DocumentEncoder:
    """Record -> documents: `slots` tokens a view of an image, bos and eos around, cut in pieces that fit the budget."""

    tokenizer: TextTokenizer
    policy: "ImagePolicy"
    slots: int
    budget: Budget

    def __call__(self, record: Record) -> list[Document]:
        from mm1.engine.data.images import decode

        parts = [part if isinstance(part, str) else decode(part) for part in record.parts]
        return self._cut([*self.units(parts), ([self.tokenizer.eos], [])], record)

    def prompt(self, parts: "Sequence[str | Image.Image]") -> Document:
        """One document without an end, whatever the budget."""
        units = self.units(parts)
        tokens = [token for ids, _ in units for token in ids]
        return Document(np.array(tokens, np.int32), tuple(view for _, views in units for view in views), "prompt")

    def units(self, parts: "Sequence[str | Image.Image]") -> list[Unit]:
        t = self.tokenizer
        units: list[Unit] = [([t.bos], [])]
        for part in parts:
            if isinstance(part, str):
                units.append((t.encode(part), []))
            else:
                views = self.policy.views(part)
                units.append(([t.image] * self.slots * len(views), views))
        return units

    def _cut(self, units: list[Unit], record: Record) -> list[Document]:
        """Whole images and as much text as fits; what does not begins the next piece."""
        pieces: list[Document] = []
        tokens: list[int] = []
        images: list[np.ndarray] = []

        def close():
            nonlocal tokens, images
            key = record.key if not pieces else f"{record.key}+{len(pieces)}"
            pieces.append(Document(np.array(tokens, np.int32), tuple(images), f"{record.shard}:{key}"))
            tokens, images = [], []

        for ids, views in units:
            if views:
                area, used = (
                    sum(v.shape[0] * v.shape[1] for v in of) // self.policy.patch**2 for of in (views, images)
                )
                count, budget = len(views), self.budget
                if area > budget.patches or count > budget.images or len(ids) > budget.tokens - 1:
                    raise Unreadable(
                        f"an image of {count} views, {area} patches exceeds the packing budget", record.shard
                    )
                full = len(images) + count > budget.images or used + area > budget.patches
                if full or len(tokens) + len(ids) > budget.tokens:
                    close()
                tokens += ids
                images += views
            else:
                while len(tokens) + len(ids) > self.budget.tokens:
                    room = self.budget.tokens - len(tokens)
                    tokens += ids[:room]
                    ids = ids[room:]
                    close()
                tokens += ids
        close()
        # A piece of which nothing can be a target teaches nothing (an image alone, a lone end-of-text).
        return [piece for piece in pieces if (piece.tokens[1:] != self.tokenizer.image).any()]
