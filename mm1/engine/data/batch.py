"""Define the packed Batch, in which data enters a model in training and in benchmarks of it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import NO_IMAGE, View
from mm1.kernels.linear_cross_entropy import IGNORED
from mm1.kernels.patches.grids import Grids, moved_to

TENSORS = ("tokens", "targets", "positions", "cu_seqlens", "target_rows")


@dataclass(frozen=True)
class PackedMedia:
    """The N views of a batch, all of one kind, one after the other."""

    kind: str
    values: Tensor  # [ΣHW, C], view after view in the order of grids, row by row; of images uint8 pixels [ΣHW, 3]
    grids: Grids
    slots: Tensor  # int64 [N·n], the token row of each slot, T for views that are absent

    def to(self, device: torch.device | str) -> "PackedMedia":
        """Copy to a GPU from pinned memory, without waiting."""
        return PackedMedia(
            self.kind, moved_to(self.values, device), self.grids.to(device), moved_to(self.slots, device)
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors."""
        return self.values, self.slots, *self.grids.tensors


@dataclass(frozen=True)
class Batch:
    """B documents in T packed tokens with N views of media; rows after the last of each are padding."""

    tokens: Tensor  # int32 [T]
    targets: Tensor  # int32 [T], the next token, -100 where there is no loss: media, prompts, padding
    positions: Tensor  # int32 [T], place inside its document
    cu_seqlens: Tensor  # int32 [B+1]; documents past the last are empty
    media: PackedMedia
    target_rows: Tensor  # int64 [target_count], rows with a target: the head sees no others
    target_count: int
    used_tokens: int  # of T
    digest: int  # CRC-32 of tokens and media: tells whether data changed
    keys: tuple[str, ...]  # the origin of each document

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a GPU from pinned memory, without waiting."""
        moved = {name: moved_to(getattr(self, name), device) for name in TENSORS}
        return replace(self, **moved, media=self.media.to(device))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that this stream uses the tensors, if they were made on another."""
        for x in (*(getattr(self, name) for name in TENSORS), *self.media.tensors):
            x.record_stream(stream)


def exact_budget(documents: Sequence[Document], patch: int) -> Budget:
    """Return the budget that holds just these documents, for evaluation and prompts."""
    return Budget(
        tokens=sum(len(d.tokens) for d in documents),
        media=sum(len(d.media) for d in documents),
        patches=sum(d.patches(patch) for d in documents),
        documents=len(documents),
    )


def pack(
    documents: Sequence[Document], budget: Budget, *, image_id: int, patch: int, slots: int, empty: View = NO_IMAGE
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
        raise ValueError(f"pack: media of kind {other.kind!r}, expected {empty.kind!r}")
    tokens = np.zeros(budget.tokens, np.int32)
    targets = np.full(budget.tokens, IGNORED, np.int32)
    positions = np.zeros(budget.tokens, np.int32)
    ends = np.cumsum(lengths)
    for document, end, length in zip(documents, ends, lengths):
        rows = slice(end - length, end)
        tokens[rows] = document.tokens
        positions[rows] = np.arange(length)
        targets[end - length : end - 1] = np.where(document.targets(image_id), document.tokens[1:], IGNORED)
    cu_seqlens = np.full(budget.documents + 1, used, np.int32)
    cu_seqlens[: len(documents) + 1] = np.concatenate([[0], ends])
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
    channels = empty.values.shape[2]
    values = [np.ascontiguousarray(arrays[i]).reshape(-1, channels) for i in by_size]
    sizes = [(arrays[i].shape[0] // patch, arrays[i].shape[1] // patch) for i in by_size]
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        media=PackedMedia(
            empty.kind,
            torch.from_numpy(np.concatenate([*values, empty.values.reshape(-1, channels)])),
            Grids(sizes, images=budget.media, patches=budget.patches, longest=budget.longest),
            torch.from_numpy(slot_rows),
        ),
        target_rows=torch.from_numpy(rows_with_target),
        target_count=len(rows_with_target),
        used_tokens=int(cu_seqlens[-1]),
        digest=reduce(lambda crc, array: zlib.crc32(array.data, crc), values, zlib.crc32(tokens.data)),
        keys=tuple(d.key for d in documents),
    )
