import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, relative_error

from mm1.kernels.route import route


@pytest.mark.parametrize("T, E, k", [(1, 4, 1), (37, 8, 2), (64, 512, 16), (0, 4, 2)])
def test_weights_are_the_normalised_largest_probabilities(T, E, k):
    logits = torch.randn(T, E, requires_grad=True)
    routing = route(logits, k)
    probability, index = logits.double().softmax(-1).topk(k)
    assert torch.equal(routing.index.long(), index)
    truth = probability / probability.sum(-1, keepdim=True)
    assert relative_error(routing.weight, truth) < 1e-6
    if T:
        found, expected = gradients(routing.weight, [logits])[0], gradients(truth.float(), [logits])[0]
        assert (found - expected).abs().max() < 1e-6


def test_ties_go_to_the_lower_expert():
    assert route(torch.zeros(3, 6), 2).index.tolist() == [[0, 1]] * 3
    assert route(torch.zeros(300, 500), 16).index.tolist() == [list(range(16))] * 300
    assert route(torch.tensor([[1.0, 5.0, 5.0, 5.0]]), 2).index.tolist() == [[1, 2]]


def test_order_is_a_stable_sort_and_offsets_its_ends():
    routing = route(torch.randn(50, 8), 2)
    experts = routing.index.flatten()
    assert torch.equal(routing.order, experts.sort(stable=True).indices)
    assert torch.equal(routing.offsets, experts.bincount(minlength=8).cumsum(0).int())


def test_losses_follow_their_formulas_and_leave_padding_out():
    logits = torch.randn(40, 8)
    mask = torch.arange(40) < 29
    routing = route(logits, 2, mask=mask)
    kept = logits[:29].double()
    p = kept.softmax(-1)
    first = F.one_hot(p.argmax(-1), 8).double().mean(0)
    assert abs(routing.load_balance - 8 * (first * p.mean(0)).sum()) < 1e-6
    assert abs(routing.z_loss - kept.logsumexp(-1).square().mean()) < 1e-5
    assert (routing.index[29:] == 8).all()
    assert not routing.weight[29:].any()
    assert routing.offsets[-1] == 58


def test_even_routing_has_load_balance_one():
    logits = 20.0 * torch.eye(8).repeat(4, 1)
    assert abs(route(logits, 1).load_balance - 1) < 1e-5


def test_capacity_keeps_first_choices_before_second_ones():
    # Expert 0 is second choice of tokens 0 and 1, first choice of 2 and 3: with room for two the first choices stay.
    logits = torch.tensor([[2.0, 3.0, 0.0], [2.0, 3.0, 0.0], [3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    routing = route(logits, 2, capacity=2)
    assert routing.index.tolist() == [[1, 3], [1, 3], [0, 3], [0, 3]]
    assert routing.dropped == 4
    assert not routing.weight[:, 1].any()


def test_compiles_whole():
    logits = torch.randn(20, 8)
    for found, expected in zip(torch.compile(lambda x: route(x, 2), fullgraph=True)(logits), route(logits, 2)):
        assert relative_error(found, expected) < 1e-6


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="route: k is 9, expected 1 … 8"):
        route(torch.randn(3, 8), 9)
