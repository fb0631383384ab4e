"""Remove metadata from image files, so that an image with broken metadata can be decoded.

Pillow refuses a whole file for a text of over 1 MiB, an EXIF block that is no TIFF or a wrong checksum of a comment.
Browsers, OpenCV and GIMP show such images. The parts that determine the pixels and the orientation are kept, with their
bytes and order unchanged; damaged pixels stay damaged.
Sources: PNG (W3C, third edition), JPEG (T.81, annex B), WebP container, GIF89a, TIFF 6.0, HEIF (ISO 23008-12).
"""

import re
import struct
import zlib

PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # chunk -> its flag in VP8X
XMP_KEYWORD = b"XML:com.adobe.xmp\0"
LARGEST_XMP = 1 << 16
# Tags of sizes, samples, compression and its tables, strips and tiles, colours, alpha and orientation.
TIFF_PIXELS = {254, *range(256, 260), 262, 266, 273, 274, *range(277, 281), 284, 292, 293, 317, 320, 321,
               *range(322, 326), 332, 334, *range(338, 342), 347, *range(512, 522), *range(529, 533)}  # fmt: skip


def without_metadata(data: bytes) -> bytes:
    """Return a file without the parts that neither pixels nor orientation need; an unknown or broken file as it is.

    Time and memory are linear in the bytes of the file, whatever sizes its headers claim.
    """
    for start, strip in STRIPPED.items():
        if re.match(start, data, re.DOTALL):
            try:
                return strip(data)
            except (struct.error, IndexError, OverflowError):  # the file is cut off, or has a position after its end
                return data
    return data


def _png(data: bytes) -> bytes:
    parts, at, kind = [data[:8]], 8, b""
    while at + 8 <= len(data) and kind != b"IEND":  # data after the end does not belong to the image
        size, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + size]
        content, checksum = chunk[8:-4], chunk[-4:]
        is_xmp = kind == b"iTXt" and content.startswith(XMP_KEYWORD + b"\0") and len(content) < LARGEST_XMP
        has_orientation = (kind == b"eXIf" or is_xmp) and checksum == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if kind in PNG_PIXELS or has_orientation:
            parts.append(chunk)
        at += 12 + size
    return b"".join(parts)


def _jpeg(data: bytes) -> bytes:
    parts, at = [data[:2]], 2
    while (at := data.find(b"\xff", at)) >= 0:
        kind = data[at + 1]
        if kind in (0x00, 0xFF):  # junk or padding
            at += 1
            continue
        if kind == 0xDA:  # the scan, which is the rest of the file
            break
        size = 0 if kind == 0x01 or 0xD0 <= kind <= 0xD9 else struct.unpack_from(">H", data, at + 2)[0]
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        # JFIF's and Adobe's segments determine the colours, EXIF and XMP the orientation.
        if not is_metadata or (kind == 0xE0 and size >= 16) or kind == 0xE1 or (kind == 0xEE and size >= 14):
            parts.append(data[at : at + 2 + size])
        at += 2 + size
    return b"".join(parts) + (data[at:] if at >= 0 else b"")


def _webp(data: bytes) -> bytes:
    """Return a WebP without ICCP, and without EXIF and XMP that are cut off: others may have the orientation."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : at + 8 + size]
        if kind not in WEBP_METADATA or (kind != b"ICCP" and len(content) == size):
            chunks.append((kind, size, content))
        at += 8 + size + size % 2
    gone = sum(flag for kind, flag in WEBP_METADATA.items() if kind not in {kind for kind, _, _ in chunks})
    parts = [b"WEBP"]
    for kind, size, content in chunks:
        if kind == b"VP8X":
            content = bytes([content[0] & ~gone]) + content[1:]
        parts += [struct.pack("<4sI", kind, size), content, bytes(size % 2 if len(content) == size else 0)]
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: bytes) -> bytes:
    table = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    at = 13 + table
    parts = [data[:at]]
    while data[at] == 0x21:
        start, at = at, at + 2
        while data[at]:
            at += 1 + data[at]
        at += 1
        if data[start + 1] == 0xF9:  # which colour is transparent
            parts.append(data[start:at])
    return b"".join(parts) + data[at:]


def _tiff(data: bytes) -> bytes:
    """Return a TIFF with the entries of the first directory that determine pixels, and the data that they point to."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count_form, entry, link = ("Q", 20, 8) if big else ("H", 12, 4)
    (count,) = struct.unpack_from(order + count_form, data, at)
    first = at + struct.calcsize(count_form)
    if first + count * entry > len(data):
        return data
    entries = [data[i : i + entry] for i in range(first, first + count * entry, entry)]
    parts = [e for e in entries if struct.unpack_from(order + "H", e)[0] in TIFF_PIXELS]
    table = struct.pack(order + count_form, len(parts)) + b"".join(parts) + bytes(link)
    return data[:at] + table + data[at + len(table) :]


def _avif(data: bytes) -> bytes:
    """Return an AVIF whose EXIF item has an unknown type. Nothing is removed, because boxes refer to positions."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8:  # a box up to the end, or with a size of 64 bits: "meta" is neither
            break
        if kind == b"meta":
            meta = re.sub(rb"(infe.{8})Exif", rb"\1skip", data[at : at + size], flags=re.DOTALL)
            return data[:at] + meta + data[at + size :]
        at += size
    return data


STRIPPED = {
    rb"\x89PNG\r\n\x1a\n": _png, rb"\xff\xd8": _jpeg, rb"RIFF....WEBP": _webp, rb"GIF8[79]a": _gif,
    rb"II[*+]\0|MM\0[*+]": _tiff, rb"....ftypavi[fs]": _avif,
}  # fmt: skip
