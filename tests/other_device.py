"""Pretend that a CPU's tensors are on another device, to find code that would mix devices on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # whose tensors torch creates without a driver
COPIES = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"}  # GPUs take a CPU's indices


class Elsewhere(Tensor):
    """Hold a CPU tensor, and say that it is on DEVICE."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.value = value
        return made

    def tolist(self):
        return self.value.tolist()

    def new_tensor(self, data, **options):
        return Elsewhere(self.value.new_tensor(data, **options))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def _computed(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    held = {id(t.value): t for t in tensors if isinstance(t, Elsewhere)}
    name = func.overloadpacket.__name__
    strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
    assert not (held and strangers) or name in COPIES, f"{name} mixes devices"
    device = kwargs.get("device")
    there = bool(held) if device is None else torch.device(device) == DEVICE
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Elsewhere, lambda t: t.value, (args, kwargs))
    result = func(*args, **kwargs)
    return tree_map_only(Tensor, lambda t: held[id(t)] if id(t) in held else Elsewhere(t), result) if there else result


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def computed_elsewhere(function: Callable, arguments: tuple[Any, ...]) -> Any:
    """Return function(*arguments), computed with tensors on DEVICE. Fails where it uses another device's tensors."""
    with _Mode():
        moved = tree_map_only(Tensor, Elsewhere, arguments)
        result = function(*moved)
    assert all(isinstance(t, Elsewhere) for t in tree_leaves(result) if isinstance(t, Tensor)), "results on a CPU"
    return tree_map_only(Elsewhere, lambda t: t.value, result)
