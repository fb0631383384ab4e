"""Read tar archives and plain files at random byte offsets, as WebDataset shards need it.

Each process opens a file when it first reads it, so that objects that refer to files can be pickled. A .gz is unpacked
to memory: this suits small sets; large shards should not be compressed.
"""

import array
import gzip
import io
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from mm1.errors import Unreadable, UserError

TARS = (".tar", ".tar.gz", ".tgz")
FOLDER = "a folder"
KINDS = {
    b"0": "", b"\0": "", b"7": "", b"S": "", b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device",
    b"4": "a block device", b"5": FOLDER, b"6": "a pipe", b"D": FOLDER, b"M": "a part of a file of several volumes",
    b"V": "a label",
}  # fmt: skip
ZEROS = bytes(1 << 16)
LENGTH_DIGITS = 20  # characters in which the length of a record of an extended header is looked for
MAX_HOLES = 1 << 26  # bytes in the holes of a sparse member: an archive of a kilobyte can claim any number


@dataclass(frozen=True)
class File:
    """Name a file and its modification time when it was indexed, so that caches distinguish its versions."""

    path: str
    version: int

    @classmethod
    def at(cls, path: Path) -> "File":
        """Return the current version of a file. Raises OSError."""
        return cls(str(path), path.stat().st_mtime_ns)

    @property
    def is_gzip(self) -> bool:
        """Return whether the file is a .gz or .tgz."""
        return self.path.lower().endswith("gz")

    def read(self, start: int, size: int) -> bytes:
        """Return up to `size` bytes of the unpacked file from `start` on. Raises OSError."""
        return _unpacked(self)[0][start : start + size] if self.is_gzip else _opened(self).read(start, size)

    def whole(self) -> tuple[bytes | mmap.mmap, str | None]:
        """Return all unpacked bytes, and a description of the damage or None."""
        if self.is_gzip:
            return _unpacked(self)
        with open(self.path, "rb") as file:
            is_empty = not os.fstat(file.fileno()).st_size  # mmap refuses an empty file
            return (b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), None


class _Descriptor:
    """Hold an open file that several threads read at any offset. Raises OSError if it cannot be opened."""

    def __init__(self, path: str):
        self.file, self.lock = open(path, "rb", buffering=0), Lock()  # noqa: SIM115

    def read(self, start: int, size: int) -> bytes:
        """Return up to `size` bytes from `start` on."""
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), size, start)  # without a shared offset, and without the GIL
        with self.lock:  # Windows
            self.file.seek(start)
            return self.file.read(size)

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()


@lru_cache(maxsize=256)  # of the 1024 files a process may usually have open
def _opened(file: File) -> _Descriptor:
    return _Descriptor(file.path)


@cache
def _unpacked(file: File) -> tuple[bytes, str | None]:
    chunks, damage = [], None
    try:
        with gzip.open(file.path) as stream:
            while chunk := stream.read1(1 << 20):
                chunks.append(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not chunks:
            raise UserError(f"{file.path} is not a gzip file") from None
        damage = f"its gzip stream is broken: {error}"
    return b"".join(chunks), damage


class Member(NamedTuple):
    """Locate a member of an archive. The bytes of a regular file are at start … start + size.

    kind: "" for a regular file, else a description of its type. sparse: its holes are not stored. header: the position
    of its first header (which may be that of a long name).
    """

    name: str
    start: int
    size: int
    header: int
    kind: str = ""
    sparse: bool = False

    def read(self, tar: File) -> bytes:
        """Return the bytes of a regular file. Raises Unreadable."""
        return read_sparse(tar, self.header) if self.sparse else tar.read(self.start, self.size)


def members(file: File, damage: list[str], at: int = 0) -> Iterator[Member]:
    """Yield members of a tar from the header at byte `at` on. Appends to `damage`; raises UserError if it is no tar.

    Archives that were appended to one another are read as one (`tar --ignore-zeros`). The standard tarfile would treat
    a broken header inside the archive as its end, and take 27 µs for a member instead of 6.
    """
    data, broken = file.whole()
    damage += [broken] if broken else []
    first, pax, ended = at, {}, False
    while header := data[at : at + 512]:
        if not any(header):
            at = first = _skip_zeros(data, at)
            pax, ended = {}, True
            continue
        ended = False
        try:
            checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            if len(header) < 512 or int(header[148:156].strip(b" \0"), 8) != checksum:
                raise ValueError
            kind, start = header[156:157], at + 512
            if kind == b"S":
                start = _skip_map(data, header, start)
            size = int(pax.get(b"size", 0)) or _number(header[124:136])
            if b"1" <= kind <= b"6":  # links, folders, devices: no data follows, whatever the size is
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
                raise UserError(f"{file.path} is not a tar archive") from None
            damage.append(f"broken header at byte {at}: the rest is lost")
            return
        at = start + -(-size // 512) * 512
        if kind in b"xLgK":  # a header of the next member
            continue
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        name = pax.get(b"GNU.sparse.name", pax.get(b"path", name)).decode(errors="replace").removeprefix("./")
        description = FOLDER if name.endswith("/") else KINDS.get(kind)
        if description is None:
            description = f"a member of the unknown type {kind.decode('latin-1')!r}"
        sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax)
        yield Member(name, start, size, first, description, sparse)
        first, pax = at, {}
    if not ended:
        if at == 0:
            raise UserError(f"{file.path} is empty, not a tar archive")
        damage.append(f"cut off at byte {len(data)}: there is no end-of-archive mark")


def _skip_zeros(data: bytes | mmap.mmap, at: int) -> int:
    """Return the position of the first block of 512 bytes from `at` on that is not all zeros, or the end."""
    step = len(ZEROS)
    while data[at : at + step] == ZEROS:
        at += step
    while at < len(data) and not any(data[at : at + 512]):
        at += 512
    return min(at, len(data))


def _skip_map(data: bytes | mmap.mmap, header: bytes, at: int) -> int:
    """Return the position after the blocks that continue the map of a sparse member of the old GNU form."""
    more = header[482]
    while more:
        if at + 512 > len(data):
            raise ValueError
        more, at = data[at + 504], at + 512
    return at


def read_sparse(file: File, header: int) -> bytes:
    """Return the bytes of a sparse member, with zeros in its holes. Raises Unreadable."""
    try:
        with io.BytesIO(_unpacked(file)[0]) if file.is_gzip else open(file.path, "rb") as stream:
            stream.seek(header)
            with tarfile.TarFile(fileobj=stream) as tar:
                stored, whole = next(members(file, [], header), None), tar.next()
                if stored is None or whole is None:
                    raise Unreadable("a broken sparse member of the tar: it is not at its indexed position")
                if whole.size > stored.size + MAX_HOLES:
                    sizes = f"{stored.size} stored bytes of {whole.size}, expected at most {MAX_HOLES} in holes"
                    raise Unreadable(f"a sparse member of the tar has {sizes}")
                content = tar.extractfile(whole)
                return content.read() if content is not None else b""
    except Unreadable:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise Unreadable(f"a broken sparse member of the tar: {error}") from None


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's form of numbers that are too large for octal
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Return the fields of an extended header: "30 path=some/long/name\\n"… is {b"path": b"some/long/name"}."""
    fields, at = {}, 0
    while at < len(data):
        length = int(data[at : at + LENGTH_DIGITS].partition(b" ")[0])
        if length < 1:
            raise ValueError
        key, _, value = data[at : at + length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        fields[key], at = value, at + length
    return fields


def read_member(tar: File, name: str) -> bytes:
    """Return the bytes of the last member with this name, as tar would extract it. Raises Unreadable."""
    try:
        hashes, headers, damage = _directory(tar)
        first, last = (int(np.searchsorted(hashes, hash(name), side=side)) for side in ("left", "right"))
        for header in reversed(headers[first:last].tolist()):
            member = next(members(tar, [], header), None)
            if member is not None and member.name == name:  # the names of equal hashes may differ
                if member.kind:
                    raise Unreadable(f"{name!r} in {tar.path} is {member.kind}, which is not followed")
                return member.read(tar)
    except UserError as error:
        raise Unreadable(str(error)) from None
    raise Unreadable(f"no member {name!r} in {tar.path}" + (f", {damage}" if damage else ""))


@cache
def _directory(tar: File) -> tuple[np.ndarray, np.ndarray, str]:
    """Return hashes of the member names int64 [n] sorted, bytes of their first headers int64 [n], and the damage.

    A member takes 16 bytes, in a dict of names 300: a loader process keeps the tables of all tars that it has read.
    hash() of a string differs between processes, so that each makes a table of its own.
    """
    damage: list[str] = []
    pairs = array.array("q")
    for member in members(tar, damage):
        if member.kind == FOLDER:
            continue
        pairs.extend((hash(member.name), member.header))
    table = np.array(pairs, np.int64).reshape(-1, 2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0].copy(), table[:, 1].copy(), "; ".join(damage)
