"""Divide a model among the processes of a run, by torch.distributed.

    replicate × shard × tensor processes
    data         each of replicate × shard takes micro-batches of its own
    shard        parameters, gradients and optimizer state are sharded (fully_shard), with `replicate` copies
    tensor       a process computes its share of the heads, the MLP's width and the experts of each decoder layer
    expert       `expert` neighbours of `shard` divide the experts; tokens are sent to them (all-to-all)

Every process draws the same initial weights and keeps its shard, so nothing is sent at the start. Gradients are sums
over all tokens of a step, of all processes; Trainer divides by their number.

Every layout computes the result of one process, also in bf16. Autocast implements this policy of dtypes:

    fp32         master weights, all-reduced gradients, AdamW's state; residual stream, norms, router (weight and
                 logits), embedding, positions, load-balance and z-loss
    autocast's   (bf16) inputs, weights and results of products and of attention, also when they are sent: gathered
                 weights of blocks, partial sums of tensor parallelism, tokens of expert parallelism

The matrices of each block are therefore gathered in autocast's dtype. All other parameters (norms, biases, routers,
embedding, head, connector) form one group that is gathered in fp32 when the model is called.

Each layer declares how it is divided (layers/sharding.py). Source: Zhao et al. 2023 (FSDP).
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from mm1.engine.layers.layer import blocks_to_shard
from mm1.engine.layers.sharding import local_part
from mm1.engine.models.spec import Model
from mm1.engine.train.config import Parallel
from mm1.errors import UserError, require


def collective_timeout(hang: float) -> timedelta:
    """Return the time after which a collective fails that other processes never join; longer than train.hang.

    The watchdog (safety.Watch) has then printed where each process waits. hang: seconds; 0: no watchdog.
    """
    return timedelta(seconds=1.5 * hang + 60) if hang else timedelta(days=7)


class World:
    """Hold the ranks, meshes and collectives of a run's processes; a single process communicates nothing.

    hang: as train.hang, in seconds. Raises UserError if the layout does not fit the number of processes.
    """

    def __init__(self, c: Parallel = Parallel(), hang: float = 1800.0):
        self.config, timeout = c, collective_timeout(hang)
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.shard, rest = divmod(self.size, c.replicate * c.tensor)
        if rest or not self.shard:
            product = f"parallel.replicate {c.replicate} × parallel.tensor {c.tensor}"
            raise UserError(f"settings {product} do not divide {self.size} processes")
        divisor = f"a divisor of the {self.shard} processes that shard"
        require(self.shard % c.expert == 0, "setting parallel.expert", c.expert, divisor)
        self.data_size, self.data_rank = self.size // c.tensor, self.rank // c.tensor
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
            self.mesh = init_device_mesh(
                self.device.type, (c.replicate, self.shard, c.tensor), mesh_dim_names=("replicate", "shard", "tensor")
            )
            # A checkpoint is written while steps run, and needs a group of its own to keep their messages apart.
            self.savers = dist.new_group(backend="gloo", timeout=timeout)
            # Experts are sharded in two levels: among `expert` processes, then among the others.
            self.expert_mesh = init_device_mesh(
                self.device.type, (c.replicate, self.shard // c.expert, c.expert, c.tensor),
                mesh_dim_names=("replicate", "shard", "expert", "tensor"),
            )  # fmt: skip

    def __str__(self) -> str:
        """Describe the layout, such as "4 processes (replicate 2, shard 2, tensor 1, expert 1)"."""
        if self.size == 1:
            return "1 process"
        c = self.config
        layout = f"replicate {c.replicate}, shard {self.shard}, tensor {c.tensor}, expert {c.expert}"
        return f"{self.size} processes ({layout})"

    @property
    def first(self) -> bool:
        """Return whether this is process 0."""
        return self.rank == 0

    def shard_model(self, model: Model, dtype: torch.dtype) -> None:
        """Replace each parameter by this process's shard of it. dtype: autocast's, in which products are computed.

        Raises UserError if the layout does not fit the model.
        """
        c, blocks = self.config, blocks_to_shard(model)
        mixtures = [experts for block in blocks for experts in block.expert_layers().values()]
        for experts in mixtures:
            experts.capacity = c.capacity
        if self.size == 1:
            return
        if c.tensor > 1:
            for block in blocks:
                _check_divisors(block.divided_counts(), c.tensor, "tensor")
                block.split(self.mesh["tensor"])
        if c.expert > 1:
            if c.tensor > 1:
                raise UserError("settings parallel.tensor and parallel.expert are both above 1, expected one of them")
            require(len(mixtures) > 0, "setting parallel.expert", c.expert, "1 for a model without experts")
            for experts in mixtures:
                _check_divisors(experts.divided_counts(), c.expert, "expert")
                experts.split_by_expert(self.expert_mesh["expert"])
        narrow = None if dtype == torch.float32 else dtype

        def shard(module: nn.Module, mesh: DeviceMesh, parts: int, dtype: torch.dtype | None, ignored: set) -> None:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(
                module, mesh=mesh["replicate", "shard"] if c.replicate > 1 else mesh["shard"], mp_policy=policy,
                # Stacked weights [E, …] are cut along their second axis: E may be less than the number of processes.
                shard_placement_fn=lambda p: Shard(1 if p.ndim == 3 and p.shape[1] % parts == 0 else 0),
                ignored_params=ignored,
            )  # fmt: skip
            cast(FSDPModule, module).set_gradient_divide_factor(1.0)
            cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)  # gloo knows no other

        # The root comes first, or the parameters that a block ignores would belong to no group.
        matrices = {parameter for block in blocks for parameter in block.autocast_weights().values()}
        shard(model, self.mesh, self.shard, None, matrices)
        register_fsdp_forward_method(model, "document_losses")
        for experts in mixtures if c.expert > 1 else ():
            own = {parameter for name, parameter in experts.named_parameters() if name in experts.shard_axes()}
            ignored = set(experts.parameters()) - own
            shard(experts, self.expert_mesh, self.shard // c.expert, narrow, ignored)
        for block in blocks:
            others = set(block.parameters()) - set(block.autocast_weights().values())
            shard(block, self.mesh, self.shard, narrow, others)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place; equal values within a tensor group count once."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.config.tensor
        return values

    def square_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return this process's part of Σ g², fp32 []; `sum` makes it the square of the norm of all gradients."""
        locals_, shares = [], []
        for gradient in gradients:
            locals_.append(local_part(gradient))
            shares.append(self.config.tensor * _shards(gradient) / self.size)
        norms = torch._foreach_norm(locals_)
        # Scalars need no copy to the device, which would make the host wait.
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
        """Return the result of `work`; if it fails on any process, all raise the error of the first such process."""
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
        """Run `work` on the first process; return its result, or raise its error, on all."""
        result = self.together(lambda: work() if self.first else None)
        return self.gather(result)[0]

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):  # other processes may have ended
                dist.destroy_process_group()


def _shards(x: Tensor) -> int:
    """Return the number of different shards of a tensor."""
    if not isinstance(x, DTensor):
        return 1
    return math.prod(n for n, place in zip(x.device_mesh.shape, x.placements) if not place.is_replicate())


def _check_divisors(counts: Mapping[str, int], parts: int, name: str) -> None:
    for field, count in counts.items():
        require(count % parts == 0, f"setting parallel.{name}", parts, f"a divisor of the {count} {field}")
