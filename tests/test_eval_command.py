"""`mm1 eval`: files of a benchmark in, a table and one line of JSON out; docs/evaluate.md's commands run as written."""

import gzip
import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from small import FOLDER, small_run
from test_choices import problem, science
from test_evaluate import rows
from test_generate import picture

from mm1.cli import main
from mm1.engine.data.references import read_image
from mm1.engine.evaluation.benchmarks import BENCHMARKS


def digits_questions(folder, count):
    """Questions of the demo about its digits, in VQAv2's files."""
    for split, name in (("val", "test-interleaved"), ("train", "train-questions")):
        with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt") as file:
            items = [json.loads(line) for line in file][:count]
        asked, answered = [], []
        for number, item in enumerate(items):
            key = 10 * number + (split == "train")
            path = folder / f"{split}2014" / f"COCO_{split}2014_{key:012d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(read_image(item["image"], FOLDER))).convert("RGB").save(path, quality=95)
            asked.append({"question_id": key, "image_id": key, "question": item["question"]})
            answered.append({"question_id": key, "answers": [{"answer": item["answer"]}] * 10})
        subset = f"{split}2014"
        (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(
            json.dumps({"data_subtype": subset, "questions": asked})
        )
        (folder / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps({"annotations": answered}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from mm1.engine.train.trainer import train

    out = tmp_path_factory.mktemp("run") / "out"
    train(small_run(steps=1), out)
    return out


def command(monkeypatch, capsys, *arguments):
    """In this process: what `mm1` prints, and its status."""
    monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code or 0
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_evaluates_the_demos_questions(checkpoint, tmp_path, monkeypatch, capsys):
    digits_questions(tmp_path / "data", 12)
    common = ("eval", checkpoint, "vqav2", "--data", tmp_path / "data", "--out", tmp_path / "out")
    status, out, err = command(monkeypatch, capsys, *common, "--shots", 0, 4, "--limit", 6)
    assert status == 0, err
    table, last = out[: out.rindex("\n{")], json.loads(out.splitlines()[-1])
    assert [row["shots"] for row in last["results"]] == [0, 4]
    assert [row["samples"] for row in last["results"]] == [6, 6]
    assert all(0 <= row["score"] <= 100 for row in last["results"])
    assert "accuracy" in table
    assert "vqav2 4-shot 6/6" in err
    kept = rows(tmp_path / "out", 4)
    assert all(key % 10 == 1 for row in kept.values() for key in row["shots"])  # of the training split
    again = command(monkeypatch, capsys, *common, "--shots", 0, 4, "--limit", 6)
    assert again == (0, out, "")
    status, _, err = command(monkeypatch, capsys, *common, "--shots", 4, "--limit", 6, "--choose", "fixed")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "choose 'random' instead of 'fixed'" in err
    status, _, err = command(monkeypatch, capsys, "eval", checkpoint, "vqav3", *common[3:])
    assert (status, err) == (2, f"mm1: benchmark is 'vqav3', expected one of {', '.join(BENCHMARKS)}\n")


def karpathy(folder, tests, shots):
    """Captions of random pictures in Karpathy's file."""
    images = []
    for number in range(tests + shots):
        name = f"COCO_val2014_{number:012d}.jpg"
        (folder / "val2014").mkdir(parents=True, exist_ok=True)
        picture(12, 24, number).save(folder / "val2014" / name)
        images.append({"filepath": "val2014", "filename": name, "cocoid": number,
                       "split": "test" if number < tests else "train",
                       "sentences": [{"raw": f"a dog of {number}"}, {"raw": "a cat"}]})  # fmt: skip
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def test_the_commands_of_the_page_run_as_written(checkpoint, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluate.md").read_text()
    commands = re.findall(r"^    mm1 (eval .*)$", page, re.M)
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(checkpoint)
    karpathy(tmp_path / "coco", 3, 12)
    digits_questions(tmp_path / "vqav2", 12)
    for split in ("val2014", "train2014"):
        (tmp_path / "coco" / split).mkdir(exist_ok=True)
        for path in (tmp_path / "vqav2" / split).iterdir():
            path.rename(tmp_path / "coco" / split / path.name)
    (tmp_path / "scienceqa").mkdir()
    problems = {str(i): problem("train" if i < 6 else "test", i % 2, image="image.png") for i in range(9)}
    splits = {split: [k for k, p in problems.items() if p["split"] == split] for split in ("train", "test")}
    science(tmp_path / "scienceqa", problems, splits)
    found = {}
    for line in commands:
        status, out, err = command(monkeypatch, capsys, *line.split())
        assert status == 0, err
        found[line.split()[2], line.split()[-1]] = json.loads(out.splitlines()[-1]), out
    beams, table = next(of for (name, _), of in found.items() if name == "coco" and of[0]["num_beams"] == 3)
    assert beams["length_penalty"] == 0
    assert [[row["seed"] for row in result["seeds"]] for result in beams["results"]] == [[0, 1, 2]]
    assert "3 beams" in table
    assert "seed 2" in table
    choices, table = next(of for (name, _), of in found.items() if name == "scienceqa")
    assert all(set(result["groups"]) == {"NAT", "IMG", "G1-6"} for result in choices["results"])
    assert all(low <= result["score"] <= high for result in choices["results"] for low, high in [result["interval"]])
    assert "IMG" in table


def test_ids_of_another_split_end_the_command_with_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    digits_questions(tmp_path, 4)
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    other = tmp_path / "v2_mscoco_train2014_annotations.json"
    status, out, err = command(
        monkeypatch, capsys, "eval", checkpoint, "vqav2", "--data", questions, other, "--out", tmp_path / "out"
    )
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "0 of 4 annotations match the 4 questions: ids such as 1 against 0" in err
