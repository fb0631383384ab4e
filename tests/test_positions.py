import pytest
import torch
from conftest import DEVICE, gradients, not_interpreted, relative_error

from mm1.kernels.patches import position_tables, reference
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.position_tables import positions

# Growing, shrinking, one of each, the table's own, one row and one column.
SIZES = [(2, 3), (1, 1), (9, 2), (3, 11), (5, 6), (2, 3), (1, 13), (13, 1)]
KINDS = [
    ("bilinear", True, False), ("bilinear", True, True), ("bilinear", False, False), ("bilinear", False, True),
    ("bicubic", True, False), ("bicubic", True, True), ("bicubic", False, False), ("bicubic", False, True),
    ("nearest", False, False),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 4), *(pytest.param(s, marks=not_interpreted) for s in [(5, 6), (1, 1), (8, 2)])], ids=str
)
def test_is_torchs_interpolation(shape, kind):
    table = torch.randn(*shape, 5, device=DEVICE, requires_grad=True)
    truth = reference.positions(table.double(), SIZES, *kind)
    y = positions(table, Grids(SIZES, images=10, patches=len(truth) + 9), *kind)
    assert not y[len(truth) :].any()
    assert relative_error(y[: len(truth)], truth) < 1e-5
    assert relative_error(gradients(y[: len(truth)], [table])[0], gradients(truth, [table])[0]) < 1e-5


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[6]], ids=str)
@pytest.mark.parametrize("sizes", [pytest.param([(96, 96)], marks=not_interpreted), [(1, 64), (64, 1)]], ids=str)
def test_large_grids(sizes, kind):
    table = torch.randn(4, 3, 2, device=DEVICE, requires_grad=True)
    y, truth = positions(table, sizes, *kind), reference.positions(table.double(), sizes, *kind)
    assert relative_error(y, truth) < 1e-5
    assert relative_error(gradients(y, [table])[0], gradients(truth, [table])[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    table = torch.randn(5, 6, 33, device=DEVICE).to(dtype).requires_grad_()
    y, truth = positions(table, SIZES), reference.positions(table.double(), SIZES)
    assert relative_error(y, truth) < 1e-2
    assert relative_error(gradients(y, [table])[0], gradients(truth, [table])[0]) < 1e-2


def test_merged_blocks_are_the_same_places_in_another_order():
    sizes = [(4, 6), (2, 2), (6, 2)]
    table = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    rows, start = [], 0
    for h, w in sizes:
        places = torch.arange(start, start + h * w).view(h // 2, 2, w // 2, 2)
        rows.append(places.transpose(1, 2).flatten())
        start += h * w
    truth = positions(table, sizes)[torch.cat(rows)]
    y = positions(table, Grids(sizes, merge=2))
    assert relative_error(y, truth) < 1e-6
    assert relative_error(gradients(y, [table])[0], gradients(truth, [table])[0]) < 1e-6


def test_sizes_that_only_the_device_knows_with_gaps_and_part_of_an_image():
    table = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    first, rows, h, w = torch.tensor([[0, 6, 2, 3], [8, 3, 3, 2], [16, 4, 1, 4]], device=DEVICE).unbind(1)
    y = positions(table, Grids.of_tensors(first, rows, h, w, 21))
    whole = positions(table, [(2, 3), (3, 2), (1, 4)])
    truth = torch.zeros(21, 5, device=DEVICE)
    truth[:6], truth[8:11], truth[16:20] = whole[:6], whole[6:9], whole[12:]
    assert torch.equal(y, truth)
    assert relative_error(gradients(y, [table])[0], gradients(truth, [table])[0]) < 1e-6


def test_no_image():
    table = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    for grids in (Grids([]), Grids([], images=2, patches=7)):
        y = positions(table, grids)
        assert y.shape == (grids.patches, 5)
        assert not y.any()
        assert not gradients(y, [table])[0].any()


def test_same_bits_every_time(poisoned):
    table = torch.randn(5, 6, 7, device=DEVICE, requires_grad=True)
    first = [y := positions(table, SIZES), *gradients(y, [table])]
    y = positions(table, SIZES)
    assert all(torch.equal(a, b) for a, b in zip([y, *gradients(y, [table])], first))


@not_interpreted
def test_op_contract():
    table, grids = torch.randn(5, 6, 7, device=DEVICE, requires_grad=True), Grids(SIZES, device=DEVICE)
    torch.library.opcheck(position_tables._forward, (table, grids.table, grids.owner, 1, "bilinear", True, False))


def test_refuses_bad_arguments():
    table = torch.randn(5, 6, 7)
    with pytest.raises(ValueError, match=r"positions: table is \(6, 7\), expected \[Gh, Gw, D\]"):
        positions(table[0], SIZES)
    with pytest.raises(ValueError, match="positions: interpolation is None"):
        positions(table, SIZES, None)
