"""Provide a small call of every public op, for tests of the promises that all ops share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm1.kernels.abstractor.bottleneck import NAMES, conv_block
from mm1.kernels.abstractor.pooling import adaptive_pool
from mm1.kernels.attention import Prefix, attention, paged_attention
from mm1.kernels.linear_cross_entropy import linear_cross_entropy
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.grouped import grouped_gemm, grouped_gemm_dw
from mm1.kernels.moe.routing import choose, route, sort_by_expert
from mm1.kernels.patches.embedding import embed_patches, patch_embed
from mm1.kernels.patches.loss import patch_loss
from mm1.kernels.patches.position_tables import positions

SIZES = [(2, 3), (4, 1), (3, 3)]  # of images, in patches
PATCHES = sum(h * w for h, w in SIZES)


class Call(NamedTuple):
    op: Callable[..., Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = {}  # noqa: RUF012
    differentiable: tuple[str, ...] = ()  # names of tensors that get gradients

    def __call__(self, **changes: Tensor) -> Any:
        return self.op(**self.tensors | changes, **self.settings)


def offsets(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device="cpu")


def _block(x: Tensor, grids: Any, **weights: Tensor) -> Tensor:
    return conv_block(x, grids, {name.replace("_", "."): w for name, w in weights.items()})


def _prefix_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **mask: Tensor) -> Tensor:
    return attention(q, k, v, cu_seqlens, mask=Prefix(mask["mask.lengths"]))


def every_op(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Return calls with seeded values on the CPU, whatever the default dtype and device are."""
    random = torch.Generator("cpu").manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=random, dtype=torch.int32, device="cpu")

    C, S = 16, 4
    shapes = {
        "conv1.conv.weight": (C, C, 1, 1), "conv2.conv.weight": (C, 1, 3, 3), "se.fc1.weight": (S, C, 1, 1),
        "se.fc1.bias": (S,), "se.fc2.weight": (C, S, 1, 1), "conv3.conv.weight": (C, C, 1, 1),
    }  # fmt: skip
    block = {name.replace(".", "_"): r(*shapes.get(name, (C,))) for name in NAMES if not name.startswith("downsample")}
    pixels = integers(256, PATCHES * 16, 3).to(torch.uint8)
    return {
        "moe_mlp": Call(
            moe_mlp,
            {"x": r(9, 16), "index": integers(4, 9, 2), "weight": r(9, 2), "gate_up": r(4, 24, 16),
             "down": r(4, 16, 12), "gate_up_bias": r(4, 24), "down_bias": r(4, 16)},
            {}, ("x", "weight", "gate_up", "down", "gate_up_bias", "down_bias"),
        ),
        "route": Call(partial(route, k=2), {"logits": r(9, 4), "mask": r(9) > 0}, {}, ("logits",)),
        "choose": Call(partial(choose, k=2), {"logits": r(9, 4), "mask": r(9) > 0}),
        "sort_by_expert": Call(partial(sort_by_expert, experts=4), {"index": integers(5, 9, 2)}),
        "grouped_gemm": Call(
            grouped_gemm, {"a": r(9, 16), "b": r(3, 16, 8), "offsets": offsets(4, 4, 8), "bias": r(3, 8)}, {},
            ("a", "b", "bias"),
        ),
        "grouped_gemm_dw": Call(
            grouped_gemm_dw, {"a": r(9, 16), "dy": r(9, 8), "offsets": offsets(4, 4, 8)}, {}, ("a", "dy")
        ),
        "patch_embed": Call(
            patch_embed, {"pixels": pixels, "weight": r(8, 48), "bias": r(8), "pos_embed": r(4, 4, 8)},
            {"sizes": [(4 * h, 4 * w) for h, w in SIZES], "patch_size": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3},
            ("weight", "bias", "pos_embed"),
        ),
        "embed_patches": Call(
            embed_patches, {"patches": r(PATCHES, 48), "weight": r(8, 48), "bias": r(8), "pos_embed": r(4, 4, 8)},
            {"grids": SIZES}, ("patches", "weight", "bias", "pos_embed"),
        ),
        "patch_loss": Call(
            patch_loss, {"x": r(9, 16), "weight": r(48, 16), "bias": r(48), "pixels": pixels,
                         "rows": integers(PATCHES + 1, 9)},
            {"grids": SIZES, "patch_size": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3}, ("x", "weight", "bias"),
        ),
        "positions": Call(positions, {"table": r(4, 4, 8)}, {"grids": SIZES}, ("table",)),
        "conv_block": Call(_block, {"x": r(PATCHES, C), **block}, {"grids": SIZES}, ("x", *block)),
        "adaptive_pool": Call(adaptive_pool, {"x": r(PATCHES, C)}, {"grids": SIZES, "out": (2, 2)}, ("x",)),
        "attention": Call(
            _prefix_attention,
            {"q": r(9, 4, 16), "k": r(9, 2, 16), "v": r(9, 2, 16), "cu_seqlens": offsets(0, 5, 9),
             "mask.lengths": offsets(0, 3)},
            {}, ("q", "k", "v"),
        ),
        "paged_attention": Call(
            paged_attention,
            {"q": r(3, 4, 16), "k": r(5, 4, 2, 16), "v": r(5, 4, 2, 16), "cu_q": offsets(0, 1, 3),
             "tables": offsets(3, 1, 0, 4).view(2, 2), "lengths": offsets(7, 6)},
            {"rows": 2},
        ),
        "linear_cross_entropy": Call(
            linear_cross_entropy, {"x": r(9, 16), "weight": r(20, 16), "targets": integers(20, 9)}, {}, ("x", "weight")
        ),
    }  # fmt: skip


def results(actual: Any) -> list[Tensor]:
    """Return the tensors of an op's result as a flat list."""
    if isinstance(actual, Tensor):
        return [actual]
    return [] if not isinstance(actual, tuple) else [tensor for item in actual for tensor in results(item)]


def values_and_gradients(call: Call) -> list[Tensor]:
    tensors = {name: call.tensors[name].detach().clone().requires_grad_() for name in call.differentiable}
    values = results(call(**tensors))
    wanted = [y for y in values if y.requires_grad]
    if wanted:
        # Numbers that do not depend on y, whose rounding they would amplify.
        upstream = [torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view(y.shape) for y in wanted]
        values += torch.autograd.grad(wanted, [*tensors.values()], upstream)
    return [y.detach() for y in values]
