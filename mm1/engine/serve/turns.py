"""What requests share before the engine has them: turns at work that takes long, and bytes of memory."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

V = TypeVar("V")


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


class Room:
    """`size` bytes, lent first come, first served."""

    def __init__(self, size: int):
        self.size = self.left = size
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        """Wait for `count` bytes, of which there are at most `size`."""
        place = asyncio.get_running_loop().create_future()
        self.waiting.append((count, place))
        self.give(0)
        try:
            await place
        except asyncio.CancelledError:
            self.give(0 if place.cancelled() else count)
            raise

    def give(self, count: int) -> None:
        """Give bytes back."""
        self.left += count
        while self.waiting and (self.waiting[0][1].cancelled() or self.waiting[0][0] <= self.left):
            wanted, place = self.waiting.popleft()
            if not place.cancelled():
                self.left -= wanted
                place.set_result(None)


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
