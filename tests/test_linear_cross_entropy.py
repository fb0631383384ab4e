import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, relative_error

from mm1.kernels.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_cross_entropy_of_logits(reduction):
    x, weight = torch.randn(33, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (33,), dtype=torch.int32)
    targets[::4] = -100
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    truth = F.cross_entropy(x.double() @ weight.double().T, targets.long(), reduction=reduction)
    assert relative_error(loss, truth) < 1e-6
    for found, expected in zip(gradients(loss, [x, weight]), gradients(truth.float(), [x, weight])):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("rows", [0, 5])
def test_without_targets_loss_and_gradients_are_zero(rows):
    x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((rows,), -100))
    assert loss == 0
    assert all(not g.any() for g in gradients(loss, [x, weight]))


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="linear_cross_entropy: targets"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(4, dtype=torch.long))
