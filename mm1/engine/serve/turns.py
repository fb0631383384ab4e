"""Share resources fairly between requests before the engine accepts them: slow work, memory, and a cache."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from mm1.errors import Busy

V = TypeVar("V")

PASSES = 16  # requests that may take memory before an earlier one that needs more than is free


async def finished(future: asyncio.Future[V]) -> V:
    """Return the result of a thread's work. A cancelled caller waits for the thread before it ends."""
    try:
        return await asyncio.shield(future)
    finally:
        await asyncio.wait([future])


class Limit:
    """Admit at most `size` tasks to a context at once; entering it raises Busy for one more.

    reason: end of the error message, after the number of tasks; active: number of tasks in the context.
    """

    def __init__(self, size: int, reason: str):
        self.size, self.reason, self.active = size, reason, 0

    def __enter__(self) -> None:
        if self.active >= self.size:
            raise Busy(f"{self.active} {self.reason}")
        self.active += 1

    def __exit__(self, *_: object) -> None:
        self.active -= 1


class Turns:
    """Implement a semaphore that is fair between clients: `total` tasks run at once, at most `each` of one client.

    The tasks of a client with many wait for each other, and other clients do not wait for them. running: number of
    tasks by client.
    """

    def __init__(self, total: int, each: int):
        self.total, self.each = total, each
        self.running: Counter[str] = Counter()
        self.waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn of this client, which lasts until the context ends."""
        place = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(place)
        self._start_next()
        try:
            await place
            yield
        finally:
            if place.cancelled():
                self.waiting[client].remove(place)
                if not self.waiting[client]:
                    del self.waiting[client]
            else:
                self.running[client] -= 1
                self.running += Counter()  # drops clients at zero
            self._start_next()

    def _start_next(self) -> None:
        """Start tasks up to the limits: first of the client with the fewest running, then in the order of arrival."""
        while self.running.total() < self.total:
            ready = [(self.running[client], place, client) for client, place in self._first_places()]
            running, place, client = min(ready, key=lambda entry: entry[0], default=(self.each, None, ""))
            if running >= self.each or place is None:
                return
            self.waiting[client].remove(place)
            self.waiting.move_to_end(client)
            if not self.waiting[client]:
                del self.waiting[client]
            place.set_result(None)
            self.running[client] += 1

    def _first_places(self) -> Iterator[tuple[str, "asyncio.Future[None]"]]:
        for client, places in self.waiting.items():
            if place := next((place for place in places if not place.cancelled()), None):
                yield client, place


@dataclass(eq=False)
class Place:
    """Represent a request that waits for memory. passed: number of later requests that were served before it."""

    client: str
    count: int
    future: asyncio.Future[None]
    passed: int = 0


class Room:
    """Reserve bytes from a budget of `size`, first-in, first-out, but so that no client locks out the others.

    A client that has reserved bytes gets more only if its total then is at most the number of free bytes, so one client
    alone can reserve at most half. If too few bytes are free for a request, up to PASSES smaller ones go before it.
    """

    def __init__(self, size: int):
        self.size = self.free = size
        self.by_client: Counter[str] = Counter()
        self.waiting: list[Place] = []

    async def acquire(self, count: int, client: str) -> None:
        """Wait until `count` bytes, at most `size`, are reserved."""
        place = Place(client, count, asyncio.get_running_loop().create_future())
        self.waiting.append(place)
        self._serve_waiting()
        try:
            await place.future
        except asyncio.CancelledError:
            if place.future.cancelled():
                self.waiting = [other for other in self.waiting if other is not place]
                self._serve_waiting()
            else:
                self.release(count, client)
            raise

    def release(self, count: int, client: str) -> None:
        """Return bytes to the budget."""
        self.free += count
        self.by_client[client] -= count
        if not self.by_client[client]:
            del self.by_client[client]
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        passed: list[Place] = []
        for place in list(self.waiting):
            if place.future.cancelled():
                continue
            own = self.by_client[place.client]
            if place.count <= self.free and not (own and own + place.count > self.free):
                self.free -= place.count
                self.by_client[place.client] += place.count
                self.waiting.remove(place)
                place.future.set_result(None)
                for other in passed:
                    other.passed += 1
            elif not own:  # a client that waits for its own bytes makes nobody else wait
                passed.append(place)
            if any(other.passed >= PASSES for other in passed):
                return


class LRUCache(Generic[V]):
    """Cache values by name, at most `limit` bytes in total; the least recently used are evicted."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, name: Hashable) -> V | None:
        """Return a value and mark it as used; None if there is no value of this name."""
        if name not in self._entries:
            return None
        self._entries.move_to_end(name)
        return self._entries[name][0]

    def add(self, name: Hashable, value: V, size: int) -> None:
        """Add a value of `size` bytes, or replace the one of this name."""
        self.size += size - self._entries.get(name, (None, 0))[1]
        self._entries[name] = value, size
        self._entries.move_to_end(name)
        while self.size > self.limit:
            self.size -= self._entries.popitem(last=False)[1][1]
