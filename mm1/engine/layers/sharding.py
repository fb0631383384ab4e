"""Divide layers among processes: parts of tensors, tensor parallelism, and experts to which tokens travel.

Sources: Shoeybi et al. 2019 (Megatron-LM), Lepikhin et al. 2020 (GShard).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mm1.kernels.moe.backends import Backend
from mm1.kernels.moe.routing import Routing, sort_by_expert


def local_part(x: Tensor) -> Tensor:
    """Return this process's part of a tensor, the tensor itself where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def copy_to_part(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` this process's part of a tensor that every process has whole."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local_part(target).copy_(whole)


def sharded_like(target: Tensor, part: Tensor) -> Tensor:
    """Return a local tensor as a DTensor that is sharded as `target` is; itself if `target` is not sharded."""
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def sum_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which all processes of `mesh` hold, so that its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_results(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of the processes' x, in the dtype of x."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def split_parameter(module: nn.Module, name: str, mesh: DeviceMesh, axis: int) -> None:
    """Replace a parameter by this process's part of it along `axis`."""
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)], src_data_rank=None)))


def split_linear(linear: nn.Linear, mesh: DeviceMesh, axis: int) -> None:
    """Let a linear multiply by this process's part of its weight along `axis`. Raises ValueError if it has a bias."""
    if linear.bias is not None:
        raise ValueError("a linear with a bias cannot be split: the sum over processes would add the bias to each part")
    split_parameter(linear, "weight", mesh, axis)
    linear.forward = lambda input: F.linear(input, local_part(linear.weight))


def share_norm(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Let an RMSNorm that each process applies to its own heads have the gradient of all of them."""
    if isinstance(norm, nn.RMSNorm):
        norm.forward = lambda x: F.rms_norm(x, norm.normalized_shape, sum_gradients(norm.weight, mesh), norm.eps)


def share_input(module: nn.Module, mesh: DeviceMesh, dtype: Callable[[Tensor], torch.dtype]) -> None:
    """Sum the module's (first) result over the processes of `mesh`, and the gradient of its first argument.

    dtype: of the product with an input, in which both sums are taken.
    """

    def enter(_module: nn.Module, arguments: Any) -> Any:
        return sum_gradients(arguments[0].to(dtype(arguments[0])), mesh), *arguments[1:]

    def leave(_module: nn.Module, _arguments: Any, result: Any) -> Any:
        return (sum_results(result[0], mesh), *result[1:]) if isinstance(result, tuple) else sum_results(result, mesh)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def tensor_parallel_experts(backend: Backend, mesh: DeviceMesh) -> Backend:
    """Return a backend that applies this process's experts to all tokens and adds the results of the others."""

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local_part(gate_up), local_part(down)
        here = _count_from(r.index, mesh.get_local_rank(), len(down))
        sent = r._replace(index=here, weight=sum_gradients(r.weight, mesh), order=sort_by_expert(here, len(down)))
        return sum_results(backend(sum_gradients(x, mesh), sent, gate_up, down), mesh)

    return run


def _count_from(index: Tensor, part: int, experts: int) -> Tensor:
    """Count experts from the first of this part; those of other parts become `experts`, which is no expert."""
    index = index - part * experts
    return torch.where((index >= 0) & (index < experts), index, experts)


def expert_parallel(backend: Backend, mesh: DeviceMesh) -> Backend:
    """Return a backend that sends each routed slot to the process with its expert, and takes the result back.

    Processes first tell each other how many slots each expert gets, then send exactly those rows: none is dropped or
    padded, and the result is that of one process. The host must read the counts to size the messages: once a layer
    forward, and again where the layer is recomputed. Rows leave sorted by expert, so that the counts alone tell the
    receiver which row is for which expert.
    """
    group, parts = mesh.get_group(), mesh.size()

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local_part(gate_up), local_part(down)
        slots, position, offsets = r.order
        (T, K), here = position.shape, len(down)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        arriving = all_to_all_single(counts, None, None, group).view(parts, here)
        sent, received = torch.stack([counts.view(parts, here).sum(1), arriving.sum(1)]).tolist()

        # A copy for each choice first: its gradient is a sum, where that of a gather would be added with atomics.
        rows = x[:, None].expand(-1, K, -1).reshape(T * K, -1).index_select(0, slots[: sum(sent)])
        rows = all_to_all_single_autograd(rows, received, sent, group)
        expert = torch.arange(here, dtype=torch.int32, device=x.device).repeat(parts)
        index = expert.repeat_interleave(arriving.flatten(), output_size=len(rows))[:, None]
        one = torch.ones(index.shape, device=x.device)
        y = backend(rows, r._replace(index=index, weight=one, order=sort_by_expert(index, here)), gate_up, down)
        y = all_to_all_single_autograd(y, sent, received, group)
        y = F.pad(y, (0, 0, 0, 1))[position.clamp(max=sum(sent)).long()]  # slots of no expert read the row of zeros
        return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)

    return cast(Backend, torch.compiler.disable(run))  # sizes change with every step
