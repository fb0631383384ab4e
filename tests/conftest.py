"""Shared by all tests: seeds, an error measure, small models and data."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests compare on the CPU, also where there is a GPU

import pytest
import torch

# timm and some of transformers import torchvision, whose wheels are built against CUDA. Beside a CPU build of torch
# two of its operators are missing, and declaring them is all the import needs.
if torch.version.cuda is None:
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
        _torchvision.define(_schema)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """rms(found - truth) / rms(truth), in fp64; the absolute error where the truth is zero."""
    found, truth = found.detach().double(), truth.detach().double()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    scale = truth.square().mean().sqrt()
    return ((found - truth).square().mean().sqrt() / (scale if scale > 0 else 1)).item()


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of y."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((y * weights.to(y.dtype)).sum(), inputs))  # an input left out is an error
