"""The interpreter of the tests finds what may be wrong on a GPU alone."""

import pytest
import torch
from conftest import INTERPRETED

from mm1.kernels.dispatch import launch
from mm1.kernels.language import tl, triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


@triton.jit
def _copy(x, y, N, step, shift, BLOCK: tl.constexpr):
    """Write x[i + shift] to y[i], `step` elements after those of the program before."""
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + shift, mask=at < N), mask=at < N)


def copy(N=24, step=16, shift=0, grid=2, into_itself=False):
    """Copy N numbers by programs of 16."""
    x = torch.arange(N, dtype=torch.float32)
    y = x if into_itself else torch.full((N,), -1.0)
    launch(_copy, grid, x=x, y=y, N=N, step=step, shift=shift, BLOCK=16)
    return y


def test_a_sound_kernel_passes():
    assert copy().tolist() == list(range(24))
    assert copy(into_itself=True).tolist() == list(range(24))


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"shift": 1}, "load of 1 elements outside"),
        ({"shift": -1}, "load of 1 elements outside"),
        ({"step": 8}, "store of an element that another program writes"),
        ({"into_itself": True, "shift": -8, "step": 16, "N": 16, "grid": 1}, "load of 8 elements outside"),
        ({"into_itself": True, "step": 8, "N": 16}, "of an element that another program writes"),
    ],
)
def test_a_wrong_kernel_fails(wrong, error):
    with pytest.raises(Exception, match=error):
        copy(**wrong)


@triton.jit
def _excluded(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_elements_that_a_mask_excludes_are_not_a_number(dtype):
    y = torch.zeros(4, dtype=dtype)
    launch(_excluded, 1, x=torch.ones(3, dtype=dtype), y=y, BLOCK=4)
    assert y.isfinite().tolist() == [True, True, True, False]


def test_memory_that_nothing_has_written_is_not_a_number():
    assert torch.empty(3).isnan().all()
