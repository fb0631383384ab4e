"""Whatever stands in a benchmark's file where something else should, it is read as published or told in one line."""

import copy
import json
from pathlib import Path

import pytest
from test_benchmarks import CASES
from test_choices import MMMU, PROBLEMS, SEED, SPLITS

from mm1.engine.evaluation import benchmarks
from mm1.engine.evaluation.benchmarks import read
from mm1.engine.evaluation.samples import Images
from mm1.errors import UserError

WRONG = [None, True, False, 5, -1, 1.5, "", "x", "['x'", [], ["x"], [["x"]], [5], [None], {}, {"a": 1}, {"a": ["x"]}]
ROWS = [row | {f"image_{n}": row[f"image_{n}"] if row[f"image_{n}"] is None else "a.png" for n in (1, 2)}
        for row in MMMU]  # fmt: skip
FILES = {name: (of, split, files) for name, (of, split, files, _) in CASES.items()} | {
    "scienceqa": ("scienceqa", "test", {"problems.json": PROBLEMS, "pid_splits.json": SPLITS}),
    "scienceqa-alone": ("scienceqa", "test", {"problems.json": PROBLEMS}),
    "seed": ("seed", "image", {"SEED-Bench.json": SEED}),
    "mmmu": ("mmmu", "validation", {"validation.json": ROWS}),
}


def places(data, path=()):
    """Yield the path of each value in a file, without the file itself."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(files, name, path, value):
    """Return the files with another value at one place."""
    files = copy.deepcopy(files)
    at = files[name]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return files


def assert_samples_are_whole(samples):
    for sample in samples:
        assert type(sample.key) in (int, str)
        assert all(isinstance(text, str) for text in (sample.question, *sample.references, *sample.options))
        assert all(isinstance(group, str) for group in sample.groups)
        assert all(isinstance(where, Path) for where in sample.images)


def line_of(of, split, files, images):
    """Return the line that reading ends with; None where the samples are whole."""
    try:
        samples = read(of, [images.folder / name for name in files], images, split)
    except UserError as error:
        return str(error)
    assert_samples_are_whole(samples)
    return None


@pytest.mark.filterwarnings("ignore:.*have no problem in")
@pytest.mark.parametrize("of, split, files", FILES.values(), ids=FILES)
def test_any_value_in_the_place_of_any_other_is_read_or_told_in_a_line(of, split, files, tmp_path, monkeypatch):
    images, now, lines = Images(tmp_path), files, set()
    for way in ("find", "at"):
        monkeypatch.setattr(images, way, lambda *_: Path(__file__))  # any file: only annotations are read
    monkeypatch.setattr(benchmarks, "load", lambda file: now[file.name])
    assert line_of(of, split, files, images) is None
    for name in files:
        for path in places(files[name]):
            for value in WRONG:
                now = changed(files, name, path, value)
                try:
                    lines.add(line_of(of, split, files, images))
                except Exception as error:
                    pytest.fail(f"{value!r} at {name} {path}: {type(error).__name__}: {error}")
    lines.discard(None)
    assert len(lines) > 10
    assert not any("\n" in line or len(line) > 400 + 2 * len(str(tmp_path)) for line in lines)


WITNESSES = {
    "subject": ("scienceqa", "problems.json", ("1", "subject"), ["x"], r'1: subject is \["x"\], expected str'),
    "answer": ("scienceqa", "problems.json", ("1", "answer"), True, "1: answer is true, expected int"),
    "types": ("seed", "SEED-Bench.json", ("question_type",), [5], r"question_type is \[5\], expected dict"),
    "key": ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations", 0, "question_id"), True,
            "question_id is true, expected int or str"),
}  # fmt: skip


@pytest.mark.parametrize("case, name, path, value, message", WITNESSES.values(), ids=WITNESSES)
def test_the_line_names_what_was_found_and_what_was_expected(case, name, path, value, message, tmp_path):
    of, split, files = FILES[case]
    for other, data in changed(files, name, path, value).items():
        (tmp_path / other).write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        read(of, [tmp_path / other for other in files], Images(tmp_path), split)
