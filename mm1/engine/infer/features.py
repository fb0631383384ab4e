"""Encode media when their rows of a prompt are due, and cache the features.

The cache finds features by a view's digest, a hash of its kind and values, so that requests with the same views share
them. The least recently used features are evicted when the cache exceeds a number of bytes.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.batch import packed_views
from mm1.engine.data.record import View
from mm1.engine.infer.request import Request
from mm1.engine.models.spec import LanguageModel


class Features:
    """Hold features [n, D] of views by their digests.

    patches: limit of patches that one call encodes, except for a single view that has more; max_bytes: of the cache.
    """

    def __init__(self, model: LanguageModel, patches: int, max_bytes: int):
        self.model, self.patches, self.max_bytes = model, patches, max_bytes
        self.cached: OrderedDict[bytes, Tensor] = OrderedDict()  # the least recently used first
        self.bytes = 0
        self.encoded = 0  # views that were encoded since the beginning

    def rows(self, requests: Sequence[Request]) -> tuple[np.ndarray, Tensor] | None:
        """Return the indices of media among all rows that are due, int64 [rows], and their features [rows, D].

        Return None where no row of a medium is due. If the views have more patches than one call encodes, `due` is
        lowered for the requests whose views are encoded in a later call, to 0 if necessary.
        """
        features: dict[bytes, Tensor] = {}
        missing: dict[bytes, View] = {}
        patch, patches = self.model.config.images.patch, self.patches
        for request in requests:
            first, last = request.media_range(request.computed, request.computed + request.due)
            for i in range(first, last):
                digest, view = request.digests[i], request.document.media[i]
                cached = request.features.get(digest, self.cached.get(digest))
                if cached is not None:
                    features[digest] = cached
                elif digest not in missing:
                    size = view.patches(patch)
                    if missing and size > patches:
                        request.due = max(int(request.media_rows[i * request.slots]) - request.computed, 0)
                        break
                    missing[digest], patches = view, patches - size
        features.update(self._encode(missing))
        self._cache(features)
        return self._gather(requests, features)

    def _gather(self, requests: Sequence[Request], features: dict[bytes, Tensor]) -> tuple[np.ndarray, Tensor] | None:
        places, parts, offset = [], [], 0
        for request in requests:
            start, end = request.computed, request.computed + request.due
            first, last = request.media_range(start, end)
            begin, stop = np.searchsorted(request.media_rows, [start, end]).tolist()  # the due rows among media_rows
            digests = request.digests[first:last]
            if digests:
                skipped = begin - first * request.slots  # rows of the first view before `start`
                parts.append(torch.cat([features[digest] for digest in digests])[skipped : skipped + stop - begin])
                places.append(request.media_rows[begin:stop] + (offset - start))
            # The features of a view with rows in the next step are kept until then, even if the cache evicts them.
            unfinished = digests and stop < last * request.slots
            request.features = {digests[-1]: features[digests[-1]]} if unfinished else {}
            offset += request.due
        return (np.concatenate(places), torch.cat(parts)) if places else None

    def _encode(self, missing: dict[bytes, View]) -> dict[bytes, Tensor]:
        """Encode views in one call, with equal sizes next to each other."""
        if not missing:
            return {}
        order = sorted(missing, key=lambda digest: missing[digest].values.shape)
        device = self.model.decoder.embedding.weight.device
        values, grids = packed_views(
            [missing[digest].values for digest in order], self.model.config.images.patch, device=device
        )
        encoded = self.model.encode(values.to(device), grids).unflatten(0, (len(order), -1))
        self.encoded += len(order)
        return {digest: x.clone() for digest, x in zip(order, encoded.unbind())}  # copies: none keeps the others alive

    def _cache(self, features: dict[bytes, Tensor]) -> None:
        """Add features as the most recently used ones, and evict until max_bytes are not exceeded."""
        for digest, x in features.items():
            self.bytes += 0 if digest in self.cached else x.nbytes
            self.cached[digest] = x
            self.cached.move_to_end(digest)
        while self.bytes > self.max_bytes:
            _, x = self.cached.popitem(last=False)
            self.bytes -= x.nbytes

    def clear(self) -> None:
        """Drop all features."""
        self.cached.clear()
        self.bytes = 0
