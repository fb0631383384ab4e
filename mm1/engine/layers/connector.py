"""Define connectors, which map any grid of image features to the same number of tokens for every image.

AveragePool     adaptive mean to √n × √n, then the readout (as in Emu2)
AttentionPool   n learned queries attend to the image's features
CAbstractor     blocks → adaptive mean → blocks → readout: Cha et al. 2024 (Honeybee), section 3.2, MM1's choice

Each maps features [P, Dv] of packed images and their grids to [N·n, D]. With `encoder_layers` above 0, the attention
pool's output and the abstractor's gates are initialised like products that write into a residual stream of that depth.
"""

import math

import torch
from torch import Tensor, nn

from mm1.engine.layers.config import POOL_HEADS, Connector
from mm1.engine.layers.layer import LEARNED_STD, BlockLayer, Fill, Layer, fan_in, normal
from mm1.engine.layers.workload import Layout, Operations, Workload, attention_operations
from mm1.errors import require
from mm1.kernels.abstractor.bottleneck import conv_block
from mm1.kernels.abstractor.bottleneck import cost as block_cost
from mm1.kernels.abstractor.pooling import adaptive_pool
from mm1.kernels.attention import Full, attention
from mm1.kernels.patches.grids import Grids, as_grids
from mm1.kernels.patches.position_tables import positions


def _side(tokens: int) -> int:
    """Return the square root of `tokens`. Raises ValueError if it is not an integer."""
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"connector: tokens is {tokens}, expected a square")
    return math.isqrt(tokens)


def readout(in_width: int, out_width: int, depth: int) -> nn.Sequential:
    """Return `depth` linears with SiLU between them."""
    layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
    for _ in range(depth - 1):
        layers += [nn.SiLU(), nn.Linear(out_width, out_width)]
    return nn.Sequential(*layers)


def readout_operations(rows: int, in_width: int, out_width: int, depth: int) -> int:
    """Return the forward operations of a readout's linears."""
    return 2 * rows * (in_width * out_width + (depth - 1) * out_width**2)


class AttentionPool(Layer):
    """Pool features by pre-norm cross-attention of learned queries and an MLP, each with a residual.

    The sizes are those of axlearn's AttentionPooling.
    """

    vectors = ("queries",)

    def __init__(
        self, in_width: int, out_width: int, *, tokens: int = 144, heads: int = POOL_HEADS, encoder_layers: int = 0
    ):
        super().__init__()
        self.heads, self.encoder_layers = heads, encoder_layers
        self.queries = nn.Parameter(torch.empty(tokens, out_width))
        self.norm_queries = nn.LayerNorm(out_width)
        self.norm_features = nn.LayerNorm(in_width)
        self.q = nn.Linear(out_width, out_width)
        self.kv = nn.Linear(in_width, 2 * out_width)
        self.out = nn.Linear(out_width, out_width)
        self.norm_mlp = nn.LayerNorm(out_width)
        self.mlp = nn.Sequential(nn.Linear(out_width, 4 * out_width), nn.GELU(), nn.Linear(4 * out_width, out_width))

    def forward(self, features: Tensor, grids) -> Tensor:
        grids = as_grids(grids, features.device)
        n, width = self.queries.shape
        q = self.q(self.norm_queries(self.queries)).expand(grids.images, n, width)
        q = q.reshape(-1, self.heads, width // self.heads)
        k, v = self.kv(self.norm_features(features)).unflatten(1, (2, self.heads, -1)).unbind(1)
        cu_q = torch.arange(grids.images + 1, dtype=torch.int32, device=features.device) * n
        pooled = attention(
            q, k, v, cu_q, mask=Full(), cu_seqlens_k=grids.cu_seqlens, max_length=max(n, grids.longest)
        ).flatten(1)
        x = self.queries.repeat(grids.images, 1) + self.out(pooled)
        return x + self.mlp(self.norm_mlp(x))

    def initial_values(self) -> dict[str, Fill]:
        return {"queries": normal(LEARNED_STD), "out.weight": fan_in(self.out.weight.shape[1], self.encoder_layers)}

    def operations(self, workload: Workload) -> list[Operations]:
        n, width = self.queries.shape
        queries = 2 * n * width**2 * min(workload.images, 1)  # the same for all images
        keys = 4 * workload.patches * self.kv.in_features * width
        pairs = attention_operations(workload.image_patches * n, 1, width)
        return [Operations("connector", queries + keys + pairs + 2 * workload.images * n * 9 * width**2)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        n, width = self.queries.shape
        keys = workload.patches * (self.kv.in_features + 2 * width)
        return layout.itemsize * (keys + workload.images * n * 13 * width)


class _Conv(nn.Module):
    """Hold a convolution without bias and a LayerNorm under timm's names, conv and bn, so that its weights load."""

    def __init__(self, in_width: int, width: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, size, groups=1 if size == 1 else width, bias=False)
        self.bn = nn.LayerNorm(width, eps=1e-5)


class ConvBlock(BlockLayer):
    """Hold the parameters of one block under timm's names; mm1.kernels.abstractor.bottleneck computes it.

    The connector counts its operations and bytes.
    """

    compiled_only = True

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
    """Apply `depth` blocks named b1, b2, … to packed images of any grids; the last block pools its result to `pool`."""

    def __init__(self, in_width: int, width: int, depth: int):
        super().__init__()
        for i in range(depth):
            self.add_module(f"b{i + 1}", ConvBlock(in_width if i == 0 else width, width))

    def forward(self, x: Tensor, grids: Grids, pool: tuple[int, int] | None = None) -> Tensor:
        *blocks, last = self.children()
        for block in blocks:
            x = block(x, grids)
        return last(x, grids, pool)


class CAbstractor(Layer):
    """Apply convolution blocks before and after an adaptive mean, then the readout.

    Modules and parameters have Honeybee's names (`net.0.b1.conv1.conv.weight` …, `readout.…`, `pos_emb [1, h·w, Dv]`).
    position_grid: (h, w) of the learned positions, which are resampled to other grids; None: no positions.
    """

    vectors = ("pos_emb",)

    def __init__(
        self, in_width: int, out_width: int, *, hidden: int = 1024, depth: int = 3, tokens: int = 144,
        readout_depth: int = 2, position_grid: tuple[int, int] | None = None, encoder_layers: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.in_width, self.out_width, self.hidden, self.depth = in_width, out_width, hidden, depth
        self.readout_depth, self.encoder_layers = readout_depth, encoder_layers
        self.out = (_side(tokens), _side(tokens))
        self.position_grid = position_grid
        if position_grid is not None:
            self.pos_emb = nn.Parameter(torch.empty(1, math.prod(position_grid), in_width))
        if depth:
            # Index 1 is the pool, which has no parameters.
            self.net = nn.ModuleDict({"0": Stage(in_width, hidden, depth), "2": Stage(hidden, hidden, depth)})
        self.readout = readout(hidden if depth else in_width, out_width, readout_depth)

    def forward(self, features: Tensor, grids) -> Tensor:
        x, grids = features, as_grids(grids, features.device)
        if self.position_grid is not None:
            table = self.pos_emb.view(*self.position_grid, -1)
            x = x + positions(table, grids, "bicubic", True, False).to(x.dtype)
        if self.depth:
            x = self.net["0"](x, grids, self.out)
            x = self.net["2"](x, _pooled(grids.images, self.out, x.device))
        else:
            x = adaptive_pool(x, grids, self.out)
        return self.readout(x)

    def initial_values(self) -> dict[str, Fill]:
        values: dict[str, Fill] = {} if self.position_grid is None else {"pos_emb": normal(LEARNED_STD)}
        for name, block in self.named_modules():
            if isinstance(block, ConvBlock):
                squeezed = block.get_parameter("se.fc2.weight").shape[1]
                values[f"{name}.se.fc2.weight"] = fan_in(squeezed, self.encoder_layers)
        return values

    def operations(self, workload: Workload) -> list[Operations]:
        rows, hidden, images = workload.images * math.prod(self.out), self.hidden, workload.images
        width, blocks = self.in_width, 0
        if self.depth:
            widths = [width] + [hidden] * (self.depth - 1)
            blocks = sum(block_cost(workload.patches, images, before, hidden).flops for before in widths)
            blocks += self.depth * block_cost(rows, images, hidden, hidden).flops
            width = hidden
        return [Operations("connector", blocks + readout_operations(rows, width, self.out_width, self.readout_depth))]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        rows, hidden = workload.images * math.prod(self.out), self.hidden
        # conv_block stores x, W1 x and W3 c of each block; the mean alone stores nothing.
        blocks = 3 * self.depth * hidden * (workload.patches + rows)
        blocks += workload.patches * self.in_width * (self.depth > 0)
        pooled = hidden if self.depth else self.in_width
        readout = rows * (pooled + 2 * (self.readout_depth - 1) * self.out_width)
        return layout.itemsize * (blocks + readout)


class AveragePool(CAbstractor):
    """Pool features by an adaptive mean, then apply the readout: a C-Abstractor without blocks and positions."""

    vectors = ()

    def __init__(self, in_width: int, out_width: int, *, tokens: int = 144, readout_depth: int = 1):
        super().__init__(in_width, out_width, depth=0, tokens=tokens, readout_depth=readout_depth)


def _pooled(images: int, out: tuple[int, int], device: torch.device) -> Grids:
    """Return the grids of images that are pooled to `out`."""
    first = torch.arange(images, device=device) * (out[0] * out[1])
    rows, h, w = (torch.full_like(first, n) for n in (out[0] * out[1], *out))
    return Grids.of_tensors(first, rows, h, w, images * out[0] * out[1])


def build_connector(c: Connector, in_width: int, out_width: int, encoder_layers: int = 0) -> Layer:
    """Return the connector of settings `c` between an encoder and a decoder of these widths."""
    if c.kind == "average":
        return AveragePool(in_width, out_width, tokens=c.tokens, readout_depth=c.readout_depth)
    if c.kind == "attention":
        return AttentionPool(in_width, out_width, tokens=c.tokens, encoder_layers=encoder_layers)
    require(c.kind == "c-abstractor", "setting model.connector.kind", c.kind, "a connector of build_connector")
    return CAbstractor(
        in_width, out_width, hidden=c.hidden, depth=c.depth, tokens=c.tokens, readout_depth=c.readout_depth,
        position_grid=c.position_grid, encoder_layers=encoder_layers,
    )  # fmt: skip
