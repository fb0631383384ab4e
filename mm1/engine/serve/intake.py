"""From the bytes of a request to a document that the engine can take, so that no request holds up the others.

What takes long, of parsing, base64, hashes and tokens, happens in threads, in calls that give up the interpreter's lock
or are short. Clients take turns at it. The views of images are lent from a fixed number of bytes until their request
has ended: a request that is preempted is computed anew, also its images.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mm1.engine.data.document import Document
from mm1.engine.data.sources import read_image
from mm1.engine.infer.engine import Busy, Engine
from mm1.engine.infer.prompts import CHARACTERS, policy_of
from mm1.engine.serve import chat, urls
from mm1.engine.serve.images import Decoder
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.turns import Kept, Room, Turns, finished
from mm1.errors import Unreadable, UserError

T = TypeVar("T")

LONG = 1 << 16  # bytes or characters from which work waits for a turn; below, it takes a few milliseconds
THREADS = 4  # of which long work has two
IMAGES_SECONDS = 120  # for all images of a request, once it is its turn
VIEW_BYTES = 1 << 30  # of all requests' views
VIEW_SECONDS = 30  # that a request waits for them


class Intake:
    """What requests go through before the engine. max_images, max_bytes: of one request.

    files: uploaded images by their id. room: bytes that views may take.
    """

    def __init__(
        self, engine: Engine, decoder: Decoder, metrics: Metrics, *, max_images: int, max_bytes: int, allow_urls: bool
    ):
        self.tokenizer, self.slots = engine.tokenizer, engine.model.config.connector.tokens
        self.decoder, self.metrics = decoder, metrics
        self.max_images, self.max_bytes, self.allow_urls = max_images, max_bytes, allow_urls
        self.tokens = engine.context
        self.characters = self.tokens * max(CHARACTERS, self.tokenizer.longest)
        self.image_bytes = policy_of(engine.model).most_bytes
        self.files: Kept[bytes] = Kept(8 * max_bytes)
        self.long, self.pictures = Turns(most=2, each=1), Turns(most=8, each=4)
        self.room = Room(max(VIEW_BYTES, max_images * self.image_bytes))
        self.threads = ThreadPoolExecutor(THREADS, "mm1-intake")

    async def run(self, work: Callable[[], T], size: int = 0, client: str = "") -> T:
        """Do it in a thread; in the client's turn if its input is as large as LONG."""
        turn: AbstractAsyncContextManager[None] = self.long.turn(client) if size >= LONG else nullcontext()
        async with turn:
            return await finished(asyncio.get_running_loop().run_in_executor(self.threads, work))

    @asynccontextmanager
    async def document(self, parts: Sequence[str | chat.Picture], client: str) -> AsyncIterator[Document]:
        """Encode texts and images. The document's views count until the end of the context.

        Raises UserError, Unreadable and Busy; for a text that cannot fit before any of it is encoded.
        """
        pictures = sum(isinstance(part, chat.Picture) for part in parts)
        if pictures > self.max_images:
            raise UserError(f"{pictures} images, expected at most {self.max_images}")
        size = sum(len(part) for part in parts if isinstance(part, str))
        if size > self.characters:
            raise UserError(f"a text of {size} characters exceeds {self.tokens} tokens")
        async with self._lent(pictures * self.image_bytes, client) as lent:
            found: list[Any] = list(parts)
            if pictures:
                async with self.pictures.turn(client):
                    await self._see(found, client)
            del parts  # with the text of data: URLs
            pixels = sum(view.nbytes for part in found if not isinstance(part, str) for view in part)
            lent(pixels)
            # A hash of 512 bytes takes as long as the tokens of one character.
            yield await self.run(lambda: self._encoded(found), size + pixels // 512, client)

    async def views(self, data: bytes, client: str) -> list[np.ndarray]:
        """Decode an image."""
        async with self.pictures.turn(client):
            return await self._decoded(data)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _lent(self, most: int, client: str) -> AsyncIterator[Callable[[int], None]]:
        """Lend room for `most` bytes; call what it gives with the number that is needed once it is known."""
        held = min(most, self.room.size)
        try:
            async with asyncio.timeout(VIEW_SECONDS):
                if held:  # who needs none does not wait in line
                    await self.room.take(held, client)
        except TimeoutError:
            raise Busy("the images of other requests fill the memory for images") from None

        def needed(count: int) -> None:
            nonlocal held
            if count < held:
                self.room.give(held - count, client)
                held = count

        try:
            yield needed
        finally:
            if held:
                self.room.give(held, client)

    async def _see(self, parts: list[Any], client: str) -> None:
        """Put views in the places of pictures. Raises UserError that says which of them is wrong."""
        number = 0
        try:
            async with asyncio.timeout(IMAGES_SECONDS):
                for i, part in enumerate(parts):
                    if isinstance(part, chat.Picture):
                        number += 1
                        parts[i] = await self._decoded(await self._bytes_of(part, client))
        except TimeoutError:
            # Not the client's fault: each image has bounds of its own, so that most of the time went by in waiting.
            raise Busy(f"the images took more than {IMAGES_SECONDS} s, at image {number}") from None
        except (UserError, Unreadable) as error:
            raise UserError(f"image {number}: {error}") from None

    async def _bytes_of(self, picture: chat.Picture, client: str) -> bytes:
        url = picture.url
        if url[:5].lower() == "data:":
            return await self.run(lambda: read_image(url, Path()), len(url), client)
        if data := self.files.get(url):
            return data
        if url.startswith("file-"):
            raise UserError(f"there is no file {url[:60]!r} any more, or never was: upload it again")
        if not url.startswith(("http://", "https://")):
            raise UserError("an image is a data: URL or the id of an uploaded file")
        if not self.allow_urls:
            raise UserError("URLs are not fetched here (mm1 serve --allow-urls would)")
        return await urls.fetch(url, self.max_bytes)

    async def _decoded(self, data: bytes) -> list[np.ndarray]:
        try:
            views = await self.decoder.decode(data)
        except Unreadable:
            self.metrics.images.labels("refused").inc()
            raise
        self.metrics.images.labels("decoded").inc()
        return views

    def _encoded(self, parts: list[Any]) -> Document:
        document = chat.encode(self.tokenizer, self.slots, parts)
        document.digests  # noqa: B018, computed here, not on the engine's thread
        return document
