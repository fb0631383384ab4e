"""Few-shot prompts: their layouts, shots that resemble the query, images of two resolutions, majority votes.

Prompts that begin with the same shots share their pages and image features in the Engine: it computes the shots once.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mm1.engine.data.document import Document, document_of, joined_texts
from mm1.engine.data.record import Media, View, view_digest
from mm1.engine.evaluation.vqa import normalize
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import several
from mm1.engine.infer.prompts import Prompt, interleave, last_text, policy_of, tokenizer_of, with_views
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids

if TYPE_CHECKING:
    from PIL import Image

    from mm1.engine.data.images import ImagePolicy

MARKERS = ("answer is", "Answer:")


def caption(image: "Image.Image") -> "tuple[Image.Image, str]":
    """MM1's prompt for a caption."""
    return image, " A photo of"


def question(image: "Image.Image", text: str) -> "tuple[Image.Image, str]":
    """MM1's prompt for a short answer."""
    return image, f" Question: {text} Short answer:"


def multiple_choice(
    images: "Sequence[Image.Image]", text: str, options: Sequence[str] = ()
) -> "list[str | Image.Image]":
    """A question with its options, in the layout of ScienceQA (Lu et al. 2022); without options in that of `question`.

    `<image>` marks in text and options where images stand; images without a mark stand before the text, and marks
    beyond the number of images are text.
    """
    shown = " ".join(f"({letter}) {option}" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options))
    asked = f" Question: {text}\nOptions: {shown}\nAnswer:" if options else f" Question: {text} Short answer:"
    (parts,) = interleave([asked if images else asked.lstrip()], images, strict=False)
    return parts


@dataclass(frozen=True, eq=False)
class Shot:
    """A prompt, images and texts in reading order, whose answer is known."""

    parts: "tuple[str | Image.Image, ...]"
    answer: str

    @property
    def shown(self) -> "tuple[str | Image.Image, ...]":
        """With its answer, as it stands in a prompt."""
        said = f" {' '.join(self.answer.split())}\n"
        *before, last = self.parts
        return (*before, last + said) if isinstance(last, str) else (*before, last, said)

    @property
    def text(self) -> "Shot":
        """Without its images: what Flamingo's "zero-shot" prompts begin with two of (Alayrac et al. 2022)."""
        return Shot(tuple(part.lstrip() for part in self.parts if isinstance(part, str)), self.answer)


def few_shot(shots: Iterable[Shot], query: Prompt) -> "list[str | Media | Image.Image]":
    return [part for shot in shots for part in shot.shown] + list(query)


Piece = list["str | list[View]"]  # part of a prompt with the views of its images, which serves in many prompts


def piece(model: MM1, parts: Prompt, policy: "ImagePolicy | None" = None) -> Piece:
    """policy: how images become patches, if not as the model was trained."""
    return with_views(policy or policy_of(model), parts)


def joined(model: MM1, pieces: Iterable[Piece]) -> tuple[Document, str]:
    """Return a prompt and its last text. Texts of adjacent pieces are encoded as one."""
    parts = joined_texts(part for piece in pieces for part in piece)
    return document_of(tokenizer_of(model), model.config.connector.tokens, parts), last_text(parts)


def encode_mixed(
    model: MM1, parts: Prompt, last: int, *, high: "ImagePolicy | None" = None, low: "ImagePolicy | None" = None
) -> Document:
    """The last `last` images by the policy `high`, those before by `low`.

    Default: high is the model's own, low the same without sub-images, so that of a fine-tuned MM1 only the last images
    take 5 · 144 tokens and the shots 144 each.
    """
    high = high or policy_of(model)
    low = low or replace(high, parts=1)
    left = sum(not isinstance(part, str) for part in parts)
    pieces = []
    for part in parts:
        pieces.append(piece(model, [part], high if left <= last else low))
        left -= not isinstance(part, str)
    return joined(model, pieces)[0]


class Retrieval:
    """Images by likeness: cosine of the mean output of the model's own encoder (RICES, Yang et al. 2022)."""

    def __init__(self, model: MM1, images: "Iterable[Image.Image]", *, batch: int = 32, file: Path | None = None):
        """batch: images encoded at once. file: of features by content, which is read and added to.

        Features of other weights in `file` are replaced.
        """
        self.model, self.policy, self.batch = model, policy_of(model), batch
        weights = fingerprint(model)
        self.known = _read_features(file, weights) if file else {}
        before = len(self.known)
        self.digests, self.features = self._of(images)
        if file and len(self.known) > before:
            _write_features(file, weights, self.known)

    def nearest(self, images: "Iterable[Image.Image]", n: int) -> list[list[int]]:
        """For each of these the numbers of the n images most like it, the most alike last; never itself."""
        found = []
        for digest, feature in zip(*self._of(images)):
            likeness = self.features @ feature
            order = np.argsort(-likeness, kind="stable").tolist()
            found.append([i for i in order if self.digests[i] != digest][:n][::-1])
        return found

    def _of(self, images: "Iterable[Image.Image]") -> tuple[list[bytes], np.ndarray]:
        """Digests, and features float32 [N, Dv] of length 1."""
        views, digests = map(self.policy.resize, images), []
        while some := list(islice(views, self.batch)):
            names = [view_digest(View("image", view)) for view in some]
            fresh = {name: view for name, view in zip(names, some) if name not in self.known}
            if fresh:
                self.known.update(zip(fresh, self._encoded(list(fresh.values()))))
            digests += names
        width = self.model.config.vision.width
        return digests, np.array([self.known[digest] for digest in digests], np.float32).reshape(-1, width)

    @torch.inference_mode()
    def _encoded(self, views: Sequence[np.ndarray]) -> np.ndarray:
        device, patch = self.model.decoder.embedding.weight.device, self.policy.patch
        sizes = [(view.shape[0] // patch, view.shape[1] // patch) for view in views]
        pixels = torch.from_numpy(np.concatenate([view.reshape(-1, 3) for view in views])).to(device)
        rows = self.model.vision(pixels, Grids(sizes, device=device)).float().split([h * w for h, w in sizes])
        return torch.nn.functional.normalize(torch.stack([x.mean(0) for x in rows]), dim=-1).cpu().numpy()


def fingerprint(model: MM1) -> str:
    """Of the weights: of the first values of each, because a training step changes all."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(name.encode() + weight.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _read_features(file: Path, weights: str) -> dict[bytes, np.ndarray]:
    if not file.exists():
        return {}
    try:
        with np.load(file) as held:
            if str(held["weights"]) != weights:
                return {}
            return {row.tobytes(): feature for row, feature in zip(held["digests"], held["features"], strict=True)}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a file of image features: {error}") from None


def _write_features(file: Path, weights: str, known: dict[bytes, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    digests = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), -1)
    with partial.open("wb") as out:
        np.savez(out, weights=np.array(weights), digests=digests, features=np.stack(list(known.values())))
    os.replace(partial, file)


class Vote(NamedTuple):
    answer: str  # normalised
    share: float  # of the samples
    texts: list[str]


def vote(
    engine: Engine, prompt: Prompt | Document, samples: int, *, temperature: float = 0.7, max_tokens: int = 256,
    stop: Sequence[str] = (), seed: int = 0, markers: Sequence[str] = MARKERS,
) -> Vote:  # fmt: skip
    """The answer that most of `samples` chains of thought end with; of equals the first (Wang et al. 2022).

    The chains share the prompt's pages; chain i draws with seed + i. One that ends with nothing has no vote.
    """
    how = Sampling(max_tokens, temperature, stop=stop, seed=seed)
    texts = [request.text for request in several(engine, prompt, samples, how)]
    votes = Counter(answer for text in texts if (answer := normalize(final_answer(text, markers))))
    winner, count = votes.most_common(1)[0] if votes else ("", 0)
    return Vote(winner, count / samples, texts)


def final_answer(text: str, markers: Sequence[str] = MARKERS) -> str:
    """What follows the last marker, in any case, to the end of its line; the last line if there is none."""
    lower = text.lower()
    ends = [at + len(m) for m in markers if (at := lower.rfind(m.lower())) >= 0]
    rest = text[max(ends) :] if ends else (text.strip().splitlines() or [""])[-1]
    line = (rest.strip().splitlines() or [""])[0]
    return line.strip(" .:")
