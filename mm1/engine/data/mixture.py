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
from absl import flags  # noqa: E402

from mm1.engine.data.document import DECODED_AHEAD, Document, DocumentEncoder  # noqa: E402
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
            return Drawn(self.number, error.shard or shard, error.key or key, [], error.reason)

    def mean_tokens(self, sampled: int) -> float:
        """Mean length of evenly spaced records, 1 if none of them is readable."""
        drawn = [self(i) for i in range(0, len(self.source), -(-len(self.source) // sampled))]
        lengths = [sum(len(document.tokens) for document in d.documents) for d in drawn if d.documents]
        return sum(lengths) / len(lengths) if lengths else 1.0


class Mixture:
    """Endless stream of the documents of several sources, each shuffled anew every epoch.

    weights: shares of the tokens drawn from each source, as the paper's sequences are all of one length; records
    are drawn by weight over their mean length in tokens, `mean_lengths`, which is estimated from `sampled` records of
    each source where it is None. seed: 0 to 2³² - 1.
    """

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], encode: DocumentEncoder, seed: int,
        mean_lengths: Sequence[float] | None = None, sampled: int = 64,
    ):  # fmt: skip
        if any(weight <= 0 for weight in weights):
            raise DataError(f"weights of data sources are {list(weights)}, expected positive numbers")
        readers = [_Reader(source, number, encode) for number, source in enumerate(sources)]
        datasets = [
            grain.MapDataset.range(len(reader.source)).shuffle(seed=(seed + reader.number) % 2**32).repeat().map(reader)
            for reader in readers
        ]
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
