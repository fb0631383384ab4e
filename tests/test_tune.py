"""`mm1 tune`: what is measured, kept, gone on with and told, on a GPU that is made up; tables; many processes."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from mm1 import cli
from mm1.autotune import predict, tables, timing, tune
from mm1.autotune.explain import explain
from mm1.autotune.ranks import expect_consistent, group, on_all_ranks, on_rank_0
from mm1.autotune.space import KERNELS, Kernel
from mm1.autotune.tables import merged, read_table, without, write_table, write_user_row
from mm1.autotune.timing import Trial, run_trial
from mm1.autotune.workers import Failed, Workers
from mm1.kernels import tuning
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import Tunable, TuneError, chain, config_for
from tests import worker_tasks
from tests.conftest import not_interpreted

pytestmark = not_interpreted
ROOT = Path(__file__).parent.parent
BF16 = torch.bfloat16
HERE = replace(DEVICES["h200"], name="made-up")  # compiled when tried, as any GPU that is not in the tables


@dataclass(frozen=True)
class Config:
    block: int = 8


class Shape(NamedTuple):
    rows: int
    width: int
    gated: bool = False


BLOCKS = [16, 32, 64]
TOY = Tunable(
    "toy", Shape, Config, lambda *_: map(Config, BLOCKS), lambda config, *_: config.block <= 64, lambda *_: Config(8),
    lambda config, *_: 1.0 / config.block,
)  # fmt: skip
SHAPES = [Shape(128, 64), Shape(256, 64), Shape(512, 64)]
FAST = {8: 1.0, 16: 0.9, 32: 0.5, 64: 0.8}
calls: list[int] = []


def example(shape, new):
    """y = 2x. Block 16 multiplies by 2.2, 32 never alike, 64 leaves a value out."""
    x = new.floats(shape.rows, shape.width)

    def run():
        block = config_for(TOY, shape, new.dtype, HERE).block
        calls.append(block)
        y = torch.empty_like(x)
        y[1:] = 2.2 * x[1:] if block == 16 else 2 * x[1:]
        if block != 64:
            y[0] = 2 * x[0]
        return y + (len(calls) / 1000 if block == 32 else 0)

    return run


KERNEL = Kernel(TOY, ("_toy_kernel",), False, False, lambda: iter(SHAPES), example)


class Gpu:
    """Takes so many seconds by block, or fails; a block that crashes when it is timed takes its whole batch along.
    then: what happens before a trial."""

    def __init__(self, times=FAST, crashes=(), then=lambda trial: None):
        self.times, self.crashes, self.then, self.trials = times, crashes, then, []

    def one(self, trial):
        self.trials.append(trial)
        self.then(trial)
        if trial.samples and {config.block for config in trial.configs} & set(self.crashes):
            return Failed("the process died with status -11", "process")
        times = [self.times[config.block] for config in trial.configs]
        return [Failed(t) if isinstance(t, str) else [t] * trial.samples for t in times]

    def start(self):
        pass

    def close(self):
        pass

    def tried(self):
        """(rows of the shape, block), how often."""
        return Counter((trial.shape[0], config.block) for trial in self.trials for config in trial.configs)


def terminated(rows, *blocks):
    """At the first timing of these blocks at this shape."""

    def then(trial):
        if trial.samples and trial.shape[0] == rows and {*blocks} <= {config.block for config in trial.configs}:
            os.kill(os.getpid(), signal.SIGTERM)

    return then


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    """Cache and tables of our own, the toy among the kernels, and a GPU of its own kind."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "tables", lambda: tmp_path / "tables")
    monkeypatch.setitem(KERNELS, "toy", KERNEL)
    monkeypatch.setattr(tune, "_here", lambda: HERE)
    monkeypatch.setattr(timing, "_now", [])
    tuning.clear_caches()
    yield
    tuning.clear_caches()


@pytest.fixture
def measured(monkeypatch):
    """`mm1 tune toy` on such a GPU."""

    def run(gpu=None, budget=60.0, **more):
        gpu = gpu or Gpu()
        monkeypatch.setattr(tune, "Workers", lambda function, count, limit: gpu)
        return tune.tune(["toy"], budget, **more)

    return run


def source(rows, block, origin="predicted", width=64, **more):
    return {"when": {"bits": 16, "rows": rows, "width": width, "gated": False}, "config": {"block": block},
            "origin": origin, **more}  # fmt: skip


def answer(rows=100):
    found = next(a for a in chain(TOY, Shape(rows, 64), BF16, HERE) if a.config is not None)
    return found.step, found.config.block


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "cache/tune/made-up.jsonl").read_text().splitlines()]


# --- what is measured ---


def test_what_was_measured_is_what_kernels_run_with(measured):
    found = measured()
    assert (found["device"], found["shapes"], found["stopped"]) == ("made-up", 3, False)
    assert [r["when"]["rows"] for r in found["rows"]] == [[257, 512], [129, 256], [65, 128]]
    assert {answer(rows) for rows in (65, 128, 129, 512)} == {("user", 32)}
    kept = found["rows"][0]
    assert (kept["origin"], kept["us"], kept["default_us"], kept["gain"]) == ("measured", [5e5, 0.0], [1e6, 0.0], 2.0)
    assert config_for(TOY, Shape(100, 64), BF16, HERE) == Config(32)


def test_rows_for_a_folder_go_there_and_not_to_the_user(measured, tmp_path):
    tables = tmp_path / "tables"
    write_table(tables, "toy", HERE, [source([1, 4096], 16), source([1, 4096], 16, width=32)])
    measured(folder=tables, shape="rows=256 width=64")
    assert [answer(rows) for rows in (128, 129, 256, 257)] == [
        ("shipped", 16), ("shipped", 32), ("shipped", 32), ("shipped", 16)
    ]  # fmt: skip
    assert not (tmp_path / "cache/configs").exists()


def test_a_table_says_with_what_its_predictions_were_made(measured, tmp_path):
    older = {"triton": "3.6.0"}
    path = write_table(tmp_path, "toy", HERE, [source([1, 2], 16)], older)
    measured(folder=tmp_path)
    assert json.loads(path.read_text())["versions"] == older
    assert read_table(tmp_path, "toy", HERE)[-1]["versions"] == tables.versions()


def test_where_nothing_beats_the_default_no_row_is_written(measured, tmp_path):
    assert measured(Gpu(dict.fromkeys(FAST, 1.0)))["rows"] == []
    assert answer() == ("default", 8)
    assert [e["row"] for e in log_of(tmp_path) if e["event"] == "result"] == [None] * 3


def test_a_row_in_use_that_is_slower_than_the_default_gives_way_to_it(measured, tmp_path):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 128], 64)])
    assert answer() == ("shipped", 64)
    gpu = Gpu({8: 1.0, 16: 1.2, 32: 1.2, 64: 1.5})
    (kept,) = measured(gpu, shape="rows=128 width=64")["rows"]
    assert (kept["config"], kept["origin"], kept["gain"]) == ({"block": 8}, "measured", 1.0)
    assert answer() == ("user", 8)


def test_so_does_a_row_in_use_that_is_wrong(measured, tmp_path):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 128], 64)])
    times = {8: 1.0, 16: 1.2, 32: 1.2, 64: "wrong by 0.1 of rms"}
    measured(Gpu(times, then=terminated(128, 8)), shape="rows=128 width=64")
    assert answer() == ("user", 8)
    shutil.rmtree(tmp_path / "cache/configs")
    tuning.clear_caches()
    again = Gpu(times)
    measured(again, shape="rows=128 width=64")
    assert not again.tried()[128, 64]
    assert answer() == ("user", 8), "as the stopped run has found"


@pytest.mark.parametrize("why", ["budget", "stopped"])
def test_a_row_in_use_that_was_never_measured_stays(measured, tmp_path, monkeypatch, why):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 128], 64)])
    if why == "stopped":
        measured(Gpu(then=terminated(128, 8)), shape="rows=128 width=64")
    else:
        search = tune.search
        monkeypatch.setattr(tune, "search", lambda *args, **more: search(*args, **{**more, "budget": 0.0}))
        measured(shape="rows=128 width=64")
    assert answer() == ("shipped", 64)


def test_samples_of_a_run_that_was_stopped_do_not_say_that_it_is_slower(measured, tmp_path, monkeypatch):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 128], 64)])
    fast = {8: 1.0, 16: 1.0, 32: 1.0, 64: 0.5}
    assert measured(Gpu(fast, then=terminated(128, 8, 64)), shape="rows=128 width=64")["stopped"]
    search = tune.search
    monkeypatch.setattr(tune, "search", lambda *args, **more: search(*args, **{**more, "budget": 0.0}))
    measured(Gpu(fast), shape="rows=128 width=64")
    assert answer()[1] == 64


def test_nor_do_samples_of_another_shape(measured, tmp_path, monkeypatch):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 512], 64)])
    search, budgets = tune.search, iter([60.0, 60.0, 0.0])
    monkeypatch.setattr(tune, "search", lambda *args, **more: search(*args, **{**more, "budget": next(budgets)}))
    measured(Gpu({8: 1.0, 16: 1.2, 32: 1.2, 64: 1.5}))
    assert [answer(rows) for rows in (512, 256, 128)] == [("user", 8), ("user", 8), ("shipped", 64)]


def test_a_candidate_that_crashes_is_found_and_only_it_is_lost(measured, tmp_path):
    gpu = Gpu(crashes=[32])
    (kept,) = measured(gpu, shape="rows=128 width=64")["rows"]
    assert kept["config"] == {"block": 64}
    refused = [e for e in log_of(tmp_path) if e["event"] == "refused"]
    assert [(e["config"], e["why"]) for e in refused] == [({"block": 32}, "the process died with status -11")]
    assert gpu.tried()[128, 32] == 4, "judged, timed with the others, alone, and alone in a new process"


class Sticky(Gpu):
    """After an error of a kernel each call of the process fails, until another process takes its place."""

    def __init__(self, culprits, **more):
        super().__init__(**more)
        self.culprits, self.poisoned, self.processes = culprits, False, 1

    def one(self, trial):
        self.trials.append(trial)
        found = []
        for config in trial.configs:
            self.poisoned = self.poisoned or config.block in self.culprits
            if self.poisoned:
                return Failed("RuntimeError: CUDA error: an illegal memory access was encountered", "process")
            found.append([self.times[config.block]] * trial.samples)
        return found

    def close(self):
        self.poisoned, self.processes = False, self.processes + 1


def test_after_an_error_of_the_device_only_its_cause_is_refused(measured, tmp_path):
    """And nothing of the kind is found in the log of the others, in the order in which they came or in any other."""
    for order in ([16, 32, 64], [64, 32, 16], [32, 16, 64]):
        BLOCKS[:] = order
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (kept,) = measured(Sticky([16]), shape="rows=128 width=64")["rows"]
        assert kept["config"] == {"block": 32}
        assert [e["config"] for e in log_of(tmp_path) if e["event"] == "refused"] == [{"block": 16}]
    BLOCKS[:] = [16, 32, 64]


def test_where_the_default_fails_in_a_new_process_too_no_candidate_is_refused(measured, tmp_path, capsys):
    """It is the GPU that is broken."""

    def breaks(trial):
        if trial.configs == (Config(32),):
            gpu.culprits = [8, 16, 32, 64]

    gpu = Sticky([])
    one = gpu.one
    gpu.one = lambda trial: (breaks(trial), one(trial))[1]
    found = measured(gpu, shape="rows=128 width=64")
    assert found["rows"] == []
    assert [e["event"] for e in log_of(tmp_path) if e["event"] in ("refused", "result")] == []
    assert "the default fails: RuntimeError: CUDA error" in capsys.readouterr().out
    measured(Gpu(), shape="rows=128 width=64")
    assert answer() == ("user", 32), "a later run tries all of them"


def test_want_of_memory_is_no_refusal_and_replaces_no_row_in_use(measured, tmp_path):
    write_table(tmp_path / "tables", "toy", HERE, [source([65, 128], 64)])

    class Short(Gpu):
        def one(self, trial):
            found = super().one(trial)
            return Failed("OutOfMemoryError", "memory") if Config(64) in trial.configs else found

    measured(Short({**FAST, 16: 1.0, 32: 1.0}), shape="rows=128 width=64")
    assert answer() == ("shipped", 64)
    events = [(e["event"], e["config"]) for e in log_of(tmp_path) if e["event"] in ("refused", "failed")]
    assert events == [("failed", {"block": 64})]


JOBS = Tunable("toy", Shape, worker_tasks.Job, lambda *_: iter([]), lambda *_: True, lambda *_: worker_tasks.Job(8),
               lambda *_: 1.0)  # fmt: skip


def test_in_processes_of_their_own_a_late_error_blames_nobody_and_an_early_one_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "Trial", worker_tasks.Trial)
    monkeypatch.setattr(tune, "Workers", lambda *_: Workers(worker_tasks.act_on_each, 1, 120.0))
    first, second, illegal, late, short = map(worker_tasks.Job, (1, 2, "illegal", ("late", 3), "short"))
    lost, loses = (worker_tasks.Job((task, str(tmp_path / "lost"))) for task in ("lost", "loses"))
    error = Failed("RuntimeError: CUDA error: an illegal memory access was encountered", "process")
    with tune._Session(HERE, 16, None, 1) as session:
        found = session.samples(JOBS, SHAPES[0], [first, illegal, second, short], 1)
        memory = Failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 GiB", "memory")
        assert found == [[1.0], error, [2.0], memory]
        assert session.samples(JOBS, SHAPES[0], [late], 1) == [[3.0]]
        assert session.samples(JOBS, SHAPES[0], [second], 1) == [[2.0]], "which comes after it in the same process"
        with pytest.raises(tune._Unfit) as ended:
            session.samples(JOBS._replace(default=lambda *_: lost), SHAPES[0], [loses], 1)
        assert ended.value.args[0].why == "RuntimeError: No CUDA GPUs are available"
    refused = [e["config"]["task"] for e in log_of(tmp_path) if e["event"] == "refused"]
    assert refused == ["illegal"]


def test_one_that_hangs_or_dies_is_told_from_those_it_was_tried_with(tmp_path, monkeypatch):
    class Patient(Workers):
        """But not with what hangs: the start of a process is no hang."""

        def one(self, task):
            self.limit = 1.0 if hang in task.configs else 120.0
            return super().one(task)

        def start(self):
            self.limit = 120.0
            super().start()

    first, second, dies = map(worker_tasks.Job, (1, 2, "segfault"))
    hang = worker_tasks.Job(("hang", str(tmp_path / "child")))
    monkeypatch.setattr(tune, "Trial", worker_tasks.Trial)
    monkeypatch.setattr(tune, "Workers", lambda *_: Patient(worker_tasks.act_on_each, 1, 120.0))
    with tune._Session(HERE, 16, None, 1) as session:
        found = session.samples(JOBS, SHAPES[0], [first, dies, second], 2)
        assert found == [[1.0, 1.0], Failed("the process died with status -11", "process"), [2.0, 2.0]]
        found = session.samples(JOBS, SHAPES[0], [hang, first, second], 2)
        assert found == [Failed("took longer than 1 s", "time"), [1.0, 1.0], [2.0, 2.0]]
        assert multiprocessing.active_children()
    assert [e["config"]["task"] for e in log_of(tmp_path) if e["event"] == "refused"] == ["segfault", list(hang.task)]
    assert not multiprocessing.active_children()


class Slow(Gpu):
    """The trial of these blocks takes the whole time limit and is killed; counts how often."""

    def __init__(self, hanging):
        super().__init__()
        self.hanging, self.limits = hanging, 0

    def one(self, trial):
        found = super().one(trial)
        if not {config.block for config in trial.configs} & {*self.hanging}:
            return found
        self.limits += 1
        return Failed("took longer than 60 s", "time")


def test_a_candidate_that_hangs_costs_one_time_limit_and_the_others_are_measured(measured, tmp_path):
    gpu = Slow([32])
    (kept,) = measured(gpu, shape="rows=128 width=64")["rows"]
    assert kept["config"] == {"block": 64}
    assert [(e["config"], e["why"]) for e in log_of(tmp_path) if e["event"] == "refused"] == [
        ({"block": 32}, "took longer than 60 s")
    ]
    assert gpu.limits == 1


def test_a_default_that_hangs_costs_one_time_limit_and_blames_nobody(measured, tmp_path):
    gpu = Slow([8])
    assert measured(gpu, shape="rows=128 width=64")["rows"] == []
    assert gpu.limits == 1
    assert [e["event"] for e in log_of(tmp_path) if e["event"] != "samples"] == ["failed"]


def test_where_the_default_hangs_too_no_candidate_is_refused(measured, tmp_path, capsys):
    gpu = Slow([])

    def breaks(trial):
        if trial.configs == (Config(32),):
            gpu.hanging = [8, 16, 32, 64]

    gpu.then = breaks
    assert measured(gpu, shape="rows=128 width=64")["rows"] == []
    assert gpu.limits == 2
    assert [e["event"] for e in log_of(tmp_path) if e["event"] in ("refused", "result")] == []
    assert "the default fails: took longer than 60 s" in capsys.readouterr().out


def test_no_shape_is_begun_after_the_budget_and_a_later_run_does_it(measured, monkeypatch):
    now = [0.0]

    def pass_time(trial):
        now[0] += 9.0

    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(tune, "ENOUGH", 1)
    first = Gpu(then=pass_time)
    assert measured(first)["shapes"] == 2  # in 60 seconds
    assert {rows for rows, _ in first.tried()} == {512, 256}
    judged = Counter(trial.shape[0] for trial in first.trials if not trial.samples)
    assert judged == {512: 2, 256: 1}, "in 0.6 of the time: the rest is for measuring"
    assert measured(Gpu())["shapes"] == 2, "and the one whose candidates were not judged"


# --- what is gone on with ---


def test_a_finished_shape_is_not_measured_again_unless_versions_changed(measured, monkeypatch):
    measured(shape="rows=128 width=64")
    again = Gpu()
    measured(again)
    assert {rows for rows, _ in again.tried()} == {256, 512}
    monkeypatch.setattr(tune, "versions", lambda: {"triton": "another"})
    again = Gpu()
    measured(again)
    assert {rows for rows, _ in again.tried()} == {128, 256, 512}


def test_a_configuration_once_refused_is_not_tried_again(measured):
    first = Gpu({**FAST, 32: "wrong by 0.1 of rms"}, then=terminated(128, 8))
    assert measured(first, shape="rows=128 width=64")["stopped"]
    assert first.tried()[128, 32]
    again = Gpu()
    (kept,) = measured(again, shape="rows=128 width=64")["rows"]
    assert set(again.tried()) == {(128, 8), (128, 16), (128, 64)}
    assert kept["config"] == {"block": 64}


def test_sigterm_keeps_what_was_decided_and_a_later_run_does_the_rest(measured):
    before = signal.getsignal(signal.SIGTERM)
    first = Gpu(then=terminated(256, 8))
    found = measured(first)
    assert found["stopped"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert {rows for rows, _ in first.tried()} == {512, 256}
    assert answer(512) == ("user", 32)
    assert answer(100)[0] != "user"
    again = Gpu()
    assert not measured(again)["stopped"]
    assert {rows for rows, _ in again.tried()} == {256, 128}
    assert {answer(rows) for rows in (100, 200, 400)} == {("user", 32)}


def test_a_shape_whose_candidates_were_not_judged_for_want_of_time_is_not_done(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "LEAST", 0.0)
    late = Gpu(then=lambda trial: time.sleep(0.05))
    measured(late, shape="rows=128 width=64", budget=0.05)
    assert late.trials
    assert not [e for e in log_of(tmp_path) if e["event"] == "result"]
    measured(Gpu(), shape="rows=128 width=64")
    assert answer() == ("user", 32)


def test_sigterm_while_candidates_are_judged_ends_that_too(measured):
    gpu = Gpu(then=lambda trial: None if trial.samples else os.kill(os.getpid(), signal.SIGTERM))
    measured(gpu, shape="rows=128 width=64")
    assert len([trial for trial in gpu.trials if not trial.samples]) == 1


def test_rows_decided_before_a_run_failed_are_kept_and_written_anew_where_they_are_gone(measured, tmp_path):
    def crash(trial):
        if trial.shape[0] == 256:
            raise OSError("the machine goes down")

    with pytest.raises(OSError, match="goes down"):
        measured(Gpu(then=crash))
    assert answer(400) == ("user", 32)
    shutil.rmtree(tmp_path / "cache/configs")
    tuning.clear_caches()
    again = Gpu()
    measured(again)
    assert 512 not in {rows for rows, _ in again.tried()}
    assert {answer(rows) for rows in (100, 200, 400)} == {("user", 32)}


def test_what_was_measured_in_bf16_says_nothing_of_fp32(measured):
    measured()
    again = Gpu()
    measured(again, bits=32)
    assert again.trials


# --- what may be timed at all ---


def test_wrong_and_unstable_configurations_are_refused_and_the_others_timed_in_turns():
    calls.clear()
    trial = Trial("toy", (128, 64, False), 16, tuple(map(Config, (8, 16, 4, 32, 64))), 3)
    right, wrong, too, unstable, unwritten = run_trial(trial)
    assert wrong == Failed("wrong by 0.1 of rms")
    assert unstable == Failed("two runs differ")
    assert unwritten == Failed("wrong by nan of rms")
    assert len(right) == len(too) == 3
    assert min(*right, *too) > 0
    assert calls[-6:] == [8, 4, 4, 8, 8, 4]
    assert run_trial(trial._replace(samples=0)) == [[], wrong, [], unstable, unwritten]
    assert Counter(calls) == {8: 6, 16: 2, 4: 5, 32: 2, 64: 2}, "two runs judge each once and for all"


@pytest.mark.parametrize("run", [2, 3], ids=["checked", "timed"])
def test_an_error_is_seen_behind_the_configuration_that_made_it(monkeypatch, run):
    """Kernels run after their launch returned: without a wait the next one would be blamed."""

    def wait():
        if calls.count(4) == run:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls.clear()
    monkeypatch.setattr(timing, "synchronize", wait)
    with pytest.raises(RuntimeError, match="illegal memory"):
        run_trial(Trial("toy", (128, 64, False), 16, (Config(4), Config(8)), 2))
    assert calls == {2: [8, 4, 4], 3: [8, 4, 4, 8, 8, 4]}[run], "nothing was run behind it"


def test_no_candidate_of_a_gpu_is_timed_on_a_cpu():
    with pytest.raises(RuntimeError, match="the trial is for cuda, and this process has cpu alone"):
        run_trial(Trial("toy", (128, 64, False), 16, (Config(8),), 1), on="cuda")


def test_interpreted_the_whole_of_it_runs(tmp_path):
    log = tmp_path / "log.jsonl"
    run = mm1("tune", "conv_norm", "--shape", "rows=2 channels=16", "--budget", "12", "--log", str(log),
              TRITON_INTERPRET="1", MM1_CACHE=str(tmp_path))  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert (found["device"], found["shapes"]) == ("interpreted", 1)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events[0] == "samples"
    assert "refused" not in events


# --- tables ---


def test_neighbouring_intervals_are_one_row_only_where_all_else_is_equal():
    rows = [source([129, 256], 16), source([65, 128], 16), source([257, 512], 32), source([513, 1024], 32, "measured"),
            source([1025, 2048], 32, "measured"), source([4097, 8192], 32), source([1 << 14, 1 << 15], 32),
            source([1, 64], 16, width=32),
            source([65, 128], 16, width=32), source([33, 64], 16)]  # fmt: skip
    found = [(r["when"]["width"], r["when"]["rows"], r["config"]["block"], r["origin"]) for r in merged(rows)]
    assert found == [
        (32, [1, 128], 16, "predicted"),
        (64, [33, 256], 16, "predicted"),
        (64, [257, 512], 32, "predicted"),
        (64, [513, 1024], 32, "measured"),
        (64, [1025, 2048], 32, "measured"),
        (64, [4097, 8192], 32, "predicted"),
        (64, [1 << 14, 1 << 15], 32, "predicted"),
    ]
    other = source([257, 512], 16)
    other["when"]["bits"] = 32
    assert len(merged([source([129, 256], 16), other])) == 2


def test_predicted_rows_are_cut_around_a_measured_one():
    def cut(*intervals, new=(129, 256)):
        rows = [source(list(interval), 16) for interval in intervals]
        return [tuple(r["when"]["rows"]) for r in without(rows, source(list(new), 32, "measured"))]

    assert cut((1, 4096)) == [(1, 128), (257, 4096)]
    assert cut((1, 128), (129, 256), (257, 512)) == [(1, 128), (257, 512)]
    assert cut((1, 129), (256, 300), (150, 200)) == [(1, 128), (257, 300)]
    kept = [source([1, 4096], 16, "measured"), source([1, 4096], 16, width=32)]
    assert without(kept, source([129, 256], 32, "measured")) == kept


def test_a_table_reads_as_it_was_written_one_row_a_line(tmp_path):
    rows = [source([129, 256], 16), source([65, 128], 32), source([65, 128], 32, width=32)]
    path = write_table(tmp_path, "toy", DEVICES["h200"], rows)
    first = path.read_bytes()
    back = read_table(tmp_path, "toy", DEVICES["h200"])
    assert back == [rows[2], rows[1], rows[0]]
    head, *lines, tail = first.decode().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines] == back
    assert json.loads(head + tail)["device"]["pci"] == ["2335", "233b"]
    write_table(tmp_path, "toy", DEVICES["h200"], rows[::-1])
    assert path.read_bytes() == first
    assert read_table(tmp_path, "toy", DEVICES["a100"]) == []


def _write_often(start, block):
    start.wait()
    for _ in range(100):
        write_user_row(TOY, HERE, source([65, 128], block, "measured", note="x" * 5000))


def test_two_who_write_the_same_row_at_once_leave_one_that_is_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    writers = [context.Process(target=_write_often, args=(start, block)) for block in (16, 32)]
    for writer in writers:
        writer.start()
    start.wait()
    folder, seen = tmp_path / "cache/configs/toy/made-up", 0
    while any(writer.is_alive() for writer in writers) or not seen:
        for path in folder.glob("*.json"):
            assert json.loads(path.read_text())["config"]["block"] in (16, 32)
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(folder.iterdir())) == 1
    tuning.clear_caches()
    assert answer()[0] == "user"


def test_threads_that_write_the_same_row_are_not_in_each_others_way(tmp_path, monkeypatch):
    real = os.replace

    def meanwhile(part, path):
        monkeypatch.setattr(os, "replace", real)
        write_user_row(TOY, HERE, source([65, 128], 16, "measured"))
        real(part, path)

    monkeypatch.setattr(os, "replace", meanwhile)
    path = write_user_row(TOY, HERE, source([65, 128], 32, "measured"))
    assert json.loads(path.read_text())["config"]["block"] == 32
    assert list(path.parent.iterdir()) == [path]


def test_no_row_that_its_kernel_could_not_read_is_written(tmp_path):
    for bad in (source(["a", "b"], 16), {**source([1, 2], 16), "config": {"blocks": 16}}, {"when": {}}):
        with pytest.raises(ValueError, match="is no row of"):
            write_user_row(TOY, HERE, bad)
    assert not (tmp_path / "cache").exists()


def test_a_write_that_fails_leaves_nothing_else(tmp_path):
    path = tmp_path / "toy" / "h200.json"
    path.mkdir(parents=True)  # no file can take its place
    with pytest.raises(OSError):
        write_table(tmp_path, "toy", DEVICES["h200"], [])
    assert list(path.parent.iterdir()) == [path]


def test_tables_can_be_read_by_others_as_any_file_can(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert write_table(tmp_path, "toy", HERE, []).stat().st_mode == plain.stat().st_mode


def test_a_cache_that_cannot_be_written_is_one_clear_line(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tune, "Workers", lambda function, count, limit: Gpu())
    status, error = told(monkeypatch, capsys, "tune", "toy", "--budget", "60")
    assert status == 1
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "no folder"


# --- what is told ---


def test_the_check_names_a_table_that_cannot_be_read(tmp_path):
    path = write_table(tmp_path, "toy", DEVICES["h200"], [source([1, 2], 32)])
    path.write_text(path.read_text()[:-9])
    assert "toy/h200.json" in predict.check(["toy"], [DEVICES["h200"]], tmp_path, processes=1)[0]


def test_the_command_checks_a_folder_of_tables(tmp_path, monkeypatch, capsys):
    write_table(tmp_path, "toy", DEVICES["h200"], [source([1, 2], 128)])
    monkeypatch.setattr(sys, "argv", ["mm1", "tune", "toy", "--check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    *faults, last = capsys.readouterr().out.splitlines()
    assert (ended.value.code, json.loads(last)) == (1, {"faults": 1})
    assert "Config(block=128) is not legal on h200" in faults[0]


def mm1(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "mm1.cli", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **environment})  # fmt: skip


def told(monkeypatch, capsys, *arguments):
    """Exit status and the one line of standard error."""
    monkeypatch.setattr(sys, "argv", ["mm1", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mm1: ")
    return ended.value.code, lines[0]


BAD = {
    "tune nosuch": "unknown kernel 'nosuch'",
    "tune toy --shape rows=1": "missing 'width'",
    "tune toy --shape width=1,rows=two": "whole numbers",
    "tune toy --static": "--device",
    "tune toy --device h200": "--static or --check",
    "tune toy --static --device h200 --processes 0": "--processes is 0, expected at least 1",
    "tune toy --static --device h2000": "unknown device 'h2000'",
    "tune --check --device h2000": "unknown device 'h2000'",
    "explain nosuch rows=1 --device h200": "unknown kernel 'nosuch'",
    "explain toy rows=1 --device h200": "missing 'width'",
    "explain toy rows=1 width=1 wdith=2 --device h200": "unknown 'wdith'",
    "explain toy rows=1 width= --device h200": "whole numbers",
    "explain toy rows=1 width=1": "--device",
    "explain toy rows=1 width=1 --device h2000": "known: a100",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_status_2_and_one_line_that_says_what(monkeypatch, capsys, command):
    status, error = told(monkeypatch, capsys, *command.split())
    assert status == 2
    assert BAD[command] in error


@pytest.mark.parametrize("shape", ["rows=-4 width=64", "rows=4 width=64 gated=perhaps", "rows=4 rows=5 width=64"])
def test_a_shape_that_cannot_be_is_refused(monkeypatch, capsys, shape):
    assert told(monkeypatch, capsys, "explain", "toy", *shape.split(), "--device", "h200")[0] == 2


def test_a_table_is_not_emptied_for_want_of_processes(tmp_path):
    path = write_table(tmp_path, "toy", DEVICES["h200"], [source([65, 128], 32)])
    before = path.read_bytes()
    with contextlib.suppress(ValueError):
        predict.predict(["toy"], DEVICES["h200"], tmp_path, processes=0)
    assert path.read_bytes() == before


def test_the_command_itself_ends_with_that_status_and_line():
    run = mm1("explain", "grouped_gemm", "rows=8192", "--device", "h200")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "mm1: grouped_gemm: missing 'experts' in the shape; it takes rows, experts, k, n, gated\n"


def test_without_a_gpu_measuring_says_what_can_be_done_instead(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(TuneError, match="--static --device NAME"):
        tune.tune(["grouped_gemm"], 1.0)


def test_explain_marks_the_step_that_answers_and_says_why_others_did_not(tmp_path, capsys):
    write_table(tmp_path / "tables", "toy", DEVICES["h200"], [source([65, 128], 32)])
    capsys.readouterr()
    found = explain("toy", "rows=200,width=64", "h200")
    assert (found["step"], found["config"], found["origin"]) == ("neighbour", {"block": 32}, "predicted")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("→")] == ["neighbour"]
    assert "shipped    none of 1 usable rows in h200.json holds the shape" in lines[3]
    assert "block=32" in lines


def test_a_row_says_at_which_clocks_it_was_measured(capsys, monkeypatch):
    state = {"sm_mhz": 1980, "memory_mhz": 3201}
    monkeypatch.setattr(tune.gpu_state, "read", lambda index: state)
    tune._print_head(HERE, 60.0)
    assert "1980/3201 MHz" in capsys.readouterr().out


# --- many processes ---


def as_rank() -> None:
    """What each of two processes does: tune; then with rows of its own; then with an error on rank 0."""
    rank, found = int(os.environ["RANK"]), {}
    KERNELS["toy"] = KERNEL
    tune._here = lambda: HERE
    tune.Workers = lambda *_: Gpu() if rank == 0 else None
    with group(120) as ranks:
        result = tune.tune(["toy"], 60.0)
        found |= {"rows": result["rows"], "digest": result["digest"], "answer": answer()}
        if rank == 1:
            for path in (tuning.cache_folder() / "toy" / HERE.name).iterdir():  # as another process would
                path.write_text(path.read_text().replace('"block": 32', '"block": 16'))
        try:
            expect_consistent([TOY], HERE, ranks)
        except TuneError as error:
            found["differ"] = str(error)

        def fail():
            raise TuneError(f"said by rank {rank}")

        try:
            on_rank_0(fail, ranks)
        except TuneError as error:
            found["error"] = str(error)
        try:
            on_all_ranks(fail if rank else lambda: None, ranks)
        except TuneError as error:
            found["elsewhere"] = str(error)
        found["again"] = on_rank_0(lambda: rank, ranks)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        cache = str(tmp_path_factory.mktemp(f"rank{rank}"))
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "MM1_CACHE": cache, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        ranks.append(subprocess.Popen([sys.executable, "-c", "from tests.test_tune import as_rank; as_rank()"],
                                      cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True))  # fmt: skip
    found = []
    for process in ranks:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_every_rank_has_the_rows_of_rank_0(two_ranks):
    first, second = two_ranks
    assert len(first["rows"]) == 3
    assert first["rows"] == second["rows"]
    assert first["digest"] == second["digest"]
    assert first["answer"] == second["answer"] == ["user", 32]


def test_a_rank_with_other_rows_is_named(two_ranks):
    for found in two_ranks:
        assert found["differ"].startswith("ranks [1] have other configurations than rank 0")


def test_an_error_on_rank_0_is_one_on_every_rank(two_ranks):
    assert [found["error"] for found in two_ranks] == ["rank 0: TuneError: said by rank 0"] * 2
    assert [found["elsewhere"] for found in two_ranks] == ["rank 1: TuneError: said by rank 1"] * 2
    assert [found["again"] for found in two_ranks] == [0, 0]
