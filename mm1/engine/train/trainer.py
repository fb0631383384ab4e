"""Train a model: `Trainer.fit` runs all steps, `step` launches one asynchronously, `settle` waits for the oldest.

step.py computes a step, state.py holds what a restart needs, saving.py writes it, start.py begins a run.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from mm1.engine.data.feed import Feed
from mm1.engine.data.lines import read_lines, write_lines
from mm1.engine.data.streams import merged
from mm1.engine.run_config import Run, to_dict
from mm1.engine.train import checkpoint, safety
from mm1.engine.train.display import Display, Silent, logged
from mm1.engine.train.optim import learning_rate
from mm1.engine.train.parallel import World
from mm1.engine.train.prepare import prepare
from mm1.engine.train.profile import Profile
from mm1.engine.train.saving import Saver
from mm1.engine.train.start import Start, load_initial_weights, named_dtype, open_run
from mm1.engine.train.state import TrainingState
from mm1.engine.train.step import Observer, StepResult, run_micro_batches, sum_and_update

MAX_DROPPED = 0.001  # share of the token-expert pairs; above it a run warns once
log = logging.getLogger(__name__)


def train(
    run: Run, folder: Path, *, resume: bool = False, display: Display | None = None, profile: bool = False,
    accept_other_data: bool = False, observers: Sequence[Observer] = (),
) -> Any:  # fmt: skip
    """Train to run.train.steps, write checkpoints and metrics.jsonl into `folder`, and return the model of its kind.

    Under torchrun, all processes call this. resume: continue from the newest complete checkpoint, bit-exactly on the
    same machine with the same number of threads and processes, or start if there is none. accept_other_data: continue,
    or begin from train.init, even if the data or the tokenizer differ from the checkpoint's. profile: write a trace and
    a table of some steps to folder/profile (see profile.py). observers: called at each stage of a step (see Observer).

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and raise safety.Stopped. Raises UserError for settings, data or a
    folder that cannot be used, SaveError if no checkpoint can be written, FloatingPointError if too many losses in a
    row are not finite.
    """
    safety.follow_launcher()
    world = World(run.parallel, run.train.hang)
    with ExitStack() as stack:
        stack.callback(world.close)
        world.on_first(lambda: stack.enter_context(safety.locked(folder)))
        shown = display or (Display(folder, run.train) if world.first else Silent())
        if isinstance(shown, Display):
            stack.enter_context(logged(shown.console))
        trainer = Trainer(run, folder, shown, resume, world, accept_other_data, observers=observers)
        if profile:
            trainer.observers.append(Profile(trainer.run, trainer.model, world, folder / "profile", trainer.steps_done))
        trainer.fit()
        return trainer.model


class Trainer:
    """Run the steps of training. The arguments are those of `train`; backend: torch.compile's.

    `fit` does everything. A caller that runs single steps calls `settle` once for each `step` and at the end `close`,
    or uses the trainer as a context manager.
    """

    def __init__(
        self, run: Run, folder: Path, display: Any, resume: bool = False, world: World | None = None,
        accept_other_data: bool = False, *, backend: str = "inductor", observers: Sequence[Observer] = (),
    ):  # fmt: skip
        self.folder, self.display, self.world = folder, display, world or World()
        self.device, self.dtype = self.world.device, named_dtype(run.train.dtype, self.world.device)
        start = open_run(run, folder, resume, accept_other_data, self.world, display.warn)
        self.run, self.tokenizer, self.streams = start.run, start.tokenizer, start.streams
        t = self.run.train
        torch.manual_seed(t.seed)
        self.model = prepare(self.run.model, t, self.world, self.dtype, backend)
        self.peak_rate = t.peak_lr or self.model.default_peak_lr()
        self.state = TrainingState(self.model, t, self.peak_rate, self.world, self.dtype)
        self.saver = Saver(folder, t, self.state, display.warn, lambda: not self.bad_steps)
        self.stop = safety.Stop()
        self.observers: list[Observer] = list(observers)
        self.pending: deque[StepResult] = deque()  # launched steps whose results were not read
        self.steps_done = self.rewinds = 0
        self.bad_steps = 0  # in a row up to the last settled step; their loss or gradient was not finite
        self.warned_of_drops = self.warned_of_weights = False
        self.rewound_to: Path | None = None  # until a step is good
        self.last_settle_time = time.perf_counter()
        self._begin(start, accept_other_data)
        if t.compile and not safety.load_compiled(folder):
            display.warn(f"{folder / safety.COMPILED} is damaged: compiling again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and processes that load data ahead. No step may follow."""
        (self.feed if "feed" in vars(self) else self.streams).close()

    def _begin(self, start: Start, accept_other_tokenizer: bool) -> None:
        """Load the initial weights or the checkpoint, and delete what a killed run wrote after its checkpoint."""
        if start.newest is None and self.run.train.init:
            init = Path(self.run.train.init)
            load_initial_weights(self.model, init, self.tokenizer, self.world, accept_other_tokenizer)
        if start.newest is not None:
            self.resume_from(start.newest, start.other_data)
            log.info("resumed at step %d from %s", self.steps_done, start.newest)
        self.world.on_first(lambda: self._tidy(start.newest, start.state))
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.named_children()}
        log.info(
            "%.3g M parameters (%s) on %s in %s, %s", sum(parts.values()) / 1e6,
            ", ".join(f"{name} {count / 1e6:.3g}" for name, count in parts.items() if count), self.device,
            str(self.dtype).removeprefix("torch."), self.world,
        )  # fmt: skip

    def _tidy(self, newest: Path | None, state: dict[str, Any] | None) -> None:
        """Finish what a kill interrupted after the checkpoint, and delete the lines that were written after it."""
        if newest is not None:
            self.saver.publish(newest)
        if self.steps_done < self.run.train.steps:
            ends = {int(i): s["position"] for i, s in state["data"]["streams"].items()} if state else {}
            self._drop_later_metrics()
            for warning in self.streams.quarantine.trim(ends):
                self.display.warn(warning)

    def resume_from(self, folder: Path, other_data: bool = False) -> None:
        """Restore weights, optimizer, random state, data position and step of a checkpoint.

        other_data: restore only the position of the packers, without their waiting documents, which are not in these
        data.
        """
        state = self.state.restore(folder)
        for stream in state["data"]["streams"].values() if other_data else ():
            stream["waiting"] = []
        self.streams.restore(state["data"])
        self.steps_done, self.rewinds = state["step"], state["rewinds"]

    def fit(self) -> None:
        """Train to the last step, or until a signal: then save and raise safety.Stopped. Closes the trainer."""
        t, begun, self.last_settle_time = self.run.train, self.steps_done, time.perf_counter()
        if t.compile and begun < t.steps:
            log.info("compiling each kind of block: the first steps take longer")
        with self, self.stop, safety.Watch(t.hang) as watch, self.display.run(begun):
            try:
                with safety.no_recompiles(t.recompile, t.compile) as warm:
                    self._run_steps(begun, watch, warm)
                while self.pending:
                    self.settle()
                stopped = self.stop.agreed and (self.steps_done < t.steps or self.saver.due)
                if stopped and self.steps_done != self.saver.last_step:
                    self._save_if_sound()
                self.saver.finish(last=True)
            except Exception:
                self.saver.finish_quietly()
                raise
        newest = checkpoint.latest(self.folder)
        if stopped:
            saved = "nothing is saved" if newest is None else f"--resume continues from {newest}"
            message = f"stopped at step {self.steps_done}; {saved}"
            raise safety.Stopped(message, self.stop.any_interrupted, newest is not None)
        log.info("trained to step %d; the checkpoint is %s", self.steps_done, newest)
        if bad := len(self.streams.quarantine.records()) if self.world.first else 0:
            log.info("left out %d different unreadable records, listed in %s", bad, self.folder / "quarantine")

    def _run_steps(self, begun: int, watch: safety.Watch, warm: Any) -> None:
        """Run and save steps until the last one or a signal. begun: steps that were done before `fit`."""
        t = self.run.train
        while self.steps_done < t.steps and not self.stop.agreed:
            self.step()
            watch.alive()
            self.saver.due |= self.steps_done % t.save_every == 0 or self.steps_done == t.steps
            # A GPU computes one step while the host prepares the next, but a save needs the results of all.
            while len(self.pending) > (0 if self.saver.due or self.device.type == "cpu" else 1):
                self.settle()
            if self.saver.due:
                self._save_if_sound()
                self.last_settle_time = time.perf_counter()
            if self.steps_done == begun + safety.WARM:
                warm()
                if t.compile and self.world.first:
                    safety.save_compiled(self.folder)

    @cached_property
    def feed(self) -> Feed:
        """Return the batches of this process; created by the first step, after the data position is restored."""
        return Feed(self.streams, self.device)

    def step(self) -> StepResult:
        """Launch the next step; a GPU computes it asynchronously.

        Call `settle` for every step before `save`: it logs the metrics, counts bad steps, rewinds the run after too
        many of them, and learns of stop signals. Without it the results accumulate in `pending`. Raises whatever the
        data raise, such as UserError for too many unreadable records in a row.
        """
        t, number, before = self.run.train, self.steps_done + 1, self.feed.state
        for observer in self.observers:
            observer.step_begins(number)
        count = t.accumulate // self.world.data_size
        with self.state.copies:
            done = run_micro_batches(self.state, self.feed, count, self.dtype, self.observers)
        for observer in self.observers:
            observer.gradients_complete()
        rate = learning_rate(self.steps_done, t, self.peak_rate)
        flags = self.stop.asked, self.stop.interrupted, self.saver.is_complete
        values, arrived, shape = sum_and_update(self.state, done, t, rate, flags)
        host = {"lr": rate, "skipped": self.feed.skipped, "rewinds": self.rewinds, "data_seconds": done.waited}
        result = StepResult(number, values, arrived, done.per, shape, done.keys, before, host)
        self.pending.append(result)
        self.steps_done = number
        for observer in self.observers:
            observer.step_ends(result)
        return result

    def settle(self) -> None:
        """Wait for the oldest pending step, log its metrics, and react to a bad step, a signal or a complete save.

        All results are sums over the processes, so every process decides alike.
        """
        done = self.pending.popleft()
        sums = done.sums
        self.stop.agreed = self.stop.agreed or sums["stop"] > 0
        self.stop.any_interrupted = self.stop.any_interrupted or sums["interrupted"] > 0
        if sums["saved"] == self.world.data_size:
            self.saver.finish()
        # The time between two settled steps: on a GPU the host runs ahead, and reading `sums` waits for the device.
        seconds, self.last_settle_time = time.perf_counter() - self.last_settle_time, time.perf_counter()
        if not sums["targets"] or not math.isfinite(sums["loss"] + sums["norm"]):
            self._record_bad_step(done, sums)
            return
        self.bad_steps, self.rewound_to = 0, None
        metrics = self._metrics(done, sums, seconds)
        if metrics.get("dropped", 0.0) > MAX_DROPPED and not self.warned_of_drops:
            self.warned_of_drops = True
            share = f"experts were full and dropped {metrics['dropped']:.1%} of the token-expert pairs"
            self.display.warn(f"step {done.step}: {share}; raise parallel.capacity, or leave it out to drop none")
        self.display.step(done.step, metrics)

    def _metrics(self, done: StepResult, sums: dict[str, float], seconds: float) -> dict[str, Any]:
        budget, accumulate = self.streams.budget, self.run.train.accumulate
        divisors = {"targets": sums["targets"], "batches": accumulate}
        return {
            **{name: sums[name] / divisors[per] for name, per in done.per.items()},
            "grad_norm": sums["norm"],
            **{name: int(sums[name]) for name in ("tokens", "targets", "images")},
            "fill": sums["tokens"] / (budget.tokens * accumulate),
            "image_fill": sums["images"] / (budget.media * accumulate),
            "data": int(sums["data"]),
            **self.model.metrics(done.counts),
            **done.host,
            "seconds": seconds,
        }

    def _record_bad_step(self, done: StepResult, sums: dict[str, float]) -> None:
        """Write a file about a step that changed nothing; rewind if more than train.skips in a row are not finite."""
        why = "no target tokens" if not sums["targets"] else f"loss {sums['loss']}, gradient norm {sums['norm']}"
        note = {"step": done.step, "why": why, "keys": done.keys, "data": done.data_before, "sums": repr(sums)}
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
            self.pending.clear()
            documents = done.keys[0] if done.keys else "no documents"
            self._rewind(
                f"{self.bad_steps} bad steps in a row, the last with {why} at step {done.step} ({documents}, …)"
            )

    def _rewind(self, why: str) -> None:
        """Restore the weights of the last checkpoint, and continue with the data after the bad steps."""
        self.saver.finish()
        newest = self.world.on_first(lambda: checkpoint.latest(self.folder))
        if newest is None or self.rewinds == self.run.train.rewinds:
            spent = f"the run was rewound {self.rewinds} times already, the limit of train.rewinds"
            raise FloatingPointError(f"{why}; {'there is no checkpoint to return to' if newest is None else spent}")
        if newest == self.rewound_to and len(checkpoint.numbered(self.folder)) > 1:
            aside = self.world.on_first(lambda folder=newest: checkpoint.set_aside(folder))
            self.display.warn(f"no step after {newest.name} was good: it is now {aside.name}")
        newest = checkpoint.newest_whole(self.folder, self.world, self.display.warn)
        assert newest is not None  # if all are damaged, newest_whole raised an error
        self.steps_done = self.saver.last_step = self.state.restore(newest)["step"]
        self.rewinds, self.bad_steps, self.saver.due, self.rewound_to = self.rewinds + 1, 0, False, newest

        def tidy() -> None:
            checkpoint.point(self.folder / "checkpoint", newest)
            self._drop_later_metrics()

        self.world.on_first(tidy)
        self.display.warn(f"{why}: restored {newest.name}; training continues with the next data")

    def _save_if_sound(self) -> None:
        """Save, unless the last steps were bad or a value is not finite, so that a rewind restores sound weights.

        A postponed save happens after the next good step. At the end of the run, finite weights are saved even after
        bad steps, which changed nothing, and older checkpoints are kept. Weights that are not finite are never saved.
        """
        last, finite = self.steps_done == self.run.train.steps, self.state.is_finite()
        if finite and not self.bad_steps:
            self.save()
        elif finite and last:
            self.display.warn(f"the last {self.bad_steps} steps were left out: older checkpoints are kept")
            self.save()
        elif last and not self.stop.agreed:
            self._rewind(f"step {self.steps_done} left weights that are not finite")
        elif not finite and not self.bad_steps and not self.warned_of_weights:
            self.warned_of_weights = True
            self.display.warn(f"step {self.steps_done}: weights are not finite, so no checkpoint is written")

    def save(self) -> None:
        """Write a checkpoint of the steps done; with several processes, the write overlaps the next steps."""
        self.saver.save(self.steps_done, self._texts, self.stop.agreed or self.steps_done == self.run.train.steps)

    def _texts(self) -> dict[str, str]:
        """Return the text files of a checkpoint; all processes call this together."""
        position = self.feed.state if "feed" in vars(self) else self.streams.state()
        state = {
            "step": self.steps_done, "data": merged(self.world.gather(position)), "rewinds": self.rewinds,
            "rng": torch.get_rng_state().tolist(), "identity": self.streams.identity, "processes": self.world.size,
            "device": self.device.type,
        }  # fmt: skip
        texts = {"config.json": json.dumps(to_dict(self.run), indent=1), "state.json": json.dumps(state)}
        return texts if self.tokenizer is None else {**texts, "tokenizer.json": self.tokenizer.text}

    def _drop_later_metrics(self) -> None:
        """Delete the metrics after this step, and lines that are not metrics, which a kill or an edit may leave."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            objects, foreign = read_lines(path)
            lines = [line for line in objects if isinstance(line.get("step"), int)]
            if foreign := foreign + len(objects) - len(lines):
                self.display.warn(f"{path}: unreadable lines are dropped: {foreign}")
            write_lines(path, [line for line in lines if line["step"] <= self.steps_done])
