"""Define the mixture-of-experts layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Decoder
from mm1.engine.layers.layer import Fill, Layer, fan_in, product_dtype
from mm1.engine.layers.sharding import DeviceMesh, expert_parallel, split_parameter, tensor_parallel_experts
from mm1.engine.layers.workload import Layout, Operations, Workload
from mm1.kernels.moe import experts as experts_op
from mm1.kernels.moe.backends import Backend, find
from mm1.kernels.moe.routing import route


class Router(Layer):
    """Compute the logits of the experts in fp32, also under autocast."""

    fp32 = True

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def initial_values(self) -> dict[str, Fill]:
        return {"weight": fan_in(self.weight.shape[1])}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits fp32 [T, E] of x [T, D]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(Layer):
    """Route each token to k experts by a router in fp32.

    capacity: largest number of slots per expert, as a multiple of an even share of a sequence's T·K slots; further
    slots are dropped, second choices first. None drops nothing. The limit applies to each sequence, so that every
    layout drops the same slots.
    """

    capacity: float | None = None

    def __init__(self, c: Decoder):
        super().__init__()
        self.config, self.k = c, c.experts_per_token
        self.router = Router(c.width, c.experts)
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.ffn, c.width))
        self.down = nn.Parameter(torch.empty(c.experts, c.width, c.ffn))
        self.backend: Backend = find(c.moe_backend)

    def initial_values(self) -> dict[str, Fill]:
        width, ffn = self.gate_up.shape[2], self.down.shape[2]
        return {"gate_up": fan_in(width), "down": fan_in(ffn, self.config.layers)}

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute x [T, D], mask bool [T] -> y [T, D], load-balance and z-loss fp32 [], slots int64 [E + 1].

        slots: the end of each expert's slots when sorted by expert, then the number of dropped slots.
        """
        limit = None
        if self.capacity is not None:
            limit = math.ceil(self.capacity * len(x) * self.k / len(self.router.weight))
        routing = route(self.router(x), self.k, mask=mask, capacity=limit)
        dtype = product_dtype(x)
        y = self.backend(x.to(dtype), routing, self.gate_up.to(dtype), self.down.to(dtype))
        slots = torch.cat([routing.offsets, routing.dropped[None]])
        return y, routing.load_balance, routing.z_loss, slots

    def operations(self, workload: Workload) -> list[Operations]:
        c = self.config
        routed = experts_op.cost(workload.expert_rows, self.k, c.experts, c.width, c.ffn).flops
        return [
            Operations("router", 2 * workload.tokens * c.width * c.experts),
            Operations("experts", routed, split=True, routed=True),
        ]

    def kept_bytes(self, workload: Workload, layout: Layout) -> tuple[float, float]:
        """Return the bytes stored for backward, and those of them that are results of products."""
        c, itemsize, received = self.config, layout.itemsize, layout.received
        # Stored are gate and up of each slot, on a tensor group of the slots of all experts; logits, and their fp32
        # input if it is a copy; with expert parallelism also the received rows, and the returned results in fp32.
        products = itemsize * self.k * (received or 1) * 2 * c.ffn
        kept = products + 4 * (c.experts + c.width * (itemsize < 4))
        kept += self.k * c.width * (itemsize * received + 4 * (received > 0))
        return workload.tokens * kept, workload.tokens * (products + 4 * c.experts)

    def shard_axes(self) -> dict[str, int]:
        return {"gate_up": 0, "down": 0}

    def divided_counts(self) -> dict[str, int]:
        return {"experts": self.config.experts}

    def split(self, mesh: DeviceMesh) -> None:
        """Divide the experts among the processes of a tensor group, which all see the same tokens."""
        self._split_parameters(mesh)
        self.backend = tensor_parallel_experts(self.backend, mesh)

    def split_by_expert(self, mesh: DeviceMesh) -> None:
        """Divide the experts among processes with tokens of their own, which are sent to their experts."""
        self._split_parameters(mesh)
        self.backend = expert_parallel(self.backend, mesh)

    def _split_parameters(self, mesh: DeviceMesh) -> None:
        for name, axis in self.shard_axes().items():
            split_parameter(self, name, mesh, axis)


def expert_metrics(slots: Tensor) -> dict[str, Any]:
    """Return the metrics of slots [mixture layers, E + 1], summed over a step; empty for a dense model.

    expert_load: for each layer, the largest number of slots of an expert over the mean. dropped: share of the slots.
    """
    if not len(slots):
        return {}
    counts, dropped = slots[:, :-1].diff(prepend=slots.new_zeros(len(slots), 1)).double(), slots[:, -1].sum().item()
    routed = counts.sum().item() + dropped
    busiest = counts.amax(1) / counts.mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    return {"expert_load": busiest.tolist(), "dropped": dropped / max(1, routed)}
