"""Show that the clip art is small, split without leaks, and made from a package's files by the rules of its script."""

import io
import re
import tarfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mm1
from mm1.engine.data.clipart.make import CLASSES, SIDE, class_of, drawing, is_test, make, unique
from mm1.engine.data.record import Media
from mm1.engine.data.sources import open_source
from mm1.errors import Unreadable

FOLDER = Path(mm1.__file__).parent / "engine/data/clipart"


@cache
def shard(name: str) -> list[tuple[np.ndarray, str]]:
    """Return the pixels of each image and its class, empty without one."""
    source, images = open_source("images", str(FOLDER / name), Path()), []
    for record in (source[i] for i in range(len(source))):
        (medium,) = (part for part in record.parts if isinstance(part, Media))
        label = "".join(part for part in record.parts if isinstance(part, str))
        images.append((np.asarray(Image.open(io.BytesIO(medium.data))), label))
    return images


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 200, (6, 8, 3), np.uint8)
    return coarse.repeat(height // 6, 0).repeat(width // 8, 1)


def test_the_files_are_those_of_the_readme_and_small():
    rows = re.findall(r"\| `(\w+\.tar\.gz)` \| ([\d,]+) images.*`([0-9a-f]{64})`", (FOLDER / "README.md").read_text())
    assert [name for name, _, _ in rows] == ["train.tar.gz", "test.tar.gz"]
    for name, count, digest in rows:
        assert sha256((FOLDER / name).read_bytes()).hexdigest() == digest
        assert len(shard(name)) == int(count.replace(",", ""))
    assert sum((FOLDER / name).stat().st_size for name, _, _ in rows) < 8_000_000


def test_images_are_in_colour_and_of_at_most_48_pixels():
    for pixels, _ in shard("train.tar.gz") + shard("test.tar.gz"):
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert max(pixels.shape[:2]) == SIDE == 48
        assert min(pixels.shape[:2]) >= 8


def test_every_class_has_images_of_both_parts_and_no_image_is_in_both():
    names = {name.rpartition("/")[2] for name in CLASSES}
    assert {label for _, label in shard("test.tar.gz")} == names
    assert {label for _, label in shard("train.tar.gz")} == names | {""}
    seen = {pixels.tobytes() for pixels, _ in shard("train.tar.gz")}
    assert not seen & {pixels.tobytes() for pixels, _ in shard("test.tar.gz")}


def test_a_drawing_is_cut_and_put_on_white():
    canvas = np.zeros((100, 120, 4), np.uint8)  # transparent
    canvas[20:80, 10:90] = (200, 0, 0, 255)
    pixels = np.asarray(drawing(png(canvas)))
    assert pixels.shape == (36, 48, 3)
    assert (pixels == (200, 0, 0)).all()


@pytest.mark.parametrize("data, reason", [
    (b"no image", "not an image"),
    (png(np.full((9, 9, 3), 255, np.uint8)), "all pixels are white"),
    (png(np.zeros((70, 10, 3), np.uint8)), "drawing of 10 x 70 pixels"),
    (png(np.zeros((3000, 3000), np.uint8)), "image of 3000 x 3000 pixels"),
    (bytes(2_000_001), "file of 2000001 bytes"),
])  # fmt: skip
def test_files_that_make_no_drawing_are_refused(data, reason):
    with pytest.raises(Unreadable, match=reason):
        drawing(data)


def test_of_drawings_that_look_alike_one_of_a_class_stays():
    image, other = Image.fromarray(noise(0)), Image.fromarray(noise(1))
    brighter = Image.fromarray(noise(0) + 2)
    kept = unique({"computer/icons/a.png": image, "food/fruit/b.png": brighter, "food/fruit/c.png": other})
    assert list(kept) == ["food/fruit/b.png", "food/fruit/c.png"]


def test_classes_are_folders():
    assert class_of("animals/birds/eagle/a.png") == "birds"
    assert class_of("animals/birdsong.png") is None
    assert class_of("computer/icons/a.png") is None


def test_the_script_writes_the_same_two_parts_again_and_skips_links_and_stars(tmp_path):
    package, outs = tmp_path / "png", [tmp_path / "a", tmp_path / "b"]
    paths = [f"food/fruit/apple{i}.png" for i in range(30)] + ["unsorted/x.png", "shapes/stars/s.png"]
    for seed, path in enumerate(paths):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_bytes(png(noise(seed)))
    (package / "food/fruit/link.png").symlink_to("apple0.png")
    for out in outs:
        out.mkdir()
        make(package, out)
    test = sum(is_test(path) for path in paths[:30])
    assert 0 < test < 30
    for name, images, labels in (("test.tar.gz", test, test), ("train.tar.gz", 31 - test, 30 - test)):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
        with tarfile.open(outs[0] / name) as tar:
            suffixes = [Path(member).suffix for member in tar.getnames()]
        assert (suffixes.count(".webp"), suffixes.count(".cls")) == (images, labels)
