"""Instances exchanged in place, of any class: one of torch's own, one that hears of its subclasses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mm1.integrations.swap import Swapped, restore, swap

heard: list[tuple[str, str]] = []


class Original(nn.Module):
    """Keeps a register of its subclasses, as frameworks do, and cannot do without a keyword."""

    def __init_subclass__(cls, *, key: str, **keywords):
        super().__init_subclass__(**keywords)
        heard.append((cls.__name__, key))

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.weight


class Ours(Swapped):
    def forward(self, x):
        return -super().forward(x)


class OurLinear(Swapped):
    def forward(self, x):
        return -super().forward(x)


@pytest.fixture(autouse=True)
def silence():
    heard.clear()


def chosen(original, module):
    return Ours if original is Original else None


def test_a_class_that_hears_of_its_subclasses_hears_nothing_of_ours():
    """It would take ours, which has the same name, for another of its own."""
    module, x = Original(), torch.tensor([1.0, 2.0])
    assert swap(module, chosen) == [""]
    assert torch.equal(module(x), -x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), -x)
        assert type(other) is type(module)
    assert restore(module) == [""]
    assert type(module) is Original
    assert torch.equal(module(x), x)
    assert heard == []


def test_who_derives_from_a_swapped_class_gives_the_originals_keywords():
    module, x = Original(), torch.tensor([1.0, 2.0])
    swap(module, chosen)

    class Mine(type(module), key="mine"):
        pass

    assert heard == [("Mine", "mine")]
    assert torch.equal(Mine()(x), -x)
    with pytest.raises(TypeError, match="key"):

        class Other(type(module)):
            pass


def test_a_class_of_ours_may_take_keywords_too():
    class Marked(Swapped):
        def __init_subclass__(cls, *, mark=None, **keywords):
            super().__init_subclass__(**keywords)
            cls.mark = mark

    class Kind(Marked, mark="kind"):
        def forward(self, x):
            return -super().forward(x)

    assert Kind.mark == "kind"
    module = Original()
    swap(module, lambda *_: Kind)
    assert torch.equal(module(torch.ones(2)), -torch.ones(2))


def test_torchs_own_modules_can_be_exchanged():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    x, seen = torch.randn(4, 2), []
    truth = model[2](torch.relu(-model[0](x)))

    def choose(original, module):
        seen.append(original)
        return OurLinear if module is model[0] else None

    assert swap(model, choose) == ["0"]
    assert seen == [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), truth)
    assert restore(model) == ["0"]
    assert type(model[0]) is nn.Linear


def test_a_class_that_torch_derives_on_the_fly_counts_as_the_one_beneath():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.weight

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    module, x = Plain(), torch.tensor([1.0, 2.0])
    parametrize.register_parametrization(module, "weight", Double())
    seen = []
    assert swap(module, lambda original, of: seen.append(original) or (Ours if original is Plain else None)) == [""]
    assert seen[0] is Plain
    assert torch.equal(module(x), -2 * x)
    assert restore(module) == [""]
    assert torch.equal(module(x), 2 * x)
