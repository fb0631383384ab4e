"""The Engine: many requests at once over a paged cache.

A step of the Engine lets in the requests that have room, runs their prompts packed, behind the pages that they share
with earlier ones, and then one token of each document that goes on. Images are encoded together, and once: their
features are kept by content.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mm1.engine.beams import Beams
from mm1.engine.cache import PAGE, Cache, Rows, names
from mm1.engine.data.document import Document
from mm1.engine.data.record import DataError, at_least
from mm1.engine.decode import step_of
from mm1.engine.detokenizer import Text
from mm1.engine.graphs import PAGES, Graphs
from mm1.engine.model import MM1
from mm1.engine.packed import Head, packed
from mm1.engine.prompts import Prompt, encode_prompts, refuse_malformed, tokenizer_of
from mm1.engine.quantize import quantized
from mm1.engine.request import Request, drawn
from mm1.engine.sampler import choose
from mm1.engine.sampler import likeliest as likeliest_of
from mm1.engine.sampling import Draw, Sampling
from mm1.kernels.dispatch import cdiv
from mm1.kernels.grids import Grids


class Busy(RuntimeError):
    """The queue is full; try again later."""


class Engine:
    """A model, as it is when this begins, and the requests it works on.

    tokens: of the cache; batch: documents at once, each beam counts as one; queue: requests that wait; prefill: rows of
    prompts a step, if it is more than one; images: whose features are kept; weights: as they are, or "int8", "int4",
    "float8" (quantize.py).
    Not for several threads at once.
    """

    def __init__(
        self, model: MM1, *, tokens: int = 65_536, batch: int = 64, queue: int = 1024, prefill: int = 8192,
        images: int = 1024, weights: str | None = None,
    ):  # fmt: skip
        at_least(1, tokens=tokens, batch=batch, queue=queue)
        at_least(0, images=images)
        weight = model.decoder.embedding.weight
        self.model, self.tokenizer, self.device = model, tokenizer_of(model), weight.device
        self.decoder, self.head = quantized(model.decoder, weights) if weights else packed(model.decoder)
        graphs = self.device.type == "cuda"
        self.pages = cdiv(tokens, PAGE)
        self.context = self.pages * PAGE
        self.cache = Cache(model.config.decoder, self.pages + graphs, weight.device, weight.dtype)
        self.graphs = Graphs(self.decoder, self.head, self.cache, batch) if graphs else None
        plain = (self.decoder, self.head) if weights else (model.decoder, Head(model.decoder))
        self.one_step = step_of(*plain, self.cache)
        self.batch, self.queue, self.prefill, self.images = batch, queue, prefill, images
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.features: OrderedDict[bytes, Tensor] = OrderedDict()  # [n, D] of an image by its content
        self.encoded = self.computed = 0  # images and rows of prompts, since the beginning

    def submit(
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), on_text: Callable[[str], None] | None = None,
        scored: int = 0,
    ) -> Request:  # fmt: skip
        """Raises Busy if the queue is full, DataError for a prompt that is more than the cache holds.

        scored: how many of the prompt's last tokens get a log-probability; the first has none.
        """
        document = prompt if isinstance(prompt, Document) else encode_prompts(self.model, [prompt])[0]
        scored = min(scored, len(document.tokens) - 1)
        return self._enqueue(Request(document, sampling, Text(self.tokenizer, sampling.stop, on_text), scored))

    def submit_answer(self, prompt: Document, answer: Sequence[int]) -> Request:
        """Whose tokens are not chosen but scored. Raises DataError for none, and as submit does."""
        if not len(answer):
            raise DataError("an answer to score is empty")
        tokens = np.array([*prompt.tokens, *answer], np.int32)
        document = Document(tokens, prompt.images, prompt.key)
        return self._enqueue(Request(document, Sampling(max_tokens=0), Text(self.tokenizer, (), None), len(answer)))

    def _enqueue(self, request: Request) -> Request:
        document, c = request.document, self.model.config
        refuse_malformed(document, c.connector.tokens, self.tokenizer.image, c.decoder.vocabulary)
        if request.room > self.pages:
            exceed = f"exceed {self.pages * PAGE}"
            raise DataError(f"a prompt of {len(request.document.tokens)} tokens and what follows {exceed}")
        width, vocabulary = request.sampling.num_beams, self.model.config.decoder.vocabulary
        if beyond := [token for token, _ in request.sampling.biases if token >= vocabulary]:
            raise DataError(f"logit_bias has token {beyond[0]}, expected 0 to {vocabulary - 1}")
        if width > self.batch or (width > 1 and 2 * width > vocabulary):
            raise DataError(f"{width} beams, expected at most {min(self.batch, vocabulary // 2)}")
        if len(self.waiting) >= self.queue:
            raise Busy(f"{len(self.waiting)} requests wait already")
        tokens, slots = request.document.tokens, self.model.config.connector.tokens
        # Rows before an answer's are computed anew, because their logits are what it is scored by.
        shareable = (len(tokens) - request.scored - 1) // PAGE
        request.cached = names(tokens, request.digests, self.tokenizer.image, slots)[:shareable]
        self.waiting.append(request)
        return request

    def forget(self) -> None:
        """What is known of earlier prompts and images. After a change of weights make a new Engine."""
        self.cache.forget()
        self.features.clear()

    def cancel(self, request: Request) -> None:
        """What it has so far stays."""
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish = "cancelled"
        elif request in self.running:
            self._end(request, "cancelled")

    def run(self) -> None:
        """Until nothing is left."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Whether there is more to do."""
        if self.running:
            self._decode(list(self.running))
        if fresh := self._admitted():  # afterwards: a listener that fails in decoding leaves nobody half admitted
            try:
                found = self._prefilled(fresh)
            except Exception:  # theirs alone: who ran before goes on
                for request in fresh:
                    self._end(request, "failed")
                raise
            for request in fresh:
                self.cache.remember(request.pages, request.cached)
            self._choose(fresh, [1] * len(fresh), *found, [drawn(request) for request in fresh])
        return bool(self.running or self.waiting)

    def _admitted(self) -> list[Request]:
        """In their order. One whose beginning another is about to compute waits for it, and shares it then; those
        behind it go before it."""
        fresh: list[Request] = []
        computing: set[bytes] = set()
        rows, width = 0, sum(request.sampling.num_beams for request in self.running)
        for request in list(self.waiting):
            shared = self.cache.shared(request.cached)
            missing = request.cached[len(shared) :]
            if computing.intersection(missing):
                continue
            new = len(request.document.tokens) - len(shared) * PAGE
            if width + request.sampling.num_beams > self.batch or (fresh and rows + new > self.prefill):
                break
            pages = self.cache.take(request.room, shared)
            if pages is None:
                break
            request.admit(pages, len(shared))
            width += request.sampling.num_beams
            fresh.append(request)
            self.waiting.remove(request)
            self.running.append(request)
            computing.update(missing)
            rows += new
        return fresh

    def _prefilled(self, fresh: Sequence[Request]) -> tuple[Tensor, list[int], list[float]]:
        """Logits [B, V] behind the prompts, the likeliest tokens and their log-probabilities."""
        starts = [request.shared * PAGE for request in fresh]
        ends = [len(request.document.tokens) for request in fresh]
        tokens = np.concatenate([r.document.tokens[start:] for r, start in zip(fresh, starts)])
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])
        x = self.model.decoder.embedding(self._moved(tokens))
        images = np.flatnonzero(tokens == self.tokenizer.image)
        if len(images):
            x = x.index_copy(0, self._moved(images), self._image_rows(fresh, starts).to(x.dtype))
        self.computed += len(tokens)
        if self.one_step and len(tokens) <= self.one_step.few and not any(request.scored for request in fresh):
            tables = [r.table for r, start, end in zip(fresh, starts, ends) for _ in range(start, end)]
            last = np.cumsum([end - start for start, end in zip(starts, ends)]) - 1
            return self.one_step(x.float(), positions, tables, last)
        rows = self.cache.rows([request.pages for request in fresh], starts, ends)
        hidden, last = self._hidden(x, self._moved(positions), rows), rows.cu_seqlens[1:].long() - 1
        for i, request in enumerate(fresh):
            if request.scored:
                self._score(request, hidden[last[i] - request.scored : last[i]])
        logits = self.head(hidden[last])
        return logits, *likeliest(logits)

    def _decode(self, going: Sequence[Request]) -> None:
        """One token more."""
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
            found = (logits, *likeliest(logits))
        self._choose(going, [len(of) for of in heads], *found, left)

    def _hidden(self, x: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        return self.decoder(x, positions, rows.cu_seqlens, attends=self.cache.attends(rows))[0]

    def _moved(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _image_rows(self, fresh: Sequence[Request], starts: Sequence[int]) -> Tensor:
        """Features of the images' tokens from each document's start on, in their order."""
        slots, parts = self.model.config.connector.tokens, []
        wanted: OrderedDict[bytes, np.ndarray] = OrderedDict()
        for request, start in zip(fresh, starts):
            before = int((request.document.tokens[:start] == self.tokenizer.image).sum())
            digests = request.digests[before // slots :]
            wanted.update(zip(digests, request.document.images[before // slots :]))
            parts.append((digests, before % slots))
        features = self._features(wanted)
        return torch.cat([torch.cat([features[d] for d in digests])[cut:] for digests, cut in parts if digests])

    def _features(self, wanted: "OrderedDict[bytes, np.ndarray]") -> dict[bytes, Tensor]:
        """Of all these images; those that are not known are encoded together, equal sizes side by side."""
        missing = sorted((d for d in wanted if d not in self.features), key=lambda d: wanted[d].shape)
        if missing:
            patch, images = self.model.config.vision.patch, [wanted[digest] for digest in missing]
            pixels = self._moved(np.concatenate([np.ascontiguousarray(image).reshape(-1, 3) for image in images]))
            grids = Grids([(h // patch, w // patch) for h, w, _ in (i.shape for i in images)], device=self.device)
            encoded = self.model.encode(pixels, grids).unflatten(0, (len(images), -1))
            self.features.update(zip(missing, (x.clone() for x in encoded.unbind())))  # none holds the others
            self.encoded += len(missing)
        found = {digest: self.features[digest] for digest in wanted}
        for digest in found:
            self.features.move_to_end(digest)
        while len(self.features) > self.images:
            self.features.popitem(last=False)
        return found

    def _score(self, request: Request, hidden: Tensor) -> None:
        tokens = self._moved(request.document.tokens[-request.scored :]).long()
        logs = self.head(hidden).float().log_softmax(-1)
        request.scores = logs.gather(1, tokens[:, None])[:, 0].tolist()
        if count := request.sampling.top_logprobs:
            request.score_top = [row[:count] for row in likeliest_of(logs)]
        if request.sampling.max_tokens == 0:
            request.logprobs = request.scores

    def _choose(
        self, requests: Sequence[Request], widths: Sequence[int], logits: Tensor, tokens: list[int],
        logprobs: list[float], draws: Sequence[Draw | None],
    ) -> None:  # fmt: skip
        """Take the next token of each request, another than `tokens` where there is a draw still.

        widths: rows of each request in logits, tokens, logprobs and draws.
        """
        firsts = [end - width for end, width in zip(accumulate(widths), widths)]
        self._search([(r.beams, range(at, at + n)) for r, at, n in zip(requests, firsts, widths) if r.beams], logits)
        rows = logits if len(firsts) == len(logits) else logits[firsts]
        tokens, logprobs = [tokens[at] for at in firsts], [logprobs[at] for at in firsts]
        choices = choose(requests, rows, tokens, logprobs, [draws[at] for at in firsts])
        failed: Exception | None = None
        for request, choice in zip(requests, choices):
            if request.finish:  # cancelled by the on_text of one before it
                continue
            if request.sampling.max_tokens == 0:
                self._end(request, "scored" if request.scored else "length")
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
            except Exception as error:  # of its on_text or grammar; the others are to have their tokens
                failed, request._text.emit = failed or error, None
                if request in self.running:
                    self._end(request, "failed")
                request.finish = "failed"
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
        self.running.remove(request)
        self.cache.drop(request.pages)
        request.end(why)


def likeliest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Tokens of logits [B, V] and their log-probabilities."""
    best, tokens = logits.float().log_softmax(-1).max(-1)
    return tokens.tolist(), best.tolist()
