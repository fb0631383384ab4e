"""Hold a request of the Engine: its prompt, its pages, and the tokens that were generated so far."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import Beams, pages_needed
from mm1.engine.infer.cache import PAGE, page_name
from mm1.engine.infer.detokenizer import TextStream
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.kernels.dispatch import cdiv

ALTERNATIVE = np.dtype([("token", np.int32), ("logprob", np.float32)])


def fitted(sampling: Sampling, prompt: int, context: int | None) -> Sampling:
    """Return the settings with max_tokens lowered so that prompt and text fit in `context` tokens; None: no limit.

    A prompt that fills the context gets one token, whose own row is never computed.
    """
    limit = max(context - prompt, 1) if context else sampling.max_tokens
    return sampling if sampling.max_tokens <= limit else replace(sampling, max_tokens=limit)


class Request:
    """Hold a prompt, its pages and the new tokens.

    output: collects the text. finish: None while it waits or runs, then "stop", "length", "scored", "cancelled", or
    "failed" if its on_text or a step that computed it raised `error`. to_score: the number of last tokens of the prompt
    whose log-probabilities are returned.
    """

    def __init__(self, document: Document, sampling: Sampling, output: TextStream, to_score: int = 0):
        self.document, self.sampling, self.to_score = document, sampling, to_score
        self.prompt = len(document.tokens)
        self.digests = document.digests
        self.page_names: list[bytes] = []  # of its first full pages
        self.registered = 0  # pages of its prefix that were in the cache when Schedule.admit last looked
        self.blocked_at: tuple[int, int, int] | None = None  # the state of the cache when it had too few pages for it
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # of tokens, or of the answer that is scored
        self.scores: list[float] = []  # log-probabilities of the prompt's last tokens
        self._score_top = np.empty((0, 0), ALTERNATIVE)
        self.top: list[list[tuple[int, float]]] = []  # the likeliest tokens at each new token's place
        self.counts: Counter[int] = Counter()  # of new tokens, for frequency_penalty and presence_penalty
        self._repeats = sampling.repetition_penalty != 1
        # The distinct tokens of prompt and text, for repetition_penalty.
        self.seen = np.unique(document.tokens).astype(np.int64) if self._repeats else np.empty(0, np.int64)
        self.grammar = sampling.grammar.begin() if sampling.grammar else None
        self.finish: str | None = None
        self.error: BaseException | None = None
        self.output = output
        self.number = 0  # order of arrival
        self.overtaken = 0  # later requests that were admitted while it waited for pages
        self.preempted = 0  # how often
        self.pages: list[int] = []
        self.table = np.empty(0, np.int32)  # the same pages
        self.shared = 0  # pages of the prefix cache that it got when it was first admitted
        self.computed = 0  # rows in the cache, without those of beams
        self.due = 0  # rows of its prompt that the next step computes
        self.media_rows = np.empty(0, np.int64)  # rows of the prompt that are slots of media
        self.features: dict[bytes, Tensor] = {}  # of a view of which a step computed some rows but not all
        self.random = random.Random(sampling.seed) if sampling.temperature else None
        self.beams: Beams | None = None  # while it runs, if it searches

    @property
    def text(self) -> str:
        """Return the generated text so far."""
        return self.output.text

    @property
    def sharable(self) -> list[bytes]:
        """Return the names of the pages that it may reuse: those before the first row whose logits are still needed."""
        if len(self.scores) >= self.to_score:
            return self.page_names
        return self.page_names[: (self.prompt - 1 - self.to_score + len(self.scores)) // PAGE]

    @property
    def max_pages(self) -> int:
        """Return the largest number of pages that it needs until its end."""
        return pages_needed(self.prompt, self.sampling)

    @property
    def pending(self) -> int:
        """Return the number of rows of prompt and new tokens that are not in the cache."""
        return self.prompt + len(self.tokens) - self.computed

    @property
    def prefilling(self) -> bool:
        """Return whether its prompt, or tokens that preemption has dropped from the cache, are being computed."""
        return self.computed + 1 < self.prompt + len(self.tokens) or self.computed < self.prompt

    def ids(self, start: int, end: int) -> np.ndarray:
        """Return the tokens of rows `start` to `end` of prompt and generated text, int32."""
        prompt = self.document.tokens
        new = self.tokens[max(start - self.prompt, 0) : max(end - self.prompt, 0)]
        return np.concatenate([prompt[start:end], np.array(new, np.int32)])

    @property
    def slots(self) -> int:
        """Return the number of rows of one view, 1 where there is none."""
        return max(len(self.media_rows) // max(len(self.digests), 1), 1)

    def media_range(self, start: int, end: int) -> tuple[int, int]:
        """Return the number of the first view with a row in `start` to `end`, and one past the last; equal if none."""
        first, last = np.searchsorted(self.media_rows, [start, end]).tolist()
        first_view = first // self.slots
        return first_view, cdiv(last, self.slots) if last > first else first_view

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
            width = min(self.sampling.top_logprobs, top[0].shape[1])
            if not self.scores:
                self._score_top = np.empty((self.to_score, width), ALTERNATIVE)
            rows = self._score_top[len(self.scores) :][: len(logprobs)]
            rows["token"], rows["logprob"] = (x[:, :width] for x in top)
        self.scores += logprobs
        if self.sampling.max_tokens == 0:  # no new tokens will have log-probabilities
            self.logprobs = self.scores

    @property
    def score_top(self) -> np.ndarray:
        """Return the likeliest tokens at the places of `scores`, ALTERNATIVE [scores, k]: 8 bytes each."""
        return self._score_top[: len(self.scores)]

    def admit(self, pages: list[int], shared: int) -> None:
        """Assign its pages. The first `shared` come from the prefix cache."""
        if not self.preempted:
            self.shared = shared
        self.pages, self.table, self.computed = pages, np.array(pages, np.int32), shared * PAGE
        if self.sampling.num_beams > 1:
            self.beams = Beams(self.prompt, pages, self.sampling, self.output.ends)

    def draw(self) -> Draw:
        """Return how its next token is drawn, with a new random number."""
        return self.sampling.draw(self.random.random() if self.random else 0.0)

    def add_page(self, page: int) -> None:
        """Assign one more page."""
        self.pages.append(page)
        self.table = np.append(self.table, np.int32(page))

    def advance(self, rows: int) -> range:
        """Count `rows` more rows as computed; return the numbers of its pages that these rows fill."""
        full = range(self.computed // PAGE, (self.computed + rows) // PAGE)
        self.computed += rows
        for page in full:
            start, end = page * PAGE, page * PAGE + PAGE
            if page == len(self.page_names) and end >= self.prompt:  # pages of the prompt are named before it begins
                first, last = self.media_range(start, end)
                previous = self.page_names[-1] if page else b""
                self.page_names.append(page_name(previous, self.ids(start, end), self.digests[first:last]))
        return full

    def preempt(self) -> None:
        """Release its pages, but keep its text and the state of its random draws."""
        self.preempted += 1
        self.pages, self.table, self.computed, self.due = [], np.empty(0, np.int32), 0, 0
        self.features, self.registered, self.blocked_at = {}, 0, None

    def append(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Add the next token to the text. Raises what its on_text or its grammar raises."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.counts[token] += 1
        if self._repeats and token not in self.seen:
            self.seen = np.append(self.seen, token)
        if self.sampling.top_logprobs:
            self.top.append(top)
        if self.grammar:
            self.grammar.take(token)
        self.output.add(token)

    @property
    def completion(self) -> str | None:
        """Return the reason why its text is complete, "stop" or "length", or None."""
        if self.beams:
            stopped = self.beams.done and self.output.ends(self.beams.best.tokens)
            return "stop" if stopped else "length" if self.beams.done else None
        limited = len(self.tokens) == self.sampling.max_tokens
        return "stop" if self.output.done else "length" if limited else None

    def last_rows(self) -> list[tuple[int, int, np.ndarray]]:
        """Return the rows that a decoding step computes, one of each text: token, position in the text, pages."""
        place = self.prompt - 1
        if self.beams:
            return [(beam.tokens[-1], place + len(beam.tokens), beam.table) for beam in self.beams.live]
        return [(self.tokens[-1], place + len(self.tokens), self.table)]

    def end(self, why: str) -> None:
        """End the request for the reason `why` and keep its text; a beam search ends with its best text."""
        self.finish, self.features = why, {}
        if self.beams:
            best = self.beams.best
            self.tokens, self.logprobs = list(best.tokens), list(best.logprobs)
            for token in self.tokens:
                self.output.add(token)
        self.output.finish()
