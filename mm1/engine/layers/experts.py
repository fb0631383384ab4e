"""The mixture-of-experts layer, and the back-ends that may compute it.

Each back-end is y = f(x [T, D], routing, gate_up [E, 2F, D], down [E, D, F]) of one dtype; "mm1" is this project's own
kernels, the others are there for comparison.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Decoder
from mm1.errors import UserError
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.routing import Routing, route

Backend = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]


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
        self.backend = BACKENDS[c.moe_backend]()

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


def _mm1(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    return moe_mlp(x, r.index, r.weight, gate_up, down, order=r.order)


def _torch(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    slots, position, offsets = r.order
    # Rows past the last offset come back uninitialised, results and gradients alike: nothing may read them.
    taken = torch.arange(len(slots), device=x.device)[:, None] < offsets[-1]
    rows = torch.where(taken, x[slots // position.shape[1]], 0)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    y = torch.where(taken, y, 0)[position.long()]
    return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)


class _Megablocks:
    def __init__(self) -> None:
        try:
            from megablocks import grouped_gemm_util as grouped
            from megablocks import ops
        except ImportError as error:
            how = f'pip install "mm1-engine[gpu]" ({error})'
            raise UserError(f'moe_backend "megablocks" needs megablocks: {how}') from None
        if not grouped.grouped_gemm_is_available():
            raise UserError('moe_backend "megablocks" needs grouped_gemm beside it: pip install grouped_gemm')
        self.grouped, self.ops = grouped, ops

    def __reduce__(self) -> tuple[Any, ...]:
        return _Megablocks, ()  # modules cannot be pickled

    def __call__(self, x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        grouped, ops = self.grouped, self.ops
        if not x.is_cuda or x.dtype != torch.bfloat16:
            raise UserError(f'moe_backend "megablocks" computes in bf16 on CUDA, not in {x.dtype} on {x.device.type}')
        K, E = r.index.shape[1], len(down)
        with torch.no_grad():
            index = r.index.flatten()
            bin_ids, order = ops.sort(index, max((E - 1).bit_length(), 1))
            counts = ops.histogram(index, E)
            bins = ops.inclusive_cumsum(counts, 0).reshape(-1)  # of one expert it comes back without an axis
            sizes = counts.cpu().long()  # where its grouped GEMM wants them
        rows = ops.gather(x, order, bin_ids, bins, K)
        gate, up = grouped.ops.gmm(rows, gate_up, sizes, trans_b=True).chunk(2, dim=-1)
        y = grouped.ops.gmm(F.silu(gate) * up, down, sizes, trans_b=True)
        return ops.scatter(y, order, bin_ids, r.weight.flatten(), bins, K)


# Functions of the module, not closures: a model is pickled with its back-end.
BACKENDS: dict[str, Callable[[], Backend]] = {"mm1": lambda: _mm1, "torch": lambda: _torch, "megablocks": _Megablocks}
