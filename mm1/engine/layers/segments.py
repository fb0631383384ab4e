"""Define packed segments: the documents of a decoder, the images of an encoder."""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.attention import Full, Prefix


class Segments(NamedTuple):
    """Hold where packed segments lie, and the prefix of each if attention has a prefix mask.

    span: a tensor [longest, 0] without values, because compiled code can take a size as a variable, but not a number.
    prefix: with it the last segment is empty, because compiled code takes the size of a single one as a constant.
    """

    cu_seqlens: Tensor  # int32 [B + 1]
    span: Tensor
    prefix: Tensor | None = None  # int32 [B]

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int, prefix: Tensor | None = None) -> Self:
        """Return segments of at most `longest` rows. prefix int32 [n]: of the first n segments; of the others 0.

        torch's attention launches programs for that many rows of each of the B segments: both should be the batch's.
        """
        if prefix is not None:
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:]])
            prefix = F.pad(prefix, (0, cu_seqlens.shape[0] - 1 - prefix.shape[0]))
        return cls(cu_seqlens, cu_seqlens.new_empty(max(longest, 2), 0), prefix)  # compiled code takes 1 as a constant

    @property
    def longest(self) -> int:
        """Return the bound of the segments' lengths."""
        return self.span.shape[0]

    @property
    def mask(self) -> Full | Prefix:
        """Return the mask of an encoder: full, or causal behind the prefixes."""
        return Full() if self.prefix is None else Prefix(self.prefix)

    def mark_dynamic(self) -> None:
        """Let compiled code take the number of segments, from 1, and their longest length as variables."""
        for x in self:
            if x is not None:
                torch._dynamo.mark_dynamic(x, 0)
