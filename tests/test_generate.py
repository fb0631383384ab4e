import numpy as np
import pytest
import torch
from PIL import Image
from small import logits_of, small_mm1

from mm1.engine.infer import generate as generating
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.command import SamplingOptions
from mm1.engine.infer.detokenizer import TextStream
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate, n_best, score
from mm1.engine.infer.prompts import interleave
from mm1.engine.infer.sampler import draw_tokens
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.engine.settings import help_texts
from mm1.errors import UserError


def picture(height=12, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


PROMPTS = [
    ["quiz\n", picture(), "question: how many sevens? answer:"],
    [picture(24, 12, 1)],
    ["three and four make", picture(12, 12, 2), " and ", picture(12, 36, 3)],
    ["one"],
]


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(model):
    together = generate(model, PROMPTS, max_tokens=10)
    assert together == [generate(model, [prompt], max_tokens=10)[0] for prompt in PROMPTS]


def test_greedy_decoding_is_the_argmax_of_full_passes(model):
    from small import IMAGE, PATCH, SLOTS

    from mm1.engine.data.batch import exact_budget, pack
    from mm1.engine.data.document import Document
    from mm1.engine.infer.prompts import encode_prompts

    document = encode_prompts(model, PROMPTS[:1])[0]
    ids = document.tokens.tolist()
    for _ in range(8):
        grown = Document(torch.tensor(ids, dtype=torch.int32).numpy(), document.media, "test")
        batch = pack([grown], exact_budget([grown], PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)
        ids.append(int(logits_of(model, batch)[-1].argmax()))
    text = generate(model, PROMPTS[:1], max_tokens=8)[0]
    new = ids[len(document.tokens) :]
    eos = model.tokenizer.eos
    assert text == model.tokenizer.decode(new[: new.index(eos)] if eos in new else new)


def test_streamed_pieces_add_up_to_the_text_and_end_before_stop_strings(model):
    plain = generate(model, PROMPTS, max_tokens=16)
    stop = plain[0][3:6]
    pieces = [""] * len(PROMPTS)

    def gather(i, piece):
        pieces[i] += piece

    stopped = generate(model, PROMPTS, max_tokens=16, stop=(stop,), on_text=gather)
    assert pieces == stopped
    assert stopped == [text.split(stop)[0] for text in plain]


def test_sampling_repeats_with_its_seed_and_keeps_to_the_nucleus(model):
    options = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    assert generate(model, PROMPTS, seed=5, **options) == generate(model, PROMPTS, seed=5, **options)
    assert generate(model, PROMPTS, seed=5, **options) != generate(model, PROMPTS, seed=6, **options)


def test_each_row_is_sampled_by_its_own_settings():
    logits = torch.tensor([[3.0, 1.0, 2.0, -9.0]]).expand(1000, -1)
    us = [(i + 0.5) / 1000 for i in range(1000)]

    def drawn(temperature, top_p=1.0, top_k=0):
        return draw_tokens(logits, torch.tensor([Draw(temperature, top_p, top_k, u) for u in us]))

    assert set(drawn(1.0, 0.6).tolist()) == {0}
    assert set(drawn(1.0, 0.8).tolist()) == {0, 2}
    assert set(drawn(1.0, top_k=1).tolist()) == {0}
    assert set(drawn(5.0, top_k=2).tolist()) == {0, 2}
    assert set(drawn(0.0).tolist()) == {0}
    counts = drawn(1.0).bincount(minlength=4) / 1000
    assert (counts - logits[0].softmax(-1)).abs().max() < 2e-3
    draws = torch.tensor([Draw(1.0, 1.0, 0, 0.9), Draw(0.0, 1.0, 0, 0.9), Draw(5.0, 0.5, 3, 0.9)])
    together = draw_tokens(logits[:3], draws)
    assert together.tolist() == [int(draw_tokens(logits[:1], draw[None])) for draw in draws]
    almost = Draw(1.0, 1.0, 3, 1 - 2**-24)  # of flat probabilities, whose sum is not quite 1
    assert int(draw_tokens(torch.zeros(1, 7), torch.tensor([almost]))) == 2


def test_logits_that_are_no_numbers_harm_nobody():
    logits = torch.tensor([[1.0, 3.0, 2.0], [float("nan")] * 3, [float("inf")] * 3, [float("-inf")] * 3])
    found = draw_tokens(logits, torch.tensor([Draw(1.0, 0.5, 0, 0.1)] * 4))
    assert int(found[0]) == 1
    assert all(0 <= token < 3 for token in found.tolist())


@pytest.mark.parametrize("tokens", [None, 96])
def test_a_cache_is_as_large_as_it_has_to_be_and_no_larger(model, monkeypatch, tokens):
    """64 short texts that may become long need no cache for all of that; who is put back has the same text."""
    sizes = []
    monkeypatch.setattr(
        generating, "Engine", lambda *given, **how: sizes.append(how["tokens"]) or Engine(*given, **how)
    )
    prompts = [[f"{i}"] for i in range(12)]
    settings = {"max_tokens": 60, "temperature": 1.0, "seed": 0}
    whole = generate(model, prompts, **settings)
    scores = score(model, prompts, [[" one", " two"]] * 12)
    assert sizes == [12 * 64, 24 * PAGE]
    monkeypatch.setattr(generating, "TOKENS", tokens or generating.TOKENS)
    assert generate(model, prompts, **settings) == whole
    assert np.allclose(score(model, prompts, [[" one", " two"]] * 12), scores, atol=1e-4)
    assert tokens is None or sizes[2:] == [tokens, tokens]
    generate(model, [["one"]] * 64, max_tokens=4096 if tokens is None else 400, stop=["e", "a", " "])
    assert sizes[4] == (generating.TOKENS if tokens is None else 96)  # the model has no context


def test_no_prompts_give_no_texts(model):
    assert generate(model, []) == []


def test_images_take_their_marks_and_spare_ones_come_first():
    a, b, c = picture(seed=1), picture(seed=2), picture(seed=3)
    assert interleave(["x <image> y"], [a, b]) == [[a, "x ", b, " y"]]
    assert interleave(["<image>one", "two<image>"], [a, b]) == [[a, "one"], ["two", b]]
    assert interleave([""], [a, b, c]) == [[a, b, c]]
    with pytest.raises(UserError, match="2 <image> marks, expected at most 1, one for each image"):
        interleave(["<image><image>"], [a])


def test_texts_without_tokens_cannot_be_compared(model):
    with pytest.raises(UserError, match="max_tokens is 0, expected at least 1"):
        n_best(Engine(model), ["one"], 2, Sampling(max_tokens=0))


def test_settings_are_the_fields_of_sampling_and_no_others(model):
    limited = generate(model, PROMPTS, max_tokens=3)
    assert limited == [request_text(model, prompt, Sampling(max_tokens=3)) for prompt in PROMPTS]
    with pytest.raises(TypeError, match="temprature"):
        generate(model, PROMPTS, temprature=1.0)


def test_the_commands_options_are_the_fields_of_sampling_that_have_a_help_text():
    options, texts = SamplingOptions(), help_texts(Sampling)
    assert {"temperature", "min_p", "stop", "seed"} < texts.keys() == vars(options).keys()
    assert {name: value for name, value in vars(options).items() if value != getattr(Sampling(), name)} == {}


def request_text(model, prompt, sampling):
    engine = Engine(model)
    request = engine.submit(prompt, sampling)
    engine.run()
    return request.text


def test_refuses_bad_settings(model):
    with pytest.raises(UserError, match="temperature"):
        generate(model, PROMPTS, temperature=-1)
    model_without = small_mm1()
    model_without.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        generate(model_without, PROMPTS)


class Letters:
    """Tokens are letters."""

    eos = -1

    def pieces(self, ids, continued=False):
        return [bytes([number]) for number in ids]

    def has_text(self, number):
        return True


@pytest.mark.parametrize("stop, text, pieces", [
    (("cde",), "ab", ["a", "b"]),  # over three tokens
    (("xyz", "f", "bcd"), "a", ["a"]),  # of several the earliest, whatever their order
    (("d", "cd"), "ab", ["a", "b"]),  # two that end at once: what begins first
    (("zz",), "abcdef", ["a", "b", "c", "d", "e", "f"]),
    (("fgh",), "abcdef", ["a", "b", "c", "d", "e", "f"]),  # its beginning comes at the end
])  # fmt: skip
def test_stops_over_several_tokens_are_never_seen(stop, text, pieces):
    seen = []
    grown = TextStream(Letters(), stop, seen.append)
    for letter in "abcdef":
        grown.add(ord(letter))
    grown.finish()
    assert (grown.text, seen) == (text, pieces)
