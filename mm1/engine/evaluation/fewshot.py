"""Make few-shot prompts: layouts, shots that resemble the query, images of two resolutions, majority votes.

Prompts that begin with the same shots share pages of the prefix cache and image features: the Engine computes the
shots once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mm1.engine.data.batch import packed_views
from mm1.engine.data.codecs import codec_of
from mm1.engine.data.document import Document, document_of, joined_texts
from mm1.engine.data.record import Media, View, view_digest
from mm1.engine.evaluation.features import FeatureStore, fingerprint
from mm1.engine.evaluation.vqa import normalize
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import several
from mm1.engine.infer.prompts import Prompt, interleave, last_text, tokenizer_of, with_views
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1 import MM1

if TYPE_CHECKING:
    from PIL import Image

    from mm1.engine.data.images import ImagePolicy

MARKERS = ("answer is", "Answer:")


def caption(image: "Image.Image") -> "tuple[Image.Image, str]":
    """Return MM1's prompt for a caption."""
    return image, " A photo of"


def question(image: "Image.Image", text: str) -> "tuple[Image.Image, str]":
    """Return MM1's prompt for a short answer."""
    return image, f" Question: {text} Short answer:"


def multiple_choice(
    images: "Sequence[Image.Image]", text: str, options: Sequence[str] = ()
) -> "list[str | Image.Image]":
    """Return a prompt with lettered options in the layout of ScienceQA (Lu et al. 2022).

    Without options it has the layout of `question`. Each `<image>` in text and options is replaced by the next image;
    images without a mark come before the text, and marks beyond the number of images are text.
    """
    shown = " ".join(f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options))
    asked = f" Question: {text}\nOptions: {shown}\nAnswer:" if options else f" Question: {text} Short answer:"
    (parts,) = interleave([asked if images else asked.lstrip()], images, strict=False)
    return parts


@dataclass(frozen=True, eq=False)
class Shot:
    """Hold a question, images and texts in reading order, and its answer."""

    parts: "tuple[str | Image.Image, ...]"
    answer: str

    @property
    def shown(self) -> "tuple[str | Image.Image, ...]":
        """Return the parts, the answer and a line break, as they are in a prompt."""
        answer = f" {' '.join(self.answer.split())}\n"
        *before, last = self.parts
        return (*before, last + answer) if isinstance(last, str) else (*before, last, answer)

    @property
    def text(self) -> "Shot":
        """Return the shot without its images, for Flamingo's "zero-shot" prompts (Alayrac et al. 2022)."""
        return Shot(tuple(part.lstrip() for part in self.parts if isinstance(part, str)), self.answer)


def few_shot(shots: Iterable[Shot], query: Prompt) -> "list[str | Media | Image.Image]":
    """Return the prompt of all shots with their answers, then the query."""
    return [part for shot in shots for part in shot.shown] + list(query)


Piece = list["str | list[View]"]  # part of a prompt, with the views of its images, which many prompts can share


def piece(model: MM1, parts: Prompt, policy: "ImagePolicy | None" = None) -> Piece:
    """Return prompt parts with each image resized to its views, by the model's own policy unless one is passed."""
    return with_views(policy or codec_of(model.config), parts)


def joined(model: MM1, pieces: Iterable[Piece]) -> tuple[Document, str]:
    """Return the document of a prompt made of the pieces, and its last text. Adjacent texts are encoded as one."""
    parts = joined_texts(part for piece in pieces for part in piece)
    return document_of(tokenizer_of(model), model.config.images.slots, parts), last_text(parts)


def encode_mixed(
    model: MM1, parts: Prompt, last: int, *, high: "ImagePolicy | None" = None, low: "ImagePolicy | None" = None
) -> Document:
    """Encode a prompt with its last `last` images in high resolution and the images before them in low resolution.

    high: policy of these last images; None for the model's own. low: policy of the other images; None for `high`
    without sub-images. In a prompt of a fine-tuned MM1 the last images then have 5 · 144 tokens each, and those of the
    shots 144.
    """
    high = high or codec_of(model.config)
    low = low or replace(high, parts=1)
    following = sum(not isinstance(part, str) for part in parts)  # images from this part on
    pieces = []
    for part in parts:
        pieces.append(piece(model, [part], high if following <= last else low))
        following -= not isinstance(part, str)
    return joined(model, pieces)[0]


class Retrieval:
    """Find the images that resemble a query: cosine similarity of the encoder's mean output (RICES, Yang et al. 2022).

    features: float32 [N, Dv], one row of norm 1 for each image of the pool, in its order. encoded: number of images
    that the encoder has processed, without those in the cache.
    """

    def __init__(self, model: MM1, images: "Iterable[Image.Image]", *, batch: int = 32, folder: Path | None = None):
        """Encode the pool `images`, `batch` at a time.

        folder: of a FeatureStore, whose features are not computed again. Raises UserError if it is none.
        """
        self.model, self.policy, self.batch, self.encoded = model, codec_of(model.config), batch, 0
        self.cache: dict[bytes, np.ndarray] = {}
        if folder is None:
            self.digests, self.features = self._encode(images)
            return
        kind = {"model": fingerprint(model), "features": "mean of the vision encoder's output, of norm 1"}
        with FeatureStore(folder, kind, model.config.vision.width) as store:
            rows = store.rows().numpy()
            self.cache = {digest: rows[first] for digest, (first, _) in store.images.items()}
            self.digests, self.features = self._encode(images)
            store.add({digest: x[None] for digest, x in self.cache.items() if digest not in store.images})

    def nearest(self, images: "Iterable[Image.Image]", n: int) -> list[list[int]]:
        """Return for each query image the indices of the n most similar pool images, the most similar last.

        An image of the same content as the query is left out.
        """
        neighbours = []
        for digest, feature in zip(*self._encode(images)):
            order = np.argsort(-(self.features @ feature), kind="stable").tolist()
            neighbours.append([i for i in order if self.digests[i] != digest][:n][::-1])
        return neighbours

    def _encode(self, images: "Iterable[Image.Image]") -> tuple[list[bytes], np.ndarray]:
        """Return the images' digests and features float32 [N, Dv] of norm 1. Those in the cache are not computed."""
        views, digests = map(self.policy.resize, images), []
        while chunk := list(islice(views, self.batch)):
            names = [view_digest(View("image", view)) for view in chunk]
            missing = {name: view for name, view in zip(names, chunk) if name not in self.cache}
            if missing:
                self.cache.update(zip(missing, self._encode_views(list(missing.values()))))
                self.encoded += len(missing)
            digests += names
        width = self.model.config.vision.width
        return digests, np.array([self.cache[digest] for digest in digests], np.float32).reshape(-1, width)

    @torch.inference_mode()
    def _encode_views(self, views: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features float32 [N, Dv] of resized images uint8 [H, W, 3]."""
        pixels, grids = packed_views(views, self.policy.patch)
        device = self.model.decoder.embedding.weight.device
        features = self.model.vision(pixels.to(device), grids.to(device)).float()
        means = [x.mean(0) for x in features.split([h * w for h, w in grids.sizes or ()])]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1).cpu().numpy()


class Vote(NamedTuple):
    """Hold the result of a vote: the winning answer, normalized; the share of texts with this answer; all texts."""

    answer: str
    share: float
    texts: list[str]


def vote(
    engine: Engine, prompt: Prompt | Document, samples: int, *, temperature: float = 0.7, max_tokens: int = 256,
    stop: Sequence[str] = (), seed: int = 0, markers: Sequence[str] = MARKERS,
) -> Vote:  # fmt: skip
    """Sample `samples` chains of thought and return the answer that most of them end with (Wang et al. 2022).

    The chains share the prompt's pages; chain i draws with seed + i.
    """
    sampling = Sampling(max_tokens, temperature, stop=stop, seed=seed)
    return majority([request.text for request in several(engine, prompt, samples, sampling)], markers)


def majority(texts: Sequence[str], markers: Sequence[str] = MARKERS) -> Vote:
    """Return the answer that most of the texts end with, the first one in a tie.

    Answers are compared as VQA compares them (`normalize`). A text that ends without an answer has no vote, but counts
    in the share.
    """
    votes = Counter(answer for text in texts if (answer := normalize(final_answer(text, markers))))
    winner, count = votes.most_common(1)[0] if votes else ("", 0)
    return Vote(winner, count / max(len(texts), 1), list(texts))


def final_answer(text: str, markers: Sequence[str] = MARKERS) -> str:
    """Return the rest of the line after the last marker, or the last line if no marker occurs. Case is ignored."""
    lower = text.lower()
    ends = [start + len(m) for m in markers if (start := lower.rfind(m.lower())) >= 0]
    rest = text[max(ends) :] if ends else (text.strip().splitlines() or [""])[-1]
    line = (rest.strip().splitlines() or [""])[0]
    return line.strip(" .:")
