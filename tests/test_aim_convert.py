"""AIM's encoder goes from and to apple's files, and into an MM1 by `mm1 convert` and by train.init."""

import dataclasses
import json

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from small import small_run
from test_aim_model import PATCH, Twin, small_aim
from test_aim_run import aim_run, draw_pictures

import mm1
from mm1.engine.convert.aim import from_ml_aim, to_ml_aim
from mm1.engine.convert.assemble import assemble
from mm1.engine.convert.command import convert
from mm1.engine.convert.weights import from_hf
from mm1.engine.layers.config import PixelHead
from mm1.engine.models.aim import AIM
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import DIGITS
from mm1.engine.run_config import DIGITS_FOLDER, Run, to_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.display import Silent
from mm1.engine.train.trainer import Trainer, train
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids

TOKENIZER = DIGITS_FOLDER / "tokenizer.json"
HEAD = PixelHead(24, 2, 40)


def scrambled(model: AIM) -> AIM:
    """Norms are not ones and biases not zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def our_aim(**vision) -> AIM:
    """An AIM whose MLP is as wide as the published ones."""
    c = small_aim(image_size=4 * PATCH)
    c = dataclasses.replace(c, vision=dataclasses.replace(c.vision, ffn=4 * c.vision.width, **vision))
    return scrambled(AIM(c).init_weights(3))


def saved(model: AIM, folder):
    texts = {"config.json": json.dumps({"model": to_dict(model.config)})}
    checkpoint.write(folder, {"model.safetensors": dict(model.state_dict())}, texts)
    return folder


def pictures(grids):
    images = [torch.randint(0, 256, (PATCH * h, PATCH * w, 3), dtype=torch.uint8) for h, w in grids]
    return images, torch.cat([x.reshape(-1, 3) for x in images])


def published():
    """The twin of apple's encoder in tests/test_aim.py with random weights, and its state dict."""
    pytest.importorskip("transformers")
    from test_aim import Aim, randomized

    aim = randomized(Aim())
    return aim, {**aim.state_dict(), "head.linear.weight": torch.ones(10, 32)}


@torch.no_grad()
def test_apples_encoder_has_the_twins_features():
    """After the final norm, which its probes do not use, and as they do: the mean of some blocks' outputs."""
    aim, state = published()
    ours = from_ml_aim(aim.config, state, head=HEAD)
    assert ours.config.image_size == 28
    images = torch.randint(0, 256, (2, 28, 56, 3), dtype=torch.uint8)
    mean, std = torch.tensor(ours.config.vision.mean), torch.tensor(ours.config.vision.std)
    truth = aim(((images / 255 - mean) / std).permute(0, 3, 1, 2)).flatten(0, 1)
    pixels, grids = images.view(-1, 3), [(2, 4)] * 2
    assert relative_error(ours.features(pixels, grids, layers=[1]), truth) < 1e-5
    assert relative_error(ours.features(pixels, grids), aim.trunk["post_trunk_norm"](truth)) < 1e-5


@torch.no_grad()
def test_there_and_back_are_the_same_bits():
    aim, state = published()
    config, back = to_ml_aim(from_ml_aim(aim.config, state, head=HEAD))
    assert set(back) == {name for name in state if not name.startswith("head.")}
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert config.items() >= {k: v for k, v in aim.config.items() if k != "num_classes"}.items()
    ours = our_aim()
    again = from_ml_aim(*to_ml_aim(ours), head=HEAD)
    assert dataclasses.replace(again.config.vision, table=ours.config.vision.table) == ours.config.vision
    for name, tensor in ours.vision.state_dict().items():
        assert torch.equal(again.vision.state_dict()[name], tensor), name


def test_an_encoder_that_the_layout_does_not_hold_is_refused():
    for vision, message in (
        ({"eps": 1e-5}, "model.vision.eps is 1e-05, but in files of apple/ml-aim it is 1e-06"),
        ({"mean": (0.5, 0.5, 0.5)}, "model.vision.mean is"),
        ({"bias": True}, "model.vision.bias is True"),
    ):
        with pytest.raises(UserError, match=message):
            to_ml_aim(our_aim(**vision))


@pytest.mark.parametrize("name", ["preprocessor.pos_embed", "trunk.blocks.1.mlp.fc3.weight"])
def test_a_file_of_version_2_is_named_by_its_key(name):
    aim, state = published()
    for load in (
        lambda state: from_ml_aim(aim.config, state, head=HEAD),
        lambda state: from_hf(vision=(aim.config, state), decoder=DIGITS.decoder, image_tokens=4),
    ):
        with pytest.raises(UserError, match=f"tensor {name} is of AIM version 2, expected version 1"):
            load(state | {name: torch.ones(2)})


@torch.no_grad()
def test_the_command_converts_from_and_to_apples_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mm1.engine.convert.aim.PixelHead", lambda: HEAD)  # AIM's has 400 million parameters
    aim, state = published()
    apple = tmp_path / "apple"
    apple.mkdir()
    save_file({name: x.contiguous() for name, x in state.items()}, apple / "model.safetensors")
    (apple / "config.json").write_text(json.dumps(aim.config))
    convert(tmp_path / "ours", source=apple, to="aim")
    model = mm1.load(tmp_path / "ours", device="cpu")
    assert type(model) is AIM
    convert(tmp_path / "back", source=tmp_path / "ours", to="ml-aim")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], state[name]) for name in state if not name.startswith("head."))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["img_size"] == 28
    assert capsys.readouterr().out.split() == [str(tmp_path / "ours"), str(tmp_path / "back")]
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "back", source=tmp_path / "ours", to="ml-aim")
    with pytest.raises(UserError, match="--to aim takes --from, not --image-size"):
        convert(tmp_path / "new", source=apple, to="aim", image_size=28)
    with pytest.raises(UserError, match=r"--to aim takes --from$"):
        convert(tmp_path / "new", to="aim")
    with pytest.raises(UserError, match="ours is a model of kind aim, expected mm1"):
        convert(tmp_path / "new", source=tmp_path / "ours", experts=2)


@torch.no_grad()
def test_an_mm1_with_our_aim_sees_what_the_twin_sees_at_any_grid(tmp_path):
    """The last block's rows without the mask, at 4 × 4 patches of its training and elsewhere."""
    model = our_aim(mean=(0.4, 0.5, 0.6), eps=1e-5)
    folder = saved(model, tmp_path / "aim")
    out = assemble(tmp_path / "mm1", vision=folder, decoder="digits", tokenizer=TOKENIZER, image_tokens=4)
    whole = mm1.load(out, device="cpu")
    assert (whole.config.image_size, whole.config.vision.final_norm) == (4 * PATCH, False)
    grids = [(4, 4), (6, 6), (1, 5), (1, 1), (7, 2)]
    images, pixels = pictures(grids)
    truth = torch.cat([Twin(model).features(x, None, [model.config.vision.layers - 1]) for x in images])
    assert relative_error(whole.vision(pixels, Grids(grids)), truth) < 1e-5
    with pytest.raises(UserError, match="mm1 is a model of kind mm1, expected aim"):
        assemble(tmp_path / "new", vision=out, decoder="digits", tokenizer=TOKENIZER)


def mm1_run(vision, init, **changes) -> Run:
    run = small_run(**{"init": str(init), "steps": 8, "peak_lr": 5e-3} | changes)
    vision = dataclasses.replace(vision, final_norm=False)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))


def test_an_mm1_begins_with_the_encoder_of_an_aim_that_was_trained(tmp_path):
    """From a run's folder; the other parts are those of a start without it, and the loss of captions falls."""
    before = aim_run(draw_pictures(tmp_path / "pictures"), steps=4)
    train(before, tmp_path / "aim")
    aim = mm1.load(tmp_path / "aim", device="cpu")
    run = mm1_run(before.model.vision, tmp_path / "aim")
    start = Trainer(run, tmp_path / "start", Silent(), False)
    plain = MM1(run.model).init_weights(run.train.seed)
    for name, parameter in start.model.named_parameters():
        source = aim if name.startswith("vision.") else plain
        assert torch.equal(parameter, source.get_parameter(name)), name
    train(run, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    resumed = Trainer(run, tmp_path / "run", Silent(), True)
    assert resumed.steps_done == 8


@pytest.mark.parametrize("final_norm", [False, True])
def test_a_final_norm_is_loaded_where_the_mm1_has_one(tmp_path, final_norm):
    model = our_aim()
    run = mm1_run(model.config.vision, saved(model, tmp_path / "aim"))
    vision = dataclasses.replace(run.model.vision, final_norm=final_norm)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))
    begun = dict(Trainer(run, tmp_path / "run", Silent(), False).model.named_parameters())
    assert ("vision.final_norm.weight" in begun) == final_norm
    for name in set(begun) & {f"vision.{name}" for name in model.vision.state_dict()}:
        assert torch.equal(begun[name], model.get_parameter(name)), name


def test_an_encoder_with_other_settings_is_refused_by_their_names(tmp_path):
    model = our_aim()
    folder, vision = saved(model, tmp_path / "aim"), model.config.vision
    for changes, message in (
        ({"width": 64, "heads": 4}, r"model.vision: width 32, not 64; heads 2, not 4$"),
        ({"eps": 1e-5}, r"model.vision: eps 1e-06, not 1e-05$"),
        ({"positions": "table", "table": (4, 4)}, r"model.vision: table .*; positions sincos, not table$"),
    ):
        run = mm1_run(dataclasses.replace(vision, **changes), folder)
        with pytest.raises(UserError, match=message):
            Trainer(run, tmp_path / "run", Silent(), False)
