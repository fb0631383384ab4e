"""Test the bf16 copies of weights that a training step computes with."""

import dataclasses
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import not_interpreted
from parallel_runs import Quiet
from small import document, packed, small_mm1, small_model, small_run
from torch.utils._python_dispatch import TorchDispatchMode

from mm1.engine.layers.layer import blocks_to_shard
from mm1.engine.models.mm1 import MM1
from mm1.engine.train import copies
from mm1.engine.train.copies import WeightCopies
from mm1.engine.train.prepare import compile_blocks
from mm1.engine.train.recompute import recompute_blocks
from mm1.engine.train.trainer import Trainer

pytestmark = not_interpreted
DTYPE = torch.bfloat16


def model_of(experts: int, recompute: str = "none", compiled: bool = False) -> MM1:
    model = MM1(small_model(experts=experts)).init_weights()
    if recompute != "none":
        recompute_blocks(model, recompute)
    if compiled:
        compile_blocks(model, fullgraph=True, backend="eager")
    return model


def gradients(model: MM1, context) -> list[torch.Tensor]:
    """Return the gradients of three micro-batches."""
    torch.manual_seed(0)
    batches = [packed([document((6, 6), 20, (8, 8), 30) for _ in range(2)]) for _ in range(3)]
    with context:
        for batch in batches:
            with torch.autocast("cpu", DTYPE):
                objective = model(batch).objective
            objective.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "experts, recompute, compiled", [(0, "none", False), (4, "blocks", False), (4, "selective", True)]
)
def test_gradients_are_those_of_autocast_to_the_bit(experts, recompute, compiled, monkeypatch):
    """Each copy has a gradient in each micro-batch, also in compiled code."""
    torch.compiler.reset()
    moved = []
    move = copies._move_gradient
    monkeypatch.setattr(copies, "_move_gradient", lambda weight, copy: moved.append(id(weight)) or move(weight, copy))
    truth = gradients(model_of(experts, recompute, compiled), nullcontext())
    torch.compiler.reset()  # the guards of compiled code do not see the copies
    model = model_of(experts, recompute, compiled)
    for (name, _), found, expected in zip(
        model.named_parameters(), gradients(model, WeightCopies(model, DTYPE)), truth
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name
    weights = [w for block in blocks_to_shard(model) for w in block.autocast_weights().values()]
    assert Counter(moved) == {id(weight): 3 for weight in weights}


class Casts(TorchDispatchMode):
    """Count the numbers that are cast from fp32 matrices of blocks, and from bf16 to fp32 gradients of their shapes."""

    def __init__(self, model: MM1):
        super().__init__()
        weights = [w for block in blocks_to_shard(model) for w in block.autocast_weights().values()]
        self.weights, self.shapes = {w.data_ptr() for w in weights}, {w.shape for w in weights}
        self.numbers = self.gradients = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._to_copy.default:
            x, dtype = args[0], kwargs.get("dtype")
            self.numbers += x.numel() * (x.data_ptr() in self.weights and dtype == DTYPE)
            self.gradients += x.numel() * (x.shape in self.shapes and x.dtype == DTYPE and dtype == torch.float32)
        if op is torch.ops.aten._foreach_copy_.default:
            self.numbers += sum(x.numel() for x in args[1])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "mixture"])
def test_weights_and_gradients_are_cast_once_in_three_micro_batches_and_recomputations(experts):
    model = model_of(experts, "blocks")
    numbers = sum(w.numel() for block in blocks_to_shard(model) for w in block.autocast_weights().values())
    with Casts(model) as casts:
        gradients(model, WeightCopies(model, DTYPE))
    model.zero_grad()
    with Casts(model) as by_autocast:
        gradients(model, nullcontext())
    assert (casts.numbers, by_autocast.numbers) == (numbers, 6 * numbers)
    assert by_autocast.gradients - casts.gradients == 2 * numbers


def test_outside_a_step_a_model_has_its_parameters_alone():
    model = small_mm1()
    weights, before = WeightCopies(model, DTYPE), model.state_dict(keep_vars=True)
    linear = model.decoder.blocks[0].mlp.gate
    with weights:
        assert linear.weight.dtype == DTYPE
        assert all(x is before[name] for name, x in model.state_dict(keep_vars=True).items())
        assert {id(p) for p in model.parameters()} <= {id(x) for x in before.values()}
    assert linear.weight is before["decoder.blocks.0.mlp.gate.weight"]
    with torch.no_grad():
        linear.weight.fill_(3.0)
    with weights:
        assert (linear.weight == 3.0).all(), "a step computes with the weights of the step before"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_computes_with_copies_only_in_16_bits(dtype, tmp_path):
    run = small_run(steps=2, dtype=dtype)
    trainer, seen = Trainer(dataclasses.replace(run, model=small_model(experts=4)), tmp_path / "run", Quiet()), []
    attention = trainer.model.decoder.blocks[1].attention
    parameter = attention.out.weight
    attention.register_forward_pre_hook(
        lambda *_: seen.append((attention.out.weight.dtype, attention.out.weight is parameter))
    )
    trainer.fit()
    assert set(seen) == {{"bf16": (DTYPE, False), "fp32": (torch.float32, True)}[dtype]}
    assert attention.out.weight is parameter
