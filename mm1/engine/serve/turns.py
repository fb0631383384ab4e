"""What requests share before the engine has them: turns at work that takes long, and bytes of memory."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

PASSES = 16  # who may have room before one that came earlier and needs more than there is


async def finished(future: asyncio.Future[V]) -> V:
    """Return what a thread makes. Who asked may have gone: its turn lasts until the thread is free."""
    try:
        return await asyncio.shield(future)
    finally:
        await asyncio.wait([future])


class Turns:
    """Lets `most` go at once, of one client at most `each`. Who asks for many waits for itself, not another for it."""

    def __init__(self, most: int, each: int):
        self.most, self.each = most, each
        self.going: Counter[str] = Counter()
        self.waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        place = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(place)
        self._call()
        try:
            await place
            yield
        finally:
            if place.cancelled():
                self.waiting[client].remove(place)
                if not self.waiting[client]:
                    del self.waiting[client]
            else:
                self.going[client] -= 1
                self.going += Counter()  # drops those at zero
            self._call()

    def _call(self) -> None:
        """Let in whose clients have the fewest going, of these who waits longest."""
        while self.going.total() < self.most:
            ready = [(self.going[client], place, client) for client, place in self._firsts()]
            going, place, client = min(ready, key=lambda of: of[0], default=(self.each, None, ""))
            if going >= self.each or place is None:
                return
            self.waiting[client].remove(place)
            self.waiting.move_to_end(client)
            if not self.waiting[client]:
                del self.waiting[client]
            place.set_result(None)
            self.going[client] += 1

    def _firsts(self) -> Iterator[tuple[str, "asyncio.Future[None]"]]:
        for client, places in self.waiting.items():
            if place := next((place for place in places if not place.cancelled()), None):
                yield client, place


@dataclass(eq=False)
class Place:
    """One who waits for room. passed: how many went before it who came after it."""

    client: str
    count: int
    future: asyncio.Future[None]
    passed: int = 0


class Room:
    """`size` bytes, lent in the order of arrival, but so that no client keeps the others out.

    Who holds some gets more only as long as it then holds no more than is still free before it, so that one client
    alone has half of all. Where there is too little for one, PASSES who need less go before it.
    """

    def __init__(self, size: int):
        self.size = self.left = size
        self.held: Counter[str] = Counter()
        self.waiting: list[Place] = []

    async def take(self, count: int, client: str) -> None:
        """Wait for `count` bytes, of which there are at most `size`."""
        place = Place(client, count, asyncio.get_running_loop().create_future())
        self.waiting.append(place)
        self._lend()
        try:
            await place.future
        except asyncio.CancelledError:
            if place.future.cancelled():
                self.waiting = [other for other in self.waiting if other is not place]
                self._lend()
            else:
                self.give(count, client)
            raise

    def give(self, count: int, client: str) -> None:
        """Give bytes back."""
        self.left += count
        self.held[client] -= count
        if not self.held[client]:
            del self.held[client]
        self._lend()

    def _lend(self) -> None:
        passed: list[Place] = []
        for place in list(self.waiting):
            if place.future.cancelled():
                continue
            held = self.held[place.client]
            if place.count <= self.left and not (held and held + place.count > self.left):
                self.left -= place.count
                self.held[place.client] += place.count
                self.waiting.remove(place)
                place.future.set_result(None)
                for other in passed:
                    other.passed += 1
            elif not held:  # who waits for what it holds itself keeps nobody
                passed.append(place)
            if any(other.passed >= PASSES for other in passed):
                return


class Kept(Generic[V]):
    """Values by name, up to `limit` bytes: the last used stay."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._held: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __contains__(self, name: Hashable) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: Hashable) -> V | None:
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        return self._held[name][0]

    def keep(self, name: Hashable, value: V, size: int) -> None:
        self.size += size - self._held.get(name, (None, 0))[1]
        self._held[name] = value, size
        self._held.move_to_end(name)
        while self.size > self.limit:
            self.size -= self._held.popitem(last=False)[1][1]
