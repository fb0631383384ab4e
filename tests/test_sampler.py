"""Each step of drawing a token is that of vLLM and transformers, and no request changes another's token."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import logits_of, small_mm1
from test_generate import PROMPTS

from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import generate
from mm1.engine.infer.sampler import choose_tokens, draw_tokens
from mm1.engine.infer.sampling import Draw, Sampling
from mm1.errors import UserError

V = 384


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=3).eval()


def request_of(sampling, prompt=(), tokens=()):
    """As much of a Request as drawing looks at."""
    seen = np.unique(np.array([*prompt, *tokens], np.int64))
    return SimpleNamespace(sampling=sampling, seen=seen, counts=Counter(tokens), grammar=None)


def chosen(requests, logits, us=None):
    draws = [request.sampling.draw(u) for request, u in zip(requests, us or [0.5] * len(requests))]
    logs = logits.log_softmax(-1)
    return choose_tokens(requests, logits, logs.argmax(-1).tolist(), logs.max(-1).values.tolist(), draws)


def altered(logits, sampling, prompt, tokens):
    """Logits fp64 [V] after the steps of Sampling's docstring, one token after the other."""
    out = logits.double().clone()
    for token, add in sampling.logit_bias:
        out[token] += add
    for token in {*prompt, *tokens}:
        out[token] *= sampling.repetition_penalty ** (-1 if out[token] > 0 else 1)
    for token, n in Counter(tokens).items():
        out[token] -= n * sampling.frequency_penalty + sampling.presence_penalty
    return out


SETTINGS = [
    {"logit_bias": {3: 4.0, 9: -100.0}}, {"repetition_penalty": 1.7}, {"frequency_penalty": 1.5},
    {"presence_penalty": 1.5}, {"presence_penalty": -2.0, "frequency_penalty": 0.5},
    {"logit_bias": {5: 3.0, 6: -3.0}, "repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 0.4},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bias_and_penalties_are_their_formulas_in_their_order(settings):
    random = np.random.default_rng(0)
    prompt, tokens = random.integers(0, 20, 6).tolist(), random.integers(0, 20, 9).tolist()
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)) * 3
    sampling = Sampling(**settings)
    found = chosen([request_of(sampling, prompt, tokens)] * 50, logits)
    truth = [altered(row, sampling, prompt, tokens) for row in logits]
    assert [choice.token for choice in found] == [int(row.argmax()) for row in truth]
    assert {int(row.argmax()) for row in truth} != {int(row.argmax()) for row in logits}
    plain = logits.double().log_softmax(-1)
    told = [choice.logprob for choice in found]
    assert told == pytest.approx([float(plain[i, c.token]) for i, c in enumerate(found)], abs=1e-5)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2),
                                                 (6, 0.8, 0.0), (8, 0.9, 0.1), (3, 0.5, 0.9)])  # fmt: skip
def test_what_may_be_drawn_is_what_transformers_leaves(top_k, top_p, min_p):
    from transformers.generation import logits_process as theirs

    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(2)) * 2
    warped = theirs.TemperatureLogitsWarper(1.3)(None, logits)
    for wanted, warper in ((top_k, theirs.TopKLogitsWarper), (top_p < 1 and top_p, theirs.TopPLogitsWarper),
                           (min_p, theirs.MinPLogitsWarper)):  # fmt: skip
        warped = warper(wanted)(None, warped) if wanted else warped
    n = 400
    draws = torch.tensor([Draw(1.3, top_p, top_k, (i + 0.5) / n, min_p) for i in range(n)])
    for row, left in zip(logits, warped.softmax(-1)):
        drawn = draw_tokens(row.expand(n, -1), draws)
        shares = drawn.bincount(minlength=30) / n
        assert (shares - left).abs().max() < 1.1 / n
        assert set(drawn.tolist()) <= set(left.nonzero()[:, 0].tolist())


def test_a_token_of_probability_0_is_never_drawn():
    """u may be 1 in fp32."""
    inf = float("inf")
    logits = torch.tensor([[5.0, -inf, 3.0, -inf], [-inf, 0.0, -inf, -inf], [0.0, -300.0, -inf, -inf]])
    draws = torch.tensor([Draw(1.0, 1.0, 0, 1 - 2**-26)] * 3)
    assert draws[:, Draw._fields.index("u")].tolist() == [1.0] * 3
    assert draw_tokens(logits, draws).tolist() == [2, 1, 0]


def test_a_token_depends_on_nobody_else_to_the_bit():
    logits = torch.randn(12, V, generator=torch.Generator().manual_seed(4)) * 3
    logits[:, 100:110] = 3.0  # equal ones
    drawings = [{}, {"temperature": 1.0}, {"temperature": 0.7, "min_p": 0.05}] * 4
    how = [{**settings, **drawing, "top_logprobs": top}
           for settings, drawing, top in zip(SETTINGS * 2, drawings, [0, 20, 3] * 4)]  # fmt: skip
    how[3] = how[7] = {}
    requests = [request_of(Sampling(**settings), range(i), range(0, 3 * i, 2)) for i, settings in enumerate(how)]
    us = [i / 12 for i in range(12)]
    together = chosen(requests, logits, us)
    assert together == [chosen([r], logits[i : i + 1], [us[i]])[0] for i, r in enumerate(requests)]
    backwards = chosen(requests[::-1], logits.flip(0), us[::-1])
    assert together == backwards[::-1]
    assert [len(choice.top) for choice in together] == [r.sampling.top_logprobs for r in requests]


def test_alternatives_are_the_likeliest_of_the_model_whatever_is_drawn(model):
    options = {"max_tokens": 10, "temperature": 1.5, "seed": 3, "logit_bias": {7: 5.0}, "top_logprobs": 5}
    engine = Engine(model, tokens=512)
    request = engine.submit(PROMPTS[0], Sampling(**options))
    plain = engine.submit(PROMPTS[1], Sampling(max_tokens=10, top_logprobs=20))
    engine.run()
    assert len(request.top) == len(request.tokens)
    for top, token, logprob in zip(request.top, request.tokens, request.logprobs):
        values = [value for _, value in top]
        assert len(top) == 5
        assert values == sorted(values, reverse=True)
        assert logprob <= values[0]
        assert dict(top).get(token, logprob) == logprob
    assert [top[0] for top in plain.top] == list(zip(plain.tokens, plain.logprobs))
    assert all(sum(np.exp([value for _, value in top])) < 1 for top in plain.top)


def test_a_text_grows_by_its_penalties_as_when_each_step_is_made_by_hand(model):
    never = {model.tokenizer.eos: -100, model.tokenizer.image: -100}
    settings = {"frequency_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": never}
    engine = Engine(model, tokens=1024)
    request = engine.submit(["one"], Sampling(max_tokens=24, **settings))
    others = [engine.submit(prompt, Sampling(max_tokens=24, temperature=1.0, seed=1)) for prompt in PROMPTS]
    engine.run()
    grown = []
    for _ in range(24):
        logits = logits_behind(model, [*request.document.tokens.tolist(), *grown])
        grown.append(int(altered(logits, Sampling(**settings), (), grown).argmax()))
    assert request.tokens == grown
    assert len(set(grown)) > 8
    assert all(other.finish for other in others)


def logits_behind(model, ids):
    from mm1.engine.data.batch import exact_budget, pack
    from mm1.engine.data.document import Document

    document = Document(np.array(ids, np.int32), (), "test")
    batch = pack([document], exact_budget([document], 4), image_id=3, patch=4, slots=4)
    with torch.inference_mode():
        return logits_of(model, batch)[-1]


def test_generate_takes_every_setting(model):
    plain = generate(model, [["one"]], max_tokens=8)
    biased = generate(model, [["one"]], max_tokens=8, logit_bias={model.tokenizer.eos: 100})
    assert biased == [""]
    assert generate(model, [["one"]], max_tokens=8, frequency_penalty=2.0, presence_penalty=2.0) != plain
    assert generate(model, [["one"]], max_tokens=8, temperature=1.0, min_p=1.0, seed=1) == plain


@pytest.mark.parametrize("settings, message", [
    ({"min_p": 1.5}, "min_p is 1.5, expected ≥ 0 and ≤ 1"),
    ({"top_logprobs": 21}, "top_logprobs is 21, expected ≥ 0 and ≤ 20"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"), ({"logit_bias": {-1: 1.0}}, "logit_bias is"),
    ({"logit_bias": {3: float("inf")}}, "logit_bias is"), ({"num_beams": 2, "logit_bias": {1: 1.0}}, "2 beams with"),
    ({"num_beams": 2, "max_tokens": 0}, "max_tokens is 0"), ({"num_beams": 2, "top_logprobs": 2}, "2 beams with"),
    ({"logit_bias": {5: 1e39}}, "logit_bias is"), ({"repetition_penalty": 1e-46}, "repetition_penalty is 1e-46"),
    ({"repetition_penalty": 1e39}, "repetition_penalty"), ({"frequency_penalty": -1e39}, "frequency_penalty is -1e"),
    ({"presence_penalty": -1e300}, "presence_penalty is -1e"), ({"top_k": 10**400}, "top_k is 1000"),
    ({"temperature": float("inf")}, "temperature is inf, expected ≥ 0 and ≤ 1000000"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_a_bias_of_a_token_that_is_not_there_is_told(model):
    size = model.config.decoder.vocabulary
    with pytest.raises(UserError, match=f"logit_bias has token {size}, expected 0 to {size - 1}"):
        Engine(model, tokens=128).submit(["one"], Sampling(logit_bias={size: 1.0}))


def test_no_tokens_are_made_of_none(model):
    engine = Engine(model, tokens=64)
    request = engine.submit(["one"], Sampling(max_tokens=0))
    engine.run()
    assert (request.text, request.tokens, request.finish) == ("", [], "length")


def test_settings_can_be_compared_and_hashed():
    assert Sampling(logit_bias={3: 1.0}) == Sampling(logit_bias=[(3, 1.0)])
    assert len({Sampling(logit_bias={3: 1.0}), Sampling(logit_bias=((3, 1.0),)), Sampling()}) == 2
    assert json.dumps(Sampling().logit_bias) == "[]"
