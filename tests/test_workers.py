"""A process that crashes or hangs loses only its own task, and no process outlives its workers."""

import multiprocessing
import os
import signal
import time
from itertools import chain, count
from pathlib import Path

import pytest
import torch

from mm1.autotune.workers import Failed, Workers, kind_of
from tests import worker_tasks
from tests.conftest import not_interpreted

pytestmark = not_interpreted
LONG = 120.0  # seconds: a start on a busy machine must not be taken for a hang


@pytest.fixture
def workers():
    """Return a function that makes workers, which are closed after the test."""
    made = []

    def make(number):
        made.append(Workers(worker_tasks.act, number, LONG))
        return made[-1]

    yield make
    for one in made:
        one.close()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(*pids: int) -> bool:
    """Wait until all processes have ended, and return whether they did within 30 seconds."""
    end = time.monotonic() + 30
    while any(runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(runs(pid) for pid in pids)


def test_a_crash_or_an_exception_is_one_tasks_result_and_the_others_are_all_there(workers):
    tasks = [1, "raise", 2, "exit", 3, "segfault", 4, "kill", 5]
    found = dict(workers(2).each(tasks))
    assert found == {
        **{i: ["done", i] for i in (1, 2, 3, 4, 5)},
        "raise": Failed("ValueError: not this one"),
        "exit": Failed("the process died with status 7", "process"),
        "segfault": Failed("the process died with status -11", "process"),
        "kill": Failed("the process died with status -9", "memory"),  # as Linux does where memory is short
    }


def test_a_process_serves_many_tasks_and_an_exception_does_not_end_it(workers):
    one = workers(1)
    first = one.one("who")
    assert one.one("raise") == Failed("ValueError: not this one")
    assert one.one("who") == first
    assert one.one("exit") == Failed("the process died with status 7", "process")
    assert one.one("who") != first


def test_an_error_of_the_device_ends_the_process_and_so_does_want_of_memory(workers):
    """The next task gets a process without broken context and with free memory."""
    one = workers(1)
    for task, why, kind in (
        ("illegal", "RuntimeError: CUDA error: an illegal memory access was encountered", "process"),
        ("short", "OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 GiB", "memory"),
    ):
        first = one.one("who")
        assert one.one(task) == Failed(why, kind)
        assert gone(first)
        assert one.one(7) == ["done", 7]


def chained(first, second):
    try:
        try:
            raise first
        except Exception:
            raise second  # noqa: B904
    except Exception as error:
        return error


ASYNC = "Search for `cudaErrorIllegalAddress' in the documentation. CUDA kernel errors might be asynchronously reported"
CAPTURE = "CUDA error: operation failed due to a previous error during capture"
ERRORS = [
    *((RuntimeError(f"CUDA error: {what}\n{ASYNC}"), "process") for what in (
        "an illegal memory access was encountered", "an illegal instruction was encountered", "misaligned address",
        "unspecified launch failure", "uncorrectable ECC error encountered", "device-side assert triggered",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    )),
    (torch.AcceleratorError("CUDA error: misaligned address"), "process"),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "process"),
    (RuntimeError("HIP error: the operation cannot be performed in the present state"), "process"),
    (RuntimeError("CUDA driver error: unknown error"), "process"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "process"),
    (RuntimeError("No CUDA GPUs are available"), "process"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
    (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
    (MemoryError(), "memory"),
    (chained(torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CAPTURE)), "memory"),
    (chained(ValueError("in a graph"), RuntimeError(CAPTURE)), "process"),
    (ValueError("block_m 24 is no power of 2"), "task"),
    (AssertionError(), "task"),
]  # fmt: skip


def test_a_kernel_that_needs_more_than_the_gpu_has_is_at_fault_itself():
    errors = pytest.importorskip("triton.runtime.errors", exc_type=ImportError)
    assert kind_of(errors.OutOfResources(300_000, 232_448, "shared memory")) == "task"


@pytest.mark.parametrize("error, kind", ERRORS, ids=lambda x: x if isinstance(x, str) else str(x)[:40])
def test_a_failure_is_of_the_task_of_the_process_or_of_memory(error, kind):
    """The messages are those of torch and Triton. A shape that needs too much shared memory is the task's failure."""
    assert kind_of(error) == kind


def test_what_hangs_is_killed_at_the_limit_with_what_it_started(workers, tmp_path):
    two, child = workers(2), tmp_path / "child"
    pids = {pid for _, pid in two.each(["who", "who"])}

    def tasks():
        two.limit = 1.0  # both run by now, so that this is the time of the task alone
        yield "hang", str(child)
        two.limit = LONG
        yield from range(4)

    found = dict(two.each(tasks()))
    assert found.pop(("hang", str(child))).why.startswith("took longer than")
    assert found == {i: ["done", i] for i in range(4)}
    assert gone(int(child.read_text()))
    assert len([pid for pid in pids if runs(pid)]) == 1, "the other goes on"
    assert {pid for _, pid in two.each(["who", "who"])} > {pid for pid in pids if runs(pid)}, "another took its place"


def test_closed_workers_leave_no_process_nor_any_that_tasks_started(workers, tmp_path):
    two, child = workers(2), tmp_path / "child"
    pids = [pid for _, pid in two.each(["who", "who"])]
    two.one(("leave", str(child)))
    two.close()
    assert gone(*pids, int(child.read_text()))
    assert not multiprocessing.active_children()


def test_who_stops_listening_early_leaves_none_at_work(workers, tmp_path):
    two, child = workers(2), tmp_path / "child"
    results = two.each(chain(["who", ("hang", str(child))], count()))
    task, pid = next(results)
    assert task == "who"
    while not child.is_file() or not child.read_text():
        task, _ = next(results)
    results.close()
    assert gone(int(child.read_text()))
    assert two.one(5) == ["done", 5], "they can be used again"
    two.close()
    assert gone(pid)
    assert not multiprocessing.active_children()


def test_tasks_are_taken_only_when_a_process_is_free(workers):
    """Later tasks may then depend on earlier results."""
    taken = []
    results = workers(1).each(taken.append(i) or i for i in range(100))
    for i in range(3):
        assert next(results) == (i, ["done", i])
        assert taken == list(range(i + 1))
    results.close()


def test_a_process_that_dies_between_two_tasks_is_replaced(workers):
    one = workers(1)
    pid = one.one("who")
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert one.one("who") != pid


def test_a_task_that_cannot_be_sent_costs_no_process(workers):
    one = workers(1)
    with pytest.raises(Exception, match="pickle"):
        one.one(lambda: 1)
    assert one.one(1) == ["done", 1]
