"""Serve a checkpoint behind OpenAI's HTTP API, with a page to try it on: `mm1 serve`."""

import base64
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.codecs import codec_of
from mm1.engine.infer.asynchronous import AsyncEngine
from mm1.engine.infer.engine import Engine
from mm1.engine.serve import chat, completions, connections
from mm1.engine.serve.answers import Answers, Parsed, while_connected
from mm1.engine.serve.arrivals import Arrivals, client_of, read_body, read_form
from mm1.engine.serve.images import Decoder
from mm1.engine.serve.intake import Intake
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.privacy import checked_key, forbid_inspection, take_from_environment
from mm1.engine.serve.refusals import Refusal, exception_handlers, json_response, response
from mm1.engine.serve.turns import Limit
from mm1.errors import UserError, at_least

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

STALL_SECONDS = 120  # of one step of the engine; /health then says "stalled"
STOP_SECONDS = 10  # in which running answers may end when the server stops
OPEN_PATHS = ("/", "/health")  # answered without a key
LOOPBACK = re.compile(rb"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)
PAGE_FILE = Path(__file__).with_name("page.html")


class Service:
    """Serves one engine as an ASGI application; nothing else may use the engine from then on.

    name: the model's name for clients; key: the API key that clients must send; max_images: images of one prompt;
    max_pixels: of one image; max_bytes: of one request; allow_urls: whether images are fetched from http(s) URLs.
    Without a key it answers only requests to loopback names, so that no web page reaches it under another name.
    Raises UserError for a limit below its minimum.
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
        self.decoder, self.metrics = Decoder(codec_of(engine.model.config), max_pixels), Metrics(engine)
        self.intake = Intake(
            engine, self.decoder, self.metrics, max_images=max_images, max_bytes=max_bytes, allow_urls=allow_urls
        )
        self.answers = Answers(self.engine, name, self.intake, self.metrics)
        self.active = Limit(engine.capacity, "requests are being worked on already")
        self.arrivals = Arrivals(max_bytes)
        room = self.intake.room
        self.metrics.gauge("mm1_body_bytes", "Bytes of request bodies in memory", lambda: self.arrivals.buffered)
        self.metrics.gauge("mm1_view_bytes", "Bytes of decoded images of requests", lambda: room.size - room.free)
        self.created = int(time.time())
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
                Route("/v1/chat/completions", self._endpoint(self._parse_chat), methods=["POST"]),
                Route("/v1/completions", self._endpoint(completions.parse), methods=["POST"]),
            ],
            exception_handlers=exception_handlers(),
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False  # a redirect has no body that says what is wrong

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, complete = 499, False  # the status that is counted if the client leaves before it has an answer
        # A client that sent "Expect: 100-continue" and is refused sends no body, so there is none to discard.
        arriving = (b"expect", b"100-continue") not in [(name, value.lower()) for name, value in scope["headers"]]
        arriving = arriving and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )

        async def watched_receive() -> "Message":
            nonlocal arriving
            message = await receive()
            arriving = message.get("more_body", False)
            return message

        async def watched_send(message: "Message") -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if arriving:  # the connection discards the rest of the body unread, and closes
                    others = [pair for pair in message["headers"] if pair[0] != b"connection"]
                    message = {**message, "headers": [*others, connections.CLOSE]}
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            if refusal := self._forbid(scope):
                answer = json_response(refusal.body, refusal.status, refusal.headers)
                await answer(scope, watched_receive, watched_send)
            else:
                await self.app(scope, watched_receive, watched_send)
        except Exception:
            if not complete:
                raise  # otherwise Starlette re-raises an error that has been logged and answered
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.requests.labels(status).inc()

    def _forbid(self, scope: "Scope") -> Refusal | None:
        """Return why a request may not be answered: no key, or another host than this one; None if it may."""
        headers = dict(scope["headers"])
        if self.key:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            valid = scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.key.encode())
            if scope["path"] in OPEN_PATHS or valid:
                return None
            return Refusal(401, "wrong or missing API key", "invalid_api_key", www_authenticate="Bearer")
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if not LOOPBACK.fullmatch(host) or origin not in (None, b"http://" + host):
            return Refusal(
                403, "without an API key this server answers only its own page and requests to loopback names"
            )
        return None

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        async with self.engine, self.decoder:
            yield
        self.intake.close()
        self.answers.close()

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
        return response(self.page, 200, "text/html", headers)

    async def _health(self, _: "Request") -> "Response":
        """Return the engine's state. Everybody may ask, so the reason of a failure is in the log alone."""
        engine = self.engine.engine
        if not self.engine.alive:
            return json_response({"status": "dead", "reason": "the engine has stopped"}, 503)
        if (seconds := self.engine.step_seconds) > STALL_SECONDS:
            return json_response({"status": "stalled", "seconds": round(seconds)}, 503)
        pages = {"total": engine.pages, "free": engine.cache.room}
        load = {"running": len(engine.running), "waiting": len(engine.waiting), "pages": pages}
        limits = {"images": self.intake.max_images, "bytes": self.max_bytes}  # of a request, which the page shows
        return json_response({"status": "ok", "model": self.name, **load, "limits": limits})

    async def _metrics(self, _: "Request") -> "Response":
        text, media_type = self.metrics.text()
        return response(text, 200, media_type)

    async def _models(self, _: "Request") -> "Response":
        return json_response({"object": "list", "data": [self.card()]})

    async def _model(self, request: "Request") -> "Response":
        self.answers.expect_name(request.path_params["name"])
        return json_response(self.card())

    def card(self) -> dict[str, Any]:
        """Describe the model. max_model_len is vLLM's extension: the limit of prompt and answer together, in tokens."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mm1",
                "max_model_len": self.engine.engine.context}  # fmt: skip

    async def _upload(self, request: "Request") -> "Response":
        """Store an image in memory under the hash of its bytes; the least recently used are evicted."""
        from starlette.datastructures import UploadFile
        from starlette.requests import ClientDisconnect

        client, digest = client_of(request.scope), ""

        async def check(data: bytes) -> None:
            nonlocal digest
            await self.intake.views(data, client)
            digest = (await self.intake.run(lambda: hashlib.sha256(data), len(data), client)).hexdigest()

        receiving = self.arrivals.receive(request)
        async with receiving as limited, read_form(limited, self.max_bytes) as form:
            with self.active:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise UserError("expected multipart/form-data with an image as its field file")
                data = await file.read()
                await while_connected(request.receive, check(data))
                if not digest:
                    raise ClientDisconnect
                name = f"file-{digest[:32]}"
                self.intake.files.add(name, data, len(data))
                return json_response({
                    "id": name, "object": "file", "bytes": len(data), "created_at": int(time.time()),
                    "filename": file.filename, "purpose": str(form.get("purpose", "vision")), "status": "processed",
                })  # fmt: skip

    def _parse_chat(self, body: bytes) -> chat.ChatRequest:
        if self.plain and not self.warned:
            self.warned = True
            logging.getLogger("mm1").warning(
                "%s was not trained on conversations: chats are given to it as plain text", self.name
            )
        return chat.parse(body, "none" if self.plain else "conversation")

    def _endpoint(self, parse: Callable[[bytes], Parsed]) -> Callable[["Request"], Awaitable[Any]]:
        """Return a route's handler for requests that `parse` reads."""

        async def handle(request: "Request") -> Any:
            """Return an ASGI application: a response that begins when the engine has taken the request."""
            begun = time.monotonic()

            async def respond(scope: "Scope", receive: "Receive", send: "Send") -> None:
                async with AsyncExitStack() as arrived:
                    body = await read_body(await arrived.enter_async_context(self.arrivals.receive(request)))
                    with self.active:
                        work = self.answers.send(parse, body, arrived, begun, scope, receive, send)
                        del body
                        await while_connected(receive, work)

            return respond

        return handle


def serve(
    checkpoint: Path, *, host: str, port: int, api_key: str | None, engine: dict[str, Any], **limits: Any
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT; running answers then have STOP_SECONDS to end.

    engine, limits: settings of Engine and of Service. Raises UserError for wrong settings, for a missing package, and
    for an address that other machines can reach if there is no key.
    """
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'mm1-engine[serve]'") from None
    from mm1.engine.train.checkpoint import load

    environment_key = take_from_environment("MM1_API_KEY")
    key = api_key or environment_key
    if key:
        key = checked_key(key, "--api-key-file" if api_key else "MM1_API_KEY")
    if not key and not _is_loopback(host):
        raise UserError(f"{host or 'every address'} can be reached by others: set MM1_API_KEY, or serve on 127.0.0.1")
    forbid_inspection()
    connections.raise_descriptor_limit()
    folder = checkpoint.absolute()
    name = folder.parent.name if folder.name == "checkpoint" else folder.name
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        service = Service(Engine(load(checkpoint), **engine), name, key=key, **limits)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again after it has ended
            signal.signal(number, lambda *_: None)
        url_host = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{url_host}:{listener.getsockname()[1]}", flush=True)
        server = server_of(service)
        server.run(sockets=[listener])
    if not server.started:
        raise OSError("the server did not start")
    if service.engine.hangs:  # the interpreter's exit would wait for the thread, whose step does not end
        logging.shutdown()
        os._exit(1)


def server_of(service: Service) -> "uvicorn.Server":
    """Return a server of this application with the limits of connections.py."""
    return connections.server_of(service, STOP_SECONDS)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
