"""Run an Engine in a thread, with coroutines that await its requests.

async with AsyncEngine(engine) as running:
    async for piece in running.stream(prompt, Sampling(max_tokens=32)):
        print(piece, end="")
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import torch

from mm1.engine.data.document import Document
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.prompts import Prompt
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.errors import Busy

BETWEEN_SECONDS = 0.005  # limit of the time between two steps in which commands are taken from the inbox
STOP_SECONDS = 10  # limit of the time that closing waits for the last step


class Dead(RuntimeError):
    """Report why the engine has stopped and computes nothing more."""


class Stream:
    """Iterate asynchronously over the pieces of one request's text. Iterating raises a failed request's error.

    Pieces that a slow reader has not read are joined, so that they take no more memory than the text. request: the
    engine's request; complete when the iterator ends.
    """

    request: Request

    def __init__(self):
        self._pieces: list[str] = []
        self._outbox = asyncio.Event()
        self._accepted = False  # whether the engine has the request
        self._end: Exception | None = None  # StopAsyncIteration if the text is complete

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> str:
        while not self._pieces:
            if self._end:
                raise self._end
            await self._wait()
        text, self._pieces = "".join(self._pieces), []
        return text

    async def _wait(self) -> None:
        self._outbox.clear()
        await self._outbox.wait()

    def _receive(self, message: str | Exception) -> None:
        """Store a piece of the text, the end or an error. An empty piece reports that the request was accepted."""
        if isinstance(message, Exception):
            self._end = self._end or message
        else:
            self._accepted = True
            self._pieces += [message] if message else []
        self._outbox.set()


class AsyncEngine:
    """Run an Engine in a thread. Use it with `async with`, in one event loop; nothing else may use the engine then.

    A step that fails ends the requests that the engine lists as failed, each with its own error, and the others go on;
    if it lists none, all running requests end. Once the device no longer responds, `dead` is the reason and nothing
    more is computed. Closing waits for the current step, but at most STOP_SECONDS. loop: the event loop.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, engine: Engine):
        self.engine = engine
        self.dead: Exception | None = None
        self.warm = False  # whether `warm_up` has ended
        self._warm_until = 0.0  # limit of its time
        self._closed = False
        self._opened = 0  # requests; used only by the loop
        self._awake: float | None = None  # begin of the thread's current step or command; None while it waits for work
        self._streams: dict[Stream, Request] = {}  # used only by the thread
        self._outbox: list[tuple[Stream, str | Exception]] = []  # messages to the loop; used only by the thread
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mm1-engine", daemon=True)

    async def __aenter__(self) -> "AsyncEngine":
        self.loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.dead, self._closed = self.dead or Dead("the engine is closed"), True
        self.stop()
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if self.hangs:
            logging.getLogger("mm1").error("the engine's step has taken %.0f s: it is abandoned", self.step_seconds)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in the thread between two steps. If it raises, all requests end with a Dead."""
        self._inbox.put(function)

    def warm_up(self, seconds: float) -> None:
        """Warm the engine up between the steps of requests; `warm` is true when that ends.

        No part begins after this number of seconds, but one that has begun goes on: what is missing then is compiled
        and captured when requests need it, as it is after a failure, which is logged.
        """
        self._warm_until = time.monotonic() + seconds
        self.call(partial(self._warm_up, self.engine.warm_up()))

    def stop(self) -> None:
        """End the thread after its current step, and all requests with a Dead."""
        self._inbox.put(None)

    @property
    def hangs(self) -> bool:
        """Return whether the engine was closed while its thread is in a step that does not end."""
        return self._closed and self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Return whether requests are still computed."""
        return not self.dead and self._thread.is_alive()

    @property
    def warming(self) -> bool:
        """Return whether the engine warms up within the time for it."""
        return self.alive and not self.warm and time.monotonic() < self._warm_until

    @property
    def step_seconds(self) -> float:
        """Return the seconds since the thread's current step began; 0 while it waits for work."""
        awake = self._awake
        return time.monotonic() - awake if awake else 0.0

    @asynccontextmanager
    async def open(
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), scored: int = 0
    ) -> AsyncIterator[Stream]:
        """Submit a request; leaving the context before its end cancels it. Raises Busy, UserError and Dead.

        scored: as in Engine.submit.
        """
        async with self.open_many([(prompt, sampling, scored)]) as [stream]:
            yield stream

    @asynccontextmanager
    async def open_many(self, jobs: Sequence[tuple[Prompt | Document, Sampling, int]]) -> AsyncIterator[list[Stream]]:
        """Submit requests between the same two steps: all of them, or none if one is refused.

        jobs: the arguments of `open` for each request. Leaving the context before their ends cancels them. Raises Busy,
        UserError and Dead.
        """
        if not self._thread.is_alive():
            ended = Dead("the engine's thread has ended") if self._thread.ident else None
            raise self.dead or ended or RuntimeError("an AsyncEngine must be used within `async with`")
        if self._opened + len(jobs) > self.engine.capacity:
            raise Busy(f"{self._opened} requests are open, expected at most {self.engine.capacity}")
        self._opened += len(jobs)
        streams = [Stream() for _ in jobs]
        try:
            encode = self.engine.encode
            prompts = [p if isinstance(p, Document) else await asyncio.to_thread(encode, p) for p, *_ in jobs]
            if self.dead:  # checked here, because the thread may have stopped reading its inbox
                raise Dead(f"the engine has stopped: {self.dead}")
            submissions = [(stream, prompt, *job[1:]) for stream, prompt, job in zip(streams, prompts, jobs)]
            self.call(partial(self._submit, submissions))
            for stream in streams:
                while not stream._accepted:
                    if stream._end:
                        raise stream._end
                    await stream._wait()
            yield streams
        finally:
            self._opened -= len(jobs)
            for stream in streams:
                self.call(partial(self._cancel, stream))

    async def stream(self, prompt: Prompt | Document, sampling: Sampling = Sampling()) -> AsyncGenerator[str, None]:
        """Yield the pieces of a text. Closing the generator or cancelling its reader cancels the request."""
        async with self.open(prompt, sampling) as stream:
            async for piece in stream:
                yield piece

    async def generate(self, prompt: Prompt | Document, sampling: Sampling = Sampling()) -> Request:
        """Return the finished request."""
        async with self.open(prompt, sampling) as stream:
            async for _ in stream:
                pass
            return stream.request

    # All methods below run in the thread.

    def _work(self) -> None:
        while True:
            try:
                return self._serve()
            except BaseException as error:  # without this all requests would wait forever
                logging.getLogger("mm1").exception("the engine's thread failed")
                self._die(Dead(f"{type(error).__name__}: {error}"))
                self._report()

    def _serve(self) -> None:
        """Run commands and steps until None is in the inbox."""
        more = False
        while True:
            until = math.inf
            while not more or not self._inbox.empty():
                self._awake = time.monotonic() if more else None
                command = self._inbox.get()
                self._awake = time.monotonic()
                until = min(until, self._awake + BETWEEN_SECONDS)
                if command is None:
                    self._fail(list(self._streams), self.dead or Dead("the engine is closed"))
                    return self._report()
                command()
                more = True
                if time.monotonic() >= until:
                    break
            self._awake = time.monotonic()
            more = not self.dead and self._step()
            self._report()

    def _warm_up(self, parts: Iterator[None]) -> None:
        """Do one part, and put the next one behind the commands that have arrived meanwhile."""
        try:
            self.warm = time.monotonic() >= self._warm_until or next(parts, True) is True
        except Exception:
            logging.getLogger("mm1").exception("the warm-up failed: kernels are compiled when requests need them")
            self.warm = True
        if not (self.warm or self.dead):
            self.call(partial(self._warm_up, parts))

    def _die(self, why: Dead) -> None:
        """End all requests, and every later one, with this error."""
        self.dead = why
        self._outbox += [(stream, why) for stream in self._streams]
        self._streams.clear()

    def _submit(self, submissions: Sequence[tuple[Stream, Document, Sampling, int]]) -> None:
        """Submit all requests to the engine, or report the error of the first refused one to all of them."""
        submitted: list[Stream] = []
        try:
            for stream, document, sampling, scored in submissions:
                if self.dead:
                    raise Dead(f"the engine has stopped: {self.dead}")
                on_text = partial(self._on_text, stream)
                stream.request = self._streams[stream] = self.engine.submit(document, sampling, on_text, scored)
                submitted.append(stream)
            self._outbox += [(stream, "") for stream in submitted]
        except Exception as error:
            for stream in submitted:
                self._cancel(stream)
            self._outbox += [(stream, error) for stream, *_ in submissions]

    def _on_text(self, stream: Stream, piece: str) -> None:
        self._outbox.append((stream, piece))

    def _cancel(self, stream: Stream) -> None:
        if request := self._streams.pop(stream, None):
            self.engine.cancel(request)

    def _step(self) -> bool:
        try:
            return self.engine.step()
        except Exception as error:
            logging.getLogger("mm1").exception("a step failed")
            error.__traceback__ = None  # its frames hold the step's tensors
            step_error = error
        try:
            failed = self.engine.failed  # perhaps of the warm-up alone, which has no stream
            ended = [s for s, request in self._streams.items() if request in (failed or self.engine.running)]
            self._fail(ended if failed or ended else list(self._streams), step_error)
            torch.zeros(1, device=self.engine.device).item()
        except Exception as error:  # after a CUDA error every later call fails too
            self._die(Dead(f"{error} after {step_error}"))
        return bool(self._streams)

    def _fail(self, streams: list[Stream], error: Exception) -> None:
        for stream in streams:
            own = self._streams[stream].error
            self._outbox.append((stream, own if isinstance(own, Exception) else error))
            self._cancel(stream)

    def _report(self) -> None:
        """Send all messages of a step to the loop at once."""
        for stream in [s for s, request in self._streams.items() if request.finish]:
            del self._streams[stream]
            self._outbox.append((stream, StopAsyncIteration()))
        if self._outbox:
            messages, self._outbox = self._outbox, []
            with suppress(RuntimeError):  # the loop is closed, so nobody waits for them
                self.loop.call_soon_threadsafe(_deliver, messages)


def _deliver(messages: list[tuple[Stream, str | Exception]]) -> None:
    for stream, message in messages:
        stream._receive(message)
