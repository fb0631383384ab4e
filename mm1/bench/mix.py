"""Draw random documents in the proportions of MM1's training (section 4 of the paper), and pack or pad them.

Of all tokens, 45 % are in captions with their image, 45 % in documents of images and texts, 10 % in texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from mm1.engine.data.batch import Batch, pack
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import View, max_patches
from mm1.engine.layers.workload import Workload
from mm1.engine.models.mm1_config import MM1Config
from mm1.kernels.linear_cross_entropy import IGNORED

PAD, BOS, EOS, IMAGE = range(4)  # token ids that do not occur in texts
SHARES = {"captions": 0.45, "interleaved": 0.45, "text": 0.1}  # shares of tokens
TEXT = (20, 61)  # range of the number of text tokens for each image
IMAGES = (2, 6)  # range of the number of images in an interleaved document

Documents = Sequence[Document]
Layout = Callable[[Documents], list[Batch]]


def documents(c: MM1Config, tokens: int, seed: int) -> list[Document]:
    """Return random documents of `tokens` tokens together, or as many fewer as are too few for one more caption."""
    draw, kinds = np.random.default_rng(seed), list(SHARES)
    counts = dict.fromkeys(kinds, 0)  # tokens by kind
    drawn: list[Document] = []
    while True:
        kind = min(kinds, key=lambda kind: counts[kind] / SHARES[kind])
        document = _document(c, tokens, kind, draw)
        if sum(counts.values()) + len(document.tokens) <= tokens:
            counts[kind] += len(document.tokens)
            drawn.append(document)
        elif kind == "captions":
            return drawn
        else:
            kinds = ["captions"]


def _document(c: MM1Config, tokens: int, kind: str, draw: np.random.Generator) -> Document:
    images = {"captions": 1, "interleaved": int(draw.integers(*IMAGES)), "text": 0}[kind]
    parts = [np.array([BOS])]
    for _ in range(max(images, 1)):
        length = draw.integers(*(TEXT if images else (tokens // 16, tokens // 4)))
        parts += [np.full(c.connector.tokens, IMAGE)] * (images > 0)
        parts.append(draw.integers(EOS + 2, c.decoder.vocabulary, length))
    row = np.concatenate([*parts, [EOS]]).astype(np.int32)
    return Document(row, tuple(View("image", _image(c, draw)) for _ in range(images)), kind)


def _image(c: MM1Config, draw: np.random.Generator) -> np.ndarray:
    p = c.vision.patch
    h = w = c.image_size // p
    if c.image_mode == "native":
        side = math.isqrt(c.image_patches)
        h = int(draw.integers(max(1, side // 2), side * 3 // 2 + 1))
        w = int(draw.integers(max(1, side // 2), c.image_patches // h + 1))
    return draw.integers(0, 256, (h * p, w * p, 3), dtype=np.uint8)


def packed(c: MM1Config, sets: Sequence[Documents], tokens: int) -> Layout:
    """Return a layout that packs a set of documents into one batch. sets: all sets that must fit into its budget."""
    budget = _budget(c, sets, tokens)
    # The documents are sorted as by the loader, so that equal lengths run as one batch.
    return lambda docs: [_pack(c, sorted(docs, key=lambda d: len(d.tokens)), budget)]


def padded(c: MM1Config, tokens: int) -> Layout:
    """Return a layout that pads documents to the longest of a set, in batches of at most `tokens` rows."""

    def layout(docs: Documents) -> list[Batch]:
        longest = max(len(d.tokens) for d in docs)
        count = math.ceil(len(docs) / max(1, tokens // longest))
        cuts = [i * len(docs) // count for i in range(count + 1)]
        return [_padded(c, docs[begin:end], longest) for begin, end in pairwise(cuts)]

    return layout


def _padded(c: MM1Config, docs: Documents, longest: int) -> Batch:
    rows = [np.pad(d.tokens, (0, longest - len(d.tokens)), constant_values=PAD) for d in docs]
    full = [replace(d, tokens=row) for d, row in zip(docs, rows)]
    batch = _pack(c, full, _budget(c, [full], len(full) * longest))
    targets = torch.where(batch.targets == PAD, IGNORED, batch.targets)
    rows = (targets != IGNORED).nonzero()[:, 0]
    return replace(batch, targets=targets, target_rows=rows, target_count=len(rows))


def load_of_padded(docs: Documents, batches: Sequence[Batch]) -> Workload:
    """Return the workload of documents that are computed in padded batches."""
    tokens, longest = sum(len(batch.tokens) for batch in batches), int(batches[0].cu_seqlens[1])
    return Workload(
        documents=[len(d.tokens) for d in docs],
        grids=[size for batch in batches for size in batch.media.grids.sizes or ()],
        targets=sum(batch.target_count for batch in batches),
        tokens=tokens,
        images=sum(batch.media.grids.images for batch in batches),
        patches=sum(batch.media.grids.patches for batch in batches),
        computed_pairs=tokens * (longest + 1) // 2,
        computed_expert_rows=tokens,
    )


def _budget(c: MM1Config, parts: Sequence[Documents], tokens: int) -> Budget:
    """Return the smallest budget that holds each part."""
    return Budget(
        tokens=tokens,
        media=max(sum(len(d.media) for d in docs) for docs in parts),
        patches=max(sum(d.patches(c.vision.patch) for d in docs) for docs in parts),
        documents=max(map(len, parts)),
        max_patches=max_patches(c.images),
    )


def _pack(c: MM1Config, docs: Documents, budget: Budget) -> Batch:
    return pack(docs, budget, image_id=IMAGE, patch=c.vision.patch, slots=c.connector.tokens)
