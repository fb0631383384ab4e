"""Benchmarks of captions and questions: the user's files into samples, and how each is asked and scored.

Nothing is downloaded. Formats are told apart by what a file holds, so that any of them may be given to any benchmark of
its kind.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm1.engine.data.record import DataError
from mm1.engine.fewshot import Shot, caption, question

if TYPE_CHECKING:
    from PIL import Image

Key = int | str


@dataclass(frozen=True)
class Sample:
    """key: as submissions name it. references: captions, or the answers of ten people; none in test splits."""

    key: Key
    image: Path
    question: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """files: patterns of names, `{split}` in them, alternatives apart by |; of a test split only the first is needed.

    key, text: fields of a submission. stop, max_tokens: of greedy decoding.
    """

    metric: str
    files: tuple[str, ...]
    split: str = "val"
    key: str = "question_id"
    text: str = "answer"
    stop: tuple[str, ...] = ("\n", ".", ",", "Question")
    max_tokens: int = 10

    def query(self, sample: Sample, image: "Image.Image") -> "tuple[Image.Image, str]":
        return question(image, sample.question) if self.metric == "vqa" else caption(image)

    def shot(self, sample: Sample, image: "Image.Image") -> Shot:
        """With the first of its references, as OpenFlamingo takes it."""
        return Shot(self.query(sample, image), sample.references[0])

    def answer(self, text: str) -> str:
        return text.strip() if self.metric == "vqa" else text.replace('"', "").strip()


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
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def find(name: str, paths: Sequence[Path], split: str) -> list[Path]:
    """The files of a split: those given, or of a folder those that have the benchmark's names. Raises DataError."""
    if len(paths) != 1 or not paths[0].is_dir():
        return list(paths)
    found: list[Path] = []
    for number, pattern in enumerate(benchmark(name).files):
        wanted = pattern.format(split=split)
        matches = next((m for p in wanted.split("|") if (m := sorted(paths[0].rglob(p)))), [])
        if len(matches) > 1:
            raise DataError(f"{paths[0]} holds {len(matches)} files {wanted}, expected one: name the files")
        if not matches and not (number and split.startswith("test")):
            raise DataError(f"{paths[0]} holds no file {wanted}")
        found += [m for m in matches if m not in found]
    return found


def read(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    """Samples of a split, in the order of the files. Raises DataError for a file that is not as it should be."""
    samples = _samples(name, files, images, split)
    if not samples:
        raise DataError(f"{files[0]}: no samples of split {split!r}")
    return samples


def read_pool(
    name: str, data: Sequence[Path], given: Sequence[Path], images: "Images", samples: list[Sample]
) -> list[Sample]:
    """What shots are drawn from: the training split in `given`, or in `data` if it is there, or else `samples`."""
    if given:
        return read(name, find(name, given, "train"), images, "train")
    try:
        files = find(name, data, "train")
    except DataError:
        return samples
    return _samples(name, files, images, "train") or samples


def _samples(name: str, files: Sequence[Path], images: "Images", split: str) -> list[Sample]:
    loaded = [(file, _load(file)) for file in files]
    forms = CAPTIONS if benchmark(name).metric == "cider" else QUESTIONS
    form = next((form for form in forms if form.fits(loaded)), None)
    if form is None:
        kind = "captions" if forms is CAPTIONS else "questions and answers"
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: no known form of {kind}")
    samples = form.read(loaded, images, split)
    if samples and not samples[0].image.is_file():
        raise DataError(f"{files[0]}: {samples[0].key}: no image {samples[0].image.name} in {images.folder}")
    twice = len(samples) - len({sample.key for sample in samples})
    if twice:
        raise DataError(f"{files[0]}: {twice} keys are there twice")
    return samples


class Images:
    """Files below a folder, by their names."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"no folder of images {folder}")
        self.folder = folder
        self.paths: dict[str, Path] = {}
        for parent, _, names in os.walk(folder):
            self.paths.update((name, Path(parent, name)) for name in names)

    def find(self, *names: str) -> Path:
        """The first of these that is there: as a path below the folder, or anywhere in it by its last part."""
        for name in names:
            if "/" in name and (path := self.folder / name).is_file():
                return path
            if path := self.paths.get(name.rpartition("/")[2]):
                return path
        return self.folder / names[0]

    def of_coco(self, image_id: Key, subset: str = "") -> Path:
        if isinstance(image_id, str):
            return self.find(image_id, f"{image_id}.jpg")
        number = f"{image_id:012d}.jpg"
        subsets = [subset] if subset else []
        return self.find(*(f"COCO_{s}_{number}" for s in (*subsets, "val2014", "train2014", "test2015")), number)


def submission(name: str, predictions: dict[Key, str]) -> list[dict[str, Key]]:
    """As the benchmark's evaluation server takes it."""
    b = benchmark(name)
    return [{b.key: key, b.text: text} for key, text in predictions.items()]


Loaded = list[tuple[Path, Any]]


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None


def _field(file: Path, row: Any, name: str, kind: type | tuple[type, ...], key: object = None) -> Any:
    """Of a row; raises DataError that names file and key."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        where = f"{file}: " + ("" if key is None else f"{key}: ")
        raise DataError(f"{where}{name} is {json.dumps(value)[:60]}, expected {kinds}")
    return value


def _answers(file: Path, row: Any, key: object) -> tuple[str, ...]:
    """Strings, or objects with "answer"; none if there are none."""
    if row.get("answers") is None:
        return ()
    answers = _field(file, row, "answers", list, key)
    return tuple(a if isinstance(a, str) else _field(file, a, "answer", str, key) for a in answers)


def _coco(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """COCO, NoCaps: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    captions: dict[Key, list[str]] = defaultdict(list)
    for file, data in loaded:
        for row in data.get("annotations") or []:
            key = _field(file, row, "image_id", (int, str))
            captions[key].append(_field(file, row, "caption", str, key))
    samples = []
    for file, data in loaded:
        for row in _field(file, data, "images", list):
            key = _field(file, row, "id", (int, str))
            name = _field(file, row, "file_name", str, key)
            samples.append(Sample(key, images.find(name), "", tuple(captions[key])))
    return samples


def _karpathy(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Karpathy's: {"images": [{"split", "filepath", "filename", "cocoid", "sentences": [{"raw"}]}]}."""
    splits = {"train", "restval"} if split == "train" else {split}
    samples = []
    for file, data in loaded:
        for row in _field(file, data, "images", list):
            name = _field(file, row, "filename", str)
            if _field(file, row, "split", str, name) not in splits:
                continue
            sentences = _field(file, row, "sentences", list, name)
            texts = tuple(_field(file, sentence, "raw", str, name) for sentence in sentences)
            path = images.find(f"{row['filepath']}/{name}" if row.get("filepath") else name)
            samples.append(Sample(row.get("cocoid", name), path, "", texts))
    return samples


def _textcaps(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """TextCaps: {"data": [{"image_id", "caption_str"}]}, a row for each caption."""
    captions: dict[Key, list[str]] = {}
    for file, data in loaded:
        for row in _field(file, data, "data", list):
            key = _field(file, row, "image_id", (int, str))
            captions.setdefault(key, [])
            if row.get("caption_str") is not None:
                captions[key].append(_field(file, row, "caption_str", str, key))
    return [Sample(key, images.find(f"{key}.jpg"), "", tuple(texts)) for key, texts in captions.items()]


def _vqa(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """VQAv2, OK-VQA: {"questions": [{"question_id", "image_id", "question"}]} and {"annotations": [{"question_id",
    "answers": [{"answer"}]}]}."""
    answers: dict[Key, tuple[str, ...]] = {}
    for file, data in loaded:
        for row in data.get("annotations") or []:
            key = _field(file, row, "question_id", (int, str))
            answers[key] = _answers(file, row, key)
    samples, annotated = [], bool(answers)
    for file, data in loaded:
        for row in data.get("questions") or []:
            key = _field(file, row, "question_id", (int, str))
            image = _field(file, row, "image_id", (int, str), key)
            if annotated and not answers.get(key):
                raise DataError(f"{file}: {key}: no answers among the annotations")
            path = images.of_coco(image, data.get("data_subtype", ""))
            samples.append(Sample(key, path, _field(file, row, "question", str, key), answers.get(key, ())))
    return samples


def _textvqa(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """TextVQA: {"data": [{"question_id", "image_id", "question", "answers": [text]}]}."""
    samples = []
    for file, data in loaded:
        for row in _field(file, data, "data", list):
            key = _field(file, row, "question_id", (int, str))
            path = images.find(f"{_field(file, row, 'image_id', (int, str), key)}.jpg")
            samples.append(Sample(key, path, _field(file, row, "question", str, key), _answers(file, row, key)))
    return samples


def _vizwiz(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """VizWiz-VQA: [{"image", "question", "answers": [{"answer"}]}], one question an image."""
    samples = []
    for file, data in loaded:
        for row in data:
            key = _field(file, row, "image", str)
            samples.append(
                Sample(key, images.find(key), _field(file, row, "question", str, key), _answers(file, row, key))
            )
    return samples


@dataclass(frozen=True)
class _Form:
    """of: where rows are in one of the files, None if it is a list of them. first: a key of the first row."""

    read: Callable[[Loaded, Images, str], list[Sample]]
    of: str | None
    first: str = ""

    def fits(self, loaded: Loaded) -> bool:
        for _, data in loaded:
            rows = data if self.of is None else data.get(self.of) if isinstance(data, dict) else None
            if isinstance(rows, list) and rows and isinstance(rows[0], dict) and self.first in {*rows[0], ""}:
                return all(isinstance(other, type(data)) for _, other in loaded)
        return False


CAPTIONS = (_Form(_karpathy, "images", "sentences"), _Form(_coco, "images", "id"), _Form(_textcaps, "data", "image_id"))
QUESTIONS = (_Form(_vqa, "questions"), _Form(_textvqa, "data", "question"), _Form(_vizwiz, None, "image"))
