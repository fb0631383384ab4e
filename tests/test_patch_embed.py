import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICE,
    INTERPRETED,
    assert_exports,
    gradients,
    needs_gpu,
    needs_triton,
    not_interpreted,
    relative_error,
)

from mm1.kernels.patches import embedding, reference
from mm1.kernels.patches.embedding import embed_patches, patch_embed
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.pixels import word_bytes
from mm1.kernels.tiles import Config
from mm1.kernels.tuning import pinned

SIZES = [(2, 3), (1, 1), (4, 2), (2, 3), (1, 7)]
USED = sum(h * w for h, w in SIZES)
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
NORMAL = {"mean": MEAN, "std": STD}
# The interpreter cuts bf16 off instead of rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}


def tiles_of(block_m, block_n, rows):
    """Pin tiles block_m × block_n where interpreted, and steps of `rows` patches in the weight gradient."""
    small = Config(block_m=block_m, block_n=block_n, block_k=32, group_m=2, warps=4, stages=2, tma=False)
    gradient = replace(small, block_m=16, block_n=64, block_k=rows)
    return pinned(**({"patch_embed": small, "patch_embed_dw": gradient} if INTERPRETED else {}))


@pytest.fixture(autouse=True)
def _tiles():
    """Use tiles so small that tiny shapes have several steps and a remainder."""
    with tiles_of(16, 16, 16):
        yield


def parameters(p, width=20, table=(3, 4), dtype=torch.float32):
    shapes = [(width, p * p * 3), (width,), (*table, width)]
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def images(p, sizes=SIZES, dtype=torch.uint8):
    made = [torch.randint(0, 256, (h * p, w * p, 3), dtype=torch.uint8, device=DEVICE) for h, w in sizes]
    return made if dtype == torch.uint8 else [(x / 255).to(dtype) for x in made]


def sizes_in_pixels(p, sizes=SIZES):
    return [(h * p, w * p) for h, w in sizes]


def packed(made):
    return torch.cat([image.reshape(-1, 3) for image in made])


def in_fp64(pixels, p, weight, bias, table, sizes=SIZES):
    """Return the reference's tokens."""
    pixels = pixels.double() if pixels.is_floating_point() else pixels
    weights = weight.double(), bias.double(), table.double()
    return reference.patch_embed(pixels, Grids(sizes), *weights, patch_size=p, **NORMAL)[0]


@pytest.mark.parametrize("p, dtype", [
    (4, torch.float32), (4, torch.bfloat16), (4, torch.float16), (5, torch.float32), (14, torch.float32),
    *(pytest.param(p, dtype, marks=not_interpreted)
      for p in (5, 14, 16, 32) for dtype in TOLERANCE if p > 14 or dtype != torch.float32),
], ids=str)  # fmt: skip
def test_bytes_are_convolved_and_positions_interpolated(p, dtype):
    inputs = parameters(p, dtype=dtype)
    made = images(p)
    y, cu_seqlens = patch_embed(made, sizes_in_pixels(p), *inputs, patch_size=p, **NORMAL)
    assert y.dtype == dtype
    assert cu_seqlens.tolist() == [0, *itertools.accumulate(h * w for h, w in SIZES)]
    truth = in_fp64(packed(made), p, *inputs)
    assert relative_error(y, truth) < TOLERANCE[dtype]
    for found, expected in zip(gradients(y, inputs), gradients(truth, inputs)):
        assert relative_error(found, expected) < TOLERANCE[dtype]


def test_64_images_from_one_patch_to_96_by_96():
    draw = random.Random(0)
    most = 5 if INTERPRETED else 40
    sizes = [(96, 96), (1, 64), (64, 1), (1, 1), *((draw.randint(1, most), draw.randint(1, most)) for _ in range(60))]
    inputs, pixels = parameters(4, width=4, table=(2, 3)), packed(images(4, sizes))
    with tiles_of(1024, 16, 1024):
        y, _ = patch_embed(pixels, Grids(sizes), *inputs, patch_size=4, **NORMAL)
        found = gradients(y, inputs)
    truth = in_fp64(pixels, 4, *inputs, sizes=sizes)
    assert relative_error(y, truth) < 1e-5
    for a, b in zip(found, gradients(truth, inputs)):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "pixel_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("p", [4, pytest.param(14, marks=not_interpreted)])
def test_float_pixels_have_a_gradient(p, dtype, pixel_dtype):
    inputs = parameters(p, dtype=dtype)
    pixels = packed(images(p, dtype=pixel_dtype)).requires_grad_()
    y, _ = patch_embed(pixels, Grids(SIZES, images=7, patches=USED + 4), *inputs, patch_size=p, **NORMAL)
    truth = in_fp64(pixels, p, *inputs)
    assert relative_error(y[:USED], truth) < TOLERANCE[dtype]
    for found, expected in zip(gradients(y[:USED], [pixels, *inputs]), gradients(truth, [pixels, *inputs])):
        assert relative_error(found, expected) < TOLERANCE[dtype]


def test_cut_patches_of_any_width_and_of_no_image():
    weight, bias, table = parameters(4)
    patches = torch.randn(USED + 3, 48, device=DEVICE, requires_grad=True)
    grids = Grids(SIZES, patches=USED + 3)
    y = embed_patches(patches, grids, weight, bias, table, interpolation="bicubic")
    positions = reference.positions(table.double(), SIZES, "bicubic")
    truth = F.linear(patches.double(), weight.double(), bias.double()) + F.pad(positions, (0, 0, 0, 3))
    assert relative_error(y, truth) < 1e-5
    inputs = [patches, weight, bias, table]
    for found, expected in zip(gradients(y, inputs), gradients(truth, inputs)):
        assert relative_error(found, expected) < 1e-5
    assert torch.equal(embed_patches(patches, grids, weight, bias), F.linear(patches, weight, bias))


def test_merged_blocks_are_the_same_patches_in_another_order():
    sizes, start, order = [(4, 6), (2, 2), (6, 2)], 0, []
    for h, w in sizes:
        places = torch.arange(start, start + h * w).view(h // 2, 2, w // 2, 2)
        order, start = [*order, *places.transpose(1, 2).flatten().tolist()], start + h * w
    inputs = parameters(4)
    pixels = packed(images(4, sizes, torch.float32)).requires_grad_()
    y, _ = patch_embed(pixels, Grids(sizes, merge=2), *inputs, patch_size=4, **NORMAL)
    truth = patch_embed(pixels, sizes_in_pixels(4, sizes), *inputs, patch_size=4, **NORMAL)[0][order]
    assert relative_error(y, truth) < 1e-6
    for found, expected in zip(gradients(y, [pixels, *inputs]), gradients(truth, [pixels, *inputs])):
        assert relative_error(found, expected) < 1e-5


def test_strided_arguments():
    p, (weight, bias, table) = 4, parameters(4)
    pixels, grids = packed(images(p)), Grids(SIZES)
    truth, _ = patch_embed(pixels, grids, weight, bias, table, patch_size=p)
    spread = lambda x: torch.stack([x, x], -1)[..., 0]  # noqa: E731
    inputs = [spread(weight), bias, spread(table)]
    y, _ = patch_embed(spread(pixels), grids, *inputs, patch_size=p)
    assert relative_error(y, truth) < 1e-6
    dy = torch.randn(20, USED, device=DEVICE).t()  # a gradient that is transposed
    for found, expected in zip(
        torch.autograd.grad(y, [weight, bias, table], dy), torch.autograd.grad(truth, [weight, bias, table], dy)
    ):
        assert relative_error(found, expected) < 1e-6
    patches = torch.randn(48, USED, device=DEVICE).t()
    assert relative_error(embed_patches(patches, grids, *inputs), embed_patches(patches.contiguous(), grids, weight,
                          bias, table)) < 1e-6  # fmt: skip


def test_pixels_off_a_words_border():
    """Buffers that begin at an odd byte are read byte by byte."""
    p, (weight, bias, table) = 4, parameters(4)
    pixels, grids = packed(images(p)), Grids(SIZES)
    bytes_ = torch.cat([pixels.new_zeros(1), pixels.view(-1)])[1:].view(-1, 3)
    assert word_bytes(bytes_, p) == 1
    found, truth = (patch_embed(x, grids, weight, bias, table, patch_size=p)[0] for x in (bytes_, pixels))
    assert relative_error(found, truth) < 1e-6


@needs_triton
@pytest.mark.parametrize("block_n", [64, 128])
def test_wide_tiles_are_finished_in_parts(block_n):
    inputs, pixels = parameters(4, width=130), packed(images(4))
    with pinned(patch_embed=Config(block_m=16, block_n=block_n, block_k=32, warps=4, stages=2, tma=False)):
        y, _ = patch_embed(pixels, Grids(SIZES), *inputs, patch_size=4, **NORMAL)
    assert relative_error(y, in_fp64(pixels, 4, *inputs)) < 1e-5


def test_padding_changes_nothing_and_is_zero():
    p, inputs = 4, parameters(4)
    pixels = packed(images(p))
    exact, _ = patch_embed(pixels, Grids(SIZES), *inputs, patch_size=p, **NORMAL)
    grids = Grids(SIZES, images=9, patches=40)
    for buffer in (pixels, torch.cat([pixels, torch.full((40 * p * p - len(pixels), 3), 99).to(pixels)])):
        padded, cu_seqlens = patch_embed(buffer, grids, *inputs, patch_size=p, **NORMAL)
        assert relative_error(padded[:USED], exact) < 1e-6
        assert not padded[USED:].any()
        assert cu_seqlens.tolist()[5:] == [USED] * 5
        # What comes back into padding rows counts for nothing, whatever it is.
        dy = torch.randn(40, 20, device=DEVICE)
        dy[USED:] = float("nan")
        found = torch.autograd.grad(padded, inputs, dy)
        for a, b in zip(found, torch.autograd.grad(exact, inputs, dy[:USED], retain_graph=True)):
            assert relative_error(a, b) < 1e-6


def test_an_image_alone_and_in_company_has_the_same_bits():
    p, inputs = 4, parameters(4)
    made = images(p)
    together, cu = patch_embed(packed(made), Grids(SIZES), *inputs, patch_size=p)
    twice, _ = patch_embed(packed(made), Grids(SIZES), *inputs, patch_size=p)
    assert torch.equal(together, twice)
    for a, b in zip(gradients(together, inputs), gradients(twice, inputs)):
        assert torch.equal(a, b)
    for i, size in enumerate(SIZES):
        alone, _ = patch_embed(packed([made[i]]), Grids([size]), *inputs, patch_size=p)
        assert relative_error(together[cu[i] : cu[i + 1]], alone) < 1e-6


def test_frozen_parameters_have_no_gradient():
    p, (weight, bias, table) = 4, parameters(4)
    y, _ = patch_embed(packed(images(p)), Grids(SIZES), weight, bias.detach(), table.detach(), patch_size=p)
    truth, _ = patch_embed(packed(images(p)), Grids(SIZES), weight, bias, table, patch_size=p)
    assert gradients(y, [weight])[0].shape == weight.shape
    y, _ = patch_embed(packed(images(p)), Grids(SIZES), weight.detach(), None, table, patch_size=p)
    assert relative_error(gradients(y, [table])[0], gradients(truth, [table])[0]) < 1e-6


def test_no_image_gives_no_tokens_and_zero_gradients():
    inputs = parameters(4)
    y, cu_seqlens = patch_embed([], [], *inputs, patch_size=4)
    assert y.shape == (0, 20)
    assert cu_seqlens.tolist() == [0]
    assert all(not g.any() for g in gradients(y, inputs))
    y, _ = patch_embed(torch.zeros(0, 3, dtype=torch.uint8, device=DEVICE), Grids([], images=2, patches=5), *inputs,
                       patch_size=4)  # fmt: skip
    assert not y.any()
    assert all(not g.any() for g in gradients(y, inputs))


@not_interpreted
def test_new_sizes_do_not_recompile():
    p, inputs = 4, parameters(4)
    call = torch.compile(lambda x, g: patch_embed(x, g, *inputs, patch_size=p, **NORMAL)[0], fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in (SIZES, [(5, 5)], [(1, 1)] * 7, []):
            made, grids = images(p, sizes), Grids(sizes, images=8, patches=40, device=DEVICE)
            used = grids.patches * p * p
            pixels = torch.zeros(used, 3, dtype=torch.uint8, device=DEVICE)
            if made:
                pixels[: len(packed(made))] = packed(made)
            y = call(pixels, grids)
            assert relative_error(y, patch_embed(pixels, grids, *inputs, patch_size=p, **NORMAL)[0]) < 1e-6
            gradients(y, inputs)


@not_interpreted
def test_compiles_with_a_list_of_sizes():
    p, inputs = 4, parameters(4)
    pixels = images(p)
    call = lambda *a: patch_embed(pixels, sizes_in_pixels(p), *a, patch_size=p)[0]  # noqa: E731
    assert relative_error(torch.compile(call, fullgraph=True)(*inputs), call(*inputs)) < 1e-6


def sides_of(sizes):
    """Return the first row, rows, h and w of each image, int64 [N]."""
    h, w = torch.tensor(sizes, device=DEVICE).unbind(1)
    return (h * w).cumsum(0) - h * w, h * w, h, w


BATCHES = [SIZES, [(2, 3)], [(1, 2)], [(5, 4), (2, 3), (1, 7), (1, 1)], SIZES[::-1]]  # the first is the example


@not_interpreted
@pytest.mark.parametrize("dtype, strict", [(torch.uint8, True), (torch.float32, False)], ids=str)
def test_exports_for_any_images_of_any_sizes(dtype, strict):
    def call(weight, bias, table, pixels, *sides):
        grids = Grids.of_tensors(*sides, pixels.shape[0] // 16)
        return patch_embed(pixels, grids, weight, bias, table, patch_size=4, **NORMAL)[0]

    rows, count = {0: 16 * torch.export.Dim("P", max=4096)}, {0: torch.export.Dim("N", min=1, max=64)}
    cases = [(packed(images(4, sizes, dtype)), *sides_of(sizes)) for sizes in BATCHES]
    assert_exports(call, (rows, *[count] * 4), *cases, strict=strict, parameters=parameters(4))


@not_interpreted
@pytest.mark.parametrize("strict", [True, False])
def test_cut_patches_export_for_any_images_of_any_sizes(strict):
    def call(weight, bias, table, patches, *sides):
        return embed_patches(patches, Grids.of_tensors(*sides, patches.shape[0]), weight, bias, table)

    rows, count = {0: torch.export.Dim("P", min=1, max=4096)}, {0: torch.export.Dim("N", min=1, max=64)}
    sides = [sides_of(sizes) for sizes in [*BATCHES, [(1, 1)], [(1, 1)] * 5]]
    cases = [(torch.randn(int(each[1].sum()), 48, device=DEVICE), *each) for each in sides]
    assert_exports(call, (rows, *[count] * 4), *cases, strict=strict, parameters=parameters(4))


@not_interpreted
def test_op_contracts():
    p, (weight, bias, table) = 4, parameters(4)
    grids = Grids(SIZES, device=DEVICE)
    geometry = grids.table, grids.owner
    interpolation = "bilinear", True, False
    torch.library.opcheck(
        embedding._forward,
        (packed(images(p)), weight, bias, table, *geometry, p, [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], 1, *interpolation),
    )
    patches = torch.randn(USED, 48, device=DEVICE, requires_grad=True)
    torch.library.opcheck(embedding._embed_op, (patches, weight, bias, table, *geometry, 1, *interpolation))


@needs_gpu
def test_no_synchronisation_on_a_gpu():
    p, inputs = 4, parameters(4)
    pixels, grids = packed(images(p)), Grids(SIZES).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = patch_embed(pixels, grids, *inputs, patch_size=p, **NORMAL)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_beyond_2_31_bytes_of_pixels():
    """Patches have 14 pixels, images 96 × 96 patches; the last image begins beyond 2³¹ bytes."""
    p, side = 14, 96
    count = 2**31 // (side * side * p * p * 3) + 2
    weight = torch.randn(4, p * p * 3, device=DEVICE)
    pixels = torch.zeros(count * side * side * p * p, 3, dtype=torch.uint8, device=DEVICE)
    pixels[-side * side * p * p :] = torch.randint(0, 256, (side * side * p * p, 3), dtype=torch.uint8)
    last, _ = patch_embed(pixels, Grids([(side, side)] * count), weight, patch_size=p)
    alone, _ = patch_embed(pixels[-side * side * p * p :], Grids([(side, side)]), weight, patch_size=p)
    assert relative_error(last[-side * side :], alone) < 1e-6


@pytest.mark.parametrize("p", [4, 7])
def test_the_weight_of_a_convolution_is_taken_as_it_is(p):
    conv = torch.nn.Conv2d(3, 20, p, stride=p).to(DEVICE)
    exact, made = copy.deepcopy(conv).double(), images(p)
    y, _ = patch_embed(made, sizes_in_pixels(p), conv.weight, conv.bias, patch_size=p, **NORMAL)
    mean, std = (torch.tensor(x, device=DEVICE, dtype=torch.float64) for x in (MEAN, STD))
    truth = [exact(((x.double() / 255 - mean) / std).permute(2, 0, 1)[None])[0].flatten(1).t() for x in made]
    assert relative_error(y, torch.cat(truth)) < 1e-5
    (found,), (expected,) = gradients(y, [conv.weight]), gradients(torch.cat(truth), [exact.weight])
    assert relative_error(found, expected) < 1e-5


def test_refuses_bad_arguments():
    weight, bias, table = parameters(4)
    blank = lambda *shape: torch.zeros(*shape, dtype=torch.uint8, device=DEVICE)  # noqa: E731

    def call(pixels, sizes, w=weight, b=bias, t=table, **options):
        return patch_embed(pixels, sizes, w, b, t, patch_size=4, **options)

    for match, run in {
        r"patch_embed: sizes is \(9, 8\), expected multiples of 4": lambda: call([blank(9, 8, 3)], [(9, 8)]),
        r"patch_embed: sizes is \(0, 8\), expected positive": lambda: call([blank(0, 8, 3)], [(0, 8)]),
        r"patch_embed: sizes is \(-4, 8\), expected positive": lambda: call([blank(4, 8, 3)], [(-4, 8)]),
        r"patch_embed: pixels is \(95, 3\), expected \(96, 3\)": lambda: call(blank(95, 3), Grids([(2, 3)])),
        r"patch_embed: pixels is \(96, 4\)": lambda: call(blank(96, 4), Grids([(2, 3)])),
        r"patch_embed: pixels is \[\(4, 8, 3\)\], expected \[\(8, 4, 3\)\]": lambda: call([blank(4, 8, 3)], [(8, 4)]),
        "patch_embed: dtype of pixels": lambda: call(blank(96, 3).int(), Grids([(2, 3)])),
        r"patch_embed: mean is \(nan, 0, 0\)": lambda: call(blank(96, 3), [(8, 12)], mean=(float("nan"), 0, 0)),
        r"patch_embed: std is \(1, 0, 1\)": lambda: call(blank(96, 3), [(8, 12)], std=(1, 0, 1)),
        r"patch_embed: std is \(1, 1\)": lambda: call(blank(96, 3), [(8, 12)], std=(1, 1)),
        r"patch_embed: weight is \(20, 75\), expected \[Dv, 48\] in \(row, column, channel\) order":
            lambda: call(blank(96, 3), [(8, 12)], weight.new_zeros(20, 75)),
        r"patch_embed: bias is \(19,\), expected \[20\]": lambda: call(blank(96, 3), [(8, 12)], b=bias[1:]),
        r"patch_embed: pos_embed is \(12, 20\)": lambda: call(blank(96, 3), [(8, 12)], t=table.flatten(0, 1)),
        "patch_embed: interpolation is lanczos": lambda: call(blank(96, 3), [(8, 12)], interpolation="lanczos"),
        "embed_patches: rows of patches is 5, expected 6": lambda: embed_patches(torch.zeros(5, 48), [(2, 3)], weight),
        "grids: a side is not positive": lambda: Grids([(2, 3), (0, 3)]),
        "grids: a side is no multiple of merge 2": lambda: Grids([(2, 3)], merge=2),
        "grids: 1 images of 6 patches exceed": lambda: Grids([(2, 3)], patches=5),
        "grids: an image of 6 patches exceeds longest = 5": lambda: Grids([(2, 3)], longest=5),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            run()
