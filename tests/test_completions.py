"""/v1/completions gives the Engine's texts, and the scores of prompts that transformers would give."""

import json
import threading

import numpy as np
import pytest
import torch
from service import (  # noqa: F401, fixtures
    client_fixture,
    http_request,
    model_fixture,
    openai,
    openai_client,
    port_fixture,
    run_alone,
    served_fixture,
    serving,
)
from small import logits_of

from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.generate import score
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve import completions, replies
from mm1.errors import UserError

PATH = "/v1/completions"
TEXT = "three and four make seven"


def truth_of(model, ids):
    """Log-probabilities [n - 1, V] of what follows each token but the last, in one pass of the model in training."""
    from mm1.engine.data.batch import exact_budget, pack
    from mm1.engine.data.document import Document

    document = Document(np.array(ids, np.int32), (), "test")
    batch = pack([document], exact_budget([document], 4), image_id=3, patch=4, slots=4)
    with torch.inference_mode():
        return logits_of(model, batch)[:-1].double().log_softmax(-1)


def test_a_text_goes_on_as_the_engine_alone_continues_it(model, client):
    truth = run_alone(model, [TEXT], 12)
    found = client.completions.create(model="small", prompt=TEXT, max_tokens=12)
    assert (found.object, found.choices[0].text, found.choices[0].finish_reason) == (
        "text_completion", truth.text, truth.finish)  # fmt: skip
    assert found.usage.prompt_tokens == len(truth.document.tokens)
    assert found.usage.completion_tokens == len(truth.tokens)
    same = client.completions.create(model="small", prompt=truth.document.tokens.tolist(), max_tokens=12)
    assert same.choices[0].text == truth.text
    assert client.completions.create(model="small", prompt=TEXT).usage.completion_tokens <= 16


def test_several_prompts_have_n_choices_each_in_order(model, client):
    texts = ["one", TEXT, "two and"]
    found = client.completions.create(model="small", prompt=texts, n=2, temperature=0.9, seed=4, max_tokens=6)
    truth = [run_alone(model, [text], 6, temperature=0.9, seed=4 + i).text for text in texts for i in range(2)]
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(truth))
    ids = [[1, *model.tokenizer.encode(text)] for text in texts]
    assert found.usage.prompt_tokens == sum(map(len, ids))
    found = client.completions.create(model="small", prompt=ids, n=2, temperature=0.9, seed=4, max_tokens=6)
    assert [choice.text for choice in found.choices] == truth


def test_the_best_of_several_have_the_best_mean_log_probability(model, client):
    tries = [run_alone(model, [TEXT], 8, temperature=1.2, seed=i) for i in range(5)]
    best = sorted(tries, key=lambda request: -np.mean(request.logprobs))[:2]
    found = client.completions.create(model="small", prompt=TEXT, n=2, best_of=5, temperature=1.2, seed=0, max_tokens=8)
    assert [choice.text for choice in found.choices] == [request.text for request in best]
    assert found.usage.completion_tokens == sum(len(request.tokens) for request in tries)


@pytest.mark.parametrize("size", [1, 2, 9, 40])
def test_scores_of_a_prompt_are_those_of_one_pass(model, client, size):
    """As lm-eval asks for them."""
    ids = np.random.default_rng(size).integers(4, 384, size).tolist()
    found = client.completions.create(model="small", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    columns, truth = found.choices[0].logprobs, truth_of(model, ids) if size > 1 else []
    assert {len(column) for column in columns.model_dump().values()} == {size + 1}
    assert columns.token_logprobs[0] is columns.top_logprobs[0] is None
    assert columns.token_logprobs[1:-1] == pytest.approx(
        [float(row[token]) for row, token in zip(truth, ids[1:])], abs=1e-4
    )
    for row, top, own in zip(truth, columns.top_logprobs[1:], columns.token_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        assert own in top.values()
        assert len(top) <= 2
    greedy = [own == max(top.values()) for top, own in zip(columns.top_logprobs[1:-1], columns.token_logprobs[1:-1])]
    assert greedy == [int(row.argmax()) == token for row, token in zip(truth, ids[1:])]


def test_the_score_of_an_answer_is_that_of_score(model, client):
    prompt, answer = "three and four", " make seven"
    [[truth]] = score(model, [[prompt]], [[answer]])
    before = len(model.tokenizer.encode(prompt)) + 1  # <bos>
    for max_tokens in (0, 1, 5):
        found = client.completions.create(
            model="small", prompt=prompt + answer, echo=True, logprobs=0, max_tokens=max_tokens
        )
        columns, choice = found.choices[0].logprobs, found.choices[0]
        total = len(model.tokenizer.encode(prompt + answer)) + 1
        assert sum(columns.token_logprobs[before:total]) == pytest.approx(truth, abs=1e-4)
        assert "".join(columns.tokens[1:total]) == prompt + answer
        assert choice.text.startswith(prompt + answer)
        assert found.usage.completion_tokens == len(columns.tokens) - total <= max_tokens
        assert choice.finish_reason in ("stop", "length")


def test_offsets_are_places_in_the_text_also_inside_characters(model, client):
    text = "a €, 好"
    found = client.completions.create(model="small", prompt=text, echo=True, logprobs=2, max_tokens=20)
    columns, whole = found.choices[0].logprobs, found.choices[0].text
    assert whole.startswith(text)
    assert "bytes:\\xe2" in columns.tokens
    assert columns.tokens[0] == "<bos>"
    for token, at in zip(columns.tokens[1:], columns.text_offset[1:]):
        if not token.startswith(("bytes:", "<")):
            assert whole[at : at + len(token)] == token
    assert columns.text_offset == sorted(columns.text_offset)


@pytest.mark.parametrize("settings", [
    {"logprobs": 3}, {"logprobs": 2, "echo": True}, {"echo": True}, {"logprobs": 0, "n": 2, "echo": True},
    {"prompt": [TEXT, "one"], "logprobs": 1, "echo": True}, {"max_tokens": 0, "echo": True, "logprobs": 1},
], ids=str)  # fmt: skip
def test_a_stream_adds_up_to_the_whole(client, settings):
    settings = {"model": "small", "prompt": TEXT, "max_tokens": 30, "temperature": 0.8, "seed": 2} | settings
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert last.usage.model_dump() | {"prompt_tokens_details": None} == whole.usage.model_dump() | {
        "prompt_tokens_details": None}  # fmt: skip
    assert {chunk.id for chunk in chunks} == {last.id}
    for choice in whole.choices:
        parts = [c for chunk in body for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        if choice.logprobs is None:
            assert all(part.logprobs is None for part in parts)
            continue
        for name, column in choice.logprobs.model_dump().items():
            streamed = [x for part in parts for x in part.logprobs.model_dump()[name]]
            if name == "token_logprobs":
                streamed, column = ([0 if x is None else x for x in xs] for xs in (streamed, column))
                assert streamed == pytest.approx(column, abs=1e-5)
            elif name != "top_logprobs":
                assert streamed == column


@pytest.mark.parametrize("stream", [False, True])
def test_one_choice_scores_a_prompt_for_all(model, stream):
    """Also where the others begin sooner, as their prompt is known: its first page is all that is computed of it."""
    ids = np.random.default_rng(9).integers(4, 384, 100).tolist()
    wish = {"model": "small", "prompt": [ids, ids[:50]], "max_tokens": 4, "n": 3, "echo": True, "logprobs": 2}
    with serving(model) as (port, service), openai_client(port) as client:
        service.engine.engine.schedule.prefill = 16
        client.completions.create(**{**wish, "echo": False, "n": 1})
        engine, seen = service.engine.engine, []
        computed = engine.computed
        columns = completions.Reply.logprob_columns
        with pytest.MonkeyPatch.context() as patch:
            thread = lambda: threading.current_thread().name  # noqa: E731
            patch.setattr(completions.Reply, "logprob_columns", lambda *a: seen.append(thread()) or columns(*a))
            found = client.completions.create(**wish, stream=stream)
            found = list(found) if stream else [found]
        scored = engine.computed - computed
    assert scored <= 100 + 50 + 4 * (PAGE + 4)
    assert {name.rpartition("_")[0] for name in seen} == {"mm1-intake"}
    choices = [choice for chunk in found for choice in chunk.choices]
    for prompt, at in ((ids, 0), (ids[:50], 3)):
        truth = [float(row[token]) for row, token in zip(truth_of(model, prompt), prompt[1:])]
        for index in range(at, at + 3):
            of = [choice for choice in choices if choice.index == index]
            logprobs = [x for choice in of for x in choice.logprobs.token_logprobs]
            assert logprobs[1 : len(prompt)] == pytest.approx(truth, abs=1e-4)
            assert of[0].text.startswith(model.tokenizer.decode(prompt))


def test_more_scores_than_an_answer_may_tell_are_refused(model):
    body = {"prompt": [[5] * 100] * 3, "echo": True, "logprobs": 20, "n": 2}
    asked = completions.parse(json.dumps(body).encode())
    assert replies.SCORES > 65_536 * 21  # a whole prompt of a default cache, with all alternatives
    told = 3 * 99 * 21 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "SCORES", told)
        assert [job.scored for job in asked.jobs(asked.prompts, 200, None)] == [99, 0] * 3
        patch.setattr(replies, "SCORES", told - 1)
        with pytest.raises(UserError, match=f"logprobs and echo ask for {told} numbers, expected at most") as refused:
            asked.jobs(asked.prompts, 200, None)
    assert refused.value.param == "logprobs"


def test_a_scored_prompt_in_a_batch_with_others_is_scored_alike(model):
    engine, all_but_one = Engine(model, tokens=2048), len(model.tokenizer.encode(TEXT))
    wanted = ((0, 0), (3, 2), (0, all_but_one), (20, 5))
    requests = [engine.submit([TEXT], Sampling(max_tokens=4, top_logprobs=k), scored=n) for k, n in wanted]
    engine.run()
    ids = requests[0].document.tokens.tolist()
    truth = truth_of(model, ids)
    every = [float(row[token]) for row, token in zip(truth, ids[1:])]
    assert len(every) == all_but_one
    for request, (k, n) in zip(requests, wanted):
        assert request.scores == pytest.approx(every[len(every) - n :], abs=1e-4)
        assert request.tokens == requests[0].tokens
        for row, top in zip(truth[len(every) - n :], request.score_top.tolist()):
            assert [value for _, value in top] == pytest.approx(row.topk(k).values.tolist(), abs=1e-4)
            assert [token for token, _ in top] == row.topk(k).indices.tolist()


WRONG = [
    {"prompt": 3}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "x"]}, {"prompt": [[1], "x"]}, {"prompt": [-1]},
    {"prompt": [1 << 40]}, {"prompt": [999]}, {"prompt": [True]}, {"prompt": [[1, 3]]}, {"prompt": ["x"] * 257},
    {"prompt": "\ud800"}, {"logprobs": 21}, {"logprobs": True}, {"logprobs": -1}, {"echo": "yes"}, {"suffix": "x"},
    {"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 17}, {"max_tokens": -1}, {"messages": []},
    {"template": "none"}, {"top_logprobs": 1}, {"best_of": 2, "max_tokens": 0}, {"model": "gpt"},
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body)[:60])
def test_what_is_wrong_is_refused_with_its_name(port, body):
    status, _, answer = http_request(port, "POST", PATH, {"prompt": "one", "max_tokens": 2} | body)
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (404 if "model" in body else 400, "invalid_request_error"), answer
    assert error["param"] in (*body, None), error
    assert 0 < len(error["message"]) < 400


@pytest.mark.parametrize(
    "body, message",
    [
        ([1], "the request is of type array, expected object"),
        ({"prompt": {}}, "prompt is of type object, expected array"),
        ({"prompt": "x", "echo": "yes"}, "echo is of type string, expected boolean"),
        ({"prompt": "x", "n": 1.5}, "n is of type number, expected integer"),
        ({"prompt": "x", "top_p": True}, "top_p is of type boolean, expected number"),
        ({"prompt": "x", "logit_bias": []}, "logit_bias is of type array, expected object"),
    ],
)
def test_types_have_the_names_of_json(body, message):
    with pytest.raises(UserError) as refused:
        completions.parse(json.dumps(body).encode())
    assert str(refused.value) == message


def test_no_prompt_is_the_beginning_of_a_document(model, client):
    truth = Engine(model, tokens=256)
    request = truth.submit([""], Sampling(max_tokens=5))
    truth.run()
    for prompt in (None, ""):
        assert client.completions.create(model="small", prompt=prompt, max_tokens=5).choices[0].text == request.text


def test_more_texts_than_the_server_takes_are_refused(model):
    with serving(model, batch=2, queue=2) as (port, _):
        status, _, answer = http_request(port, "POST", PATH, {"prompt": ["one"] * 5, "max_tokens": 1})
        assert (status, "5 texts in one request, expected at most 4" in answer.decode()) == (400, True)
        assert http_request(port, "POST", PATH, {"prompt": ["one"] * 4, "max_tokens": 1})[0] == 200


def test_a_reader_beside_a_growing_text_never_sees_half_a_token(model):
    """Tokens, log-probabilities and alternatives grow one after the other in the engine's thread."""
    asked = completions.parse(b'{"prompt": "one", "logprobs": 1, "stream": true}')
    request = run_alone(model, ["one"], 6, top_logprobs=1)
    reply, whole = completions.Reply("small", model.tokenizer, asked), list(request.tokens)
    reply.begin([request])
    top, request.top = request.top, request.top[:3]
    first = reply.piece(0, "")["choices"][0]["logprobs"]
    request.top = top
    second = reply.end(0)["choices"][0]["logprobs"]
    assert [len(first["tokens"]), len(second["tokens"])] == [3, len(whole) - 3]


def test_a_models_card_says_how_long_a_prompt_may_be(client, port):
    card = client.models.retrieve("small")
    assert (card.id, card.model_extra["max_model_len"]) == ("small", 8192)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")
    for method, path, status in (("GET", "/v1/none", 404), ("GET", PATH, 405), ("DELETE", "/v1/models/small", 405)):
        found, _, answer = http_request(port, method, path)
        assert (found, json.loads(answer)["error"]["type"]) == (status, "invalid_request_error")
