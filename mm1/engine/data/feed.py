"""A process's feed: a thread makes the next batches of its streams ready on the device."""

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mm1.engine.data.batch import Batch

if TYPE_CHECKING:  # a bare GPU image has no Grain
    from mm1.engine.data.streams import Streams

AHEAD = {"cuda": 2, "cpu": 0}  # batches that are ready


class Feed:
    """Streams' batches on a device; `state` is that behind the last one taken.

    A thread has so many ready `ahead`. On a CPU the next is made when it is asked for: a thread beside the products
    halved their speed on two cores, and Grain's own threads decode in any case.
    """

    def __init__(self, streams: "Streams", device: torch.device, ahead: int | None = None):
        self.streams, self.device = streams, device
        self.state, self.skipped = streams.state(), streams.skipped
        self.ahead = AHEAD[device.type] if ahead is None else ahead
        self._queue: queue.Queue[Fed | BaseException] = queue.Queue(self.ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        if self.ahead:
            self._thread.start()

    def __next__(self) -> Batch:
        fed = self._queue.get() if self.ahead else self._made(None)
        if isinstance(fed, BaseException):
            self._queue.put(fed)  # whoever asks again is told again
            raise fed
        self.state, self.skipped = fed.state, fed.skipped
        if fed.ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(fed.ready)
            fed.batch.record_stream(current)
        return fed.batch

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        self.streams.close()

    def _made(self, side: "torch.cuda.Stream | None") -> "Fed":
        with torch.cuda.stream(side):
            batch = next(self.streams).to(self.device)
            return Fed(batch, self.streams.state(), self.streams.skipped, side.record_event() if side else None)

    def _work(self) -> None:
        side = torch.cuda.Stream() if self.device.type == "cuda" else None
        try:
            while not self._closed.is_set():
                self._put(self._made(side))
        except BaseException as error:
            self._put(error)

    def _put(self, fed: "Fed | BaseException") -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(fed, timeout=0.1)
            except queue.Full:
                continue


class Fed(NamedTuple):
    batch: Batch  # on the device
    state: dict[str, Any]  # of the streams behind it
    skipped: int
    ready: Any  # CUDA event, or None
