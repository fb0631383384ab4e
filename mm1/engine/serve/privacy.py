"""Read the API key, and keep it from other processes, those of the same user included."""

import ctypes
import os
import sys
from pathlib import Path

from mm1.engine.serve import seccomp
from mm1.errors import UserError


def take_from_environment(name: str) -> str | None:
    """Return a variable and remove it, from the memory behind /proc/PID/environ too. Returns None if it is not set."""
    value = os.environ.get(name)
    if value is not None and os.name == "posix":
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        if place := getenv(name.encode()):
            ctypes.memset(place, 0, len(os.fsencode(value)))
    os.environ.pop(name, None)
    return value


def read_key(path: Path) -> str:
    """Return the key in a file, its only line. Raises UserError."""
    try:
        return checked_key(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def checked_key(text: str, where: str) -> str:
    """Return a key without surrounding white space. Raises UserError for one that no HTTP header can hold.

    where: the name of its source, for the error.
    """
    key = text.strip()
    if not key or not key.isprintable():
        raise UserError(f"{where} has {len(key.splitlines())} lines, expected one line with a key")
    if not key.isascii():
        raise UserError(f"{where} has a character that is not ASCII, expected a key of ASCII characters")
    return key


def forbid_inspection() -> None:
    """Stop other processes of this user, but not root, from reading this one's memory, environment and descriptors.

    No core dump is written either. It does nothing outside Linux.
    """
    if sys.platform == "linux":
        seccomp.prctl(seccomp.PR_SET_DUMPABLE, 0)
