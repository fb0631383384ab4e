"""Limit the number of a server's connections, and the time that each stage of a connection takes.

uvicorn alone would wait without limit for the head of a request and for a client to read a complete answer.
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

HEAD_SECONDS = 10  # limit from a connection, or the first byte of its next request, to a complete head
IDLE_SECONDS = 30  # limit between requests: longer than clients reuse a connection, so that they close it first
SEND_SECONDS = 60  # limit of the time in which a client reads nothing of an answer
SEND_BYTES = 1 << 16  # minimum that a client must read of a complete answer in each second after that
UNSENT_BYTES = 1 << 28  # limit of all complete answers in memory; beyond it the oldest are aborted
LINGER_SECONDS = 20  # limit of the time to receive and discard the rest of a body after an early answer
QUIET_SECONDS = 2  # limit of a pause in that rest
PROBE_SECONDS = 2  # between probes of a client that has closed its sending side and waits for an answer
STOP_SECONDS = 10  # limit of the time for running answers to end when the server stops
READ_BYTES = 1 << 14  # limit of bytes read from one connection before the others have their turn
ACCEPT = 16  # limit of connections accepted in one turn of the event loop
BACKLOG = 512  # limit of connections that wait in the kernel to be accepted
CONNECTIONS = 2048  # limit of open connections
SPARE = 96  # descriptors reserved for image workers, URLs and files
CLOSE = (b"connection", b"close")


def raise_descriptor_limit() -> None:
    """Raise the process's soft limit of file descriptors to the hard limit, where the system has such limits."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limit() -> int:
    """Return the limit of open connections that leaves enough descriptors for everything else."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    except (ImportError, OSError):
        return CONNECTIONS
    return CONNECTIONS if limit == resource.RLIM_INFINITY else max(8, min(CONNECTIONS, limit - used - SPARE))


def server_of(app: Any, stop_seconds: float = STOP_SECONDS) -> "uvicorn.Server":
    """Return a server of an ASGI application with these limits; uvicorn is imported here because it is optional.

    stop_seconds: limit of the time for running answers to end when the server stops.
    """
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from mm1.engine.serve.reader import Reader

    max_connections = connection_limit()

    class Transport:
        """Wrap asyncio's transport so that closing it while a body arrives lets the client read the answer first.

        The system would otherwise send a reset at once, which can overtake the answer (RFC 9112, 9.6).
        """

        def __init__(self, transport: Any, connection: "Connection"):
            self.transport, self.connection = transport, connection
            transport.max_size = READ_BYTES

        def __getattr__(self, name: str) -> Any:
            return getattr(self.transport, name)

        def is_closing(self) -> bool:
            return self.connection.lingers or self.transport.is_closing()

        def close(self) -> None:
            if self.is_closing() or not self.connection.sending:
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
        """Record the stage of a connection and when it began, and end a stage that takes too long.

        lingers: whether the answer was sent and arriving bytes are discarded; discarded: number of these bytes.
        """

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.conn = Reader()
            self.half_closed = self.lingers = False
            self.discarded = 0
            self.stage: tuple[str, Any] = ("head", None)  # as _stage returns it
            self.since = self.begun = self.loop.time()  # beginning of the stage, and of all stages of its name in a row
            self.patience = math.inf  # seconds, limit of the latter

        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast("Any", Transport(transport, self)))
            if len(self.connections) > max_connections:
                dropped = self._least_needed()
                dropped.transport.abort()
                dropped.forget()  # at once: others may connect before the loop reports it as lost
            if self in self.connections:
                waiting[self] = None

        def _least_needed(self) -> "Connection":
            """Return the connection to drop: the one that has waited longest without a request.

            A connection that still has to send an answer is dropped only if no other waits. If all are receiving or
            answering a request, the new connection is dropped.
            """
            others = [c for c in chain(waiting, cast("set[Connection]", self.connections)) if c is not self]
            for stages in (("head", "idle", "linger"), ("flush",)):
                if waiter := next((c for c in others if c._stage()[0] in stages), None):
                    return waiter
            return self

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.forget()

        def forget(self) -> None:
            self.connections.discard(self)
            waiting.pop(self, None)

        def data_received(self, data: bytes) -> None:
            if self.lingers:
                self.discarded += len(data)
            else:
                super().data_received(data)

        @property
        def arrived(self) -> bool:
            """Return whether a complete request has arrived whose answer is not complete."""
            return bool(self.cycle) and not self.cycle.more_body and not self.cycle.response_complete

        @property
        def sending(self) -> bool:
            """Return whether the client may still be sending a request, or bytes that are no valid request."""
            return not self.half_closed and self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

        def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Keep the connection open for the answer to a client that has closed its sending side.

            An HTTP/1.0 client counts as disconnected, because it cannot be probed before its response (see _probe).
            """
            if self.arrived and not self.lingers and self.scope["http_version"] == "1.1":
                self.half_closed, self.probed = True, self.loop.time()
                self._close_after_last()
            return self.half_closed

        def on_response_complete(self) -> None:
            super().on_response_complete()  # it also begins to answer the next request if that has arrived
            if self.half_closed and not self.transport.is_closing():
                if self.arrived:
                    self._close_after_last()
                else:
                    self.transport.close()

        def _close_after_last(self) -> None:
            """Close the connection after the current answer unless another request has arrived."""
            if not self.conn.trailing_data[0]:
                self.cycle.keep_alive = False
                self.headers.append(CLOSE)  # in the request's headers, from which uvicorn copies it to the response

        def _stage(self) -> tuple[str, Any]:
            """Return the stage: a name and a value; a change of either begins a new stage.

            linger: an answer was sent before its whole request had arrived, and the client is still sending.
            flush: an answer is complete, aborted or blocked, and the client has not read all of its bytes.
            work: the body of a request is arriving or the request is being answered.
            head: the head of a request is arriving.
            idle: nothing has arrived since the last answer.
            """
            answered = self.cycle is None or self.cycle.response_complete
            unsent = self.transport.get_write_buffer_size()
            if self.lingers:
                return "linger", self.discarded
            if self.transport.is_closing() or (unsent and (answered or self.flow.write_paused)):
                return "flush", unsent
            if not answered:
                return "work", self.cycle
            arriving = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
            return "head" if arriving or not self.cycle else "idle", self.cycle

        def check(self, now: float) -> None:
            """Update the stage, and end a connection whose stage takes too long."""
            if (stage := self._stage()) != self.stage:
                if stage[0] != self.stage[0]:
                    self.begun = now
                    sending = SEND_SECONDS + self.transport.get_write_buffer_size() / SEND_BYTES
                    self.patience = {"linger": LINGER_SECONDS, "flush": sending}.get(stage[0], math.inf)
                self.stage, self.since = stage, now
                waiting.pop(self, None)
                if stage[0] != "work":
                    waiting[self] = None
            age = now - self.since
            limit = {"head": HEAD_SECONDS, "linger": QUIET_SECONDS, "flush": SEND_SECONDS}.get(stage[0], math.inf)
            if stage[0] == "head" and age > limit:
                self._time_out_head()
            elif age > limit or now - self.begun > self.patience:
                self.transport.abort()
            elif stage[0] == "work" and self.half_closed:
                self._probe(now)

        def _time_out_head(self) -> None:
            """Answer an incomplete head with 408; close a connection on which no head has begun."""
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(408, "Request Timeout", f"the head of the request took more than {HEAD_SECONDS} s")
            else:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            """Refuse bytes that are no valid request or that are built to be slow to parse; uvicorn calls this."""
            self._refuse(400, "Bad Request", f"this is not a valid request of HTTP/1.1: {self.conn.problem}")

        def _refuse(self, status: int, reason: str, message: str) -> None:
            """Send an error in OpenAI's form if no answer has begun, and close the connection."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
                body = json.dumps({"error": error}).encode()
                headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), CLOSE]
                for event in (h11.Response(status_code=status, headers=headers, reason=reason),
                              h11.Data(data=body), h11.EndOfMessage()):  # fmt: skip
                    self.transport.write(self.conn.send(event) or b"")
            if self.cycle:  # wakes the task that reads the request's body
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _probe(self, now: float) -> None:
            """Find out whether a client that closed its sending side has disconnected.

            A disconnected client looks like one that only stopped sending, until bytes are sent to it: then its system
            answers with a reset. Before a response any number of 100 Continue may be sent (RFC 9110, 15.2).
            """
            if self.transport.get_extra_info("socket").getsockopt(SOL_SOCKET, SO_ERROR):
                self.transport.abort()
            elif now - self.probed > PROBE_SECONDS:
                self.probed = now
                if not self.cycle.response_started:
                    event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                    self.transport.write(self.conn.send(event) or b"")

    waiting: dict[Connection, None] = {}  # connections without a request, in the order in which they began to wait

    class Server(uvicorn.Server):
        """Check all connections at every tick, ten times a second."""

        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in sockets or ():
                listener.listen(BACKLOG)  # uvicorn's backlog is also how many connections asyncio accepts in one turn

        async def on_tick(self, counter: int) -> bool:
            now = asyncio.get_running_loop().time()
            opened = cast("list[Connection]", list(self.server_state.connections))
            for connection in opened:
                connection.check(now)
            flushing = [c for c in opened if c.stage[0] == "flush"]
            unsent = sum(c.stage[1] for c in flushing)
            for connection in sorted(flushing, key=lambda c: c.begun):
                if unsent <= UNSENT_BYTES:
                    break
                unsent -= connection.stage[1]
                connection.transport.abort()
            return await super().on_tick(counter)

    # No proxy headers: a client could name another address and use up that client's turns.
    return Server(uvicorn.Config(
        app, http=Connection, loop="asyncio", ws="none", lifespan="on", log_level="error", access_log=False,
        server_header=False, proxy_headers=False, backlog=ACCEPT, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=cast("Any", stop_seconds),
    ))  # fmt: skip
