"""Define packed segments: the documents of a decoder, the images of an encoder."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Hold where packed segments lie.

    span: a tensor [longest, 0] without values, because compiled code can take a size as a variable, but not a number.
    """

    cu_seqlens: Tensor  # int32 [B + 1]
    span: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int) -> Self:
        """Return segments of at most `longest` rows.

        torch's attention launches programs for that many rows of each of the B segments: both should be the batch's.
        """
        return cls(cu_seqlens, cu_seqlens.new_empty(max(longest, 2), 0))  # compiled code takes 1 as a constant

    @property
    def longest(self) -> int:
        """Return the bound of the segments' lengths."""
        return self.span.shape[0]

    def mark_dynamic(self) -> None:
        """Let compiled code take the number of segments, from 1, and their longest length as variables."""
        for x in self:
            torch._dynamo.mark_dynamic(x, 0)
