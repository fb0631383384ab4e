"""Exchanges modules of other frameworks in place: an instance becomes one of a subclass of its class, and back.

Parameters, buffers, hooks and state-dict keys stay where they are. The subclass bears the original's name, by which
frameworks know their modules (saved configurations, sharding policies, recorders of outputs).
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from mm1.kernels.dispatch import FLOATS, autocast_dtype

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ORIGINAL = "_mm1_original"  # the attribute of a subclass made here that holds the class it stands for


class Swapped(nn.Module):
    """Replaces methods of an original: super() is the original's."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let forward give way to the original's after restore, as a wrapper may have kept the bound method.

        The original hears of classes that others derive, but not of that which takes its place: this bears its name,
        and has no keywords of its own.
        """
        if ORIGINAL not in vars(cls):
            super().__init_subclass__(**keywords)
        if "forward" in vars(cls):
            cls.forward = _while_swapped(cls.forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if ORIGINAL not in vars(type(self)):  # torch derived another class from ours, and says itself what it allows
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _blank, type(self).__bases__, *state  # a class made on the fly has no place to be found at


def _while_swapped(forward: Callable) -> Callable:
    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, Swapped) else type(self).forward)(self, *args, **kwargs)

    return call


@cache
def _subclass(ours: type, original: type) -> type:
    names = {key: getattr(original, key) for key in ("__module__", "__doc__")}
    return type(original.__name__, (ours, original), {**names, ORIGINAL: original})


def _blank(ours: type, original: type) -> Any:
    return object.__new__(_subclass(ours, original))


def swap(model: nn.Module, choose: Callable[[type, nn.Module], type[Swapped] | None]) -> list[str]:
    """Give each module the methods that `choose` has for its original class; return the names of these modules.

    A module whose forward somebody replaced before is left alone: that one would win. Classes that torch derives from
    a module's own (FSDPModule, parametrizations) keep what they add.
    """
    names = []
    for name, module in model.named_modules():
        kind = type(module)
        subclass = _swapped(kind)
        original = _beneath(kind) if subclass is None else vars(subclass)[ORIGINAL]
        ours = choose(original, module)
        if ours is not None and (subclass is not None or "forward" not in vars(module)):
            module.__class__ = _rebased(kind, subclass or original, _subclass(ours, original))
            names.append(name)
    return names


def restore(model: nn.Module) -> list[str]:
    """Give every swapped module its original class back; return their names."""
    names = []
    for name, module in model.named_modules():
        subclass = _swapped(type(module))
        if subclass is not None:
            module.__class__ = _rebased(type(module), subclass, vars(subclass)[ORIGINAL])
            names.append(name)
    return names


def _swapped(kind: type) -> type | None:
    """Return the class made here that `kind` is or derives from."""
    return next((base for base in kind.__mro__ if ORIGINAL in vars(base)), None)


def _beneath(kind: type) -> type:
    """Return the class that torch derived `kind` from on the fly, or `kind` where it is itself a class of torch."""
    others = (base for base in kind.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch."))
    return next(others, kind)


def _rebased(kind: type, old: type, new: type) -> type:
    """Return a class like `kind`, which is or derives from `old`, that is or derives from `new` instead."""
    if kind is old or kind is new:
        return new
    bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in kind.__bases__)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, members)


def untouched(module: nn.Module) -> bool:
    """Say whether nothing but its forward happens when it is called."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in HOOKS)


def plain(module: nn.Module, kind: type) -> bool:
    """Say whether its weights are all it does: no adapter, no quantized or sharded variant, no hooks."""
    return type(module) is kind and untouched(module)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which torch would compute a product with this weight."""
    return (autocast_dtype(weight) if weight.dtype in FLOATS else None) or weight.dtype


def weights(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight [D, K] and bias [D] of a layer that is one product."""
    return layer.weight.flatten(1).to(dtype), None if layer.bias is None else layer.bias.to(dtype)


def missing(package: str, error: ImportError) -> ImportError:
    """Return an error that says how to install what is missing."""
    return ImportError(f'mm1.integrations needs {package} ({error}): pip install "mm1-engine[integrations]"')
