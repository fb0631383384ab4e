"""A process that crashes or hangs loses its own task, and nothing else; none outlives what it was started for."""

import multiprocessing
import os
import signal
import time
from itertools import chain, count
from pathlib import Path

import pytest

from mm1.autotune.workers import Failed, Workers
from tests import worker_tasks
from tests.conftest import not_interpreted

pytestmark = not_interpreted
LONG = 120.0  # seconds: a start on a busy machine must not be taken for a hang


@pytest.fixture
def workers():
    """Makes workers; whatever a test leaves is closed."""
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
    """Whether all of them end, within a time that only a failure takes."""
    end = time.monotonic() + 30
    while any(runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(runs(pid) for pid in pids)


def test_a_crash_or_an_exception_is_one_tasks_result_and_the_others_are_all_there(workers):
    tasks = [1, "raise", 2, "exit", 3, "kill", 4, 5]
    found = dict(workers(2).each(tasks))
    assert found == {
        **{i: ["done", i] for i in (1, 2, 3, 4, 5)},
        "raise": Failed("ValueError: not this one"),
        "exit": Failed("the process died with status 7"),
        "kill": Failed("the process died with status -9"),
    }


def test_a_process_serves_many_tasks_and_an_exception_does_not_end_it(workers):
    one = workers(1)
    first = one.one("who")
    assert one.one("raise") == Failed("ValueError: not this one")
    assert one.one("who") == first
    assert one.one("exit") == Failed("the process died with status 7")
    assert one.one("who") != first


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
    """So that what is yet to come may depend on what came: no more than one ahead for each process."""
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
