"""Define the packed Batch, in which data enters a model in training and in benchmarks of it."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import EMPTY_IMAGE, View
from mm1.kernels.linear_cross_entropy import IGNORED
from mm1.kernels.patches.grids import Grids, moved_to

TENSORS = ("tokens", "targets", "positions", "cu_seqlens", "target_rows", "prefix", "plain")


@dataclass(frozen=True)
class PackedMedia:
    """Hold the N views of a batch, all of one kind, one after the other."""

    kind: str
    values: Tensor  # [ΣHW, C], view after view in the order of grids, row by row; of images uint8 pixels [ΣHW, 3]
    grids: Grids
    slots: Tensor  # int64 [N·n], the token row of each slot, T for absent views

    def to(self, device: torch.device | str) -> "PackedMedia":
        """Copy to a GPU from pinned memory, without waiting."""
        return PackedMedia(
            self.kind, moved_to(self.values, device), self.grids.to(device), moved_to(self.slots, device)
        )


@dataclass(frozen=True)
class Batch:
    """Hold B documents in T packed tokens with N views of media; rows after the last of each are padding.

    In a batch of images alone, documents are images and tokens are their patches, whose values are in media: tokens,
    targets and positions are empty.
    """

    tokens: Tensor  # int32 [T]
    targets: Tensor  # int32 [T], the next token, -100 where there is no loss: media, prompts, padding
    positions: Tensor  # int32 [T], position inside the document
    cu_seqlens: Tensor  # int32 [B+1], B ≥ 1
    longest: int  # tokens of the longest document
    media: PackedMedia
    target_rows: Tensor  # int64 [target_count], rows with a target: the output head computes only these; -1: padding
    target_count: int
    used_tokens: int  # tokens without padding
    digest: int  # CRC-32 of tokens and media, which shows whether data changed
    keys: tuple[str, ...]  # the origin of each document
    prefix: Tensor | None = None  # int32 [B], of images: leading patches that all patches of the image see
    plain: Tensor | None = None  # bool [P], of images: patches of a single colour

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a GPU from pinned memory, without waiting."""
        moved = {name: moved_to(x, device) for name, x in self._tensors()}
        return replace(self, **moved, media=self.media.to(device))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that this stream uses the tensors, if they were made on another."""
        media = self.media
        for x in (*dict(self._tensors()).values(), media.values, media.slots, *media.grids.tensors):
            x.record_stream(stream)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, x) for name in TENSORS if (x := getattr(self, name)) is not None)


def exact_budget(documents: Sequence[Document], patch: int) -> Budget:
    """Return the budget that exactly holds these documents, for batches without padding."""
    return Budget(
        tokens=sum(len(d.tokens) for d in documents),
        media=sum(len(d.media) for d in documents),
        patches=sum(d.patches(patch) for d in documents),
        documents=len(documents),
    )


def packed_views(
    views: Sequence[np.ndarray], patch: int, empty: np.ndarray = EMPTY_IMAGE.values, **options: Any
) -> tuple[Tensor, Grids]:
    """Return the values of views [H, W, C] end to end as one tensor [ΣHW, C], and their grids in patches.

    empty: values without rows, of the C and dtype to return where there are no views. options: passed to Grids.
    """
    rows = [np.ascontiguousarray(x).reshape(-1, x.shape[-1]) for x in views] or [empty.reshape(-1, empty.shape[-1])]
    sizes = [(x.shape[0] // patch, x.shape[1] // patch) for x in views]
    return torch.from_numpy(np.concatenate(rows)), Grids(sizes, **options)


def pack(
    documents: Sequence[Document], budget: Budget, *, image_id: int, patch: int, slots: int, empty: View = EMPTY_IMAGE
) -> Batch:
    """Return documents end to end as one batch of the budget's size.

    image_id: the token in each of a view's `slots` places. empty: a view without values, of the kind, channels and
    dtype of all others. Raises ValueError if the documents exceed the budget or their views are of another kind.
    """
    lengths = [len(d.tokens) for d in documents]
    views = [view for d in documents for view in d.media]
    used = sum(lengths)
    if used > budget.tokens or len(documents) > budget.documents:
        raise ValueError(f"pack: {len(documents)} documents of {used} tokens exceed {budget}")
    if other := next((view for view in views if view.kind != empty.kind), None):
        raise ValueError(f"pack: media of kind {other.kind!r}, expected {empty.kind!r}: a batch has one kind of media")
    tokens = np.zeros(budget.tokens, np.int32)
    targets = np.full(budget.tokens, IGNORED, np.int32)
    positions = np.zeros(budget.tokens, np.int32)
    ends = np.cumsum(lengths)
    for document, end, length in zip(documents, ends, lengths):
        rows = slice(end - length, end)
        tokens[rows] = document.tokens
        positions[rows] = np.arange(length)
        targets[end - length : end - 1] = np.where(document.targets(image_id), document.tokens[1:], IGNORED)
    slot_rows = np.full(budget.media * slots, budget.tokens, np.int64)
    media_rows = np.flatnonzero(tokens[:used] == image_id)
    if len(media_rows) != len(views) * slots:
        raise ValueError(
            f"pack: {len(media_rows)} {empty.kind} tokens, expected {slots} for each of {len(views)} views"
        )
    rows_with_target = np.flatnonzero(targets != IGNORED)
    # The encoder takes the views in order of their size, because equal ones side by side run as one batch.
    arrays = [view.values for view in views]
    by_size = sorted(range(len(arrays)), key=lambda i: (arrays[i].size, arrays[i].shape))
    slot_rows[: len(media_rows)] = media_rows.reshape(len(arrays), slots)[by_size].ravel()
    values, grids = packed_views(
        [arrays[i] for i in by_size], patch, empty.values, images=budget.media, patches=budget.patches,
        longest=budget.max_patches,
    )  # fmt: skip
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.tensor([0, *(ends if documents else [0])], dtype=torch.int32),
        longest=max(lengths, default=0),
        media=PackedMedia(empty.kind, values, grids, torch.from_numpy(slot_rows)),
        target_rows=torch.from_numpy(rows_with_target),
        target_count=len(rows_with_target),
        used_tokens=used,
        digest=zlib.crc32(values.numpy().data, zlib.crc32(tokens.data)),
        keys=tuple(d.key for d in documents),
    )


def next_patch_rows(sizes: Sequence[tuple[int, int]], prefixes: Sequence[int]) -> np.ndarray:
    """Return the rows int64 [R] of packed images from which the next patch is predicted.

    These are rows S - 1 … K - 2 of an image of K = h · w patches with a prefix of S, which predict patches S … K - 1. A
    prefix of 0 has the rows of a prefix of 1. Raises ValueError for a prefix that leaves no target in an image of
    several patches.
    """
    rows, first = [np.zeros(0, np.int64)], 0
    for i, ((h, w), prefix) in enumerate(zip(sizes, prefixes, strict=True)):
        patches = h * w
        if not 0 <= prefix <= max(patches - 1, 1):
            raise ValueError(f"image {i} of {patches} patches has a prefix of {prefix}, expected 0 to {patches - 1}")
        rows.append(np.arange(first + max(prefix, 1) - 1, first + patches - 1))
        first += patches
    return np.concatenate(rows)


def pack_images(documents: Sequence[Document], budget: Budget, *, patch: int, empty: View = EMPTY_IMAGE) -> Batch:
    """Return images end to end as one batch of the budget's size, for a model that takes images alone.

    Each document is one view, whose patches are its tokens and whose prefix is its prompt. Equal grids and prefixes are
    neighbours, because a CPU computes the attention of equal ones as a batch. Target rows are padded to the budget's.
    Raises ValueError if the images or their targets exceed the budget.
    """
    order = sorted(documents, key=lambda d: (len(d.tokens), d.media[0].values.shape, _prefix(d)))
    views, prefixes = [d.media[0].values for d in order], [_prefix(d) for d in order]
    values, grids = packed_views(
        views, patch, empty.values, images=budget.media, patches=budget.patches, longest=budget.max_patches
    )
    rows = next_patch_rows(grids.sizes or (), prefixes)
    padding = 0 if budget.target_rows is None else budget.target_rows - len(rows)
    if padding < 0:
        raise ValueError(f"pack_images: {len(rows)} targets exceed {budget}")
    none, prefix = torch.zeros(0, dtype=torch.int32), torch.tensor(prefixes, dtype=torch.int32)
    ends = np.cumsum([len(d.tokens) for d in order] or [0])
    plain = np.zeros(budget.patches, bool)
    plain[: ends[-1]] = np.concatenate([plain_patches(view, patch) for view in views] or [plain[:0]])
    return Batch(
        tokens=none,
        targets=none,
        positions=none,
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        longest=max((len(d.tokens) for d in order), default=0),
        media=PackedMedia(empty.kind, values, grids, none.long()),
        target_rows=torch.from_numpy(np.pad(rows, (0, padding), constant_values=-1)),
        target_count=len(rows),
        used_tokens=int(ends[-1]),
        digest=zlib.crc32(values.numpy().data, zlib.crc32(prefix.numpy().data)),
        keys=tuple(d.key for d in order),
        prefix=prefix,
        plain=torch.from_numpy(plain),
    )


def plain_patches(view: np.ndarray, patch: int) -> np.ndarray:
    """Return bool [h·w], True for each patch of an image [h · patch, w · patch, C] that has a single colour."""
    height, width, channels = view.shape
    patches = view.reshape(height // patch, patch, width // patch, patch, channels)
    return (patches == patches[:, :1, :, :1]).all((1, 3, 4)).ravel()


def _prefix(image: Document) -> int:
    """Return the number of leading patches of an image that are never a target."""
    return 0 if image.prompt_mask is None else int(image.prompt_mask.sum())
