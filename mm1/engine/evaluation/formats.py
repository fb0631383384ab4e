"""Read files of captions and questions in their published formats."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm1.engine.evaluation.samples import Form, Images, Key, Loaded, Sample, expect_match, field, optional, rows_at


def _rows(loaded: Loaded, name: str, required: bool = True) -> Iterator[tuple[Path, Any, Any]]:
    """Yield (file, content, row) of each row in the lists of this name, which a file lacks only if not `required`."""
    for file, data in loaded:
        for row in field(file, data, name, list) if required else optional(file, data, name, list) or []:
            yield file, data, row


def _answers(file: Path, row: Any, key: object) -> tuple[str, ...]:
    """Return a row's answers, which are strings or objects with "answer"; () if it has none."""
    answers = optional(file, row, "answers", list, key) or ()
    return tuple(a if isinstance(a, str) else field(file, a, "answer", str, key) for a in answers)


def _coco(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read COCO and NoCaps: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    captions: dict[Key, list[str]] = defaultdict(list)
    annotated = loaded[0][0]
    for file, _, row in _rows(loaded, "annotations", required=False):
        key = field(file, row, "image_id", (int, str))
        captions[key].append(field(file, row, "caption", str, key))
        annotated = file
    samples = []
    for file, _, row in _rows(loaded, "images"):
        key = field(file, row, "id", (int, str))
        name = field(file, row, "file_name", str, key)
        samples.append(Sample(key, images.find(name), "", tuple(captions.get(key, ()))))
    expect_match(annotated, "captioned images", captions, "images", [sample.key for sample in samples])
    return samples


def _karpathy(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read Karpathy's form: {"images": [{"split", "filepath", "filename", "cocoid", "sentences": [{"raw"}]}]}."""
    splits = {"train", "restval"} if split == "train" else {split}
    samples = []
    for file, _, row in _rows(loaded, "images"):
        name = field(file, row, "filename", str)
        if field(file, row, "split", str, name) not in splits:
            continue
        texts = (field(file, sentence, "raw", str, name) for sentence in field(file, row, "sentences", list, name))
        folder, key = optional(file, row, "filepath", str, name), optional(file, row, "cocoid", (int, str), name)
        path = images.find(f"{folder}/{name}" if folder else name)
        samples.append(Sample(name if key is None else key, path, "", tuple(texts)))
    return samples


def _textcaps(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read TextCaps: {"data": [{"image_id", "caption_str"}]}, a row for each caption."""
    captions: dict[Key, list[str]] = {}
    for file, _, row in _rows(loaded, "data"):
        key = field(file, row, "image_id", (int, str))
        text = optional(file, row, "caption_str", str, key)
        captions.setdefault(key, []).extend([] if text is None else [text])
    return [Sample(key, images.find(f"{key}.jpg"), "", tuple(texts)) for key, texts in captions.items()]


def _vqa(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read VQAv2 and OK-VQA: {"questions": [{"question_id", "image_id", "question"}]} and {"annotations":
    [{"question_id", "answers": [{"answer"}]}]}."""
    answers: dict[Key, tuple[str, ...]] = {}
    annotated = loaded[0][0]
    for file, _, row in _rows(loaded, "annotations", required=False):
        key = field(file, row, "question_id", (int, str))
        answers[key] = _answers(file, row, key)
        annotated = file
    samples = []
    for file, data, row in _rows(loaded, "questions", required=False):
        key = field(file, row, "question_id", (int, str))
        image = field(file, row, "image_id", (int, str), key)
        path = images.of_coco(image, optional(file, data, "data_subtype", str) or "")
        samples.append(Sample(key, path, field(file, row, "question", str, key), answers.get(key, ())))
    expect_match(annotated, "annotations", answers, "questions", [sample.key for sample in samples])
    return samples


def _textvqa(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read TextVQA: {"data": [{"question_id", "image_id", "question", "answers": [text]}]}."""
    samples = []
    for file, _, row in _rows(loaded, "data"):
        key = field(file, row, "question_id", (int, str))
        path = images.find(f"{field(file, row, 'image_id', (int, str), key)}.jpg")
        samples.append(Sample(key, path, field(file, row, "question", str, key), _answers(file, row, key)))
    return samples


def _vizwiz(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read VizWiz-VQA: [{"image", "question", "answers": [{"answer"}]}], one question for each image."""
    samples = []
    for file, row in ((file, row) for file, rows in loaded for row in rows):
        key = field(file, row, "image", str)
        samples.append(Sample(key, images.find(key), field(file, row, "question", str, key), _answers(file, row, key)))
    return samples


CAPTIONS = (
    Form(_karpathy, rows_at("images", "sentences")),
    Form(_coco, rows_at("images", "id")),
    Form(_textcaps, rows_at("data", "image_id")),
)
QUESTIONS = (
    Form(_vqa, rows_at("questions")),
    Form(_textvqa, rows_at("data", "question")),
    Form(_vizwiz, rows_at(None, "image")),
)
