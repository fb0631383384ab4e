"""Protect a long run: a lock on its folder, signals, a watchdog, a ban on recompiling, stored compiled code."""

import ctypes
import faulthandler
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mm1.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
LOCK = ".lock"
COMPILED = "compiled.bin"
PR_SET_PDEATHSIG = 1
WARM = 2  # steps in which everything is compiled


class Stopped(KeyboardInterrupt):
    """A signal stopped the run between two steps.

    status: the exit status, 128 + SIGINT or SIGTERM if a checkpoint exists, 1 if nothing is saved.
    """

    def __init__(self, message: str, interrupted: bool, saved: bool = True):
        super().__init__(message)
        self.status = 128 + (signal.SIGINT if interrupted else signal.SIGTERM) if saved else 1


class Stop:
    """Record SIGTERM, SIGUSR1 or Ctrl-C as `asked`; the processes of a run agree to stop with their next step.

    Later SIGTERM and SIGUSR1 are ignored, because launchers send a second one while the run saves. A second Ctrl-C
    raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.asked = self.interrupted = False  # this process; interrupted: by Ctrl-C
        self.agreed = self.any_interrupted = False  # all processes

    def __enter__(self) -> "Stop":
        self.previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            # os.write, because a handler may have interrupted a print.
            os.write(2, b"\nsaving after this step, then stopping; Ctrl-C again stops at once, without saving\n")
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """Let this process receive SIGTERM when torchrun ends, even if torchrun was killed, on Linux."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system releases it when this process ends.

    Raises UserError with the host and process that hold it. It is a POSIX lock, which works on NFS and is not inherited
    by loader processes; on a file system without locks the run continues with a warning.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            if fcntl is None:
                raise OSError(None, "this system has no POSIX locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use by {file.read().strip() or 'another process'}") from None
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if new and os.listdir(folder) == [LOCK]:  # the run was refused before it wrote anything
                shutil.rmtree(folder)


class Watch:
    """Print the stacks of all threads when `alive` was not called for `seconds`; 0: never."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.alive()
        return self

    def alive(self) -> None:
        """Restart the countdown."""
        if self.seconds:
            # The process's own standard error: a test or a notebook may have put another object in its place.
            faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__ or 2)

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def no_recompiles(policy: str, compiles: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call when everything is compiled.

    A later compilation raises UserError with the guard that failed (policy "error"), or is only logged ("warn").
    """
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
        raise UserError(f'{where} was compiled again: {why} (train.recompile="warn" continues)') from error
    finally:
        config.error_on_recompile = before


def save_compiled(folder: Path) -> None:
    """Store torch's compiled code in the folder, for a start of the same run on a machine with an empty cache."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None and not (folder / COMPILED).exists():
        part = folder / f".{COMPILED}"
        part.write_bytes(artifacts[0])
        os.replace(part, folder / COMPILED)


def load_compiled(folder: Path) -> bool:
    """Give torch the compiled code that an earlier start stored. Returns False if the file is damaged."""
    path = folder / COMPILED
    return not path.exists() or torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
