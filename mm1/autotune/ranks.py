"""Tune in many processes: rank 0 measures, all ranks get its rows, and check that they will choose the same.

Ranks with different configurations would compute different bits, and wait for the slowest. The process group uses gloo
with its own time limit, because training's is shorter than a search.
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
    """Yield a group of the processes that torchrun started, or None for a single process. limit: seconds to wait."""
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


def on_all_ranks(work: Callable[[], Any], group: Any) -> list[Any]:
    """Run `work` on every rank and return all results by rank.

    Raises TuneError on every rank if it fails on one, so that no rank waits for another.
    """
    if group is None:
        return [work()]
    result = error = None
    try:
        result = work()
    except Exception as failure:
        error = f"rank {dist.get_rank(group)}: {type(failure).__name__}: {failure}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, error), group)
    if errors := [error for _, error in outcomes if error]:
        raise TuneError("; ".join(errors))
    return [result for result, _ in outcomes]


def on_rank_0(work: Callable[[], Any], group: Any) -> Any:
    """Run `work` on rank 0 and return its result on every rank. Raises TuneError on every rank if it fails."""
    return on_all_ranks(work if group is None or dist.get_rank(group) == 0 else lambda: None, group)[0]


def expect_consistent(tunables: list[Tunable], device: Device, group: Any) -> str:
    """Return the digest of the rows in use. Raises TuneError with the ranks whose digest differs from rank 0's."""
    clear_caches()
    first, *others = on_all_ranks(lambda: digest(tunables, device), group)
    if different := [rank for rank, other in enumerate(others, 1) if other != first]:
        raise TuneError(f"ranks {different} have other configurations than rank 0: tune again, or empty their caches")
    return first
