"""Define AIM: an encoder that is pre-trained to predict the normalised pixels of an image's next patch.

    features = vision(pixels), causal behind a prefix of S patches         [P, Dv]
    hidden = head(rows S - 1 … K - 2 of each image of K patches)           [R, width]
    loss = mean over patches S … K - 1 of |prediction - normalised patch|² / (3 · patch²)
Source: El-Nouby et al. 2024 (AIM, arXiv 2401.08541), section 4.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mm1.engine.data.batch import Batch, next_patch_rows
from mm1.engine.layers.layer import BlockLayer, Fill, xavier_uniform
from mm1.engine.layers.patch_order import packed_order
from mm1.engine.layers.pixel_head import PixelPredictor
from mm1.engine.layers.vision import VisionEncoder
from mm1.engine.layers.workload import Layout, Operations, Workload
from mm1.engine.models.aim_config import AIMConfig
from mm1.engine.models.spec import Losses, Model, Sum
from mm1.kernels.patches.grids import Grids, as_grids, moved_to
from mm1.kernels.patches.loss import patch_loss

PLACES = 8  # equal parts of an image's patches, in the order of prediction, whose losses are logged apart


class AIM(Model):
    """Compute the next-patch losses of packed images of any grid.

    The rows of prefixes and targets count patches in the order of prediction.
    """

    PROFILE: ClassVar = {
        "vision": ("patch embedding", "vision linear", "vision attention"),
        "head": ("pixel head",),
        "loss": ("prediction",),
    }

    def __init__(self, c: AIMConfig):
        super().__init__(c)
        self.vision = VisionEncoder(c.vision)
        self.head = PixelPredictor(c.head, c.vision)
        for block in self.blocks():
            block.float8 = True

    def forward(self, batch: Batch) -> Losses:
        """Return the next-patch loss of a packed batch of images."""
        losses, targets = self._losses(batch.media.values, batch.media.grids, batch.prefix, batch.target_rows)
        total = objective = losses.sum()
        if self.config.average == "images":
            sums, counts = self._by_image(losses, batch)
            objective = (sums / counts.clamp(min=1)).sum() * batch.target_count / counts.count_nonzero().clamp(min=1)
        return Losses(objective, {"loss": Sum(total, "targets")}, self._by_place(losses, targets, batch))

    def _by_place(self, losses: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Return fp64 [2, PLACES + 1], sums and numbers of losses.

        These are the losses at each part of the images, then those of patches with more than one colour. It is a
        product, because atomic additions would give other bits in each run.
        """
        assert batch.plain is not None
        rows, grids = batch.target_rows.clamp(min=0), batch.media.grids.to(losses.device)
        first, count, *_ = grids.table[grids.owner[rows]].unbind(1)
        place = (rows + 1 - first) * PLACES // count.clamp(min=1)
        members = place[:, None] == torch.arange(PLACES, device=losses.device)
        members = torch.cat([members, ~batch.plain[targets.clamp(min=0)][:, None]], 1) & (targets >= 0)[:, None]
        values = torch.stack([losses.detach(), torch.ones_like(losses)])
        return values.double() @ members.double()

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Return the mean losses at each part of the images, and that of patches of several colours, or NaN."""
        *places, textured = (counts[0] / counts[1]).tolist()
        return {"loss_textured": textured, "loss_by_place": places}

    def document_losses(self, batch: Batch) -> Tensor:
        losses, _ = self._losses(batch.media.values, batch.media.grids, batch.prefix, batch.target_rows)
        sums, counts = self._by_image(losses, batch)
        return sums / counts

    def _by_image(self, losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum and the number of each image's losses, fp32 [B] both. losses: of all target rows."""
        grids, rows = batch.media.grids, batch.target_rows
        images = torch.where(rows < 0, grids.images, grids.to(rows.device).owner[rows])
        zeros = losses.new_zeros(grids.images + 1)  # the last one collects the rows of padding
        sums, counts = (zeros.index_add(0, images, x)[: len(batch.keys)] for x in (losses, torch.ones_like(losses)))
        return sums, counts

    def features(
        self, pixels: Tensor, grids: Grids | Sequence[tuple[int, int]], prefix: Tensor | None = None,
        layers: Collection[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the features [P, Dv] of packed images: pixels uint8 [ΣHW, 3] and their grids.

        prefix int32 [N]: attention is causal behind the first prefix[n] patches of image n; None: each patch sees its
        whole image. layers: the mean of the outputs of these blocks, counted from 0; None: the last one's, after the
        final norm. Raises ValueError for a layer that the model does not have.
        """
        depth = self.config.vision.layers
        if layers is not None and not (layers and all(0 <= layer < depth for layer in layers)):
            raise ValueError(f"features: layers are {list(layers)}, expected numbers from 0 to {depth - 1}")
        grids = as_grids(grids, pixels.device)
        return self.vision(pixels, grids, prefix, layers, None if prefix is None else self._order(grids, pixels.device))

    def loss(self, pixels: Tensor, grids: Grids | Sequence[tuple[int, int]], prefix: Tensor) -> Tensor:
        """Return the mean loss fp32 [] over the targets of packed images, 0 if they have none.

        prefix int [N]: lengths from 0 to K - 1 of an image of K patches; an image of one patch has no target. Raises
        ValueError for another length.
        """
        grids = as_grids(grids, pixels.device)
        rows = torch.from_numpy(next_patch_rows(grids.sizes or (), prefix.tolist())).to(pixels.device)
        losses, _ = self._losses(pixels, grids, prefix.to(pixels.device, torch.int32), rows)
        return losses.sum() / max(1, len(rows))

    def _losses(self, pixels: Tensor, grids: Grids, prefix: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses fp32 [R] of the patches after `rows` int64 [R], 0 where a row is -1; and these patches.

        The patches are int64 [R] in the order of the pixels, -1 where a row is -1.
        """
        c, order = self.config.vision, self._order(grids, pixels.device)
        features = self.vision(pixels, grids, prefix, None, order)
        patches, targets = rows.clamp(min=0), torch.where(rows < 0, 0, rows + 1)
        if order is not None:
            patches, targets = order[patches], order[targets]
        targets = torch.where(rows < 0, -1, targets)
        hidden = self.head(features.index_select(0, patches), grids.to(features.device), patches)
        losses = patch_loss(
            hidden, self.head.output.weight, self.head.output.bias, pixels, targets, grids, patch_size=c.patch,
            mean=c.mean, std=c.std,
        )  # fmt: skip
        return losses, targets

    def _order(self, grids: Grids, device: torch.device) -> Tensor | None:
        """Return the packed patches in the order of prediction, None for row by row."""
        if self.config.order == "raster":
            return None
        return moved_to(packed_order(self.config.order, grids.sizes or (), grids.patches), device)

    def blocks(self) -> list[BlockLayer]:
        return [module for module in self.modules() if isinstance(module, BlockLayer)]

    def initial_values(self) -> dict[str, Fill]:
        """Return AIM's initial values of the matrices; queries, keys and values are products of their own."""
        matrices = {name for name, p in self.named_parameters() if p.ndim == 2}
        return {name: xavier_uniform(3 if name.endswith("qkv.weight") else 1) for name in matrices}

    def default_peak_lr(self) -> float:
        """Return AIM's peak learning rate, the same for all sizes (paper, table 1)."""
        return 1e-3

    def operations(self, workload: Workload) -> list[Operations]:
        return [*self.vision.operations(workload), *self.head.operations(workload)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        return self.vision.kept_bytes(workload, layout) + self.head.kept_bytes(workload, layout)
