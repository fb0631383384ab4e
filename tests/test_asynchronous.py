"""Behind asyncio each request gets what the Engine alone gives it, and whoever leaves leaves nothing behind."""

import asyncio
import threading
import time
from contextlib import aclosing
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from small import small_mm1
from test_engine import drained
from test_generate import PROMPTS
from test_graphs import on_graphs

from mm1.engine.data.document import Document
from mm1.engine.infer import graphs
from mm1.engine.infer.asynchronous import AsyncEngine, Dead
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import Sampling
from mm1.errors import Busy, UserError


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


def alone(model, prompt, sampling):
    engine = Engine(model)
    request = engine.submit(prompt, sampling)
    engine.run()
    return request


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def step_that(engine, act):
    """Steps of the engine, each before its own work handed to act."""
    step = engine.step

    def acting():
        act()
        return step()

    engine.step = acting


def test_many_at_once_get_what_each_gets_alone(model):
    samplings = [
        Sampling(12),
        Sampling(12, temperature=0.9, seed=5),
        Sampling(9, stop=("e",)),
        Sampling(7, top_k=3, temperature=1.0, seed=1),
    ]

    async def all_of_them():
        async with AsyncEngine(engine) as running:

            async def streamed(prompt, sampling):
                return "".join([piece async for piece in running.stream(prompt, sampling)])

            documents = encode_prompts(model, PROMPTS)
            return await asyncio.gather(
                asyncio.gather(*(running.generate(p, s) for p in PROMPTS for s in samplings)),
                asyncio.gather(*(streamed(d, s) for d in documents for s in samplings)),
            )

    engine = Engine(model, batch=5, tokens=1024)
    finished, texts = asyncio.run(all_of_them())
    truth = [alone(model, p, s) for p in PROMPTS for s in samplings]
    assert [r.tokens for r in finished] == [r.tokens for r in truth]
    assert [r.finish for r in finished] == [r.finish for r in truth]
    assert texts == [r.text for r in truth]
    assert drained(engine)


@pytest.mark.parametrize("way", ["closed", "cancelled", "cancelled before it is accepted"])
def test_who_leaves_cancels_the_request(model, way):
    engine = Engine(model, tokens=4096)
    submitted = []
    submit = engine.submit
    engine.submit = lambda *args: submitted.append(submit(*args)) or submitted[-1]

    async def leave():
        async with AsyncEngine(engine) as running:
            if way == "closed":
                async with aclosing(running.stream(PROMPTS[0], Sampling(2000))) as stream:
                    await anext(stream)
            else:
                task = asyncio.create_task(running.generate(encode_prompts(model, PROMPTS[:1])[0], Sampling(2000)))
                if way == "cancelled":
                    await until(lambda: submitted and submitted[0].tokens)
                else:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: submitted and submitted[0].finish)
            assert submitted[0].finish == "cancelled"
            assert len(submitted[0].tokens) < 2000
            assert drained(engine)
            return await running.generate(PROMPTS[1], Sampling(5))

    assert asyncio.run(leave()).tokens == alone(model, PROMPTS[1], Sampling(5)).tokens


def test_a_full_queue_and_a_prompt_too_long_are_the_callers_to_know(model):
    engine = Engine(model, tokens=256, batch=1, queue=1)

    async def refused():
        async with AsyncEngine(engine) as running:
            with pytest.raises(UserError, match="the prompt has 300 tokens, the cache holds at most 256"):
                await running.generate(Document(np.full(300, 5, np.int32), (), ""), Sampling(3))
            async with running.open(PROMPTS[0], Sampling(100)), running.open(PROMPTS[1], Sampling(100)):
                with pytest.raises(Busy):
                    await running.generate(PROMPTS[2])
            await running.generate(PROMPTS[2], Sampling(2))
        with pytest.raises(Dead, match="closed"):
            await running.generate(PROMPTS[2])

    asyncio.run(refused())
    assert drained(engine)


def test_the_engines_own_refusal_comes_through(model):
    async def refused():
        async with AsyncEngine(Engine(model, tokens=256)) as running:
            with pytest.raises(UserError, match="the token id 9999"):
                await running.generate(Document(np.array([1, 9999], np.int32), (), ""), Sampling(5))

    asyncio.run(refused())


def test_many_are_submitted_between_two_steps_and_have_what_each_gets_alone(model):
    engine = Engine(model, tokens=4096, batch=3, queue=9, prefill=1024)
    steps, prompts = [], [[f"{i} and {i}"] for i in range(12)]
    step_that(engine, lambda: steps.append(len(engine.waiting) + len(engine.running)))

    async def all_of_them():
        async with AsyncEngine(engine) as running:
            async with running.open_many([(prompt, Sampling(2), 0) for prompt in prompts]) as streams:
                for stream in streams:
                    async for _ in stream:
                        pass
            async with running.open_many([]) as none:
                assert none == []
            return [stream.request.tokens for stream in streams]

    assert asyncio.run(all_of_them()) == [alone(model, prompt, Sampling(2)).tokens for prompt in prompts]
    assert steps[0] == 12
    assert drained(engine)


def test_none_of_many_is_submitted_if_one_is_refused(model):
    engine = Engine(model, tokens=256, batch=2, queue=2)
    good, bad = Document(np.arange(5, 20, dtype=np.int32), (), ""), Document(np.array([9999], np.int32), (), "")

    async def refused():
        async with AsyncEngine(engine) as running:
            with pytest.raises(UserError, match="9999"):
                async with running.open_many([(document, Sampling(200), 0) for document in (good, good, bad)]):
                    pytest.fail("it was taken")
            with pytest.raises(Busy):
                async with running.open_many([(good, Sampling(200), 0)] * 5):
                    pytest.fail("it was taken")
            assert drained(engine)
            async with running.open_many([(good, Sampling(200), 0)] * 4):
                pass
            return await running.generate(good, Sampling(5))

    assert asyncio.run(refused()).tokens == alone(model, good, Sampling(5)).tokens
    assert drained(engine)


@pytest.mark.parametrize("where", ["inside its prompt", "preempted"])
def test_who_leaves_without_pages_or_with_half_a_prompt_leaves_nothing(model, where):
    engine = Engine(model, tokens=4096, prefill=4)
    document, reached, gate = Document(np.arange(4, 353, dtype=np.int32), (), ""), [], threading.Event()

    def hold():
        """Stop before a step, once, where it is to leave."""
        for request in engine.running[:] if not reached else ():
            if where == "preempted" and len(request.tokens) == 3:
                engine.schedule.preempt(request)
                engine.schedule.admit = lambda: None  # it stays where it waits
            elif where == "preempted" or request.computed < 60:
                continue
            reached.append(request)
            gate.wait(60)

    step_that(engine, hold)

    async def leave():
        async with AsyncEngine(engine) as running:
            task = asyncio.create_task(running.generate(document, Sampling(2000)))
            await until(lambda: reached)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()
            await until(lambda: drained(engine))

    asyncio.run(leave())
    assert reached[0].finish == "cancelled"
    assert engine.computed < 349 or where == "preempted"


def test_prompts_are_scored_behind_asyncio_too(model):
    document = Document(np.arange(5, 60, dtype=np.int32), (), "")

    async def scored():
        async with AsyncEngine(Engine(model)) as running, running.open(document, Sampling(2), scored=7) as stream:
            return [piece async for piece in stream] and stream.request

    engine = Engine(model)
    truth = engine.submit(document, Sampling(2), scored=7)
    engine.run()
    assert asyncio.run(scored()).scores == truth.scores


def test_it_says_that_it_is_full_also_while_a_step_takes_long(model):
    engine = Engine(model, batch=2, queue=1)
    gate, reached = threading.Event(), threading.Event()
    step_that(engine, lambda: reached.set() or gate.wait())

    async def asked():
        async with AsyncEngine(engine) as running:
            tasks = [asyncio.create_task(running.generate(PROMPTS[0], Sampling(3))) for _ in range(3)]
            await until(reached.is_set)
            with pytest.raises(Busy):
                await running.generate(PROMPTS[0])
            gate.set()
            return await tasks[0]

    assert asyncio.run(asked()).finish == "length"


def test_a_failing_step_fails_those_that_ran_and_no_others(model):
    engine = Engine(model, batch=2, tokens=4096)

    def out_of_memory():
        if len(engine.running) == 2 and engine.waiting:
            raise torch.OutOfMemoryError("no more")

    step_that(engine, out_of_memory)

    async def three():
        async with AsyncEngine(engine) as running:
            results = await asyncio.gather(
                *(running.generate(p, Sampling(50)) for p in PROMPTS[:3]), return_exceptions=True
            )
            assert running.dead is None
            return results

    results = asyncio.run(three())
    failed = [r for r in results if isinstance(r, torch.OutOfMemoryError)]
    [(i, good)] = [(i, r) for i, r in enumerate(results) if not isinstance(r, Exception)]
    assert len(failed) == 2
    assert good.tokens == alone(model, PROMPTS[i], Sampling(50)).tokens
    assert drained(engine)


class FailingAt13(Engine):
    """An Engine that has no memory for prompts of seed 13."""

    def prefill(self, due):
        if any(request.sampling.seed == 13 for request in due):
            raise torch.OutOfMemoryError("no more")
        return super().prefill(due)


def test_a_prompt_that_fails_fails_alone(model):
    engine = FailingAt13(model, tokens=4096)

    async def two():
        async with AsyncEngine(engine) as running:
            good = asyncio.create_task(running.generate(PROMPTS[0], Sampling(200)))
            while not engine.running:
                await asyncio.sleep(0.001)
            with pytest.raises(torch.OutOfMemoryError):
                await running.generate(PROMPTS[1], Sampling(5, seed=13))
            return await good

    assert asyncio.run(two()).tokens == alone(model, PROMPTS[0], Sampling(200)).tokens
    assert drained(engine)


def test_a_call_is_made_in_the_thread_and_its_error_ends_all_requests(model):
    async def called():
        threads: list[str] = []
        async with AsyncEngine(Engine(model)) as running:
            running.call(lambda: threads.append(threading.current_thread().name))
            await running.generate(PROMPTS[0], Sampling(2))
            task = asyncio.create_task(running.generate(PROMPTS[0], Sampling(2000)))
            while not running.engine.running:
                await asyncio.sleep(0.001)
            running.call(lambda: [].pop())
            with pytest.raises(Dead, match="IndexError"):
                await task
            return threads

    assert asyncio.run(called()) == ["mm1-engine"]


def test_stop_ends_the_thread_and_its_requests(model):
    async def stopped():
        async with AsyncEngine(Engine(model)) as running:
            task = asyncio.create_task(running.generate(PROMPTS[0], Sampling(2000)))
            while not running.engine.running:
                await asyncio.sleep(0.001)
            running.stop()
            with pytest.raises(Dead, match="closed"):
                await task
            while running.alive:
                await asyncio.sleep(0.001)

    asyncio.run(stopped())


def test_who_never_began_is_told(model):
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(AsyncEngine(Engine(model)).generate(PROMPTS[0]))


def test_steps_that_always_fail_leave_nobody_waiting(model):
    engine = Engine(model)

    def fail():
        if engine.waiting or engine.running:
            raise ZeroDivisionError

    step_that(engine, fail)

    async def ask():
        async with asyncio.timeout(60), AsyncEngine(engine) as running:
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    await running.generate(PROMPTS[0])

    asyncio.run(ask())
    assert drained(engine)


def test_a_device_that_does_not_answer_ends_it(model):
    engine = Engine(model)

    def fail():
        engine.device = torch.device("meta")  # of which nothing can be read
        raise RuntimeError("an illegal memory access was encountered")

    async def ask():
        async with asyncio.timeout(60), AsyncEngine(engine) as running:
            async with running.open(PROMPTS[0], Sampling(2000)) as stream:
                step_that(engine, fail)
                with pytest.raises((Dead, RuntimeError), match="illegal memory"):
                    async for _ in stream:
                        pass
            await until(lambda: running.dead)
            with pytest.raises(Dead, match="illegal memory"):
                await running.generate(PROMPTS[0])

    asyncio.run(ask())


def test_many_that_come_at_once_do_not_hold_up_who_runs(model, monkeypatch):
    """Each takes the thread some time, as long prompts do whose pages are named."""
    monkeypatch.setattr("mm1.engine.infer.asynchronous.BETWEEN_SECONDS", 0)
    engine, done = Engine(model), []
    step, submit = engine.step, engine.submit
    engine.step = lambda: done.append("step") or step()
    engine.submit = lambda *given: done.append("submit") or submit(*given)

    async def ask():
        async with AsyncEngine(engine) as running, running.open(PROMPTS[0], Sampling(500)):
            await until(lambda: "step" in done)
            await asyncio.gather(*(running.generate(PROMPTS[1], Sampling(1)) for _ in range(6)))

    asyncio.run(ask())
    assert done.count("submit") == 7
    assert ("submit", "submit") not in pairwise(done)


def test_each_of_two_that_fail_in_one_step_is_told_its_own_error(model):
    engine = Engine(model)

    def break_both():
        if len(engine.running) == 2:
            for request in engine.running:
                request.append = partial(failing, request.sampling.seed)

    def failing(seed, *_):
        raise ValueError(f"of {seed}")

    async def ask():
        async with AsyncEngine(engine) as running:
            asked = (running.generate(p, Sampling(900, seed=i)) for i, p in enumerate(PROMPTS[:2]))
            return await asyncio.gather(*asked, return_exceptions=True)

    step_that(engine, break_both)
    assert [str(error) for error in asyncio.run(ask())] == ["of 0", "of 1"]


def test_closing_ends_those_in_flight(model):
    engine = Engine(model, tokens=4096)

    async def close():
        async with AsyncEngine(engine) as running:
            task = asyncio.create_task(running.generate(PROMPTS[0], Sampling(2000)))
            await until(lambda: engine.running)
        with pytest.raises(Dead, match="closed"):
            await task

    asyncio.run(close())
    assert drained(engine)


def test_a_slow_reader_gets_all_in_few_pieces(model):
    async def slow():
        async with AsyncEngine(Engine(model)) as running, running.open(PROMPTS[0], Sampling(60)) as stream:
            await until(lambda: stream.request.finish)
            await asyncio.sleep(0.05)
            return [piece async for piece in stream]

    assert asyncio.run(slow()) == [alone(model, PROMPTS[0], Sampling(60)).text]


class Parts(Engine):
    """An engine with a warm-up of these parts."""

    def __init__(self, model, parts):
        super().__init__(model)
        self.parts, self.done = parts, 0

    def warm_up(self):
        for part in self.parts:
            part()
            self.done += 1
            yield


def test_requests_are_answered_while_the_engine_warms_up(model):
    """The warm-up ends only when they are: steps are taken between its parts."""
    answered = threading.Event()
    engine = Parts(model, (partial(time.sleep, 0.001) for _ in iter(answered.is_set, True)))

    async def run():
        async with AsyncEngine(engine) as running:
            running.warm_up(60)
            found = await running.generate(PROMPTS[0], Sampling(12))
            assert not running.warm
            answered.set()
            await until(lambda: running.warm)
            return found

    assert asyncio.run(run()).tokens == alone(model, PROMPTS[0], Sampling(12)).tokens
    assert engine.done > 12


@pytest.mark.parametrize("why", ["time", "failure"])
def test_a_warm_up_ends_at_its_limit_or_first_failure_and_requests_go_on(model, why, caplog):
    def fail():
        raise RuntimeError("no memory for a graph")

    engine = Parts(model, [fail] if why == "failure" else [partial(time.sleep, 0.02)] * 1000)

    async def run():
        async with AsyncEngine(engine) as running:
            running.warm_up(60 if why == "failure" else 0.1)
            await until(lambda: running.warm)
            return await running.generate(PROMPTS[0], Sampling(4))

    assert asyncio.run(run()).tokens == alone(model, PROMPTS[0], Sampling(4)).tokens
    assert engine.done < 10
    assert ("no memory for a graph" in caplog.text) == (why == "failure")


class NoMemoryForWarmUp(Engine):
    """An Engine that has no memory for the prompts of its warm-up."""

    def prefill(self, due):
        if any(request.sampling == Sampling(max_tokens=1) for request in due):
            raise torch.OutOfMemoryError("no memory for the warm-up")
        return super().prefill(due)


def test_a_prompt_of_the_warm_up_that_fails_ends_the_warm_up_and_no_request(model, monkeypatch, caplog):
    monkeypatch.setattr(graphs.torch, "compile", lambda f, **_: f)
    engine = on_graphs(model, kind=NoMemoryForWarmUp, batch=2, tokens=4096)

    async def run():
        async with AsyncEngine(engine) as running, running.open(PROMPTS[0], Sampling(200)) as stream:
            await anext(stream)
            running.warm_up(60)
            await until(lambda: running.warm)
            assert [piece async for piece in stream]
            return stream.request

    assert asyncio.run(run()).tokens == alone(model, PROMPTS[0], Sampling(200)).tokens
    assert "a prompt of the warm-up failed: no memory for the warm-up" in caplog.text
    assert len(engine.graphs.captures) == 1  # the request's
