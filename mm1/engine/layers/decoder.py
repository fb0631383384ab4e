"""Define the decoder on packed documents: RMSNorm, RoPE, grouped-query attention, gated MLP or mixture of experts.

    L × [x += attention(norm(x)), causal, inside each document;  x += mlp(norm(x))];  norm
Sources: Touvron et al. 2023 (Llama), Jiang et al. 2024 (Mixtral); MM1 section 4 for the layers with experts.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Decoder, is_moe
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.layer import BlockLayer, Fill, Layer, fan_in, prefixed, product_dtype
from mm1.engine.layers.segments import Segments
from mm1.engine.layers.sharding import DeviceMesh, all_reduce_around, all_reduce_norm_gradient, split_linear
from mm1.engine.layers.workload import KeptBytes, Layout, Operations, Traffic, Workload, attention_operations
from mm1.kernels.attention import Causal, attention
from mm1.kernels.linear_cross_entropy import CHUNK, linear_cross_entropy
from mm1.kernels.linear_cross_entropy import cost as head_cost


class Rope(NamedTuple):
    """Hold the cosines and sines of rotary positions."""

    cos: Tensor  # fp32 [T, 1, Dh/2]
    sin: Tensor


def rope(positions: Tensor, width: int, theta: float) -> Rope:
    """Return the rotary embedding of positions int [T] for heads of `width`; pairs are (i, i + Dh/2), as in Llama."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions.float()[:, None, None] * frequencies
    return Rope(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rope) -> Tensor:
    """Rotate each pair of x fp32 [T, H, Dh] by its angle."""
    # The halves are a dimension of their own, because Inductor's CPU code for slices of the last dimension is scalar.
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack([a * angles.cos - b * angles.sin, b * angles.cos + a * angles.sin], dim=-2).flatten(-2)


class Attention(Layer):
    """Compute causal grouped-query self-attention inside each document.

    The rows of qkv are grouped by key-value head: its query heads, its key, its value. A slice of heads is thus a slice
    of rows.
    """

    def __init__(self, c: Decoder):
        super().__init__()
        self.config = c
        self.queries_per_kv, self.head_width = c.heads // c.kv_heads, c.head_width
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_width, bias=False)
        self.out = nn.Linear(c.heads * c.head_width, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_width, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_width, c.eps) if c.qk_norm else nn.Identity()

    def project(self, x: Tensor, angles: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, H, Dh], k and v [T, G, Dh] of x [T, D]."""
        qkv = self.qkv(x).unflatten(1, (-1, self.queries_per_kv + 2, self.head_width))
        q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]  # (T, H | G, Dh)
        q, k = (rotate(norm(x.float()), angles).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v

    def forward(self, x: Tensor, angles: Rope, documents: Segments) -> Tensor:
        y = attention(*self.project(x, angles), documents.cu_seqlens, mask=Causal(), max_length=documents.longest)
        return self.out(y.flatten(1))

    def initial_values(self) -> dict[str, Fill]:
        return {"out.weight": fan_in(self.out.weight.shape[1], self.config.layers)}

    def operations(self, workload: Workload) -> list[Operations]:
        c = self.config
        projections = 2 * c.width * (c.heads + c.kv_heads) * c.head_width
        pairs = attention_operations(workload.causal_pairs, c.heads, c.head_width)
        return [
            Operations("decoder linear", 2 * workload.tokens * projections, split=True),
            Operations("decoder attention", pairs, attention=True, split=True),
        ]

    def kept_bytes(self, workload: Workload, layout: Layout) -> tuple[float, float]:
        """Return the bytes stored for backward, and those of them that are results of products and attention."""
        c, itemsize = self.config, layout.itemsize
        pairs = (c.heads + c.kv_heads) * c.head_width / layout.tensor
        kept = 4 * pairs + itemsize * (2 * c.width + 3 * pairs)  # q and k before their norms in fp32, and rotated
        return workload.tokens * kept, workload.tokens * itemsize * (2 * pairs + 2 * c.width)

    def shard_axes(self) -> dict[str, int]:
        return {"qkv.weight": 0, "out.weight": 1}

    def split(self, mesh: DeviceMesh) -> None:
        split_linear(self.qkv, mesh, 0)
        split_linear(self.out, mesh, 1)
        all_reduce_norm_gradient(self.q_norm, mesh)
        all_reduce_norm_gradient(self.k_norm, mesh)
        all_reduce_around(self, mesh, product_dtype)


class MLP(Layer):
    """Compute a gated MLP: down(silu(gate(x)) · up(x))."""

    def __init__(self, c: Decoder):
        super().__init__()
        self.config = c
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        zero = x.new_zeros((), dtype=torch.float32)
        return self.down(F.silu(self.gate(x)) * self.up(x)), zero, zero, None

    def initial_values(self) -> dict[str, Fill]:
        return {"down.weight": fan_in(self.down.weight.shape[1], self.config.layers)}

    def operations(self, workload: Workload) -> list[Operations]:
        c = self.config
        return [Operations("decoder linear", 2 * workload.tokens * 3 * c.width * c.ffn, split=True)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> tuple[float, float]:
        """Return the bytes stored for backward, gate, up, silu(gate) and their product, and those of gate and up."""
        rows = workload.tokens * layout.itemsize * self.config.ffn / layout.tensor
        return 4 * rows, 2 * rows

    def shard_axes(self) -> dict[str, int]:
        return {"gate.weight": 0, "up.weight": 0, "down.weight": 1}

    def divided_counts(self) -> dict[str, int]:
        return {"ffn": self.config.ffn}

    def split(self, mesh: DeviceMesh) -> None:
        for name, linear in self.named_children():
            assert isinstance(linear, nn.Linear)
            split_linear(linear, mesh, self.shard_axes()[f"{name}.weight"])
        all_reduce_around(self, mesh, product_dtype)


class Block(BlockLayer):
    """Add attention and an MLP, or experts, to the residual stream."""

    float8 = True

    def __init__(self, c: Decoder, moe: bool):
        super().__init__()
        self.config = c
        self.norm1 = nn.RMSNorm(c.width, c.eps)
        self.attention = Attention(c)
        self.norm2 = nn.RMSNorm(c.width, c.eps)
        self.mlp = Experts(c) if moe else MLP(c)

    def forward(self, x: Tensor, angles: Rope, documents: Segments, mask: Tensor | None = None):
        x = x + self.attention(self.norm1(x), angles, documents)
        y, load_balance, z_loss, slots = self.mlp(self.norm2(x), mask)
        return x + y, load_balance, z_loss, slots

    def operations(self, workload: Workload) -> list[Operations]:
        return [*self.attention.operations(workload), *self.mlp.operations(workload)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> KeptBytes:
        rows = layout.residual * workload.tokens * self.config.width
        parts = [part.kept_bytes(workload, layout) for part in (self.attention, self.mlp)]
        everything, results = (sum(column) for column in zip(*parts))
        return KeptBytes(2 * rows + everything, results, rows)  # 2: inputs of the norms

    def shard_axes(self) -> dict[str, int]:
        return {
            **dict(prefixed("attention", self.attention.shard_axes())),
            **dict(prefixed("mlp", self.mlp.shard_axes())),
        }

    def divided_counts(self) -> dict[str, int]:
        return {"kv_heads": self.config.kv_heads, **self.mlp.divided_counts()}

    def split(self, mesh: DeviceMesh) -> None:
        """Divide heads, and the MLP's width or experts: two all-reduces per layer forward and two backward."""
        self.attention.split(mesh)
        self.mlp.split(mesh)

    def expert_layers(self) -> dict[str, Experts]:
        return {"mlp": self.mlp} if isinstance(self.mlp, Experts) else {}

    def traffic(self, workload: Workload) -> Traffic:
        rows = 2 * workload.tokens * self.config.width
        return Traffic(2 * rows, self.config.experts_per_token * rows if self.expert_layers() else 0.0)


class DecoderLM(Layer):
    """Hold the embedding, the blocks, the final norm and, if it is not tied, the head of a language model."""

    def __init__(self, c: Decoder):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        self.blocks = nn.ModuleList(Block(c, is_moe(c, layer)) for layer in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.eps)
        if not c.tied:
            self.head = nn.Linear(c.width, c.vocabulary, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Return the weight of the head [V, D], which is the embedding's if they are tied."""
        return self.embedding.weight if self.config.tied else self.head.weight

    def forward(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """Compute hidden states of embedded tokens x [T, D] of packed documents.

        positions int [T]; mask bool [T], False: padding; longest: tokens of the longest document (None: T). Returns
        hidden [T, D] after the final norm, the means over the mixture layers of load-balance and z-loss, and each
        mixture layer's slots (see Experts).
        """
        c = self.config
        documents = Segments.of(cu_seqlens, longest or len(x))
        angles = rope(positions, c.head_width, c.rope_theta)
        load_balance = z_loss = x.new_zeros((), dtype=torch.float32)
        slots: list[Tensor] = []
        for block in self.blocks:
            x, balance, z, routed = block(x, angles, documents, mask)
            load_balance, z_loss = load_balance + balance, z_loss + z
            slots += [] if routed is None else [routed]
        mixtures = max(1, len(slots))
        return self.norm(x), load_balance / mixtures, z_loss / mixtures, slots

    def document_losses(self, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the mean loss fp32 [B] of each document's targets, NaN where it has none.

        hidden [T, D] after the final norm, targets int [T], cu_seqlens int32 [B + 1].
        """
        bounds = pairwise(cu_seqlens.tolist())
        return torch.stack([linear_cross_entropy(hidden[a:b], self.head_weight, targets[a:b]) for a, b in bounds])

    def operations(self, workload: Workload) -> list[Operations]:
        c = self.config
        return [Operations("head", head_cost(workload.head_rows, c.width, c.vocabulary).flops)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        return (layout.residual * workload.tokens + layout.itemsize * workload.targets) * self.config.width

    def temporary_bytes(self, workload: Workload, layout: Layout) -> dict[str, float]:
        """Return the bytes of temporary buffers at the start of backward, by purpose; products are in bf16."""
        c, received = self.config, layout.received
        logits = 2 * workload.targets * c.vocabulary
        rows = 2 * workload.tokens * c.experts_per_token * c.width * 2 * (1 + received) * (received > 0)
        return {
            "logits": min(logits, CHUNK["cuda"]),
            "gradient of the head": 4 * c.vocabulary * c.width * (1 + (logits > CHUNK["cuda"])),  # two if chunked
            "tokens sent to experts": rows,  # of one layer: inputs and results, sent and received
        }
