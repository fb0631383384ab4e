"""Define the ViT encoder on packed patches of images of any grid, with attention inside each image.

    x = embed(pixels) [P, Dv];  x = norm(x) (CLIP's pre-norm);  L × [x += attention(norm(x)); x += mlp(norm(x))]
    AIM: x = norm(embed(pixels) + bias) + positions, linears without biases, x = norm(x) after the last block

Attention is full, or causal behind a prefix of each image (AIM's pre-training).
The result has no class tokens. Without a final norm it is hidden_states[-1] of transformers' CLIPVisionModel, which is
the input of Honeybee's C-Abstractor (MM1 does not publish its choice).
Sources: Dosovitskiy et al. 2021; El-Nouby et al. 2024 (AIM), section 4.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Vision
from mm1.engine.layers.layer import LEARNED_STD, BlockLayer, Fill, Layer, fan_in, fill_zeros, normal
from mm1.engine.layers.segments import Segments
from mm1.engine.layers.workload import KeptBytes, Layout, Operations, Workload, attention_operations
from mm1.kernels.attention import attention
from mm1.kernels.patches.embedding import cost as embedding_cost
from mm1.kernels.patches.embedding import patch_embed
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def sincos(grids: Grids, width: int, rows: Tensor | None = None) -> Tensor:
    """Return AIM's positions fp32 [P, width] of patches at (row, column) of images of any grid.

        [sin(column · f) | cos(column · f) | sin(row · f) | cos(row · f)],  f_i = 10000^(-i / q), i < q = width / 4

    rows: int64 [R], the patches whose positions are returned, [R, width]; None: all.
    Sources: He et al. 2022 (MAE) for the order of the halves; El-Nouby et al. 2024.
    """
    rows = torch.arange(grids.patches, device=grids.table.device) if rows is None else rows
    image = grids.owner.index_select(0, rows).clamp(min=0)  # -1: padding
    first, _, _, columns = grids.table.index_select(0, image).unbind(1)
    place = rows - first
    columns = columns.clamp(min=1)
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=first.device, dtype=torch.float32) / quarter)
    column, row = ((x.float()[:, None] * frequencies) for x in (place % columns, place // columns))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)


def sincos_table(rows: int, columns: int, width: int) -> Tensor:
    """Return 2-D sine-cosine positions fp32 [rows, columns, width], the initial value of a learned table.

    A smooth table keeps its meaning when it is resampled to another grid; white noise would average out. Source: Chen
    et al. 2021 (MoCo v3).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    r, c = torch.arange(rows)[:, None] * frequencies, torch.arange(columns)[:, None] * frequencies
    parts = [r.sin()[:, None], r.cos()[:, None], c.sin()[None], c.cos()[None]]
    table = torch.cat([part.expand(rows, columns, -1) for part in parts], dim=-1)
    return F.pad(table, (0, width - table.shape[-1]))


class VisionBlock(BlockLayer):
    """Add attention inside each image and an MLP to the residual stream."""

    def __init__(self, c: Vision):
        super().__init__()
        self.config = c
        self.heads, self.activation = c.heads, ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.bias)
        self.out = nn.Linear(c.width, c.width, bias=c.bias)
        self.norm2 = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.ffn, bias=c.bias)
        self.fc2 = nn.Linear(c.ffn, c.width, bias=c.bias)

    def forward(self, x: Tensor, images: Segments) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)  # (P, H, Dh) each
        y = attention(q, k, v, images.cu_seqlens, mask=images.mask, max_length=images.longest)
        x = x + self.out(y.flatten(1))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def initial_values(self) -> dict[str, Fill]:
        products = {"out.weight": self.out.weight, "fc2.weight": self.fc2.weight}  # into the residual stream
        return {name: fan_in(weight.shape[1], self.config.layers) for name, weight in products.items()}

    def operations(self, workload: Workload) -> list[Operations]:
        c, rows = self.config, workload.visual_rows(self.config.class_token)
        pairs = workload.visual_pairs(c.class_token)
        return [
            Operations("vision linear", 2 * rows * (4 * c.width**2 + 2 * c.width * c.ffn)),
            Operations("vision attention", attention_operations(pairs, c.heads, c.width // c.heads), attention=True),
        ]

    def kept_bytes(self, workload: Workload, layout: Layout) -> KeptBytes:
        c, rows = self.config, workload.visual_rows(self.config.class_token)
        gelu = 3 if c.activation == "quick_gelu" else 2  # quick_gelu stores its sigmoid too
        # Stored are the inputs of the norms, their outputs, q, k, v, y, and the values of the MLP.
        everything = layout.residual * 2 * c.width + layout.itemsize * (6 * c.width + gelu * c.ffn)
        results = layout.itemsize * (6 * c.width + c.ffn)
        return KeptBytes(rows * everything, rows * results, layout.residual * rows * c.width)

    def shard_axes(self) -> dict[str, int]:
        return {}  # each process of a tensor group computes the whole encoder


class VisionEncoder(Layer):
    """Embed the patches of images and apply the blocks."""

    vectors = ("positions", "class_token")

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
            self.class_token = nn.Parameter(torch.empty(c.width))  # includes its position
        self.pre_norm = nn.LayerNorm(c.width, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.layers))
        self.final_norm = nn.LayerNorm(c.width, c.eps) if c.final_norm else nn.Identity()

    def initial_values(self) -> dict[str, Fill]:
        c = self.config
        values: dict[str, Fill] = {"patch_weight": fan_in(self.patch_weight.shape[1])}
        if c.positions == "table":
            values["positions"] = lambda table, generator: table.copy_(sincos_table(*table.shape))
        values |= {"patch_bias": fill_zeros} if c.patch_norm else {}
        return values | ({"class_token": normal(LEARNED_STD)} if c.class_token else {})

    def operations(self, workload: Workload) -> list[Operations]:
        c = self.config
        flops = embedding_cost(workload.patches, c.width, 3 * c.patch**2).flops
        return [Operations("patch embedding", flops, backward=1)]  # pixels have no gradient

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        c = self.config
        rows = workload.visual_rows(c.class_token)
        return 3 * c.patch**2 * workload.patches + layout.residual * rows * c.width * (1 + c.final_norm)

    def forward(
        self, pixels: Tensor, grids: Grids, prefix: Tensor | None = None, layers: Collection[int] | None = None,
        order: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the features [P, Dv] of pixels uint8 [ΣHW, 3] of images with these grids.

        prefix int32 [N]: attention is causal behind the first prefix[n] patches of image n; None: it is full. layers:
        return the mean of the outputs of these blocks, counted from 0; None: the last one's, after the final norm.
        order: int64 [P], the packed patches in the order in which attention is causal (patch_order.py); None: row by
        row. The features are row by row in any case.
        """
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
        x = x if order is None else x.index_select(0, order)
        patch_rows = None
        if c.class_token:
            class_rows, patch_rows, cu_seqlens = grids.to(x.device).with_class_token()
            tokens = self.class_token.to(x.dtype).expand(grids.images, -1)
            x = torch.cat([tokens, x]).index_select(0, torch.cat([class_rows, patch_rows]).argsort())
        x = self.pre_norm(x)
        longest = grids.longest
        if grids.sizes is not None:  # images past these only fill the budget
            cu_seqlens = cu_seqlens[: max(len(grids.sizes), 1) + 1]
            longest = max((h * w for h, w in grids.sizes), default=0)
        if prefix is not None:
            prefix = prefix + c.class_token
        images, kept = Segments.of(cu_seqlens, longest + c.class_token, prefix), []
        for i, block in enumerate(self.blocks):
            x = block(x, images)
            kept += [x] if layers is not None and i in layers else []
        x = self.final_norm(x) if layers is None else torch.stack(kept).mean(0)
        x = x if patch_rows is None else x.index_select(0, patch_rows)
        return x if order is None else x.index_select(0, order.argsort())
