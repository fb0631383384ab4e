"""Test route and sort_by_expert on a CPU, interpreted (TRITON_INTERPRET=1), or on a GPU (CUDA_VISIBLE_DEVICES=0)."""

import pytest
import torch
from conftest import DEVICE, INTERPRETED, TRITON, needs_gpu, not_interpreted, relative_error

from mm1.kernels.moe.routing import choose as choose_experts
from mm1.kernels.moe.routing import route, sort_by_expert


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def choose(logits, k):
    """Return the k largest of each row, ties to the lower expert."""
    E = logits.shape[1]
    rows = [sorted(range(E), key=lambda e: (-row[e], e))[:k] for row in logits.double().tolist()]
    return torch.tensor(rows, device=DEVICE).view(-1, k)


def by_hand(logits, k, normalize=True, mask=None):
    """Return weight, load balance and z in fp64 without masked tokens, whose weight is zero."""
    E = logits.shape[1]
    kept = torch.ones(len(logits), dtype=torch.bool, device=DEVICE) if mask is None else mask
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    choice = choose(logits, k)
    weight = torch.stack([p[torch.arange(len(p)), choice[:, i]] for i in range(k)], 1)
    if normalize:
        weight = weight / weight.sum(1, keepdim=True)
    fraction = choice[kept, 0].bincount(minlength=E) / kept.sum()
    balance = E * (fraction * p[kept].mean(0)).sum()
    return weight * kept[:, None], balance, (logits[kept].exp().sum(1).log() ** 2).mean()


def compare(logits, k, tolerance=1e-6, **options):
    """Compare choice, weights, losses and their gradients with the formulas."""
    logits = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    routing, truth = route(logits, k, **options), by_hand(exact, k, **options)
    kept = slice(None) if options.get("mask") is None else options["mask"]
    assert torch.equal(routing.index[kept].long(), choose(logits, k)[kept])
    actual = (routing.weight, routing.load_balance, routing.z_loss)
    assert routing.dropped == 0
    for name, y, t in zip(("weight", "balance", "z"), actual, truth):
        assert y.dtype == (torch.float64 if logits.dtype == torch.float64 and not TRITON else torch.float32)
        assert relative_error(y, t) < 1e-6, name
        dy = torch.randn_like(y)
        g = torch.autograd.grad(y, logits, dy, retain_graph=True)[0]
        assert g.dtype == logits.dtype
        expected = torch.autograd.grad(t, exact, dy.double(), retain_graph=True)[0]
        error = (g.double() - expected).square().mean().sqrt()
        assert error <= tolerance * expected.square().mean().sqrt() + 1e-7 * dy.square().mean().sqrt(), name
    total = sum(y.sum() for y in actual), sum(t.sum() for t in truth)  # all three at once
    g, expected = torch.autograd.grad(total[0], logits)[0], torch.autograd.grad(total[1], exact)[0]
    assert relative_error(g, expected) < tolerance


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("T, E, k", [(1, 1, 1), (37, 7, 2), (3, 16, 16), (70, 8, 3), (20, 500, 10), (9, 512, 16)])
def test_choice_weights_losses_and_gradients(T, E, k, normalize):
    compare(2 * randn(T, E), k, 2e-6, normalize=normalize)


@pytest.mark.parametrize("k", [5, 16] if INTERPRETED else range(1, 17))
def test_every_k(k):
    compare(randn(3, 17), k, 2e-6)
    every = route(randn(2, k), k)
    assert every.index.sort().values.tolist() == [list(range(k))] * 2
    assert relative_error(every.weight.sum(1), torch.ones(2, device=DEVICE)) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float64, 1e-6)])
def test_logits_of_any_float_are_computed_in_fp32_or_wider(dtype, tolerance):
    logits = randn(40, 8)
    compare(logits.bfloat16().to(dtype), 2, tolerance)  # with ties


@pytest.mark.parametrize("T, E, k", [(0, 4, 2), (1, 1, 1), (1, 5, 2), (37, 7, 2), (9, 512, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_choose_gives_the_bits_of_route_and_masked_tokens_no_expert(T, E, k, masked):
    logits, mask = randn(T, E), torch.rand(T, device=DEVICE) < 0.6 if masked else None
    if masked:
        logits[~mask] = float("nan")  # nothing of them is read
    truth, (index, weight) = route(logits, k, mask=mask), choose_experts(logits, k, mask=mask)
    assert torch.equal(index, truth.index)
    assert torch.equal(weight, truth.weight)
    assert (index.dtype, weight.dtype) == (torch.int32, torch.float32)
    assert masked == bool((index == E).any()) or T < 9


FORMS = {
    "transposed": lambda x: x.T.contiguous().T,
    "columns of a wider one": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_mask_may_have_any_strides(form):
    logits = FORMS[form](randn(40, 7))
    mask = (torch.rand(40, 3, device=DEVICE) < 0.6)[:, 1]
    compare(logits, 2, mask=mask)
    apart, dense = route(logits, 2, mask=mask, capacity=5), route(logits, 2, mask=mask.contiguous(), capacity=5)
    assert torch.equal(apart.index, dense.index)
    assert apart.load_balance == dense.load_balance


def test_ties_go_to_the_lower_expert():
    def chosen(rows, k):
        return route(torch.as_tensor(rows, device=DEVICE), k).index.tolist()

    assert chosen(torch.zeros(3, 6), 2) == [[0, 1]] * 3
    assert chosen(torch.zeros(30, 500), 16) == [list(range(16))] * 30
    assert chosen([[1.0, 5.0, 5.0, 5.0]], 2) == [[1, 2]]
    assert chosen([[-0.0, 0.0, 1.0, -0.0, 0.0]], 5) == [[2, 0, 1, 3, 4]]
    assert chosen([[-1.0, 0.0, -0.0, -2.0]], 3) == [[1, 2, 0]]
    assert chosen([[-3.0, -3.0, -2.0, -1e-40, 1e-40]], 5) == [[4, 3, 2, 0, 1]]


def test_logits_of_minus_infinity_are_chosen_last_and_never_twice():
    logits = torch.full((2, 8), -torch.inf, device=DEVICE)
    logits[:, 5], logits[:, 2] = 1.0, 0.0
    logits.requires_grad_()
    for normalize in (True, False):
        routing = route(logits, 4, normalize=normalize)
        assert routing.index.tolist() == [[5, 2, 0, 1]] * 2
        truth = torch.tensor([1.0, 0.0, -torch.inf, -torch.inf]).softmax(0).expand(2, 4)
        assert relative_error(routing.weight, truth.to(DEVICE)) < 1e-6
        total = routing.weight[:, 0].sum() + routing.load_balance + routing.z_loss
        assert torch.autograd.grad(total, logits)[0].isfinite().all()
    nothing = torch.full((2, 8), -torch.inf, device=DEVICE)
    assert route(nothing, 8).index.tolist() == [list(range(8))] * 2
    assert route(-nothing, 3).index.tolist() == [[0, 1, 2]] * 2


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[300.0, 299.0, -300.0]], device=DEVICE)
    routing = route(logits, 2)
    assert relative_error(routing.weight, torch.tensor([[1.0, 0.0]], device=DEVICE).softmax(1)) < 1e-6
    assert relative_error(routing.z_loss, logits.double().logsumexp(1).square().mean()) < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_a_masked_token_is_routed_nowhere_and_counts_in_no_loss(normalize):
    logits, mask = randn(40, 8), torch.rand(40, device=DEVICE) < 0.7
    compare(logits, 2, mask=mask, normalize=normalize)
    routing, alone = route(logits, 2, mask=mask), route(logits[mask], 2)
    assert (routing.index[~mask] == 8).all()
    assert not routing.weight[~mask].any()
    assert torch.equal(routing.offsets, alone.offsets)
    assert relative_error(routing.load_balance, alone.load_balance) < 1e-6
    logits.requires_grad_()
    routing = route(logits, 2, mask=mask)
    g = torch.autograd.grad(routing.weight.square().sum() + routing.load_balance + routing.z_loss, logits)[0]
    assert not g[~mask].any()


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -torch.inf])
def test_the_logits_of_a_masked_token_may_be_anything(padding):
    logits, mask = randn(20, 8), torch.arange(20, device=DEVICE) % 3 > 0
    expected = route(logits, 2, mask=mask)
    logits[~mask] = padding
    logits.requires_grad_()
    routing = route(logits, 2, mask=mask)
    assert relative_error(routing.load_balance, expected.load_balance) < 1e-6
    assert relative_error(routing.z_loss, expected.z_loss) < 1e-6
    g = torch.autograd.grad(routing.weight.square().sum() + routing.load_balance + routing.z_loss, logits)[0]
    assert not g[~mask].any()
    assert g.isfinite().all()


@pytest.mark.parametrize("T", [0, 5])
def test_without_tokens_the_losses_are_zero(T):
    logits = randn(T, 4).requires_grad_()
    routing = route(logits, 2, mask=torch.zeros(T, dtype=torch.bool, device=DEVICE), capacity=1)
    assert routing.load_balance == 0
    assert routing.z_loss == 0
    assert routing.dropped == 0
    assert routing.index.shape == routing.weight.shape == (T, 2)
    assert not routing.offsets.any()
    total = routing.load_balance + routing.z_loss + routing.weight.sum()
    assert not torch.autograd.grad(total, logits)[0].any()
    assert route(randn(T, 4), 2).index.shape == (T, 2)


def test_even_routing_has_load_balance_one():
    assert abs(route(20.0 * torch.eye(8, device=DEVICE).repeat(4, 1), 1).load_balance - 1) < 1e-5


def test_capacity_keeps_first_choices_before_second_ones():
    # Expert 0 is second choice of tokens 0 and 1, first choice of 2 and 3: at capacity 2 the first choices stay.
    logits = torch.tensor([[2.0, 3.0, 0.0], [2.0, 3.0, 0.0], [3.0, 2.0, 0.0], [3.0, 2.0, 0.0]], device=DEVICE)
    routing = route(logits, 2, capacity=2)
    assert routing.index.tolist() == [[1, 3], [1, 3], [0, 3], [0, 3]]
    assert routing.dropped == 4
    assert not routing.weight[:, 1].any()


@pytest.mark.parametrize("capacity", [0, 1, 7, 1000])
@pytest.mark.parametrize("T, E, k, masked", [(40, 6, 3, False), (70, 6, 2, True)])
def test_capacity_is_spent_choice_by_choice_and_token_by_token(T, E, k, masked, capacity):
    logits = (randn(T, E) + torch.arange(E, device=DEVICE) / 2).requires_grad_()  # the higher, the fuller
    mask = torch.rand(T, device=DEVICE) < 0.7 if masked else None
    choice, room, kept = choose(logits, k).tolist(), [capacity] * E, torch.zeros(T, k, dtype=torch.bool)
    there = [True] * T if mask is None else mask.tolist()
    for i in range(k):
        for t in range(T):
            if there[t] and room[choice[t][i]] > 0:
                room[choice[t][i]] -= 1
                kept[t, i] = True
    routing, free = route(logits, k, mask=mask, capacity=capacity), route(logits, k, mask=mask)
    kept = kept.to(DEVICE)
    assert torch.equal(routing.index, torch.where(kept, free.index, E))
    assert torch.equal(routing.weight, torch.where(kept, free.weight, 0))
    assert routing.dropped == sum(there) * k - kept.sum()
    assert routing.load_balance == free.load_balance
    assert torch.equal(routing.offsets, routing.index[kept].bincount(minlength=E).cumsum(0).int())
    # A dropped slot's weight is a constant, whatever reads it.
    dy = torch.randn_like(routing.weight)
    g = torch.autograd.grad(routing.weight, logits, dy)[0]
    assert torch.equal(g, torch.autograd.grad(free.weight, logits, dy * kept)[0])


SLOTS = [(1, 1, 1), (150, 2, 5), (1500, 2, 7), (64, 1, 512), (43, 3, 500), (0, 2, 4)]
if not INTERPRETED:
    SLOTS += [(20_000, 2, 64), (70_000, 8, 512)]


@pytest.mark.parametrize("T, K, E", SLOTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sort_is_stable_with_the_slots_of_no_expert_last(T, K, E, dtype):
    index = torch.randint(-1, E + 3, (T, K), device=DEVICE, dtype=dtype)
    far = torch.tensor([-(2**31), 2**31 - 1], device=DEVICE, dtype=dtype)
    index = torch.where(torch.rand(T, K, device=DEVICE) < 0.05, far[torch.randint(2, (T, K), device=DEVICE)], index)
    order = sort_by_expert(index, E)
    expert = torch.where((index < 0) | (index >= E), E, index).flatten()
    assert order.slots.dtype == order.position.dtype == order.offsets.dtype == torch.int32
    assert torch.equal(order.slots.long(), expert.sort(stable=True).indices)
    assert torch.equal(order.position.flatten()[order.slots.long()].cpu(), torch.arange(T * K).int())
    assert order.position.shape == (T, K)
    assert torch.equal(order.offsets.long(), expert[expert < E].bincount(minlength=E).cumsum(0))


def test_sort_of_uneven_and_of_wide_indices():
    for expert in (-1, 0, 3, 4, 9):  # all slots in one place
        order = sort_by_expert(torch.full((100, 3), expert, device=DEVICE), 4)
        assert torch.equal(order.slots.cpu(), torch.arange(300).int())
        assert order.offsets.tolist() == [300 * (0 <= expert <= e) for e in range(4)]
    wide = torch.tensor([[2**32 + 1, 0], [1, -(2**32) + 2], [2**40, 2]], device=DEVICE)
    assert sort_by_expert(wide, 3).slots.tolist() == [1, 2, 5, 0, 3, 4]
    narrow = torch.tensor([[-1, 2], [1, 127]], device=DEVICE, dtype=torch.int8)
    assert sort_by_expert(narrow, 300).slots.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("form", ["transposed", "every second column", "one row for all"])
def test_sort_takes_any_strides(form):
    index = FORMS[form](torch.randint(0, 5, (90, 3), device=DEVICE))
    for actual, expected in zip(sort_by_expert(index, 5), sort_by_expert(index.clone().contiguous(), 5)):
        assert torch.equal(actual, expected)


def test_order_of_a_routing_is_that_of_its_index():
    routing = route(randn(50, 8), 2, mask=torch.arange(50, device=DEVICE) < 44, capacity=9)
    for actual, expected in zip(routing.order, sort_by_expert(routing.index, 8)):
        assert torch.equal(actual, expected)
    assert routing.offsets is routing.order.offsets


@not_interpreted
def test_forty_runs_give_the_same_bits():
    logits = randn(300, 8).requires_grad_()

    def run():
        r = route(logits, 2)
        total = r.weight.square().sum() + r.load_balance + r.z_loss
        return [r.index, r.weight, r.load_balance, r.z_loss, *r.order, *torch.autograd.grad(total, logits)]

    first = run()
    assert all(torch.equal(x, y) for _ in range(39) for x, y in zip(first, run()))


# The fourth check cannot add integer and float outputs; test_compiles_whole replaces it.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@not_interpreted
def test_op_contracts():
    logits, mask = randn(20, 8).requires_grad_(), torch.arange(20, device=DEVICE) % 3 > 0
    for m in (None, mask):
        torch.library.opcheck(torch.ops.mm1.route.default, (logits, m, 2, True), test_utils=CHECKS)
        choice, weight, first, balance, z = torch.ops.mm1.route(logits.detach(), m, 2, False)
        arguments = (torch.randn_like(weight), balance, z, logits.detach(), m, choice, first, False)
        torch.library.opcheck(torch.ops.mm1.route_backward.default, arguments)
    torch.library.opcheck(torch.ops.mm1.sort_by_expert.default, (torch.randint(-1, 9, (20, 2), device=DEVICE), 8))


@not_interpreted
def test_compiles_whole():
    logits, mask = randn(20, 8).requires_grad_(), torch.arange(20, device=DEVICE) % 3 > 0

    def step(logits, mask):
        r = route(logits, 2, mask=mask, capacity=4)
        return r.weight.square().sum() + r.load_balance + r.z_loss, r.index, r.order, r.dropped

    compiled = torch.compile(step, fullgraph=True)
    actual, expected = compiled(logits, mask), step(logits, mask)
    assert relative_error(actual[0], expected[0]) < 1e-6
    for x, y in zip([actual[1], *actual[2], actual[3]], [expected[1], *expected[2], expected[3]]):
        assert torch.equal(x, y)
    g, t = (torch.autograd.grad(total, logits)[0] for total in (actual[0], expected[0]))
    assert relative_error(g, t) < 1e-6


def test_refuses_bad_arguments():
    logits = randn(3, 8)
    for match, inputs, options in (
        ("route: k is 9, expected 1 … 8", (logits, 9), {}),
        ("route: k is 0", (logits, 0), {}),
        ("route: k is 17, expected 1 … 16", (randn(3, 32), 17), {}),
        (r"route: logits is \(8,\)", (logits[0], 2), {}),
        ("route: dtype of logits is torch.int64", (logits.long(), 2), {}),
        ("route: experts is 513, expected 1 … 512", (randn(3, 513), 2), {}),
        ("route: experts is 0", (randn(3, 0), 1), {}),
        (r"route: mask is .*\(4,\), expected .*\(3,\)", (logits, 2), {"mask": torch.ones(4, dtype=torch.bool)}),
        ("route: mask is", (logits, 2), {"mask": torch.ones(3)}),
        ("route: capacity is -1", (logits, 2), {"capacity": -1}),
    ):
        with pytest.raises(ValueError, match=match):
            route(*inputs, **options)
    with pytest.raises(ValueError, match=r"sort_by_expert: index is torch.float32 \(3, 8\)"):
        sort_by_expert(logits, 8)
    with pytest.raises(ValueError, match=r"sort_by_expert: index is torch.int64 \(3,\)"):
        sort_by_expert(torch.zeros(3, dtype=torch.int64), 8)


@needs_gpu
def test_never_waits_for_the_device():
    logits, mask = randn(300, 8).requires_grad_(), torch.arange(300, device=DEVICE) % 3 > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        r = route(logits, 2, mask=mask, capacity=40)
        torch.autograd.grad(r.weight.square().sum() + r.load_balance + r.z_loss, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
