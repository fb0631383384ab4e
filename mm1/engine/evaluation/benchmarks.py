"""Define benchmarks: their files on disk, the prompts for a model, and the scores of its answers.

A benchmark defines prompts and scores; evaluate.py runs it. Nothing is downloaded. File formats are recognised by
content, so that every benchmark of a metric reads all formats of that metric.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm1.engine.evaluation.choices import CHOICES, LETTERS, open_match
from mm1.engine.evaluation.cider import cider
from mm1.engine.evaluation.fewshot import Shot, caption, multiple_choice, question
from mm1.engine.evaluation.formats import CAPTIONS, QUESTIONS
from mm1.engine.evaluation.samples import Form, Images, Key, Sample, load
from mm1.engine.evaluation.vqa import accuracy
from mm1.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Metric:
    """Define how benchmarks of one kind ask their questions and score the answers.

    To add a metric, make an object of this class here and name it in BENCHMARKS. name: as in reports; title: of its
    column in tables; content: of the files, for errors; forms: formats of the files. ask: returns the part of a prompt
    that asks a sample's question about its images, with the options if `lettered`. clean: returns the prediction in a
    generated text. scores: returns the scores of predictions, 0 to 1 (CIDEr-D: 0 to 10). alone: whether the score of a
    prediction does not depend on the other samples.
    """

    name: str
    title: str
    content: str
    forms: tuple[Form, ...]
    ask: "Callable[[Sample, Sequence[Image.Image], bool], Sequence[str | Image.Image]]"
    clean: Callable[[str], str]
    scores: Callable[[Sequence[Sample], Sequence[str]], list[float]]
    alone: bool = True


def _cider_scores(samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
    captions: dict[Hashable, str] = {sample.key: text for sample, text in zip(samples, predictions)}
    _, scores = cider(captions, {sample.key: sample.references for sample in samples})
    return [scores[sample.key] for sample in samples]


def _vqa_scores(samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
    return [accuracy(text, sample.references) for sample, text in zip(samples, predictions)]


def _choice_scores(samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
    return [
        float(text == sample.references[0] if sample.options else open_match(text, sample.references))
        for sample, text in zip(samples, predictions)
    ]


CIDER = Metric(
    "cider", "CIDEr", "captions", CAPTIONS,
    ask=lambda sample, images, lettered: caption(images[0]),
    clean=lambda text: text.replace('"', "").strip(),
    scores=_cider_scores,
    alone=False,
)  # fmt: skip
VQA = Metric(
    "vqa", "accuracy", "questions and answers", QUESTIONS,
    ask=lambda sample, images, lettered: question(images[0], sample.question),
    clean=str.strip,
    scores=_vqa_scores,
)  # fmt: skip
CHOICE = Metric(
    "choice", "accuracy", "multiple choice", CHOICES,
    ask=lambda sample, images, lettered: multiple_choice(images, sample.question, sample.options if lettered else ()),
    clean=str.strip,
    scores=_choice_scores,
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """Define a benchmark's files, prompts and scoring.

    files: patterns of file names with `{split}`, alternatives separated by |; a test split needs only the first
    pattern's file. split: the default split to evaluate. key, text: names of the fields in a submission; without text a
    submission is one object of keys and answers. stop, max_tokens: settings of decoding. pool: the split that shots are
    drawn from; None: the evaluated split. many: whether a pattern can match several files.

    For multiple choice: lettered: the prompt shows the options and the model chooses a letter, as in ScienceQA and
    MMMU; otherwise it chooses among their texts, as in SEED-Bench. normalize: options are compared by the "sum" of
    their tokens' log-probabilities, as in lm-evaluation-harness' acc, or by the "mean", as in SEED-Bench; for letters,
    which are one token in most vocabularies, both are the same.
    """

    metric: Metric
    files: tuple[str, ...]
    split: str = "val"
    key: str = "question_id"
    text: str = "answer"
    stop: tuple[str, ...] = ("\n", ".", ",", "Question")
    max_tokens: int = 10
    pool: str | None = "train"
    many: bool = False
    lettered: bool = True
    normalize: str = "sum"

    def query(self, sample: Sample, images: "Sequence[Image.Image]") -> "Sequence[str | Image.Image]":
        """Return the part of a prompt that asks a sample's question."""
        return self.metric.ask(sample, images, self.lettered)

    def shot(self, sample: Sample, images: "Sequence[Image.Image]") -> Shot:
        """Return a sample as a shot, answered with its first reference, as in OpenFlamingo."""
        answer = sample.references[0]
        if sample.options and not self.lettered:
            answer = sample.options[LETTERS.index(answer)]
        return Shot(tuple(self.query(sample, images)), answer)

    def continuations(self, sample: Sample) -> list[str]:
        """Return the texts that the model chooses from, as they follow the query; none if it writes an answer."""
        texts = LETTERS[: len(sample.options)] if self.lettered else sample.options
        return [f" {' '.join(text.split())}" for text in texts]

    def scores(self, samples: Sequence[Sample], predictions: Mapping[Key, str]) -> list[float]:
        """Return each sample's score, 0 to 100 (CIDEr-D: 0 to 1000, with the document frequencies of all samples)."""
        scores = self.metric.scores(samples, [predictions[sample.key] for sample in samples])
        return [100 * score for score in scores]


def _captions(*files: str, split: str = "val") -> Benchmark:
    return Benchmark(CIDER, files, split, "image_id", "caption", ("\n",), 30)


BENCHMARKS = {
    "coco": _captions("dataset_coco.json|captions_{split}20*.json|image_info_{split}20*.json", split="test"),
    "nocaps": _captions("nocaps_{split}_*captions.json|nocaps_{split}_image_info.json"),
    "textcaps": _captions("TextCaps_*_{split}.json"),
    "vqav2": Benchmark(VQA, ("v2_OpenEnded_mscoco_{split}20*_questions.json",
                               "v2_mscoco_{split}20*_annotations.json")),
    "okvqa": Benchmark(VQA, ("OpenEnded_mscoco_{split}20*_questions.json", "mscoco_{split}20*_annotations.json")),
    "textvqa": Benchmark(VQA, ("TextVQA_*_{split}.json|{split}_questions_vqa_format.json",
                                 "{split}_annotations_vqa_format.json|TextVQA_*_{split}.json")),
    "vizwiz": Benchmark(VQA, ("{split}.json",), key="image"),
    "scienceqa": Benchmark(CHOICE, ("problems.json", "pid_splits.json"), split="test"),
    "seed": Benchmark(CHOICE, ("SEED-Bench*.json",), split="image", text="prediction", pool=None, lettered=False,
                      normalize="mean"),
    "mmmu": Benchmark(CHOICE, ("{split}*.parquet|{split}*.json|*_{split}.json",), split="validation", text="",
                      pool="dev", many=True),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name. Raises UserError."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def find(name: str, paths: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split: the benchmark's files in `paths` if that is one folder, or else `paths` themselves.

    Raises UserError.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        return list(paths)
    files: list[Path] = []
    b = benchmark(name)
    for number, pattern in enumerate(b.files):
        names = pattern.format(split=split)
        matches = next((m for p in names.split("|") if (m := sorted(paths[0].rglob(p)))), [])
        if len(matches) > 1 and not b.many:
            raise UserError(f"{paths[0]} holds {len(matches)} files {names}, expected one: name the files")
        if not matches and not (number and split.startswith("test")):
            raise UserError(f"{paths[0]} holds no file {names}")
        files += [m for m in matches if m not in files]
    return files


def read(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    """Return a split's samples in the order of the files. Raises UserError for a malformed file or an empty split."""
    samples = _samples(name, files, images, split)
    if not samples:
        raise UserError(f"{files[0]}: no samples of split {split!r}")
    return samples


def read_pool(
    name: str, data: Sequence[Path], shots_from: Sequence[Path], images: "Images", samples: list[Sample]
) -> list[Sample]:
    """Return the samples that shots are drawn from: the pool split in `shots_from`, or in `data`, or else `samples`."""
    b = benchmark(name)
    split = b.pool or b.split
    if shots_from:
        return read(name, find(name, shots_from, split), images, split)
    if b.pool is None:
        return samples
    try:
        files = find(name, data, split)
    except UserError:
        return samples
    return _samples(name, files, images, split) or samples


def _samples(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    loaded, metric = [(file, load(file)) for file in files], benchmark(name).metric
    form = next((form for form in metric.forms if form.fits(loaded)), None)
    if form is None:
        raise UserError(f"{', '.join(map(str, files)) or 'no file'}: no known format of {metric.content}")
    samples = form.read(loaded, images, split)
    paths = [path for sample in samples for path in sample.images if isinstance(path, Path)]
    if paths and not any(path.is_file() for path in paths):
        content = f"{len(images.paths)} files, such as {next(iter(images.paths))}" if images.paths else "no files"
        raise UserError(
            f"{files[0]}: 0 of {len(paths)} images are in {images.folder}: no {paths[0].name}; it holds {content}"
        )
    duplicates = len(samples) - len({sample.key for sample in samples})
    if duplicates:
        raise UserError(f"{files[0]}: {duplicates} keys occur twice")
    return samples


def submission(name: str, predictions: dict[Key, str]) -> list[dict[str, Key]] | dict[Key, str]:
    """Return predictions in the form that the benchmark's evaluation server reads."""
    b = benchmark(name)
    if not b.text:
        return predictions
    return [{b.key: key, b.text: text} for key, text in predictions.items()]
