"""Divide layers among processes: shards of tensors, tensor parallelism and expert parallelism.

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
    """Return this process's shard of a tensor, or the tensor itself if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def copy_to_part(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` this process's shard of a tensor that every process has whole."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local_part(target).copy_(whole)


def sharded_like(target: Tensor, part: Tensor) -> Tensor:
    """Return a local shard as a DTensor with the sharding of `target`, or unchanged if `target` is not sharded."""
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def sum_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which is equal on all processes of `mesh`; in backward, its gradient is all-reduced."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_results(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the all-reduced sum of the processes' x, in the dtype of x."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def split_parameter(module: nn.Module, name: str, mesh: DeviceMesh, axis: int) -> None:
    """Replace a parameter by this process's shard of it along `axis`."""
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)], src_data_rank=None)))


def split_linear(linear: nn.Linear, mesh: DeviceMesh, axis: int) -> None:
    """Make a linear multiply by this process's shard of its weight along `axis`. Raises ValueError if it has a bias."""
    if linear.bias is not None:
        raise ValueError("a linear with a bias cannot be split: the sum over processes would add the bias to each part")
    split_parameter(linear, "weight", mesh, axis)
    linear.forward = lambda input: F.linear(input, local_part(linear.weight))


def all_reduce_norm_gradient(norm: nn.Module, mesh: DeviceMesh) -> None:
    """All-reduce the gradient of an RMSNorm that each process of `mesh` applies to its own heads."""
    if isinstance(norm, nn.RMSNorm):
        norm.forward = lambda x: F.rms_norm(x, norm.normalized_shape, sum_gradients(norm.weight, mesh), norm.eps)


def all_reduce_around(module: nn.Module, mesh: DeviceMesh, dtype: Callable[[Tensor], torch.dtype]) -> None:
    """All-reduce the module's (first) output in forward and the gradient of its first input in backward.

    dtype: returns the dtype of a product with an input, which both all-reduces use.
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
        experts = len(down)
        index = r.index - mesh.get_local_rank() * experts
        index = torch.where((index >= 0) & (index < experts), index, experts)  # `experts`: on another process
        local = r._replace(index=index, weight=sum_gradients(r.weight, mesh), order=sort_by_expert(index, experts))
        return sum_results(backend(sum_gradients(x, mesh), local, gate_up, down), mesh)

    return run


def expert_parallel(backend: Backend, mesh: DeviceMesh) -> Backend:
    """Return a backend that sends each routed slot to the process with its expert, and receives the result.

    Processes first exchange the number of slots per expert, then send exactly these rows: none is dropped or padded,
    and the result is that of one process. The host reads the counts to size the messages, once per layer forward and
    again if the layer is recomputed. Rows are sent sorted by expert, so that the counts identify each row's expert.
    """
    group, parts = mesh.get_group(), mesh.size()

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local_part(gate_up), local_part(down)
        slots, position, offsets = r.order
        (T, K), experts = position.shape, len(down)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        arriving = all_to_all_single(counts, None, None, group).view(parts, experts)
        sent, received = torch.stack([counts.view(parts, experts).sum(1), arriving.sum(1)]).tolist()

        # Rows are copied for each choice first: the copy's gradient is a sum, that of a gather would need atomics.
        rows = x[:, None].expand(-1, K, -1).reshape(T * K, -1).index_select(0, slots[: sum(sent)])
        rows = all_to_all_single_autograd(rows, received, sent, group)
        expert = torch.arange(experts, dtype=torch.int32, device=x.device).repeat(parts)
        index = expert.repeat_interleave(arriving.flatten(), output_size=len(rows))[:, None]
        one = torch.ones(index.shape, device=x.device)
        y = backend(rows, r._replace(index=index, weight=one, order=sort_by_expert(index, experts)), gate_up, down)
        y = all_to_all_single_autograd(y, sent, received, group)
        y = F.pad(y, (0, 0, 0, 1))[position.clamp(max=sum(sent)).long()]  # slots without an expert read zeros
        return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)

    return cast(Backend, torch.compiler.disable(run))  # sizes change with every step
