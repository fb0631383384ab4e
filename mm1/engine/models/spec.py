"""Define what the engine asks of a model: config, losses, blocks, and what these compute and keep.

A model is made of layers (layers/layer.py), is called with a Batch and returns Losses. Trainer, checkpoints,
parallelism, ledger and plan know this page and no model by name; registry.py finds the class by `config.kind`. Records
are encoded and packed by the data package alike for every model, as config.images says.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.layer import BlockLayer, Layer, init_buffers, init_weights
from mm1.engine.layers.workload import Layout, Workload
from mm1.engine.models.image_input import ImageInput
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids


class Sum(NamedTuple):
    """Holds a sum over a batch, which a run logs under its name, divided by the step's "targets" or "batches"."""

    total: Tensor  # fp32 []
    per: str


class Losses(NamedTuple):
    """Holds the losses of a batch.

    objective: fp32 [], what is minimised, summed over the batch's target tokens; its gradients are divided by the
    step's. sums: named sums to log, "loss" among them, the same names for every batch. counts: int64 of any shape, what
    `metrics` reads once it is summed over a step; empty if there is nothing.
    """

    objective: Tensor
    sums: dict[str, Sum]
    counts: Tensor

    @property
    def loss(self) -> Tensor:
        """Return the loss summed over the batch's target tokens, fp32 []."""
        return self.sums["loss"].total


class ModelConfig(Protocol):
    """Lists what the engine reads of a model's config, a frozen dataclass of settings (settings.py)."""

    @property
    def kind(self) -> str: ...
    @property
    def context(self) -> int | None:
        """Return the tokens of the longest document that the model was trained on, None if that is not known."""
        ...

    @property
    def images(self) -> ImageInput: ...
    @property
    def vocabulary(self) -> int: ...


class Model(Layer):
    """Defines what the engine asks of every model, and holds the state beside the layers.

    A subclass is called with a Batch and returns Losses (forward); with by_document=True it returns the mean loss of
    each document, fp32 [B]. It says as a layer its `operations`, `kept_bytes` and, where it has parameters of its own,
    `initial_values`: all without those of the blocks that are sharded.
    """

    # The parts of a profile in the order of the work: submodules, then what the model does behind the last of them;
    # of each the parts of the ledger that it computes.
    PROFILE: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __init__(self, c: Any):
        """c: a ModelConfig."""
        super().__init__()
        self.config = c
        self.tokenizer: TextTokenizer | None = None  # comes with a checkpoint
        self.conversations: bool | None = None  # whether it was trained on conversations; None: not known

    def init_weights(self, seed: int = 0) -> Self:
        """Draw every parameter as its layer says. The same seed gives the same values in every layout."""
        init_weights(self, seed)
        return self

    def init_buffers(self, device: torch.device | str) -> None:
        """Compute every buffer on `device`, as its layer says."""
        init_buffers(self, device)

    def blocks(self) -> list[BlockLayer]:
        """Return the units of sharding, recomputation and compilation, in the order of the work."""
        raise NotImplementedError(f"{type(self).__name__} does not say its blocks: define blocks()")

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Return what a step logs of its summed `counts`, fp64 on the CPU in their shape."""
        return {}

    def default_peak_lr(self) -> float:
        """Return the peak learning rate of a run that does not set train.peak_lr."""
        raise UserError(f"setting train.peak_lr is None, expected a number: {type(self).__name__} has no default")

    def temporary_bytes(self, workload: Workload, layout: Layout) -> dict[str, float]:
        """Return the bytes of what is there for a moment as backward begins, by purpose."""
        return {}


class LanguageModel(Protocol):
    """Lists what inference asks of a model that continues token documents."""

    config: Any  # a ModelConfig; config.decoder holds the decoder's sizes
    tokenizer: TextTokenizer | None
    conversations: bool | None
    decoder: DecoderLM

    def encode(self, pixels: Tensor, grids: Grids) -> Tensor:
        """Return the rows [N·n, D] that stand for packed images in the decoder."""
        ...
