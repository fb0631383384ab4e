"""The streams of packed batches that the processes of a run take in turn."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.batch import Batch
from mm1.engine.data.config import Source as SourceSettings
from mm1.engine.data.document import Budget, DocumentEncoder, TextTokenizer
from mm1.engine.data.identity import differences, identity, mean_length
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import BUFFER, Loader
from mm1.engine.data.quarantine import Quarantine
from mm1.engine.data.sources import Source, open_source
from mm1.errors import UserError

if TYPE_CHECKING:
    from mm1.engine.run_config import Run

FIRST, HALF = 20, 0.5  # batches of a process after which a smaller mean fill is warned of
OTHERS = ("images", "patches", "documents")
FEW, BAD = 100, 0.05  # records drawn after which a larger share of bad ones is warned of
log = logging.getLogger(__name__)


class Streams:
    """The run's i-th micro-batch is of packer i mod S, and goes to process i mod R; here are those of one process.

    Which batches a run sees does therefore not depend on R, as long as R divides S and the micro-batches of a step.
    identity: the values that decide which data the run sees (see identity.py). warn: is told once if sequences stay
    half empty, and once if many records are bad.
    """

    def __init__(
        self, loaders: Mapping[int, Loader], streams: int, rank: int = 0, ranks: int = 1, *,
        identity: dict[str, Any] | None = None, quarantine: Quarantine | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ):  # fmt: skip
        self.loaders, self.streams, self.rank, self.ranks = loaders, streams, rank, ranks
        self.identity, self.quarantine, self.warn = identity or {}, quarantine or Quarantine(None), warn
        self.taken = 0  # micro-batches, by all processes
        self._shares: list[dict[str, float]] = []  # of the budgets, by each of this process's first batches
        self._bad_told = False

    def __next__(self) -> Batch:
        loader = self.loaders[(self.taken + self.rank) % self.streams]
        batch = next(loader)
        self.taken += self.ranks
        if len(self._shares) < FIRST:
            self._shares.append(loader.shares)
            if len(self._shares) == FIRST:
                self._check_fill()
        if not self._bad_told and self.drawn >= FEW and self.skipped > BAD * self.drawn:
            self._bad_told = True
            self._tell_bad()
        return batch

    @property
    def budget(self) -> Budget:
        return next(iter(self.loaders.values())).budget

    @property
    def skipped(self) -> int:
        """Return the number of bad records that this process drew, each as often as it came."""
        return sum(loader.skipped for loader in self.loaders.values())

    @property
    def drawn(self) -> int:
        """Return the number of records that this process drew, the bad ones among them."""
        return sum(loader.drawn for loader in self.loaders.values())

    def _check_fill(self) -> None:
        """Warn if the first batches are less than half full of tokens, naming the budget that most exhausted."""
        fill = sum(shares["tokens"] for shares in self._shares) / FIRST
        if fill >= HALF:
            return
        # Not the tokens: what is at most half a sequence fits beside what fills less than the other half.
        fullest = Counter(max(OTHERS, key=lambda name: shares[name]) for shares in self._shares)
        name = fullest.most_common(1)[0][0]
        self.warn(
            f"the first {FIRST} sequences hold {fill:.0%} of data.tokens ({self.budget.tokens}); data.{name} "
            f"({getattr(self.budget, name)}) is used up first: raise data.{name} or lower data.tokens"
        )

    def _tell_bad(self) -> None:
        message = f"{self.skipped} of {self.drawn} records ({self.skipped / self.drawn:.0%}) could not be used"
        if summary := self.quarantine.summary():
            reason, count = next(iter(summary.items()))
            example = next(record for record in self.quarantine.records() if record["reason"] == reason)
            message += f"; most frequent, of {count} different ones: {reason} ({example['shard']}: {example['key']})"
            message += f"; all are listed in {self.quarantine.folder}"
        self.warn(message)

    def close(self) -> None:
        """End what decodes ahead."""
        for loader in self.loaders.values():
            loader.close()

    def state(self) -> dict[str, Any]:
        """Return the states of this process's packers by their numbers."""
        return {"taken": self.taken, "streams": {str(i): loader.state() for i, loader in self.loaders.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        for i, loader in self.loaders.items():
            loader.restore(state["streams"][str(i)])


def make_streams(
    run: "Run", tokenizer: TextTokenizer, quarantine: Path | None, warn: Callable[[str], None] = print,
    rank: int = 0, ranks: int = 1, count: int = 0, before: dict[str, Any] | None = None,
) -> Streams:  # fmt: skip
    """Return packed batches of the run's sources, those of one of `ranks` processes.

    quarantine: folder of the lists of bad records. count: packers, if a run had them before. before: identity of the
    data in the checkpoint that is resumed; if these data are the same, its mean lengths mix the sources as they did, in
    place of new estimates. Raises UserError for whatever is wrong with the sources.
    """
    d, m, t = run.data, run.model, run.train
    if count and d.streams not in (0, count):
        raise UserError(f"setting data.streams is {d.streams}, expected {count} as in the checkpoint, or 0")
    count = count or d.streams or (4 * ranks if ranks > 1 else 1)
    for name, number in (("data.streams", count), ("train.accumulate", t.accumulate)):
        if number % ranks:
            raise UserError(f"setting {name} is {number}, expected a multiple of the {ranks} processes that take data")
    policy = ImagePolicy(m.vision.patch, m.image_mode, m.image_size, m.image_patches, m.image_parts)
    budget = Budget(
        tokens=d.tokens,
        images=d.images,
        patches=d.patches or d.images * policy.longest,
        documents=d.documents or max(1, d.tokens // 16),
        longest=policy.longest,
    )
    views = 1 if m.image_parts == 1 else 1 + m.image_parts**2
    for name, size, needed in (
        ("tokens", budget.tokens, views * m.connector.tokens + 2),
        ("images", budget.images, views),
        ("patches", budget.patches, views * policy.longest),
    ):
        if size < needed:
            raise UserError(f"setting data.{name} is {size}, too few for one image, expected {needed} or more")
    buffer = d.buffer or BUFFER * d.tokens
    if buffer < d.tokens:
        if rank == 0:
            warn(f"setting data.buffer is {buffer} tokens, less than a sequence: {d.tokens} are taken")
        buffer = d.tokens
    encode = DocumentEncoder(tokenizer, policy, m.connector.tokens, budget)
    sources = [_opened(i, setting) for i, setting in enumerate(d.sources)]
    names = [mean_length(i) for i in range(len(sources))]
    lengths = [before[name] for name in names] if before and before.keys() >= {*names} else None
    mixture = Mixture(sources, [source.weight for source in d.sources], encode, t.seed, lengths)
    if not d.documents:  # as many as there are of the source with the shortest ones, and a quarter more
        shortest = min(mixture.mean_lengths)
        budget = replace(budget, documents=max(budget.documents, math.ceil(1.25 * d.tokens / shortest)))
    values = identity(run, tokenizer, budget, buffer, count, sources, mixture.mean_lengths)
    if lengths and before and differences(before, values):
        return make_streams(run, tokenizer, quarantine, warn, rank, ranks, count)
    damage = [reported for source in sources for reported in source.damage]
    for shard, reason in damage if rank == 0 else ():
        warn(f"{shard}: {reason}")
    listed = Quarantine(quarantine, rank)
    loaders = {
        i: Loader(
            mixture, budget, image_id=tokenizer.image, patch=m.vision.patch, slots=m.connector.tokens, buffer=buffer,
            workers=d.workers, max_bad=d.max_bad, quarantine=listed, damage=damage if i == 0 else (), first=i,
            stride=count,
        )
        for i in range(rank, count, ranks)
    }  # fmt: skip
    drawn = t.steps * t.accumulate * d.tokens / sum(source.weight for source in d.sources)  # tokens for a weight of 1
    for setting, source, length in zip(d.sources, sources, mixture.mean_lengths):
        log.info(
            "indexed %s: %d records in %d files, which the run sees about %.3g times", setting.kind, len(source),
            len(source.files), drawn * setting.weight / (len(source) * length),
        )  # fmt: skip
        if passed := source.passed:
            log.info("passed over in %s: %s", setting.kind, passed)
    told = warn if rank == 0 else lambda message: None
    return Streams(loaders, count, rank, ranks, identity=values, quarantine=listed, warn=told)


def _opened(number: int, setting: SourceSettings) -> Source:
    try:
        return open_source(setting.kind, setting.paths, Path.cwd())
    except UserError as error:
        raise UserError(f"setting data.sources[{number}]: {error}") from None


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of all processes from their states."""
    return {"taken": states[0]["taken"], "streams": {i: s for state in states for i, s in state["streams"].items()}}
