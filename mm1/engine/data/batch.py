"""The packed Batch: the only form in which data enters the model, for training, evaluation and prefill."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.document import Budget, Document
from mm1.kernels.linear_cross_entropy import IGNORED
from mm1.kernels.patches.grids import Grids, moved_to

TENSORS = ("tokens", "targets", "positions", "cu_seqlens", "pixels", "image_slots", "target_rows")


@dataclass(frozen=True)
class Batch:
    """B documents in T packed tokens with N images; what lies past the last of each is padding."""

    tokens: Tensor  # int32 [T]
    targets: Tensor  # int32 [T], the next token, -100 where there is no loss: images, what is given, padding
    positions: Tensor  # int32 [T], place inside its document
    cu_seqlens: Tensor  # int32 [B+1]; documents past the last are empty
    pixels: Tensor  # uint8 [ΣHW, 3], image after image in the order of grids, row by row
    grids: Grids
    image_slots: Tensor  # int64 [N·n], the token row of each image token, T for absent images
    target_rows: Tensor  # int64 [target_count], rows with a target: the head sees no others
    target_count: int
    used_tokens: int  # of T
    digest: int  # CRC-32 of tokens and pixels: tells whether data changed
    keys: tuple[str, ...]  # where each document came from

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a GPU from pinned memory, without waiting."""
        moved = {name: moved_to(getattr(self, name), device) for name in TENSORS}
        return replace(self, **moved, grids=self.grids.to(device))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that this stream uses the tensors, if they were made on another."""
        for x in (*(getattr(self, name) for name in TENSORS), *self.grids.tensors):
            x.record_stream(stream)


def exact_budget(documents: Sequence[Document], patch: int) -> Budget:
    """Return the budget that holds just these documents, for evaluation and prompts."""
    return Budget(
        tokens=sum(len(d.tokens) for d in documents),
        images=sum(len(d.images) for d in documents),
        patches=sum(d.patches(patch) for d in documents),
        documents=len(documents),
    )


def pack(documents: Sequence[Document], budget: Budget, *, image_id: int, patch: int, slots: int) -> Batch:
    """Lay documents end to end. Raises ValueError if they exceed the budget."""
    lengths = [len(d.tokens) for d in documents]
    images = [image for d in documents for image in d.images]
    used = sum(lengths)
    if used > budget.tokens or len(documents) > budget.documents:
        raise ValueError(f"pack: {len(documents)} documents of {used} tokens exceed {budget}")
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
    image_slots = np.full(budget.images * slots, budget.tokens, np.int64)
    found = np.flatnonzero(tokens[:used] == image_id)
    if len(found) != len(images) * slots:
        raise ValueError(f"pack: {len(found)} image tokens for {len(images)} images of {slots}")
    rows_with_target = np.flatnonzero(targets != IGNORED)
    # The encoder takes the images in order of their size, because equal ones side by side run as one batch.
    by_size = sorted(range(len(images)), key=lambda i: (images[i].size, images[i].shape))
    image_slots[: len(found)] = found.reshape(-1, slots)[by_size].ravel()
    pixels = [np.ascontiguousarray(images[i]).reshape(-1, 3) for i in by_size]
    sizes = [(images[i].shape[0] // patch, images[i].shape[1] // patch) for i in by_size]
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        pixels=torch.from_numpy(np.concatenate(pixels) if pixels else np.zeros((0, 3), np.uint8)),
        grids=Grids(sizes, images=budget.images, patches=budget.patches, longest=budget.longest),
        image_slots=torch.from_numpy(image_slots),
        target_rows=torch.from_numpy(rows_with_target),
        target_count=len(rows_with_target),
        used_tokens=int(cu_seqlens[-1]),
        digest=reduce(lambda crc, array: zlib.crc32(array.data, crc), pixels, zlib.crc32(tokens.data)),
        keys=tuple(d.key for d in documents),
    )
