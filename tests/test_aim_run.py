"""AIM is trained by the ordinary trainer: on a folder of pictures, stopped and resumed, replayed, and on processes."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error
from PIL import Image
from test_aim_model import packed, small_aim
from test_train import Quiet, assert_same, trained

import mm1
from mm1.engine.data.config import Data, Source
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.packing import Loader
from mm1.engine.data.record import View
from mm1.engine.data.streams import make_streams
from mm1.engine.infer.generate import generate
from mm1.engine.layers import float8
from mm1.engine.layers.config import PixelHead
from mm1.engine.models.aim import AIM
from mm1.engine.models.image_input import ImageDraws
from mm1.engine.run_config import Run, from_dict, load_run, to_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.config import Train
from mm1.engine.train.ledger import ledger
from mm1.engine.train.plan import plan, show, typical
from mm1.engine.train.replay import replay
from mm1.engine.train.trainer import Trainer, train
from mm1.errors import UserError


def draw_pictures(folder: Path, count: int = 24) -> Path:
    """Stripes of two colours, of any size, in two classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        (height, width), slope = random.integers(12, 40, 2), random.random(2)
        y, x = np.mgrid[:height, :width]
        stripes = (np.sin(slope[0] * x + slope[1] * y) > 0)[..., None]
        pixels = np.where(stripes, *random.integers(0, 256, (2, 3))).astype(np.uint8)
        path = folder / ("even" if i % 2 == 0 else "odd") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


def aim_run(pictures: Path, data: dict | None = None, model: dict | None = None, **changes) -> Run:
    settings = {"steps": 12, "accumulate": 2, "warmup": 1, "peak_lr": 3e-3, "compile": False, "save_every": 4}
    sizes = {"images": 6, "patches": 150} | (data or {})
    c = small_aim(**{"image_mode": "native", "image_patches": 36} | (model or {}))
    return Run(c, Data((Source("images", (str(pictures),)),), **sizes), Train(**settings | changes))


def batches(run: Run, count: int, **options):
    streams = make_streams(run, None, None, **options)
    return [next(streams) for _ in range(count)]


def test_a_run_learns_and_says_what_it_did(pictures, tmp_path, capfd):
    train(aim_run(pictures, steps=40), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert "load_balance" not in metrics[0]
    for line in metrics:
        assert 0.2 * line["tokens"] < line["targets"] < line["tokens"] - line["images"] < 300
        assert line["fill"] == line["tokens"] / 300
        assert line["image_fill"] == line["images"] / 12
        assert len(line["loss_by_place"]) == 8
        assert line["loss_textured"] > 0.9 * line["loss"], "most patches of stripes have two colours"
    assert "indexed images: 24 records in 1 files" in capfd.readouterr().err
    model = mm1.load(tmp_path / "run")
    assert type(model) is AIM
    assert model.config == aim_run(pictures).model
    with pytest.raises(UserError, match="a model of kind aim takes images alone and generates no text"):
        generate(model, [["hello"]])
    checkpoint.export(tmp_path / "run", tmp_path / "alone")
    assert_same(dict(mm1.load(tmp_path / "alone").named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("changes", [
    {}, {"recompute": "blocks"}, {"recompute": "selective"}, {"model": {"image_min_patches": 9}}
], ids=str)  # fmt: skip
def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(pictures, tmp_path, changes):
    run = aim_run(pictures, **changes)
    truth = trained(tmp_path / "truth", run)
    for workers, steps in ((0, 3), (2, 7)):  # of another number of loader processes too
        other = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
        with Trainer(other, tmp_path / "run", Quiet(), resume=steps > 3) as part:
            while part.steps_done < steps:
                part.step()
                part.settle()
            part.save()
    assert_same(trained(tmp_path / "run", run, resume=True), truth)


def test_a_step_is_replayed_with_the_images_of_the_highest_loss(pictures, tmp_path):
    train(aim_run(pictures), tmp_path / "run")
    report = replay(tmp_path / "run", 10)
    assert report["verdict"] == ["nothing differs"]
    assert all(".png" in document["key"] for document in report["documents"])


def test_a_resume_with_other_draws_is_refused(pictures, tmp_path):
    train(aim_run(pictures, steps=4), tmp_path / "run")
    for change, message in (
        ({"image_flip": False}, "model.image_flip: False, was True"),
        ({"image_crop": (0.5, 1.0)}, r"model.image_crop: \[0.5, 1.0\], was \[0.4, 1.0\]"),
        ({"prefix": "causal"}, "model.prefix: causal, was uniform"),
        ({"image_min_patches": 9}, "model.image_min_patches: 9, was 0"),
    ):
        with pytest.raises(UserError, match=message):
            train(aim_run(pictures, model=change), tmp_path / "run", resume=True)


def test_kinds_of_data_that_a_model_does_not_take_are_one_line(pictures, tmp_path):
    run = aim_run(pictures)
    text = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=(Source("text", ("a.txt",)),)))
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.kind is 'text', expected images for a model of kind aim"):
        train(text, tmp_path / "text")
    digits = load_run("digits", [f'data.sources=[{{kind="images",paths=["{pictures}"]}}]'])
    with pytest.raises(UserError, match=r"is 'images', expected captions or interleaved or .* of kind mm1"):
        train(digits, tmp_path / "digits")
    with pytest.raises(UserError, match=r"setting data\.patches is 35, too few for one image, expected 36 or more"):
        train(aim_run(pictures, {"patches": 35}), tmp_path / "small")


def test_half_empty_batches_name_the_setting(pictures):
    warnings = []
    batches(aim_run(pictures, {"patches": 600}), 20, warn=warnings.append)
    (warning,) = warnings
    assert "of data.patches (600); data.images (6) is used up first: raise data.images or lower data.patches" in warning


def test_the_packer_fills_batches_and_draws_every_image_once_an_epoch(pictures):
    streams = make_streams(aim_run(pictures, {"images": 12}), None, None)
    keys, filled = [], []
    for _ in range(30):
        batch = next(streams)
        keys += batch.keys
        filled.append(batch.used_tokens / 150)
        sizes = batch.media.grids.sizes
        assert batch.used_tokens == sum(h * w for h, w in sizes) <= 150
        assert all(h * w <= 36 for h, w in sizes)
        assert batch.target_count == sum(h * w for h, w in sizes) - int(batch.prefix.sum())
        assert len(batch.target_rows) == 112 >= batch.target_count == int((batch.target_rows >= 0).sum())
    assert np.mean(filled) > 0.95
    waiting = [w.whole.key for w in streams.loaders[0].waiting]
    counts = np.unique(keys + waiting, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.max() - counts.min() <= 1, "each is drawn once an epoch, and the small ones wait longer"


class Lengths:
    """A mixture of square images without pixels; the prefixes are uniform."""

    def __init__(self, patches: int):
        self.view, self.random = View("image", np.zeros((0, 0, 3), np.uint8)), np.random.default_rng(0)
        self.patches = patches

    def iterate(self, *_):
        for i in itertools.count():
            sees = np.arange(self.patches) < self.random.integers(1, self.patches)
            image = Document(np.zeros(self.patches, np.int32), (self.view,), str(i), sees)
            yield SimpleNamespace(reason=None, source=0, documents=[image])


@pytest.mark.parametrize("images, rows", [(1, 256), (4, 768), (64, 9216)])
def test_batches_are_full_within_the_budget_of_targets(images, rows):
    """Also one of a single image, whose targets are every patch but one."""
    patches = images * 256
    assert ImageDraws((1.0, 1.0), False, "uniform").target_rows(patches, 256) == rows
    assert ImageDraws((1.0, 1.0), False, "causal").target_rows(patches, 256) == patches
    budget = Budget(patches, images, patches, images, target_rows=rows)
    loader = Loader(Lengths(256), budget, image_id=-1, patch=1, slots=0, buffer=4 * patches)
    taken, targets = [], []
    for _ in range(200):
        loader.fill_pool()
        documents = loader.take_documents()
        taken.append(len(documents))
        targets.append(sum(int((~d.prompt_mask).sum()) for d in documents))
    assert max(targets) <= rows
    assert np.mean(taken) > 0.999 * images
    assert np.mean(targets) == pytest.approx(patches / 2, rel=0.1), "images with many targets do not stay behind"


def test_micro_batches_are_those_of_any_number_of_processes(pictures):
    run = aim_run(pictures, {"streams": 4}, accumulate=4)
    truth = [batch.digest for batch in batches(run, 8)]
    found = [batches(run, 4, rank=rank, ranks=2) for rank in (0, 1)]
    assert [batch.digest for pair in zip(*found) for batch in pair] == truth


def test_bf16_is_near_fp32():
    model, batch = AIM(small_aim()).init_weights(0), packed()
    truth = model(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(batch).loss, truth) < 0.01


def test_trunk_and_head_are_trained_in_float8(pictures, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(float8, "WIDE", 32)
    run = aim_run(pictures, {"patches": 160}, {"head": PixelHead(32, 2, 48)}, float8="rowwise", dtype="bf16", steps=20)
    shown = Quiet()
    model = train(run, tmp_path / "run", display=shown)
    names = [name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(names) == 4 * 3 + 2 * 2
    assert shown.metrics[-1]["loss"] < 0.9 * shown.metrics[0]["loss"]


def test_a_profile_has_a_row_for_each_part(pictures, tmp_path):
    train(aim_run(pictures, steps=16), tmp_path / "run", profile=True)
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    rows = {line.split("  ")[0].strip() for line in table.splitlines()}
    assert {"vision", "head", "loss", "waiting for data"} <= rows


def test_the_plan_speaks_of_images_and_counts_by_hand():
    run = load_run("aim-7b")
    load = typical(run, 1024)
    assert (len(load.grids), load.patches, load.targets) == (64, 64 * 256, 64 * 128)
    counted = ledger(run.model, load)
    rows, width, layers = 64 * 256, 4096, 32
    assert counted.forward["vision linear"] == 2 * rows * 12 * width**2 * layers
    assert counted.forward["pixel head"] == 2 * (rows // 2) * (12 * 2 * 2048 * 8192 + width * 2048)
    assert counted.forward["prediction"] == 2 * (rows // 2) * 2048 * 588
    pairs = counted.forward["vision attention"] / (4 * width * layers)
    assert pairs == pytest.approx(64 * 2 / 3 * 256**2, rel=0.01), "two thirds of all pairs on average"
    assert counted.padding["prediction"] == 3 * 2 * (9216 - 8192) * 2048 * 588
    text = show(plan(run, 64))
    assert "64 images of 256 patches; 8192 patches are targets, and the pixel head has 9216 rows" in text
    assert " patches/s, " in text
    assert "tokens" not in text


def test_sizes_have_recipes_and_settings_are_read_as_they_were_written(pictures):
    paper, small = load_run("aim-0.6b"), load_run("aim-clipart")
    assert paper.train.accumulate * paper.data.images == 4096
    assert (paper.train.weight_decay, paper.train.final_lr, paper.train.peak_lr) == (0.05, 0.0, None)
    assert (small.train.accumulate, small.train.compile) == (1, False)
    assert AIM(small.model).default_peak_lr() == 1e-3
    assert from_dict(to_dict(aim_run(pictures))) == aim_run(pictures)
    with pytest.raises(UserError, match=r"setting model\.image_size is 30, expected a multiple of the patch size 4"):
        load_run("aim-clipart", ["model.image_size=30"])
    for changes, expected in (
        (["model.image_min_patches=9"], "9, expected at most 0 if model.image_mode is squash"),
        (["model.image_mode=native", "model.image_min_patches=65"], "65, expected at most 64"),
    ):
        with pytest.raises(UserError, match=f"setting model.image_min_patches is {expected}"):
            load_run("aim-clipart", changes)
    with pytest.raises(UserError, match=r"setting model\.image_crop is \(1\.0, 0\.4\), expected the smaller"):
        load_run("aim-clipart", ["model.image_crop=[1.0, 0.4]"])


CODE = """
import json, sys
from pathlib import Path
import torch
from mm1.engine.run_config import from_dict
from mm1.engine.train.display import Silent
from mm1.engine.train.parallel import World
from mm1.engine.train.trainer import Trainer
class Lines(Silent):
    lines = []
    def step(self, step, metrics):
        self.lines.append([metrics["loss"], metrics["grad_norm"]])
torch.set_num_threads(1)
run, folder = from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
world = World(run.parallel)
Trainer(run, folder, Lines(), False, world).fit()
if world.first:
    (folder / "lines.json").write_text(json.dumps(Lines.lines))
world.close()
"""


@pytest.mark.slow
def test_two_and_four_processes_equal_one(pictures, tmp_path):
    (tmp_path / "run.py").write_text(CODE)
    run = aim_run(pictures, {"streams": 4}, steps=4, accumulate=4)
    found = {}
    ways = {"alone": (1, {}), "shard": (2, {}), "tensor": (2, {"tensor": 2}), "replicate": (4, {"replicate": 2})}
    for way, (processes, parallel) in ways.items():
        settings = {**to_dict(run), "parallel": parallel}
        (tmp_path / f"{way}.json").write_text(json.dumps(settings))
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29871",
             tmp_path / "run.py", tmp_path / f"{way}.json", tmp_path / way], check=True, capture_output=True,
        )  # fmt: skip
        found[way] = torch.tensor(json.loads((tmp_path / way / "lines.json").read_text()))
    assert found["alone"].shape == (4, 2)
    for way, lines in found.items():
        torch.testing.assert_close(lines, found["alone"], rtol=1e-6, atol=0, msg=way)


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from mm1.engine.data import mixture
from mm1.engine.run_config import from_dict
from mm1.engine.train.trainer import train
torch.set_num_threads(1)
run, folder, kills = from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), 0
random.seed(0)
while True:
    if not (child := os.fork()):
        train(run, folder, resume=True)
        os._exit(0)
    if kills < 30:
        time.sleep(random.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    kills += ended == signal.SIGKILL
    if not ended:
        break
    assert ended == signal.SIGKILL, ended
print(kills)
"""


@pytest.mark.slow
def test_thirty_kills_change_no_bit(pictures, tmp_path):
    run = aim_run(pictures, steps=200, save_every=2, accumulate=1)
    (tmp_path / "run.json").write_text(json.dumps(to_dict(run)))
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "run.json", tmp_path / "run"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 10, "the run ended before"
    truth = trained(tmp_path / "truth", run)
    assert_same(dict(mm1.load(tmp_path / "run", device="cpu").named_parameters()), truth)
