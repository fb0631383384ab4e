"""Save the checkpoints of a run, try again after a save that failed, and delete old ones."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm1.engine.train import checkpoint
from mm1.engine.train.config import Train
from mm1.engine.train.state import State

Texts = Callable[[], dict[str, str]]  # the text files of a checkpoint; all processes call it together


class Saver:
    """Writes the checkpoints of a run; one of several processes is written while the next steps run.

    warn: is told of failed saves. is_sound: whether the last step was good; older checkpoints stay where it was not.
    """

    def __init__(self, folder: Path, t: Train, state: State, warn: Callable[[str], Any], is_sound: Callable[[], bool]):
        self.folder, self.train, self.state, self.warn, self.is_sound = folder, t, state, warn, is_sound
        self.under_way: checkpoint.Saving | None = None
        self.due = False
        self.last_step = -1  # of the last save that did not fail
        self.failures = 0  # in a row

    @property
    def is_complete(self) -> bool:
        """Say whether a save was under way on this process and is complete."""
        return self.under_way is not None and self.under_way.done

    def save(self, step: int, texts: Texts, last: bool) -> None:
        """Write a checkpoint of this step. last: no other follows. Raises SaveError after train.save_retries."""
        self.finish()
        self.due, self.last_step = False, step
        folder, texts_now = self.folder / f"step-{step:08d}", texts()
        try:
            if self.state.world.size > 1:
                world, tensors = self.state.world, self.state.tensors()
                self.under_way = checkpoint.Saving(folder, tensors, texts_now, world, lambda: self.complete(folder))
            else:
                self.state.save(folder, texts_now)
                self.complete(folder)
                self.failures = 0
        except OSError as error:
            self._failed(error, last)

    def complete(self, folder: Path) -> None:
        """Let the run's link point to a checkpoint that is complete, and delete what is more than train.keep."""
        checkpoint.point(self.folder / "checkpoint", folder)
        if not self.is_sound():  # the new one may not be the one to keep
            return
        try:
            checkpoint.prune(self.folder, self.train.keep)
        except OSError as error:
            self.warn(f"an old checkpoint could not be deleted: {error}")

    def finish(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written. All processes call this after the same step."""
        if self.under_way is not None:
            saving, self.under_way = self.under_way, None
            try:
                saving.wait()
                self.failures = 0
            except checkpoint.SaveError as error:
                self._failed(error, last)

    def finish_quietly(self) -> None:
        """Wait for the checkpoint that is being written, however it ends: the run ends by another error."""
        if self.under_way is not None:
            with suppress(Exception):
                self.under_way.wait()

    def _failed(self, error: OSError, last: bool) -> None:
        """Warn, for the next interval to try again; raise SaveError after the last one or train.save_retries."""
        self.failures, self.last_step = self.failures + 1, -1
        if last or self.failures > self.train.save_retries:
            newest = checkpoint.latest(self.folder)
            kept = "there is no older one" if newest is None else f"{newest} is the newest"
            raise checkpoint.SaveError(f"{error}; {self.failures} saves in a row failed, {kept}") from None
        self.warn(f"{error}; trying again after the next {self.train.save_every} steps")
