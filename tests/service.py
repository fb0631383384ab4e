"""Run a server of a small model on loopback, with helpers that send requests to it and read its answers."""

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
from small import small_mm1

from mm1.engine.infer.engine import Engine
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve.app import Service
from mm1.engine.serve.connections import STOP_SECONDS, server_of

for package in ("uvicorn", "starlette", "multipart", "prometheus_client"):
    pytest.importorskip(package, reason="serving is an extra")
openai = pytest.importorskip("openai")

ROOT = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"
LONG = 6000  # tokens; the small model needs a second or more to generate them


@pytest.fixture(name="model", scope="module")
def model_fixture():
    """Return the small model that the server's tests serve."""
    return small_mm1(seed=5).eval()


@pytest.fixture(name="served", scope="module")
def served_fixture(model):
    """Yield the port and the service of a server that the tests of a module share."""
    with serving(model) as (port, service):
        yield port, service


@pytest.fixture(name="port")
def port_fixture(served):
    """Return the port of the shared server."""
    return served[0]


@pytest.fixture(name="client")
def client_fixture(port):
    """Yield an OpenAI client of the shared server."""
    with openai_client(port) as client:
        yield client


@contextmanager
def serving(model, *, batch=8, queue=64, tokens=8192, small=False, stop_seconds=STOP_SECONDS, **options):
    """Yield port and service of a server on its own thread and event loop. small: whether send buffers are small."""
    service = Service(Engine(model, tokens=tokens, batch=batch, queue=queue), "small", **options)
    listener = socket.create_server(("127.0.0.1", 0))
    if small:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = server_of(service, stop_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield listener.getsockname()[1], service
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def openai_client(port, key="none"):
    """Return OpenAI's client of the server at this port."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def wait_until(condition, seconds=60):
    """Wait until a condition is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)


def http_request(port, method, path, body=None, headers=None):
    """Send a request; return the response's status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(body) if isinstance(body, dict | list) else body
    connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, str | bytes | None))
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def refusal_of(port, body, status=400):
    """Return the error message of a chat request that is refused with this status."""
    actual, _, answer = http_request(port, "POST", CHAT, body)
    assert actual == status, answer
    error = json.loads(answer)["error"]
    assert {"message", "type", "code"} <= error.keys()
    assert "\n" not in error["message"]
    return error["message"]


def health(port):
    return json.loads(http_request(port, "GET", "/health")[2])


def is_idle(port):
    """Say whether no request runs or waits and all pages of the cache are free."""
    now = health(port)
    return now["running"] == now["waiting"] == 0 and now["pages"]["free"] == now["pages"]["total"]


def metric(port, name):
    """Return the sum of a metric over its labels."""
    lines = http_request(port, "GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def png(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def text_part(words):
    return {"type": "text", "text": words}


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def content_parts(prompt):
    return [text_part(part) if isinstance(part, str) else image_part(data_url(png(part))) for part in prompt]


def plain_chat(prompt, **more):
    """Return the body of a chat request that gives the prompt to the model without a template."""
    return {"messages": [{"role": "user", "content": content_parts(prompt)}], "template": "none", **more}


def create_chat(client, prompt, **more):
    """Send the same request as plain_chat with OpenAI's client."""
    return client.chat.completions.create(
        model="small",
        messages=plain_chat(prompt)["messages"],
        extra_body={"template": "none", **more.pop("extra", {})},
        **more,
    )


def run_alone(model, prompt, *args, **kwargs):
    """Return the finished request of an Engine that has no other one. Settings are those of Sampling."""
    engine = Engine(model)
    request = engine.submit(prompt, Sampling(*args, **kwargs))
    engine.run()
    return request


def slow_steps(engine, seconds):
    """Make every step of the engine take so many seconds longer, so that a client can act while an answer is coming."""
    step = engine.step

    def slow():
        time.sleep(seconds)
        return step()

    engine.step = slow


def fail_after(tokens, engine):
    """Make the engine's steps fail once a request has more than so many tokens."""
    step = engine.step

    def failing():
        if any(len(request.tokens) > tokens for request in engine.running):
            raise MemoryError("no more")
        return step()

    engine.step = failing
