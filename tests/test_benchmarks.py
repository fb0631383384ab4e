"""Each benchmark's files as published, in small; and one line for each that is not as it should be."""

import json

import pytest
from PIL import Image

from mm1.engine.evaluation.benchmarks import BENCHMARKS, Images, benchmark, find, read, read_pool, submission
from mm1.errors import UserError


def answers(*texts):
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]


def karpathy(folder, number, split, text):
    name = f"COCO_{folder}_{number:012d}.jpg"
    return {"filepath": folder, "filename": name, "cocoid": number, "split": split, "sentences": [{"raw": text}]}


COCO = {
    "info": {}, "licenses": [],
    "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (42, 7)],
    "annotations": [{"image_id": 7, "id": 1, "caption": "a dog"}, {"image_id": 42, "id": 2, "caption": "a cat"},
                    {"image_id": 7, "id": 3, "caption": "one dog"}],
}  # fmt: skip
KARPATHY = {"dataset": "coco", "images": [
    karpathy("val2014", 42, "test", "a cat"), karpathy("train2014", 9, "train", "a bus"),
    karpathy("val2014", 7, "restval", "a dog"),
]}  # fmt: skip
OPEN_IMAGE = "0013ea2087020901"
NOCAPS = {
    "images": [{"id": 0, "open_images_id": OPEN_IMAGE, "file_name": f"{OPEN_IMAGE}.jpg", "domain": "in-domain"}],
    "annotations": [{"image_id": 0, "id": 0, "caption": "a baby"}],
}
TEXTCAPS = {"dataset_type": "val", "data": [
    {"image_id": OPEN_IMAGE, "caption_id": i, "caption_str": text, "reference_strs": ["a sign", "the sign"]}
    for i, text in enumerate(["a sign", "the sign"])
]}  # fmt: skip
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": 10 * n, "image_id": n, "question": q} for n, q in ((42, "what?"), (7, "who?"))],
}
ANNOTATIONS = {"annotations": [{"question_id": 70, "image_id": 7, "answers": answers("dog", "a dog")},
                               {"question_id": 420, "image_id": 42, "answers": answers("cat", "cats")}]}  # fmt: skip
BRAND = {"question_id": 34602, "image_id": OPEN_IMAGE, "question": "brand?", "answers": ["nokia", "Nokia"]}
TEXTVQA = {"data": [BRAND]}
VIZWIZ = [{"image": "VizWiz_val_00000000.jpg", "question": "what?", "answers": answers("milk", "oats")}]

NAMES = ("val2014/COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000007.jpg",
         "train2014/COCO_train2014_000000000009.jpg", "0013ea2087020901.jpg", "VizWiz_val_00000000.jpg")  # fmt: skip
CASES = {  # benchmark, split, files, and what is read: key, image, question, references
    "coco": ("coco", "val", {"captions_val2014.json": COCO},
             [(42, NAMES[0], "", ("a cat",)), (7, NAMES[1], "", ("a dog", "one dog"))]),
    "karpathy": ("coco", "test", {"dataset_coco.json": KARPATHY}, [(42, NAMES[0], "", ("a cat",))]),
    "karpathy-train": ("coco", "train", {"dataset_coco.json": KARPATHY},
                       [(9, NAMES[2], "", ("a bus",)), (7, NAMES[1], "", ("a dog",))]),
    "nocaps": ("nocaps", "val", {"nocaps_val_4500_captions.json": NOCAPS}, [(0, NAMES[3], "", ("a baby",))]),
    "textcaps": ("textcaps", "val", {"TextCaps_0.1_val.json": TEXTCAPS},
                 [(OPEN_IMAGE, NAMES[3], "", ("a sign", "the sign"))]),
    "vqav2": ("vqav2", "val", {"v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS,
                               "v2_mscoco_val2014_annotations.json": ANNOTATIONS},
              [(420, NAMES[0], "what?", ("cat", "cats")), (70, NAMES[1], "who?", ("dog", "a dog"))]),
    "vqav2-test": ("vqav2", "test-dev", {"v2_OpenEnded_mscoco_test-dev2015_questions.json": QUESTIONS},
                   [(420, NAMES[0], "what?", ()), (70, NAMES[1], "who?", ())]),
    "okvqa": ("okvqa", "val", {"OpenEnded_mscoco_val2014_questions.json": QUESTIONS,
                               "mscoco_val2014_annotations.json": ANNOTATIONS},
              [(420, NAMES[0], "what?", ("cat", "cats")), (70, NAMES[1], "who?", ("dog", "a dog"))]),
    "textvqa": ("textvqa", "val", {"TextVQA_0.5.1_val.json": TEXTVQA},
                [(34602, NAMES[3], "brand?", ("nokia", "Nokia"))]),
    "vizwiz": ("vizwiz", "val", {"val.json": VIZWIZ},
               [("VizWiz_val_00000000.jpg", NAMES[4], "what?", ("milk", "oats"))]),
    "vizwiz-test": ("vizwiz", "test", {"test.json": [{"image": "VizWiz_val_00000000.jpg", "question": "what?"}]},
                    [("VizWiz_val_00000000.jpg", NAMES[4], "what?", ())]),
}  # fmt: skip


@pytest.fixture
def images(tmp_path):
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return Images(tmp_path / "images")


def written(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return [folder / name for name in files]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_published_files_are_found_and_read(case, images, tmp_path):
    name, split, files, truth = case
    paths = written(tmp_path / "data", files)
    assert find(name, [tmp_path / "data"], split) == paths
    for given in (paths, paths[::-1]):
        found = read(name, given, images, split)
        assert [(s.key, str(s.image.relative_to(images.folder)), s.question, s.references) for s in found] == truth


def test_the_form_that_open_flamingo_publishes_is_read(images, tmp_path):
    for name, image in (("textvqa", OPEN_IMAGE), ("vizwiz", "VizWiz_val_00000000.jpg")):
        asked = {"questions": [{"question_id": 1, "image_id": image, "question": "q"}]}
        answered = {"annotations": [{"question_id": 1, "answers": answers("x")}]}
        files = {"val_questions_vqa_format.json": asked, "val_annotations_vqa_format.json": answered}
        (sample,) = read(name, written(tmp_path / name, files), images, "val")
        assert (sample.key, sample.image.is_file(), sample.references) == (1, True, ("x",))


def test_every_benchmark_is_covered():
    written_freely = {name for name, b in BENCHMARKS.items() if b.metric.name != "choice"}  # others: test_choices.py
    assert {case[0] for case in CASES.values()} == written_freely


def annotated(*keys):
    return {"annotations": [{"question_id": key, "answers": answers("x")} for key in keys]}


BAD = {
    "unknown": ("coca", {"a.json": COCO}, "benchmark is 'coca', expected one of coco, nocaps"),
    "not json": ("coco", {"a.json": "{"}, r"a\.json is not JSON: Expecting"),
    "other form": ("coco", {"a.json": QUESTIONS}, r"a\.json: no known format of captions"),
    "other kind": ("vqav2", {"a.json": COCO}, r"a\.json: no known format of questions and answers"),
    "empty": ("vqav2", {"a.json": {"questions": []}}, "no known format"),
    "no split": ("coco", {"a.json": KARPATHY}, r"a\.json: no samples of split 'val'"),
    "field": ("vqav2", {"a.json": {"questions": [{"question_id": 3, "image_id": 42, "question": None}]}},
              r"a\.json: 3: question is null, expected str"),
    "no id": ("vqav2", {"a.json": {"questions": [{"image_id": 42}]}}, r"a\.json: question_id is null, expected int or"),
    "caption": ("coco", {"a.json": COCO | {"annotations": [{"image_id": 42, "caption": 5}]}},
                r"a\.json: 42: caption is 5, expected str"),
    "answer": ("textvqa", {"a.json": {"data": [BRAND | {"answers": [3]}]}},
               r"a\.json: 34602: answer is null, expected str"),
    "answers": ("vizwiz", {"a.json": [VIZWIZ[0] | {"answers": "milk"}]}, r"answers is \"milk\", expected list"),
    "other annotations": ("vqav2", {"a.json": QUESTIONS, "b.json": annotated(7, 8, 9)},
                          r"b\.json: 0 of 3 annotations match the 2 questions: ids such as 7 against 420"),
    "ids of another type": ("okvqa", {"a.json": QUESTIONS, "b.json": annotated("420", "70")},
                            r'b\.json: 0 of 2 annotations match the 2 questions: ids such as "420" against 420'),
    "captions of other images": ("coco", {"a.json": COCO | {"annotations": [{"image_id": "42", "caption": "a"}]}},
                                 r'a\.json: 0 of 1 captioned images match the 2 images: ids such as "42" against 42'),
    "no image": ("vqav2", {"a.json": {"questions": [{"question_id": 1, "image_id": 5, "question": "what?"}]}},
                 r"a\.json: 0 of 1 images are in .*images: no COCO_val2014_0{11}5\.jpg; it holds 5 files, such as"),
    "twice": ("coco", {"a.json": COCO | {"images": COCO["images"] * 2}}, r"a\.json: 2 keys occur twice"),
    "row": ("coco", {"a.json": COCO | {"annotations": [None]}}, r"a\.json: image_id is null"),
}  # fmt: skip


@pytest.mark.parametrize("name, files, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_with_file_and_key(name, files, message, images, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(name, written(tmp_path / "data", files), images, "val")
    assert "\n" not in str(error.value)


def test_questions_that_some_annotations_match_are_read_with_those(images, tmp_path):
    files = written(tmp_path / "data", {"a.json": QUESTIONS, "b.json": annotated(420, 5, 6)})
    assert [sample.references for sample in read("vqav2", files, images, "val")] == [("x",), ()]
    some = COCO | {"annotations": COCO["annotations"][1:2]}
    found = read("coco", written(tmp_path / "coco", {"captions_val2014.json": some}), images, "val")
    assert [sample.references for sample in found] == [("a cat",), ()]


def test_images_of_which_some_are_there_are_read(images, tmp_path):
    asked = {"questions": [{"question_id": n, "image_id": n, "question": "what?"} for n in (5, 42)]}
    found = read("vqav2", written(tmp_path / "data", {"a.json": asked}), images, "val")
    assert [sample.image.is_file() for sample in found] == [False, True]


def test_what_is_missing_is_one_line(images, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data holds no file v2_OpenEnded_mscoco_val20\*_questions.json"):
        find("vqav2", [tmp_path / "data"], "val")
    written(tmp_path / "data", {"v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS})
    with pytest.raises(UserError, match=r"holds no file v2_mscoco_val20\*_annotations.json"):
        find("vqav2", [tmp_path / "data"], "val")
    written(tmp_path / "data" / "more", {"v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS})
    with pytest.raises(UserError, match="holds 2 files"):
        find("vqav2", [tmp_path / "data"], "val")
    with pytest.raises(UserError, match="No such file"):
        read("vqav2", [tmp_path / "none.json"], images, "val")
    with pytest.raises(UserError, match="no folder of images"):
        Images(tmp_path / "none")


def test_shots_come_from_the_training_split_if_there_is_one(images, tmp_path):
    files = written(tmp_path / "data", {"dataset_coco.json": KARPATHY})
    samples = read("coco", files, images, "test")
    for data in (files, [tmp_path / "data"]):
        assert [s.key for s in read_pool("coco", data, [], images, samples)] == [9, 7]
    alone = written(tmp_path / "alone", {"TextVQA_0.5.1_val.json": TEXTVQA})
    samples = read("textvqa", alone, images, "val")
    for data in (alone, [tmp_path / "alone"]):
        assert read_pool("textvqa", data, [], images, samples) == samples
    given = written(tmp_path / "given", {"TextVQA_0.5.1_train.json": {"data": [BRAND | {"question_id": 1}]}})
    for shots in (given, [tmp_path / "given"]):
        assert [s.key for s in read_pool("textvqa", alone, shots, images, samples)] == [1]
    with pytest.raises(UserError, match=r"holds no file TextVQA_\*_train.json"):
        read_pool("textvqa", alone, [tmp_path / "alone"], images, samples)


def test_images_are_found_by_path_or_name(images):
    name = "COCO_val2014_000000000042.jpg"
    assert images.find(f"val2014/{name}") == images.find(name) == images.find(f"other/{name}")
    (images.folder / "copy").mkdir()
    Image.new("RGB", (8, 8)).save(images.folder / "copy" / name)
    again = Images(images.folder)
    assert again.find(f"copy/{name}") == images.folder / "copy" / name
    assert again.find(f"val2014/{name}") == images.folder / "val2014" / name
    assert images.of_coco(9).name == "COCO_train2014_000000000009.jpg"
    assert not images.of_coco(1).exists()
    Image.new("RGB", (8, 8)).save(images.folder / "COCO_train2014_000000000042.jpg")
    again = Images(images.folder)
    assert [again.of_coco(42, subset).name[5:13] for subset in ("val2014", "train2014")] == ["val2014_", "train201"]


def test_submissions_are_in_the_servers_form():
    assert submission("vqav2", {3: "two"}) == [{"question_id": 3, "answer": "two"}]
    assert submission("vizwiz", {"a.jpg": "milk"}) == [{"image": "a.jpg", "answer": "milk"}]
    assert submission("nocaps", {0: "a dog"}) == [{"image_id": 0, "caption": "a dog"}]


def test_captions_and_answers_end_as_in_the_protocol():
    assert benchmark("coco").stop == ("\n",)
    assert {"\n", ".", ",", "Question"} == set(benchmark("vqav2").stop)
    assert benchmark("coco").metric.clean(' a "red" bus ') == "a red bus"
    assert benchmark("vqav2").metric.clean(' "red" ') == '"red"'
