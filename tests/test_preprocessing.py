"""mm1 gives an encoder the pixels that the published processor gave it, or says why it does not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mm1
from mm1.engine.convert.assemble import assemble, read_tensors
from mm1.engine.convert.preprocessing import normalization
from mm1.engine.data.images import ImagePolicy
from mm1.engine.layers.config import Vision
from mm1.engine.run_config import DIGITS_FOLDER
from mm1.errors import UserError

transformers = pytest.importorskip("transformers")

ENCODER = Vision(width=32, layers=1, heads=2, ffn=48, patch=14, table=(2, 2))
FRAME = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}
THREE, OTHERS = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
COMPUTED = {
    "as published": {},
    "mean and std": {"image_mean": THREE, "image_std": OTHERS},
    "one number": {"image_mean": 0.5, "image_std": 0.25},
    "a list of one": {"image_mean": [0.5], "image_std": [0.25]},
    "integers": {"image_mean": 0, "image_std": [1, 2, 3]},
    "not normalised": {"do_normalize": False},
    "not normalised, by null": {"do_normalize": None, "image_mean": None, "image_std": None},
    "not rescaled": {"do_rescale": False, "image_mean": [100, 110.5, 120], "image_std": [60, 61, 62]},
    "not rescaled, by null": {"do_rescale": None},
    "not cropped, by null": {"do_center_crop": None, "crop_size": None},
    "one null beside numbers": {"do_normalize": None, "image_mean": THREE, "image_std": OTHERS},
    "neither": {"do_rescale": False, "do_normalize": False},
    "rescaled to -1 … 1": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "rescaled to 0 … 255": {"rescale_factor": 1, "image_mean": THREE, "image_std": OTHERS},
    "a rounded factor": {"rescale_factor": 0.00392156862745098},
    "squashed": {"size": {"height": 28, "width": 28}, "do_center_crop": False},
    "cropped by nothing": {"size": 28, "crop_size": {"height": 28, "width": 28}},
    "no crop, whatever its size": {"do_center_crop": False, "crop_size": 20},
    "what changes no pixel": {"do_convert_rgb": False, "do_pad": False, "pad_size": None},
}  # fmt: skip


def write(folder, fields, nested=False):
    folder.mkdir(exist_ok=True)
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("nested", [False, True], ids=["file of its own", "inside the processor's"])
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("side", [28, 45])
def test_pixels_are_those_of_transformers(tmp_path, name, nested, side):
    folder = write(tmp_path / "clip", FRAME | COMPUTED[name], nested)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(pixels)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    truth = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float64)
    mean, std = normalization(folder, ENCODER)
    resized = ImagePolicy(14, size=28).resize(image)
    found = ((resized / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    # torchvision's resize differs by a step of 1 / 255 from Pillow's here and there.
    atol = 1e-5 * np.abs(truth).max() if side == 28 else 1.01 / 255 / min(std)
    np.testing.assert_allclose(found, truth, rtol=0, atol=atol)


REFUSED = {
    "null for a mean": ({"image_mean": None}, "image_mean is None, expected a number or three"),
    "two numbers": ({"image_std": [0.1, 0.2]}, r"image_std is \[0.1, 0.2\], expected a number or three"),
    "words": ({"image_mean": ["a", "b", "c"]}, "image_mean is .*, expected a number or three"),
    "truth": ({"image_mean": True}, "image_mean is True, expected a number or three"),
    "no number": ({"image_mean": float("nan")}, "image_mean is nan, expected a number or three"),
    "a std of zero": ({"image_std": [0.1, 0, 0.1]}, "image_std is .*, expected positive numbers"),
    "a negative std": ({"image_std": -1}, "image_std is -1, expected positive numbers"),
    "null for the factor": ({"rescale_factor": None}, "rescale_factor is None, expected a positive number"),
    "a factor of zero": ({"rescale_factor": 0}, "rescale_factor is 0, expected a positive number"),
    "bilinear": ({"resample": 2}, r"resample is 2, expected 3"),
    "no resize": ({"do_resize": False}, "do_resize is False, expected True"),
    "a cropped border": ({"size": 32, "crop_size": 28}, "crop_size is 28, expected size's 32: mm1 cannot crop"),
    "a border cropped by default": ({"size": "missing"}, "crop_size is 28, expected size's 224"),
    "a border added by default": ({"crop_size": "missing"}, "crop_size is 224, expected size's 28"),
    "null for resize": ({"do_resize": None}, "do_resize is None, expected True"),
    "null for the interpolation": ({"resample": None}, "resample is None, expected 3"),
    "null for the crop's size": ({"crop_size": None}, "crop_size is 224, expected size's 28"),
    "a share of the crop": ({"crop_pct": 0.875}, "crop_pct is 0.875, expected None"),
    "the longest edge": ({"size": {"longest_edge": 28}}, "size is .*, expected the side of a square"),
    "no square": ({"size": {"height": 28, "width": 14}}, "size is .*, expected the side of a square"),
    "a size in words": ({"size": "28"}, "size is '28', expected the side of a square"),
    "padded": ({"do_pad": True}, "do_pad is True, expected False"),
    "blue first": ({"do_flip_channel_order": True}, "do_flip_channel_order is True, expected False"),
    "a word for a flag": ({"do_normalize": "false"}, "do_normalize is 'false', expected True or False"),
    "a number for a flag": ({"do_rescale": 0}, "do_rescale is 0, expected True or False"),
    "a word for no crop": ({"do_center_crop": "no"}, "do_center_crop is 'no', expected True or False"),
    "unknown": ({"do_sharpen": True}, "do_sharpen is True, expected False: mm1 does not support it"),
    "another's defaults": (
        {"image_processor_type": "ViTImageProcessor", "resample": 3}, "image_mean of ViTImageProcessor is missing"),
    "another's interpolation": (
        {"image_processor_type": "ViTImageProcessor"}, "resample of ViTImageProcessor is missing, expected 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_one_line_what_it_does_not_compute(tmp_path, name):
    fields, message = REFUSED[name]
    fields = {name: value for name, value in (FRAME | fields).items() if value != "missing"}
    folder = write(tmp_path / "clip", fields)
    with pytest.raises(UserError, match=rf"clip/preprocessor_config\.json: {message}") as caught:
        normalization(folder, ENCODER)
    assert "\n" not in str(caught.value)


def test_the_processor_inside_goes_before_the_file_of_its_own(tmp_path):
    folder = write(tmp_path / "clip", FRAME | {"image_mean": OTHERS})
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert normalization(folder, ENCODER)[0] == tuple(OTHERS)
    write(folder, FRAME | {"image_mean": THREE}, nested=True)
    assert normalization(folder, ENCODER)[0] == tuple(THREE)
    assert transformers.AutoImageProcessor.from_pretrained(folder).image_mean == tuple(THREE)
    (folder / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(UserError, match="image_processor is 3, expected an object"):
        normalization(folder, ENCODER)


def test_without_a_processor_the_encoders_own_numbers_stand(tmp_path):
    assert normalization(tmp_path, ENCODER) == (ENCODER.mean, ENCODER.std)
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has only video_preprocessor_config\.json"):
        normalization(tmp_path, ENCODER)


def test_a_checkpoint_has_the_processors_numbers(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
    model.save_pretrained(tmp_path / "clip")
    write(tmp_path / "clip", FRAME | {"do_normalize": False, "rescale_factor": 1 / 127.5}, nested=True)
    out = assemble(
        tmp_path / "out", vision=tmp_path / "clip", decoder="digits", tokenizer=DIGITS_FOLDER / "tokenizer.json",
    )  # fmt: skip
    found = mm1.load(out).config.vision
    assert (found.mean, found.std) == ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards, and a file of weights beside it."""
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "one.safetensors")
    save_file({"c": torch.ones(1), "b": torch.zeros(1)}, folder / "deep" / "two.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")

    def read(**names):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return {name: tensor.item() for name, tensor in read_tensors(folder).items()}

    return read


def test_each_tensor_is_that_of_the_file_which_the_index_names(shards):
    both = {"a": "one.safetensors", "c": "deep/two.safetensors"}
    assert shards(**both, b="one.safetensors") == {"a": 1, "b": 1, "c": 1}
    assert shards(**both, b="deep/two.safetensors") == {"a": 1, "b": 0, "c": 1}


@pytest.mark.parametrize("name, message", [
    ("../secret.safetensors", "a is in '../secret.safetensors', expected a file of its folder"),
    ("deep/../../secret.safetensors", "a is in .*, expected a file of its folder"),
    ("..", "a is in '..', expected"),
    ("", "a is in '', expected"),
    ("{tmp}/secret.safetensors", "a is in .*secret.safetensors', expected a file of its folder"),
    (r"..\secret.safetensors", "a is in .*, expected a file of its folder"),
    ("a\0b", "a is in .*, expected a file of its folder"),
    (7, "a is in 7, expected a file of its folder"),
    (None, "a is in None, expected a file of its folder"),
    (["one.safetensors"], "a is in .*, expected a file of its folder"),
    ("three.safetensors", "no such file of weights: .*three.safetensors"),
    ("deep", "deep: convert it to safetensors"),
    ("deep/two.safetensors", "two.safetensors: tensor a is missing, but model.safetensors.index.json names it"),
    ("model.bin", "model.bin: convert it to safetensors"),
])  # fmt: skip
def test_an_index_names_files_of_its_folder_that_hold_the_tensor(shards, tmp_path, name, message):
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    with pytest.raises(UserError, match=message) as caught:
        shards(a=name, b="one.safetensors")
    assert "\n" not in str(caught.value)
