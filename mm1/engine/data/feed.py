"""Feed one process: a thread loads the next batches of its streams onto the device."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mm1.engine.data.batch import Batch

if TYPE_CHECKING:  # a bare GPU image has no Grain
    from mm1.engine.data.streams import Streams

AHEAD = {"cuda": 2, "cpu": 0}  # batches that are loaded in advance


class Loaded(NamedTuple):
    """Hold a batch on the device, and the streams' state and number of bad records after it."""

    batch: Batch
    state: dict[str, Any]
    skipped: int
    ready: Any  # CUDA event after the copy, or None


class Feed:
    """Yield the batches of streams on a device. state: of the streams after the last batch that was yielded.

    ahead: batches that a thread loads in advance (default: 2 on a GPU, 0 on a CPU). On a CPU such a thread halved the
    speed of matrix products on two cores, and Grain's threads decode in any case.
    """

    def __init__(self, streams: "Streams", device: torch.device, ahead: int | None = None):
        self.streams, self.device = streams, device
        self.state, self.skipped = streams.state(), streams.skipped
        self.ahead = AHEAD[device.type] if ahead is None else ahead
        self._side = torch.cuda.Stream(device) if self.ahead and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "feed")
        self._loading: deque[Future[Loaded]] = deque()  # one more than `ahead`: that which the thread works on
        for _ in range(self.ahead + 1 if self.ahead else 0):
            self._loading.append(self._thread.submit(self._load))

    def __next__(self) -> Batch:
        if self.ahead:
            loaded = self._loading[0].result()  # an error stays the first result: the next call raises it again
            self._loading.popleft()
            self._loading.append(self._thread.submit(self._load))
        else:
            loaded = self._load()
        self.state, self.skipped = loaded.state, loaded.skipped
        if loaded.ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(loaded.ready)
            loaded.batch.record_stream(current)
        return loaded.batch

    def close(self) -> None:
        """End the thread, and the threads and processes of the streams."""
        self._thread.shutdown(cancel_futures=True)
        self.streams.close()

    def _load(self) -> Loaded:
        with torch.cuda.stream(self._side):
            batch = next(self.streams).to(self.device)
            ready = self._side.record_event() if self._side else None
            return Loaded(batch, self.streams.state(), self.streams.skipped, ready)
