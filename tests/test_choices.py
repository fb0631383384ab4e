"""Multiple choice: each benchmark's files as published, in small, and options compared by their log-probability."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from small import small_mm1
from test_generate import picture

from mm1.engine.data.images import decode
from mm1.engine.data.images import read as read_image
from mm1.engine.evaluation import evaluate as runner
from mm1.engine.evaluation.benchmarks import benchmark, find, read, read_pool, submission
from mm1.engine.evaluation.choices import DISCIPLINE, open_match
from mm1.engine.evaluation.config import Decoding, ShotSettings
from mm1.engine.evaluation.evaluate import evaluate, show
from mm1.engine.evaluation.fewshot import Shot, few_shot, multiple_choice
from mm1.engine.evaluation.samples import Images, Sample
from mm1.engine.evaluation.samples import picture as opened
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import score
from mm1.engine.infer.prompts import encode_prompts
from mm1.errors import UserError


def png(number):
    data = io.BytesIO()
    picture(12, 24, number).save(data, "PNG")
    return data.getvalue()


def problem(split, answer, *, image=None, hint="", subject="natural science", grade="grade2", choices=("a", "b")):
    return {"question": "which?", "choices": list(choices), "answer": answer, "hint": hint, "image": image,
            "task": "closed choice", "grade": grade, "subject": subject, "topic": "t", "category": "c", "skill": "s",
            "lecture": "", "solution": "", "split": split}  # fmt: skip


PROBLEMS = {
    "1": problem("test", 1, image="image.png", hint="read this"),
    "2": problem("train", 0, image="image.png"),
    "3": problem("test", 0, subject="language science", grade="grade8", choices=("x", "y", "z")),
    "5": problem("test", 2, subject="social science", hint="it rains", choices=("p", "q", "r")),
}
SPLITS = {"train": ["2"], "test": ["1", "3", "5"]}
SEED = {
    "questions": [
        {"answer": "C", "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
         "data_id": "10_11", "data_type": "image", "question": "how?", "question_id": "101", "question_type_id": 5},
        {"answer": "A", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d",
         "data_id": "v.webm", "data_type": "video", "question": "what?", "question_id": "102", "question_type_id": 10},
    ],
    "question_type": {"Instances Counting": 5, "Action Recognition": 10},
}  # fmt: skip
MMMU = [
    {"id": "validation_Math_1", "question": "see <image 2>, then <image 1>", "options": "['1', \"it's <image 1>\"]",
     "answer": "B", "question_type": "multiple-choice", "image_1": 0, "image_2": 1},
    {"id": "validation_Math_2", "question": "how many?", "options": "[]", "answer": "['0.5', '1/2']",
     "question_type": "open", "image_1": 2, "image_2": None},
    {"id": "validation_Music_3", "question": "which?", "options": "['a', 'b', 'c']", "answer": "?",
     "question_type": "multiple-choice", "image_1": None, "image_2": None},
]  # fmt: skip


def science(folder, problems=PROBLEMS, splits=SPLITS):
    for key, row in problems.items():
        if row["image"]:
            path = folder / "images" / row["split"] / key / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(int(key)))
    (folder / "images").mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    if splits is not None:
        (folder / "pid_splits.json").write_text(json.dumps(splits))
    return Images(folder / "images")


def seed_bench(folder, data=SEED):
    for name in ("10_11",):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(png(4))
    (folder / "SEED-Bench.json").write_text(json.dumps(data))
    return Images(folder / "images")


def parquet(folder, rows=MMMU):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for subject in dict.fromkeys(row["id"].split("_")[1] for row in rows):
        of = [row for row in rows if row["id"].split("_")[1] == subject]
        columns = {name: [row[name] for row in of] for name in of[0] if not name.startswith("image")}
        for name in ("image_1", "image_2"):
            held = [None if row[name] is None else {"bytes": png(row[name]), "path": "x.png"} for row in of]
            columns[name] = pa.array(held, kind)
        (folder / subject).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / subject / "validation-00000-of-00001.parquet", row_group_size=1)
    return Images(folder)


def test_scienceqa_is_read_with_its_splits_contexts_and_groups(tmp_path):
    images = science(tmp_path)
    files = find("scienceqa", [tmp_path], "test")
    assert [file.name for file in files] == ["problems.json", "pid_splits.json"]
    for given in (files, files[::-1], files[:1]):
        assert read("scienceqa", given, Images(tmp_path), "test") == read("scienceqa", given, images, "test")
        first, second, third = read("scienceqa", given, images, "test")
        assert (first.key, first.question, first.references) == ("1", "which?\nContext: read this", ("B",))
        assert first.image == images.folder / "test" / "1" / "image.png"
        assert first.groups == ("NAT", "TXT", "IMG", "G1-6")
        assert (second.images, second.options, second.groups) == ((), ("x", "y", "z"), ("LAN", "NO", "G7-12"))
        assert (third.references, third.groups) == (("C",), ("SOC", "TXT", "G1-6"))
    assert [sample.key for sample in read_pool("scienceqa", [tmp_path], [], images, [])] == ["2"]


def test_seed_bench_is_read_with_its_questions_about_images(tmp_path):
    images = seed_bench(tmp_path)
    (sample,) = read("seed", find("seed", [tmp_path], "image"), images, "image")
    assert (sample.key, sample.options, sample.references) == ("101", ("one", "two", "three", "four"), ("C",))
    assert sample.image == images.folder / "10_11"
    assert sample.groups == ("Instances Counting",)
    assert read_pool("seed", [tmp_path], [], images, [sample]) == [sample]
    with pytest.raises(UserError, match="no split 'video', expected image: videos are not read"):
        read("seed", [tmp_path / "SEED-Bench.json"], images, "video")


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_mmmu_is_read_with_its_marked_images(tmp_path, form):
    if form == "parquet":
        images = parquet(tmp_path)
    else:
        names = {number: f"{number}.png" for number in range(3)}
        for number, name in names.items():
            (tmp_path / name).write_bytes(png(number))
        for subject in ("Math", "Music"):
            rows = [row | {f"image_{i}": names.get(row[f"image_{i}"]) for i in (1, 2)} for row in MMMU]
            of = [row for row in rows if subject in row["id"]]
            (tmp_path / f"validation_{subject}.json").write_text(json.dumps(of))
        images = Images(tmp_path)
    files = find("mmmu", [tmp_path], "validation")
    assert len(files) == 2
    first, second, third = read("mmmu", files, images, "validation")
    assert (first.question, first.options) == ("see <image>, then <image>", ("1", "it's <image>"))
    shown = [np.asarray(opened(where)) for where in first.images]
    assert all(np.array_equal(a, np.asarray(decode(png(n)))) for a, n in zip(shown, (1, 0, 0), strict=True))
    assert first.groups == ("Science", "Math")
    assert (second.options, second.references, len(second.images)) == ((), ("0.5", "1/2"), 1)
    assert (third.references, third.images, third.groups) == ((), (), ("Art and Design", "Music"))
    assert len(DISCIPLINE) == 30


LIST = "expected a list of strings"
BAD = {
    "code": ({"options": "__import__('os').system('touch hacked')"}, LIST),
    "code in a list": ({"options": "[__import__('os').system('touch hacked')]"}, LIST),
    "text": ({"options": "a or b"}, f"validation_Math_1: options is 'a or b', {LIST}"),
    "numbers": ({"options": "[1, 2]"}, LIST),
    "torn": ({"options": "['a', 'b"}, f"validation_Math_1: options is .*{LIST}"),
    "nested": ({"options": "[" * 5000}, LIST),
    "answer": ({"answer": "C"}, "validation_Math_1: answer is 'C', expected one of 2 options"),
    "no image": ({"image_2": None}, "validation_Math_1: no image_2, which its texts refer to"),
    "no options": ({"options": "[]"}, "0 options of a question that is multiple-choice"),
    "open": ({"question_type": "open"}, "2 options of a question that is open"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line_and_options_are_never_run(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = MMMU[0] | {"image_1": "a.png", "image_2": "b.png"} | change
    (tmp_path / "validation.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message) as error:
        read("mmmu", [tmp_path / "validation.json"], Images(tmp_path), "validation")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not (tmp_path / "hacked").exists()


def test_ids_of_other_problems_are_an_error_and_some_are_counted(tmp_path):
    images = science(tmp_path, splits={"test": [1, 3, 5]})
    with pytest.raises(UserError, match=r'0 of 3 ids of split test match the 4 problems.*ids such as 1 against "1"'):
        read("scienceqa", find("scienceqa", [tmp_path], "test"), images, "test")
    science(tmp_path, splits={"test": ["1", "30", "31"]})
    with pytest.warns(UserWarning, match="2 of 3 ids of split test have no problem in problems.json, such as '30'"):
        (sample,) = read("scienceqa", find("scienceqa", [tmp_path], "test"), images, "test")
    assert sample.key == "1"
    with pytest.raises(UserError, match="no split 'val', expected one of test"):
        read("scienceqa", find("scienceqa", [tmp_path], "test"), images, "val")


def test_layouts():
    a, b = picture(seed=0), picture(seed=1)
    shown = multiple_choice([a], "which?", ["x", "y"])
    assert shown == [a, " Question: which?\nOptions: (A) x (B) y\nAnswer:"]
    assert multiple_choice([], "which?", ["x", "y"]) == ["Question: which?\nOptions: (A) x (B) y\nAnswer:"]
    assert multiple_choice([a], "which?") == [a, " Question: which? Short answer:"]
    marked = multiple_choice([a, b], "is <image> it?", ["x", "<image>"])
    assert marked == [" Question: is ", a, " it?\nOptions: (A) x (B) ", b, "\nAnswer:"]
    sample = Sample(1, None, "which?", ("B",), ("x", "y y"))
    lettered, written = benchmark("mmmu"), benchmark("seed")
    assert (lettered.continuations(sample), written.continuations(sample)) == ([" A", " B"], [" x", " y y"])
    assert lettered.shot(sample, []).answer == "B"
    assert written.shot(sample, []).answer == "y y"
    assert lettered.normalize == "sum"
    assert written.normalize == "mean"
    assert submission("mmmu", {"validation_Math_1": "B"}) == {"validation_Math_1": "B"}


@pytest.mark.parametrize("said, answers, right", [
    ("0.5", ["0.5"], True), ("about 0.501", ["0.5"], True), ("1,000", ["1000"], True), ("5", ["0.5"], False),
    ("The Answer", ["answer"], True), ("b", ["b"], True), ("bat", ["b"], False),
    ("x b", ["b"], True), ("0.25", ["25"], False), ("x or 1/2", ["0.5", "1/2"], True),
    ("", ["0"], False), ("nothing", [], False),
])  # fmt: skip
def test_open_answers_are_found_as_mmmu_finds_them(said, answers, right):
    assert open_match(said, answers) == right


def test_questions_without_options_are_scored_by_the_rule_of_open_questions():
    sample = Sample("a", None, "how much?", ("3.5", "seven"))
    scores = [benchmark("mmmu").scores([sample], {"a": text}) for text in ("it is 3.50", "Seven pence", "four")]
    assert scores == [[100.0], [100.0], [0.0]]


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


@pytest.fixture
def made(tmp_path):
    """Seven questions, the last without an image, and five to draw shots from."""
    draw = np.random.default_rng(0)
    words = ["one", "two", "three three", "four and five", "six"]

    def sample(key, image=True):
        path = tmp_path / f"{key}.png"
        picture(12, 24, key).save(path)
        options = tuple(draw.permutation(words)[: 2 + key % 3].tolist())
        groups = ("even" if key % 2 == 0 else "odd", *["third"] * (key % 3 == 0))
        return Sample(key, path if image else None, f"how many {key}?", ("AB"[key % 2],), options, groups)

    return [*(sample(i) for i in range(6)), sample(6, image=False)], [sample(20 + i) for i in range(5)]


def run(model, made, out, name, **options):
    return evaluate(model, name, *made, out, display=io.StringIO(), **options)


def rows(out, name):
    return {row["key"]: row for row in map(json.loads, (out / name).read_text().splitlines()[1:])}


@pytest.mark.parametrize("name, normalize", [("seed", None), ("seed", "sum"), ("mmmu", None)])
def test_options_are_compared_by_their_log_probability_behind_the_prompt(model, made, tmp_path, name, normalize):
    found = run(model, made, tmp_path / "out", name, shots=(0, 2), decoding=Decoding(normalize=normalize))
    b, known = benchmark(name), {sample.key: sample for of in made for sample in of}

    def parts(sample):
        return b.query(sample, [read_image(where) for where in sample.images])

    for result, file in zip(found["results"], ("0-shot.jsonl", "2-shot-seed-0.jsonl"), strict=True):
        kept = rows(tmp_path / "out", file)
        for sample in made[0]:
            row = kept[sample.key]
            shots = [Shot(tuple(parts(known[key])), b.shot(known[key], [None]).answer) for key in row["shots"]]
            texts = [f" {letter}" for letter in "ABCD"] if name == "mmmu" else [f" {o}" for o in sample.options]
            texts = texts[: len(sample.options)]
            (truth,) = score(model, [few_shot(shots, parts(sample))], [texts])
            assert row["logprobs"] == pytest.approx(truth, abs=1e-4)
            assert row["tokens"] == [len(model.tokenizer.encode(text)) for text in texts]
            per_token = name == "seed" and normalize is None
            values = [t / n if per_token else t for t, n in zip(truth, row["tokens"])]
            assert row["prediction"] == "ABCD"[int(np.argmax(values))]
            assert row["score"] == (row["prediction"] == sample.references[0])
        assert result["score"] == pytest.approx(100 * np.mean([row["score"] for row in kept.values()]))
        for group, of in result["groups"].items():
            members = [sample.key for sample in made[0] if group in sample.groups]
            assert of["samples"] == len(members)
            assert of["score"] == pytest.approx(100 * np.mean([kept[key]["score"] for key in members]))
        assert list(result["groups"]) == ["even", "third", "odd"]
    assert "third" in show(found)


def test_batches_change_nothing_and_a_prompt_is_computed_once(model, made, tmp_path, monkeypatch):
    engines = []

    class Counted(Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            engines.append(self)

    monkeypatch.setattr(runner, "Engine", Counted)
    truth = None
    for batch in (1, 3, 64):
        run(model, made, tmp_path / str(batch), "seed", shots=(3,), shot_settings=ShotSettings("similar"), batch=batch)
        kept = rows(tmp_path / str(batch), "3-shot.jsonl")
        for row in kept.values():
            row["logprobs"] = pytest.approx(row["logprobs"], abs=1e-5)
        truth = truth or kept
        assert {k: v["prediction"] for k, v in kept.items()} == {k: v["prediction"] for k, v in truth.items()}
        assert [v["logprobs"] == truth[k]["logprobs"].expected for k, v in kept.items()] == [True] * 7
        prompts = 7 * (4 * 70)  # rows of prompts, at most
        options = sum(len(sample.options) for sample in made[0])
        assert engines[-1].computed < prompts + options * (PAGE + 20)
        assert engines[-1].cache.available == engines[-1].cache.pages


def test_open_questions_of_mmmu_are_answered_in_words(model, tmp_path):
    images = parquet(tmp_path / "data")
    samples = read("mmmu", find("mmmu", [tmp_path / "data"], "validation"), images, "validation")
    found = run(model, (samples, []), tmp_path / "out", "mmmu", shots=(0,))
    kept = rows(tmp_path / "out", "0-shot.jsonl")
    assert set(kept) == {"validation_Math_1", "validation_Math_2"}
    assert kept["validation_Math_1"]["prediction"] in "AB"
    assert "logprobs" not in kept["validation_Math_2"]
    assert found["unanswered"] == {"samples": 1, "of": 3, "such_as": "validation_Music_3"}
    withheld = [Sample(s.key, s.image, s.question, (), s.options, s.groups, s.others) for s in samples]
    found = run(model, (withheld, []), tmp_path / "test", "mmmu", shots=(0,))
    given = json.loads((tmp_path / "test" / "0-shot-submission.json").read_text())
    assert given == {key: row["prediction"] for key, row in rows(tmp_path / "test", "0-shot.jsonl").items()}
    assert found["results"][0]["groups"] == {}


def test_a_mark_in_a_question_without_that_image_is_text(model, tmp_path):
    """And does not end the evaluation, be it the question's or a shot's."""
    samples = [Sample(i, None, f"what does <image> stand for in {i}?", ("A",), ("a <image>", "two")) for i in range(3)]
    result = run(model, (samples, samples), tmp_path / "out", "scienceqa", shots=(0, 1))
    assert [r["unreadable"] for r in result["results"]] == [{}, {}]
    (parts,) = {*benchmark("scienceqa").query(samples[0], [])}
    assert parts == "Question: what does <image> stand for in 0?\nOptions: (A) a <image> (B) two\nAnswer:"
    image = picture()
    sample = Sample(0, Path("x"), "a <image> beside an <image>", ("A",), ("one", "two"))
    shown = benchmark("scienceqa").query(sample, [image])
    assert shown == [" Question: a ", image, " beside an <image>\nOptions: (A) one (B) two\nAnswer:"]


def test_questions_without_images_are_not_their_own_shots(model, tmp_path):
    samples = [Sample(i, None, f"how many {i}?", ("A",), ("one", "two")) for i in range(4)]
    for choose in ("random", "similar", "fixed"):
        run(model, (samples, samples), tmp_path / choose, "mmmu", shots=(3,), shot_settings=ShotSettings(choose))
        (file,) = (tmp_path / choose).glob("3-shot*.jsonl")
        kept = rows(file.parent, file.name)
        assert [sorted([key, *row["shots"]]) for key, row in kept.items()] == [[0, 1, 2, 3]] * 4


def test_the_cache_holds_the_longest_prompt_and_what_exceeds_it_is_counted_as_wrong(model, made, tmp_path, monkeypatch):
    long = Sample(99, None, "word " * 500, ("A",), ("x", "y" * 80))
    samples = [*made[0], long]
    assert run(model, (samples, []), tmp_path / "a", "seed", shots=(0,), batch=2)["results"][0]["unreadable"] == {}
    (prompt,) = encode_prompts(model, [benchmark("seed").query(long, [])])
    engine = Engine(model, tokens=len(prompt.tokens) + 2 * PAGE)
    monkeypatch.setattr(runner, "sized_engine", lambda *_: engine)  # with room for the first option, not for the second
    found = run(model, (samples, []), tmp_path / "b", "seed", shots=(0,), batch=2)
    assert list(found["results"][0]["unreadable"]) == ["99"]
    assert not engine.waiting
    assert not engine.running
    assert engine.cache.available == engine.cache.pages


def test_answers_are_scored_as_the_tokens_that_they_have_behind_their_prompt(tmp_path):
    """A tokenizer that puts "▁" before every text, as Llama 2's; and one whose tokens cross the boundary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    from mm1.engine.data.text_tokenizer import TextTokenizer
    from mm1.engine.infer.prompts import continued

    vocab, pieces = {}, ["▁", *"onetwhra:", "▁a", "▁o", "▁on", "▁one", "▁t", "▁tw", "▁two", ":o", "<unk>"]
    for token in ["<pad>", "<bos>", "<eos>", "<image>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]:
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "a"), ("▁", "o"), ("▁o", "n"), ("▁on", "e"), ("▁", "t"), ("▁t", "w"), ("▁tw", "o"), (":", "o")]
    kind = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    kind.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    kind.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    kind.add_special_tokens(["<pad>", "<bos>", "<eos>", "<image>"])
    kind.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")

    model = small_mm1()
    model.tokenizer = tokenizer
    for end, answers in (("a:", [" two", " one", "one"]), ("a: ", ["two", "one"]), ("", ["one", "a"]), ("a:", [])):
        (prompt,) = encode_prompts(model, [["a: ", picture(), end] if end else ["a: ", picture()]])
        document, ids = continued(tokenizer, prompt, end, answers)
        begin = encode_prompts(model, [["a: ", picture()]])[0].tokens.tolist()
        for answer, of in zip(answers, ids, strict=True):
            assert document.tokens.tolist() + of == begin + tokenizer.encode(end + answer)


def test_the_first_options_of_all_questions_run_together_and_then_the_others_behind_them(model):
    engine = Engine(model)
    prompts = encode_prompts(model, [[f"{i} of {'three and four ' * 6}"] for i in range(5)])
    for prompt in prompts:
        for answer in (" one", " two", " three three"):
            engine.submit_answer(prompt, model.tokenizer.encode(answer))
    assert engine.step()
    assert (len(engine.waiting), len(engine.running)) == (10, 0)
    assert not engine.step()
