"""Define documents of tokens and views of media, made of records and of prompts, ready to pack.

This module imports no torch, so that loader processes start fast. PIL and tokenizers are imported with the first image
or text: a program that packs documents of ready tokens needs neither.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mm1.engine.data.codecs import Codec
from mm1.engine.data.record import Answer, Media, Record, View, view_digest
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.errors import Unreadable, UserError

DECODED_AHEAD = 64  # documents that a packer's thread, or each of its worker processes, decodes in advance


@dataclass(frozen=True)
class Document:
    """Hold tokens and the views of media among them.

    tokens: int32 [n], in which each view has its slots. media: the views in reading order. key: names the origin in
    logs. prompt_mask: bool [n], True for tokens that are never a target; None if there are none.
    """

    tokens: np.ndarray
    media: tuple[View, ...]
    key: str
    prompt_mask: np.ndarray | None = None

    @property
    def digests(self) -> list[bytes]:
        """Return the digest of each view. Digests are computed once: 5 MB of values take 4 ms."""
        cache = self.__dict__  # the lock of cached_property would let only one document at a time compute them
        if "_digests" not in cache:
            cache["_digests"] = [view_digest(view) for view in self.media]
        return cache["_digests"]

    def targets(self, image_id: int) -> np.ndarray:
        """Return bool [n - 1], True for each token after the first that is a target."""
        text = self.tokens[1:] != image_id
        return text if self.prompt_mask is None else text & ~self.prompt_mask[1:]

    def section(self, start: int, stop: int, image_id: int, slots: int) -> "Document":
        """Return tokens start to stop as a document; neither may lie inside the slots of a view.

        slots: tokens of one view; 0 for a model of text alone.
        """
        if start == 0 and stop == len(self.tokens):
            return self
        first, last = (int((self.tokens[:end] == image_id).sum()) // max(slots, 1) for end in (start, stop))
        key = f"{self.key}@{start}" if start else self.key
        mask = None if self.prompt_mask is None else self.prompt_mask[start:stop]
        return Document(self.tokens[start:stop], self.media[first:last], key, mask)

    def patches(self, patch: int) -> int:
        """Return the number of patches of all views."""
        return sum(view.patches(patch) for view in self.media)


@dataclass(frozen=True)
class Budget:
    """Hold the limits of one packed sequence. media and patches: of all views together."""

    tokens: int
    media: int
    patches: int
    documents: int
    max_patches: int | None = None  # patches of one view; None: only `patches` limits it
    target_rows: int | None = None  # targets of all images; None: not limited, and the head has no padding


class Unit(NamedTuple):
    """Hold the tokens of one part of a document, and the views in their slots. is_target: whether texts are learned."""

    ids: list[int]
    views: list[View]
    is_target: bool = True


def units_of(tokenizer: TextTokenizer, slots: int, parts: Sequence[str | list[View]]) -> list[Unit]:
    """Return <bos>, then each part: a text's tokens, with <eos> after an Answer, or `slots` tokens for each view.

    parts: texts, and for each medium the list of its views. Raises UserError for a text that cannot be encoded.
    """
    units = [Unit([tokenizer.bos], [])]
    for part in parts:
        if isinstance(part, str):
            units.append(Unit(tokenizer.encode(part) + [tokenizer.eos] * isinstance(part, Answer), []))
        elif not slots:
            kind = part[0].kind if part else "image"
            raise UserError(f"the record or prompt has media of kind {kind!r}, but the model takes text alone")
        else:
            units.append(Unit([tokenizer.image] * slots * len(part), part))
    return units


def document_of(
    tokenizer: TextTokenizer, slots: int, parts: Sequence[str | list[View]], key: str = "prompt"
) -> Document:
    """Return a prompt's parts as one document of any length, without <eos> at its end. Arguments as in units_of."""
    units = units_of(tokenizer, slots, parts)
    tokens = [token for unit in units for token in unit.ids]
    return Document(np.array(tokens, np.int32), tuple(view for unit in units for view in unit.views), key)


def joined_texts(parts: Iterable[Any]) -> list[Any]:
    """Return parts with adjacent texts joined, because many tokenizers begin a text with a space.

    Empty texts are dropped, and answers are not joined with other texts.
    """
    joined: list[Any] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str) and not isinstance(part, Answer)):
        run = list(group)
        joined += filter(None, ["".join(run)]) if is_text else run
    return joined


@dataclass(frozen=True)
class DocumentEncoder:
    """Encode records as documents for training: <bos>, the parts, <eos>, cut into pieces that fit the budget.

    In a record with answers each answer ends with <eos>, and nothing else is a target. slots: tokens of one view.
    """

    tokenizer: TextTokenizer
    codec: Codec
    slots: int
    budget: Budget

    def __call__(self, record: Record) -> list[Document]:
        """Return the record's documents, at least one. Raises Unreadable."""
        parts = [part if isinstance(part, str) else self._decoded(part, record) for part in record.parts]
        try:
            units = units_of(self.tokenizer, self.slots, parts)
        except UserError as error:  # a text that the tokenizer cannot encode
            raise Unreadable(str(error), record.shard) from None
        if any(isinstance(part, Answer) for part in parts):
            bos, *units = units
            units = [bos, *(u._replace(is_target=isinstance(part, Answer)) for part, u in zip(parts, units))]
        else:
            units.append(Unit([self.tokenizer.eos], []))
        return self.cut(units, record)

    def _decoded(self, medium: Media, record: Record) -> list[View]:
        if medium.kind != self.codec.kind:
            raise Unreadable(
                f"a medium of kind {medium.kind!r}, expected {self.codec.kind!r}: batches have one kind of media",
                record.shard,
            )
        return [View(medium.kind, values) for values in self.codec.views(self.codec.decode(medium.data))]

    def cut(self, units: Sequence[Unit], record: Record) -> list[Document]:
        """Return pieces of whole media and as much text as fits; the next piece begins with what does not fit.

        Raises Unreadable for a medium that is larger than the budget, and where no piece has a target.
        """
        pieces: list[Document] = []
        tokens: list[int] = []
        media: list[View] = []
        mask: list[bool] = []
        budget, patches = self.budget, 0  # patches: of the piece's media

        def close():
            nonlocal patches
            key = record.key if not pieces else f"{record.key}+{len(pieces)}"
            prompt_mask = np.array(mask) if any(mask) else None
            pieces.append(Document(np.array(tokens, np.int32), tuple(media), f"{record.shard}:{key}", prompt_mask))
            patches = 0
            for part in (tokens, media, mask):
                part.clear()

        for ids, views, is_target in units:
            area = sum(view.patches(self.codec.patch) for view in views)
            if views:
                if area > budget.patches or len(views) > budget.media or len(ids) > budget.tokens - 1:
                    size = f"one {self.codec.kind} of {len(views)} views and {area} patches"
                    raise Unreadable(f"{size} exceeds the packing budget", record.shard)
                full = len(media) + len(views) > budget.media or patches + area > budget.patches
                if full or len(tokens) + len(ids) > budget.tokens:
                    close()
            start = 0  # the rest of a text is not copied for every piece, which would take quadratic time
            while len(tokens) + len(ids) - start > budget.tokens:
                end = start + budget.tokens - len(tokens)
                tokens += ids[start:end]
                mask += [not is_target] * (end - start)
                start = end
                close()
            tokens += ids[start:]
            mask += [not is_target] * (len(ids) - start)
            media += views
            patches += area
        close()
        # A piece whose only target is <eos> is dropped: it would teach that a document ends after any image.
        image, eos = self.tokenizer.image, self.tokenizer.eos
        pieces = [piece for piece in pieces if (piece.targets(image) & (piece.tokens[1:] != eos)).any()]
        if not pieces:
            raise Unreadable("no target text besides its media", record.shard)
        return pieces
