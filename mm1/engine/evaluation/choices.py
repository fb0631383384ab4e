"""Read multiple-choice benchmarks in their published formats, and score MMMU's open questions."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mm1.engine.evaluation.samples import (
    Embedded,
    Form,
    Images,
    Loaded,
    Picture,
    Sample,
    expect_match,
    field,
    optional,
    rows_at,
)
from mm1.errors import UserError

LETTERS = ascii_uppercase
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
MARK = re.compile(r"<image (\d)>")
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def _scienceqa(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read ScienceQA: problems.json {id: {"question", "choices", "answer": number, "hint", "image", "subject",
    "grade"}} and pid_splits.json {split: [id]}; images are SPLIT/ID/image.png.

    Groups are those of the paper's table: subject, context (text, image, none) and grade.
    """
    problems, (splits_file, splits) = _problems(loaded)
    if split not in splits:
        raise UserError(f"{splits_file}: no split {split!r}, expected one of {', '.join(splits)}")
    (file, rows), ids = problems, splits[split]
    for i, key in enumerate(ids):
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise UserError(f"{splits_file}: id {i} of split {split} is {json.dumps(key)[:60]}, expected a string")
    expect_match(splits_file, f"ids of split {split}", ids, f"problems of {file.name}", rows)
    if missing := [key for key in ids if key not in rows]:
        warnings.warn(
            f"{splits_file}: {len(missing)} of {len(ids)} ids of split {split} have no problem in "
            f"{file.name}, such as {missing[0]!r}: left out", stacklevel=2,
        )  # fmt: skip
    samples = []
    for key, row in ((key, rows[key]) for key in ids if key in rows):
        text, hint = field(file, row, "question", str, key), field(file, row, "hint", str, key)
        name = optional(file, row, "image", str, key)
        folder = optional(file, row, "split", str, key) or split
        path = images.at(f"{folder}/{key}/{name}") if name else None  # all are named image.png
        grade = int(re.sub(r"\D", "", field(file, row, "grade", str, key)) or 0)
        contexts = ["TXT"] * bool(hint) + ["IMG"] * bool(name) or ["NO"]
        subject = optional(file, row, "subject", str, key)
        groups = (SUBJECTS.get(subject or "", "other"), *contexts, "G1-6" if grade <= 6 else "G7-12")
        options = tuple(field(file, row, "choices", list, key))
        number = optional(file, row, "answer", int, key)
        answers = () if number is None else (_letter(file, key, number, options),)
        samples.append(Sample(key, path, text + (f"\nContext: {hint}" if hint else ""), answers, options, groups))
    return samples


def _problems(loaded: Loaded) -> tuple[tuple[Path, dict[str, Any]], tuple[Path, dict[str, list[str]]]]:
    """Return the file of problems, and the file of splits or, without one, the splits named in the problems."""
    file, problems = next((file, data) for file, data in loaded if _is_problems(data))
    for other, data in loaded:
        if other != file:
            return (file, problems), (other, {name: field(other, data, name, list) for name in data})
    splits: dict[str, list[str]] = {}
    for key, row in problems.items():
        splits.setdefault(field(file, row, "split", str, key), []).append(key)
    return (file, problems), (file, splits)


def _is_problems(data: Any) -> bool:
    first = next(iter(data.values()), None) if isinstance(data, dict) else None
    return isinstance(first, dict) and {"question", "choices"} <= set(first)


def _science_fits(loaded: Loaded) -> bool:
    others = [data for _, data in loaded if not _is_problems(data)]
    return len(loaded) - len(others) == 1 and len(others) < 2 and all(isinstance(data, dict) for data in others)


def _seed(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read SEED-Bench: {"questions": [{"question_id", "question", "choice_a" … "choice_d", "answer", "data_id",
    "data_type", "question_type_id"}], "question_type": {name: id}}.

    Only the data type image is read, as the split "image".
    """
    if split != "image":
        raise UserError(f"seed: no split {split!r}, expected image: videos are not read")
    samples = []
    for file, data in loaded:
        types = optional(file, data, "question_type", dict) or {}
        names = {field(file, types, name, (int, str), "question_type"): name for name in types}
        for row in field(file, data, "questions", list):
            key = field(file, row, "question_id", (int, str))
            if optional(file, row, "data_type", str, key) not in (None, "image"):
                continue
            options = tuple(field(file, row, f"choice_{letter}", str, key) for letter in "abcd")
            name = field(file, row, "data_id", str, key)
            number = optional(file, row, "question_type_id", (int, str), key)
            answers = _answers(file, key, row.get("answer"), options)
            path = images.find(name, f"{name}.jpg", f"{name}.png")
            group = (str(names.get(number, number)),)
            samples.append(Sample(key, path, field(file, row, "question", str, key), answers, options, group))
    return samples


def _mmmu(loaded: Loaded, images: Images, split: str) -> list[Sample]:
    """Read MMMU: rows {"id": "validation_Subject_1", "question", "options": "['…', …]", "answer", "question_type",
    "image_1" … "image_7"}. `<image 1>` in a text marks an image; in JSON an image is the name of a file.

    Groups are disciplines and subjects. Open questions have no options; their answer is a text, or a list written as
    a text.
    """
    samples = []
    for file, rows in loaded:
        for row in rows:
            key = field(file, row, "id", str)
            options = tuple(_strings(file, row, "options", key))
            open_ended = field(file, row, "question_type", str, key) == "open"
            if open_ended == bool(options):
                raise UserError(f"{file}: {key}: {len(options)} options of a question that is {row['question_type']}")
            text = field(file, row, "question", str, key)
            marked = [int(n) for part in (text, *options) for n in MARK.findall(part)]
            columns = [n for n in range(1, 8) if row.get(f"image_{n}")]
            shown = [n for n in columns if n not in marked] + marked
            pictures = [_picture(file, row, f"image_{n}", key, images) for n in shown]
            answer = row.get("answer")
            if open_ended:
                is_list = isinstance(answer, list) or str(answer).startswith("[")
                texts = _strings(file, row, "answer", key) if is_list else [field(file, row, "answer", str, key)]
                answers = () if texts in ([""], ["?"]) else tuple(texts)
            else:
                answers = _answers(file, key, answer, options)
            subject = (re.fullmatch(r"[a-z]+_(.+)_\d+", key) or ["", "other"])[1]
            groups = (DISCIPLINE.get(subject, "other"), subject)
            text, *options = (MARK.sub("<image>", part) for part in (text, *options))
            image = pictures[0] if pictures else None
            samples.append(Sample(key, image, text, answers, tuple(options), groups, tuple(pictures[1:])))
    return samples


def _strings(file: Path, row: Any, name: str, key: str) -> list[str]:
    """Return a field's list of strings. A list written as a text is parsed as a literal, never evaluated."""
    value = field(file, row, name, (str, list), key)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(f"{file}: {key}: {name} is {value[:60]!r}, expected a list of strings") from None
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise UserError(f"{file}: {key}: {name} is {str(value)[:60]!r}, expected a list of strings")
    return value


def _picture(file: Path, row: Any, column: str, key: str, images: Images) -> Picture:
    value = optional(file, row, column, (str, Embedded), key)
    if not value:
        raise UserError(f"{file}: {key}: no {column}, which its texts refer to")
    return images.find(value) if isinstance(value, str) else value


def _answers(file: Path, key: object, answer: Any, options: Sequence[str]) -> tuple[str, ...]:
    """Return the letter of the right option, or () where the answer is withheld."""
    if answer in (None, "", "?"):
        return ()
    number = LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else -1
    return (_letter(file, key, number, options, answer),)


def _letter(file: Path, key: object, number: int, options: Sequence[str], answer: Any = None) -> str:
    if not all(isinstance(option, str) for option in options) or len(options) > len(LETTERS):
        raise UserError(f"{file}: {key}: options are not at most {len(LETTERS)} strings")
    if not 0 <= number < len(options):
        raise UserError(f"{file}: {key}: answer is {answer or number!r}, expected one of {len(options)} options")
    return LETTERS[number]


def open_match(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether a short text contains one of the answers, by the rule of MMMU's eval_open.

    Numbers are compared after rounding to two places. Other answers must be part of the text, ignoring case; a single
    letter must be next to a space.
    """
    parts = {*_normal(prediction), *map(_number, NUMBER.findall(prediction))}
    texts = [part for part in parts if isinstance(part, str)]
    targets = [part for answer in answers for part in _normal(answer)]
    return any(part in parts or (isinstance(part, str) and any(part in text for text in texts)) for part in targets)


def _normal(text: str) -> list[str | float]:
    text = text.strip().lower()
    number = _number(text)
    if number is not None:
        return [number]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text] * bool(text)


def _number(text: str) -> float | None:
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


CHOICES = (
    Form(_scienceqa, _science_fits),
    Form(_seed, rows_at("questions", "choice_a")),
    Form(_mmmu, rows_at(None, "question_type")),
)
