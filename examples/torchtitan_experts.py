"""Let mm1 compute torchtitan's GroupedExperts, with the same parameters and checkpoints.

    torchtitan … --override.imports torchtitan_experts.mm1_experts

torchtitan (0.3) passes rows that its dispatcher has sorted by expert, and applies routing weights itself. So each row
is a token with one expert and weight 1. Rows beyond the counts become zeros, in results and gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts

from mm1.kernels.moe import moe_mlp
from mm1.kernels.moe.routing import Order


class MM1Experts(GroupedExperts):
    """Replace the forward of torchtitan's experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        gate, down, up = (_local(w).bfloat16() for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        offsets = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        rows = torch.arange(len(x_RD), device=x_RD.device, dtype=torch.int32)
        index = torch.searchsorted(offsets, rows, right=True, out_int32=True)[:, None]
        order = Order(rows, rows.clone()[:, None], offsets)
        ones = torch.ones(len(x_RD), 1, device=x_RD.device)
        return moe_mlp(x_RD.bfloat16(), index, ones, gate, down, up=up, order=order).type_as(x_RD)


@override(target=GroupedExperts.Config, exact=True, description="mixture of experts by mm1's Triton kernels")
def mm1_experts(config: GroupedExperts.Config) -> MM1Experts.Config:
    return derive(config, MM1Experts.Config)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
