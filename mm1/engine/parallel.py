"""One run on many processes, by torch.distributed: who holds which part of the model, and what they tell each other.

    replicate × shard × tensor processes
    data         each of replicate × shard takes micro-batches of its own
    shard        parameters, gradients and optimizer state lie in shares (fully_shard); `replicate` holds copies of them
    tensor       of each decoder layer a process computes its share of heads, of the MLP's width and of the experts
    expert       `expert` processes side by side of `shard` share the experts, to which tokens travel (all-to-all)

Every process starts from the same weights and cuts out its share, so nothing is sent at the start. Gradients are
sums over all tokens of a step, whoever had them; Trainer divides by their number.
Sources: Shoeybi et al. 2019 (Megatron-LM), Zhao et al. 2023 (FSDP), Lepikhin et al. 2020 (GShard).
"""

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mm1.engine import config
from mm1.engine.data.record import DataError
from mm1.engine.decoder import Block
from mm1.engine.experts import Backend, Experts
from mm1.engine.model import MM1
from mm1.kernels.dispatch import cdiv
from mm1.kernels.route import Routing, sort_by_expert


class World:
    """The processes of a run, of which this is one; alone it does nothing and costs nothing."""

    def __init__(self, c: config.Parallel = config.Parallel(), hang: float = 1800.0):
        """hang: seconds without a step after which stacks are printed (safety.Watch); 0: never."""
        self.config = c
        # A collective that others never join fails after the stacks are printed, which say where they are.
        timeout = timedelta(seconds=1.5 * hang + 60) if hang else timedelta(days=7)
        self.rank, self.size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.shard, left = divmod(self.size, c.replicate * c.tensor)
        if left or not self.shard:
            raise DataError(f"{self.size} processes are no multiple of replicate {c.replicate} × tensor {c.tensor}")
        if self.shard % c.expert:
            raise DataError(f"setting parallel.expert is {c.expert}, expected a divisor of the {self.shard} that shard")
        self.data_size, self.data_rank = self.size // c.tensor, self.rank // c.tensor
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
            self.mesh = init_device_mesh(
                self.device.type, (c.replicate, self.shard, c.tensor), mesh_dim_names=("replicate", "shard", "tensor")
            )
            # A checkpoint is written beside the steps: on a group of its own, or their messages would be mixed up.
            self.savers = dist.new_group(backend="gloo", timeout=timeout)
            # Experts are cut otherwise than the rest: first among `expert` processes, then among the others.
            self.expert_mesh = init_device_mesh(
                self.device.type, (c.replicate, self.shard // c.expert, c.expert, c.tensor),
                mesh_dim_names=("replicate", "shard", "expert", "tensor"),
            )  # fmt: skip

    def __str__(self) -> str:
        """Describe the layout, such as "4 processes (replicate 2, shard 2, tensor 1, expert 1)"."""
        if self.size == 1:
            return "1 process"
        c = self.config
        return (
            f"{self.size} processes (replicate {c.replicate}, shard {self.shard}, tensor {c.tensor}, expert {c.expert})"
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def place(self, model: MM1, dtype: torch.dtype) -> None:
        """Leave of the model what this process holds. dtype: of the products, to which weights are gathered."""
        if self.size == 1:
            return
        c = self.config
        mixtures = [block.mlp for block in model.decoder.blocks if isinstance(block.mlp, Experts)]
        if c.tensor > 1:
            _check_divisors(model.config.decoder, c.tensor, "tensor")
            for block in model.decoder.blocks:
                _split_layer(cast(Block, block), self.mesh["tensor"])
        if c.expert > 1:
            if c.tensor > 1:
                raise DataError("settings parallel.tensor and parallel.expert are both above 1, expected one of them")
            _check_divisors(model.config.decoder, c.expert, "expert")
            for experts in mixtures:
                _send_tokens(experts, self.expert_mesh["expert"], c.capacity or c.expert)
        policy = MixedPrecisionPolicy(param_dtype=dtype if dtype != torch.float32 else None, reduce_dtype=torch.float32)
        over = partial(_mesh, replicate=c.replicate)
        shard = partial(fully_shard, mesh=over(self.mesh), mp_policy=policy, shard_placement_fn=_axis(self.shard))
        for experts in mixtures if c.expert > 1 else ():
            shard(experts.router)
            along = _axis(self.shard // c.expert)
            fully_shard(experts, mesh=over(self.expert_mesh), mp_policy=policy, shard_placement_fn=along)
        for block in [*model.vision.blocks, *model.decoder.blocks]:
            shard(block)
        shard(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place; those of one tensor group hold the same, which counts once."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.config.tensor
        return values

    def square_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """This process's part of Σ g²: what `sum` makes of it is the square of the norm of all gradients."""
        locals_, shares = [], []
        for gradient in gradients:
            locals_.append(local(gradient))
            shares.append(self.config.tensor * _shards(gradient) / self.size)
        norms = torch.stack(torch._foreach_norm(locals_))
        return (norms.square() * torch.tensor(shares, device=norms.device)).sum()

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def together(self, work: Callable[[], Any]) -> Any:
        """Return what `work` gives here; if it fails on any process, all raise the error of the first that failed."""
        result = error = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        for other in self.gather(error):
            if other is not None:
                raise other
        return result

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Return on all processes what `work` gives on the first, or raise its error on all."""
        result = self.together(lambda: work() if self.first else None)
        return self.gather(result)[0]

    def wait(self) -> None:
        """For all the others."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):  # others may be gone
                dist.destroy_process_group()


def local(x: Tensor) -> Tensor:
    """What of a tensor is here."""
    return x.to_local() if isinstance(x, DTensor) else x


def put(target: Tensor, whole: Tensor) -> None:
    """Into `target`, which may be a part, what belongs there of a tensor that every process has."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local(target).copy_(whole)


def cut_like(part: Tensor, target: Tensor) -> Tensor:
    """A part as what it is part of: as much of another tensor as is here of `target`."""
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def _mesh(mesh: DeviceMesh, replicate: int) -> DeviceMesh:
    return mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]


def _axis(parts: int) -> Callable[[nn.Parameter], Shard]:
    """Experts are cut across, so that all processes hold as much of them, be there more processes than experts."""
    return lambda p: Shard(1 if p.ndim == 3 and p.shape[1] % parts == 0 else 0)


def _shards(x: Tensor) -> int:
    """In how many different parts it lies."""
    if not isinstance(x, DTensor):
        return 1
    return math.prod(n for n, place in zip(x.device_mesh.shape, x.placements) if not place.is_replicate())


def _check_divisors(c: config.Decoder, parts: int, name: str) -> None:
    counts = {"experts": c.experts} if c.experts else {}
    if name == "tensor":
        counts |= {"kv_heads": c.kv_heads, "ffn": c.ffn}
    for field, count in counts.items():
        if count % parts:
            raise DataError(f"setting parallel.{name} is {parts}, expected a divisor of the {count} {field}")


def _enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same on all processes; its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _leave(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what all processes have."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _cut(module: nn.Module, name: str, mesh: DeviceMesh, axis: int) -> None:
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)], src_data_rank=None)))


def _cut_linear(linear: nn.Linear, mesh: DeviceMesh, axis: int) -> None:
    _cut(linear, "weight", mesh, axis)
    linear.forward = lambda input: F.linear(input, local(linear.weight))


def _split_layer(block: Block, mesh: DeviceMesh) -> None:
    """Heads, and widths or experts, among the processes of `mesh`; two sums a layer forward, two backward."""
    attention, mlp = block.attention, block.mlp
    _cut_linear(attention.qkv, mesh, 0)
    _cut_linear(attention.out, mesh, 1)
    for norm in (attention.q_norm, attention.k_norm):
        if isinstance(norm, nn.RMSNorm):  # seen by the heads that are here
            norm.forward = lambda x, norm=norm: F.rms_norm(
                x, norm.normalized_shape, _enter(norm.weight, mesh), norm.eps
            )
    _enclose(attention, mesh)
    if isinstance(mlp, Experts):
        for name in ("gate_up", "down"):
            _cut(mlp, name, mesh, 0)
        mlp.backend = _sharing(mlp.backend, mesh)
    else:
        for linear, axis in ((mlp.gate, 0), (mlp.up, 0), (mlp.down, 1)):
            _cut_linear(linear, mesh, axis)
        _enclose(mlp, mesh)


def _enclose(module: nn.Module, mesh: DeviceMesh) -> None:
    """Its first argument comes in the same for all, its (first) result is the sum of what they make."""

    def leave(_module: nn.Module, _given: Any, result: Any) -> Any:
        return (_leave(result[0], mesh), *result[1:]) if isinstance(result, tuple) else _leave(result, mesh)

    module.register_forward_pre_hook(lambda _module, given: (_enter(given[0], mesh), *given[1:]))
    module.register_forward_hook(leave)


def _sharing(backend: Backend, mesh: DeviceMesh) -> Backend:
    """All tokens are here, some experts; what the others make is added."""

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local(gate_up), local(down)
        here = _own(r.index, mesh.get_local_rank(), len(down))
        sent = r._replace(index=here, weight=_enter(r.weight, mesh), order=sort_by_expert(here, len(down)))
        return _leave(backend(_enter(x, mesh), sent, gate_up, down), mesh)

    return run


def _own(index: Tensor, part: int, experts: int) -> Tensor:
    """Experts counted from the first of this part; those of other parts are `experts`."""
    index = index - part * experts
    return torch.where((index >= 0) & (index < experts), index, experts)


def _send_tokens(experts: Experts, mesh: DeviceMesh, capacity: float) -> None:
    for name in ("gate_up", "down"):
        _cut(experts, name, mesh, 0)
    experts.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device=experts.down.device), persistent=False)
    experts.backend = _travelling(experts.backend, mesh, capacity, experts)


def _travelling(backend: Backend, mesh: DeviceMesh, capacity: float, experts: Any) -> Backend:
    """Each process sends every other `capacity` times an even share of its T·K slots at most: all shapes are known
    beforehand, and no number of tokens is asked for. What is over is counted in `dropped`, and adds nothing."""
    group, parts = mesh.get_group(), mesh.size()

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local(gate_up), local(down)
        slots, position, offsets = r.order
        here, (T, K) = len(down), position.shape
        C = min(T * K, cdiv(math.ceil(capacity * T * K), parts))
        # Sorted by expert the slots are sorted by process; place p of process d goes to row d·C + p.
        ends = offsets.view(parts, here)[:, -1].contiguous()
        starts = F.pad(ends, (1, 0))[:-1]
        at = torch.arange(T * K, device=x.device, dtype=offsets.dtype)
        to = torch.searchsorted(ends, at, right=True).clamp(max=parts - 1)
        place = at - starts[to]
        fits = (at < ends[-1]) & (place < C)
        row = torch.where(fits, to * C + place, parts * C)  # one row more takes what is not sent
        experts.dropped.add_(ends[-1] - fits.sum())

        of = torch.searchsorted(offsets, at, right=True) - to * here  # expert, as its process counts them
        index = torch.full((parts * C + 1,), here, dtype=torch.int32, device=x.device)
        index = index.index_copy(0, row, of.to(torch.int32))[:-1]
        # A copy for each choice first: its gradient is a sum, where that of a gather would be added with atomics.
        rows = x[:, None].expand(-1, K, -1).reshape(T * K, -1)[slots]
        sent = x.new_zeros(parts * C + 1, x.shape[1]).index_copy(0, row, rows)[:-1]

        index = all_to_all_single(index, None, None, group)
        taken = all_to_all_single_autograd(sent, None, None, group)
        one = torch.ones(parts * C, 1, device=x.device)
        routing = r._replace(index=index[:, None], weight=one, order=sort_by_expert(index[:, None], here))
        made = backend(taken, routing, gate_up, down)
        back = all_to_all_single_autograd(made, None, None, group)
        y = F.pad(back, (0, 0, 0, 1))[row[position.flatten().long()]].view(T, K, -1)
        return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)

    return run


def dropped(model: nn.Module) -> Tensor:
    """Slots of tokens that found no room on their way to an expert, since the start."""
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("mlp.dropped")]
    return torch.stack(counts).sum() if counts else torch.zeros((), device=next(model.parameters()).device)
