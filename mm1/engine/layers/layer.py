"""Define what the engine asks of a layer: initial values, buffers, operations, bytes kept for backward, sharding.

A layer answers for the parameters that are its own. Those of torch's linears, convolutions, embeddings and norms are
known here; a layer may answer for them in their place, as a block does for the products that write into its residual
stream. What no layer answers for is an error that names it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mm1.engine.layers.sharding import copy_to_part
from mm1.engine.layers.workload import KeptBytes, Layout, Operations, Traffic, Workload

Fill = Callable[[Tensor, Generator], object]  # fills a tensor, and may draw from the generator
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
LEARNED = 0.02  # standard deviation of learned vectors: positions, class token, queries


def zeros(value: Tensor, generator: Generator) -> None:
    value.zero_()


def ones(value: Tensor, generator: Generator) -> None:
    value.fill_(1.0)


def normal(std: float) -> Fill:
    return lambda value, generator: value.normal_(0.0, std, generator=generator)


def fan_in(inputs: int, layers: int = 0) -> Fill:
    """Fill with normal values of variance 1 / inputs, over 2 · layers where a product writes into a residual stream.

    Source: Radford et al. 2019 (GPT-2), section 2.3, for the division by depth: two products a layer write into it.
    """
    return normal(inputs**-0.5 / (2 * layers) ** 0.5 if layers else inputs**-0.5)


def _of_torch(module: nn.Module) -> dict[str, Fill]:
    """Return the initial values of the parameters of one of torch's modules; none of a kind that is not listed."""
    values: dict[str, Fill] = {}
    if isinstance(module, nn.Linear | nn.Embedding):
        values["weight"] = fan_in(module.weight.shape[-1])
    elif isinstance(module, _ConvNd):
        values["weight"] = fan_in(math.prod(module.weight.shape[1:]))
    elif isinstance(module, NORMS):
        values["weight"] = ones
    return {**values, "bias": zeros} if values and getattr(module, "bias", None) is not None else values


class Layer(nn.Module):
    """Answers what the engine asks of a module, for the parameters that are its own."""

    fp32: ClassVar[bool] = False  # its products are computed in fp32, and sharded weights are gathered so
    vectors: ClassVar[tuple[str, ...]] = ()  # its learned vectors and tables of them, which weight decay leaves alone

    def initial_values(self) -> Mapping[str, Fill]:
        """Return how each parameter is filled, by its name in the layer: "queries", or "out.weight" of a submodule."""
        return {}

    def initial_buffers(self) -> Mapping[str, Tensor]:
        """Return the values of the layer's own buffers, on the CPU."""
        return {}

    def operations(self, workload: Workload) -> list[Operations]:
        """Return the operations of the layer, forward, that are not those of a model's blocks."""
        raise NotImplementedError(f"{type(self).__name__} does not say its operations: define operations(workload)")

    def kept_bytes(self, workload: Workload, layout: Layout) -> Any:
        """Return the bytes that the layer keeps for backward: a number, and of a block KeptBytes."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps: define kept_bytes(…)")


class BlockLayer(Layer):
    """Forms a unit of a model that is compiled by itself, and also sharded and recomputed unless `compiled_only`.

    Its forward may be replaced for speed or memory. Copies and pickles have the class's own forward, as torch does it
    with what Module.compile made: a replaced one is a closure over this module, which cannot be pickled, and in a copy
    it would compute with the weights of the original.
    """

    compiled_only: ClassVar[bool] = False
    float8: ClassVar[bool] = False  # whether train.float8 applies to its wide linears
    _replaced: Callable[..., Any] | None = None

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        self.forward = self._replaced = forward

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if (replaced := state.pop("_replaced", None)) and state.get("forward") is replaced:
            del state["forward"]
        return state

    def kept_bytes(self, workload: Workload, layout: Layout) -> KeptBytes:
        return super().kept_bytes(workload, layout)

    def axes(self) -> Mapping[str, int]:
        """Return the axis along which a tensor group divides each parameter that it divides, by name in the block."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is sharded: define axes()")

    def divisible(self) -> Mapping[str, int]:
        """Return the counts that a tensor group must divide, by the name of their setting."""
        return {}

    def split(self, mesh: Any) -> None:
        """Divide the block among the processes of a tensor group. Nothing to do where `axes` is empty."""
        if self.axes():
            raise NotImplementedError(f"{type(self).__name__} has axes() to split by: define split(mesh)")

    def expert_layers(self) -> Mapping[str, Any]:
        """Return the mixtures of experts that are in the block, by name."""
        return {}

    def traffic(self, workload: Workload) -> Traffic:
        """Return what tensor and expert parallelism send in one pass through the block."""
        return Traffic()

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the weights of the block's products in autocast's dtype, in which they are gathered when sharded."""
        return {
            f"{path}.{name}" if path else name: parameter
            for path, module in self.named_modules()
            if not getattr(module, "fp32", False)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1
        }


def blocks_to_shard(model: Any) -> list[BlockLayer]:
    """Return the blocks of a model that are units of sharding and recomputation."""
    return [block for block in model.blocks() if not block.compiled_only]


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter, whole or a part, as its layer says; random values are drawn in the order of the names.

    A parameter has the same values whatever the layout, because each process draws the whole of it.
    """
    parameters = dict(sorted(model.named_parameters()))
    fills = _named(model, lambda module: module.initial_values() if isinstance(module, Layer) else _of_torch(module))
    _refuse(model, parameters.keys() - fills.keys(), "how it is initialised", "initial_values()")
    _refuse(model, fills.keys() - parameters.keys(), "of which parameter it gives an initial value", "parameters")
    generator: Generator | None = None
    for name, parameter in parameters.items():
        generator = generator or Generator(parameter.device).manual_seed(seed)
        value = torch.empty(parameter.shape, device=parameter.device)
        fills[name](value, generator)
        with torch.no_grad():
            copy_to_part(parameter, value)


def init_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute every buffer on `device`. Buffers are constants, which no checkpoint has: each must be non-persistent."""
    stored = model.state_dict(keep_vars=True).keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    _refuse(model, stored, "why a checkpoint should store its buffer", "register_buffer(…, persistent=False)")
    values = _named(model, lambda module: module.initial_buffers() if isinstance(module, Layer) else {})
    _refuse(model, dict(model.named_buffers()).keys() - values.keys(), "its buffer's values", "initial_buffers()")
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = value.to(device)


def _named(model: nn.Module, of: Callable[[nn.Module], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `of` gives of all modules by full names; what a module says outweighs what is said inside of it."""
    values: dict[str, Any] = {}
    for path, module in model.named_modules():  # a module comes before those in it
        for name, value in of(module).items():
            values.setdefault(f"{path}.{name}" if path else name, value)
    return values


def _refuse(model: nn.Module, names: set[str], what: str, where: str) -> None:
    for name in sorted(names):
        path = name.rpartition(".")[0]
        while path and _missing(model, path):
            path = path.rpartition(".")[0]
        kind = type(model.get_submodule(path)).__name__
        raise TypeError(f"layer {path or 'of the model'} ({kind}) does not say {what}: {name}; see its {where}")


def _missing(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is None
    except AttributeError:
        return True


def learned_vectors(model: nn.Module) -> set[str]:
    """Return the names of learned vectors and tables of them, which weight decay leaves alone."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, Layer))
    return {f"{path}.{name}" if path else name for path, layer in layers for name in layer.vectors}


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product with x is computed: autocast's, or that of x without autocast."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def prefixed(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return (prefix.name, value) of each item."""
    return ((f"{prefix}.{name}", value) for name, value in values.items())
