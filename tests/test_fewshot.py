"""Shots in prompts: layouts, retrieval by similarity, two resolutions, votes; the Engine computes shared shots once."""

import dataclasses

import numpy as np
import pytest
import torch
from small import SLOTS, small_mm1, small_model
from test_generate import picture

from mm1.engine.data.codecs import codec_of
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.evaluation.fewshot import (
    Retrieval,
    Shot,
    Vote,
    caption,
    encode_mixed,
    few_shot,
    final_answer,
    joined,
    majority,
    piece,
    question,
    vote,
)
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import Sampling
from mm1.engine.models.mm1 import MM1
from mm1.errors import UserError


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


@pytest.fixture(scope="module")
def parted():
    """Return a model that sees each image whole and in 2 × 2 parts."""
    c = dataclasses.replace(small_model(), image_mode="squash", image_size=12, image_parts=2)
    model = MM1(c).init_weights(5).eval()
    model.tokenizer = TextTokenizer(small_mm1().tokenizer.path)
    return model


def test_layouts_are_mm1s():
    a, b, c = (picture(seed=i) for i in range(3))
    captions = few_shot([Shot(caption(a), "a cat "), Shot(caption(b), "two dogs")], caption(c))
    assert captions == [a, " A photo of a cat\n", b, " A photo of two dogs\n", c, " A photo of"]
    asked = few_shot([Shot(question(a, "how many?"), "3")], question(b, "what?"))
    assert asked == [a, " Question: how many? Short answer: 3\n", b, " Question: what? Short answer:"]
    assert few_shot([], caption(a)) == [a, " A photo of"]
    assert Shot(question(a, "how many?"), "3").text.shown == ("Question: how many? Short answer: 3\n",)
    assert Shot((a,), "3 of\nthem\n").shown == (a, " 3 of them\n")
    assert Shot(("x", a, "y", b, "z"), "3").shown == ("x", a, "y", b, "z 3\n")


def test_pieces_join_to_what_the_prompt_encodes_to(model):
    shots = [Shot(question(picture(seed=i), f"how many {i}?"), str(i)) for i in range(3)]
    query = question(picture(24, 12, 9), "what?")
    whole = encode_prompts(model, [few_shot(shots, query)])[0]
    document, end = joined(model, [*(piece(model, shot.shown) for shot in shots), piece(model, query)])
    assert np.array_equal(document.tokens, whole.tokens)
    assert end == query[-1]
    assert len(document.media) == len(whole.media) == 4
    assert all(np.array_equal(a.values, b.values) for a, b in zip(document.media, whole.media))


def test_shots_that_queries_share_are_computed_once_and_change_nothing(model):
    shots = [Shot(question(picture(12, 24, i), "how many are there of all?"), "one and two") for i in range(4)]
    prompts = [few_shot(shots, question(picture(24, 24, 10 + i), "what is first?")) for i in range(5)]
    truth = []
    for prompt in prompts:
        alone = Engine(model)
        truth.append(alone.submit(prompt, Sampling(max_tokens=5)))
        alone.run()
    engine = Engine(model)
    together = [engine.submit(prompt, Sampling(max_tokens=5)) for prompt in prompts]
    engine.run()
    assert [r.tokens for r in together] == [r.tokens for r in truth]
    for a, b in zip(together, truth):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    common = len(encode_prompts(model, [few_shot(shots, [])])[0].tokens) // PAGE * PAGE
    lengths = [len(r.document.tokens) for r in together]
    assert common > 80
    assert engine.computed <= lengths[0] + sum(n - common for n in lengths[1:])
    assert engine.encoded == 4 + 5


def test_mixed_resolution_is_each_image_encoded_by_hand(parted):
    t, whole, single = parted.tokenizer, codec_of(parted.config), dataclasses.replace(codec_of(parted.config), parts=1)
    a, b, c = picture(24, 24, 1), picture(30, 12, 2), picture(12, 30, 3)
    parts = [a, "one", b, c, "two"]
    for last, many in {0: (1, 1, 1), 1: (1, 1, 5), 2: (1, 5, 5), 3: (5, 5, 5), 9: (5, 5, 5)}.items():
        document = encode_mixed(parted, parts, last)
        slots = [[t.image] * SLOTS * n for n in many]
        assert document.tokens.tolist() == [t.bos, *slots[0], *t.encode("one"), *slots[1], *slots[2], *t.encode("two")]
        views = [v for x, n in zip((a, b, c), many) for v in (whole if n == 5 else single).views(x)]
        assert len(document.media) == len(views) == sum(many)
        assert all(np.array_equal(x.values, y) for x, y in zip(document.media, views))
    assert np.array_equal(encode_mixed(parted, parts, 3).tokens, encode_prompts(parted, [parts])[0].tokens)
    engine = Engine(parted)
    request = engine.submit(encode_mixed(parted, parts, 1), Sampling(max_tokens=3))
    engine.run()
    assert engine.encoded == 7
    assert request.tokens


def test_resolutions_can_be_chosen(parted):
    high, low = ImagePolicy(4, "squash", 24), ImagePolicy(4, "squash", 8)
    document = encode_mixed(parted, [picture(seed=1), picture(seed=2)], 1, high=high, low=low)
    assert [view.values.shape for view in document.media] == [(8, 8, 3), (24, 24, 3)]


def noisy(image, amount, seed=0):
    from PIL import Image

    noise = np.random.default_rng(seed).normal(0, amount, (*image.size[::-1], 3))
    return Image.fromarray((np.array(image) + noise).clip(0, 255).astype(np.uint8))


def test_retrieval_finds_similar_images_and_puts_the_most_similar_last(model):
    from PIL import Image

    kinds = [Image.fromarray(np.full((24, 24, 3), v, np.uint8)) for v in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    pool = [noisy(kind, 12, 10 * i + k) for k, kind in enumerate(kinds) for i in range(3)]
    retrieval = Retrieval(model, pool, batch=4)
    assert retrieval.features.shape == (9, model.config.vision.width)
    assert np.linalg.norm(retrieval.features, axis=1) == pytest.approx(np.ones(9), abs=1e-5)
    queries = [noisy(kind, 12, 99) for kind in kinds]
    for k, near in enumerate(retrieval.nearest(queries, 3)):
        assert set(near) == {3 * k, 3 * k + 1, 3 * k + 2}
    similarity = retrieval.features @ Retrieval(model, queries).features.T
    for q, near in enumerate(retrieval.nearest(queries, 9)):
        assert similarity[near, q].tolist() == sorted(similarity[:, q])
    assert retrieval.nearest([], 3) == []


def test_retrieval_is_the_cosine_of_mean_outputs_whatever_the_batch(model):
    from mm1.kernels.patches.grids import Grids

    pool = [picture(12 * (1 + i % 2), 12 * (1 + i % 3), i) for i in range(7)]
    retrieval = Retrieval(model, pool, batch=3)
    for image, feature in zip(pool, retrieval.features):
        pixels = torch.from_numpy(codec_of(model.config).resize(image))
        with torch.inference_mode():
            grids = Grids([(pixels.shape[0] // 4, pixels.shape[1] // 4)])
            mean = model.vision(pixels.reshape(-1, 3), grids).mean(0)
        assert feature == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    assert Retrieval(model, pool, batch=7).features == pytest.approx(retrieval.features, abs=1e-5)


def test_an_image_is_never_its_own_shot(model):
    pool = [picture(seed=i) for i in range(5)]
    pool.append(pool[2].copy())
    near = Retrieval(model, pool).nearest(pool, 6)
    assert [len(of) for of in near] == [5, 5, 4, 5, 5, 4]
    assert all(not {i, 2 if i == 5 else i, 5 if i == 2 else i} & set(of) for i, of in enumerate(near))


def test_features_are_cached_by_content_and_by_weights(model, tmp_path):
    folder, pool = tmp_path / "some" / "features", [picture(seed=i) for i in range(4)]
    first = Retrieval(model, pool, folder=folder)
    again = Retrieval(model, pool[::-1], folder=folder)
    assert np.array_equal(again.features, first.features[::-1])
    assert (first.encoded, again.encoded) == (4, 0)
    assert Retrieval(model, [*pool, picture(seed=9)], folder=folder).encoded == 1
    assert Retrieval(model, [picture(seed=9)], folder=folder).encoded == 0
    other = Retrieval(small_mm1(seed=4).eval(), pool, folder=folder)
    assert other.encoded == 4
    assert not np.allclose(other.features, first.features)
    next(folder.glob("*/index")).write_bytes(b"\xff" * 80)
    with pytest.raises(UserError, match="is not a folder of image features"):
        Retrieval(model, pool, folder=folder)


def test_answers_stand_behind_the_last_marker():
    assert final_answer("so 3 + 4. The answer is 7.") == "7"
    assert final_answer("The answer is 5? no.\nanswer: two dogs \nand more") == "two dogs"
    assert final_answer("The answer is 5, no, the answer is 6") == "6"
    assert final_answer("Answer: 5. So the answer is: 6") == "6"
    assert final_answer("first\nthen\n  red car. \n") == "red car"
    assert final_answer("the result => 4, I think", markers=("=>",)) == "4, I think"
    assert final_answer("the answer is") == ""
    assert final_answer("") == ""


def test_a_majority_counts_normalised_answers_and_takes_the_first_of_equals():
    def of(*answers):
        return majority([f"so it goes. The answer is {answer}." for answer in answers])

    vote = of("The 7", "eight", "seven", "8", "Seven!")
    assert vote[:2] == ("7", 0.6)
    assert len(vote.texts) == 5
    assert of("two", "three", "3", "2")[:2] == ("2", 0.5)
    assert of("", "", "red")[:2] == ("red", pytest.approx(1 / 3))
    assert of("", "")[:2] == ("", 0)
    assert majority([])[:2] == ("", 0)
    assert majority(["5 => 6", "6"], markers=("=>",))[:2] == ("6", 1)


def test_votes_share_the_prompt_and_repeat_with_their_seed(model):
    prompt = few_shot([Shot(question(picture(24, 24, i), "how many are there?"), "two") for i in range(5)], ["what?"])
    engine = Engine(model, queue=2)
    result = vote(engine, prompt, 6, temperature=1.2, max_tokens=8, seed=3)
    assert isinstance(result, Vote)
    assert len(set(result.texts)) > 1
    length = len(encode_prompts(model, [prompt])[0].tokens)
    assert engine.encoded == 5
    assert engine.computed <= length + 5 * (PAGE + 1)
    assert not engine.running
    assert vote(Engine(model), prompt, 6, temperature=1.2, max_tokens=8, seed=3) == result
    assert vote(Engine(model), prompt, 6, temperature=1.2, max_tokens=8, seed=4).texts != result.texts
