"""Whole documents into fixed budgets of tokens, images, patches and documents.

The oldest of `buffer` waiting documents opens a batch, then the longest that still fits joins, until none does: for a
good fill the buffer holds some batches' worth. Deterministic, and its state is small: the next position of the stream,
and the positions of the documents that wait.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.batch import Batch, pack
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import DataError

if TYPE_CHECKING:  # a bare GPU image has no Grain
    from mm1.engine.data.mixture import Drawn, Mixture


@dataclass(frozen=True, eq=False)
class _Waiting:
    position: int
    piece: int  # of the documents at that position
    document: Document
    tokens: int
    images: int
    patches: int


class Loader:
    """Endless packed batches of a mixture: of every stride-th position, from `first` on.

    quarantine: a file to which every record that was skipped, and the damage (shard, reason) found in whole files, is
    appended as one JSON line. max_bad records of one source in a row raise DataError naming the last one's shard.
    """

    def __init__(
        self, mixture: "Mixture", budget: Budget, *, image_id: int, patch: int, slots: int, buffer: int = 64,
        workers: int = 0, max_bad: int = 100, quarantine: Path | None = None, damage: Sequence[tuple[str, str]] = (),
        first: int = 0, stride: int = 1,
    ):  # fmt: skip
        self.mixture, self.budget, self.buffer, self.workers = mixture, budget, buffer, workers
        self.layout = {"image_id": image_id, "patch": patch, "slots": slots}
        self.max_bad, self.quarantine, self.damage = max_bad, quarantine, damage
        self.position, self.stride = first, stride
        self.waiting: list[_Waiting] = []
        self.skipped = 0
        self.in_a_row: dict[int, int] = {}
        self._stream: Iterator[Drawn] | None = None

    def state(self) -> dict[str, Any]:
        """Everything that decides the batches to come, as plain values."""
        return {
            "position": self.position,
            "waiting": [[w.position, w.piece] for w in self.waiting],
            "skipped": self.skipped,
            "in_a_row": [[source, count] for source, count in self.in_a_row.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.position, self.skipped, self._stream = state["position"], state["skipped"], None
        self.in_a_row = dict(state["in_a_row"])
        self.waiting = []
        for position, piece in state["waiting"]:
            drawn = self.mixture[position]
            if piece >= len(drawn.documents):
                raise DataError(f"{drawn.shard}: {drawn.key} is not what it was when the checkpoint was written")
            self.waiting.append(self._wait(position, piece, drawn.documents[piece]))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self._refill()
        budget = self.budget
        tokens, images, patches, slots = budget.tokens, budget.images, budget.patches, budget.documents
        chosen: list[Document] = []
        fitting = self.waiting
        while slots:
            fitting = [w for w in fitting if w.tokens <= tokens and w.images <= images and w.patches <= patches]
            if not fitting:
                break
            pick = max(fitting, key=attrgetter("tokens")) if chosen else fitting[0]
            fitting = [w for w in fitting if w is not pick]
            self.waiting.remove(pick)
            chosen.append(pick.document)
            tokens, images, patches, slots = (
                tokens - pick.tokens,
                images - pick.images,
                patches - pick.patches,
                slots - 1,
            )
        chosen.sort(key=lambda document: len(document.tokens))  # equal lengths run as one batch
        return pack(chosen, budget, **self.layout)

    def _refill(self) -> None:
        if self._stream is None:
            self._stream = self.mixture.iterate(self.position, self.workers, self.stride)
            for shard, reason in self.damage:
                self._list(shard, "", reason, -1)
        while len(self.waiting) < self.buffer:
            drawn = next(self._stream)
            if drawn.reason is None:
                self.in_a_row.pop(drawn.source, None)
            else:
                self._skip(drawn)
            self.waiting += [
                self._wait(self.position, piece, document) for piece, document in enumerate(drawn.documents)
            ]
            self.position += self.stride

    def _wait(self, position: int, piece: int, document: Document) -> _Waiting:
        patches = document.patches(self.layout["patch"])
        return _Waiting(position, piece, document, len(document.tokens), len(document.images), patches)

    def _skip(self, bad: "Drawn") -> None:
        self.skipped += 1
        self.in_a_row[bad.source] = self.in_a_row.get(bad.source, 0) + 1
        self._list(bad.shard, bad.key, bad.reason, self.position)
        if self.in_a_row[bad.source] >= self.max_bad:
            raise DataError(f"{bad.shard}: {self.max_bad} unreadable records in a row, the last because {bad.reason}")

    def _list(self, shard: str, key: str, reason: str | None, position: int) -> None:
        if self.quarantine is not None:
            with self.quarantine.open("a") as file:
                file.write(json.dumps({"shard": shard, "key": key, "reason": reason, "position": position}) + "\n")
