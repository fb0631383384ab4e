"""Messages become the prompts that models were trained on."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from service import (
    data_url,
    image_url,
    png,
    raw,
    text,
)
from small import SLOTS, small_mm1
from test_generate import picture

from mm1.engine.data.batch import exact_budget
from mm1.engine.data.document import Budget, DocumentEncoder
from mm1.engine.data.images import ImagePolicy, decode
from mm1.engine.data.sources import open_source
from mm1.engine.prompts import encode_prompts
from mm1.engine.serve import chat


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=5).eval()


def encoder(model):
    c = model.config
    policy = ImagePolicy(c.vision.patch, c.image_mode, c.image_size, c.image_patches)
    return DocumentEncoder(model.tokenizer, policy, SLOTS, exact_budget([], c.vision.patch))


def encoded(model, asked: chat.Asked):
    """As the server encodes it, decoding in this process."""
    views = encoder(model).policy.views
    found = [views(decode(base64.b64decode(p.url.split(",")[1]))) if isinstance(p, chat.Picture) else p
             for p in asked.parts]  # fmt: skip
    return chat.encode(model.tokenizer, SLOTS, found)


def test_messages_are_laid_out_as_conversations_were_in_training(model, tmp_path):
    turns = ["<image>\nhow many sevens? ", "two", "and here: <image><image>, nines?", "none\n", "sure?", "yes"]
    pictures = [data_url(png(picture(12, 24, seed))) for seed in range(3)]
    record = {"image": pictures, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}  # fmt: skip
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    encode = encoder(model)
    large = Budget(tokens=4096, images=16, patches=4096, documents=1)
    [trained] = DocumentEncoder(encode.tokenizer, encode.policy, SLOTS, large)(
        open_source("conversations", str(tmp_path / "talk.jsonl"), Path())[0]
    )
    left = iter(pictures)

    def content(turn):
        first, *rest = turn.split("<image>")
        return [text(first), *(p for words in rest for p in (image_url(next(left)), text(words)))]

    messages = [{"role": ("user", "assistant")[i % 2], "content": turn if i % 2 else content(turn)}
                for i, turn in enumerate(turns[:-1])]  # fmt: skip
    found = encoded(model, chat.parse(json.dumps({"messages": messages}).encode()))
    answer = [*model.tokenizer.encode(" yes"), model.tokenizer.eos]
    assert [*found.tokens, *answer] == trained.tokens.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(found.images, trained.images, strict=True))


def test_a_systems_words_come_first_on_a_line_of_their_own():
    body = {"messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": " how many? "}]}
    assert chat.parse(json.dumps(body).encode()).parts == ("Count.\nUSER: how many? ASSISTANT:",)


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
    a, b = (image_url(data_url(png(prompt[i]))) for i in (1, 3))
    messages = [
        {"role": "system", "content": "quiz\n"},
        {"role": "user", "content": [a, text("question: how many "), text("twos? answer:")]},
        {"role": "assistant", "content": " one\n"},
        {"role": "user", "content": [b, text("question: sevens? answer:")]},
    ]
    for body in (raw(prompt), {"messages": messages, "template": "none"}):
        found = encoded(model, chat.parse(json.dumps(body).encode()))
        assert found.tokens.tolist() == truth.tokens.tolist()
        assert all(np.array_equal(x, y) for x, y in zip(found.images, truth.images, strict=True))
