"""Measure rows of the tables on a GPU, within a limit of seconds, for `mm1 tune`.

For each shape, candidates chosen by the cost model and at random are compiled in parallel; those with sound code are
checked one by one in a process that may crash; those with correct results are searched for the fastest. Each trial is
logged at once, so that the run after an interrupted one skips what was finished.
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

LEAST = 12.0  # minimum seconds for a shape: a candidate takes about half a second to be compiled and checked
ENOUGH = 8  # number of candidates to check before a shape counts as done
USUAL = 16384  # rows of a training step; their octave is measured first


def tune(
    names: Iterable[str], budget: float, *, shape: str | None = None, folder: Path | None = None,
    log: Path | None = None, processes: int = os.cpu_count() or 1, bits: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Measure on this machine's GPU for `budget` seconds, and return a report.

    A row is written if a configuration beats the default, or if the default beats the row in use. It goes to the user's
    own rows, or to the tables in `folder`. Under torchrun rank 0 measures, and all ranks get its rows.

    shape: one shape to measure, such as "rows=8192 experts=64 k=2048 n=1408" (None: the shapes of the models). log: the
    file of trials (None: in the user's cache). processes: number that compile at once. bits: per element. Raises
    TuneError for an unknown kernel or shape, and without a GPU.
    """
    tunables, device = chosen(names), this_device()
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

            writes = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one process per machine; rank 0 wrote them already
            on_all_ranks(write if writes and torch.distributed.get_rank(ranks) else lambda: None, ranks)
            report["digest"] = expect_consistent(tunables, device, ranks)
    return report


def this_device() -> Device:
    """Return the device to measure on. Raises TuneError if there is none."""
    if where() == "cuda":
        return device_of_index(None)
    if not INTERPRETED:
        raise TuneError("no GPU here: `--static --device NAME` predicts rows without one")
    return replace(device_of(torch.empty(0)), name="interpreted")  # rows for this name are never looked up


def _by_importance(tunables: list[Tunable]) -> Iterator[tuple[Tunable, Any]]:
    """Yield the most important shape of each kernel, then the second of each, …"""
    for group_of_shapes in zip_longest(*([(t, s) for s in _shapes_of(t)] for t in tunables)):
        yield from (pair for pair in group_of_shapes if pair)


def _shapes_of(tunable: Tunable) -> list[Any]:
    """Return a kernel's shapes: layers in pairs, MM1's first; within a pair, numbers of rows next to USUAL first."""
    shapes = list(KERNELS[tunable.kernel].shapes())
    rank = {key: i for i, key in enumerate(dict.fromkeys(s[1:] for s in shapes))}
    return sorted(shapes, key=lambda s: (rank[s[1:]] // 2, abs(log2(s[0] / USUAL)), rank[s[1:]]))


class _Session:
    """Hold what all shapes share: the device, the log, the processes, and signals to stop."""

    def __init__(self, device: Device, bits: int, log: Path | None, processes: int):
        self.device, self.bits, self.dtype = device, bits, DTYPES[bits]
        self.log = Log(log or cache_folder().parent / "tune" / f"{device.name}.jsonl")
        self.trials, self.compilers = Workers(partial(run_trial, on=where()), 1, LIMIT), compilers(processes)
        self.compiles = device.name in DEVICES and not INTERPRETED  # otherwise a trial compiles its configurations
        self.signals: list[int] = []

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

    def measure(
        self, wanted: list[tuple[Tunable, Any]], budget: float, keep: Callable[[str, dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Measure these shapes for `budget` seconds, keep each row at once, and return a report."""
        end, rows, done = time.monotonic() + budget, [], 0
        _print_head(self.device, budget)
        self.trials.start()
        if self.compiles:
            self.compilers.start()
        for i, (tunable, shape) in enumerate(wanted):
            remaining, work = end - time.monotonic(), _Tuning(self, tunable, shape)
            if earlier := self.log.of("result", **work.fields):
                source = earlier[-1]["row"]
            elif remaining <= 0 or self.stopped():
                break
            else:
                try:
                    source = work.row(min(remaining, max(LEAST, remaining / (len(wanted) - i))))
                except _Unfit as unfit:
                    source = work.default_fails(*unfit.args)
                done += 1
            if source is not None:
                keep(tunable.kernel, source)
                rows.append({"kernel": tunable.kernel, **source})
        used = budget - (end - time.monotonic())
        ended = ", stopped" if self.stopped() else ""
        print(f"{done} shapes, {len(rows)} rows; budget {budget:g} s, used {used:.1f} s{ended}")
        return {"device": self.device.name, "seconds": round(used, 1), "shapes": done, "rows": rows,
                "stopped": self.stopped()}  # fmt: skip


class _Tuning:
    """Tune one kernel at one shape."""

    def __init__(self, session: _Session, tunable: Tunable, shape: Any):
        self.session, self.tunable, self.shape, self.log = session, tunable, shape, session.log
        self.default = tunable.default(shape, session.dtype, session.device)
        # The fields by which the log identifies this shape, also in events of an earlier run.
        self.fields = {"device": session.device.name, "kernel": tunable.kernel, "shape": list(shape),
                       "bits": session.bits, "versions": versions()}  # fmt: skip
        self.seen: set[Any] = set()  # configurations that were timed or refused in this run

    def row(self, budget: float) -> dict[str, Any] | None:
        """Search for `budget` seconds, and return the row to keep, or None for no row."""
        session, at = self.session, (self.tunable, self.shape, self.session.dtype, self.session.device)
        begin, incumbent = time.monotonic(), next(a.config for a in chain(*at) if a.config is not None)
        refused = {json.dumps(e["config"]) for e in self.log.of("refused", **self.fields)}
        candidates = dict.fromkeys([incumbent, *ranked(*at, CANDIDATES), *strays(*at, STRAYS)])
        candidates = [c for c in candidates if c != self.default and json.dumps(vars(c)) not in refused]
        codes = self.compiled([self.default, *candidates], begin + 0.3 * budget)
        # If the default fails, perhaps for want of memory, no candidate is to blame, and a later run tries again.
        (first,) = self.samples([self.default], 0)
        if isinstance(first, Failed):
            return self.default_fails(first)
        wanted, correct, judged = [c for c in candidates if c not in self.seen], [], 0
        for config in (c for c in wanted if c in codes):
            if time.monotonic() >= begin + 0.6 * budget or session.stopped():
                break
            judged += 1
            correct += [] if isinstance(self.samples([config], 0)[0], Failed) else [config]
        with gpu_state.watch(None) as state:
            remaining = begin + budget - time.monotonic()
            result = search(correct, self.default, self.samples, budget=remaining, stopped=session.stopped)
        if isinstance(result, Failed):
            return self.default_fails(result)
        _print_result(self.tunable.kernel, self.shape, result)
        source = None
        failed = incumbent not in result.timed and (incumbent in self.seen or json.dumps(vars(incumbent)) in refused)
        slower = incumbent in result.timed and result.ended == "searched"
        if result.won or (incumbent != self.default and (failed or slower)):
            code = codes.get(result.config)
            facts = {"static": static_facts(code, session.device)} if code else {}
            source = row(
                self.shape, session.bits, result.config, "measured", us=_us(result.seconds),
                default_us=_us(result.default_seconds), gain=round(result.gain, 4), noise=round(result.noise, 4),
                **facts, versions=versions(), gpu=_brief(state),
            )  # fmt: skip
        if result.ended != "stopped" and judged >= min(ENOUGH, len(wanted)):
            self.log.add("result", **self.fields, row=source, tried=result.tried, gpu=state)
        return source

    def default_fails(self, failed: Failed) -> None:
        """Print and log that the default fails."""
        print(f"{self.tunable.kernel} {short(self.shape)}: the default fails: {failed.why}", flush=True)
        self.log.add("failed", **self.fields, why=failed.why)

    def compiled(self, configs: list[Any], end: float) -> dict[Any, Any]:
        """Compile configurations until `end`, and return the code of each whose code is sound."""
        session = self.session
        if not session.compiles:
            return dict.fromkeys(configs)
        codes, kernel, shape = {}, self.tunable.kernel, tuple(self.shape)
        results = session.compilers.each(Task(kernel, shape, c, session.bits, session.device.name) for c in configs)
        for task, code in results:
            if why := fault(task, code):
                self.refuse(task.config, code if isinstance(code, Failed) else Failed(why))
            else:
                codes[task.config] = code
            if time.monotonic() > end or session.stopped():
                results.close()
        return codes

    def samples(self, configs: list[Any], count: int) -> list[Any]:
        """Return the seconds of `count` runs of each configuration, alternating, or Failed.

        If the trial of several fails, each runs in a trial of its own, so that only the cause is lost.
        """
        results = self.trial(configs, count)
        if isinstance(results, Failed) and len(configs) > 1:
            return [self.samples([config], count)[0] for config in configs]
        if isinstance(results, Failed):
            results = [self.alone(configs[0], count, results)]
        for config, result in zip(configs, results):
            if isinstance(result, Failed):
                if config != self.default:
                    self.refuse(config, result)
            elif result:
                self.seen.add(config)
                self.log.add("samples", **self.fields, config=vars(config), seconds=[round(s, 9) for s in result])
        return results

    def trial(self, configs: list[Any], count: int) -> Any:
        """Return the results of one trial, or Failed."""
        session = self.session
        trial = Trial(self.tunable.kernel, tuple(self.shape), session.bits, tuple(configs), count)
        return session.trials.one(trial)

    def alone(self, config: Any, count: int, failed: Failed) -> Any:
        """Return the result of a configuration that failed, in a new process if that may change it.

        One that took longer than the limit is not tried again, because that would cost as much once more. Raises _Unfit
        if the default fails in a new process too: then no configuration is to blame.
        """
        if failed.kind == "task":
            return failed

        def fresh(config: Any, count: int) -> Any:
            self.session.trials.close()
            self.session.trials.start()  # before the trial, so that its time limit does not include the start
            result = self.trial([config], count)
            return result if isinstance(result, Failed) else result[0]

        result = failed if failed.kind == "time" else fresh(config, count)
        if isinstance(result, Failed) and result.kind in ("process", "time") and config != self.default:
            control = fresh(self.default, 0)
            if isinstance(control, Failed):
                raise _Unfit(control)
        return result

    def refuse(self, config: Any, failed: Failed) -> None:
        """Log that a configuration must not be tried again. After want of memory it may be tried in a later run."""
        if failed.kind == "memory":
            self.log.add("failed", **self.fields, config=vars(config), why=failed.why)
        else:
            self.seen.add(config)
            self.log.add("refused", **self.fields, config=vars(config), why=failed.why)


class _Unfit(Exception):
    """Tell that the default, which ran before, fails in a new process: the GPU is broken, not a configuration."""


def _brief(state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the GPU's state that a row keeps."""
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
    times = " ".join(f"{1e6 * t:8.1f}us" for t in (result.default_seconds[0], result.seconds[0]))
    config = short(result.config) if result.won else "default stays"
    failed = f"  failed: {result.failed}" if result.failed else ""
    print(f"{kernel:18} {times} {result.gain:6.3f} {result.noise:6.3f}  {config}, {short(shape)}"
          f"  ({result.tried} tried, {result.ended}){failed}", flush=True)  # fmt: skip


def main() -> None:
    """Run like `mm1 tune`, but with only torch and triton installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=float, help="total seconds to measure")
    parser.add_argument("--out", type=Path, help="folder of tables to write to (default: the user's own rows)")
    parser.add_argument("--sweeps", type=Path, help="folder for the log, <gpu>/sweeps/tune.jsonl (default: the cache)")
    options = parser.parse_args()
    log = options.sweeps and options.sweeps / device_named(None).name / "sweeps" / "tune.jsonl"
    print(json.dumps(tune([], options.seconds, folder=options.out, log=log)))


if __name__ == "__main__":
    main()
