"""Processes that may crash or hang: what they were at is lost, and nothing else."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast


class Failed(NamedTuple):
    why: str


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


class Workers:
    """A few spawned processes that apply one function of a module; each starts at its first task.

    limit: seconds a task may take. A process that takes longer, or dies, is killed with what it started, and another
    takes its place. A task's exception is its result.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, limit: float):
        if count < 1:
            raise ValueError(f"{count} processes, expected at least 1")
        self.function, self.limit = function, limit
        self._idle: list[_Worker | None] = [None] * count

    def each(self, tasks: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        """(task, result or Failed), as they come; a result is taken before the next task is."""
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
                    result = Failed(f"took longer than {self.limit:g} s") if pipe in late else _received(worker)
                    if pipe in late or not worker.process.is_alive():
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
        """All processes, and wait until they are up: each is given nothing to do, which its function may not like."""
        for _ in self.each([None] * len(self._idle)):
            pass

    def one(self, task: Any) -> Any:
        return next(iter(self.each([task])))[1]

    def close(self) -> None:
        for i, worker in enumerate(self._idle):
            if worker:
                _kill(worker)
            self._idle[i] = None

    def _sent(self, worker: _Worker | None, task: Any) -> _Worker:
        """The process that has the task now: another one, if this died while it had nothing to do."""
        if worker and not worker.process.is_alive():
            _kill(worker)
            worker = None
        worker = self._idle[-1] = worker or self._start()
        with contextlib.suppress(BrokenPipeError):  # it died just now, which the end of its pipe will tell
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
        return Failed(f"the process died with status {worker.process.exitcode}")


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    os.setsid()  # so that what a task starts can be killed with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = function(task)
        except Exception as error:
            result = Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        pipe.send(result)


def _kill(worker: _Worker) -> None:
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone, or not its own group's leader yet
        worker.process.kill()
    worker.process.join()
    worker.pipe.close()
