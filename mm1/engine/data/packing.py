"""Whole documents into fixed budgets of tokens, images, patches and documents.

The oldest document waiting opens a batch, then the longest that still fits joins, until none does. Deterministic, and
its state is small: the next position of the stream, and the positions of the documents that wait.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm1.engine.data.batch import Batch, pack
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.mixture import Drawn, Mixture
from mm1.engine.data.record import DataError


class Loader:
    """Endless packed batches of a mixture.

    quarantine: a file to which every record that was skipped is appended as one JSON line. max_bad records of one source
    in a row raise DataError naming the last one's shard.
    """

    def __init__(
        self, mixture: Mixture, budget: Budget, *, image_id: int, patch: int, slots: int, buffer: int = 64,
        workers: int = 0, max_bad: int = 100, quarantine: Path | None = None,
    ):  # fmt: skip
        self.mixture, self.budget, self.buffer, self.workers = mixture, budget, buffer, workers
        self.layout = {"image_id": image_id, "patch": patch, "slots": slots}
        self.max_bad, self.quarantine = max_bad, quarantine
        self.position = 0
        self.waiting: list[tuple[int, int, Document]] = []  # (position, piece of it, document)
        self.skipped = 0
        self.in_a_row: dict[int, int] = {}
        self._stream: Iterator[Drawn] | None = None

    def state(self) -> dict[str, Any]:
        """Everything that decides the batches to come, as plain values."""
        return {
            "position": self.position,
            "waiting": [[position, piece] for position, piece, _ in self.waiting],
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
            self.waiting.append((position, piece, drawn.documents[piece]))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        chosen: list[Document] = []
        room = self.budget
        while True:
            self._refill()
            fitting = [i for i, (_, _, document) in enumerate(self.waiting) if self._left(room, document)]
            if not fitting:
                chosen.sort(key=lambda document: len(document.tokens))  # equal lengths run as one batch
                return pack(chosen, self.budget, **self.layout)
            pick = max(fitting, key=lambda i: len(self.waiting[i][2].tokens)) if chosen else fitting[0]
            document = self.waiting.pop(pick)[2]
            chosen.append(document)
            left = self._left(room, document)
            assert left is not None
            room = left

    def _left(self, room: Budget, document: Document) -> Budget | None:
        """What the document would leave of the room, None if it does not fit."""
        left = Budget(
            room.tokens - len(document.tokens),
            room.images - len(document.images),
            room.patches - document.patches(self.layout["patch"]),
            room.documents - 1,
        )
        return left if min(left.tokens, left.images, left.patches, left.documents) >= 0 else None

    def _refill(self) -> None:
        if self._stream is None:
            self._stream = self.mixture.iterate(self.position, self.workers)
        while len(self.waiting) < self.buffer:
            drawn = next(self._stream)
            if drawn.reason is None:
                self.in_a_row.pop(drawn.source, None)
            else:
                self._skip(drawn)
            self.waiting += [(self.position, piece, document) for piece, document in enumerate(drawn.documents)]
            self.position += 1

    def _skip(self, bad: Drawn) -> None:
        self.skipped += 1
        self.in_a_row[bad.source] = self.in_a_row.get(bad.source, 0) + 1
        if self.quarantine is not None:
            line = {"shard": bad.shard, "key": bad.key, "reason": bad.reason, "position": self.position}
            with self.quarantine.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.in_a_row[bad.source] >= self.max_bad:
            raise DataError(f"{bad.shard}: {self.max_bad} unreadable records in a row, the last because {bad.reason}")
