"""Connectors: any grid of image features -> the same number of tokens for every image.

AveragePool     adaptive mean to √n × √n, then the readout (as in Emu2)
AttentionPool   n learned queries attend to the image's features
CAbstractor     blocks → adaptive mean → blocks → readout: Cha et al. 2024 (Honeybee), section 3.2, MM1's choice

Each maps features [P, Dv] of packed images and their grids to [N·n, D].
"""

import math

import torch
from torch import Tensor, nn

from mm1.engine.layers.config import POOL_HEADS, Connector
from mm1.engine.layers.replaceable import Replaceable
from mm1.kernels.abstractor.bottleneck import conv_block
from mm1.kernels.abstractor.pooling import adaptive_pool
from mm1.kernels.attention import Full, attention
from mm1.kernels.patches.grids import Grids, as_grids
from mm1.kernels.patches.position_tables import positions


def _side(tokens: int) -> int:
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"connector: tokens is {tokens}, expected a square")
    return math.isqrt(tokens)


def readout(in_width: int, out_width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [nn.SiLU(), nn.Linear(out_width, out_width)]
    return nn.Sequential(*layers)


class AveragePool(nn.Module):
    def __init__(self, in_width: int, out_width: int, *, tokens: int = 144, readout_depth: int = 1):
        super().__init__()
        self.out = (_side(tokens), _side(tokens))
        self.readout = readout(in_width, out_width, readout_depth)

    def forward(self, tokens: Tensor, grids) -> Tensor:
        return self.readout(adaptive_pool(tokens, grids, self.out))


class AttentionPool(nn.Module):
    """One cross-attention layer with residual and one MLP, pre-norm; the shape of axlearn's AttentionPooling."""

    def __init__(self, in_width: int, out_width: int, *, tokens: int = 144, heads: int = POOL_HEADS):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(tokens, out_width) * 0.02)
        self.norm_queries = nn.LayerNorm(out_width)
        self.norm_features = nn.LayerNorm(in_width)
        self.q = nn.Linear(out_width, out_width)
        self.kv = nn.Linear(in_width, 2 * out_width)
        self.out = nn.Linear(out_width, out_width)
        self.norm_mlp = nn.LayerNorm(out_width)
        self.mlp = nn.Sequential(nn.Linear(out_width, 4 * out_width), nn.GELU(), nn.Linear(4 * out_width, out_width))

    def forward(self, tokens: Tensor, grids) -> Tensor:
        grids = as_grids(grids, tokens.device)
        n, width = self.queries.shape
        q = (
            self.q(self.norm_queries(self.queries))
            .expand(grids.images, n, width)
            .reshape(-1, self.heads, width // self.heads)
        )
        k, v = self.kv(self.norm_features(tokens)).unflatten(1, (2, self.heads, -1)).unbind(1)
        cu_q = torch.arange(grids.images + 1, dtype=torch.int32, device=tokens.device) * n
        pooled = attention(
            q, k, v, cu_q, mask=Full(), cu_seqlens_k=grids.cu_seqlens, max_length=max(n, grids.longest)
        ).flatten(1)
        x = self.queries.repeat(grids.images, 1) + self.out(pooled)
        return x + self.mlp(self.norm_mlp(x))


class _Conv(nn.Module):
    """Convolution without bias and LayerNorm; they are called conv and bn as in timm, so that its weights load."""

    def __init__(self, in_width: int, width: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, size, groups=1 if size == 1 else width, bias=False)
        self.bn = nn.LayerNorm(width, eps=1e-5)


class ConvBlock(Replaceable):
    """Parameters of one block under timm's names; the work is mm1.kernels.abstractor.bottleneck's."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        squeezed = round(0.25 * in_width)
        self.conv1 = _Conv(in_width, width, 1)
        self.conv2 = _Conv(width, width, 3)
        self.se = nn.ModuleDict({"fc1": nn.Conv2d(width, squeezed, 1), "fc2": nn.Conv2d(squeezed, width, 1)})
        self.conv3 = _Conv(width, width, 1)
        if in_width != width:
            self.downsample = _Conv(in_width, width, 1)

    def forward(self, x: Tensor, grids: Grids, pool: tuple[int, int] | None = None) -> Tensor:
        return conv_block(x, grids, dict(self.named_parameters()), pool=pool)


class Stage(nn.Module):
    """`depth` blocks named b1, b2, … on packed images of any grids; pool: the last one's result is pooled."""

    def __init__(self, in_width: int, width: int, depth: int):
        super().__init__()
        for i in range(depth):
            self.add_module(f"b{i + 1}", ConvBlock(in_width if i == 0 else width, width))

    def forward(self, x: Tensor, grids: Grids, pool: tuple[int, int] | None = None) -> Tensor:
        *blocks, last = self.children()
        for block in blocks:
            x = block(x, grids)
        return last(x, grids, pool)


class CAbstractor(nn.Module):
    """Honeybee's module and parameter names (`net.0.b1.conv1.conv.weight` …, `readout.…`, `pos_emb [1, h·w, Dv]`).

    position_grid: (h, w) of pos_emb, which is resampled to other grids; None for none.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        hidden: int = 1024,
        depth: int = 3,
        tokens: int = 144,
        readout_depth: int = 2,
        position_grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.out = (_side(tokens), _side(tokens))
        self.position_grid = position_grid
        if position_grid is not None:
            self.pos_emb = nn.Parameter(torch.randn(1, position_grid[0] * position_grid[1], in_width) * 0.02)
        if depth:
            # Index 1 is the pool, which has no parameters.
            self.net = nn.ModuleDict({"0": Stage(in_width, hidden, depth), "2": Stage(hidden, hidden, depth)})
        self.readout = readout(hidden if depth else in_width, out_width, readout_depth)

    def forward(self, tokens: Tensor, grids) -> Tensor:
        grids = as_grids(grids, tokens.device)
        x = tokens
        if self.position_grid is not None:
            table = self.pos_emb.view(*self.position_grid, -1)
            x = x + positions(table, grids, "bicubic", True, False).to(x.dtype)
        if hasattr(self, "net"):
            x = self.net["0"](x, grids, self.out)
            x = self.net["2"](x, _pooled(grids.images, self.out, x.device))
        else:
            x = adaptive_pool(x, grids, self.out)
        return self.readout(x)


def _pooled(images: int, out: tuple[int, int], device: torch.device) -> Grids:
    """The grids after the pool."""
    first = torch.arange(images, device=device) * (out[0] * out[1])
    rows, h, w = (torch.full_like(first, n) for n in (out[0] * out[1], *out))
    return Grids.of_tensors(first, rows, h, w, images * out[0] * out[1])


def build(c: Connector, in_width: int, out_width: int) -> nn.Module:
    if c.kind == "average":
        return AveragePool(in_width, out_width, tokens=c.tokens, readout_depth=c.readout_depth)
    if c.kind == "attention":
        return AttentionPool(in_width, out_width, tokens=c.tokens)
    if c.kind == "c-abstractor":
        return CAbstractor(
            in_width, out_width, hidden=c.hidden, depth=c.depth, tokens=c.tokens, readout_depth=c.readout_depth,
            position_grid=c.position_grid,
        )  # fmt: skip
    raise ValueError(f"connector: kind is {c.kind!r}, expected 'c-abstractor', 'attention' or 'average'")
