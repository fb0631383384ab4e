"""Run many requests at once by continuous batching over a paged cache.

A step decodes one token of each running request, admits waiting requests, and prefills a limited number of rows of
their prompts, packed, after the pages that they share with earlier requests. Images are encoded together, when their
rows are prefilled, and their features are cached by the images' content.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import Beams, max_length, pages_needed
from mm1.engine.infer.cache import PAGE, Cache, Rows, page_names
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.detokenizer import TextStream
from mm1.engine.infer.features import Features
from mm1.engine.infer.graphs import Graphs
from mm1.engine.infer.prompts import (
    Prompt,
    encode_prompts,
    refuse_long,
    refuse_malformed,
    sample_document,
    tokenizer_of,
)
from mm1.engine.infer.request import Request, fitted
from mm1.engine.infer.sampler import NextToken, alternatives, choose_tokens
from mm1.engine.infer.sampling import GREEDY, Draw, Sampling
from mm1.engine.infer.schedule import Schedule
from mm1.engine.layers.blocked import Head, blocked
from mm1.engine.layers.generation import hidden_states
from mm1.engine.layers.quantize import quantized
from mm1.engine.models.spec import LanguageModel
from mm1.errors import Busy, UserError, at_least
from mm1.kernels.dispatch import cdiv

TOKENS = 65_536  # default size of the cache
ROWS = {"cpu": 512, "cuda": 8192}  # rows of prompts in a step; chunking makes a long prompt 15 % slower
PATCHES = {"cpu": 2048, "cuda": 32_768}  # patches of images in a step
WARM_ROWS = 8, 32, 64, 128, 512  # rows of prompts in the steps of a warm-up, beside the limit of a step
SCORED = 256  # rows whose logits are in memory at once when a prompt is scored

Next = tuple[Tensor, list[int], list[float]]  # logits [B, V], the next tokens and their log-probabilities


class Engine:
    """Run a model for many requests at once. It is not thread-safe.

    The model's weights must not change afterwards: the engine copies some of them, quantized or in other layouts, and
    uses others in place.

    tokens: size of the cache; batch: limit of running texts, each beam counts as one; queue: limit of waiting requests;
    prefill: rows of prompts in a step (default: 512 on a CPU, 8192 on a GPU), after which each running text gets a
    token; image_patches: limit of patches that a step encodes, but at least one image (default: 2,048 on a CPU, 32,768
    on a GPU); feature_bytes: limit of cached image features; weights: None for the model's dtype, or "int8", "int4",
    "float8" (quantize.py).

    context: limit of a prompt's tokens: the size of the cache, or the length that the model was trained on if that is
    less. A text ends when prompt and text together reach it, even before max_tokens; a prompt of that length gets one
    token. Beams share only the prompt's pages, so their texts may end sooner.
    """

    def __init__(
        self, model: LanguageModel, *, tokens: int = TOKENS, batch: int = 64, queue: int = 1024,
        prefill: int | None = None, image_patches: int | None = None, feature_bytes: int = 1 << 28,
        weights: str | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer_of(model)
        weight = model.decoder.embedding.weight
        self.device = weight.device
        prefill = ROWS.get(self.device.type, ROWS["cpu"]) if prefill is None else prefill
        image_patches = PATCHES.get(self.device.type, PATCHES["cpu"]) if image_patches is None else image_patches
        at_least(1, tokens=tokens, batch=batch, queue=queue, prefill=prefill, image_patches=image_patches)
        at_least(0, feature_bytes=feature_bytes)
        self.decoder, self.head = quantized(model.decoder, weights) if weights else blocked(model.decoder)
        graphs = self.device.type == "cuda"
        self.pages = cdiv(tokens, PAGE)
        self.context = min(self.pages * PAGE, model.config.context or self.pages * PAGE)
        self.cache = Cache(model.config.decoder, self.pages + graphs, weight.device, weight.dtype)
        longest = cdiv(self.context, PAGE)
        self.graphs = Graphs(self.decoder, self.head, self.cache, batch, longest) if graphs else None
        plain = (self.decoder, self.head) if weights else (model.decoder, Head(model.decoder))
        self.one_step = step_of(*plain, self.cache)
        self.batch, self.queue = batch, queue
        self.schedule = Schedule(self.cache, batch, prefill)
        self.waiting, self.running = self.schedule.waiting, self.schedule.running
        self.features = Features(model, image_patches, feature_bytes)
        self.computed = 0  # rows of prompts that have been prefilled
        self.failed: list[Request] = []  # requests that the last step ended with an error

    @property
    def capacity(self) -> int:
        """Return how many requests may run or wait at once."""
        return self.batch + self.queue

    @property
    def encoded(self) -> int:
        """Return how many images have been encoded."""
        return self.features.encoded

    def encode(self, prompt: Prompt | Document) -> Document:
        """Return a prompt as a document. Raises UserError if it is longer than the context."""
        return prompt if isinstance(prompt, Document) else encode_prompts(self.model, [prompt], self.context)[0]

    def submit(
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), on_text: Callable[[str], None] | None = None,
        scored: int = 0,
    ) -> Request:  # fmt: skip
        """Add a request to the queue, and return it.

        on_text: called with each piece of the text; scored: how many tokens at the prompt's end get log-probabilities.
        Raises Busy if the queue is full, UserError for a prompt that is longer than the context or malformed.
        """
        document = self.encode(prompt)
        tokens, c, beams = document.tokens, self.model.config, sampling.num_beams
        cache, last = self.pages * PAGE, len(tokens) - 1
        if not 0 <= scored <= max(last, 0):
            raise UserError(f"scored is {scored}, expected 0 to {last}, all tokens of the prompt but the first")
        refuse_malformed(self.model, document)
        refuse_long(len(tokens), c.context, cache)
        sampling = fitted(sampling, len(tokens), min(c.context or cache, max_length(len(tokens), beams, self.pages)))
        if pages_needed(len(tokens), sampling) > self.pages:
            raise UserError(f"the prompt has {len(tokens)} tokens, the cache of {cache} is too small for {beams} beams")
        if illegal := [token for token, _ in sampling.biases if token >= c.vocabulary]:
            raise UserError(f"logit_bias has token {illegal[0]}, expected 0 to {c.vocabulary - 1}")
        if beams > self.batch or (beams > 1 and 2 * beams > c.vocabulary):
            raise UserError(f"num_beams is {beams}, expected at most {min(self.batch, c.vocabulary // 2)}")
        # Both counts together: between two steps a new request waits even if the batch has a place for it.
        if len(self.waiting) + len(self.running) >= self.capacity:
            raise Busy(f"the queue is full: {len(self.waiting)} requests are waiting")
        request = Request(document, sampling, TextStream(self.tokenizer, sampling.stop, on_text), scored)
        request.media_rows = np.flatnonzero(tokens == self.tokenizer.image)
        request.page_names = page_names(tokens, request.digests, self.tokenizer.image, c.images.slots)
        self.schedule.add(request)
        return request

    def submit_answer(self, prompt: Document, answer: Sequence[int]) -> Request:
        """Add a request that scores an answer after a prompt and generates no token, and return it.

        answer: token ids. Raises Busy and UserError as `submit` does, and UserError if the answer is empty.
        """
        if not len(answer):
            raise UserError("an answer to score is empty, expected tokens")
        document = replace(prompt, tokens=np.array([*prompt.tokens, *answer], np.int32))
        return self.submit(document, Sampling(max_tokens=0), scored=len(answer))

    @torch.inference_mode()
    def warm_up(self) -> Iterator[None]:
        """Do on a GPU, part by part, what the first requests would wait for: compile kernels and capture graphs.

        Prompts have WARM_ROWS rows, up to the limit of a step, because kernels depend on their number; kernels for
        other numbers may still be compiled later, as those for batches of images, scores and beams are. The caller
        takes steps between the parts. On a CPU there are no parts. Raises Busy if the queue is full, and RuntimeError
        if a prompt of the warm-up fails.
        """
        if not self.graphs:
            return
        for prompt in self._warm_up_prompts():
            request = self.submit(prompt, Sampling(max_tokens=1))
            while not request.finish:
                yield
            if request.error:
                raise RuntimeError(f"a prompt of the warm-up failed: {request.error}")
        for kind in self.graphs.kinds:
            self.graphs.capture(kind)
            yield

    def _warm_up_prompts(self) -> Iterator[Document]:
        """Yield prompts of an image, then texts of each number of rows; each alone, and behind pages in the cache.

        Rows behind cached pages take other kernels. No two texts of other numbers of rows begin alike.
        """
        sample = sample_document(self.model, min(self.model.config.images.slots + 2 * PAGE, self.context))
        yield from (sample, sample)
        limit = min(self.schedule.prefill, self.context - PAGE)
        first, *others = (token for token in range(len(WARM_ROWS) + 3) if token != self.tokenizer.image)
        yield Document(np.full(PAGE, first, np.int32), (), "")
        for rows, token in zip(sorted({*WARM_ROWS, limit}), others):
            for cached in (0, PAGE) if 0 < rows <= limit else ():
                yield Document(np.repeat(np.array([first, token], np.int32), [cached, rows]), (), "")

    def forget(self) -> None:
        """Drop the prefix cache and the cached features of images."""
        self.cache.clear()
        self.features.clear()

    def cancel(self, request: Request) -> None:
        """End a waiting or running request, which keeps its text. Then raises what its on_text raises."""
        if request in self.waiting or request in self.running:
            self.schedule.end(request, "cancelled")

    def run(self) -> None:
        """Take steps until no request waits or runs."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Decode a token of each running request, then prefill rows of prompts. Return whether any request is left.

        If it raises, `failed` lists the requests that ended with an error, and the others go on.
        """
        self.failed = []
        if decoding := self.schedule.plan_decode():
            with self._fail_on_error(decoding):
                row_counts, following, draws = self.decode(decoding)
                for request in decoding:
                    self.schedule.advance(request, 0 if request.beams else 1)
                next_tokens = self._choose(decoding, row_counts, *following, draws)
            self._append(decoding, next_tokens)
        self.schedule.admit()  # after decoding: an on_text that fails there leaves no request half admitted
        if due := self.schedule.plan_prefill():
            with self._fail_on_error(due):
                following = self.prefill(due)
            for request in due:
                self.schedule.advance(request, request.due)
            complete = [request for request in due if not request.pending]
            for request in complete:
                if not request.sampling.max_tokens:
                    self.schedule.end(request, "scored" if request.to_score else "length")
            if begun := [request for request in complete if request.sampling.max_tokens]:
                with self._fail_on_error(begun):
                    draws = [request.draw() for request in begun]
                    next_tokens = self._choose(begun, [1] * len(begun), *following, draws)
                self._append(begun, next_tokens)
        return bool(self.running or self.waiting)

    @contextmanager
    def _fail_on_error(self, requests: Sequence[Request]) -> Iterator[None]:
        """Mark these requests as failed if their computation raises, Ctrl-C included; the other requests go on."""
        try:
            yield
        except BaseException as error:
            for request in requests:
                self._fail(request, error)
            raise

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error. Its on_text is not called again, because it may be what failed."""
        request.error = request.error or error
        request.output.emit = None
        if request in self.running:
            self.schedule.end(request, "failed")
        request.finish = "failed"
        self.failed.append(request)

    def prefill(self, due: Sequence[Request]) -> Next:
        """Compute `request.due` rows of each prompt.

        Return logits [B, V] after the B prompts that are then complete and generate text, the likeliest tokens and
        their log-probabilities.
        """
        images = self.features.rows(due)
        due = [request for request in due if request.due]
        starts = [request.computed for request in due]
        ends = [start + request.due for request, start in zip(due, starts)]
        tokens = np.concatenate([request.ids(start, end) for request, start, end in zip(due, starts, ends)])
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])
        x = self.model.decoder.embedding(self._to_device(tokens))
        if images:
            x = x.index_copy(0, self._to_device(images[0]), images[1].to(x.dtype))
        self.computed += len(tokens)
        stops = np.cumsum([request.due for request in due])  # by request, one past its last row
        last = stops[[request.pending == request.due and request.sampling.max_tokens > 0 for request in due]] - 1
        scored = [request.scoring_rows(start, end) for request, start, end in zip(due, starts, ends)]
        pairs = sum(request.due * (start + 1 + end) // 2 for request, start, end in zip(due, starts, ends))
        if self.one_step and self.one_step.is_faster(len(tokens), pairs) and not any(scored):
            tables = [request.table for request in due for _ in range(request.due)]
            return self.one_step(x.float(), positions, tables, last)
        rows = self.cache.rows([request.table for request in due], starts, ends)
        hidden = self._hidden(x, self._to_device(positions), rows)
        for request, span, start, first in zip(due, scored, starts, stops - [request.due for request in due]):
            if span:
                self._score(request, span[0], hidden[first - start + span[0] : first - start + span[1]])
        if not len(last):  # no prompt is complete
            return hidden.new_empty(0, self.model.config.vocabulary), [], []
        logits = self.head(hidden[self._to_device(last)])
        return logits, *greedy(logits)

    def decode(self, requests: Sequence[Request]) -> tuple[list[int], Next, Sequence[Draw | None]]:
        """Compute one row for each text, or for each live beam.

        Return the number of rows of each request, the logits and tokens after these rows, and each row's Draw, None
        where the token is already drawn.
        """
        last_rows = [request.last_rows() for request in requests]
        tokens, starts, tables = zip(*(row for rows in last_rows for row in rows))
        owners = [request for request, rows in zip(requests, last_rows) for _ in rows]
        draws = [request.draw() for request in owners]
        remaining: Sequence[Draw | None] = draws
        if self.one_step:
            following = self.one_step(tokens, starts, tables)
        elif self.graphs:
            inside = [GREEDY if r.sampling.alters else draw for r, draw in zip(owners, draws)]
            remaining = [draw if r.sampling.alters else None for r, draw in zip(owners, draws)]
            following = self.graphs(tokens, starts, tables, inside)
        else:
            rows = self.cache.rows(tables, starts, [start + 1 for start in starts])
            x = self.model.decoder.embedding(self._to_device(np.array(tokens)))
            logits = self.head(self._hidden(x, self._to_device(np.array(starts)), rows))
            following = (logits, *greedy(logits))
        return [len(rows) for rows in last_rows], following, remaining

    def _hidden(self, x: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        return hidden_states(self.decoder, x, positions, self.cache.attends(rows))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _score(self, request: Request, start: int, hidden: Tensor) -> None:
        """Score the tokens after rows `start`, start + 1, … of a prompt. hidden: these rows' states [rows, D]."""
        ids = self._to_device(request.document.tokens[start + 1 : start + 1 + len(hidden)]).long()
        for rows, tokens in zip(hidden.split(SCORED), ids.split(SCORED)):
            logprobs = self.head(rows).float().log_softmax(-1)
            top = [x.cpu().numpy() for x in alternatives(logprobs)] if request.sampling.top_logprobs else None
            request.score(logprobs.gather(1, tokens[:, None])[:, 0].tolist(), top)

    def _choose(
        self, requests: Sequence[Request], row_counts: Sequence[int], logits: Tensor, tokens: list[int],
        logprobs: list[float], draws: Sequence[Draw | None],
    ) -> list[NextToken]:  # fmt: skip
        """Choose the next token of each request, and advance beam searches.

        row_counts: rows of each request in logits, tokens, logprobs and draws; a row with a draw gets a token drawn
        from its logits instead of the one in `tokens`.
        """
        spans = [range(end - count, end) for end, count in zip(accumulate(row_counts), row_counts)]
        self._search([(request.beams, span) for request, span in zip(requests, spans) if request.beams], logits)
        firsts = [span.start for span in spans]
        rows = logits if len(firsts) == len(logits) else logits[firsts]
        tokens, logprobs = [tokens[at] for at in firsts], [logprobs[at] for at in firsts]
        return choose_tokens(requests, rows, tokens, logprobs, [draws[at] for at in firsts])

    def _append(self, requests: Sequence[Request], next_tokens: Sequence[NextToken]) -> None:
        """Append its next token to each request, and end those that are complete.

        Raises the first error of an on_text or a grammar, Ctrl-C included, after all requests have their tokens.
        """
        first_error: BaseException | None = None
        for request, following in zip(requests, next_tokens):
            if request.finish:  # cancelled by the on_text of an earlier request
                continue
            try:
                if following.error:
                    raise following.error
                if not request.beams:
                    request.append(*following[:3])
                if not request.finish and (why := request.completion):  # finish: its own on_text may have cancelled it
                    self.schedule.end(request, why)
            except BaseException as error:  # raised below, after the other requests have their tokens
                first_error = first_error or error
                self._fail(request, error)
        if first_error:
            raise first_error

    def _search(self, searches: "Sequence[tuple[Beams, range]]", logits: Tensor) -> None:
        """Advance each beam search by its rows of the logits."""
        if not searches:
            return
        rows = [row for _, span in searches for row in span]
        count = 2 * max(beams.sampling.num_beams for beams, _ in searches)
        logprobs, tokens = (x.cpu().numpy() for x in logits[rows].float().log_softmax(-1).topk(count))
        copies, at = [], 0
        for beams, span in searches:
            copies += beams.advance(logprobs[at : at + len(span)], tokens[at : at + len(span)])
            at += len(span)
        self.cache.copy(copies)


def greedy(logits: Tensor) -> tuple[list[int], list[float]]:
    """Return the likeliest token of each row of logits [B, V], and their log-probabilities."""
    best, tokens = logits.float().log_softmax(-1).max(-1)
    return tokens.tolist(), best.tolist()
