import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, TRITON, gradients, relative_error

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
    for actual, expected in zip(gradients(loss, [x, weight]), gradients(truth, [x, weight])):
        assert relative_error(actual, expected) < 5 * tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(33, 16, 50), (1, 8, 1), (5, 7, 4097), (3, 16, 9000)], ids=str)
def test_matches_cross_entropy_of_logits(shape, reduction):
    compare(*problem(*shape), reduction)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])  # one chunk or several, with a last chunk of one row or more
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
    for actual, expected in zip((dx, dw), gradients(truth, [x, weight])):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 1e-2


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
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets)
    assert sum(saved) < x.numel() + weight.numel() + 10
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


@pytest.mark.parametrize("invalid", [-1, -99, -101, 50, 51, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_target_that_is_no_class_is_refused_or_poisons_the_loss(invalid, dtype):
    x, weight, targets = problem(9, 16, 50)
    targets = targets.to(dtype)
    targets[4] = invalid
    if not TRITON:
        with pytest.raises(ValueError, match=rf"target of row 4 is {invalid}, expected 0 … 49, or -100"):
            linear_cross_entropy(x, weight, targets)
        return
    loss = linear_cross_entropy(x, weight, targets)
    dx, dw = gradients(loss, [x, weight])
    assert loss.isnan()
    assert dw.isnan().all()
    assert dx.isnan().any(1).tolist() == [row == 4 for row in range(9)], "the other rows' gradients are their own"


def test_fp16_sums_over_many_tokens_stay_finite():
    x, weight, targets = problem(90, 16, 50)
    targets[targets > 2] = 7
    x = (x.detach() + 3000).requires_grad_()
    for half in (True, False):
        inputs = [
            t.detach().half().requires_grad_() if half else t.detach().requires_grad_() for t in (x, weight / 3000)
        ]
        with torch.autocast(DEVICE, torch.float16, enabled=not half):
            loss = linear_cross_entropy(*inputs, targets)
        (dw,) = torch.autograd.grad(loss, inputs[1])
        exact = [t.detach().half().double().requires_grad_() for t in inputs]
        (truth,) = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets.long()), exact[1])
        count = (targets != -100).sum()
        assert (truth * count).abs().max() > torch.finfo(torch.float16).max, "the sum itself exceeds fp16"
        assert relative_error(dw, truth) < 5e-3


def test_bf16_gradients_of_many_chunks_are_as_good_as_of_one(monkeypatch):
    errors = []
    for rows_at_once in (2, 120):
        torch.manual_seed(0)
        x, weight, targets = problem(120, 16, 50, torch.bfloat16)
        monkeypatch.setitem(module.CHUNK, DEVICE, rows_at_once * 50 * 2)
        truth = F.cross_entropy(x.double() @ weight.double().T, targets.long())
        dw = gradients(linear_cross_entropy(x, weight, targets), [weight])[0]
        errors.append(relative_error(dw, gradients(truth, [weight])[0]))
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mean_divides_in_fp32(dtype):
    """1/43 in bf16 is wrong by 0.2 %: gradients of many tokens would all be too large by as much."""
    x, weight, targets = problem(43, 16, 50, dtype)
    targets[targets == -100] = 1
    (summed,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, reduction="sum"), x)
    (mean,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    assert ((mean.double() * 43 / summed.double()).nanmedian() - 1).abs() < 2e-4


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_is_frozen_costs_no_product(frozen):
    x, weight, targets = problem(33, 16, 50)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, targets), [x, weight])
    x.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "x")
    with torch.profiler.profile() as profile:
        loss = linear_cross_entropy(x, weight, targets)
        if frozen != "both":
            loss.backward()
    products = sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert products == (1 if frozen == "both" else 2)
    for tensor, truth in zip((x, weight), expected):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or torch.equal(tensor.grad, truth)


def test_derivatives_that_are_not_computed_are_refused():
    x, weight, targets = problem(8, 16, 50)
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: gradients of gradients are not computed"):
        dx.square().sum().backward()
    with pytest.raises(RuntimeError, match="linear_cross_entropy: x has a tangent"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, weight.detach(), targets), (x.detach(),), (x.detach(),))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets is \(4,\), expected \(3,\)"),
        ({"targets": torch.zeros(3)}, r"targets is torch.float32 \(3,\), expected integers"),
        ({"weight": torch.randn(9, 5)}, r"weight is \(9, 5\), expected \[V, 4\]"),
        ({"weight": torch.randn(9, 4, device="meta")}, "device of weight is meta, expected cpu, that of x"),
        ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, "device of targets is meta, expected cpu"),
        ({"reduction": "none"}, "reduction is none"),
    ],
)
def test_refuses_bad_arguments(change, message):
    inputs = {"x": torch.randn(3, 4), "weight": torch.randn(9, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**inputs | change)
