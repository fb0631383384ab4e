"""Run tasks in processes that may crash or hang, so that only the task of such a process is lost."""

import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

# Messages of torch and Triton for errors of a GPU. After most of them every later call of the process fails too.
DEVICE = re.compile(r"\b(CUDA|HIP)( driver| unknown)? error\b|Triton Error \[|_STATUS_|No (CUDA|HIP) GPUs", re.I)
MEMORY = re.compile(r"out of memory|_STATUS_ALLOC_FAILED", re.I)


class Failed(NamedTuple):
    """Stand for the result of a task that failed.

    why: the reason in one line. kind: "task" if the task raised an exception; "process" if its process died or is
    unusable, as after an error of the GPU, which an earlier task may have caused; "memory" if there was too little;
    "time" if it took longer than the limit.
    """

    why: str
    kind: str = "task"


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


class Workers:
    """Apply one function of a module to tasks in `count` spawned processes, each of which starts at its first task.

    limit: maximum seconds of a task. A process that takes longer, dies or is unusable (see Failed) is replaced, and
    killed with the processes that it started (on Windows without them). The result of a task that raises is Failed.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, limit: float):
        if count < 1:
            raise ValueError(f"{count} processes, expected at least 1")
        self.function, self.limit = function, limit
        self._idle: list[_Worker | None] = [None] * count

    def each(self, tasks: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Yield (task, result or Failed) in the order of completion.

        A task is taken from `tasks` only when a process is free and the results before it are consumed.
        """
        busy: dict[Connection, tuple[_Worker, Any, float]] = {}
        tasks = iter(tasks)
        try:
            while True:
                while self._idle and (task := next(tasks, self)) is not self:
                    worker = self._sent(self._idle[-1], task)
                    self._idle.pop()
                    busy[worker.pipe] = worker, task, time.monotonic() + self.limit
                if not busy:
                    return
                ready = wait(list(busy), max(0.0, min(end for _, _, end in busy.values()) - time.monotonic()))
                late = [pipe for pipe, (_, _, end) in busy.items() if pipe not in ready and time.monotonic() >= end]
                for pipe in [*ready, *late]:
                    worker, task, _ = busy.pop(pipe)
                    timeout = Failed(f"took longer than {self.limit:g} s", "time")
                    result = timeout if pipe in late else _received(worker)
                    unfit = isinstance(result, Failed) and result.kind != "task"
                    if unfit or not worker.process.is_alive():
                        _kill(worker)
                        self._idle.append(None)
                    else:
                        self._idle.append(worker)
                    yield task, result
        finally:
            for worker, _, _ in busy.values():
                _kill(worker)
                self._idle.append(None)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start all processes and wait until they run. Each gets the task None, which may fail."""
        for _ in self.each([None] * len(self._idle)):
            pass

    def one(self, task: Any) -> Any:
        """Return the result of one task, or Failed."""
        return next(iter(self.each([task])))[1]

    def close(self) -> None:
        """Kill all processes."""
        for i, worker in enumerate(self._idle):
            if worker:
                _kill(worker)
            self._idle[i] = None

    def _sent(self, worker: _Worker | None, task: Any) -> _Worker:
        """Send the task to this process, or to a new one if it died while idle, and return the process."""
        if worker and not worker.process.is_alive():
            _kill(worker)
            worker = None
        worker = self._idle[-1] = worker or self._start()
        with contextlib.suppress(BrokenPipeError):  # the process died just now, as reading from its pipe will show
            worker.pipe.send(task)
        return worker

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        pipe = cast(Connection, pipe)
        process = context.Process(target=_serve, args=(other, self.function), daemon=True)
        process.start()
        other.close()
        return _Worker(process, pipe)


def _received(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        status = worker.process.exitcode
        # Linux kills the largest process when memory is short. No error of a task itself gives this status.
        killed = hasattr(signal, "SIGKILL") and status == -signal.SIGKILL
        return Failed(f"the process died with status {status}", "memory" if killed else "process")


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # a new process group, so that processes that a task starts can be killed with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = function(task)
        except Exception as error:
            result = Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300], kind_of(error))
        pipe.send(result)


def kind_of(error: BaseException) -> str:
    """Return the kind of Failed for an exception.

    The first exception of a chain decides, because after an error of the GPU cleaning up fails too.
    """
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    for e in reversed(chain):
        names = {base.__name__ for base in type(e).__mro__}  # compared by name, so that torch is not imported
        if isinstance(e, MemoryError) or "OutOfMemoryError" in names or MEMORY.search(str(e)):
            return "memory"
        if "AcceleratorError" in names or DEVICE.search(str(e)):
            return "process"
    return "task"


def _kill(worker: _Worker) -> None:
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # on Windows; dead; or not its group's leader yet
        worker.process.kill()
    worker.process.join()
    worker.pipe.close()
