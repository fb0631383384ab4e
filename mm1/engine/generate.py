"""Generation: many requests at once over a paged cache.

A step of the Engine lets in the requests that have room, runs their prompts packed, behind the pages that they share
with earlier ones, and then one token of each document that goes on. Images are encoded together, and once: their
features are kept by content.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mm1.engine.beams import Beams, pages_of
from mm1.engine.cache import PAGE, Cache, Rows, names
from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import Document, DocumentEncoder, TextTokenizer
from mm1.engine.data.record import DataError, Unreadable, at_least
from mm1.engine.decode import step_of
from mm1.engine.detokenizer import Text
from mm1.engine.graphs import PAGES, Graphs
from mm1.engine.model import MM1
from mm1.engine.packed import Head, packed
from mm1.engine.quantize import quantized
from mm1.engine.request import Request, drawn
from mm1.engine.sampling import Draw, Sampling, penalized, sample
from mm1.kernels.dispatch import cdiv
from mm1.kernels.grids import Grids

if TYPE_CHECKING:
    from PIL import Image

    from mm1.engine.data.images import ImagePolicy

Prompt = Sequence["str | Image.Image"]


class Busy(RuntimeError):
    """The queue is full; try again later."""


@torch.inference_mode()
def generate(
    model: MM1,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    weights: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each prompt, a sequence of texts and PIL images; returns the new texts.

    Settings are those of Sampling and, weights, of Engine; prompt i draws with seed + i. on_text(prompt number, piece)
    is called as text arrives; of a search with beams it arrives at the end.
    """
    sampling = Sampling(
        max_tokens, temperature, top_p, top_k, repetition_penalty, stop, None, num_beams, length_penalty, early_stopping
    )
    documents = encode_prompts(model, prompts)
    pages = sum(pages_of(len(document.tokens), sampling) for document in documents)
    count = max(len(prompts), 1)
    engine = Engine(model, tokens=max(pages, 1) * PAGE, batch=count * num_beams, queue=count, weights=weights)
    requests = []
    for i, document in enumerate(documents):
        own = replace(sampling, seed=None if seed is None else seed + i)
        requests.append(engine.submit(document, own, partial(on_text, i) if on_text else None))
    engine.run()
    return [request.text for request in requests]


@torch.inference_mode()
def score(model: MM1, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """Log-probability of each answer behind its prompt, summed over its tokens: for multiple choice.

    A prompt's answers share its pages. Raises DataError for an empty answer.
    """
    encoded = encode_prompts(model, prompts)
    if len(answers) != len(encoded) or any(isinstance(of, str) for of in answers):
        raise DataError(f"{len(encoded)} prompts, expected as many lists of answers")
    documents = []
    for document, parts, of in zip(encoded, prompts, answers):
        end = parts[-1] if len(parts) and isinstance(parts[-1], str) else ""
        document, ids = continued(tokenizer_of(model), document, end, of)
        documents.append([(document, tokens) for tokens in ids])
    flat = [pair for of in documents for pair in of]
    pages = sum(cdiv(len(prompt.tokens) + len(ids), PAGE) for prompt, ids in flat)
    engine = Engine(model, tokens=max(pages, 1) * PAGE, queue=max(len(flat), 1))
    requests = [[engine.submit_answer(prompt, ids) for prompt, ids in of] for of in documents]
    engine.run()
    return [[sum(request.logprobs) for request in of] for of in requests]


def continued(
    tokenizer: TextTokenizer, prompt: Document, end: str, answers: Sequence[str]
) -> tuple[Document, list[list[int]]]:
    """Return the prompt and each answer's tokens, as they are when `end`, its last text, and the answer are one text.

    Encoded alone an answer may begin with a token that never follows a text ("▁" in Llama's). Tokens of `end` that
    change before one of the answers are taken from the prompt and stand at the beginning of every answer.
    """
    before = tokenizer.encode(end)
    whole = [tokenizer.encode(end + answer) if answer else before for answer in answers]
    kept = min((_common(before, ids) for ids in whole), default=len(before))
    tokens = prompt.tokens[: len(prompt.tokens) - len(before) + kept]
    return Document(tokens, prompt.images, prompt.key), [ids[kept:] for ids in whole]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def several(engine: "Engine", prompt: "Prompt | Document", n: int, sampling: Sampling) -> "list[Request]":
    """n continuations of one prompt, whose pages they share; the i-th draws with seed + i. Others go on meanwhile."""
    document = prompt if isinstance(prompt, Document) else encode_prompts(engine.model, [prompt])[0]
    seed = random.randrange(1 << 32) if sampling.seed is None else sampling.seed
    found: list[Request] = []
    while len(found) < n:
        try:
            found.append(engine.submit(document, replace(sampling, seed=seed + len(found))))
        except Busy:
            engine.step()
    while any(request.finish is None for request in found):
        engine.step()
    return found


def n_best(engine: "Engine", prompt: "Prompt | Document", n: int, sampling: Sampling) -> "list[Request]":
    """`several`, the likeliest first: by the mean of their tokens' log-probabilities."""
    return sorted(several(engine, prompt, n, sampling), key=lambda request: -np.mean(request.logprobs))


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
        self, prompt: Prompt | Document, sampling: Sampling = Sampling(), on_text: Callable[[str], None] | None = None
    ) -> Request:
        """Raises Busy if the queue is full, DataError for a prompt that is more than the cache holds."""
        document = prompt if isinstance(prompt, Document) else encode_prompts(self.model, [prompt])[0]
        return self._enqueue(Request(document, sampling, Text(self.tokenizer, sampling.stop, on_text)))

    def submit_answer(self, prompt: Document, answer: Sequence[int]) -> Request:
        """Whose tokens are not chosen but scored. Raises DataError for none, and as submit does."""
        if not len(answer):
            raise DataError("an answer to score is empty")
        tokens = np.array([*prompt.tokens, *answer], np.int32)
        document = Document(tokens, prompt.images, prompt.key)
        return self._enqueue(Request(document, Sampling(), Text(self.tokenizer, (), None), len(answer)))

    def _enqueue(self, request: Request) -> Request:
        if request.room > self.pages:
            exceed = f"exceed {self.pages * PAGE}"
            raise DataError(f"a prompt of {len(request.document.tokens)} tokens and what follows {exceed}")
        width, vocabulary = request.sampling.num_beams, self.model.config.decoder.vocabulary
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
            inside = [draw if r.sampling.repetition_penalty == 1 else Draw(0, 1, 0, 0) for r, draw in zip(whose, draws)]
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
        found = self.head(hidden).float().log_softmax(-1).gather(1, tokens[:, None])
        request.logprobs = found[:, 0].tolist()

    def _choose(
        self, requests: Sequence[Request], widths: Sequence[int], logits: Tensor, tokens: list[int],
        logprobs: list[float], draws: Sequence[Draw | None],
    ) -> None:  # fmt: skip
        """The next token of each, another than these where there is a draw still; nobody's depends on the others.

        widths: rows of each, of logits and all that follows.
        """
        firsts = [end - width for end, width in zip(accumulate(widths), widths)]
        self._search([(r.beams, range(at, at + n)) for r, at, n in zip(requests, firsts, widths) if r.beams], logits)
        tokens, logprobs = [tokens[at] for at in firsts], [logprobs[at] for at in firsts]
        draws = [draws[at] for at in firsts]
        left = [i for i, draw in enumerate(draws) if draw and not (requests[i].scored or requests[i].sampling.plain)]
        if left:
            rows = logits[[firsts[i] for i in left]].float()
            seen = rows.clone()
            for row, request in zip(seen, (requests[i] for i in left)):
                if request.sampling.repetition_penalty != 1:
                    known = np.unique(np.array([*request.document.tokens, *request.tokens], np.int64))
                    row.copy_(penalized(row, self._moved(known), request.sampling.repetition_penalty))
            found = sample(seen, *self._moved(np.array([draws[i] for i in left], np.float32).T).unbind())
            sure = rows.log_softmax(-1).gather(1, found[:, None])[:, 0]
            for i, token, logprob in zip(left, found.tolist(), sure.tolist()):
                tokens[i], logprobs[i] = token, logprob
        failed: Exception | None = None
        for request, token, logprob in zip(requests, tokens, logprobs):
            if request.finish:  # cancelled by the on_text of one before it
                continue
            if request.scored:
                self._end(request, "scored")
                continue
            try:
                if request.beams:
                    if request.beams.done:
                        self._end(request, "stop" if request._text.ends(request.beams.best.tokens) else "length")
                    continue
                request.tokens.append(token)
                request.logprobs.append(logprob)
                request._text.add(token)
                if request.finish:  # cancelled by its own on_text
                    continue
                if request._text.done:
                    self._end(request, "stop")
                elif len(request.tokens) == request.sampling.max_tokens:
                    self._end(request, "length")
            except Exception as error:  # of its on_text; the others are to have their tokens
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


def interleave(texts: Sequence[str], images: "Sequence[Image.Image]") -> "list[list[str | Image.Image]]":
    """Prompts of texts in which `<image>` marks the place of the next image; images without a mark open the first."""
    marks = sum(text.count("<image>") for text in texts)
    if marks > len(images):
        raise DataError(f"the prompt has {marks} <image> marks for {len(images)} images")
    spare, rest = list(images[: len(images) - marks]), iter(images[len(images) - marks :])
    prompts: list[list[str | Image.Image]] = []
    for text in texts:
        parts: list[str | Image.Image] = [*spare]
        spare = []
        for i, piece in enumerate(text.split("<image>")):
            parts += [next(rest)] if i else []
            parts += [piece] if piece else []
        prompts.append(parts)
    return prompts


def encode_prompts(model: MM1, prompts: Sequence[Prompt]) -> list[Document]:
    c = model.config
    budget = exact_budget([], c.vision.patch)
    encode = DocumentEncoder(tokenizer_of(model), policy_of(model), c.connector.tokens, budget)
    return [encode.prompt(checked(parts)) for parts in prompts]


def checked(parts: Prompt) -> "list[str | Image.Image]":
    """Images in RGB and upright, whatever they were. Raises DataError for what is neither text nor image."""
    from PIL import Image

    from mm1.engine.data.images import upright

    wrong = [parts] if isinstance(parts, str) else [p for p in parts if not isinstance(p, str | Image.Image)]
    if wrong:
        raise DataError(f"a prompt is a sequence of texts and PIL images, not {type(wrong[0]).__name__}")
    try:
        return [part if isinstance(part, str) else upright(part) for part in parts]
    except Unreadable as error:
        raise DataError(str(error)) from None


def policy_of(model: MM1, parts: int | None = None) -> "ImagePolicy":
    """How the model was trained to see an image; parts: with other sub-images, 1 for none."""
    from mm1.engine.data.images import ImagePolicy

    c = model.config
    return ImagePolicy(c.vision.patch, c.image_mode, c.image_size, c.image_patches, parts or c.image_parts)


def tokenizer_of(model: MM1) -> TextTokenizer:
    if model.tokenizer is None:
        raise DataError("this model has no tokenizer: generate from a trained checkpoint")
    return model.tokenizer


def likeliest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Tokens of logits [B, V] and their log-probabilities."""
    best, tokens = logits.float().log_softmax(-1).max(-1)
    return tokens.tolist(), best.tolist()
