"""Define the command `mm1 serve`."""

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
    """Serve OpenAI's chat API, and a page to try the model in a browser.

    Args:
        checkpoint: a checkpoint folder, or the folder of a run.
        host: address to listen on; one that other machines can reach needs an API key.
        port: port to listen on; 0: any free port.
        api_key_file: file with the API key that clients must send (default: the variable MM1_API_KEY). There is no
            option for the key itself, because every user of the machine can read a command line.
        max_images: limit of images in a request.
        max_pixels: limit of pixels of an image.
        max_bytes: limit of bytes of a request.
        batch: limit of requests that are computed together.
        queue: limit of waiting requests; more are refused with status 429.
        tokens: size of the cache in tokens, shared by all requests.
        prefill: prompt tokens computed between two tokens of a running answer (default: 512 on a CPU, 8192 on a GPU).
        weights: dtype to which the decoder's weights are rounded (default: no rounding).
        allow_urls: fetch images from public http and https addresses, ports 80 and 443.
    """
    require(0 <= port < 1 << 16, "port", port, "0 to 65535")
    from mm1.engine.serve.app import serve
    from mm1.engine.serve.privacy import read_key

    engine = {"batch": batch, "queue": queue, "tokens": tokens, "prefill": prefill, "weights": weights}
    serve(
        checkpoint, host=host, port=port, api_key=read_key(api_key_file), engine=engine, max_images=max_images,
        max_pixels=max_pixels, max_bytes=max_bytes, allow_urls=allow_urls,
    )  # fmt: skip
