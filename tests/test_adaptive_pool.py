"""Test adaptive_pool on a CPU, interpreted (TRITON_INTERPRET=1), or on a GPU (CUDA_VISIBLE_DEVICES=0)."""

import pytest
import torch
from conftest import DEVICE, INTERPRETED, gradients, not_interpreted, relative_error

from mm1.kernels.abstractor import pooling, reference
from mm1.kernels.abstractor.pooling import adaptive_pool
from mm1.kernels.patches.grids import Grids

# The interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if INTERPRETED else 2e-3, torch.float16: 3e-4}
GRIDS = [(5, 40), (13, 11), (1, 1), (12, 12), (27, 27), (3, 2), (1, 64), (64, 1)]
SMALL = [(5, 4), (1, 1), (3, 3), (3, 3), (1, 9), (9, 1)]


def patches(grids):
    return sum(h * w for h, w in grids)


def images(x, grids):
    """Return the images [1, C, h, w] of packed rows."""
    parts = x[: patches(grids)].split([h * w for h, w in grids])
    return [part.T.reshape(1, -1, h, w) for part, (h, w) in zip(parts, grids)]


def rows(image):
    return image.flatten(2)[0].T


def in_fp64(x, grids, out):
    return reference.adaptive_pool(x.double()[: patches(grids)], grids, out)


@pytest.mark.parametrize("grids", [SMALL] if INTERPRETED else [SMALL, GRIDS, [(96, 96)]], ids=str)
@pytest.mark.parametrize("out", [(3, 3), (2, 5)] if INTERPRETED else [(12, 12), (8, 8), (1, 3)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_windows_are_those_of_torch(grids, out, dtype, poisoned):
    x = torch.randn(patches(grids), 6, device=DEVICE).to(dtype).requires_grad_()
    y, truth = adaptive_pool(x, grids, out), in_fp64(x, grids, out)
    assert y.dtype == dtype
    assert relative_error(y, truth) < TOLERANCE[dtype]
    assert relative_error(gradients(y, [x])[0], gradients(truth, [x])[0]) < 2 * TOLERANCE[dtype]


def test_rows_of_no_image_and_absent_images_are_zeros_and_leak_nowhere(poisoned):
    x = torch.randn(70, 5, device=DEVICE)
    x[patches(SMALL) :] = torch.nan
    x.requires_grad_()
    y = adaptive_pool(x, Grids(SMALL, images=8, patches=70, device=DEVICE), (2, 2))
    assert relative_error(y[:24], in_fp64(x, SMALL, (2, 2))) < 1e-6
    assert not y[24:].any()
    dy = torch.randn_like(y)
    dy[24:] = torch.nan
    (dx,) = torch.autograd.grad(y, [x], dy)
    assert dx[: patches(SMALL)].isfinite().all()
    assert not dx[patches(SMALL) :].any()


@pytest.mark.parametrize("images, rows", [(0, 0), (0, 5), (2, 5)])
def test_no_image_at_all_gives_zeros(images, rows, poisoned):
    x = torch.randn(rows, 4, device=DEVICE, requires_grad=True)
    y = adaptive_pool(x, Grids([], images=images, patches=rows, device=DEVICE), (2, 3))
    assert y.shape == (6 * images, 4)
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), [x])[0].any()


def test_an_image_gives_the_same_bits_alone_packed_and_again():
    x = torch.randn(patches(SMALL), 6, device=DEVICE)
    y = adaptive_pool(x, SMALL, (3, 2))
    assert torch.equal(y, adaptive_pool(x, SMALL, (3, 2)))
    parts = x.split([h * w for h, w in SMALL])
    alone = [adaptive_pool(part, [size], (3, 2)) for part, size in zip(parts, SMALL)]
    assert torch.equal(y, torch.cat(alone))
    backwards = adaptive_pool(torch.cat(parts[::-1]), SMALL[::-1], (3, 2))
    assert torch.equal(backwards, torch.cat(alone[::-1]))


def test_x_and_its_gradient_may_have_any_strides():
    x, dy = torch.randn(8, patches(SMALL), device=DEVICE).T[:, ::2], torch.randn(4, 24, device=DEVICE).T
    x.requires_grad_()
    y, truth = adaptive_pool(x, SMALL, (2, 2)), in_fp64(x, SMALL, (2, 2))
    assert relative_error(y, truth) < 1e-6
    found, expected = torch.autograd.grad(y, [x], dy)[0], torch.autograd.grad(truth, [x], dy.double())[0]
    assert relative_error(found, expected) < 1e-6


@not_interpreted
def test_ops_keep_their_declarations():
    grids = Grids(SMALL, images=8, patches=70, device=DEVICE)
    x = torch.randn(70, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(pooling._forward, (x, grids.table, grids.owner, 2, 3))
    dy = torch.randn(48, 5, device=DEVICE)
    torch.library.opcheck(pooling._backward, (dy, grids.table, grids.owner, 2, 3))


def test_refuses_bad_arguments():
    x = torch.randn(5, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"adaptive_pool: x is \(5, 4\), expected \[4, C\]"):
        adaptive_pool(x, [(2, 2)])
    with pytest.raises(ValueError, match="adaptive_pool: out"):
        adaptive_pool(x, [(5, 1)], (0, 2))
    with pytest.raises(ValueError, match="adaptive_pool: dtype of x"):
        adaptive_pool(x.int(), [(5, 1)])
    with pytest.raises(ValueError, match="adaptive_pool: merge of grids is 2, expected 1"):
        adaptive_pool(x[:4], Grids([(2, 2)], merge=2, device=DEVICE))
