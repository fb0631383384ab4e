"""Records into documents of tokens and images, ready to pack. Knows no torch: loader processes start fast.

Nor PIL and tokenizers before a text or an encoded image is met: who packs documents of ready tokens needs neither.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mm1.engine.data.record import Answer, Record
from mm1.engine.data.text_tokenizer import SPECIAL as SPECIAL
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.errors import Unreadable, UserError

if TYPE_CHECKING:
    from PIL import Image

    from mm1.engine.data.images import ImagePolicy

    Part = str | Image.Image | list[np.ndarray]  # a text, or an image, also as the views that it becomes

DECODED_AHEAD = 64  # documents that a packer's thread, or each of its worker processes, makes before they are wanted


@dataclass(frozen=True)
class Document:
    """tokens int32 [n], where each image holds its slots; images uint8 [H, W, 3] in order; where it came from; which
    tokens are no target, bool [n] or None."""

    tokens: np.ndarray
    images: tuple[np.ndarray, ...]
    key: str
    given: np.ndarray | None = None

    @property
    def digests(self) -> list[bytes]:
        """Return a name of each image by its content. Computed once: it takes 4 ms for 5 MB of pixels."""
        kept = self.__dict__  # cached_property would let one document at a time compute them
        if "_digests" not in kept:
            kept["_digests"] = [image_digest(image) for image in self.images]
        return kept["_digests"]

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


def image_digest(image: np.ndarray) -> bytes:
    """Return a name of an image's shape and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


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
        try:
            units, eos = self.units(parts), [self.tokenizer.eos]
        except UserError as error:  # a text that the tokenizer cannot encode
            raise Unreadable(str(error), record.shard) from None
        if not any(isinstance(part, Answer) for part in parts):
            return self._cut([*units, Unit(eos, [])], record)
        bos, *units = units
        ended = (Unit(u.ids + eos, []) if isinstance(part, Answer) else u._replace(given=True)
                 for part, u in zip(parts, units))  # fmt: skip
        return self._cut([bos, *ended], record)

    def prompt(self, parts: "Sequence[Part]") -> Document:
        """Return one document without an end, whatever the budget."""
        units = self.units(parts)
        tokens = [token for unit in units for token in unit.ids]
        return Document(np.array(tokens, np.int32), tuple(view for unit in units for view in unit.views), "prompt")

    def units(self, parts: "Sequence[Part]") -> list[Unit]:
        t = self.tokenizer
        units = [Unit([t.bos], [])]
        for part in parts:
            if isinstance(part, str):
                units.append(Unit(t.encode(part), []))
            else:
                views = part if isinstance(part, list) else self.policy.views(part)
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
