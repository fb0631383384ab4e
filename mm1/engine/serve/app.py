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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.codecs import codec_of
from mm1.engine.infer.asynchronous import AsyncEngine
from mm1.engine.infer.engine import Engine
from mm1.engine.serve import chat, completions, connections
from mm1.engine.serve.answers import Answers, while_connected
from mm1.engine.serve.arrivals import Arrivals, client_of, read_body, read_form
from mm1.engine.serve.images import Decoder
from mm1.engine.serve.intake import Intake
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.privacy import forbid_inspection
from mm1.engine.serve.refusals import Refusal, exception_handlers, json_response, response
from mm1.engine.serve.replies import Parsed, Reply
from mm1.engine.serve.turns import Limit
from mm1.engine.train.checkpoint import load
from mm1.errors import UserError, at_least

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

WARM_SECONDS = 300  # after which no part of the warm-up begins, and /ready answers as /health does
STALL_SECONDS = 120  # limit of one step of the engine; a longer one makes /health report "stalled" after the warm-up
PACKAGES = ("starlette", "uvicorn", "h11", "python_multipart", "prometheus_client")
OPEN_PATHS = ("/", "/health", "/ready")  # answered without a key
LOOPBACK = re.compile(rb"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)
PAGE_FILE = Path(__file__).with_name("page.html")


class Service:
    """Serve one engine as an ASGI application; nothing else may use the engine from then on.

    name: the model's name for clients; key: the API key that clients must send; max_images: images of one prompt;
    max_pixels: pixels of one image; max_bytes: bytes of one request; allow_urls: whether images are fetched from
    http(s) URLs. Without a key only requests to loopback names are answered, so that no web page can reach the server
    under another name. Raises UserError for a limit below its minimum.
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
        self.active = Limit(engine.capacity, "requests are being processed already")
        self.arrivals = Arrivals(max_bytes)
        room = self.intake.room
        self.metrics.gauge("mm1_body_bytes", "Bytes of request bodies in memory", lambda: self.arrivals.buffered)
        self.metrics.gauge("mm1_view_bytes", "Bytes of decoded images of requests", lambda: room.size - room.free)
        self.created = int(time.time())
        self.template = "none" if engine.model.conversations is False else "conversation"
        self.page = PAGE_FILE.read_text()
        post = partial(Route, methods=["POST"])
        routes = [
            Route("/", self._page), Route("/health", self._health), Route("/ready", self._ready),
            Route("/metrics", self._metrics), Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            post("/v1/files", self._upload),
            post("/v1/chat/completions", self._endpoint(self._parse_chat, chat.Reply)),
            post("/v1/completions", self._endpoint(completions.parse, completions.Reply)),
        ]  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers=exception_handlers(), lifespan=self._lifespan)
        self.app.router.redirect_slashes = False  # a redirect would have no error message

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, complete = 499, False  # 499 is counted for a client that leaves before its answer begins
        headers = [(name, value.lower()) for name, value in scope["headers"]]
        # A client that sent "Expect: 100-continue" and is refused sends no body, so there is none to discard.
        arriving = (b"expect", b"100-continue") not in headers and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers
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
                if arriving:  # the connection discards the rest of the body and closes
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
                raise  # if the answer is complete, Starlette re-raises an error that was logged and answered
        finally:
            if scope["path"].startswith("/v1/"):
                self.metrics.requests.labels(status).inc()

    def _forbid(self, scope: "Scope") -> Refusal | None:
        """Return the refusal of a request without the key or, if there is no key, to another host; None if allowed."""
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
                403, "without an API key the server answers only requests to localhost and from its own page"
            )
        return None

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        async with self.engine, self.decoder:
            self.engine.warm_up(WARM_SECONDS)
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
        """Return the engine's state. Anybody may ask, so only the log has the reason of a failure.

        A long step of the warm-up compiles kernels: whoever restarts stalled servers must not end it.
        """
        engine = self.engine.engine
        if not self.engine.alive:
            return json_response({"status": "dead", "reason": "the engine has stopped"}, 503)
        if (seconds := self.engine.step_seconds) > STALL_SECONDS and not self.engine.warming:
            return json_response({"status": "stalled", "seconds": round(seconds)}, 503)
        pages = {"total": engine.pages, "free": engine.cache.available}
        load = {"running": len(engine.running), "waiting": len(engine.waiting), "pages": pages}
        limits = {"images": self.intake.max_images, "bytes": self.max_bytes}  # of a request, for the page
        return json_response({"status": "ok", "model": self.name, **load, "limits": limits})

    async def _ready(self, request: "Request") -> "Response":
        """Return what /health returns, or 503 during the warm-up, but for at most WARM_SECONDS.

        Afterwards too, a request may wait for a kernel; see Engine.warm_up.
        """
        if self.engine.warming:
            return json_response({"status": "warming up"}, 503, {"retry-after": "1"})
        return await self._health(request)

    async def _metrics(self, _: "Request") -> "Response":
        text, media_type = self.metrics.text()
        return response(text, 200, media_type)

    async def _models(self, _: "Request") -> "Response":
        return json_response({"object": "list", "data": [self.card()]})

    async def _model(self, request: "Request") -> "Response":
        self.answers.expect_name(request.path_params["name"])
        return json_response(self.card())

    def card(self) -> dict[str, Any]:
        """Describe the model. max_model_len, an extension of vLLM: limit of prompt and answer together, in tokens."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mm1",
                "max_model_len": self.engine.engine.context}  # fmt: skip

    async def _upload(self, request: "Request") -> "Response":
        """Store an image in memory under the hash of its bytes; the least recently used are evicted."""
        from starlette.datastructures import UploadFile
        from starlette.requests import ClientDisconnect

        client = client_of(request.scope)

        async def digest_of(data: bytes) -> str:
            """Return the hash of an image. Raises Unreadable for bytes that are no image."""
            await self.intake.views(data, client)
            return (await self.intake.run(lambda: hashlib.sha256(data), len(data), client)).hexdigest()

        receiving = self.arrivals.receive(request)
        async with receiving as limited, read_form(limited, self.max_bytes) as form:
            with self.active:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise UserError("expected multipart/form-data with an image as its field file")
                data = await file.read()
                if (digest := await while_connected(request.receive, digest_of(data))) is None:
                    raise ClientDisconnect
                name = f"file-{digest[:32]}"
                self.intake.files.add(name, data, len(data))
                return json_response({
                    "id": name, "object": "file", "bytes": len(data), "created_at": int(time.time()),
                    "filename": file.filename, "purpose": str(form.get("purpose", "vision")), "status": "processed",
                })  # fmt: skip

    def _parse_chat(self, body: bytes) -> Parsed:
        return chat.parse(body, self.template)

    def _endpoint(self, parse: Callable[[bytes], Parsed], reply: type[Reply]) -> Callable[["Request"], Awaitable[Any]]:
        """Return the handler of a route that generates text. parse, reply: read a request and build its response."""

        async def handle(request: "Request") -> Any:
            """Return an ASGI application, whose response begins when the engine has accepted the request."""
            begun = time.monotonic()

            async def respond(scope: "Scope", receive: "Receive", send: "Send") -> None:
                async with AsyncExitStack() as arrived:
                    body = await read_body(await arrived.enter_async_context(self.arrivals.receive(request)))
                    with self.active:
                        work = self.answers.send(parse, reply, body, arrived, begun, scope, receive, send)
                        del body
                        await while_connected(receive, work)

            return respond

        return handle


def serve(
    checkpoint: Path, *, host: str, port: int, api_key: str | None, engine: dict[str, Any], **limits: Any
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT; see `run`.

    engine, limits: settings of Engine and of Service. Raises UserError for wrong settings, for a missing package, and
    for an address that other machines can reach if there is no key.
    """
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        raise UserError(f"packages for serving are missing: pip install {' '.join(missing)}")
    if not api_key and not _is_loopback(host):
        raise UserError(
            f"{host or 'every address'} can be reached by others: set MM1_API_KEY (api_key), or serve on 127.0.0.1"
        )
    forbid_inspection()
    connections.raise_descriptor_limit()
    folder = checkpoint.absolute()
    name = folder.parent.name if folder.name == "checkpoint" else folder.name
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        service = Service(Engine(load(checkpoint), **engine), name, key=api_key, **limits)
        if service.template == "none":
            logging.getLogger("mm1").warning("%s was not trained on conversations: chats become plain text", name)
        url_host = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{url_host}:{listener.getsockname()[1]}", flush=True)
        run(service, listener)


def run(service: Service, listener: socket.socket, stop_seconds: float = connections.STOP_SECONDS) -> None:
    """Serve requests to a listening socket until SIGTERM or SIGINT; running answers then have stop_seconds to end.

    A step of the engine that does not end then ends the process with status 1. Raises OSError if the server did not
    start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again after it has ended
        signal.signal(number, lambda *_: None)
    server = connections.server_of(service, stop_seconds)
    server.run(sockets=[listener])
    if not server.started:
        raise OSError("the server did not start")
    if service.engine.hangs:  # the interpreter's exit would wait for the thread, whose step does not end
        logging.shutdown()
        os._exit(1)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
