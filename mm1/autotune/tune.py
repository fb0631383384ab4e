"""Measure rows of the tables on a GPU, within a limit of seconds, for `mm1 tune`.

For each shape, candidates chosen by the model and at random are compiled in parallel, those with sound code are tried
one by one in a process that may crash, and those with correct results are searched. Trials are logged as they come, so
that a run after one that was cut off skips what was finished.
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from math import log2
from pathlib import Path
from typing import Any

import torch

from mm1.autotune import gpu_state
from mm1.autotune.ranks import expect_consistent, group, on_all_ranks, on_rank_0
from mm1.autotune.search import CANDIDATES, STRAYS, Log, Result, ranked, search, strays
from mm1.autotune.space import DTYPES, KERNELS, chosen, shape_named, short
from mm1.autotune.static import LIMIT, Task, compilers, fault
from mm1.autotune.tables import read_table, row, static_facts, versions, without, write_table, write_user_row
from mm1.autotune.timing import Trial, device_named, run_trial, where
from mm1.autotune.workers import Failed, Workers
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import INTERPRETED, device_of, device_of_index
from mm1.kernels.tuning import Tunable, TuneError, cache_folder, chain

LEAST = 12.0  # seconds for one shape at least: a candidate takes about half a second to be compiled and checked
ENOUGH = 8  # candidates to judge before a shape counts as done
USUAL = 16384  # rows of a training step, whose octave is measured first


def tune(
    names: Iterable[str], budget: float, *, shape: str | None = None, folder: Path | None = None,
    log: Path | None = None, processes: int = os.cpu_count() or 1, bits: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Measure on the GPU at hand for `budget` seconds, and return a report.

    A row is written wherever a configuration beats the default, or the default beats the row in use: among the user's
    own rows, or into the tables of `folder`. Under torchrun rank 0 measures, and all ranks get its rows.
    """
    tunables, device = chosen(names), _here()
    wanted = [(t, shape_named(t, shape)) for t in tunables] if shape else list(_by_importance(tunables))

    def keep(kernel: str, source: dict[str, Any]) -> None:
        if folder is None:
            write_user_row(KERNELS[kernel].tunable, device, source)
        else:
            others = without(read_table(folder, kernel, device), source)
            write_table(folder, kernel, device, [*others, source])

    with group(budget + 600) as ranks:

        def measure() -> dict[str, Any]:
            with _Session(device, bits, log, processes) as session:
                return session.measure(wanted, budget, keep)

        report = on_rank_0(measure, ranks)
        if ranks is not None:

            def write() -> None:
                for source in report["rows"]:
                    keep(source["kernel"], {k: v for k, v in source.items() if k != "kernel"})

            writes = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one process a machine; rank 0 has done it already
            on_all_ranks(write if writes and torch.distributed.get_rank(ranks) else lambda: None, ranks)
            report["digest"] = expect_consistent(tunables, device, ranks)
    return report


def _here() -> Device:
    if where() == "cuda":
        return device_of_index(None)
    if not INTERPRETED:
        raise TuneError("no GPU here: `--static --device NAME` predicts rows without one")
    return replace(device_of(torch.empty(0)), name="interpreted")  # rows under this name are never looked up


def _by_importance(tunables: list[Tunable]) -> Iterator[tuple[Tunable, Any]]:
    """Yield the first shape of each kernel, the second of each, …"""
    for some in zip_longest(*([(t, s) for s in _shapes_of(t)] for t in tunables)):
        yield from (pair for pair in some if pair)


def _shapes_of(tunable: Tunable) -> list[Any]:
    """Return a kernel's shapes, two layers after the other: MM1's first; of each the usual number of rows first."""
    shapes = list(KERNELS[tunable.kernel].shapes())
    rank = {key: i for i, key in enumerate(dict.fromkeys(s[1:] for s in shapes))}
    return sorted(shapes, key=lambda s: (rank[s[1:]] // 2, abs(log2(s[0] / USUAL)), rank[s[1:]]))


class _Session:
    """Holds what stays the same from shape to shape: the device, the log, the processes."""

    def __init__(self, device: Device, bits: int, log: Path | None, processes: int):
        self.device, self.bits, self.dtype = device, bits, DTYPES[bits]
        self.log = Log(log or cache_folder().parent / "tune" / f"{device.name}.jsonl")
        self.trials, self.compilers = Workers(partial(run_trial, on=where()), 1, LIMIT), compilers(processes)
        self.compiles = device.name in DEVICES and not INTERPRETED  # else that is done when it is tried
        self.signals: list[int] = []
        self.seen: set[Any] = set()  # of this shape, what was timed or failed

    def __enter__(self) -> "_Session":
        catch = lambda number, _: self.signals.append(number)  # noqa: E731
        self.handlers = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.trials.close()
        self.compilers.close()

    def stopped(self) -> bool:
        return bool(self.signals)

    def fields(self, tunable: Tunable, shape: Any) -> dict[str, Any]:
        """Return what all events of a shape have in common in the log, also those that an earlier run has written."""
        return {"device": self.device.name, "kernel": tunable.kernel, "shape": list(shape), "bits": self.bits,
                "versions": versions()}  # fmt: skip

    def measure(
        self, wanted: list[tuple[Tunable, Any]], budget: float, keep: Callable[[str, dict[str, Any]], None]
    ) -> dict[str, Any]:
        end, rows, done = time.monotonic() + budget, [], 0
        _print_head(self.device, budget)
        self.trials.start()
        if self.compiles:
            self.compilers.start()
        for i, (tunable, shape) in enumerate(wanted):
            remaining = end - time.monotonic()
            if earlier := self.log.of("result", **self.fields(tunable, shape)):
                source = earlier[-1]["row"]
            elif remaining <= 0 or self.stopped():
                break
            else:
                try:
                    source = self.shape(tunable, shape, min(remaining, max(LEAST, remaining / (len(wanted) - i))))
                except _Unfit as unfit:
                    source = self.failed(tunable, shape, *unfit.args)
                done += 1
            if source is not None:
                keep(tunable.kernel, source)
                rows.append({"kernel": tunable.kernel, **source})
        used = budget - (end - time.monotonic())
        ended = ", stopped" if self.stopped() else ""
        print(f"{done} shapes, {len(rows)} rows; budget {budget:g} s, used {used:.1f} s{ended}")
        return {"device": self.device.name, "seconds": round(used, 1), "shapes": done, "rows": rows,
                "stopped": self.stopped()}  # fmt: skip

    def shape(self, tunable: Tunable, shape: Any, budget: float) -> dict[str, Any] | None:
        """Search one shape for so many seconds; return the row that it ends with, if it ends with one."""
        at = tunable, shape, self.dtype, self.device
        begin, default = time.monotonic(), tunable.default(shape, self.dtype, self.device)
        incumbent = next(a.config for a in chain(*at) if a.config is not None)
        fields, self.seen = self.fields(tunable, shape), set()
        refused = {json.dumps(e["config"]) for e in self.log.of("refused", **fields)}
        some = dict.fromkeys([incumbent, *ranked(*at, CANDIDATES), *strays(*at, STRAYS)])
        some = [c for c in some if c != default and json.dumps(vars(c)) not in refused]
        codes = self.compiled(tunable, shape, [default, *some], begin + 0.3 * budget)
        # Where the default fails, for want of memory perhaps, no other is to blame, and a later run tries again.
        (first,) = self.samples(tunable, shape, [default], 0)
        if isinstance(first, Failed):
            return self.failed(tunable, shape, first)
        wanted, some, judged = [c for c in some if c not in self.seen], [], 0
        for config in (c for c in wanted if c in codes):
            if time.monotonic() >= begin + 0.6 * budget or self.stopped():
                break
            judged += 1
            some += [] if isinstance(self.samples(tunable, shape, [config], 0)[0], Failed) else [config]
        with gpu_state.watch(None) as state:
            result = search(
                some, default, lambda configs, samples: self.samples(tunable, shape, configs, samples),
                budget=begin + budget - time.monotonic(), stopped=self.stopped,
            )  # fmt: skip
        if isinstance(result, Failed):
            return self.failed(tunable, shape, result)
        _print_result(tunable.kernel, shape, result)
        source = None
        failed = incumbent not in result.timed and (incumbent in self.seen or json.dumps(vars(incumbent)) in refused)
        slower = incumbent in result.timed and result.ended == "searched"
        if result.won or (incumbent != default and (failed or slower)):
            facts = {"static": static_facts(codes[result.config], self.device)} if codes.get(result.config) else {}
            source = row(
                shape, self.bits, result.config, "measured", us=_us(result.seconds),
                default_us=_us(result.default_seconds), gain=round(result.gain, 4), noise=round(result.noise, 4),
                **facts, versions=versions(), gpu=_brief(state),
            )  # fmt: skip
        if result.ended != "stopped" and judged >= min(ENOUGH, len(wanted)):
            self.log.add("result", **fields, row=source, tried=result.tried, gpu=state)
        return source

    def failed(self, tunable: Tunable, shape: Any, why: Failed) -> None:
        print(f"{tunable.kernel} {short(shape)}: the default fails: {why.why}", flush=True)
        self.log.add("failed", **self.fields(tunable, shape), why=why.why)

    def compiled(self, tunable: Tunable, shape: Any, configs: list[Any], end: float) -> dict[Any, Any]:
        """Compile configurations; return by configuration the code of those where it is sound and was there in time."""
        if not self.compiles:
            return dict.fromkeys(configs)
        codes = {}
        results = self.compilers.each(
            Task(tunable.kernel, tuple(shape), c, self.bits, self.device.name) for c in configs
        )
        for task, code in results:
            if why := fault(task, code):
                failed = code if isinstance(code, Failed) else Failed(why)
                self.refuse(tunable, shape, task.config, failed)
            else:
                codes[task.config] = code
            if time.monotonic() > end or self.stopped():
                results.close()
        return codes

    def samples(self, tunable: Tunable, shape: Any, configs: list[Any], count: int) -> list[Any]:
        """Return seconds of so many runs of each, in turns. If that fails each runs alone: only the culprit is lost."""
        results = self.trials.one(Trial(tunable.kernel, tuple(shape), self.bits, tuple(configs), count))
        if isinstance(results, Failed) and len(configs) > 1:
            return [self.samples(tunable, shape, [config], count)[0] for config in configs]
        if isinstance(results, Failed):
            results = [self.alone(tunable, shape, configs[0], count, results)]
        for config, result in zip(configs, results):
            if isinstance(result, Failed):
                if config != tunable.default(shape, self.dtype, self.device):
                    self.refuse(tunable, shape, config, result)
            elif result:
                self.seen.add(config)
                fields = {**self.fields(tunable, shape), "config": vars(config)}
                self.log.add("samples", **fields, seconds=[round(s, 9) for s in result])
        return results

    def alone(self, tunable: Tunable, shape: Any, config: Any, count: int, failed: Failed) -> Any:
        """Return what a configuration that failed gives in a process of its own, if that may make a difference.

        What took longer than the limit is not tried again: each time would cost as much. Raises _Unfit where the
        default fails in a new process too: then no configuration is to blame.
        """
        if failed.kind == "task":
            return failed

        def fresh(config: Any, count: int) -> Any:
            self.trials.close()
            self.trials.start()  # whose time is not the trial's
            result = self.trials.one(Trial(tunable.kernel, tuple(shape), self.bits, (config,), count))
            return result if isinstance(result, Failed) else result[0]

        result = failed if failed.kind == "time" else fresh(config, count)
        default = tunable.default(shape, self.dtype, self.device)
        if isinstance(result, Failed) and result.kind in ("process", "time") and config != default:
            control = fresh(default, 0)
            if isinstance(control, Failed):
                raise _Unfit(control)
        return result

    def refuse(self, tunable: Tunable, shape: Any, config: Any, failed: Failed) -> None:
        """Never try it again; but after want of memory do, as there may be more another time."""
        fields = {**self.fields(tunable, shape), "config": vars(config), "why": failed.why}
        if failed.kind == "memory":
            self.log.add("failed", **fields)
        else:
            self.seen.add(config)
            self.log.add("refused", **fields)


class _Unfit(Exception):
    """Says that the default, which ran before, does not run in a new process any more: it is the GPU that fails."""


def _brief(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a row keeps of the GPU's state."""
    after = {name: state["after"].get(name) for name in ("sm_mhz", "memory_mhz", "power_w", "celsius", "driver")}
    return {name: value for name, value in {**after, "throttled": state["throttled"]}.items() if value is not None}


def _us(times: tuple[float, float]) -> list[float]:
    return [round(1e6 * t, 2) for t in times]


def _print_head(device: Device, budget: float) -> None:
    state = gpu_state.read(None)
    clocks = f"{state['sm_mhz']}/{state['memory_mhz']} MHz" if not state.get("note") else state["note"]
    print(f"{device.name}  {device.arch}  {device.units} units  {clocks}  budget {budget:g} s")
    print(f"{'kernel':18} {'default':>10} {'best':>10} {'gain':>6} {'noise':>6}  configuration, shape", flush=True)


def _print_result(kernel: str, shape: Any, result: Result) -> None:
    times = [f"{1e6 * t:8.1f}us" for t in (result.default_seconds[0], result.seconds[0])]
    what = short(result.config) if result.won else "default stays"
    failed = f"  failed: {result.failed}" if result.failed else ""
    print(f"{kernel:18} {' '.join(times)} {result.gain:6.3f} {result.noise:6.3f}  {what}, {short(shape)}"
          f"  ({result.tried} tried, {result.ended}){failed}", flush=True)  # fmt: skip


def main() -> None:
    """Run like `mm1 tune`, but with torch and triton alone installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=float, help="in all")
    parser.add_argument("--out", type=Path, help="folder of tables to write to (default: the user's own rows)")
    parser.add_argument("--sweeps", type=Path, help="folder for the log, <gpu>/sweeps/tune.jsonl (default: the cache)")
    options = parser.parse_args()
    log = options.sweeps and options.sweeps / device_named(None).name / "sweeps" / "tune.jsonl"
    print(json.dumps(tune([], options.seconds, folder=options.out, log=log)))


if __name__ == "__main__":
    main()
