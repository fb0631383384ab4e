"""Store a decoder's weights in the order in which a CPU reads them fastest.

Products of few rows are limited by the rate at which weights are read. On two cores with 35 GB/s, torch's fp32 product
of a row and a matrix reads 8 to 20 GB/s, of eight rows 5 to 16; oneDNN's with its blocked order reads 19 to 32.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mm1.engine.layers.decoder import DecoderLM

ROWS = 8  # number of rows for which oneDNN chooses the order; other numbers work too
MIN_NUMBERS = 1 << 17  # a smaller weight stays in the cores' caches, and the call costs more than it saves
_linear = torch.ops.mkldnn._linear_pointwise.default


class BlockedLinear(nn.Module):
    """Multiply x [T, in] by a frozen weight [out, in], without gradient."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the plain weight, because the blocked order depends on the processor and cannot be saved."""
        return BlockedLinear, (self.blocked.to_dense(),)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.blocked, None, "none", [], "")


def blocked(decoder: DecoderLM) -> tuple[nn.Module, nn.Module]:
    """Return a decoder and its head with wide linears in blocked order on a CPU; unchanged on other devices.

    The copies share all other parameters, and take the memory of the wide linears once more.
    """
    weight = decoder.head_weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return decoder, Head(decoder)
    other = twin(decoder)
    for module in list(other.blocks.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None and child.weight.numel() >= MIN_NUMBERS:
                setattr(module, name, BlockedLinear(child.weight))
    return other, BlockedLinear(weight) if weight.numel() >= MIN_NUMBERS else Head(decoder)


def twin(decoder: DecoderLM) -> DecoderLM:
    """Return a copy of the decoder's modules that shares its parameters and buffers."""
    return copy.deepcopy(decoder, {id(x): x for x in (*decoder.parameters(), *decoder.buffers())})


class Head(nn.Module):
    """Compute logits [T, V] of hidden states [T, D]."""

    def __init__(self, decoder: DecoderLM):
        super().__init__()
        self.weight = decoder.head_weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T
