"""Who waits for a turn or for room, and that nobody waits for ever."""

import asyncio
import random
from contextlib import ExitStack

import pytest

from mm1.engine.serve.turns import PASSES, Limit, LRUCache, Room, Turns
from mm1.errors import Busy


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


class Work:
    """Tasks that hold a turn until they are let go; `going`: whose they are, in the order in which they began."""

    def __init__(self, turns):
        self.turns, self.going, self.tasks, self.events = turns, [], [], {}

    def begin(self, client, name):
        self.events[name] = asyncio.Event()

        async def work():
            async with self.turns.turn(client):
                self.going.append(name)
                await self.events[name].wait()

        self.tasks.append(asyncio.create_task(work(), name=name))
        return self.tasks[-1]


def test_one_client_has_its_share_and_another_goes_before_its_rest():
    async def run():
        work = Work(Turns(total=3, each=2))
        for i in range(5):
            work.begin("a", f"a{i}")
        await settled()
        assert work.going == ["a0", "a1"]
        work.begin("b", "b0")
        work.begin("b", "b1")
        work.begin("c", "c0")
        await settled()
        assert work.going == ["a0", "a1", "b0"]
        for name in ("a0", "a1", "b0"):
            work.events[name].set()
            await settled()
        assert work.going[3:] == ["c0", "a2", "b1"]  # who has the fewest, though a's came first
        for event in work.events.values():
            event.set()
        await asyncio.gather(*work.tasks)
        assert len(work.going) == 8
        assert not work.turns.running
        assert not work.turns.waiting

    asyncio.run(run())


def test_who_leaves_while_it_waits_or_works_gives_its_turn_on():
    async def run():
        work = Work(Turns(total=1, each=1))
        first, second, third = (work.begin("a", name) for name in ("first", "second", "third"))
        await settled()
        second.cancel()
        await settled()
        first.cancel()
        await settled()
        assert work.going == ["first", "third"]
        work.events["third"].set()
        await third
        assert not work.turns.running
        assert not work.turns.waiting

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_random_comings_and_goings_never_exceed_the_limits_and_all_end(seed):
    async def run():
        r, turns, now, most_seen = random.Random(seed), Turns(total=4, each=2), {}, 0

        async def work(client):
            nonlocal most_seen
            async with turns.turn(client):
                now[client] = now.get(client, 0) + 1
                most_seen = max(most_seen, sum(now.values()))
                assert now[client] <= 2
                assert sum(now.values()) <= 4
                try:
                    for _ in range(r.randrange(5)):
                        await asyncio.sleep(0)
                finally:
                    now[client] -= 1

        tasks = [asyncio.create_task(work(r.choice("abcd"))) for _ in range(60)]
        for task in r.sample(tasks, 20):
            for _ in range(r.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait(tasks, timeout=30)
        assert all(task.done() for task in tasks)
        assert all(task.cancelled() or not task.exception() for task in tasks)
        assert most_seen == 4
        assert not turns.running
        assert not turns.waiting

    asyncio.run(run())


class Lending:
    """Tasks that take room and keep it; `order`: their names, as they got it."""

    def __init__(self, room):
        self.room, self.order = room, []

    def take(self, name, count):
        async def work():
            await self.room.acquire(count, name[0])
            self.order.append(name)

        return asyncio.create_task(work())


def test_room_is_lent_in_order_and_comes_back_from_who_leaves():
    async def run():
        room = Room(10)
        lending = Lending(room)
        await room.acquire(6, "x")
        large, small = lending.take("a", 8), lending.take("b", 5)
        last = lending.take("c", 5)
        await settled()
        assert lending.order == []
        large.cancel()
        last.cancel()
        await settled()
        room.release(6, "x")
        await settled()
        assert lending.order == ["b"]
        await small
        assert room.free == 5
        await room.acquire(5, "y")  # all that is left
        room.release(5, "y")
        room.release(5, "b")
        assert room.free == room.size == 10
        assert not room.waiting
        assert not room.by_client

    asyncio.run(run())


def test_one_client_leaves_room_for_another():
    async def run():
        room = Room(100)
        lending = Lending(room)
        tasks = [lending.take(f"a{i}", 10) for i in range(30)]
        await settled()
        assert lending.order == [f"a{i}" for i in range(5)]  # half of all
        tasks += [lending.take(f"b{i}", 10) for i in range(30)]
        await settled()
        assert lending.order[5:] == ["b0", "b1", "b2"]
        tasks.append(lending.take("c0", 10))
        await settled()
        assert lending.order[-1] == "c0"
        room.release(50, "a")
        await settled()
        assert room.by_client == {"a": 30, "b": 30, "c": 10}
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_the_whole_room_can_be_lent_to_one_request():
    async def run():
        room = Room(10)
        await room.acquire(10, "a")
        room.release(10, "a")
        assert room.free == 10

    asyncio.run(run())


def test_small_ones_pass_a_large_one_but_not_for_ever():
    async def run():
        room = Room(1000)
        lending = Lending(room)
        await room.acquire(900, "x")
        tasks = [lending.take("a", 200), *(lending.take(chr(0x100 + i), 1) for i in range(PASSES + 5))]
        await settled()
        assert len(lending.order) == PASSES
        assert "a" not in lending.order
        room.release(900, "x")
        await settled()
        assert lending.order[PASSES] == "a"
        assert len(lending.order) == len(tasks)

    asyncio.run(run())


def test_who_waits_for_what_it_holds_itself_keeps_nobody():
    async def run():
        room = Room(1000)
        lending = Lending(room)
        tasks = [lending.take(f"a{i}", 500) for i in range(2)]
        tasks += [lending.take(chr(0x100 + i), 1) for i in range(3 * PASSES)]
        await settled()
        assert lending.order[0] == "a0"
        assert len(lending.order) == len(tasks) - 1
        tasks[1].cancel()
        await settled()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_of_random_takers_all_have_their_room_in_the_end(seed):
    async def run():
        r, room = random.Random(seed), Room(20)

        async def work(client):
            count = r.randrange(1, 21)
            await room.acquire(count, client)
            try:
                assert sum(room.by_client.values()) + room.free == room.size
                assert room.free >= 0
                for _ in range(r.randrange(5)):
                    await asyncio.sleep(0)
            finally:
                room.release(count, client)

        tasks = [asyncio.create_task(work(r.choice("abcd"))) for _ in range(60)]
        for task in r.sample(tasks, 20):
            for _ in range(r.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait(tasks, timeout=30)
        assert all(task.done() for task in tasks)
        assert all(task.cancelled() or not task.exception() for task in tasks)
        assert (room.free, dict(room.by_client), room.waiting) == (20, {}, [])

    asyncio.run(run())


def test_who_leaves_in_the_moment_in_which_it_gets_room_gives_it_back():
    async def run():
        room = Room(1)
        await room.acquire(1, "a")
        waiting = asyncio.create_task(room.acquire(1, "b"))
        await settled()
        room.release(1, "a")
        waiting.cancel()
        await asyncio.wait([waiting])
        assert room.free == 1

    asyncio.run(run())


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_limit_refuses_one_more_until_another_has_left(size):
    limit = Limit(size, "things run already")
    with ExitStack() as entered:
        for _ in range(size):
            entered.enter_context(limit)
        for _ in range(2):  # a refusal changes nothing
            with pytest.raises(Busy, match=f"^{size} things run already$"):
                entered.enter_context(limit)
            assert limit.active == size
    assert limit.active == 0
    if size:
        with pytest.raises(ZeroDivisionError), limit:
            raise ZeroDivisionError
        assert limit.active == 0


def test_the_last_used_are_kept():
    cache = LRUCache(10)
    for name in "abc":
        cache.add(name, name.upper(), 3)
    assert cache.get("a") == "A"
    cache.add("d", "D", 4)
    assert [cache.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    assert cache.size == 10
    cache.add("a", "AA", 1)
    assert (cache.size, cache.get("a"), cache.get("b")) == (8, "AA", None)
    cache.add("e", "E", 11)
    assert (cache.size, cache.get("a"), cache.get("e")) == (0, None, None)
