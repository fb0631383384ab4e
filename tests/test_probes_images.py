"""Probes of an encoder on labelled images: each is encoded once, layers are compared, the test chooses nothing."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import relative_error
from PIL import Image
from test_aim_model import small_aim

from mm1.cli import main
from mm1.engine.data.codecs import codec_of
from mm1.engine.data.record import Media, Record, View
from mm1.engine.evaluation import probes_images
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.evaluation.probes_images import Encoder, Images, draw_layers, drawn, find, probe, show, windows
from mm1.engine.evaluation.probes_train import Labelled
from mm1.engine.models.aim import AIM
from mm1.errors import Unreadable, UserError

QUICK = ProbeSettings(epochs=6, batch=8, rates=(1e-3, 1e-2), decays=(0.05,))
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


class Made(list):
    """A source of records; an error in the place of one is raised."""

    def __getitem__(self, i):
        if isinstance(record := super().__getitem__(i), Exception):
            raise record
        return record


def picture(label, seed, size=(12, 16)):
    noise = np.random.default_rng(seed).normal(0, 40, (*size, 3))
    out = io.BytesIO()
    Image.fromarray((np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(label, seed, size=(12, 16)):
    return Record((Media("image", picture(label, seed, size)), label), f"{label}/{seed}", "made")


def source(count, seed=0):
    labels = [*COLOURS] * count
    return Made(record(label, 1000 * seed + i, (8 + 4 * (i % 3), 16)) for i, label in enumerate(labels))


@pytest.fixture(scope="module")
def model():
    config = small_aim(image_mode="native", image_patches=20)
    return AIM(dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=5))).init_weights(0).eval()


def views_of(model, records):
    codec = codec_of(model.config)
    return [View("image", codec.resize(codec.decode(r.parts[0].data))) for r in records]


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_stored_features_are_the_models_own_of_each_image_alone(model, tmp_path, mask):
    records = source(3)
    with Encoder(model, tmp_path, mask, io.StringIO()) as encoder:
        images = encoder.read(records, [None, (1,), (0,), (2,), (3,), (1, 4)], "images")
        encoder.average(images, (0, 2, 3))
        for layers in (None, (1,), (1, 4), (0, 2, 3)):
            data = encoder.labelled(images, layers, ["blue", "green", "red"])
            assert data.labels.tolist() == [2, 1, 0] * 3
            for i, view in enumerate(views_of(model, records)):
                pixels, grid = torch.from_numpy(view.values), (view.values.shape[0] // 4, view.values.shape[1] // 4)
                prefix = None if mask == "full" else torch.zeros(1, dtype=torch.int32)
                with torch.no_grad():
                    truth = model.features(pixels.reshape(-1, 3), [grid], prefix, layers)
                assert relative_error(data.images(torch.tensor([i]))[0], truth) < 1e-5


def test_an_image_is_encoded_once_for_each_layer_mask_and_model(model, tmp_path, monkeypatch):
    calls, inner = [], Encoder._features

    def counted(self, pixels, *rest):
        calls.append(len(pixels))
        return inner(self, pixels, *rest)

    monkeypatch.setattr(Encoder, "_features", counted)
    records = Made([*source(4), *source(4)])

    def encoded(used=model, layers=(None,), mask="full"):
        calls.clear()
        with Encoder(used, tmp_path, mask, io.StringIO()) as encoder:
            encoder.read(records, layers, "images")
        return sum(calls)

    assert encoded() == 12
    assert encoded() == 0
    assert encoded(layers=(None, (1,))) == 12
    assert encoded(mask="causal") == 12
    assert encoded(AIM(model.config).init_weights(1).eval()) == 12
    monkeypatch.setattr(probes_images, "CHUNK", 5)
    assert encoded(layers=((2,),)) == 12


@pytest.mark.parametrize("kind", ["attentive", "linear", "knn"])
@pytest.mark.parametrize("layers", ["last", "all", "best"])
def test_a_probe_tells_the_colours_apart(model, tmp_path, kind, layers):
    report = probe(model, source(12), source(6, seed=1), tmp_path, kind=kind, layers=layers, settings=QUICK,
                   display=io.StringIO())  # fmt: skip
    assert report["accuracy"] > 0.8
    assert (report["kind"], report["choice"], report["mask"]) == (kind, layers, "full")
    assert (report["training_images"], report["images"], report["shared_images"]) == (36, 18, 0)
    assert [row["layers"] for row in report["by_layer"]] == ([None] if layers == "last" else [(i,) for i in range(5)])
    assert report["layers"] in [row["layers"] for row in report["by_layer"]]
    highest = kind != "knn" and report["chosen"]["rate"] == 1e-2
    assert ("the highest rate is the best" in show(report)) == highest
    assert f"accuracy          {report['accuracy']:>7.2%}" in show(report)
    json.loads(json.dumps(report, allow_nan=False))


def test_all_reports_the_block_that_is_best_on_held_out_training_images(model, tmp_path, monkeypatch):
    def worst_on_the_test(train, test, seed):
        order = [0.3, 0.7, 0.9, 0.5, 0.1]
        validation = order[len(rows)]
        rows.append(train.features.shape)
        return {"validation": validation, "accuracy": 1 - validation}

    rows = []
    monkeypatch.setattr(probes_images, "knn", worst_on_the_test)
    report = probe(model, source(2), None, tmp_path, kind="knn", layers="all", display=io.StringIO())
    assert report["layers"] == (2,)
    assert report["accuracy"] == pytest.approx(0.1)
    assert [row["accuracy"] for row in report["by_layer"]] == pytest.approx([0.7, 0.3, 0.1, 0.5, 0.9])


def test_windows_are_means_of_consecutive_blocks():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    for depth, count in [(1, 1), (5, 1), (8, 2), (24, 6), (32, 6)]:
        pooled = []
        for i in range(depth):
            x = torch.randn(24, 4, generator=draw)
            x[:, 0] += 50 * (2 * labels - 1) * (i == depth - 1)
            pooled.append(Labelled.packed(x, torch.arange(25), labels, ("a", "b")))
        blocks = [row[0] for row in windows(pooled, 0)]
        assert blocks == [tuple(range(first, first + count)) for first in range(depth - count + 1)]
        assert windows(pooled, 0)[-1][1]["validation"] == 1


def test_a_fifth_of_each_class_is_the_test_and_equal_images_are_drawn_together():
    digests = [bytes([i]) for i in range(30)]
    images = Images([*digests, *digests[:7], b"one"], ["a"] * 20 + ["b"] * 10 + ["a"] * 6 + ["b", "c"], {}, 2)
    for seed in range(10):
        train, test = drawn(images, seed)
        assert not {*train.digests} & {*test.digests}
        assert sorted([*train.digests, *test.digests]) == sorted(images.digests)
        chosen = {*test.digests}
        assert [len(chosen & {*digests[:20]}), len(chosen & {*digests[20:]}), b"one" in chosen] == [4, 2, False]
        assert drawn(images, seed) == (train, test)
    assert drawn(images, 0)[1].digests != drawn(images, 1)[1].digests


def test_images_are_split_in_the_same_way_whatever_the_layers(model, tmp_path):
    reports = [probe(model, source(12), None, tmp_path, kind="knn", layers=layers, display=io.StringIO())
               for layers in ("last", "all")]  # fmt: skip
    assert [(r["training_images"], r["images"]) for r in reports] == [(30, 6)] * 2
    assert reports[0]["shared_images"] == 0


def test_what_is_left_out_is_counted(model, tmp_path):
    known = source(8)
    bare = Record((Media("image", picture("red", 77)),), "77.png", "made")
    broken = Record((Media("image", b"no image"), "red"), "red/broken.png", "made")
    train = Made([*known, bare, broken, Unreadable("a hole", "made", "red/hole.png")])
    report = probe(model, train, Made([*source(2, seed=3), known[0]]), tmp_path, kind="knn", layers="last",
                   display=io.StringIO())  # fmt: skip
    assert report["training_images"] == 24
    assert report["unlabelled"] == 1
    reasons = report["unreadable"]
    assert reasons.pop("made: red/hole.png") == "a hole"
    assert reasons.pop("made: red/broken.png").startswith("not an image in one of the formats")
    assert not reasons
    reasons["made: red/hole.png"] = "a hole"
    assert report["shared_images"] == 1
    text = show(report)
    assert "1 test images have the pixels of a training image" in text
    assert "1 images without a class: left out" in text
    assert "1 unreadable images, such as made: red/hole.png (a hole): left out" in text


def test_images_without_classes_and_models_without_features_are_refused(model, tmp_path):
    quiet = {"display": io.StringIO()}
    bare = Made([Record((Media("image", picture("red", 1)),), "1.png", "made")])
    with pytest.raises(UserError, match="training images have no classes, expected a sub-folder for each class"):
        probe(model, bare, bare, tmp_path, **quiet)
    with pytest.raises(UserError, match="images: all are unreadable, such as a hole"):
        probe(model, Made([Unreadable("a hole")]), None, tmp_path, **quiet)
    for layers in ("last", "all", "best"):
        with pytest.raises(UserError, match="class 'blue' has test images and no training image"):
            probe(
                model, Made(r for r in source(9) if r.parts[1] != "blue"), source(1), tmp_path, layers=layers, **quiet
            )
        with pytest.raises(UserError, match=r"1 \(red\), expected at least 2"):
            probe(model, Made(r for r in source(9) if r.parts[1] == "red"), None, tmp_path, layers=layers, **quiet)
    from small import small_mm1

    with pytest.raises(UserError, match="the model is of kind mm1, expected one with features of images, such as aim"):
        probe(small_mm1(), source(1), None, tmp_path, **quiet)


def test_the_folders_of_a_split(tmp_path):
    assert find(tmp_path, []) == ([tmp_path], [])
    (tmp_path / "train").mkdir()
    assert find(tmp_path, []) == ([tmp_path], [])
    (tmp_path / "val").mkdir()
    assert find(tmp_path, []) == ([tmp_path / "train"], [tmp_path / "val"])
    (tmp_path / "test").mkdir()
    assert find(tmp_path, []) == ([tmp_path / "train"], [tmp_path / "test"])
    assert find(tmp_path, [tmp_path / "other.tar"]) == ([tmp_path / "train"], [tmp_path / "other.tar"])
    assert find(tmp_path / "val", []) == ([tmp_path / "val"], [])
    assert find(tmp_path / "val", [tmp_path / "test"]) == ([tmp_path / "val"], [tmp_path / "test"])


def test_the_plot_of_layers(model, tmp_path):
    pytest.importorskip("matplotlib")
    options = {"kind": "knn", "display": io.StringIO()}
    report = probe(model, source(8), None, tmp_path / "features", layers="all", **options)
    draw_layers(report, tmp_path / "layers.png")
    assert Image.open(tmp_path / "layers.png").size[0] > 100
    draw_layers(probe(model, source(8), None, tmp_path / "features", layers="best", **options), tmp_path / "best.svg")
    with pytest.raises(UserError, match=r"layers\.doc"):
        draw_layers(report, tmp_path / "layers.doc")


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mm1", "probe", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_the_command_scores_a_folder_of_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for label in COLOURS:
        for part, count in (("train", 14), ("val", 5)):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(picture(label, i + 100 * (part == "val")))
    (tmp_path / "data" / "train" / "red" / "broken.png").write_bytes(b"no image")
    options = ("aim-clipart", "data", "--kind", "linear", "--epochs", "4", "--rates", "1e-2", "--batch", "8")
    status, out, errors = command(monkeypatch, capsys, *options, "--layers", "all")
    assert status == 0, errors
    report = json.loads(out.splitlines()[-1])
    assert report["accuracy"] > 0.8
    assert (report["training_images"], report["images"], len(report["unreadable"])) == (42, 15, 1)
    assert len(report["by_layer"]) == 4
    assert out.startswith("linear probe, block ")
    assert list((tmp_path / "runs" / "features").glob("*/rows"))
    status, out, _ = command(monkeypatch, capsys, *options, "--test", "data/val", "--layers", "last")
    assert (status, json.loads(out.splitlines()[-1])["training_images"]) == (0, 42)
    for wrong, message in [
        (("aim-clipart", "data", "--layers", "last", "--plot", "x.png"), "layers is 'last', expected all or best"),
        (("aim-clipart", "data/train/red"), "images have no classes, expected a sub-folder for each class"),
        (("aim-clipart", "data/train/red/0.png"), "expected a folder, or a file ending in .tar"),
        (("aim-clipart", "nowhere"), "no such file: nowhere"),
        (("aim-clipart", "data", "--batch", "1"), "batch is 1, expected ≥ 2"),
        (("digits", "data"), "the model is of kind mm1, expected one with features of images, such as aim"),
    ]:
        status, _, errors = command(monkeypatch, capsys, *wrong)
        assert (status, errors.splitlines()[-1].startswith("mm1: ")) == (2, True)
        assert message in errors
