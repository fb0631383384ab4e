"""Layers answer for their own initial values, buffers, operations and sharding; who does not is named."""

import math

import pytest
import torch
from conftest import relative_error
from small import small_model
from torch import nn

from mm1.engine.layers.connector import AveragePool
from mm1.engine.layers.layer import (
    BlockLayer,
    Layer,
    fan_in,
    fill_ones,
    fill_zeros,
    init_buffers,
    init_weights,
    learned_vectors,
)
from mm1.engine.layers.vision import sincos_table
from mm1.engine.layers.workload import Layout, Workload
from mm1.engine.models.mm1 import MM1
from mm1.engine.train.config import Train
from mm1.engine.train.parallel import World
from mm1.engine.train.prepare import prepare

WORKLOAD = Workload([5], [(2, 3)], 4, 8, 1, 6)


class Scale(Layer):
    """A layer with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))
        self.register_buffer("table", torch.empty(4), persistent=False)

    def initial_values(self):
        return {"scale": fill_ones}

    def initial_buffers(self):
        return {"table": torch.arange(4.0)}


@pytest.mark.parametrize("make, inputs", [
    (lambda: nn.Conv1d(80, 400, 3), 240), (lambda: nn.Conv2d(12, 400, 3), 108), (lambda: nn.Linear(200, 300), 200),
    (lambda: nn.Conv2d(100, 100, 3, groups=100), 9),
])  # fmt: skip
def test_a_product_begins_with_variance_one_over_the_inputs_of_an_output(make, inputs):
    layer = make()
    init_weights(layer, 0)
    assert layer.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.05)
    assert not layer.bias.any()


def test_norms_begin_as_the_identity():
    for norm in (nn.LayerNorm(5), nn.RMSNorm(5), nn.GroupNorm(1, 5)):
        nn.init.normal_(norm.weight)
        init_weights(norm, 0)
        assert norm.weight.eq(1).all()


def test_what_writes_into_the_residual_stream_is_scaled_by_depth():
    model = MM1(small_model(layers=8, width=64, ffn=200, experts=0)).init_weights(0)
    for block in model.decoder.blocks:
        out, up = block.mlp.down.weight, block.mlp.up.weight
        assert out.std().item() == pytest.approx(200**-0.5 / math.sqrt(2 * 8), rel=0.05)
        assert up.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert relative_error(model.vision.positions, sincos_table(*model.vision.positions.shape)) == 0


def test_a_layers_word_outweighs_that_of_a_module_inside_of_it():
    class Zeroed(Layer):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)

        def initial_values(self):
            return {"out.weight": fill_zeros}

    model = nn.Sequential(Zeroed(), nn.Linear(4, 4))
    init_weights(model, 0)
    assert not model[0].out.weight.any()
    assert model[1].weight.any()


def test_values_are_drawn_in_the_order_of_the_names_whoever_asks():
    """The value of a parameter depends on the seed and on the names before it, not on the order of the modules."""
    a, b = nn.ModuleDict({"x": nn.Linear(2, 3), "y": nn.Linear(2, 3)}), nn.ModuleDict()
    b["y"], b["x"] = nn.Linear(2, 3), nn.Linear(2, 3)
    for model in (a, b):
        init_weights(model, 5)
    assert torch.equal(a["x"].weight, b["x"].weight)
    assert torch.equal(a["y"].weight, b["y"].weight)
    draw = torch.empty(3, 2).normal_(0.0, 2**-0.5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(a["x"].weight, draw)


def test_a_parameter_for_which_no_layer_answers_is_an_error_with_its_name():
    class Silent(Layer):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.empty(3))

    with pytest.raises(
        TypeError, match=r"layer 1 \(Silent\): parameter gain has no initial value; return it from initial_values"
    ):
        init_weights(nn.Sequential(Scale(), Silent()), 0)
    with pytest.raises(TypeError, match=r"layer 0 \(Bilinear\): parameter bias has no initial value"):
        init_weights(nn.Sequential(nn.Bilinear(2, 2, 2)), 0)


def test_an_initial_value_of_no_parameter_is_an_error():
    class Misspelled(Scale):
        def initial_values(self):
            return {"scale": fill_ones, "scales": fan_in(3)}

    with pytest.raises(TypeError, match=r"Misspelled: initial_values\(\) names scales, which is not a parameter"):
        init_weights(Misspelled(), 0)


def test_buffers_are_computed_and_not_stored():
    with torch.device("meta"):
        model = nn.Sequential(Scale())
    model.to_empty(device="cpu")
    model[0].table.fill_(7.0)
    init_buffers(model, "cpu")
    assert model[0].table.tolist() == [0, 1, 2, 3]
    assert "0.table" not in model.state_dict()


def test_a_buffer_for_which_no_layer_answers_or_that_would_be_stored_is_an_error():
    class Unknown(Scale):
        def initial_buffers(self):
            return {}

    with pytest.raises(TypeError, match=r"model Unknown: buffer table has no value; return it from"):
        init_buffers(Unknown(), "cpu")
    with pytest.raises(TypeError, match=r"buffer num_batches_tracked must be registered with persistent=False"):
        init_buffers(nn.BatchNorm1d(3), "cpu")


def test_a_connector_that_is_not_counted_is_an_error_with_its_name():
    class New(Layer):
        pass

    model = MM1(small_model())
    model.connector = New()
    with pytest.raises(NotImplementedError, match="New must define operations"):
        model.operations(WORKLOAD)
    with pytest.raises(NotImplementedError, match="New must define kept_bytes"):
        model.kept_bytes(WORKLOAD, Layout(2))


def test_a_block_that_does_not_say_how_it_is_sharded_is_an_error_with_its_name():
    class New(BlockLayer):
        pass

    with pytest.raises(NotImplementedError, match="New must define shard_axes"):
        New().split(None)


def test_learned_vectors_are_those_that_layers_name():
    assert learned_vectors(MM1(small_model())) >= {"vision.positions"}
    assert not learned_vectors(AveragePool(8, 8, tokens=4))


@pytest.mark.parametrize("recompute", ["none", "selective", "blocks"])
def test_preparing_gives_the_weights_of_the_seed_whatever_is_put_around_the_blocks(recompute):
    c = small_model()
    t = Train(steps=2, compile=True, recompute=recompute, seed=3)
    model = prepare(c, t, World(), torch.float32, "eager")
    truth = MM1(c).init_weights(3)
    assert all(torch.equal(p, truth.get_parameter(name)) for name, p in model.named_parameters())
    replaced = [block for block in model.blocks() if "forward" in vars(block)]
    assert replaced == model.blocks(), "all are compiled"
