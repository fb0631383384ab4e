"""However requests are batched, paged, shared and cancelled, each gets what it gets alone, and no page is lost."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error
from PIL import Image
from small import DOCUMENTS, IMAGE, PATCH, SLOTS, document, logits_of, packed, small_mm1
from test_generate import PROMPTS, picture

from mm1.engine.data.batch import exact_budget, pack
from mm1.engine.data.document import Document
from mm1.engine.data.record import View, view_digest
from mm1.engine.infer import cache as cache_module
from mm1.engine.infer import engine as engine_module
from mm1.engine.infer import generate as generating
from mm1.engine.infer.cache import PAGE, Cache, page_names
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate, n_best, score
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import GREEDY, Sampling
from mm1.engine.layers import blocked as packing
from mm1.engine.layers import quantize
from mm1.engine.layers.blocked import BlockedLinear
from mm1.engine.layers.blocked import blocked as blocked_weights
from mm1.errors import Busy, UserError

LONG = "seven and two and one and nine make nineteen and not eighteen, "


@pytest.fixture(scope="module", params=[0, 4], ids=["dense", "mixture"])
def model(request):
    return small_mm1(seed=3, experts=request.param).eval()


def of_full_passes(model, document: Document, count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by the training forward of all so far, again for each."""
    ids, found = document.tokens.tolist(), []
    for _ in range(count):
        grown = Document(np.array(ids, np.int32), document.media, "")
        batch = pack([grown], exact_budget([grown], PATCH), image_id=IMAGE, patch=PATCH, slots=SLOTS)
        with torch.inference_mode():
            logits = logits_of(model, batch)[-1].log_softmax(-1)
        ids.append(int(logits.argmax()))
        found.append(float(logits.max()))
    return ids[len(document.tokens) :], found


def names_of(document: Document, image_id: int = IMAGE) -> list[bytes]:
    return page_names(document.tokens, document.digests, image_id, SLOTS)


def drained(engine: Engine) -> bool:
    """No request, and every page free or known without a user."""
    return (
        not (engine.running or engine.waiting or any(engine.cache.users))
        and engine.cache.available == engine.cache.pages
    )


@pytest.mark.parametrize("by", ["one call", "torch"])
def test_tokens_and_log_probabilities_are_those_of_full_passes(model, by):
    """Batched, paged, continued while others join; on each its own."""
    engine = Engine(model, tokens=4096, batch=3)
    assert engine.one_step
    if by == "torch":
        engine.one_step = None
    documents = [document(*parts) for parts in [*DOCUMENTS, (40,), ((2, 2), 30, (3, 2), 9)]]
    requests = [engine.submit(d, Sampling(max_tokens=6)) for d in documents]
    engine.run()
    assert drained(engine)
    for request, d in zip(requests, documents):
        tokens, logprobs = of_full_passes(model, d, 6)
        count = len(request.tokens)
        assert count == 6 or (request.finish == "stop" and request.tokens[-1] == model.tokenizer.eos)
        assert request.tokens == tokens[:count]
        assert request.logprobs == pytest.approx(logprobs[:count], abs=1e-4)


def test_what_a_fresh_cache_happens_to_hold_is_never_read(model):
    engines = [Engine(model, tokens=512) for _ in range(2)]
    for engine, value in zip(engines, (0.0, float("nan"))):
        engine.cache.k.fill_(value)
        engine.cache.v.fill_(value)
    found = [[engine.submit(prompt, Sampling(max_tokens=5)) for prompt in PROMPTS] for engine in engines]
    for engine in engines:
        engine.run()
    assert [r.logprobs for r in found[0]] == [r.logprobs for r in found[1]]


def test_a_shared_beginning_is_computed_once_and_changes_nothing(model):
    shots = [LONG, picture(24, 24, 1), LONG, picture(12, 24, 2), "that was it. "]
    prompts = [[*shots, f"question {i}: how many? answer:"] for i in range(6)]
    alone = [Engine(model) for _ in prompts]
    truth = []
    for engine, prompt in zip(alone, prompts):
        truth.append(engine.submit(prompt, Sampling(max_tokens=5)))
        engine.run()
    engine = Engine(model)
    found = [engine.submit(prompt, Sampling(max_tokens=5)) for prompt in prompts]
    engine.step()
    assert len(engine.running) == 1  # the others wait for what it computes
    engine.step()
    assert len(engine.running) == 6
    engine.run()
    assert [r.tokens for r in found] == [r.tokens for r in truth]
    for a, b in zip(found, truth):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    lengths = [len(r.document.tokens) for r in found]
    common = len(encode_prompts(model, [shots])[0].tokens) // PAGE * PAGE
    assert engine.computed <= lengths[0] + sum(n - common for n in lengths[1:])
    assert engine.encoded == 2
    assert drained(engine)


def test_other_images_behind_the_same_tokens_share_nothing(model):
    def prompt(seed):
        return [LONG[:20], picture(24, 24, seed), LONG, "how many? answer:"]

    a, b = encode_prompts(model, [prompt(1), prompt(2)])
    assert np.array_equal(a.tokens, b.tokens)
    mine, other = (names_of(d, model.tokenizer.image) for d in (a, b))
    first = int(np.flatnonzero(a.tokens == model.tokenizer.image)[0]) // PAGE
    assert mine[:first] == other[:first]
    assert not set(mine[first:]) & set(other[first:])
    engine = Engine(model)
    found = []
    for seed in (1, 2):
        found.append(engine.submit(prompt(seed), Sampling(max_tokens=6)))
        engine.run()
    assert found[1].tokens == of_full_passes(model, b, 6)[0][: len(found[1].tokens)]
    assert found[1].logprobs != found[0].logprobs


def test_a_page_is_named_by_the_images_it_holds_a_part_of():
    """An image over the border of pages is part of both names; a later one of neither."""
    tokens = np.array([1] * (PAGE - 2) + [IMAGE] * SLOTS + [5] * PAGE + [IMAGE] * SLOTS + [6] * PAGE, np.int32)
    a, b, c = (View("image", np.full((PATCH, PATCH, 3), n, np.uint8)) for n in (1, 2, 3))
    plain, first, second = (names_of(Document(tokens, images, "")) for images in ((a, b), (c, b), (a, c)))
    assert plain[0] != first[0]
    assert plain[0] == second[0]
    assert plain[1] == second[1] or tokens[PAGE : 2 * PAGE].tolist().count(IMAGE) > SLOTS - 2
    assert plain[2] != second[2]
    others = [View("image", a.values.reshape(-1, 2, 3)), View("image", a.values.view(np.int8)), View("sound", a.values)]
    assert len({view_digest(x) for x in (a, b, c, *others)}) == 6


def test_a_thousand_requests_lose_none_mix_up_none_and_leak_no_page(model):
    """Random lengths, images, settings, cancels and refusals, a small cache and a short queue."""
    draw = random.Random(0)
    engine = Engine(model, tokens=1024, batch=8, queue=8, prefill=128, feature_bytes=2000)
    pictures = [picture(12, 12 * n, n) for n in (1, 2, 3)]
    made, refused, kinds = [], 0, {}
    for number in range(1000):
        parts = [LONG[: draw.randint(0, 60)]]
        for _ in range(draw.randint(0, 2)):
            parts += [draw.choice(pictures), f"{draw.randint(0, 3)}"]
        sampling = Sampling(
            max_tokens=draw.randint(1, 12), temperature=draw.choice([0, 0, 0.8]), top_k=draw.choice([0, 5]), seed=number
        )
        if number % 50 == 7:
            with pytest.raises(UserError, match="the cache holds at most 1024"):
                engine.submit([LONG * 200], sampling)
            continue
        try:
            made.append((parts, sampling, engine.submit(parts, sampling)))
        except Busy:
            refused += 1
        if draw.random() < 0.1 and made:
            engine.cancel(draw.choice(made[-12:])[2])
        for _ in range(draw.choice([0, 0, 1, 3])):
            engine.step()
    engine.run()
    assert drained(engine)
    assert refused + len(made) == 980
    for _, sampling, request in made:
        kinds[request.finish] = kinds.get(request.finish, 0) + 1
        assert request.finish in ("stop", "length", "cancelled")
        assert len(request.tokens) == sampling.max_tokens or request.finish != "length"
    assert min(kinds["cancelled"], kinds["length"], refused) > 10
    for parts, sampling, request in draw.sample([m for m in made if m[2].finish != "cancelled"], 40):
        alone = Engine(model)
        truth = alone.submit(parts, sampling)
        alone.run()
        assert (request.tokens, request.text) == (truth.tokens, truth.text)


def free(cache):
    return [page for page in range(cache.pages) if cache.free[page]]


def test_pages_go_to_who_needs_them_and_known_ones_last(model):
    cache = Cache(model.config.decoder, 6, torch.device("cpu"), torch.float32)
    a = cache.allocate(3)
    cache.register(a, [b"1", b"2"])
    cache.release(a)
    assert (cache.available, free(cache), list(cache.idle)) == (6, [2, 3, 4, 5], [1, 0])
    b = cache.allocate(4, cache.find([b"1", b"x"]))
    assert b == [0, 3, 4, 5]  # behind the place of the last that were taken
    assert cache.allocate(3) is None
    assert cache.available == 2
    c = cache.allocate(2)  # the known one nobody uses is given up
    assert sorted(c) == [1, 2]
    assert cache.find([b"1", b"2"]) == [0]
    cache.release(b)
    cache.release(c)
    assert cache.available == 6


def test_a_document_grows_into_the_next_page_or_else_into_any(model):
    cache = Cache(model.config.decoder, 8, torch.device("cpu"), torch.float32)
    a, b = cache.allocate(2, ahead=4), cache.allocate(2)
    assert (a, b) == ([0, 1], [4, 5])  # with room between them
    assert [cache.extend(1), cache.extend(2)] == [2, 3]
    cache.release([2])
    assert cache.extend(3) in (2, 6, 7)
    cache.register(b, [b"1", b"2"])
    cache.release(b)
    assert cache.allocate(4, leave=1) is None
    assert [cache.extend(7) for _ in range(4)][-1] == 4  # the first page of what is known goes last
    assert cache.extend(3) is None
    assert (cache.page_of, sum(cache.free), cache.available) == ({}, 0, 0)


def test_the_best_of_several_comes_first_and_their_prompt_is_computed_once(model):
    engine = Engine(model)
    prompt, sampling = [LONG, picture(24, 24, 1), LONG, "answer:"], Sampling(max_tokens=6, temperature=1.5, seed=3)
    found = n_best(engine, prompt, 5, sampling)
    means = [sum(r.logprobs) / len(r.logprobs) for r in found]
    assert means == sorted(means, reverse=True)
    assert len({r.text for r in found}) > 1
    length = len(found[0].document.tokens)
    assert engine.computed <= length + 4 * (length - length // PAGE * PAGE + PAGE)
    assert engine.encoded == 1
    alone = {generate(model, [prompt], max_tokens=6, temperature=1.5, seed=3 + i)[0] for i in range(5)}
    assert {r.text for r in found} == alone


def test_what_is_forgotten_is_computed_again(model):
    engine = Engine(model)
    prompt = [LONG, picture(24, 24, 1), LONG, "answer:"]
    first = engine.submit(prompt, Sampling(max_tokens=3))
    engine.step()
    engine.forget()  # while it runs
    engine.run()
    again = engine.submit(prompt, Sampling(max_tokens=3))
    engine.run()
    assert again.tokens == first.tokens
    assert (engine.computed, engine.encoded) == (2 * len(first.document.tokens), 2)
    assert drained(engine)


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_narrow_weights_generate_and_leave_the_model_alone(model, how, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantize, "MIN_NUMBERS", 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine = Engine(model, weights=how)
    assert (engine.one_step is None) == (how == "int4")
    found = [engine.submit(prompt, Sampling(max_tokens=6)) for prompt in PROMPTS]
    engine.run()
    assert drained(engine)
    wide = [r.logprobs[0] for r in found]
    other = Engine(model)
    truth = [other.submit(prompt, Sampling(max_tokens=6)) for prompt in PROMPTS]
    other.run()
    assert wide == pytest.approx([r.logprobs[0] for r in truth], abs=0.1 if how == "int8" else 1.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_answers_are_scored_as_full_passes_do(model):
    prompts = [[LONG, picture(), "how many? answer:"], ["one"]]
    answers = [[" two", " three", " seven"], [" and", " or"]]
    found = score(model, prompts, answers)
    for d, of, scores in zip(encode_prompts(model, prompts), answers, found):
        for answer, value in zip(of, scores):
            ids = model.tokenizer.encode(answer)
            grown = Document(np.array([*d.tokens, *ids], np.int32), d.media, "")
            with torch.inference_mode():
                logits = logits_of(model, packed([grown])).log_softmax(-1)[-len(ids) - 1 : -1]
            assert value == pytest.approx(float(logits.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)
    first, again = score(model, prompts[:1], [[LONG, LONG]])[0]  # all of whose pages are known by then
    assert again == pytest.approx(first, abs=1e-4)
    with pytest.raises(UserError, match="empty"):
        score(model, prompts[:1], [[""]])


@pytest.mark.parametrize("settings, message", [
    ({"batch": 0}, "batch is 0"), ({"queue": 0}, "queue is 0"), ({"tokens": 0}, "tokens is 0"),
    ({"feature_bytes": -1}, "feature_bytes is -1"), ({"prefill": 0}, "prefill is 0"),
    ({"image_patches": 0}, "image_patches is 0"), ({"tokens": 1 << 50}, "no memory for a cache"),
])  # fmt: skip
def test_an_engine_that_could_do_nothing_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        Engine(model, **settings)


@pytest.mark.parametrize("prompt, kind", [("one", "str"), ([None], "NoneType"), ([np.zeros((4, 4, 3))], "ndarray")])
def test_what_is_no_prompt_is_told(model, prompt, kind):
    with pytest.raises(UserError, match=f"a prompt is a sequence of texts and (media|PIL images), not {kind}"):
        generate(model, [prompt])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "I", "1", "CMYK", "F"])
def test_images_of_any_mode_are_taken(model, mode):
    grey = Image.new("L", (24, 12), 200)
    given = grey.convert("I").convert("I;16") if mode == "I;16" else grey.convert(mode)
    [document] = encode_prompts(model, [[given]])
    assert document.media[0].values.shape == (12, 24, 3)


def test_images_that_are_none_are_told(model):
    with pytest.raises(UserError, match="0 x 4"):
        generate(model, [[Image.new("RGB", (0, 4))]])


class Failing(Engine):
    """An Engine whose next decode or prefill raises the error of that name in `errors`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.errors: dict[str, BaseException] = {}

    def decode(self, requests):
        if error := self.errors.pop("decode", None):
            raise error
        return super().decode(requests)

    def prefill(self, due):
        if error := self.errors.pop("prefill", None):
            raise error
        return super().prefill(due)


def test_a_prefill_that_fails_costs_those_that_run_nothing(model):
    engine = Failing(model)
    first = engine.submit([LONG], Sampling(max_tokens=6))
    engine.step()
    second = engine.submit(["one"], Sampling(max_tokens=6))
    engine.errors["prefill"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.run()
    assert second.finish == "failed"
    assert first.finish in ("stop", "length")
    assert drained(engine)


def test_answers_go_with_their_prompts(model):
    for answers in ([[" one"]], [" one", " two"]):
        with pytest.raises(UserError, match="2 prompts"):
            score(model, [["one"], ["two"]], answers)


def test_one_stop_may_be_a_string(model):
    assert Sampling(stop="six").stop == ("six",)
    plain = generate(model, [PROMPTS[0]], max_tokens=16)[0]
    assert generate(model, [PROMPTS[0]], max_tokens=16, stop=plain[3:6]) == [plain.split(plain[3:6])[0]]


def test_a_finished_request_says_why_it_ended(model):
    engine = Engine(model)
    whole = engine.submit([LONG], Sampling(max_tokens=16))
    engine.run()
    assert (whole.finish, len(whole.tokens)) == ("length", 16)
    stopped = engine.submit([LONG], Sampling(max_tokens=16, stop=whole.text[:2]))
    engine.run()
    assert (stopped.finish, stopped.text) == ("stop", "")
    assert len(stopped.tokens) < 16


def penalized(logits, tokens, penalty):
    """Return logits [V] by CTRL's formula, one token after the other."""
    logits = logits.clone()
    for token in set(tokens):
        logits[token] *= penalty ** (-1 if logits[token] > 0 else 1)
    return logits


def test_sampled_texts_do_not_depend_on_who_else_is_there(model):
    options = {"max_tokens": 8, "temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3}
    together = generate(model, PROMPTS, seed=5, **options)
    assert together == [generate(model, [prompt], seed=5 + i, **options)[0] for i, prompt in enumerate(PROMPTS)]


def test_what_a_prompt_meets_in_the_cache_is_within_rounding(model):
    engine = Engine(model)
    prompt = [LONG, picture(24, 24, 1), LONG, "answer:"]
    first = engine.submit(prompt, Sampling(max_tokens=1))
    engine.run()
    computed = engine.computed
    again = engine.submit(prompt, Sampling(max_tokens=1))
    engine.run()
    assert engine.computed - computed <= PAGE
    assert relative_error(torch.tensor(again.logprobs), torch.tensor(first.logprobs)) < 1e-5


@pytest.mark.parametrize(
    "settings, message",
    [({"max_tokens": -1}, "max_tokens is -1"), ({"top_k": -1}, "top_k"), ({"repetition_penalty": 0.0}, "repetition"),
     ({"top_p": 0.0}, "top_p")],
)  # fmt: skip
def test_settings_that_cannot_be_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_give_the_decoder_itself_and_leave_it_alone(tied, monkeypatch):
    monkeypatch.setattr(packing, "MIN_NUMBERS", 1)
    decoder = small_mm1(experts=4, tied=tied).eval().decoder
    names = [name for name, _ in decoder.named_parameters()]
    twin, head = blocked_weights(decoder)
    x, positions, cu = torch.randn(11, 32), torch.arange(11), torch.tensor([0, 11], dtype=torch.int32)
    with torch.inference_mode():
        truth, found = (d(x, positions, cu)[0] for d in (decoder, twin))
        assert relative_error(found, truth) < 1e-5
        assert sum(type(m) is BlockedLinear for m in (*twin.modules(), head)) == 8
        assert relative_error(head(found), truth @ decoder.head_weight.T) < 1e-5
    assert [name for name, _ in decoder.named_parameters()] == names
    assert all(type(m) is not BlockedLinear for m in decoder.modules())
    mine, other = (dict(d.named_parameters()) for d in (decoder, twin))
    assert all(mine[name] is p for name, p in other.items())


def test_a_listener_that_fails_costs_the_others_nothing(model):
    def fail(_):
        raise RuntimeError("gone")

    prompts = [[LONG], [LONG[10:]], ["one"]]
    engine = Engine(model)
    found = [engine.submit(p, Sampling(max_tokens=6), fail if i == 1 else None) for i, p in enumerate(prompts)]
    with pytest.raises(RuntimeError, match="gone"):
        engine.run()
    engine.run()
    assert found[1].finish == "failed"
    for i in (0, 2):
        other = Engine(model)
        alone = other.submit(prompts[i], Sampling(max_tokens=6))
        other.run()
        assert found[i].tokens == alone.tokens
    assert drained(engine)


def test_a_penalty_is_of_prompt_and_text_and_log_probabilities_are_without_it(model):
    engine, given = Engine(model), document(12)
    request = engine.submit(given, Sampling(max_tokens=8, repetition_penalty=1e6))
    engine.run()
    ids = given.tokens.tolist()
    for token, logprob in zip(request.tokens, request.logprobs):
        plain = of_logits(model, ids, given)
        assert token == int(penalized(plain, ids, 1e6).argmax())
        assert logprob == pytest.approx(float(plain.log_softmax(-1)[token]), abs=1e-4)
        ids.append(token)
    assert len(set(request.tokens)) == len(request.tokens)


def of_logits(model, ids, given):
    grown = type(given)(np.array(ids, np.int32), given.media, "")
    with torch.inference_mode():
        return logits_of(model, packed([grown]))[-1]


def test_a_step_takes_prompts_up_to_its_rows_the_shortest_first_and_half_of_the_oldest(model):
    engine = Engine(model, prefill=50)
    requests = [engine.submit(document(count), Sampling(max_tokens=1)) for count in (60, 20, 20, 20)]
    computed = []
    while engine.step():
        computed.append([request.computed for request in requests])
    assert computed == [[25, 21, 4, 0], [50, 21, 21, 8]]  # the last is the third step, after which there is no more
    assert [request.computed for request in requests] == [61, 21, 21, 21]


def test_the_best_is_by_the_mean_also_of_unequal_lengths(monkeypatch):
    made = [SimpleNamespace(logprobs=logprobs) for logprobs in ([-1.0] * 4, [-1.5], [-0.5] * 9)]
    monkeypatch.setattr(generating, "several", lambda *_: made)
    found = n_best(None, ["one"], 3, Sampling())
    assert [len(request.logprobs) for request in found] == [9, 4, 1]


def test_more_than_may_wait_are_continued_in_turn(model):
    engine = Engine(model, batch=1, queue=2)
    other = engine.submit([LONG], Sampling(max_tokens=3))
    found = generating.several(engine, ["one"], 5, Sampling(max_tokens=4, temperature=1.0, seed=7))
    alone = [generate(model, [["one"]], max_tokens=4, temperature=1.0, seed=7 + i)[0] for i in range(5)]
    assert [request.text for request in found] == alone
    assert other.finish
    assert drained(engine)


class Inside:
    """In the place of Graphs: steps by decode.cpp, and what was to be drawn inside."""

    def __init__(self, step):
        self.step, self.draws = step, []

    def __call__(self, tokens, positions, tables, draws):
        self.draws.append(list(draws))
        return self.step(tokens, positions, tables)


def test_by_graphs_penalties_are_outside(model):
    """A greedy text with a penalty, among others, is the same."""
    sampling = Sampling(max_tokens=6, repetition_penalty=1.8)
    found = []
    for by in ("one call", "graphs"):
        engine = Engine(model)
        if by == "graphs":
            engine.graphs, engine.one_step = Inside(engine.one_step), None
        requests = [engine.submit([LONG], s) for s in (sampling, Sampling(max_tokens=6))]
        engine.run()
        found.append([r.tokens for r in requests])
        if by == "graphs":
            assert engine.graphs.draws
            assert all(draw == GREEDY for draws in engine.graphs.draws for draw in draws)
    assert found[0] == found[1]


def test_a_prefill_passes_the_length_of_its_longest_prompt_to_attention(model, monkeypatch):
    """Without it, torch's kernel launches programs for all rows of the batch in each of its segments."""
    lengths, attention = [], cache_module.attention
    monkeypatch.setattr(
        cache_module,
        "attention",
        lambda *args, **known: lengths.append(known["max_length"]) or attention(*args, **known),
    )
    monkeypatch.setattr(engine_module, "step_of", lambda *_: None)
    engine = Engine(model)
    for size in (40, 3, 7):
        engine.submit(document(size), Sampling(max_tokens=1))
    engine.run()
    assert lengths == [41] * model.config.decoder.layers  # with begin-of-text


def test_pages_used_longest_ago_go_first_and_forgotten_ones_are_free(model):
    cache = Cache(model.config.decoder, 4, torch.device("cpu"), torch.float32)
    for name in (b"1", b"2", b"3"):
        page = cache.allocate(1)
        cache.register(page, [name])
        cache.release(page)
    assert cache.allocate(5, cache.find([b"3"])) is None  # a held page is no room
    assert cache.allocate(2)
    assert (cache.find([b"1"]), cache.find([b"3"])) == ([], [2])
    cache.clear()
    assert cache.available == 2
    assert cache.find([b"3"]) == []


def test_only_a_lack_of_memory_is_told_as_one(model):
    with pytest.raises(UserError, match="no memory for a cache of 18014398509481984 tokens"):
        Cache(model.config.decoder, 1 << 50, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="negative dimension"):
        Cache(model.config.decoder, -1, torch.device("cpu"), torch.float32)


def test_what_two_computed_is_known_once(model):
    cache = Cache(model.config.decoder, 2, torch.device("cpu"), torch.float32)
    for page in (cache.allocate(1), cache.allocate(1)):
        cache.register(page, [b"1"])
        cache.release(page)
    assert (cache.find([b"1"]), free(cache), cache.available) == ([0], [1], 2)
    assert sorted(cache.allocate(2)) == [0, 1]
