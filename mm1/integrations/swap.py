"""Swap methods of other frameworks' modules in place, by changing the class of an instance to a subclass, and undo it.

Parameters, buffers, hooks and state-dict keys do not change. The subclass has the name of the original, by which
frameworks identify modules (saved configurations, sharding policies, recorders of outputs).
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from mm1.kernels.dispatch import FLOATS, autocast_dtype

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ORIGINAL = "_mm1_original"  # attribute of a subclass made here: the class that it replaces


class Swapped(nn.Module):
    """Define the base of classes whose methods replace those of an original class; super() calls the original's."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Make `forward` call the original's after restore, because a wrapper may have stored the bound method.

        The original's __init_subclass__ runs for classes derived from the replacement, but not for the replacement.
        """
        if ORIGINAL not in vars(cls):
            super().__init_subclass__(**keywords)
        if "forward" in vars(cls):
            cls.forward = _while_swapped(cls.forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if ORIGINAL not in vars(type(self)):  # a class that torch derived from this one pickles in its own way
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _blank, type(self).__bases__, *state  # pickle cannot import a class made at run time


def _while_swapped(forward: Callable) -> Callable:
    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, Swapped) else type(self).forward)(self, *args, **kwargs)

    return call


@cache
def _subclass(replacement: type, original: type) -> type:
    """Return a class with the original's name and the replacement's methods."""
    names = {key: getattr(original, key) for key in ("__module__", "__doc__")}
    return type(original.__name__, (replacement, original), {**names, ORIGINAL: original})


def _blank(replacement: type, original: type) -> Any:
    """Return an uninitialised instance, for unpickling."""
    return object.__new__(_subclass(replacement, original))


def swap(model: nn.Module, choose: Callable[[type, nn.Module], type[Swapped] | None]) -> list[str]:
    """Swap each module for which `choose` returns a replacement of its original class; return these modules' names.

    A module whose forward was replaced on the instance does not change, because that one takes precedence. Classes that
    torch derives from a module's own (FSDPModule, parametrizations) keep their additions.
    """
    names = []
    for name, module in model.named_modules():
        kind = type(module)
        subclass = _swapped(kind)
        original = _underived(kind) if subclass is None else vars(subclass)[ORIGINAL]
        replacement = choose(original, module)
        if replacement is not None and (subclass is not None or "forward" not in vars(module)):
            module.__class__ = _rebased(kind, subclass or original, _subclass(replacement, original))
            names.append(name)
    return names


def restore(model: nn.Module) -> list[str]:
    """Return every swapped module to its original class; return these modules' names."""
    names = []
    for name, module in model.named_modules():
        subclass = _swapped(type(module))
        if subclass is not None:
            module.__class__ = _rebased(type(module), subclass, vars(subclass)[ORIGINAL])
            names.append(name)
    return names


def _swapped(kind: type) -> type | None:
    """Return the subclass made here that `kind` is or derives from, None if there is none."""
    return next((base for base in kind.__mro__ if ORIGINAL in vars(base)), None)


def _underived(kind: type) -> type:
    """Return the class from which torch derived `kind` at run time; `kind` itself if it is a class of torch."""
    others = (base for base in kind.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch."))
    return next(others, kind)


def _rebased(kind: type, old: type, new: type) -> type:
    """Return a class like `kind` with its base class `old` replaced by `new`."""
    if kind is old or kind is new:
        return new
    bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in kind.__bases__)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, members)


def untouched(module: nn.Module) -> bool:
    """Return whether calling a module runs only the forward of its class: no hooks, no replaced forward."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in HOOKS)


def plain(module: nn.Module, kind: type) -> bool:
    """Return whether a module is exactly of this class, without hooks: no adapter, no quantized or sharded variant."""
    return type(module) is kind and untouched(module)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which torch computes a product with this weight, autocast included."""
    return (autocast_dtype(weight) if weight.dtype in FLOATS else None) or weight.dtype


def weights(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight [D, K] and bias [D] or None of a linear or convolution, in this dtype."""
    return layer.weight.flatten(1).to(dtype), None if layer.bias is None else layer.bias.to(dtype)


def missing(requirement: str, error: ImportError) -> ImportError:
    """Return an error with the command that installs a missing package."""
    return ImportError(f'mm1.integrations needs {requirement} ({error}): pip install "{requirement}"')
