"""Time kernels and their peers in turns, after checking each way against wider arithmetic.

On a GPU caches are cold at each call. Short calls are also timed as CUDA graphs, in a row of their own ("graph") with
the ways that can be captured. On a CPU caches are warm, and ratios are what counts.
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
from mm1.bench.ops import OPS, Leaves, Maker
from mm1.bench.peers import COMPILED, PEERS, Peer, Way, missing
from mm1.bench.record import Record, Row
from mm1.bench.roofline import DTYPES, ceilings, floor, impossible
from mm1.bench.timing import CONTROL, Samples, interleaved, noise, ratio, reason, summary
from mm1.errors import UserError
from mm1.kernels.dispatch import Cost

WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
# rms error of one product: bf16 rounds to 1.7e-3, fp16 to 2e-4, fp32 to 3e-8
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LOOSE = 5  # times as wrong as this project may a peer be
LAUNCHES = 200e-6  # seconds; in shorter calls the time of launches may be visible
BUDGET = {"cuda": 0.4, "cpu": 4.0}  # seconds a row
DIRECTIONS = ("forward", "forward+backward")
ENERGY = 0.15  # seconds of calls to count energy over, in which the counter moves a dozen times


def measure(
    record: Record,
    ops: Sequence[str] = (),
    *,
    shapes: Sequence[str] = (),
    dtype: str | None = None,
    peers: Sequence[str] = (),
    budget: float | None = None,
    seconds: float = float("inf"),
) -> bool:
    """Append a row for each op × case × direction and print it; return whether this project was right in all.

    ops, peers: names, all if there are none. shapes: parts of the cases' names. budget: seconds a row. seconds: limit
    in all, after which remaining cases are skipped. Raises UserError for unknown names.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = dtype or ("bf16" if device == "cuda" else "fp32")
    _known("op", ops, OPS)
    _known("dtype", [name], DTYPES)
    _known("peer", peers, [peer.name for peer in PEERS])
    cases = [(op, case) for op, case in ordered(ops, device) if not shapes or any(part in case for part in shapes)]
    if not cases:
        raise UserError(f"bench kernels: no case is called like {', '.join(shapes)}")
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
                _print(row, gpu=device == "cuda")
    return right


def _known(what: str, names: Sequence[str], known: Any) -> None:
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"bench kernels: unknown {what} {unknown[0]!r}; known: {', '.join(known)}")


def ordered(ops: Sequence[str], device: str) -> list[tuple[str, str]]:
    """Return (op, case): the most informative case of each op, then the second ones, …"""
    turns = zip_longest(*([(op, case) for case in OPS[op].cases[device]] for op in ops or OPS))
    return [pair for turn in turns for pair in turn if pair is not None]


class Bench:
    """Holds one op at one size: its ways, and the reasons why others are left out."""

    def __init__(self, op: str, case: str, device: str, dtype: str, peers: Sequence[Peer], limits: dict[str, Any]):
        self.problem = OPS[op].problem(Maker(device, DTYPES[dtype]), *OPS[op].cases[device][case])
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
        """Return the result and the gradients by name; only the result for an op without backward."""
        if not self.backward:
            return {"y": way.packed(torch.no_grad()(way.run)(way.leaves))}
        leaves = _given(way)
        y = way.run(leaves)
        spread = way.spread(dy.to(y.dtype))
        found = torch.autograd.grad(y, list(leaves.values()), spread, allow_unused=True)
        return {"y": way.packed(y.detach()), **{n: g for n, g in zip(leaves, found) if g is not None}}

    def _try(self, peer: Peer, op: str) -> str | None:
        """Add the peer if its results are right; else return the reason."""
        try:
            way = peer.ways[op](self.problem)
            if way.same:
                found = self._results(way, self.dy)
                self.errors[peer.name] = max(rms_error(found[name], self.truth[name]) for name in found)
        except Exception as error:
            return reason(error)
        limit = TOLERANCE[DTYPES[self.dtype]] * self.problem.tolerance * (1 if peer.name == "mm1" else LOOSE)
        if way.same and not self.errors[peer.name] <= limit:
            return f"wrong by {self.errors[peer.name]:.1g} of rms"
        self.ways[peer.name] = way
        return None

    def rows(self, budget: float) -> Iterator[Row]:
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
        costs = [self.problem.cost(backward) for backward in (False, True)[: 1 + (what != "forward")]]
        cost = Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))
        with gpu_state.watch() as gpu:
            samples = interleaved(calls, budget=budget, control="mm1" in calls)
        failed = {**self.failed, **(failed or {}), **samples.failed}
        if "mm1" in samples.seconds and (why := self._after(samples, cost)):
            failed["mm1"] = why
        taken = {name: seconds for name, seconds in samples.seconds.items() if name not in failed}
        ours = taken.get("mm1")
        least = floor(cost, self.dtype, self.limits)
        variants = {}
        for name, seconds in taken.items():
            found = variants[name] = {**summary(seconds), "samples": seconds, "error": self.errors.get(name)}
            if ours is not None and name not in ("mm1", CONTROL):
                found["ratio"] = ratio(seconds, ours)
            if self.device == "cuda" and name != CONTROL:
                found |= {"share": least / found["median"], **_aside(calls[name])}
        row = {**self.row, "what": what, "mode": mode, "flops": cost.flops, "bytes": cost.bytes, "floor": least,
               "noise": noise(samples), "variants": variants, "failed": failed}  # fmt: skip
        return row | ({"gpu": gpu} if self.device == "cuda" else {})

    def _after(self, samples: Samples, cost: Cost) -> str | None:
        """Return what is wrong with this project's figures: changed results, or an impossible time; or None."""
        again = self._results(self.ways["mm1"], self.dy)
        if any(rms_error(again[name], self.truth[name]) > 2 * self.errors["mm1"] for name in again):
            return "results changed while they were timed"
        median = summary(samples.seconds["mm1"])["median"]
        if self.device == "cpu":
            return None  # where caches are warm
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        if impossible(median, cost, self.dtype, self.limits, l2):
            return (
                f"{floor(cost, self.dtype, self.limits) / median:.0%} of what this GPU can do: counted or timed wrongly"
            )
        return None


def _given(way: Way) -> Leaves:
    return {name: leaf.detach().requires_grad_() if leaf.is_leaf and not isinstance(leaf, torch.nn.Parameter)
            else leaf for name, leaf in way.leaves.items()}  # fmt: skip


def _call(way: Way, what: str, dy: Tensor) -> Call:
    if what == "forward":
        return torch.no_grad()(partial(way.run, way.leaves))
    leaves = _given(way)
    given = list(leaves.values())
    with torch.no_grad():
        y = way.run(leaves)
    spread = way.spread(dy.to(y.dtype)) if way.same else torch.randn_like(y)
    return lambda: torch.autograd.grad(way.run(leaves), given, spread, allow_unused=True)


def _graphs(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    graphs, failed = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = capture(call).replay
        except Exception as error:
            failed[name] = f"not captured: {reason(error)}"
    return graphs, failed


def _aside(call: Call) -> dict[str, Any]:
    """Return seconds until the host is free again, and joules a call if the GPU reports them."""
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


def rms_error(found: Tensor, truth: Tensor) -> float:
    """Return the rms of the difference relative to that of the truth."""
    if not truth.numel():
        return 0.0
    truth = truth.reshape(found.shape)
    scale = truth.double().square().mean().sqrt()
    return float((found.double() - truth.double()).square().mean().sqrt() / scale.clamp(min=1e-30))


def _print(row: Row, gpu: bool) -> None:
    variants, noisy = row["variants"], row["noise"]
    spread = "" if noisy is None else f"  ± {noisy:.1%}"
    print(f"{row['op']}  {row['case']}  {row['dtype']}  {row['what']}{'  as a graph' if row['mode'] == 'graph' else ''}"
          f"{spread}")  # fmt: skip
    for name, v in variants.items():
        if name == CONTROL:
            continue
        share = f"  {v['share']:5.0%} of the floor's rate" if gpu else ""
        r = v.get("ratio")
        times = "" if r is None else f"  {r['median']:6.2f} × mm1's  ({r['low']:.2f} … {r['high']:.2f})"
        print(
            f"    {name:24} {1e6 * v['median']:10.1f} µs  ({1e6 * v['low']:.1f} … {1e6 * v['high']:.1f}){share}{times}"
        )
    for name, why in row["failed"].items():
        print(f"    {name:24} {why}")
    print(end="", flush=True)
