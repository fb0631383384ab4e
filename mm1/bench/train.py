"""The training step from plain torch to everything on, one change a rung, and what others make of the same documents.

A step is what the trainer does: forward, backward, clipping, AdamW, on as many documents as fill one packed sequence.
All rungs and peers share weights and optimizer state, and the rate is 0, so that they take turns on the very same work
and a GPU holds one model. Before anything is timed each must give the first rung's loss and gradient norm.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from mm1.autotune.gpu_state import watched
from mm1.bench import mix, plain
from mm1.bench.peer_models import TransformersModel
from mm1.bench.record import Record, Row
from mm1.bench.roofline import ceilings
from mm1.bench.rungs import FULL, Rung, ladder, peers
from mm1.bench.timing import interleaved, noise, ratio, reason, summary
from mm1.engine.data.batch import Batch
from mm1.engine.layers import connector, decoder, vision
from mm1.engine.layers.float8 import converted
from mm1.engine.layers.layer import BlockLayer, learned_vectors
from mm1.engine.layers.workload import Workload
from mm1.engine.models import spec
from mm1.engine.models.mm1_config import MODELS, Model, named
from mm1.engine.models.registry import model_class
from mm1.engine.train.config import Train
from mm1.engine.train.ledger import Ledger, ledger, workload
from mm1.engine.train.optim import adamw
from mm1.engine.train.recompute import recomputed
from mm1.errors import UserError
from mm1.kernels.moe.backends import find
from mm1.kernels.patches.reference import patch_embed

SETS = 3  # of documents; the first is timed, the others show what is compiled again
TOLERANCES = {"loss": {"fp32": 1e-5, "bf16": 2e-3}, "gradient norm": {"fp32": 1e-4, "bf16": 3e-2}}
# Bytes of a GPU that holds what plain torch keeps for backward of 4096 tokens and their images; of less, half of them.
BIG = 100e9


class Size(NamedTuple):
    model: Model
    tokens: int  # of a packed sequence


def _resized(name: str, **changes: int) -> Model:
    model = named(name)
    return replace(model, decoder=replace(model.decoder, **changes))


SIZES = {name: Size(model, 768 if name == "digits" else 4096) for name, model in MODELS.items()} | {
    "digits-dense": Size(_resized("digits", experts=0), 768),
    "mm1-3b-moe-4x8": Size(_resized("mm1-3b-moe", layers=4, experts=8), 4096),  # what one GPU holds
}
DEFAULTS = {"cpu": ("digits", "digits-dense"), "cuda": ("mm1-1b", "mm1-3b-moe-4x8")}


def measure(record: Record, models: Sequence[str] = (), rounds: int | None = None, budget: float = 30.0) -> None:
    """Add a row for each model that the record lacks, and print it.

    models: of SIZES, none for some that suit the machine. rounds: of turns, or as many as `budget` seconds a model
    allow. A variant's "ratio" is its time over the first rung's; compiling takes longer where "cache_hits" is 0. Raises
    UserError for an unknown size.
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
            record.add(watched(lambda row=row, steps=steps: row | steps.row(rounds, budget)))


@dataclass
class Way:
    """A rung or a peer, once it was tried."""

    rung: Rung
    step: Callable[[], None]
    ledger: Ledger
    data: float  # seconds to make and move the batches of a step
    found: dict[str, float]  # what must be as the first rung's
    first: float  # seconds of the first forward and backward
    recompiles: int
    cache_hits: int  # graphs of the first step that were on disk
    peak_bytes: int | None


class Steps:
    """The model, its documents, and the ways to train on them."""

    def __init__(self, c: Model, tokens: int, device: str, dtype: str, peak: float):
        self.config, self.device, self.dtype, self.peak = c, torch.device(device), dtype, peak
        sets = [mix.documents(c, tokens, seed) for seed in range(SETS)]
        self.documents, self.same_size = sets[0], c.image_mode == "squash"
        self.layouts = {True: mix.packed(c, sets, tokens), False: mix.padded(c, tokens)}
        self.sets = {packed: [self._moved(layout(docs)) for docs in sets] for packed, layout in self.layouts.items()}
        torch.compiler.reset()  # the model before may have had the same blocks
        self.model = model_class(c.kind)(c).init_weights().to(device)
        self.optimizers = _optimizers(self.model)
        self.compiled: dict[tuple[nn.Module, str, bool], Callable] = {}

    def row(self, rounds: int | None, budget: float) -> Row:
        ways, failed = self.check(ladder(self.config, self.dtype))
        others, missing = self.check_peers(next(iter(ways.values()), None))
        ways, failed = ways | others, failed | missing
        samples = interleaved({name: way.step for name, way in ways.items()}, rounds=rounds, budget=budget)
        share, seconds, failed = noise(samples), samples.seconds, failed | samples.failed
        variants = {name: self._variant(seconds[name], way) for name, way in ways.items() if name in seconds}
        for name, variant in variants.items():
            variant["ratio"] = ratio(seconds[name], seconds[next(iter(variants))])
        _print(variants, failed, share)
        totals = self.ledger(FULL).totals()
        self.release()
        return {"shape": self.shape, "ledger": totals, "peak": self.peak, "noise": share, "variants": variants,
                "failed": failed}  # fmt: skip

    def check_peers(self, truth: Way | None = None) -> tuple[dict[str, Way], dict[str, str]]:
        """Do as `check` does, for transformers' ways, if it can build this model."""
        try:
            self.peer = TransformersModel(self.model)
            self.peer_inputs = {
                packed: [self.peer.inputs(batch, packed) for batch in sets[0]] for packed, sets in self.sets.items()
            }
        except Exception as error:
            return {}, {"transformers": "not installed" if isinstance(error, ImportError) else reason(error)}
        self.peer_optimizer = _sharing_moments(self.peer, self.optimizers[False])
        return self.check(peers(self.device.type), truth)

    @property
    def shape(self) -> dict[str, int]:
        packed, padded = self.sets[True][0][0], self.sets[False][0]
        return {
            "tokens": packed.used_tokens, "images": len(packed.media.grids.sizes or ()),
            "documents": len(self.documents), "targets": packed.target_count,
            "longest": max(len(d.tokens) for d in self.documents),
            "packed": len(packed.tokens), "padded": sum(len(batch.tokens) for batch in padded),
        }  # fmt: skip

    def check(self, rungs: Sequence[Rung], truth: Way | None = None) -> tuple[dict[str, Way], dict[str, str]]:
        """Return the rungs that give the loss and gradient norm of `truth` (None: the first), and why others do not."""
        ways: dict[str, Way] = {}
        failed: dict[str, str] = {}
        for rung in rungs:
            try:
                way = self.attempt(rung)
                if wrong := self.differs(way, truth or next(iter(ways.values()), way)):
                    failed[rung.name] = wrong
                else:
                    ways[rung.name] = way
                said = wrong or f"loss {way.found['loss']:.4f}, first {way.first:.1f} s"
            except Exception as error:
                said = failed[rung.name] = reason(error)
            self.model.zero_grad(set_to_none=True)
            print(f"  {rung.name:20} {said}", flush=True)
        return ways, failed

    def differs(self, way: Way, truth: Way) -> str | None:
        """Return how a way's results differ from the true ones, or None where they agree."""
        loose = 10 if way.rung.float8 else 1
        errors = {name: abs(way.found[name] - value) / abs(value) for name, value in truth.found.items()}
        wrong = [
            f"{name} differs by {e:.2g}" for name, e in errors.items() if not e <= loose * TOLERANCES[name][self.dtype]
        ]
        return f"{' and '.join(wrong)} from that of {truth.rung.name!r}" if wrong else None

    def attempt(self, rung: Rung) -> Way:
        """Run a rung for the first time, and return it with its results."""
        # A peer that is compiled is so for the timed batch alone: others would only make its shapes variables.
        batches, *others = [self.peer_inputs[rung.packed]] if rung.peer else self.sets[rung.packed]
        before, on_disk, begin = _graphs(), _cache_hits(), time.perf_counter()
        found = self._loss(rung, batches)
        first, once, on_disk = time.perf_counter() - begin, _graphs() - before, _cache_hits() - on_disk
        for other in others if rung.compiled else ():
            self._loss(rung, other)
        step = partial(self.step, rung, batches)
        peak = self.peak_bytes(step)
        recompiles = _graphs() - before - once
        data = self.data_seconds(rung)
        return Way(rung, step, self.ledger(rung), data, found, first, recompiles, on_disk, peak)

    def _model(self, rung: Rung) -> spec.Model | TransformersModel:
        return self.peer if rung.peer else self.model

    def _loss(self, rung: Rung, batches: Sequence[Any]) -> dict[str, float]:
        """Return the mean over targets and the norm of its gradient; a mixture's other losses see padding too."""
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
        """Let the model compute as the rung says."""
        # Every way's variants of a block count together.
        with torch._dynamo.config.patch(recompile_limit=64), ExitStack() as stack:
            swap = lambda *args: stack.enter_context(patch.object(*args))  # noqa: E731
            if rung.peer:
                self.peer.attend_by(rung.peer)
                for block in self.peer.blocks() if rung.compiled else ():
                    swap(block, "forward", self._compiled(block, rung))
            else:
                self._change(rung, swap)
            for parent, name, linear in converted(self.float8_blocks, "tensorwise") if rung.float8 else ():
                stack.enter_context(patch.dict(parent._modules, {name: linear}))
            yield

    def _change(self, rung: Rung, swap: Callable) -> None:
        """Put in place of the engine's functions and modules those that the rung names."""
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
            # Where batches are of several shapes, as torch chooses: from the second on with shapes as variables. A peer
            # is compiled for each of its shapes, which makes it fastest.
            dynamic = None if rung.baseline and not rung.peer else False
            self.compiled[key] = torch.compile(forward, dynamic=dynamic)
        return self.compiled[key]

    @property
    def float8_blocks(self) -> list[BlockLayer]:
        return [block for block in self.model.blocks() if block.float8]

    def _compilable(self, block: BlockLayer, rung: Rung) -> bool:
        if block.compiled_only:  # of images of several sizes a loop over sizes, another one each batch
            return self.same_size or "vision" not in rung.plain
        # torch's grouped_mm wants bf16.
        return not (block.expert_layers() and "experts" in rung.plain and self.dtype == "fp32")

    def ledger(self, rung: Rung) -> Ledger:
        """Return the operations of a step on the first set."""
        batches = self.sets[rung.packed][0]
        load = workload(batches[0]) if rung.packed else mix.load_of_padded(self.documents, batches)
        if rung.peer:
            load = self._peer_load(rung, load, batches)
        elif "attention" in rung.plain:
            rows = batches[0].media.grids.longest + self.config.vision.class_token
            pairs = load.tokens**2 if rung.packed else load.pairs
            load = replace(load, pairs=pairs, patch_pairs=load.images * rows**2)
        return ledger(self.config, load, recompute=rung.recompute)

    def _peer_load(self, rung: Rung, load: Workload, batches: Sequence[Batch]) -> Workload:
        """Return what transformers computes: no rows beyond the documents' (packed) and the images' own, but all pairs
        behind a mask, and, of padded documents, the head on every row."""
        tokens = sum(load.documents) if rung.packed else load.tokens
        patches = [sum(h * w for h, w in batch.media.grids.sizes or ()) for batch in batches]
        one_row = not self.config.vision.class_token  # of all images of a batch
        return replace(
            load, tokens=tokens, routed=tokens, images=len(load.grids), patches=sum(patches),
            pairs=tokens**2 if rung.packed and rung.peer == "sdpa" else load.pairs,
            patch_pairs=sum(n**2 for n in patches) if one_row else None,
            heads=None if rung.packed else tokens,
        )  # fmt: skip

    def data_seconds(self, rung: Rung) -> float:
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            self._moved(self.layouts[rung.packed](self.documents))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def peak_bytes(self, step: Callable[[], None]) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def release(self) -> None:
        """Free both models, so that a GPU has room for the next."""
        for name in ("model", "optimizers", "compiled", "peer", "peer_inputs", "peer_optimizer"):
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
    """Divide the gradients by the targets, clip them and update the weights."""
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / targets)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizers(model: spec.Model) -> dict[bool, torch.optim.Optimizer]:
    """Return AdamW by whether it is plain: the engine's, and torch's as it comes; they share their moments."""
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
    """Return the engine's AdamW for the peer; a parameter that is part of one of ours has that one's moments."""
    optimizer = adamw(peer.named_parameters(), Train(), 0.0)
    owners = {parameter.untyped_storage().data_ptr(): state for parameter, state in ours.state.items()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if state := owners.get(parameter.untyped_storage().data_ptr()):
            shape = parameter.shape, parameter.stride(), parameter.storage_offset()
            moments = {name: state[name].as_strided(*shape) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments | {"step": state["step"].clone()}
    return optimizer


def _graphs() -> int:
    """Return how many graphs torch has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _cache_hits() -> int:
    """Return how many graphs Inductor or AOTAutograd had on disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def _print(variants: dict[str, Any], failed: dict[str, str], share: float | None) -> None:
    print(f"  {'':20} {'ms':>8} {'(range)':>17} {'×':>6} {'tokens/s':>9} {'images/s':>9} {'MFU':>6} {'HFU':>6}"
          f" {'padding':>8} {'data':>6} {'compile':>8} {'again':>5} {'GB':>6}")  # fmt: skip
    for name, v in variants.items():
        memory = "" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 1e9:.1f}"
        print(
            f"  {name:20} {1e3 * v['median']:8.1f} {1e3 * v['low']:8.1f}…{1e3 * v['high']:<8.1f}"
            f" {1 / v['ratio']['median']:6.2f} {v['tokens_per_s']:9.0f} {v['images_per_s']:9.1f} {v['mfu']:6.1%}"
            f" {v['hfu']:6.1%} {v['padding']:8.1%} {v['data_wait']:6.1%} {v['compile_seconds']:7.1f}s"
            f" {v['recompiles']:5} {memory:>6}"
        )
    for name, why in failed.items():
        print(f"  {name}: {why}")
    if share is not None:
        print(f"  two runs of the same differ by {share:.1%}", flush=True)
