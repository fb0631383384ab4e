"""However prompts are cut and requests are put back, each gets what it gets alone, and everyone comes to an end."""

import random
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small import DOCUMENTS, SLOTS, document, logits_of, packed, small_mm1
from test_engine import LONG, Failing, drained
from test_generate import PROMPTS, picture

from mm1.engine.data.document import Document
from mm1.engine.data.record import View
from mm1.engine.infer.cache import PAGE, Cache, page_names
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import score
from mm1.engine.infer.grammar import Grammars
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.engine.infer.schedule import MAX_LONG, MAX_OVERTAKEN, Schedule
from mm1.errors import UserError


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


def text(count, seed=0):
    return Document(np.array([1, *np.random.default_rng(seed).integers(4, 384, count - 1)], np.int32), (), "t")


def alone(model, prompt, sampling, **settings):
    engine = Engine(model, **settings)
    request = engine.submit(prompt, sampling)
    engine.run()
    return request


def check_pages(engine):
    """Each page has the users that hold it, is free, or is known; nobody writes where another reads or writes."""
    cache, schedule = engine.cache, engine.schedule
    users = Counter(page for request in schedule.running for page in request.pages)
    assert cache.users == [users[page] for page in range(cache.pages)]
    for page in range(cache.pages):
        assert (users[page] > 0) + cache.free[page] + (page in cache.idle) == 1
    assert all(cache.page_of[name] == page for page, name in cache.name_of.items())
    for request in schedule.running:
        if not request.beams:
            assert all(users[page] == 1 for page in request.pages[request.computed // PAGE :])
    for request in schedule.waiting:
        assert not request.pages
    numbers = [[request.number for request in of] for of in (schedule.running, schedule.waiting)]
    assert numbers == [sorted(of) for of in numbers]


# Chunks


@pytest.mark.parametrize("by", ["one call", "torch"])
@pytest.mark.parametrize("rows", [3, 7, 50])
def test_prompts_cut_anywhere_give_what_whole_ones_give(model, rows, by):
    """Also inside an image, several in one chunk, behind pages that are known and before a second one begins."""
    torch.manual_seed(0)
    documents = [document(*parts) for parts in [*DOCUMENTS, (40,), ((2, 2), 30, (3, 2), 9), (13, (1, 1), (2, 1))]]
    found = []
    for prefill in (8192, rows):
        engine = Engine(model, prefill=prefill, image_patches=9 if prefill == rows else None, feature_bytes=0)
        engine.one_step = engine.one_step if by == "one call" else None
        found.append([engine.submit(d, Sampling(max_tokens=6)) for d in documents])
        engine.run()
        assert drained(engine)
    for whole, cut in zip(*found):
        assert cut.tokens == whole.tokens
        assert cut.logprobs == pytest.approx(whole.logprobs, abs=1e-5)


def test_a_running_document_gets_a_token_between_any_two_chunks(model):
    engine = Engine(model, prefill=32)
    running = engine.submit(["one"], Sampling(max_tokens=100))
    engine.step()
    prompts = [engine.submit(text(300, seed), Sampling(max_tokens=1)) for seed in (1, 2)]
    steps = 0
    while not all(prompt.finish for prompt in prompts):
        before, made = engine.computed, len(running.tokens)
        engine.step()
        assert engine.computed - before <= 32
        assert len(running.tokens) == made + 1
        steps += 1
    assert steps == -(-600 // 32)  # no row of a chunk is left empty


def test_a_prompt_is_cancelled_inside_and_what_was_computed_of_it_is_known(model):
    engine = Engine(model, prefill=40)
    request = engine.submit(text(400), Sampling(max_tokens=5))
    for _ in range(3):
        engine.step()
    engine.cancel(request)
    assert (request.finish, request.tokens, engine.computed) == ("cancelled", [], 120)
    assert drained(engine)
    again = engine.submit(text(400), Sampling(max_tokens=5))
    engine.run()
    assert again.shared == 120 // PAGE
    assert again.tokens == alone(model, text(400), Sampling(max_tokens=5)).tokens


def test_short_prompts_do_not_wait_for_a_long_one_and_it_goes_on(model):
    engine = Engine(model, prefill=64)
    long = engine.submit(text(2000), Sampling(max_tokens=2))
    engine.step()
    short = []
    for seed in range(8):  # more than a step computes keep coming
        short += [engine.submit(text(20, 10 * seed + i), Sampling(max_tokens=2)) for i in range(4)]
        before = long.computed
        engine.step()
        assert long.computed - before >= 32
    assert short[0].tokens
    while not all(request.finish for request in short):
        engine.step()
    assert long.prefilling
    engine.run()
    assert long.tokens == alone(model, text(2000), Sampling(max_tokens=2)).tokens


def test_short_prompts_and_known_ones_pass_any_number_of_long_ones(model):
    engine = Engine(model, prefill=64)
    known = text(100, 99)
    engine.submit(known, Sampling(max_tokens=1))
    engine.run()
    long = [engine.submit(text(600, seed), Sampling(max_tokens=2)) for seed in range(6)]
    for _ in range(3):
        engine.step()
    assert list(engine.running) == long[:MAX_LONG]  # no more take pages before it is their turn
    for prompt in (text(10, 50), known, text(16, 51)):
        short = engine.submit(prompt, Sampling(max_tokens=1))
        engine.step()
        assert short.finish
    while not long[0].tokens:
        engine.step()
    engine.step()
    assert long[MAX_LONG] in engine.running
    engine.run()
    assert all(request.finish for request in long)


def test_images_are_encoded_when_their_rows_are_due_so_many_patches_a_step_and_once(model):
    """Of 6, 6 and 30 patches, seven to a step: one of more goes alone, and rows that show others wait."""
    prompt = document((2, 3), 3, (3, 2), 2, (5, 6), 4)
    engine = Engine(model, prefill=3, feature_bytes=0)  # cut inside images, of whose features none are kept
    request = engine.submit(prompt, Sampling(max_tokens=1))
    encoded = []
    while engine.step():
        encoded.append(engine.encoded)
    assert encoded == [1, 1, 2, 2, 3, 3, 3]
    engine = Engine(model, image_patches=7)
    request = engine.submit(prompt, Sampling(max_tokens=1))
    encoded = []
    while engine.step():
        encoded.append((engine.encoded, request.computed))
    first, second = (int(request.media_rows[i * SLOTS]) for i in (1, 2))
    assert encoded == [(1, first), (2, second)]
    assert engine.encoded == 3


@pytest.mark.parametrize("settings", [{"image_patches": 1, "feature_bytes": 0}, {"image_patches": 9}], ids=str)
def test_a_prompt_that_goes_on_inside_an_image_waits_for_the_encoder_and_fails_nobody(model, settings):
    """Its pages are known up to the middle of the image, whose features are forgotten, and another image is first."""
    torch.manual_seed(0)
    prompts = [document(3, (3, 3), 4), document(12, (2, 2), 8), document(2, (2, 3), 3)]
    engine = Engine(model, **settings)
    engine.submit(prompts[1], Sampling(max_tokens=2))
    engine.run()
    engine.features.clear()
    found = [engine.submit(prompt, Sampling(max_tokens=4)) for prompt in prompts]
    engine.run()
    assert found[1].shared == 1
    assert PAGE in found[1].media_rows
    for request, prompt in zip(found, prompts):
        assert request.tokens == alone(model, prompt, Sampling(max_tokens=4)).tokens


def test_images_of_no_rows_are_none(model):
    request = Engine(model).submit(document(2, (1, 1), 3, (1, 1)))
    first, second = request.media_rows[0], request.media_rows[SLOTS]
    for place, at in ((0, 0), (first + 1, 0), (second - 1, 1), (second + 2, 1), (second + SLOTS, 2)):
        start, end = request.media_range(place, place)
        assert start == end in (at, at + 1)


def test_features_are_kept_by_bytes_the_last_used_ones(model):
    one = SLOTS * model.config.decoder.width * 4
    engine = Engine(model, feature_bytes=2 * one)
    for seed in (1, 2, 1, 3, 1):
        engine.submit([picture(seed=seed), f"{seed}{engine.encoded}"], Sampling(max_tokens=1))
        engine.run()
        assert engine.features.bytes <= 2 * one
    assert engine.encoded == 3
    engine.forget()
    assert (engine.features.bytes, len(engine.features.cached)) == (0, 0)


def test_a_prompt_whose_image_tokens_have_no_image_is_refused_before_it_spoils_a_step(model):
    for count, images in ((1, ()), (SLOTS + 1, (View("image", np.zeros((4, 4, 3), np.uint8)),))):
        prompt = Document(np.array([5, *[model.tokenizer.image] * count], np.int32), images, "t")
        told = f"{count} image tokens, expected {4 * len(images)} for its {len(images)} images"
        with pytest.raises(UserError, match=told):
            Engine(model).submit(prompt)


@pytest.mark.parametrize("tokens, told", [
    ([], "the prompt has no tokens"), ([5, 384], "the token id 384, expected 0 to 383"), ([-1, 5], "the token id -1"),
])  # fmt: skip
def test_tokens_that_the_model_does_not_have_are_refused_before_they_spoil_a_step(model, tokens, told):
    with pytest.raises(UserError, match=told):
        Engine(model).submit(Document(np.array(tokens, np.int32), (), "t"))


# Scores


@pytest.mark.parametrize("prefill", [5, 512])
@pytest.mark.parametrize("count", [1, 9, 17, 60])
def test_a_prompts_last_tokens_are_scored_as_a_full_pass_scores_them(model, prefill, count):
    torch.manual_seed(1)
    prompt = document(20, (2, 2), 36)
    engine = Engine(model, prefill=prefill)
    sampling = Sampling(max_tokens=3, top_logprobs=2)
    found = [engine.submit(prompt, sampling, scored=count) for _ in range(2)]  # the second behind known pages
    engine.run()
    with torch.inference_mode():
        logprobs = logits_of(model, packed([prompt])).log_softmax(-1)[-count - 1 : -1]
    truth = logprobs.gather(1, torch.from_numpy(prompt.tokens[-count:]).long()[:, None])[:, 0].tolist()
    for request in found:
        assert request.scores == pytest.approx(truth, abs=1e-5)
        assert [[token for token, _ in of] for of in request.score_top.tolist()] == logprobs.topk(2).indices.tolist()
        assert [v for of in request.score_top.tolist() for _, v in of] == pytest.approx(
            logprobs.topk(2).values.flatten().tolist(), abs=1e-5
        )
        assert request.tokens == alone(model, prompt, Sampling(max_tokens=3)).tokens
        assert len(request.logprobs) == len(request.tokens)


def test_of_no_new_tokens_a_prompt_alone_is_scored(model):
    sampling, engine = Sampling(max_tokens=0), Engine(model, prefill=16)
    found = [engine.submit(text(40), sampling, scored=count) for count in (39, 0)]
    engine.run()
    assert [(r.finish, r.tokens, len(r.scores)) for r in found] == [("scored", [], 39), ("length", [], 0)]
    assert drained(engine)


def test_a_prompt_that_is_preempted_while_it_is_scored_has_each_score_once(model):
    prompt, truth = text(80), Engine(model)
    whole = truth.submit(prompt, Sampling(max_tokens=3), scored=50)
    truth.run()
    engine = Engine(model, prefill=12)
    request = engine.submit(prompt, Sampling(max_tokens=3), scored=50)
    for _ in range(4):
        engine.step()
    assert 0 < len(request.scores) < 50
    engine.schedule.preempt(request)
    engine.run()
    assert request.scores == pytest.approx(whole.scores, abs=1e-5)
    assert request.tokens == whole.tokens


def test_what_cannot_be_scored_is_refused(model):
    prompt = text(5)
    for count in (-1, 5):
        with pytest.raises(UserError, match=f"scored is {count}, expected 0 to 4"):
            Engine(model).submit(prompt, Sampling(), scored=count)


def test_a_scored_prompt_is_known_afterwards_and_goes_on_from_its_pages(model):
    prompt = text(100)
    engine = Engine(model)
    first = [engine.submit(prompt, Sampling(max_tokens=3, temperature=1.0, seed=i), scored=0 if i else 99)
             for i in range(4)]  # fmt: skip
    engine.run()
    assert engine.computed == 100 + 3 * (100 - 96)  # the others share what the first computes
    again = engine.submit(prompt, Sampling(max_tokens=3), scored=10)
    engine.run()
    assert again.shared == (100 - 1 - 10) // PAGE
    assert again.scores == pytest.approx(first[0].scores[-10:], abs=1e-5)
    request = engine.submit(prompt, Sampling(max_tokens=30), scored=99)
    for _ in range(28):
        engine.step()
    before = engine.computed
    engine.schedule.preempt(request)
    engine.run()
    assert engine.computed - before <= PAGE
    assert request.tokens == alone(model, prompt, Sampling(max_tokens=30)).tokens
    assert len(request.scores) == 99


def test_alternatives_take_eight_bytes_each(model):
    request = Engine(model).submit(text(400), Sampling(max_tokens=0, top_logprobs=20), scored=399)
    engine = Engine(model)
    request = engine.submit(text(400), request.sampling, scored=399)
    engine.run()
    assert request.score_top.shape == (399, 20)
    assert request.score_top.nbytes == 399 * 20 * 8


def test_of_equal_tokens_the_same_ones_are_told_however_many_are_asked_for(model):
    model = small_mm1(seed=3).eval()
    with torch.no_grad():
        model.decoder.embedding.weight.copy_(model.decoder.embedding.weight[:1].expand(384, -1))
    found = []
    for count in (1, 3, 20):
        engine = Engine(model)
        found.append(engine.submit(text(40), Sampling(max_tokens=0, top_logprobs=count), scored=39))
        engine.run()
    for one, three, twenty in zip(*(request.score_top.tolist() for request in found)):
        assert one == twenty[:1]
        assert three == twenty[:3]


def test_answers_are_scored_alike_in_pieces(model):
    prompts, answers = [[LONG, picture(), "how many? answer:"]], [[" two", LONG]]
    whole = score(model, prompts, answers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm1.engine.infer.engine.ROWS", {"cpu": 7})
        patch.setattr("mm1.engine.infer.engine.SCORED", 3)
        assert score(model, prompts, answers)[0] == pytest.approx(whole[0], abs=1e-4)


# Pages


def test_64_requests_that_may_become_long_run_together_while_they_are_short(model):
    engine = Engine(model, tokens=4096)
    requests = [engine.submit(text(12, i), Sampling(max_tokens=4000)) for i in range(64)]
    while any(len(request.tokens) < 20 for request in requests):
        engine.step()
        assert all(request.finish in (None, "stop") for request in requests)
    assert sum(request.preempted for request in requests) == 0
    assert len(engine.running) == 64 - sum(request.finish == "stop" for request in requests)
    for request in requests:
        engine.cancel(request)
    assert drained(engine)


def test_who_was_preempted_goes_on_with_the_same_tokens_and_emits_nothing_twice(model):
    """Greedy, drawn, penalized and stopped texts in a cache that holds two of six."""
    samplings = [
        Sampling(90), Sampling(90, temperature=1.1, seed=4), Sampling(80, repetition_penalty=1.4),
        Sampling(90, temperature=0.7, top_k=9, seed=2), Sampling(90, stop=("zz",)),
        Sampling(60, temperature=2.0, seed=1),
    ]  # fmt: skip
    prompts = [
        text(20, 1),
        text(33, 2),
        *encode_prompts(model, [PROMPTS[0], [LONG, picture(24, 24, 1)]]),
        text(3, 3),
        text(40, 4),
    ]
    engine, heard = Engine(model, tokens=256, prefill=24), [[] for _ in prompts]
    found = [engine.submit(p, s, of.append) for p, s, of in zip(prompts, samplings, heard)]
    while engine.step():
        check_pages(engine)
    assert drained(engine)
    assert sum(request.preempted for request in found) > 2
    for request, prompt, sampling, pieces in zip(found, prompts, samplings, heard):
        truth = alone(model, prompt, sampling)
        assert (request.tokens, request.text, request.finish) == (truth.tokens, truth.text, truth.finish)
        assert "".join(pieces) == truth.text
        assert request.logprobs == pytest.approx(truth.logprobs, abs=1e-4)


def test_a_preempted_requests_pages_are_found_again(model):
    engine = Engine(model, tokens=256)
    first = engine.submit(text(20, 1), Sampling(max_tokens=120, temperature=1.0, seed=1))
    second = engine.submit(text(20, 2), Sampling(max_tokens=60, temperature=1.0, seed=2))
    for _ in range(40):
        engine.step()
    computed = engine.computed
    engine.schedule.preempt(second)
    check_pages(engine)
    assert (list(engine.waiting), second.finish) == ([second], None)
    engine.step()
    assert engine.computed - computed <= PAGE
    assert second.shared == 0  # what a client is told was known beforehand
    engine.run()
    assert second.tokens == alone(model, text(20, 2), second.sampling).tokens
    assert first.tokens == alone(model, text(20, 1), first.sampling).tokens


def test_the_next_turn_finds_what_was_generated(model):
    engine = Engine(model)
    first = engine.submit(text(30), Sampling(max_tokens=50, temperature=1.0, seed=3))
    engine.run()
    assert len(first.tokens) == 50
    grown = Document(np.concatenate([first.document.tokens, np.array([*first.tokens, 9, 9], np.int32)]), (), "t")
    second = engine.submit(grown, Sampling(max_tokens=4))
    engine.run()
    assert second.shared == (30 + 49) // PAGE
    assert second.tokens == alone(model, grown, Sampling(max_tokens=4)).tokens


def test_an_image_token_that_was_generated_is_no_image(model):
    """A preempted text that holds one is computed anew by its own embedding, and its pages have names of their own."""
    prompt, engine = document(5, (1, 2), 8), Engine(model, tokens=512)
    request = engine.submit(prompt, Sampling(max_tokens=40))
    for _ in range(10):
        engine.step()
    request.tokens[4] = model.tokenizer.image
    engine.forget()
    engine.schedule.preempt(request)
    engine.run()
    ids = np.array([*prompt.tokens, *request.tokens[:10]], np.int32)
    assert (engine.encoded, request.finish is not None) == (2, True)
    assert request.ids(0, len(ids)).tolist() == ids.tolist()
    assert request.media_range(0, 1000) == (0, 1)


def test_a_preempted_request_is_cancelled_where_it_waits(model):
    heard = []
    engine = Engine(model, tokens=256)
    request = engine.submit(text(20), Sampling(max_tokens=60), heard.append)
    for _ in range(12):
        engine.step()
    engine.schedule.preempt(request)
    engine.cancel(request)
    assert request.finish == "cancelled"
    assert len(request.tokens) == 12
    assert "".join(heard) == request.text == model.tokenizer.decode(request.tokens)
    assert drained(engine)


def test_beams_have_their_pages_from_the_beginning_and_are_never_put_back(model):
    engine = Engine(model, tokens=256)
    how = Sampling(max_tokens=30, num_beams=2)
    plain = [engine.submit(text(10, i), Sampling(max_tokens=100, temperature=1.0, seed=i)) for i in range(2)]
    search = engine.submit(text(10, 7), how)
    later = engine.submit(text(10, 8), Sampling(max_tokens=100, temperature=1.0, seed=8))
    while engine.step():
        check_pages(engine)
    assert drained(engine)
    assert search.preempted == 0
    assert sum(request.preempted for request in [*plain, later]) > 0
    assert search.tokens == alone(model, text(10, 7), how).tokens
    for request, seed in zip([*plain, later], (0, 1, 8)):
        assert request.tokens == alone(model, text(10, seed), request.sampling).tokens


def test_a_step_that_fails_ends_only_those_in_it(model):
    engine = Failing(model, prefill=16)
    first = engine.submit(["one"], Sampling(max_tokens=50))
    engine.step()
    second = engine.submit(text(100), Sampling(max_tokens=3))
    engine.step()
    assert second.prefilling
    engine.errors["decode"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        engine.step()
    check_pages(engine)
    assert (first.finish, second.finish) == ("failed", None)
    engine.run()
    assert second.tokens == alone(model, text(100), Sampling(max_tokens=3)).tokens
    assert drained(engine)


def test_a_token_that_cannot_be_chosen_ends_those_it_is_chosen_for_with_the_error(model, monkeypatch):
    for going in (False, True):  # behind a prompt, or in decoding
        engine = Engine(model, prefill=16)
        first, second = (engine.submit(text(9, i), Sampling(max_tokens=50)) for i in range(2))
        long = engine.submit(text(100), Sampling(max_tokens=3))
        for _ in range(2 * going):
            engine.step()
        error = MemoryError("sort")
        monkeypatch.setattr("mm1.engine.infer.engine.choose_tokens", Mock(side_effect=error))
        with pytest.raises(MemoryError, match="sort"):
            engine.step()
        monkeypatch.undo()
        check_pages(engine)
        assert (first.finish, first.error) == ("failed", error)
        assert long.finish is None
        engine.run()
        assert drained(engine)
        assert long.tokens == alone(model, text(100), Sampling(max_tokens=3)).tokens
        assert second.finish


def held(model, prompt):
    """A stop string that holds back all of a greedy text."""
    return alone(model, prompt, Sampling(max_tokens=30)).text + "zz"


def test_a_step_that_fails_ends_all_in_it_whatever_their_listeners_do(model):
    engine = Failing(model)

    def listener(_):
        raise ValueError("listener")

    prompts = [text(20, i) for i in range(2)]
    requests = [engine.submit(p, Sampling(max_tokens=30, stop=held(model, p)), listener) for p in prompts]
    for _ in range(4):
        engine.step()
    engine.errors["decode"] = RuntimeError("device")
    with pytest.raises(RuntimeError, match="device"):
        engine.step()
    assert [request.finish for request in requests] == ["failed"] * 2
    assert drained(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_a_listener_costs_the_others_no_token(model, error):
    """Ctrl-C in a listener too: the engine goes on afterwards."""
    drawn = Sampling(max_tokens=30, temperature=1.0, seed=1)
    engine, heard = Engine(model), []

    def listener(piece):
        heard.append(piece)
        if len(heard) == 2:
            raise error

    first, second = engine.submit(text(20), Sampling(max_tokens=30), listener), engine.submit(text(9, 1), drawn)
    with pytest.raises(error):
        engine.run()
    check_pages(engine)
    engine.run()
    assert (first.finish, type(first.error), second.error) == ("failed", error, None)
    assert second.tokens == alone(model, text(9, 1), drawn).tokens


def test_requests_of_every_kind_get_in_a_crowd_what_they_get_alone(model):
    """Images of which no features are kept, few patches a step, grammars, scores, cancels, a small cache."""
    pytest.importorskip("llguidance")
    draw, whole = random.Random(1), Grammars(model.tokenizer).compile('{"type": "integer"}')
    torch.manual_seed(1)
    pictures = [(2, 2), (3, 3), (1, 2)]
    prompts = [document(draw.randint(1, 20), draw.choice(pictures), draw.randint(1, 9), draw.choice(pictures), 3)
               for _ in range(6)] + [text(draw.choice([9, 30, 90]), i) for i in range(6)]  # fmt: skip
    engine = Engine(model, tokens=256, batch=12, prefill=24, image_patches=9, feature_bytes=0)
    made = []
    for number in range(80):
        prompt = draw.choice(prompts)
        how = {"temperature": draw.choice([0, 1.0]), "seed": number, "top_logprobs": draw.choice([0, 3]),
               "grammar": draw.choice([None, None, whole])}  # fmt: skip
        sampling, scored = Sampling(draw.choice([0, 2, 60]), **how), draw.choice([0, 0, 5, len(prompt.tokens) - 1])
        made.append((engine.submit(prompt, sampling, scored=scored), prompt, sampling, scored))
        if draw.random() < 0.1:
            engine.cancel(draw.choice(made)[0])
        for _ in range(draw.choice([0, 1, 3])):
            engine.step()
            check_pages(engine)
    while engine.step():
        check_pages(engine)
    assert drained(engine)
    assert sum(request.preempted for request, *_ in made) > 5
    for request, prompt, sampling, scored in made:
        if request.finish == "cancelled":
            continue
        engine = Engine(model, tokens=512)
        truth = engine.submit(prompt, sampling, scored=scored)
        engine.run()
        assert (request.tokens, request.finish) == (truth.tokens, truth.finish)
        assert request.scores == pytest.approx(truth.scores, abs=1e-4)
        assert [len(top) for top in request.score_top] == [len(top) for top in truth.score_top]


# The schedule alone, without a model


class Simulated:
    """A Schedule and what an Engine does with it, with numbers in the place of tokens."""

    def __init__(self, pages, batch, prefill):
        config = SimpleNamespace(layers=1, kv_heads=1, head_width=1)
        self.cache = Cache(config, pages, torch.device("cpu"), torch.float32)
        self.schedule = Schedule(self.cache, batch, prefill)
        self.draw = random.Random(pages)

    def submit(self, prompt, limit, common=0):
        tokens = np.array([*range(common), *(self.draw.randrange(1 << 30) for _ in range(prompt - common))], np.int32)
        text = SimpleNamespace(finish=lambda: None, add=lambda token: None, ends=lambda tokens: False)
        request = Request(Document(tokens, (), ""), Sampling(max_tokens=limit), text)
        if request.max_pages > self.cache.pages:
            return None
        request.page_names = page_names(tokens, [], -1, 1)[: (prompt - 1) // PAGE]
        self.schedule.add(request)
        return request

    def step(self):
        """Return how many rows of prompts and how many tokens it computed."""
        schedule, made, rows = self.schedule, 0, 0
        for request in schedule.plan_decode():
            assert request.computed < len(request.pages) * PAGE
            schedule.advance(request, 1)
            made += self.token(request)
        schedule.admit()
        for request in schedule.plan_prefill():
            rows += request.due
            schedule.advance(request, request.due)
            if not request.pending:
                made += self.token(request)
        assert rows <= schedule.prefill
        return rows, made

    def token(self, request):
        request.tokens.append(self.draw.randrange(1 << 30))
        if len(request.tokens) == request.sampling.max_tokens:
            self.schedule.end(request, "length")
        return 1


@pytest.mark.parametrize("pages, batch, prefill", [(4, 3, 8), (16, 8, 30), (40, 64, 16), (97, 5, 512)])
def test_everyone_comes_to_an_end_and_no_page_is_lost(pages, batch, prefill):
    """Random arrivals, cancels, lengths and common beginnings."""
    engine, draw, made = Simulated(pages, batch, prefill), random.Random(pages), []
    for _ in range(150):
        for _ in range(draw.choice([0, 0, 1, 2])):
            prompt, limit = (
                draw.choice([1, 15, 16, 17, 40, 8 * pages, 15 * pages]),
                draw.choice([1, 2, 20, 60, 8 * pages]),
            )
            common = draw.choice([0, 0, min(prompt, 40)])
            made += [r for r in [engine.submit(prompt + draw.randint(0, 5), limit, common)] if r]
        if made and draw.random() < 0.1:
            engine.schedule.end(draw.choice([r for r in made if not r.finish] or [made[0]]), "cancelled")
        engine.step()
        check_pages(engine)
    steps = 0
    while engine.schedule.running or engine.schedule.waiting:
        rows, tokens = engine.step()
        assert rows or tokens, "no step is in vain"
        check_pages(engine)
        steps += 1
    assert all(len(r.tokens) == r.sampling.max_tokens for r in made if r.finish == "length")
    assert {r.finish for r in made} == {"length", "cancelled"}
    assert sum(r.preempted for r in made) > 5
    assert engine.cache.available == pages


def test_a_big_request_is_passed_by_some_and_then_by_none(model):
    """While it waits for pages small ones come for ever; they begin before it, but not for ever."""
    engine = Simulated(20, 8, 64)
    for _ in range(4):
        engine.submit(30, 30)
    engine.step()
    big, small = engine.submit(300, 10), []
    for _ in range(2000):
        small += [engine.submit(10, 10)]
        engine.step()
        if big.tokens:
            break
    begun = [r for r in small if r.tokens or r.finish]
    assert big.tokens
    assert 8 < len(begun) <= MAX_OVERTAKEN + 8
    assert big.overtaken <= MAX_OVERTAKEN


def test_who_waits_for_pages_is_not_looked_at_again_before_one_is_free(monkeypatch):
    engine = Simulated(40, 64, 64)
    first = engine.submit(400, 20)
    engine.step()
    shared = first.document.tokens
    while first.prefilling:
        engine.step()
    waiting = [engine.submit(300, 10) for _ in range(5)]
    for request in waiting:
        request.page_names = page_names(np.concatenate([shared, request.document.tokens]), [], -1, 1)[:18]
    looked = Mock(wraps=engine.cache.find)
    monkeypatch.setattr(engine.cache, "find", looked)
    waiting += [engine.submit(500, 10)]  # of which the cache holds no page
    for _ in range(5):
        engine.step()
    assert not waiting[-1].pages
    assert sum(call.args == ([],) for call in looked.call_args_list) == 1
    while not all(request.finish for request in waiting):
        engine.step()


def test_who_was_preempted_is_passed_by_nobody(model):
    engine = Simulated(8, 8, 64)
    requests = [engine.submit(30, 60) for _ in range(3)]
    while not any(r.preempted for r in requests):
        engine.step()
    [waits] = [r for r in requests if r.preempted]
    later = engine.submit(1, 1)
    while not waits.pages:
        engine.step()
        assert waits.pages or not later.pages
        assert engine.schedule.running


def test_who_begins_leaves_a_page_to_each_that_grows():
    """Or the next row of an older one would put it back at once."""
    engine = Simulated(8, 8, 512)
    older, younger = engine.submit(40, 40), engine.submit(80, 2)  # pages 3 of 5, and 5 of 6
    engine.step()
    assert older.pages
    assert not younger.pages
    while engine.schedule.running:
        engine.step()
    assert (younger.finish, younger.preempted) == ("length", 0)


def test_pages_of_a_text_lie_side_by_side_while_there_is_room():
    """A step reads them faster so."""
    engine = Simulated(256, 16, 512)
    requests = [engine.submit(20, 100) for _ in range(16)]
    for _ in range(90):
        engine.step()
    for request in requests:
        assert request.pages == list(range(request.pages[0], request.pages[0] + len(request.pages)))
