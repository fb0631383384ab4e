"""Features of images: encoded when the rows of a prompt that show them are due, and kept by content.

What requests have in common is encoded once. Features that were used longest ago are dropped when all together have
more than so many bytes.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm1.engine.infer.request import Request
from mm1.engine.models.mm1 import MM1
from mm1.kernels.patches.grids import Grids


class Features:
    """Holds features [n, D] of images by their digests.

    patches: that one call encodes at most, but for one image that has more; most: bytes that are kept.
    """

    def __init__(self, model: MM1, patches: int, most: int):
        self.model, self.patches, self.most = model, patches, most
        self.known: OrderedDict[bytes, Tensor] = OrderedDict()  # used last last
        self.bytes = self.encoded = 0  # encoded: images, since the beginning

    def rows(self, requests: Sequence[Request]) -> tuple[np.ndarray, Tensor] | None:
        """Return the rows that images have among all that are due of these prompts, int64, and features [rows, D].

        It returns None where no image is due. Where the images are more than one call encodes, it lowers `due` of the
        requests that have to wait for the next, to 0 if need be.
        """
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, np.ndarray] = {}
        patch, left = self.model.config.vision.patch, self.patches
        for request in requests:
            first, last = request.images(request.computed, request.computed + request.due)
            for i in range(first, last):
                digest, image = request.digests[i], request.document.images[i]
                kept = request.features.get(digest, self.known.get(digest))
                if kept is not None:
                    found[digest] = kept
                elif digest not in missing:
                    size = image.shape[0] * image.shape[1] // patch**2
                    if missing and size > left:
                        request.due = max(int(request.places[i * request.slots]) - request.computed, 0)
                        break
                    missing[digest], left = image, left - size
        found.update(self._encode(missing))
        self._keep(found)
        return self._gather(requests, found)

    def _gather(self, requests: Sequence[Request], found: dict[bytes, Tensor]) -> tuple[np.ndarray, Tensor] | None:
        places, parts, offset = [], [], 0
        for request in requests:
            start, end = request.computed, request.computed + request.due
            first, last = request.images(start, end)
            begin, stop = np.searchsorted(request.places, [start, end]).tolist()  # its rows among those of all images
            shown = [request.digests[i] for i in range(first, last)]
            if shown:
                skipped = begin - first * request.slots  # rows of the first image before `start`
                parts.append(torch.cat([found[digest] for digest in shown])[skipped : skipped + stop - begin])
                places.append(request.places[begin:stop] + (offset - start))
            # An image that goes on in the next step is kept for it, whatever else is encoded until then.
            again = shown and stop < last * request.slots
            request.features = {shown[-1]: found[shown[-1]]} if again else {}
            offset += request.due
        return (np.concatenate(places), torch.cat(parts)) if places else None

    def _encode(self, missing: dict[bytes, np.ndarray]) -> dict[bytes, Tensor]:
        """Encode images together, equal sizes side by side."""
        if not missing:
            return {}
        order = sorted(missing, key=lambda digest: missing[digest].shape)
        images, patch = [missing[digest] for digest in order], self.model.config.vision.patch
        device = self.model.decoder.embedding.weight.device
        pixels = np.concatenate([np.ascontiguousarray(image).reshape(-1, 3) for image in images])
        grids = Grids([(h // patch, w // patch) for h, w, _ in (image.shape for image in images)], device=device)
        encoded = self.model.encode(torch.from_numpy(pixels).to(device), grids).unflatten(0, (len(images), -1))
        self.encoded += len(images)
        return {digest: x.clone() for digest, x in zip(order, encoded.unbind())}  # none holds the others

    def _keep(self, found: dict[bytes, Tensor]) -> None:
        """Keep these as the last that were used, and drop what is too much."""
        for digest, x in found.items():
            self.bytes += 0 if digest in self.known else x.nbytes
            self.known[digest] = x
            self.known.move_to_end(digest)
        while self.bytes > self.most:
            _, x = self.known.popitem(last=False)
            self.bytes -= x.nbytes

    def forget(self) -> None:
        self.known.clear()
        self.bytes = 0
