import io
import warnings

import numpy as np
import pytest
from PIL import Image

from mm1.engine.data.images import ImagePolicy, decode
from mm1.errors import Unreadable


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height, width, *channels):
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def pixels(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_exact(format):
    array = noise(5, 7, 3)
    options = {"lossless": True} if format == "WEBP" else {}
    assert (pixels(encode(Image.fromarray(array), format, **options)) == array).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_other_modes_become_rgb_as_pil_converts_them(mode, format):
    if format == "JPEG" and mode in "1P":
        pytest.skip("JPEG has no such mode")
    data = encode(Image.fromarray(noise(16, 16, 3)).convert(mode), format)
    truth = Image.open(io.BytesIO(data))
    assert truth.mode == mode
    assert (pixels(data) == np.asarray(truth.convert("RGB"))).all()


def test_transparency_lies_over_white():
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 128]]], np.uint8)
    blend = [round((c * 128 + 255 * 127) / 255) for c in (0, 100, 200)]
    out = pixels(encode(Image.fromarray(rgba)))
    assert np.abs(out[0].astype(int) - [[255] * 3, [10, 20, 30], blend]).max() <= 1
    grey = np.array([[[50, 0], [50, 255]]], np.uint8)
    assert pixels(encode(Image.fromarray(grey, "LA")))[0].tolist() == [[255] * 3, [50] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 40, 50, 60])
    for format in ("PNG", "GIF"):
        assert pixels(encode(palette, format, transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert pixels(encode(palette, transparency=b"\0\xff"))[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert pixels(encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("format, dtype", [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("PPM", None)])
def test_sixteen_bits_are_scaled_not_clipped(format, dtype):
    values = np.array([[0, 257, 32768, 40000, 65535]])
    if dtype is None:
        data = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encode(Image.fromarray(values.astype(dtype)), format)
    assert pixels(data)[0, :, 0].tolist() == [0, 1, 128, 156, 255]


@pytest.mark.parametrize("top", [1, 255])
def test_floats_of_either_range_become_bytes(top):
    values = np.array([[0, 0.5, 1]], np.float32) * top
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == [0, 128, 255]
    values[0, 1] = np.nan
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(orientation, turn):
    array = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels(encode(Image.fromarray(array), exif=exif)) == np.rot90(array, turn)).all()


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_bytes_that_are_no_image_are_unreadable():
    whole = encode(Image.fromarray(noise(64, 64, 3)))
    jpeg = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    empty = whole[:16] + bytes(8) + whole[24:]
    for data in (b"", b"a PNG that is text", whole[:30], whole[:-2000], jpeg[:-900], empty):
        with pytest.raises(Unreadable) as caught:
            decode(data)
        assert caught.value.reason
        assert "\n" not in caught.value.reason
        assert " at 0x" not in caught.value.reason
    for format in ("EPS", "TGA", "PCX"):
        with pytest.raises(Unreadable, match="not an image in one of the formats PNG, JPEG"):
            decode(encode(Image.new("RGB", (9, 9)), format))


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_unreadable_whatever_pil_allows(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    bomb = b"P6 20000 10000 255\n"
    with pytest.raises(Unreadable, match=r"bomb|200000000|20000 x 10000"):
        decode(bomb)


def test_pil_warns_no_one(monkeypatch):
    """This holds also after a program has enabled all warnings since the last image."""
    decode(encode(Image.new("RGB", (4, 4))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(encode(Image.new("RGB", (4, 4))))
        warnings.warn("another's warning", stacklevel=1)
    assert [str(w.message) for w in caught] == ["another's warning"]


def test_a_policy_knows_the_patches_of_its_largest_view():
    assert ImagePolicy(14, size=672).max_patches == 48 * 48
    assert ImagePolicy(14, mode="native", patches=300).max_patches == 300


def test_squash_is_pils_bicubic_to_a_square():
    image = Image.fromarray(noise(50, 90, 3))
    out = ImagePolicy(patch=14).resize(image)
    assert (out == np.asarray(image.resize((378, 378), Image.Resampling.BICUBIC))).all()
    assert out.dtype == np.uint8
    assert out.flags.writeable


@pytest.mark.parametrize("height, width", [(14, 14), (28, 700), (378, 378), (14, 729 * 14)])
def test_native_leaves_an_image_that_fits_untouched(height, width):
    array = noise(height, width, 3)
    assert (ImagePolicy(14, "native").resize(Image.fromarray(array)) == array).all()


@pytest.mark.parametrize(
    "height, width, grid",
    [
        (1, 4000, (1, 286)),
        (4000, 1, (286, 1)),
        (1, 1, (1, 1)),
        (1, 60_000, (1, 729)),
        (480, 640, (23, 31)),
        (4000, 6000, (22, 33)),
        (20, 22, (1, 2)),
    ],
)
def test_native_gives_a_legal_grid_near_the_aspect_ratio(height, width, grid):
    out = ImagePolicy(14, "native").resize(Image.new("RGB", (width, height)))
    assert (out.shape[0] / 14, out.shape[1] / 14) == grid


def test_native_keeps_its_promises_for_any_shape():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        policy = ImagePolicy(int(rng.integers(1, 33)), "native", patches=int(rng.integers(1, 1000)))
        height, width = (int(side) for side in np.exp(rng.uniform(0, 9, 2)))
        rows, columns = policy._grid(height / policy.patch, width / policy.patch, policy.patches)
        assert min(rows, columns) >= 1
        assert rows * columns <= policy.patches
        assert rows <= max(1, height / policy.patch + 0.5)
        assert columns <= max(1, width / policy.patch + 0.5)
        assert policy._grid(width / policy.patch, height / policy.patch, policy.patches) == (columns, rows)
        if min(rows, columns) >= 8:
            assert abs(np.log((rows / columns) / (height / width))) < 0.13
            assert rows * columns > 0.8 * min(policy.patches, height * width / policy.patch**2)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"mode": "crop"}, "mode is 'crop'"),
        ({"size": 380}, "size is 380"),
        ({"size": 0}, "size is 0"),
        ({"patch": 0}, "patch=0"),
        ({"patches": 0}, "patches=0"),
    ],
)
def test_a_wrong_policy_is_refused(options, why):
    with pytest.raises(ValueError, match=why):
        ImagePolicy(**{"patch": 14, **options})


def test_native_does_not_ask_for_a_square_size():
    assert ImagePolicy(patch=16, mode="native").size == 378
