"""Answer a request for text: parse it, prepare its prompts, run the engine, and send the result."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mm1.engine.data.document import Document
from mm1.engine.infer.asynchronous import AsyncEngine, Stream
from mm1.engine.infer.grammar import Grammar, Grammars
from mm1.engine.serve.arrivals import client_of
from mm1.engine.serve.body import dumps
from mm1.engine.serve.intake import Intake
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.refusals import Refusal, refusal_of, response
from mm1.engine.serve.replies import Parsed, Reply
from mm1.engine.serve.turns import Turns, finished
from mm1.errors import Busy, UserError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")

SEND_SECONDS = 60  # limit of the time until a client takes one event of a stream
SCHEMA_SECONDS = 30  # limit of the time that a request waits for its turn to compile a schema


class Answers:
    """Answer requests for text from one engine.

    name: the model's name, which a request may contain.
    """

    def __init__(self, engine: AsyncEngine, name: str, intake: Intake, metrics: Metrics):
        self.engine, self.name, self.intake, self.metrics = engine, name, intake, metrics
        self.grammars, self.compilers = Grammars(engine.engine.tokenizer), ThreadPoolExecutor(2, "mm1-grammar")
        self.compiling = Turns(total=2, each=1)

    def close(self) -> None:
        """Stop compiling schemas."""
        self.compilers.shutdown(wait=False, cancel_futures=True)

    def expect_name(self, model: str | None) -> None:
        """Raise Refusal (404) for a model of another name; None means this one."""
        if model not in (None, self.name):
            message = f"there is no model {str(model)[:60]!r} here but {self.name!r}"
            raise Refusal(404, message, "model_not_found", "model")

    async def send(
        self, parse: Callable[[bytes], Parsed], reply_class: type[Reply], body: bytes, arrived: AsyncExitStack,
        begun: float, scope: "Scope", receive: "Receive", send: "Send",
    ) -> None:  # fmt: skip
        """Answer the request in `body` as an ASGI application does.

        parse, reply_class: read a request, and build its response; arrived: contexts of the body, closed as soon as
        nothing refers to it; begun: time.monotonic() when the request arrived. Raises the errors that refusal_of turns
        into a response, as long as no response has begun.
        """
        client = client_of(scope)
        parsed = await self.intake.run(partial(parse, body), len(body), client)
        del body
        self.expect_name(parsed.settings.model)
        if parsed.texts > (limit := self.engine.engine.capacity):
            raise UserError(f"{parsed.texts} texts in one request, expected at most {limit}")
        grammar = await self._grammar(parsed.settings.schema, client)
        reply = reply_class(self.name, self.intake.tokenizer, parsed)
        async with AsyncExitStack() as opened:
            documents = [
                p if isinstance(p, Document) else await opened.enter_async_context(self.intake.document(p, client))
                for p in parsed.prompts
            ]
            jobs = parsed.jobs(documents, self.engine.engine.context, grammar)
            del parsed
            await arrived.aclose()
            streams = await opened.enter_async_context(self.engine.open_many(jobs))
            requests = [stream.request for stream in streams]
            for request in requests:
                opened.callback(self.metrics.count, request)
            if reply.parsed.settings.stream:
                scored = [asyncio.Event() if job.scored else None for job in jobs]
                await self._send_stream(streams, scored, reply, begun, send)
                return
            try:
                await _gather(self._read(stream, begun) for stream in streams)
                content = await self.intake.run(lambda: dumps(reply.whole(requests)), reply.size(requests), client)
            except Exception as error:
                raise refusal_of(error) from None
            await response(content, 200, "application/json")(scope, receive, send)

    async def _send_stream(
        self, streams: list[Stream], scored: list[asyncio.Event | None], reply: Reply, begun: float, send: "Send"
    ) -> None:
        """Send server-sent events.

        scored: for each text that scores its prompt, an event to set once the scores are computed; None for others.
        """
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(data: str, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        async def emit_text(index: int, stream: Stream) -> None:
            """Send the events of one text. A text whose prompt an earlier text scores waits for the scores."""
            own = scored[index]
            if not own and (earlier := next((event for event in scored[index::-1] if event), None)):
                await earlier.wait()

            async def emit_chunk(make: Callable[..., Any], *more: str) -> None:
                if own:
                    own.set()
                if any(scored):  # a prompt may have millions of scores, so a thread writes such a chunk
                    await emit((await self.intake.run(lambda: dumps(make(index, *more)))).decode())
                else:
                    await emit(json.dumps(make(index, *more)))

            await self._read(stream, begun, partial(emit_chunk, reply.piece))
            await emit_chunk(reply.end)

        try:
            for chunk in reply.begin([stream.request for stream in streams]):
                await emit(json.dumps(chunk))
            await _gather(emit_text(i, stream) for i, stream in enumerate(streams))
            if reply.parsed.settings.usage:
                await emit(json.dumps(reply.last()))
            await emit("[DONE]", more=False)
        except TimeoutError:
            return  # the server closes the connection of an incomplete answer
        except Exception as error:
            await emit(json.dumps(refusal_of(error).body), more=False)

    async def _read(
        self, stream: Stream, begun: float, on_piece: Callable[[str], Awaitable[None]] | None = None
    ) -> None:
        """Read a text to its end, and record the time of its tokens."""
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


async def while_connected(receive: "Receive", work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of a coroutine; cancel it when the client disconnects, and return None."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.wait([task, leaving])
    return None if task.cancelled() else task.result()


async def _gather(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all coroutines; when one fails, cancel the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
