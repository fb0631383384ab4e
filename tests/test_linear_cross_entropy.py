import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, gradients, relative_error

from mm1.kernels import linear_cross_entropy as module
from mm1.kernels.linear_cross_entropy import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def problem(rows, width, vocabulary, dtype=torch.float32):
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), dtype=torch.int32, device=DEVICE)
    targets[3::4] = -100
    return x, weight, targets


def compare(x, weight, targets, reduction="mean", call=linear_cross_entropy):
    loss = call(x, weight, targets, reduction=reduction)
    truth = F.cross_entropy(x.double() @ weight.double().T, targets.long(), reduction=reduction)
    tolerance = TOLERANCE[weight.dtype]
    assert loss.dtype == torch.float32
    assert relative_error(loss, truth) < tolerance
    for found, expected in zip(gradients(loss, [x, weight]), gradients(truth, [x, weight])):
        assert relative_error(found, expected) < 5 * tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(33, 16, 50), (1, 8, 1), (5, 7, 4097), (3, 16, 9000)], ids=str)
def test_matches_cross_entropy_of_logits(shape, reduction):
    compare(*problem(*shape), reduction)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])  # of one chunk, of several, the last of one row or not
def test_chunks_are_no_different_from_the_whole(dtype, rows, monkeypatch):
    monkeypatch.setitem(module.CHUNK, DEVICE, 2 * 50 * dtype.itemsize)
    compare(*problem(rows, 16, 50, dtype))


def test_huge_logits_neither_overflow_nor_vanish():
    x, weight, targets = problem(8, 16, 300)
    with torch.no_grad():
        weight.mul_(1e4)
    compare(x, weight, targets)


def test_fp32_weights_have_fp32_gradients_of_16_bit_products(monkeypatch):
    monkeypatch.setitem(module.CHUNK, DEVICE, 2 * 50 * 2)
    x, weight, targets = problem(40, 16, 50)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    dx, dw = gradients(loss, [x, weight])
    truth = F.cross_entropy(x.bfloat16().double() @ weight.bfloat16().double().T, targets.long())
    for found, expected in zip((dx, dw), gradients(truth, [x, weight])):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("rows", [0, 5])
def test_without_targets_loss_and_gradients_are_zero(rows):
    x, weight, _ = problem(rows, 16, 50)
    loss = linear_cross_entropy(x, weight, torch.full((rows,), -100, device=DEVICE))
    assert loss == 0
    assert all(not g.any() for g in gradients(loss, [x, weight]))


def test_compiled_is_eager():
    x, weight, targets = problem(33, 16, 50)
    compare(x, weight, targets, "sum", torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"))


def test_what_waits_for_backward_is_no_logits():
    x, weight, targets = problem(64, 8, 5000)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets)
    assert sum(held) < x.numel() + weight.numel() + 10
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="linear_cross_entropy: targets"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(4, dtype=torch.long))
