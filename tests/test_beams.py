"""Beam search gives transformers' sequences, in any company, and copies no more of the cache than it must."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from small import small_mm1, small_model

from mm1.engine.data.document import Document
from mm1.engine.infer.beams import Beams, pages_needed
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import Sampling
from mm1.errors import UserError

transformers = pytest.importorskip("transformers")
EOS = 2


@lru_cache
def llama(seed, eos_bias=0.0):
    """A random Llama of transformers, and an mm1 that holds its weights. eos_bias makes texts end at odd places."""
    from mm1.engine.convert.weights import from_hf

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=EOS,
        pad_token_id=0, tie_word_embeddings=False, initializer_range=0.35,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        theirs.lm_head.weight[EOS] += eos_bias * theirs.lm_head.weight[5:9].mean(0)
    c = small_model()
    ours = from_hf(vision=c.vision, connector=c.connector, decoder=(config.to_dict(), theirs.state_dict()))
    ours.tokenizer = small_mm1().tokenizer
    assert ours.tokenizer.eos == EOS
    return theirs, ours.eval()


def prompts_of(seed, lengths=(5, PAGE, 2 * PAGE + 3, 1)):
    draw = np.random.default_rng(seed)
    return [Document(np.array([1, *draw.integers(4, 384, n - 1)], np.int32), (), "p") for n in lengths]


def theirs_of(model, prompts, criteria=None, **settings):
    """New tokens of each prompt, all in one batch with padding before them, up to the end token."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(torch.from_numpy(p.tokens).long(), (longest - len(p.tokens), 0))
                       for p in prompts])  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=settings.pop("max_tokens"),
            stopping_criteria=criteria and criteria(longest), **settings,
        )[:, longest:].tolist()  # fmt: skip
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]


def ours_of(model, prompts, batch=64, **settings):
    engine = Engine(model, tokens=4096, batch=batch)
    requests = [engine.submit(prompt, Sampling(**settings)) for prompt in prompts]
    engine.run()
    assert engine.cache.available == engine.cache.pages
    return requests


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -2.0])
def test_sequences_are_those_of_transformers(penalty, early):
    lengths, ended = set(), 0
    for seed in range(3):
        theirs, ours = llama(seed, eos_bias=3.0)
        prompts = prompts_of(seed)
        for beams in (2, 3, 5):
            settings = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early, "max_tokens": 19}
            found = ours_of(ours, prompts, **settings)
            assert [request.tokens for request in found] == theirs_of(theirs, prompts, **settings)
            for request in found:
                assert request.finish == ("stop" if request.tokens[-1] == EOS else "length")
                assert len(request.logprobs) == len(request.tokens)
                lengths.add(len(request.tokens))
                ended += request.finish == "stop"
    assert ended > 3
    assert len(lengths) > 2


def test_one_beam_is_greedy_and_one_token_is_the_likeliest():
    theirs, ours = llama(0, eos_bias=3.0)
    prompts = prompts_of(0)
    greedy = [request.tokens for request in ours_of(ours, prompts, max_tokens=9)]
    assert [request.tokens for request in ours_of(ours, prompts, num_beams=1, max_tokens=9)] == greedy
    assert theirs_of(theirs, prompts, max_tokens=9) == greedy
    one = ours_of(ours, prompts, num_beams=4, max_tokens=1)
    assert [request.tokens for request in one] == [tokens[:1] for tokens in greedy]


def test_log_probabilities_are_those_of_a_full_pass_and_beams_find_no_worse_a_text_than_greedy():
    theirs, ours = llama(1)
    (prompt,) = prompts_of(4, (11,))
    (greedy,), (found,) = (ours_of(ours, [prompt], num_beams=n, length_penalty=0.0, max_tokens=12) for n in (1, 5))
    ids = torch.tensor([[*prompt.tokens.tolist(), *found.tokens]])
    with torch.no_grad():
        logprobs = theirs(ids).logits[0, 10:-1].log_softmax(-1).gather(1, ids[0, 11:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), logprobs, atol=2e-5, rtol=1e-5)
    assert sum(found.logprobs) > sum(greedy.logprobs)


def test_company_changes_nothing():
    """Several searches of other widths, greedy and sampled texts at once, in little room, with pages in common."""
    _, ours = llama(2, eos_bias=3.0)
    (common,) = prompts_of(7, (2 * PAGE + 1,))
    prompts = [*prompts_of(2), common, Document(np.append(common.tokens, np.int32(9)), (), "p"), common]
    how = [Sampling(max_tokens=14, num_beams=n, length_penalty=p) for n, p in
           ((3, 0.0), (1, 1.0), (5, -2.0), (2, 1.0), (3, 0.0), (4, 1.0))]  # fmt: skip
    how.append(Sampling(max_tokens=14, temperature=1.0, seed=3))
    alone = []
    for prompt, sampling in zip(prompts, how):
        engine = Engine(ours, tokens=1024)
        alone.append(engine.submit(prompt, sampling))
        engine.run()
    for batch, tokens in ((5, 256), (7, 400), (64, 4096)):
        engine = Engine(ours, tokens=tokens, batch=batch)
        for _ in range(2):  # the second time behind pages that the first left
            found = [engine.submit(prompt, sampling) for prompt, sampling in zip(prompts, how)]
            rows = 0
            while engine.step():
                rows = max(rows, sum(len(request.last_rows()) for request in engine.running))
            assert [request.tokens for request in found] == [request.tokens for request in alone]
            assert engine.cache.available == engine.cache.pages
            assert rows <= batch


def test_without_the_compiled_step_too(monkeypatch):
    theirs, ours = llama(0, eos_bias=3.0)
    monkeypatch.setattr("mm1.engine.infer.engine.step_of", lambda *_: None)
    settings = {"num_beams": 3, "length_penalty": 0.0, "max_tokens": 12}
    prompts = prompts_of(5)
    found = ours_of(ours, prompts, **settings)
    assert [request.tokens for request in found] == theirs_of(theirs, prompts, **settings)


def test_behind_graphs_too():
    from test_engine import Inside

    theirs, ours = llama(0, eos_bias=3.0)
    settings = {"num_beams": 3, "length_penalty": 0.0, "max_tokens": 12}
    prompts = prompts_of(5)
    engine = Engine(ours, tokens=4096)
    engine.graphs, engine.one_step = Inside(engine.one_step), None
    found = [engine.submit(prompt, Sampling(**settings)) for prompt in prompts]
    engine.run()
    assert [request.tokens for request in found] == theirs_of(theirs, prompts, **settings)
    assert max(map(len, engine.graphs.draws)) == 3 * len(prompts)


def test_texts_end_before_stop_strings_as_transformers_criteria_end_them():
    theirs, ours = llama(1)
    tokenizer, prompts = ours.tokenizer, prompts_of(3)
    settings = {"num_beams": 3, "length_penalty": 0.0, "max_tokens": 16}
    plain = [tokenizer.decode(request.tokens) for request in ours_of(ours, prompts, **settings)]
    stops = [text[i : i + 2] for text, i in zip(plain, (2, 4, 6, 8))]

    class Stops(transformers.StoppingCriteria):
        def __init__(self, start):
            self.start = start

        def __call__(self, ids, scores, **_):
            texts = [tokenizer.decode(row[self.start :].tolist()) for row in ids]
            return torch.tensor([any(stop in text for stop in stops) for text in texts])

    truth = theirs_of(theirs, prompts, lambda start: transformers.StoppingCriteriaList([Stops(start)]), **settings)
    found = ours_of(ours, prompts, stop=stops, **settings)
    ended = 0
    for request, tokens in zip(found, truth):
        assert request.tokens == tokens[: len(request.tokens)]  # behind it is padding
        assert set(tokens[len(request.tokens) :]) <= {0, EOS}
        assert not any(stop in request.text for stop in stops)
        assert tokenizer.decode(request.tokens).startswith(request.text)
        ended += request.finish == "stop"
    assert ended


def test_images_and_streams_go_with_beams():
    from test_generate import PROMPTS

    model = small_mm1(seed=3).eval()
    settings = {"num_beams": 3, "length_penalty": 0.0, "max_tokens": 8}
    pieces = [[] for _ in PROMPTS]
    together = generate(model, PROMPTS, **settings, on_text=lambda i, piece: pieces[i].append(piece))
    assert together == [generate(model, [prompt], **settings)[0] for prompt in PROMPTS]
    assert ["".join(of) for of in pieces] == together
    assert together != generate(model, PROMPTS, max_tokens=8)


def test_a_search_that_is_cancelled_leaves_its_best_text_and_its_pages():
    _, ours = llama(0)
    engine = Engine(ours, tokens=1024)
    first, other = (engine.submit(prompt, Sampling(max_tokens=12, num_beams=3)) for prompt in prompts_of(0)[:2])
    for _ in range(6):
        engine.step()
    best = first.beams.best
    engine.cancel(first)
    assert (first.finish, first.tokens) == ("cancelled", list(best.tokens))
    assert len(first.tokens) == 6
    assert first.text == ours.tokenizer.decode(first.tokens)
    engine.run()
    assert other.tokens == ours_of(ours, prompts_of(0)[1:2], max_tokens=12, num_beams=3)[0].tokens
    assert engine.cache.available == engine.cache.pages


def test_a_listener_that_fails_fails_its_own_search_alone():
    _, ours = llama(0)
    engine, prompts = Engine(ours, tokens=1024), prompts_of(0)[:2]

    def fails(_):
        raise RuntimeError("listener")

    how = Sampling(max_tokens=5, num_beams=3)
    bad, good = engine.submit(prompts[0], how, fails), engine.submit(prompts[1], how)
    with pytest.raises(RuntimeError, match="listener"):
        engine.run()
    engine.run()
    assert (bad.finish, good.finish) == ("failed", "length")
    assert engine.cache.available == engine.cache.pages


@pytest.mark.parametrize("penalty", [-10.0, 10.0])
def test_the_steepest_penalties_give_a_long_search_finite_scores(penalty):
    """Of hypotheses that end at each length up to 4096; the length to the power of 150 would be no number."""
    how = Sampling(max_tokens=4096, num_beams=2, length_penalty=penalty, early_stopping="never")
    beams = Beams(1, range(pages_needed(1, how)), how, lambda tokens: tokens[-1] == EOS)
    steps = 0
    while not beams.done:
        rows = np.tile([[EOS, 5, 6, 7]], (len(beams.live), 1))
        beams.advance(np.full(rows.shape, -0.5), rows)
        steps += 1
        scores = np.array([score for score, _ in beams.finished])
        assert np.isfinite(scores).all()
        assert (scores < 0).all()
    assert steps == 4096 if penalty > 0 else steps > 1


@pytest.mark.parametrize("prompt", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_beams_share_what_they_can_and_stay_within_their_pages(prompt):
    """Against rows of a plain table that is copied whole at every step."""
    draw = np.random.default_rng(prompt)
    how = Sampling(max_tokens=40, num_beams=4)
    pages = draw.permutation(200)[: pages_needed(prompt, how)].tolist()
    beams = Beams(prompt, pages, how, lambda tokens: False)
    rows = np.full((200, PAGE), -1)  # what each row of each page holds
    for i in range(prompt):
        rows[pages[i // PAGE], i % PAGE] = 1000 + i
    copied = 0
    for _ in range(39):
        tokens = np.sort(draw.integers(0, 900, (len(beams.live), 8)), axis=1)
        logprobs = -np.sort(draw.exponential(size=(len(beams.live), 8)), axis=1)
        pairs = beams.advance(logprobs, tokens)
        assert not {source for source, _ in pairs} & {target for _, target in pairs}
        for source, target in pairs:
            rows[target] = rows[source]
        copied += len(pairs)
        places = [(beam.table[-1], (prompt + len(beam.tokens) - 1) % PAGE) for beam in beams.live]
        assert len(set(places)) == len(beams.live)  # nobody writes where another does
        for place, beam in zip(places, beams.live):
            rows[place] = beam.tokens[-1]
        for beam in beams.live:
            held = [rows[beam.table[i // PAGE], i % PAGE] for i in range(prompt + len(beam.tokens))]
            assert held == [*range(1000, 1000 + prompt), *beam.tokens]
            assert set(beam.table.tolist()) <= set(pages)
            assert beam.table.tolist()[: prompt // PAGE] == pages[: prompt // PAGE]
    assert copied <= 39 * 3


@pytest.mark.parametrize("settings, message", [
    ({"num_beams": 0}, "num_beams is 0, expected ≥ 1"),
    ({"length_penalty": float("nan")}, "length_penalty is nan, expected ≥ -10 and ≤ 10"),
    ({"length_penalty": 150.0}, "length_penalty is 150.0, expected ≥ -10 and ≤ 10"),
    ({"length_penalty": -10.5}, "length_penalty is -10.5, expected ≥ -10 and ≤ 10"),
    ({"early_stopping": "soon"}, "early_stopping is 'soon', expected False, True or"),
    ({"num_beams": 2, "temperature": 0.5}, "2 beams with temperature"),
    ({"num_beams": 2, "repetition_penalty": 1.5}, "2 beams with temperature, penalties"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_more_beams_than_the_batch_or_the_vocabulary_has_room_for_are_told():
    model = small_mm1(seed=3).eval()
    document = encode_prompts(model, [["one"]])[0]
    for batch, beams, most in ((4, 5, 4), (400, 193, 192)):
        with pytest.raises(UserError, match=f"num_beams is {beams}, expected at most {most}"):
            Engine(model, batch=batch).submit(document, Sampling(num_beams=beams, max_tokens=2))
    with pytest.raises(UserError, match="the prompt has 2 tokens, the cache of 64 is too small for 5 beams"):
        Engine(model, tokens=64).submit(document, Sampling(num_beams=5, max_tokens=20))


def test_a_search_is_cut_to_what_the_cache_has_room_for():
    """The last token of a beam needs no row: 2 + 14 rows of 3 beams, which share no full page of the prompt."""
    model = small_mm1(seed=3).eval()
    model.tokenizer.eos = -1
    document = encode_prompts(model, [["one"]])[0]
    engine = Engine(model, tokens=64)
    for beams, tokens in ((3, 14), (2, 30), (1, 62)):
        request = engine.submit(document, Sampling(num_beams=beams, max_tokens=100))
        engine.run()
        assert (len(request.tokens), request.finish) == (tokens, "length")
        whole = Engine(model, tokens=4096)
        truth = whole.submit(document, Sampling(num_beams=beams, max_tokens=tokens))
        whole.run()
        assert request.tokens == truth.tokens
