"""Layouts of a run on several processes, by torch.distributed: which process holds which part of the model.

    replicate × shard × tensor processes
    data         each of replicate × shard takes micro-batches of its own
    shard        parameters, gradients and optimizer state lie in shards (fully_shard); `replicate` holds copies of them
    tensor       of each decoder layer a process computes its share of heads, of the MLP's width and of the experts
    expert       `expert` neighbours of `shard` divide the experts among them; tokens travel to them (all-to-all)

Every process starts from the same weights and cuts out its share, so nothing is sent at the start. Gradients are
sums over all tokens of a step, whoever had them; Trainer divides by their number.

Every layout computes what one process computes, also in bf16. The policy of dtypes, which autocast carries out:

    fp32         master weights, their gradients as they are summed over processes, AdamW's state; residual stream,
                 norms, router (weight and logits), embedding, positions, load-balance and z-loss
    autocast's   (bf16) inputs, weights and results of products and of attention, and what processes send each other of
                 them: gathered weights of blocks, partial sums of tensor parallelism, rows of tokens that travel

So the matrices of each block are gathered in autocast's dtype. All other parameters (norms, biases, routers, embedding,
head, connector) are one group that is gathered in fp32 when the model is called.

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

from mm1.engine.layers.config import Decoder
from mm1.engine.layers.decoder import Block
from mm1.engine.layers.experts import Backend, Experts, product_dtype
from mm1.engine.models.mm1 import MM1
from mm1.engine.train.config import Parallel
from mm1.errors import UserError
from mm1.kernels.moe.routing import Routing, sort_by_expert


class World:
    """The processes of a run as one of them sees them; alone it communicates nothing."""

    def __init__(self, c: Parallel = Parallel(), hang: float = 1800.0):
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
        self.shard, rest = divmod(self.size, c.replicate * c.tensor)
        if rest or not self.shard:
            raise UserError(
                f"settings parallel.replicate {c.replicate} × parallel.tensor {c.tensor} do not divide {self.size} "
                "processes"
            )
        if self.shard % c.expert:
            raise UserError(f"setting parallel.expert is {c.expert}, expected a divisor of the {self.shard} that shard")
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
        """Replace each parameter by this process's part of it. dtype: autocast's, in which products are computed."""
        c = self.config
        mixtures = [block.mlp for block in model.decoder.blocks if isinstance(block.mlp, Experts)]
        for experts in mixtures:
            experts.capacity = c.capacity
        if self.size == 1:
            return
        if c.tensor > 1:
            _check_divisors(model.config.decoder, c.tensor, "tensor")
            for block in model.decoder.blocks:
                _split_layer(cast(Block, block), self.mesh["tensor"])
        if c.expert > 1:
            if c.tensor > 1:
                raise UserError("settings parallel.tensor and parallel.expert are both above 1, expected one of them")
            if not mixtures:
                raise UserError(f"setting parallel.expert is {c.expert}, expected 1 for a model without experts")
            _check_divisors(model.config.decoder, c.expert, "expert")
            for experts in mixtures:
                _divide_experts(experts, self.expert_mesh["expert"])
        narrow = None if dtype == torch.float32 else dtype
        over = partial(_mesh, replicate=c.replicate)
        blocks = [*model.vision.blocks, *model.decoder.blocks]
        matrices = {p for block in blocks for p in _matrices(block)}

        def shard(module: nn.Module, mesh: DeviceMesh, parts: int, dtype: torch.dtype | None, ignored: set) -> None:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(
                module, mesh=over(mesh), mp_policy=policy, shard_placement_fn=_axis(parts), ignored_params=ignored
            )
            cast(FSDPModule, module).set_gradient_divide_factor(1.0)
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)  # gloo knows no other

        # The root comes first: what a block ignores would otherwise belong to no group.
        shard(model, self.mesh, self.shard, None, matrices)
        for experts in mixtures if c.expert > 1 else ():
            shard(experts, self.expert_mesh, self.shard // c.expert, narrow, {experts.router.weight})
        for block in blocks:
            shard(block, self.mesh, self.shard, narrow, set(block.parameters()) - _matrices(block))

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place. Those of a tensor group hold the same values, which count once."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.config.tensor
        return values

    def square_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return this process's part of Σ g², fp32 []: its `sum` is the square of the norm of all gradients."""
        locals_, shares = [], []
        for gradient in gradients:
            locals_.append(local(gradient))
            shares.append(self.config.tensor * _shards(gradient) / self.size)
        norms = torch._foreach_norm(locals_)
        # As scalars: a tensor of them would have to be copied to the device, for which the host waits.
        torch._foreach_mul_(norms, [math.sqrt(share) for share in shares])
        return torch.stack(norms).square().sum()

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
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):  # others may be gone
                dist.destroy_process_group()


def local(x: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def put(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` its part of a tensor that every process has whole."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local(target).copy_(whole)


def cut_like(part: Tensor, target: Tensor) -> Tensor:
    """Return a local tensor as a DTensor that is divided among processes as `target` is."""
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def _matrices(block: nn.Module) -> set[nn.Parameter]:
    """Return the weights of a block's products, which are gathered in autocast's dtype."""
    return {p for name, p in block.named_parameters() if p.ndim > 1 and not name.endswith("router.weight")}


def _mesh(mesh: DeviceMesh, replicate: int) -> DeviceMesh:
    return mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]


def _axis(parts: int) -> Callable[[nn.Parameter], Shard]:
    """Cut stacked weights [E, …] across their second axis: there may be fewer experts than processes."""
    return lambda p: Shard(1 if p.ndim == 3 and p.shape[1] % parts == 0 else 0)


def _shards(x: Tensor) -> int:
    """Return the number of different parts that processes hold of a tensor."""
    if not isinstance(x, DTensor):
        return 1
    return math.prod(n for n, place in zip(x.device_mesh.shape, x.placements) if not place.is_replicate())


def _check_divisors(c: Decoder, parts: int, name: str) -> None:
    counts = {"experts": c.experts} if c.experts else {}
    if name == "tensor":
        counts |= {"kv_heads": c.kv_heads, "ffn": c.ffn}
    for field, count in counts.items():
        if count % parts:
            raise UserError(f"setting parallel.{name} is {parts}, expected a divisor of the {count} {field}")


def _enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which all processes of `mesh` hold, so that its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _leave(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of the processes' x, in the dtype of x."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _cut(module: nn.Module, name: str, mesh: DeviceMesh, axis: int) -> None:
    whole = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(axis)], src_data_rank=None)))


def _cut_linear(linear: nn.Linear, mesh: DeviceMesh, axis: int) -> None:
    _cut(linear, "weight", mesh, axis)
    linear.forward = lambda input: F.linear(input, local(linear.weight))


def _split_layer(block: Block, mesh: DeviceMesh) -> None:
    """Divide heads, and the MLP's width or experts, among the processes of `mesh`: two all-reduces a layer forward,
    two backward."""
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
    """Sum the module's (first) result over the processes of `mesh`, and the gradient of its first argument."""

    def enter(_module: nn.Module, arguments: Any) -> Any:
        return _enter(arguments[0].to(product_dtype(arguments[0])), mesh), *arguments[1:]

    def leave(_module: nn.Module, _arguments: Any, result: Any) -> Any:
        return (_leave(result[0], mesh), *result[1:]) if isinstance(result, tuple) else _leave(result, mesh)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _sharing(backend: Backend, mesh: DeviceMesh) -> Backend:
    """Return a back-end that applies this process's experts to all tokens and adds the results of the others."""

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local(gate_up), local(down)
        here = _own(r.index, mesh.get_local_rank(), len(down))
        sent = r._replace(index=here, weight=_enter(r.weight, mesh), order=sort_by_expert(here, len(down)))
        return _leave(backend(_enter(x, mesh), sent, gate_up, down), mesh)

    return run


def _own(index: Tensor, part: int, experts: int) -> Tensor:
    """Count experts from the first of this part; those of other parts become `experts`, which is no expert."""
    index = index - part * experts
    return torch.where((index >= 0) & (index < experts), index, experts)


def _divide_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Leave each process of `mesh` its share of the experts, to which tokens travel."""
    for name in ("gate_up", "down"):
        _cut(experts, name, mesh, 0)
    experts.backend = _exchanging(experts.backend, mesh)


def _exchanging(backend: Backend, mesh: DeviceMesh) -> Backend:
    """Return a back-end that sends each routed slot to the process with its expert, and takes the result back.

    Processes first tell each other how many slots each expert gets, then send exactly those rows: none is dropped or
    padded, and the result is that of one process. The host must read the counts to size the messages: once a layer
    forward, and again where the layer is recomputed. Rows leave sorted by expert, so that the counts alone tell the
    receiver which row is for which expert.
    """
    group, parts = mesh.get_group(), mesh.size()

    def run(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = local(gate_up), local(down)
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
