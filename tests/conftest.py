"""Shared by all tests: seeds, an error measure, small models and data."""

import os
from contextlib import contextmanager

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests compare on the CPU, also where there is a GPU
os.environ.setdefault("MM1_STRICT", "1")  # a kernel that fails must fail its test

import pytest
import torch

from mm1.integrations.torchvision import declare_operators
from mm1.kernels.language import INSTALLED

declare_operators()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's source on CPU tensors, slowly: shapes are tiny then
TRITON = INTERPRETED or DEVICE == "cuda"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="declarations are the same, repetition shows nothing")
compiles = pytest.mark.skipif(INTERPRETED or not INSTALLED, reason="needs Triton as it is, once")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
needs_triton = pytest.mark.skipif(not TRITON, reason="the CPU's own implementation has no tiles")


# Without Triton, as on macOS and Windows, what a CPU computes is tested, and nothing that only compiles or tunes.
COMPILED = ("ahead", "clock", "static", "tables", "tune", "tune_tables")
collect_ignore = [] if INSTALLED else [f"test_{name}.py" for name in COMPILED]


def mostly_slow(first: str, *others: str) -> list:
    """Parameters of which only the first is no slow test: compiling for a GPU takes some ten seconds each."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


if INTERPRETED:
    import hostile

    hostile.install()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextmanager
def tiles(**changes):
    """Every kernel over experts in tiles so small that tiny shapes take several, and on three multiprocessors."""
    from mm1.kernels import dispatch
    from mm1.kernels.tiles import Config
    from mm1.kernels.tuning import pinned

    config = Config(**{"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2, "warps": 4, "stages": 2, "tma": False,
                       **changes})  # fmt: skip
    names = ("grouped_gemm", "grouped_gemm_dw", "experts_up", "experts_dh", "few_tokens")
    with pytest.MonkeyPatch.context() as patch, pinned(**dict.fromkeys(names, config)):
        patch.setitem(dispatch.DEVICES, "h200", dispatch.Device("small", "sm_90", 3, 227 << 10))
        yield


@pytest.fixture
def small_tiles():
    """When interpreted; a GPU runs its own defaults."""
    if not INTERPRETED:
        yield
        return
    with tiles():
        yield


def assert_exports(call, dynamic_shapes, *cases, strict=False, parameters=()):
    """Export call(*cases[0]) with torch.export: the program computes what `call` does at the sizes of every case.

    parameters: modules and tensors that `call` reads.
    """

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_ = torch.nn.ModuleList(p for p in parameters if isinstance(p, torch.nn.Module))
            self.tensors = torch.nn.ParameterList(p for p in parameters if not isinstance(p, torch.nn.Module))

        def forward(self, *given):
            return call(*self.modules_, *self.tensors, *given)

    module = Module()
    program = torch.export.export(module, cases[0], dynamic_shapes=(dynamic_shapes,), strict=strict).module()
    for case in cases:
        torch.testing.assert_close(program(*case), module(*case), rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=INTERPRETED)
def poisoned():
    """torch.empty gives NaN, and the largest integer; for all interpreted tests."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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
    return list(torch.autograd.grad((y * weights.to(y)).sum(), inputs))  # an input left out is an error
