"""Read the media that documents refer to: paths, members of tars, and data: URLs.

Documents are not trusted: no other URL is fetched, and no reference leads out of the folder of its document.
"""

import base64
import os
import re
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mm1.engine.data.tar import TARS, File, read_member
from mm1.errors import Unreadable

BASE64_PIECE = 1 << 18  # characters that one call decodes
PERCENT_PIECE = 1 << 16
URL_HEAD = 1000  # maximum number of characters of a data: URL before its data
HEX = np.full(256, 255, np.uint8)  # values of hexadecimal digits by their codes
for _code in b"0123456789abcdefABCDEF":
    HEX[_code] = int(chr(_code), 16)


def decode_base64(text: str) -> bytes:
    """Decode base64 that may contain white space. Raises ValueError.

    It is decoded in pieces: one call on 30 MB would hold the GIL, and so block all other threads, for 0.2 s.
    """
    pieces: list[bytes] = []
    rest = ""
    for at in range(0, len(text), BASE64_PIECE):
        rest += "".join(text[at : at + BASE64_PIECE].split())
        if rest and pieces and len(pieces[-1]) % 3:
            raise ValueError("data after the padding")
        if whole := len(rest) // 4 * 4:
            pieces.append(base64.b64decode(rest[:whole], validate=True))
            rest = rest[whole:]
    return b"".join([*pieces, base64.b64decode(rest, validate=True)])


def decode_percent(text: str, piece: int = PERCENT_PIECE) -> bytes:
    """Decode ASCII text with percent-encoded bytes; a percent sign without two hexadecimal digits is kept.

    It is decoded in pieces of `piece` characters (at least 3), like base64, and in arrays: urllib makes an object for
    each percent sign, which takes seconds for a few megabytes.
    """
    pieces: list[bytes] = []
    at = 0
    while at < len(text):
        codes = np.frombuffer(text[at : at + piece].encode("ascii"), np.uint8).copy()
        digits = HEX[codes]
        places = np.flatnonzero((codes[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16))
        codes[places] = 16 * digits[places + 1] + digits[places + 2]
        keep = np.ones(len(codes), bool)
        keep[places + 1] = keep[places + 2] = False
        cut = len(codes)
        if at + cut < len(text) and (rest := text.find("%", at + cut - 2, at + cut)) >= 0 and keep[rest - at]:
            cut = rest - at  # the digits of this sign are in the next piece
        pieces.append(codes[:cut][keep[:cut]].tobytes())
        at += cut
    return b"".join(pieces)


def read_image(name: Any, folder: Path) -> bytes:
    """Return the bytes of the image that a document in `folder` refers to. Raises Unreadable.

    name: a path below the folder, "some.tar/member.png" of a tar there, or a data: URL of an image.
    """
    if not isinstance(name, str):
        raise Unreadable(f"image is of type {type(name).__name__}, expected a string or bytes")
    if name[:5].lower() == "data:":  # RFC 2397: a type, parameters, "base64", and data that may be percent-encoded
        comma = name.find(",", 0, URL_HEAD)
        head, payload = name[: max(comma, 0)], name[comma + 1 :]
        kind, *parameters = head[5:].lower().split(";")
        if not re.fullmatch(r"image/[\w.+-]+", kind.strip()):
            raise Unreadable(f"image is {(head or name)[:60]!r}, expected data:image/…;base64")
        if not payload.isascii():
            raise Unreadable("a data: URL has characters that are not ASCII")
        if not parameters or parameters[-1].strip() != "base64":
            return decode_percent(payload)
        payload = decode_percent(payload).decode("ascii", "replace") if "%" in payload else payload
        try:
            return decode_base64(payload)
        except ValueError as error:
            raise Unreadable(f"image of broken base64: {error}") from None
    if re.match(r"[A-Za-z][\w.+-]*://", name):
        raise Unreadable(
            f"image {name[:200]!r} is a URL, which is never fetched: download the images and name their files, "
            "as docs/data.md says under OBELICS"
        )
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise Unreadable(f"image {name!r} is not a path inside the shard's folder")
    for tar in path.parents:
        if tar.name.lower().endswith(TARS) and (folder / tar).is_file():
            return read_member(File.at(_inside(tar, folder)), path.relative_to(tar).as_posix())
    if not (folder / path).is_file():
        raise Unreadable(f"no image {name!r} in {folder}")
    return _inside(path, folder).read_bytes()


def _inside(path: PurePosixPath, folder: Path) -> Path:
    """Return the file at a path below the folder. Raises Unreadable if a symbolic link leads out of the folder."""
    # A path without links is not resolved, because that takes longer than reading a small image. Only on POSIX systems
    # do the parts of a path show all links.
    steps = islice(accumulate(path.parts, os.path.join, initial=str(folder)), 1, None)
    if os.name == "posix" and not any(map(os.path.islink, steps)):
        return folder / path
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise Unreadable(
            f"image {str(path)!r} leads out of the shard's folder by a symbolic link, which is not followed"
        )
    return target
