"""Generation by its parts, beside transformers.

    prefill       the prompt's tokens through the decoder, logits of the last; text fills the images' places
    first token   by the engine, images encoded, nothing known; with the features of the shots' images known from other
                  queries; with their pages known as well; transformers has no such model
    decode        one token more for every prompt, over a cache that holds the prompts; once with weights in int8
    generate      NEW tokens for every prompt, greedily, by the engine and by transformers' generate
    queries       ANSWER tokens to each of many queries behind the same shots, from nothing known on; and the same
                  without sharing pages

Prompts are random: `shots` examples, each an image and TEXT tokens, and a query like them. Those of a batch are of one
length, which spares transformers its padding. Its parameters are views of ours: both read the same random weights.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mm1.autotune import gpu_state
from mm1.autotune.clock import Call, capture
from mm1.bench.comparison import OWN
from mm1.bench.peer_models import transformers_decoder
from mm1.bench.record import Record, Row
from mm1.bench.roofline import DTYPES, ceilings, floor, impossible
from mm1.bench.timing import CONTROL, interleaved, noise, ratio, reason, summary
from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document, TextTokenizer
from mm1.engine.infer.cache import PAGE, Cache
from mm1.engine.infer.decode import step_of
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.graphs import Graphs
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.engine.layers.blocked import Head, packed
from mm1.engine.layers.quantize import quantized
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import DIGITS, MODELS, Model, named
from mm1.engine.train.ledger import Load, ledger
from mm1.errors import UserError
from mm1.kernels.dispatch import Cost, cdiv

SHOTS = (0, 4, 8)
TEXT = 30  # tokens that follow each image
IMAGE = 3  # stands in for the number of a tokenizer's image token
NEW = ROOM = 64  # tokens that a cache holds beyond the prompt
ANSWER = 4  # tokens
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of the logits' rms; roundings of bf16 add up to 2e-2 in 26 layers
NARROW = 0.2  # of int8's logits, on random weights
CACHES = {"transformers": "DynamicCache", "transformers static": "StaticCache"}
_30M = replace(
    DIGITS.decoder, vocabulary=8192, width=512, layers=8, heads=8, kv_heads=8, head_width=64, ffn=1408, experts=0
)
MODELS = {**MODELS, "digits-30m": replace(DIGITS, decoder=_30M)}

Way = Callable[[], Call]  # makes a call, whose result is logits or tokens


class Scale(NamedTuple):
    """What suits a machine: models, batches, the most prompt tokens of a batch, to decode after and to prefill, and
    queries."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    decoded: int
    prefilled: int
    queries: int


GPU = Scale(("mm1-1b", "mm1-3b"), (1, 2, 4, 8, 16, 32, 64, 128), 32_768, 16_384, 64)
CPU = Scale(("digits", "digits-30m"), (1, 8), 2048, 512, 200)
PREFILLED = (1, 8)  # batches


class Tokens:
    """In the place of a tokenizer: nothing ends a text, and there is none."""

    image, eos = IMAGE, -1

    def pieces(self, ids: Sequence[int], continued: bool = False) -> list[bytes]:
        return [b""] * len(ids)

    def has_text(self, token: int) -> bool:
        return False


class Case(NamedTuple):
    what: str
    shots: int
    batch: int

    def key(self) -> Row:
        return {"case": f"{self.shots}-shot batch={self.batch}", "what": self.what}


class Checked(NamedTuple):
    calls: dict[str, Call]
    errors: dict[str, float]
    failed: dict[str, str]


@torch.inference_mode()
def measure(record: Record, models: Sequence[str] = (), rounds: int | None = None, budget: float = 1.0) -> None:
    """Adds a row for each case that the record lacks, as they come, and prints it.

    models: named sizes, none for some that suit the machine. Of each row `rounds` rounds, or as many as `budget`
    seconds allow. Raises UserError for an unknown size.
    """
    if rounds is not None and rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    scale, device, dtype = (GPU, "cuda", "bf16") if torch.cuda.is_available() else (CPU, "cpu", "fp32")
    sizes = {name: MODELS.get(name) or named(name) for name in models or scale.models}
    limits = record.header["ceilings"] = record.header.get("ceilings") or ceilings(device)
    for name, size in sizes.items():
        base = {"bench": "generate", "model": name, "dtype": dtype, "mode": "stream" if device == "cuda" else "host"}
        lacking = [case for case in cases(size, scale) if not record.has(**base, **case.key())]
        bench = Bench(size, device, dtype, limits)
        for case in lacking:
            with record.at(**base, **case.key()):
                for row in bench.rows(case, base | case.key(), rounds, budget):
                    record.add(row)
                    _print(row)
        del bench  # before the next one's weights are made


def cases(c: Model, scale: Scale) -> list[Case]:
    every = [(shots, batch) for shots in SHOTS for batch in scale.batches]
    fit = {most: [(s, b) for s, b in every if b * prompt_length(c, s) <= most] for most in scale[2:4]}
    few = [(s, b) for s, b in fit[scale.prefilled] if b in PREFILLED]
    whole = [(s, b) for s, b in fit[scale.decoded] if b in PREFILLED and s != 4]
    found = [Case(what, s, b) for what in ("prefill", "first token") for s, b in few]
    found += [Case("decode", s, b) for s, b in fit[scale.decoded]] + [Case("generate", s, b) for s, b in whole]
    return [*found, Case("queries", SHOTS[-1], scale.queries)]


def prompt_length(c: Model, shots: int) -> int:
    return 1 + (shots + 1) * (c.connector.tokens + TEXT)


def prompts(c: Model, shots: int, batch: int, *, images: bool) -> list[Document]:
    """Random documents of one length; without images, text in their places."""
    random, patch, squash = np.random.default_rng(0), c.vision.patch, c.image_mode == "squash"
    rows = c.image_size // patch if squash else math.isqrt(c.image_patches)
    columns = rows if squash else c.image_patches // rows

    def document() -> Document:
        tokens = random.integers(IMAGE + 1, c.decoder.vocabulary, prompt_length(c, shots), dtype=np.int32)
        if not images:
            return Document(tokens, (), "")
        tokens[1:].reshape(shots + 1, -1)[:, : c.connector.tokens] = IMAGE
        shape = (shots + 1, rows * patch, columns * patch, 3)
        return Document(tokens, tuple(random.integers(256, size=shape, dtype=np.uint8)), "")

    return [document() for _ in range(batch)]


class Bench:
    """A model with random weights, made when first needed, and the ways to run it."""

    def __init__(self, size: Model, device: str, dtype: str, limits: dict[str, Any]):
        self.config, self.device, self.dtype, self.limits = size, device, dtype, limits

    @cached_property
    def model(self) -> MM1:
        with torch.device(self.device):
            model = MM1(self.config)
        return model.initialize().to(DTYPES[self.dtype]).eval()

    @cached_property
    def packed(self) -> tuple[nn.Module, nn.Module]:
        """Decoder and head as the engine runs them."""
        return packed(self.model.decoder)

    @cached_property
    def narrow(self) -> tuple[nn.Module, nn.Module]:
        return quantized(self.model.decoder, "int8")

    def rows(self, case: Case, key: Row, rounds: int | None, budget: float) -> Iterator[Row]:
        """The row of these key fields; of a decoding step on a GPU also that beside transformers' CUDA graph."""
        documents = prompts(self.config, case.shots, case.batch, images=case.what in ("first token", "queries"))
        prompt = prompt_length(self.config, case.shots)
        row = key | {"shape": {"batch": case.batch, "prompt": prompt, "images": len(documents[0].images)}}
        ways = {"prefill": self.prefills, "first token": self.first_tokens, "decode": self.steps,
                "generate": self.generates, "queries": self.answers}[case.what](documents)  # fmt: skip
        context, new = (prompt, 1) if case.what == "decode" else (0, prompt)
        cost, tokens = self.cost(documents, context, new), case.batch * new
        if case.what == "generate":
            steps = [cost, *(self.cost(documents, prompt + i, 1) for i in range(NEW - 1))]
            cost = Cost(sum(step.flops for step in steps), sum(step.bytes for step in steps))
            tokens = case.batch * NEW
        found = checked(ways, TOLERANCE[self.dtype])
        yield self.timed(row, cost, tokens, found, rounds, budget)
        if self.device == "cuda" and "transformers static" in found.calls:
            graphs = {"mm1": lambda: found.calls["mm1"]}  # is one already
            graphs["transformers static"] = partial(captured, found.calls["transformers static"])
            found = checked(graphs, TOLERANCE[self.dtype])
            yield self.timed(row | {"mode": "graph"}, cost, tokens, found, rounds, budget)

    def prefills(self, documents: Sequence[Document]) -> dict[str, Way]:
        def theirs() -> Call:
            ids = self.ids(documents)
            return lambda: self.peer(ids, past_key_values=self.past("DynamicCache"), logits_to_keep=1).logits[:, 0]

        return {"mm1": lambda: self.prefill(documents)[0], "transformers": theirs}

    def first_tokens(self, documents: Sequence[Document]) -> dict[str, Way]:
        def way(before: Callable[[Engine], object], known: Sequence[Document] = ()) -> Call:
            engine, queries = self.engine(documents), self.queries(documents)
            for document in known:
                engine.submit(document, Sampling(max_tokens=1))
            engine.run()

            def call() -> Tensor:
                before(engine)
                requests = [engine.submit(document, Sampling(max_tokens=1)) for document in next(queries)]
                engine.run()
                return torch.tensor([request.logprobs[0] for request in requests])

            return call

        ways: dict[str, Way] = {"mm1": partial(way, Engine.forget)}
        if len(documents[0].images) > 1:
            ways["mm1 features known"] = partial(way, lambda engine: engine.cache.forget(), documents[:1])
            ways["mm1 pages known"] = partial(way, lambda engine: None, documents[:1])
        return ways

    def queries(self, documents: Sequence[Document]) -> Iterator[list[Document]]:
        """The same shots for all; the last image is another each time."""
        for count in itertools.count(1):
            found = []
            for b, document in enumerate(documents):
                image = document.images[-1].copy()
                image.reshape(-1)[:8] = np.frombuffer((count * len(documents) + b).to_bytes(8, "little"), np.uint8)
                tokens, slots = documents[0].tokens, self.config.connector.tokens
                tokens = np.concatenate([tokens[: -slots - TEXT], document.tokens[-slots - TEXT :]])
                found.append(Document(tokens, (*documents[0].images[:-1], image), ""))
            yield found

    def generates(self, documents: Sequence[Document]) -> dict[str, Way]:
        ids, engine = self.ids(documents), self.engine(documents)

        def result(tokens: Sequence[Sequence[int]]) -> Tensor:
            """Roundings of bf16 make other texts."""
            return torch.tensor(tokens) if self.dtype == "fp32" else torch.tensor([len(of) for of in tokens])

        def ours() -> Tensor:
            engine.forget()
            requests = [engine.submit(document, Sampling(max_tokens=NEW)) for document in documents]
            engine.run()
            return result([request.tokens for request in requests])

        def theirs() -> Call:
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            mask, prompt = torch.ones_like(ids), ids.shape[1]
            return lambda: result(self.peer.generate(ids, attention_mask=mask, **options)[:, prompt:].tolist())

        return {"mm1": lambda: ours, "transformers": theirs}

    def answers(self, documents: Sequence[Document]) -> dict[str, Way]:
        def way(share: bool) -> Call:
            engine, queries = self.engine(documents), next(self.queries(documents))

            def call() -> Tensor:
                engine.forget()
                requests = [engine.submit(document, Sampling(max_tokens=ANSWER)) for document in queries]
                for request in requests if not share else ():
                    request.cached = []  # no page has a name
                engine.run()
                return torch.tensor([request.logprobs[0] for request in requests])

            return call

        return {"mm1": partial(way, True), "mm1 without shared pages": partial(way, False)}

    def engine(self, documents: Sequence[Document]) -> Engine:
        """With room for 64 of these, the shots once more, and NEW tokens of each."""
        self.model.tokenizer = cast(TextTokenizer, Tokens())
        batch = min(len(documents), 64)
        pages = sum(cdiv(len(document.tokens) + NEW, PAGE) for document in [*documents[:batch], documents[0]])
        return Engine(self.model, tokens=pages * PAGE, batch=batch)

    def steps(self, documents: Sequence[Document]) -> dict[str, Way]:
        """Each step leaves the cache as it was."""
        prefill, cache, tables = self.prefill(documents)
        tokens, ends = prefill().argmax(-1), [len(d.tokens) for d in documents]
        pages = [np.array(table, np.int32) for table in tables]

        def ours(decoder: nn.Module, head: nn.Module) -> Call:
            ids = tokens.tolist()
            if self.device == "cuda":
                graphs, greedy = Graphs(decoder, head, cache, len(ids)), [Draw(0.0, 1.0, 0, 0.0)] * len(ids)
                return lambda: graphs(ids, ends, pages, greedy)[0]
            step = step_of(decoder, head, cache)
            if step is None:
                raise RuntimeError("no C++ compiler")
            return lambda: step(ids, ends, pages)[0]

        def theirs(kind: str) -> Call:
            past = self.past(kind, ends[0] + ROOM)
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
        peers = {name: partial(theirs, kind) for name, kind in CACHES.items()}
        return {"mm1": lambda: ours(decoder, Head(decoder)), **peers, "mm1 int8": lambda: ours(*self.narrow)}

    def prefill(self, documents: Sequence[Document]) -> tuple[Call, Cache, list[list[int]]]:
        """Logits [B, V] of the packed prompts' last tokens, the cache, which each call fills anew, and its pages."""
        c, lengths = self.config, [len(document.tokens) for document in documents]
        weight, need = self.model.decoder.embedding.weight, [cdiv(n + ROOM, PAGE) for n in lengths]
        cache = Cache(c.decoder, sum(need) + 2, weight.device, weight.dtype)  # two of them for graphs to spare
        tables = [cache.take(count) or [] for count in need]
        attends = cache.attends(cache.rows(tables, [0] * len(lengths), lengths))
        budget = exact_budget(documents, c.vision.patch)
        batch = pack(documents, budget, image_id=IMAGE, patch=c.vision.patch, slots=c.connector.tokens).to(self.device)
        last, (decoder, head) = batch.cu_seqlens[1:].long() - 1, self.packed
        step = step_of(self.model.decoder, Head(self.model.decoder), cache)
        pages = [table for table, n in zip(tables, lengths) for table in [np.array(table, np.int32)] * n]

        def call() -> Tensor:  # the engine's two ways
            x = self.model.embed(batch)
            if step and step.takes(len(x), sum(n * (n + 1) // 2 for n in lengths)):
                return step(x.float(), batch.positions.numpy(), pages, last.numpy())[0]
            return head(decoder(x, batch.positions, batch.cu_seqlens, attends=attends)[0][last])

        return call, cache, tables

    @cached_property
    def peer(self) -> Any:
        return transformers_decoder(self.model.decoder)

    def past(self, kind: str, capacity: int = 0) -> Any:
        import transformers

        sizes = {"max_cache_len": capacity} if kind == "StaticCache" else {}
        return getattr(transformers, kind)(config=self.peer.config, **sizes)

    def ids(self, documents: Sequence[Document]) -> Tensor:
        return torch.from_numpy(np.stack([document.tokens for document in documents])).long().to(self.device)

    def cost(self, documents: Sequence[Document], context: int, new: int) -> Cost:
        """Of `new` tokens of each document behind `context` tokens that a cache holds.

        Bytes: the weights (of a mixture as many experts as there are choices, or all), a row of the embedding a token,
        keys and values read or written; encoder, connector and pixels where there are images.
        """
        m, d, patch = self.model, self.model.decoder, self.config.vision.patch
        c, count, images = d.config, len(documents), [image for document in documents for image in document.images]
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

    def timed(self, row: Row, cost: Cost, tokens: int, found: Checked, rounds: int | None, budget: float) -> Row:
        with gpu_state.watch() as gpu:
            samples = interleaved(found.calls, rounds=rounds, budget=budget, control="mm1" in found.calls)
        failed, least, variants = found.failed | samples.failed, floor(cost, self.dtype, self.limits), {}
        for name, seconds in samples.seconds.items():
            v = summary(seconds)
            counted = name == CONTROL or not name.startswith(
                OWN
            )  # others know more, or read less, than what is counted
            if self.device == "cuda" and counted and impossible(v["median"], cost, self.dtype, self.limits, 0):
                failed[name] = f"{least / v['median']:.0%} of what this GPU can do: counted or timed wrongly"
                continue
            v |= {"samples": seconds, "error": found.errors.get(name), "tokens_per_s": tokens / v["median"]}
            v |= {"share": least / v["median"], "bandwidth_share": cost.bytes / self.limits["copy"] / v["median"]}
            if name not in ("mm1", CONTROL) and "mm1" in samples.seconds:
                v["ratio"] = ratio(seconds, samples.seconds["mm1"])
            variants[name] = v
        row = row | {"flops": cost.flops, "bytes": cost.bytes, "floor": least, "noise": noise(samples)}
        return row | {"variants": variants, "failed": failed} | ({"gpu": gpu} if self.device == "cuda" else {})


def checked(ways: dict[str, Way], tolerance: float) -> Checked:
    """The calls whose result is that of "mm1", which comes first."""
    calls, errors, failed, truth = {}, {}, {}, torch.tensor(math.nan)
    for name, way in ways.items():
        try:
            call = way()
            result = call().float()
            truth = result if name == "mm1" else truth
            errors[name] = float((result - truth).square().mean().sqrt() / truth.square().mean().sqrt())
            if errors[name] <= (NARROW if name == "mm1 int8" else tolerance):
                calls[name] = call
            else:
                failed[name] = f"differs from mm1 by {errors[name]:.1g} of rms"
        except Exception as error:
            failed[name] = "not installed" if isinstance(error, ModuleNotFoundError) else reason(error)
    return Checked(calls, errors, failed)


def captured(call: Call) -> Call:
    """The same as a CUDA graph."""
    results: list[Tensor] = []
    graph = capture(lambda: results.append(call()))

    def replay() -> Tensor:
        graph.replay()
        return results[0]

    return replay


def operations(c: Model, lengths: list[int], grids: Sequence[tuple[int, int]] = (), heads: int = 0) -> int:
    """Of documents and images forward, and of that many rows of logits."""
    load = Load(lengths, grids, heads, sum(lengths), len(grids), sum(h * w for h, w in grids))
    return sum(ledger(c, load).forward.values())


def _print(row: Row) -> None:
    graph = "  as a graph" * (row["mode"] == "graph")
    print(f"{row['model']}  {row['dtype']}  {row['what']}  {row['case']}  {row['shape']['prompt']} tokens each{graph}")
    share, of = ("bandwidth_share", "copying's rate") if row["what"] == "decode" else ("share", "the floor's rate")
    for name, v in row["variants"].items():
        if name != CONTROL:
            times = f"  {r['median']:5.2f} × mm1's  ({r['low']:.2f} … {r['high']:.2f})" if (r := v.get("ratio")) else ""
            print(f"    {name:20} {1e3 * v['median']:9.3f} ms  ({1e3 * v['low']:.3f} … {1e3 * v['high']:.3f})"
                  f"  {v['tokens_per_s']:9.0f} tokens/s  {v[share]:4.0%} of {of}{times}")  # fmt: skip
    for name, why in row["failed"].items():
        print(f"    {name:20} {why}")
    print(end="", flush=True)
