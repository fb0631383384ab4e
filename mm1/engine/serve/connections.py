"""Connections of strangers: time limits below HTTP, and a bound on how many there are.

uvicorn alone waits for a request's head, and for a reader of an answer that is complete, as long as the client likes.
"""

import asyncio
import json
import math
import os
from contextlib import suppress
from itertools import chain
from pathlib import Path
from socket import SO_ERROR, SOL_SOCKET, socket
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import uvicorn

HEAD_SECONDS = 10  # from a connection, or the first byte of its next request, to a complete head
IDLE_SECONDS = 30  # between requests: longer than clients keep a connection, or both could use and close it at once
SEND_SECONDS = 60  # for a reader to take anything of an answer
SEND_BYTES = 1 << 16  # that it takes in each further second
UNSENT_BYTES = 1 << 28  # of all answers that are complete; beyond, the oldest of them are given up
LINGER_SECONDS = 20  # for the rest of a body that was answered before it had come
QUIET_SECONDS = 2  # in which nothing of it comes
PROBE_SECONDS = 2  # between signs to a client that has closed its sending side and waits for an answer
READ_BYTES = 1 << 14  # of a connection, before the others have their turn
ACCEPT = 16  # connections accepted at a time
BACKLOG = 512  # connections that the kernel holds
MOST = 2048  # connections
SPARE = 96  # descriptors for image workers, URLs and files
CLOSE = (b"connection", b"close")


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one, where the system has such limits."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections() -> int:
    """Return how many connections leave enough descriptors for everything else."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    except (ImportError, OSError):
        return MOST
    return MOST if limit == resource.RLIM_INFINITY else max(8, min(MOST, limit - used - SPARE))


def server_of(app: Any, stop_seconds: int) -> "uvicorn.Server":
    """Return a server of an ASGI application with these limits. uvicorn is imported here because it is optional."""
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from mm1.engine.serve.reader import Reader

    most = most_connections()

    class Transport:
        """asyncio's transport, but one that is closed while a body arrives first lets the client read the answer.

        The system would send a reset at once, which can overtake the answer (RFC 9112, 9.6).
        """

        def __init__(self, transport: Any, connection: "Connection"):
            self.transport, self.connection = transport, connection
            transport.max_size = READ_BYTES

        def __getattr__(self, name: str) -> Any:
            return getattr(self.transport, name)

        def is_closing(self) -> bool:
            return self.connection.lingers or self.transport.is_closing()

        def close(self) -> None:
            if self.is_closing() or not self.connection.sends:
                self.transport.close()
            else:
                self.connection.lingers = True
                try:
                    self.transport.write_eof()
                except OSError:  # the client has gone
                    self.transport.close()
                else:
                    self.transport.resume_reading()

    class Connection(H11Protocol):
        """A connection that knows what it waits for, and since when.

        lingers: whether it is answered, and what still comes is thrown away unread. thrown: bytes of that.
        """

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.conn = Reader()
            self.half_closed = self.lingers = False
            self.thrown = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast("Any", Transport(transport, self)))
            self.since = self.begun = self.loop.time()  # of the stage, and of all stages of its name
            self.patience = math.inf
            self.stage = self._stage()
            if len(self.connections) > most:
                last = self._least_needed()
                last.transport.abort()
                last.forget()  # now: others may come before the loop tells that it is lost
            if self in self.connections:
                waiting[self] = None

        def _least_needed(self) -> "Connection":
            """Return the connection that has waited longest; one with an answer to take only if no other waits, one
            whose request arrives or is answered never: then the new one goes."""
            others = [c for c in chain(waiting, cast("set[Connection]", self.connections)) if c is not self]
            for stages in (("head", "idle", "linger"), ("flush",)):
                if found := next((c for c in others if c._stage()[0] in stages), None):
                    return found
            return self

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.forget()

        def forget(self) -> None:
            self.connections.discard(self)
            waiting.pop(self, None)

        def data_received(self, data: bytes) -> None:
            if self.lingers:
                self.thrown += len(data)
            else:
                super().data_received(data)

        @property
        def arrived(self) -> bool:
            """Say if a whole request is here that has no whole answer yet."""
            return bool(self.cycle) and not self.cycle.more_body and not self.cycle.response_complete

        @property
        def sends(self) -> bool:
            """Say if more of a request has yet to come, or of what is none."""
            return not self.half_closed and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

        def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Keep the way back open for a client that has sent all of its requests. One that speaks HTTP/1.0 has
            left: nothing but a response can be sent to it that would show it (see _probe)."""
            if self.arrived and not self.lingers and self.scope["http_version"] == "1.1":
                self.half_closed, self.probed = True, self.loop.time()
                self._close_behind_last()
            return self.half_closed

        def on_response_complete(self) -> None:
            super().on_response_complete()  # which begins with the next request if that is here
            if self.half_closed and not self.transport.is_closing():
                if self.arrived:
                    self._close_behind_last()
                else:
                    self.transport.close()

        def _close_behind_last(self) -> None:
            """Let the present answer be the last if no other request is here."""
            if not self.conn.trailing_data[0]:
                self.cycle.keep_alive = False
                self.headers.append(CLOSE)  # of the request: uvicorn repeats it in the response

        def _stage(self) -> tuple[str, Any]:
            """Return the stage; one that differs in either item is a new one.

            linger: an answer was given before its request had come, and the client is still sending.
            flush: an answer is complete, was given up or cannot go on, and the client has yet to take its bytes.
            work: a request is arriving or is being answered.
            head: a head is arriving.
            idle: nothing has come since the last answer.
            """
            answered = self.cycle is None or self.cycle.response_complete
            unsent = self.transport.get_write_buffer_size()
            if self.lingers:
                return "linger", self.thrown
            if self.transport.is_closing() or (unsent and (answered or self.flow.write_paused)):
                return "flush", unsent
            if not answered:
                return "work", self.cycle
            arriving = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
            return "head" if arriving or not self.cycle else "idle", self.cycle

        def look(self, now: float) -> None:
            """End what has lasted too long."""
            if (stage := self._stage()) != self.stage:
                if stage[0] != self.stage[0]:
                    self.begun = now
                    taking = SEND_SECONDS + self.transport.get_write_buffer_size() / SEND_BYTES
                    self.patience = {"linger": LINGER_SECONDS, "flush": taking}.get(stage[0], math.inf)
                self.stage, self.since = stage, now
                waiting.pop(self, None)
                if stage[0] != "work":
                    waiting[self] = None
            lasted = now - self.since
            most = {"head": HEAD_SECONDS, "linger": QUIET_SECONDS, "flush": SEND_SECONDS}.get(stage[0], math.inf)
            if stage[0] == "head" and lasted > most:
                self._give_up_head()
            elif lasted > most or now - self.begun > self.patience:
                self.transport.abort()
            elif stage[0] == "work" and self.half_closed:
                self._probe(now)

        def _give_up_head(self) -> None:
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(408, "Request Timeout", f"the head of the request took more than {HEAD_SECONDS} s")
            else:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            """Refuse bytes that are no request: h11 calls them so, or they are made to be slow to read."""
            self._refuse(400, "Bad Request", f"this is not a valid request of HTTP/1.1: {self.conn.problem}")

        def _refuse(self, status: int, reason: str, message: str) -> None:
            """Answer in OpenAI's form if no answer has begun, and close."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
                body = json.dumps({"error": error}).encode()
                headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), CLOSE]
                for event in (h11.Response(status_code=status, headers=headers, reason=reason),
                              h11.Data(data=body), h11.EndOfMessage()):  # fmt: skip
                    self.transport.write(self.conn.send(event) or b"")
            if self.cycle:  # whoever reads its body
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _probe(self, now: float) -> None:
            """Notice that a client which had closed its sending side has left.

            A client that has left looks like one that only sends no more, until something is sent to it: then its
            system answers with a reset. Before a response, any number of 100 Continue may be sent (RFC 9110, 15.2).
            """
            if self.transport.get_extra_info("socket").getsockopt(SOL_SOCKET, SO_ERROR):
                self.transport.abort()
            elif now - self.probed > PROBE_SECONDS:
                self.probed = now
                if not self.cycle.response_started:
                    event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                    self.transport.write(self.conn.send(event) or b"")

    waiting: dict[Connection, None] = {}  # those without a request, the longest first

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in sockets or ():
                listener.listen(BACKLOG)  # uvicorn's backlog is also how many asyncio accepts before it does anything

        async def on_tick(self, counter: int) -> bool:
            now = asyncio.get_running_loop().time()
            opened = cast("list[Connection]", list(self.server_state.connections))
            for connection in opened:
                connection.look(now)
            flushing = [c for c in opened if c.stage[0] == "flush"]
            unsent = sum(c.stage[1] for c in flushing)
            for connection in sorted(flushing, key=lambda c: c.begun):
                if unsent <= UNSENT_BYTES:
                    break
                unsent -= connection.stage[1]
                connection.transport.abort()
            return await super().on_tick(counter)

    # The address is that of the connection: whoever could name another one would take the turns of others.
    return Server(uvicorn.Config(
        app, http=Connection, loop="asyncio", ws="none", lifespan="on", log_level="error", access_log=False,
        server_header=False, proxy_headers=False, backlog=ACCEPT, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=stop_seconds,
    ))  # fmt: skip
