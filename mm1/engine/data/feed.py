"""What feeds a process of a run: micro-batches of its packers in turn, and a thread that has the next ones ready."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mm1.engine.data.batch import Batch
from mm1.engine.data.document import Budget
from mm1.engine.data.packing import Loader
from mm1.engine.data.quarantine import Quarantine

FIRST, HALF = 20, 0.5  # batches of a process after which a smaller mean fill is warned of
OTHERS = ("images", "patches", "documents")
FEW, BAD = 100, 0.05  # records drawn after which a larger share of bad ones is warned of
AHEAD = {"cuda": 2, "cpu": 0}  # batches that are ready


class Streams:
    """The run's i-th micro-batch is of packer i mod S, and goes to process i mod R; here are those of one process.

    Which batches a run sees does therefore not depend on R, as long as R divides S and the micro-batches of a step.
    identity: the values that decide which data the run sees (see identity.py). warn: is told once if sequences stay
    half empty, and once if many records are bad.
    """

    def __init__(
        self, loaders: Mapping[int, Loader], streams: int, rank: int = 0, ranks: int = 1, *,
        identity: dict[str, Any] | None = None, quarantine: Quarantine | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ):  # fmt: skip
        self.loaders, self.streams, self.rank, self.ranks = loaders, streams, rank, ranks
        self.identity, self.quarantine, self.warn = identity or {}, quarantine or Quarantine(None), warn
        self.taken = 0  # micro-batches, by all processes
        self._shares: list[dict[str, float]] = []  # of the budgets, by each of this process's first batches
        self._bad_told = False

    def __next__(self) -> Batch:
        loader = self.loaders[(self.taken + self.rank) % self.streams]
        batch = next(loader)
        self.taken += self.ranks
        if len(self._shares) < FIRST:
            self._shares.append(loader.shares)
            if len(self._shares) == FIRST:
                self._check_fill()
        if not self._bad_told and self.drawn >= FEW and self.skipped > BAD * self.drawn:
            self._bad_told = True
            self._tell_bad()
        return batch

    @property
    def budget(self) -> Budget:
        return next(iter(self.loaders.values())).budget

    @property
    def skipped(self) -> int:
        """Bad records that this process drew, each as often as it came."""
        return sum(loader.skipped for loader in self.loaders.values())

    @property
    def drawn(self) -> int:
        """Records that this process drew, the bad ones among them."""
        return sum(loader.drawn for loader in self.loaders.values())

    def _check_fill(self) -> None:
        """Warn if the first batches are less than half full of tokens, naming the budget that most exhausted."""
        fill = sum(shares["tokens"] for shares in self._shares) / FIRST
        if fill >= HALF:
            return
        # Not the tokens: what is at most half a sequence fits beside what fills less than the other half.
        fullest = Counter(max(OTHERS, key=lambda name: shares[name]) for shares in self._shares)
        name = fullest.most_common(1)[0][0]
        self.warn(
            f"the first {FIRST} sequences hold {fill:.0%} of data.tokens ({self.budget.tokens}); data.{name} "
            f"({getattr(self.budget, name)}) is used up first: raise data.{name} or lower data.tokens"
        )

    def _tell_bad(self) -> None:
        message = f"{self.skipped} of {self.drawn} records ({self.skipped / self.drawn:.0%}) could not be used"
        if summary := self.quarantine.summary():
            reason, count = next(iter(summary.items()))
            example = next(record for record in self.quarantine.records() if record["reason"] == reason)
            message += f"; most frequent, of {count} different ones: {reason} ({example['shard']}: {example['key']})"
            message += f"; all are listed in {self.quarantine.folder}"
        self.warn(message)

    def state(self) -> dict[str, Any]:
        """Of this process: its packers' states by their numbers."""
        return {"taken": self.taken, "streams": {str(i): loader.state() for i, loader in self.loaders.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        for i, loader in self.loaders.items():
            loader.restore(state["streams"][str(i)])


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes."""
    return {"taken": states[0]["taken"], "streams": {i: s for state in states for i, s in state["streams"].items()}}


class Feed:
    """Streams' batches on a device; `state` is that behind the last one taken.

    A thread has so many ready `ahead`. On a CPU the next is made when it is asked for: a thread beside the products
    halved their speed on two cores, and Grain's own threads decode in any case.
    """

    def __init__(self, streams: Streams, device: torch.device, ahead: int | None = None):
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
