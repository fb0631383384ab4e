"""Save the checkpoints of a run, retry after a failed save, and delete old checkpoints."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm1.engine.train import checkpoint
from mm1.engine.train.config import Train
from mm1.engine.train.state import TrainingState


class Saver:
    """Write the checkpoints of a run; with several processes, the write overlaps the next steps.

    warn: called with a line about each failed save. is_sound: returns whether the last step was good; if not, no old
    checkpoint is deleted.
    """

    def __init__(
        self, folder: Path, t: Train, state: TrainingState, warn: Callable[[str], Any], is_sound: Callable[[], bool]
    ):
        self.folder, self.train, self.state, self.warn, self.is_sound = folder, t, state, warn, is_sound
        self.active_save: checkpoint.Saving | None = None
        self.due = False
        self.last_step = -1  # of the newest save that did not fail
        self.failures = 0  # in a row

    @property
    def is_complete(self) -> bool:
        """Return whether this process has an active save that has ended."""
        return self.active_save is not None and self.active_save.done

    def save(self, step: int, make_texts: Callable[[], dict[str, str]], last: bool) -> None:
        """Write a checkpoint of this step.

        make_texts: returns the checkpoint's text files; all processes call it together. last: no other save follows.
        Raises SaveError after train.save_retries failures in a row.
        """
        self.finish()
        self.due, self.last_step = False, step
        folder, texts = self.folder / f"step-{step:08d}", make_texts()
        try:
            if self.state.world.size > 1:
                world, tensors = self.state.world, self.state.tensors()
                self.active_save = checkpoint.Saving(folder, tensors, texts, world, lambda: self.publish(folder))
            else:
                self.state.save(folder, texts)
                self.publish(folder)
                self.failures = 0
        except OSError as error:
            self._handle_failure(error, last)

    def publish(self, folder: Path) -> None:
        """Point the run's link to a complete checkpoint, and delete all but the newest train.keep."""
        checkpoint.point(self.folder / "checkpoint", folder)
        if not self.is_sound():  # an older checkpoint may be the better one
            return
        try:
            checkpoint.prune(self.folder, self.train.keep)
        except OSError as error:
            self.warn(f"an old checkpoint could not be deleted: {error}")

    def finish(self, last: bool = False) -> None:
        """Wait for the active save, if any. All processes call this after the same step."""
        if self.active_save is not None:
            saving, self.active_save = self.active_save, None
            try:
                saving.wait()
                self.failures = 0
            except checkpoint.SaveError as error:
                self._handle_failure(error, last)

    def finish_quietly(self) -> None:
        """Wait for the active save and ignore its errors: another error ends the run."""
        if self.active_save is not None:
            with suppress(Exception):
                self.active_save.wait()

    def _handle_failure(self, error: OSError, last: bool) -> None:
        """Warn, so that the save is retried at the next interval; raise SaveError if no retry follows."""
        self.failures, self.last_step = self.failures + 1, -1
        if last or self.failures > self.train.save_retries:
            newest = checkpoint.latest(self.folder)
            older = "there is no older one" if newest is None else f"{newest} is the newest"
            raise checkpoint.SaveError(f"{error}; {self.failures} saves in a row failed, {older}") from None
        self.warn(f"{error}; trying again after the next {self.train.save_every} steps")
