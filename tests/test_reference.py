"""The specifications in plain torch, compared in fp64 with transformers, timm and torch itself."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import not_interpreted, relative_error
from torch import nn

from mm1.kernels.abstractor import reference as abstractor
from mm1.kernels.abstractor.bottleneck import NAMES
from mm1.kernels.moe import reference as moe
from mm1.kernels.patches import reference as patches
from mm1.kernels.patches.grids import Grids

pytestmark = not_interpreted
SIZES = [(2, 3), (1, 1), (4, 2), (4, 2), (1, 7)]
USED = sum(h * w for h, w in SIZES)
PADDED = Grids(SIZES, images=len(SIZES) + 2, patches=USED + 4)
EXACT = 1e-12


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def gradients(y, inputs):
    """Return the gradients of a fixed random projection of y."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    return torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True)


def assert_same(y, truth, inputs, tolerance=EXACT):
    """Compare values, and gradients of all inputs."""
    for result, expected in zip([y, *gradients(y, inputs)], [truth, *gradients(truth, inputs)], strict=True):
        assert relative_error(result, expected) < tolerance


def routed(tokens, experts, k):
    index = torch.rand(tokens, experts).topk(k).indices
    return index, torch.rand(tokens, k, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("tokens, experts", [(11, 4), (1, 4), (5, 9)])
def test_experts_are_mixtrals(tokens, experts):
    transformers = pytest.importorskip("transformers")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=experts)
    config._experts_implementation = "eager"
    module = mixtral.MixtralExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, (index, weight) = random(tokens, 8), routed(tokens, experts, 2)
    y = moe.moe_mlp(x, index, weight, module.gate_up_proj, module.down_proj)
    assert_same(y, module(x, index, weight), [x, weight, module.gate_up_proj, module.down_proj])


def test_biases_limit_shift_and_alternating_rows_are_those_of_gpt_oss():
    transformers = pytest.importorskip("transformers")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=4)
    config._experts_implementation, config.swiglu_alpha, config.swiglu_limit = "eager", 1.702, 1.0
    module = gpt_oss.GptOssExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, (index, weight) = random(11, 8), routed(11, 4, 2)
    y = moe.moe_mlp(
        x, index, weight, module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2),
        gate_up_bias=module.gate_up_proj_bias, down_bias=module.down_proj_bias, activation="quick_gelu",
        limit=module.limit, shift=1.0, interleaved=True,
    )  # fmt: skip
    assert_same(y, module(x, index, weight), [x, weight, *module.parameters()])


FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_are_their_formulas_without_a_gate(activation):
    x, w, down, weight = random(7, 5), random(1, 6, 5), random(1, 5, 6), random(7, 1)
    y = moe.moe_mlp(x, torch.zeros(7, 1, dtype=torch.int32), weight, w, down, activation=activation)
    truth = weight * (FORMULAS[activation](x @ w[0].t()) @ down[0].t())
    assert_same(y, truth, [x, w, down, weight])


def test_gate_and_up_may_be_apart_and_an_index_outside_adds_nothing():
    x, gate, up, down, (index, weight) = (
        random(9, 8),
        random(4, 6, 8),
        random(4, 6, 8),
        random(4, 8, 6),
        routed(9, 4, 2),
    )
    truth = moe.moe_mlp(x, index, weight, torch.cat([gate, up], 1), down)
    assert_same(moe.moe_mlp(x, index, weight, gate, down, up=up), truth, [x, gate, up, down, weight])
    outside = torch.rand(index.shape) < 0.4
    some = torch.where(outside, torch.tensor([[-1, 4]]), index)
    y = moe.moe_mlp(x, some, weight, gate, down, up=up)
    truth = moe.moe_mlp(x, index, weight.masked_fill(outside, 0.0), gate, down, up=up)
    assert_same(y, truth, [x, gate, up, down])
    assert not gradients(y, [weight])[0][outside].any()


def test_no_tokens_give_none_and_zero_gradients():
    x, gate_up, down = random(0, 8), random(4, 12, 8), random(4, 8, 6)
    y = moe.moe_mlp(x, torch.zeros(0, 2, dtype=torch.int32), random(0, 2), gate_up, down)
    assert y.shape == (0, 8)
    assert not torch.autograd.grad(y.sum(), [gate_up])[0].any()


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0), (1,)])
def test_grouped_products_are_those_of_each_row_and_its_expert(sizes):
    ends = torch.tensor(sizes).cumsum(0).int()
    rows = int(ends[-1]) + 2
    a, b, bias = random(rows, 5), random(len(sizes), 5, 3), random(len(sizes), 3)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    product = torch.einsum("rk,rkn->rn", a[: len(owner)], b[owner]) + bias[owner]
    truth = torch.cat([product, a.new_zeros(2, 3)])
    y = moe.grouped_gemm(a, b, ends, bias)
    assert_same(y, truth, [a, b, bias])
    dy = torch.randn_like(y)
    (db,) = torch.autograd.grad(y, [b], dy)
    assert relative_error(moe.grouped_gemm_dw(a, dy, ends), db) < EXACT


def test_routing_weights_are_a_softmax_of_the_chosen_and_losses_are_their_formulas():
    logits = random(13, 5)
    chosen = moe.choose_experts(logits, None, 2, True)
    best, index = logits.topk(2)
    assert torch.equal(chosen.choice.long(), index)
    assert_same(chosen.weight, best.softmax(1), [logits])
    share = F.one_hot(index[:, 0], 5).double().mean(0)
    assert_same(chosen.load_balance, 5 * (share * logits.softmax(1).mean(0)).sum(), [logits])
    assert_same(chosen.z_loss, logits.exp().sum(1).log().square().mean(), [logits])


@pytest.mark.parametrize("kind", [("bilinear", True, False), ("bicubic", False, True), ("nearest", False, False)])
def test_positions_are_torchs_interpolation_of_each_image(kind):
    table, (mode, antialias, align) = random(3, 4, 5), kind
    options = {} if mode == "nearest" else {"antialias": antialias, "align_corners": align}
    images = [F.interpolate(table.permute(2, 0, 1)[None], size, mode=mode, **options)[0] for size in SIZES]
    truth = F.pad(torch.cat([image.flatten(1).t() for image in images]), (0, 0, 0, 4))
    assert_same(patches.positions(table, PADDED, *kind), truth, [table])


def test_a_column_is_a_row_transposed():
    """As torch's own antialiased result of one column is not."""
    table = random(5, 1, 3)
    y = patches.positions(table, [(7, 1)])
    assert_same(y, patches.positions(table.transpose(0, 1), [(1, 7)]), [table])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64], ids=str)
def test_patches_are_convolved_image_by_image(dtype):
    p, mean, std = 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.randint(0, 256, (PADDED.patches * p * p, 3), dtype=torch.uint8)
    if dtype != torch.uint8:
        pixels = (pixels / 255).to(dtype).requires_grad_()
    weight, bias, table = random(5, p * p * 3), random(5), random(2, 3, 5)
    y, cu_seqlens = patches.patch_embed(pixels, PADDED, weight, bias, table, patch_size=p, mean=mean, std=std)
    assert cu_seqlens.tolist() == [0, 6, 7, 15, 23, 30, 30, 30]
    kernel, parts, begin = weight.view(5, p, p, 3).permute(0, 3, 1, 2), [], 0
    for h, w in SIZES:
        image = pixels[begin : begin + h * w * p * p].view(h * p, w * p, 3).double()
        image = ((image / 255 if dtype == torch.uint8 else image) - torch.tensor(mean).double()) / torch.tensor(std)
        place = F.interpolate(table.permute(2, 0, 1)[None], (h, w), mode="bilinear", antialias=True)
        parts.append((F.conv2d(image.permute(2, 0, 1)[None], kernel, bias, stride=p) + place)[0].flatten(1).t())
        begin += h * w * p * p
    truth = F.pad(torch.cat(parts), (0, 0, 0, 4))
    inputs = [weight, bias, table, *([pixels] if pixels.requires_grad else [])]
    assert_same(y, truth, inputs, tolerance=1e-6)  # mean and std above are rounded to fp32


def test_merged_blocks_are_the_same_patches_in_another_order():
    sizes, order = [(4, 6), (2, 2), (6, 2)], []
    for h, w in sizes:
        places = torch.arange(len(order), len(order) + h * w).view(h // 2, 2, w // 2, 2)
        order += places.transpose(1, 2).flatten().tolist()
    pixels, weight, table = random(len(order) * 4, 3), random(5, 12), random(2, 3, 5)
    options = {"pos_embed": table, "patch_size": 2}
    y, _ = patches.patch_embed(pixels, Grids(sizes, merge=2), weight, **options)
    truth, _ = patches.patch_embed(pixels, Grids(sizes), weight, **options)
    assert_same(y, truth[order], [pixels, weight, table])


def images_of(x):
    ends = torch.tensor([0, *(h * w for h, w in SIZES)]).cumsum(0).tolist()
    return [x[a:b].t().view(1, -1, h, w) for (a, b), (h, w) in zip(pairwise(ends), SIZES)]


@pytest.mark.parametrize("pool", [None, (2, 3)])
@pytest.mark.parametrize("widths", [(8, 8), (6, 8)], ids=["identity shortcut", "convolved shortcut"])
def test_a_block_is_timms_bottleneck_of_each_image(widths, pool):
    regnet, layers = pytest.importorskip("timm.models.regnet"), pytest.importorskip("timm.layers")
    module = regnet.Bottleneck(*widths, act_layer=nn.SiLU, norm_layer=layers.LayerNorm2d, group_size=1).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = {name: p for name, p in module.named_parameters() if name in NAMES}
    x = random(PADDED.patches, widths[0])
    y = abstractor.conv_block(x, PADDED, weights, pool=pool)
    results = [module(image) if pool is None else F.adaptive_avg_pool2d(module(image), pool) for image in images_of(x)]
    truth = torch.cat([result[0].flatten(1).t() for result in results])
    assert_same(y, F.pad(truth, (0, 0, 0, len(y) - len(truth))), [x, *weights.values()], tolerance=1e-6)  # eps of timm


def test_pooling_is_torchs_of_each_image():
    x = random(PADDED.patches, 5)
    truth = torch.cat([nn.AdaptiveAvgPool2d((2, 3))(image)[0].flatten(1).t() for image in images_of(x)])
    y = abstractor.adaptive_pool(x, PADDED, (2, 3))
    assert y.shape == (PADDED.images * 6, 5)
    assert_same(y, F.pad(truth, (0, 0, 0, 12)), [x])


def test_without_images_there_are_zeros():
    weights = {name: random(*shape) for name, shape in zip(NAMES, [(8, 6, 1, 1)])}
    for grids in (Grids([]), Grids([], images=2, patches=3)):
        assert patches.positions(random(2, 3, 5), grids).shape == (grids.patches, 5)
        y = abstractor.conv_block(random(grids.patches, 6), grids, weights)
        assert y.shape == (grids.patches, 8)
        assert not y.any()
        assert not abstractor.adaptive_pool(random(grids.patches, 6), grids, (2, 2)).any()
