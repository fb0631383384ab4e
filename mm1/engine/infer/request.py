"""A request of the Engine: its prompt, its pages, and the tokens that were generated so far."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import Beams, pages_of
from mm1.engine.infer.cache import PAGE, page_name
from mm1.engine.infer.detokenizer import Text
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.kernels.dispatch import cdiv


def fitted(sampling: Sampling, prompt: int, context: int | None) -> Sampling:
    """Return the settings with max_tokens cut to the room that `context` tokens have after `prompt` tokens.

    After a prompt that fills the context there is room for one token, whose own row is never computed.
    """
    room = max(context - prompt, 1) if context else sampling.max_tokens
    return sampling if sampling.max_tokens <= room else replace(sampling, max_tokens=room)


class Alternatives(Sequence[list[tuple[int, float]]]):
    """Holds the `width` likeliest tokens at each of `count` places with their log-probabilities, in 8 bytes each.

    Its length is the number of places that are filled; each is a list of pairs (token, log-probability).
    """

    def __init__(self, count: int, width: int):
        self._tokens, self._logprobs = np.empty((count, width), np.int32), np.empty((count, width), np.float32)
        self._filled = 0

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Fill the next places with the first columns of these [n, ≥ width]."""
        rows = slice(self._filled, self._filled + len(tokens))
        width = self._tokens.shape[1]
        self._tokens[rows], self._logprobs[rows] = tokens[:, :width], logprobs[:, :width]
        self._filled = rows.stop

    def __len__(self) -> int:
        return self._filled

    def __getitem__(self, place: int) -> list[tuple[int, float]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        place = range(self._filled)[place]
        return list(zip(self._tokens[place].tolist(), self._logprobs[place].tolist()))

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        return (self[place] for place in range(self._filled))


class Request:
    """Holds a prompt, its pages and the new tokens.

    finish: None while it waits or runs, then "stop", "length", "scored", "cancelled", or "failed" if its on_text or a
    step that computed it raised `error`. to_score: the number of last tokens of the prompt whose log-probabilities are
    wanted. limit: the largest number of new tokens (default: max_tokens of the sampling).
    """

    def __init__(
        self, document: Document, sampling: Sampling, text: Text, to_score: int = 0, *, limit: int | None = None
    ):
        self.document, self.sampling, self.to_score = document, sampling, to_score
        self.limit = sampling.max_tokens if limit is None else limit
        self.prompt = len(document.tokens)
        self.digests = document.digests
        self.page_names: list[bytes] = []  # of its first full pages
        self.registered = 0  # pages of its prefix that were in the cache when the schedule last looked
        self.short: tuple[int, int, int] | None = None  # the state of the cache that had too few pages (Schedule.admit)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # of tokens, or of the answer that is scored
        self.scores: list[float] = []  # log-probabilities of the prompt's last tokens
        self.score_top: Sequence[list[tuple[int, float]]] = []  # the likeliest tokens at their places
        self.top: list[list[tuple[int, float]]] = []  # the likeliest tokens at each new token's place
        self.counts: Counter[int] = Counter()  # of new tokens, for the frequency and presence penalties
        self.grammar = sampling.grammar.begin() if sampling.grammar else None
        self.finish: str | None = None
        self.error: BaseException | None = None
        self._text = text
        self.number = 0  # order of arrival
        self.overtaken = 0  # later requests that were admitted while it waited for pages
        self.preempted = 0  # how often
        self.pages: list[int] = []
        self.table = np.empty(0, np.int32)  # the same pages
        self.shared = 0  # pages that it shared when it was first admitted
        self.computed = 0  # rows in the cache, without those of beams
        self.due = 0  # rows of its prompt that the next step computes
        self.places = np.empty(0, np.int64)  # rows of the prompt that are slots of media
        self.features: dict[bytes, Tensor] = {}  # of a view of which a step computed some rows but not all
        self.random = random.Random(sampling.seed) if sampling.temperature else None
        self.beams: Beams | None = None  # while it runs, if it searches
        self._seen = np.empty(0, np.int64)
        self._seen_set: set[int] = set()  # the same
        self._counted = 0  # new tokens that both contain

    def fit(self, context: int) -> None:
        """Cut max_tokens to the room that `context` tokens have after the prompt (`fitted`)."""
        self.sampling = fitted(self.sampling, self.prompt, context)
        self.limit = min(self.limit, self.sampling.max_tokens)

    def silence(self) -> None:
        """Call its on_text no more."""
        self._text.emit = None

    @property
    def text(self) -> str:
        """Return the generated text so far."""
        return self._text.text

    @property
    def sharable(self) -> list[bytes]:
        """Return the names of the pages that it may share: those before the first row whose logits are still needed."""
        if len(self.scores) >= self.to_score:
            return self.page_names
        return self.page_names[: (self.prompt - 1 - self.to_score + len(self.scores)) // PAGE]

    @property
    def room(self) -> int:
        """Return the largest number of pages that it needs until its end."""
        return pages_of(self.prompt, self.sampling) if self.limit else cdiv(self.prompt, PAGE)

    @property
    def pending(self) -> int:
        """Return the number of rows of prompt and new tokens that are not in the cache."""
        return self.prompt + len(self.tokens) - self.computed

    @property
    def prefilling(self) -> bool:
        """Return whether its prompt is being computed, or tokens that preemption has dropped from the cache."""
        return self.computed + 1 < self.prompt + len(self.tokens) or self.computed < self.prompt

    def ids(self, start: int, end: int) -> np.ndarray:
        """Return the tokens of rows `start` to `end` of prompt and generated text, int32."""
        prompt = self.document.tokens
        new = self.tokens[max(start - self.prompt, 0) : max(end - self.prompt, 0)]
        return np.concatenate([prompt[start:end], np.array(new, np.int32)])

    @property
    def slots(self) -> int:
        """Return the number of rows of one view, 1 where there is none."""
        return max(len(self.places) // max(len(self.digests), 1), 1)

    def media_range(self, start: int, end: int) -> tuple[int, int]:
        """Return the number of the first view with a row in `start` to `end`, and one past the last; equal if none."""
        first, last = np.searchsorted(self.places, [start, end]).tolist()
        return first // self.slots, cdiv(last, self.slots) if last > first else first // self.slots

    def scoring_rows(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the range of rows in `start` to `end` whose logits score a token, None where there is none."""
        last = self.prompt - 1
        first, end = max(last - self.to_score + len(self.scores), start), min(end, last)
        return (first, end) if first < end else None

    def score(self, logprobs: list[float], top: Sequence[np.ndarray] | None) -> None:
        """Add the log-probabilities of the next n tokens to score.

        top: the likeliest tokens and their log-probabilities, [n, k] each.
        """
        if top:
            if not isinstance(self.score_top, Alternatives):
                width = min(self.sampling.top_logprobs, top[0].shape[1])
                self.score_top = Alternatives(self.to_score, width)
            self.score_top.extend(*top)
        self.scores += logprobs
        if self.limit == 0:  # no new tokens will have log-probabilities
            self.logprobs = self.scores

    @property
    def seen(self) -> np.ndarray:
        """Return the distinct tokens of prompt and text, int64, for the repetition penalty. Only new ones take time."""
        if not self._seen_set:
            self._seen = np.unique(self.document.tokens).astype(np.int64)
            self._seen_set = set(self._seen.tolist())
        new = [token for token in self.tokens[self._counted :] if token not in self._seen_set]
        self._counted = len(self.tokens)
        if new:
            self._seen_set.update(new)
            self._seen = np.append(self._seen, list(dict.fromkeys(new)))
        return self._seen

    def admit(self, pages: list[int], shared: int) -> None:
        """Assign its pages, of which the first `shared` are computed already."""
        if not self.preempted:
            self.shared = shared
        self.pages, self.table, self.computed = pages, np.array(pages, np.int32), shared * PAGE
        if self.sampling.num_beams > 1:
            self.beams = Beams(self.prompt, pages, self.sampling, self._text.ends)

    def add_page(self, page: int) -> None:
        """Assign one more page."""
        self.pages.append(page)
        self.table = np.append(self.table, np.int32(page))

    def advance(self, rows: int) -> range:
        """Count `rows` more rows in the cache; return the numbers of its pages that are full with them."""
        full = range(self.computed // PAGE, (self.computed + rows) // PAGE)
        self.computed += rows
        for page in full:
            start, end = page * PAGE, page * PAGE + PAGE
            if page == len(self.page_names) and end >= self.prompt:  # pages of the prompt are named before it begins
                first, last = self.media_range(start, end)
                before = self.page_names[-1] if page else b""
                self.page_names.append(page_name(before, self.ids(start, end), self.digests[first:last]))
        return full

    def preempt(self) -> None:
        """Give up its pages; the text so far and the state of its random draws stay."""
        self.preempted += 1
        self.pages, self.table, self.computed, self.due = [], np.empty(0, np.int32), 0, 0
        self.features, self.registered, self.short = {}, 0, None

    def append(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Add the next token to the text. Raises what its on_text or its grammar raises."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.counts[token] += 1
        if self.sampling.top_logprobs:
            self.top.append(top)
        if self.grammar:
            self.grammar.take(token)
        self._text.add(token)

    def heads(self) -> list[tuple[int, int, np.ndarray]]:
        """Return the rows that a decoding step computes: each its token, its place in the document, and the pages."""
        place = self.prompt - 1
        if self.beams:
            return [(beam.tokens[-1], place + len(beam.tokens), beam.table) for beam in self.beams.live]
        return [(self.tokens[-1], place + len(self.tokens), self.table)]

    def end(self, why: str) -> None:
        """End the request for the reason `why`, with the text so far; a beam search ends with its best text."""
        self.finish, self.features = why, {}
        if self.beams:
            best = self.beams.best
            self.tokens, self.logprobs = list(best.tokens), list(best.logprobs)
            for token in self.tokens:
                self._text.add(token)
        self._text.finish()


def drawn(request: Request) -> Draw:
    """Return the settings and the random number by which a request's next token is drawn."""
    how = request.sampling
    u = request.random.random() if request.random else 0.0
    return Draw(how.temperature, how.top_p, how.top_k, u, how.min_p)
