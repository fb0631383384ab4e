"""Define the masks of attention, which declare the keys of its own segment that a query sees.

    Full()            all keys
    Causal()          key j where j ≤ i
    Prefix(lengths)   key j where j ≤ i or j < lengths[b], in segment b

j is a key's place in its segment. i is a query's place, counted so that the last query has the place of the last key:
where a segment has as many queries as keys, i counts from 0.

Masks are data: another prefix length changes a tensor's values and compiles nothing.
Source of the prefix mask: El-Nouby et al. 2024 (AIM), section 4.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Full:
    """Let every query see every key of its segment."""

    def pairs(self, lengths: Sequence[int]) -> int:
        """Return the number of visible (query, key) pairs in segments of these lengths."""
        return sum(n * n for n in lengths)


@dataclass(frozen=True)
class Causal:
    """Let a query see the keys of its segment up to its own place."""

    def pairs(self, lengths: Sequence[int]) -> int:
        """Return the number of visible (query, key) pairs in segments of these lengths."""
        return sum(n * (n + 1) // 2 for n in lengths)


class Prefix(NamedTuple):
    """Let a query see the keys of its segment up to its own place, and the first lengths[b] keys of segment b.

    lengths: integers [B] on the device of the queries. Lengths up to 0 mean causal; the segment's length and more,
    full.
    """

    lengths: Tensor

    def pairs(self, lengths: Sequence[int]) -> int:
        """Return the number of visible (query, key) pairs in segments of these lengths; waits for the device."""
        seen = [min(max(s, 0), n) for s, n in zip(self.lengths.tolist(), lengths, strict=True)]
        return sum(s * n + (n - s) * (n - s + 1) // 2 for s, n in zip(seen, lengths))


Mask = Full | Causal | Prefix
