"""The mixture-of-experts layer, and the back-ends that may compute it.

Each back-end is y = f(x [T, D], routing, gate_up [E, 2F, D], down [E, D, F]) of one dtype; "mm1" is this project's own
kernels, the others are there for comparison.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine import config
from mm1.engine.data.record import DataError
from mm1.kernels.experts import moe_mlp
from mm1.kernels.route import Routing, route

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
    """Mixture of experts with a dropless top-k router in fp32; returns its two auxiliary losses beside the result."""

    def __init__(self, c: config.Decoder):
        super().__init__()
        self.k = c.experts_per_token
        self.router = Router(c.width, c.experts)
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.ffn, c.width))
        self.down = nn.Parameter(torch.empty(c.experts, c.width, c.ffn))
        self.backend = BACKENDS[c.moe_backend]()

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        routing = route(self.router(x), self.k, mask=mask)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y = self.backend(x.to(dtype), routing, self.gate_up.to(dtype), self.down.to(dtype))
        return y, routing.load_balance, routing.z_loss


def _mm1() -> Backend:
    return lambda x, r, gate_up, down: moe_mlp(x, r.index, r.weight, gate_up, down, order=r.order)


def _torch() -> Backend:
    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        slots, position, offsets = r.order
        # Rows past the last offset come back uninitialised, results and gradients alike: nothing may read them.
        taken = torch.arange(len(slots), device=x.device)[:, None] < offsets[-1]
        rows = torch.where(taken, x[slots // position.shape[1]], 0)
        gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
        y = torch.where(taken, y, 0)[position.long()]
        return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)

    return run


def _megablocks() -> Backend:
    try:
        from megablocks import grouped_gemm_util as grouped
        from megablocks import ops
    except ImportError as error:
        raise DataError(f'moe_backend "megablocks" needs megablocks: pip install "mm1-engine[gpu]" ({error})') from None
    if not grouped.grouped_gemm_is_available():
        raise DataError('moe_backend "megablocks" needs grouped_gemm beside it: pip install grouped_gemm')

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        if not x.is_cuda or x.dtype != torch.bfloat16:
            raise DataError(f'moe_backend "megablocks" computes in bf16 on CUDA, not in {x.dtype} on {x.device.type}')
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

    return run


BACKENDS: dict[str, Callable[[], Backend]] = {"mm1": _mm1, "torch": _torch, "megablocks": _megablocks}
