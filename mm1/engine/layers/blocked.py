"""A decoder whose weights lie as a CPU reads them best.

Products of few rows are bound by reading the weights once. torch's product of a row and a matrix on a CPU reached 8 to
20 GB/s of 35 here, of eight rows 5 to 16; oneDNN's with weights in its own blocked order 19 to 32 (fp32, two cores).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine.layers.decoder import DecoderLM

ROWS = 8  # that the order of the weights is chosen for; others work as well
LEAST = 1 << 17  # numbers in a weight; a smaller one stays in the cores' caches, and the call costs more than it saves
_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """x [T, in] -> [T, out] of a frozen linear; no gradient."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __reduce__(self) -> tuple[Any, ...]:
        """The blocked order is of this processor and has no bytes to save, so that a copy packs the weight anew."""
        return PackedLinear, (self.packed.to_dense(),)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.packed, None, "none", [], "")


def packed(decoder: DecoderLM) -> tuple[nn.Module, nn.Module]:
    """The decoder and its head: on a CPU copies, wide linears packed as they are now, all else shared.

    Elsewhere they are themselves. A copy takes the memory of its linears once more.
    """
    weight = decoder.head_weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return decoder, Head(decoder)
    other = twin(decoder)
    for module in list(other.blocks.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None and child.weight.numel() >= LEAST:
                setattr(module, name, PackedLinear(child.weight))
    return other, PackedLinear(weight) if weight.numel() >= LEAST else Head(decoder)


def twin(decoder: DecoderLM) -> DecoderLM:
    """Other modules of the same parameters."""
    return copy.deepcopy(decoder, {id(x): x for x in (*decoder.parameters(), *decoder.buffers())})


class Head(nn.Module):
    """Hidden states [T, D] -> logits [T, V]."""

    def __init__(self, decoder: DecoderLM):
        super().__init__()
        self.weight = decoder.head_weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T
