"""Benchmarks: which files a user has of them, what a model is asked, and how its answers are scored.

A benchmark gives prompts and scores; evaluate.py runs them. Nothing is downloaded. Formats are told apart by what a
file holds, so that any of them may be given to any benchmark of its kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm1.engine.evaluation.choices import CHOICES, LETTERS, open_match
from mm1.engine.evaluation.cider import cider
from mm1.engine.evaluation.fewshot import Shot, caption, multiple_choice, question
from mm1.engine.evaluation.formats import CAPTIONS, QUESTIONS
from mm1.engine.evaluation.samples import Images, Key, Sample, load
from mm1.engine.evaluation.vqa import accuracy
from mm1.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FORMS = {"cider": CAPTIONS, "vqa": QUESTIONS, "choice": CHOICES}
KINDS = {"cider": "captions", "vqa": "questions and answers", "choice": "multiple choice"}


@dataclass(frozen=True)
class Benchmark:
    """Says which files a benchmark has, what it asks and how it is scored.

    files: patterns of names, `{split}` in them, alternatives apart by |; of a test split only the first is needed.

    key, text: fields of a submission; without text it is one object of keys and answers. stop, max_tokens: of
    decoding. pool: the split that shots are drawn from; None: its own. many: each pattern may stand for several files.

    Of multiple choice: lettered: the prompt shows the options and the model chooses a letter, as ScienceQA and MMMU
    ask; else it chooses among their texts, as SEED-Bench does. normalize: options are compared by the "sum" of their
    tokens' log-probabilities, as in the acc of lm-evaluation-harness, or by the "mean", as in SEED-Bench. Of letters,
    which are one token in most vocabularies, both are the same.
    """

    metric: str
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

    def query(self, sample: Sample, images: "Sequence[Image.Image]") -> "list[str | Image.Image]":
        """Return the question as it stands in a prompt."""
        if self.metric == "cider":
            return list(caption(images[0]))
        if self.metric == "vqa":
            return list(question(images[0], sample.question))
        return multiple_choice(images, sample.question, sample.options if self.lettered else ())

    def shot(self, sample: Sample, images: "Sequence[Image.Image]") -> Shot:
        """Show the first of its references, as OpenFlamingo does."""
        answer = sample.references[0]
        if sample.options and not self.lettered:
            answer = sample.options[LETTERS.index(answer)]
        return Shot(tuple(self.query(sample, images)), answer)

    def continuations(self, sample: Sample) -> list[str]:
        """Return what the model chooses from, each as it stands behind the query; none where it is to write."""
        texts = LETTERS[: len(sample.options)] if self.lettered else sample.options
        return [f" {' '.join(text.split())}" for text in texts]

    def answer(self, text: str) -> str:
        return text.replace('"', "").strip() if self.metric == "cider" else text.strip()

    def scores(self, samples: Sequence[Sample], predictions: Mapping[Key, str]) -> list[float]:
        """Return each sample's score, 0 to 100 (CIDEr-D: 0 to 1000, with the document frequencies of all samples)."""
        if self.metric == "cider":
            _, scores = cider({s.key: predictions[s.key] for s in samples}, {s.key: s.references for s in samples})
            return [100 * scores[sample.key] for sample in samples]
        return [100 * self.score(sample, predictions[sample.key]) for sample in samples]

    def score(self, sample: Sample, prediction: str) -> float:
        """Return one answer's score, 0 to 1."""
        if self.metric == "vqa":
            return accuracy(prediction, sample.references)
        if sample.options:
            return float(prediction == sample.references[0])
        return float(open_match(prediction, sample.references))


def _captions(*files: str, split: str = "val") -> Benchmark:
    return Benchmark("cider", files, split, "image_id", "caption", ("\n",), 30)


BENCHMARKS = {
    "coco": _captions("dataset_coco.json|captions_{split}20*.json|image_info_{split}20*.json", split="test"),
    "nocaps": _captions("nocaps_{split}_*captions.json|nocaps_{split}_image_info.json"),
    "textcaps": _captions("TextCaps_*_{split}.json"),
    "vqav2": Benchmark("vqa", ("v2_OpenEnded_mscoco_{split}20*_questions.json",
                               "v2_mscoco_{split}20*_annotations.json")),
    "okvqa": Benchmark("vqa", ("OpenEnded_mscoco_{split}20*_questions.json", "mscoco_{split}20*_annotations.json")),
    "textvqa": Benchmark("vqa", ("TextVQA_*_{split}.json|{split}_questions_vqa_format.json",
                                 "{split}_annotations_vqa_format.json|TextVQA_*_{split}.json")),
    "vizwiz": Benchmark("vqa", ("{split}.json",), key="image"),
    "scienceqa": Benchmark("choice", ("problems.json", "pid_splits.json"), split="test"),
    "seed": Benchmark("choice", ("SEED-Bench*.json",), split="image", text="prediction", pool=None, lettered=False,
                      normalize="mean"),
    "mmmu": Benchmark("choice", ("{split}*.parquet|{split}*.json|*_{split}.json",), split="validation", text="",
                      pool="dev", many=True),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def find(name: str, paths: Sequence[Path], split: str) -> list[Path]:
    """Return the files of a split: those given, or those of a folder that have the benchmark's names.

    Raises UserError.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        return list(paths)
    files: list[Path] = []
    b = benchmark(name)
    for number, pattern in enumerate(b.files):
        wanted = pattern.format(split=split)
        matches = next((m for p in wanted.split("|") if (m := sorted(paths[0].rglob(p)))), [])
        if len(matches) > 1 and not b.many:
            raise UserError(f"{paths[0]} holds {len(matches)} files {wanted}, expected one: name the files")
        if not matches and not (number and split.startswith("test")):
            raise UserError(f"{paths[0]} holds no file {wanted}")
        files += [m for m in matches if m not in files]
    return files


def read(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    """Return a split's samples, in the order of the files. Raises UserError for a file that is not as it should be."""
    samples = _samples(name, files, images, split)
    if not samples:
        raise UserError(f"{files[0]}: no samples of split {split!r}")
    return samples


def read_pool(
    name: str, data: Sequence[Path], given: Sequence[Path], images: "Images", samples: list[Sample]
) -> list[Sample]:
    """Return what shots are drawn from: the training split in `given` or else in `data`, or else `samples`."""
    b = benchmark(name)
    split = b.pool or b.split
    if given:
        return read(name, find(name, given, split), images, split)
    if b.pool is None:
        return samples
    try:
        files = find(name, data, split)
    except UserError:
        return samples
    return _samples(name, files, images, split) or samples


def _samples(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    loaded = [(file, load(file)) for file in files]
    metric = benchmark(name).metric
    form = next((form for form in FORMS[metric] if form.fits(loaded)), None)
    if form is None:
        raise UserError(f"{', '.join(map(str, files)) or 'no file'}: no known form of {KINDS[metric]}")
    samples = form.read(loaded, images, split)
    wanted = [path for sample in samples for path in sample.images if isinstance(path, Path)]
    if wanted and not any(path.is_file() for path in wanted):
        content = f"{len(images.paths)} files, such as {next(iter(images.paths))}" if images.paths else "no files"
        raise UserError(
            f"{files[0]}: 0 of {len(wanted)} images are in {images.folder}: no {wanted[0].name}; it holds {content}"
        )
    twice = len(samples) - len({sample.key for sample in samples})
    if twice:
        raise UserError(f"{files[0]}: {twice} keys are there twice")
    return samples


def submission(name: str, predictions: dict[Key, str]) -> list[dict[str, Key]] | dict[Key, str]:
    """Return predictions as the benchmark's evaluation server takes them."""
    b = benchmark(name)
    if not b.text:
        return predictions
    return [{b.key: key, b.text: text} for key, text in predictions.items()]
