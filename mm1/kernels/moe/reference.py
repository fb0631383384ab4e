"""Specify the family's ops in plain torch, in the dtype of their arguments; in fp64 all tests compare with them.

The functions have the signatures and meaning of the public ops, and are differentiable.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.moe.activation import ACTIVATIONS


class Chosen(NamedTuple):
    """Hold the experts chosen for each token, before masks and capacity."""

    choice: Tensor  # int32 [T, K]
    weight: Tensor  # [T, K]
    first: Tensor  # [E], number of tokens whose first choice is each expert
    load_balance: Tensor  # []
    z_loss: Tensor  # []


def choose_experts(logits: Tensor, mask: Tensor | None, k: int, normalize: bool) -> Chosen:
    """Return the k largest experts of each row of logits [T, E], ties to the lower expert, and both losses.

    mask: bool [T], False for a token that counts in no loss, and whose logits may have any values.
    """
    E = logits.shape[1]
    counted = logits.new_ones(len(logits)) if mask is None else mask.to(logits.dtype)
    logits = masked(logits, mask)
    tokens = counted.sum().clamp(min=1)
    probability = logits.softmax(-1)
    choice = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # topk does not define the order of ties
    weight = probability.gather(1, choice)
    if normalize:
        weight = weight / weight.sum(-1, keepdim=True)
    first = torch.zeros(E, dtype=logits.dtype, device=logits.device).index_add_(0, choice[:, 0], counted)
    load_balance = E * (first * (counted @ probability)).sum() / tokens.square()
    z_loss = counted @ logits.logsumexp(-1).square() / tokens
    return Chosen(choice.int(), weight, first, load_balance, z_loss)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Replace the logits of masked tokens by zeros, so that no value of theirs, not even NaN, reaches a result."""
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0.0)


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a[r] · b[e] (+ bias[e]) for each row r of expert e, [M, N], and zeros past the last offset."""
    parts, ends = [], [0, *offsets.tolist()]
    for e, (begin, end) in enumerate(pairwise(ends)):
        y = a[begin:end] @ b[e]
        parts.append(y if bias is None else y + bias[e])
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[2])])


def grouped_gemm_dw(a: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """Return a[rows of e]ᵀ · dy[rows of e] for each expert e, [E, K, N]."""
    return torch.stack([a[begin:end].t() @ dy[begin:end] for begin, end in pairwise([0, *offsets.tolist()])])


def activate(
    h: Tensor, up: Tensor | None, width: int, activation: str = "silu", limit: float | None = None, shift: float = 0.0,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """Return s [n, F] for the first product h [n, 2F], or for h [n, F] and up [n, F] or None; see activation.py."""
    gate = h
    if up is None and h.shape[1] > width:
        gate, up = (h[:, ::2], h[:, 1::2]) if interleaved else h.chunk(2, 1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), None if up is None else up.clamp(-limit, limit)
    s = ACTIVATIONS[activation].value(gate)
    return s if up is None else s * (up + shift if shift else up)


def moe_mlp(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, up: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, **options: object,
) -> Tensor:  # fmt: skip
    """Return the weighted sum of each token's experts, [T, D]; options: activation, limit, shift, interleaved.

    The slots are sorted by expert, and each expert multiplies all its rows at once; the host reads their number.
    """
    (E, D, width), (T, K) = down.shape, index.shape
    expert = torch.where((index < 0) | (index >= E), E, index).flatten().long()
    order, sizes = expert.argsort(stable=True), F.one_hot(expert, E + 1).sum(0).tolist()
    parts = []
    # After unbind the gradient of one expert's weight is as small as that weight.
    tensors = [[None] * E if t is None else t.unbind(0) for t in (gate_up, up, down, gate_up_bias, down_bias)]
    for rows, w, w_up, w_down, bias, bias_down in zip(x[order // max(K, 1)].split(sizes), *tensors):
        h, other = F.linear(rows, w, bias), None if w_up is None else F.linear(rows, w_up)
        parts.append(F.linear(activate(h, other, width, **options), w_down, bias_down))  # pyright: ignore
    y = torch.cat([*parts, x.new_zeros(sizes[E], D)])[order.argsort()]
    return (y.view(T, K, D) * weight[..., None]).sum(1).to(x.dtype)
