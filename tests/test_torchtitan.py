"""examples/torchtitan_experts.py against torchtitan's own module."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import compiles, gradients, relative_error

pytest.importorskip("torchtitan")
pytest.importorskip("spmd_types")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def experts(imports=()):
    """The experts of a torchtitan layer, built from its config after the overrides."""
    from torchtitan.config import OverrideConfig, apply_overrides
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    config = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=32, hidden_dim=48, num_experts=5),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=5, top_k=2),
    )
    apply_overrides(OverrideConfig(imports=list(imports)), config)
    return config.inner_experts.build()


@compiles  # torchtitan itself imports Triton
def test_the_override_computes_what_torchtitan_does():
    stock, ours = experts(), experts(["torchtitan_experts.mm1_experts"])
    assert type(ours).__name__ == "MM1Experts"
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(40, 32, requires_grad=True)
    counts = torch.tensor([11, 0, 20, 1, 5])  # 3 rows past the last
    found, expected = ours(x, counts), stock(x, counts)
    assert relative_error(found[:37], expected[:37]) < 1e-2  # torchtitan rounds h to bf16 between its products
    assert not found[37:].any()
    for mine, theirs in zip(
        gradients(found[:37], [x, *ours.parameters()]), gradients(expected[:37], [x, *stock.parameters()])
    ):
        if mine.shape == x.shape:
            mine, theirs = mine[:37], theirs[:37]  # torchtitan leaves the gradient of the others uninitialised
        assert relative_error(mine, theirs) < 2e-2
