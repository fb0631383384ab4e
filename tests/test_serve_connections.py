"""Clients that are slow, silent, many or half gone cost the others nothing; one that only sends no more is answered."""

import asyncio
import errno
import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import h11
import pytest
from service import CHAT, ROOT, data_url, http_request, image_part, openai_client, png, wait_until
from small import small_run
from test_generate import picture

from mm1.engine.serve import connections
from mm1.engine.serve.reader import CHUNK_BYTES, CHUNKS, Reader, in_origin_form

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
        self.scope = scope
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
            headers += [connections.CLOSE] if scope["path"] == "/closes" else []
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
        wait_until(lambda: server.started)
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


def sent(connection, data) -> bool:
    """Say if it could be sent."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


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
        wait_until(lambda: not server.server_state.connections)
        assert http_request(port, "GET", "/")[0] == 200


def test_a_head_that_comes_byte_by_byte_has_the_same_time(short):
    with served() as (port, _, _), connected(port, b"GET / HTTP/1.1\r\nX-a: ") as connection:
        begun = time.monotonic()
        assert b" 408 " in dribbled(connection)
        assert time.monotonic() - begun >= 0.3


def test_a_body_that_nobody_waits_for_has_an_end_too(short):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with served() as (port, _, _), connected(port, head) as connection:
        assert dribbled(connection).endswith(b"xx")


def test_a_head_too_large_is_refused_as_it_comes(monkeypatch):
    monkeypatch.setattr(connections, "QUIET_SECONDS", 0.1)
    with served() as (port, _, server), connected(port, b"GET / HTTP/1.1\r\nX-a: ") as connection:
        received = dribbled(connection, b"x" * 4096)
        assert received.startswith(b"HTTP/1.1 400 ") or not received  # a reset may overtake it
        wait_until(lambda: not server.server_state.connections)


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
        wait_until(lambda: server.server_state.total_requests == 1)
        wait_until(lambda: not server.server_state.connections)


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


def test_a_client_that_sends_no_more_gets_its_answer(short):
    """A 100 Continue says now and then that the server is there, which any client reads over."""
    with served() as (port, application, _), connected(port, request("/slow", body=b"x" * 300_000)) as connection:
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: application.begun)
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
        wait_until(lambda: application.begun)
        application.release.set()
        assert everything(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_of_requests_one_behind_the_other_each_is_answered_though_no_more_are_sent():
    """And the last answer says that it is the last."""
    with served() as (port, application, _), connected(port, 3 * request("/slow") + b"POST /half") as connection:
        connection.shutdown(socket.SHUT_WR)
        application.release.set()
        answer = everything(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    with served() as (port, application, server), connected(port, 2 * request("/slow")) as connection:
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: all(c.half_closed for c in server.server_state.connections) and application.begun)
        application.release.set()
        first, second = everything(connection).split(b"HTTP/1.1 200 OK")[1:]
    assert b"connection: close" not in first.lower()
    assert b"connection: close" in second.lower()


@pytest.mark.parametrize("path", ["/slow", "/stream"])
def test_a_client_of_http_1_0_has_left_when_it_sends_no_more(path):
    """Nothing but an answer could be sent to it to see if it is still there."""
    with served() as (port, application, server), connected(port, request(path, "1.0")) as connection:
        wait_until(lambda: application.begun)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: application.left)
        wait_until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("path", ["/slow", "/stream"])
@pytest.mark.parametrize("half_closed_before", [False, True])
def test_a_client_that_leaves_is_noticed(short, path, half_closed_before):
    with served() as (port, application, server), connected(port, request(path)) as connection:
        wait_until(lambda: application.begun)
        if half_closed_before:
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.2)
        connection.close()
        wait_until(lambda: application.left)
        wait_until(lambda: not server.server_state.connections)


def test_half_a_request_and_no_more_is_no_request(short):
    with served() as (port, application, _), connected(port, request("/slow", body=b"x" * 100)[:-1]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
        wait_until(lambda: application.left)


def test_beyond_the_most_connections_the_oldest_that_waits_goes(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 8)
    with served() as (port, application, server), ExitStack() as opened:
        working = [opened.enter_context(connected(port, request("/slow"))) for _ in range(3)]
        wait_until(lambda: application.begun == 3)
        for _ in range(30):
            opened.enter_context(connected(port, b"GET"))
            assert http_request(port, "GET", "/")[0] == 200
            assert len(server.server_state.connections) <= 8
        working += [opened.enter_context(connected(port, request("/slow"))) for _ in range(5)]
        wait_until(lambda: application.begun == 8)
        assert everything(connected(port, GET)) == b""  # all of them work: the new one goes
        application.release.set()
        for connection in working:
            one(connection)
        assert not application.left


def test_beyond_the_most_connections_uploads_and_answers_stay(monkeypatch):
    """Silent ones make place for each other; where all others upload, the new one goes; an answer goes last."""
    monkeypatch.setattr(connections, "CONNECTIONS", 8)
    with served(buffer=65536) as (port, application, server), ExitStack() as opened:
        upload = request("/slow", body=b"x" * 100)[:-1]
        uploads = [opened.enter_context(connected(port, upload)) for _ in range(6)]
        reader = opened.enter_context(connected(port, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"))
        wait_until(lambda: [c.stage[0] for c in server.server_state.connections].count("flush") == 1)
        for _ in range(20):
            opened.enter_context(connected(port))
        assert http_request(port, "GET", "/")[0] == 200
        received = b""
        while len(received) < 8 << 20:
            more = reader.recv(1 << 20)
            assert more, len(received)
            received += more
        uploads += [opened.enter_context(connected(port, upload)) for _ in range(2)]
        wait_until(lambda: sum(c.stage[0] == "work" for c in server.server_state.connections) == 8)
        assert everything(connected(port)) == b""
        application.release.set()
        for connection in uploads:
            connection.sendall(b"x")
            one(connection)


@pytest.mark.parametrize("length", ["small", "as large as they have to be"])
def test_a_body_of_tiny_chunks_is_refused(length):
    small = length == "small"
    chunk = b"1\r\nx\r\n" if small else b"%x\r\n%b\r\n" % (CHUNK_BYTES, b"x" * CHUNK_BYTES)
    head = b"POST /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with served() as (port, application, _), connected(port, head + chunk * (CHUNKS + 10)) as connection:
        if small:
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert (
                f"{CHUNKS + 1} chunks have {CHUNKS + 1} bytes"
                in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
            )
            wait_until(lambda: application.left)
        else:
            connection.sendall(b"0\r\n\r\n")
            application.release.set()
            one(connection)


def test_what_comes_behind_an_early_answer_is_thrown_away_unread(short, monkeypatch):
    """The client gets its answer and the end though it goes on sending; h11 sees none of that."""
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.5)
    monkeypatch.setattr(connections, "QUIET_SECONDS", 0.1)
    read = []
    receive = Reader.receive_data
    monkeypatch.setattr(Reader, "receive_data", lambda self, data: (read.append(len(data)), receive(self, data))[1])
    head = b"POST /closes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with served() as (port, _, server), connected(port, head) as connection:
        assert everything(connection).endswith(b"xx")
        wait_until(lambda: not sent(connection, (b"1000\r\n" + bytes(0x1000) + b"\r\n") * 100))
        assert sum(read) == len(head)
        wait_until(lambda: not server.server_state.connections)
        connection.close()
        with connected(port, head) as quiet:
            assert everything(quiet).endswith(b"xx")
            wait_until(lambda: not server.server_state.connections)


def test_a_client_that_resets_its_connection_behind_an_early_answer_is_no_error(monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", errors := Mock())
    gone = Mock(side_effect=OSError(errno.ENOTCONN, "Transport endpoint is not connected"))
    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", gone)
    head = b"POST /closes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with served() as (port, _, server), connected(port, head) as connection:
        assert everything(connection).endswith(b"xx")
        wait_until(lambda: not server.server_state.connections)
    assert gone.called
    assert not errors.called


def test_at_most_so_much_is_read_of_one_connection_at_a_time(monkeypatch):
    read = []
    receive = Reader.receive_data
    monkeypatch.setattr(Reader, "receive_data", lambda self, data: (read.append(len(data)), receive(self, data))[1])
    with served() as (port, application, _), connected(port, request("/slow", body=bytes(1 << 20))) as connection:
        application.release.set()
        one(connection)
    assert sum(read) > 1 << 20
    assert max(read) <= connections.READ_BYTES


@pytest.mark.parametrize(
    "sent", [b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n"]
)
def test_what_is_no_request_is_told_so_as_openai_would(sent):
    with served() as (port, _, _), connected(port, sent) as connection:
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "not a valid request" in error["message"]


def test_a_whole_uri_is_a_path_of_its_host():
    """It takes the place of the header Host (RFC 9112, 3.2.2)."""
    seen = h11.Request(method="GET", target="HTTP://a.example:80?b=c", headers=[("Host", "evil"), ("A", "b")])
    found = in_origin_form(seen)
    assert (found.target, list(found.headers)) == (b"/?b=c", [(b"host", b"a.example:80"), (b"a", b"b")])
    with served(buffer=65536) as (port, _, _), connected(port) as connection:
        connection.sendall(b"GET http://127.0.0.1/large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(everything(connection)) > 8 << 20


def test_who_takes_an_answer_too_slowly_as_a_whole_is_left(short, monkeypatch):
    """It takes some bytes now and then, which alone would keep it for hours; and who asks and never reads has an end
    too."""
    monkeypatch.setattr(connections, "SEND_BYTES", 1 << 24)
    with served(buffer=65536) as (port, _, server), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        received = 0
        with suppress(OSError):
            while more := connection.recv(20_000):
                time.sleep(0.02)
                received += len(more)
        assert received < 8 << 20
        wait_until(lambda: not server.server_state.connections)
    with served(buffer=4096) as (port, _, server), connected(port) as connection:
        connection.settimeout(0.2)
        wait_until(lambda: not sent(connection, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 100))
        wait_until(lambda: not server.server_state.connections)


def test_answers_that_nobody_takes_are_bounded_together(monkeypatch):
    """The one that has had the longest time goes."""
    monkeypatch.setattr(connections, "UNSENT_BYTES", 20 << 20)
    with served(buffer=65536) as (port, _, server), ExitStack() as opened:
        readers = []
        for i in range(4):
            readers.append(opened.enter_context(connected(port, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")))
            wait_until(lambda i=i: server.server_state.total_requests == i + 1)
            time.sleep(0.15)
        wait_until(lambda: len(server.server_state.connections) == 2)
        for i, reader in enumerate(readers):
            received = 0
            with suppress(ConnectionResetError):
                while received < 8 << 20 and (more := reader.recv(1 << 20)):
                    received += len(more)
            assert (received >= 8 << 20) == (i >= 2)


def test_the_address_is_that_of_the_connection():
    """A header chooses nobody's turn."""
    with served() as (port, application, _):
        http_request(port, "GET", "/", headers={"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"})
        assert application.scope["client"][0] == "127.0.0.1"
        assert application.scope["scheme"] == "http"


@linux
def test_a_burst_of_connections_is_accepted_piece_by_piece(monkeypatch, caplog):
    """While the loop is busy three hundred connect. It never has many more open than it may, so accept never fails."""
    monkeypatch.setattr(connections, "CONNECTIONS", 20)
    with served() as (port, _, server), ExitStack() as opened:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = len(os.listdir("/proc/self/fd")) + 300 + 20 + connections.SPARE
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        opened.enter_context(connected(port, b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n"))
        for _ in range(299):
            opened.enter_context(connected(port))
        assert http_request(port, "GET", "/")[0] == 200
        assert len(server.server_state.connections) <= 20
    assert caplog.records == []


@pytest.mark.slow
@linux
def test_the_command_withstands_half_open_connections_and_keeps_its_key(tmp_path):
    """As `mm1 serve` runs: with 256 descriptors, 260 connections that say nothing."""
    from mm1.engine.train.trainer import train

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
        wait_until(lambda: answers(port))
        environment = readable(f"/proc/{process.pid}/environ")
        assert b"sesame" not in environment + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if not os.getuid():
            assert b"MM1_API_KEY=\0" in environment
        with ExitStack() as opened, openai_client(port, "sesame") as client:
            for i in range(260):
                opened.enter_context(connected(port, (b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nX-a: ")[i % 3]))
            assert http_request(port, "GET", "/health")[0] == 200
            message = {"role": "user", "content": [image_part(data_url(png(picture())))]}
            found = client.chat.completions.create(model="served", messages=[message], max_tokens=2)
            assert found.usage.completion_tokens
        status, _, answer = http_request(port, "POST", CHAT, {}, {"Authorization": "Bearer sesamf"})
        assert (status, b"sesame" in answer) == (401, False)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        told = "served was not trained on conversations: chats become plain text\n"
        assert (process.returncode, out, errors) == (0, "", told)
    finally:
        process.kill()


def answers(port) -> bool:
    try:
        return http_request(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def readable(path) -> bytes:
    """What another process of this user can read of it; root reads all."""
    try:
        return Path(path).read_bytes()
    except PermissionError:
        return b""
