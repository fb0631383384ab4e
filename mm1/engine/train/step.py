"""Compute one training step: micro-batches forward and backward, sums over processes, clipping, AdamW.

A step reads nothing back from the device: the device itself decides whether the gradients are finite and AdamW changes
anything. The host reads the results while the next step runs, so that a GPU never waits for the host.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm1.engine.data.batch import Batch
from mm1.engine.data.feed import Feed
from mm1.engine.train.config import Train
from mm1.engine.train.state import TrainingState

COUNTS = ("tokens", "targets", "images", "stop", "interrupted", "saved", "data", "norm")  # follow the model's sums


class Observer:
    """Define callbacks for the stages of a step, in the order in which they are called. A subclass overrides some."""

    def step_begins(self, step: int) -> None:
        """Run before a step. step: its number, from 1."""

    def batch_awaited(self) -> None:
        """Run before a micro-batch is requested."""

    def batch_drawn(self, batch: Batch) -> None:
        """Run after the micro-batch arrived, before its forward and backward pass."""

    def gradients_complete(self) -> None:
        """Run when parameters have the gradients of all micro-batches, summed over target tokens."""

    def step_ends(self, result: "StepResult") -> None:
        """Run when all work of the step is launched; a GPU may not have finished it."""


@dataclass
class MicroBatches:
    """Hold the sums over the micro-batches of a step on this process."""

    totals: Tensor | None = None  # fp64 [sums], on the device
    per: dict[str, str] = field(default_factory=dict)  # the model's sums and their divisors
    counts: Tensor | None = None  # the model's
    tokens: int = 0
    targets: int = 0
    images: int = 0
    digest: int = 0  # sum of the batches' checksums
    keys: list[str] = field(default_factory=list)  # of the documents
    waited: float = 0.0  # seconds for data


@dataclass(frozen=True)
class StepResult:
    """Hold the results of a step; on a GPU they may not be ready yet."""

    step: int
    values: Tensor  # the named sums, COUNTS and the model's counts, on the host once `arrived`
    arrived: Any  # CUDA event, or None
    per: dict[str, str]  # the model's sums by name, and the divisor of each: "targets" or "batches"
    counts_shape: torch.Size
    keys: list[str]  # of its documents on this process
    data_before: dict[str, Any]  # this process's data position before the step
    host: dict[str, Any]  # metrics that are computed on the host

    @property
    def sums(self) -> dict[str, float]:
        """Return the model's sums and COUNTS by name. Waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip((*self.per, *COUNTS), self.values.tolist()))

    @property
    def counts(self) -> Tensor:
        """Return the model's counts, fp64 on the CPU, summed over the step; read `sums` first, which waits for them."""
        return self.values[len(self.per) + len(COUNTS) :].view(self.counts_shape)


def run_micro_batches(
    state: TrainingState, feed: Feed | Iterator[Batch], count: int, dtype: torch.dtype, observers: Sequence[Observer]
) -> MicroBatches:
    """Draw `count` micro-batches, and add the gradients of their objectives to those of the parameters.

    dtype: autocast's; fp32 turns autocast off. Raises ValueError if the model's sums lack "loss" or clash with COUNTS.
    """
    done, device = MicroBatches(), state.world.device
    for _ in range(count):
        for observer in observers:
            observer.batch_awaited()
        asked = time.perf_counter()
        batch = next(feed)
        done.waited += time.perf_counter() - asked
        for observer in observers:
            observer.batch_drawn(batch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = state.model(batch)
        if "loss" not in losses.sums or losses.sums.keys() & set(COUNTS):
            raise ValueError(
                f'{type(state.model).__name__} returned the sums {", ".join(losses.sums)}, expected "loss" among '
                f"them and none of the trainer's own {', '.join(COUNTS)}"
            )
        losses.objective.backward()
        totals = torch.stack([part.total for part in losses.sums.values()]).detach().double()
        done.totals = totals if done.totals is None else done.totals + totals
        done.counts = losses.counts if done.counts is None else done.counts + losses.counts
        done.per = {name: part.per for name, part in losses.sums.items()}
        done.tokens += batch.used_tokens
        done.targets += batch.target_count
        done.images += len(batch.media.grids.sizes or ())
        done.digest += batch.digest
        done.keys += batch.keys
    return done


def sum_and_update(
    state: TrainingState, done: MicroBatches, t: Train, rate: float, flags: Sequence[bool]
) -> tuple[Tensor, Any, torch.Size]:
    """Sum over the processes, clip the gradients and apply AdamW; a bad step leaves the weights unchanged.

    rate: learning rate. flags: "stop", "interrupted" and "saved" of this process. Returns the values of a StepResult,
    the event of their arrival on the host or None, and the shape of the model's counts.
    """
    world = state.world
    assert done.totals is not None
    assert done.counts is not None
    gradients = state.local_gradients()
    # Filled on the device, because the host would wait for a copy from its pageable memory.
    counts = [
        torch.full((), count, dtype=torch.float64, device=world.device)
        for count in (done.tokens, done.targets, done.images, *flags, done.digest)
    ]
    square = world.square_norm(p.grad for p in state.model.parameters() if p.grad is not None)
    values = world.sum(
        torch.cat([done.totals, torch.stack(counts), square.double()[None], done.counts.flatten().double()])
    )
    loss, targets, norm = ([*done.per, *COUNTS].index(name) for name in ("loss", "targets", "norm"))
    # Gradients were summed over target tokens; dividing by the tokens of all processes gives the mean of the step.
    mean = 1 / values[targets].clamp(min=1)
    values[norm] = norm_of_mean = values[norm].sqrt() * mean
    bad = ~(values[loss] + norm_of_mean).isfinite() | (values[targets] == 0)
    factor = torch.where(bad, 0.0, mean * (t.clip / (norm_of_mean + 1e-6)).clamp(max=1))
    torch._foreach_mul_(gradients, factor.float())
    state.update(rate, bad)
    arrived = None
    if world.device.type == "cuda":
        values = values.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(world.device).record_event()
    return values, arrived, done.counts.shape
