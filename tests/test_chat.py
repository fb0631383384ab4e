"""Messages become the prompts that models were trained on."""

import base64
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from service import (
    data_url,
    image_part,
    plain_chat,
    png,
    text_part,
)
from small import SLOTS, small_mm1
from test_generate import picture

from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import Budget, Document, DocumentEncoder, document_of
from mm1.engine.data.images import ImagePolicy
from mm1.engine.data.record import View
from mm1.engine.data.references import read_image
from mm1.engine.data.sources import open_source
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.infer.sampling import Sampling
from mm1.engine.run_config import saw_conversations
from mm1.engine.serve import chat, completions
from mm1.engine.serve.fields import WrongField
from mm1.engine.serve.replies import Picture, finish_of
from mm1.errors import Unreadable


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=5).eval()


def encoder(model):
    c = model.config
    policy = ImagePolicy(c.vision.patch, c.image_mode, c.image_size, c.image_patches)
    return DocumentEncoder(model.tokenizer, policy, SLOTS, exact_budget([], c.vision.patch))


def encoded(model, request):
    """As the server encodes it, decoding in this process."""
    codec = encoder(model).codec

    def views(picture):
        return [View("image", x) for x in codec.views(codec.decode(base64.b64decode(picture.url.split(",")[1])))]

    parts = [views(part) if isinstance(part, Picture) else part for part in request.prompts[0]]
    return document_of(model.tokenizer, SLOTS, parts)


def test_messages_are_laid_out_as_conversations_were_in_training(model, tmp_path):
    turns = ["<image>\nhow many sevens? ", "two", "and here: <image><image>, nines?", "none\n", "sure?", "yes"]
    pictures = [data_url(png(picture(12, 24, seed))) for seed in range(3)]
    record = {"image": pictures, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}  # fmt: skip
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    encode = encoder(model)
    large = Budget(tokens=4096, media=16, patches=4096, documents=1)
    [trained] = DocumentEncoder(encode.tokenizer, encode.codec, SLOTS, large)(
        open_source("conversations", str(tmp_path / "talk.jsonl"), Path())[0]
    )
    left = iter(pictures)

    def content(turn):
        first, *rest = turn.split("<image>")
        return [text_part(first), *(p for words in rest for p in (image_part(next(left)), text_part(words)))]

    messages = [{"role": ("user", "assistant")[i % 2], "content": turn if i % 2 else content(turn)}
                for i, turn in enumerate(turns[:-1])]  # fmt: skip
    found = encoded(model, chat.parse(json.dumps({"messages": messages}).encode()))
    answer = [*model.tokenizer.encode(" yes"), model.tokenizer.eos]
    assert [*found.tokens, *answer] == trained.tokens.tolist()
    assert all(np.array_equal(a.values, b.values) for a, b in zip(found.media, trained.media, strict=True))


def test_a_systems_words_come_first_on_a_line_of_their_own():
    body = {"messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": " how many? "}]}
    assert chat.parse(json.dumps(body).encode()).prompts[0] == ("Count.\nUSER: how many? ASSISTANT:",)


def test_shots_can_be_asked_exactly_as_the_demo_was_trained(model):
    """Whatever the messages are cut into."""
    prompt = [
        "quiz\n",
        picture(seed=1),
        "question: how many twos? answer: one\n",
        picture(),
        "question: sevens? answer:",
    ]
    [truth] = encode_prompts(model, [prompt])
    a, b = (image_part(data_url(png(prompt[i]))) for i in (1, 3))
    messages = [
        {"role": "system", "content": "quiz\n"},
        {"role": "user", "content": [a, text_part("question: how many "), text_part("twos? answer:")]},
        {"role": "assistant", "content": " one\n"},
        {"role": "user", "content": [b, text_part("question: sevens? answer:")]},
    ]
    for body in (plain_chat(prompt), {"messages": messages, "template": "none"}):
        found = encoded(model, chat.parse(json.dumps(body).encode()))
        assert found.tokens.tolist() == truth.tokens.tolist()
        assert all(np.array_equal(x.values, y.values) for x, y in zip(found.media, truth.media, strict=True))


def parsed(*messages, template="conversation", **more):
    return chat.parse(json.dumps({"messages": list(messages), **more}).encode(), template)


USER = {"role": "user", "content": "how many?"}


def test_a_developers_words_are_a_systems():
    both = [parsed({"role": role, "content": "Count."}, USER).prompts[0] for role in ("system", "developer")]
    assert both[0] == both[1] == ("Count.\nUSER: how many? ASSISTANT:",)


@pytest.mark.parametrize("answer, said", [
    ({"content": None}, ""), ({}, ""), ({"content": "two", "refusal": None, "audio": None, "tool_calls": None}, "two"),
    ({"content": "two", "tool_calls": [], "annotations": [], "function_call": None, "name": "x"}, "two"),
    ({"content": None, "refusal": "no"}, "no"), ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
    ({"content": [text_part("two"), text_part(" or three")]}, "two or three"), ({"content": []}, ""),
])  # fmt: skip
def test_an_answer_of_before_may_have_every_form_that_openai_gives(answer, said):
    found = parsed(USER, {"role": "assistant", **answer}, USER)
    assert found.prompts[0] == ("USER: how many? ASSISTANT:", f" {said}", "USER: how many? ASSISTANT:")


def test_a_message_that_the_openai_client_received_can_be_sent_back():
    openai = pytest.importorskip("openai")
    message = openai.types.chat.ChatCompletionMessage(role="assistant", content="two", refusal=None)
    assert parsed(USER, message.model_dump(), USER).prompts[0][1] == " two"


@pytest.mark.parametrize("part, url", [
    ({"type": "image_url", "image_url": {"url": "u", "detail": "low"}}, "u"),
    ({"type": "image_url", "image_url": {"url": "u", "detail": None}}, "u"),
    ({"type": "image_url", "image_url": {"url": "u"}, "prompt_cache_breakpoint": {"mode": "explicit"}}, "u"),
    ({"type": "file", "file": {"file_id": "file-1", "filename": "a.png"}}, "file-1"),
    ({"type": "file", "file": {"file_data": "data:image/png,A", "filename": "a.png"}}, "data:image/png,A"),
])  # fmt: skip
def test_an_image_may_have_every_form_that_openai_documents(part, url):
    assert parsed({"role": "user", "content": [part]}).prompts[0] == ("USER: ", Picture(url), " ASSISTANT:")


def data_urls(data):
    plain = base64.b64encode(data).decode()
    escaped = plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for head in ("data:image/png;base64,", "DATA:image/PNG;BASE64,", "data:image/png;charset=utf-8;base64,",
                 "data:image/png;name=a.png;base64,", "Data:IMAGE/png; charset=x ;Base64,"):  # fmt: skip
        yield from (head + plain, head + escaped, head + plain[:9] + "\n " + plain[9:])
    yield "data:image/png," + "".join(f"%{byte:02X}" for byte in data)


def test_a_data_url_may_have_every_form_of_its_rfc():
    data = png(picture(9, 7))
    for url in data_urls(data):
        assert read_image(url, Path()) == data
    for url in ("data:text/plain;base64,AAAA", "data:;base64,AAAA", "data:image/png;base64,A", "data:image/png;base64"):
        with pytest.raises(Unreadable):
            read_image(url, Path())


def test_by_default_a_plain_models_messages_stand_as_they_are():
    turns = [{"role": "system", "content": "quiz\n"}, USER, {"role": "assistant", "content": " two"}]
    assert parsed(*turns, template="none").prompts[0] == ("quiz\nhow many? two",)
    assert chat.parse(json.dumps({"messages": [USER], "template": "conversation"}).encode(), "none").prompts[0] == (
        "USER: how many? ASSISTANT:",
    )


@pytest.mark.parametrize("config, saw", [
    ({"model": {}}, False), ({"data": {"sources": [{"kind": "captions"}]}}, False), ({"data": {}}, False),
    ({"data": {"sources": [{"kind": "text"}, {"kind": "conversations"}]}}, True), ({"data": None}, False),
])  # fmt: skip
def test_a_checkpoint_says_whether_it_was_trained_on_conversations(config, saw):
    assert saw_conversations(config) is saw


def test_max_tokens_left_out_is_what_the_context_has_room_for(model):
    document = encode_prompts(model, [["one two"]])[0]
    room = 100 - len(document.tokens)
    for asked, most in ((parsed(USER), room), (parsed(USER, max_tokens=7), 7), (parsed(USER, n=2), room)):
        jobs = asked.jobs([document], 100, None)
        assert [job.sampling.max_tokens for job in jobs] == [most] * asked.settings.count
    assert parsed(USER).jobs([document], 2, None)[0].sampling.max_tokens == 1


@pytest.mark.parametrize("message, param", [
    (3, ""), ({"role": "x"}, ".role"), ({"content": "x"}, ".role"), ({"role": "user", "content": 3}, ".content"),
    ({"role": "user", "content": "\ud800"}, ".content"), ({"role": "user", "content": [3]}, ".content[0]"),
    ({"role": "user", "content": "x", "name": 5}, ".name"), ({"role": "user", "content": [{}]}, ".content[0].type"),
    ({"role": "user", "content": [text_part("a"), {"type": "text", "text": 3}]}, ".content[1].text"),
    ({"role": "user", "content": [image_part(3)]}, ".content[0].image_url.url"),
    ({"role": "user", "content": [image_part("data:image/png,\ud800")]}, ".content[0].image_url.url"),
    ({"role": "user", "content": [{"type": "file", "file": {"file_id": 3}}]}, ".content[0].file.file_id"),
    ({"role": "assistant", "content": [image_part("data:,")]}, ".content"),
    ({"role": "assistant", "refusal": 3}, ".refusal"),
], ids=repr)  # fmt: skip
def test_an_error_names_the_field_that_it_is_about(message, param):
    messages = [USER, message, USER]
    with pytest.raises(WrongField) as told:
        chat.parse(json.dumps({"messages": messages}).encode())
    assert told.value.param == f"messages[1]{param}"
    with pytest.raises(WrongField) as told:
        chat.parse(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}).encode())
    assert told.value.param == "messages[0].role"


def test_a_reply_keeps_prompts_only_to_echo_them(model):
    """A data: URL of many megabytes is not held in memory while the engine answers."""
    asked = parsed({"role": "user", "content": [image_part("data:image/png;base64,AAAA")]})
    assert chat.Reply("m", model.tokenizer, asked).parsed.prompts == ()
    for echo in (False, True):
        scored = completions.parse(json.dumps({"prompt": "x", "echo": echo}).encode())
        reply = completions.Reply("m", model.tokenizer, scored)
        assert reply.parsed.prompts == (scored.prompts if echo else ())


def test_every_setting_reaches_the_engine():
    found = parsed(
        USER, min_p=0.1, frequency_penalty=-1, presence_penalty=2, logit_bias={"5": -100, "7": 1.5}, logprobs=True,
        top_logprobs=20, temperature=0.5, top_p=0.9, top_k=3, seed=1, stop="x", max_completion_tokens=9,
    )  # fmt: skip
    [job] = found.jobs([Document(np.array([1]), (), "")], 100, None)
    assert job.sampling == Sampling(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, frequency_penalty=-1, presence_penalty=2,
        logit_bias={5: -100, 7: 1.5}, top_logprobs=20, seed=1, stop="x",
    )  # fmt: skip


@pytest.mark.parametrize("finish", [None, "cancelled", "failed"])
def test_a_text_that_did_not_come_to_its_end_is_no_answer(model, finish):
    request = SimpleNamespace(finish=finish, text="x", tokens=[], logprobs=[], top=[])
    with pytest.raises(RuntimeError, match=f"ended as {finish}"):
        chat.Reply("m", model.tokenizer, parsed(USER)).whole([request])
    assert [finish_of(SimpleNamespace(finish=why)) for why in ("stop", "length", "scored")] == [
        "stop", "length", "length"]  # fmt: skip


def test_alternatives_come_with_their_bytes_and_control_tokens_with_their_names(model):
    t = model.tokenizer
    ids = [*t.encode("a 好"), t.eos]
    request = SimpleNamespace(tokens=ids, logprobs=[-1.0] * len(ids), top=[[(t.eos, -0.5), (i, -1.0)] for i in ids])
    content = chat.Reply("m", t, parsed(USER, logprobs=True, top_logprobs=2)).logprobs(request, Counter())["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "a 好"
    assert content[-1]["token"] == "<eos>"
    for entry in content:
        assert [other["token"] for other in entry["top_logprobs"]] == ["<eos>", entry["token"]]
        assert [other["logprob"] for other in entry["top_logprobs"]] == [-0.5, -1.0]
