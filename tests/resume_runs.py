"""Runs that tests of test_resume.py stop from outside: resume_runs.py RUN.json FOLDER, alone or under torchrun.

With a third argument, a folder whose run was killed: it is copied and gone on with once for every operation on files
that this takes, killed at that one and gone on with again: FOLDER/0, FOLDER/1, …, and what it was killed at in each.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from mm1.engine.data import mixture  # noqa: F401  # all modules are there before a fork
from mm1.engine.run_config import Run, from_dict
from mm1.engine.train.trainer import train

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}  # events of sys.addaudithook


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(number: int, folder: Path, note: Path) -> None:
    """This process, before its number-th change to a file of `folder`, or when a file that it writes anew is empty."""
    left, dying = number, False

    def due(event: str, path: str) -> bool:
        nonlocal left, dying
        left -= 1
        if left < 0:
            dying = True
            note.write_text(f"{event} {os.path.relpath(path, folder)}")
        return left < 0

    def hook(event: str, args: tuple) -> None:
        if dying or not (event in CHANGES or event == "open") or not isinstance(args[0], str | os.PathLike):
            return
        # rmtree names files by their folder's descriptor.
        at = args[-1] if event in ("os.remove", "os.rmdir") else -1
        path = os.path.join(os.readlink(f"/proc/self/fd/{at}"), args[0]) if at != -1 else os.fspath(args[0])
        if not os.path.abspath(path).startswith(f"{folder}{os.sep}"):
            return
        if event in CHANGES:
            if due(event.removeprefix("os."), path):
                die()
        elif args[2] & (os.O_WRONLY | os.O_RDWR):
            if due("open", path):
                die()
            if args[2] & os.O_TRUNC and os.path.exists(path) and due("emptied", path):
                os.truncate(path, 0)
                die()

    sys.addaudithook(hook)


def forked(work) -> bool:
    """If `work` came to its end in a process of its own."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the run failed: {status}"
    return status == 0


def die_everywhere(run: Run, folder: Path, killed: Path) -> None:
    for number in itertools.count():
        copy, note = folder / str(number), folder / f"{number}.txt"
        shutil.copytree(killed, copy, symlinks=True)

        def dying(copy=copy, number=number, note=note):
            die_at(number, copy, note)
            train(run, copy, resume=True)

        if forked(dying):
            return
        assert forked(lambda copy=copy: train(run, copy, resume=True))


def main(path: Path, folder: Path, killed: str | None = None) -> None:
    torch.set_num_threads(1)
    run = from_dict(json.loads(path.read_text()))
    if killed is not None:
        die_everywhere(run, folder.absolute(), Path(killed))
        return
    path.with_name(f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    train(run, folder, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
