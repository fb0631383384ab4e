"""Expand paths of data files: patterns as in a shell, and ranges of numbered files."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm1.errors import UserError


def expand(paths: str | Path | Sequence[str | Path], base: Path, folders: bool = False) -> list[Path]:
    """Return the files that match paths relative to `base`: names, patterns ("*.tar") and ranges ("a-{00..12}.tar").

    folders: whether folders may match too. Raises UserError for a path without a file, for a folder that may not match,
    and if there are no paths.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for pattern in _braces(str(base / Path(path).expanduser())):
            # A file of that name comes before a pattern: it may be called a[1].tar.
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise UserError(f"no such file: {pattern}")
            if not folders and (folder := next(filter(os.path.isdir, matches), None)):
                raise UserError(f"{folder} is a directory: name its files, as in {folder}/*.tar")
            files += map(Path, matches)
    if not files:
        raise UserError("the data has no paths, expected at least one")
    return files


def _braces(pattern: str) -> Iterator[str]:
    """Yield the pattern with each number of its ranges in their place."""
    if not (braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        yield pattern
        return
    first, last = braces.groups()
    if int(first) > int(last):
        raise UserError(f"{pattern}: the range {braces[0]} is empty")
    for number in range(int(first), int(last) + 1):
        yield from _braces(pattern[: braces.start()] + str(number).zfill(len(first)) + pattern[braces.end() :])
