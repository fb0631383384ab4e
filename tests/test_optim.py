"""The schedule of learning rates, and what weight decay does to which parameters."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from conftest import relative_error
from small import small_model, small_run
from torch import nn

from mm1.engine.layers.config import Connector
from mm1.engine.layers.layer import learned_vectors
from mm1.engine.layers.sharding import local_part
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import MM1Config
from mm1.engine.run_config import load_run
from mm1.engine.train.config import Parallel, Train
from mm1.engine.train.display import Silent
from mm1.engine.train.optim import adamw, decays, learning_rate
from mm1.engine.train.parallel import World
from mm1.engine.train.trainer import Trainer

DENSE = small_model(experts=0)
MODELS = {
    "mixture": small_model(),
    "own head": small_model(experts=0, tied=False),
    "positions of the abstractor": dataclasses.replace(
        DENSE, connector=dataclasses.replace(DENSE.connector, position_grid=(6, 6))
    ),
    "attention": dataclasses.replace(DENSE, connector=Connector("attention", tokens=4)),
    "average": dataclasses.replace(DENSE, connector=Connector("average", tokens=4)),
    "CLIP": dataclasses.replace(DENSE, vision=dataclasses.replace(DENSE.vision, class_token=True, pre_norm=True)),
    "AIM": dataclasses.replace(DENSE, vision=dataclasses.replace(DENSE.vision, patch_norm=True, bias=False)),
}


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that multiply an input: the kind of their module says so, not their shape."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
    own = {"vision.patch_weight"}
    for name, _ in model.named_parameters():
        if name.endswith((".mlp.router.weight", ".mlp.gate_up", ".mlp.down")):
            own.add(name)
    return names | own


@pytest.mark.parametrize("c", MODELS.values(), ids=MODELS)
def test_a_run_of_zero_gradients_shrinks_matrices_by_the_rates_and_nothing_else(c: MM1Config):
    model, t, peak = MM1(c).init_weights(), Train(steps=40, warmup=4), 0.01
    for parameter in model.parameters():
        parameter.data.add_(0.5)  # no zeros, which would hide a decay
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = adamw(model.named_parameters(), t, peak, learned_vectors(model))
    factor = 1.0
    for step in range(t.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t, peak)
        optimizer.step()
        factor *= 1 - 0.1 * learning_rate(step, t, peak)
    assert 0.97 < factor < 0.99
    shrunk = matrices(model)
    assert any("mlp" in name for name in shrunk)
    for name, p in model.named_parameters():
        if name in shrunk:
            assert relative_error(p.double(), before[name] * factor) < 2e-6, name  # 40 roundings of fp32
        else:
            assert torch.equal(p.double(), before[name]), name


def test_the_3b_shrinks_over_its_run_as_the_papers_weight_decay_says():
    """λ = 0.1 η scaled by the schedule: the weights keep exp(-0.1 · Σ rate) of what they were. In 200k steps that is
    nearly half, where a λ multiplied by the rate once more left 99.996 %."""
    t, peak = load_run("mm1-3b").train, 6e-5
    kept = math.exp(sum(math.log1p(-0.1 * learning_rate(step, t, peak)) for step in range(t.steps)))
    by_hand = math.exp(-0.1 * peak * (1000 + 198_000 * 0.55))  # means: half of a warm-up, 0.55 of a cosine to a tenth
    assert kept == pytest.approx(by_hand, rel=1e-4)
    assert kept == pytest.approx(0.517, abs=0.002)


LAYOUTS = {"shard": {}, "replicate": {"replicate": 2}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}


@pytest.fixture
def four_ranks(monkeypatch):
    """This process as one of four, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decays_the_same_parameters(layout, four_ranks):
    c = small_model()
    c = dataclasses.replace(c, vision=dataclasses.replace(c.vision, class_token=True, pre_norm=True),
                            connector=dataclasses.replace(c.connector, position_grid=(6, 6)))  # fmt: skip
    whole = MM1(c)
    with torch.device("meta"):
        model = MM1(c)
    World(Parallel(**LAYOUTS[layout])).shard_model(model, torch.float32)
    parts = {name: nn.Parameter(local_part(p.detach())) for name, p in model.named_parameters()}
    assert any(part.shape != whole.get_parameter(name).shape for name, part in parts.items())
    assert {name for name, part in parts.items() if decays(name, part, learned_vectors(model))} == matrices(whole)


def test_schedule_warms_up_and_ends_at_a_tenth():
    t = Train(steps=1000, warmup=100)
    rates = [learning_rate(step, t, 1.0) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[99] == 1.0 == max(rates)
    assert abs(rates[550] - (0.1 + 0.9 * 0.5)) < 1e-3
    assert abs(rates[-1] - 0.1) < 1e-4


@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 1), (10, 1), (100, 3), (10_000, 300), (66_700, 2000),
                                           (200_000, 2000)])  # fmt: skip
def test_the_warm_up_is_three_percent_of_a_short_run_and_the_papers_of_a_long_one(steps, warmup):
    assert Train(steps=steps).warmup_steps == warmup
    rates = [learning_rate(step, Train(steps=steps), 1.0) for step in range(min(steps, 2000))]
    assert max(rates) == 1.0  # every run reaches its peak


def test_a_run_of_a_hundred_steps_is_at_its_peak_rate_after_three(tmp_path):
    run = small_run(steps=100, accumulate=1, save_every=100, peak_lr=2e-3, warmup=None)
    trainer = Trainer(run, tmp_path / "run", Silent(), False)
    assert [trainer.step().host["lr"] for _ in range(3)][-1] == 2e-3
    trainer.feed.close()
