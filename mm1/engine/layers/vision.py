"""ViT encoder on packed patches: images of any grid, full attention inside each image.

    x = embed(pixels) [P, Dv];  x = norm(x) (CLIP's pre-norm);  L × [x += attention(norm(x)); x += mlp(norm(x))]
    AIM: x = norm(embed(pixels) + bias) + positions, linears without biases

The result is the last block's output, before the final norm, without class tokens: hidden_states[-1] of transformers'
CLIPVisionModel, the layer Honeybee's C-Abstractor is fed (MM1 does not say which).
Sources: Dosovitskiy et al. 2021; El-Nouby et al. 2024 (AIM).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Vision
from mm1.engine.layers.replaceable import Replaceable
from mm1.kernels.attention import Full, attention
from mm1.kernels.patches.embedding import patch_embed
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def sincos(grids: Grids, width: int) -> Tensor:
    """AIM's positions fp32 [P, width] of patches at (row, column) of their image, whatever its grid.

        [sin(column · f) | cos(column · f) | sin(row · f) | cos(row · f)],  f_i = 10000^(-i / q), i < q = width / 4

    Source: He et al. 2022 (MAE), whose halves stand in this order; El-Nouby et al. 2024.
    """
    first, _, _, columns = grids.table.index_select(0, grids.owner.clamp(min=0)).unbind(1)  # padding has an image's
    place = torch.arange(grids.patches, device=first.device) - first
    columns = columns.clamp(min=1)
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=first.device, dtype=torch.float32) / quarter)
    column, row = ((x.float()[:, None] * frequencies) for x in (place % columns, place // columns))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)


class VisionBlock(Replaceable):
    def __init__(self, c: Vision):
        super().__init__()
        self.heads, self.activation = c.heads, ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.bias)
        self.out = nn.Linear(c.width, c.width, bias=c.bias)
        self.norm2 = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn, bias=c.bias)
        self.fc2 = nn.Linear(c.ffn, c.width, bias=c.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)  # (P, H, Dh) each
        x = x + self.out(attention(q, k, v, cu_seqlens, mask=Full(), max_length=longest).flatten(1))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class VisionEncoder(nn.Module):
    def __init__(self, c: Vision):
        super().__init__()
        self.config = c
        self.patch_weight = nn.Parameter(torch.empty(c.width, c.patch * c.patch * 3))
        if c.positions == "table":
            self.positions = nn.Parameter(torch.empty(*c.table, c.width))
        if c.patch_norm:
            self.patch_bias = nn.Parameter(torch.empty(c.width))
            self.patch_norm = nn.LayerNorm(c.width, c.eps)
        if c.class_token:
            self.class_token = nn.Parameter(torch.empty(c.width))  # its position is part of it
        self.pre_norm = nn.LayerNorm(c.width, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.layers))

    def forward(self, pixels: Tensor, grids: Grids) -> Tensor:
        """pixels uint8 [ΣHW, 3], grids of the batch -> [P, Dv]."""
        c = self.config
        learned = self.positions if c.positions == "table" else None
        bias, table = (self.patch_bias, None) if c.patch_norm else (None, learned)
        x, cu_seqlens = patch_embed(
            pixels, grids, self.patch_weight, bias, table, patch_size=c.patch, mean=c.mean, std=c.std,
            interpolation=c.interpolation,
        )  # fmt: skip
        x = self.patch_norm(x) if c.patch_norm else x
        if learned is None:
            x = x + sincos(grids.to(x.device), c.width).to(x.dtype)
        elif table is None:
            x = x + positions(learned, grids, c.interpolation).to(x.dtype)
        patch_rows = None
        if c.class_token:
            class_rows, patch_rows, cu_seqlens = grids.to(x.device).with_class_token()
            tokens = self.class_token.to(x.dtype).expand(grids.images, -1)
            x = torch.cat([tokens, x]).index_select(0, torch.cat([class_rows, patch_rows]).argsort())
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x, cu_seqlens, grids.longest + c.class_token)
        return x if patch_rows is None else x.index_select(0, patch_rows)
