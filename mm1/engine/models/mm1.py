"""MM1: a ViT encoder, a connector and a decoder, in which image tokens stand among the text tokens.

    features = connector(vision(pixels))                 [N·n, D]
    x = embed(tokens);  x[media.slots] = features        [T, D]
    loss = mean over targets of -log p(target), + 0.01 · load balance + 0.001 · router z
Source: McKinzie et al. 2024 (MM1, arXiv 2403.09611), section 3.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm1.engine.data.batch import Batch
from mm1.engine.layers.connector import build
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.experts import load
from mm1.engine.layers.layer import BlockLayer
from mm1.engine.layers.vision import VisionEncoder
from mm1.engine.layers.workload import Layout, Operations, Workload
from mm1.engine.models import mm1_config
from mm1.engine.models.mm1_config import peak_lr
from mm1.engine.models.registry import on_meta
from mm1.engine.models.spec import Losses, Model, Sum
from mm1.kernels.linear_cross_entropy import linear_cross_entropy


class MM1(Model):
    PROFILE: ClassVar = {
        "vision": ("patch embedding", "vision linear", "vision attention"),
        "connector": ("connector",),
        "decoder": ("decoder linear", "decoder attention", "router", "experts"),
        "head": ("head",),
    }

    def __init__(self, c: mm1_config.Model):
        super().__init__(c)
        self.vision = VisionEncoder(c.vision)
        self.connector = build(c.connector, c.vision.width, c.decoder.width, c.vision.layers)
        width, eps = c.decoder.width, c.decoder.eps
        self.image_norm = nn.RMSNorm(width, eps) if c.connector.output_norm else nn.Identity()
        self.decoder = DecoderLM(c.decoder)

    def forward(self, batch: Batch, by_document: bool = False) -> Losses | Tensor:
        hidden, load_balance, z_loss, slots = self.hidden(batch)
        if by_document:
            return self.decoder.document_losses(hidden, batch.targets, batch.cu_seqlens)
        rows = batch.target_rows
        nll = linear_cross_entropy(hidden[rows], self.decoder.head_weight, batch.targets[rows], reduction="sum")
        c = self.config.decoder
        objective = nll + batch.target_count * (c.load_balance * load_balance + c.z_loss * z_loss)
        sums = {
            "loss": Sum(nll, "targets"),
            "load_balance": Sum(load_balance, "batches"),
            "z_loss": Sum(z_loss, "batches"),
        }
        return Losses(objective, sums, torch.stack(slots) if slots else batch.tokens.new_zeros(0, dtype=torch.int64))

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the final hidden states [T, D] of the packed batch, the auxiliary losses and the slots by layer."""
        x = self.embed(batch)
        mask = torch.arange(len(x), device=x.device) < batch.cu_seqlens[-1]
        return self.decoder(x, batch.positions, batch.cu_seqlens, mask)

    def embed(self, batch: Batch) -> Tensor:
        """Return the rows [T, D] of text and images that enter the decoder."""
        x = self.decoder.embedding(batch.tokens)
        media = batch.media
        if not media.grids.images:
            return x
        # Absent images point one past the end, at a row that is dropped again.
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        return x.index_copy(0, media.slots, self.encode(media.values, media.grids).to(x.dtype))[:-1]

    def encode(self, pixels: Tensor, grids) -> Tensor:
        """Return the rows [N·n, D] that stand for packed images in the decoder."""
        return self.image_norm(self.connector(self.vision(pixels, grids), grids).float())

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [T, V] of a packed batch."""
        return self.hidden(batch)[0] @ self.decoder.head_weight.T

    def blocks(self) -> list[BlockLayer]:
        return [module for module in self.modules() if isinstance(module, BlockLayer)]

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Return the load of the experts, and the share of slots that were dropped; nothing of a dense model."""
        return load(counts) if len(counts) else {}

    def default_peak_lr(self) -> float:
        """Return the law's rate for the dense decoder without embeddings, also of a mixture (paper, section 3.4)."""
        counts = parameter_counts(self.config)
        return peak_lr(counts.get("decoder_dense_non_embedding", counts["decoder_non_embedding"]))

    def operations(self, workload: Workload) -> list[Operations]:
        parts = (self.vision, self.connector, self.decoder)
        return [operations for part in parts for operations in part.operations(workload)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        kept = sum(part.kept_bytes(workload, layout) for part in (self.vision, self.connector, self.decoder))
        slots = workload.images * self.config.connector.tokens
        return kept + 4 * slots * self.config.decoder.width  # the input of the image norm, in fp32

    def temporary_bytes(self, workload: Workload, layout: Layout) -> dict[str, float]:
        return self.decoder.temporary_bytes(workload, layout)


def parameter_counts(c: mm1_config.Model) -> dict[str, int]:
    """Return the parameters of vision, connector and decoder, and decoder_non_embedding, without allocating any.

    A mixture also has decoder_dense_non_embedding, those of the decoder whose experts are one dense MLP a layer.
    """
    model = on_meta(c)
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "connector", "decoder")
    }
    embeddings = c.decoder.vocabulary * c.decoder.width * (1 if c.decoder.tied else 2)
    dense = dataclasses.replace(c, decoder=dataclasses.replace(c.decoder, experts=0))
    counts["decoder_non_embedding"] = counts["decoder"] - embeddings
    if c.decoder.experts:
        counts["decoder_dense_non_embedding"] = parameter_counts(dense)["decoder_non_embedding"]
    return counts
