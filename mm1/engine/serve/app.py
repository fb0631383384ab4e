"""`mm1 serve`: a checkpoint behind OpenAI's chat API, with a page to try it on."""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.document import Document
from mm1.engine.infer.asynchronous import AsyncEngine, Dead, Stream
from mm1.engine.infer.engine import Busy, Engine
from mm1.engine.infer.grammar import Grammar, Grammars, SchemaError
from mm1.engine.infer.prompts import policy_of
from mm1.engine.serve import chat, completions, connections
from mm1.engine.serve.arrivals import Arrivals
from mm1.engine.serve.body import TooLarge, dumps
from mm1.engine.serve.images import Decoder
from mm1.engine.serve.intake import Intake
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.privacy import checked_key, forbid_inspection, take_from_environment
from mm1.engine.serve.turns import Turns, finished
from mm1.errors import Unreadable, UserError, at_least

if TYPE_CHECKING:
    import uvicorn
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

Asked = chat.Asked | completions.Asked

BODY_SECONDS = 60  # for a request to arrive
SEND_SECONDS = 60  # for a reader to take anything
SCHEMA_SECONDS = 30  # that a request waits for a turn at compiling its schema
STALL_SECONDS = 120  # of one step of the engine, from which on it counts as hung
STOP_SECONDS = 10  # for answers to end when the server is to
OPEN = ("/", "/health")  # without a key
LOOPBACK = re.compile(rb"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)
PAGE_FILE = Path(__file__).with_name("page.html")


class Refusal(Exception):
    """What a client is told, as OpenAI would."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    match error:
        case Refusal():
            return error
        case TooLarge():
            return Refusal(413, str(error), connection="close")
        case SchemaError():
            message = f"response_format: the schema cannot be followed: {error}"
            return Refusal(400, message, "invalid_json_schema", "response_format")
        case UserError() | Unreadable():
            return Refusal(400, str(error), param=getattr(error, "param", None))
        case Busy():
            return Refusal(429, str(error), "rate_limit_exceeded", retry_after="1")
        case Dead():
            return _logged(503, "the engine has stopped", error, "engine_dead")
        case ClientDisconnect():
            return Refusal(499, "the client left")
        case HTTPException():
            return Refusal(error.status_code, error.detail, **(error.headers or {}))
    return _logged(500, "internal error", error)


def _logged(status: int, what: str, error: Exception, code: str | None = None) -> Refusal:
    """Return a refusal without what the error says, which the log alone has, under the same number."""
    number = secrets.token_hex(6)
    logging.getLogger("mm1").error("request %s: %s", number, what, exc_info=error)
    return Refusal(status, f"{what}: the server's log has more under request {number}", code)


class Service:
    """The ASGI application of one engine, which is its own from then on.

    max_pixels: of one image; max_bytes: of one request. Without a key it answers to loopback names alone, so that no
    web page can reach it under another name.
    """

    def __init__(
        self, engine: Engine, name: str, *, key: str | None = None, max_images: int = 32, max_pixels: int = 1 << 25,
        max_bytes: int = 1 << 25, allow_urls: bool = False,
    ):  # fmt: skip
        from starlette.applications import Starlette
        from starlette.routing import Route

        at_least(0, max_images=max_images)
        at_least(1, max_pixels=max_pixels, max_bytes=max_bytes)
        self.engine, self.name, self.key, self.max_bytes = AsyncEngine(engine), name, key, max_bytes
        self.decoder, self.metrics = Decoder(policy_of(engine.model), max_pixels), Metrics(engine)
        self.intake = Intake(
            engine, self.decoder, self.metrics, max_images=max_images, max_bytes=max_bytes, allow_urls=allow_urls
        )
        self.active = self.held = 0  # requests that have arrived, and bytes of all bodies
        self.arrivals = Arrivals(32 * max_bytes)
        room = self.intake.room
        self.metrics.gauge("mm1_body_bytes", "Bytes of bodies that the engine has not yet", lambda: self.held)
        self.metrics.gauge("mm1_view_bytes", "Bytes of images of requests", lambda: room.size - room.left)
        self.begun = int(time.time())
        self.grammars, self.compilers = Grammars(engine.tokenizer), ThreadPoolExecutor(2, "mm1-grammar")
        self.compiling = Turns(most=2, each=1)
        self.plain, self.warned = engine.model.conversations is False, False
        self.page = PAGE_FILE.read_text()
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/files", self._upload, methods=["POST"]),
                Route("/v1/chat/completions", self._answers(self._parsed_chat), methods=["POST"]),
                Route("/v1/completions", self._answers(completions.parse), methods=["POST"]),
            ],
            exception_handlers={Exception: _refused, **dict.fromkeys(_expected(), _refused)},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False  # a redirect has no body that says what is wrong

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, complete = 499, False  # the client left before it had an answer
        # Who waits to be told to go on (Expect: 100-continue) sends nothing that would have to be thrown away.
        arriving = (b"expect", b"100-continue") not in [(name, value.lower()) for name, value in scope["headers"]]
        arriving = arriving and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )

        async def received() -> "Message":
            nonlocal arriving
            message = await receive()
            arriving = message.get("more_body", False)
            return message

        async def sent(message: "Message") -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if arriving:  # the connection throws the rest away unread
                    others = [pair for pair in message["headers"] if pair[0] != b"connection"]
                    message = {**message, "headers": [*others, connections.CLOSE]}
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            if refusal := self._forbids(scope):
                await _json(refusal.body, refusal.status, refusal.headers)(scope, received, sent)
            else:
                await self.app(scope, received, sent)
        except Exception:
            if not complete:
                raise  # else Starlette raises once more what has been logged and answered
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.requests.labels(status).inc()

    def _forbids(self, scope: "Scope") -> Refusal | None:
        headers = dict(scope["headers"])
        if self.key:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key.encode())
            if scope["path"] in OPEN or right:
                return None
            return Refusal(401, "wrong or missing API key", "invalid_api_key", www_authenticate="Bearer")
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if not LOOPBACK.fullmatch(host) or origin not in (None, b"http://" + host):
            return Refusal(403, "without an API key this server answers to its own page and to loopback names alone")
        return None

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        async with self.engine, self.decoder:
            yield
        self.intake.close()
        self.compilers.shutdown(wait=False, cancel_futures=True)

    async def _page(self, _: "Request") -> "Response":
        hashes = {
            tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", self.page, re.DOTALL)
        }
        policy = (
            f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff",
                   "referrer-policy": "no-referrer", "cache-control": "no-cache"}  # fmt: skip
        return _response(self.page, 200, "text/html", headers)

    async def _health(self, _: "Request") -> "Response":
        engine = self.engine.engine
        if not self.engine.alive:  # why is said in the log: everybody may ask here
            return _json({"status": "dead", "reason": "the engine has stopped"}, 503)
        if (seconds := self.engine.step_seconds) > STALL_SECONDS:
            return _json({"status": "stalled", "seconds": round(seconds)}, 503)
        pages = {"total": engine.cache.pages, "free": engine.cache.room}
        now = {"running": len(engine.running), "waiting": len(engine.waiting), "pages": pages}
        limits = {"images": self.intake.max_images, "bytes": self.max_bytes}  # of a request, which the page looks at
        return _json({"status": "ok", "model": self.name, **now, "limits": limits})

    async def _metrics(self, _: "Request") -> "Response":
        text, media_type = self.metrics.text()
        return _response(text, 200, media_type)

    async def _models(self, _: "Request") -> "Response":
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: "Request") -> "Response":
        self._refuse_other(request.path_params["name"])
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        """Describe the model. max_model_len is vLLM's extension: the longest prompt and answer together, in tokens."""
        return {"id": self.name, "object": "model", "created": self.begun, "owned_by": "mm1",
                "max_model_len": self.engine.engine.context}  # fmt: skip

    def _refuse_other(self, model: str | None) -> None:
        if model not in (None, self.name):
            message = f"there is no model {str(model)[:60]!r} here but {self.name!r}"
            raise Refusal(404, message, "model_not_found", "model")

    async def _upload(self, request: "Request") -> "Response":
        """An image, kept in memory by its content, the last used longest."""
        from starlette.datastructures import UploadFile
        from starlette.requests import ClientDisconnect

        client, hashed = _client(request.scope), ""

        async def looked_at(data: bytes) -> None:
            nonlocal hashed
            await self.intake.views(data, client)
            digest = await self.intake.run(lambda: hashlib.sha256(data), len(data), client)
            hashed = digest.hexdigest()

        async with self._bounded(request) as bounded, _form(bounded, self.max_bytes) as form, self._counted():
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise UserError("expected multipart/form-data with an image as its field file")
            data = await file.read()
            await _while_connected(request.receive, looked_at(data))
            if not hashed:
                raise ClientDisconnect
            name = f"file-{hashed[:32]}"
            self.intake.files.keep(name, data, len(data))
            return _json({
                "id": name, "object": "file", "bytes": len(data), "created_at": int(time.time()),
                "filename": file.filename, "purpose": str(form.get("purpose", "vision")), "status": "processed",
            })  # fmt: skip

    def _parsed_chat(self, body: bytes) -> chat.Asked:
        if self.plain and not self.warned:
            self.warned = True
            logging.getLogger("mm1").warning(
                "%s was not trained on conversations: chats are given to it as plain text", self.name
            )
        return chat.parse(body, "none" if self.plain else "conversation")

    def _answers(self, parse: Callable[[bytes], Asked]) -> Callable[["Request"], Awaitable[Any]]:
        async def answer(request: "Request") -> Any:
            """Return an ASGI application: a response that begins when the engine has taken the request."""
            begun = time.monotonic()

            async def respond(scope: "Scope", receive: "Receive", send: "Send") -> None:
                async with AsyncExitStack() as arrived:
                    body = await _whole(await arrived.enter_async_context(self._bounded(request)))
                    async with self._counted():
                        work = self._answer(parse, body, arrived, begun, scope, receive, send)
                        del body
                        await _while_connected(receive, work)

            return respond

        return answer

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Count a request that has arrived and is worked on. Raises Busy if there are too many."""
        if self.active >= self.engine.engine.batch + self.engine.engine.queue:
            raise Busy(f"{self.active} requests are being worked on already")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    @asynccontextmanager
    async def _bounded(self, request: "Request") -> AsyncIterator["Request"]:
        """Yield the same request, refused while it arrives if it is too large or slow; its bytes count until the end
        of the context."""
        from starlette.requests import Request

        too_large = Refusal(413, f"the request has more than {self.max_bytes} bytes", connection="close")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise too_large
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        body = self.arrivals.begin(_client(request.scope))

        async def receive() -> "Message":
            try:
                async with asyncio.timeout_at(0 if body.given_up else deadline) as body.waits:
                    message = await request.receive()
            except TimeoutError:
                body.check()
                raise Refusal(408, f"the request took more than {BODY_SECONDS} s to arrive") from None
            finally:
                body.waits = None
            body.check()
            size = len(message.get("body", b""))
            body.add(size)
            self.held += size
            if body.size > self.max_bytes:
                raise too_large
            self.arrivals.bound(body, self.held, self.max_bytes // 512)
            if not message.get("more_body"):
                self.arrivals.end(body)
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self.held -= body.size
            self.arrivals.free(body)

    async def _answer(
        self, parse: Callable[[bytes], Asked], body: bytes, arrived: AsyncExitStack, begun: float, scope: "Scope",
        receive: "Receive", send: "Send",
    ) -> None:  # fmt: skip
        """arrived: what ends once nothing is left of the body."""
        client = _client(scope)
        asked = await self.intake.run(partial(parse, body), len(body), client)
        del body
        self._refuse_other(asked.settings.model)
        if asked.texts > (most := self.engine.engine.batch + self.engine.engine.queue):
            raise UserError(f"{asked.texts} texts in one request, expected at most {most}")
        grammar, reply = (
            await self._grammar(asked.settings.schema, client),
            asked.reply(self.name, self.intake.tokenizer),
        )
        async with AsyncExitStack() as opened:
            documents = [
                p if isinstance(p, Document) else await opened.enter_async_context(self.intake.document(p, client))
                for p in asked.prompts
            ]
            jobs = asked.jobs(documents, self.engine.engine.context, grammar)
            asked = asked.settings
            await arrived.aclose()
            streams = await opened.enter_async_context(self._opened(jobs))
            requests = [stream.request for stream in streams]
            if not asked.stream:
                try:
                    await _all(self._pieces(stream, begun, None) for stream in streams)
                    size = reply.size(requests)
                    content = await self.intake.run(lambda: dumps(reply.whole(requests)), size, client)
                except Exception as error:
                    raise refusal_of(error) from None
                return await _response(content, 200, "application/json")(scope, receive, send)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

            scored = [asyncio.Event() if job.scored else None for job in jobs]  # set once its prompt has its scores

            async def emit(event: dict[str, Any] | str | Callable[[], Any], more: bool = True) -> None:
                if callable(event):  # of scores there may be millions
                    make = event
                    event = (await self.intake.run(lambda: dumps(make()))).decode() if any(scored) else make()
                text = event if isinstance(event, str) else json.dumps(event)
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

            try:
                await _all(self._streamed(i, stream, begun, reply, emit, scored) for i, stream in enumerate(streams))
                if asked.usage:
                    await emit(reply.last(requests))
                await emit("[DONE]", more=False)
            except TimeoutError:
                return  # which makes the server close the connection
            except Exception as error:
                await emit(refusal_of(error).body, more=False)

    async def _grammar(self, schema: str | None, client: str) -> Grammar | None:
        """Compile a schema, which may take seconds, in the client's turn. Raises SchemaError and Busy."""
        if schema is None:
            return None
        if known := self.grammars.known(schema):
            return known
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(SCHEMA_SECONDS):
                    await turn.enter_async_context(self.compiling.turn(client))
            except TimeoutError:
                raise Busy("other schemas are being compiled") from None
            compiled = asyncio.get_running_loop().run_in_executor(self.compilers, self.grammars.of_schema, schema)
            return await finished(compiled)

    async def _streamed(
        self, index: int, stream: Stream, begun: float, reply: Any, emit: Callable, scored: list[asyncio.Event | None]
    ) -> None:
        """scored: of each choice that scores its prompt, for those behind it too, which wait for that."""
        request = stream.request
        for event in reply.begin(index, request):
            await emit(event)
        own = scored[index]
        if not own and (other := next((event for event in scored[index::-1] if event), None)):
            await other.wait()

        async def told(make: Callable[[], Any]) -> None:
            if own:
                own.set()
            await emit(make)

        await self._pieces(stream, begun, lambda piece: told(lambda: reply.piece(index, request, piece)))
        await told(lambda: reply.end(index, request))

    async def _pieces(self, stream: Stream, begun: float, take: Callable[[str], Awaitable[None]] | None) -> None:
        first = None
        async for piece in stream:
            first = first or time.monotonic()
            if take:
                await take(piece)
        ended, made = time.monotonic(), len(stream.request.tokens)
        self.metrics.first.observe((first or ended) - begun)
        if first and made > 1:
            self.metrics.next.observe((ended - first) / (made - 1))

    @asynccontextmanager
    async def _opened(self, jobs: list[chat.Job]) -> AsyncIterator[list[Stream]]:
        async with self.engine.open_many(jobs) as streams:
            try:
                yield streams
            finally:
                for stream in streams:
                    self.metrics.count(stream.request)


async def _all(work: Any) -> None:
    """All of them; when one fails the others end, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _while_connected(receive: "Receive", work: Coroutine[Any, Any, None]) -> None:
    """Ends the work when the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if not tasks[0].cancelled():
        tasks[0].result()


async def _whole(request: "Request") -> bytes:
    """The body, of which the request keeps nothing."""
    return b"".join([piece async for piece in request.stream()])


def _client(scope: "Scope") -> str:
    """Who takes turns with others: an address."""
    return (scope.get("client") or ("",))[0]


@asynccontextmanager
async def _form(request: "Request", most: int) -> AsyncIterator["FormData"]:
    """Parse multipart/form-data of at most so many bytes in memory: Starlette alone has files of the disk for it."""
    from starlette.datastructures import FormData
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser

    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        yield FormData()
        return
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8)
    parser.spool_max_size = most
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    try:
        yield form
    finally:
        await form.close()


def _expected() -> tuple[type[Exception], ...]:
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    return Refusal, UserError, SchemaError, Unreadable, Busy, Dead, HTTPException, ClientDisconnect


async def _refused(_: "Request", error: Exception) -> "Response":
    refusal = refusal_of(error)
    return _json(refusal.body, refusal.status, refusal.headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    return _response(json.dumps(content), status, "application/json", headers)


def _response(content: str | bytes, status: int, kind: str, headers: dict[str, str] | None = None) -> "Response":
    from starlette.responses import Response

    return Response(content, status, headers, kind)


def serve(
    checkpoint: Path, *, host: str, port: int, api_key: str | None, engine: dict[str, Any], **limits: Any
) -> None:
    """Until SIGTERM or SIGINT: then it takes nothing more, and what runs has STOP_SECONDS.

    engine, limits: settings of Engine and of Service. Raises UserError, also for an address that others can reach
    without a key.
    """
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'mm1-engine[serve]'") from None
    from mm1.engine.train.checkpoint import load

    in_environment = take_from_environment("MM1_API_KEY")
    key = api_key or in_environment
    if key:
        key = checked_key(key, "--api-key-file" if api_key else "MM1_API_KEY")
    if not key and not _loopback(host):
        raise UserError(f"{host or 'every address'} can be reached by others: set MM1_API_KEY, or serve on 127.0.0.1")
    forbid_inspection()
    connections.raise_descriptor_limit()
    folder = checkpoint.absolute()
    name = folder.parent.name if folder.name == "checkpoint" else folder.name
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        service = Service(Engine(load(checkpoint), **engine), name, key=key, **limits)
        for number in (signal.SIGINT, signal.SIGTERM):  # which uvicorn raises once more when it has ended
            signal.signal(number, lambda *_: None)
        where = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{where}:{listener.getsockname()[1]}", flush=True)
        server = server_of(service)
        server.run(sockets=[listener])
    if not server.started:
        raise OSError("the server did not start")
    if service.engine.hangs:  # also the interpreter would wait for what its thread waits for
        logging.shutdown()
        os._exit(1)


def server_of(service: Service) -> "uvicorn.Server":
    return connections.server_of(service, STOP_SECONDS)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
