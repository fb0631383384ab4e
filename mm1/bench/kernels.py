"""Time kernels and their peers in alternating rounds, after checking each against arithmetic in a wider dtype.

On a GPU caches are cold at each call. Short calls are also timed as CUDA graphs, in a row of their own with the mode
"graph" and those implementations that can be captured. On a CPU caches are warm, and only ratios are meaningful.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from mm1.autotune import gpu_state
from mm1.autotune.clock import Call, capture
from mm1.autotune.space import Inputs
from mm1.bench.ops import OPS, Leaves
from mm1.bench.peers import COMPILED, PEERS, Peer, Way, missing
from mm1.bench.record import Record, Row
from mm1.bench.roofline import DTYPES, ceilings, floor, impossible
from mm1.bench.rows import show, timed
from mm1.bench.timing import CONTROL, reason
from mm1.errors import UserError
from mm1.kernels.dispatch import Cost

WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Maximum rms error of one product. Rounding alone gives 1.7e-3 in bf16, 2e-4 in fp16 and 3e-8 in fp32.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LOOSE = 5  # factor by which a peer's error may exceed the limit for mm1
LAUNCHES = 200e-6  # seconds; shorter calls may wait for their launches, and are timed as graphs too
BUDGET = {"cuda": 0.4, "cpu": 4.0}  # seconds per row
DIRECTIONS = ("forward", "forward+backward")
ENERGY = 0.15  # seconds of calls for a measurement of energy, in which the counter is updated a dozen times


def measure(
    record: Record, ops: Sequence[str] = (), *, shapes: Sequence[str] = (), dtype: str | None = None,
    peers: Sequence[str] = (), budget: float | None = None, seconds: float = float("inf"),
) -> bool:  # fmt: skip
    """Add and print a row for each op, case and direction; return whether mm1's results are right in all of them.

    ops, peers: names (empty: all). shapes: parts of the names of cases. budget: seconds per row. seconds: total limit,
    after which the remaining cases are skipped. Raises UserError for unknown names.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = dtype or ("bf16" if device == "cuda" else "fp32")
    _expect_names("op", ops, OPS)
    _expect_names("dtype", [name], DTYPES)
    _expect_names("peer", peers, [peer.name for peer in PEERS])
    cases = [(op, case) for op, case in ordered(ops, device) if not shapes or any(part in case for part in shapes)]
    if not cases:
        raise UserError(f"bench kernels: no case has {', '.join(shapes)} in its name")
    chosen = [p for p in PEERS if (p.name in peers if peers else device == "cuda" or p.name not in COMPILED)]
    record.header["ceilings"] = limits = ceilings(device)
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in limits["gemm"].items())
    print(f"{record.header['device']}: memory {limits['copy'] / 1e9:.0f} GB/s; products {rates} TFLOP/s", flush=True)
    end, right = time.monotonic() + seconds, True
    for op, case in cases:
        if time.monotonic() > end:
            break
        last = {"bench": "kernels", "op": op, "case": case, "dtype": name, "what": DIRECTIONS[OPS[op].backward]}
        if record.has(**last):
            continue
        with record.at(**last):
            for row in Bench(op, case, device, name, chosen, limits).rows(budget or BUDGET[device]):
                record.add(row)
                right &= "mm1" in row["variants"]
                show(row)
    return right


def _expect_names(kind: str, names: Sequence[str], choices: Any) -> None:
    if unknown := [name for name in names if name not in choices]:
        raise UserError(f"bench kernels: unknown {kind} {unknown[0]!r}; known: {', '.join(choices)}")


def ordered(ops: Sequence[str], device: str) -> list[tuple[str, str]]:
    """Return pairs (op, case): the most informative case of each op, then the second of each, …"""
    turns = zip_longest(*([(op, case) for case in OPS[op].cases[device]] for op in ops or OPS))
    return [pair for turn in turns for pair in turn if pair is not None]


class Bench:
    """Hold one op at one size: the implementations to time, and why others are not timed."""

    def __init__(self, op: str, case: str, device: str, dtype: str, peers: Sequence[Peer], limits: dict[str, Any]):
        torch.manual_seed(0)
        self.problem = OPS[op].problem(Inputs(device, DTYPES[dtype]), *OPS[op].cases[device][case])
        self.row = {"bench": "kernels", "op": op, "case": case, "shape": self.problem.shape, "dtype": dtype}
        self.device, self.dtype, self.limits, self.backward = device, dtype, limits, OPS[op].backward
        self.failed: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.ways: dict[str, Way] = {}
        self.dy, self.truth = self._truth()
        ours = Peer("mm1", {op: lambda problem: Way(problem.ours, problem.leaves)})
        for peer in [ours, *(peer for peer in peers if op in peer.ways)]:
            if why := missing(peer, device) or self._try(peer, op):
                self.failed[peer.name] = why

    def _truth(self) -> tuple[Tensor, dict[str, Tensor]]:
        wide = WIDE[DTYPES[self.dtype]]
        leaves = {name: leaf.detach().to(wide).requires_grad_() for name, leaf in self.problem.leaves.items()}
        y = self.problem.plain(leaves)
        dy = torch.randn_like(y).to(DTYPES[self.dtype] if y.ndim else y.dtype)
        return dy, self._results(Way(self.problem.plain, leaves), dy.to(y.dtype))

    def _results(self, way: Way, dy: Tensor) -> dict[str, Tensor]:
        """Return the result and the gradients by name, or only the result for an op without backward."""
        if not self.backward:
            return {"y": way.packed(torch.no_grad()(way.run)(way.leaves))}
        leaves = _differentiable(way)
        y = way.run(leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), way.spread(dy.to(y.dtype)), allow_unused=True)
        return {"y": way.packed(y.detach()), **{name: g for name, g in zip(leaves, gradients) if g is not None}}

    def _try(self, peer: Peer, op: str) -> str | None:
        """Add the peer's implementation if its results are right, else return why not."""
        try:
            way = peer.ways[op](self.problem)
            if way.same:
                results = self._results(way, self.dy)
                self.errors[peer.name] = max(rms_error(result, self.truth[name]) for name, result in results.items())
        except Exception as error:
            return reason(error)
        limit = TOLERANCE[DTYPES[self.dtype]] * self.problem.tolerance * (1 if peer.name == "mm1" else LOOSE)
        if way.same and not self.errors[peer.name] <= limit:
            return f"wrong by {self.errors[peer.name]:.1g} of rms"
        self.ways[peer.name] = way
        return None

    def rows(self, budget: float) -> Iterator[Row]:
        """Yield the row of each direction; on a GPU, for short calls, also the row of their CUDA graphs."""
        for what in DIRECTIONS[: 1 + self.backward]:
            calls = {name: _call(way, what, self.dy) for name, way in self.ways.items()}
            row = self._row(what, "stream" if self.device == "cuda" else "host", calls, budget)
            yield row
            if self.device == "cuda" and row["variants"].get("mm1", {}).get("median", 1) < LAUNCHES:
                graphs, failed = _graphs(calls)
                yield self._row(what, "graph", graphs, budget, failed)

    def _row(
        self, what: str, mode: str, calls: dict[str, Call], budget: float, failed: dict[str, str] | None = None
    ) -> Row:
        costs = self.problem.costs[: 1 + (what != "forward")]
        cost = Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))

        def fault(name: str, median: float) -> str | None:
            return self._fault(median, cost) if name == "mm1" else None

        def facts(name: str, median: float) -> dict[str, Any]:
            if self.device == "cpu" or name == CONTROL:
                return {}
            return {"share": floor(cost, self.dtype, self.limits) / median, **_host_and_energy(calls[name])}

        return timed({**self.row, "what": what, "mode": mode}, calls, cost, self.limits, budget=budget, fault=fault,
                     facts=facts, failed={**self.failed, **(failed or {})}, errors=self.errors)  # fmt: skip

    def _fault(self, median: float, cost: Cost) -> str | None:
        """Return what is wrong with mm1's figures, changed results or an impossible time, or None."""
        again = self._results(self.ways["mm1"], self.dy)
        if any(rms_error(again[name], self.truth[name]) > 2 * self.errors["mm1"] for name in again):
            return "results changed while they were timed"
        if self.device == "cpu":
            return None  # caches are warm there
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        if not impossible(median, cost, self.dtype, self.limits, l2):
            return None
        share = floor(cost, self.dtype, self.limits) / median
        return f"{share:.0%} of what this GPU can do: counted or timed wrongly"


def _differentiable(way: Way) -> Leaves:
    return {name: leaf.detach().requires_grad_() if leaf.is_leaf and not isinstance(leaf, torch.nn.Parameter)
            else leaf for name, leaf in way.leaves.items()}  # fmt: skip


def _call(way: Way, what: str, dy: Tensor) -> Call:
    if what == "forward":
        return torch.no_grad()(partial(way.run, way.leaves))
    leaves = _differentiable(way)
    inputs = list(leaves.values())
    with torch.no_grad():
        y = way.run(leaves)
    spread = way.spread(dy.to(y.dtype)) if way.same else torch.randn_like(y)
    return lambda: torch.autograd.grad(way.run(leaves), inputs, spread, allow_unused=True)


def _graphs(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    graphs, failed = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = capture(call).replay
        except Exception as error:
            failed[name] = f"not captured: {reason(error)}"
    return graphs, failed


def _host_and_energy(call: Call) -> dict[str, Any]:
    """Return the seconds until the host is free again, and the joules of a call if the GPU reports them."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    count = 0
    with gpu_state.watch() as gpu:
        while time.perf_counter() - begin < ENERGY:
            call()
            torch.cuda.synchronize()
            count += 1
    return {"host": host, "joules": gpu["joules"] and gpu["joules"] / max(count, 1)}


def rms(x: Tensor) -> float:
    """Return the root of the mean square; 0 for a tensor without elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def rms_error(result: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """Return the rms error relative to `scale` (default: the rms of the truth)."""
    difference = result.double() - truth.reshape(result.shape).double()
    return rms(difference) / max(rms(truth) if scale is None else scale, 1e-30)
