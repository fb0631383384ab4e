"""Routing of tokens to experts.

    p = softmax(logits);  index, weight = the k largest p, ties to the lower expert;  weight /= Σ weight (normalize)
    load balance = E · Σ_e f_e · mean(p_e),  f_e the fraction of tokens whose first choice is e (before capacity)
    z            = mean(logsumexp(logits)²)

logits [T, E], reads T·E. Sources: Shazeer et al. 2017; GShard (Lepikhin et al. 2021), section 2.2 and algorithm 1 for
capacity; ST-MoE (Zoph et al. 2022), equation 5 for z. MM1 weights the losses 0.01 and 0.001.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect


class Routing(NamedTuple):
    # Hides tuple.index, which nobody calls.
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # int32 [T, K], E where the slot is dropped or the token masked
    weight: Tensor  # fp32 [T, K]
    order: Tensor  # int64 [T·K], slots t·K + k sorted by expert, stable; dropped ones last
    offsets: Tensor  # int32 [E], end of each expert's slots in `order`
    load_balance: Tensor  # fp32 []
    z_loss: Tensor  # fp32 []
    dropped: Tensor  # int64 [], slots over capacity


def route(
    logits: Tensor, k: int, *, normalize: bool = True, capacity: int | None = None, mask: Tensor | None = None
) -> Routing:
    """Choose k of E experts for each token of logits [T, E].

    capacity: at most so many slots an expert (GShard's order: all first choices before all second ones); None keeps
    every slot. mask bool [T]: False for padding, which is routed nowhere and counts in no loss.
    """
    expect(logits.ndim == 2, "route", "logits", tuple(logits.shape), "[T, E]")
    T, E = logits.shape
    expect(1 <= k <= E, "route", "k", k, f"1 … {E}")
    expect(mask is None or mask.shape == (T,), "route", "mask", mask is not None and tuple(mask.shape), (T,))
    logits = logits.float()
    counted = logits.new_ones(T) if mask is None else mask.float()
    tokens = counted.sum().clamp(min=1)

    probability = logits.softmax(-1)
    choice = probability.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # topk promises no order of ties
    weight = probability.gather(1, choice)
    if normalize:
        weight = weight / weight.sum(-1, keepdim=True)
    first = F.one_hot(choice[:, 0], E) * counted[:, None]
    load_balance = E * (first.sum(0) / tokens * ((probability * counted[:, None]).sum(0) / tokens)).sum()
    z_loss = (logits.logsumexp(-1).square() * counted).sum() / tokens

    index = choice if mask is None else torch.where(mask[:, None], choice, E)
    dropped = index.new_zeros(())
    if capacity is not None:
        by_choice = F.one_hot(index.t().reshape(-1), E + 1)  # (K·T, E+1): every first choice before any second
        rank = (by_choice.cumsum(0) * by_choice).sum(-1).view(k, T).t()
        over = (rank > capacity) & (index < E)
        index, dropped = torch.where(over, E, index), over.sum()
    weight = weight * (index < E)
    order, offsets = sort_by_expert(index, E)
    return Routing(index.int(), weight, order, offsets, load_balance, z_loss, dropped)


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """index [T, K] -> order int64 [T·K] of slots by expert (stable), end offsets int32 [E]."""
    expert, order = index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=index.device, dtype=expert.dtype), right=True)
    return order, ends.int()


def cost(tokens: int, experts: int, k: int, *, itemsize: int = 2) -> Cost:
    return Cost(4 * tokens * experts, tokens * (experts * itemsize + k * 12))
