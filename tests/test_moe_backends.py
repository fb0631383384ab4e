"""The back-ends of the engine's mixture-of-experts layer: same parameters, same result."""

import dataclasses
import importlib.util

import pytest
import torch
from conftest import gradients, relative_error

from mm1.engine.layers.experts import Experts
from mm1.engine.models.mm1_config import MODELS
from mm1.engine.run_config import load_run
from mm1.errors import UserError

SMALL = dataclasses.replace(MODELS["mm1-3b-moe"].decoder, width=32, ffn=48, experts=5)


def layer(backend: str) -> Experts:
    torch.manual_seed(1)
    experts = Experts(dataclasses.replace(SMALL, moe_backend=backend))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


def test_torch_gives_what_mm1_does_and_padding_gets_nothing():
    x, mask = torch.randn(23, 32, requires_grad=True), torch.arange(23) < 17
    results = {}
    for backend in ("mm1", "torch"):
        experts = layer(backend)
        y, balance, z, _ = experts(x, mask)
        assert not y[17:].any()
        results[backend] = [y, balance, z, *gradients(y, [x, *experts.parameters()])]
    for found, expected in zip(results["torch"], results["mm1"]):
        assert relative_error(found, expected) < 1e-5


def test_the_layer_is_one_op_of_the_kernels():
    y = layer("mm1")(torch.randn(9, 32), None)[0]
    assert "mm1_moe_mlp" in type(y.grad_fn).__name__


@pytest.mark.skipif(importlib.util.find_spec("megablocks") is not None, reason="megablocks is installed")
def test_megablocks_says_what_it_lacks():
    with pytest.raises(UserError, match=r'moe_backend "megablocks" needs megablocks: pip install "mm1-engine\[gpu\]"'):
        layer("megablocks")


def test_another_name_is_refused():
    with pytest.raises(UserError, match="moe_backend is 'fast', expected one of mm1, torch, megablocks"):
        load_run("digits", ["model.decoder.moe_backend=fast"])
