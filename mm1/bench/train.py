"""Time the training step from plain torch to everything on, one change a rung, and transformers on the same documents.

A step is forward, backward, clipping and AdamW, as in the trainer, for the documents that fill one packed sequence. All
rungs and peers share weights and optimizer state, and the learning rate is 0, so that all do the same work in every
round and a GPU holds one model. Before it is timed, each must give the first rung's loss and gradient norm.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from mm1.autotune.gpu_state import watch
from mm1.bench import mix, plain
from mm1.bench.peer_models import TransformersModel
from mm1.bench.record import Record, Row
from mm1.bench.roofline import ceilings
from mm1.bench.rows import show
from mm1.bench.rungs import FULL, Rung, ladder, peers
from mm1.bench.timing import interleaved, noise, ratio, reason, summary
from mm1.engine.data.batch import Batch
from mm1.engine.layers import connector, decoder, vision
from mm1.engine.layers.float8 import converted
from mm1.engine.layers.layer import BlockLayer, learned_vectors
from mm1.engine.layers.workload import Workload
from mm1.engine.models import spec
from mm1.engine.models.mm1_config import MODELS, MM1Config
from mm1.engine.models.registry import model_class, named
from mm1.engine.train.config import Train
from mm1.engine.train.copies import WeightCopies
from mm1.engine.train.ledger import Ledger, ledger, workload
from mm1.engine.train.optim import adamw
from mm1.engine.train.prepare import compiled
from mm1.engine.train.recompute import recomputed
from mm1.errors import UserError
from mm1.kernels.moe.backends import find
from mm1.kernels.patches.reference import patch_embed

SETS = 3  # sets of documents: the first is timed, the others show whether blocks are compiled again
TOLERANCES = {"loss": {"fp32": 1e-5, "bf16": 2e-3}, "gradient norm": {"fp32": 1e-4, "bf16": 3e-2}}
# Memory of a GPU, in bytes, in which plain torch can train on 4096 tokens with their images. Smaller ones get half.
BIG = 100e9


class Size(NamedTuple):
    """Hold a model and the number of tokens of a packed sequence."""

    model: MM1Config
    tokens: int


def _resized(name: str, **changes: int) -> MM1Config:
    model = named(name)
    return replace(model, decoder=replace(model.decoder, **changes))


SIZES = {name: Size(model, 768 if name == "digits" else 4096) for name, model in MODELS.items()} | {
    "digits-dense": Size(_resized("digits", experts=0), 768),
    "mm1-3b-moe-4x8": Size(_resized("mm1-3b-moe", layers=4, experts=8), 4096),  # small enough for one GPU
}
DEFAULTS = {"cpu": ("digits", "digits-dense"), "cuda": ("mm1-1b", "mm1-3b-moe-4x8")}


def measure(record: Record, models: Sequence[str] = (), rounds: int | None = None, budget: float = 30.0) -> None:
    """Add a row for each model that the record lacks, and print it.

    models: keys of SIZES (empty: some that suit the machine). rounds: their number (None: as many as `budget` seconds
    per model allow). A variant's "ratio" is its time over the first rung's. "cache_hits" counts graphs that were not
    compiled but read from disk. Raises UserError for an unknown size.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = models or DEFAULTS[device]
    if unknown := [name for name in models if name not in SIZES]:
        raise UserError(f"unknown size {unknown[0]!r}; known: {', '.join(SIZES)}")
    if rounds is not None and rounds < 1:
        raise UserError(f"rounds is {rounds}, expected at least 1")
    for name in models:
        c, tokens = SIZES[name]
        if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < BIG:
            tokens //= 2
        row: Row = {
            "bench": "train", "model": name, "case": f"captions, interleaved, text; {tokens} tokens",
            "dtype": "bf16" if device == "cuda" else "fp32", "what": "step",
            "mode": "stream" if device == "cuda" else "host",
        }  # fmt: skip
        if record.has(**row):
            continue
        with record.at(**row):
            limits = record.header["ceilings"] = record.header.get("ceilings") or ceilings(device)
            print(f"{name}: a step of {row['case']}, {row['dtype']}", flush=True)
            steps = Steps(c, tokens, device, row["dtype"], limits["gemm"][row["dtype"]])
            with watch() as gpu:
                row |= steps.row(rounds, budget)
            record.add(row | ({"gpu": gpu} if device == "cuda" else {}))
            show(row)


@dataclass
class Way:
    """Hold a rung or a peer after its first steps."""

    rung: Rung
    step: Callable[[], None]
    ledger: Ledger
    data: float  # seconds to make and move the batches of a step
    results: dict[str, float]  # loss and gradient norm, which must equal the first rung's
    first: float  # seconds of the first forward and backward
    recompiles: int
    cache_hits: int  # graphs of the first step that were read from disk
    peak_bytes: int | None


class Steps:
    """Hold a model, documents, and the ways to train on them."""

    def __init__(self, c: MM1Config, tokens: int, device: str, dtype: str, peak: float):
        self.config, self.device, self.dtype, self.peak = c, torch.device(device), dtype, peak
        sets = [mix.documents(c, tokens, seed) for seed in range(SETS)]
        self.documents, self.same_size = sets[0], c.image_mode == "squash"
        self.layouts = {True: mix.packed(c, sets, tokens), False: mix.padded(c, tokens)}
        self.sets = {packed: [self._moved(layout(docs)) for docs in sets] for packed, layout in self.layouts.items()}
        torch.compiler.reset()  # the model before may have blocks of the same code
        self.model = model_class(c.kind)(c).init_weights().to(device)
        self.optimizers = _optimizers(self.model)
        self.copies = WeightCopies(self.model, torch.bfloat16) if dtype == "bf16" else nullcontext()
        self.compiled: dict[tuple[nn.Module, str, bool], Callable] = {}

    def row(self, rounds: int | None, budget: float) -> Row:
        """Check and time all ways, and return the fields of a row."""
        ways, failed = self.check(ladder(self.config, self.dtype))
        others, missing = self.check_peers(next(iter(ways.values()), None))
        ways, failed = ways | others, failed | missing
        samples = interleaved({name: way.step for name, way in ways.items()}, rounds=rounds, budget=budget)
        share, seconds, failed = noise(samples), samples.seconds, failed | samples.failed
        variants = {name: self._variant(seconds[name], way) for name, way in ways.items() if name in seconds}
        for name, variant in variants.items():
            variant["ratio"] = ratio(seconds[name], seconds[next(iter(variants))])
        totals = self.ledger(FULL).totals()
        self.release()
        return {"shape": self.shape, "ledger": totals, "peak": self.peak, "noise": share, "variants": variants,
                "failed": failed}  # fmt: skip

    def check_peers(self, truth: Way | None = None) -> tuple[dict[str, Way], dict[str, str]]:
        """Return what `check` does for transformers' ways, if transformers can build this model."""
        try:
            self.peer = TransformersModel(self.model)
            self.peer_inputs = {
                packed: [self.peer.inputs(batch, packed) for batch in sets[0]] for packed, sets in self.sets.items()
            }
        except Exception as error:
            return {}, {"transformers": reason(error)}
        self.peer_optimizer = _sharing_moments(self.peer, self.optimizers[False])
        return self.check(peers(self.device.type), truth)

    @property
    def shape(self) -> dict[str, int]:
        """Return the numbers of documents, images and tokens of a step."""
        packed, padded = self.sets[True][0][0], self.sets[False][0]
        return {
            "tokens": packed.used_tokens, "images": len(packed.media.grids.sizes or ()),
            "documents": len(self.documents), "targets": packed.target_count,
            "longest": max(len(d.tokens) for d in self.documents),
            "packed": len(packed.tokens), "padded": sum(len(batch.tokens) for batch in padded),
        }  # fmt: skip

    def check(self, rungs: Sequence[Rung], truth: Way | None = None) -> tuple[dict[str, Way], dict[str, str]]:
        """Return the rungs that give the loss and gradient norm of `truth` (None: the first), and why others failed."""
        ways: dict[str, Way] = {}
        failed: dict[str, str] = {}
        for rung in rungs:
            try:
                way = self.attempt(rung)
                if wrong := self.differs(way, truth or next(iter(ways.values()), way)):
                    failed[rung.name] = wrong
                else:
                    ways[rung.name] = way
                line = wrong or f"loss {way.results['loss']:.4f}, first {way.first:.1f} s"
            except Exception as error:
                line = failed[rung.name] = reason(error)
            self.model.zero_grad(set_to_none=True)
            print(f"  {rung.name:20} {line}", flush=True)
        return ways, failed

    def differs(self, way: Way, truth: Way) -> str | None:
        """Return how a way's results differ from the true ones, or None where they agree."""
        loose = 10 if way.rung.float8 else 1
        errors = {name: abs(way.results[name] - value) / abs(value) for name, value in truth.results.items()}
        limits = {name: loose * TOLERANCES[name][self.dtype] for name in errors}
        wrong = [f"{name} differs by {error:.2g}" for name, error in errors.items() if not error <= limits[name]]
        return f"{' and '.join(wrong)} from that of {truth.rung.name!r}" if wrong else None

    def attempt(self, rung: Rung) -> Way:
        """Run a rung for the first time, and return it with its results."""
        # A peer is compiled for the timed batch alone, because other batches would turn its shapes into variables.
        batches, *others = [self.peer_inputs[rung.packed]] if rung.peer else self.sets[rung.packed]
        before, on_disk, begin = _graphs(), _cache_hits(), time.perf_counter()
        results = self._loss(rung, batches)
        first, once, on_disk = time.perf_counter() - begin, _graphs() - before, _cache_hits() - on_disk
        for other in others if rung.compiled else ():
            self._loss(rung, other)
        step = partial(self.step, rung, batches)
        peak = self.peak_bytes(step)
        recompiles = _graphs() - before - once
        data = self.data_seconds(rung)
        return Way(rung, step, self.ledger(rung), data, results, first, recompiles, on_disk, peak)

    def _model(self, rung: Rung) -> spec.Model | TransformersModel:
        return self.peer if rung.peer else self.model

    def _loss(self, rung: Rung, batches: Sequence[Any]) -> dict[str, float]:
        """Return the mean loss over targets and its gradient's norm, without other losses, in which padding counts."""
        total, loss, model = sum(batch.target_count for batch in batches), 0.0, self._model(rung)
        with self.running(rung):
            for batch in batches:
                with self.autocast():
                    nll = model(batch).loss / total
                nll.backward()
                loss += nll.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return {"loss": loss, "gradient norm": norm.item()}

    def step(self, rung: Rung, batches: Sequence[Any]) -> None:
        """Take a training step on these batches."""
        model = self._model(rung)
        optimizer = self.peer_optimizer if rung.peer else self.optimizers["optimizer" in rung.plain]
        with self.running(rung):
            for batch in batches:
                with self.autocast():
                    losses = model(batch)
                losses.objective.backward()
            finish(model, optimizer, sum(batch.target_count for batch in batches))

    @contextmanager
    def running(self, rung: Rung) -> Iterator[None]:
        """Apply the rung's changes to the model within the block."""
        # torch counts the variants of a block in all ways together.
        with torch._dynamo.config.patch(recompile_limit=64), ExitStack() as stack:
            swap = lambda *args: stack.enter_context(patch.object(*args))  # noqa: E731
            if rung.peer:
                self.peer.attend_by(rung.peer)
                for block in self.peer.blocks() if rung.compiled else ():
                    swap(block, "forward", self._compiled(block, rung))
            else:
                self._change(rung, swap)
                if "casts" not in rung.plain:
                    stack.enter_context(self.copies)
            narrow = [block for block in self.model.blocks() if block.float8 and rung.float8]
            for parent, name, linear in converted(narrow, "tensorwise") if narrow else ():
                stack.enter_context(patch.dict(parent._modules, {name: linear}))
            yield

    def _change(self, rung: Rung, swap: Callable) -> None:
        """Replace functions and modules of the engine by those of the rung."""
        if "attention" in rung.plain:
            swap(decoder, "attention", plain.MaskedAttention() if rung.packed else plain.batched_attention)
            swap(vision, "attention", plain.batched_attention if self.same_size else plain.padded_attention)
        if "vision" in rung.plain:
            swap(vision, "patch_embed", patch_embed)
            swap(connector, "conv_block", plain.conv_block)
        for block in self.model.blocks():
            for experts in block.expert_layers().values() if "experts" in rung.plain else ():
                swap(experts, "backend", find("torch"))
            if rung.compiled and self._compilable(block, rung):
                swap(block, "forward", self._compiled(block, rung))

    def _compiled(self, block: nn.Module, rung: Rung) -> Callable:
        key = (block, rung.recompute, rung.baseline)
        if key not in self.compiled:
            again = rung.recompute != "none" and not getattr(block, "compiled_only", False)
            forward = recomputed(block.forward, rung.recompute) if again else block.forward
            # A plain baseline has batches of several shapes, which torch turns into variables from the second batch on.
            # A peer is compiled for one shape, which makes it fastest.
            dynamic = None if rung.baseline and not rung.peer else False
            # torch's dense attention makes constants of the segments' number and length.
            compiler = torch.compile if "attention" in rung.plain else compiled
            self.compiled[key] = compiler(forward, dynamic=dynamic)
        return self.compiled[key]

    def _compilable(self, block: BlockLayer, rung: Rung) -> bool:
        if block.compiled_only:  # for images of several sizes it loops over sizes, which change from batch to batch
            return self.same_size or "vision" not in rung.plain
        # torch's grouped_mm needs bf16.
        return not (block.expert_layers() and "experts" in rung.plain and self.dtype == "fp32")

    def ledger(self, rung: Rung) -> Ledger:
        """Return the operations of a step on the first set."""
        batches = self.sets[rung.packed][0]
        load = workload(batches[0]) if rung.packed else mix.load_of_padded(self.documents, batches)
        if rung.peer:
            load = self._peer_load(rung, load, batches)
        elif "attention" in rung.plain:
            rows = batches[0].media.grids.longest + self.config.vision.class_token
            pairs = load.tokens**2 if rung.packed else load.computed_pairs
            load = replace(load, computed_pairs=pairs, computed_patch_pairs=load.images * rows**2)
        return ledger(self.config, load, recompute=rung.recompute)

    def _peer_load(self, rung: Rung, load: Workload, batches: Sequence[Batch]) -> Workload:
        """Return the workload of transformers.

        It has no rows beyond those of documents (packed) and images, but it computes all pairs under a mask, and for
        padded documents the head on every row.
        """
        tokens = sum(load.documents) if rung.packed else load.tokens
        patches = [sum(h * w for h, w in batch.media.grids.sizes or ()) for batch in batches]
        one_row = not self.config.vision.class_token  # all images of a batch are in one row
        return replace(
            load, tokens=tokens, computed_expert_rows=tokens, images=len(load.grids), patches=sum(patches),
            computed_pairs=tokens**2 if rung.packed and rung.peer == "sdpa" else load.computed_pairs,
            computed_patch_pairs=sum(n**2 for n in patches) if one_row else None,
            computed_head_rows=None if rung.packed else tokens,
        )  # fmt: skip

    def data_seconds(self, rung: Rung) -> float:
        """Return the median seconds to make the batches of a step and to move them to the device."""
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            self._moved(self.layouts[rung.packed](self.documents))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        """Return the maximum memory that a step allocates on a GPU, or None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    def autocast(self) -> torch.autocast:
        """Return autocast to bf16, disabled for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def release(self) -> None:
        """Free both models, so that the GPU has memory for the next ones."""
        for name in ("model", "optimizers", "copies", "compiled", "peer", "peer_inputs", "peer_optimizer"):
            vars(self).pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _moved(self, batches: Sequence[Batch]) -> list[Batch]:
        return [batch.to(self.device) for batch in batches]

    def _variant(self, seconds: Sequence[float], way: Way) -> dict[str, Any]:
        median = statistics.median(seconds)
        return {
            **summary(seconds),
            "samples": list(seconds),
            "about" if way.rung.baseline else "change": way.rung.change,
            "tokens_per_s": self.shape["tokens"] / median,
            "images_per_s": self.shape["images"] / median,
            "mfu": way.ledger.mfu(median, self.peak),
            "hfu": way.ledger.hfu(median, self.peak),
            "padding": sum(way.ledger.padding.values()) / way.ledger.executed,
            "data_wait": way.data / (way.data + median),
            "compile_seconds": max(0.0, way.first - median) if way.rung.compiled else 0.0,
            "recompiles": way.recompiles,
            "cache_hits": way.cache_hits,
            "peak_bytes": way.peak_bytes,
        }


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, targets: int) -> None:
    """Divide the gradients by the number of targets, clip them and update the weights."""
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / targets)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizers(model: spec.Model) -> dict[bool, torch.optim.Optimizer]:
    """Return the engine's AdamW (False) and torch's with its defaults (True), which share their moments."""
    fused = adamw(model.named_parameters(), Train(), 0.0, learned_vectors(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fused.step()
    fused.zero_grad(set_to_none=True)
    eager = torch.optim.AdamW([{"params": group["params"]} for group in fused.param_groups], lr=0.0)
    for parameter, state in fused.state.items():
        eager.state[parameter] = state | {"step": state["step"].to("cpu", copy=True)}
    return {False: fused, True: eager}


def _sharing_moments(peer: TransformersModel, ours: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the engine's AdamW for the peer, with the moments of mm1's parameters of which the peer's are views."""
    optimizer = adamw(peer.named_parameters(), Train(), 0.0)
    owners = {parameter.untyped_storage().data_ptr(): state for parameter, state in ours.state.items()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if state := owners.get(parameter.untyped_storage().data_ptr()):
            shape = parameter.shape, parameter.stride(), parameter.storage_offset()
            moments = {name: state[name].as_strided(*shape) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments | {"step": state["step"].clone()}
    return optimizer


def _graphs() -> int:
    """Return the number of graphs that torch has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _cache_hits() -> int:
    """Return the number of graphs that Inductor or AOTAutograd read from disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
