"""The command `mm1 serve`."""

from pathlib import Path
from typing import Literal

from mm1.errors import require


def serve(
    checkpoint: Path,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    max_images: int = 32,
    max_pixels: int = 1 << 25,
    max_bytes: int = 1 << 25,
    batch: int = 64,
    queue: int = 256,
    tokens: int = 65_536,
    prefill: int | None = None,
    weights: Literal["int8", "int4", "float8"] | None = None,
    allow_urls: bool = False,
) -> None:
    """Serve OpenAI's chat API, and a page to try the model on.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        host: address to listen at; one that others can reach needs an API key.
        port: port to listen at; 0: any that is free.
        api_key_file: file with the key that clients have to send (default: the variable MM1_API_KEY). Every user of the
            machine can read a command line, so it holds no key.
        max_images: most images of a request.
        max_pixels: most pixels of an image.
        max_bytes: most bytes of a request.
        batch: most requests that are computed together.
        queue: most requests that wait; more are refused with status 429.
        tokens: tokens that the cache holds, over all requests.
        prefill: prompt tokens that are computed between two tokens of a running answer (default: 512 on a CPU, 8192 on
            a GPU).
        weights: round the decoder's weights to fewer bits (default: no rounding).
        allow_urls: fetch images from public http and https addresses, ports 80 and 443.
    """
    require(0 <= port < 1 << 16, "port", port, "0 to 65535")
    from mm1.engine.serve.app import serve
    from mm1.engine.serve.privacy import read_key

    api_key = read_key(api_key_file) if api_key_file else None
    engine = {"batch": batch, "queue": queue, "tokens": tokens, "prefill": prefill, "weights": weights}
    serve(
        checkpoint, host=host, port=port, api_key=api_key, engine=engine, max_images=max_images,
        max_pixels=max_pixels, max_bytes=max_bytes, allow_urls=allow_urls,
    )  # fmt: skip
