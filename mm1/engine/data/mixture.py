"""Weighted mixture of sources as one endless stream of documents with random access.

The stream is Grain's MapDataset: position i always is the same document, so the exact state of a run's data is a
position and the few documents the packer holds. Compared: torchdata's StatefulDataLoader replays or pickles each
worker's state, and its maintenance has slowed; `webdataset` resamples shards and has no position; Energon needs its own
index files. Grain shuffles globally in O(1) memory, mixes by weight, decodes in threads or processes without changing
the order, and is what torchtitan moved to.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain warns at import that there is no jax
import grain  # noqa: E402

from mm1.engine.data.document import Document, DocumentEncoder  # noqa: E402
from mm1.engine.data.record import DataError, Unreadable  # noqa: E402


class Drawn(NamedTuple):
    """One record of the stream: its documents, or the reason why it could not be used."""

    source: int
    shard: str
    key: str
    documents: list[Document]
    reason: str | None


@dataclass(frozen=True)
class _Reader:
    """Index in a source -> Drawn."""

    source: Any
    number: int
    encode: DocumentEncoder

    def __call__(self, index: int) -> Drawn:
        shard, key = "", str(index)
        try:
            record = self.source[index]
            shard, key = record.shard, record.key
            return Drawn(self.number, shard, key, self.encode(record), None)
        except Unreadable as error:
            return Drawn(self.number, error.shard or shard, key, [], error.reason)


class Mixture:
    """Endless stream of the documents of several sources, drawn by weight, each source shuffled anew every epoch."""

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], encode: DocumentEncoder, seed: int):
        if any(weight <= 0 for weight in weights):
            raise DataError(f"weights of data sources are {list(weights)}, expected positive numbers")
        datasets = [
            grain.MapDataset.range(len(source))
            .shuffle(seed=seed + number)
            .repeat()
            .map(_Reader(source, number, encode))
            for number, source in enumerate(sources)
        ]
        self._documents = grain.MapDataset.mix(datasets, weights)

    def __getitem__(self, position: int) -> Drawn:
        return self._documents[position]

    def iterate(self, position: int, workers: int) -> Iterator[Drawn]:
        """From `position` on; the order does not depend on the number of workers."""
        documents = self._documents.slice(slice(position, None))
        if workers:
            return iter(documents.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
        return iter(documents.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)))
