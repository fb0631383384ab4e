"""Paths of data files: patterns of shells, and ranges of numbered files."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm1.errors import UserError


def expand(paths: str | Path | Sequence[str | Path], base: Path) -> list[Path]:
    """Return the files that match paths, patterns such as "*.tar" and ranges such as "a-{00..12}.tar", from base on.

    Raises UserError for a path without a file, for a folder, and if there are no paths.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for pattern in _braces(str(base / Path(path).expanduser())):
            # A file of that name comes before a pattern: it may be called a[1].tar.
            hits = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not hits:
                raise UserError(f"no such file: {pattern}")
            if folders := [hit for hit in hits if os.path.isdir(hit)]:
                raise UserError(f"{folders[0]} is a directory: name its files, as in {folders[0]}/*.tar")
            files += map(Path, hits)
    if not files:
        raise UserError("the data has no paths, expected at least one")
    return files


def _braces(pattern: str) -> Iterator[str]:
    if not (braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        yield pattern
        return
    first, last = braces.groups()
    if int(first) > int(last):
        raise UserError(f"{pattern}: the range {braces[0]} is empty")
    for number in range(int(first), int(last) + 1):
        name = str(number).zfill(len(first))
        yield from _braces(pattern[: braces.start()] + name + pattern[braces.end() :])
