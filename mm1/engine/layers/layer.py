"""Define what the engine asks of a layer: initial values, buffers, operations, bytes stored for backward, sharding.

A layer declares these for its own parameters. torch's linears, convolutions, embeddings and norms have default initial
values here, which an enclosing layer may override, such as a block for products that write into its residual stream. A
parameter without a declaration raises an error with its name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mm1.engine.layers.sharding import copy_to_part
from mm1.engine.layers.workload import KeptBytes, Layout, Operations, Traffic, Workload
from mm1.kernels.dispatch import autocast_dtype

Fill = Callable[[Tensor, Generator], object]  # fills a tensor in place, and may draw from the generator
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
LEARNED_STD = 0.02  # standard deviation of learned vectors: positions, class token, queries


def fill_zeros(value: Tensor, generator: Generator) -> None:
    """Fill a tensor with zeros."""
    value.zero_()


def fill_ones(value: Tensor, generator: Generator) -> None:
    """Fill a tensor with ones."""
    value.fill_(1.0)


def normal(std: float) -> Fill:
    """Return a function that fills a tensor with normal values of mean 0."""
    return lambda value, generator: value.normal_(0.0, std, generator=generator)


def fan_in(inputs: int, layers: int = 0) -> Fill:
    """Return a function that fills a tensor with normal values of variance 1 / inputs.

    layers: depth of the residual stream into which the product writes, by 2 · layers of which the variance is divided;
    0: it writes into none. Source: Radford et al. 2019 (GPT-2), section 2.3; each layer has two such products.
    """
    return normal(inputs**-0.5 / (2 * layers) ** 0.5 if layers else inputs**-0.5)


def xavier_uniform(products: int = 1) -> Fill:
    """Return a function that fills a weight with uniform values of variance 2 / (inputs + outputs).

    products: number of products whose weights are stacked in it, each with its own outputs. Source: Glorot and Bengio
    2010, section 4.2.1.
    """

    def fill(value: Tensor, generator: Generator) -> None:
        bound = (6 / (value.shape[1] + value.shape[0] / products)) ** 0.5
        value.uniform_(-bound, bound, generator=generator)

    return fill


def _torch_defaults(module: nn.Module) -> dict[str, Fill]:
    """Return the initial values of the parameters of one of torch's modules; empty for kinds that are not listed."""
    values: dict[str, Fill] = {}
    if isinstance(module, nn.Linear | nn.Embedding):
        values["weight"] = fan_in(module.weight.shape[-1])
    elif isinstance(module, _ConvNd):
        values["weight"] = fan_in(math.prod(module.weight.shape[1:]))
    elif isinstance(module, NORMS):
        values["weight"] = fill_ones
    return {**values, "bias": fill_zeros} if values and getattr(module, "bias", None) is not None else values


class Layer(nn.Module):
    """Define a layer for the engine; a subclass declares initial values, operations and bytes of its parameters."""

    fp32: ClassVar[bool] = False  # products are computed in fp32, and sharded weights are gathered in fp32
    vectors: ClassVar[tuple[str, ...]] = ()  # names of learned vectors and tables of them, without weight decay

    def initial_values(self) -> Mapping[str, Fill]:
        """Return how each parameter is filled, by its name in the layer: "queries", or "out.weight" of a submodule."""
        return {}

    def initial_buffers(self) -> Mapping[str, Tensor]:
        """Return the values of the layer's own buffers by name, on the CPU."""
        return {}

    def operations(self, workload: Workload) -> list[Operations]:
        """Return the forward operations of the layer; a model excludes those of its sharded blocks."""
        raise NotImplementedError(f"{type(self).__name__} must define operations(workload)")

    def kept_bytes(self, workload: Workload, layout: Layout) -> Any:
        """Return the bytes that the layer stores for backward: a number, or KeptBytes of a block."""
        raise NotImplementedError(f"{type(self).__name__} must define kept_bytes(workload, layout)")


class BlockLayer(Layer):
    """Define a unit of compilation and, unless `compiled_only`, of sharding and recomputation.

    float8: whether train.float8 applies to its wide linears.

    Its forward may be replaced for speed or memory. A replaced forward is a closure over this module. Copies and
    pickles therefore drop it and use the class's forward, as torch does for Module.compile.
    """

    compiled_only: ClassVar[bool] = False
    float8: bool = False
    _replaced: Callable[..., Any] | None = None

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        """Call `forward` in the place of the class's forward."""
        self.forward = self._replaced = forward

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if (replaced := state.pop("_replaced", None)) and state.get("forward") is replaced:
            del state["forward"]
        return state

    def kept_bytes(self, workload: Workload, layout: Layout) -> KeptBytes:
        return super().kept_bytes(workload, layout)

    def shard_axes(self) -> Mapping[str, int]:
        """Return the axes along which a tensor group divides parameters, by their names in the block."""
        raise NotImplementedError(f"{type(self).__name__} must define shard_axes()")

    def divided_counts(self) -> Mapping[str, int]:
        """Return the counts that the size of a tensor group must divide, by the names of their settings."""
        return {}

    def split(self, mesh: Any) -> None:
        """Divide the block among the processes of a tensor group. A block without `shard_axes` is not divided."""
        if self.shard_axes():
            raise NotImplementedError(f"{type(self).__name__} has shard_axes() and must define split(mesh)")

    def expert_layers(self) -> Mapping[str, Any]:
        """Return the mixtures of experts in the block, by name."""
        return {}

    def traffic(self, workload: Workload) -> Traffic:
        """Return the bytes that tensor and expert parallelism send in one pass through the block."""
        return Traffic()

    def autocast_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of products in autocast's dtype; when sharded, they are gathered in this dtype."""
        return {
            name: parameter
            for path, module in self.named_modules() if not getattr(module, "fp32", False)
            for name, parameter in prefixed(path, dict(module.named_parameters(recurse=False))) if parameter.ndim > 1
        }  # fmt: skip


def blocks_to_shard(model: Any) -> list[BlockLayer]:
    """Return the blocks of a model that are units of sharding and recomputation."""
    return [block for block in model.blocks() if not block.compiled_only]


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter, whole or sharded, as its layer declares. Random values are drawn in the order of the names.

    A parameter has the same values in every layout, because each process draws the whole of it. Raises TypeError for a
    parameter without a declaration, and for a declaration without a parameter.
    """
    parameters = dict(sorted(model.named_parameters()))
    fills = _by_name(model, lambda m: m.initial_values() if isinstance(m, Layer) else _torch_defaults(m))
    missing = "parameter {} has no initial value; return it from initial_values()"
    _refuse(model, parameters.keys() - fills.keys(), missing)
    _refuse(model, fills.keys() - parameters.keys(), "initial_values() names {}, which is not a parameter")
    generator: Generator | None = None
    for name, parameter in parameters.items():
        generator = generator or Generator(parameter.device).manual_seed(seed)
        value = torch.empty(parameter.shape, device=parameter.device)
        fills[name](value, generator)
        with torch.no_grad():
            copy_to_part(parameter, value)


def init_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute every buffer on `device`.

    Buffers are constants that checkpoints do not store. Raises TypeError for one that is persistent or has no value.
    """
    stored = model.state_dict(keep_vars=True).keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    _refuse(model, stored, "buffer {} must be registered with persistent=False")
    values = _by_name(model, lambda module: module.initial_buffers() if isinstance(module, Layer) else {})
    missing = "buffer {} has no value; return it from initial_buffers()"
    _refuse(model, dict(model.named_buffers()).keys() - values.keys(), missing)
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = value.to(device)


def _by_name(model: nn.Module, declared: Callable[[nn.Module], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the declarations of all modules by full names; an enclosing module overrides the modules inside it."""
    values: dict[str, Any] = {}
    for path, module in model.named_modules():  # enclosing modules come first
        for name, value in prefixed(path, declared(module)):
            values.setdefault(name, value)
    return values


def _refuse(model: nn.Module, names: set[str], problem: str) -> None:
    """Raise TypeError for the first of `names`, with the innermost module that exists on its path."""
    modules = dict(model.named_modules())
    for name in sorted(names):
        path = name.rpartition(".")[0]
        while path not in modules:
            path = path.rpartition(".")[0]
        layer = f"layer {path} ({type(modules[path]).__name__})" if path else f"model {type(model).__name__}"
        raise TypeError(f"{layer}: {problem.format(name.removeprefix(f'{path}.'))}")


def learned_vectors(model: nn.Module) -> Set[str]:
    """Return the names of learned vectors and tables of them, which have no weight decay."""
    return _by_name(model, lambda m: dict.fromkeys(m.vectors if isinstance(m, Layer) else ())).keys()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x: autocast's, or that of x without autocast."""
    return autocast_dtype(x) or x.dtype


def prefixed(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return (prefix.name, value) of each item, or (name, value) for an empty prefix."""
    start = f"{prefix}." if prefix else ""
    return ((start + name, value) for name, value in values.items())
