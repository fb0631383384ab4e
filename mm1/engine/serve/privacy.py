"""Read the API key, and keep it from other processes, those of the same user included."""

import ctypes
import os
import sys
from pathlib import Path

from mm1.engine.serve import seccomp
from mm1.errors import UserError

VARIABLE = "MM1_API_KEY"


def read_key(file: Path | None = None) -> str | None:
    """Return the API key: the only line of a file, by default the value of MM1_API_KEY; None without both.

    White space around the key is removed. The variable is removed from the environment in any case, and from the memory
    that /proc/PID/environ shows. Raises UserError for a file that cannot be read, and for a key that no HTTP header can
    contain.
    """
    key, source = _take_from_environment(VARIABLE) or None, VARIABLE
    if file:
        try:
            key, source = file.read_text(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isprintable():
        raise UserError(f"{source} has {len(key.splitlines())} lines, expected one line with a key")
    if not key.isascii():
        raise UserError(f"{source} has a character that is not ASCII, expected a key of ASCII characters")
    return key


def _take_from_environment(name: str) -> str | None:
    """Return a variable and remove it, from the memory that /proc/PID/environ shows too."""
    value = os.environ.get(name)
    if value is not None and os.name == "posix":
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        if address := getenv(name.encode()):
            ctypes.memset(address, 0, len(os.fsencode(value)))
    return os.environ.pop(name, None)


def forbid_inspection() -> None:
    """Stop other processes of this user, but not root, from reading this one's memory, environment and descriptors.

    The process then writes no core dump either. On other systems than Linux this does nothing.
    """
    if sys.platform == "linux":
        seccomp.prctl(seccomp.PR_SET_DUMPABLE, 0)
