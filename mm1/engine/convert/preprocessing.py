"""Read the image processor of published weights: adopt its normalization, refuse settings that mm1 does not support.

mm1 resizes an image to the encoder's square, bicubic, and computes (x / 255 - mean) / std. A processor of transformers
computes (x · rescale_factor - image_mean) / image_std, which is the same with other numbers. Resizing and cropping that
would change a square image are refused; an image that is not square is cropped by CLIP's processor, squashed by mm1.
Names and defaults: transformers 5, image_processing_base and CLIPImageProcessor. A null in the file is not replaced by
a default, because the constructor sets all fields first; a null do_… means that the step is omitted.
"""

import math
from pathlib import Path
from typing import Any

from mm1.engine.data.tokenizer import json_object
from mm1.engine.layers.config import Vision
from mm1.errors import UserError

Numbers = tuple[float, float, float]
NESTED, FLAT, VIDEO = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
BICUBIC = 3
CLIP_SIDE = 224  # pixels, the default of size and crop_size
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,), "resample": (BICUBIC,), "do_pad": (False, None), "pad_size": (None,), "crop_pct": (None,),
    "do_flip_channel_order": (False, None),
}  # fmt: skip
FLAGS = {*SUPPORTED, "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"}


def normalization(folder: Path, vision: Vision) -> tuple[Numbers, Numbers]:
    """Return mean and std, for pixels in 0..1, of the processor in a folder; the encoder's own if it has none.

    Raises UserError for a field that mm1 does not support or that has the wrong type.
    """
    file, fields = _fields(folder)
    if not fields:
        return vision.mean, vision.std
    for name, value in fields.items():
        if name.startswith("do_") and not isinstance(value, bool | None):  # "false" in quotes would count as true
            raise UserError(f"{file}: {name} is {value!r}, expected True or False")
    for name, values in SUPPORTED.items():
        if name in fields and fields[name] not in values:
            raise UserError(f"{file}: {name} is {fields[name]!r}, expected {' or '.join(map(repr, values))}")
    if "resample" not in fields and not _kind(fields).startswith("CLIP"):  # the default of most classes is bilinear
        raise UserError(f"{file}: resample of {_kind(fields)} is missing, expected {BICUBIC}")
    if unsupported := [name for name in fields if name.startswith("do_") and fields[name] and name not in FLAGS]:
        name = unsupported[0]
        raise UserError(f"{file}: {name} is {fields[name]!r}, expected False: mm1 does not support it")
    _expect_one_square(file, fields)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if fields.get("do_normalize", True):
        mean, std = (_numbers(file, fields, name, default) for name, default in
                     (("image_mean", vision.mean), ("image_std", vision.std)))  # fmt: skip
    if not min(std) > 0:
        raise UserError(f"{file}: image_std is {fields['image_std']!r}, expected positive numbers")
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1
    if not _is_number(factor) or factor <= 0:
        raise UserError(f"{file}: rescale_factor is {factor!r}, expected a positive number")
    scale = 255 * factor  # factor of x / 255
    if abs(scale - 1) < 1e-6:  # the file rounds 1 / 255
        return mean, std
    a, b, c = (m / scale for m in mean)
    d, e, f = (s / scale for s in std)
    return (a, b, c), (d, e, f)


def _fields(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file and the fields of the processor; since transformers 5 they may be in another processor's file."""
    if (file := folder / NESTED).is_file() and (fields := json_object(file).get("image_processor")) is not None:
        if not isinstance(fields, dict):
            raise UserError(f"{file}: image_processor is {fields!r}, expected an object")
        return file, fields
    if (file := folder / FLAT).is_file():
        return file, json_object(file)
    if (folder / VIDEO).is_file():
        raise UserError(f"{folder} has only {VIDEO}, expected {FLAT} or {NESTED} with image_processor")
    return file, {}


def _kind(fields: dict[str, Any]) -> str:
    """Return the name of the processor's class, which has the defaults of missing fields."""
    return str(fields.get("image_processor_type", fields.get("feature_extractor_type", "CLIP")))


def _expect_one_square(file: Path, fields: dict[str, Any]) -> None:
    """Raise UserError for a crop that cuts off a border, and for sizes that are not square."""
    default = CLIP_SIDE if _kind(fields).startswith("CLIP") else None
    sizes = {name: default if fields.get(name) is None else fields[name] for name in ("size", "crop_size")}
    sides = {name: _side(file, name, size) for name, size in sizes.items() if size is not None}
    if fields.get("do_center_crop", True) and len(set(sides.values())) > 1:
        raise UserError(
            f"{file}: crop_size is {sides['crop_size']}, expected size's {sides['size']}: mm1 cannot crop a border"
        )


def _side(file: Path, name: str, value: Any) -> int:
    """Return the side of a square in pixels. Raises UserError for a value of another form."""
    sides = {value} if isinstance(value, int) else set(value.values()) if isinstance(value, dict) else set()
    valid = not isinstance(value, dict) or value.keys() in ({"shortest_edge"}, {"height", "width"})
    if not valid or len(sides) != 1 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{file}: {name} is {value!r}, expected the side of a square in pixels")
    return sides.pop()


def _numbers(file: Path, fields: dict[str, Any], name: str, default: Numbers) -> Numbers:
    """Return three numbers, one for each channel, from a field with three numbers or one. Raises UserError."""
    if name not in fields:
        if not _kind(fields).startswith("CLIP"):  # other classes have other defaults
            raise UserError(f"{file}: {name} of {_kind(fields)} is missing")
        return default
    value = fields[name]
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 3) or not all(map(_is_number, values)):
        raise UserError(f"{file}: {name} is {value!r}, expected a number or three")
    a, b, c = (float(v) for v in (values if len(values) == 3 else 3 * values))
    return a, b, c


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
