"""Define the tiles of the kernels that multiply patches: the legal ones, the default, and their predicted seconds."""

from dataclasses import replace
from typing import NamedTuple

import torch

from mm1.kernels import tiles
from mm1.kernels.cost_model import Predicted, Product
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv
from mm1.kernels.tiles import Config, Shape, fitted, space
from mm1.kernels.tuning import Tunable

WAVES = 2  # waves of programs into which the weight gradient is split


class PatchShape(NamedTuple):
    """Hold the sizes of a patch embedding [patches, k] · [k, width]."""

    patches: int
    k: int
    width: int

    @property
    def product(self) -> Shape:
        """Return the shape of the product with a single weight."""
        return Shape(self.patches, 1, self.k, self.width)


def legal(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the forward kernel fits into shared memory and registers."""
    plain = not config.persistent and config.block_n in (32, 64, 128) and config.block_k <= _step(device)
    # With 64 rows of fp32 Triton 3.7 emits a TF32 product on a B200, whatever precision is requested.
    small = dtype != torch.float32 or (config.block_m <= 32 and not config.tma)
    fits = shared_bytes(config, shape, dtype, device) <= device.shared
    return plain and small and fits and tiles.legal(config, shape.product, dtype, device, stores=False)


def shared_bytes(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> int:
    """Return the bytes of shared memory of a program, which may change the layout of its fp32 sums there at the end."""
    pipeline = tiles.shared_bytes(config, shape.product, dtype.itemsize, device, stores=False)
    return max(pipeline, 4 * config.block_m * config.block_n)


def default(shape: PatchShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose tiles that let two programs share a multiprocessor: one multiplies while the other loads or stores."""
    tall = device.asynchronous and cdiv(shape.patches, 128) * cdiv(shape.width, 128) >= device.units
    config = Config(
        128 if tall else 64, 128, _step(device), warps=4 if device.wgmma and not tall else 8, tma=device.tma
    )
    return _fitted(config, shape, dtype, device)


def legal_dw(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the weight-gradient kernel fits; it uses no descriptors and does not group tiles."""
    return not config.tma and config.group_m == 8 and legal(config, shape, dtype, device)


def default_dw(shape: PatchShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose the largest tiles that fit."""
    return _fitted(Config(128, 128, _step(device), warps=8, tma=False), shape, dtype, device)


def _step(device: Device) -> int:
    """Return the step of the reduction; before Hopper, with operands in registers, steps of 64 spilled."""
    return 64 if device.asynchronous else 32


def _fitted(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> Config:
    if dtype == torch.float32:  # without matrix units: small tiles in registers
        config = replace(config, block_m=32, block_n=64, block_k=32, warps=4, stages=2, tma=False)
    return fitted(config, shape.product, dtype, device)


def work(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run.

    Each result takes four table entries; neighbours share two thirds of them, which L1 keeps.
    """
    product = tiles.work(config, shape.product, dtype, device, finish=2.5, finishing=15)
    return replace(product, shared=shared_bytes(config, shape, dtype, device))


def work_loss(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run of the loss's kernel, which reads a byte for each result."""
    product = tiles.work(config, shape.product, dtype, device, finish=0.5, finishing=30, stored=0.5)
    return replace(product, shared=shared_bytes(config, shape, dtype, device))


def work_dw(config: Config, shape: PatchShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run of the weight-gradient kernel."""
    part = cdiv(shape.width, config.block_m) * cdiv(shape.k, config.block_n)
    splits = splits_of(shape.patches, part, config, device)
    size, shared = dtype.itemsize, shared_bytes(config, shape, dtype, device)
    moved = shape.patches * (shape.k + shape.width) * size + 8 * splits * shape.width * shape.k
    return Product(
        splits * part, cdiv(shape.patches, splits), config.block_m, config.block_n, config.block_k, config.warps,
        config.stages, shared, moved, size, addressed=(config.block_m + config.block_n) * config.block_k, finish=2,
        finishing=8,
    )  # fmt: skip


def splits_of(patches: int, part: int, config: Config, device: Device) -> int:
    """Return the number of programs that share the patches of each of `part` tiles."""
    return max(1, min(cdiv(patches, 8 * config.block_k), WAVES * device.units // max(part, 1)))


EMBED = Tunable("patch_embed", PatchShape, Config, space, legal, default, Predicted(work), ("k",))
EMBED_DW = Tunable("patch_embed_dw", PatchShape, Config, space, legal_dw, default_dw, Predicted(work_dw), ("k",))
# Its rows are patches of k values, whose `width` pixel values are predicted.
LOSS = Tunable("patch_loss", PatchShape, Config, space, legal, default, Predicted(work_loss), ("k",))
