"""`mm1 tune` measures, keeps and resumes as it should on a made-up GPU."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm1.autotune import tables, timing, tune
from mm1.autotune.tables import read_table, write_table
from mm1.autotune.timing import Trial, run_trial
from mm1.autotune.workers import Failed, Workers
from mm1.kernels import tuning
from mm1.kernels.tuning import Tunable, config_for
from tests import worker_tasks
from tests.conftest import not_interpreted
from tests.toy_kernel import BF16, BLOCKS, FAST, HERE, SHAPES, TOY, Config, Gpu, Shape, answer, calls, isolated, source

pytestmark = not_interpreted
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    """Give each test its own cache and tables, the toy kernel, and a GPU of a kind of its own."""
    yield from isolated(tmp_path, monkeypatch)


def terminated(rows, *blocks):
    """Return a function that sends SIGTERM at the first timing of these blocks at this shape."""

    def then(trial):
        if trial.samples and trial.shape[0] == rows and {*blocks} <= {config.block for config in trial.configs}:
            os.kill(os.getpid(), signal.SIGTERM)

    return then


@pytest.fixture
def measured(monkeypatch):
    """Return a function that runs `mm1 tune toy` on a made-up GPU."""

    def run(gpu=None, budget=60.0, **more):
        gpu = gpu or Gpu()
        monkeypatch.setattr(tune, "Workers", lambda function, count, limit: gpu)
        return tune.tune(["toy"], budget, **more)

    return run


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
    """Fail in each call after an error of a kernel, until the process is replaced."""

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
    """The order of the candidates makes no difference."""
    for order in ([16, 32, 64], [64, 32, 16], [32, 16, 64]):
        BLOCKS[:] = order
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (kept,) = measured(Sticky([16]), shape="rows=128 width=64")["rows"]
        assert kept["config"] == {"block": 32}
        assert [e["config"] for e in log_of(tmp_path) if e["event"] == "refused"] == [{"block": 16}]
    BLOCKS[:] = [16, 32, 64]


def test_where_the_default_fails_in_a_new_process_too_no_candidate_is_refused(measured, tmp_path, capsys):
    """The GPU is broken then."""

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
        found = tune._Tuning(session, JOBS, SHAPES[0]).samples([first, illegal, second, short], 1)
        memory = Failed("OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 GiB", "memory")
        assert found == [[1.0], error, [2.0], memory]
        assert tune._Tuning(session, JOBS, SHAPES[0]).samples([late], 1) == [[3.0]]
        assert tune._Tuning(session, JOBS, SHAPES[0]).samples([second], 1) == [[2.0]], (
            "which comes after it in the same process"
        )
        with pytest.raises(tune._Unfit) as ended:
            tune._Tuning(session, JOBS._replace(default=lambda *_: lost), SHAPES[0]).samples([loses], 1)
        assert ended.value.args[0].why == "RuntimeError: No CUDA GPUs are available"
    refused = [e["config"]["task"] for e in log_of(tmp_path) if e["event"] == "refused"]
    assert refused == ["illegal"]


def test_one_that_hangs_or_dies_is_told_from_those_it_was_tried_with(tmp_path, monkeypatch):
    class Patient(Workers):
        """Give a hanging task a short limit, and starting processes a long one."""

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
        found = tune._Tuning(session, JOBS, SHAPES[0]).samples([first, dies, second], 2)
        assert found == [[1.0, 1.0], Failed("the process died with status -11", "process"), [2.0, 2.0]]
        found = tune._Tuning(session, JOBS, SHAPES[0]).samples([hang, first, second], 2)
        assert found == [Failed("took longer than 1 s", "time"), [1.0, 1.0], [2.0, 2.0]]
        assert multiprocessing.active_children()
    assert [e["config"]["task"] for e in log_of(tmp_path) if e["event"] == "refused"] == ["segfault", list(hang.task)]
    assert not multiprocessing.active_children()


class Slow(Gpu):
    """Let trials of these blocks take the whole time limit, and count them."""

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
    """Kernels run after their launch returned: without a wait the next configuration would be blamed."""

    def wait():
        if calls.count(4) == run:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls.clear()
    monkeypatch.setattr(timing, "synchronize", wait)
    with pytest.raises(RuntimeError, match="illegal memory"):
        run_trial(Trial("toy", (128, 64, False), 16, (Config(4), Config(8)), 2))
    assert calls == {2: [8, 4, 4], 3: [8, 4, 4, 8, 8, 4]}[run], "nothing was run behind it"


def test_no_candidate_of_a_gpu_is_timed_on_a_cpu():
    with pytest.raises(RuntimeError, match="the trial is for cuda, but this process has only cpu"):
        run_trial(Trial("toy", (128, 64, False), 16, (Config(8),), 1), on="cuda")
