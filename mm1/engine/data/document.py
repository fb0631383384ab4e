"""Records into documents of tokens and images, ready to pack. Knows no torch: loader processes start fast.

Nor PIL and tokenizers before a text or an encoded image is met: who packs documents of ready tokens needs neither.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mm1.engine.data.record import Answer, DataError, Record, Unreadable

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer

    from mm1.engine.data.images import ImagePolicy

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
DECODED_AHEAD = 64  # documents that a packer's thread, or each of its worker processes, makes before they are wanted


@dataclass(frozen=True)
class Document:
    """tokens int32 [n], where each image holds its slots; images uint8 [H, W, 3] in order; where it came from; which
    tokens are no target, bool [n] or None."""

    tokens: np.ndarray
    images: tuple[np.ndarray, ...]
    key: str
    given: np.ndarray | None = None

    def targets(self, image_id: int) -> np.ndarray:
        """Return bool [n - 1]: which tokens behind the first are learned."""
        text = self.tokens[1:] != image_id
        return text if self.given is None else text & ~self.given[1:]

    def section(self, start: int, stop: int, image_id: int, slots: int) -> "Document":
        """Return tokens start to stop as a document; neither end lies inside an image's slots."""
        if start == 0 and stop == len(self.tokens):
            return self
        first, last = (int((self.tokens[:end] == image_id).sum()) // slots for end in (start, stop))
        key = f"{self.key}@{start}" if start else self.key
        given = None if self.given is None else self.given[start:stop]
        return Document(self.tokens[start:stop], self.images[first:last], key, given)

    def patches(self, patch: int) -> int:
        return sum(image.shape[0] * image.shape[1] for image in self.images) // patch**2


class TextTokenizer:
    """A tokenizer.json with the four special tokens. Raises DataError if it is not there, not one, or lacks them."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not Path(path).is_file():
            raise DataError(f"no such tokenizer file: {path}")
        try:
            self.text = Path(path).read_text(encoding="utf-8")
            missing = [token for token in SPECIAL if self._tokenizer.token_to_id(token) is None]
        except Exception as error:  # the tokenizers library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        if missing:
            how = f"add them by `mm1 tokenizer NEW --from {path}`"
            raise DataError(f"{path} lacks the special tokens {', '.join(missing)}: {how}")
        self.pad, self.bos, self.eos, self.image = (int(self._tokenizer.token_to_id(token) or 0) for token in SPECIAL)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.encode_special_tokens = True  # "<image>" in a text stays text
        return tokenizer

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}  # reopened in each process

    def __len__(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # half a surrogate pair
            raise DataError("a text is not valid Unicode") from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: "Iterable[int]", continued: bool = False) -> "Iterator[bytes]":
        for number in ids:
            yield self.token_bytes(number, not continued)
            continued = continued or self.has_text(number)

    def has_text(self, number: int) -> bool:
        return number not in (self.pad, self.bos, self.eos, self.image)

    def token_bytes(self, number: int, first: bool = False) -> bytes:
        import re

        from tokenizers.pre_tokenizers import ByteLevel  # noqa: F401

        name = self._tokenizer.id_to_token(number)
        if name is None or not self.has_text(number):
            return b""
        if "ByteLevel" in str(self._tokenizer.decoder):
            printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
            others = [byte for byte in range(256) if byte not in printable]
            table = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
            return bytes(table[c] for c in name)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes([int(byte[1], 16)])
        text = name.replace("▁", " ").encode()
        return text.lstrip(b" ") if first else text

    def stream(self) -> Callable[[int], str]:
        """Return a function that gives what each further token adds to a text, once its last character is whole."""
        from tokenizers.decoders import DecodeStream

        growing = DecodeStream(skip_special_tokens=True)
        return lambda token: growing.step(self._tokenizer, token) or ""


@dataclass(frozen=True)
class Budget:
    """The limits of one packed sequence."""

    tokens: int
    images: int
    patches: int
    documents: int
    longest: int | None = None  # patches of one image; None: no bound but that of all


class Unit(NamedTuple):
    """Token ids, and the views of an image if these are their slots. given: they are no targets."""

    ids: list[int]
    views: list[np.ndarray]
    given: bool = False


@dataclass(frozen=True)
class DocumentEncoder:
    """Record -> documents: `slots` tokens a view of an image, bos and eos around, cut in pieces that fit the budget.

    Of a record with answers each of them has an eos, and all else is given.
    """

    tokenizer: TextTokenizer
    policy: "ImagePolicy"
    slots: int
    budget: Budget

    def __call__(self, record: Record) -> list[Document]:
        from mm1.engine.data.images import decode

        parts = [part if isinstance(part, str) else decode(part) for part in record.parts]
        units, eos = self.units(parts), [self.tokenizer.eos]
        if not any(isinstance(part, Answer) for part in parts):
            return self._cut([*units, Unit(eos, [])], record)
        bos, *units = units
        ended = (Unit(u.ids + eos, []) if isinstance(part, Answer) else u._replace(given=True)
                 for part, u in zip(parts, units))  # fmt: skip
        return self._cut([bos, *ended], record)

    def prompt(self, parts: "Sequence[str | Image.Image]") -> Document:
        """Return one document without an end, whatever the budget."""
        units = self.units(parts)
        tokens = [token for unit in units for token in unit.ids]
        return Document(np.array(tokens, np.int32), tuple(view for unit in units for view in unit.views), "prompt")

    def units(self, parts: "Sequence[str | Image.Image]") -> list[Unit]:
        t = self.tokenizer
        units = [Unit([t.bos], [])]
        for part in parts:
            if isinstance(part, str):
                units.append(Unit(t.encode(part), []))
            else:
                views = self.policy.views(part)
                units.append(Unit([t.image] * self.slots * len(views), views))
        return units

    def _cut(self, units: list[Unit], record: Record) -> list[Document]:
        """Return pieces of whole images and as much text as fits; what does not fit begins the next piece."""
        pieces: list[Document] = []
        tokens: list[int] = []
        images: list[np.ndarray] = []
        given: list[bool] = []
        budget, patches = self.budget, 0  # patches: of the piece's images

        def close():
            nonlocal tokens, images, given, patches
            key = record.key if not pieces else f"{record.key}+{len(pieces)}"
            marks = np.array(given) if any(given) else None
            pieces.append(Document(np.array(tokens, np.int32), tuple(images), f"{record.shard}:{key}", marks))
            tokens, images, given, patches = [], [], [], 0

        for ids, views, no_target in units:
            if views:
                area = sum(v.shape[0] * v.shape[1] for v in views) // self.policy.patch**2
                if area > budget.patches or len(views) > budget.images or len(ids) > budget.tokens - 1:
                    raise Unreadable(
                        f"an image of {len(views)} views, {area} patches exceeds the packing budget", record.shard
                    )
                full = len(images) + len(views) > budget.images or patches + area > budget.patches
                if full or len(tokens) + len(ids) > budget.tokens:
                    close()
                tokens += ids
                images += views
                given += [no_target] * len(ids)
                patches += area
                continue
            start = 0  # of what is left of the text: to copy the rest for every piece would take quadratic time
            while len(tokens) + len(ids) - start > budget.tokens:
                room = budget.tokens - len(tokens)
                tokens += ids[start : start + room]
                given += [no_target] * room
                start += room
                close()
            tokens += ids[start:]
            given += [no_target] * (len(ids) - start)
        close()
        # A piece without a target but <eos> is left out: it would teach that a document ends behind any image.
        taught = [p for p in pieces if (p.targets(self.tokenizer.image) & (p.tokens[1:] != self.tokenizer.eos)).any()]
        if not taught:
            raise Unreadable("no text to learn beside its images", record.shard)
        return taught
