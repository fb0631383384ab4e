"""Write the data of `mm1 demo aim` next to this file, from the folder that Debian's package openclipart-png installs.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb unpacked
    python -m mm1.engine.data.clipart.make unpacked/usr/share/openclipart/png [folder]

Each drawing is cut to what is not white and scaled to at most 48 pixels a side, on white. The SHA-256 of a drawing's
path decides whether it is a test image. The same libraries write the same bytes in each run. It takes four minutes.
"""

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from mm1.engine.data.images import decode
from mm1.errors import Unreadable

SIDE = 48  # pixels of the longer side
THUMBNAIL = 8  # pixels of the square in which drawings are compared
SAME = 4.0  # mean difference of two thumbnails, of 255, below which one of the drawings is left out
SLIMMEST = 6  # ratio of the sides above which a drawing is left out
MAX_PIXELS, MAX_BYTES = 8_000_000, 2_000_000  # of a file; larger ones are left out
TEST = 0.2  # share of the drawings of a class that are test images
LEFT_OUT = ("shapes/stars/", "special/")  # stars that a program drew, patterns and tests of renderers
# A class is named after the last part of its folder. Folders that collect drawings of any subject are no class: their
# drawings are training images without a class.
CLASSES = (
    "animals/birds", "animals/bugs", "animals/mammals", "buildings", "computer/buttons", "computer/hardware",
    "education", "electronics", "food/beverages", "food/desserts", "food/fruit", "office", "people", "plants",
    "recreation/games", "recreation/music", "recreation/sports", "shapes/arrows", "shapes/jigsaw",
    "signs_and_symbols/flags", "signs_and_symbols/led", "signs_and_symbols/map_symbols", "tools", "transportation",
)  # fmt: skip


def class_of(path: str) -> str | None:
    """Return the class of a drawing by its path in the package, such as "animals/birds/owl.png"; None without one."""
    return next((name.rpartition("/")[2] for name in CLASSES if path.startswith(f"{name}/")), None)


def is_test(path: str) -> bool:
    """Return whether the drawing of a class is a test image."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) < TEST * 2**64


def drawing(data: bytes) -> Image.Image:
    """Return a drawing in RGB as it is stored. Raises Unreadable for files that are huge, broken, empty or slim."""
    if len(data) > MAX_BYTES:
        raise Unreadable(f"file of {len(data)} bytes, expected at most {MAX_BYTES}")
    image = decode(data, ("PNG",), MAX_PIXELS)
    box = ImageChops.invert(image).getbbox()
    if box is None:
        raise Unreadable("all pixels are white")
    image = image.crop(box)
    if max(image.size) > SLIMMEST * min(image.size):
        raise Unreadable(f"drawing of {image.width} x {image.height} pixels, expected a ratio of at most {SLIMMEST}")
    scale = SIDE / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def unique(drawings: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """Return the drawings without those that look like an earlier one; drawings of a class come first."""
    kept, paths = np.empty((len(drawings), 3 * THUMBNAIL**2), np.float32), list[str]()
    for path in sorted(drawings, key=lambda path: (class_of(path) is None, path)):
        small = drawings[path].resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        pixels = np.asarray(small, np.float32).ravel()
        if not (np.abs(kept[: len(paths)] - pixels).mean(1) < SAME).any():
            kept[len(paths)] = pixels
            paths.append(path)
    return {path: drawings[path] for path in paths}


def write_shard(file: Path, drawings: dict[str, Image.Image]) -> None:
    """Write a gzipped tar of drawings in WebP without loss, each with its class, if it has one, in a .cls."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, (path, image) in enumerate(sorted(drawings.items())):
            packed, label = io.BytesIO(), class_of(path)
            image.save(packed, "WEBP", lossless=True, quality=100, method=6)
            for extension, body in (("webp", packed.getvalue()), ("cls", (label or "").encode())):
                if body:
                    info = tarfile.TarInfo(f"{key:04d}.{extension}")  # a new TarInfo has time, owner and group 0
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    with file.open("wb") as stream, gzip.GzipFile("", "wb", 9, stream, mtime=0) as packed:
        packed.write(buffer.getvalue())


def make(package: Path, folder: Path) -> None:
    """Write train.tar.gz and test.tar.gz, and print what was left out."""
    drawings, refused = dict[str, Image.Image](), 0
    for file in sorted(package.rglob("*.png")):
        path = file.relative_to(package).as_posix()
        if file.is_symlink() or not file.is_file() or path.startswith(LEFT_OUT):
            continue
        try:
            drawings[path] = drawing(file.read_bytes())
        except Unreadable as error:
            refused += 1
            print(f"{path}: {error.reason}")
    kept = unique(drawings)
    test = {path: image for path, image in kept.items() if class_of(path) and is_test(path)}
    train = {path: image for path, image in kept.items() if path not in test}
    write_shard(folder / "train.tar.gz", train)
    write_shard(folder / "test.tar.gz", test)
    labelled = sum(class_of(path) is not None for path in train)
    print(f"{refused} left out, {len(drawings) - len(kept)} look like another one")
    print(f"{len(train)} training images, {labelled} with a class; {len(test)} test images")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
