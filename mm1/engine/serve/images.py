"""Decode images from clients in sandboxed processes, which can open nothing, hold no secrets and can be killed.

A worker process imports the decoders and forks once for each image. The child drops root, limits its memory and time,
and installs a seccomp filter before it reads a byte of the image; it answers and exits. So no image can read memory
that another one used, and the worker itself never reads an image. This file, run as a module, is a worker. It does not
import torch.
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
from typing import Any

import numpy as np
from PIL import Image, MpoImagePlugin  # noqa: F401  the JPEG plugin imports it for a file of several pictures

from mm1.engine.data.images import ImagePolicy, decode
from mm1.engine.serve import seccomp
from mm1.engine.serve.turns import Limit, LRUCache
from mm1.errors import Unreadable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SECONDS = 10  # limit of wall-clock time and of CPU time for one image
START_SECONDS = 60  # limit of the time in which a worker starts, on a busy machine
HEAD_BYTES = 1 << 16  # limit of an answer's line of JSON, before its pixels
NOBODY = 65534  # user and group id of a child whose parent is root


@dataclass(eq=False)
class Worker:
    """Control a process that forks to decode an image. control: a Unix socket that passes file descriptors to it."""

    process: Process
    control: socket.socket

    def kill(self) -> None:
        """Kill the worker and its child, which share a process group."""
        self.control.close()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def send(self, data: bytes, max_bytes: int) -> bytes:
        """Let a new child decode an image, and return its output once it has exited.

        Raises ValueError for an output of more than max_bytes, OSError if the worker has ended.
        """
        near, far = socket.socketpair()
        with far:
            socket.send_fds(self.control, [b"\0"], [far.fileno()])
        reader, writer = await asyncio.open_connection(sock=near)
        try:
            writer.write(data)
            writer.write_eof()
            answer = bytearray()
            while piece := await reader.read(1 << 20):
                answer += piece
                if len(answer) > max_bytes:
                    raise ValueError("the answer is too long")
        finally:
            writer.transport.abort()
        if not await asyncio.get_running_loop().sock_recv(self.control, 1):
            raise ConnectionError("the worker has ended")
        return bytes(answer)


class Decoder:
    """Decode images into views, uint8 [H, W, 3] each, as the policy cuts them. Use it with `async with`.

    max_pixels: limit of pixels of one image; processes: number of workers; waiting: limit of images that wait for a
    worker; cache_bytes: limit of cached views, whose key is the content of the image.
    """

    def __init__(
        self, policy: ImagePolicy, max_pixels: int, *, processes: int = 2, waiting: int = 256,
        cache_bytes: int = 1 << 28,
    ):  # fmt: skip
        self.policy, self.max_pixels, self.processes = policy, max_pixels, processes
        self.waiting = Limit(waiting, "images wait to be decoded already")
        self.unfiltered = ""  # why the workers' children run without a seccomp filter, "" if they have one
        self.idle: asyncio.Queue[Worker | None] = asyncio.Queue()  # None: a worker that has to be started
        self.views: LRUCache[list[np.ndarray]] = LRUCache(cache_bytes)
        self.tasks: set[asyncio.Task[Any]] = set()  # decoding images, whose client may have left, and starting workers

    async def __aenter__(self) -> "Decoder":
        for worker in await asyncio.gather(*(self.start_worker() for _ in range(self.processes))):
            self.idle.put_nowait(worker)
        if self.unfiltered:
            logging.getLogger(__name__).warning("images are decoded without a seccomp filter: %s", self.unfiltered)
        return self

    async def __aexit__(self, *_error: object) -> None:
        while self.tasks:
            await asyncio.wait(self.tasks)
        for _ in range(self.processes):
            if worker := await self.idle.get():
                worker.kill()
                await worker.process.wait()

    async def decode(self, data: bytes) -> list[np.ndarray]:
        """Return an image's views. Raises Unreadable for a bad image, Busy if too many images wait.

        If the client leaves, the image is decoded nevertheless: killing its process would make another client wait for
        the start of a new one.
        """
        digest = (await asyncio.to_thread(hashlib.sha256, data)).digest()
        if cached := self.views.get(digest):
            return cached
        with self.waiting:
            worker = await self.idle.get()
        task = self._create_task(self._decode(worker, data))
        try:
            views = await asyncio.shield(task)
        finally:  # a cancelled caller keeps its turn until the process is free
            await asyncio.wait([task])
        if isinstance(views, str):
            raise Unreadable(views)
        self.views.add(digest, views, sum(view.nbytes for view in views))
        return views

    def _create_task(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _decode(self, worker: Worker | None, data: bytes) -> list[np.ndarray] | str:
        """Return views, or why there are none. The worker returns to the queue; one that failed is replaced."""
        healthy = False
        try:
            worker = worker or await self.start_worker()
            async with asyncio.timeout(SECONDS):
                answer = await worker.send(data, HEAD_BYTES + self.policy.max_bytes)
            healthy = True
            return self._read(answer)
        except TimeoutError:
            return f"the image took more than {SECONDS} s to decode"
        except (OSError, ValueError, TypeError, RecursionError):
            return "the image broke its decoder"
        finally:
            if healthy:
                self.idle.put_nowait(worker)
            else:
                if worker:
                    worker.kill()
                self._create_task(self._replace())

    async def _replace(self) -> None:
        """Add a new worker to the queue; if it does not start, the next image tries again and reports the failure."""
        worker = None
        try:
            worker = await self.start_worker()
        except (OSError, RuntimeError) as error:
            logging.getLogger(__name__).error("%s", error)
        finally:
            self.idle.put_nowait(worker)

    async def start_worker(self) -> Worker:
        """Return a worker that is ready. Raises RuntimeError if it does not start within START_SECONDS."""
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        near, far = socket.socketpair()
        near.setblocking(False)
        with far:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "mm1.engine.serve.images",
                json.dumps([self.max_pixels, *astuple(self.policy)]),
                stdin=far.fileno(), stdout=DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        worker = Worker(process, near)
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await asyncio.get_running_loop().sock_recv(near, 1000)
            self.unfiltered = json.loads(ready)
        except (TimeoutError, OSError, ValueError):
            worker.kill()
            raise RuntimeError("a process that decodes images did not start") from None
        except BaseException:
            worker.kill()
            raise
        return worker

    def _read(self, answer: bytes) -> list[np.ndarray] | str:
        """Return the views of an answer, or its reason why there are none. Raises ValueError for a malformed answer."""
        head, _, pixels = answer.partition(b"\n")
        shapes = json.loads(head[:HEAD_BYTES])
        if isinstance(shapes, str):
            return shapes
        patch, count = self.policy.patch, self.policy.max_views
        if not isinstance(shapes, list) or len(shapes) != count:
            raise ValueError(f"expected {count} views")
        views, at = [], 0
        for height, width in shapes:
            if not (type(height) is type(width) is int and height > 0 and width > 0):
                raise ValueError("a side is no positive number")
            if height % patch or width % patch or height * width > self.policy.max_patches * patch**2:
                raise ValueError("a view does not consist of patches, or has too many")
            size = math.prod((height, width, 3))
            views.append(np.frombuffer(bytearray(pixels[at : at + size]), np.uint8).reshape(height, width, 3))
            at += size
        if at != len(pixels):
            raise ValueError("more or fewer bytes than pixels")
        return views


def views(data: bytes, policy: ImagePolicy, max_pixels: int) -> list[np.ndarray]:
    """Decode an image and cut it by the policy; the size in its header is checked first. Raises Unreadable."""
    return policy.views(decode(data, FORMATS, max_pixels))


def confine(max_pixels: int) -> None:
    """Irrevocably drop every right that decoding does not need. Raises OSError if only seccomp could not be installed.

    The memory limit is 512 MiB plus 32 bytes a pixel, which is the peak of converting 16-bit pixels to RGB.
    """
    import resource

    limits = {"AS": (512 << 20) + 32 * max_pixels, "CPU": SECONDS + 1, "NOFILE": 0, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with suppress(ValueError):  # macOS has no limit of the address space
            resource.setrlimit(number, (limit, limit))
    signal.alarm(SECONDS + 1)
    drop_root()
    seccomp.install()


def drop_root() -> None:
    """Change to the user nobody, if the process is root. A container that forbids this is no error."""
    if os.geteuid() == 0:
        for drop in (partial(os.setgroups, []), partial(os.setgid, NOBODY), partial(os.setuid, NOBODY)):
            with suppress(OSError):
                drop()


def _warm_up(policy: ImagePolicy) -> None:
    """Decode an image of each format, which imports everything: a confined child cannot open files."""
    for form in FORMATS:
        exif, file = Image.Exif(), BytesIO()
        exif[0x0112] = 6  # orientation
        options = {} if form in ("GIF", "BMP") else {"exif": exif}
        Image.new("L", (16, 8)).save(file, form, **options)
        views(file.getvalue(), policy, 1 << 20)


def _why_unfiltered(max_pixels: int, policy: ImagePolicy) -> str:
    """Return why decoding fails in a confined child, "" if it works."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            confine(max_pixels)
            _warm_up(policy)
        except BaseException as error:
            os.write(writer, f"{error}"[:500].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    reason = os.read(reader, 1000).decode()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return reason or (f"a decoder under the filter ended with status {status}" if status else "")


def _answer(max_pixels: int, policy: ImagePolicy, confined: bool) -> None:
    """Read an image from descriptor 0 and write the answer to descriptor 1.

    The answer is a line of JSON, [[height, width], …] or the reason why there are no views, and the bytes of the views.
    confined: whether to fail without a seccomp filter.
    """
    try:
        confine(max_pixels)
    except OSError:
        if confined:
            raise
    try:
        with open(0, "rb", closefd=False) as file:
            decoded = views(file.read(), policy, max_pixels)
    except (Unreadable, MemoryError) as error:
        decoded = []
        answer = str(error) or "the image takes too much memory"
    else:
        answer = [view.shape[:2] for view in decoded]
    with open(1, "wb", closefd=False) as file:
        file.write(json.dumps(answer).encode() + b"\n")
        for view in decoded:
            file.write(view.tobytes())


def _work(control: socket.socket, max_pixels: int, policy: ImagePolicy) -> None:
    """Fork a child for each descriptor that arrives, as its input and output. Reply with a byte once it has exited."""
    _warm_up(policy)
    Image.MAX_IMAGE_PIXELS = max_pixels
    unfiltered = _why_unfiltered(max_pixels, policy)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    control.sendall(json.dumps(unfiltered).encode())
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        [descriptor] = descriptors
        if not (child := os.fork()):
            os.dup2(descriptor, 0)
            os.dup2(descriptor, 1)
            os.closerange(3, descriptor + 1)
            try:
                _answer(max_pixels, policy, not unfiltered)
            finally:
                os._exit(0)
        os.close(descriptor)
        os.waitpid(child, 0)
        control.sendall(b"\0")


if __name__ == "__main__":
    _pixels, *_policy = json.loads(sys.argv[1])
    _control = socket.socket(fileno=os.dup(0))
    _work(_control, _pixels, ImagePolicy(*_policy))
