import pytest
import torch

from mm1.kernels.patches.grids import STRIP_COLUMNS, STRIP_ROWS, Grids, as_grids

SIZES = [(2, 3), (1, 1), (20, 5)]


def test_tensors_of_a_padded_batch():
    grids = Grids(SIZES, images=5, patches=120)
    assert grids.table.tolist() == [[0, 6, 2, 3], [6, 1, 1, 1], [7, 100, 20, 5], [107, 0, 0, 0], [107, 0, 0, 0]]
    assert grids.owner[:107].tolist() == [0] * 6 + [1] + [2] * 100
    first, rows = grids.table[grids.owner[107:].long(), :2].unbind(1)
    assert (torch.arange(107, 120) >= first + rows).all()  # of no image
    assert grids.cu_seqlens.tolist() == [0, 6, 7, 107, 107, 107]
    assert (STRIP_ROWS, STRIP_COLUMNS) == (16, 4)
    assert grids.strips.tolist() == [0, 1, 2, 6, 6, 6]


def test_the_device_may_be_what_knows_the_sizes():
    known = Grids(SIZES)
    other = Grids.of_tensors(*known.table.unbind(1), known.patches)
    for name in ("table", "owner", "cu_seqlens", "strips"):
        assert torch.equal(getattr(known, name), getattr(other, name)), name


def test_without_images_there_are_no_patches():
    nothing = torch.zeros(0, dtype=torch.int64)
    for grids in (Grids([]), Grids([], images=2, patches=5), Grids.of_tensors(*[nothing] * 4, 0)):
        assert grids.cu_seqlens.tolist() == grids.strips.tolist() == [0] * (grids.images + 1)


def test_longest_is_exact_or_a_bound_that_does_not_depend_on_the_batch():
    assert Grids(SIZES).longest == 100
    assert Grids([]).longest == 0
    assert Grids(SIZES, patches=120).longest == 120
    assert Grids(SIZES, patches=120, longest=110).longest == 110
    with pytest.raises(ValueError, match="grids: an image of 100 patches exceeds longest = 99"):
        Grids(SIZES, patches=120, longest=99)


@pytest.mark.parametrize("padding", [{}, {"images": 5, "patches": 120}], ids=["exact", "padded"])
def test_class_tokens_go_before_their_images(padding):
    grids = Grids(SIZES, **padding)
    classes, patches, cu_seqlens = grids.with_class_token()
    rows = torch.full((grids.images + grids.patches,), -1)
    rows[classes] = torch.arange(grids.images)
    rows[patches] = torch.arange(grids.patches) + 1000
    assert (rows >= 0).all()  # each row once
    for i, (h, w) in enumerate(SIZES):
        begin, end, start = cu_seqlens[i], cu_seqlens[i + 1], grids.cu_seqlens[i]
        assert rows[begin:end].tolist() == [i, *range(1000 + start, 1000 + start + h * w)]


def test_made_in_inference_mode_they_serve_training():
    with torch.inference_mode():
        grids = Grids(SIZES)
    tensors = (grids.table, grids.owner, grids.cu_seqlens, grids.strips)
    assert not any(tensor.is_inference() for tensor in tensors)


def test_a_list_becomes_grids_and_grids_stay():
    grids = Grids(SIZES)
    assert as_grids(grids, "cpu") is grids
    assert torch.equal(as_grids(SIZES, "cpu").table, grids.table)
