"""Time the implementations of one computation, and make and print the row of a record."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from mm1.autotune import gpu_state
from mm1.autotune.clock import Call
from mm1.bench.record import Row
from mm1.bench.roofline import floor
from mm1.bench.timing import CONTROL, interleaved, noise, ratio, summary
from mm1.kernels.dispatch import Cost


def timed(
    row: Row, calls: dict[str, Call], cost: Cost, limits: dict[str, Any], *,
    failed: Mapping[str, str], errors: Mapping[str, float],
    fault: Callable[[str, float], str | None], facts: Callable[[str, float], dict[str, Any]],
    rounds: int | None = None, budget: float = 1.0,
) -> Row:  # fmt: skip
    """Return the row with the times of all calls, and their ratios to the times of "mm1", which comes first.

    failed, errors: reasons of implementations that failed before, and rms errors of the others. fault(name, median):
    the reason why a time is refused, or None. facts(name, median): further fields of a variant.
    """
    with gpu_state.watch() as gpu:
        samples = interleaved(calls, rounds=rounds, budget=budget, control="mm1" in calls)
    failed, variants = {**failed, **samples.failed}, {}
    for name, seconds in samples.seconds.items():
        median = statistics.median(seconds)
        if why := fault(name, median):
            failed[name] = why
            continue
        v = {**summary(seconds), "samples": seconds, "error": errors.get(name), **facts(name, median)}
        if "mm1" in variants and name != CONTROL:
            v["ratio"] = ratio(seconds, samples.seconds["mm1"])
        variants[name] = v
    row = row | {"flops": cost.flops, "bytes": cost.bytes, "floor": floor(cost, row["dtype"], limits)}
    row |= {"noise": noise(samples), "variants": variants, "failed": failed}
    return row if row["mode"] == "host" else row | {"gpu": gpu}


def show(row: Row) -> None:
    """Print a row: a line for its case, and one for each implementation."""
    graph = "  as a graph" * (row["mode"] == "graph")
    spread = "" if row["noise"] is None else f"  ± {row['noise']:.1%}"
    print(f"{row.get('op') or row['model']}  {row['case']}  {row['dtype']}  {row['what']}{graph}{spread}")
    share, rate = ("bandwidth_share", "copying's") if row["what"] == "decode" else ("share", "the roofline's")
    base = "mm1's" if "mm1" in row["variants"] else "the first's"
    for name, v in row["variants"].items():
        if name != CONTROL:
            tokens = f"  {v['tokens_per_s']:9.0f} tokens/s" if "tokens_per_s" in v else ""
            part = f"  {v[share]:4.0%} of {rate} rate" if share in v else f"  MFU {v['mfu']:.1%}" if "mfu" in v else ""
            r = v.get("ratio")
            times = f"  {r['median']:6.2f} × {base}  ({r['low']:.2f} … {r['high']:.2f})" if r else ""
            print(f"    {name:24} {1e3 * v['median']:10.4f} ms  ({1e3 * v['low']:.4f} … {1e3 * v['high']:.4f})"
                  f"{tokens}{part}{times}")  # fmt: skip
    for name, why in row["failed"].items():
        print(f"    {name:24} {why}")
    print(end="", flush=True)
