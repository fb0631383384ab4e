"""Who waits for a turn or for room, and that nobody waits for ever."""

import asyncio
import random

import pytest

from mm1.engine.serve.turns import Kept, Room, Turns


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
        work = Work(Turns(most=3, each=2))
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
        assert not work.turns.going
        assert not work.turns.waiting

    asyncio.run(run())


def test_who_leaves_while_it_waits_or_works_gives_its_turn_on():
    async def run():
        work = Work(Turns(most=1, each=1))
        first, second, third = (work.begin("a", name) for name in ("first", "second", "third"))
        await settled()
        second.cancel()
        await settled()
        first.cancel()
        await settled()
        assert work.going == ["first", "third"]
        work.events["third"].set()
        await third
        assert not work.turns.going
        assert not work.turns.waiting

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_random_comings_and_goings_never_exceed_the_limits_and_all_end(seed):
    async def run():
        r, turns, now, most_seen = random.Random(seed), Turns(most=4, each=2), {}, 0

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
        assert not turns.going
        assert not turns.waiting

    asyncio.run(run())


def test_room_is_lent_in_order_and_comes_back_from_who_leaves():
    async def run():
        room = Room(10)
        await room.take(6)
        order = []

        async def take(name, count):
            await room.take(count)
            order.append(name)

        large, small, last = (asyncio.create_task(take(*of)) for of in (("large", 8), ("small", 4), ("last", 2)))
        await settled()
        assert order == []  # small would fit, but large was first
        large.cancel()
        await settled()
        assert order == ["small"]
        last.cancel()
        await settled()
        room.give(6)
        await small
        assert room.left == 6
        await room.take(6)  # all that is left
        room.give(10)
        assert room.left == room.size == 10
        assert not room.waiting

    asyncio.run(run())


def test_who_leaves_in_the_moment_in_which_it_gets_room_gives_it_back():
    async def run():
        room = Room(1)
        await room.take(1)
        waiting = asyncio.create_task(room.take(1))
        await settled()
        room.give(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert room.left == 1

    asyncio.run(run())


def test_the_last_used_are_kept():
    kept = Kept(10)
    for name in "abc":
        kept.keep(name, name.upper(), 3)
    assert kept.get("a") == "A"
    kept.keep("d", "D", 4)
    assert [name in kept for name in "abcd"] == [True, False, True, True]
    assert (kept.size, len(kept)) == (10, 3)
    kept.keep("a", "AA", 1)
    assert (kept.size, kept.get("a"), kept.get("b")) == (8, "AA", None)
    kept.keep("e", "E", 11)
    assert (len(kept), kept.size) == (0, 0)
