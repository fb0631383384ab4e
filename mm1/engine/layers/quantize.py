"""Store a decoder's weights in fewer bits, because the rate of decoding is limited by reading them.

    int8     one scale per row, rounded by torchao and multiplied by kernels/moe/quantized.py; torchao's own product
             first writes the whole weight in x's dtype (33 ms for 2048 × 8192 on a CPU, where reading it takes 1.3)
    float8   e4m3, otherwise like int8, on GPUs with float8 units
    int4     a scale and a zero for each 128, 64 or 32 numbers of a row, torchao's packing and product in bf16; int8 for
             experts, whose kernel reads rows of whole bytes, for the head, whose errors are errors of the logits, and
             for weights that do not divide into groups

Rounding normal weights changes a product by 0.8 % (int8, 2048 wide) and 9 % (int4 in groups of 64). On a CPU decode.cpp
reads int8 itself: with 30 M parameters and two threads a token takes 2.7 ms, in bf16 3.9, in fp32 5.8. int4 uses
torch's product there: with 78 M parameters in fp32 and one thread, a token takes 22 ms and eight take 50, where
blocked.py needs 50 and 56, but a prompt of 256 takes 501 instead of 391.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.blocked import twin
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.experts import Experts
from mm1.errors import UserError
from mm1.kernels.moe.quantized import linear_8, moe_mlp_8
from mm1.kernels.moe.routing import choose

NEEDED = {"int8": (0, 0), "int4": (8, 0), "float8": (8, 9)}  # compute capability of a GPU
MIN_NUMBERS = 1 << 17  # a smaller weight saves too little to matter
GROUPS = (128, 64, 32)  # numbers that share a scale in int4


class Linear8(nn.Module):
    """Multiply x [T, in] by a frozen 8-bit weight [out, in]."""

    def __init__(self, weight: Tensor, how: str):
        super().__init__()
        self.weight, self.scale = map(nn.Buffer, rounded(weight, how))

    def forward(self, x: Tensor) -> Tensor:
        return linear_8(x, self.weight, self.scale)


class Linear4(nn.Module):
    """Multiply x [T, in] by a frozen 4-bit weight [out, in] in torchao's packing."""

    def __init__(self, weight: Tensor, group: int):
        super().__init__()
        self.weight = nn.Parameter(grouped(weight, group), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight).to(x.dtype)


class Experts8(nn.Module):
    """Replace Experts by frozen 8-bit weights, for generation: without losses and counts."""

    def __init__(self, experts: Experts, how: str):
        super().__init__()
        self.k, self.router = experts.k, experts.router
        self.gate_up, self.gate_up_scale = map(nn.Buffer, rounded(experts.gate_up, how))
        self.down, self.down_scale = map(nn.Buffer, rounded(experts.down, how))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        index, weight = choose(self.router(x), self.k, mask=mask)
        zero = x.new_zeros((), dtype=torch.float32)
        y = moe_mlp_8(x, index, weight, self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return y, zero, zero, None


@torch.no_grad()
def quantized(decoder: DecoderLM, how: str) -> tuple[nn.Module, nn.Module]:
    """Return a copy of the decoder with wide linears and experts in 8 or 4 bits, and its head [T, D] -> [T, V].

    how: "int8", "int4" or "float8". All other parameters are shared. Raises UserError without torchao, or if the device
    does not support the products.
    """
    if how not in NEEDED:
        raise UserError(f"weights are {how!r}, expected one of {', '.join(NEEDED)}")
    _check(decoder.head_weight.device, how)
    other = twin(decoder)
    for module in list(other.blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, Experts8(child, how))
            elif type(child) is nn.Linear and child.bias is None and child.weight.numel() >= MIN_NUMBERS:
                setattr(module, name, _linear(child.weight, how))
    head = Linear8(decoder.head_weight, "int8" if how == "int4" else how)
    if not decoder.config.tied:
        del other.head
    return other, head


def _check(device: torch.device, how: str) -> None:
    """Raise UserError if a GPU, or for float8 the CPU, lacks the products."""
    needed = NEEDED[how]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if how == "float8" if capability is None else capability < needed:
        actual = device.type if capability is None else "one of {}.{}".format(*capability)
        message = f'weights "{how}" need a GPU of compute capability {needed[0]}.{needed[1]} or more, not {actual}'
        raise UserError(message)


def _linear(weight: Tensor, how: str) -> nn.Module:
    rows, width = weight.shape
    group = next((g for g in GROUPS if width % g == 0), None)
    if how == "int4" and group and (weight.device.type == "cuda" or rows % 16 == 0):
        return Linear4(weight, group)
    return Linear8(weight, "int8" if how == "int4" else how)


def rounded(weight: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Return weight [..., N, K] in 8 bits, and its scales fp32 [..., N]."""
    with importing_torchao('weights "int8" or "float8"'):
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    if weight.ndim == 3:  # expert by expert, because rounding takes several copies
        data, scale = zip(*(rounded(w, how) for w in weight))
        return torch.stack(data), torch.stack(scale)
    kind = Float8Tensor if how == "float8" else Int8Tensor
    tensor = kind.from_hp(weight.detach().float(), granularity=PerRow())
    return tensor.qdata, tensor.scale[:, 0].contiguous()


def grouped(weight: Tensor, group: int) -> Tensor:
    """Return weight [N, K] in 4 bits, in torchao's packing for the device."""
    with importing_torchao('weights "int4"'):
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
        from torchao.quantization import Int4TilePackedTo4dTensor
    weight = weight.detach().to(torch.bfloat16)
    if weight.device.type == "cpu":
        return Int4OpaqueTensor.from_hp(weight, [1, group])
    return Int4TilePackedTo4dTensor.from_hp(weight, [1, group], ntile_size=16 if torch.version.hip else 8)


@contextmanager
def importing_torchao(what: str) -> Iterator[None]:
    """Hide torchao's warnings about libraries for other machines. Raises UserError if torchao is not installed."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}: needs torchao: pip install torchao ({error})") from None
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
