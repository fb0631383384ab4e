"""Show that an image with broken or huge metadata is decoded, and one with damaged pixels is not."""

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from mm1.engine.data.images import decode
from mm1.engine.data.metadata import TIFF_PIXELS, without_metadata
from mm1.errors import Unreadable

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
MEBIBYTE = 1 << 20


def exif(orientation=6, kind=3):
    """Return EXIF of one entry, an orientation of TIFF's type `kind`, after JPEG's header."""
    value = struct.pack({3: "<HH", 4: "<I", 2: "<4s", 11: "<f", 5: "<I"}[kind], *([orientation, 0] if kind == 3 else [
        orientation]))  # fmt: skip
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def file(form, **options):
    out = io.BytesIO()
    image = Image.fromarray(PIXELS)
    (image.quantize(8) if form == "GIF" else image).save(out, form, **options)
    return out.getvalue()


def chunk(kind, data, crc=None):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(*chunks, after=()):
    """Return the picture with chunks before and after its pixels."""
    data = file("PNG")
    return data[:33] + b"".join(chunks) + data[33:-12] + b"".join(after) + data[-12:]


def segment(marker, content, length=None):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2 if length is None else length) + content


def jpeg(*segments):
    data = file("JPEG", quality=95)
    return data[:2] + b"".join(segments) + data[2:]


def webp(*chunks, flags=0x2C):
    """Return a lossless WebP in the extended form, with chunks after the pixels."""
    simple = file("WEBP", lossless=True)[12:]
    vp8x = b"VP8X" + struct.pack("<IIHBHB", 10, flags, 23, 0, 15, 0)
    body = b"WEBP" + vp8x + simple + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff(kind, data, size=None):
    return kind + struct.pack("<I", len(data) if size is None else size) + data + bytes(len(data) % 2)


def gif(*extensions):
    data = file("GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"".join(extensions) + data[at:]


def tiff(**entries):
    """Return an uncompressed TIFF with entries of its directory replaced by (type, count, value or offset)."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[305], tags[700] = "a description", "a program", XMP.replace(b"6", b"1")
    data = bytearray(file("TIFF", tiffinfo=tags, icc_profile=bytes(300), dpi=(72, 72)))
    at = struct.unpack_from("<I", data, 4)[0]
    for i in range(struct.unpack_from("<H", data, at)[0]):
        entry = at + 2 + 12 * i
        if (name := f"tag{struct.unpack_from('<H', data, entry)[0]}") in entries:
            struct.pack_into("<HII", data, entry + 2, *entries.pop(name))
    assert not entries
    return bytes(data)


def avif(**options):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    return file("AVIF", quality=100, subsampling="4:4:4", **options)


def avif_with_exif(header):
    """Return the picture with a text in its EXIF, whose first eight bytes are `header`."""
    block = Image.Exif()
    block[0x010E] = "a description"
    data = avif(exif=block)
    start = data.index(block.tobytes()[6:14])
    return data[:start] + header + data[start + 8 :]


TRUTHS = {
    "JPEG": lambda: np.asarray(Image.open(io.BytesIO(jpeg()))),
    "GIF": lambda: np.asarray(Image.open(io.BytesIO(file("GIF"))).convert("RGB")),
    "AVIF": lambda: np.asarray(Image.open(io.BytesIO(avif()))),
}
HUGE = zlib.compress(bytes(2 * MEBIBYTE))
BROKEN = {
    "PNG, EXIF that is no TIFF": lambda: png(chunk(b"eXIf", b"garbage!")),
    "PNG, EXIF cut off": lambda: png(chunk(b"eXIf", exif()[6:16])),
    "PNG, EXIF with headers of JPEG": lambda: png(chunk(b"eXIf", b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0")),
    "PNG, EXIF of a wrong checksum": lambda: png(chunk(b"eXIf", exif()[6:], crc=1)),
    "PNG, EXIF as broken text": lambda: png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nno hex")),
    "PNG, huge compressed text": lambda: png(chunk(b"zTXt", b"Comment\0\0" + HUGE)),
    "PNG, huge compressed text after": lambda: png(after=[chunk(b"zTXt", b"Comment\0\0" + HUGE)]),
    "PNG, huge text of Unicode": lambda: png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + HUGE)),
    "PNG, texts of 80 MiB": lambda: png(*[chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(MEBIBYTE)))] * 80),
    "PNG, text of a wrong checksum": lambda: png(chunk(b"tEXt", b"Comment\0text", crc=0)),
    "PNG, text of no zlib stream": lambda: png(chunk(b"zTXt", b"Comment\0\0no zlib")),
    "PNG, text of unknown compression": lambda: png(chunk(b"zTXt", b"Comment\0\7" + HUGE)),
    "PNG, text that is empty": lambda: png(*(chunk(kind, b"") for kind in (b"tEXt", b"zTXt", b"iTXt"))),
    "PNG, huge profile": lambda: png(chunk(b"iCCP", b"icc\0\0" + HUGE)),
    "PNG, profile of no zlib stream": lambda: png(chunk(b"iCCP", b"icc\0\0no zlib")),
    "PNG, profile cut off": lambda: png(chunk(b"iCCP", b"icc")),
    "PNG, gamma, density and chromaticities cut off": lambda: png(
        *(chunk(kind, b"\0") for kind in (b"gAMA", b"pHYs", b"cHRM", b"sRGB"))
    ),
    "PNG, bytes after the end": lambda: png(chunk(b"tEXt", b"a", crc=0)) + b"\r\n",
    "PNG, another one after the end": lambda: png(chunk(b"tEXt", b"a", crc=0)) + file("PNG")[:60],
    "PNG, an animation's header cut off": lambda: png(chunk(b"acTL", b"\0")),
    "JPEG, EXIF that is no TIFF": lambda: jpeg(segment(0xE1, b"Exif\0\0garbage!")),
    "JPEG, EXIF cut off": lambda: jpeg(segment(0xE1, exif(1)[:20])),
    "JPEG, EXIF of no content": lambda: jpeg(segment(0xE1, b"Exif\0\0")),
    "JPEG, EXIF shorter than said": lambda: jpeg(segment(0xE1, exif(1), length=12)),
    "JPEG, XMP that is none": lambda: jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<")),
    "JPEG, profile in parts that lack one": lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\3" + bytes(99))),
    "JPEG, profile without numbers": lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "JPEG, list of pictures that is none": lambda: jpeg(segment(0xE2, b"MPF\0garbage")),
    "JPEG, list of pictures cut off": lambda: jpeg(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0")),
    "JPEG, Photoshop's block cut off": lambda: jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\3\xed")),
    "JPEG, JFIF cut off": lambda: jpeg(segment(0xE0, b"JFIF")),
    "JPEG, Adobe's segment cut off": lambda: jpeg(segment(0xEE, b"Adobe")),
    "JPEG, segments without content": lambda: jpeg(*(segment(marker, b"") for marker in range(0xE0, 0xF0))),
    "JPEG, a comment without content": lambda: jpeg(segment(0xFE, b"")),
    "WebP, EXIF that is no TIFF": lambda: webp(riff(b"EXIF", b"garbage!")),
    "WebP, EXIF past the end": lambda: webp(riff(b"EXIF", b"II*\0", size=4000)),
    "WebP, XMP that is none": lambda: webp(riff(b"XMP ", b"\xff\xfe<")),
    "WebP, flags of what is not there": lambda: webp(),
    "GIF, a comment that is no text": lambda: gif(b"\x21\xfe\3\xff\xfe\xfd\0"),
    "GIF, a comment without content": lambda: gif(b"\x21\xfe\0"),
    "GIF, applications without content": lambda: gif(b"\x21\xff\0", b"\x21\xff\x0bNETSCAPE2.0\0"),
    "GIF, many comments": lambda: gif(*[b"\x21\xfe\xff" + bytes(255) + b"\0"] * 999),
    "TIFF, a text past the end": lambda: tiff(tag270=(2, 4000, 1 << 20)),
    "TIFF, a text of more bytes than the file": lambda: tiff(tag305=(2, 1 << 31, 8)),
    "TIFF, a resolution that is text": lambda: tiff(tag282=(2, 9, 8), tag283=(2, 9, 8), tag296=(3, 1, 3)),
    "TIFF, a resolution past the end": lambda: tiff(tag282=(5, 1, 1 << 20)),
    "TIFF, a profile past the end": lambda: tiff(tag34675=(7, 300, 1 << 20)),
    "TIFF, entries of unknown type": lambda: tiff(tag270=(99, 5, 5), tag700=(0, 5, 5)),
    "AVIF, EXIF that is no TIFF": lambda: avif_with_exif(b"zzzz\0\0\0\x08"),
    "AVIF, EXIF that points past its end": lambda: avif_with_exif(b"MM\0*\0\xff\xff\xff"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_costs_no_picture(name):
    truth = TRUTHS.get(name.split(",")[0], lambda: PIXELS)()
    assert np.array_equal(np.asarray(decode(BROKEN[name]())), truth)


TURNED = {
    "PNG with a huge profile": lambda: png(chunk(b"iCCP", b"icc\0\0" + HUGE), chunk(b"eXIf", exif()[6:])),
    "PNG after its pixels": lambda: png(chunk(b"tEXt", b"a", crc=0), after=[chunk(b"eXIf", exif()[6:])]),
    "PNG, headers of JPEG": lambda: png(chunk(b"eXIf", b"Exif\0\0Exif\0\0" + exif())),
    "PNG by XMP": lambda: png(chunk(b"tEXt", b"a", crc=0), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "JPEG with a broken one": lambda: jpeg(segment(0xE0, b"JFIF"), segment(0xE1, exif())),
    "JPEG by XMP": lambda: jpeg(segment(0xEE, b"Adobe"), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "WebP": lambda: webp(riff(b"EXIF", exif())),
    "WebP with XMP past the end": lambda: webp(riff(b"EXIF", exif()), riff(b"XMP ", b"<", size=4000)),
    "WebP without its last byte": lambda: webp(riff(b"EXIF", exif() + b"a"))[:-1],
    "WebP by XMP": lambda: webp(riff(b"XMP ", XMP), riff(b"EXIF", b"II*\0", size=4000)),
    "a long integer": lambda: png(chunk(b"eXIf", exif(6, kind=4)[6:])),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_an_orientation_that_can_be_read_is_heard(name):
    truth = np.asarray(Image.open(io.BytesIO(jpeg()))) if "JPEG" in name.split()[0] else PIXELS
    assert np.array_equal(np.asarray(decode(TURNED[name]())), np.rot90(truth, 3))


@pytest.mark.parametrize("orientation, kind", [(b"6\0\0\0", 2), (0, 3), (9, 3), (65535, 3), (1 << 20, 5)])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_lies(orientation, kind):
    assert np.array_equal(np.asarray(decode(png(chunk(b"eXIf", exif(orientation, kind)[6:])))), PIXELS)


def test_an_orientation_turns_whatever_else_its_block_holds():
    """Pillow reads this value, but cannot write it."""
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    block += struct.pack("<HHII", 0x0131, 7, 4, 0xFFFFFFFF) + bytes(4)
    assert np.array_equal(np.asarray(decode(png(chunk(b"eXIf", block)))), np.rot90(PIXELS, 3))


def test_damage_of_pixels_is_an_error_whatever_is_wrong_beside_it():
    text, noise = chunk(b"tEXt", b"a", crc=0), bytearray(png())
    noise[200] ^= 0x55
    for data in (bytes(noise), png(text)[:-300], png()[:16] + b"\xff" + png()[17:], jpeg(segment(0xE0, b"JFIF"))[:-400],
                 png(chunk(b"tRNS", b"\0\0", crc=0)), webp()[:-100], tiff(tag273=(4, 1, 1 << 20))):  # fmt: skip
        with pytest.raises(Unreadable, match=r"^broken image|^not an image|^image of"):
            decode(data)


def test_a_decompression_bomb_with_broken_metadata_stays_refused():
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0))
    with pytest.raises(Unreadable):
        decode(header + chunk(b"tEXt", b"a", crc=0) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""))


def bigtiff(count, at=16):
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", at, count) + bytes(40)


HOSTILE = {
    "TIFF, 2**60 entries": lambda: bigtiff(1 << 60),
    "TIFF, 2**64 - 1 entries": lambda: bigtiff((1 << 64) - 1),
    "TIFF, a directory at 2**64 - 1": lambda: bigtiff(1, at=(1 << 64) - 1),
    "TIFF, a directory at 2**62": lambda: bigtiff(1, at=1 << 62),
    "TIFF, 65535 entries": lambda: b"MM\0*\0\0\0\x08\xff\xff" + bytes(40),
    "PNG, a chunk of 4 GiB": lambda: png()[:33] + b"\xff\xff\xff\xfftEXt",
    "PNG, chunks without content": lambda: png()[:8] + bytes(12) * 5_000,
    "JPEG, segments of no length": lambda: b"\xff\xd8" + b"\xff\xe1\0\0" * 5_000,
    "JPEG, padding alone": lambda: b"\xff\xd8" + b"\xff" * 100_000,
    "WebP, a chunk of 4 GiB": lambda: webp()[:30] + b"EXIF\xff\xff\xff\xff",
    "WebP, chunks without content": lambda: webp()[:30] + b"ABCD\0\0\0\0" * 5_000,
    "GIF, blocks without an end": lambda: gif()[:13] + b"\x21\xfe" + b"\xff" * 100_000,
    "AVIF, boxes of no size": lambda: b"\0\0\0\x08ftypavif" + bytes(100_000),
    "AVIF, a box of 4 GiB": lambda: b"\0\0\0\x0cftypavif" + b"\xff\xff\xff\xffmeta",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_grows_with_the_bytes_of_a_file_whatever_numbers_stand_in_it(name):
    data = HOSTILE[name]()
    tracemalloc.start()
    try:
        assert len(without_metadata(data)) <= len(data)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(data) + MEBIBYTE
    finally:
        tracemalloc.stop()
    with pytest.raises(Unreadable):
        decode(data)


def test_what_decides_pixels_stays_byte_for_byte():
    assert without_metadata(png(chunk(b"tEXt", b"a\0b"), after=[chunk(b"tIME", bytes(7))])) == png()
    assert without_metadata(gif(b"\x21\xfe\1a\0")) == gif()
    assert without_metadata(jpeg(segment(0xFE, b"comment"), segment(0xE2, b"MPF\0"))) == jpeg()
    assert without_metadata(b"BM no file") == b"BM no file"
    assert {256, 257, 258, 259, 262, 273, 279, 320, 322, 325, 347} <= TIFF_PIXELS


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_directory_without_its_texts_is_the_same_picture(big, compression):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[305] = "a description", "a program"
    data = file("TIFF", tiffinfo=tags, big_tiff=big, compression=compression)
    bare = without_metadata(data)
    assert len(bare) == len(data)
    with TiffImagePlugin.TiffImageFile(io.BytesIO(bare)) as image:
        assert not {270, 305} & set(image.tag_v2)
        assert np.array_equal(np.asarray(image), PIXELS)


def test_every_cut_of_a_file_is_a_picture_or_an_error():
    for whole in (png(chunk(b"tEXt", b"a", crc=0)), jpeg(segment(0xE1, exif())), webp(riff(b"EXIF", exif())),
                  gif(b"\x21\xfe\3abc\0"), tiff()):  # fmt: skip
        for end in range(0, len(whole), 61):
            without_metadata(whole[:end])
            with suppress(Unreadable):
                assert decode(whole[:end]).mode == "RGB"


def grey_png(bits, colour, row, *chunks):
    """Return one row of samples of `bits` bits, packed."""
    width = len(row) * 8 // bits // {0: 1, 2: 3, 4: 2}[colour]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    idat = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + idat + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits, row, key, seen", [
    (1, b"\xaa", 1, [255, 0] * 4),
    (1, b"\xaa", 0, [255, 255] * 4),
    (2, b"\x1b", 1, [0, 255, 170, 255]),
    (4, b"\x05\xaf", 5, [0, 255, 170, 255]),
    (8, b"\x05\xaf", 5, [255, 175]),
    (16, struct.pack(">4H", 0, 257, 258, 40000), 257, [0, 255, 1, 156]),
])  # fmt: skip
def test_a_transparent_grey_of_any_depth_is_white(bits, row, key, seen):
    data = grey_png(bits, 0, row, chunk(b"tRNS", struct.pack(">H", key)))
    assert np.asarray(decode(data))[0].tolist() == [[value] * 3 for value in seen]


def test_a_transparent_colour_of_16_bits_is_white():
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0)
    data = grey_png(16, 2, row, chunk(b"tRNS", row[:6]))
    assert np.asarray(decode(data))[0].tolist() == [[255] * 3, [0x12, 0x56, 0]]


def test_alpha_of_16_bits_lies_over_white():
    data = grey_png(16, 4, struct.pack(">4H", 0x1280, 0, 0x9C40, 0xFFFF))
    assert np.asarray(decode(data))[0].tolist() == [[255] * 3, [0x9C] * 3]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_either_byte_order_are_scaled(order):
    values = struct.pack(f"{order}5H", 0, 257, 32768, 40000, 65535)
    tags = [(256, 5), (257, 1), (258, 16), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 10)]
    table = struct.pack(f"{order}H", len(tags)) + b"".join(struct.pack(f"{order}HHIHH", t, 3, 1, v, 0) for t, v in tags)
    data = ({"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8) + table + bytes(4)).ljust(122) + values
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 1, 128, 156, 255]


def test_avif_is_read_where_pillow_reads_it():
    truth = np.asarray(Image.open(io.BytesIO(avif())))
    assert np.abs(truth.astype(int) - PIXELS).mean() < 3
    assert np.array_equal(np.asarray(decode(avif())), truth)
    block = Image.Exif()
    block[0x0112] = 6
    assert np.array_equal(np.asarray(decode(avif(exif=block))), np.rot90(truth, 3))
