"""Tar archives and plain files by byte offsets: what random access to WebDataset shards stands on.

Files are opened when first needed and kept per process, so that what refers to them can be pickled. A .gz is unpacked
to memory: fine for small sets; shards of much data are better left unpacked.
"""

import array
import gzip
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm1.engine.data.record import DataError, Unreadable


@dataclass(frozen=True)
class File:
    """A file as it was when indexed: one written anew is another, and no cache mixes the two up."""

    path: str
    version: int

    @classmethod
    def at(cls, path: Path) -> "File":
        return cls(str(path), path.stat().st_mtime_ns)

    @property
    def packed(self) -> bool:
        return self.path.lower().endswith("gz")

    def read(self, start: int, size: int) -> bytes:
        return _unpacked(self)[0][start : start + size] if self.packed else _opened(self).read(start, size)

    def whole(self) -> tuple[bytes | mmap.mmap, str | None]:
        """All bytes to index, and what is wrong with them."""
        if self.packed:
            return _unpacked(self)
        with open(self.path, "rb") as file:
            empty = not os.fstat(file.fileno()).st_size  # which mmap refuses
            return (b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), None


class _Descriptor:
    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.number, size, start)  # no shared offset, and no GIL while the disk is slow

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=256)  # of the 1024 files a process may usually have open
def _opened(file: File) -> _Descriptor:
    return _Descriptor(file.path)


@cache
def _unpacked(file: File) -> tuple[bytes, str | None]:
    chunks = []
    try:
        with gzip.open(file.path) as stream:
            while chunk := stream.read1(1 << 20):
                chunks.append(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not chunks:
            raise DataError(f"{file.path} is not a gzip file") from None
        return b"".join(chunks), f"its gzip stream is broken: {error}"
    return b"".join(chunks), None


class Member(NamedTuple):
    """A regular file in a tar: its bytes are at start … start + size, its first header (of a long name) at `header`."""

    name: str
    start: int
    size: int
    header: int


def members(file: File, damage: list[str], at: int = 0) -> Iterator[Member]:
    """Regular files of a tar from the header at byte `at` on. Appends to `damage`; raises DataError if it is no tar.

    Not tarfile: it takes a broken header amid the archive for its end, and 27 µs a member where this takes 6.
    """
    data, broken = file.whole()
    damage += [broken] if broken else []
    first, pax = at, {}
    while any(header := data[at : at + 512]):
        try:
            checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            if len(header) < 512 or int(header[148:156].strip(b" \0"), 8) != checksum:
                raise ValueError
            kind, start = header[156:157], at + 512
            size = int(pax.get(b"size", 0)) or _number(header[124:136])
            if b"1" <= kind <= b"6":  # links, folders, devices: no data follows, whatever the size says
                size = 0
            if size < 0:
                raise ValueError
            if start + size > len(data):
                damage.append(f"cut off at byte {len(data)}, inside a member")
                return
            if kind == b"x":
                pax |= _pax(data[start : start + size])
            elif kind == b"L":
                pax[b"path"] = data[start : start + size].rstrip(b"\0")
        except ValueError:
            if at == 0:
                raise DataError(f"{file.path} is not a tar archive") from None
            damage.append(f"broken header at byte {at}: what follows is lost")
            return
        at = start + -(-size // 512) * 512
        if kind in b"xLgK":
            continue  # about the next member
        if kind in (b"0", b"\0", b"7"):
            name = header[:100].split(b"\0", 1)[0]
            if header[257:263] == b"ustar\0" and header[345]:
                name = header[345:500].split(b"\0", 1)[0] + b"/" + name
            yield Member(pax.get(b"path", name).decode(errors="replace").removeprefix("./"), start, size, first)
        first, pax = at, {}
    if not header:
        if at == 0:
            raise DataError(f"{file.path} is empty, not a tar archive")
        damage.append(f"cut off at byte {len(data)}: there is no end-of-archive mark")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: too large for octal
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Extended header: "30 path=some/long/name\\n"… -> {b"path": b"some/long/name"}."""
    found = {}
    while data:
        length = int(data.partition(b" ")[0])
        if length < 1:
            raise ValueError
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        found[key], data = value, data[length:]
    return found


def read_member(tar: File, name: str) -> bytes:
    """Return the bytes of a member, the last of that name, as tar has it. Raises Unreadable."""
    try:
        hashes, headers, damage = _directory(tar)
        first, last = (int(np.searchsorted(hashes, hash(name), side=side)) for side in ("left", "right"))
        for header in reversed(headers[first:last].tolist()):
            member = next(members(tar, [], header), None)
            if member is not None and member.name == name:  # names of equal hash are told apart by the name itself
                return tar.read(member.start, member.size)
    except DataError as error:
        raise Unreadable(str(error)) from None
    raise Unreadable(f"there is no member {name!r} in {tar.path}" + (f", {damage}" if damage else ""))


@cache
def _directory(tar: File) -> tuple[np.ndarray, np.ndarray, str]:
    """Hashes of the member names int64 [n] sorted, bytes of their first headers int64 [n], damage.

    16 bytes a member, where a dict of names takes 300: a loader process holds those of all the tars it met. hash() of a
    string differs between processes, and so the table belongs to one: it is made in each, never pickled.
    """
    damage: list[str] = []
    pairs = array.array("q")
    for member in members(tar, damage):
        pairs.extend((hash(member.name), member.header))
    table = np.array(pairs, np.int64).reshape(-1, 2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0].copy(), table[:, 1].copy(), "; ".join(damage)
