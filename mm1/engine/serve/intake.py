"""Turn the texts and images of a request into a document for the engine, so that no request blocks the others.

Slow work on text, base64, hashes and tokens runs in threads, in calls that are short or release the interpreter's lock,
and clients take turns. The memory of decoded images is reserved from a fixed budget until their request has ended,
because a preempted request is computed again, its images included.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mm1.engine.data.codecs import codec_of
from mm1.engine.data.document import Document, document_of
from mm1.engine.data.record import View
from mm1.engine.data.references import read_image
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.prompts import refuse_long_text
from mm1.engine.serve import urls
from mm1.engine.serve.images import Decoder
from mm1.engine.serve.metrics import Metrics
from mm1.engine.serve.replies import Picture
from mm1.engine.serve.turns import LRUCache, Room, Turns, finished
from mm1.errors import Busy, Unreadable, UserError

T = TypeVar("T")

LONG = 1 << 16  # bytes or characters of input from which on work waits for a turn; less takes a few milliseconds
THREADS = 4  # long work uses two of them
IMAGES_SECONDS = 120  # limit of the time for all images of a request, from its turn on
VIEW_BYTES = 1 << 30  # memory for the decoded images of all requests
VIEW_SECONDS = 30  # limit of the time that a request waits for that memory


class Intake:
    """Prepare the documents of requests.

    max_images: limit of images of one prompt; max_bytes: limit of one fetched image; allow_urls: whether http(s) URLs
    are fetched; files: uploaded images by id; room: the memory for decoded images.
    """

    def __init__(
        self, engine: Engine, decoder: Decoder, metrics: Metrics, *, max_images: int, max_bytes: int, allow_urls: bool
    ):
        self.tokenizer, self.slots = engine.tokenizer, engine.model.config.images.slots
        self.decoder, self.metrics = decoder, metrics
        self.max_images, self.max_bytes, self.allow_urls = max_images, max_bytes, allow_urls
        self.context = engine.context
        self.image_bytes = codec_of(engine.model.config).max_bytes
        self.files: LRUCache[bytes] = LRUCache(8 * max_bytes)
        self.long, self.pictures = Turns(total=2, each=1), Turns(total=8, each=4)
        self.room = Room(max(VIEW_BYTES, max_images * self.image_bytes))
        self.threads = ThreadPoolExecutor(THREADS, "mm1-intake")
        self.fetcher = urls.Fetcher()

    async def run(self, work: Callable[[], T], size: int = 0, client: str = "") -> T:
        """Run work in a thread and return its result.

        size: bytes or characters of the input; from LONG on the work waits for a turn of the client.
        """
        turn: AbstractAsyncContextManager[None] = self.long.turn(client) if size >= LONG else nullcontext()
        async with turn:
            return await finished(asyncio.get_running_loop().run_in_executor(self.threads, work))

    @asynccontextmanager
    async def document(self, parts: Sequence[str | Picture], client: str) -> AsyncIterator[Document]:
        """Yield the document of texts and images; the memory of its decoded images is reserved until the context ends.

        Raises UserError, Unreadable and Busy; a text that cannot fit is refused before any of it is encoded.
        """
        pictures = sum(isinstance(part, Picture) for part in parts)
        if pictures > self.max_images:
            raise UserError(f"{pictures} images, expected at most {self.max_images}")
        size = refuse_long_text(self.tokenizer, parts, self.context)
        reserved = pictures * self.image_bytes
        try:
            async with asyncio.timeout(VIEW_SECONDS):
                if pictures:  # a request without images does not queue
                    await self.room.acquire(reserved, client)
        except TimeoutError:
            raise Busy("the images of other requests fill the memory for images") from None
        try:
            decoded: list[Any] = list(parts)
            if pictures:
                async with self.pictures.turn(client):
                    await self._decode_all(decoded, client)
            del parts  # which has the text of data: URLs
            pixels = sum(view.nbytes for part in decoded if not isinstance(part, str) for view in part)
            self.room.release(reserved - pixels, client)
            reserved = pixels
            # Hashing 512 bytes takes as long as tokenizing one character.
            yield await self.run(lambda: self._encode(decoded), size + pixels // 512, client)
        finally:
            self.room.release(reserved, client)

    async def views(self, data: bytes, client: str) -> list[np.ndarray]:
        """Decode an image in the client's turn. Raises Unreadable and Busy."""
        async with self.pictures.turn(client):
            return await self._decode(data)

    def close(self) -> None:
        """Cancel work that has not begun."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.fetcher.close()

    async def _decode_all(self, parts: list[Any], client: str) -> None:
        """Replace each picture by its views. Raises UserError with the number of the picture that is wrong."""
        number = 0
        try:
            async with asyncio.timeout(IMAGES_SECONDS):
                for i, part in enumerate(parts):
                    if isinstance(part, Picture):
                        number += 1
                        parts[i] = await self._decode(await self._read(part, client))
        except TimeoutError:
            # Busy, not the client's error: each image has limits of its own, so most of the time was spent waiting.
            raise Busy(f"the images took more than {IMAGES_SECONDS} s, at image {number}") from None
        except (UserError, Unreadable) as error:
            raise UserError(f"image {number}: {error}") from None

    async def _read(self, picture: Picture, client: str) -> bytes:
        """Return the encoded bytes of an image, from its data: URL, an uploaded file or the web. Raises UserError."""
        url = picture.url
        if url[:5].lower() == "data:":
            return await self.run(lambda: read_image(url, Path()), len(url), client)
        if data := self.files.get(url):
            return data
        if url.startswith("file-"):
            raise UserError(f"there is no file {url[:60]!r}, or not any more: upload it again")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the URL is {url[:60]!r}, expected a data: URL or the id of an uploaded file")
        if not self.allow_urls:
            raise UserError("this server fetches no URLs (mm1 serve --allow-urls would)")
        return await self.fetcher.fetch(url, self.max_bytes)

    async def _decode(self, data: bytes) -> list[np.ndarray]:
        try:
            views = await self.decoder.decode(data)
        except Unreadable:
            self.metrics.images.labels("refused").inc()
            raise
        self.metrics.images.labels("decoded").inc()
        return views

    def _encode(self, parts: list[Any]) -> Document:
        parts = [part if isinstance(part, str) else [View("image", pixels) for pixels in part] for part in parts]
        document = document_of(self.tokenizer, self.slots, parts, "chat")
        document.digests  # noqa: B018, computed here, not on the engine's thread
        return document
