"""Images of strangers are decoded in processes of their own, which can open nothing, know nothing and are killed.

A worker process imports the decoders and is then asked to fork, once an image. The child drops root, bounds its memory
and time, and installs a seccomp filter before it reads a byte of the image; it answers and ends. So no image meets what
another one left behind, and the worker itself never sees an image.
Run as a module this file is a worker; it knows no torch.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from PIL import Image, MpoImagePlugin  # noqa: F401  the JPEG plugin imports it when it meets a file of several pictures

from mm1.engine.data.images import ImagePolicy, decode
from mm1.engine.serve import seccomp
from mm1.engine.serve.turns import Kept
from mm1.errors import Unreadable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SECONDS = 10  # for an image, by the clock and of CPU time
START_SECONDS = 60  # for a worker to begin, on a machine that is busy
HEAD_BYTES = 1 << 16  # of an answer, before its pixels
NOBODY = 65534  # user and group that a child of root becomes
V = TypeVar("V")


@dataclass(eq=False)
class Worker:
    """A process that forks to decode an image. control: a Unix socket that carries descriptors to it."""

    process: Process
    control: socket.socket

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait(self) -> int:
        return await self.process.wait()

    def kill(self) -> None:
        """Kill the worker and its child: both are in a process group of their own."""
        self.control.close()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def asked(self, data: bytes, most: int) -> bytes:
        """Return what the child of an image wrote, when it has ended. Raises ValueError beyond so many bytes."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.control, [b"\0"], [theirs.fileno()])
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(data)
            writer.write_eof()
            answer = bytearray()
            while more := await reader.read(1 << 20):
                answer += more
                if len(answer) > most:
                    raise ValueError("the answer is too long")
        finally:
            writer.transport.abort()
        if not await asyncio.get_running_loop().sock_recv(self.control, 1):
            raise ConnectionError("the worker has ended")
        return bytes(answer)


class Decoder:
    """Encoded bytes -> views, uint8 [H, W, 3] each, as the policy has them. Use it with `async with`.

    waiting: images that may wait for one of the processes; kept: bytes of views that are kept by content.
    """

    def __init__(
        self, policy: ImagePolicy, max_pixels: int, *, processes: int = 2, waiting: int = 256, kept: int = 1 << 28
    ):
        self.policy, self.max_pixels, self.processes = policy, max_pixels, processes
        self.room = waiting
        self.missing = ""  # why the workers' children have no seccomp filter, if they have none
        self.idle: asyncio.Queue[Worker | None] = asyncio.Queue()  # None: one that is yet to be started
        self.views: Kept[list[np.ndarray]] = Kept(kept)
        self.tasks: set[asyncio.Task[Any]] = set()  # of images whose client may have gone, and of workers that start

    async def __aenter__(self) -> "Decoder":
        for worker in await asyncio.gather(*(self._started() for _ in range(self.processes))):
            self.idle.put_nowait(worker)
        if self.missing:
            logging.getLogger(__name__).warning("images are decoded without a seccomp filter: %s", self.missing)
        return self

    async def __aexit__(self, *_error: object) -> None:
        while self.tasks:
            await asyncio.wait(self.tasks)
        for _ in range(self.processes):
            if worker := await self.idle.get():
                worker.kill()
                await worker.wait()

    async def decode(self, data: bytes) -> list[np.ndarray]:
        """Raises Unreadable for what is no good image, Busy if too many wait.

        An image whose client leaves is decoded to its end: to kill its process would make another client wait for the
        start of the next.
        """
        digest = (await asyncio.to_thread(hashlib.sha256, data)).digest()
        if known := self.views.get(digest):
            return known
        worker = await self._turn()
        task = self._begun(self._decoded(worker, data))
        try:
            found = await asyncio.shield(task)
        finally:  # who has gone keeps its turn until the process is free
            await asyncio.wait([task])
        if isinstance(found, str):
            raise Unreadable(found)
        self.views.keep(digest, found, sum(view.nbytes for view in found))
        return found

    def _begun(self, work: Coroutine[Any, Any, V]) -> "asyncio.Task[V]":
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _decoded(self, worker: Worker | None, data: bytes) -> list[np.ndarray] | str:
        """Return views, or why there are none, and give the worker back or start another."""
        good = False
        try:
            worker = worker or await self._started()
            async with asyncio.timeout(SECONDS):
                answer = await worker.asked(data, HEAD_BYTES + self.policy.most_bytes)
            good = True
            return self._read(answer)
        except TimeoutError:
            return f"the image took more than {SECONDS} s to decode"
        except (OSError, ValueError, TypeError, RecursionError):
            return "the image broke its decoder"
        finally:
            if good:
                self.idle.put_nowait(worker)
            else:
                if worker:
                    worker.kill()
                self._begun(self._replace())

    async def _replace(self) -> None:
        """Start a worker; if that fails, whoever needs it tries once more and is told."""
        worker = None
        try:
            worker = await self._started()
        except (OSError, RuntimeError) as error:
            logging.getLogger(__name__).error("%s", error)
        finally:
            self.idle.put_nowait(worker)

    async def _turn(self) -> Worker | None:
        from mm1.engine.infer.engine import Busy  # not above: it knows torch

        if not self.room:
            raise Busy("too many images wait to be decoded")
        self.room -= 1
        try:
            return await self.idle.get()
        finally:
            self.room += 1

    async def _started(self) -> Worker:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "mm1.engine.serve.images",
                json.dumps([self.max_pixels, *astuple(self.policy)]),
                stdin=theirs.fileno(), stdout=DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        worker = Worker(process, ours)
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await asyncio.get_running_loop().sock_recv(ours, 1000)
            self.missing = json.loads(ready)
        except (TimeoutError, OSError, ValueError):
            worker.kill()
            raise RuntimeError("a process that decodes images did not start") from None
        except BaseException:
            worker.kill()
            raise
        return worker

    def _read(self, answer: bytes) -> list[np.ndarray] | str:
        """Return views, or why there are none. Nothing in an answer is trusted: a bad one raises ValueError."""
        head, _, pixels = answer.partition(b"\n")
        shapes = json.loads(head[:HEAD_BYTES])
        if isinstance(shapes, str):
            return shapes
        patch, count = self.policy.patch, self.policy.count
        if not isinstance(shapes, list) or len(shapes) != count:
            raise ValueError(f"expected {count} views")
        found, at = [], 0
        for height, width in shapes:
            if not (type(height) is type(width) is int and height > 0 and width > 0):
                raise ValueError("a side is no positive number")
            if height % patch or width % patch or height * width > self.policy.longest * patch**2:
                raise ValueError("a view does not consist of patches, or has too many")
            size = math.prod((height, width, 3))
            found.append(np.frombuffer(bytearray(pixels[at : at + size]), np.uint8).reshape(height, width, 3))
            at += size
        if at != len(pixels):
            raise ValueError("more or fewer bytes than pixels")
        return found


def views(data: bytes, policy: ImagePolicy, max_pixels: int) -> list[np.ndarray]:
    """Decode an image and resize it; the header is looked at before anything else. Raises Unreadable."""
    return policy.views(decode(data, FORMATS, max_pixels))


def _confine(max_pixels: int) -> None:
    """Give up for good what decoding does not need. Raises OSError if there is no seccomp; all else is done then.

    Memory: 512 MiB to begin with; 16-bit pixels take 32 bytes on their way to RGB.
    """
    import resource

    limits = {"AS": (512 << 20) + 32 * max_pixels, "CPU": SECONDS + 1, "NOFILE": 0, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, most in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(ValueError):  # macOS does not bound addresses
            resource.setrlimit(number, (most, most))
    signal.alarm(SECONDS + 1)
    _drop_root()
    seccomp.install()


def _drop_root() -> None:
    """Become nobody, as far as a container has this user and the right to become it."""
    if os.geteuid() == 0:
        for drop in (partial(os.setgroups, []), partial(os.setgid, NOBODY), partial(os.setuid, NOBODY)):
            with suppress(OSError):
                drop()


def _warm_up(policy: ImagePolicy) -> None:
    """Imports what decoding any of the formats imports: later it could not."""
    for form in FORMATS:
        exif, file = Image.Exif(), BytesIO()
        exif[0x0112] = 6  # orientation
        options = {} if form in ("GIF", "BMP") else {"exif": exif}
        Image.new("L", (16, 8)).save(file, form, **options)
        views(file.getvalue(), policy, 1 << 20)


def _missing(max_pixels: int, policy: ImagePolicy) -> str:
    """Return why a child cannot decode under a seccomp filter, "" if it can, by trying."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            _confine(max_pixels)
            _warm_up(policy)
        except BaseException as error:
            os.write(writer, f"{error}"[:500].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    reason = os.read(reader, 1000).decode()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return reason or (f"a decoder under it ended with status {status}" if status else "")


def _answer(max_pixels: int, policy: ImagePolicy, confined: bool) -> None:
    """Read an image from descriptor 0 and write the answer to 1.

    The answer is a line of JSON, [[height, width], …] or why there are no views, and their bytes.
    """
    try:
        _confine(max_pixels)
    except OSError:
        if confined:
            raise
    try:
        with open(0, "rb", closefd=False) as file:
            found = views(file.read(), policy, max_pixels)
    except (Unreadable, MemoryError) as error:
        found = []
        answer = str(error) or "the image takes too much memory"
    else:
        answer = [view.shape[:2] for view in found]
    with open(1, "wb", closefd=False) as file:
        file.write(json.dumps(answer).encode() + b"\n")
        for view in found:
            file.write(view.tobytes())


def _work(control: socket.socket, max_pixels: int, policy: ImagePolicy) -> None:
    """Fork for each descriptor that comes: it is the child's input and output. A byte goes back when it has ended."""
    _warm_up(policy)
    Image.MAX_IMAGE_PIXELS = max_pixels
    missing = _missing(max_pixels, policy)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    control.sendall(json.dumps(missing).encode())
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        [descriptor] = descriptors
        if not (child := os.fork()):
            os.dup2(descriptor, 0)
            os.dup2(descriptor, 1)
            os.closerange(3, descriptor + 1)
            try:
                _answer(max_pixels, policy, not missing)
            finally:
                os._exit(0)
        os.close(descriptor)
        os.waitpid(child, 0)
        control.sendall(b"\0")


if __name__ == "__main__":
    _pixels, *_policy = json.loads(sys.argv[1])
    _control = socket.socket(fileno=os.dup(0))
    _work(_control, _pixels, ImagePolicy(*_policy))
