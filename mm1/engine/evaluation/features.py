"""Keep frozen features of images in a folder, so that each image is encoded once for a model, a layer and a mask.

    features/<16 hex digits of the settings>/settings.json    what determines the features, beside the image
                                             rows             float32 [P, D], image after image
                                             index            40 bytes an image: SHA-256 of its pixels, number of rows

Both files only grow; an image counts once its rows are on the disk and its entry in the index is whole. Opening a store
discards what a kill or a full disk left after that.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.record import View, view_digest
from mm1.engine.models.spec import Model
from mm1.engine.train import safety
from mm1.errors import UserError

ENTRY = np.dtype([("digest", "V32"), ("rows", "<i8")])
Encode = Callable[[list[np.ndarray]], Sequence[Sequence[np.ndarray]]]


class FeatureStore:
    """Open the features of one kind in a folder, for this process alone.

    settings: JSON values that determine the features; width: their columns. images: digest -> (first row, rows). Raises
    UserError for files that are no store, and while another process has it open.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], width: int):
        text = json.dumps({**settings, "width": width}, sort_keys=True, indent=1)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.width, self.images, self.end = width, dict[bytes, tuple[int, int]](), 0
        with ExitStack() as stack:
            try:
                stack.enter_context(safety.locked(self.folder))
                self._open(text)
            except UserError:
                raise
            except (OSError, ValueError) as error:
                raise UserError(f"{self.folder} is not a folder of image features: {error}") from None
            self.closing = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.close()

    def _open(self, text: str) -> None:
        """Read the index, and discard entries without rows and rows without an entry."""
        settings, rows, index = (self.folder / name for name in ("settings.json", "rows", "index"))
        if not settings.exists():
            partial = settings.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(settings)
        if settings.read_text() != text:
            raise ValueError("settings.json has other settings")
        rows.touch()
        index.touch()
        whole = index.stat().st_size // ENTRY.itemsize
        entries = np.fromfile(index, ENTRY, whole)
        ends = np.cumsum(entries["rows"])
        stored = rows.stat().st_size // (4 * self.width)
        if len(entries) and (entries["rows"].min() < 1 or not np.all(np.diff(ends) > 0)):
            raise ValueError("index has an image without rows")
        kept = int(np.searchsorted(ends, stored, side="right"))
        self.end = int(ends[kept - 1]) if kept else 0
        os.truncate(index, kept * ENTRY.itemsize)
        os.truncate(rows, 4 * self.end * self.width)
        firsts = (ends - entries["rows"])[:kept].tolist()
        digests = [bytes(digest) for digest in entries["digest"][:kept]]
        self.images = dict(zip(digests, zip(firsts, entries["rows"][:kept].tolist())))

    def add(self, features: Mapping[bytes, np.ndarray]) -> None:
        """Append the features [K, D] of images by digest. After a kill all of them are there, or the first of them.

        Raises ValueError for other shapes, and OSError, such as of a full disk, after which the store is as before.
        """
        for rows in features.values():
            if rows.ndim != 2 or rows.shape[1] != self.width or not len(rows):
                raise ValueError(f"FeatureStore: features are {list(rows.shape)}, expected [K, {self.width}]")
        entries = np.array([(np.void(digest), len(rows)) for digest, rows in features.items()], ENTRY)
        with (self.folder / "rows").open("r+b") as file:
            file.seek(4 * self.width * self.end)  # over what a failed call left
            for rows in features.values():
                file.write(np.ascontiguousarray(rows, np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())
        with (self.folder / "index").open("r+b") as file:
            file.seek(ENTRY.itemsize * len(self.images))
            file.write(entries.tobytes())
        for digest, rows in features.items():
            self.images[digest] = (self.end, len(rows))
            self.end += len(rows)

    def rows(self) -> Tensor:
        """Return all rows float32 [P, D], mapped into memory; writing into them does not change the file."""
        if not self.end:
            return torch.zeros(0, self.width)
        shape = (self.end, self.width)
        return torch.from_numpy(np.memmap(self.folder / "rows", np.float32, "c", shape=shape))


def encode_missing(
    stores: Sequence[FeatureStore], views: Sequence[View], encode: Encode, patches: int, patch: int
) -> list[bytes]:
    """Return the digests of views, after encoding those that a store lacks.

    encode: returns for each store the features [K, D] of each of several pixels uint8 [H, W, 3]; patches: limit of
    patches of `patch` pixels for a call, except for a single view that has more.
    """
    digests = [view_digest(view) for view in views]
    unique = dict(zip(digests, views))
    batches, size = list[dict[bytes, np.ndarray]](), patches
    for digest, view in unique.items():
        if all(digest in store.images for store in stores):
            continue
        if size + view.patches(patch) > patches:
            batches.append({})
            size = 0
        batches[-1][digest], size = view.values, size + view.patches(patch)
    for batch in batches:
        for store, features in zip(stores, encode(list(batch.values())), strict=True):
            store.add({digest: x for digest, x in zip(batch, features) if digest not in store.images})
    return digests


def fingerprint(model: Model) -> str:
    """Return 16 hexadecimal digits that identify the weights.

    Only the first 1,024 values of each parameter are hashed, because a training step changes all values.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode() + weight.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
