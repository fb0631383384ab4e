"""Compare each installed library that can compute the engine's mixture of experts with the reference."""

import copy
import dataclasses
import pickle
from typing import get_type_hints

import pytest
import torch
from conftest import DEVICE, gradients, relative_error

from mm1.engine.layers.config import Decoder
from mm1.engine.layers.experts import Experts
from mm1.engine.models.mm1_config import MODELS
from mm1.engine.run_config import load_run
from mm1.errors import UserError
from mm1.kernels.moe import reference
from mm1.kernels.moe.backends import BACKENDS, find
from mm1.kernels.moe.routing import route

SMALL = dataclasses.replace(MODELS["mm1-3b-moe"].decoder, width=32, ffn=48, experts=5)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def installed() -> list:
    """Return each library with its dtypes; those that are not installed are skipped, with the reason."""
    cases = []
    for name, library in BACKENDS.items():
        why = library.missing() or (None if DEVICE in library.devices else f"runs on {library.devices} only")
        marks = pytest.mark.skipif(why is not None, reason=f"{name}: {why}")
        cases += [pytest.param(name, dtype, marks=marks) for dtype in TOLERANCE if dtype in library.dtypes]
    return cases


def layer(backend: str) -> Experts:
    torch.manual_seed(1)
    experts = Experts(dataclasses.replace(SMALL, moe_backend=backend))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


@pytest.mark.parametrize("tokens, experts", [(23, 5), (1, 3), (7, 1), (3, 40), (23, 8)])
@pytest.mark.parametrize("backend, dtype", installed())
def test_each_computes_the_reference_and_its_gradients(backend, dtype, tokens, experts):
    def random(*shape):
        return (torch.randn(*shape, device=DEVICE) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, gate_up, down = random(tokens, 32), random(experts, 96, 32), random(experts, 32, 48)
    masked = torch.arange(tokens, device=DEVICE) % 7 == 6
    routing = route(torch.randn(tokens, experts, device=DEVICE), min(2, experts), mask=~masked)
    routing = routing._replace(weight=routing.weight.detach().requires_grad_())
    inputs = [x, routing.weight, gate_up, down]
    y = find(backend)(x, routing, gate_up, down)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = reference.moe_mlp(exact[0], routing.index, *exact[1:])
    assert y.dtype == dtype
    assert not y[masked].any()
    for result, expected in zip([y, *gradients(y, inputs)], [truth, *gradients(truth, exact)], strict=True):
        assert relative_error(result, expected) < TOLERANCE[dtype]


def test_torch_gives_what_mm1_does_and_padding_gets_nothing():
    x, mask = torch.randn(23, 32, requires_grad=True), torch.arange(23) < 17
    results = {}
    for backend in ("mm1", "torch"):
        experts = layer(backend)
        y, balance, z, _ = experts(x, mask)
        assert not y[17:].any()
        results[backend] = [y, balance, z, *gradients(y, [x, *experts.parameters()])]
    for result, expected in zip(results["torch"], results["mm1"]):
        assert relative_error(result, expected) < 1e-5


def test_the_layer_is_one_op_of_the_kernels():
    y = layer("mm1")(torch.randn(9, 32), None)[0]
    assert "mm1_moe_mlp" in type(y.grad_fn).__name__


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("backend", ["mm1", "torch"])
def test_a_backend_can_be_copied_and_pickled_as_part_of_a_model(backend, way):
    experts, x = layer(backend), torch.randn(9, 32)
    assert torch.equal(way(experts)(x, None)[0], experts(x, None)[0])


def test_a_dtype_that_a_library_does_not_compute_in_is_named():
    x = torch.randn(9, 32, dtype=torch.float64)
    routing = route(torch.randn(9, 3), 2)
    with pytest.raises(
        UserError, match=r'moe_backend "torch" got torch.float64 on cpu, expected torch.float32 or .* on'
    ):
        find("torch")(x, routing, torch.randn(3, 96, 32).double(), torch.randn(3, 32, 48).double())


@pytest.mark.skipif(BACKENDS["megablocks"].missing() is None, reason="megablocks is installed")
def test_megablocks_says_what_it_lacks():
    with pytest.raises(UserError, match=r'moe_backend "megablocks" needs megablocks: pip install megablocks'):
        layer("megablocks")


def test_the_setting_offers_the_backends_of_the_table():
    hints = get_type_hints(Decoder, include_extras=True)
    assert hints["moe_backend"].__metadata__[0].names == tuple(BACKENDS)


def test_another_name_is_refused():
    with pytest.raises(UserError, match="moe_backend is 'fast', expected one of mm1, torch, megablocks"):
        load_run("digits", ["model.decoder.moe_backend=fast"])


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UserError, match="moe_backend is 'x', expected one of mm1, torch, megablocks"):
        find("x")
