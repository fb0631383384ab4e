"""Clients that are slow, silent, many or half gone cost the others nothing; one that only sends no more is answered."""

import asyncio
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from service import CHAT, ROOT, asked, client_of, data_url, image_url, png, until
from small import small_run
from test_generate import picture

from mm1.engine.serve import connections

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Application:
    """Answers by path: / at once, /slow when told to, /large with 8 MB, /stream in pieces as long, /busy blocking."""

    def __init__(self):
        self.release = threading.Event()
        self.begun = self.left = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body, streams = b"x" * (8 << 20 if scope["path"] == "/large" else 2), scope["path"] == "/stream"
        if scope["path"] in ("/slow", "/stream"):
            while (await receive()).get("more_body"):
                pass
            self.begun += 1
            gone = asyncio.ensure_future(receive())
            if streams:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            while not self.release.is_set() and not gone.done():
                await asyncio.sleep(0.01)
                if streams:
                    await send({"type": "http.response.body", "body": b"piece\n", "more_body": True})
            self.left += gone.done()
            gone.cancel()
        if scope["path"] == "/busy":
            time.sleep(0.3)
        if not streams:
            headers = [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def served(buffer=None):
    """Port, application and server. buffer: bytes that its sockets hold."""
    application = Application()
    server = connections.server_of(application, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield listener.getsockname()[1], application, server
    finally:
        application.release.set()
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.05)


def connected(port, sent=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(sent)
    return connection


def everything(connection) -> bytes:
    """What comes until the server closes."""
    received = b""
    try:
        while more := connection.recv(1 << 16):
            received += more
    except ConnectionResetError:
        pass
    return received


def one(connection) -> bytes:
    """The next answer of two bytes."""
    received = b""
    while not received.endswith(b"\r\n\r\nxx"):
        more = connection.recv(1000)
        assert more, received
        received += more
    return received


def dribbled(connection, piece=b"x") -> bytes:
    """What comes until the server closes, while a piece is sent every few milliseconds."""
    received = b""
    connection.settimeout(0.02)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            connection.sendall(piece)
            if not (more := connection.recv(1 << 16)):
                return received
            received += more
        except TimeoutError:
            continue
        except OSError:
            return received
    raise AssertionError("the server never closed")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"GET / HTTP/1.1\r\nHost: x\r\nX-a: "])
def test_a_head_that_does_not_come_is_not_waited_for(short, sent, kept):
    """Neither the first of a connection nor, once it has begun, the next."""
    with served() as (port, _, server), connected(port, GET if kept else b"") as connection:
        if kept:
            one(connection)
            sent = sent or b"G"
        connection.sendall(sent)
        answer = everything(connection)
        if sent:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert "took more than" in json.loads(body)["error"]["message"]
        else:
            assert answer == b""
        until(lambda: not server.server_state.connections)
        assert asked(port, "GET", "/")[0] == 200


def test_a_head_that_comes_byte_by_byte_has_the_same_time(short):
    with served() as (port, _, _), connected(port, b"GET / HTTP/1.1\r\nX-a: ") as connection:
        begun = time.monotonic()
        assert b" 408 " in dribbled(connection)
        assert time.monotonic() - begun >= 0.3


def test_a_body_that_nobody_waits_for_has_an_end_too(short):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with served() as (port, _, _), connected(port, head) as connection:
        assert dribbled(connection).endswith(b"xx")


def test_a_head_too_large_is_refused_as_it_comes():
    with served() as (port, _, server), connected(port, b"GET / HTTP/1.1\r\nX-a: ") as connection:
        received = dribbled(connection, b"x" * 4096)
        assert received.startswith(b"HTTP/1.1 400 ") or not received  # a reset may overtake it
        until(lambda: not server.server_state.connections)


def test_an_idle_connection_is_closed_in_the_end(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    with served() as (port, _, _), connected(port, GET + GET) as connection:
        assert everything(connection).count(b"HTTP/1.1 200 OK") == 2


def test_heads_one_after_the_other_have_each_their_time(short):
    """A connection that is used longer than one head may take stays open."""
    with served() as (port, _, _), connected(port) as connection:
        for _ in range(6):
            connection.sendall(GET[:-2])
            time.sleep(0.1)
            connection.sendall(b"\r\n")
            one(connection)


def test_who_takes_nothing_of_a_complete_answer_is_left(short):
    with served() as (port, _, server), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.server_state.total_requests == 1)
        until(lambda: not server.server_state.connections)


def test_who_takes_it_slowly_gets_all_of_it(short):
    """Longer than a reader may take nothing; the sockets hold little of the 8 MB."""
    with served(buffer=65536) as (port, _, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        received, begun = 0, time.monotonic()
        while received < 8 << 20:
            more = len(connection.recv(1 << 17))
            assert more, f"the server left after {received} bytes"
            received += more
            time.sleep(0.01)
        assert time.monotonic() - begun > 0.6


def request(path, version="1.1", body=b""):
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_sends_no_more_gets_its_answer(short, version):
    """To 1.1 a 100 Continue says now and then that the server is there, which any client reads over."""
    with served() as (port, application, _), connected(port, request("/slow", version, b"x" * 300_000)) as connection:
        connection.shutdown(socket.SHUT_WR)
        until(lambda: application.begun)
        time.sleep(0.4)
        application.release.set()
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.read()) == (200, b"xx")
        assert connection.recv(1) == b""
        assert not application.left


def test_one_that_is_answered_soon_gets_nothing_else_and_the_end(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_SECONDS", 3600)
    with served() as (port, application, _), connected(port, request("/slow")) as connection:
        connection.shutdown(socket.SHUT_WR)
        until(lambda: application.begun)
        application.release.set()
        assert everything(connection).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("path", ["/slow", "/stream"])
@pytest.mark.parametrize("half_closed_before", [False, True])
def test_a_client_that_leaves_is_noticed(short, path, half_closed_before):
    with served() as (port, application, server), connected(port, request(path)) as connection:
        until(lambda: application.begun)
        if half_closed_before:
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.2)
        connection.close()
        until(lambda: application.left)
        until(lambda: not server.server_state.connections)


def test_half_a_request_and_no_more_is_no_request(short):
    with served() as (port, application, _), connected(port, request("/slow", body=b"x" * 100)[:-1]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
        until(lambda: application.left)


def test_beyond_the_most_connections_the_oldest_that_waits_goes(monkeypatch):
    monkeypatch.setattr(connections, "MOST", 8)
    with served() as (port, application, server), ExitStack() as opened:
        working = [opened.enter_context(connected(port, request("/slow"))) for _ in range(3)]
        until(lambda: application.begun == 3)
        for _ in range(30):
            opened.enter_context(connected(port, b"GET"))
            assert asked(port, "GET", "/")[0] == 200
            assert len(server.server_state.connections) <= 8
        working += [opened.enter_context(connected(port, request("/slow"))) for _ in range(5)]
        until(lambda: application.begun == 8)
        assert everything(connected(port, GET)) == b""  # all of them work: the new one goes
        application.release.set()
        for connection in working:
            one(connection)
        assert not application.left


@linux
def test_a_burst_of_connections_is_accepted_piece_by_piece(monkeypatch, caplog):
    """While the loop is busy three hundred connect. It never has many more open than it may, so accept never fails."""
    monkeypatch.setattr(connections, "MOST", 20)
    with served() as (port, _, server), ExitStack() as opened:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = len(os.listdir("/proc/self/fd")) + 300 + 20 + connections.SPARE
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        opened.enter_context(connected(port, b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n"))
        for _ in range(299):
            opened.enter_context(connected(port))
        assert asked(port, "GET", "/")[0] == 200
        assert len(server.server_state.connections) <= 20
    assert caplog.records == []


@linux
def test_the_command_withstands_half_open_connections_and_keeps_its_key(tmp_path):
    """As `mm1 serve` runs: with 256 descriptors, 260 connections that say nothing."""
    from mm1.engine.train import train

    train(small_run(steps=1), tmp_path / "served")
    command = [sys.executable, "-m", "mm1.cli", "serve", str(tmp_path / "served"), "--port", "0", "--tokens", "4096"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "MM1_API_KEY": "sesame"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 256)),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("served: http://127.0.0.1:"), process.communicate()
        port = int(line.rpartition(":")[2])
        until(lambda: answers(port))
        environment = readable(f"/proc/{process.pid}/environ")
        assert b"sesame" not in environment + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if not os.getuid():
            assert b"MM1_API_KEY=\0" in environment
        with ExitStack() as opened, client_of(port, "sesame") as client:
            for i in range(260):
                opened.enter_context(connected(port, (b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nX-a: ")[i % 3]))
            assert asked(port, "GET", "/health")[0] == 200
            message = {"role": "user", "content": [image_url(data_url(png(picture())))]}
            found = client.chat.completions.create(model="served", messages=[message], max_tokens=2)
            assert found.usage.completion_tokens
        status, _, answer = asked(port, "POST", CHAT, {}, {"Authorization": "Bearer sesamf"})
        assert (status, b"sesame" in answer) == (401, False)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        told = "served was not trained on conversations: chats are given to it as plain text\n"
        assert (process.returncode, out, errors) == (0, "", told)
    finally:
        process.kill()


def answers(port) -> bool:
    try:
        return asked(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def readable(path) -> bytes:
    """What another process of this user can read of it; root reads all."""
    try:
        return Path(path).read_bytes()
    except PermissionError:
        return b""
