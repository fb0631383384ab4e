"""Define the mixture-of-experts layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Decoder
from mm1.kernels.moe.backends import Backend, find
from mm1.kernels.moe.routing import route


class Router(nn.Module):
    """Logits of the experts, in fp32 whatever else is not."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """Mixture of experts with a top-k router in fp32.

    capacity: at most so many times an even share of a sequence's T·K slots go to one expert, first choices before
    second ones, and the others are dropped; None drops nothing. Each sequence is cut by itself, so that every layout
    drops the same slots.
    """

    capacity: float | None = None

    def __init__(self, c: Decoder):
        super().__init__()
        self.k = c.experts_per_token
        self.router = Router(c.width, c.experts)
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.ffn, c.width))
        self.down = nn.Parameter(torch.empty(c.experts, c.width, c.ffn))
        self.backend: Backend = find(c.moe_backend)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, D], mask bool [T] -> y [T, D], load-balance and z-loss fp32 [], slots int64 [E + 1].

        slots: the end of each expert's slots in their order by expert, then the number of dropped ones; see `load`.
        """
        limit = None
        if self.capacity is not None:
            limit = math.ceil(self.capacity * len(x) * self.k / len(self.router.weight))
        routing = route(self.router(x), self.k, mask=mask, capacity=limit)
        dtype = product_dtype(x)
        y = self.backend(x.to(dtype), routing, self.gate_up.to(dtype), self.down.to(dtype))
        slots = torch.cat([routing.offsets, routing.dropped[None]])
        return y, routing.load_balance, routing.z_loss, slots


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product with x is computed: autocast's, or that of x without autocast."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def load(slots: Tensor) -> dict[str, Any]:
    """Return the metrics of slots [mixture layers, E + 1] that were summed over a step; none for a dense model.

    expert_load: of each layer the most slots of an expert over their mean. dropped: share of the routed slots.
    """
    if not len(slots):
        return {}
    counts, dropped = slots[:, :-1].diff(prepend=slots.new_zeros(len(slots), 1)).double(), slots[:, -1].sum().item()
    routed = counts.sum().item() + dropped
    busiest = counts.amax(1) / counts.mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    return {"expert_load": busiest.tolist(), "dropped": dropped / max(1, routed)}
