"""Every kernel's example gives the results of fp32, in its default and in another configuration.

Kernels run interpreted (TRITON_INTERPRET=1) or on a GPU (CUDA_VISIBLE_DEVICES=0).
"""

import pytest
import torch
from conftest import DEVICE, needs_triton

from mm1.autotune import space
from mm1.autotune.search import strays
from mm1.autotune.space import KERNELS
from mm1.autotune.timing import Bench, wrong
from mm1.kernels.dispatch import device_of

TINY = {
    "grouped_gemm": (24, 3, 48, 40, False), "grouped_gemm_dw": (24, 3, 48, 40, True, False),
    "experts_up": (24, 3, 48, 40, True), "experts_dh": (24, 3, 48, 80, False), "few_tokens": (6, 4, 48, 40, True),
    "patch_embed": (10, 588, 32), "patch_embed_dw": (10, 48, 32), "conv_gate": (20, 32, 32),
    "patch_loss": (10, 32, 48),
    "paged_attention": (64, 16, 6, 16), **dict.fromkeys(("flash", "flash_dq", "flash_dkv"), (24, 2, 1, 16, True)),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_configurations_give_what_fp32_gives(kernel, monkeypatch):
    monkeypatch.setattr(space, "POOL", (2, 2))
    monkeypatch.setattr(space, "SIDE", 3)
    tunable, device = KERNELS[kernel].tunable, device_of(torch.empty(0, device=DEVICE))
    shape = tunable.shape(*TINY.get(kernel, (20, 24)))
    bench, at = Bench(kernel, tuple(shape), 16), (shape, torch.bfloat16, device)
    default = tunable.default(*at)
    other = next(c for c in strays(tunable, *at, 99) if c != default)
    assert bench.fault(default) is None
    assert bench.fault(other) is None, other


TRUTH = torch.randn(1000, 100)


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda x: x, None),
        (lambda x: x * 1.005, None),
        (lambda x: x * 1.02, "of rms"),
        (lambda x: torch.where(torch.arange(100) == 7, 0.0, x), "of rms"),
        (lambda x: x.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0), accumulate=True), "an element"),
        (lambda x: x.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(float("nan"))), "nan"),
        (lambda x: x[:-1], "expected"),
    ],
)
def test_what_is_wrong_is_told(spoil, why):
    found = wrong(spoil(TRUTH.clone()), TRUTH, 1e-2)
    assert found is None if why is None else why in found
