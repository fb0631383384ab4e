"""Pack documents into fixed budgets of tokens, media, patches and documents: vector bin packing, first fit decreasing.

Images are packed into a budget of targets too. It does not order them: if those with the most targets came first, they
would use up the targets of a batch and leave its patches empty.

Documents wait in a pool of `buffer` tokens. Each batch takes the largest one that fits, then the next largest, until
none fits (a document's size is the largest share of a budget that it takes). Documents stay whole unless the fullest
budget would be filled less than FULL: only then the largest document that may be cut fills the batch with its head, and
its tail stays in the pool. Captions and conversations are never cut, so that their batches may be less full if they are
longer than half a sequence. The packer is deterministic, and its state is small: the next position of the stream and
the position of each waiting document.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from mm1.engine.data.batch import Batch, pack
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.quarantine import Quarantine
from mm1.engine.data.record import EMPTY_IMAGE, View
from mm1.errors import UserError

if TYPE_CHECKING:  # a bare GPU image has no Grain
    from mm1.engine.data.mixture import Drawn, Mixture

BUFFER = 4  # batches' worth of tokens that the pool holds by default
FULL = 0.95  # no document is cut for a batch that uses this share of one of its budgets
SHORTEST = 16  # the smallest number of tokens in a head or tail of a document that is cut
OVERDUE = 8  # a document opens the next batch once OVERDUE records for each document in the pool were drawn after it


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Hold a document in the pool, from token `start` on, and the sizes of that part."""

    age: tuple[int, int]  # its position in the stream, and its number among the documents there
    start: int
    whole: Document
    tokens: int
    media: int
    patches: int
    targets: int  # 0 if the budget does not limit them
    order: tuple[float, int, int]  # sort key: minus the largest share of a budget, then age


class Loader:
    """Yield packed batches of a mixture without end: of every stride-th position, from `first` on.

    image_id, patch, slots, empty: as in batch.pack. make_batch: packs the documents of a batch (None: batch.pack).
    buffer: tokens of the pool; it also holds decoded media, and is
    full if their patches reach the same multiple of the patch budget. quarantine: lists every bad record, and the
    damage (shard, reason) of whole files. max_bad bad records of one source in a row raise a UserError that names the
    last one's shard. waiting: the pool. shares: the share of each budget that the last batch used.
    """

    def __init__(
        self, mixture: "Mixture", budget: Budget, *, image_id: int, patch: int, slots: int, buffer: int,
        workers: int = 0, max_bad: int = 100, quarantine: Quarantine | None = None,
        damage: Sequence[tuple[str, str]] = (), first: int = 0, stride: int = 1, empty: View = EMPTY_IMAGE,
        make_batch: Callable[[Sequence[Document], Budget], Batch] | None = None,
    ):  # fmt: skip
        self.mixture, self.budget, self.buffer, self.workers = mixture, budget, buffer, workers
        self.image_id, self.patch, self.slots = image_id, patch, slots
        self.make_batch = make_batch or partial(pack, image_id=image_id, patch=patch, slots=slots, empty=empty)
        self.max_bad, self.quarantine, self.damage = max_bad, quarantine or Quarantine(None), damage
        self.position, self.first, self.stride = first, first, stride
        self.waiting: list[_Waiting] = []  # largest first, of equal ones the oldest
        self.shares: dict[str, float] = {}
        self.skipped = 0
        self.in_a_row: dict[int, int] = {}
        self._stream: Iterator[Drawn] | None = None

    @property
    def drawn(self) -> int:
        """Return the number of records drawn so far, including bad ones."""
        return (self.position - self.first) // self.stride

    def state(self) -> dict[str, Any]:
        """Return the values that determine the following batches, as plain values for JSON."""
        return {
            "position": self.position,
            "waiting": [[*w.age, w.start] for w in self.waiting],
            "skipped": self.skipped,
            "in_a_row": [[source, count] for source, count in self.in_a_row.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after `state`. The records in its pool are decoded again, each once, by several threads.

        Raises UserError for a record that has changed.
        """
        self.position, self.skipped, self._stream = state["position"], state["skipped"], None
        self.in_a_row = dict(state["in_a_row"])
        positions = sorted({position for position, _, _ in state["waiting"]})
        with ThreadPoolExecutor() as pool:
            drawn = dict(zip(positions, pool.map(self.mixture.__getitem__, positions)))
        self.waiting = []
        for position, piece, start in state["waiting"]:
            record = drawn[position]
            if piece >= len(record.documents) or start >= len(record.documents[piece].tokens):
                raise UserError(f"{record.shard}: {record.key} has changed since the checkpoint was written")
            self.waiting.append(self._entry((position, piece), start, record.documents[piece]))

    def close(self) -> None:
        """End the threads and processes that decode in advance; the next batch starts them again."""
        self._stream = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self.fill_pool()
        documents = sorted(self.take_documents(), key=lambda d: len(d.tokens))  # equal lengths run as one batch
        return self.make_batch(documents, self.budget)

    def take_documents(self) -> list[Document]:
        """Take the next batch's documents out of the pool.

        The room in a batch only shrinks. Therefore a single pass over the pool, largest first, meets at each point the
        largest document that still fits.
        """
        budget, order = self.budget, self.waiting
        tokens, media, patches, documents = budget.tokens, budget.media, budget.patches, budget.documents
        targets = budget.target_rows or 0
        oldest = min(order, key=attrgetter("age"))
        if (self.position - oldest.age[0]) // self.stride > OVERDUE * len(order):
            order = [oldest, *(w for w in order if w is not oldest)]
        chosen: list[Document] = []
        waiting: list[_Waiting] = []
        for w in order:
            fits = w.tokens <= tokens and w.media <= media and w.patches <= patches and w.targets <= targets
            if documents and fits:
                chosen.append(self._section(w.whole, w.start, len(w.whole.tokens)))
                tokens, media, patches = tokens - w.tokens, media - w.media, patches - w.patches
                targets -= w.targets
                documents -= 1
            else:
                waiting.append(w)
        for i, w in enumerate(waiting):
            free = (tokens / budget.tokens, media / budget.media, patches / budget.patches)
            if not documents or min(free) <= 1 - FULL:
                break
            if cut := self._place_of_cut(w, tokens, media, patches):
                waiting[i] = tail = self._entry(w.age, cut, w.whole)
                chosen.append(self._section(w.whole, w.start, cut))
                tokens -= w.tokens - tail.tokens
                media -= w.media - tail.media
                patches -= w.patches - tail.patches
                documents -= 1
        self.waiting = waiting
        unused = {"tokens": tokens, "media": media, "patches": patches, "documents": documents}
        self.shares = {name: 1 - count / getattr(budget, name) for name, count in unused.items()}
        return chosen

    def _place_of_cut(self, w: _Waiting, tokens: int, media: int, patches: int) -> int:
        """Return the token before which a waiting document may be cut so that its head fits, 0 if there is none.

        A text is cut anywhere, a document with media only between a text and a medium, and a conversation nowhere: no
        text is separated from the medium before it, and no answer from its question.
        """
        whole = w.whole
        first, last = w.start + SHORTEST, min(w.start + tokens, len(whole.tokens) - SHORTEST)
        if whole.prompt_mask is not None or last < first:
            return 0
        if not w.media:
            return last
        is_slot = whole.tokens == self.image_id
        places = first + np.flatnonzero(is_slot[first : last + 1] & ~is_slot[first - 1 : last])
        for at in places[::-1].tolist():
            head = self._section(whole, w.start, at)
            fits = len(head.media) <= media and head.patches(self.patch) <= patches
            if fits and (~is_slot[at:]).sum() > 1:  # the tail has text besides its <eos>
                return at
        return 0

    def _section(self, whole: Document, start: int, stop: int) -> Document:
        return whole.section(start, stop, self.image_id, self.slots)

    def fill_pool(self) -> None:
        """Draw documents until the pool is full, and sort it."""
        if self._stream is None:
            self._stream = self.mixture.iterate(self.position, self.workers, self.stride)
            for shard, reason in self.damage:
                self.quarantine.add(shard, "", reason, -1)
        tokens, patches = sum(w.tokens for w in self.waiting), sum(w.patches for w in self.waiting)
        while tokens < self.buffer and patches * self.budget.tokens < self.buffer * self.budget.patches:
            drawn = next(self._stream)
            if drawn.reason is None:
                self.in_a_row.pop(drawn.source, None)
            else:
                self._skip(drawn, drawn.reason)
            for piece, document in enumerate(drawn.documents):
                self.waiting.append(self._entry((self.position, piece), 0, document))
                tokens, patches = tokens + self.waiting[-1].tokens, patches + self.waiting[-1].patches
            self.position += self.stride
        self.waiting.sort(key=attrgetter("order"))

    def _entry(self, age: tuple[int, int], start: int, whole: Document) -> _Waiting:
        rest, budget = self._section(whole, start, len(whole.tokens)), self.budget
        tokens, media, patches = len(rest.tokens), len(rest.media), rest.patches(self.patch)
        targets = 0 if budget.target_rows is None else int(rest.targets(self.image_id).sum())
        size = max(tokens / budget.tokens, media / budget.media, patches / budget.patches, 1 / budget.documents)
        return _Waiting(age, start, whole, tokens, media, patches, targets, (-size, *age))

    def _skip(self, bad: "Drawn", reason: str) -> None:
        self.skipped += 1
        count = self.in_a_row[bad.source] = self.in_a_row.get(bad.source, 0) + 1
        self.quarantine.add(bad.shard, bad.key, reason, self.position)
        if count >= self.max_bad:
            raise UserError(
                f"{bad.shard}: {count} unreadable records in a row (setting data.max_bad), the last one: {reason}"
            )
