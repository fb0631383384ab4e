"""Make the few-shot prompts of benchmarks: choose the shots, and encode shots and query as a document."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mm1.engine.data.codecs import codec_of
from mm1.engine.data.document import Document
from mm1.engine.evaluation.benchmarks import Benchmark
from mm1.engine.evaluation.config import ShotSettings
from mm1.engine.evaluation.fewshot import Piece, Retrieval, joined, piece
from mm1.engine.evaluation.samples import Key, Picture, Sample, picture
from mm1.engine.infer.prompts import continued, tokenizer_of
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError

CACHED = 1 << 30  # bytes of shots' pixels
SPARE = 64  # extra candidates, which replace shots that cannot be read or show the query's image


class Asked(NamedTuple):
    """Hold a prompt, the continuations to choose from as tokens, and the keys of its shots."""

    document: Document
    continuations: list[list[int]]
    shots: list[Key]


class Prompts:
    """Make documents of shots and a query. Shots are cached, so that each is read and resized once."""

    def __init__(
        self, model: MM1, benchmark: Benchmark, pool: Sequence[Sample], settings: ShotSettings, features: Path
    ):
        self.model, self.benchmark, self.pool, self.features = model, benchmark, pool, features
        self.settings = settings
        self.high = codec_of(model.config)
        self.low = self.high if settings.high is None else replace(self.high, parts=1)
        self.retrieval: Retrieval | None = None
        self.candidates: list[int] = []  # numbers in the pool of the shots that `retrieval` has
        self.similar: dict[Picture, list[int]] = {}  # numbers of shots that resemble an image, the most similar last
        self.unreadable: dict[Picture, str] = {}  # images of shots, and why they cannot be read
        shots = CACHED // self.high.max_bytes
        self.piece = lru_cache(shots)(self._piece)

    def check(self, n: int, samples: Sequence[Sample]) -> None:
        """Find the shots of these samples if they are chosen by similarity. Raises UserError for fewer than n shots."""
        n = n or 2 * self.settings.text_shots
        if n and len({sample.images or sample.key for sample in self.pool}) <= n:
            raise UserError(f"{len(self.pool)} answered samples to draw shots from, expected over {n}")
        if not n or self.settings.choose != "similar":
            return
        first = {sample.image: i for i, sample in reversed(list(enumerate(self.pool))) if sample.image}
        shots, queries = [], []
        self.retrieval = self.retrieval or Retrieval(
            self.model, _readable(first, shots, self.unreadable), folder=self.features
        )
        self.candidates = self.candidates or [first[path] for path in shots]
        images = (sample.image for sample in samples if sample.image)
        nearest = self.retrieval.nearest(_readable(images, queries, {}), n)
        self.similar = {path: [self.candidates[i] for i in numbers] for path, numbers in zip(queries, nearest)}

    def seeded(self, n: int) -> bool:
        """Return whether prompts of n shots depend on the seed."""
        return bool(n or self.settings.text_shots) and self.settings.choose != "similar"

    def ask(self, n: int, sample: Sample, seed: int = 0) -> Asked | str:
        """Return the prompt of n shots, or the reason why the query's image cannot be read.

        seed: of random shots. Raises UserError if too few shots can be read.
        """
        try:
            images = [picture(where) for where in sample.images]
        except UserError as error:
            return str(error)
        text_only = n == 0 and self.settings.text_shots
        n = 2 if text_only else n
        high = math.inf if self.settings.high is None else self.settings.high  # of the last images
        pieces, keys, own = [], [], set(sample.images)
        for i in self._order(sample, n, seed):
            if len(keys) == n:
                break
            shot = self.pool[i]
            if shot == sample or not own.isdisjoint(shot.images):
                continue
            if shot_piece := self.piece(i, text_only, n - len(keys) < high):
                pieces.append(shot_piece)
                keys.append(shot.key)
        if len(keys) < n:
            raise UserError(f"{sample.key}: {len(keys)} readable shots, expected {n}")
        query = self.benchmark.query(sample, images)
        document, end = joined(self.model, [*pieces, piece(self.model, query, self.high if high > 0 else self.low)])
        texts = self.benchmark.continuations(sample)
        return Asked(*continued(tokenizer_of(self.model), document, end, texts), keys)

    def _order(self, sample: Sample, n: int, seed: int) -> Sequence[int]:
        """Return the numbers of candidates for shots in order, SPARE more than n."""
        if not n:
            return []
        if self.settings.choose == "similar":
            if sample.image in self.similar:
                return self.similar[sample.image]
            seed = 0  # a query without an image gets random shots
        draw = random.Random(seed if self.settings.choose == "fixed" else f"{seed} {sample.key}")
        return draw.sample(range(len(self.pool)), min(len(self.pool), n + SPARE))

    def _piece(self, i: int, text_only: bool, high: bool) -> Piece | None:
        """Encode shot i of the pool, with its sub-images if `high`; return None if an image of it cannot be read."""
        sample = self.pool[i]
        images = []
        for place in sample.images:
            try:
                images.append(picture(place))
            except UserError as error:
                self.unreadable[place] = str(error)
                return None
        shot = self.benchmark.shot(sample, images)
        return piece(self.model, (shot.text if text_only else shot).shown, self.high if high else self.low)


def _readable(places: Iterable[Picture], good: list[Picture], bad: dict[Picture, str]) -> Iterator[Any]:
    """Yield each readable image once. Add its place to `good`, and the place of another with the reason to `bad`."""
    for place in dict.fromkeys(places):
        try:
            image = picture(place)
        except UserError as error:
            bad[place] = str(error)
            continue
        good.append(place)
        yield image
