"""Recomputing changes what is kept and what runs twice, and nothing else."""

import weakref

import pytest
import torch
from small import document, packed, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from mm1.engine.layers.workload import Layout
from mm1.engine.models.mm1 import MM1
from mm1.engine.train import recompute
from mm1.engine.train.ledger import workload
from mm1.engine.train.plan import activations
from mm1.engine.train.prepare import compile_blocks
from mm1.engine.train.recompute import recompute_blocks

WAYS = ["none", "selective", "blocks"]


class Alive(TorchDispatchMode):
    """Bytes of all that operations made and that is not gone again."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = weakref.ref(storage)
        return result

    @property
    def bytes(self) -> int:
        return sum(found.nbytes() for ref in self.made.values() if (found := ref()) is not None)


def made(what: str, experts: int, compiled: bool = False):
    torch.manual_seed(0)
    model = MM1(small_model(experts=experts)).init_weights()
    if what != "none":
        recompute_blocks(model, what)
    if compiled:
        compile_blocks(model, fullgraph=True, backend="aot_eager")
    return model, packed([document((6, 6), 20, (8, 8), 30) for _ in range(4)])


def gradients(model: MM1, batch) -> dict[str, torch.Tensor]:
    model(batch).objective.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "mixture"])
def test_gradients_are_the_same_bits(experts, compiled):
    truth = gradients(*made("none", experts))
    for what in ("selective", "blocks"):
        torch.compiler.reset()
        found = gradients(*made(what, experts, compiled))
        for name, value in truth.items():
            if compiled:
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
            else:
                assert torch.equal(found[name], value), (what, name)


def test_selective_runs_no_product_twice():
    flops = {}
    for what in WAYS:
        model, batch = made(what, 0)
        with FlopCounterMode(display=False) as counter:
            gradients(model, batch)
        flops[what] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < 0.85 * flops["blocks"]


def test_attention_is_kept_whoever_computes_it():
    import torch.nn.attention.varlen  # declares its operation

    ops = torch.ops
    kept = (ops.mm1.flash.default, ops.mm1.attention_segments.default, ops.torch_attn._varlen_attn.default,
            ops.aten._scaled_dot_product_flash_attention.default, ops.aten._scaled_mm.default)  # fmt: skip
    again = (ops.aten.mul.Tensor, ops.aten.silu.default, ops.aten._to_copy.default, ops.aten.rsqrt.default)
    policies = [[recompute.selective_policy(None, op) for op in of] for of in (kept, again)]
    assert policies == [[CheckpointPolicy.MUST_SAVE] * len(kept), [CheckpointPolicy.PREFER_RECOMPUTE] * len(again)]


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "mixture"])
def test_what_is_kept_is_what_the_plan_says(experts):
    found, expected = {}, {}
    for what in WAYS:
        model, batch = made(what, experts)
        with Alive() as alive:
            losses = model(batch)
        found[what] = alive.bytes - 4 * model.decoder.head_weight.numel()  # whose gradient forward made
        assert losses.loss.requires_grad
        estimate = activations(small_model(experts=experts), workload(batch), Layout(4), recompute=what)
        expected[what] = sum(estimate.values()) - estimate.get("a block computed again", 0)
    assert found["blocks"] < found["selective"] < found["none"]
    for what in WAYS:
        assert 0.75 < expected[what] / found[what] < 1.25, what
