"""No request holds up the others: while one is stuck in any stage before the engine, /health and small requests are
answered, and what waits takes bounded memory."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest
from service import (
    CHAT,
    LONG,
    data_url,
    health,
    http_request,
    image_part,
    is_idle,
    metric,
    model_fixture,  # noqa: F401, fixtures
    plain_chat,
    png,
    refusal_of,
    run_alone,
    serving,
    text_part,
    wait_until,
)
from test_generate import PROMPTS, picture

from mm1.engine.data import document
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.grammar import Grammars
from mm1.engine.infer.prompts import character_limit, encode_prompts
from mm1.engine.serve import answers, app, chat, intake
from mm1.engine.serve.body import DEPTH, TEXT


@pytest.fixture(scope="module")
def served(model):
    with serving(model, tokens=1 << 16) as (port, service):
        yield port, service


class Gate:
    """Stands before a function: who comes `when` waits until it is opened."""

    def __init__(self, function, when):
        self.function, self.when = function, when
        self.waiting, self.opened = 0, threading.Event()

    def __call__(self, *args):
        if self.when(*args):
            self.waiting += 1
            assert self.opened.wait(60)
        return self.function(*args)


LARGE = "one " * 1500
PHOTO = {"messages": [{"role": "user", "content": [text_part("one"), image_part(data_url(png(picture(100, 100, 1))))]}]}


@pytest.mark.parametrize(
    ("stage", "owner", "name", "when", "body"),
    [
        ("parsing", chat, "parse", lambda body, _: len(body) > intake.LONG, plain_chat([LARGE])),
        ("encoding", document.TextTokenizer, "encode", lambda _, text: len(text) > intake.LONG, plain_chat([LARGE])),
        ("base64", intake, "read_image", lambda url, _: len(url) > intake.LONG, PHOTO),
        ("hashes of images", document, "view_digest", lambda _: True, PHOTO),
        (
            "writing",
            chat.Reply,
            "whole",
            lambda _, requests: len(requests) == 4,
            plain_chat(["one"], n=4, logprobs=True, top_logprobs=20),
        ),
        (
            "schemas",
            Grammars,
            "compile",
            lambda *_: True,
            plain_chat(
                ["one"],
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
            ),
        ),
    ],
)
def test_a_stage_that_is_stuck_holds_up_nobody_else(model, served, monkeypatch, stage, owner, name, when, body):
    port, service = served
    monkeypatch.setattr(intake, "LONG", 4096)
    gate = Gate(getattr(owner, name), when)
    monkeypatch.setattr(owner, name, lambda *args: gate(*args))
    found = []
    many = 2 if stage == "hashes of images" else 6
    threads = [threading.Thread(target=lambda: found.append(http_request(port, "POST", CHAT, body | {"max_tokens": 1})))
               for _ in range(many)]  # fmt: skip
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: gate.waiting and service.active.active == many)
        for _ in range(5):
            assert health(port)["status"] == "ok"
        status, _, answer = http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=3))
        assert status == 200
        assert json.loads(answer)["choices"][0]["message"]["content"] == run_alone(model, ["one"], 3).text
        assert len(found) == 0
        assert gate.waiting == (1 if stage in ("writing", "schemas") else gate.waiting) <= 2  # a client's turns
    finally:
        gate.opened.set()
        for thread in threads:
            thread.join(60)
    assert [status for status, _, _ in found] == [200] * many
    wait_until(lambda: is_idle(port))


def test_schemas_of_one_client_hold_up_no_other_client(served, monkeypatch):
    port, service = served
    gate, body = Gate(Grammars.compile, lambda _, schema: "enum" in schema), {"max_tokens": 20}
    plain = plain_chat(["one"], response_format={"type": "json_object"}) | body
    assert http_request(port, "POST", CHAT, plain)[0] == 200
    monkeypatch.setattr(Grammars, "compile", lambda *args: gate(*args))
    forms = [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [i]}}} for i in range(4)]
    found = []
    bodies = [plain_chat(["one"], response_format=form) | body for form in forms]
    threads = [
        threading.Thread(target=lambda body=body: found.append(http_request(port, "POST", CHAT, body)[0]))
        for body in bodies
    ]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(map(len, service.answers.compiling.waiting.values())) == 3)
        assert http_request(port, "POST", CHAT, plain)[0] == 200  # which is known: also the same client has it
        plain["response_format"] = forms[0] | {"json_schema": {"name": "x", "schema": {"type": "boolean"}}}
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=("127.0.0.2", 0))
        other.request("POST", CHAT, json.dumps(plain))
        assert other.getresponse().status == 200
        other.close()
        monkeypatch.setattr(answers, "SCHEMA_SECONDS", 0.01)
        assert "schemas" in refusal_of(port, plain_chat(["one"], response_format=forms[0]), 429)
        assert gate.waiting == 1
    finally:
        gate.opened.set()
        for thread in threads:
            thread.join(60)
    assert found == [200] * 4
    assert not service.answers.compiling.running


def test_images_that_are_stuck_hold_up_no_text(model, served, monkeypatch):
    port, service = served
    gate, decode = threading.Event(), service.decoder.decode

    async def stuck(data):
        while not gate.is_set():
            await intake.asyncio.sleep(0.005)
        return await decode(data)

    monkeypatch.setattr(service.decoder, "decode", stuck)
    found = []
    body = plain_chat(PROMPTS[1], max_tokens=1)
    threads = [
        threading.Thread(target=lambda: found.append(http_request(port, "POST", CHAT, body)[0])) for _ in range(6)
    ]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: service.active.active == 6)
        assert http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=3))[0] == 200
        going = service.intake.pictures.running
        assert going == {"127.0.0.1": 4}
        with socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) as other:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
            other.sendall(f"{head}{len(json.dumps(body))}\r\n\r\n{json.dumps(body)}".encode())
            wait_until(lambda: going == {"127.0.0.1": 4, "127.0.0.2": 1})
    finally:
        gate.set()
        for thread in threads:
            thread.join(60)
    assert found == [200] * 6


def test_a_step_that_hangs_is_told_by_health(model, monkeypatch):
    with serving(model) as (port, service):
        engine, gate = service.engine.engine, threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: gate.wait(60) and step())
        thread = threading.Thread(target=http_request, args=(port, "POST", CHAT, plain_chat(["one"], max_tokens=2)))
        thread.start()
        wait_until(lambda: engine.waiting)
        assert health(port)["status"] == "ok"
        monkeypatch.setattr(app, "STALL_SECONDS", 0)
        wait_until(lambda: health(port)["status"] == "stalled")
        assert http_request(port, "GET", "/health")[0] == 503
        assert health(port)["seconds"] >= 0
        gate.set()
        thread.join(60)
        wait_until(lambda: service.engine.step_seconds == 0)  # who waits for work is not hung, however long
        assert health(port)["status"] == "ok"


def test_a_long_part_of_the_warm_up_is_no_stall_until_its_time_is_over(model, monkeypatch):
    """Whoever restarts servers that /health reports must not end a warm-up that goes on."""
    gate = threading.Event()

    def parts(self):
        yield gate.wait(60)

    monkeypatch.setattr(Engine, "warm_up", parts)
    monkeypatch.setattr(app, "STALL_SECONDS", 0)
    with serving(model) as (port, service):
        wait_until(lambda: service.engine.step_seconds)
        assert health(port)["status"] == "ok"
        assert json.loads(http_request(port, "GET", "/ready")[2]) == {"status": "warming up"}
        service.engine._warm_until = 0.0  # its time is over
        assert health(port)["status"] == "stalled"
        assert json.loads(http_request(port, "GET", "/ready")[2])["status"] == "stalled"
        monkeypatch.setattr(app, "STALL_SECONDS", 120)
        assert http_request(port, "GET", "/ready")[0] == 200
        assert not service.engine.warm
        gate.set()
        wait_until(lambda: service.engine.warm)


def test_an_engine_thread_that_fails_is_told_to_all_who_wait_and_by_health(model):
    def fail():
        raise KeyError("a fault of the engine's thread")

    with serving(model) as (port, service):
        with begun(port, plain_chat(PROMPTS[0], max_tokens=LONG)) as connection:
            wait_until(lambda: health(port)["running"] == 1)
            service.engine.call(fail)
            assert b" 503 " in connection.recv(1000)
        status, _, answer = http_request(port, "GET", "/health")
        assert (status, json.loads(answer)["status"]) == (503, "dead")
        assert b"fault" not in answer
        refusal_of(port, plain_chat(["one"]), 503)


def test_an_engine_thread_that_is_gone_is_told_by_health(model):
    with serving(model) as (port, service):
        service.engine.stop()
        wait_until(lambda: not service.engine.alive)
        status, _, answer = http_request(port, "GET", "/health")
        assert (status, json.loads(answer)["status"]) == (503, "dead")
        refusal_of(port, plain_chat(["one"]), 503)


@contextmanager
def begun(port, body, more=b""):
    """A connection that has sent a request."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n".encode()
        connection.sendall(head + more + b"\r\n" + (b"" if more else body))
        yield connection


def test_who_asks_before_sending_is_refused_before_it_sends(model):
    with serving(model, max_bytes=1000) as (port, _), begun(port, b"x" * 1001, b"Expect: 100-continue\r\n") as waiting:
        answer = waiting.recv(1000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()
    with serving(model, max_bytes=1000) as (port, _), begun(port, b"x" * 999, b"Expect: 100-continue\r\n") as waiting:
        assert waiting.recv(1000).startswith(b"HTTP/1.1 100 ")


def test_json_is_bounded_and_data_urls_are_bounded_apart(served):
    port, _ = served
    assert f"more than {TEXT} bytes" in refusal_of(port, plain_chat(["a" * TEXT]), 413)
    assert f"at most {DEPTH}" in refusal_of(port, '{"messages": ' + "[" * 1000 + "]" * 1000 + "}")
    photo = data_url(bytes(TEXT))
    assert "not an image" in refusal_of(port, {"messages": [{"role": "user", "content": [image_part(photo)]}]})


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(model, monkeypatch):
    with serving(model) as (port, _):
        monkeypatch.setattr(document.TextTokenizer, "encode", lambda *_: pytest.fail("it was encoded"))
        size = character_limit(model.tokenizer, 8192) + 1
        message = refusal_of(port, plain_chat(["a" * size]))
        assert f"{size} characters, expected at most {size - 1}, the longest text of 8192 tokens" in message


def test_bodies_are_given_back_once_the_engine_has_the_request(model):
    with (
        serving(model) as (port, service),
        begun(port, plain_chat(PROMPTS[0], max_tokens=LONG, stream=True)) as connection,
    ):
        assert connection.recv(1)
        assert service.active.active == 1
        assert service.arrivals.buffered == metric(port, "mm1_body_bytes") == 0
        views = encode_prompts(model, [PROMPTS[0]])[0].media
        assert metric(port, "mm1_view_bytes") == sum(view.values.nbytes for view in views) > 0
        assert service.intake.room.free < service.intake.room.size


def test_views_are_lent_from_fixed_memory(model, monkeypatch):
    monkeypatch.setattr(intake, "VIEW_SECONDS", 60)
    with serving(model) as (port, service):
        room, loop, found = service.intake.room, service.engine.loop, []
        body = plain_chat([picture(24, 24, 1), "one"], max_tokens=1)
        assert http_request(port, "POST", CHAT, body)[0] == 200
        wait_until(lambda: room.free == room.size)
        loop.call_soon_threadsafe(room.release, -room.size, "others")  # others have it
        waiting = threading.Thread(target=lambda: found.append(http_request(port, "POST", CHAT, body)[0]))
        waiting.start()
        wait_until(lambda: room.waiting)
        assert http_request(port, "POST", CHAT, plain_chat(["one"], max_tokens=1))[0] == 200  # which needs none
        monkeypatch.setattr(intake, "VIEW_SECONDS", 0.01)
        assert "fill the memory" in refusal_of(port, body, 429)
        assert found == []
        loop.call_soon_threadsafe(room.release, room.size, "others")
        waiting.join(60)
        assert found == [200]
        wait_until(lambda: room.free == room.size)


def test_an_error_says_which_image_it_is_about(served):
    good, bad = (image_part(data_url(data)) for data in (png(picture(24, 24, 1)), b"x"))
    body = {"messages": [{"role": "user", "content": [good, text_part("one"), good, bad]}]}
    assert refusal_of(served[0], body).startswith("image 3: ")


def test_images_that_never_come_are_not_waited_for(model, monkeypatch):
    monkeypatch.setattr(intake, "IMAGES_SECONDS", 0.1)
    with serving(model) as (port, service):
        monkeypatch.setattr(service.decoder, "decode", lambda _: intake.asyncio.sleep(60))
        assert "took more than 0.1 s, at image 1" in refusal_of(port, plain_chat([picture(24, 24, 1)]), 429)
        assert not service.intake.pictures.running
