"""A server of a small model on loopback, and what its clients send and see."""

import base64
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest

from mm1.engine.infer.engine import Engine
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve.app import Service, server_of

for package in ("uvicorn", "starlette", "multipart", "prometheus_client"):
    pytest.importorskip(package, reason="serving is an extra")
openai = pytest.importorskip("openai")

ROOT = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"
LONG = 6000  # tokens that take the small model a second or more


@contextmanager
def serving(model, *, batch=8, queue=64, tokens=8192, small=False, **options):
    """Port and service, on a thread and an event loop of its own. small: what its sockets hold."""
    service = Service(Engine(model, tokens=tokens, batch=batch, queue=queue), "small", **options)
    listener = socket.create_server(("127.0.0.1", 0))
    if small:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = server_of(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield listener.getsockname()[1], service
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def client_of(port, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


def asked(port, method, path, body=None, headers=None):
    """Status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(body) if isinstance(body, dict | list) else body
    connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, str | bytes | None))
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def refused(port, body, status=400):
    found, _, answer = asked(port, "POST", CHAT, body)
    assert found == status, answer
    error = json.loads(answer)["error"]
    assert {"message", "type", "code"} <= error.keys()
    assert "\n" not in error["message"]
    return error["message"]


def health(port):
    return json.loads(asked(port, "GET", "/health")[2])


def idle(port):
    now = health(port)
    return now["running"] == now["waiting"] == 0 and now["pages"]["free"] == now["pages"]["total"]


def metric(port, name):
    lines = asked(port, "GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def png(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def text(words):
    return {"type": "text", "text": words}


def image_url(url):
    return {"type": "image_url", "image_url": {"url": url}}


def parts(prompt):
    return [text(part) if isinstance(part, str) else image_url(data_url(png(part))) for part in prompt]


def raw(prompt, **more):
    """A request for the prompt as it is."""
    return {"messages": [{"role": "user", "content": parts(prompt)}], "template": "none", **more}


def create(client, prompt, **more):
    return client.chat.completions.create(
        model="small",
        messages=raw(prompt)["messages"],
        extra_body={"template": "none", **more.pop("extra", {})},
        **more,
    )


def alone(model, prompt, *args, **kwargs):
    engine = Engine(model)
    request = engine.submit(prompt, Sampling(*args, **kwargs))
    engine.run()
    return request


def slow_steps(engine, seconds):
    """Make every step of the engine take longer, so that an answer is still coming when a client acts on it."""
    step = engine.step

    def slow():
        time.sleep(seconds)
        return step()

    engine.step = slow


def fails_behind(tokens, engine):
    step = engine.step

    def failing():
        if any(len(request.tokens) > tokens for request in engine.running):
            raise MemoryError("no more")
        return step()

    engine.step = failing
