"""Images of strangers are decoded in processes of their own, which can open nothing, know nothing and are killed.

A process starts with an empty environment, and, before its first image, gives up opening files or sockets, forking and
writing files; memory, CPU time and pixels are bounded. What breaks it breaks one request: the next gets a new one.
Run as a module this file is such a process; it knows no torch.
"""

import asyncio
import hashlib
import json
import math
import os
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from dataclasses import astuple
from io import BytesIO
from typing import BinaryIO

import numpy as np

from mm1.engine.data.images import ImagePolicy, decode
from mm1.engine.data.record import Unreadable
from mm1.engine.serve.turns import Kept

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SECONDS = 10  # for an image, by the clock and of CPU time
START_SECONDS = 60  # for a process to begin, on a machine that is busy


class Decoder:
    """Encoded bytes -> views, uint8 [H, W, 3] each, as the policy has them. Use it with `async with`.

    waiting: images that may wait for one of the processes; kept: bytes of views that are kept by content.
    """

    def __init__(
        self, policy: ImagePolicy, max_pixels: int, *, processes: int = 2, waiting: int = 256, kept: int = 1 << 28
    ):
        self.policy, self.max_pixels, self.processes = policy, max_pixels, processes
        self.room = waiting
        self.idle: asyncio.Queue[Process | None] = asyncio.Queue()  # None: one that is yet to be started
        self.views: Kept[list[np.ndarray]] = Kept(kept)

    async def __aenter__(self) -> "Decoder":
        for process in await asyncio.gather(*(self._started() for _ in range(self.processes))):
            self.idle.put_nowait(process)
        return self

    async def __aexit__(self, *_error: object) -> None:
        for _ in range(self.processes):
            if process := await self.idle.get():
                _kill(process)
                await process.wait()

    async def decode(self, data: bytes) -> list[np.ndarray]:
        """Raises Unreadable for what is no good image, Busy if too many wait."""
        digest = (await asyncio.to_thread(hashlib.sha256, data)).digest()
        if known := self.views.get(digest):
            return known
        process = await self._turn()
        good = False
        try:
            process = process or await self._started()
            async with asyncio.timeout(SECONDS):
                found = await self._asked(process, data)
            good = True
        except TimeoutError:
            raise Unreadable(f"the image took more than {SECONDS} s to decode") from None
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, TypeError):
            raise Unreadable("the image broke its decoder") from None
        finally:
            self.idle.put_nowait(process if good else None)
            if not good:  # also if whoever asked has gone: its answer would be the next one's
                _kill(process)
        if isinstance(found, str):
            raise Unreadable(found)
        self.views.keep(digest, found, sum(view.nbytes for view in found))
        return found

    async def _turn(self) -> Process | None:
        from mm1.engine.engine import Busy  # not above: it knows torch

        if not self.room:
            raise Busy("too many images wait to be decoded")
        self.room -= 1
        try:
            return await self.idle.get()
        finally:
            self.room += 1

    async def _started(self) -> Process:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "mm1.engine.serve.images", json.dumps([self.max_pixels, *astuple(self.policy)]),
            stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        line = None
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(START_SECONDS):
                    line = process.stdout and await process.stdout.readline()
            if line != b"ready\n":
                raise RuntimeError("a process that decodes images did not start")
        except BaseException:
            _kill(process)
            raise
        return process

    async def _asked(self, process: Process, data: bytes) -> list[np.ndarray] | str:
        """Views, or why there are none. Nothing that comes back is trusted."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(len(data).to_bytes(8) + data)
        await process.stdin.drain()
        answer = json.loads(await process.stdout.readline() or "null")
        if isinstance(answer, str):
            return answer
        shapes = [(int(height), int(width), 3) for height, width in answer or ()]
        pixels = (1 + self.policy.parts**2) * self.policy.longest * self.policy.patch**2
        if not shapes or sum(height * width for height, width, _ in shapes) > pixels:
            raise ValueError("no views")
        return [
            np.frombuffer(bytearray(await process.stdout.readexactly(math.prod(shape))), np.uint8).reshape(shape)
            for shape in shapes
        ]


def _kill(process: Process | None) -> None:
    if process:
        with suppress(ProcessLookupError):
            process.kill()


def views(data: bytes, policy: ImagePolicy, max_pixels: int) -> list[np.ndarray]:
    """Decode an image and resize it; the header is looked at before anything else. Raises Unreadable."""
    return policy.views(decode(data, FORMATS, max_pixels))


def _confine(max_pixels: int) -> None:
    """What is given up for good. Memory: 512 MiB to begin with; 16-bit pixels take 32 bytes on their way to RGB."""
    import resource

    memory = (512 << 20) + 32 * max_pixels
    limits = {"AS": memory, "NOFILE": 3, "NPROC": 0, "FSIZE": 0, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _allow_cpu_seconds(more: int) -> None:
    import resource
    import time

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + more + 1, hard))


def _warm_up(policy: ImagePolicy) -> None:
    """Imports what decoding any of the formats imports: later it could not."""
    from PIL import Image

    for form in FORMATS:
        exif, file = Image.Exif(), BytesIO()
        exif[0x0112] = 6  # orientation
        options = {} if form in ("GIF", "BMP") else {"exif": exif}
        Image.new("L", (16, 8)).save(file, form, **options)
        views(file.getvalue(), policy, 1 << 20)


def _work(stdin: BinaryIO, stdout: BinaryIO, max_pixels: int, policy: ImagePolicy) -> None:
    """Asked: length in 8 bytes, image. Answered: a line of JSON, [[height, width], …] or what is wrong, and pixels."""
    from PIL import Image

    _warm_up(policy)
    Image.MAX_IMAGE_PIXELS = max_pixels
    _confine(max_pixels)
    stdout.write(b"ready\n")
    stdout.flush()
    while size := stdin.read(8):
        _allow_cpu_seconds(SECONDS)
        try:
            found = views(stdin.read(int.from_bytes(size)), policy, max_pixels)
        except (Unreadable, MemoryError) as error:
            found = []
            answer = str(error) or "the image takes too much memory"
        else:
            answer = [view.shape[:2] for view in found]
        stdout.write(json.dumps(answer).encode() + b"\n")
        for view in found:
            stdout.write(view.tobytes())
        stdout.flush()


if __name__ == "__main__":
    _pixels, *_policy = json.loads(sys.argv[1])
    _work(sys.stdin.buffer, sys.stdout.buffer, _pixels, ImagePolicy(*_policy))
