"""Decoder on packed documents: RMSNorm, RoPE, grouped-query attention, gated MLP or a top-k mixture of experts.

    L × [x += attention(norm(x)), causal, inside each document;  x += mlp(norm(x))];  norm
Sources: Touvron et al. 2023 (Llama), Jiang et al. 2024 (Mixtral); MM1 section 3.4 for the mixture's placement.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import Decoder, is_moe
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.replaceable import Replaceable
from mm1.kernels.attention import Causal, attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rope(NamedTuple):
    cos: Tensor  # fp32 [T, 1, Dh/2]
    sin: Tensor


def rope(positions: Tensor, width: int, theta: float) -> Rope:
    """Angles of rotary positions int [T]; pairs are (i, i + Dh/2), as in Llama's released code for transformers."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions.float()[:, None, None] * frequencies
    return Rope(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rope) -> Tensor:
    """x fp32 [T, H, Dh]"""
    # Halves as a dimension of their own: Inductor's CPU code for a chunk of the last one, and its gradient, is scalar.
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack([a * angles.cos - b * angles.sin, b * angles.cos + a * angles.sin], dim=-2).flatten(-2)


class Attention(nn.Module):
    """qkv's rows stand by key-value head, its query heads, its key, its value, so that any share of the heads is a
    share of the rows."""

    def __init__(self, c: Decoder):
        super().__init__()
        self.shared, self.head_width = c.heads // c.kv_heads, c.head_width
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_width, bias=False)
        self.out = nn.Linear(c.heads * c.head_width, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_width, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_width, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, angles: Rope, cu_seqlens: Tensor, attend=None) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (-1, self.shared + 2, self.head_width))
        q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]  # (T, H | G, Dh)
        q, k = (rotate(norm(x.float()), angles).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        y = attention(q, k, v, cu_seqlens, mask=Causal()) if attend is None else attend(q, k, v)
        return self.out(y.flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Decoder):
        super().__init__()
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        zero = x.new_zeros((), dtype=torch.float32)
        return self.down(F.silu(self.gate(x)) * self.up(x)), zero, zero, None


class Block(Replaceable):
    def __init__(self, c: Decoder, moe: bool):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.width, c.eps)
        self.attention = Attention(c)
        self.norm2 = nn.RMSNorm(c.width, c.eps)
        self.mlp = Experts(c) if moe else MLP(c)

    def forward(self, x: Tensor, angles: Rope, cu_seqlens: Tensor, mask: Tensor | None = None, attend=None):
        x = x + self.attention(self.norm1(x), angles, cu_seqlens, attend)
        y, load_balance, z_loss, slots = self.mlp(self.norm2(x), mask)
        return x + y, load_balance, z_loss, slots


class DecoderLM(nn.Module):
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
        """[V, D]"""
        return self.embedding.weight if self.config.tied else self.head.weight

    def forward(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None,
        attends: Sequence[Attend] = (),
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """x [T, D] embedded tokens of packed documents, positions int [T], mask bool [T] (False: padding).

        attends: of each layer (q, k, v) -> y, if the documents have more before these tokens, such as a Cache's.
        Returns hidden [T, D] after the final norm, the mean over mixture layers of load-balance and z-loss, and of each
        mixture layer its slots (see Experts).
        """
        c = self.config
        angles = rope(positions, c.head_width, c.rope_theta)
        load_balance = z_loss = x.new_zeros((), dtype=torch.float32)
        slots: list[Tensor] = []
        for block, attend in zip_longest(self.blocks, attends):
            x, balance, z, routed = block(x, angles, cu_seqlens, mask, attend)
            load_balance, z_loss = load_balance + balance, z_loss + z
            slots += [] if routed is None else [routed]
        mixtures = max(1, len(slots))
        return self.norm(x), load_balance / mixtures, z_loss / mixtures, slots
