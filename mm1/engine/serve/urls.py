"""Fetch images from URLs that clients send, only from public addresses and within limits of time and size."""

import asyncio
import ipaddress
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from urllib.parse import urlsplit

from mm1.engine.serve.turns import Limit
from mm1.errors import UserError

SECONDS = 10  # limit of the time of one fetch, look-up of the name included
PORTS = (80, 443)
FETCHES = 32  # limit of fetches at the same time
LOOK_UPS = 2  # threads that look up names: a name server that does not answer blocks no other threads
HEAD_BYTES = 1 << 16  # limit of a response before its body


class Fetcher:
    """Fetch URLs, at most FETCHES at the same time."""

    def __init__(self):
        self.active = Limit(FETCHES, "URLs are being fetched already")
        self.look_ups = ThreadPoolExecutor(LOOK_UPS, "mm1-names")

    def close(self) -> None:
        """Cancel look-ups that have not begun."""
        self.look_ups.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """Return the contents of an http or https URL, at most max_bytes. Raises UserError, and Busy beyond FETCHES.

        Redirects are not followed, because each target would have to be checked like the first.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            name = parts.netloc.rpartition("@")[2]
            head = f"GET {path} HTTP/1.0\r\nHost: {name}\r\nUser-Agent: mm1\r\n\r\n".encode("ascii")
            if not host or len(host) > 253 or head.split(b"\r\n", 1)[0].count(b" ") != 2:
                raise ValueError
        except (ValueError, KeyError):
            raise UserError(f"the URL is {url[:60]!r}, expected http or https in ASCII") from None
        if port not in PORTS:
            raise UserError(f"the port of {host} is {port}, expected {' or '.join(map(str, PORTS))}")
        with self.active:
            try:
                async with asyncio.timeout(SECONDS):
                    address = await self._public_address(host, port)
                    return await _get(host, address, port, parts.scheme == "https", head, max_bytes)
            except TimeoutError:
                raise UserError(f"{host} took more than {SECONDS} s") from None
            except OSError as error:
                raise UserError(f"{host}: {error}") from None

    async def _public_address(self, host: str, port: int) -> str:
        """Look a name up. Raises UserError unless all of its addresses are public."""
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            entries = await asyncio.get_running_loop().run_in_executor(self.look_ups, look_up)
        except ValueError:  # a label of more than 63 characters, a NUL
            raise UserError(f"the host is {host[:60]!r}, expected a valid name") from None
        addresses = [str(address[0]) for *_, address in entries]
        if not addresses or not all(map(is_public, addresses)):
            raise UserError(f"{host} does not have a public address")
        return addresses[0]


async def _get(host: str, address: str, port: int, encrypted: bool, head: bytes, max_bytes: int) -> bytes:
    """Send a request to an address that was checked, and return the body of the response.

    A second look-up of the name could return another address.
    """
    options = {"ssl": _tls(), "server_hostname": host} if encrypted else {}
    reader, writer = await asyncio.open_connection(address, port, **options)
    try:
        writer.write(head)
        answer = bytearray()
        while len(answer) <= max_bytes + HEAD_BYTES and (piece := await reader.read(1 << 16)):
            answer += piece
    finally:
        writer.transport.abort()
    lines, _, body = answer.partition(b"\r\n\r\n")
    status = lines.split(b"\r\n")[0].split(b" ")[1:2]
    if status != [b"200"] or b"\ntransfer-encoding:" in lines.lower():
        answered = b"".join(status).decode("latin-1")[:9] or "nothing"
        raise UserError(f"{host} answered {answered}, expected 200 and plain bytes")
    if len(body) > max_bytes:
        raise UserError(f"the image from {host} has more than {max_bytes} bytes")
    return bytes(body)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # cached, because it reads some hundred certificates


def is_public(address: str) -> bool:
    """Return whether an address is public: not private, loopback, link-local, multicast or IPv4 embedded in IPv6."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.is_global and ip in ipaddress.ip_network("2000::/3") and not (ip.sixtofour or ip.teredo)
    return ip.is_global and not ip.is_multicast
