"""List the libraries that can compute a mixture of experts.

All of them compute y = Σ_k weight[t, k] · (silu(x gateᵀ) · (x upᵀ)) downᵀ from x [T, D], a Routing, gate_up [E, 2F, D]
and down [E, D, F] of one dtype. "mm1" is this project's own implementation; the others serve for comparison.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.errors import UserError
from mm1.kernels.dispatch import FLOATS, READ
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.routing import Routing

Backend = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]  # (x, routing, gate_up, down) -> y [T, D]


class Library(NamedTuple):
    """Describe one implementation: dtypes and devices that it supports, and the package that it lacks."""

    compute: Backend
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] = ("cpu", "cuda", "meta")
    missing: Callable[[], str | None] = lambda: None  # returns the package to install, or None


def find(name: str) -> Backend:
    """Return the implementation with this name, which can be pickled. Raises UserError if it is unknown or missing."""
    if name not in BACKENDS:
        raise UserError(f"moe_backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if package := BACKENDS[name].missing():
        raise UserError(f'moe_backend "{name}" needs {package}')
    return partial(_run, name)


def _run(name: str, x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    library = BACKENDS[name]
    if x.device.type not in library.devices or x.dtype not in library.dtypes:
        raise UserError(
            f'moe_backend "{name}" got {x.dtype} on {x.device.type}, expected '
            f"{' or '.join(map(str, library.dtypes))} on {' or '.join(library.devices)}"
        )
    return library.compute(x, routing, gate_up, down)


def _mm1(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    return moe_mlp(x, r.index, r.weight, gate_up, down, order=r.order)


def _torch(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    slots, position, offsets = r.order
    # Rows past the last offset, of results and gradients, are uninitialised: mask them wherever they are read.
    valid = torch.arange(len(slots), device=x.device)[:, None] < offsets[-1]
    rows = torch.where(valid, x[slots // position.shape[1]], 0)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    y = torch.where(valid, y, 0)[position.long()]
    return (y.float() * r.weight[..., None]).sum(1).to(x.dtype)


def _megablocks(x: Tensor, r: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    grouped, ops = import_module("megablocks.grouped_gemm_util"), import_module("megablocks.ops")
    K, E = r.index.shape[1], len(down)
    with torch.no_grad():
        index = r.index.flatten()
        bin_ids, order = ops.sort(index, E.bit_length())  # padding has index E
        counts = ops.histogram(index, E)
        bins = ops.inclusive_cumsum(counts, 0).reshape(-1)  # with one expert it has no dimension
        sizes = counts.cpu().long()  # megablocks' grouped GEMM takes them on the host
    rows = ops.gather(x, order, bin_ids, bins, K)
    gate, up = grouped.ops.gmm(rows, gate_up, sizes, trans_b=True).chunk(2, dim=-1)
    y = grouped.ops.gmm(F.silu(gate) * up, down, sizes, trans_b=True)
    return ops.scatter(y, order, bin_ids, r.weight.flatten(), bins, K)


def _megablocks_missing() -> str | None:
    try:
        grouped = import_module("megablocks.grouped_gemm_util")
    except ImportError as error:
        return f"megablocks: pip install megablocks ({error})"
    return None if grouped.grouped_gemm_is_available() else "grouped_gemm: pip install grouped_gemm"


BACKENDS = {
    "mm1": Library(_mm1, READ),
    "torch": Library(_torch, FLOATS),
    "megablocks": Library(_megablocks, (torch.bfloat16,), ("cuda",), _megablocks_missing),
}
