"""Few-shot prompts of benchmarks: chooses the shots, and encodes shots and query as a document."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mm1.engine.data.codecs import codec_of
from mm1.engine.data.document import Document
from mm1.engine.evaluation.benchmarks import Benchmark
from mm1.engine.evaluation.fewshot import Piece, Retrieval, joined, piece
from mm1.engine.evaluation.samples import Key, Picture, Sample, picture
from mm1.engine.infer.prompts import continued, tokenizer_of
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError, at_least

CHOICES = ("random", "fixed", "similar")
CACHED = 1 << 30  # bytes of shots' pixels
SPARE = 64  # extra candidates, in place of shots that cannot be read or show the query's image


@dataclass(frozen=True)
class How:
    """Settings of shots: how they are chosen and shown.

    choose: "random" for each query, "fixed" for all queries, or "similar": those whose images are most like the
    query's, one of each image. text_shots: zero-shot prompts begin with two shots without their images, as Flamingo's
    do and MM1's do not. high: number of a prompt's last images that have sub-images (None: all).
    """

    choose: str = "random"
    seed: int = 0
    text_shots: bool = False
    high: int | None = None

    def __post_init__(self):
        if self.choose not in CHOICES:
            raise UserError(f"choose is {self.choose!r}, expected one of {', '.join(CHOICES)}")
        at_least(0, high=self.high)


class Asked(NamedTuple):
    """Holds a prompt, the continuations to choose from as tokens, and the keys of its shots."""

    document: Document
    continuations: list[list[int]]
    shots: list[Key]


class Prompts:
    """Makes documents of shots and a query. Shots are cached, so that each is read and resized once."""

    def __init__(self, model: MM1, benchmark: Benchmark, pool: Sequence[Sample], how: How, features: Path):
        self.model, self.benchmark, self.pool, self.how, self.features = model, benchmark, pool, how, features
        self.high = codec_of(model.config)
        self.low = self.high if how.high is None else replace(self.high, parts=1)
        self.retrieval: Retrieval | None = None
        self.candidates: list[int] = []  # numbers in the pool of the shots that `retrieval` has
        self.near: dict[Picture, list[int]] = {}  # numbers of shots that resemble an image, the most similar last
        self.unreadable: dict[Picture, str] = {}  # images of shots, and why they cannot be read
        shots = CACHED // self.high.max_bytes
        self.piece = lru_cache(shots)(self._piece)

    def check(self, n: int, samples: Sequence[Sample]) -> None:
        """Raise UserError if there are fewer than n shots; find similar shots of these samples if they are wanted."""
        n = n or 2 * self.how.text_shots
        if n and len({sample.images or sample.key for sample in self.pool}) <= n:
            raise UserError(f"{len(self.pool)} answered samples to draw shots from, expected over {n}")
        if not n or self.how.choose != "similar":
            return
        first = {sample.image: i for i, sample in reversed(list(enumerate(self.pool))) if sample.image}
        shots, queries = [], []
        self.retrieval = self.retrieval or Retrieval(
            self.model, _readable(first, shots, self.unreadable), file=self.features
        )
        self.candidates = self.candidates or [first[path] for path in shots]
        images = (sample.image for sample in samples if sample.image)
        near = self.retrieval.nearest(_readable(images, queries, {}), n)
        self.near = {path: [self.candidates[i] for i in of] for path, of in zip(queries, near)}

    def seeded(self, n: int) -> bool:
        """Return whether prompts of n shots depend on the seed."""
        return bool(n or self.how.text_shots) and self.how.choose != "similar"

    def ask(self, n: int, sample: Sample, seed: int | None = None) -> Asked | str:
        """Return the prompt of n shots, or the reason why the query's image cannot be read.

        seed: of random shots (default: that of `how`). Raises UserError if too few shots can be read.
        """
        try:
            images = [picture(where) for where in sample.images]
        except UserError as error:
            return str(error)
        bare = n == 0 and self.how.text_shots
        n = 2 if bare else n
        pieces, keys, own = [], [], set(sample.images)
        for i in self._order(sample, n, self.how.seed if seed is None else seed):
            if len(keys) == n:
                break
            last = self.how.high is None or n - len(keys) < self.how.high
            shot = self.pool[i]
            if shot != sample and own.isdisjoint(shot.images) and (found := self.piece(i, bare, last)):
                pieces.append(found)
                keys.append(shot.key)
        if len(keys) < n:
            raise UserError(f"{sample.key}: {len(keys)} readable shots, expected {n}")
        last = self.how.high is None or self.how.high > 0
        query = self.benchmark.query(sample, images)
        document, end = joined(self.model, [*pieces, piece(self.model, query, self.high if last else self.low)])
        texts = self.benchmark.continuations(sample)
        return Asked(*continued(tokenizer_of(self.model), document, end, texts), keys)

    def _order(self, sample: Sample, n: int, seed: int) -> Sequence[int]:
        """Return the numbers of candidates for shots in order, with SPARE more than n."""
        if not n:
            return []
        if self.how.choose == "similar":
            if sample.image in self.near:
                return self.near[sample.image]
            seed = 0  # a query without an image gets random shots
        draw = random.Random(seed if self.how.choose == "fixed" else f"{seed} {sample.key}")
        return draw.sample(range(len(self.pool)), min(len(self.pool), n + SPARE))

    def _piece(self, i: int, bare: bool, high: bool) -> Piece | None:
        """Encode a shot; None if an image of it cannot be read."""
        sample = self.pool[i]
        images = []
        for where in sample.images:
            try:
                images.append(picture(where))
            except UserError as error:
                self.unreadable[where] = str(error)
                return None
        shot = self.benchmark.shot(sample, images)
        return piece(self.model, (shot.text if bare else shot).shown, self.high if high else self.low)


def _readable(paths: Iterable[Picture], found: list[Picture], missed: dict[Picture, str]) -> Iterator[Any]:
    """Yield each readable image once. Add its place to `found`; add places of others with the reason to `missed`."""
    for path in dict.fromkeys(paths):
        try:
            image = picture(path)
        except UserError as error:
            missed[path] = str(error)
            continue
        found.append(path)
        yield image
