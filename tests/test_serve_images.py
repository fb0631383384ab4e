"""Images of strangers: decoded apart, within bounds, and fetched from public addresses alone."""

import asyncio
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from service import (  # noqa: F401, fixtures
    CHAT,
    ROOT,
    data_url,
    http_request,
    image_part,
    metric,
    model_fixture,
    openai_client,
    plain_chat,
    png,
    port_fixture,
    refusal_of,
    run_alone,
    served_fixture,
    serving,
)
from test_generate import PROMPTS, picture

from mm1.engine.data.images import ImagePolicy
from mm1.engine.serve import images, urls
from mm1.engine.serve.images import Decoder
from mm1.errors import Busy, Unreadable, UserError


def header_of(width, height) -> bytes:
    """A PNG that claims to be so large, and ends where its pixels begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 1 << 20) + b"IDAT"


def bomb(side: int) -> bytes:
    """Black, whole and valid: a thousandth of its pixels' bytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    found = b"\x89PNG\r\n\x1a\n"
    for name, content in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ):
        found += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return found


def form_of(image, form, **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


NO_IMAGES = {
    "truncated": (png(picture(64, 64))[:-400], "broken image"),
    "of a billion pixels": (header_of(40_000, 25_000), "pixels"),
    "of 2^62 pixels": (header_of((1 << 31) - 1, (1 << 31) - 1), "pixels"),
    "of a few pixels too many": (header_of(5800, 5800), "expected at most 33554432"),
    "a bomb": (bomb(12_000), "pixels"),
    "text": (b"hello", "not an image"),
    "empty": (b"", "not an image"),
    "tiff": (form_of(picture(), "TIFF"), "not an image"),
    "eps": (form_of(picture(), "EPS"), "not an image"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_good_image_is_refused(port, name):
    data, why = NO_IMAGES[name]
    before = metric(port, "mm1_images_total")
    assert why in refusal_of(
        port, plain_chat([]) | {"messages": [{"role": "user", "content": [image_part(data_url(data))]}]}
    )
    assert metric(port, "mm1_images_total") == before + 1


NO_URLS = ["data:text/html;base64,AAAA", "data:image/png;base64,@@", "file:///etc/passwd", "/etc/passwd",
           "http://127.0.0.1/a.png", "https://example.com/a.png", "", "data:"]  # fmt: skip


@pytest.mark.parametrize("url", NO_URLS)
def test_an_image_is_data_or_an_upload_and_nothing_else(port, url):
    refusal_of(port, {"messages": [{"role": "user", "content": [image_part(url)]}]})


def test_images_are_counted_before_any_is_decoded(model):
    with serving(model, max_images=2) as (port, service):
        body = {"messages": [{"role": "user", "content": [image_part("data:image/png;base64,AAAA")] * 3}]}
        assert "3 images, expected at most 2" in refusal_of(port, body)
        assert not service.decoder.views.size
        assert http_request(port, "POST", CHAT, plain_chat([picture()] * 2, max_tokens=1))[0] == 200


def test_an_image_of_parts_comes_with_them():
    policy = ImagePolicy(4, "squash", 8, parts=2)

    async def decoded():
        async with Decoder(policy, 10_000, processes=1) as decoder:
            return await decoder.decode(png(picture(20, 20)))

    truth = policy.views(picture(20, 20))
    assert all(np.array_equal(a, b) for a, b in zip(asyncio.run(decoded()), truth, strict=True))


def test_too_little_memory_refuses_one_image():
    async def decoded():
        async with Decoder(ImagePolicy(4, "native", 24, 64), 60_000_000, processes=1) as decoder:
            worker = await decoder.idle.get()
            resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (200 << 20, 200 << 20))
            decoder.idle.put_nowait(worker)
            with pytest.raises(Unreadable, match="MemoryError"):
                await decoder.decode(form_of(Image.new("RGB", (7000, 7000)), "PNG"))
            return await decoder.decode(png(picture()))

    assert len(asyncio.run(decoded())) == 1


def killed(pid):
    os.kill(pid, signal.SIGKILL)


def stopped(pid):
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("how", [killed, stopped])
def test_a_process_that_breaks_fails_its_own_image(monkeypatch, how):
    monkeypatch.setattr(images, "SECONDS", 0.3)

    async def decoded():
        async with Decoder(ImagePolicy(4, "native", 24, 64), 10_000, processes=2) as decoder:
            ill, well = await decoder.idle.get(), await decoder.idle.get()
            how(ill.process.pid)
            decoder.idle.put_nowait(ill)
            decoder.idle.put_nowait(well)
            with pytest.raises(Unreadable, match="broke" if how is killed else "took more than"):
                await decoder.decode(png(picture(seed=0)))
            monkeypatch.setattr(images, "SECONDS", 30)
            for seed in range(1, 4):
                assert len(await decoder.decode(png(picture(seed=seed)))) == 1
            assert await ill.process.wait() != 0

    asyncio.run(decoded())


def test_who_leaves_while_an_image_is_decoded_leaves_no_answer_for_the_next():
    policy = ImagePolicy(4, "native", 24, 64)

    async def decoded():
        async with Decoder(policy, 1_000_000, processes=1) as decoder:
            task = asyncio.create_task(decoder.decode(png(picture(800, 800, 1))))
            while not decoder.idle.empty():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await decoder.decode(png(picture(12, 24, 2)))

    assert np.array_equal(asyncio.run(decoded())[0], policy.views(picture(12, 24, 2))[0])


def test_who_leaves_while_an_image_is_decoded_costs_the_others_no_process():
    """Nor do others wait for one that broke: the next worker starts by itself."""
    policy = ImagePolicy(4, "native", 24, 64)

    async def decoded():
        async with Decoder(policy, 10_000_000, processes=1) as decoder:
            worker = decoder.idle.get_nowait()
            decoder.idle.put_nowait(worker)
            for seed in range(3):
                task = asyncio.create_task(decoder.decode(png(picture(800, 800, seed))))
                while not decoder.idle.empty():
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not decoder.idle.empty()  # its turn lasted as long as its process was at work
            assert await decoder.idle.get() is worker
            worker.kill()
            decoder.idle.put_nowait(worker)
            with pytest.raises(Unreadable, match="broke"):
                await decoder.decode(png(picture(seed=4)))
            while decoder.idle.empty():
                await asyncio.sleep(0.01)
            other = decoder.idle.get_nowait()
            assert other.process.pid != worker.process.pid
            decoder.idle.put_nowait(other)

    asyncio.run(decoded())


def test_no_more_images_wait_than_may():
    async def decoded():
        async with Decoder(ImagePolicy(4, "native", 24, 64), 10_000, processes=1, waiting=2) as decoder:
            return await asyncio.gather(
                *(decoder.decode(png(picture(seed=s))) for s in range(5)), return_exceptions=True
            )

    found = asyncio.run(decoded())
    assert [isinstance(f, Busy) for f in found].count(True) == 2
    assert [isinstance(f, list) for f in found].count(True) == 3


def test_reading_images_needs_no_torch():
    code = "import sys, mm1.engine.serve.images; print({'torch', 'starlette'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"


OWN = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "169.254.169.254",
    "0.0.0.0",
    "::1",
    "fe80::1",
    "fd00::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "224.0.0.1",
    "100.64.0.1",
    "::",
    "255.255.255.255",
]


@pytest.mark.parametrize("address", OWN)
def test_no_address_of_ones_own_is_public(address):
    assert not urls.is_public(address)


def test_public_addresses_are():
    assert urls.is_public("93.184.216.34")
    assert urls.is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.fixture
def host():
    """A web server that answers what the path says."""
    answers = {
        "/a.png": b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n" + png(PROMPTS[1][0]),
        "/large": b"HTTP/1.0 200 OK\r\n\r\n" + bytes(1 << 20),
        "/moved": b"HTTP/1.0 302 Found\r\nLocation: /a.png\r\n\r\n",
        "/nothing": b"",
    }

    def answer():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            path = connection.recv(4096).decode().split()[1]
            with connection:
                if path != "/never":
                    connection.sendall(answers[path])
                else:
                    time.sleep(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_url_is_fetched_once_from_a_public_address_and_within_bounds(monkeypatch, host):
    def fetched(path):
        return asyncio.run(urls.Fetcher().fetch(host + path, 1 << 16))

    port = int(host.rpartition(":")[2])
    with pytest.raises(UserError, match=f"the port of 127.0.0.1 is {port}, expected 80 or 443"):
        fetched("/a.png")
    monkeypatch.setattr(urls, "PORTS", (port,))
    for name in ("localhost", "127.0.0.1", "127.1", "0x7f000001", "[::1]"):
        with pytest.raises(UserError, match="address"):
            asyncio.run(urls.Fetcher().fetch(f"http://{name}:{port}/a.png", 1 << 16))
    for wrong in ("ftp://x/a", "http:///a", "http://x:99999/", "http://x/a b", "http://x/\r\nHost: y", "http://ü/",
                  f"http://{'a' * 64}.example/", f"http://{'a.' * 200}/", "http://a\0b/", "http://a..b/"):  # fmt: skip
        with pytest.raises(UserError):
            asyncio.run(urls.Fetcher().fetch(wrong, 1 << 16))
    monkeypatch.setattr(urls, "is_public", lambda address: True)
    assert fetched("/a.png") == png(PROMPTS[1][0])
    with pytest.raises(UserError, match="more than 65536 bytes"):
        fetched("/large")
    with pytest.raises(UserError, match="answered 302"):
        fetched("/moved")
    with pytest.raises(UserError, match="answered nothing"):
        fetched("/nothing")
    monkeypatch.setattr(urls, "SECONDS", 0.2)
    with pytest.raises(UserError, match="took more than"):
        fetched("/never")


def test_slow_look_ups_take_no_thread_of_the_loop_and_are_bounded(monkeypatch):
    """Fifty names that no server answers for: what else waits for a thread of the loop's own is not held up."""
    answering, names = threading.Event(), []

    def look_up(name, *_args, **_kwargs):
        names.append(name)
        answering.wait(30)
        raise socket.gaierror(-2, "no such name")

    async def fetched():
        fetcher = urls.Fetcher()
        tasks = [asyncio.create_task(fetcher.fetch(f"http://host{i}.example/", 100)) for i in range(50)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        waiting = [task for task in tasks if task not in done]
        assert await asyncio.to_thread(lambda: "free") == "free"
        looked_up = len(names)
        answering.set()
        return looked_up, await asyncio.gather(*done, return_exceptions=True), await asyncio.gather(
            *waiting, return_exceptions=True)  # fmt: skip

    monkeypatch.setattr(urls.socket, "getaddrinfo", look_up)
    looked_up, refused_at_once, failed = asyncio.run(fetched())
    assert looked_up <= 2
    assert [type(error) for error in refused_at_once] == [Busy] * 18
    assert [type(error) for error in failed] == [UserError] * 32
    assert len(names) == 32


def test_urls_are_fetched_where_that_is_allowed(model, monkeypatch, host):
    with serving(model, allow_urls=True) as (port, _), openai_client(port) as client:
        monkeypatch.setattr(urls, "PORTS", (int(host.rpartition(":")[2]),))
        message = {"role": "user", "content": [image_part(f"{host}/a.png")]}
        assert "public address" in refusal_of(port, {"messages": [message]})
        monkeypatch.setattr(urls, "is_public", lambda address: True)
        found = client.chat.completions.create(model="small", messages=[message], max_tokens=8,
                                               extra_body={"template": "none"})  # fmt: skip
        assert found.choices[0].message.content == run_alone(model, PROMPTS[1], 8).text
