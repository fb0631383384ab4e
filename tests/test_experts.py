import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, relative_error

from mm1.kernels.experts import moe_mlp, permute
from mm1.kernels.grouped_gemm import _dw, _forward, grouped_gemm, grouped_gemm_dw
from mm1.kernels.route import route


def by_hand(x, index, weight, gate_up, down, activation=F.silu, gated=True):
    """Every token through every one of its experts, in fp64."""
    x, weight, gate_up, down = (t.double() for t in (x, weight, gate_up, down))
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for k, expert in enumerate(index[t].tolist()):
            if expert < down.shape[0]:
                h = gate_up[expert] @ x[t]
                s = activation(h[: len(h) // 2]) * h[len(h) // 2 :] if gated else activation(h)
                y = y + weight[t, k] * (down[expert] @ s)
        rows.append(y)
    return torch.stack(rows) if rows else x


def problem(T=23, D=8, width=12, E=5, k=2, gated=True):
    routing = route(torch.randn(T, E), k)
    x = torch.randn(T, D, requires_grad=True)
    weight = routing.weight.detach().requires_grad_()
    gate_up = torch.randn(E, width * (2 if gated else 1), D, requires_grad=True)
    return x, routing.index, weight, gate_up, torch.randn(E, D, width, requires_grad=True)


@pytest.mark.parametrize("T, k", [(23, 2), (1, 1), (40, 3), (0, 2)])
def test_matches_token_by_token(T, k):
    x, index, weight, gate_up, down = problem(T, k=k)
    y, truth = moe_mlp(x, index, weight, gate_up, down), by_hand(x, index, weight, gate_up, down)
    assert relative_error(y, truth) < 1e-5
    inputs = [x, weight, gate_up, down]
    if T:
        for found, expected in zip(gradients(y, inputs), gradients(truth, inputs)):
            assert relative_error(found, expected) < 1e-5


def test_other_activations_layouts_and_no_gate():
    x, index, weight, gate_up, down = problem()
    interleaved = gate_up.view(5, 2, 12, 8).transpose(1, 2).reshape(5, 24, 8)
    assert torch.equal(
        moe_mlp(x, index, weight, interleaved, down, interleaved=True), moe_mlp(x, index, weight, gate_up, down)
    )
    x, index, weight, up, down = problem(gated=False)
    y = moe_mlp(x, index, weight, up, down, activation="gelu")
    assert relative_error(y, by_hand(x, index, weight, up, down, F.gelu, gated=False)) < 1e-5


def test_an_index_past_the_experts_contributes_nothing():
    x, index, weight, gate_up, down = problem()
    index = torch.where(torch.rand(index.shape) < 0.4, 5, index)
    y, truth = moe_mlp(x, index, weight, gate_up, down), by_hand(x, index, weight, gate_up, down)
    assert relative_error(y, truth) < 1e-5
    assert not gradients(y, [weight])[0][index >= 5].any()


def test_grouped_gemm_zeroes_what_no_expert_owns():
    a, b = torch.randn(10, 4), torch.randn(3, 4, 6)
    offsets = torch.tensor([4, 4, 7], dtype=torch.int32)
    y = grouped_gemm(a, b, offsets)
    assert relative_error(y[:4], a[:4] @ b[0]) < 1e-6
    assert relative_error(y[4:7], a[4:7] @ b[2]) < 1e-6
    assert not y[7:].any()
    dw = grouped_gemm_dw(a, y, offsets)
    assert not dw[1].any()
    assert relative_error(dw[2], a[4:7].T @ y[4:7]) < 1e-6


def test_op_contracts():
    a, b = torch.randn(10, 4, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True)
    offsets = torch.tensor([4, 4, 7], dtype=torch.int32)
    torch.library.opcheck(_forward, (a, b, offsets))
    torch.library.opcheck(_forward, (a, b.transpose(1, 2).contiguous().transpose(1, 2), offsets))
    torch.library.opcheck(_dw, (a, torch.randn(10, 6, requires_grad=True), offsets))
    order = torch.randperm(10)
    torch.library.opcheck(permute, (a, order, order.argsort()))


def test_compiles_whole():
    x, index, weight, gate_up, down = problem()
    compiled = torch.compile(moe_mlp, fullgraph=True)
    y, truth = compiled(x, index, weight, gate_up, down), moe_mlp(x, index, weight, gate_up, down)
    assert relative_error(y, truth) < 1e-6
    inputs = [x, weight, gate_up, down]
    for found, expected in zip(gradients(y, inputs), gradients(truth, inputs)):
        assert relative_error(found, expected) < 1e-6


def test_refuses_bad_arguments():
    x, index, weight, gate_up, down = problem()
    with pytest.raises(ValueError, match=r"moe_mlp: gate_up is \(5, 24, 7\)"):
        moe_mlp(x, index, weight, gate_up[..., :7], down)
    with pytest.raises(ValueError, match="grouped_gemm: offsets"):
        grouped_gemm(torch.randn(4, 4), torch.randn(3, 4, 6), torch.tensor([4], dtype=torch.int32))
