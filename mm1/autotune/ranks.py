"""Tune in many processes: rank 0 measures, all ranks get its rows and check that they will choose alike.

Ranks with different configurations would compute different bits, and wait for the slowest. The process group uses gloo
with its own time limit, as training's is shorter than a search.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mm1.kernels.device import Device
from mm1.kernels.tuning import Tunable, TuneError, clear_caches, digest


@contextmanager
def group(limit: float):
    """Yield a group of the processes that torchrun started, None for a single process. limit: seconds to wait."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_initialized():
        yield None
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
    own: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
    try:
        yield own
    finally:
        if started:
            dist.destroy_process_group()


def on_rank_0(work: Callable[[], Any], group: Any) -> Any:
    """Run `work` on rank 0 and return its result on every rank; raises TuneError on every rank if it fails."""
    if group is None:
        return work()
    outcome: list[Any] = [None, None]  # result, error
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = f"rank 0: {type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, 0, group)
    if outcome[1] is not None:
        raise TuneError(outcome[1])
    return outcome[0]


def on_all_ranks(work: Callable[[], None], group: Any) -> None:
    """Run `work` on every rank; raises TuneError on every rank if it fails on one, so that none waits for another."""
    mine, errors = None, [None] * dist.get_world_size(group)
    try:
        work()
    except Exception as error:
        mine = f"rank {dist.get_rank(group)}: {type(error).__name__}: {error}"
    dist.all_gather_object(errors, mine, group)
    if failed := [error for error in errors if error]:
        raise TuneError("; ".join(failed))


def expect_consistent(tunables: list[Tunable], device: Device, group: Any) -> str:
    """Return the digest of the rows in use; raises TuneError that names the ranks whose digests differ."""
    clear_caches()
    mine = digest(tunables, device)
    if group is None:
        return mine
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, mine, group)
    if differ := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise TuneError(f"ranks {differ} have other configurations than rank 0: tune again, or empty their caches")
    return mine
