"""Define AIM's pixel head, which predicts the normalised pixels of the next patch from the rows of an encoder.

    x = projection(features) + positions;  L × [x += norm(x); x += mlp(norm(x))];  prediction = output(norm(x))

A block is a transformer block whose attention is the identity, and therefore adds its normalised input to the stream.
The head is computed on the rows with a target alone, because no patch depends on another. The last product belongs to
the loss (`patch_loss`), which stores no predictions.
Source: El-Nouby et al. 2024 (AIM), section 4.3.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mm1.engine.layers.config import PixelHead, Vision
from mm1.engine.layers.layer import BlockLayer, Layer
from mm1.engine.layers.vision import sincos
from mm1.engine.layers.workload import KeptBytes, Layout, Operations, Workload
from mm1.kernels.patches.grids import Grids


class PixelBlock(BlockLayer):
    """Add the normalised input, then an MLP, to the residual stream."""

    float8 = True

    def __init__(self, c: PixelHead, eps: float):
        super().__init__()
        self.config = c
        self.norm1 = nn.LayerNorm(c.width, eps)
        self.norm2 = nn.LayerNorm(c.width, eps)
        self.fc1 = nn.Linear(c.width, c.ffn, bias=False)
        self.fc2 = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(x)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def operations(self, workload: Workload) -> list[Operations]:
        return [Operations("pixel head", 2 * workload.head_rows * 2 * self.config.width * self.config.ffn)]

    def kept_bytes(self, workload: Workload, layout: Layout) -> KeptBytes:
        c, rows = self.config, workload.head_rows
        # Stored are the inputs of the norms, the output of the second one, and the values of the MLP.
        everything = layout.residual * 2 * c.width + layout.itemsize * (c.width + 2 * c.ffn)
        return KeptBytes(
            rows * everything, rows * layout.itemsize * (c.ffn + c.width), rows * layout.residual * c.width
        )

    def shard_axes(self) -> dict[str, int]:
        return {}  # each process of a tensor group computes the whole head


class PixelPredictor(Layer):
    """Compute what the pixels of the next patch are predicted from, and hold the weights of the prediction."""

    def __init__(self, c: PixelHead, vision: Vision):
        super().__init__()
        self.config, self.vision = c, vision
        self.projection = nn.Linear(vision.width, c.width)
        self.blocks = nn.ModuleList(PixelBlock(c, vision.eps) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width, vision.eps)
        self.output = nn.Linear(c.width, 3 * vision.patch**2)

    def forward(self, x: Tensor, grids: Grids, patches: Tensor) -> Tensor:
        """Return hidden [R, width] after the final norm, from rows x [R, Dv] of the encoder.

        patches: int64 [R], the patch of each row among the packed patches of `grids`.
        """
        x = self.projection(x)
        x = x + sincos(grids, self.config.width, patches)  # fp32, as the residual stream
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def operations(self, workload: Workload) -> list[Operations]:
        c, v = self.config, self.vision
        return [
            Operations("pixel head", 2 * workload.head_rows * v.width * c.width),
            Operations("prediction", 2 * workload.head_rows * c.width * 3 * v.patch**2),
        ]

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        # Stored are the inputs of projection, final norm and prediction.
        c = self.config
        return workload.head_rows * (layout.itemsize * (self.vision.width + c.width) + layout.residual * c.width)
