"""What a client of the server gets is what the Engine alone gives; what is wrong is refused and hurts nobody else."""

import asyncio
import json
import logging
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from service import (  # noqa: F401, fixtures
    CHAT,
    LONG,
    ROOT,
    client_fixture,
    create_chat,
    fail_after,
    health,
    http_request,
    image_part,
    is_idle,
    metric,
    model_fixture,
    openai,
    openai_client,
    plain_chat,
    png,
    port_fixture,
    refusal_of,
    run_alone,
    served_fixture,
    serving,
    wait_until,
)
from small import small_run
from test_generate import PROMPTS, picture

from mm1.engine.infer.asynchronous import Dead
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.prompts import encode_prompts
from mm1.engine.serve import answers, app, arrivals, connections
from mm1.engine.serve.privacy import read_key
from mm1.errors import UserError


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_the_engines(model, client, prompt):
    truth = run_alone(model, prompt, 12)
    found = create_chat(client, prompt, max_tokens=12, logprobs=True)
    [choice] = found.choices
    assert (choice.message.content, choice.message.role) == (truth.text, "assistant")
    assert choice.finish_reason == truth.finish
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(truth.logprobs, abs=1e-4)
    assert [entry.token for entry in choice.logprobs.content] == [model.tokenizer.decode([t]) for t in truth.tokens]
    assert found.usage.prompt_tokens == len(truth.document.tokens)
    assert found.usage.completion_tokens == len(truth.tokens)
    assert found.usage.total_tokens == len(truth.document.tokens) + len(truth.tokens)


def test_a_streamed_answer_adds_up_to_it(model, client):
    truth = run_alone(model, PROMPTS[0], 40)
    chunks = list(create_chat(client, PROMPTS[0], max_tokens=40, logprobs=True, stream=True,
                         stream_options={"include_usage": True}))  # fmt: skip
    *body, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert body[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == truth.text
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + [truth.finish]
    entries = [entry for chunk in body if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx(truth.logprobs, abs=1e-4)
    assert last.choices == []
    assert last.usage.completion_tokens == len(truth.tokens)


def test_a_stream_is_events_that_end_with_done(port):
    status, headers, body = http_request(port, "POST", CHAT, plain_chat(["one"], stream=True, max_tokens=3))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_submissions_with_seeds_one_apart(model, client, stream):
    settings = {"temperature": 0.9, "top_p": 0.95}
    truth = [
        run_alone(model, PROMPTS[0], 16, **settings, top_k=20, repetition_penalty=1.1, seed=7 + i) for i in range(3)
    ]
    found = create_chat(client, PROMPTS[0], max_completion_tokens=16, **settings, seed=7, n=3, stream=stream,
                   extra={"top_k": 20, "repetition_penalty": 1.1})  # fmt: skip
    texts = ["", "", ""]
    for choice in [c for chunk in found for c in chunk.choices] if stream else found.choices:
        texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert texts == [request.text for request in truth]
    assert len(set(texts)) == 3


def test_it_stops_before_any_stop_string(model, client):
    plain = run_alone(model, PROMPTS[0], 30).text
    for stop in (plain[5:8], [plain[9:12], plain[6:8]]):
        truth = run_alone(model, PROMPTS[0], 30, stop=(stop,) if isinstance(stop, str) else tuple(stop))
        found = create_chat(client, PROMPTS[0], max_tokens=30, stop=stop).choices[0]
        assert (found.message.content, found.finish_reason) == (truth.text, "stop")


def test_a_shared_prompt_is_computed_once_and_said_so(model, client, port):
    prompt = ["that was a long beginning, and it is longer yet, " * 3, *PROMPTS[0]]
    truth = run_alone(model, prompt, 4)
    first, second = (create_chat(client, prompt, max_tokens=4) for _ in range(2))
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.choices == second.choices
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert len(truth.document.tokens) - 17 <= cached < len(truth.document.tokens)
    assert metric(port, "mm1_prompt_tokens_total") >= 2 * len(truth.document.tokens)


def test_an_uploaded_image_is_the_same_image(model, client, port):
    upload = client.files.create(file=("two.png", png(PROMPTS[1][0])), purpose="vision")
    assert (upload.filename, upload.bytes) == ("two.png", len(png(PROMPTS[1][0])))
    assert client.files.create(file=("again.png", png(PROMPTS[1][0])), purpose="vision").id == upload.id
    truth = run_alone(model, PROMPTS[1], 8).text
    for part in (image_part(upload.id), {"type": "file", "file": {"file_id": upload.id}}):
        message = {"role": "user", "content": [part]}
        found = client.chat.completions.create(model="small", messages=[message], max_tokens=8,
                                               extra_body={"template": "none"})  # fmt: skip
        assert found.choices[0].message.content == truth
    assert "upload it again" in refusal_of(port, plain_chat([]) | {"messages": [
        {"role": "user", "content": [image_part("file-0123")]}]})  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="not an image"):
        client.files.create(file=("no.png", b"no image"), purpose="vision")
    assert http_request(port, "POST", "/v1/files", {"file": "x"})[0] == 400


def test_uploads_are_bounded_and_the_last_used_stay(model):
    with serving(model, max_bytes=2000) as (port, service), openai_client(port) as client:
        first = client.files.create(file=("a", png(picture(20, 24, 0))), purpose="vision").id
        for seed in range(1, 13):
            client.files.create(file=("a", png(picture(20, 24, seed))), purpose="vision")
            message = {"role": "user", "content": [image_part(first)]}
            client.chat.completions.create(model="small", messages=[message], max_tokens=1)
        assert service.intake.files.get(first)
        assert 10 * 1400 < service.intake.files.size <= 16_000


def test_the_async_client_streams_many_side_by_side(model, port):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as client:

            async def one(prompt):
                chunks = await client.chat.completions.create(
                    model="small", max_tokens=20, stream=True, extra_body={"template": "none"},
                    messages=plain_chat(prompt)["messages"],
                )  # fmt: skip
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(one(prompt) for prompt in PROMPTS * 3))

    assert asyncio.run(all_of_them()) == [run_alone(model, prompt, 20).text for prompt in PROMPTS] * 3


def test_models_lists_the_one_there_is(client, port):
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError, match="'small'"):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "one"}])
    assert http_request(port, "GET", "/v1/nothing")[0] == 404
    assert http_request(port, "POST", CHAT + "/", "{}")[0] == 404  # no redirect, whose answer would have no body
    assert http_request(port, "GET", CHAT)[0] == 405
    assert json.loads(http_request(port, "GET", "/v1/nothing")[2])["error"]["type"] == "invalid_request_error"


def test_a_mark_in_a_text_is_text(model, client):
    """No client can make slots of images without images."""
    found = create_chat(client, ["<image><eos><bos>"], max_tokens=1)
    assert found.usage.prompt_tokens == len(encode_prompts(model, [["<image><eos><bos>"]])[0].tokens)
    assert model.tokenizer.image not in encode_prompts(model, [["<image><eos><bos>"]])[0].tokens


ONE = [{"role": "user", "content": "one"}]


WRONG = [
    "", "{", "null", "[]", "3", '"x"', "{}", '{"messages": NaN}', "[" * 100_000, b"\xff\xfe",
    '{"seed": 1' + "0" * 5000 + "}",
    {"messages": None}, {"messages": []}, {"messages": {}}, {"messages": ["one"]}, {"messages": [{}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": [], "content": "x"}]},
    {"messages": [{"role": "user", "content": ["one"]}]}, {"messages": [{"role": "user", "content": [{}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
    {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
    {"messages": [{"role": "user", "content": "x", "refusal": "no"}]},
    {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "user", "content": "x", "nam": "y"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": "y"}]}]},
    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:", "detial": "low"}}]}]},
    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}]}]},
    {"messages": [*ONE, {"role": "assistant", "content": "two"}]}, {"messages": [{**ONE[0], "name": 5}]},
    {"messages": ONE, "max_tokens": 3, "max_completion_tokens": 4},
    {"messages": [{"role": "user", "content": [image_part("data:image/png,\ud800")]}]},
    {"messages": [{"role": "user", "content": [image_part("data:image/png,é")]}]},
    {"messages": [{"role": "assistant", "content": [image_part("data:image/png;base64,")]}, *ONE]},
    *({"messages": ONE, name: value} for name, values in {
        "max_tokens": (0, -1, 1.5, "3", True, [], 1 << 30), "temperature": (-1, "hot", [], True, 1e300),
        "top_p": (0, 1.1, "x", {}), "n": (0, 17, 1.0, "2"), "top_k": (-1, 0.5), "seed": (0.5, "s", 1 << 63),
        "repetition_penalty": (0, 1e-300, "x", float("nan"), float("inf")),
        "stop": (3, [3], {}, "", ["x"] * 17, "x" * 1000), "stream": ("yes", 1),
        "stream_options": (True, {"include_usage": "x"}, {"include_usag": True}, {"include_usage": True}),
        "logprobs": (1, "x"), "top_logprobs": (3,),
        "template": ("chatml", 3, []), "model": (3, {}), "tools": ([{"type": "function"}], "x"),
        "response_format": (
            {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 3}},
            {"type": "json_schema", "json_schema": {"schema": {}, "shema": 1}}, {"type": "json_object", "strict": True},
        ),
        "audio": ({"voice": "x"},), "frequency_penalty": (2.5, "x"), "presence_penalty": (-3,), "min_p": (1.5, -0.1),
        "logit_bias": ({"x": 1}, {"5": 1, "05": 2}, {"": 1},
                       {"5": 101}, {"5": "x"}, {"-1": 1}, {"384": 1}, {"9" * 30: 1}, [],
                       {str(i): 0 for i in range(1025)}),
        "best_of": (2,), "echo": (True,), "unheard_of": (1,), "max_completion_tokens": (0,),
    }.items() for value in values),
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body)[:70])
def test_what_is_wrong_is_refused_in_one_line(port, body):
    message = refusal_of(port, body)
    assert 0 < len(message) < 400


def test_what_asks_for_nothing_is_let_through(port):
    body = {"messages": [{**ONE[0], "name": "me", "tool_calls": None}], "max_tokens": 1, "max_completion_tokens": 1,
            "temperature": 1e-9,
            "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "me", "logit_bias": None,
            "frequency_penalty": 0, "presence_penalty": 0.0, "store": False, "metadata": {"a": "b"}}  # fmt: skip
    assert http_request(port, "POST", CHAT, body)[0] == 200


def test_next_to_no_temperature_is_none(model, client):
    settings = {"temperature": 1e-40, "max_tokens": 20, "seed": 1}
    assert (
        create_chat(client, PROMPTS[0], **settings).choices[0].message.content == run_alone(model, PROMPTS[0], 20).text
    )


def test_a_prompt_longer_than_the_cache_is_refused(port):
    assert "the cache holds at most 8192" in refusal_of(port, plain_chat(["one " * 9000], max_tokens=1))
    assert "the longest text of 8192 tokens" in refusal_of(port, plain_chat(["one " * 200_000]))


def test_with_a_key_nothing_is_answered_without_it(model):
    with serving(model, key="sesame") as (port, _):
        with openai_client(port, "sesame") as client:
            assert create_chat(client, ["one"], max_tokens=1).choices
        with openai_client(port, "sesamf") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            create_chat(client, ["one"], max_tokens=1)
        for path, status in {
            "/v1/models": 401,
            "/metrics": 401,
            "/v1/files": 401,
            "/health": 200,
            "/ready": 200,
            "/": 200,
        }.items():
            assert http_request(port, "GET", path)[0] == status
            assert http_request(port, "GET", path, headers={"Authorization": "Bearer sesam\xe9"})[0] == status
        for scheme, status in {"Bearer ": 200, "bearer ": 200, "BEARER  ": 200, "Basic ": 401, "": 401}.items():
            for key, of_key in {"sesame": status, "Sesame": 401, "": 401}.items():
                headers = {"Authorization": scheme + key, "Host": "a.example"}
                assert http_request(port, "GET", "/v1/models", headers=headers)[0] == of_key, headers


def test_without_a_key_no_other_page_and_no_other_name_reaches_it(port):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
                    {"Host": "127.0.0.1.evil.example"}):  # fmt: skip
        assert http_request(port, "GET", "/v1/models", headers=headers)[0] == 403
    for name in ("LOCALHOST", f"LocalHost:{port}"):  # names have no case
        assert http_request(port, "GET", "/v1/models", headers={"Host": name})[0] == 200
    own = f"127.0.0.1:{port}"
    assert http_request(port, "GET", "/v1/models", headers={"Host": own, "Origin": f"http://{own}"})[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_while_it_arrives(model, chunked):
    with serving(model, max_bytes=100_000) as (port, service):
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for path, body in ((CHAT, b"{"), ("/v1/files", head)):
            body += b" " * 8_000_000  # more than a socket holds
            pieces = iter([body[i : i + 50_000] for i in range(0, len(body), 50_000)]) if chunked else body
            status, _, answer = http_request(
                port, "POST", path, pieces, {"Content-Type": "multipart/form-data; boundary=x"}
            )
            assert status == 413, answer
            assert "100000 bytes" in json.loads(answer)["error"]["message"]
        assert service.arrivals.buffered == service.active.active == 0


def test_a_refusal_reaches_who_is_still_sending(model):
    with serving(model, key="sesame") as (port, _):
        status, headers, _ = http_request(port, "POST", CHAT, b" " * 8_000_000)
        assert (status, headers["connection"]) == (401, "close")  # what it still sends is not read
        assert http_request(port, "POST", "/v1/nothing", b" " * 8_000_000, {"Authorization": "Bearer sesame"})[0] == 404


def test_a_body_that_never_comes_is_not_waited_for(model, monkeypatch):
    monkeypatch.setattr(arrivals, "BODY_SECONDS", 0.2)
    with serving(model) as (port, service), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(1000)
        wait_until(lambda: not service.active.active)


def begun(port, size, source="127.0.0.1"):
    """A connection that has sent so many of a thousand bytes."""
    connection = socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n".encode() + b" " * size
    )
    return connection


def test_requests_that_are_still_arriving_take_no_place_in_the_queue(model):
    with serving(model, batch=1, queue=1) as (port, service):
        arriving = [begun(port, 10) for _ in range(8)]
        wait_until(lambda: service.arrivals.buffered == 80)
        assert service.active.active == 0
        assert http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=1))[0] == 200
        for connection in arriving:
            connection.close()
        wait_until(lambda: not service.arrivals.buffered and not service.arrivals.arriving)


def test_of_too_many_bodies_that_arrive_the_slowest_of_the_busiest_client_goes(model, monkeypatch):
    monkeypatch.setattr(arrivals, "BODIES", 4)
    monkeypatch.setattr(arrivals, "GRACE_BYTES", 50)
    monkeypatch.setattr(arrivals, "SPEED_SECONDS", 0.5)
    with serving(model) as (port, service):
        other = begun(port, 1, "127.0.0.2")  # slower, but of a client with few
        arriving = []
        for i, size in enumerate((900, 10, 800)):
            arriving.append(begun(port, size))
            wait_until(lambda i=i: len(service.arrivals.arriving) == 2 + i)
            wait_until(lambda i=i: service.arrivals.buffered == 1 + sum((900, 10, 800)[: i + 1]))
        time.sleep(1)
        last = begun(port, 20)
        assert b" 429 " in arriving[1].recv(1000)
        for connection in (other, arriving[0], arriving[2], last):
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        assert http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=1))[0] == 200
        for connection in (other, *arriving, last):
            connection.close()
        wait_until(lambda: not service.arrivals.buffered and not service.arrivals.arriving)
        assert not service.arrivals.dropping


def test_bodies_that_stall_make_place_for_one_that_comes(model, monkeypatch):
    """They fill the room for bodies together; a large one is let in at the cost of the slowest."""
    monkeypatch.setattr(arrivals, "SPEED_SECONDS", 0.1)
    with serving(model, max_bytes=1000) as (port, service):
        stalled = []
        while service.arrivals.buffered <= 31_000:
            stalled.append(begun(port, 900))
            wait_until(lambda: service.arrivals.buffered >= 900 * len(stalled))
        time.sleep(0.3)
        body = json.dumps(plain_chat(["one"], max_tokens=1))
        for _ in range(8):
            assert http_request(port, "POST", CHAT, body + " " * (990 - len(body)))[0] == 200
        for connection in stalled:
            connection.close()
        wait_until(lambda: not service.arrivals.buffered and not service.arrivals.arriving)
        assert not service.arrivals.dropping


def test_who_leaves_while_its_upload_is_decoded_is_waited_for_no_more(model, monkeypatch):
    with serving(model) as (port, service):
        seen = []

        async def slow(data, _client):
            try:
                seen.append(len(data))
                await asyncio.sleep(60)
            finally:
                seen.append("left")

        monkeypatch.setattr(service.intake, "views", slow)
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        body = head + b"abc\r\n--x--\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; "
                               b"boundary=x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            wait_until(lambda: seen == [3])
        wait_until(lambda: seen == [3, "left"])
        wait_until(lambda: not service.active.active)


def test_an_upload_takes_no_file_of_the_disk(model, monkeypatch):
    """Nor a descriptor: connections have those that there are."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("a file was made"))
    with serving(model) as (port, _), openai_client(port) as client:
        noise = png(picture(1, 1, 1)) + random.Random(0).randbytes(3 << 20)  # which follows the image
        assert client.files.create(file=("a.png", noise), purpose="vision").bytes == len(noise) > 3 << 20


def test_an_error_of_the_server_is_logged_once(model, monkeypatch, caplog):
    with serving(model) as (port, service):
        monkeypatch.setattr(service, "card", lambda: 1 / 0)
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        status, headers, answer = http_request(port, "GET", "/v1/models")
    assert (status, headers["content-type"]) == (500, "application/json")
    [record] = caplog.records
    assert record.exc_info[0] is ZeroDivisionError
    assert record.getMessage().split()[1].rstrip(":") in json.loads(answer)["error"]["message"]


def test_all_requests_together_are_bounded(model, monkeypatch):
    monkeypatch.setattr(arrivals, "BODY_SECONDS", 4)
    with serving(model, max_bytes=1000) as (port, service):
        arriving = []
        while service.arrivals.buffered <= 31_000:
            arriving.append(begun(port, 900))
            wait_until(lambda: service.arrivals.buffered >= 900 * len(arriving))
        last = begun(port, 900)
        answered, _, _ = select.select([*arriving, last], [], [], 60)
        assert b" 429 " in answered[0].recv(1000)
        assert service.arrivals.buffered <= 33_000
        for connection in [*arriving, last]:
            connection.close()
        wait_until(lambda: not service.arrivals.buffered)


def test_small_requests_go_on_beside_large_ones_that_fill_the_room_for_bodies(model):
    with serving(model, max_bytes=200_000) as (port, service):
        service.arrivals.buffered = 32 * 200_000  # of others
        assert http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=1))[0] == 200
        assert http_request(port, "POST", CHAT, plain_chat(["one " * 1000], max_tokens=1))[0] == 429
        assert service.arrivals.buffered == 32 * 200_000


def streaming(port, prompt, **more):
    """A connection that has read the head of a stream."""
    connection = socket.create_connection(("127.0.0.1", port))
    send(connection, plain_chat(prompt, stream=True, **more))
    found = b""
    while b"data: " not in found:
        found += connection.recv(1000)
    assert b" 200 " in found
    return connection


def send(connection, body):
    body = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def test_a_full_queue_is_said_and_when_to_come_again(model):
    with serving(model, batch=1, queue=1) as (port, _):
        first, second = streaming(port, PROMPTS[0], max_tokens=LONG), streaming(port, PROMPTS[1], max_tokens=LONG)
        status, headers, answer = http_request(port, "POST", CHAT, plain_chat(["one"]))
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"
        with openai_client(port) as client, pytest.raises(openai.RateLimitError):
            create_chat(client, ["one"])
        assert health(port)["running"] == 1
        first.close()
        second.close()
        wait_until(lambda: is_idle(port))
        assert metric(port, "mm1_requests_total") == 4


@pytest.mark.parametrize("stream", [False, True])
def test_who_disconnects_frees_the_engine(model, stream, monkeypatch):
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.1)
    with serving(model) as (port, service):
        if stream:
            connection = streaming(port, PROMPTS[0], max_tokens=7000, n=1)
        else:
            connection = socket.create_connection(("127.0.0.1", port))
            send(connection, plain_chat(PROMPTS[0], max_tokens=7000))
        wait_until(lambda: health(port)["running"] == 1)
        wait_until(lambda: health(port)["pages"]["free"] < health(port)["pages"]["total"])
        connection.close()
        wait_until(lambda: is_idle(port))
        wait_until(lambda: not service.active.active)
        assert metric(port, "mm1_tokens_total") < 7000
        assert metric(port, "mm1_pages_used") == 0


def test_a_slow_reader_holds_nobody_up_and_gets_all(model):
    with serving(model, small=True) as (port, _), openai_client(port) as client:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", port))
        send(slow, plain_chat(PROMPTS[0], max_tokens=2000, stream=True, logprobs=True))
        truth = run_alone(model, PROMPTS[1], 30).text
        assert create_chat(client, PROMPTS[1], max_tokens=30).choices[0].message.content == truth
        wait_until(lambda: is_idle(port))  # the engine is done with it, read or not
        assert create_chat(client, PROMPTS[1], max_tokens=30).choices[0].message.content == truth
        received = b""
        while more := slow.recv(1 << 16):
            received += more
        events = [line for line in received.decode().split("\r\n") if line.startswith("data: ")]
        found = "".join(
            choice["delta"].get("content", "")
            for event in "".join(events).split("data: ")[1:]
            if not event.startswith("[DONE]")
            for choice in json.loads(event)["choices"]
        )
        assert found == run_alone(model, PROMPTS[0], 2000).text


def test_a_reader_that_takes_nothing_is_left_in_the_end(model, monkeypatch):
    monkeypatch.setattr(answers, "SEND_SECONDS", 0.2)
    with serving(model, small=True) as (port, service):
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stuck.connect(("127.0.0.1", port))
        send(stuck, plain_chat(PROMPTS[0], max_tokens=500, n=16, stream=True, logprobs=True, temperature=1))
        wait_until(lambda: metric(port, "mm1_requests_total"))
        wait_until(lambda: not service.active.active and is_idle(port))
        stuck.close()


def test_two_hundred_clients_at_once_get_their_answers_and_health_answers_meanwhile(model):
    truth = {i: run_alone(model, prompt, 6 + i).text for i, prompt in enumerate(PROMPTS)}

    async def ask(i):
        body = json.dumps(plain_chat(PROMPTS[i % 4], max_tokens=6 + i % 4)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n".encode())
        writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return i, int(head.split()[1]), json.loads(answer)

    async def all_of_them():
        tasks = [asyncio.create_task(ask(i)) for i in range(200)]
        answered = 0
        while not all(task.done() for task in tasks):
            assert (await asyncio.to_thread(health, port))["status"] == "ok"
            answered += 1
        return [await task for task in tasks], answered

    with serving(model, batch=32, queue=256) as (port, service):
        found, answered = asyncio.run(all_of_them())
        wait_until(lambda: is_idle(port))
        assert metric(port, "mm1_requests_total") == 200
        assert metric(port, "mm1_first_token_seconds_count") == 200
        assert service.arrivals.buffered == service.active.active == 0
    assert answered
    assert {status for _, status, _ in found} == {200}
    for i, _, answer in found:
        assert answer["choices"][0]["message"]["content"] == truth[i % 4]


def test_a_failing_step_is_logged_and_told_by_a_number_and_the_next_request_is_answered(model, caplog):
    with serving(model) as (port, service), openai_client(port) as client:
        fail_after(20, service.engine.engine)
        for stream, kind in ((False, openai.InternalServerError), (True, openai.APIError)):
            with pytest.raises(kind, match="internal error: see the server's log for request") as told:
                list(create_chat(client, PROMPTS[0], max_tokens=50, stream=stream))
            number = re.findall("for request ([0-9a-f]{12})", str(told.value))[0]
            [record] = [r for r in caplog.records if number in r.getMessage()]
            assert "no more" in str(record.exc_info[1])
            assert "no more" not in str(told.value)
        assert (
            create_chat(client, PROMPTS[0], max_tokens=5).choices[0].message.content
            == run_alone(model, PROMPTS[0], 5).text
        )
        assert is_idle(port)


def test_ready_is_health_once_the_engine_is_warm(model):
    with serving(model) as (port, service):
        wait_until(lambda: http_request(port, "GET", "/ready")[0] == 200)
        assert json.loads(http_request(port, "GET", "/ready")[2]) == health(port)
        service.engine.warm = False
        status, headers, answer = http_request(port, "GET", "/ready")
        assert (status, headers["retry-after"], json.loads(answer)) == (503, "1", {"status": "warming up"})
        assert health(port)["status"] == "ok"  # requests are answered, though slowly
        service.engine.dead = Dead("gone")
        assert json.loads(http_request(port, "GET", "/ready")[2])["status"] == "dead"


def test_a_dead_engine_is_told_by_health_and_to_every_client(model):
    with serving(model) as (port, service):
        service.engine.dead = Dead("gone")
        status, _, answer = http_request(port, "GET", "/health")
        assert (status, json.loads(answer)["status"]) == (503, "dead")
        assert "the engine has stopped" in (message := refusal_of(port, plain_chat(["one"]), 503))
        assert "gone" not in message


def test_metrics_are_those_of_what_was_done(model):
    with serving(model) as (port, _), openai_client(port) as client:
        truth = run_alone(model, PROMPTS[0], 10)
        create_chat(client, PROMPTS[0], max_tokens=10)
        list(create_chat(client, PROMPTS[0], max_tokens=10, stream=True))
        refusal_of(port, "{")
        assert metric(port, 'mm1_requests_total{status="200"}') == 2
        assert metric(port, 'mm1_requests_total{status="400"}') == 1
        assert metric(port, "mm1_tokens_total") == 2 * len(truth.tokens)
        assert metric(port, "mm1_prompt_tokens_total") == 2 * len(truth.document.tokens)
        assert metric(port, "mm1_first_token_seconds_count") == metric(port, "mm1_token_seconds_count") == 2
        assert metric(port, "mm1_images_total") == 2
        assert metric(port, "mm1_running") == metric(port, "mm1_waiting") == 0
        assert metric(port, "mm1_pages") == 8192 / 16


@pytest.mark.parametrize("limit", [{"max_images": -1}, {"max_pixels": 0}, {"max_bytes": 0}])
def test_limits_that_let_nothing_through_are_refused(model, limit):
    with pytest.raises(UserError, match=f"{next(iter(limit))} is"):
        app.Service(Engine(model, tokens=64), "small", **limit)


def test_an_address_that_others_reach_takes_a_key(monkeypatch):
    monkeypatch.delenv("MM1_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.com", ""):
        with pytest.raises(UserError, match="can be reached by others: set MM1_API_KEY"):
            app.serve(Path("nowhere"), host=host, port=0, api_key=None, engine={})


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for name in ("h11", "python_multipart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"packages for serving are missing: pip install h11 python_multipart$"):
        app.serve(Path("nowhere"), host="127.0.0.1", port=0, api_key=None, engine={})


def test_a_key_comes_from_a_file_of_one_line_or_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MM1_API_KEY", raising=False)
    assert read_key() is None
    (tmp_path / "key").write_text("sesame\n")
    for value in ("other", " secret\n", ""):
        monkeypatch.setenv("MM1_API_KEY", value)
        assert read_key(tmp_path / "key") == "sesame"
        assert "MM1_API_KEY" not in os.environ
        monkeypatch.setenv("MM1_API_KEY", value)
        assert read_key() == (value.strip() or None)
        assert "MM1_API_KEY" not in os.environ
    for content in (b"", b"\n", b"two\nlines\n", b"\xff"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(UserError, match="key"):
            read_key(tmp_path / "key")
    with pytest.raises(UserError, match="No such file"):
        read_key(tmp_path / "nothing")


@pytest.mark.parametrize("key", ["two\nlines", " ", "schl\xfcssel", "\udcff", "a\0b"])
def test_a_key_that_no_header_can_hold_is_refused(key, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(key.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{tmp_path}/key"):
        read_key(tmp_path / "key")
    if "\0" not in key:  # which no variable can hold
        monkeypatch.setenv("MM1_API_KEY", key)
        with pytest.raises(UserError, match="MM1_API_KEY has"):
            read_key()


def test_what_the_server_subclasses_is_of_a_version_that_is_known():
    """Private parts of them are used: older versions than those tested are not let in."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    least = dict(requirement.split(">=") for requirement in wanted if ">=" in requirement)
    for name in ("starlette", "uvicorn", "h11"):
        assert [int(n) for n in version(name).split(".")] >= [int(n) for n in least[name].split(".")]


def test_what_runs_too_long_is_cut_off_at_the_end(model):
    with serving(model, stop_seconds=0.2) as (port, service):
        connection = streaming(port, PROMPTS[0], max_tokens=7000)
    while received := connection.recv(1 << 16):
        assert b"[DONE]" not in received
    connection.close()
    assert not service.engine.engine.running


def test_a_step_that_hangs_ends_with_the_process(tmp_path):
    """Not before it has had its time, and the log says so."""
    code = """
import os, signal, socket, threading, time
from small import small_mm1
from mm1.engine.infer import asynchronous
from mm1.engine.infer.engine import Engine
from mm1.engine.serve import app

def hangs():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(600)

asynchronous.STOP_SECONDS = 0.5
engine = Engine(small_mm1(seed=5).eval(), tokens=4096)
engine.step = hangs
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
app.run(app.Service(engine, "x"), listener, stop_seconds=0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests", text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.strip().isdigit(), process.communicate()
        connection = socket.create_connection(("127.0.0.1", int(line)))
        send(connection, plain_chat(["one"]))
        _, errors = process.communicate(timeout=60)
        connection.close()
        assert process.returncode == 1
        assert "the engine's step has taken" in errors
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_answers_end(tmp_path, tmp_path_factory, number):
    from mm1.engine.train.trainer import train

    folder = tmp_path_factory.getbasetemp() / "served"
    if not folder.exists():
        train(small_run(steps=2), folder)
    (tmp_path / "key").write_text("sesame\n")
    command = [sys.executable, "-m", "mm1.cli", "serve", str(folder), "--port", "0", "--tokens", "4096",
               "--api-key-file", str(tmp_path / "key")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MM1_API_KEY": "other"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("served: http://127.0.0.1:"), process.communicate()
        with openai_client(int(line.rpartition(":")[2]), "sesame") as client:
            assert [model.id for model in client.models.list()] == ["served"]
            chunks = client.chat.completions.create(model="served", stream=True, max_tokens=600, messages=ONE)
            next(chunks)
            process.send_signal(number)
            *_, last = chunks
            assert last.choices[0].finish_reason in ("stop", "length")
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        assert errors == "served was not trained on conversations: chats become plain text\n"
    finally:
        process.kill()
