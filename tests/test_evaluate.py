"""The runner: which shots stand in which prompt, what is kept and gone on with, what is counted as wrong."""

import io
import json
import random
import statistics

import pytest
import torch
from small import small_mm1
from test_generate import picture

from mm1.engine.data.images import read
from mm1.engine.evaluation import evaluate as runner
from mm1.engine.evaluation.benchmarks import BENCHMARKS
from mm1.engine.evaluation.bootstrap import interval
from mm1.engine.evaluation.cider import cider
from mm1.engine.evaluation.config import Decoding, ShotSettings
from mm1.engine.evaluation.evaluate import evaluate, show
from mm1.engine.evaluation.fewshot import Retrieval, Shot, caption, few_shot, question
from mm1.engine.evaluation.log import Log
from mm1.engine.evaluation.prompts import Prompts
from mm1.engine.evaluation.samples import Sample
from mm1.engine.evaluation.vqa import accuracy
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate
from mm1.errors import UserError


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


@pytest.fixture
def made(tmp_path):
    """Ten questions about five images, and eight to draw shots from."""

    def sample(key, number, truth):
        path = tmp_path / f"{number}.png"
        if not path.exists():
            picture(12 * (1 + number % 2), 24, number).save(path)
        return Sample(key, path, f"how many {key}?", tuple([truth] * 6 + ["none"] * 4))

    draw = random.Random(0)
    samples = [sample(i, i // 2, draw.choice("12345")) for i in range(10)]
    return samples, [sample(100 + i, 10 + i, draw.choice("12345")) for i in range(8)]


def run(model, made, out, name="vqav2", **options):
    return evaluate(model, name, *made, out, display=io.StringIO(), **options)


def file_of(out, n, seed=0):
    plain = out / f"{n}-shot.jsonl"
    return plain if plain.exists() else out / f"{n}-shot-seed-{seed}.jsonl"


def rows(out, n, seed=0):
    first, *rest = [json.loads(line) for line in file_of(out, n, seed).read_text().splitlines()]
    assert set(first) == {"settings"}
    return {row["key"]: row for row in rest}


def always_right(model, made, out, name="vqav2"):
    """These samples, with what the model says of them without shots for references."""
    run(model, made, out, name, shots=(0,))
    said = {key: row["prediction"] for key, row in rows(out, 0).items()}
    assert "" not in said.values()
    return [Sample(s.key, s.image, s.question, (said[s.key],) * 10) for s in made[0]], made[1]


def by_hand(model, made, keys, query, benchmark=BENCHMARKS["vqav2"]):
    """The prediction of a prompt put together part by part."""
    known = {sample.key: sample for of in made for sample in of}
    shots = [Shot(question(read(s.image), s.question), s.references[0]) for s in (known[key] for key in keys)]
    prompt = few_shot(shots, question(read(query.image), query.question))
    return generate(model, [prompt], max_tokens=benchmark.max_tokens, stop=benchmark.stop)[0].strip()


def test_predictions_are_those_of_prompts_by_hand_and_scores_those_of_the_metric(model, made, tmp_path):
    found = run(model, made, tmp_path / "out", shots=(0, 3))
    assert [row["shots"] for row in found["results"]] == [0, 3]
    for result, n in zip(found["results"], (0, 3)):
        kept = rows(tmp_path / "out", n)
        assert set(kept) == {sample.key for sample in made[0]}
        for sample in made[0]:
            row = kept[sample.key]
            assert len(set(row["shots"])) == n
            assert row["prediction"] == by_hand(model, made, row["shots"], sample)
            assert row["references"] == list(sample.references)
            assert row["score"] == accuracy(row["prediction"], sample.references)
        assert result["score"] == pytest.approx(10 * sum(row["score"] for row in kept.values()))
        assert (result["samples"], result["unreadable"]) == (10, {})
    assert len({row["prediction"] for row in rows(tmp_path / "out", 3).values()}) > 1


def test_random_shots_are_of_the_seed_and_the_query(model, made, tmp_path):
    def drawn(out, samples=made[0], **how):
        run(model, (samples, made[1]), tmp_path / out, shots=(4,), shot_settings=ShotSettings(**how))
        return {key: row["shots"] for key, row in rows(tmp_path / out, 4).items()}

    first = drawn("a")
    assert len({tuple(keys) for keys in first.values()}) > 7
    assert drawn("b", made[0][3:7]) == {sample.key: first[sample.key] for sample in made[0][3:7]}
    run(model, made, tmp_path / "a", shots=(4,), seeds=(1,))
    assert {key: row["shots"] for key, row in rows(tmp_path / "a", 4, 1).items()} != first
    counts = [sum(key in keys for keys in first.values()) for key in range(100, 108)]
    assert min(counts) > 0


def counted(monkeypatch):
    engines = []

    class Counted(Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            engines.append(self)

    monkeypatch.setattr(runner, "Engine", Counted)
    return engines


def test_fixed_shots_are_the_same_and_computed_once(model, made, tmp_path, monkeypatch):
    engines = counted(monkeypatch)
    computed = {}
    for choose in ("fixed", "random"):
        run(model, made, tmp_path / choose, shots=(5,), shot_settings=ShotSettings(choose))
        computed[choose] = engines[-1].computed
    shots = {tuple(row["shots"]) for row in rows(tmp_path / "fixed", 5).values()}
    assert len(shots) == 1
    assert engines[0].encoded == 5 + 5
    assert computed["fixed"] < 0.5 * computed["random"]
    (keys,) = shots
    run(model, made, tmp_path / "other", shots=(5,), seeds=(1,), shot_settings=ShotSettings("fixed"))
    assert {tuple(row["shots"]) for row in rows(tmp_path / "other", 5, 1).values()} != shots
    for sample in made[0]:
        assert rows(tmp_path / "fixed", 5)[sample.key]["prediction"] == by_hand(model, made, keys, sample)


def test_similar_shots_are_the_nearest_with_the_nearest_last(model, made, tmp_path):
    samples, pool = made
    run(model, made, tmp_path / "out", shots=(1, 3), shot_settings=ShotSettings("similar"))
    nearest = Retrieval(model, [read(sample.image) for sample in pool]).nearest([read(s.image) for s in samples], 3)
    for n in (1, 3):
        kept = rows(tmp_path / "out", n)
        assert [kept[s.key]["shots"] for s in samples] == [[pool[i].key for i in near[-n:]] for near in nearest]
    assert (tmp_path / "out" / "features").exists()


@pytest.mark.parametrize("choose", ["random", "fixed", "similar"])
def test_a_query_is_never_among_its_shots_nor_is_its_image(model, made, tmp_path, choose):
    samples, _ = made
    run(model, (samples, samples), tmp_path / "out", shots=(3,), shot_settings=ShotSettings(choose))
    image = {sample.key: sample.image for sample in samples}
    for key, row in rows(tmp_path / "out", 3).items():
        assert len(row["shots"]) == 3
        assert image[key] not in {image[shot] for shot in row["shots"]}
        assert choose != "similar" or not any(shot % 2 for shot in row["shots"])  # the first question of each image


def test_batches_and_sharing_change_no_prediction(model, made, tmp_path):
    truth = None
    for batch in (1, 3, 64):
        for n in (0, 4):
            run(model, made, tmp_path / str(batch), shots=(n,), batch=batch)
        kept = [rows(tmp_path / str(batch), n) for n in (0, 4)]
        truth = truth or kept
        assert kept == truth


def test_captions_are_scored_together(model, made, tmp_path):
    texts = ["a dog runs", "two cats sit on a bed", "one red bus"]
    samples = [Sample(i, made[1][i].image, "", (text, f"{text} there")) for i, text in enumerate(texts)]
    pool = [Sample(9 + i, made[1][3 + i].image, "", ("a cat",)) for i in range(3)]
    found = run(model, (samples, pool), tmp_path / "out", "coco", shots=(2,))
    kept = rows(tmp_path / "out", 2)
    truth = cider({k: row["prediction"] for k, row in kept.items()}, {s.key: s.references for s in samples})[0]
    assert found["results"][0]["score"] == 100 * truth
    assert "score" not in kept[0]
    right = always_right(model, (samples, pool), tmp_path / "right", "coco")
    assert run(model, right, tmp_path / "again", "coco", shots=(0,))["results"][0]["score"] > 100
    assert "CIDEr" in show(found)


class Killed(Exception):
    pass


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_run_that_was_killed_goes_on_and_ends_the_same(model, made, tmp_path, monkeypatch, torn):
    truth = run(model, made, tmp_path / "whole", shots=(2,))
    add, seen = Log.add, []

    def killed_after_four(self, row):
        assert self.path.read_bytes().count(b"\n") == 1 + len(seen)  # as they come
        if len(seen) == 4:
            raise Killed
        seen.append(row["key"])
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "add", killed_after_four)
        with pytest.raises(Killed):
            run(model, made, tmp_path / "out", shots=(2,), batch=2)
    file = file_of(tmp_path / "out", 2)
    data = file.read_bytes()
    assert data.count(b"\n") == 5
    if torn:
        file.write_bytes(data[:-torn])
    done = 4 - bool(torn)
    engines = counted(monkeypatch)
    assert run(model, made, tmp_path / "out", shots=(2,)) == truth
    assert rows(tmp_path / "out", 2) == rows(tmp_path / "whole", 2)
    assert file.read_text().count("\n") == 11
    assert engines[0].encoded <= 2 * (10 - done) + 8
    engines.clear()
    assert run(model, made, tmp_path / "out", shots=(2,)) == truth
    assert not engines  # nothing is left to do


def test_similar_shots_go_on_too(model, made, tmp_path):
    truth = run(model, made, tmp_path / "out", shots=(2,), shot_settings=ShotSettings("similar"))
    file = file_of(tmp_path / "out", 2)
    data = file.read_bytes()
    file.write_bytes(b"".join(data.splitlines(keepends=True)[:4]))
    assert run(model, made, tmp_path / "out", shots=(2,), shot_settings=ShotSettings("similar")) == truth
    assert sorted(file.read_bytes().splitlines()) == sorted(data.splitlines())


def test_other_settings_are_refused_before_anything_runs(model, made, tmp_path):
    out = tmp_path / "out"
    run(model, made, out, shots=(2,))
    other = small_mm1(seed=4).eval()
    other_answers = [Sample(s.key, s.image, s.question, s.references[::-1]) for s in made[0]]
    changed = {
        "num_beams 1 instead of 2": lambda: run(model, made, out, shots=(2,), decoding=Decoding(num_beams=2)),
        "choose 'random' instead of 'fixed'": lambda: run(
            model, made, out, shots=(2,), shot_settings=ShotSettings("fixed")
        ),
        "model '": lambda: run(other, made, out, shots=(2,)),
        "samples '": lambda: run(model, (made[0][1:], made[1]), out, shots=(2,)),
        "samples '\\w+' instead": lambda: run(model, (other_answers, made[1]), out, shots=(2,)),
        "pool '": lambda: run(model, (made[0], made[1][1:]), out, shots=(2,)),
        "benchmark 'vqav2' instead of 'okvqa'": lambda: run(model, made, out, "okvqa", shots=(2,)),
    }
    kept = file_of(out, 2).read_bytes()
    for message, again in changed.items():
        with pytest.raises(UserError, match=message):
            again()
    assert file_of(out, 2).read_bytes() == kept
    for bad in (b"x\n", b'{"key": 1}\n', kept + b"{}\n"):
        file_of(out, 2).write_bytes(bad)
        with pytest.raises(UserError, match=r"2-shot-seed-0\.jsonl is not a file of predictions"):
            run(model, made, out, shots=(2,))


def test_unreadable_images_are_counted_listed_and_wrong(model, made, tmp_path):
    samples, pool = made
    truth = run(model, made, tmp_path / "whole", shots=(3,), shot_settings=ShotSettings("fixed"))
    first = rows(tmp_path / "whole", 3)[0]["shots"][0]
    bad = next(sample for sample in pool if sample.key == first)
    bad.image.write_bytes(b"no image")
    right = always_right(model, made, tmp_path / "right")
    samples[4].image.unlink()  # of two questions
    assert run(model, right, tmp_path / "some", shots=(0,))["results"][0]["score"] == pytest.approx(80)
    found = run(model, made, tmp_path / "out", shots=(3,), shot_settings=ShotSettings("fixed"))
    kept = rows(tmp_path / "out", 3)
    (result,) = found["results"]
    assert set(result["unreadable"]) == {"4", "5"}
    assert all("2.png: No such file" in why for why in result["unreadable"].values())
    assert (kept[4]["prediction"], kept[4]["score"], kept[4]["shots"]) == ("", 0, [])
    assert result["score"] == pytest.approx(10 * sum(row["score"] for row in kept.values()))
    assert list(found["unreadable_shots"]) == [str(bad.image)]
    assert all(first not in row["shots"] and len(row["shots"]) in (0, 3) for row in kept.values())
    said = show(found)
    assert "2 of them unreadable, counted as wrong" in said
    assert said.count("No such file") == 1
    assert said.count("not an image") == 1
    assert truth["unreadable_shots"] == {}
    for sample in samples[:8]:
        sample.image.write_bytes(b"")
    found = run(model, made, tmp_path / "mostly", shots=(0,), batch=1)  # more in a row than are looked at together
    assert len(found["results"][0]["unreadable"]) == 8
    similar = run(model, made, tmp_path / "similar", shots=(3,), shot_settings=ShotSettings("similar"))
    assert list(similar["unreadable_shots"]) == [str(bad.image)]
    assert set(similar["results"][0]["unreadable"]) == set("01234567")


def test_too_few_shots_are_refused_and_unanswered_samples_left_out_and_counted(model, made, tmp_path):
    samples, pool = made
    with pytest.raises(UserError, match="8 answered samples to draw shots from, expected over 8"):
        run(model, made, tmp_path / "a", shots=(8,))
    with pytest.raises(UserError, match="0 answered samples"):
        run(model, (samples, [Sample(1, samples[0].image, "what?", ())]), tmp_path / "b", shots=(1,))
    with pytest.raises(UserError, match="choose is 'best', expected one of random, fixed, similar"):
        ShotSettings("best")
    half = [*samples[:5], *(Sample(s.key, s.image, s.question, ()) for s in samples[5:])]
    found = run(model, (half, pool), tmp_path / "c", shots=(0,))
    assert found["results"][0] == run(model, (samples[:5], pool), tmp_path / "c", shots=(0,))["results"][0]
    assert found["unanswered"] == {"samples": 5, "of": 10, "such_as": 5}
    assert "5 of 10 samples have no references, such as 5: left out" in show(found)
    for sample in pool[:6]:
        sample.image.write_bytes(b"")
    with pytest.raises(UserError, match="2 readable shots, expected 3"):
        run(model, made, tmp_path / "d", shots=(3,))


def test_without_answers_there_is_a_submission_and_no_score(model, made, tmp_path):
    samples, pool = made
    asked = [Sample(s.key, s.image, s.question, ()) for s in samples]
    found = run(model, (asked, pool), tmp_path / "out", shots=(2,))
    (result,) = found["results"]
    assert result["score"] is None
    run(model, made, tmp_path / "answered", shots=(2,))
    truth = [{"question_id": k, "answer": row["prediction"]} for k, row in rows(tmp_path / "answered", 2).items()]
    given = json.loads((tmp_path / "out" / "2-shot-seed-0-submission.json").read_text())
    assert given == sorted(truth, key=lambda row: row["question_id"])
    assert f"submission: {result['submission']}" in show(found)
    assert not list((tmp_path / "answered").glob("*submission*"))


def test_zero_shots_with_text_are_two_shots_without_images(model, made, tmp_path):
    samples, pool = made
    prompts = Prompts(model, BENCHMARKS["vqav2"], pool, ShotSettings(text_shots=True), tmp_path / "f.npz")
    document, _, keys = prompts.ask(0, samples[0])
    known = {sample.key: sample for sample in pool}
    begin = "".join(f"Question: {known[k].question} Short answer: {known[k].references[0]}\n" for k in keys)
    assert len(keys) == 2
    assert len(document.media) == 1
    text = model.tokenizer.decode(document.tokens.tolist())
    assert text == begin + f" Question: {samples[0].question} Short answer:"
    for choose in ("random", "similar"):
        run(model, made, tmp_path / choose, shots=(0, 1), shot_settings=ShotSettings(choose, text_shots=True))
        kept = [rows(tmp_path / choose, n) for n in (0, 1)]
        assert [{len(row["shots"]) for row in of.values()} for of in kept] == [{2}, {1}]
    assert {key: row["shots"][-1:] for key, row in kept[0].items()} == {k: row["shots"] for k, row in kept[1].items()}
    with pytest.raises(UserError, match="1 answered samples to draw shots from, expected over 2"):
        run(model, (samples, pool[:1]), tmp_path / "few", shots=(0,), shot_settings=ShotSettings(text_shots=True))
    plain, *_ = Prompts(model, BENCHMARKS["vqav2"], pool, ShotSettings(), tmp_path / "f.npz").ask(0, samples[0])
    assert plain.tokens.tolist() == document.tokens.tolist()[:1] + document.tokens.tolist()[-len(plain.tokens) + 1 :]


def test_only_the_last_images_have_sub_images(made, tmp_path):
    from test_fewshot import parted

    model = parted.__wrapped__()
    samples, pool = made
    for high, many in {None: 20, 0: 4, 1: 8, 2: 12, 9: 20}.items():
        prompts = Prompts(model, BENCHMARKS["vqav2"], pool, ShotSettings(high=high), tmp_path / "f.npz")
        document, *_ = prompts.ask(3, samples[0])
        assert len(document.media) == many
        assert (document.tokens == model.tokenizer.image).sum() == 4 * many
        room = runner.sized_engine(prompts, 3, 6, None).cache.pages * PAGE
        images = room - 6 * (4 * runner.TEXT + prompts.benchmark.max_tokens)
        assert 0 <= images - 6 * 4 * many < PAGE


def test_the_display_is_plain_lines_without_a_terminal(model, made, tmp_path):
    out = io.StringIO()
    evaluate(model, "vqav2", *made, tmp_path / "out", shots=(0, 2), display=out)
    assert [line.split("/s")[0].rsplit(" ", 1)[0] for line in out.getvalue().splitlines()] == [
        "vqav2 2-shot 10/10", "vqav2 0-shot 10/10"
    ]  # fmt: skip


def test_models_are_told_apart_by_any_weight(model):
    from mm1.engine.evaluation.features import fingerprint

    other = small_mm1(seed=3).eval()
    assert fingerprint(other) == fingerprint(model)
    with torch.no_grad():
        other.connector.get_parameter(next(iter(dict(other.connector.named_parameters())))).flatten()[0] += 1
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("settings, message", [
    ({"shots": (3, -1)}, "shots is"), ({"shots": ()}, "shots is"), ({"batch": 0}, "batch is 0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told(model, made, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, "vqav2", *made, tmp_path, **settings)


def test_no_samples_and_no_data_are_told(tmp_path):
    with pytest.raises(UserError, match="limit is 0"):
        runner.samples_of("vqav2", [tmp_path], limit=0)
    with pytest.raises(UserError, match="no data"):
        runner.samples_of("vqav2", [])
    with pytest.raises(UserError, match="high is -1"):
        ShotSettings(high=-1)


def test_several_seeds_give_what_each_gives_alone_their_mean_and_spread(model, made, tmp_path):
    run(model, made, tmp_path / "said", shots=(1, 3), seeds=(5, 0))
    said = [rows(tmp_path / "said", n, seed) for n, seed in ((1, 5), (3, 0))]
    right = [Sample(s.key, s.image, s.question, tuple(kept[s.key]["prediction"] for kept in said) * 2) for s in made[0]]
    both = (right, made[1])
    found = run(model, both, tmp_path / "all", shots=(0, 1, 3), seeds=(5, 0, 7))
    zero, one, three = found["results"]
    assert found["seeds"] == [5, 0, 7]
    assert ([row["seed"] for row in zero["seeds"]], zero["sd"]) == ([None], None)  # nothing is drawn: run once
    assert (tmp_path / "all" / "0-shot.jsonl").exists()
    for result, n in ((one, 1), (three, 3)):
        for row in result["seeds"]:
            alone = run(model, both, tmp_path / f"{row['seed']}", shots=(n,), seeds=(row["seed"],))["results"][0]
            assert (row["score"], row["interval"]) == (alone["score"], alone["interval"])
            assert rows(tmp_path / "all", n, row["seed"]) == rows(tmp_path / f"{row['seed']}", n, row["seed"])
        scores = [row["score"] for row in result["seeds"]]
        assert result["score"] == pytest.approx(statistics.mean(scores))
        assert result["sd"] == pytest.approx(statistics.stdev(scores))
        assert len(set(scores)) > 1
        low, high = result["interval"]
        assert low <= result["score"] <= high
    shots = [str([row["shots"] for row in rows(tmp_path / "all", 3, seed).values()]) for seed in (5, 0, 7)]
    assert len(set(shots)) == 3
    table = show(found).splitlines()
    assert [line.split()[:2] for line in table if "seed" in line[:8]] == [["seed", s] for s in ["5", "0", "7"] * 2]
    more = run(model, both, tmp_path / "all", shots=(1,), seeds=(0, 9))["results"][0]  # goes on where it was
    assert more["seeds"][0] == one["seeds"][1]
    with pytest.raises(UserError, match="seeds is"):
        run(model, both, tmp_path / "none", seeds=())


def test_intervals_are_those_of_the_samples_scores(model, made, tmp_path):
    found = run(model, made, tmp_path / "vqa", shots=(2,))["results"][0]
    kept = rows(tmp_path / "vqa", 2)
    assert found["interval"] == list(interval([100 * kept[sample.key]["score"] for sample in made[0]]))
    captions = [Sample(s.key, s.image, "", (f"a {s.key} dog", "one cat")) for s in made[0]]
    samples = always_right(model, (captions, []), tmp_path / "a", "coco")[0][:4] + captions[4:]
    found = run(model, (samples, []), tmp_path / "b", "coco", shots=(0,))["results"][0]
    kept = rows(tmp_path / "b", 0)
    _, scores = cider({k: row["prediction"] for k, row in kept.items()}, {s.key: s.references for s in samples})
    assert found["interval"] == list(interval([100 * scores[sample.key] for sample in samples]))
    assert found["interval"][0] < found["score"] < found["interval"][1]


def test_captions_are_searched_with_beams_and_batches_change_nothing(model, made, tmp_path):
    samples = [Sample(s.key, s.image, "", ("a dog", "a cat")) for s in made[0]]
    pool = [Sample(s.key, s.image, "", ("a bus",)) for s in made[1]]
    beams = {"num_beams": 3, "length_penalty": -2.0}
    truth = None
    for batch in (1, 4, 64):
        found = run(model, (samples, pool), tmp_path / str(batch), "coco", shots=(2,), batch=batch,
                    decoding=Decoding(**beams))  # fmt: skip
        kept = rows(tmp_path / str(batch), 2)
        truth = truth or kept
        assert kept == truth
    assert "3 beams, length penalty -2" in show(found)
    known = {sample.key: sample for sample in (*samples, *pool)}
    b, different = BENCHMARKS["coco"], 0
    for sample in samples:
        shots = [Shot(caption(read(known[key].image)), "a bus") for key in truth[sample.key]["shots"]]
        prompt = few_shot(shots, caption(read(sample.image)))
        text, greedy = (generate(model, [prompt], max_tokens=30, stop=b.stop, **how)[0] for how in (beams, {}))
        assert truth[sample.key]["prediction"] == b.metric.clean(text)
        different += text != greedy
    assert different


@pytest.mark.parametrize("settings, message", [
    ({"num_beams": 0}, "num_beams is 0"), ({"length_penalty": float("inf")}, "length_penalty is inf"),
    ({"normalize": "median"}, "normalize is 'median', expected sum or mean"),
])  # fmt: skip
def test_decoding_that_cannot_be_is_told(model, made, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(model, made, tmp_path, "coco", decoding=Decoding(**settings))
