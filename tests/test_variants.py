"""Serving compiles few variants of each kernel, however the batches differ."""

import random
from collections import defaultdict

import torch
from conftest import compiles

from mm1.kernels.attention import flash, paged
from mm1.kernels.device import DEVICES
from mm1.kernels.dispatch import recording
from mm1.kernels.moe import experts, few_tokens, routing

pytestmark = compiles
HEADS, GROUPS, HEAD, WIDTH, FFN, EXPERTS, CHOSEN, PAGE = 16, 8, 128, 2048, 1024, 64, 8, 16


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape):
    return empty(*shape, dtype=torch.int32)


def prefill(rows, pages):
    """Launch what a mixture layer launches for prompts with these numbers of new rows, the longest of `pages` pages."""
    count, total = len(rows), sum(rows)
    q, k, cu_seqlens = empty(total, HEADS, HEAD), empty(total, GROUPS, HEAD), integers(count + 1)
    flash.forward(q, k, k, cu_seqlens, cu_seqlens, None, None, True)
    cached = empty(40, PAGE, GROUPS, HEAD)
    paged.forward(q, cached, cached, cu_seqlens, integers(count, pages), integers(count), max(rows))
    x, weights = empty(total, WIDTH), (empty(EXPERTS, 2 * FFN, WIDTH), None, empty(EXPERTS, WIDTH, FFN), None, None)
    index, weight = routing.choose_forward(empty(total, EXPERTS, dtype=torch.float32), None, CHOSEN)
    settings = "silu", None, 0.0, False
    if few_tokens.few(index.numel(), EXPERTS):
        experts.moe_mlp_few(x, index, weight, *weights, *settings)
    else:
        experts.moe_mlp_forward(x, routing.sort(index, EXPERTS), weight, *weights, *settings, False)


def test_three_hundred_prefill_batches_compile_at_most_six_variants_of_a_kernel():
    """Tiles follow the number of rows, from 16 to 128; nothing else of a batch is part of the code."""
    from mm1.autotune.static import specialize

    numbers, variants = random.Random(0), defaultdict(set)
    with recording(DEVICES["h200"]) as launches:
        for _ in range(300):
            rows = [numbers.choice([1, numbers.randint(1, 40), numbers.randint(1, 600)]) for _ in range(40)]
            prefill(rows[: numbers.randint(1, 40)], numbers.randint(1, 512))
    for launch in launches:
        variants[launch.name].add(repr((specialize(launch), launch.options)))
    counts = {name: len(codes) for name, codes in variants.items()}
    tiled = {"_paged_kernel": 4, "_map_kernel": 4, "_up_kernel": 5, "_gemm_kernel": 5, "_combine_kernel": 2}
    by_size = {"_merge_kernel": 6, "_few_kernel": 6}  # by splits, a power of two; two products by slots
    alone = dict.fromkeys(("map_kernel", "_forward_kernel", "_route_kernel", "_count_kernel", "_place_kernel"), 1)
    limits = {**alone, **tiled, **by_size}
    assert set(counts) == set(limits)
    assert {name: count for name, count in counts.items() if count > limits[name]} == {}
