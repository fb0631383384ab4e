"""Compile a C++ source for this machine at its first use, and cache the library in the user's cache folder.

A library runs with the user's rights, so it is loaded only if nobody else could have written it: folder and file must
belong to the user, and no other user may write them. If only the group may write the user's folder, as with a umask of
002, that right is removed. A file ends in the SHA-256 of its key and its content, because loading a truncated library
can kill the process (SIGBUS). Where the cache cannot be used, the code is compiled for this process alone, in a private
folder that is removed after loading.
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

LIMIT = 120.0  # seconds after which a compiler is killed; three are usual
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
DIGEST = hashlib.sha256().digest_size
log = logging.getLogger(__name__)


class CannotCompile(Exception):
    """Report in one line why a source cannot be compiled."""


def compiled(source: Path, compiler: list[str], flags: tuple[str, ...], folder: Callable[[], Path]) -> ctypes.CDLL:
    """Return the compiled source, from the cache folder if it was compiled before. Raises CannotCompile.

    compiler: a program and its first arguments; flags: its options; folder: returns the cache folder, which is created
    if it is missing, or raises OSError, or RuntimeError as Path.home() does.
    """
    parts = [source.read_text(), compiler, version_of(compiler), flags, processor()]
    key = hashlib.sha256(repr(parts).encode()).digest()
    path, why = None, ""
    try:
        directory = folder()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_to_group(directory)
        _expect_private(directory)
        path = directory / f"{key.hex()[:24]}.so"
    except (OSError, RuntimeError) as error:
        why = str(error)
    if path and (loaded := _loaded(path, key)):
        return loaded
    try:
        with tempfile.TemporaryDirectory(prefix="mm1-") as private:
            library = Path(private) / "library.so"
            _run([*compiler, *flags, "-o", str(library), str(source)])
            if path:
                try:
                    _store(library.read_bytes(), path, key)
                    if loaded := _loaded(path, key):
                        return loaded
                    why = f"libraries in {path.parent} cannot be loaded"  # perhaps it is mounted without execution
                except OSError as error:
                    why = str(error)
            log.warning("%s is compiled for this process alone: %s", source.name, why)
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotCompile(str(error)) from None


def version_of(compiler: list[str]) -> str:
    """Return the output of a compiler's --version. Raises CannotCompile."""
    return _run([*compiler, "--version"])


def processor() -> str:
    """Return a description of the processor, because machines that share a home folder may need different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([os.uname().machine, *sorted({line for line in lines if line.startswith(names)})])


def _loaded(path: Path, key: bytes) -> ctypes.CDLL | None:
    """Return the cached library; None if it is missing, not private, truncated or not for this machine."""
    try:
        _expect_private(path)
        data = path.read_bytes()
        intact = data[-DIGEST:] == hashlib.sha256(key + data[:-DIGEST]).digest()
        return ctypes.CDLL(str(path)) if intact else None
    except OSError:
        return None


def _close_to_group(directory: Path) -> None:
    """Remove the group's right to write the user's own folder; files in it are still checked when they are loaded."""
    status = directory.stat()
    if status.st_uid == os.geteuid() and status.st_mode & OTHERS_WRITE == stat.S_IWGRP:
        directory.chmod(0o700)


def _expect_private(path: Path) -> None:
    """Raise OSError if another user owns a path or may write it; links are followed."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & OTHERS_WRITE:
        raise PermissionError(f"others may write {path}: chmod go-w {path}")


def _store(data: bytes, path: Path, key: bytes) -> None:
    """Write a library atomically; other processes may write the same file. Raises OSError."""
    number, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")  # private to this user
    try:
        with open(number, "wb") as file:
            file.write(data + hashlib.sha256(key + data).digest())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """Run a compiler and return its output. Raises CannotCompile if it fails or takes longer than LIMIT.

    After LIMIT, or an interrupt, it is killed with its children.
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
            if process.poll() is None:  # after Ctrl-C too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if status:
        lines = text.splitlines() or ["no message"]
        why = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(f"{command[0]} ended with status {status}: {why}")
    return text
