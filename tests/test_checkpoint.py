import json
import shutil

import pytest
import torch
from small import logits_of, packed, small_run

from mm1.engine.train import checkpoint
from mm1.engine.train.checkpoint import CheckpointError
from mm1.engine.train.trainer import train
from mm1.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(small_run(steps=2), folder)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run[0] / "step-00000002", tmp_path / "copy")


def test_loads_what_was_trained_from_the_checkpoint_or_the_run(run):
    from small import documents

    folder, model = run
    batch = packed(documents())
    for path in (folder, folder / "checkpoint", folder / "step-00000002"):
        loaded = checkpoint.load(path)
        assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
        assert len(loaded.tokenizer) == 384


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_flipped_byte_or_a_missing_file_is_one_clear_line(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} is not what was written"):
        checkpoint.load(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        checkpoint.load(copy)


def test_without_its_marker_there_is_no_checkpoint(copy):
    (copy / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.load(copy)
    assert checkpoint.latest(copy.parent) is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(copy / "nothing" / "here")


def test_an_unfinished_write_is_not_seen_and_swept_away(tmp_path):
    tensors = {"a.safetensors": {"x": torch.ones(2)}}
    for step in (1, 2, 3):
        checkpoint.write(tmp_path / f"step-{step:08d}", tensors, {"b.json": "{}"})
    (tmp_path / ".step-00000004.partial").mkdir()
    (tmp_path / "step-00000005").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000003"
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert set(json.loads((tmp_path / "step-00000003" / "COMPLETE").read_text())) == {"a.safetensors", "b.json"}


def test_a_named_size_has_random_weights_and_no_tokenizer():
    model = checkpoint.load("digits")
    assert model.tokenizer is None
    with pytest.raises(UserError, match="unknown size 'mm1-4b', and no such file or folder; expected one of digits"):
        checkpoint.load("mm1-4b")
