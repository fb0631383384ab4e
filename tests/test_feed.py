"""Show that micro-batches are divided among processes, and loaded in advance by a thread."""

import dataclasses

import pytest
import torch
from small import document, packed, small_run
from two_gpus import TwoGPUs

from mm1.engine.data.feed import Feed
from mm1.engine.data.streams import Streams, make_streams, merged
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.errors import UserError

CPU = torch.device("cpu")


def streams(rank=0, ranks=1, count=4, **data):
    run = small_run(accumulate=4)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, streams=count, **data))
    return make_streams(run, TextTokenizer(run.data.tokenizer), None, rank=rank, ranks=ranks)


def keys(feed, count):
    return [next(feed).keys for _ in range(count)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_the_batches_of_one(ranks):
    truth = keys(streams(), 12)
    parts = [keys(streams(rank, ranks), 12 // ranks) for rank in range(ranks)]
    assert [parts[i % ranks][i // ranks] for i in range(12)] == truth


@pytest.mark.parametrize("before, after", [(2, 1), (1, 4), (4, 2)])
def test_other_processes_go_on_with_what_is_next(before, after):
    truth = keys(streams(), 16)
    begun = [streams(rank, before) for rank in range(before)]
    for part in begun:
        keys(part, 8 // before)
    state = merged([part.state() for part in begun])
    resumed = [streams(rank, after) for rank in range(after)]
    for part in resumed:
        part.restore(state)
    parts = [keys(part, 8 // after) for part in resumed]
    assert [parts[i % after][i // after] for i in range(8)] == truth[8:]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_state_is_that_after_the_last_batch_taken(ahead):
    truth = keys(streams(), 8)
    feed = Feed(streams(), CPU, ahead)
    assert keys(feed, 5) == truth[:5]
    state = feed.state
    feed.close()
    resumed = streams()
    resumed.restore(state)
    assert keys(Feed(resumed, CPU, ahead), 3) == truth[5:]


class OnSecondGPU:
    """Stand for streams and for their batch, and record where the batch was copied and on which stream it is used."""

    skipped = 0

    def __init__(self, gpus):
        self.gpus, self.state, self.close = gpus, dict, lambda: None

    def __next__(self):
        return self

    def to(self, device):
        self.copied_on = self.gpus.current_stream(device)
        return self

    def record_stream(self, stream):
        self.used_on = stream


def test_batches_for_the_second_gpu_are_copied_beside_its_own_stream_and_waited_for_there(monkeypatch):
    gpus = TwoGPUs()
    gpus.replace(monkeypatch)
    feed = Feed(OnSecondGPU(gpus), torch.device("cuda:1"))
    batch = next(feed)
    feed.close()
    current = gpus.current_stream("cuda:1")
    assert batch.used_on is current
    assert current.waited_for.device == torch.device("cuda:1")
    assert current.waited_for is batch.copied_on
    assert current.waited_for is not current


class Broken(Streams):
    def __next__(self):
        raise UserError("shard-1: 100 unreadable records in a row")


class FailsOnce(Streams):
    """Raise an error for the second batch alone."""

    taken = 0

    def __next__(self):
        self.taken += 1
        if self.taken == 2:
            raise UserError("shard-1 is unreadable")
        return packed([document(3)])


@pytest.mark.parametrize("ahead", [1, 2])
def test_no_later_batch_is_yielded_after_an_error(ahead):
    feed = Feed(FailsOnce({}, 1), CPU, ahead)
    next(feed)
    for _ in range(3):
        with pytest.raises(UserError, match="shard-1"):
            next(feed)
    feed.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_data_is_raised_where_a_batch_is_taken(ahead):
    feed = Feed(Broken({}, 1), CPU, ahead)
    for _ in range(2):
        with pytest.raises(UserError, match="shard-1"):
            next(feed)
    feed.close()


@pytest.mark.parametrize("count, ranks, setting", [(3, 2, "data.streams is 3"), (6, 3, "train.accumulate is 4")])
def test_refuses_what_cannot_be_dealt_evenly(count, ranks, setting):
    with pytest.raises(UserError, match=f"{setting}, expected a multiple of the {ranks} processes"):
        streams(0, ranks, count)
