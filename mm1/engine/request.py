"""A request of the Engine: its prompt, its pages, and the tokens that it has so far."""

import random

import numpy as np

from mm1.engine.beams import Beams, pages_of
from mm1.engine.cache import PAGE
from mm1.engine.data.document import Document
from mm1.engine.detokenizer import Text
from mm1.engine.sampling import Draw, Sampling
from mm1.kernels.dispatch import cdiv


class Request:
    """Holds a prompt, its pages and the new tokens.

    finish: None while it runs, then "stop", "length", "scored", "cancelled", or "failed" if its on_text or its prompt
    raised.
    """

    def __init__(self, document: Document, sampling: Sampling, text: Text, scored: int = 0):
        self.document, self.sampling, self.scored = document, sampling, scored
        self.digests = document.digests
        self.cached: list[bytes] = []  # names of the pages that may be shared
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # of tokens, or of those that are scored
        self.finish: str | None = None
        self._text = text
        self.pages: list[int] = []
        self.shared = 0  # of them, with what was computed before
        self.table = np.empty(0, np.int32)  # the same pages
        self.random = random.Random(sampling.seed) if sampling.temperature else None
        self.beams: Beams | None = None  # while it runs, if it searches

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def room(self) -> int:
        """Return how many pages it needs, with those for all that is to come."""
        rows = len(self.document.tokens)
        return cdiv(rows, PAGE) if self.scored else pages_of(rows, self.sampling)

    def admit(self, pages: list[int], shared: int) -> None:
        """Begin on these pages, of which the first `shared` are computed already."""
        self.pages, self.table, self.shared = pages, np.array(pages, np.int32), shared
        if self.sampling.num_beams > 1:
            self.beams = Beams(len(self.document.tokens), pages, self.sampling, self._text.ends)

    def heads(self) -> list[tuple[int, int, np.ndarray]]:
        """Return the rows that a step computes: the last token, its place in the document, the pages."""
        place = len(self.document.tokens) - 1
        if self.beams:
            return [(beam.tokens[-1], place + len(beam.tokens), beam.table) for beam in self.beams.live]
        return [(self.tokens[-1], place + len(self.tokens), self.table)]

    def end(self, why: str) -> None:
        """Keep what it has so far; of a search its best text."""
        self.finish = why
        if self.beams:
            best = self.beams.best
            self.tokens, self.logprobs = list(best.tokens), list(best.logprobs)
            for token in self.tokens:
                self._text.add(token)
        self._text.finish()


def drawn(request: Request) -> Draw:
    """Return how the next token of a request is drawn."""
    how = request.sampling
    return Draw(how.temperature, how.top_p, how.top_k, request.random.random() if request.random else 0.0)
