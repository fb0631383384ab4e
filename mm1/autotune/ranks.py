"""Many processes, one choice: rank 0 tunes, all get its rows, and all prove that they will choose alike.

Ranks that chose apart would give other bits, and wait for one another where one is slower. The group is of gloo, with a
time limit of its own: training's is shorter than a search.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mm1.kernels.device import Device
from mm1.kernels.tuning import Tunable, TuneError, digest, forget


@contextmanager
def group(limit: float):
    """The processes that torchrun started, or None where there is but one. limit: seconds one waits for another."""
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
    """What `work` gives on rank 0; TuneError on every rank if it fails there."""
    if group is None:
        return work()
    found: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            found[0] = work()
        except Exception as error:
            found[1] = f"rank 0: {type(error).__name__}: {error}"
    dist.broadcast_object_list(found, 0, group)
    if found[1] is not None:
        raise TuneError(found[1])
    return found[0]


def on_all_ranks(work: Callable[[], None], group: Any) -> None:
    """Do it on each; TuneError on every rank if it fails on one, so that none waits for another."""
    mine, errors = None, [None] * dist.get_world_size(group)
    try:
        work()
    except Exception as error:
        mine = f"rank {dist.get_rank(group)}: {type(error).__name__}: {error}"
    dist.all_gather_object(errors, mine, group)
    if failed := [error for error in errors if error]:
        raise TuneError("; ".join(failed))


def expect_consistent(tunables: list[Tunable], device: Device, group: Any) -> str:
    """The digest of the rows in use, if all ranks have the same; TuneError names those that differ."""
    forget()
    mine = digest(tunables, device)
    if group is None:
        return mine
    all_of_them: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of_them, mine, group)
    if differ := [rank for rank, theirs in enumerate(all_of_them) if theirs != all_of_them[0]]:
        raise TuneError(f"ranks {differ} have other configurations than rank 0: tune again, or empty their caches")
    return mine
