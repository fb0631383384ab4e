"""Training: `_step` computes one step, `_state` holds what must survive a restart.

A step reads nothing back from the device: whether its gradients are finite decides there if AdamW changes anything.
Its results are read when the next step is on its way, so that a GPU never waits for the host.
"""

import json
import logging
import math
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm1.engine.data.document import TextTokenizer
from mm1.engine.data.feed import Feed
from mm1.engine.data.identity import differences
from mm1.engine.data.lines import read_lines, write_lines
from mm1.engine.data.streams import make_streams, merged
from mm1.engine.data.tokenizer import vocabulary_size
from mm1.engine.layers.experts import load
from mm1.engine.layers.float8 import float8_linears
from mm1.engine.models.mm1 import MM1, parameter_counts
from mm1.engine.models.mm1_config import peak_lr
from mm1.engine.run_config import Run, changes, stored_model, to_dict
from mm1.engine.train import checkpoint, safety
from mm1.engine.train.display import Display, Silent, logged
from mm1.engine.train.optim import adamw, learning_rate
from mm1.engine.train.parallel import World, cut_like, local, put
from mm1.engine.train.recompute import recompute_blocks
from mm1.errors import UserError

DROPS = 0.001  # of the routed slots, above which a run warns once
SUMS = (
    "loss", "load_balance", "z_loss", "tokens", "targets", "images", "stop", "interrupted", "saved", "data", "norm",
)  # fmt: skip
PARTS = ("vision", "connector", "decoder")
log = logging.getLogger(__name__)


def train(
    run: Run, folder: Path, *, resume: bool = False, display: Display | None = None, profile: bool = False,
    accept_other_data: bool = False,
) -> MM1:  # fmt: skip
    """Train to run.train.steps, writing checkpoints and metrics.jsonl into `folder`; returns the model.

    Under torchrun it runs on all processes. resume continues from the newest whole checkpoint, bit-exactly on the same
    machine with the same number of threads and processes, or starts if there is none. accept_other_data: continue, or
    begin from train.init, even if the data or the tokenizer are others than the checkpoint's. profile: leave a trace
    and a table of some steps in folder/profile (see profile.py).

    SIGTERM, SIGUSR1 and Ctrl-C save and raise safety.Stopped. Raises UserError for settings, data or a folder that
    cannot be used, SaveError if no checkpoint can be written, FloatingPointError if too many losses are not finite.
    """
    safety.follow_launcher()
    world = World(run.parallel, run.train.hang)
    with ExitStack() as stack:
        stack.callback(world.close)
        world.on_first(lambda: stack.enter_context(safety.locked(folder)))
        shown = display or (Display(folder, run.train) if world.first else Silent())
        if isinstance(shown, Display):
            stack.enter_context(logged(shown.console))
        trainer = Trainer(run, folder, shown, resume, world, accept_other_data)
        if profile:
            from mm1.engine.train.profile import profile as watch

            watch(trainer, folder / "profile")
        trainer.fit()
        return trainer.model


class Pending(NamedTuple):
    """A step that is under way."""

    step: int
    sums: Tensor  # of SUMS and of the slots of experts, on the host once `arrived`
    arrived: Any  # CUDA event, or None
    keys: list[str]  # of its documents on this process
    before: dict[str, Any]  # this process's data position before the step
    known: dict[str, Any]  # metrics that do not come from the device

    def named(self) -> dict[str, float]:
        """SUMS by name; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(SUMS, self.sums.tolist()))


class Trainer:
    """A run between two steps. The arguments are those of `train`."""

    def __init__(
        self, run: Run, folder: Path, display: Any, resume: bool, world: World | None = None,
        accept_other_data: bool = False,
    ):  # fmt: skip
        t = run.train
        self.run, self.folder, self.display, self.world = run, folder, display, world or World()
        self.device = self.world.device
        self.dtype = _dtype(t.dtype, self.device)
        if not run.data.sources:
            raise UserError("setting data.sources is empty: train a .toml file with [[data.sources]] of kind and paths")
        newest = checkpoint.newest_whole(folder, self.world, display.warn) if resume else None
        if not resume and self.world.on_first(lambda: checkpoint.latest(folder)) is not None:
            raise UserError(f"{folder} holds a run already: give another folder, or --resume to continue it")
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = TextTokenizer(_tokenizer_path(run, newest))
        if len(self.tokenizer) > run.model.decoder.vocabulary:
            raise UserError(
                f"setting model.decoder.vocabulary is {run.model.decoder.vocabulary}, but {self.tokenizer.path} has"
                f" {len(self.tokenizer)} tokens: set model.decoder.vocabulary = {vocabulary_size(len(self.tokenizer))}"
            )
        context = max(run.data.tokens, run.model.context or 0, _context_before(run, newest))
        self.run = run = replace(run, model=replace(run.model, context=context))
        state = checkpoint.read_json(newest, "state.json") if newest else None
        # Processes of a tensor group draw the same records, and one of them lists the bad ones.
        quarantine = folder / "quarantine" if self.world.rank % run.parallel.tensor == 0 else None
        self.streams = make_streams(
            run, self.tokenizer, quarantine, display.warn, self.world.data_rank, self.world.data_size,
            len(state["data"]["streams"]) if state else 0, state.get("identity") if state else None,
        )  # fmt: skip
        other_data = []
        if state:
            unknown = ["the checkpoint does not say on which"]  # as one of an earlier version of mm1
            before = state.get("identity")
            other_data = differences(before, self.streams.identity) if before else unknown
        if other_data and not accept_other_data:
            raise UserError(
                f"{newest} was trained on other data than this run's: {'; '.join(other_data)}; "
                "--accept-other-data continues all the same, from the stored position in the new data"
            )
        # Written down: whoever goes on with the run may have another number of processes.
        self.run = run = replace(run, data=replace(run.data, streams=self.streams.streams))
        torch.manual_seed(t.seed)
        with torch.device("meta"):
            self.model = MM1(run.model)
        if t.float8 != "none":
            if run.parallel.tensor > 1:
                raise UserError(f"setting parallel.tensor is {run.parallel.tensor}, expected 1 beside train.float8")
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
        self.optimizer = adamw(self.held.items(), t, self.peak)
        self.stop = safety.Stop()
        self.step = self.rewinds = 0
        self.bad_steps = 0  # in a row, up to the last one, whose loss or gradient was not finite
        self.drops_shown = False
        self.saving: checkpoint.Saving | None = None
        self.rewound_to: Path | None = None  # until a step is good
        self.save_due, self.last_saved, self.failed_saves = False, -1, 0  # failed_saves: in a row
        self.settled = time.perf_counter()  # when the results of the step before were read
        if newest is None and t.init:
            self._begin_from(Path(t.init), accept_other_data)
        if newest is not None:
            self.resume_from(newest, bool(other_data))
            log.info("resumed at step %d from %s", self.step, newest)
        self.world.on_first(lambda: self._tidy(newest, state))
        counts = parameter_counts(run.model)
        log.info(
            "%.3g M parameters (vision %.3g, connector %.3g, decoder %.3g) on %s in %s, %s",
            sum(counts[part] for part in PARTS) / 1e6, *(counts[part] / 1e6 for part in PARTS), self.device,
            str(self.dtype).removeprefix("torch."), self.world,
        )  # fmt: skip
        if t.recompute != "none":
            recompute_blocks(self.model, t.recompute)
        if t.compile:
            safety.load_compiled(folder)
            # Experts that are sharded otherwise than their block are gathered inside of it, where its graph breaks.
            self.model.compile_blocks(fullgraph=t.recompile == "error" and run.parallel.expert == 1)

    def _tidy(self, newest: Path | None, state: dict[str, Any] | None) -> None:
        """Finish what a kill after the checkpoint interrupted, and drop what the run wrote behind it."""
        if newest is not None:
            self._saved(newest)
        if self.step < self.run.train.steps:
            ends = {int(i): s["position"] for i, s in state["data"]["streams"].items()} if state else {}
            self._drop_later_metrics()
            for warning in self.streams.quarantine.trim(ends):
                self.display.warn(warning)

    def resume_from(self, folder: Path, other_data: bool = False) -> None:
        """Restore weights, optimizer, random state, data position and step of a checkpoint.

        other_data: of the packers' state restore the position alone, without documents that are not in these data.
        """
        self._restore(folder)
        state = checkpoint.read_json(folder, "state.json")
        for stream in state["data"]["streams"].values() if other_data else ():
            stream["waiting"] = []
        self.streams.restore(state["data"])
        self.rewinds = state["rewinds"]

    def _begin_from(self, folder: Path, accept_other_tokenizer: bool) -> None:
        """Take the weights of another run's checkpoint, or of one that `mm1 convert` made."""
        folder = checkpoint.newest_in(folder)
        self.world.together(lambda: checkpoint.check(folder, self.world.rank, self.world.size))
        theirs = folder / "tokenizer.json"
        if not accept_other_tokenizer and TextTokenizer(theirs).vocabulary != self.tokenizer.vocabulary:
            raise UserError(
                f"{self.tokenizer.path} gives other token ids than {theirs}, with which the weights of train.init were "
                f"trained: set data.tokenizer to that file, or pass --accept-other-data"
            )
        checkpoint.read_into(folder, {name: p.detach() for name, p in self.model.named_parameters()})

    def fit(self) -> None:
        """Train to the last step, or until a signal: then save and raise safety.Stopped."""
        t = self.run.train
        begun, pending, self.settled = self.step, deque[Pending](), time.perf_counter()
        if t.compile and self.step < t.steps:
            log.info("compiling each kind of block: the first steps take longer")
        with self.stop, safety.Watch(t.hang) as watch, self.display.run(self.step):
            try:
                with safety.no_recompiles(t.recompile, t.compile) as warm:
                    while self.step < t.steps and not self.stop.agreed:
                        pending.append(self._step())
                        self.step += 1
                        watch.alive()
                        self.save_due = self.save_due or self.step % t.save_every == 0 or self.step == t.steps
                        while len(pending) > (0 if self.save_due or self.device.type == "cpu" else 1):
                            self._settle(pending.popleft(), pending)
                        if self.save_due:
                            self._save_if_sound()
                            self.settled = time.perf_counter()
                        if self.step == begun + safety.WARM:
                            warm()
                            if t.compile and self.world.first:
                                safety.save_compiled(self.folder)
                while pending:
                    self._settle(pending.popleft(), pending)
                stopped = self.stop.agreed and (self.step < t.steps or self.save_due)
                if stopped and self.step != self.last_saved:
                    self._save_if_sound()
                self._finish_saving(final=True)
            except Exception:
                if self.saving is not None:  # what ends the run shall not end the save that is on its way
                    with suppress(Exception):
                        self.saving.wait()
                raise
            finally:
                self.feed.close()
        newest = checkpoint.latest(self.folder)
        if stopped:
            saved = "nothing is saved" if newest is None else f"--resume continues from {newest}"
            raise safety.Stopped(f"stopped at step {self.step}; {saved}", self.stop.any_interrupted)
        log.info("trained to step %d; the checkpoint is %s", self.step, newest)
        if bad := len(self.streams.quarantine.records()) if self.world.first else 0:
            log.info("left out %d different unreadable records, listed in %s", bad, self.folder / "quarantine")

    @cached_property
    def feed(self) -> Feed:
        return Feed(self.streams, self.device)

    def _step(self) -> Pending:
        t, model, before = self.run.train, self.model, self.feed.state
        waited = 0.0
        losses_sum = torch.zeros(3, dtype=torch.float64, device=self.device)
        tokens = targets = images = data = 0
        slots: Any = 0
        keys: list[str] = []
        for _ in range(t.accumulate // self.world.data_size):
            asked = time.perf_counter()
            batch = next(self.feed)
            waited += time.perf_counter() - asked
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses = model(batch)
                objective = model.objective(losses, batch.target_count)
            objective.backward()
            losses_sum += torch.stack([losses.nll, losses.load_balance, losses.z_loss]).detach()
            slots = losses.slots + slots
            tokens, targets, images = (
                tokens + batch.used_tokens, targets + batch.target_count, images + len(batch.media.grids.sizes or ())
            )  # fmt: skip
            data += batch.digest
            keys += batch.keys
        gradients = self._local_gradients()
        saved = self.saving is not None and self.saving.done
        counts = [tokens, targets, images, self.stop.asked, self.stop.interrupted, saved, data]
        counts = torch.tensor(counts, dtype=torch.float64)
        square = self.world.square_norm(p.grad for p in model.parameters() if p.grad is not None)
        counts = counts.to(self.device, non_blocking=True)
        sums = self.world.sum(torch.cat([losses_sum, counts, square.double()[None], slots.flatten().double()]))
        # Gradients were summed over target tokens: the mean is that of the whole step, whoever had how many.
        mean = 1 / sums[4].clamp(min=1)
        at = SUMS.index("norm")
        sums[at] = norm = sums[at].sqrt() * mean
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
        known = {"lr": rate, "skipped": self.feed.skipped, "rewinds": self.rewinds, "data_seconds": waited}
        return Pending(self.step + 1, sums, arrived, keys, before, known)

    def _local_gradients(self) -> list[Tensor]:
        """Return this process's part of the gradients, in the optimizer's order."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.held[name].grad = local(parameter.grad)
        return [p.grad for p in self.held.values() if p.grad is not None]

    def _settle(self, done: Pending, pending: deque[Pending]) -> None:
        """Show the results of a step and decide what follows; `sums` are the same on all processes, and so is that."""
        sums, accumulate = done.named(), self.run.train.accumulate
        self.stop.agreed = self.stop.agreed or sums["stop"] > 0
        self.stop.any_interrupted = self.stop.any_interrupted or sums["interrupted"] > 0
        if sums["saved"] == self.world.data_size:
            self._finish_saving()
        # Of one step after another: on a GPU the host alone is ahead of its work, and waits for it in named().
        seconds, self.settled = time.perf_counter() - self.settled, time.perf_counter()
        if sums["targets"] and math.isfinite(sums["loss"] + sums["norm"]):
            self.bad_steps, self.rewound_to = 0, None
            budget = self.streams.budget
            metrics = {
                "loss": sums["loss"] / sums["targets"],
                "load_balance": sums["load_balance"] / accumulate,
                "z_loss": sums["z_loss"] / accumulate,
                "grad_norm": sums["norm"],
                **{name: int(sums[name]) for name in ("tokens", "targets", "images")},
                "fill": sums["tokens"] / (budget.tokens * accumulate),
                "image_fill": sums["images"] / (budget.media * accumulate),
                "data": int(sums["data"]),
                **load(done.sums[len(SUMS) :].view(-1, self.run.model.decoder.experts + 1)),
                **done.known,
                "seconds": seconds,
            }
            if metrics.get("dropped", 0.0) > DROPS and not self.drops_shown:
                self.drops_shown = True
                share = f"experts were full and dropped {metrics['dropped']:.1%} of the routed slots"
                self.display.warn(f"step {done.step}: {share}; raise parallel.capacity, or leave it out to drop none")
            self.display.step(done.step, metrics)
            return
        why = "no target tokens" if not sums["targets"] else f"loss {sums['loss']}, gradient norm {sums['norm']}"
        note = {"step": done.step, "why": why, "keys": done.keys, "data": done.before, "sums": repr(sums)}
        path = self.folder / "left-out" / f"step-{done.step:08d}-{self.world.rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(note, indent=1))
        except OSError as error:  # a full disk is no reason to stop
            self.display.warn(f"{path}: {error.strerror or error}")
        self.display.left_out(done.step, f"{why}: left out, see {path}")
        if not sums["targets"]:
            return
        self.bad_steps += 1
        if self.bad_steps > self.run.train.skips:
            pending.clear()
            self._rewind(f"{why} at step {done.step}, {done.keys[0] if done.keys else 'no documents'}")

    def _rewind(self, why: str) -> None:
        """Go back to the last checkpoint's weights, but on with the data, which may be better than what is left out."""
        self._finish_saving()
        newest = self.world.on_first(lambda: checkpoint.latest(self.folder))
        if newest is None or self.rewinds == self.run.train.rewinds:
            raise FloatingPointError(f"{why}; {self.bad_steps} steps in a row, rewound {self.rewinds} times")
        if newest == self.rewound_to and len(checkpoint.numbered(self.folder)) > 1:
            aside = self.world.on_first(lambda folder=newest: checkpoint.set_aside(folder))
            self.display.warn(f"no step after {newest.name} was good: it is now {aside.name}")
        newest = checkpoint.newest_whole(self.folder, self.world, self.display.warn)
        assert newest is not None  # there was one just now, and if all are damaged that is an error
        self._restore(newest)
        self.rewinds, self.bad_steps, self.save_due, self.rewound_to = self.rewinds + 1, 0, False, newest
        self.last_saved = self.step

        def tidy() -> None:
            checkpoint.point(self.folder / "checkpoint", newest)
            self._drop_later_metrics()

        self.world.on_first(tidy)
        self.display.warn(f"{why}: back to {newest.name}, on with the data behind it")

    def _save_if_sound(self) -> None:
        """Save, unless the last steps were bad or a value is not finite: a run must find sound weights to go back to.

        What is put off is saved after the next good step. At the end of the run finite weights are saved behind bad
        steps too, which changed nothing, but then older checkpoints stay; weights that are not finite never are.
        """
        last, finite = self.step == self.run.train.steps, self._finite()
        if finite and not self.bad_steps:
            self.save()
        elif finite and last:
            self.display.warn(f"the last {self.bad_steps} steps were left out: older checkpoints stay")
            self.save()
        elif last and not self.stop.agreed:
            self._rewind(f"step {self.step} left weights that are not finite")

    def _finite(self) -> bool:
        """Whether all weights and moments are finite, on all processes."""
        norms = torch.stack(torch._foreach_norm([local(x) for x in self._tensors().values()]))
        return math.isfinite(self.world.sum(norms.double().sum()).item())

    def save(self) -> None:
        """Write a checkpoint; one of several processes is written while the next steps run."""
        self._finish_saving()
        self.save_due, self.last_saved = False, self.step
        folder, data = self.folder / f"step-{self.step:08d}", merged(self.world.gather(self._data_state()))
        texts = {
            "config.json": json.dumps(to_dict(self.run), indent=1),
            "tokenizer.json": self.tokenizer.text,
            "state.json": json.dumps(self._state(data)),
        }
        after = lambda: self._saved(folder)  # noqa: E731
        try:
            if self.world.size > 1:
                self.saving = checkpoint.Saving(folder, self._tensors(), texts, self.world, after)
            else:
                optimizer = {name: x for name, x in self._tensors().items() if name not in self.held}
                weights = dict(self.model.state_dict())
                checkpoint.write(folder, {"model.safetensors": weights, "optimizer.safetensors": optimizer}, texts)
                after()
                self.failed_saves = 0
        except OSError as error:
            self._save_failed(error, final=self.stop.agreed or self.step == self.run.train.steps)

    def _saved(self, folder: Path) -> None:
        checkpoint.point(self.folder / "checkpoint", folder)
        if self.bad_steps:  # the new one may not be the one to keep
            return
        try:
            checkpoint.prune(self.folder, self.run.train.keep)
        except OSError as error:
            self.display.warn(f"an old checkpoint could not be deleted: {error}")

    def _finish_saving(self, final: bool = False) -> None:
        """Wait for the checkpoint that is being written. All processes call this after the same step.

        final: no other save follows.
        """
        if self.saving is not None:
            saving, self.saving = self.saving, None
            try:
                saving.wait()
                self.failed_saves = 0
            except checkpoint.SaveError as error:
                self._save_failed(error, final)

    def _save_failed(self, error: OSError, final: bool) -> None:
        """Warn, for the next interval to try again; raise SaveError after the final one or train.save_retries."""
        self.failed_saves, self.last_saved = self.failed_saves + 1, -1
        if final or self.failed_saves > self.run.train.save_retries:
            newest = checkpoint.latest(self.folder)
            kept = "there is no older one" if newest is None else f"{newest} is the newest"
            raise checkpoint.SaveError(f"{error}; {self.failed_saves} saves in a row failed, {kept}") from None
        self.display.warn(f"{error}; trying again after the next {self.run.train.save_every} steps")

    def _drop_later_metrics(self) -> None:
        """Keep the metrics up to this step; a kill or a user's edit may have left lines that are none."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            objects, foreign = read_lines(path)
            lines = [line for line in objects if isinstance(line.get("step"), int)]
            if foreign := foreign + len(objects) - len(lines):
                self.display.warn(f"{path}: unreadable lines are dropped: {foreign}")
            write_lines(path, [line for line in lines if line["step"] <= self.step])

    def _data_state(self) -> dict[str, Any]:
        return self.feed.state if "feed" in vars(self) else self.streams.state()

    def _state(self, data: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": self.step, "data": data, "rewinds": self.rewinds, "rng": torch.get_rng_state().tolist(),
            "identity": self.streams.identity, "processes": self.world.size, "device": self.device.type,
        }  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        """Return the weights by name and the optimizer's state by name/key, each sharded as its parameter is."""
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
        """Restore weights, optimizer, random state and step of a checkpoint that was checked."""
        before = stored_model(checkpoint.read_json(folder, "config.json"))
        if different := changes(before, self.run.model, "model"):
            named = "; ".join(f"{name} is {now!r}, was {was!r}" for name, (was, now) in different.items())
            raise UserError(f"{folder} holds another model than this run's: {named}")
        checkpoint.read_into(folder, self._tensors())
        state = checkpoint.read_json(folder, "state.json")
        self.step = state["step"]
        torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))


def _context_before(run: Run, newest: Path | None) -> int:
    """Return the context of the checkpoint that the run begins with or goes on from, 0 if it is not known."""
    folder = newest or (checkpoint.newest_in(Path(run.train.init)) if run.train.init else None)
    if folder is None or not (folder / "config.json").is_file():  # which is told where the weights are read
        return 0
    return stored_model(checkpoint.read_json(folder, "config.json")).context or 0


def _tokenizer_path(run: Run, newest: Path | None) -> Path:
    """Return the tokenizer of the settings, or if there is none the copy in the checkpoint that the run begins with.

    Raises UserError if there is neither.
    """
    path, begun_with = Path(run.data.tokenizer), newest or checkpoint.newest_in(Path(run.train.init))
    if path.is_file():
        return path
    if (newest or run.train.init) and (begun_with / "tokenizer.json").is_file():
        return begun_with / "tokenizer.json"
    how = "make one by `mm1 tokenizer tokenizer.json FILES`"
    raise UserError(f"setting data.tokenizer is {run.data.tokenizer!r}, expected a file: {how}")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _law_parameters(run: Run) -> int:
    """N of the learning-rate law: the dense decoder without embeddings, also for a mixture (paper, section 3.4)."""
    counts = parameter_counts(run.model)
    return counts.get("decoder_dense_non_embedding", counts["decoder_non_embedding"])
