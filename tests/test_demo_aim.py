"""The demo of AIM: its predictions are those of the loss, and a short run writes a report that is true to it."""

import dataclasses
import html.parser
import io
import json
import math
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from mm1.engine.data.clipart.make import write_shard
from mm1.engine.data.sources import open_source
from mm1.engine.demo import aim
from mm1.engine.demo.aim import demo, images_of, pixel_scores, run_of
from mm1.engine.demo.aim_page import chart
from mm1.engine.demo.next_patches import completed, losses, normalised, predicted, reconstructed
from mm1.engine.evaluation.config import ProbeSettings
from mm1.engine.models.aim import AIM
from mm1.engine.models.aim_config import MODELS
from mm1.errors import UserError

QUICK = ProbeSettings(rates=(1e-2,), decays=(0.1,), epochs=2, batch=8)
CLASSES = ("food/fruit", "animals/birds")


def drawings(count: int, seed: int) -> dict[str, Image.Image]:
    """Return drawings by path, of two classes in turn that differ in colour, and one without a class."""
    draw, result = np.random.default_rng(seed), {}
    for i in range(count):
        pixels = draw.integers(0, 200, (40, 48, 3), np.uint8)
        pixels[..., i % 2] = 255
        result[f"{CLASSES[i % 2]}/{i}.png"] = Image.fromarray(pixels)
    return result | {"unsorted/x.png": Image.fromarray(draw.integers(0, 256, (48, 48, 3), np.uint8))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clipart")
    write_shard(folder / "train.tar.gz", drawings(24, 0))
    write_shard(folder / "test.tar.gz", {path: x for path, x in drawings(10, 1).items() if "unsorted" not in path})
    return folder


@pytest.fixture(scope="module")
def model() -> AIM:
    model = AIM(MODELS["aim-clipart"]).init_weights(1).eval()
    model.init_buffers("cpu")
    return model


def images(count: int, rows: int = 3, columns: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 4 * rows, 4 * columns, 3), dtype=torch.uint8, generator=generator)


def patches_of(pixels: torch.Tensor) -> torch.Tensor:
    """Return the patches [N, K, 4, 4, 3] of images, each cut by itself."""
    _, height, width, _ = pixels.shape
    corners = [(top, left) for top in range(0, height, 4) for left in range(0, width, 4)]
    return torch.stack([pixels[:, top : top + 4, left : left + 4] for top, left in corners], 1)


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3])
def test_predictions_have_the_models_loss(model, count, prefix):
    pixels = images(count)
    errors = predicted(model, pixels, prefix).double() - normalised(model, pixels)[0].double()
    found = errors[:, prefix:].square().mean()
    truth = model.loss(pixels.reshape(-1, 3), [(3, 2)] * count, torch.full((count,), prefix))
    torch.testing.assert_close(found, truth.double(), rtol=1e-5, atol=0)
    if prefix == 1:
        torch.testing.assert_close(losses(model, pixels).double().mean(), truth.double(), rtol=1e-5, atol=0)


def test_patches_are_normalised_one_by_one_with_the_unbiased_variance(model):
    pixels = images(2)
    pixels[0, :4, :4] = 77  # of one colour
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (model.config.vision.mean, model.config.vision.std))
    truth = ((patches_of(pixels).double() / 255 - mean) / std).flatten(2)
    truth = (truth - truth.mean(2, keepdim=True)) / (truth.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normalised(model, pixels)[0].double(), truth, rtol=1e-4, atol=1e-5)


def test_perfect_predictions_draw_the_image_itself(model, monkeypatch):
    pixels = images(2)
    monkeypatch.setattr("mm1.engine.demo.next_patches.predicted", lambda *_: normalised(model, pixels)[0])
    assert torch.equal(reconstructed(model, pixels), pixels)
    assert torch.equal(completed(model, pixels, 2), pixels)


def test_a_completion_keeps_the_prefix_and_depends_on_later_patches_only_by_their_mean_and_contrast(model):
    pixels = images(1)
    other = pixels.clone()
    other[:, 8:] = pixels[:, 8:].flip(1)  # the same values in the last row's patches, elsewhere
    ours, theirs = completed(model, pixels, 3), completed(model, other, 3)
    assert torch.equal(patches_of(ours)[:, :3], patches_of(pixels)[:, :3])
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, pixels)


def test_the_first_completed_patch_is_the_one_predicted_from_true_patches(model):
    pixels = images(2)
    values, (_, mean, scale) = predicted(model, pixels, 3)[:, 3], normalised(model, pixels)
    c = model.config.vision
    truth = (values * scale[:, 3] + mean[:, 3]).view(2, 4, 4, 3) * torch.tensor(c.std) + torch.tensor(c.mean)
    found = patches_of(completed(model, pixels, 3))[:, 3].int()
    assert (found - (255 * truth).clamp(0, 255)).abs().max() <= 0.51


def test_images_without_a_class_are_not_scored(folder):
    pixels, labels = images_of(open_source("images", str(folder / "train.tar.gz"), folder), run_of(folder, 1))
    assert pixels.shape == (24, 32, 32, 3)
    assert sorted({*labels}) == ["birds", "fruit"]


def test_principal_components_separate_classes_of_different_colours():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 50, (40, 8, 8, 3), generator=draw)
    pixels[::2, ..., 0] += 200
    pixels, labels = pixels.to(torch.uint8), ["red", "dark"] * 20
    scores = pixel_scores(pixels[:30], labels[:30], pixels[30:], labels[30:], QUICK)
    assert scores["knn"]["share"] == 1


def test_a_chart_has_a_line_for_each_name_and_its_points_inside():
    svg = chart({"a": [(1, 2.0), (10, 0.5)], "b": [(1, 1.0)]}, "step")
    points = [tuple(map(float, p.split(","))) for line in re.findall('points="(.*?)"', svg) for p in line.split()]
    assert len(points) == 3
    assert points[1][0] > points[0][0]
    assert points[1][1] > points[0][1], "smaller values are lower"
    assert all(0 <= x <= 560 and 0 <= y <= 200 for x, y in points)


def test_a_short_run_is_trained_scored_and_reported_and_a_second_call_only_evaluates(
    folder, tmp_path, capsys, monkeypatch
):
    summary = demo(tmp_path / "run", folder, 2, QUICK)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["classes"] == 2
    assert summary["test_images"] == 10
    assert {*summary["accuracy"]} == {"pixels", "untrained", "trained"}
    for scores in summary["accuracy"].values():
        assert all(0 <= s["low"] <= s["share"] <= s["high"] <= 1 for s in scores.values())
    assert summary["test_loss"]["trained"] < summary["test_loss"]["untrained"]
    assert all(math.isfinite(value) for value in summary["test_loss"].values())
    said = capsys.readouterr().out
    assert f"{summary['accuracy']['trained']['attentive']['share']:.1%}" in said
    page = (tmp_path / "run" / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert "{" not in page.split("</style>")[1]
    pictures = [Image.open(io.BytesIO(b64decode(x))) for x in re.findall('base64,([^"]+)', page)]
    assert [p.size for p in pictures] == [(3 * 34 * 8, 3 * 34 * 2), (3 * 34 * 8, 3 * 34 * 3)]
    steps = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = demo(tmp_path / "run", folder, 2, QUICK)
    assert again["accuracy"] == summary["accuracy"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == steps
    other = run_of(folder, 2)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, order="columns"))
    monkeypatch.setattr(aim, "run_of", lambda *_: other)
    with pytest.raises(UserError, match=r"delete .* to train the demo anew"):
        demo(tmp_path / "run", folder, 2, QUICK)


@pytest.mark.parametrize("words, module, out", [
    ([], "digits", "runs/demo"), (["aim"], "aim", "runs/demo-aim"), (["aim", "--out", "x"], "aim", "x"),
])  # fmt: skip
def test_the_command_chooses_the_model_and_its_folder(monkeypatch, words, module, out):
    from mm1 import cli

    called = []
    monkeypatch.setattr(f"mm1.engine.demo.{module}.demo", lambda folder: called.append(str(folder)))
    cli.call(["demo", *words])
    assert called == [out]


def test_the_demo_has_the_shipped_images():
    assert {path.name for path in aim.FOLDER.glob("*.tar.gz")} == {"train.tar.gz", "test.tar.gz"}
