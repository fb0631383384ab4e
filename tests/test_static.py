"""Kernels compile to sound code for GPUs that are not here, in their default configurations and at the sizes in use."""

import pytest
import torch
from conftest import mostly_slow

from mm1.autotune.static import Compiled, compile_launch, distinct
from mm1.kernels import tiles
from mm1.kernels.dispatch import DEVICES, Launch, recording
from mm1.kernels.moe import experts, grouped, routing
from mm1.kernels.patches import embedding, loss, position_tables

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COARSE, FINE = (4096, 14336, 8, 2), (2048, 768, 128, 8)  # Mixtral 8×7B, Qwen3-30B


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def ints(*shape):
    return empty(*shape, dtype=torch.int32)


def layer(T, sizes, dtype=BF16, apart=False, bias=False, transposed=False):
    """Run forward and backward of an expert layer."""
    D, F, E, K = sizes
    order = ints(T * K), ints(T, K), ints(E)
    x, weight = empty(T, D, dtype=dtype), empty(T, K, dtype=FP32)
    gate_up = empty(E, D, 2 * F, dtype=dtype).transpose(1, 2) if transposed else empty(E, 2 * F, D, dtype=dtype)
    up, down = None, empty(E, D, F, dtype=dtype)
    if apart:
        gate_up, up = empty(E, F, D, dtype=dtype), empty(E, F, D, dtype=dtype)
    biases = (empty(E, 2 * F, dtype=dtype), empty(E, D, dtype=dtype)) if bias else (None, None)
    gate = ("quick_gelu", 7.0, 1.0, True) if bias else ("silu", None, 0.0, False)
    experts.moe_mlp_forward(x, order, weight, gate_up, up, down, *biases, *gate, True)
    h = empty(T * K, 2 * F, dtype=dtype)
    experts.moe_mlp_backward(x, x, h, order, weight, gate_up, up, down, *biases, *gate, True)


def few(T, sizes, dtype=BF16):
    D, F, E, K = sizes
    weights = empty(E, 2 * F, D, dtype=dtype), None, empty(E, D, F, dtype=dtype)
    x, weight = empty(T, D, dtype=dtype), empty(T, K, dtype=FP32)
    experts.moe_mlp_few(x, ints(T, K), weight, *weights, None, None, "silu", None, 0.0, False)


def route(T, E, k):
    logits = empty(T, E)
    choice, weight, first, balance, z = routing.route_forward(logits, None, k, True)
    routing.route_backward(weight, balance, z, logits, None, choice, first, True)
    routing.sort(choice, E)
    tiles.tile_map(ints(E), T * k, 64)


def add_gradient(dtype=BF16):
    """Add a weight gradient to an fp32 buffer, as gradient accumulation does."""
    a, dy, into = empty(8192, 2048, dtype=dtype), empty(8192, 1024, dtype=dtype), empty(8, 2048, 1024, dtype=FP32)
    grouped.dw(a, dy, ints(8), into, accumulate=True)


def embed(p, width, side, dtype=BF16, pixels=torch.uint8, mode="bilinear"):
    """Embed 64 images of side × side patches with a table as large, from pixels and from cut patches, both ways."""
    P = 64 * side * side
    x, weight, table = empty(P * p * p, 3, dtype=pixels), empty(width, p * p * 3, dtype=dtype), empty(side, side, width)
    geometry, dy = (ints(64, 4), ints(P)), empty(P, width, dtype=dtype)
    fold, interpolation = ([1.5, 2.5, 3.5], [0.1, 0.2, 0.3]), (1, mode, True, False)
    embedding.forward(x, weight, empty(width), table, *geometry, p, *fold, *interpolation)
    embedding.backward(dy, x, weight, *geometry, p, *fold, 1, pixels != torch.uint8, True)
    embedding.embed(empty(P, p * p * 3, dtype=dtype), weight, empty(width), table, *geometry, *interpolation)
    position_tables.forward(table, *geometry, *interpolation)
    position_tables.backward(dy, geometry[0], table.shape, *interpolation)


def predict_patches(width, dtype=BF16, p=14, channels=3):
    """Compute the loss of half of the patches of 64 images of 16 × 16 patches, both ways."""
    R, K = 64 * 128, p * p * channels
    inputs = empty(R, width, dtype=dtype), empty(K, width, dtype=dtype), empty(K, dtype=dtype)
    pixels, geometry = empty(2 * R * p * p, channels, dtype=torch.uint8), [ints(64, 4), ints(2 * R)]
    settings = [p, p, 1], [0.02] * channels, [0.1] * channels, 1e-6, dtype
    loss.forward(*inputs, pixels, ints(R), geometry, *settings)
    loss.backward(empty(R, dtype=FP32), *inputs, pixels, ints(R), geometry, *settings, [True] * 3)


CALLS = {
    "coarse": lambda: layer(8192, COARSE),
    "fine": lambda: layer(8192, FINE),
    "mm1-3b-moe": lambda: layer(8192, (3072, 8064, 64, 2)),
    "small": lambda: layer(300, FINE),
    "apart": lambda: layer(8192, COARSE, apart=True),
    "gpt-oss": lambda: layer(8192, (2880, 2880, 32, 4), bias=True, transposed=True),
    "fp16": lambda: layer(8192, FINE, FP16),
    "fp32": lambda: layer(8192, FINE, FP32),
    "gradient": add_gradient,
    "decode 1": lambda: few(1, COARSE),
    "decode 16": lambda: few(16, FINE),
    "route": lambda: route(8192, 64, 8),
    "route wide": lambda: route(8192, 512, 16),
    "vit-h-14": lambda: embed(14, 1280, 27),
    "so400m-16 cubic": lambda: embed(16, 1152, 24, mode="bicubic"),
    "vit-b-5 odd": lambda: embed(5, 768, 27, pixels=FP32),
    "aim": lambda: predict_patches(2048),
    "aimv2 fp16": lambda: predict_patches(1024, FP16),
    "spectrogram": lambda: predict_patches(768, p=16, channels=1),
    "aim fp32": lambda: predict_patches(2048, FP32),
    "vit-l-14 fp32": lambda: embed(14, 1024, 24, FP32),
}
MULTIPLY = ("_up_kernel", "_gemm_kernel", "_dh_kernel", "_dw_kernel", "_few_kernel", "_embed_kernel",
            "_embed_dw_kernel", "_dtable_kernel", "_error_kernel")  # fmt: skip
BY_POINTERS = ("_embed_dw_kernel", "_dtable_kernel")  # their operands are gathered


def compiled(call: str, device: str) -> list[tuple[Launch, Compiled]]:
    """Return each different launch of the call with its machine code."""
    with recording(DEVICES[device]) as launches:
        CALLS[call]()
    return [(launch, compile_launch(launch, DEVICES[device])) for launch in distinct(launches)]


def check(call: str, device: str) -> None:
    for launch, code in compiled(call, device):
        assert code.shared <= DEVICES[device].shared, code
        multiplies = code.name in MULTIPLY
        if call.endswith("fp32"):  # products of single multiplications; AMD's matrix cores have true fp32
            assert code.spills <= 10, code  # ptxas keeps to 80 registers, for three programs on a multiprocessor
            assert code.matrix == 0 or device == "mi300x", "TF32 where fp32 is meant"
            continue
        assert code.spills == 0, code
        assert bool(code.matrix) == multiplies, code
        if not multiplies or device != "h200":
            continue
        rows = launch.arguments.get("BLOCK_M", 0)
        if rows >= 64:
            assert code.matrix == code.instructions["HGMMA"], "mma.sync where wgmma is meant"
        contiguous = call != "gpt-oss" or code.name != "_up_kernel"  # alternate rows of a transposed weight are not
        assert bool(code.instructions["UTMALDG"]) == (contiguous and code.name not in BY_POINTERS), code
        assert bool(code.instructions["UTMASTG"]) == (code.name in ("_up_kernel", "_gemm_kernel")), code


@pytest.mark.parametrize("call", ["coarse", "fine", "gpt-oss", "gradient", "fp32", "decode 1", "decode 16", "route",
                                  "route wide", "vit-h-14", "aim"])  # fmt: skip
def test_h200_code_has_wgmma_bulk_copies_and_no_spills(call):
    check(call, "h200")


@pytest.mark.parametrize("device", ["a100", "b200", "rtx5090", "mi300x"])
@pytest.mark.parametrize("call", mostly_slow("coarse", "vit-h-14", "aim"))
def test_other_gpus_have_code_that_fits(call, device):
    check(call, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_has_code_that_fits_every_gpu(call, device):
    check(call, device)


def test_a_tile_too_large_for_the_registers_is_seen_to_spill():
    from mm1.kernels.tiles import Config
    from mm1.kernels.tuning import pinned

    with pinned(experts_dh=Config(128, 256, 64)):
        assert any(code.spills for _, code in compiled("coarse", "h200") if code.name == "_dh_kernel")
