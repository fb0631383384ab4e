"""The process that decodes an image is attacked from inside, and gives hostile answers: neither helps it."""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from service import ROOT, png
from test_generate import picture

from mm1.engine.data.images import ImagePolicy, decode
from mm1.engine.serve import images, seccomp
from mm1.engine.serve.images import Decoder
from mm1.errors import Unreadable

POLICY = ImagePolicy(4, "native", 24, 64)
linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in seccomp.MACHINES, reason="seccomp is known for two machines"
)
OBVIOUS = ("open", "environ of the parent", "socket", "connect", "kill", "unlink", "execve", "fork", "clone", "symlink")


@linux
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_no_attack_from_inside_succeeds(user):
    if os.getuid() and user == "root":
        pytest.skip("these tests run as an ordinary user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        number = images.NOBODY if not os.getuid() and user == "nobody" else 0
        command = [sys.executable, str(ROOT / "tests" / "sandbox_attacks.py"), folder, str(number)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "MM1_API_KEY": "sesame"},
                              capture_output=True, text=True, check=True, timeout=120)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    attacks = found["attacks"]
    assert {name: with_it for name, (_, with_it) in attacks.items() if with_it not in ("killed", "refused")} == {}
    assert [attacks[name][0] for name in OBVIOUS] == ["succeeded"] * len(OBVIOUS)  # where nothing holds them back
    if user == "nobody":
        assert found["inspected"] == [True, False]  # before and after forbid_inspection


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_lets_through_what_is_listed_and_that_alone(machine):
    """Interpreted here, for the numbers of both machines, of x32 and of 32 bits. 0x22: private, anonymous."""
    architecture, _, column = seccomp.MACHINES[machine]

    def verdict(number, arguments=(0,) * 6, arch=architecture):
        data = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: arch,
                **{seccomp.ARGUMENTS + 8 * i: a for i, a in enumerate(arguments)}}  # fmt: skip
        return run(seccomp.program(machine), data)

    allowed = {row[column] for row in seccomp.ALLOWED.values()}
    refused = {row[column] for row in seccomp.REFUSED.values()}
    mapped = {seccomp.MMAP[column], seccomp.MPROTECT[column]}
    for number in range(600):
        truth = seccomp.ALLOW if number in allowed else seccomp.ERRNO | 1 if number in refused else seccomp.KILL
        assert number in mapped or verdict(number) == truth
        assert verdict(number | 0x4000_0000) == verdict(number, arch=0x4000_0003) == seccomp.KILL
    for protection, flags, truth in ((3, 0x22, True), (0, 0x4022, True), (3, 2, False), (5, 0x22, False)):
        found = verdict(seccomp.MMAP[column], (0, 4096, protection, flags, -1, 0))
        assert found == (seccomp.ALLOW if truth else seccomp.ERRNO | 1)
    assert verdict(seccomp.MPROTECT[column], (0, 4096, 3)) == seccomp.ALLOW
    assert verdict(seccomp.MPROTECT[column], (0, 4096, 7)) == seccomp.ERRNO | 1


def run(lines, data):
    """Classic BPF, as much as there is of it here."""
    at, value = 0, 0
    while True:
        code, if_true, if_false, k = struct.unpack("HBBI", lines[at])
        if code == seccomp.RETURN:
            return k
        if code == seccomp.LOAD:
            value, jump = data[k], 0
        else:
            holds = {seccomp.EQUAL: value == k, seccomp.ANY_BIT: value & k}[code]
            jump = if_true if holds else if_false
        at += 1 + jump


@asynccontextmanager
async def waiting_child(worker):
    """The process of an image that has yet to come; afterwards it has ended."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            socket.send_fds(worker.control, [b"\0"], [theirs.fileno()])
        children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
        while not (child := children.read_text().split()):
            await asyncio.sleep(0.005)
        yield int(child[0])
    assert await asyncio.get_running_loop().sock_recv(worker.control, 1)


@linux
def test_the_process_of_an_image_has_nothing(monkeypatch):
    monkeypatch.setenv("MM1_API_KEY", "secret")

    async def looked_at():
        async with asyncio.timeout(60), Decoder(POLICY, 1_000_000, processes=1) as decoder:
            worker = await decoder.idle.get()
            async with waiting_child(worker) as child:
                folder = Path(f"/proc/{child}")
                while "Seccomp:\t2" not in (status := (folder / "status").read_text()):
                    await asyncio.sleep(0.005)
                found = (
                    (folder / "limits").read_text(),
                    Path(f"/proc/{worker.process.pid}/environ").read_bytes(),
                    status,
                )
                maps = (folder / "maps").read_text() if not os.getuid() else ""
                files = sorted(os.listdir(folder / "fd")) if not os.getuid() else ["0", "1", "2"]
                errors = os.readlink(folder / "fd" / "2") if not os.getuid() else os.devnull
            decoder.idle.put_nowait(worker)
            return *found, maps, files, errors, decoder.unfiltered

    limits, environment, status, maps, files, errors, missing = asyncio.run(looked_at())
    found = {line[:25].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert found["Max open files"] == found["Max core file size"] == "0"
    assert found["Max file size"] == found["Max processes"] == "0"
    assert found["Max address space"] == str((512 << 20) + 32_000_000)
    assert found["Max cpu time"] == "11"
    said = dict(line.split(":\t") for line in status.splitlines())
    assert (said["NoNewPrivs"], said["Seccomp"], said["Threads"]) == ("1", "2", "1")
    if not os.getuid():
        assert (said["Uid"], said["CapEff"]) == ("\t".join(["65534"] * 4), "0" * 16)
    assert files == ["0", "1", "2"]
    assert errors == os.devnull
    assert b"secret" not in environment
    assert "libtorch" not in maps
    assert missing == ""


def saved(image, form, **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def forms() -> dict[str, bytes]:
    """Every format and mode, with what makes Pillow run code or import modules that it otherwise would not."""
    small, noise = picture(12, 24), picture(900, 700)
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    text.add_text("long", "x" * 5000, zip=True)
    text.add_itxt("international", "ü" * 5000, "de", "ü", zip=True)
    text.add(b"eXIf", b"broken")
    several = {"save_all": True, "append_images": [picture(12, 24, seed=1)]}
    found = {f"{form} {mode}": saved(small.convert(mode), form) for form, modes in {
        "PNG": ("RGB", "L", "RGBA", "P", "LA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"),
        "GIF": ("RGB", "P", "1"), "BMP": ("RGB", "L", "P", "1", "RGBA")}.items() for mode in modes}  # fmt: skip
    return found | {
        "PNG with texts": saved(small, "PNG", pnginfo=text, exif=exif),
        "PNG animated": saved(small, "PNG", **several),
        "PNG with a transparent colour": saved(small.convert("P"), "PNG", transparency=0),
        "JPEG progressive": saved(noise, "JPEG", progressive=True, quality=90),
        "JPEG turned": saved(small, "JPEG", exif=exif, icc_profile=b"x" * 300, comment=b"c"),
        "JPEG with broken EXIF": saved(small, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "JPEG of several pictures": saved(small, "MPO", **several),
        "WEBP lossless": saved(noise, "WEBP", lossless=True),
        "WEBP animated": saved(small, "WEBP", exif=exif, **several),
        "GIF animated": saved(small.convert("P"), "GIF", transparency=3, disposal=2, **several),
        "large": saved(Image.new("RGB", (3000, 2000), "red"), "PNG"),
        "large of 16 bits": saved(Image.new("I;16", (1600, 1200), 30_000), "PNG"),
    }


def test_all_formats_are_decoded_as_outside_of_the_sandbox():
    cases = forms()

    async def decoded():
        async with Decoder(POLICY, 1 << 24) as decoder:
            return dict(zip(cases, [await decoder.decode(case) for case in cases.values()], strict=True))

    for name, found in asyncio.run(decoded()).items():
        [truth], [view] = POLICY.views(decode(cases[name])), found
        assert np.array_equal(view, truth), name


@linux
def test_a_child_that_dies_costs_no_other_image():
    async def decoded():
        async with asyncio.timeout(60), Decoder(POLICY, 1 << 24, processes=1) as decoder:
            worker = await decoder.idle.get()
            async with waiting_child(worker) as child:
                os.kill(child, signal.SIGKILL)
            decoder.idle.put_nowait(worker)
            found = await decoder.decode(png(picture(12, 24, 2)))
            assert decoder.idle.get_nowait() is worker
            decoder.idle.put_nowait(worker)
            return found

    assert np.array_equal(asyncio.run(decoded())[0], POLICY.views(picture(12, 24, 2))[0])


def test_each_right_of_root_is_dropped_though_another_cannot_be(monkeypatch):
    dropped = []

    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "setgroups", forbidden)
    monkeypatch.setattr(os, "setgid", dropped.append)
    monkeypatch.setattr(os, "setuid", dropped.append)
    images.drop_root()
    assert dropped == [images.NOBODY] * 2


GOOD = b"[[4, 8]]\n" + bytes(4 * 8 * 3)
HOSTILE = {
    "nothing": b"", "no line": b"[[4, 8]]", "no JSON": b"x\n", "deep": b"[" * 60_000, "a long line": b"1" * (1 << 20),
    "null": b"null\n", "a number": b"3\n", "an object": b'{"4": 8}\n', "no views": b"[]\n", "no pair": b"[4, 8]\n",
    "of three": b"[[4, 8, 3]]\n" + bytes(96), "two views": b"[[4, 8], [4, 8]]\n" + bytes(192),
    "too few bytes": GOOD[:-1], "the beginning of the next answer": GOOD + GOOD, "a byte more": GOOD + b"\n",
    "of other sides": b"[[5, 8]]\n" + bytes(120), "no sides": b"[[0, 8]]\n", "negative": b"[[-4, -8]]\n" + bytes(96),
    "that add up": b"[[4000000, 4000000], [-4000000, 4000000]]\n", "infinite": b"[[Infinity, 8]]\n",
    "not a number": b"[[NaN, 8]]\n", "huge": b"[[1" + b"0" * 5000 + b", 8]]\n",
    "fractions": b"[[4.0, 8.0]]\n" + bytes(96), "texts": b'[["4", "8"]]\n' + bytes(96),
    "true": b"[[true, true]]\n" + bytes(3),
    "too large": b"[[400, 400]]\n" + bytes(480_000),
    "not UTF-8": b"\xff\xfe\n", "half a character": b'"\xc3"\n',
}  # fmt: skip


class Hostile:
    """A worker whose child answers like that."""

    killed = False

    def __init__(self, answer):
        self.answer = answer

    async def send(self, _data, most):
        assert len(self.answer) <= most or len(self.answer) > 9000  # which the real one does not read
        return self.answer

    def kill(self):
        self.killed = True


def answered(answer: bytes):
    async def decoded():
        decoder = Decoder(POLICY, 1 << 20)
        decoder.idle.put_nowait(Hostile(answer))  # pyright: ignore[reportArgumentType]
        return await decoder.decode(b"image")

    return asyncio.run(decoded())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused(name):
    with pytest.raises(Unreadable, match="broke its decoder"):
        answered(HOSTILE[name])


def test_a_reason_is_one_short_line():
    with pytest.raises(Unreadable, match="a b a b") as caught:
        answered(json.dumps("a\nb\r\n" * 2000).encode() + b"\n")
    assert len(str(caught.value)) <= 1000
    assert "\n" not in str(caught.value)


def test_random_answers_are_views_or_refused():
    random.seed(0)
    assert answered(GOOD)[0].shape == (4, 8, 3)
    for _ in range(300):
        answer = bytearray(GOOD)
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(len(answer) if random.random() < 0.3 else 9)
            answer[at : at + random.randrange(3)] = random.choice(
                [b"", b"9", b"[", b"]", b"-", b"e9", b",", b"\n", b'"', b"0", bytes([random.randrange(256)])]
            )
        try:
            [view] = answered(bytes(answer))
        except Unreadable:
            continue
        assert view.dtype == np.uint8
        assert view.shape[0] % 4 == view.shape[1] % 4 == 0
        assert view.nbytes <= 64 * 16 * 3


@pytest.mark.parametrize("ending", [True, False])
def test_a_child_that_writes_without_end_or_never_ends_is_left(monkeypatch, ending):
    """Here a thread is the worker. It writes for ever, or answers well and does not say that the child has ended."""
    monkeypatch.setattr(images, "SECONDS", 0.3)
    control, theirs = socket.socketpair()
    control.setblocking(False)
    written = 0

    def work():
        nonlocal written
        [descriptor] = socket.recv_fds(theirs, 1, 1)[1]
        with socket.socket(fileno=descriptor) as child:
            try:
                while not ending and child.recv(1000):
                    pass
                while ending:
                    written += child.send(b"1" * 65536)
                child.sendall(GOOD)
            except OSError:
                return

    async def decoded():
        decoder = Decoder(POLICY, 1 << 20)
        process = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
        decoder.idle.put_nowait(images.Worker(process, control))
        with pytest.raises(Unreadable, match="broke" if ending else "took more than"):
            await decoder.decode(b"image")
        assert await process.wait() < 0
        worker = await decoder.idle.get()  # another one, started in the background
        assert worker.process.pid != process.pid
        worker.kill()
        await worker.process.wait()

    thread = threading.Thread(target=work)
    thread.start()
    asyncio.run(decoded())
    thread.join(10)
    theirs.close()
    assert written < 1 << 21


def test_where_there_is_no_seccomp_the_decoder_says_so_and_the_other_limits_stay(monkeypatch, caplog, tmp_path):
    """A module of the same name, found first, stands for a system without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "from mm1.engine.serve import seccomp\n"
        "def install(): raise OSError('not on this system')\n"
        "seccomp.install = install\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def decoded():
        async with Decoder(POLICY, 1 << 20, processes=1) as decoder:
            return await decoder.decode(png(picture(12, 24))), decoder.unfiltered

    [view], missing = asyncio.run(decoded())
    assert np.array_equal(view, POLICY.views(picture(12, 24))[0])
    assert missing == "not on this system"
    [record] = caplog.records
    assert record.getMessage() == "images are decoded without a seccomp filter: not on this system"


def test_a_worker_ends_with_its_server():
    code = (
        "import asyncio, os; from mm1.engine.data.images import ImagePolicy\n"
        "from mm1.engine.serve.images import Decoder\n"
        "async def main():\n"
        "    worker = await Decoder(ImagePolicy(4, 'native', 24, 64), 1 << 20).start_worker()\n"
        "    print(worker.process.pid, flush=True); os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    end = time.monotonic() + 30
    while alive(int(found.stdout)):
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
