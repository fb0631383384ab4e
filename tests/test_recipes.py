"""MM1's recipes as runs, and images as a whole and its parts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_model, small_run

from mm1.engine.data.document import Budget, DocumentEncoder
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.record import Media, Record
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import load_run, to_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.display import Silent
from mm1.engine.train.trainer import Trainer
from mm1.errors import UserError


def test_pre_training_is_what_a_size_is_trained_by():
    run = load_run("mm1-3b")
    assert (run.data.tokens, run.data.images, run.train.accumulate, run.train.steps) == (4096, 16, 512, 200_000)
    assert run == load_run("mm1-3b", ["recipe=pretrain"])


def test_fine_tuning_is_the_papers():
    run = load_run("mm1-3b", ["recipe=finetune", "train.steps=500"])
    assert (run.data.tokens, run.train.accumulate, run.train.steps) == (2048, 256, 500)
    assert (run.model.image_size, run.model.image_parts, run.train.peak_lr) == (672, 2, 1e-5)
    assert run.model.vision.table == (27, 27)  # interpolated, not learned anew
    assert 5 * run.model.connector.tokens == 720
    other = load_run("mm1-3b", ["recipe=finetune", "model.image_size=448", "model.image_parts=1"])
    assert (other.model.image_size, other.model.image_parts) == (448, 1)


def test_unknown_recipes_are_refused():
    with pytest.raises(UserError, match="setting recipe is 'sft', expected one of pretrain, finetune, digits"):
        load_run("mm1-3b", ["recipe=sft"])


def test_views_are_the_image_and_its_parts_row_by_row():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    whole, *parts = ImagePolicy(14, size=28, parts=2).views(large)
    assert (whole == ImagePolicy(14, size=28).resize(large)).all()
    rows = [np.concatenate(parts[i : i + 2], axis=1) for i in (0, 2)]
    assert (np.concatenate(rows) == np.array(large)).all()
    assert len(ImagePolicy(14, size=28, parts=3).views(large)) == 10


TOKENIZER = small_run().data.tokenizer


@pytest.mark.parametrize("budget", [Budget(40, 5, 45, 4), Budget(23, 7, 200, 4)])
def test_an_images_views_stay_together(budget):
    """Two images of 5 views of 4 tokens do not fit one piece, by images or by tokens."""
    encode = DocumentEncoder(TextTokenizer(TOKENIZER), ImagePolicy(4, size=12, parts=2), 4, budget)
    image = Image.new("RGB", (24, 24))
    parts = [png(image), "a", png(image), "b"]
    pieces = encode(Record(parts=tuple(parts), shard="shard", key="key"))
    assert [len(piece.media) for piece in pieces] == [5, 5]
    for piece in pieces:
        assert (piece.tokens == encode.tokenizer.image).sum() == 20


def test_an_image_of_more_views_than_the_budget_is_unreadable():
    encode = DocumentEncoder(TextTokenizer(TOKENIZER), ImagePolicy(4, size=12, parts=2), 4, Budget(100, 4, 200, 4))
    with pytest.raises(Exception, match="one image of 5 views and 45 patches exceeds the packing budget"):
        encode(Record(parts=(png(Image.new("RGB", (24, 24))), "a"), shard="shard", key="key"))


def png(image):
    from io import BytesIO

    file = BytesIO()
    image.save(file, "png")
    return Media("image", file.getvalue())


def test_a_run_begins_with_the_weights_of_a_checkpoint_and_its_own_resolution(tmp_path):
    run = small_run(steps=2)
    model = MM1(run.model).init_weights(seed=5)
    texts = {"config.json": json.dumps({"model": to_dict(run.model)}), "tokenizer.json": Path(TOKENIZER).read_text()}
    checkpoint.write(tmp_path / "base", {"model.safetensors": dict(model.state_dict())}, texts)
    lines = [
        'recipe = "finetune"',
        "[train]",
        f'init = "{tmp_path / "base"}"',
        "steps = 1",
        "accumulate = 1",
        "compile = false",
    ]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    tuned = load_run(str(tmp_path / "run.toml"))
    assert tuned.model.image_size == 672
    assert tuned.model.decoder == run.model.decoder
    small = dataclasses.replace(run.model, image_mode="squash", image_size=12, image_parts=2)
    tuned = dataclasses.replace(tuned, model=small, data=dataclasses.replace(run.data, tokens=160))
    trainer = Trainer(tuned, tmp_path / "run", Silent(), False)
    for name, parameter in trainer.model.named_parameters():
        assert (parameter == model.get_parameter(name)).all(), name
    trainer.fit()
    assert trainer.steps_done == 1


def test_weights_of_another_shape_are_refused(tmp_path):
    run = small_run()
    model = MM1(small_model(qk_norm=False)).init_weights()
    texts = {"config.json": json.dumps({"model": to_dict(run.model)}), "tokenizer.json": Path(TOKENIZER).read_text()}
    checkpoint.write(tmp_path / "base", {"model.safetensors": dict(model.state_dict())}, texts)
    begun = dataclasses.replace(run, train=dataclasses.replace(run.train, init=str(tmp_path / "base")))
    with pytest.raises(UserError, match=r"q_norm\.weight is missing, expected"):
        Trainer(begun, tmp_path / "run", Silent(), False)


def test_budgets_hold_at_least_one_image_with_its_parts(tmp_path):
    run = small_run()
    model = dataclasses.replace(run.model, image_mode="squash", image_size=12, image_parts=2)
    few = dataclasses.replace(run, model=model, data=dataclasses.replace(run.data, images=4))
    with pytest.raises(UserError, match=r"setting data.images is 4, too few for one image, expected 5 or more"):
        Trainer(few, tmp_path / "run", Silent(), False)
