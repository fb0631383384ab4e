"""A request of the Engine: its prompt, its pages, and the tokens that it has so far."""

import random
from collections import Counter

import numpy as np

from mm1.engine.beams import Beams, pages_of
from mm1.engine.cache import image_digest
from mm1.engine.data.document import Document
from mm1.engine.detokenizer import Text
from mm1.engine.sampling import Draw, Sampling


class Request:
    """Holds a prompt, its pages and the new tokens.

    finish: None while it runs, then "stop", "length", "scored", "cancelled", or "failed" if its on_text or its prompt
    raised.
    """

    def __init__(self, document: Document, sampling: Sampling, text: Text, scored: int = 0):
        self.document, self.sampling, self.scored = document, sampling, scored
        self.digests = [image_digest(image) for image in document.images]
        self.cached: list[bytes] = []  # names of the pages that may be shared
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # of tokens, or of those that are scored
        self.scores: list[float] = []  # log-probabilities of the last `scored` tokens of the prompt
        self.score_top: list[list[tuple[int, float]]] = []  # at each of them the likeliest ones, with theirs
        self.top: list[list[tuple[int, float]]] = []  # at each token: the likeliest ones, with their log-probabilities
        self.counts: Counter[int] = Counter()  # of tokens, for the frequency and presence penalties
        self.grammar = sampling.grammar.begin() if sampling.grammar else None
        self.finish: str | None = None
        self._text = text
        self.pages: list[int] = []
        self.shared = 0  # of them, with what was computed before
        self.table = np.empty(0, np.int32)  # the same pages
        self.random = random.Random(sampling.seed) if sampling.temperature else None
        self.beams: Beams | None = None  # while it runs, if it searches
        self._seen = np.empty(0, np.int64)
        self._known: set[int] = set()  # the same
        self._counted = 0  # of tokens, those that are in both

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def room(self) -> int:
        """Return how many pages it needs, with those for all that is to come."""
        rows = len(self.document.tokens)
        return pages_of(rows, self.sampling)

    @property
    def seen(self) -> np.ndarray:
        """Return the distinct tokens of prompt and text, int64, for the repetition penalty. Only new ones take time."""
        if not self._known:
            self._seen = np.unique(self.document.tokens).astype(np.int64)
            self._known = set(self._seen.tolist())
        new = [token for token in self.tokens[self._counted :] if token not in self._known]
        self._counted = len(self.tokens)
        if new:
            self._known.update(new)
            self._seen = np.append(self._seen, list(dict.fromkeys(new)))
        return self._seen

    def admit(self, pages: list[int], shared: int) -> None:
        """Begin on these pages, of which the first `shared` are computed already."""
        self.pages, self.table, self.shared = pages, np.array(pages, np.int32), shared
        if self.sampling.num_beams > 1:
            self.beams = Beams(len(self.document.tokens), pages, self.sampling, self._text.ends)

    def take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Add the next token to the text. Raises what its listener or its grammar raises."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.counts[token] += 1
        if self.sampling.top_logprobs:
            self.top.append(top)
        if self.grammar:
            self.grammar.take(token)
        self._text.add(token)

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
    u = request.random.random() if request.random else 0.0
    return Draw(how.temperature, how.top_p, how.top_k, u, how.min_p)
