"""Connections of strangers: time limits below HTTP, and a bound on how many there are.

uvicorn alone waits for a request's head, and for a reader of an answer that is complete, as long as the client likes.
"""

import asyncio
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
SEND_SECONDS = 60  # for a reader to take a complete answer, or anything of one that is not
PROBE_SECONDS = 2  # between signs to a client that has closed its sending side and waits for an answer
ACCEPT = 16  # connections accepted at a time
BACKLOG = 512  # connections that the kernel holds
MOST = 2048  # connections
SPARE = 96  # descriptors for image workers, URLs and files
BAD_HEAD = b'{"error": {"message": "the head of the request took more than %d s", "type": "invalid_request_error"}}'


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

    most = most_connections()

    class Connection(H11Protocol):
        """A connection that knows what it waits for, and since when."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.since = self.loop.time()
            self.half_closed = False
            self.stage = self._stage()
            if len(self.connections) > most:
                others = (c for c in chain(waiting, cast("set[Connection]", self.connections)) if c is not self)
                last = next((c for c in others if not c.arrived), self)  # an upload only if nobody else waits
                last.transport.abort()
                last.forget()  # now: others may come before the loop tells that it is lost
            if self in self.connections:
                waiting[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.forget()

        def forget(self) -> None:
            self.connections.discard(self)
            waiting.pop(self, None)

        @property
        def arrived(self) -> bool:
            """Say if a whole request is here that has no whole answer yet."""
            return bool(self.cycle) and not self.cycle.more_body and not self.cycle.response_complete

        def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Keep the way back open for a client that has sent all of its request."""
            if self.arrived:
                self.half_closed, self.probed = True, self.loop.time()
                self.cycle.keep_alive = False
            return self.half_closed

        def _stage(self) -> tuple[str, Any]:
            """Return the stage; one that differs in either item is a new one.

            flush: an answer is complete or was given up, and the client has yet to take its bytes.
            work: a request is arriving or is being answered.
            head: a head is arriving, or a body that nobody waits for.
            idle: nothing has come since the last answer.
            """
            answered = self.cycle is None or self.cycle.response_complete
            unsent = self.transport.get_write_buffer_size()
            if self.transport.is_closing() or (answered and unsent):
                return "flush", unsent
            if not answered:
                return "work", self.cycle
            arriving = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
            return "head" if arriving or not self.cycle else "idle", self.cycle

        def look(self, now: float) -> None:
            """End what has lasted too long."""
            if (stage := self._stage()) != self.stage:
                self.stage, self.since = stage, now
                waiting.pop(self, None)
                if stage[0] != "work":
                    waiting[self] = None
            lasted = now - self.since
            if stage[0] == "head" and lasted > HEAD_SECONDS:
                self._close()
            elif stage[0] == "flush" and lasted > SEND_SECONDS:
                self.transport.abort()
            elif stage[0] == "work" and self.half_closed:
                self._probe(now)

        def _close(self) -> None:
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                body = BAD_HEAD % HEAD_SECONDS
                headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                           ("connection", "close")]  # fmt: skip
                for event in (h11.Response(status_code=408, headers=headers, reason="Request Timeout"),
                              h11.Data(data=body), h11.EndOfMessage()):  # fmt: skip
                    self.transport.write(self.conn.send(event) or b"")
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
                if not self.cycle.response_started and self.scope["http_version"] == "1.1":
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
            for connection in cast("list[Connection]", list(self.server_state.connections)):
                connection.look(now)
            return await super().on_tick(counter)

    return Server(uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False,
        backlog=ACCEPT, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=stop_seconds,
    ))  # fmt: skip
