"""A model is added as models/spec.py says: a decoder of text alone, its settings, a line of the registry.

This is the example of "Add a model" in CONTRIBUTING: copy TextConfig, SIZES and TextModel.
"""

import dataclasses
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import torch
from small import FOLDER, documents, packed, small_model
from test_train import Quiet, assert_same, trained
from torch import Tensor

import mm1
from mm1.engine.data.batch import Batch
from mm1.engine.data.config import Data, Source
from mm1.engine.infer.generate import generate
from mm1.engine.layers.config import Decoder
from mm1.engine.layers.decoder import DecoderLM
from mm1.engine.layers.layer import BlockLayer
from mm1.engine.layers.workload import Layout, Operations, Workload
from mm1.engine.models import registry
from mm1.engine.models.image_input import TEXT_ONLY, ImageInput
from mm1.engine.models.spec import Losses, Model, Sum
from mm1.engine.run_config import Run, from_dict, load_run, to_dict
from mm1.engine.settings import Count, OneOf, check
from mm1.engine.train import checkpoint, settings_page
from mm1.engine.train.config import Train
from mm1.engine.train.ledger import ledger
from mm1.engine.train.plan import plan, typical
from mm1.engine.train.replay import replay
from mm1.engine.train.trainer import Trainer, train
from mm1.errors import UserError
from mm1.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class TextConfig:
    """Configure a decoder of text alone."""

    decoder: Decoder
    context: Count | None = None
    """Tokens of the longest document in training, which limits generation; none: unknown."""
    dialect: Annotated[str, OneOf("plain", "verse")] = "plain"
    """Kind of text; a setting that MM1 does not have."""
    kind: Annotated[str, OneOf("text")] = "text"
    """Kind of the model, a key of the registry."""

    def __post_init__(self):
        check(self, "model")

    @property
    def images(self) -> ImageInput:
        return TEXT_ONLY

    @property
    def vocabulary(self) -> int:
        return self.decoder.vocabulary


class TextModel(Model):
    """Compute the next-token loss of packed documents of text."""

    PROFILE: ClassVar = {"decoder": ("decoder linear", "decoder attention"), "head": ("head",)}

    def __init__(self, c: TextConfig):
        super().__init__(c)
        self.decoder = DecoderLM(c.decoder)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states [T, D] of a packed batch."""
        x = self.decoder.embedding(batch.tokens)
        return self.decoder(x, batch.positions, batch.cu_seqlens, longest=batch.longest)[0]

    def forward(self, batch: Batch) -> Losses:
        """Return the next-token loss of a packed batch."""
        hidden, rows = self.hidden(batch), batch.target_rows
        loss = linear_cross_entropy(hidden[rows], self.decoder.head_weight, batch.targets[rows], reduction="sum")
        return Losses(loss, {"loss": Sum(loss, "targets")}, batch.tokens.new_zeros(0, dtype=torch.int64))

    def document_losses(self, batch: Batch) -> Tensor:
        return self.decoder.document_losses(self.hidden(batch), batch.targets, batch.cu_seqlens)

    def blocks(self) -> list[BlockLayer]:
        return list(self.decoder.blocks)

    def operations(self, workload: Workload) -> list[Operations]:
        return self.decoder.operations(workload)

    def kept_bytes(self, workload: Workload, layout: Layout) -> float:
        return self.decoder.kept_bytes(workload, layout)


SIZES = {"text-small": TextConfig(small_model(experts=0).decoder)}
ENTRY = registry.Entry(*(f"{__name__}:{name}" for name in ("TextModel", "TextConfig", "SIZES")))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry.REGISTRY, "text", ENTRY)


def text_run(**changes) -> Run:
    data = Data((Source("text", (str(FOLDER / "text.txt"),)),), tokenizer=str(FOLDER / "tokenizer.json"), tokens=96)
    settings = {"steps": 8, "accumulate": 1, "warmup": 1, "peak_lr": 1e-2, "compile": False, "save_every": 4}
    return Run(SIZES["text-small"], data, Train(**settings | changes))


def test_it_is_trained_resumed_loaded_and_generated_from(tmp_path):
    shown = Quiet()
    truth = trained(tmp_path / "run", text_run(), display=shown)
    losses = [metrics["loss"] for metrics in shown.metrics]
    assert losses[-1] < losses[0] - 0.5
    assert "load_balance" not in shown.metrics[0], "which is a sum of MM1's"

    with Trainer(text_run(), tmp_path / "resumed", Quiet()) as first:
        while first.steps_done < 5:
            first.step()
            first.settle()
        first.save()
    assert_same(trained(tmp_path / "resumed", text_run(), resume=True), truth)

    model = mm1.load(tmp_path / "run", dtype=torch.float32)
    assert type(model) is TextModel
    assert model.config == dataclasses.replace(text_run().model, context=96)
    assert_same(dict(model.named_parameters()), truth)
    texts = generate(model, [["one two"], ["three"]], max_tokens=4)
    assert len(texts) == 2


def test_documents_and_prompts_longer_than_a_page_need_no_slots_of_images(tmp_path):
    """Documents are cut to fill a sequence, and full pages of a prompt have names: both count tokens of images."""
    lines = [" ".join(["one two three"] * (12 + i)) for i in range(12)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    run = text_run(steps=6)
    sources = (Source("text", (str(tmp_path / "text.txt"),)),)
    trained(tmp_path / "run", dataclasses.replace(run, data=dataclasses.replace(run.data, sources=sources)))
    model = mm1.load(tmp_path / "run", dtype=torch.float32)
    assert generate(model, [[" ".join(["one two three"] * 10)]], max_tokens=4)


@pytest.mark.parametrize("name", ["tokens", "norm", "nll"])
def test_sums_without_a_loss_or_with_a_name_of_the_trainers_own_are_refused(name, tmp_path, monkeypatch):
    forward = TextModel.forward

    def other(self, batch):
        losses = forward(self, batch)
        names = {"loss": losses.sums["loss"]} if name != "nll" else {}
        return losses._replace(sums=names | {name: losses.sums["loss"]})

    monkeypatch.setattr(TextModel, "forward", other)
    with pytest.raises(ValueError, match=rf"TextModel returned the sums .*{name}, expected \"loss\" among them"):
        Trainer(text_run(), tmp_path / "run", Quiet()).step()


def test_a_step_of_it_is_replayed_and_copies_have_weights_of_their_own(tmp_path):
    train(text_run(), tmp_path / "run")
    report = replay(tmp_path / "run", 6)
    assert report["verdict"] == ["nothing differs"]
    assert report["documents"]
    model = TextModel(SIZES["text-small"]).init_weights()
    copy = pickle.loads(pickle.dumps(model))
    assert copy.blocks()[0] is copy.decoder.blocks[0]
    assert copy.blocks()[0] is not model.blocks()[0]


def test_a_model_without_losses_of_documents_says_what_it_lacks(tmp_path):
    class Bare(Model):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare must define document_losses\(batch\)"):
        Bare(SIZES["text-small"]).document_losses(packed(documents()))


def test_its_sizes_and_recipes_are_found_by_name(tmp_path):
    assert load_run("text-small").model == SIZES["text-small"]
    assert load_run("text-small", ["model.dialect=verse"]).model.dialect == "verse"
    tuned = load_run("text-small", ["recipe=finetune"])
    assert (tuned.data.tokens, tuned.model) == (2048, SIZES["text-small"])  # without the settings of images
    assert type(mm1.load("text-small")) is TextModel
    with pytest.raises(UserError, match=r"unknown size 'text', and no such file or folder; expected .*, text-small"):
        load_run("text")
    (tmp_path / "run.toml").write_text('[model]\nsize = "text-small"\ndialect = "verse"\n')
    assert load_run(str(tmp_path / "run.toml")).model.dialect == "verse"


def test_its_settings_are_options_of_the_command_and_on_the_page():
    code = (
        "import sys, test_new_model\nfrom mm1.engine.models import registry\n"
        "registry.REGISTRY['text'] = test_new_model.ENTRY\nfrom mm1.cli import main\nmain()"
    )
    options = ("--model.dialect", "verse", "--model.decoder.ffn", "48", "--show")
    shown = subprocess.run([sys.executable, "-c", code, "train", "text-small", *options], cwd=Path(__file__).parent,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert '\ndialect = "verse"\n' in shown
    assert "\nffn = 48\n" in shown
    assert '| `model.dialect` | one of plain, verse | `"plain"` | Kind of text' in settings_page.page()


def test_its_settings_are_read_as_they_were_written():
    run = text_run()
    assert from_dict(to_dict(run)) == run
    with pytest.raises(UserError, match=r"setting model\.decoder\.kv_heads is 2, expected a divisor of the 3"):
        from_dict({**to_dict(run), "model": {"kind": "text", "decoder": {**to_dict(run.model.decoder), "heads": 3}}})
    with pytest.raises(UserError, match=r"setting model\.kind is 'tex', expected one of mm1, aim, text"):
        from_dict({"model": {"kind": "tex"}})
    with pytest.raises(UserError, match=r"setting model\.kind is \[1\], expected one of mm1, aim, text"):
        from_dict({"model": {"kind": [1]}})


def test_it_is_counted_and_planned():
    run = text_run(accumulate=8)
    counted = ledger(run.model, typical(run, 96))
    same = ledger(small_model(experts=0), typical(run, 96))  # of MM1 with this decoder, without images
    assert all(counted.forward[part] == same.forward[part] > 0 for part in counted.forward)
    assert set(counted.totals()) == {"decoder linear", "decoder attention", "head", "useful", "padding", "recompute"}
    assert plan(run, 2).parameters == sum(p.numel() for p in TextModel(run.model).parameters())


def test_a_record_with_an_image_is_bad_and_another_kind_of_model_is_not_resumed(tmp_path):
    images = Source("captions", (str(FOLDER / "test-captions.tar.gz"),))
    run = text_run()
    with pytest.raises(UserError, match="media of kind 'image', but the model takes text alone"):
        train(dataclasses.replace(run, data=dataclasses.replace(run.data, sources=(images,))), tmp_path / "images")
    trained(tmp_path / "run", run)
    folder = checkpoint.newest_in(tmp_path / "run")
    with pytest.raises(UserError, match="holds a model of kind text, expected this run's mm1"):
        Trainer(dataclasses.replace(run, model=small_model()), tmp_path / "other", Quiet()).resume_from(folder)


def test_a_model_without_a_law_of_its_own_asks_for_a_rate(tmp_path):
    with pytest.raises(UserError, match=r"setting train\.peak_lr is None, expected a number: TextModel has no default"):
        Trainer(text_run(peak_lr=None), tmp_path / "run", Quiet())
