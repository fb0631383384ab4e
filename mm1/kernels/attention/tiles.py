"""Define the tiles of attention's kernels: those that fit a GPU, the default, and their predicted seconds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from mm1.kernels.cost_model import Predicted, Product
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv
from mm1.kernels.tuning import Tunable


@dataclass(frozen=True)
class Config:
    """Hold a program's tile: block_m rows (queries; keys for dk and dv) times block_n rows of the other side a step."""

    block_m: int = 128
    block_n: int = 64
    warps: int = 8
    stages: int = 3


class FlashShape(NamedTuple):
    """Hold the sizes that a configuration depends on. causal: whether the mask is causal or a prefix."""

    rows: int
    heads: int
    kv_heads: int
    width: int
    causal: bool


def shared_bytes(kernel: str, config: Config, width: int, itemsize: int, device: Device) -> int:
    """Return the shared memory of both sides' tiles in bytes; before Hopper asynchronous copies use one stage less."""
    kept, weights = {"flash": (1, 0), "flash_dq": (2, 1), "flash_dkv": (2, 2)}[kernel]
    if device.vendor == "amd":  # a program keeps its own rows in registers
        kept = 0
    stages = config.stages if device.asynchronous else max(1, config.stages - 1)
    shared = (kept * config.block_m + 2 * stages * config.block_n) * width * itemsize + 4096
    if device.family == "sm_100" or not kept:  # weights pass through shared memory too
        shared += max(weights, not kept) * config.block_m * config.block_n * itemsize
    return shared


def legal(kernel: str, config: Config, shape: FlashShape, dtype: torch.dtype, device: Device) -> bool:
    """Return whether the tiles fit into shared memory, and the sums with two tiles of scores into registers."""
    sums = 2 if kernel == "flash_dkv" else 1
    registers = config.block_m * (sums * shape.width + 2 * config.block_n) / (config.warps * device.warp)
    return shared_bytes(kernel, config, shape.width, dtype.itemsize, device) <= device.shared and registers <= 192


def space(shape: FlashShape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not."""
    return (Config(*axis) for axis in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)))


def default(kernel: str, shape: FlashShape, dtype: torch.dtype, device: Device) -> Config:
    """Return the largest tiles that spill no register at any width, with as many stages as fit."""
    width, asynchronous = shape.width, device.asynchronous
    wide, three = width > (96 if asynchronous else 80), width == 112  # the only width of three pieces
    if dtype == torch.float32:  # no matrix units: small tiles in registers
        few = width > 64 or (kernel == "flash_dkv" and device.vendor == "amd")  # with 32 up to 119 registers spilled
        config = Config(32, 16 if few else 32, 8, 2)
    elif device.vendor == "amd":  # with a second stage each of backward's kernels spills
        config = Config() if kernel == "flash" else Config(64, 32, 4, 1) if wide else Config(128, 32, 8, 1)
    elif asynchronous:
        config = Config(128, 32 if wide else 64, 8, 2) if kernel == "flash_dkv" else Config()
        if kernel == "flash_dq" and three and device.family == "sm_100":  # with 64 no code comes out
            config = Config(128, 32, 8, 2)
    elif wide and kernel != "flash":
        config = Config(64, 16, 4, 2) if kernel == "flash_dkv" and three else Config(64, 32, 8, 2)
    else:
        config = Config(128, 32, 8, 2) if kernel == "flash_dkv" else Config()
    while not legal(kernel, config, shape, dtype, device) and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    return config


def work(kernel: str, config: Config, shape: FlashShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run over a single segment."""
    # Instructions for each score: exponentials, sums, conversions.
    products, instructions = {"flash": (2, 6.8), "flash_dq": (3, 5.2), "flash_dkv": (4, 11.3)}[kernel]
    heads = shape.kv_heads if kernel == "flash_dkv" else shape.heads
    depth = shape.width * cdiv(shape.rows * shape.heads // heads, config.block_n) // (1 + shape.causal)
    size = dtype.itemsize
    moved = 4 * shape.rows * shape.heads * shape.width * size
    return Product(
        heads * cdiv(shape.rows, config.block_m), depth, config.block_m, config.block_n, shape.width, config.warps,
        config.stages, shared_bytes(kernel, config, shape.width, size, device), moved, size,
        products=products, fetched=2 * config.block_n * shape.width, addressed=2 * config.block_n * shape.width,
        finishing=12,
        loading=instructions * config.block_m * config.block_n / (config.warps * device.warp),
    )  # fmt: skip


FLASH, DQ, DKV = (
    Tunable(
        name, FlashShape, Config, space, partial(legal, name), partial(default, name),
        Predicted(partial(work, name)), ("width",),
    )
    for name in ("flash", "flash_dq", "flash_dkv")
)  # fmt: skip
