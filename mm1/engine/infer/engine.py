"""The Engine: many requests at once over a paged cache.

A step of the Engine computes one token of each document that goes on, admits the requests that have room, and computes
rows of their prompts, at most so many, packed, behind the pages that they share with earlier ones. Images are encoded
together when their rows are due, and once: their features are kept by content.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import Beams, tokens_of
from mm1.engine.infer.cache import PAGE, Cache, Rows, names
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.detokenizer import Text
from mm1.engine.infer.features import Features
from mm1.engine.infer.graphs import PAGES, Graphs
from mm1.engine.infer.prompts import Prompt, encode_prompts, refuse_long, refuse_malformed, tokenizer_of
from mm1.engine.infer.request import Request, drawn
from mm1.engine.infer.sampler import Choice, alternatives, choose
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.engine.infer.schedule import Schedule
from mm1.engine.layers.blocked import Head, packed
from mm1.engine.layers.quantize import quantized
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError, at_least
from mm1.kernels.dispatch import cdiv

TOKENS = 65_536  # of a cache by default
ROWS = {"cpu": 512, "cuda": 8192}  # of prompts a step: so few cost a long prompt 15 % more time than all at once
PATCHES = {"cpu": 2048, "cuda": 32_768}  # of images a step
SCORED = 256  # rows whose logits are scored at once


Found = tuple[Tensor, list[int], list[float]]  # logits [B, V], the likeliest tokens and their log-probabilities


class Busy(RuntimeError):
    """The queue is full; try again later."""


class Engine:
    """Runs a model for many requests at once. Its weights must not change: some are copied when this begins, in other
    layouts or narrower, and others are used where they are.

    tokens: of the cache; batch: documents at once, each beam counts as one; queue: requests that wait; prefill: rows of
    prompts a step (default: 512 on a CPU, 8192 on a GPU), between which each running document gets a token;
    image_patches: of images that a step encodes, but at least one image (default: 2,048 on a CPU, 32,768 on a GPU);
    feature_bytes: of images' features that are kept; weights: as they are, or "int8", "int4", "float8" (quantize.py).
    Not for several threads at once.

    context: tokens of the longest prompt that it takes: as many as the cache holds, but at most what the model was
    trained on, if that is known. A text ends where prompt and text together are as long, whatever max_tokens says;
    behind a prompt of that length there is one token. Beams share a prompt's pages only, so that theirs may end sooner.
    """

    def __init__(
        self, model: MM1, *, tokens: int = TOKENS, batch: int = 64, queue: int = 1024, prefill: int | None = None,
        image_patches: int | None = None, feature_bytes: int = 1 << 28, weights: str | None = None,
    ):  # fmt: skip
        weight = model.decoder.embedding.weight
        self.model, self.tokenizer, self.device = model, tokenizer_of(model), weight.device
        prefill = ROWS.get(self.device.type, ROWS["cpu"]) if prefill is None else prefill
        image_patches = PATCHES.get(self.device.type, PATCHES["cpu"]) if image_patches is None else image_patches
        at_least(1, tokens=tokens, batch=batch, queue=queue, prefill=prefill, image_patches=image_patches)
        at_least(0, feature_bytes=feature_bytes)
        self.decoder, self.head = quantized(model.decoder, weights) if weights else packed(model.decoder)
        graphs = self.device.type == "cuda"
        self.pages = cdiv(tokens, PAGE)
        self.context = min(self.pages * PAGE, model.config.context or self.pages * PAGE)
        self.cache = Cache(model.config.decoder, self.pages + graphs, weight.device, weight.dtype)
        self.graphs = Graphs(self.decoder, self.head, self.cache, batch) if graphs else None
        plain = (self.decoder, self.head) if weights else (model.decoder, Head(model.decoder))
        self.one_step = step_of(*plain, self.cache)
        self.batch, self.queue = batch, queue
        self.schedule = Schedule(self.cache, batch, prefill)
        self.waiting, self.running = self.schedule.waiting, self.schedule.running
        self.features = Features(model, image_patches, feature_bytes)
        self.computed = 0  # rows of prompts, since the beginning

    @property
    def encoded(self) -> int:
        """Return how many images were encoded since the beginning."""
        return self.features.encoded

    def submit(
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), on_text: Callable[[str], None] | None = None,
        scored: int = 0,
    ) -> Request:  # fmt: skip
        """Add a request to the queue. scored: so many last tokens of the prompt get log-probabilities too.

        Raises Busy if the queue is full, UserError for a prompt that is longer than the context or malformed.
        """
        document = prompt if isinstance(prompt, Document) else encode_prompts(self.model, [prompt], self.context)[0]
        if not 0 <= scored < max(len(document.tokens), 1):
            raise UserError(f"{scored} tokens to score, expected 0 to {len(document.tokens) - 1}: all but the first")
        return self._enqueue(Request(document, sampling, Text(self.tokenizer, sampling.stop, on_text), scored))

    def submit_answer(self, prompt: Document, answer: Sequence[int]) -> Request:
        """Add an answer whose tokens are not chosen but scored. Raises UserError for none, and as submit does."""
        if not len(answer):
            raise UserError("an answer to score is empty")
        tokens = np.array([*prompt.tokens, *answer], np.int32)
        document = Document(tokens, prompt.images, prompt.key)
        return self._enqueue(Request(document, Sampling(), Text(self.tokenizer, (), None), len(answer), limit=0))

    def _enqueue(self, request: Request) -> Request:
        tokens, c = request.document.tokens, self.model.config
        width, vocabulary, cache = request.sampling.num_beams, c.decoder.vocabulary, self.pages * PAGE
        refuse_malformed(request.document, c.connector.tokens, self.tokenizer.image, vocabulary)
        refuse_long(len(tokens), c.context, cache)
        request.fit(min(c.context or cache, tokens_of(len(tokens), width, self.pages)))
        if request.room > self.pages:
            raise UserError(f"the prompt has {len(tokens)} tokens, the cache of {cache} has no room for {width} beams")
        if beyond := [token for token, _ in request.sampling.biases if token >= vocabulary]:
            raise UserError(f"logit_bias has token {beyond[0]}, expected 0 to {vocabulary - 1}")
        if width > self.batch or (width > 1 and 2 * width > vocabulary):
            raise UserError(f"{width} beams, expected at most {min(self.batch, vocabulary // 2)}")
        # Both together, because who is submitted between two steps waits at first though it has a place in the batch.
        if len(self.waiting) + len(self.running) >= self.batch + self.queue:
            raise Busy(f"{len(self.waiting)} requests wait already")
        request.places = np.flatnonzero(tokens == self.tokenizer.image)
        request.cached = names(tokens, request.digests, self.tokenizer.image, c.connector.tokens)
        self.schedule.add(request)
        return request

    def forget(self) -> None:
        """Forget earlier prompts and images. After a change of weights make a new Engine."""
        self.cache.forget()
        self.features.forget()

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; what it has so far stays. Raises what its on_text raises, after that."""
        if request in self.waiting or request in self.running:
            self._end(request, "cancelled")

    def run(self) -> None:
        """Take steps until nothing is left."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute a token of each that goes on, then rows of prompts. Say whether there is more to do."""
        if going := self.schedule.going():
            with self._ending(going):
                widths, found, left = self._decoded(going)
                for request in going:
                    self.schedule.advance(request, 0 if request.beams else 1)
                choices = self._choose(going, widths, *found, left)
            self._take(going, choices)
        self.schedule.admit()  # afterwards: a listener that fails in decoding leaves nobody half admitted
        if due := self.schedule.share():
            with self._ending(due):
                found = self._prefilled(due)
            for request in due:
                self.schedule.advance(request, request.due)
            done = [request for request in due if not request.pending]
            for request in done:
                if not request.limit:
                    self._end(request, "scored" if request.to_score else "length")
            if begun := [request for request in done if request.limit]:
                with self._ending(begun):
                    draws = [drawn(request) for request in begun]
                    choices = self._choose(begun, [1] * len(begun), *found, draws)
                self._take(begun, choices)
        return bool(self.running or self.waiting)

    @contextmanager
    def _ending(self, requests: Sequence[Request]) -> Iterator[None]:
        """End these if what they are computed in fails, also by Ctrl-C: who was not in it goes on."""
        try:
            yield
        except BaseException as error:
            for request in requests:
                self._fail(request, error)
            raise

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request for an error. Its on_text hears no more of it, as that may be what has failed."""
        request.error = request.error or error
        request.silence()
        if request in self.running:
            self._end(request, "failed")
        request.finish = "failed"

    def _prefilled(self, due: Sequence[Request]) -> Found:
        """Compute the rows that are due of these prompts. Return logits [B, V] behind the B prompts that end with them
        and go on, the likeliest tokens and their log-probabilities."""
        images = self.features.rows(due)
        due = [request for request in due if request.due]
        starts = [request.computed for request in due]
        ends = [start + request.due for request, start in zip(due, starts)]
        tokens = np.concatenate([request.ids(start, end) for request, start, end in zip(due, starts, ends)])
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])
        x = self.model.decoder.embedding(self._moved(tokens))
        if images:
            x = x.index_copy(0, self._moved(images[0]), images[1].to(x.dtype))
        self.computed += len(tokens)
        behind = np.cumsum([request.due for request in due])  # one past each one's last row
        last = behind[[request.pending == request.due and request.limit > 0 for request in due]] - 1
        scored = [request.scoring_rows(start, end) for request, start, end in zip(due, starts, ends)]
        seen = sum(request.due * (start + 1 + end) // 2 for request, start, end in zip(due, starts, ends))
        if self.one_step and self.one_step.takes(len(tokens), seen) and not any(scored):
            tables = [request.table for request in due for _ in range(request.due)]
            return self.one_step(x.float(), positions, tables, last)
        rows = self.cache.rows([request.table for request in due], starts, ends)
        hidden = self._hidden(x, self._moved(positions), rows)
        for request, of, start, first in zip(due, scored, starts, behind - [request.due for request in due]):
            if of:
                self._score(request, of[0], hidden[first - start + of[0] : first - start + of[1]])
        if not len(last):  # all go on in the next step
            return hidden.new_empty(0, self.model.config.decoder.vocabulary), [], []
        logits = self.head(hidden[self._moved(last)])
        return logits, *greedy(logits)

    def _decoded(self, going: Sequence[Request]) -> tuple[list[int], Found, Sequence[Draw | None]]:
        """Compute one token more of each. Return how many rows each has, what was found in them, and how those tokens
        are drawn that are not drawn yet."""
        heads = [request.heads() for request in going]
        tokens, starts, tables = zip(*(head for of in heads for head in of))
        whose = [request for request, of in zip(going, heads) for _ in of]
        draws = [drawn(request) for request in whose]
        left: Sequence[Draw | None] = draws
        if self.one_step:
            found = self.one_step(tokens, starts, tables)
        elif self.graphs and max(map(len, tables)) <= PAGES:
            inside = [Draw(0, 1, 0, 0) if r.sampling.alters else draw for r, draw in zip(whose, draws)]
            left = [None if draw is done else draw for draw, done in zip(draws, inside)]
            found = self.graphs(tokens, starts, tables, inside)
        else:
            rows = self.cache.rows(tables, starts, [start + 1 for start in starts])
            x = self.model.decoder.embedding(self._moved(np.array(tokens)))
            logits = self.head(self._hidden(x, self._moved(np.array(starts)), rows))
            found = (logits, *greedy(logits))
        return [len(of) for of in heads], found, left

    def _hidden(self, x: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        return self.decoder(x, positions, rows.cu_seqlens, attends=self.cache.attends(rows))[0]

    def _moved(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _score(self, request: Request, start: int, hidden: Tensor) -> None:
        """Score the tokens behind rows `start` … of a prompt, whose states [rows, D] these are."""
        ids = self._moved(request.document.tokens[start + 1 : start + 1 + len(hidden)]).long()
        for rows, of in zip(hidden.split(SCORED), ids.split(SCORED)):
            logprobs = self.head(rows).float().log_softmax(-1)
            top = [x.cpu().numpy() for x in alternatives(logprobs)] if request.sampling.top_logprobs else None
            request.score(logprobs.gather(1, of[:, None])[:, 0].tolist(), top)

    def _choose(
        self, requests: Sequence[Request], widths: Sequence[int], logits: Tensor, tokens: list[int],
        logprobs: list[float], draws: Sequence[Draw | None],
    ) -> list[Choice]:  # fmt: skip
        """Choose the next token of each request, another than `tokens` where there is a draw still; beams advance.

        widths: rows of each request in logits, tokens, logprobs and draws.
        """
        firsts = [end - width for end, width in zip(accumulate(widths), widths)]
        self._search([(r.beams, range(at, at + n)) for r, at, n in zip(requests, firsts, widths) if r.beams], logits)
        rows = logits if len(firsts) == len(logits) else logits[firsts]
        tokens, logprobs = [tokens[at] for at in firsts], [logprobs[at] for at in firsts]
        return choose(requests, rows, tokens, logprobs, [draws[at] for at in firsts])

    def _take(self, requests: Sequence[Request], choices: Sequence[Choice]) -> None:
        """Give each request its next token, and end those that are complete.

        Raises what the first on_text or grammar that fails raises, Ctrl-C too, once all have their tokens.
        """
        failed: BaseException | None = None
        for request, choice in zip(requests, choices):
            if request.finish:  # cancelled by the on_text of one before it
                continue
            try:
                if choice.error:
                    raise choice.error
                if request.beams:
                    if request.beams.done:
                        self._end(request, "stop" if request._text.ends(request.beams.best.tokens) else "length")
                    continue
                request.take(*choice[:3])
                if request.finish:  # cancelled by its own on_text
                    continue
                if request._text.done:
                    self._end(request, "stop")
                elif len(request.tokens) == request.sampling.max_tokens:
                    self._end(request, "length")
            except BaseException as error:  # the others are to have their tokens
                failed = failed or error
                self._fail(request, error)
        if failed:
            raise failed

    def _search(self, searches: "Sequence[tuple[Beams, range]]", logits: Tensor) -> None:
        """A step of each search, from its rows of the logits."""
        if not searches:
            return
        rows = [row for _, of in searches for row in of]
        most = 2 * max(beams.sampling.num_beams for beams, _ in searches)
        logprobs, tokens = (x.cpu().numpy() for x in logits[rows].float().log_softmax(-1).topk(most))
        copies, at = [], 0
        for beams, of in searches:
            copies += beams.advance(logprobs[at : at + len(of)], tokens[at : at + len(of)])
            at += len(of)
        self.cache.copy(copies)

    def _end(self, request: Request, why: str) -> None:
        self.schedule.end(request, why)


def greedy(logits: Tensor) -> tuple[list[int], list[float]]:
    """Return the likeliest token of each row of logits [B, V], and their log-probabilities."""
    best, tokens = logits.float().log_softmax(-1).max(-1)
    return tokens.tolist(), best.tolist()
