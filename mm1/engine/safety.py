"""What keeps a long run safe: signals, hangs, compiling again, what is compiled for the next start."""

import faulthandler
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mm1.engine.data.record import DataError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COMPILED = "compiled.bin"


class Stop:
    """Turns the first SIGTERM, SIGUSR1 or Ctrl-C into a wish, `asked`, on which the processes of a run agree with their
    next step, `agreed`; a second one stops at once."""

    def __init__(self):
        self.asked = self.agreed = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Watch:
    """Prints where every thread is, once nothing was `alive` for so many seconds: a hang names itself. 0: never."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.alive()
        return self

    def alive(self) -> None:
        if self.seconds:
            # The process's own standard error: a test or a notebook may have put another object in its place.
            faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__ or 2)

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def no_recompiles(policy: str, compiles: bool) -> Iterator[Callable[[], None]]:
    """Gives a function to be called when all is compiled. What is compiled again after it raises DataError with the
    guard that failed ("error"), or is only logged ("warn")."""
    import torch._dynamo.exc

    config = torch._dynamo.config
    before = config.error_on_recompile

    def warm() -> None:
        if compiles and policy == "error":
            config.error_on_recompile = True
        elif compiles:
            torch._logging.set_logs(recompiles=True)

    try:
        yield warm
    except torch._dynamo.exc.RecompileError as error:
        where, *guards = re.findall(r"(?:Recompiling function|- \d+/\d+:) (.*)", str(error))
        why = "; ".join(sorted(guards, key=lambda guard: "mismatch" not in guard))  # other kinds of blocks fail by type
        raise DataError(f'{where} was compiled again: {why} (train.recompile="warn" goes on)') from error
    finally:
        config.error_on_recompile = before


def save_compiled(folder: Path) -> None:
    """What torch compiled so far, for a start of the same run elsewhere; here torch's own cache has it."""
    found = torch.compiler.save_cache_artifacts()
    if found is not None and not (folder / COMPILED).exists():
        part = folder / f".{COMPILED}"
        part.write_bytes(found[0])
        os.replace(part, folder / COMPILED)


def load_compiled(folder: Path) -> None:
    path = folder / COMPILED
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())
