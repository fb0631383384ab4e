"""An Engine behind asyncio: a thread of its own takes the steps, requests come and go as coroutines.

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import torch

from mm1.engine.data.document import Document
from mm1.engine.infer.engine import Busy, Engine
from mm1.engine.infer.prompts import Prompt, encode_prompts
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling

BETWEEN_SECONDS = 0.005  # between two steps, after which no more requests are taken that have come
STOP_SECONDS = 10  # for the last step to end


class Dead(RuntimeError):
    """The engine has ended, and why."""


class Stream:
    """Pieces of one request's text; what has come since the last look comes as one, so that slow readers hold no more
    than the text. Raises what the engine failed with.

    request: what it has come to; whole when the pieces end.
    """

    request: Request

    def __init__(self):
        self._pieces: list[str] = []
        self._news = asyncio.Event()
        self._taken = False  # whether the engine has the request
        self._end: Exception | None = None  # StopAsyncIteration for a good one

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> str:
        while not self._pieces:
            if self._end:
                raise self._end
            await self._heard()
        text, self._pieces = "".join(self._pieces), []
        return text

    async def _heard(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _hear(self, news: str | Exception) -> None:
        if isinstance(news, Exception):
            self._end = self._end or news
        else:
            self._taken = True
            self._pieces += [news] if news else []
        self._news.set()


class AsyncEngine:
    """Use it with `async with`, in one loop. The engine is then its thread's alone.

    A step that fails ends the requests that it computed, each with its own error, and the next goes on without them.
    Where it is not known which these were, all that run end. dead: why nothing more is computed, once the device does
    not answer any longer. Leaving it waits for the present step, but not for one that hangs.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.dead: Exception | None = None
        self._closed = False
        self._opened = 0  # the loop's
        self._awake: float | None = None  # since when the thread does what it does; None while it waits for work
        self._streams: dict[Stream, Request] = {}  # the thread's, as is
        self._news: list[tuple[Stream, str | Exception]] = []  # what is to be told to the loop
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mm1-engine", daemon=True)

    async def __aenter__(self) -> "AsyncEngine":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.dead, self._closed = self.dead or Dead("the engine is closed"), True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if self.hangs:
            logging.getLogger("mm1").error("the engine's step has taken %.0f s: it is left behind", self.step_seconds)

    @property
    def hangs(self) -> bool:
        """Say if the engine was closed and its thread goes on, in a step that does not end."""
        return self._closed and self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return not self.dead and self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """Return how long the thread has been in its present step; 0 if it waits for work."""
        awake = self._awake
        return time.monotonic() - awake if awake else 0.0

    @asynccontextmanager
    async def open(
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), scored: int = 0
    ) -> AsyncIterator[Stream]:
        """Submit a request, which is cancelled if it is left before its end. Raises Busy, UserError and Dead."""
        async with self.open_many([(prompt, sampling, scored)]) as [stream]:
            yield stream

    @asynccontextmanager
    async def open_many(self, jobs: Sequence[tuple[Prompt | Document, Sampling, int]]) -> AsyncIterator[list[Stream]]:
        """Submit requests between the same two steps: all of them, or none if one is refused.

        jobs: what `open` takes. Each is cancelled if it is left before its end. Raises Busy, UserError and Dead.
        """
        if not self._thread.is_alive():
            ended = Dead("the engine's thread has ended") if self._thread.ident else None
            raise self.dead or ended or RuntimeError("an AsyncEngine is used within `async with`")
        if self._opened + len(jobs) > self.engine.batch + self.engine.queue:
            raise Busy(f"{self._opened} requests are being worked on already")
        self._opened += len(jobs)
        streams = [Stream() for _ in jobs]
        try:
            prompts = await self._encoded([prompt for prompt, *_ in jobs])
            if self.dead:  # looked at here, because its thread may not look any more
                raise Dead(f"the engine has stopped: {self.dead}")
            asked = [(stream, prompt, *job[1:]) for stream, prompt, job in zip(streams, prompts, jobs)]
            self._inbox.put(partial(self._submit, asked))
            for stream in streams:
                while not stream._taken:
                    if stream._end:
                        raise stream._end
                    await stream._heard()
            yield streams
        finally:
            self._opened -= len(jobs)
            for stream in streams:
                self._inbox.put(partial(self._cancel, stream))

    async def _encoded(self, prompts: Sequence[Prompt | Document]) -> list[Document]:
        rest = [prompt for prompt in prompts if not isinstance(prompt, Document)]
        made = iter(
            await asyncio.to_thread(encode_prompts, self.engine.model, rest, self.engine.context) if rest else ()
        )
        return [prompt if isinstance(prompt, Document) else next(made) for prompt in prompts]

    async def stream(self, prompt: Prompt | Document, sampling: Sampling = Sampling()) -> AsyncGenerator[str, None]:
        """Pieces of the text. Closing it, or cancelling who reads it, cancels the request."""
        async with self.open(prompt, sampling) as stream:
            async for piece in stream:
                yield piece

    async def generate(self, prompt: Prompt | Document, sampling: Sampling = Sampling()) -> Request:
        """The finished request."""
        async with self.open(prompt, sampling) as stream:
            async for _ in stream:
                pass
            return stream.request

    # From here on in the thread.

    def _work(self) -> None:
        while True:
            try:
                return self._serve()
            except BaseException as error:  # nobody would be told otherwise, and all would wait
                logging.getLogger("mm1").exception("the engine's thread failed")
                self._die(Dead(f"{type(error).__name__}: {error}"))
                self._report()

    def _serve(self) -> None:
        more = False
        while True:
            until = time.monotonic() + BETWEEN_SECONDS if more else math.inf
            while not more or not self._inbox.empty():
                self._awake = time.monotonic() if more else None
                command = self._inbox.get()
                self._awake = time.monotonic()
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

    def _die(self, why: Dead) -> None:
        """From now on every request is told why none is answered."""
        self.dead = why
        self._news += [(stream, why) for stream in self._streams]
        self._streams.clear()

    def _submit(self, asked: Sequence[tuple[Stream, Document, Sampling, int]]) -> None:
        submitted: list[Stream] = []
        try:
            for stream, document, sampling, scored in asked:
                if self.dead:
                    raise Dead(f"the engine has stopped: {self.dead}")
                tell = partial(self._tell, stream)
                stream.request = self._streams[stream] = self.engine.submit(document, sampling, tell, scored)
                submitted.append(stream)
            self._news += [(stream, "") for stream in submitted]
        except Exception as error:
            for stream in submitted:
                self._cancel(stream)
            self._news += [(stream, error) for stream, *_ in asked]

    def _tell(self, stream: Stream, piece: str) -> None:
        self._news.append((stream, piece))

    def _cancel(self, stream: Stream) -> None:
        if request := self._streams.pop(stream, None):
            self.engine.cancel(request)

    def _step(self) -> bool:
        try:
            return self.engine.step()
        except Exception as error:
            logging.getLogger("mm1").exception("a step failed")
            error.__traceback__ = None  # its frames hold the step's tensors
            failed = error
        try:
            ended = [s for s, request in self._streams.items() if request.finish == "failed"]
            running = [s for s, request in self._streams.items() if request in self.engine.running]
            self._fail(ended or running or list(self._streams), failed)
            torch.zeros(1, device=self.engine.device).item()
        except Exception as error:  # CUDA's errors stay
            self._die(Dead(f"{error} after {failed}"))
        return bool(self._streams)

    def _fail(self, streams: list[Stream], error: Exception) -> None:
        for stream in streams:
            own = self._streams[stream].error
            self._news.append((stream, own if isinstance(own, Exception) else error))
            self._cancel(stream)

    def _report(self) -> None:
        """All news of a step at once."""
        for stream in [s for s, request in self._streams.items() if request.finish]:
            del self._streams[stream]
            self._news.append((stream, StopAsyncIteration()))
        if self._news:
            news, self._news = self._news, []
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Stream, str | Exception]]) -> None:
    for stream, what in news:
        stream._hear(what)
