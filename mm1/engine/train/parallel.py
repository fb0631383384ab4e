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

Each layer says itself how it is divided (layers/sharding.py). Source: Zhao et al. 2023 (FSDP).
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mm1.engine.layers.layer import blocks_to_shard
from mm1.engine.layers.sharding import local_part
from mm1.engine.models.spec import Model
from mm1.engine.train.config import Parallel
from mm1.errors import UserError


class World:
    """Knows the processes of a run as one of them sees them; alone it communicates nothing."""

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

    def shard_model(self, model: Model, dtype: torch.dtype) -> None:
        """Replace each parameter by this process's part of it. dtype: autocast's, in which products are computed."""
        c, blocks = self.config, blocks_to_shard(model)
        mixtures = [experts for block in blocks for experts in block.expert_layers().values()]
        for experts in mixtures:
            experts.capacity = c.capacity
        if self.size == 1:
            return
        if c.tensor > 1:
            for block in blocks:
                _check_divisors(block.divisible(), c.tensor, "tensor")
                block.split(self.mesh["tensor"])
        if c.expert > 1:
            if c.tensor > 1:
                raise UserError("settings parallel.tensor and parallel.expert are both above 1, expected one of them")
            if not mixtures:
                raise UserError(f"setting parallel.expert is {c.expert}, expected 1 for a model without experts")
            for experts in mixtures:
                _check_divisors(experts.divisible(), c.expert, "expert")
                experts.split_by_expert(self.expert_mesh["expert"])
        narrow = None if dtype == torch.float32 else dtype
        over = partial(_mesh, replicate=c.replicate)

        def shard(module: nn.Module, mesh: DeviceMesh, parts: int, dtype: torch.dtype | None, ignored: set) -> None:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(
                module, mesh=over(mesh), mp_policy=policy, shard_placement_fn=_axis(parts), ignored_params=ignored
            )
            cast(FSDPModule, module).set_gradient_divide_factor(1.0)
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)  # gloo knows no other

        # The root comes first: what a block ignores would otherwise belong to no group.
        matrices = {parameter for block in blocks for parameter in block.matrices().values()}
        shard(model, self.mesh, self.shard, None, matrices)
        for experts in mixtures if c.expert > 1 else ():
            own = {parameter for name, parameter in experts.named_parameters() if name in experts.axes()}
            ignored = set(experts.parameters()) - own
            shard(experts, self.expert_mesh, self.shard // c.expert, narrow, ignored)
        for block in blocks:
            shard(block, self.mesh, self.shard, narrow, set(block.parameters()) - set(block.matrices().values()))

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
            locals_.append(local_part(gradient))
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


def _mesh(mesh: DeviceMesh, replicate: int) -> DeviceMesh:
    """Return the dimensions of a mesh over which parameters are sharded, and replicated if there are copies."""
    return mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]


def _axis(parts: int) -> Callable[[nn.Parameter], Shard]:
    """Cut stacked weights [E, …] across their second axis: there may be fewer experts than processes."""
    return lambda p: Shard(1 if p.ndim == 3 and p.shape[1] % parts == 0 else 0)


def _shards(x: Tensor) -> int:
    """Return the number of different parts that processes hold of a tensor."""
    if not isinstance(x, DTensor):
        return 1
    return math.prod(n for n, place in zip(x.device_mesh.shape, x.placements) if not place.is_replicate())


def _check_divisors(counts: Mapping[str, int], parts: int, name: str) -> None:
    for field, count in counts.items():
        if count % parts:
            raise UserError(f"setting parallel.{name} is {parts}, expected a divisor of the {count} {field}")
