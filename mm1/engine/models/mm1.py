"""MM1: a ViT encoder, a connector, a decoder; image tokens take their slots among the text tokens.

    features = connector(vision(pixels))                 [N·n, D]
    x = embed(tokens);  x[media.slots] = features        [T, D]
    loss = mean over targets of -log p(target), + 0.01 · load balance + 0.001 · router z
Source: McKinzie et al. 2024 (MM1, arXiv 2403.09611), section 3.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm1.engine.data.batch import Batch
from mm1.engine.data.document import TextTokenizer
from mm1.engine.layers.connector import ConvBlock, build
from mm1.engine.layers.decoder import Block, DecoderLM
from mm1.engine.layers.vision import VisionBlock, VisionEncoder
from mm1.engine.models.mm1_config import Model
from mm1.kernels.linear_cross_entropy import linear_cross_entropy

LEARNED_VECTORS = ("class_token", "pos_emb", "positions", "queries")  # and tables of them
INTO_RESIDUAL = (".out.weight", ".down.weight", ".down", ".fc2.weight")


class Losses(NamedTuple):
    nll: Tensor  # fp32 [], summed over target tokens
    load_balance: Tensor  # fp32 [], mean over mixture layers
    z_loss: Tensor
    slots: Tensor  # int64 [mixture layers, E + 1], see Experts


class MM1(nn.Module):
    def __init__(self, c: Model):
        super().__init__()
        self.config = c
        self.tokenizer: TextTokenizer | None = None  # comes with a checkpoint
        self.conversations: bool | None = None  # whether it was trained on conversations; None: not known
        self.vision = VisionEncoder(c.vision)
        self.connector = build(c.connector, c.vision.width, c.decoder.width)
        width, eps = c.decoder.width, c.decoder.eps
        self.image_norm = nn.RMSNorm(width, eps) if c.connector.output_norm else nn.Identity()
        self.decoder = DecoderLM(c.decoder)

    def forward(self, batch: Batch) -> Losses:
        hidden, load_balance, z_loss, slots = self.hidden(batch)
        rows = batch.target_rows
        nll = linear_cross_entropy(hidden[rows], self.decoder.head_weight, batch.targets[rows], reduction="sum")
        routed = torch.stack(slots) if slots else batch.tokens.new_zeros(0, 1, dtype=torch.int64)
        return Losses(nll, load_balance, z_loss, routed)

    def objective(self, losses: Losses, targets: int) -> Tensor:
        """Loss of one batch summed over its target tokens; over a step, divide by the step's targets."""
        c = self.config.decoder
        return losses.nll + targets * (c.load_balance * losses.load_balance + c.z_loss * losses.z_loss)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the final hidden states [T, D] of the packed batch, the auxiliary losses and the slots by layer."""
        x = self.embed(batch)
        mask = torch.arange(len(x), device=x.device) < batch.cu_seqlens[-1]
        return self.decoder(x, batch.positions, batch.cu_seqlens, mask)

    def embed(self, batch: Batch) -> Tensor:
        """[T, D], text and images."""
        x = self.decoder.embedding(batch.tokens)
        media = batch.media
        if not media.grids.images:
            return x
        # Absent images point one past the end, at a row that is dropped again.
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x.index_copy(0, media.slots, self.encode(media.values, media.grids).to(x.dtype))[:-1]

    def encode(self, pixels: Tensor, grids) -> Tensor:
        """Image tokens [N·n, D]."""
        return self.image_norm(self.connector(self.vision(pixels, grids), grids).float())

    def logits(self, batch: Batch) -> Tensor:
        """[T, V]"""
        return self.hidden(batch)[0] @ self.decoder.head_weight.T

    def compile_blocks(self, fullgraph: bool = False, **options: Any) -> None:
        """Compile each kind of block once; shapes are the packed budgets, so they never change.

        fullgraph: a graph break is an error. options: of torch.compile. Their forward, not their call: what gathers a
        block's parameters before it stays outside. Copies and pickles of the model are not compiled.
        """
        for module in self.modules():
            if isinstance(module, VisionBlock | ConvBlock | Block):
                module.replace_forward(torch.compile(module.forward, dynamic=False, fullgraph=fullgraph, **options))

    def initialize(self, seed: int = 0, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> "MM1":
        """Normal weights of variance 1 / fan-in, into the residual stream scaled by depth as in GPT-2; zero biases.

        put(parameter, value) keeps what of a value belongs into a parameter.
        """
        device = self.decoder.embedding.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            last, value = name.rpartition(".")[2], torch.empty(parameter.shape, device=device)
            if last in ("bias", "patch_bias"):
                value.zero_()
            elif last == "weight" and parameter.ndim == 1:
                value.fill_(1.0)
            elif last == "positions":
                value = sincos(*parameter.shape).to(device)
            else:
                fan_in = math.prod(parameter.shape[1:]) if parameter.ndim == 4 else parameter.shape[-1]
                std = 0.02 if last in LEARNED_VECTORS else fan_in**-0.5
                if name.endswith(INTO_RESIDUAL):
                    layers = self.config.decoder.layers if name.startswith("decoder") else self.config.vision.layers
                    std /= (2 * layers) ** 0.5
                value.normal_(0.0, std, generator=generator)
            with torch.no_grad():
                put(parameter, value)
        return self


def sincos(rows: int, columns: int, width: int) -> Tensor:
    """2-D sine-cosine positions [rows, columns, width] (Chen et al. 2021, MoCo v3): a table that is smooth from the
    start keeps its meaning when it is resampled to another grid; white noise would average out."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    r, c = torch.arange(rows)[:, None] * frequencies, torch.arange(columns)[:, None] * frequencies
    parts = [r.sin()[:, None], r.cos()[:, None], c.sin()[None], c.cos()[None]]
    table = torch.cat([part.expand(rows, columns, -1) for part in parts], dim=-1)
    return nn.functional.pad(table, (0, width - table.shape[-1]))


def parameter_counts(c: Model) -> dict[str, int]:
    """Parameters by part, without allocating any: vision, connector, decoder, and decoder_non_embedding."""
    with torch.device("meta"):
        model = MM1(c)
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "connector", "decoder")
    }
    embeddings = model.decoder.embedding.weight.numel() * (1 if c.decoder.tied else 2)
    dense = dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, experts=0))
    counts["decoder_non_embedding"] = counts["decoder"] - embeddings
    if c.decoder.experts:
        counts["decoder_dense_non_embedding"] = parameter_counts(dense)["decoder_non_embedding"]
    return counts
