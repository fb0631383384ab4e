"""Make the streams of packed batches of a run, which its processes read in turn."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.augment import ImageEncoder
from mm1.engine.data.batch import Batch, pack_images
from mm1.engine.data.codecs import codec_of
from mm1.engine.data.config import Source as SourceSettings
from mm1.engine.data.document import Budget, DocumentEncoder
from mm1.engine.data.identity import differences, identity, mean_length
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import BUFFER, Loader
from mm1.engine.data.quarantine import Quarantine
from mm1.engine.data.sources import KINDS, Source, open_source
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.errors import UserError, require

if TYPE_CHECKING:
    from mm1.engine.data.images import ImagePolicy
    from mm1.engine.run_config import Run

FILL_BATCHES, MIN_FILL = 20, 0.5  # a smaller mean fill of a process's first FILL_BATCHES batches gives a warning
SETTINGS = {"media": "images", "patches": "patches", "documents": "documents"}  # budgets other than tokens -> settings
IMAGES_ALONE = "images"  # the kind of data of models that take images alone, and only of them
NO_TOKEN = -1  # an id that no token has
BAD_RECORDS, MAX_BAD = 100, 0.05  # a larger share of bad records gives a warning after BAD_RECORDS records
log = logging.getLogger(__name__)


class Streams:
    """Yield the micro-batches of one process. The run's i-th one is made by packer i mod S for process i mod R.

    The batches of a run therefore do not depend on R, as long as R divides S and the micro-batches of a step.
    identity: the values that determine the run's data (see identity.py). warn: called once if sequences stay half
    empty, and once if many records are bad. length: the budget by which a sequence's length is set: "tokens", or
    "patches" of a model that takes images alone.
    """

    def __init__(
        self, loaders: Mapping[int, Loader], streams: int, rank: int = 0, ranks: int = 1, *,
        identity: dict[str, Any] | None = None, quarantine: Quarantine | None = None,
        warn: Callable[[str], None] = lambda message: None, length: str = "tokens",
    ):  # fmt: skip
        self.length, self.loaders, self.streams, self.rank, self.ranks = length, loaders, streams, rank, ranks
        self.identity, self.quarantine, self.warn = identity or {}, quarantine or Quarantine(None), warn
        self.taken = 0  # micro-batches that all processes have taken
        self._shares: list[dict[str, float]] = []  # shares of the budgets used by this process's first batches
        self._warned_of_bad = False

    def __next__(self) -> Batch:
        loader = self.loaders[(self.taken + self.rank) % self.streams]
        batch = next(loader)
        self.taken += self.ranks
        if len(self._shares) < FILL_BATCHES:
            self._shares.append(loader.shares)
            if len(self._shares) == FILL_BATCHES:
                self._check_fill()
        if not self._warned_of_bad and self.drawn >= BAD_RECORDS and self.skipped > MAX_BAD * self.drawn:
            self._warned_of_bad = True
            self._warn_of_bad()
        return batch

    @property
    def budget(self) -> Budget:
        """Return the limits of one packed sequence."""
        return next(iter(self.loaders.values())).budget

    @property
    def skipped(self) -> int:
        """Return the number of bad records that this process has drawn, with repetitions."""
        return sum(loader.skipped for loader in self.loaders.values())

    @property
    def drawn(self) -> int:
        """Return the number of records that this process has drawn, including bad ones."""
        return sum(loader.drawn for loader in self.loaders.values())

    def _check_fill(self) -> None:
        """Warn if the first batches are less than half full, and name the budget that limits them."""
        fill = sum(shares["tokens"] for shares in self._shares) / FILL_BATCHES
        if fill >= MIN_FILL:
            return
        # The length cannot be the limit: a document of half a sequence fits into a batch that is not half full.
        others = [name for name in SETTINGS if name != self.length]
        fullest = Counter(max(others, key=lambda name: shares[name]) for shares in self._shares)
        name = fullest.most_common(1)[0][0]
        setting, budget = f"data.{SETTINGS[name]}", self.budget
        self.warn(
            f"the first {FILL_BATCHES} sequences hold {fill:.0%} of data.{self.length} ({budget.tokens}); {setting} "
            f"({getattr(budget, name)}) is used up first: raise {setting} or lower data.{self.length}"
        )

    def _warn_of_bad(self) -> None:
        message = f"{self.skipped} of {self.drawn} records ({self.skipped / self.drawn:.0%}) could not be used"
        if summary := self.quarantine.summary():
            reason, count = next(iter(summary.items()))
            example = next(record for record in self.quarantine.records() if record["reason"] == reason)
            message += f"; most frequent, of {count} different ones: {reason} ({example['shard']}: {example['key']})"
            message += f"; all are listed in {self.quarantine.folder}"
        self.warn(message)

    def close(self) -> None:
        """End the threads and processes that decode in advance."""
        for loader in self.loaders.values():
            loader.close()

    def state(self) -> dict[str, Any]:
        """Return the states of this process's packers by their numbers, for checkpoints."""
        return {"taken": self.taken, "streams": {str(i): loader.state() for i, loader in self.loaders.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after a state of all processes (see merged)."""
        self.taken = state["taken"]
        for i, loader in self.loaders.items():
            loader.restore(state["streams"][str(i)])


def make_streams(
    run: "Run", tokenizer: TextTokenizer | None, quarantine: Path | None, warn: Callable[[str], None] = print,
    rank: int = 0, ranks: int = 1, count: int = 0, before: dict[str, Any] | None = None,
) -> Streams:  # fmt: skip
    """Return the packed batches of the run's sources for one of `ranks` processes.

    tokenizer: None for a model that takes images alone. quarantine: folder of the lists of bad records. count: number
    of packers of the run that is resumed, 0 for a new run. before: identity of the data of the resumed run; if the data
    are the same, its mean lengths mix the sources instead of new estimates. Raises UserError for sources or settings
    that cannot be used.
    """
    d, m, t = run.data, run.model.images, run.train
    if rank:  # only the first process warns
        warn = lambda message: None  # noqa: E731
    if count and d.streams not in (0, count):
        raise UserError(f"setting data.streams is {d.streams}, expected {count} as in the checkpoint, or 0")
    count = count or d.streams or (4 * ranks if ranks > 1 else 1)
    for name, number in (("data.streams", count), ("train.accumulate", t.accumulate)):
        if number % ranks:
            raise UserError(f"setting {name} is {number}, expected a multiple of the {ranks} processes that take data")
    codec = codec_of(run.model)
    budget, length = budget_of(run, codec), "patches" if tokenizer is None else "tokens"
    buffer = d.buffer or BUFFER * budget.tokens
    if buffer < budget.tokens:
        warn(f"setting data.buffer is {buffer} {length}, less than a sequence: {budget.tokens} are used")
        buffer = budget.tokens
    for i, setting in enumerate(d.sources):
        kinds = [kind for kind in KINDS if (kind == IMAGES_ALONE) == (tokenizer is None)]
        name = f"setting data.sources[{i}].kind"
        require(setting.kind in kinds, name, setting.kind, f"{' or '.join(kinds)} for a model of kind {run.model.kind}")
    if tokenizer is None:
        assert m.draws is not None
        encode, image_id, make_batch = ImageEncoder(codec, m.draws), NO_TOKEN, partial(pack_images, patch=m.patch)
    else:
        encode, image_id, make_batch = DocumentEncoder(tokenizer, codec, m.slots, budget), tokenizer.image, None
    sources = [_opened(i, setting) for i, setting in enumerate(d.sources)]
    names = [mean_length(i) for i in range(len(sources))]
    lengths = [before[name] for name in names] if before and before.keys() >= {*names} else None
    mixture = Mixture(sources, [source.weight for source in d.sources], encode, t.seed, lengths)
    if tokenizer and not d.documents:  # a quarter more than fit of the source with the shortest ones
        shortest = min(mixture.mean_lengths)
        budget = replace(budget, documents=max(budget.documents, math.ceil(1.25 * d.tokens / shortest)))
    values = identity(run, tokenizer, budget, buffer, count, sources, mixture.mean_lengths)
    if lengths and before and differences(before, values):
        return make_streams(run, tokenizer, quarantine, warn, rank, ranks, count)
    damage = [file for source in sources for file in source.damage]
    for shard, reason in damage:
        warn(f"{shard}: {reason}")
    listed = Quarantine(quarantine, rank)
    loaders = {
        i: Loader(
            mixture, budget, image_id=image_id, patch=m.patch, slots=m.slots, buffer=buffer,
            workers=d.workers, max_bad=d.max_bad, quarantine=listed, damage=damage if i == 0 else (), first=i,
            stride=count, empty=codec.empty, make_batch=make_batch,
        )
        for i in range(rank, count, ranks)
    }  # fmt: skip
    # tokens for a weight of 1
    drawn = t.steps * t.accumulate * budget.tokens / sum(source.weight for source in d.sources)
    for setting, source, mean in zip(d.sources, sources, mixture.mean_lengths):
        log.info(
            "indexed %s: %d records in %d files, read for about %.3g epochs", setting.kind, len(source),
            len(source.files), drawn * setting.weight / (len(source) * mean),
        )  # fmt: skip
        if ignored := source.ignored:
            log.info("ignored in %s: %s", setting.kind, ignored)
    return Streams(loaders, count, rank, ranks, identity=values, quarantine=listed, warn=warn, length=length)


def budget_of(run: "Run", codec: "ImagePolicy") -> Budget:
    """Return the limits of a packed sequence, as far as they do not depend on the documents.

    Raises UserError if no image fits.
    """
    d, m, alone = run.data, run.model.images, not run.model.vocabulary
    patches = d.patches or d.images * codec.max_patches
    needed = {"images": (d.images, codec.max_views), "patches": (patches, codec.max_views * codec.max_patches)}
    if not alone:
        needed["tokens"] = (d.tokens, codec.max_views * m.slots + 2)
    for name, (size, least) in needed.items():
        if size < least:
            raise UserError(f"setting data.{name} is {size}, too few for one {codec.kind}, expected {least} or more")
    return Budget(
        tokens=patches if alone else d.tokens,
        media=d.images,
        patches=patches,
        documents=d.images if alone else d.documents or max(1, d.tokens // 16),
        max_patches=codec.max_patches,
        target_rows=m.draws.target_rows(patches, codec.max_patches) if m.draws else None,
    )


def _opened(number: int, setting: SourceSettings) -> Source:
    try:
        return open_source(setting.kind, setting.paths, Path.cwd())
    except UserError as error:
        raise UserError(f"setting data.sources[{number}]: {error}") from None


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all processes."""
    return {"taken": states[0]["taken"], "streams": {i: s for state in states for i, s in state["streams"].items()}}
