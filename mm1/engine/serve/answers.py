"""Answer a request for text: parse it, prepare its prompts, run the engine, and send the result."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mm1.engine.data.document import Document
from mm1.engine.infer.asynchronous import AsyncEngine, Stream
from mm1.engine.infer.grammar import Grammar, Grammars
from mm1.engine.serve import chat, completions
from mm1.engine.serve.arrivals import client_of
from mm1.engine.serve.body import dumps
from mm1.engine.serve.intake import Intake
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.refusals import Refusal, refusal_of, response
from mm1.engine.serve.turns import Turns, finished
from mm1.errors import Busy, UserError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

Parsed = chat.ChatRequest | completions.CompletionRequest
Emit = Callable[..., Awaitable[None]]

SEND_SECONDS = 60  # limit of the time until a client takes one event of a stream
SCHEMA_SECONDS = 30  # limit of the time that a request waits for its turn to compile a schema


class Answers:
    """Answers requests for text from one engine.

    name: the model's name, which a request may state.
    """

    def __init__(self, engine: AsyncEngine, name: str, intake: Intake, metrics: Metrics):
        self.engine, self.name, self.intake, self.metrics = engine, name, intake, metrics
        self.grammars, self.compilers = Grammars(engine.engine.tokenizer), ThreadPoolExecutor(2, "mm1-grammar")
        self.compiling = Turns(total=2, each=1)

    def close(self) -> None:
        """Stop compiling schemas."""
        self.compilers.shutdown(wait=False, cancel_futures=True)

    def expect_name(self, model: str | None) -> None:
        """Raise Refusal (404) for a model of another name; None stands for this one."""
        if model not in (None, self.name):
            message = f"there is no model {str(model)[:60]!r} here but {self.name!r}"
            raise Refusal(404, message, "model_not_found", "model")

    async def send(
        self, parse: Callable[[bytes], Parsed], body: bytes, arrived: AsyncExitStack, begun: float, scope: "Scope",
        receive: "Receive", send: "Send",
    ) -> None:  # fmt: skip
        """Answer the request in `body` as an ASGI application does.

        arrived: contexts of the body, closed as soon as nothing refers to it; begun: time.monotonic() at which the
        request came. Raises what refusal_of turns into a response, as long as no response has begun.
        """
        client = client_of(scope)
        parsed = await self.intake.run(partial(parse, body), len(body), client)
        del body
        self.expect_name(parsed.settings.model)
        if parsed.texts > (limit := self.engine.engine.capacity):
            raise UserError(f"{parsed.texts} texts in one request, expected at most {limit}")
        grammar = await self._grammar(parsed.settings.schema, client)
        reply = parsed.reply(self.name, self.intake.tokenizer)
        async with AsyncExitStack() as opened:
            documents = [
                p if isinstance(p, Document) else await opened.enter_async_context(self.intake.document(p, client))
                for p in parsed.prompts
            ]
            jobs = parsed.jobs(documents, self.engine.engine.context, grammar)
            settings = parsed.settings
            del parsed
            await arrived.aclose()
            streams = await opened.enter_async_context(self._submit(jobs))
            if settings.stream:
                waits_for = [asyncio.Event() if job.scored else None for job in jobs]
                await self._send_stream(streams, waits_for, reply, settings.usage, begun, send)
            else:
                content = await self._whole(streams, reply, begun, client)
                await response(content, 200, "application/json")(scope, receive, send)

    async def _whole(self, streams: list[Stream], reply: Any, begun: float, client: str) -> bytes:
        """Return the JSON of a whole answer, once all of its texts have ended."""
        requests = [stream.request for stream in streams]
        try:
            await _gather(self._read(stream, begun, None) for stream in streams)
            return await self.intake.run(lambda: dumps(reply.whole(requests)), reply.size(requests), client)
        except Exception as error:
            raise refusal_of(error) from None

    async def _send_stream(
        self, streams: list[Stream], scored: list[asyncio.Event | None], reply: Any, usage: bool, begun: float,
        send: "Send",
    ) -> None:  # fmt: skip
        """Send server-sent events.

        scored: for each text that scores its prompt, an event that is set once the scores are there; None for others.
        """
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(event: dict[str, Any] | str | Callable[[], Any], more: bool = True) -> None:
            if callable(event):  # a prompt may have millions of scores: they are written in a thread
                make = event
                event = (await self.intake.run(lambda: dumps(make()))).decode() if any(scored) else make()
            text = event if isinstance(event, str) else json.dumps(event)
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            await _gather(self._send_text(i, stream, begun, reply, emit, scored) for i, stream in enumerate(streams))
            if usage:
                await emit(reply.last([stream.request for stream in streams]))
            await emit("[DONE]", more=False)
        except TimeoutError:
            return  # an answer without an end makes the server close the connection
        except Exception as error:
            await emit(refusal_of(error).body, more=False)

    async def _send_text(
        self, index: int, stream: Stream, begun: float, reply: Any, emit: Emit, scored: list[asyncio.Event | None]
    ) -> None:
        """Send the events of one text. A text whose prompt is scored by an earlier text waits for its scores."""
        request = stream.request
        for event in reply.begin(index, request):
            await emit(event)
        own = scored[index]
        if not own and (earlier := next((event for event in scored[index::-1] if event), None)):
            await earlier.wait()

        async def emit_scored(make: Callable[[], Any]) -> None:
            if own:
                own.set()
            await emit(make)

        await self._read(stream, begun, lambda piece: emit_scored(lambda: reply.piece(index, request, piece)))
        await emit_scored(lambda: reply.end(index, request))

    async def _read(self, stream: Stream, begun: float, on_piece: Callable[[str], Awaitable[None]] | None) -> None:
        """Read a text to its end, and record how long its tokens took."""
        first = None
        async for piece in stream:
            first = first or time.monotonic()
            if on_piece:
                await on_piece(piece)
        ended, count = time.monotonic(), len(stream.request.tokens)
        self.metrics.first.observe((first or ended) - begun)
        if first and count > 1:
            self.metrics.next.observe((ended - first) / (count - 1))

    async def _grammar(self, schema: str | None, client: str) -> Grammar | None:
        """Compile a schema, which may take seconds, in the client's turn. Raises SchemaError and Busy."""
        if schema is None:
            return None
        if grammar := self.grammars.cached(schema):
            return grammar
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(SCHEMA_SECONDS):
                    await turn.enter_async_context(self.compiling.turn(client))
            except TimeoutError:
                raise Busy("other schemas are being compiled") from None
            compiled = asyncio.get_running_loop().run_in_executor(self.compilers, self.grammars.compile, schema)
            return await finished(compiled)

    @asynccontextmanager
    async def _submit(self, jobs: list[chat.Job]) -> AsyncIterator[list[Stream]]:
        """Submit all texts of a request, and count their tokens when the context ends."""
        async with self.engine.open_many(jobs) as streams:
            try:
                yield streams
            finally:
                for stream in streams:
                    self.metrics.count(stream.request)


async def while_connected(receive: "Receive", work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine; cancel it when the client disconnects."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if not tasks[0].cancelled():
        tasks[0].result()


async def _gather(work: Any) -> None:
    """Run all coroutines; when one fails, cancel the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
