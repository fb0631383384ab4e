"""Images alone: what sources find, what is drawn for each of them, and how they are packed."""

import io
import math
import os
import struct
import tarfile
import zlib
from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm1.engine.data.augment import RATIO, ImageEncoder, random_area, random_crop
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.mixture import Mixture
from mm1.engine.data.record import Label, Media, Record
from mm1.engine.data.sources import Images, open_source
from mm1.engine.models.image_input import ImageDraws
from mm1.errors import Unreadable, UserError

DRAWS = ImageDraws((0.4, 1.0), True, "uniform")


def png(width=12, height=8, color=(255, 0, 0)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, "PNG")
    return out.getvalue()


def huge(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels."""
    head = b"IHDR" + struct.pack(">II", width, height) + png()[24:29]
    return png()[:12] + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def record(data: bytes, draw: int = 0) -> Record:
    return Record((Media("image", data),), "a.png", "folder", draw)


def parts(source) -> list[tuple[bytes, str | None]]:
    """The bytes and the class of each image of a source."""
    records = [source[i] for i in range(len(source))]
    return [(r.parts[0].data, next((str(p) for p in r.parts if isinstance(p, Label)), None)) for r in records]


def folder_of(tmp_path, *names):
    folder = tmp_path / "pictures"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_has_its_images_in_order_with_the_first_sub_folder_as_class(tmp_path):
    names = ["b/2.JPG", "a/deep/er/1.png", "top.webp", "a/0.jpeg"]
    folder = folder_of(tmp_path, *names, "a/notes.txt", "a/.hidden.png", ".cache/x.png", "README")
    (folder / "a" / "link.png").symlink_to(folder / "b" / "2.JPG")
    (folder / "a" / "broken.png").symlink_to("nowhere")
    source = Images(folder)
    truth = [("a/0.jpeg", "a"), ("a/deep/er/1.png", "a"), ("b/2.JPG", "a"), ("b/2.JPG", "b"), ("top.webp", None)]
    assert [(data.decode(), label) for data, label in parts(source)] == truth
    assert [source[i].key for i in (0, 2)] == ["a/0.jpeg", "a/link.png"]
    assert source[0].shard == str(folder)
    assert source.files == [["pictures", sum(len(name) for name, _ in truth), 5]]
    for kind in ("1 × .txt (first: a/notes.txt", "1 × a broken link", "a name that begins with a dot", "an extension"):
        assert kind in source.ignored


def test_a_tar_has_images_with_and_without_a_class(tmp_path):
    members = [
        ("0.png", b"zero"),
        ("0.cls", b" 7\n"),
        ("1.jpg", b"one"),
        ("x/2.png", b"two"),
        ("x/2.txt", b"a caption"),
    ]
    source = Images(write_tar(tmp_path / "a.tar", members))
    assert parts(source) == [(b"zero", "7"), (b"one", None), (b"two", None)]
    assert "1 × .txt in addition to a sample" in source.ignored
    alone = Images(write_tar(tmp_path / "b.tar", [("0.cls", b"1"), ("1.png", b"x")]))
    with pytest.raises(Unreadable, match="class without an image"):
        alone[0]


def test_parquet_has_images_in_every_form_of_hugging_face(tmp_path):
    (tmp_path / "here.png").write_bytes(b"file")
    rows = [{"bytes": b"one", "path": None}, {"bytes": None, "path": "here.png"}]
    pq.write_table(pa.table({"image": rows, "label": [3, 0], "other": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"plain", None]}), tmp_path / "b.parquet")
    assert parts(Images(tmp_path / "a.parquet")) == [(b"one", "3"), (b"file", "0")]
    source = Images([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert source[2].parts == (Media("image", b"plain"),)
    with pytest.raises(Unreadable, match="image is of type NoneType, expected a string or bytes"):
        source[3]


@pytest.mark.parametrize("names, path, message", [
    ((), "nothing", "no such file: .*nothing"), (("a.txt",), "", r"no records in .*pictures"),
    (("a.png",), "a.png", r"a\.png: expected a folder, or a file ending in \.tar, .*\.parquet"),
])  # fmt: skip
def test_what_has_no_images_is_one_line(tmp_path, names, path, message):
    folder = folder_of(tmp_path, *names)
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message) as error:
        open_source("images", [str(folder / path)], tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_may_not_be_read_is_damage(tmp_path):
    folder = folder_of(tmp_path, "a/1.png", "b/2.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        source = Images(folder)
    assert len(source) == 1
    assert source.damage == ((str(folder), f"{folder}/a: Permission denied, one of 1 folders left out"),)


def boxes(size, shares, count=4000):
    """The crops (left, top, right, bottom) of images of this size."""
    image = SimpleNamespace(size=size, crop=lambda box: box)
    return np.array([random_crop(image, shares, Random(i)) for i in range(count)])  # pyright: ignore


def test_crops_have_uniform_areas_and_log_uniform_ratios_at_uniform_places():
    left, top, right, bottom = boxes((400, 400), (0.1, 0.5)).T
    w, h = right - left, bottom - top
    area, ratio = w * h / 400**2, np.log(w / h) / math.log(RATIO)
    for values, low, high in ((area, 0.1, 0.5), (ratio, -1, 1), (left / (400 - w), 0, 1), (top / (400 - h), 0, 1)):
        assert low - 0.01 <= values.min() < values.max() <= high + 0.01
        shares = np.histogram(values, 8, (low, high))[0] / len(values)
        assert np.abs(shares - 1 / 8).max() < 0.03
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 400


@pytest.mark.parametrize("size", [(1, 1), (900, 3), (1, 50), (7, 5)])
def test_every_image_has_a_crop(size):
    left, top, right, bottom = boxes(size, (0.4, 1.0), 200).T
    assert min(left.min(), top.min(), *(size[0] - right), *(size[1] - bottom)) >= 0
    assert min((right - left).min(), (bottom - top).min()) > 0
    image = Image.new("RGB", size)
    assert random_crop(image, (1.0, 1.0), None) is image  # pyright: ignore


def test_areas_have_the_density_of_a_cut_off_normal_on_a_scale_of_octaves():
    areas = np.array([random_area((128, 4096), Random(i)) for i in range(6000)])
    assert 128 <= areas.min() < 132
    assert 4000 < areas.max() <= 4096
    place = np.log2(areas) * 2 / 5 - 19 / 5  # 7 to 12 → -1 to 1
    middle = math.erf(0.5 / 2**0.5) / math.erf(1 / 2**0.5)  # the share between -1/2 and 1/2
    assert np.mean(abs(place) < 0.5) == pytest.approx(middle, abs=0.02)
    assert abs(place.mean()) < 0.02
    assert {random_area((9, 9), Random(i)) for i in range(9)} == {9}


@pytest.mark.parametrize("size", [(30, 20), (400, 100), (5, 3), (1, 1), (900, 3)])
def test_a_native_image_is_enlarged_or_reduced_to_the_drawn_area_with_its_aspect(size):
    draws = ImageDraws((1.0, 1.0), False, "uniform", (16, 64))
    encode = ImageEncoder(ImagePolicy(4, "native", patches=64), draws)
    grids = [encode(record(png(*size), i))[0].media[0].values.shape[:2] for i in range(60)]
    areas = [h * w // 16 for h, w in grids]
    ratio = min(max(size[0] / size[1], 1 / 16), 64)
    assert max(areas) <= 64
    if ratio < 16:
        assert min(areas) >= 9
        assert len(set(areas)) > 6
        assert all(2 / 3 < (w / h) / ratio < 3 / 2 for h, w in grids)


def test_draws_follow_from_the_records_number_alone():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    encode = ImageEncoder(ImagePolicy(4, "native", patches=64), DRAWS)
    first, again, other = (encode(record(out.getvalue(), draw))[0] for draw in (5, 5, 6))
    assert np.array_equal(first.media[0].values, again.media[0].values)
    assert np.array_equal(first.prompt_mask, again.prompt_mask)
    assert not np.array_equal(first.media[0].values, other.media[0].values)
    assert first.key == "folder:a.png"


def test_prefixes_are_uniform_and_mirror_images_half():
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    out = io.BytesIO()
    Image.fromarray(half).save(out, "PNG")
    data, policy = out.getvalue(), ImagePolicy(4, "squash", 8)
    documents = [ImageEncoder(policy, DRAWS._replace(crop=(1.0, 1.0)))(record(data, i))[0] for i in range(1200)]
    lengths = Counter(int(d.prompt_mask.sum()) for d in documents)
    assert set(lengths) == {1, 2, 3}, "of four patches at least one is seen and at least one predicted"
    assert min(lengths.values()) > 330
    mirrored = sum(d.media[0].values[0, 0, 0] == 0 for d in documents)
    assert 500 < mirrored < 700
    plain = [ImageEncoder(policy, ImageDraws((1.0, 1.0), False, "causal"))(record(data, i))[0] for i in range(40)]
    assert all(
        np.array_equal(d.media[0].values, half) and d.prompt_mask.tolist() == [True, *[False] * 3] for d in plain
    )


def test_an_image_smaller_than_a_patch_has_one_patch_and_no_target():
    (document,) = ImageEncoder(ImagePolicy(14, "native", patches=9), DRAWS)(record(png(3, 2)))
    assert document.media[0].values.shape == (14, 14, 3)
    assert document.prompt_mask.tolist() == [True]


@pytest.mark.parametrize("data, message", [
    (b"no image", "not an image in one of the formats"), (png()[:50], "broken image"),
    (huge(13_800, 13_000), r"179400000 pixels\) exceeds limit of 178956970 pixels"),
])  # fmt: skip
def test_an_image_that_cannot_be_used_has_one_line(data, message):
    with pytest.raises(Unreadable, match=message) as error:
        ImageEncoder(ImagePolicy(4, "squash", 8), DRAWS)(record(data))
    assert "\n" not in error.value.reason


def test_epochs_draw_anew_and_worker_processes_draw_alike(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "p").mkdir()
    for i in range(3):
        Image.fromarray(np.roll(noise, i)).save(tmp_path / "p" / f"{i}.png")
    encode = ImageEncoder(ImagePolicy(4, "squash", 16), DRAWS)
    mixture = Mixture([Images(tmp_path / "p")], [1.0], encode, 3)

    def drawn(workers, count=9):
        stream = mixture.iterate(0, workers)
        each = [next(stream) for _ in range(count)]
        return [(d.key, d.documents[0].media[0].values.tobytes(), d.documents[0].prompt_mask.tobytes()) for d in each]

    plain = drawn(0)
    assert sorted(key for key, *_ in plain[:3]) == ["0.png", "1.png", "2.png"]
    assert len({pixels for _, pixels, _ in plain}) == 9, "each epoch has other crops"
    assert (
        drawn(2)
        == plain
        == [
            (d.key, d.documents[0].media[0].values.tobytes(), d.documents[0].prompt_mask.tobytes())
            for d in (mixture[i] for i in range(9))
        ]
    )
