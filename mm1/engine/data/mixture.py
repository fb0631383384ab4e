"""Weighted mixture of sources as one endless stream of documents with random access.

The stream is Grain's MapDataset: position i always is the same document, so the exact state of a run's data is a
position and the few documents the packer holds. Compared: torchdata's StatefulDataLoader replays or pickles each
worker's state, and its maintenance has slowed; `webdataset` resamples shards and has no position; Energon needs its own
index files. Grain shuffles globally in O(1) memory, mixes by weight, decodes in threads or processes without changing
the order, and is what torchtitan moved to.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns at import that there is no jax
import grain  # noqa: E402
from absl import flags  # noqa: E402

from mm1.engine.data.document import DECODED_AHEAD, Document, DocumentEncoder  # noqa: E402
from mm1.engine.data.record import FEW, Choice, Record  # noqa: E402
from mm1.errors import Unreadable, UserError  # noqa: E402


class Drawn(NamedTuple):
    """One record of the stream: its documents, or the reason why it could not be used."""

    source: int
    shard: str
    key: str
    documents: list[Document]
    reason: str | None


def shuffled(place: int, records: int, seed: int, passed: int) -> int:
    """Return which of `records` stands at `place` in a pass over a source; every pass has an order of its own.

    Grain's cipher works on 16 bits and is repeated until its number is below `records`: 10 µs a number, but 10 ms for
    a source of two records. Fewer than FEW are therefore sorted by a hash, once a pass.
    """
    if records < FEW:
        return _sorted_by_hash(records, seed, passed)[place]
    return grain.experimental.index_shuffle(place, max_index=records - 1, seed=(seed + passed) % 2**32, rounds=4)


@lru_cache(maxsize=64)
def _sorted_by_hash(records: int, seed: int, passed: int) -> list[int]:
    return sorted(range(records), key=lambda record: _hash(seed, passed, record))


def _hash(*numbers: int) -> int:
    """Return 64 bits that depend on nothing but the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class _Reader:
    """Position in a source's endless stream -> Drawn."""

    source: Any
    number: int
    encode: DocumentEncoder
    seed: int

    def __call__(self, position: int) -> Drawn:
        passed, place = divmod(position, len(self.source))
        return self.read(shuffled(place, len(self.source), self.seed, passed), passed)

    def read(self, index: int, passed: int) -> Drawn:
        """Read a record as a pass has it: of each Choice one text, the next one in the next pass."""
        shard, key = "", str(index)
        try:
            record: Record = self.source[index]
            shard, key = record.shard, record.key
            if any(isinstance(part, Choice) for part in record.parts):
                turn = passed + _hash(self.seed, index)
                record = replace(record, parts=tuple(_chosen(part, turn) for part in record.parts))
            return Drawn(self.number, shard, key, self.encode(record), None)
        except Unreadable as error:
            return Drawn(self.number, error.shard or shard, error.key or key, [], error.reason)

    def mean_tokens(self, sampled: int) -> float:
        """Return the mean length of evenly spaced records, 1 if none of them is readable."""
        drawn = [self.read(i, 0) for i in range(0, len(self.source), -(-len(self.source) // sampled))]
        lengths = [sum(len(document.tokens) for document in d.documents) for d in drawn if d.documents]
        return sum(lengths) / len(lengths) if lengths else 1.0


def _chosen(part: str | bytes, turn: int) -> str | bytes:
    return part.texts[turn % len(part.texts)] if isinstance(part, Choice) else part


class Mixture:
    """Endless stream of the documents of several sources, each shuffled anew every pass.

    weights: shares of the tokens drawn from each source, as the paper's sequences are all of one length; records
    are drawn by weight over their mean length in tokens, `mean_lengths`, which is estimated from `sampled` records of
    each source where it is None. seed: 0 to 2³² - 1.
    """

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], encode: DocumentEncoder, seed: int,
        mean_lengths: Sequence[float] | None = None, sampled: int = 64,
    ):  # fmt: skip
        if any(weight <= 0 for weight in weights):
            raise UserError(f"weights of data sources are {list(weights)}, expected positive numbers")
        readers = [_Reader(source, i, encode, (seed + i) % 2**32) for i, source in enumerate(sources)]
        datasets = [grain.MapDataset.range(sys.maxsize).map(reader) for reader in readers]
        self.mean_lengths = list(mean_lengths or (reader.mean_tokens(sampled) for reader in readers))
        self._documents = grain.MapDataset.mix(datasets, [w / n for w, n in zip(weights, self.mean_lengths)])

    def __getitem__(self, position: int) -> Drawn:
        drawn = self._documents[position]
        assert drawn is not None
        return drawn

    def iterate(self, position: int, workers: int, stride: int = 1) -> Iterator[Drawn]:
        """Return every stride-th record from `position` on; their order does not depend on the number of workers."""
        # Grain would read 500 records ahead in each worker: of images, gigabytes.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=DECODED_AHEAD)
        documents = self._documents.slice(slice(position, None, stride)).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():  # where there is jax, Grain reads a flag of absl, which nobody parses here
                flags.FLAGS.mark_as_parsed()
            documents = documents.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(documents)
