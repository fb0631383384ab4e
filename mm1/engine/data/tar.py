"""Random access to tar archives and plain files by byte offsets, as WebDataset shards need it.

Files are opened when first needed, once a process, so that objects that refer to them can be pickled. A .gz is unpacked
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
LENGTH_DIGITS = 20  # of the length of a record of an extended header with its space: more than any file needs
MAX_HOLES = 1 << 26  # bytes in the holes of a sparse member: an archive of a kilobyte can claim any number


@dataclass(frozen=True)
class File:
    """A file with the modification time that it had when it was indexed, so that caches distinguish its versions."""

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
        """Return `size` bytes from `start` on of the unpacked file, fewer at its end. Raises OSError."""
        return _unpacked(self)[0][start : start + size] if self.is_gzip else _opened(self).read(start, size)

    def whole(self) -> tuple[bytes | mmap.mmap, str | None]:
        """Return all unpacked bytes, and a description of damage or None."""
        if self.is_gzip:
            return _unpacked(self)
        with open(self.path, "rb") as file:
            empty = not os.fstat(file.fileno()).st_size  # which mmap refuses
            return (b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), None


class _Descriptor:
    """An open file that several threads read at any offset. Raises OSError if it cannot be opened."""

    def __init__(self, path: str):
        self.file, self.lock = open(path, "rb", buffering=0), Lock()  # noqa: SIM115

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, fewer at the end of the file."""
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), size, start)  # no shared offset, and no GIL while the disk is slow
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
    chunks = []
    try:
        with gzip.open(file.path) as stream:
            while chunk := stream.read1(1 << 20):
                chunks.append(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not chunks:
            raise UserError(f"{file.path} is not a gzip file") from None
        return b"".join(chunks), f"its gzip stream is broken: {error}"
    return b"".join(chunks), None


class Member(NamedTuple):
    """A member of an archive. The bytes of a regular file are at start … start + size.

    kind: "" for a regular file, else its type in words. sparse: its bytes are stored without its holes. header: the
    position of its first header (which may be that of a long name).
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

    Archives that were appended to one another are read as one (`tar --ignore-zeros`). Not tarfile: it takes a broken
    header amid the archive for its end, and 27 µs a member where this takes 6.
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
                raise UserError(f"{file.path} is not a tar archive") from None
            damage.append(f"broken header at byte {at}: what follows is lost")
            return
        at = start + -(-size // 512) * 512
        if kind in b"xLgK":
            continue  # about the next member
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        name = pax.get(b"GNU.sparse.name", pax.get(b"path", name)).decode(errors="replace").removeprefix("./")
        words = FOLDER if name.endswith("/") else KINDS.get(kind)
        if words is None:
            words = f"a member of the unknown type {kind.decode('latin-1')!r}"
        sparse = kind == b"S" or (bool(pax) and any(key.startswith(b"GNU.sparse.") for key in pax))
        yield Member(name, start, size, first, words, sparse)
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
    """Return where the bytes of a sparse member of the old GNU form begin: after the blocks that continue its map."""
    more = header[482]
    while more:
        if at + 512 > len(data):
            raise ValueError
        more, at = data[at + 504], at + 512
    return at


def read_sparse(file: File, header: int) -> bytes:
    """Return the bytes of a sparse member with its holes, which are zeros. Raises Unreadable."""
    try:
        with io.BytesIO(_unpacked(file)[0]) if file.is_gzip else open(file.path, "rb") as stream:
            stream.seek(header)
            with tarfile.TarFile(fileobj=stream) as tar:
                stored, whole = next(members(file, [], header), None), tar.next()
                if stored is None or whole is None:
                    raise Unreadable("a broken sparse member of the tar: it is not where the index has it")
                if whole.size > stored.size + MAX_HOLES:
                    counts = f"{stored.size} bytes that stand for {whole.size}, expected at most {MAX_HOLES} more"
                    raise Unreadable(f"a sparse member of the tar, {counts}")
                content = tar.extractfile(whole)
                return content.read() if content is not None else b""
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"a broken sparse member of the tar: {error}") from None


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: too large for octal
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
    """Return the bytes of the last member of a name, as tar would extract it. Raises Unreadable."""
    try:
        hashes, headers, damage = _directory(tar)
        first, last = (int(np.searchsorted(hashes, hash(name), side=side)) for side in ("left", "right"))
        for header in reversed(headers[first:last].tolist()):
            member = next(members(tar, [], header), None)
            if member is not None and member.name == name:  # names of equal hash are told apart by the name itself
                if member.kind:
                    raise Unreadable(f"{name!r} in {tar.path} is {member.kind}, which is not followed")
                return member.read(tar)
    except UserError as error:
        raise Unreadable(str(error)) from None
    raise Unreadable(f"there is no member {name!r} in {tar.path}" + (f", {damage}" if damage else ""))


@cache
def _directory(tar: File) -> tuple[np.ndarray, np.ndarray, str]:
    """Return hashes of the member names int64 [n] sorted, bytes of their first headers int64 [n], and the damage.

    They take 16 bytes a member, where a dict of names takes 300: a loader process keeps those of all tars that it has
    read. hash() of a string differs between processes, so that each makes a table of its own.
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
