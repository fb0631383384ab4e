"""Define the codec of images: encoded bytes → RGB images → pixels uint8 [H, W, 3], both sides multiples of a patch."""

import math
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from mm1.engine.data.metadata import without_metadata
from mm1.engine.data.record import EMPTY_IMAGE, View, max_patches
from mm1.errors import Unreadable, UserError

# PIL hands some formats, such as EPS, to an interpreter: files from the web must not choose that.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
MAX_PIXELS = 178_956_970  # PIL's default limit, which applies here even if a program has raised PIL's
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PIL_WARNS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode(data: bytes, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the first frame as RGB, turned upright by its EXIF, on white where it is transparent. Raises Unreadable.

    An image with broken or huge metadata is decoded too; if its orientation cannot be read, it is not turned.
    """
    # catch_warnings would change global state too, and a data thread would race with the training thread for it.
    if warnings.filters[:1] != [_PIL_WARNS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return _decoded(data, formats, max_pixels)
    except Unreadable:
        raise
    except Exception as error:  # PIL's codecs raise many types of errors on bad bytes
        if (bare := without_metadata(data)) != data:
            with suppress(Exception):
                return _decoded(bare, formats, max_pixels)
        if isinstance(error, UnidentifiedImageError):  # PIL's message contains a memory address
            raise Unreadable(f"not an image in one of the formats {', '.join(formats)}") from None
        raise Unreadable(f"broken image: {type(error).__name__}: {error}") from None


def _decoded(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    image = Image.open(BytesIO(data), formats=formats)
    if not 0 < image.width * image.height <= max_pixels:
        raise Unreadable(f"image of {image.width} x {image.height} pixels, expected at most {max_pixels}, at least 1")
    key = image.info.get("transparency")
    if image.format == "PNG" and not isinstance(key, bytes | None):  # PIL scales samples to 8 bits, but not this colour
        bits = data[24]
        if bits == 16 and image.mode == "RGB":
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif bits in (2, 4) and image.mode == "L":
            image.info["transparency"] = key * 255 // ((1 << bits) - 1)
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if not image.width * image.height:
        raise Unreadable(f"image of {image.width} x {image.height} pixels")
    turn = TURNS.get(_orientation(image))
    return _rgb(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF or XMP, from 1 to 8; 1 (not turned) if none can be read."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # no TIFF after the header, which some programs write several times
        exif, value = Image.Exif(), None
        with suppress(Exception):
            exif.load(re.sub(rb"^(Exif\0\0)+", b"", image.info["exif"]))
            value = exif.get(ORIENTATION)
    return value if isinstance(value, int) else 1


def read(path: str | Path) -> Image.Image:
    """Return the image in a file that the user names, as decode does. Raises UserError."""
    try:
        return decode(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Unreadable as error:
        raise UserError(f"{path}: {error.reason}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; convert("L") would clip at 255
        values = np.asarray(image).astype(np.int64)
        scaled = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
        scaled[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(scaled)
    elif image.mode == "F":  # values are 0..1 or 0..255, which the file does not declare
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
        values = values * 255 if values.max() <= 1 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImagePolicy:
    """Decode images and resize them (bicubic) to whole patches, as a model's settings say.

    mode "squash": to size x size, which changes the aspect ratio, as DFN5B-CLIP ViT-H-14-378 was trained.
    mode "native": to at most `patches` patches, with the aspect ratio as near as whole patches allow; an image is
    enlarged only by rounding its sides to whole patches, and not resized at all if it fits.
    parts: k > 1 adds k x k parts of the image to the whole one, each of size x size, row by row (MM1, section 5: an
    image of 1344 pixels becomes an overview and four parts of 672).
    """

    kind: ClassVar[str] = "image"
    empty: ClassVar[View] = EMPTY_IMAGE

    patch: int
    mode: str = "squash"
    size: int = 378
    patches: int = 729
    parts: int = 1

    def __post_init__(self):
        if self.mode not in ("squash", "native"):
            raise ValueError(f"ImagePolicy: mode is {self.mode!r}, expected 'squash' or 'native'")
        if self.patch < 1 or self.patches < 1:
            raise ValueError(f"ImagePolicy: patch={self.patch} patches={self.patches}, expected positive")
        if self.mode == "squash" and (self.size < 1 or self.size % self.patch):
            raise ValueError(f"ImagePolicy: size is {self.size}, expected a multiple of patch {self.patch}")

    @property
    def max_patches(self) -> int:
        """Return the largest number of patches of one view."""
        return max_patches(self)

    @property
    def max_views(self) -> int:
        """Return the number of views of an image."""
        return 1 + self.parts**2 if self.parts > 1 else 1

    @property
    def max_bytes(self) -> int:
        """Return the largest number of bytes of an image's views."""
        return 3 * self.max_views * self.max_patches * self.patch**2

    def decode(self, data: bytes) -> Image.Image:
        """Return the first frame of an image file (see the function decode). Raises Unreadable."""
        return decode(data)

    def check(self, medium: Any) -> Image.Image:
        """Return a PIL image in the form in which decode returns it. Raises UserError for anything else."""
        if not isinstance(medium, Image.Image):
            raise UserError(f"a prompt is a sequence of texts and PIL images, not {type(medium).__name__}")
        try:
            return _upright(medium)
        except Unreadable as error:
            raise UserError(str(error)) from None
        except Exception as error:
            raise UserError(f"broken image: {type(error).__name__}: {error}") from None

    def views(self, medium: Image.Image) -> list[np.ndarray]:
        """Return the resized RGB image, then its parts: uint8 [H, W, 3] each."""
        if self.parts == 1:
            return [self.resize(medium)]
        n, k = self.size, self.parts
        large = np.array(medium.resize((k * n, k * n), Image.Resampling.BICUBIC))
        parts = large.reshape(k, n, k, n, 3).swapaxes(1, 2).reshape(k * k, n, n, 3)
        return [self.resize(medium), *map(np.ascontiguousarray, parts)]

    def resize(self, image: Image.Image, area: int | None = None) -> np.ndarray:
        """Return an RGB image as uint8 [H, W, 3], H and W multiples of patch.

        area: the number of patches, at most `patches`, to which mode "native" enlarges or reduces the image; rounding
        to whole patches may give fewer. None: at most `patches`, without enlarging.
        """
        if self.mode == "squash":
            size = (self.size, self.size)
        else:
            scale = 1 / self.patch if area is None else math.sqrt(area / (image.height * image.width))
            rows, columns = self._grid(image.height * scale, image.width * scale, area or self.patches)
            size = (columns * self.patch, rows * self.patch)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(image)  # a copy: torch.from_numpy warns about PIL's read-only array

    def _grid(self, height: float, width: float, limit: int) -> tuple[int, int]:
        """Return whole rows and columns, at most `limit` patches, for sides in patches, which may be fractions."""
        scale = min(1.0, math.sqrt(limit / (height * width)))
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        if rows * columns <= limit:
            return rows, columns
        # Rounding, or a side of at least one patch, has exceeded the limit: shorten either side, or drop one row or
        # column and shorten the other side as needed, whichever changes the aspect ratio least.
        fits = [(r, min(columns, limit // r)) for r in (rows, rows - 1) if r]
        fits += [(min(rows, limit // c), c) for c in (columns, columns - 1) if c]
        return min((g for g in fits if all(g)), key=lambda g: abs(math.log(g[0] * width / (g[1] * height))))
