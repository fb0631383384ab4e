"""Mix a run's sources by weight: one endless stream of documents with random access.

The stream is Grain's MapDataset: position i always is the same record, so that the exact state of a run's data is one
position and the few documents in the packer's pool. Grain shuffles globally in O(1) memory, mixes by weight, and
decodes in threads or processes without changing the order. docs/decisions.md compares it with other libraries.
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns at import if jax is missing
import grain  # noqa: E402
from absl import flags  # noqa: E402

from mm1.engine.data.document import DECODED_AHEAD, Document  # noqa: E402
from mm1.engine.data.record import SMALL_SOURCE, Alternatives, Record  # noqa: E402
from mm1.errors import Unreadable, UserError  # noqa: E402

DRAWS = 0  # distinguishes the hash of a record's draws from other hashes
SAMPLES = 64  # records of a source from which its mean length is estimated


class Drawn(NamedTuple):
    """Hold one record of the stream: its documents, or the reason why it cannot be used."""

    source: int
    shard: str
    key: str
    documents: list[Document]
    reason: str | None


def shuffled(place: int, records: int, seed: int, epoch: int) -> int:
    """Return the number of the record at `place` in an epoch of a source; every epoch has its own order.

    Grain's cipher works on 16 bits and is repeated until its number is below `records`, which takes 10 µs in general,
    but 10 ms for two records. Sources of fewer than SMALL_SOURCE records are therefore sorted by a hash in each epoch.
    """
    if records < SMALL_SOURCE:
        return _sorted_by_hash(records, seed, epoch)[place]
    return grain.experimental.index_shuffle(place, max_index=records - 1, seed=(seed + epoch) % 2**32, rounds=4)


@lru_cache(maxsize=64)
def _sorted_by_hash(records: int, seed: int, epoch: int) -> list[int]:
    return sorted(range(records), key=lambda record: _hash(seed, epoch, record))


def _hash(*numbers: int) -> int:
    """Return a 64-bit hash of the numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class _Reader:
    """Read a source as an endless stream: map a position to its Drawn."""

    source: Any
    number: int
    encode: Callable[[Record], list[Document]]
    seed: int

    def __call__(self, position: int) -> Drawn:
        epoch, place = divmod(position, len(self.source))
        return self.read(shuffled(place, len(self.source), self.seed, epoch), epoch)

    def read(self, index: int, epoch: int) -> Drawn:
        """Read a record with one text of each Alternatives; the next epoch uses the next text."""
        shard, key = "", str(index)
        try:
            record: Record = self.source[index]
            shard, key = record.shard, record.key
            if any(isinstance(part, Alternatives) for part in record.parts):
                turn = epoch + _hash(self.seed, index)
                texts = [p.texts[turn % len(p.texts)] if isinstance(p, Alternatives) else p for p in record.parts]
                record = replace(record, parts=tuple(texts))
            record = replace(record, draw=_hash(self.seed, index, epoch, DRAWS))
            return Drawn(self.number, shard, key, self.encode(record), None)
        except Unreadable as error:
            return Drawn(self.number, error.shard or shard, error.key or key, [], error.reason)

    def mean_tokens(self, samples: int) -> float:
        """Return the mean number of tokens of about `samples` evenly spaced records, 1 if none of them is readable."""
        drawn = [self.read(i, 0) for i in range(0, len(self.source), -(-len(self.source) // samples))]
        lengths = [sum(len(document.tokens) for document in d.documents) for d in drawn if d.documents]
        return sum(lengths) / len(lengths) if lengths else 1.0


class Mixture:
    """Make an endless stream of the documents of several sources, each shuffled anew in every epoch.

    weights: the share of tokens drawn from each source, relative to the others. Records are drawn in proportion to
    weight / mean_lengths (tokens), which are estimated from SAMPLES records of each source if they are None. seed: 0
    to 2³² - 1. Raises UserError for a weight that is not positive.
    """

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], encode: Callable[[Record], list[Document]],
        seed: int,        mean_lengths: Sequence[float] | None = None,
    ):  # fmt: skip
        if any(weight <= 0 for weight in weights):
            raise UserError(f"weights of data sources are {list(weights)}, expected positive numbers")
        readers = [_Reader(source, i, encode, (seed + i) % 2**32) for i, source in enumerate(sources)]
        datasets = [grain.MapDataset.range(sys.maxsize).map(reader) for reader in readers]
        self.mean_lengths = list(mean_lengths or (reader.mean_tokens(SAMPLES) for reader in readers))
        self._documents = grain.MapDataset.mix(datasets, [w / n for w, n in zip(weights, self.mean_lengths)])

    def __getitem__(self, position: int) -> Drawn:
        drawn = self._documents[position]
        assert drawn is not None
        return drawn

    def iterate(self, position: int, workers: int, stride: int = 1) -> Iterator[Drawn]:
        """Yield every stride-th record from `position` on, in the same order for any number of worker processes."""
        # Grain would read 500 records ahead in each worker, which takes gigabytes for images.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=DECODED_AHEAD)
        documents = self._documents.slice(slice(position, None, stride)).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():  # with jax installed, Grain reads a flag of absl, which nobody parses here
                flags.FLAGS.mark_as_parsed()
            documents = documents.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(documents)
