"""Training: one step is visible in `_step`, everything that must survive is in `_state`.

A step reads nothing back from the device: whether its gradients are finite decides there if AdamW changes anything.
What it gave is read when the next one is on its way, so that a GPU never waits for the host.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm1.engine import checkpoint, safety
from mm1.engine.config import Run, from_dict, peak_lr, to_dict
from mm1.engine.data.document import Budget, DocumentEncoder, TextTokenizer
from mm1.engine.data.feed import Feed, Streams, merged
from mm1.engine.data.identity import identity, mean_length
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.packing import BUFFER, Loader
from mm1.engine.data.quarantine import Quarantine, read_lines, write_lines
from mm1.engine.data.record import DataError
from mm1.engine.data.sources import open_source
from mm1.engine.display import Display, Silent
from mm1.engine.float8 import float8_linears
from mm1.engine.model import MM1, parameter_counts
from mm1.engine.optim import adamw, learning_rate
from mm1.engine.parallel import World, cut_like, dropped, local, put
from mm1.engine.recompute import recompute_blocks

WARM = 2  # steps, after which nothing is compiled any more
SUMS = ("loss", "load_balance", "z_loss", "tokens", "targets", "images", "stop", "data", "dropped", "norm")


def train(
    run: Run, folder: Path, *, resume: bool = False, display: Display | None = None, profile: bool = False
) -> MM1:
    """Train to run.train.steps, writing checkpoints and metrics.jsonl into `folder`; returns the model.

    Under torchrun on all its processes. resume continues from the newest complete checkpoint, bit-exactly on the same
    machine with the same number of threads and processes, or starts if there is none. SIGTERM, SIGUSR1 and Ctrl-C save
    before they stop. profile: of steps behind the first leave a trace and a table in folder/profile (see profile.py).
    """
    world = World(run.parallel)
    try:
        shown = display or (Display(folder, run.train) if world.first else Silent())
        trainer = Trainer(run, folder, shown, resume, world)
        if profile:
            from mm1.engine.profile import profile as watch

            watch(trainer, folder / "profile")
        trainer.fit()
        return trainer.model
    finally:
        world.close()


class Pending(NamedTuple):
    """A step that is under way."""

    step: int
    sums: Tensor  # of SUMS, on the host once `arrived`
    arrived: Any  # CUDA event, or None
    keys: list[str]  # of its documents on this process
    before: dict[str, Any]  # state of this process's data before it
    known: dict[str, Any]  # metrics that the host knows

    def named(self) -> dict[str, float]:
        """SUMS by name; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(SUMS, self.sums.tolist()))


class Trainer:
    def __init__(self, run: Run, folder: Path, display: Any, resume: bool, world: World | None = None):
        t = run.train
        self.run, self.folder, self.display, self.world = run, folder, display, world or World()
        self.device = self.world.device
        self.dtype = _dtype(t.dtype, self.device)
        newest = checkpoint.latest(folder) if resume else None
        if not resume and checkpoint.latest(folder) is not None:
            raise DataError(f"{folder} holds a run already: give another folder, or --resume to continue it")
        if not run.data.sources:
            raise DataError("no data is given: name a .toml file with [[data.sources]] of kind and paths")
        self.world.wait()  # until all have looked
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = TextTokenizer(run.data.tokenizer)
        if len(self.tokenizer) > run.model.decoder.vocabulary:
            raise DataError(
                f"{run.data.tokenizer} has {len(self.tokenizer)} tokens, the model {run.model.decoder.vocabulary}"
            )
        state = checkpoint.read_json(newest, "state.json") if newest else None
        # Processes of a tensor group draw the same records, and one of them lists the bad ones.
        quarantine = folder / "quarantine" if self.world.rank % run.parallel.tensor == 0 else None
        self.streams = make_streams(
            run, self.tokenizer, quarantine, display.warn, self.world.data_rank, self.world.data_size,
            len(state["data"]["streams"]) if state else 0,
        )  # fmt: skip
        # Written down: whoever goes on with the run may have another number of processes.
        self.run = run = replace(run, data=replace(run.data, streams=self.streams.streams))
        torch.manual_seed(t.seed)
        with torch.device("meta"):
            self.model = MM1(run.model)
        if t.float8 != "none":
            if run.parallel.tensor > 1:
                raise DataError("settings train.float8 and parallel.tensor > 1 are not made for each other")
            float8_linears(self.model.decoder, t.float8)
        self.world.place(self.model, self.dtype)
        self.model.to_empty(device=self.device).initialize(t.seed, put)
        for buffer in self.model.buffers():
            buffer.zero_()
        self.peak = t.peak_lr or peak_lr(_law_parameters(run))
        # What the optimizer sees: the parameters, or what of them is here.
        self.held: dict[str, nn.Parameter] = {
            name: p if local(p) is p else nn.Parameter(local(p.detach())) for name, p in self.model.named_parameters()
        }  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer = adamw(self.held.values(), t, self.peak)
        self.stop = safety.Stop()
        self.step = self.left_out = self.rewinds = 0
        self.saving: checkpoint.Saving | None = None
        if newest is None and t.init:
            checkpoint.check(Path(t.init))
            checkpoint.read_into(Path(t.init), {name: p.detach() for name, p in self.model.named_parameters()})
        if newest is not None:
            self.take_up(newest)
        if self.world.first and newest is not None:
            self._saved(newest)  # a kill may have come before
        if self.world.first and self.step < t.steps:
            # Drop what a run wrote after the checkpoint it is resumed from; damage (position -1) is listed anew.
            ends = {int(i): s["position"] for i, s in state["data"]["streams"].items()} if state else {}
            _keep_lines(folder / "metrics.jsonl", lambda line: line["step"] <= self.step)
            for warning in self.streams.quarantine.trim(ends):
                display.warn(warning)
        self.world.wait()
        if t.recompute != "none":
            recompute_blocks(self.model, t.recompute)
        if t.compile:
            safety.load_compiled(folder)
            # Experts that are sharded otherwise than their block are gathered inside of it, where its graph breaks.
            self.model.compile_blocks(fullgraph=t.recompile == "error" and run.parallel.expert == 1)

    def take_up(self, folder: Path) -> None:
        """Where the run was that wrote this checkpoint."""
        self._restore(folder)
        state = checkpoint.read_json(folder, "state.json")
        self.streams.restore(state["data"])
        self.rewinds = state["rewinds"]

    def fit(self) -> None:
        t = self.run.train
        begun, pending = self.step, deque[Pending]()
        with self.stop, safety.Watch(t.hang) as watch, self.display.run(self.step):
            try:
                with safety.no_recompiles(t.recompile, t.compile) as warm:
                    while self.step < t.steps and not self.stop.agreed:
                        pending.append(self._step())
                        self.step += 1
                        watch.alive()
                        due = self.step % t.save_every == 0 or self.step == t.steps
                        while len(pending) > (0 if due or self.device.type == "cpu" else 1):
                            self._settle(pending.popleft(), pending)
                        if due:
                            self.save()
                        if self.step == begun + WARM:
                            warm()
                            if t.compile and self.world.first:
                                safety.save_compiled(self.folder)
                while pending:
                    self._settle(pending.popleft(), pending)
                if self.stop.agreed and self.step % t.save_every and self.step < t.steps:
                    self.save()
                self._finish_saving()
            finally:
                self.feed.close()
        if self.stop.agreed and self.step < t.steps:
            raise KeyboardInterrupt

    @cached_property
    def feed(self) -> Feed:
        return Feed(self.streams, self.device)

    def _step(self) -> Pending:
        t, model, before = self.run.train, self.model, self.feed.state
        begin, waited = time.perf_counter(), 0.0
        losses_sum = torch.zeros(3, dtype=torch.float64, device=self.device)
        tokens = targets = images = data = 0
        keys: list[str] = []
        for _ in range(t.accumulate // self.world.data_size):
            asked = time.perf_counter()
            batch = next(self.feed)
            waited += time.perf_counter() - asked
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses = model(batch)
                objective = model.objective(losses, batch.target_count)
            objective.backward()
            losses_sum += torch.stack(losses).detach()
            tokens, targets, images = (
                tokens + batch.used_tokens, targets + batch.target_count, images + len(batch.grids.sizes or ())
            )  # fmt: skip
            data += batch.digest
            keys += batch.keys
        gradients = self._gradients()
        counts = torch.tensor([tokens, targets, images, self.stop.asked, data], dtype=torch.float64)
        square = self.world.square_norm(p.grad for p in model.parameters() if p.grad is not None)
        scalars = torch.stack([dropped(model).double(), square.double()])
        sums = self.world.sum(torch.cat([losses_sum, counts.to(self.device, non_blocking=True), scalars]))
        # Gradients were summed over target tokens: the mean is that of the whole step, whoever had how many.
        mean = 1 / sums[4].clamp(min=1)
        sums[-1] = norm = sums[-1].sqrt() * mean
        bad = ~(sums[0] + norm).isfinite() | (sums[4] == 0)
        factor = torch.where(bad, 0.0, mean * (t.clip / (norm + 1e-6)).clamp(max=1))
        torch._foreach_mul_(gradients, factor.float())
        rate = learning_rate(self.step, t, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]  # fused AdamW obeys
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.grad = None
        arrived = None
        if self.device.type == "cuda":
            sums = sums.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        known = {"lr": rate, "skipped": self.feed.skipped, "data_seconds": waited}
        known["seconds"] = time.perf_counter() - begin
        return Pending(self.step + 1, sums, arrived, keys, before, known)

    def _gradients(self) -> list[Tensor]:
        """Those of `held`."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.held[name].grad = local(parameter.grad)
        return [p.grad for p in self.held.values() if p.grad is not None]

    def _settle(self, done: Pending, pending: deque[Pending]) -> None:
        """Show what a step gave, and decide what follows; as `sums` are the same on all processes, so is that."""
        sums, accumulate = done.named(), self.run.train.accumulate
        self.stop.agreed = self.stop.agreed or sums["stop"] > 0
        if sums["targets"] and math.isfinite(sums["loss"] + sums["norm"]):
            self.left_out = 0
            budget = self.streams.budget
            metrics = {
                "loss": sums["loss"] / sums["targets"],
                "load_balance": sums["load_balance"] / accumulate,
                "z_loss": sums["z_loss"] / accumulate,
                "grad_norm": sums["norm"],
                **{name: int(sums[name]) for name in ("tokens", "targets", "images")},
                "fill": sums["tokens"] / (budget.tokens * accumulate),
                "image_fill": sums["images"] / (budget.images * accumulate),
                "dropped": int(sums["dropped"]),
                "data": int(sums["data"]),
                **done.known,
            }
            self.display.step(done.step, metrics)
            return
        why = "no target tokens" if not sums["targets"] else f"loss {sums['loss']}, gradient norm {sums['norm']}"
        note = {"step": done.step, "why": why, "keys": done.keys, "data": done.before, "sums": repr(sums)}
        path = self.folder / "left-out" / f"step-{done.step:08d}-{self.world.rank}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(note, indent=1))
        self.display.left_out(done.step, f"{why}: left out, see {path}")
        if not sums["targets"]:
            return
        self.left_out += 1
        if self.left_out > self.run.train.skips:
            pending.clear()
            self._rewind(f"{why} at step {done.step}, {done.keys[0] if done.keys else 'no documents'}")

    def _rewind(self, why: str) -> None:
        """To the last checkpoint, but not to its data: what follows may be better."""
        self._finish_saving()
        newest = checkpoint.latest(self.folder)
        if newest is None or self.rewinds == self.run.train.rewinds:
            raise FloatingPointError(f"{why}; {self.left_out} steps in a row, rewound {self.rewinds} times")
        self.rewinds, self.left_out = self.rewinds + 1, 0
        self._restore(newest)
        self.display.warn(f"{why}: back to {newest.name}, on with the data behind it")

    def save(self) -> None:
        self._finish_saving()
        folder, data = self.folder / f"step-{self.step:08d}", merged(self.world.gather(self._data_state()))
        texts = {
            "config.json": json.dumps(to_dict(self.run), indent=1),
            "tokenizer.json": Path(self.run.data.tokenizer).read_text(),
            "state.json": json.dumps(self._state(data)),
        }
        after = lambda: self._saved(folder)  # noqa: E731
        if self.world.size > 1:
            self.saving = checkpoint.write_sharded(folder, self._tensors(), texts, self.world, after)
        else:
            optimizer = {name: x for name, x in self._tensors().items() if name not in self.held}
            weights = dict(self.model.state_dict())
            checkpoint.write(folder, {"model.safetensors": weights, "optimizer.safetensors": optimizer}, texts)
            after()

    def _saved(self, folder: Path) -> None:
        checkpoint.point(self.folder / "checkpoint", folder)
        checkpoint.prune(self.folder, self.run.train.keep)

    def _finish_saving(self) -> None:
        if self.saving is not None:
            self.saving.wait()
            self.saving = None

    def _data_state(self) -> dict[str, Any]:
        return self.feed.state if "feed" in vars(self) else self.streams.state()

    def _state(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"step": self.step, "data": data, "rewinds": self.rewinds, "rng": torch.get_rng_state().tolist()}

    def _tensors(self) -> dict[str, Tensor]:
        """Weights by name, and the optimizer's state by name/key, each cut as its parameter is."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            held, found[name] = self.held[name], parameter.detach()
            if not self.optimizer.state[held]:
                zeros = {key: torch.zeros_like(held) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[held] = {"step": torch.zeros((), device=self.device), **zeros}
            for key, value in self.optimizer.state[held].items():
                found[f"{name}/{key}"] = cut_like(value, parameter) if value.ndim else value
        return found

    def _restore(self, folder: Path) -> None:
        checkpoint.check(folder)
        before = from_dict(checkpoint.read_json(folder, "config.json"))
        if before.model != self.run.model:
            raise DataError(f"{folder} holds another model than this run's; resume with the settings it began with")
        checkpoint.read_into(folder, self._tensors())
        state = checkpoint.read_json(folder, "state.json")
        self.step = state["step"]
        torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))


def make_streams(
    run: Run, tokenizer: TextTokenizer, quarantine: Path | None, warn: Callable[[str], None] = print, rank: int = 0,
    ranks: int = 1, count: int = 0, before: dict[str, Any] | None = None,
) -> Streams:  # fmt: skip
    """Return packed batches of the run's sources, those of one of `ranks` processes.

    quarantine: folder of the lists of bad records. count: packers, if a run had them before. before: identity of the
    data in the checkpoint that is resumed; its mean lengths mix the sources as they did, in place of new estimates.
    Raises DataError for whatever is wrong with the sources.
    """
    d, m, t = run.data, run.model, run.train
    count = count or d.streams or (4 * ranks if ranks > 1 else 1)
    for name, number in (("data.streams", count), ("train.accumulate", t.accumulate)):
        if number % ranks:
            raise DataError(f"setting {name} is {number}, expected a multiple of the {ranks} processes that take data")
    policy = ImagePolicy(m.vision.patch, m.image_mode, m.image_size, m.image_patches, m.image_parts)
    budget = Budget(
        tokens=d.tokens,
        images=d.images,
        patches=d.patches or d.images * policy.longest,
        documents=d.documents or max(1, d.tokens // 16),
        longest=policy.longest,
    )
    views = 1 if m.image_parts == 1 else 1 + m.image_parts**2
    for name, size, needed in (
        ("tokens", budget.tokens, views * m.connector.tokens + 2),
        ("images", budget.images, views),
        ("patches", budget.patches, views * policy.longest),
    ):
        if size < needed:
            raise DataError(f"setting data.{name} is {size}, too few for one image, expected {needed}")
    buffer = d.buffer or BUFFER * d.tokens
    if buffer < d.tokens:
        raise DataError(f"setting data.buffer is {buffer} tokens, expected at least data.tokens ({d.tokens}), or 0")
    encode = DocumentEncoder(tokenizer, policy, m.connector.tokens, budget)
    sources = [open_source(source.kind, source.paths, Path.cwd()) for source in d.sources]
    damage = [reported for source in sources for reported in source.damage]
    for shard, reason in damage if rank == 0 else ():
        warn(f"{shard}: {reason}")
    names = [mean_length(i) for i in range(len(sources))]
    lengths = [before[name] for name in names] if before and before.keys() >= {*names} else None
    mixture = Mixture(sources, [source.weight for source in d.sources], encode, t.seed, lengths)
    if not d.documents:  # as many as there are of the source with the shortest ones, and a quarter more
        shortest = min(mixture.mean_lengths)
        budget = replace(budget, documents=max(budget.documents, math.ceil(1.25 * d.tokens / shortest)))
    listed = Quarantine(quarantine, rank)
    loaders = {
        i: Loader(
            mixture, budget, image_id=tokenizer.image, patch=m.vision.patch, slots=m.connector.tokens, buffer=buffer,
            workers=d.workers, max_bad=d.max_bad, quarantine=listed, damage=damage if i == 0 else (), first=i,
            stride=count,
        )
        for i in range(rank, count, ranks)
    }  # fmt: skip
    values = identity(run, budget, buffer, count, sources, mixture.mean_lengths)
    told = warn if rank == 0 else lambda message: None
    return Streams(loaders, count, rank, ranks, identity=values, quarantine=listed, warn=told)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _law_parameters(run: Run) -> int:
    """N of the learning-rate law: the dense decoder without embeddings, also for a mixture (paper, section 3.4)."""
    counts = parameter_counts(run.model)
    return counts.get("decoder_dense_non_embedding", counts["decoder_non_embedding"])


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop all other lines of a JSON-lines file, at once; a kill may have cut the last one short."""
    if path.exists():
        write_lines(path, [line for line in read_lines(path)[0] if keep(line)])
