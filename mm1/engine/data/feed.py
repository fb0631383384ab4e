"""Feed one process: a thread loads the next batches of its streams onto the device."""

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mm1.engine.data.batch import Batch

if TYPE_CHECKING:  # a bare GPU image has no Grain
    from mm1.engine.data.streams import Streams

AHEAD = {"cuda": 2, "cpu": 0}  # batches that are loaded in advance


class Feed:
    """Yield the batches of streams on a device. state: of the streams after the last batch that was yielded.

    ahead: batches that a thread loads in advance (default: 2 on a GPU, 0 on a CPU). On a CPU such a thread halved the
    speed of matrix products on two cores, and Grain's threads decode in any case.
    """

    def __init__(self, streams: "Streams", device: torch.device, ahead: int | None = None):
        self.streams, self.device = streams, device
        self.state, self.skipped = streams.state(), streams.skipped
        self.ahead = AHEAD[device.type] if ahead is None else ahead
        self._queue: queue.Queue[Loaded | BaseException] = queue.Queue(self.ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        if self.ahead:
            self._thread.start()

    def __next__(self) -> Batch:
        loaded = self._queue.get() if self.ahead else self._load(None)
        if isinstance(loaded, BaseException):
            self._queue.put(loaded)  # the next call raises it again
            raise loaded
        self.state, self.skipped = loaded.state, loaded.skipped
        if loaded.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(loaded.ready)
            loaded.batch.record_stream(current)
        return loaded.batch

    def close(self) -> None:
        """End the thread, and the threads and processes of the streams."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        self.streams.close()

    def _load(self, side: "torch.cuda.Stream | None") -> "Loaded":
        with torch.cuda.stream(side):
            batch = next(self.streams).to(self.device)
            return Loaded(batch, self.streams.state(), self.streams.skipped, side.record_event() if side else None)

    def _work(self) -> None:
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            while not self._closed.is_set():
                self._put(self._load(side))
        except BaseException as error:
            self._put(error)

    def _put(self, loaded: "Loaded | BaseException") -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(loaded, timeout=0.1)
            except queue.Full:
                continue


class Loaded(NamedTuple):
    """Hold a batch on the device, and the streams' state and number of bad records after it."""

    batch: Batch
    state: dict[str, Any]
    skipped: int
    ready: Any  # CUDA event after the copy, or None
