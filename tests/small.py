"""A model of every part of MM1 that trains in seconds, and documents for it."""

import dataclasses

import numpy as np
import torch

from mm1.engine.data.batch import Batch, exact_budget, pack
from mm1.engine.data.config import Data, Source
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import View
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.models.mm1 import MM1
from mm1.engine.models.mm1_config import DIGITS, MM1Config
from mm1.engine.run_config import DIGITS_FOLDER as FOLDER
from mm1.engine.run_config import Run
from mm1.engine.train.config import Train
from mm1.engine.train.step import Observer

SLOTS, IMAGE, PATCH = 4, 3, 4


def small_model(**decoder) -> MM1Config:
    sizes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn": 40}
    return MM1Config(
        vision=dataclasses.replace(DIGITS.vision, width=32, layers=2, heads=2, ffn=48),
        connector=dataclasses.replace(DIGITS.connector, tokens=SLOTS, hidden=24),
        decoder=dataclasses.replace(DIGITS.decoder, **sizes | decoder),
        image_mode="native", image_size=24, image_patches=64,
    )  # fmt: skip


def small_mm1(seed=0, **decoder) -> MM1:
    model = MM1(small_model(**decoder)).init_weights(seed)
    model.tokenizer = TextTokenizer(FOLDER / "tokenizer.json")
    return model


def logits_of(model: MM1, batch: Batch) -> torch.Tensor:
    """Return the logits [T, V] of a packed batch."""
    return model.hidden(batch)[0] @ model.decoder.head_weight.T


def document(*parts: int | tuple[int, int]) -> Document:
    """Numbers are that many random text tokens, pairs an image of so many patches."""
    tokens, views = [1], []
    for part in parts:
        if isinstance(part, tuple):
            tokens += [IMAGE] * SLOTS
            pixels = torch.randint(0, 256, (part[0] * PATCH, part[1] * PATCH, 3), dtype=torch.uint8).numpy()
            views.append(View("image", pixels))
        else:
            tokens += torch.randint(4, 384, (part,)).tolist()
    return Document(np.array(tokens, np.int32), tuple(views), "test")


DOCUMENTS = [
    ((2, 3), 5),
    (7,),
    (3, (1, 1), 2, (4, 2), 6),
    ((3, 3), (2, 3), 4),
    (1,),
]


def documents() -> list[Document]:
    return [document(*parts) for parts in DOCUMENTS]


def packed(docs: list[Document], budget: Budget | None = None) -> Batch:
    return pack(docs, budget or exact_budget(docs, PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)


def small_run(**train) -> Run:
    """Captions, quizzes and text of the demo, in small."""
    data = Data(
        sources=(
            Source("captions", (str(FOLDER / "test-captions.tar.gz"),), 45),
            Source("text", (str(FOLDER / "text.txt"),), 10),
        ),
        tokenizer=str(FOLDER / "tokenizer.json"),
        tokens=160, images=16, patches=512, documents=24,
    )  # fmt: skip
    warmup = min(2, train.get("steps", 12) - 1)
    recipe = {"steps": 12, "accumulate": 2, "warmup": warmup, "peak_lr": 2e-3, "compile": False, "save_every": 4}
    return Run(small_model(), data, Train(**(recipe | train)))


class At(Observer):
    """Call functions as steps begin or end, by their numbers: At(begins={3: f}, ends={5: g})."""

    def __init__(self, begins=None, ends=None):
        self.begins, self.ends = begins or {}, ends or {}

    def step_begins(self, step):
        self.begins.get(step, lambda: None)()

    def step_ends(self, result):
        self.ends.get(result.step, lambda: None)()
