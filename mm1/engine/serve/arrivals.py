"""Receive request bodies within limits of number, size and time, beyond which the slowest ones are dropped.

A client with few bodies loses none to a client with many, and a body that arrives steadily is not dropped for one that
stalls.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mm1.engine.serve.body import TooLarge
from mm1.engine.serve.refusals import Refusal
from mm1.errors import Busy

if TYPE_CHECKING:
    from starlette.datastructures import FormData
    from starlette.requests import Request
    from starlette.types import Message, Scope

BODIES = 512  # limit of bodies that arrive at the same time
BODY_SECONDS = 60  # limit of the time in which one body arrives
SPEED_SECONDS = 5  # time constant of the average that measures a body's speed
GRACE_BYTES = 1 << 16  # bytes that a new body is credited with, so that it is not the slowest at once
BUFFERED_BODIES = 32  # limit of the memory of all bodies, in bodies of the largest size
SMALL = 512  # a body of less than 1/512 of the largest size is never dropped for lack of memory


class Body:
    """Track a body that is arriving. timeout: the time limit of the task that waits for the next piece, if any."""

    def __init__(self, client: str):
        self.client = client
        self.size, self.recent, self.last = 0, float(GRACE_BYTES), asyncio.get_running_loop().time()
        self.dropped = False
        self.timeout: asyncio.Timeout | None = None

    def speed(self) -> float:
        """Return the recently received bytes; a byte's weight falls exponentially with its age."""
        return self.recent * math.exp((self.last - asyncio.get_running_loop().time()) / SPEED_SECONDS)

    def add(self, count: int) -> None:
        """Count the bytes of a piece that has just arrived."""
        self.recent, self.last = self.speed() + count, asyncio.get_running_loop().time()
        self.size += count

    def check(self) -> None:
        """Raise Busy if the body was dropped."""
        if self.dropped:
            raise Busy("too many requests are arriving, and this one is the slowest")

    def drop(self) -> None:
        """Make the task that reads the body raise Busy, at once if it is waiting."""
        self.dropped = True
        if self.timeout:
            self.timeout.reschedule(asyncio.get_running_loop().time())


class Arrivals:
    """Limit the memory of all request bodies together, from their first byte until their request is encoded.

    max_bytes: limit of one body; buffered: bytes of all bodies now in memory.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.buffered = 0
        self.arriving: set[Body] = set()
        self.dropping = 0  # bytes of dropped bodies that are still in memory

    @asynccontextmanager
    async def receive(self, request: "Request") -> AsyncIterator["Request"]:
        """Yield the request with a limited body, which counts as buffered until the context ends.

        Reading the body raises TooLarge beyond max_bytes, Refusal (408) after BODY_SECONDS, and Busy if it is dropped.
        """
        from starlette.requests import Request

        too_large = TooLarge(f"the request has more than {self.max_bytes} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise too_large
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        body = self.begin(client_of(request.scope))

        async def receive() -> "Message":
            try:
                async with asyncio.timeout_at(0 if body.dropped else deadline) as body.timeout:
                    message = await request.receive()
            except TimeoutError:
                body.check()
                raise Refusal(408, f"the request took more than {BODY_SECONDS} s to arrive") from None
            finally:
                body.timeout = None
            body.check()
            size = len(message.get("body", b""))
            body.add(size)
            self.buffered += size
            if body.size > self.max_bytes:
                raise too_large
            self._limit(body)
            if not message.get("more_body"):
                self.arriving.discard(body)
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self.arriving.discard(body)
            self.buffered -= body.size
            self.dropping -= body.size if body.dropped else 0

    def begin(self, client: str) -> Body:
        """Return a new body. Beyond BODIES, drop the slowest body of the client with the most bodies."""
        body = Body(client)
        self.arriving.add(body)
        if len(self.arriving) > BODIES:
            counts = Counter(each.client for each in self.arriving)
            self._drop(min(self.arriving, key=lambda each: (-counts[each.client], each.speed())))
        return body

    def _limit(self, body: Body) -> None:
        """Drop the slowest body of the client with the most bytes if all bodies together exceed their memory.

        Small bodies are not dropped: a client that sends many large ones slowly would otherwise lock everybody out.
        Raises Busy if `body` is the one to drop.
        """
        small = self.max_bytes // SMALL
        if self.buffered - self.dropping > BUFFERED_BODIES * self.max_bytes and body.size > small:
            sizes = Counter[str]()
            for each in self.arriving:
                sizes[each.client] += each.size
            large = (each for each in self.arriving if each.size > small)
            self._drop(min(large, key=lambda each: (-sizes[each.client], each.speed()), default=body))
        body.check()

    def _drop(self, body: Body) -> None:
        self.arriving.discard(body)
        self.dropping += body.size
        body.drop()


def client_of(scope: "Scope") -> str:
    """Return the client's address, by which clients share resources."""
    return (scope.get("client") or ("",))[0]


async def read_body(request: "Request") -> bytes:
    """Return the whole body; the request keeps no copy."""
    return b"".join([piece async for piece in request.stream()])


@asynccontextmanager
async def read_form(request: "Request", max_bytes: int) -> AsyncIterator["FormData"]:
    """Parse multipart/form-data in memory; by default Starlette would write files of more than 1 MB to disk."""
    from starlette.datastructures import FormData
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser

    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        yield FormData()
        return
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8)
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    try:
        yield form
    finally:
        await form.close()
