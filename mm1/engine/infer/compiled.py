"""Compiles a C++ source for this machine when it is first wanted, and keeps it in the user's cache.

What is loaded runs as the user, so nothing is loaded that anyone else could have written: neither folder nor file may
belong to, or be writable by, another. A folder of the user's own that only a group may write, as a umask of 002 makes
it, is closed to the group. A file ends in the SHA-256 of its key and of all before that, because to load one
that is cut short may end the process (SIGBUS). Where the cache cannot be used, the code is compiled for this process
alone, in a private folder that is removed once it is loaded.
"""

import ctypes
import hashlib
import logging
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

LIMIT = 120.0  # seconds a compiler may take; three are usual
DIGEST = hashlib.sha256().digest_size
log = logging.getLogger(__name__)


class CannotCompile(Exception):
    """Says in one line why a source cannot be compiled."""


def compiled(source: Path, compiler: list[str], flags: tuple[str, ...], folder: Callable[[], Path]) -> ctypes.CDLL:
    """Return the compiled source, from `folder()` if it was compiled before. Raises CannotCompile.

    compiler: a program and its first arguments. folder: made if it is not there; may raise OSError, or RuntimeError as
    Path.home() does.
    """
    parts = [source.read_text(), compiler, version_of(compiler), flags, processor()]
    key = hashlib.sha256(repr(parts).encode()).digest()
    path, why = None, ""
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_to_group(place)
        _expect_private(place)
        path = place / f"{key.hex()[:24]}.so"
    except (OSError, RuntimeError) as error:
        why = str(error)
    if path and (loaded := _loaded(path, key)):
        return loaded
    try:
        with tempfile.TemporaryDirectory(prefix="mm1-") as private:
            ours = Path(private) / "library.so"
            _run([*compiler, *flags, "-o", str(ours), str(source)])
            if path:
                try:
                    _keep(ours.read_bytes(), path, key)
                    if loaded := _loaded(path, key):
                        return loaded
                    why = f"what {path.parent} holds cannot be loaded"  # mounted without execution, perhaps
                except OSError as error:
                    why = str(error)
            log.warning("%s is compiled for this process alone: %s", source.name, why)
            return ctypes.CDLL(str(ours))
    except OSError as error:
        raise CannotCompile(str(error)) from None


def version_of(compiler: list[str]) -> str:
    """Return what a compiler says of its version. Raises CannotCompile."""
    return _run([*compiler, "--version"])


def processor() -> str:
    """Return what -march=native depends on: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([os.uname().machine, *sorted({line for line in lines if line.startswith(names)})])


def _loaded(path: Path, key: bytes) -> ctypes.CDLL | None:
    """Return the library; None if it is not there, is not ours alone, is not whole or does not fit this machine."""
    try:
        _expect_private(path)
        data = path.read_bytes()
        whole = data[-DIGEST:] == hashlib.sha256(key + data[:-DIGEST]).digest()
        return ctypes.CDLL(str(path)) if whole else None
    except OSError:
        return None


def _close_to_group(place: Path) -> None:
    """Take the group's right to write from a folder of the user's own; each file in it is checked as it is loaded."""
    status = place.stat()
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) == stat.S_IWGRP
    if shared and status.st_uid == os.geteuid():
        place.chmod(0o700)


def _expect_private(path: Path) -> None:
    """Raise OSError if somebody else owns it or may write it; a link counts as what it leads to."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write {path}: chmod go-w {path}")


def _keep(data: bytes, path: Path, key: bytes) -> None:
    """Write all of it or nothing, whoever else writes the same. Raises OSError."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")  # for this user alone
    try:
        with open(number, "wb") as file:
            file.write(data + hashlib.sha256(key + data).digest())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """Run a compiler and return what it prints.

    Raises CannotCompile if it fails or takes too long; then it is killed with its children.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise CannotCompile(f"{command[0]}: {error.strerror}") from None
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise CannotCompile(f"{command[0]} took longer than {LIMIT:g} s") from None
        finally:
            if process.poll() is None:  # also at Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if status:
        lines = text.splitlines() or ["no message"]
        why = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(f"{command[0]} ended with status {status}: {why}")
    return text
