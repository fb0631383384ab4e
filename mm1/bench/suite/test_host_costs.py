"""Measure the host's costs, which are the same for any GPU: look-ups, a batch's geometry, ops on tiny inputs."""

import pytest
import torch
import torch.nn.functional as F

from mm1.kernels import tuning
from mm1.kernels.abstractor.pooling import adaptive_pool
from mm1.kernels.attention import Causal, attention
from mm1.kernels.device import DEVICES
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.grouped import GEMM
from mm1.kernels.moe.routing import route
from mm1.kernels.patches.embedding import patch_embed
from mm1.kernels.patches.grids import Grids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = GEMM.shape(rows=16384, experts=64, k=3072, n=16128)
WIDTH = 16


def look_up():
    return tuning.config_for(GEMM, SHAPE, torch.bfloat16, DEVICES["h200"])


@pytest.mark.benchmark(group="look-up")
def test_look_up(benchmark):
    look_up()  # the first one takes a millisecond, and pytest-benchmark would plan its rounds by it
    benchmark(look_up)


@pytest.mark.benchmark(group="look-up")
def test_first_look_up(benchmark):
    benchmark.pedantic(look_up, setup=tuning.clear_caches, rounds=20)


@pytest.mark.benchmark(group="geometry")
@pytest.mark.parametrize("images", [1, 64, 512])
def test_grids(benchmark, images):
    sizes = [(16 + i % 48, 64 - i % 48) for i in range(images)]
    benchmark(Grids, sizes, device=DEVICE)


def calls():
    def new(*shape):
        return torch.randn(*shape, device=DEVICE)

    grids, ends = Grids([(2, 2)], device=DEVICE), torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    rows, gate_up, down = new(4, WIDTH), new(2, 2 * WIDTH, WIDTH), new(2, WIDTH, WIDTH)
    routing = route(new(4, 2), k=1)
    pixels = torch.zeros(4 * 2 * 2, 3, dtype=torch.uint8, device=DEVICE)
    weight, bias, table, heads = new(WIDTH, 2 * 2 * 3), new(WIDTH), new(2, 2, WIDTH), new(4, 1, WIDTH)
    half = (0.5, 0.5, 0.5)
    return {
        "torch linear": lambda: F.linear(rows, down[0]),
        "route": lambda: route(rows, k=1),
        "moe_mlp": lambda: moe_mlp(rows, routing.index, routing.weight, gate_up, down),
        "patch_embed": lambda: patch_embed(pixels, grids, weight, bias, table, patch_size=2, mean=half, std=half),
        "adaptive_pool": lambda: adaptive_pool(rows, grids, (2, 2)),
        "attention": lambda: attention(heads, heads, heads, ends, mask=Causal()),
    }


@pytest.mark.benchmark(group="an op on tiny inputs")
@pytest.mark.parametrize("name", ["torch linear", "route", "moe_mlp", "patch_embed", "adaptive_pool", "attention"])
def test_dispatch(benchmark, name):
    call = torch.no_grad()(calls()[name])
    wait = torch.cuda.synchronize if DEVICE == "cuda" else None  # otherwise a full queue would be timed
    benchmark.pedantic(call, setup=wait, rounds=300, warmup_rounds=20)
