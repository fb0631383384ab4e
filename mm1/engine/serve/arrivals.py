"""Bodies of requests while they arrive: how many and how large they may be together, and whose goes if they exceed it.

A client with few of them loses none to one with many, and one that sends loses none to one that stalls.
"""

import asyncio
import math
from collections import Counter

from mm1.engine.infer.engine import Busy

MOST = 512  # bodies at a time
SPEED_SECONDS = 5  # over which the speed of a body is measured
GRACE = 1 << 16  # bytes that count as just arrived when a body begins


class Body:
    """One that arrives. waits: the time limit of who waits for its next piece, if somebody does."""

    def __init__(self, client: str):
        self.client = client
        self.size, self.recent, self.last = 0, float(GRACE), asyncio.get_running_loop().time()
        self.given_up = False
        self.waits: asyncio.Timeout | None = None

    def speed(self) -> float:
        """Return bytes of late, each counted less the longer ago it came."""
        return self.recent * math.exp((self.last - asyncio.get_running_loop().time()) / SPEED_SECONDS)

    def add(self, count: int) -> None:
        self.recent, self.last = self.speed() + count, asyncio.get_running_loop().time()
        self.size += count

    def check(self) -> None:
        """Raises Busy if it was given up."""
        if self.given_up:
            raise Busy("too many requests arrive, and this one came slowest")

    def give_up(self) -> None:
        """Make whoever reads it raise Busy, at once if it waits."""
        self.given_up = True
        if self.waits:
            self.waits.reschedule(asyncio.get_running_loop().time())


class Arrivals:
    """All bodies that have not arrived as a whole. most_bytes: of them and of those that wait for the engine."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.arriving: set[Body] = set()
        self.leaving = 0  # bytes of those given up that are not yet freed

    def begin(self, client: str) -> Body:
        """Return a new body. Beyond MOST another is given up for it."""
        body = Body(client)
        self.arriving.add(body)
        if len(self.arriving) > MOST:
            counts = Counter(each.client for each in self.arriving)
            self._give_up(min(self.arriving, key=lambda each: (-counts[each.client], each.speed())))
        return body

    def bound(self, body: Body, held: int, small: int) -> None:
        """Give up the slowest body of the client with most bytes if all that are held exceed most_bytes; small ones go
        on, or whoever sends many large ones slowly would keep everybody out. Raises Busy if it is this one."""
        if held - self.leaving > self.most_bytes and body.size > small:
            sizes = Counter[str]()
            for each in self.arriving:
                sizes[each.client] += each.size
            large = (each for each in self.arriving if each.size > small)
            self._give_up(min(large, key=lambda each: (-sizes[each.client], each.speed()), default=body))
        body.check()

    def _give_up(self, body: Body) -> None:
        self.arriving.discard(body)
        self.leaving += body.size
        body.give_up()

    def end(self, body: Body) -> None:
        """Forget a body that has arrived, or that nobody reads any more."""
        self.arriving.discard(body)

    def free(self, body: Body) -> None:
        """Note that the bytes of a body are held no more."""
        self.end(body)
        if body.given_up:
            self.leaving -= body.size
