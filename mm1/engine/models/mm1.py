"""Define MM1: a ViT encoder, a connector and a decoder in which image tokens are placed among the text tokens.

    features = connector(vision(pixels))                 [N·n, D]
    x = embed(tokens);  x[media.slots] = features        [T, D]
    loss = mean over targets of -log p(target), + 0.01 · load balance + 0.001 · router z
Source: McKinzie et al. 2024 (MM1, arXiv 2403.09611), sections 3 and 4.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm1.engine.data.batch import Batch
from mm1.engine.layers.connector import build_connector
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.experts import expert_metrics
from mm1.engine.layers.layer import BlockLayer
from mm1.engine.layers.vision import VisionEncoder
from mm1.engine.layers.workload import Layout, Operations, Workload
from mm1.engine.models.mm1_config import MM1Config, peak_lr
from mm1.engine.models.registry import on_meta
from mm1.engine.models.spec import Losses, Model, Sum
from mm1.kernels.linear_cross_entropy import linear_cross_entropy


class MM1(Model):
    """Compute the next-token losses of packed documents of images and text."""

    PROFILE: ClassVar = {
        "vision": ("patch embedding", "vision linear", "vision attention"),
        "connector": ("connector",),
        "decoder": ("decoder linear", "decoder attention", "router", "experts"),
        "head": ("head",),
    }

    def __init__(self, c: MM1Config):
        super().__init__(c)
        self.vision = VisionEncoder(c.vision)
        self.connector = build_connector(c.connector, c.vision.width, c.decoder.width, c.vision.layers)
        width, eps = c.decoder.width, c.decoder.eps
        self.image_norm = nn.RMSNorm(width, eps) if c.connector.output_norm else nn.Identity()
        self.decoder = DecoderLM(c.decoder)

    def forward(self, batch: Batch) -> Losses:
        """Return the next-token loss, the load-balancing loss and the router's z-loss of a packed batch."""
        hidden, load_balance, z_loss, routed = self.hidden(batch)
        rows = batch.target_rows
        nll = linear_cross_entropy(hidden[rows], self.decoder.head_weight, batch.targets[rows], reduction="sum")
        c = self.config.decoder
        objective = nll + batch.target_count * (c.load_balance * load_balance + c.z_loss * z_loss)
        sums = {
            "loss": Sum(nll, "targets"),
            "load_balance": Sum(load_balance, "batches"),
            "z_loss": Sum(z_loss, "batches"),
        }
        counts = torch.stack(routed) if routed else batch.tokens.new_zeros(0, dtype=torch.int64)
        return Losses(objective, sums, counts)

    def document_losses(self, batch: Batch) -> Tensor:
        return self.decoder.document_losses(self.hidden(batch)[0], batch.targets, batch.cu_seqlens)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the final hidden states [T, D], load-balance and z-loss fp32 [], and what each mixture layer routed.

        The last is, for each mixture layer, the int64 [E + 1] of Experts: ends of the experts' token-expert pairs.
        """
        x = self.embed(batch)
        mask = torch.arange(len(x), device=x.device) < batch.cu_seqlens[-1]
        return self.decoder(x, batch.positions, batch.cu_seqlens, mask, longest=batch.longest)

    def embed(self, batch: Batch) -> Tensor:
        """Return the rows [T, D] of text and images that enter the decoder."""
        x = self.decoder.embedding(batch.tokens)
        media = batch.media
        if not media.grids.images:
            return x
        # The slots of padding images are T: they write to a row that is cut off again.
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x.index_copy(0, media.slots, self.encode(media.values, media.grids).to(x.dtype))[:-1]

    def encode(self, pixels: Tensor, grids) -> Tensor:
        """Return the decoder's rows [N·n, D] for packed images: pixels uint8 [ΣHW, 3] and their grids."""
        return self.image_norm(self.connector(self.vision(pixels, grids), grids).float())

    def blocks(self) -> list[BlockLayer]:
        return [module for module in self.modules() if isinstance(module, BlockLayer)]

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        return expert_metrics(counts)

    def default_peak_lr(self) -> float:
        """Return MM1's peak learning rate for the non-embedding parameters of the decoder (paper, section 4).

        A mixture counts as its dense equivalent.
        """
        counts = parameter_counts(self.config)
        return peak_lr(counts.get("decoder_dense_non_embedding", counts["decoder_non_embedding"]))

    def operations(self, workload: Workload) -> list[Operations]:
        parts = (self.vision, self.connector, self.decoder)
        return [operations for part in parts for operations in part.operations(workload)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        kept = sum(part.kept_bytes(workload, layout) for part in (self.vision, self.connector, self.decoder))
        normed = workload.images * self.config.connector.tokens * self.config.connector.output_norm
        return kept + 4 * normed * self.config.decoder.width  # the input of the image norm, in fp32

    def temporary_bytes(self, workload: Workload, layout: Layout) -> dict[str, float]:
        return self.decoder.temporary_bytes(workload, layout)


def parameter_counts(c: MM1Config) -> dict[str, int]:
    """Return the numbers of parameters of vision, connector, decoder and decoder_non_embedding, without allocation.

    A mixture also has decoder_dense_non_embedding: its decoder with one dense MLP in the place of a layer's experts.
    """
    model = on_meta(c)
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "connector", "decoder")
    }
    embeddings = c.decoder.vocabulary * c.decoder.width * (1 if c.decoder.tied else 2)
    counts["decoder_non_embedding"] = counts["decoder"] - embeddings
    if c.decoder.experts:
        dense = dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, experts=0))
        counts["decoder_dense_non_embedding"] = parameter_counts(dense)["decoder_non_embedding"]
    return counts
