"""Benchmark the parts of generation, and compare them with transformers.

    prefill       the decoder computes a prompt and the logits of its last token; prompts have text in place of images
    first token   the engine computes the first token with empty caches, with cached features of the shots' images, and
                  with the shots in the prefix cache too; transformers has no such model
    decode        one more token for every prompt, with a cache that holds the prompts; also with weights in int8
    generate      NEW tokens for every prompt, greedy, by the engine and by transformers' generate
    queries       ANSWER tokens for each of many queries after the same shots, from empty caches; with and without the
                  prefix cache

Prompts are random: `shots` examples, each an image and TEXT tokens, and a query of the same form. The prompts of a
batch have the same length, so that transformers needs no padding. Its parameters are views of mm1's.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mm1.autotune.clock import Call, capture
from mm1.bench.comparison import OWN
from mm1.bench.peer_models import transformers_decoder
from mm1.bench.record import Record, Row
from mm1.bench.roofline import DTYPES, ceilings, floor, impossible
from mm1.bench.rows import show, timed
from mm1.bench.timing import CONTROL, reason
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.data.record import View
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.graphs import Graphs
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.engine.layers.blocked import Head, blocked
from mm1.engine.layers.generation import hidden_states
from mm1.engine.layers.quantize import quantized
from mm1.engine.layers.workload import Workload
from mm1.engine.models.mm1_config import DIGITS, MODELS, MM1Config
from mm1.engine.models.registry import model_class, named
from mm1.engine.train.ledger import ledger
from mm1.errors import UserError
from mm1.kernels.dispatch import Cost, cdiv

SHOTS = (0, 4, 8)
TEXT = 30  # tokens after each image
IMAGE = 3  # id of the image token
NEW = 64  # tokens to generate, for which a cache has room after the prompt
ANSWER = 4  # tokens of an answer to a query
# Maximum rms difference of logits, relative to their rms. In 26 layers rounding to bf16 adds up to 2e-2.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
INT8_TOLERANCE = 0.2  # the same for int8, which suits random weights badly
CACHES = {"transformers": "DynamicCache", "transformers static": "StaticCache"}
_30M = replace(
    DIGITS.decoder, vocabulary=8192, width=512, layers=8, heads=8, kv_heads=8, head_width=64, ffn=1408, experts=0
)
MODELS = {**MODELS, "digits-30m": replace(DIGITS, decoder=_30M)}

Way = Callable[[], Call]  # prepares an implementation; the call that it returns gives logits or tokens


class Scale(NamedTuple):
    """Hold the sizes that suit a machine."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    decoded: int  # maximum prompt tokens of a batch for decode
    prefilled: int  # the same for prefill
    queries: int  # number of queries after the same shots


GPU = Scale(("mm1-1b", "mm1-3b"), (1, 2, 4, 8, 16, 32, 64, 128), 32_768, 16_384, 64)
CPU = Scale(("digits", "digits-30m"), (1, 8), 2048, 512, 200)
PREFILLED = (1, 8)  # batches to prefill

# Stands in for a tokenizer: all texts are empty, and no token ends them.
TOKENS = SimpleNamespace(
    image=IMAGE, eos=-1, pieces=lambda ids, continued=False: [b""] * len(ids), has_text=lambda token: False
)


class Case(NamedTuple):
    """Identify one measurement by the part of generation, the number of shots, and the batch size."""

    what: str
    shots: int
    batch: int

    def key(self) -> Row:
        """Return the fields of a row that identify this case."""
        return {"case": f"{self.shots}-shot batch={self.batch}", "what": self.what}


class Checked(NamedTuple):
    """Hold the implementations with right results, the errors of all results, and why other implementations failed."""

    calls: dict[str, Call]
    errors: dict[str, float]
    failed: dict[str, str]


@torch.inference_mode()
def measure(record: Record, models: Sequence[str] = (), rounds: int | None = None, budget: float = 1.0) -> None:
    """Measure each case that the record lacks, and add and print its row at once.

    models: names of sizes (default: some that suit the machine). rounds: number for each row (default: as many as
    `budget` seconds allow). Raises UserError for an unknown size.
    """
    if rounds is not None and rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    scale, device, dtype = (GPU, "cuda", "bf16") if torch.cuda.is_available() else (CPU, "cpu", "fp32")
    sizes = {name: MODELS.get(name) or named(name) for name in models or scale.models}
    limits = record.header["ceilings"] = record.header.get("ceilings") or ceilings(device)
    for name, size in sizes.items():
        base = {"bench": "generate", "model": name, "dtype": dtype, "mode": "stream" if device == "cuda" else "host"}
        missing = [case for case in cases(size, scale) if not record.has(**base, **case.key())]
        bench = Bench(size, device, dtype, limits)
        for case in missing:
            with record.at(**base, **case.key()):
                for row in bench.rows(case, base | case.key(), rounds, budget):
                    record.add(row)
                    show(row)
        del bench  # frees its weights before the next model is made


def cases(c: MM1Config, scale: Scale) -> list[Case]:
    """Return the measurements of a model."""
    every = [(shots, batch) for shots in SHOTS for batch in scale.batches]
    fit = {limit: [(s, b) for s, b in every if b * prompt_length(c, s) <= limit] for limit in scale[2:4]}
    few = [(s, b) for s, b in fit[scale.prefilled] if b in PREFILLED]
    whole = [(s, b) for s, b in fit[scale.decoded] if b in PREFILLED and s != 4]
    chosen = [Case(what, s, b) for what in ("prefill", "first token") for s, b in few]
    chosen += [Case("decode", s, b) for s, b in fit[scale.decoded]] + [Case("generate", s, b) for s, b in whole]
    return [*chosen, Case("queries", SHOTS[-1], scale.queries)]


def prompt_length(c: MM1Config, shots: int) -> int:
    """Return the number of tokens of a prompt."""
    return 1 + (shots + 1) * (c.connector.tokens + TEXT)


def prompts(c: MM1Config, shots: int, batch: int, *, images: bool) -> list[Document]:
    """Return `batch` random documents of one length, with text in place of images if `images` is False."""
    random, patch, squash = np.random.default_rng(0), c.vision.patch, c.image_mode == "squash"
    rows = c.image_size // patch if squash else math.isqrt(c.image_patches)
    columns = rows if squash else c.image_patches // rows

    def document() -> Document:
        tokens = random.integers(IMAGE + 1, c.decoder.vocabulary, prompt_length(c, shots), dtype=np.int32)
        if not images:
            return Document(tokens, (), "")
        tokens[1:].reshape(shots + 1, -1)[:, : c.connector.tokens] = IMAGE
        shape = (shots + 1, rows * patch, columns * patch, 3)
        return Document(tokens, tuple(View("image", x) for x in random.integers(256, size=shape, dtype=np.uint8)), "")

    return [document() for _ in range(batch)]


class Bench:
    """Hold a model with random weights, created at first use, and make the implementations to compare."""

    def __init__(self, size: MM1Config, device: str, dtype: str, limits: dict[str, Any]):
        self.config, self.device, self.dtype, self.limits = size, device, dtype, limits

    @cached_property
    def model(self) -> Any:
        """Return the model."""
        with torch.device(self.device):
            model = model_class(self.config.kind)(self.config)
        return model.init_weights().to(DTYPES[self.dtype]).eval()

    @cached_property
    def packed(self) -> tuple[nn.Module, nn.Module]:
        """Return decoder and head in the layout in which the engine runs them."""
        return blocked(self.model.decoder)

    @cached_property
    def int8(self) -> tuple[nn.Module, nn.Module]:
        """Return decoder and head with weights in int8."""
        return quantized(self.model.decoder, "int8")

    def rows(self, case: Case, key: Row, rounds: int | None, budget: float) -> Iterator[Row]:
        """Yield the row of a case, and for decode on a GPU also the row in which transformers runs in a CUDA graph."""
        documents = prompts(self.config, case.shots, case.batch, images=case.what in ("first token", "queries"))
        prompt = prompt_length(self.config, case.shots)
        row = key | {"shape": {"batch": case.batch, "prompt": prompt, "images": len(documents[0].media)}}
        ways = {"prefill": self.prefills, "first token": self.first_tokens, "decode": self.steps,
                "generate": self.generates, "queries": self.answers}[case.what](documents)  # fmt: skip
        context, new = (prompt, 1) if case.what == "decode" else (0, prompt)
        cost, tokens = self.cost(documents, context, new), case.batch * new
        if case.what == "generate":
            steps = [cost, *(self.cost(documents, prompt + i, 1) for i in range(NEW - 1))]
            cost = Cost(sum(step.flops for step in steps), sum(step.bytes for step in steps))
            tokens = case.batch * NEW
        results = checked(ways, TOLERANCE[self.dtype])
        yield self.timed(row, cost, tokens, results, rounds, budget)
        if self.device == "cuda" and "transformers static" in results.calls:
            graphs = {"mm1": lambda: results.calls["mm1"]}  # which is a graph already
            graphs["transformers static"] = partial(captured, results.calls["transformers static"])
            results = checked(graphs, TOLERANCE[self.dtype])
            yield self.timed(row | {"mode": "graph"}, cost, tokens, results, rounds, budget)

    def prefills(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Return the implementations of prefill."""

        def peer_call() -> Call:
            ids = self.ids(documents)
            return lambda: self.peer(ids, past_key_values=self.past("DynamicCache"), logits_to_keep=1).logits[:, 0]

        return {"mm1": lambda: self.prefill(documents)[0], "transformers": peer_call}

    def first_tokens(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Return the engine's ways to the first token: with empty caches, cached features, and cached pages."""

        def way(before: Callable[[Engine], object], cached: Sequence[Document] = ()) -> Call:
            engine, queries = self.engine(documents), self.queries(documents)
            for document in cached:
                engine.submit(document, Sampling(max_tokens=1))
            engine.run()

            def call() -> Tensor:
                before(engine)
                requests = [engine.submit(document, Sampling(max_tokens=1)) for document in next(queries)]
                engine.run()
                return torch.tensor([request.logprobs[0] for request in requests])

            return call

        ways: dict[str, Way] = {"mm1": partial(way, Engine.forget)}
        if len(documents[0].media) > 1:
            ways["mm1 features known"] = partial(way, lambda engine: engine.cache.clear(), documents[:1])
            ways["mm1 pages known"] = partial(way, lambda engine: None, documents[:1])
        return ways

    def queries(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """Yield batches of queries with the same shots; the last image is always new."""
        for count in itertools.count(1):
            batch = []
            for b, document in enumerate(documents):
                image = document.media[-1].values.copy()
                image.reshape(-1)[:8] = np.frombuffer((count * len(documents) + b).to_bytes(8, "little"), np.uint8)
                tokens, slots = documents[0].tokens, self.config.connector.tokens
                tokens = np.concatenate([tokens[: -slots - TEXT], document.tokens[-slots - TEXT :]])
                batch.append(Document(tokens, (*documents[0].media[:-1], View("image", image)), ""))
            yield batch

    def generates(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Return the implementations of generating NEW tokens."""
        ids, engine = self.ids(documents), self.engine(documents)

        def result(tokens: Sequence[Sequence[int]]) -> Tensor:
            """Return the tokens, or in bf16, where rounding changes texts, only the number of tokens."""
            return torch.tensor(tokens) if self.dtype == "fp32" else torch.tensor([len(text) for text in tokens])

        def own_call() -> Tensor:
            engine.forget()
            requests = [engine.submit(document, Sampling(max_tokens=NEW)) for document in documents]
            engine.run()
            return result([request.tokens for request in requests])

        def peer_call() -> Call:
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            mask, prompt = torch.ones_like(ids), ids.shape[1]
            return lambda: result(self.peer.generate(ids, attention_mask=mask, **options)[:, prompt:].tolist())

        return {"mm1": lambda: own_call, "transformers": peer_call}

    def answers(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Return the engine's ways to answer queries: with and without the prefix cache."""

        def way(share: bool) -> Call:
            engine, queries = self.engine(documents), next(self.queries(documents))

            def call() -> Tensor:
                engine.forget()
                requests = [engine.submit(document, Sampling(max_tokens=ANSWER)) for document in queries]
                for request in requests if not share else ():
                    request.page_names = []  # pages without names are not shared
                engine.run()
                return torch.tensor([request.logprobs[0] for request in requests])

            return call

        return {"mm1": partial(way, True), "mm1 without shared pages": partial(way, False)}

    def engine(self, documents: Sequence[Document]) -> Engine:
        """Return an engine whose cache holds up to 64 documents with NEW tokens each, and the shots once more."""
        self.model.tokenizer = cast(TextTokenizer, TOKENS)
        batch = min(len(documents), 64)
        pages = sum(cdiv(len(document.tokens) + NEW, PAGE) for document in [*documents[:batch], documents[0]])
        return Engine(self.model, tokens=pages * PAGE, batch=batch)

    def steps(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Return the implementations of decode. Each call leaves the cache unchanged."""
        prefill, cache, tables = self.prefill(documents)
        tokens, ends = prefill().argmax(-1), [len(d.tokens) for d in documents]
        pages = [np.array(table, np.int32) for table in tables]

        def own_call(decoder: nn.Module, head: nn.Module) -> Call:
            ids = tokens.tolist()
            if self.device == "cuda":
                graphs, greedy = Graphs(decoder, head, cache, len(ids)), [Draw(0.0, 1.0, 0, 0.0)] * len(ids)
                return lambda: graphs(ids, ends, pages, greedy)[0]
            step = step_of(decoder, head, cache)
            if step is None:
                raise RuntimeError("no C++ compiler")
            return lambda: step(ids, ends, pages)[0]

        def peer_call(kind: str) -> Call:
            past = self.past(kind, ends[0] + NEW)
            self.peer(self.ids(documents), past_key_values=past, logits_to_keep=1)

            def step() -> Tensor:
                logits = self.peer(tokens[:, None], past_key_values=past).logits[:, 0]
                if kind == "DynamicCache":
                    past.crop(-1)
                else:
                    torch._foreach_sub_([layer.cumulative_length for layer in past.layers], 1)
                return logits

            return step

        decoder = self.model.decoder
        peers = {name: partial(peer_call, kind) for name, kind in CACHES.items()}
        return {"mm1": lambda: own_call(decoder, Head(decoder)), **peers, "mm1 int8": lambda: own_call(*self.int8)}

    def prefill(self, documents: Sequence[Document]) -> tuple[Call, Cache, list[list[int]]]:
        """Return a call that fills a cache with the packed prompts, the cache, and each prompt's pages.

        The call returns the logits [B, V] of the prompts' last tokens.
        """
        c, lengths = self.config, [len(document.tokens) for document in documents]
        weight, need = self.model.decoder.embedding.weight, [cdiv(n + NEW, PAGE) for n in lengths]
        cache = Cache(c.decoder, sum(need) + 2, weight.device, weight.dtype)  # two spare pages, which graphs need
        tables = [cache.allocate(count) or [] for count in need]
        attends = cache.attends(cache.rows(tables, [0] * len(lengths), lengths))
        budget = exact_budget(documents, c.vision.patch)
        batch = pack(documents, budget, image_id=IMAGE, patch=c.vision.patch, slots=c.connector.tokens).to(self.device)
        last, (decoder, head) = batch.cu_seqlens[1:].long() - 1, self.packed
        step = step_of(self.model.decoder, Head(self.model.decoder), cache)
        pages = [table for table, n in zip(tables, lengths) for table in [np.array(table, np.int32)] * n]

        def call() -> Tensor:
            x = self.model.embed(batch)
            # The engine chooses between the two implementations in the same way.
            if step and step.is_faster(len(x), sum(n * (n + 1) // 2 for n in lengths)):
                return step(x.float(), batch.positions.numpy(), pages, last.numpy())[0]
            return head(hidden_states(decoder, x, batch.positions, attends)[last])

        return call, cache, tables

    @cached_property
    def peer(self) -> Any:
        """Return transformers' model with the same parameters."""
        return transformers_decoder(self.model.decoder)

    def past(self, kind: str, capacity: int = 0) -> Any:
        """Return an empty cache of transformers. kind: name of its class."""
        import transformers

        sizes = {"max_cache_len": capacity} if kind == "StaticCache" else {}
        return getattr(transformers, kind)(config=self.peer.config, **sizes)

    def ids(self, documents: Sequence[Document]) -> Tensor:
        """Return the documents' tokens, int64 [B, L]."""
        return torch.from_numpy(np.stack([document.tokens for document in documents])).long().to(self.device)

    def cost(self, documents: Sequence[Document], context: int, new: int) -> Cost:
        """Return the cost of computing `new` tokens of each document after `context` tokens that are in a cache.

        Bytes count the weights, in a mixture those of the maximum number of experts that can be chosen; one row of the
        embedding for each token; keys and values that are read or written; encoder, connector and pixels of images.
        """
        m, d, patch = self.model, self.model.decoder, self.config.vision.patch
        c, count, images = d.config, len(documents), [view.values for document in documents for view in document.media]
        grids = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
        flops = operations(self.config, [context + new] * count, grids, count)
        flops -= operations(self.config, [context] * count)
        numbers = d.norm.weight.numel() + d.head_weight.numel() + count * new * c.width
        for p in d.blocks.parameters():
            numbers += p.numel() if p.ndim < 3 else p[0].numel() * min(c.experts, count * new * c.experts_per_token)
        numbers += count * (context + new) * c.layers * 2 * c.kv_heads * c.head_width
        if images:
            numbers += sum(p.numel() for part in (m.vision, m.connector, m.image_norm) for p in part.parameters())
        return Cost(flops, numbers * d.head_weight.element_size() + sum(image.nbytes for image in images))

    def timed(self, row: Row, cost: Cost, tokens: int, results: Checked, rounds: int | None, budget: float) -> Row:
        """Return a row with the times of all implementations and their ratios to mm1's."""
        minimum = floor(cost, self.dtype, self.limits)

        def fault(name: str, median: float) -> str | None:
            # mm1 with cached features, cached pages or narrow weights has less work than the cost counts.
            counted = name == CONTROL or not name.startswith(OWN)
            if self.device == "cuda" and counted and impossible(median, cost, self.dtype, self.limits, 0):
                return f"{minimum / median:.0%} of what this GPU can do: counted or timed wrongly"
            return None

        def facts(name: str, median: float) -> dict[str, Any]:
            bandwidth = cost.bytes / self.limits["copy"] / median
            return {"tokens_per_s": tokens / median, "share": minimum / median, "bandwidth_share": bandwidth}

        return timed(row, results.calls, cost, self.limits, failed=results.failed, errors=results.errors,
                     fault=fault, facts=facts, rounds=rounds, budget=budget)  # fmt: skip


def checked(ways: dict[str, Way], tolerance: float) -> Checked:
    """Return the calls whose result equals that of "mm1", which comes first, within the tolerance."""
    calls, errors, failed, truth = {}, {}, {}, torch.tensor(math.nan)
    for name, way in ways.items():
        try:
            call = way()
            result = call().float()
            truth = result if name == "mm1" else truth
            errors[name] = float((result - truth).square().mean().sqrt() / truth.square().mean().sqrt())
            if errors[name] <= (INT8_TOLERANCE if name == "mm1 int8" else tolerance):
                calls[name] = call
            else:
                failed[name] = f"differs from mm1 by {errors[name]:.1g} of rms"
        except Exception as error:
            failed[name] = reason(error)
    return Checked(calls, errors, failed)


def captured(call: Call) -> Call:
    """Return a call that replays this call as a CUDA graph."""
    results: list[Tensor] = []
    graph = capture(lambda: results.append(call()))

    def replay() -> Tensor:
        graph.replay()
        return results[0]

    return replay


def operations(c: MM1Config, lengths: list[int], grids: Sequence[tuple[int, int]] = (), heads: int = 0) -> int:
    """Return the floating-point operations of a forward pass.

    lengths: tokens of each document; grids: (h, w) of each image; heads: rows of logits.
    """
    load = Workload(lengths, grids, heads, sum(lengths), len(grids), sum(h * w for h, w in grids))
    return sum(ledger(c, load).forward.values())
