"""Define the interface between the engine and a model: config, losses, blocks, operations and memory.

A model is made of layers (layers/layer.py), is called with a Batch and returns Losses. Trainer, checkpoints,
parallelism, ledger and plan use this interface and no model by name; registry.py finds the class by `config.kind`. The
data package encodes and packs records alike for every model, according to config.images. A model defines:

    member                           train       replay      plan, --profile    generate
    config (ModelConfig)             required    required    required           required
    forward(batch) -> Losses         required    required
    blocks()                         required    required    required
    document_losses(batch)                       required
    operations, kept_bytes                                   required
    PROFILE                                                  --profile
    default_peak_lr()                without train.peak_lr
    metrics(counts)                  optional
    temporary_bytes(…)                                       optional
    decoder, encode (LanguageModel)                                             required; encode for images
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mm1.engine.data.batch import Batch
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.layer import BlockLayer, Layer, init_buffers, init_weights
from mm1.engine.layers.workload import Layout, Workload
from mm1.engine.models.image_input import ImageInput
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids


class Sum(NamedTuple):
    """Hold a sum over a batch; a run logs it under its name, divided by the step's "targets" or "batches"."""

    total: Tensor  # fp32 []
    per: str


class Losses(NamedTuple):
    """Hold the losses of a batch.

    objective: fp32 [], the quantity to minimise, summed over the batch's target tokens; the trainer divides its
    gradients by the number of target tokens in the step. sums: named sums to log, "loss" among them, with the same
    names for every batch. counts: int64 or fp64 of any shape, empty if unused; summed over the step, then passed to
    `metrics`.
    """

    objective: Tensor
    sums: dict[str, Sum]
    counts: Tensor

    @property
    def loss(self) -> Tensor:
        """Return the loss summed over the batch's target tokens, fp32 []."""
        return self.sums["loss"].total


class ModelConfig(Protocol):
    """Declare what the engine reads from a model's config, a frozen dataclass of settings (settings.py)."""

    @property
    def kind(self) -> str:
        """Return the model's kind, a key of the registry."""
        ...

    @property
    def context(self) -> int | None:
        """Return the tokens of the longest document in training, None if unknown.

        It must be a field of the dataclass, because a run sets it at its start.
        """
        ...

    @property
    def images(self) -> ImageInput:
        """Return how the model takes images; TEXT_ONLY for a text-only model."""
        ...

    @property
    def vocabulary(self) -> int:
        """Return the rows of the token embedding; 0: the model takes images alone, and its tokens are their patches.

        The images of such a config have draws, and its context is no field.
        """
        ...


class Model(Layer):
    """Define a model for the engine. A subclass defines the members of the table above.

    Its `operations` and `kept_bytes` count the part of the model outside the blocks that are sharded. It returns
    `initial_values` for parameters of its own that belong to none of its layers.
    """

    # The parts of a profile in execution order: submodules, then the work after the last of them. Each has the names of
    # its parts in the ledger.
    PROFILE: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __init__(self, c: Any):
        """Store the config, a ModelConfig."""
        super().__init__()
        self.config = c
        self.tokenizer: TextTokenizer | None = None  # of a loaded checkpoint
        self.conversations: bool | None = None  # whether it was trained on conversations; None: unknown

    def init_weights(self, seed: int = 0) -> Self:
        """Draw every parameter as its layer declares. A seed gives the same values in every layout."""
        init_weights(self, seed)
        return self

    def init_buffers(self, device: torch.device | str) -> None:
        """Compute every buffer on `device`, as its layer declares."""
        init_buffers(self, device)

    def blocks(self) -> list[BlockLayer]:
        """Return the units of sharding, recomputation and compilation, in execution order."""
        raise NotImplementedError(f"{type(self).__name__} must define blocks()")

    def document_losses(self, batch: Batch) -> Tensor:
        """Return the mean loss fp32 [B] of each document's targets, NaN without targets; `mm1 replay` compares them."""
        raise NotImplementedError(f"{type(self).__name__} must define document_losses(batch)")

    def metrics(self, counts: Tensor) -> dict[str, Any]:
        """Return metrics of a step from its summed `counts`, fp64 on the CPU in their shape."""
        return {}

    def default_peak_lr(self) -> float:
        """Return the peak learning rate of a run that does not set train.peak_lr."""
        raise UserError(f"setting train.peak_lr is None, expected a number: {type(self).__name__} has no default")

    def temporary_bytes(self, workload: Workload, layout: Layout) -> dict[str, float]:
        """Return the bytes of temporary buffers at the start of backward, by purpose."""
        return {}


class LanguageModel(Protocol):
    """Declare what inference needs of a model to continue token documents."""

    config: Any  # a ModelConfig; config.decoder has the decoder's sizes
    tokenizer: TextTokenizer | None
    conversations: bool | None
    decoder: DecoderLM

    def encode(self, pixels: Tensor, grids: Grids) -> Tensor:
        """Return the decoder's rows [N·n, D] for packed images."""
        ...
