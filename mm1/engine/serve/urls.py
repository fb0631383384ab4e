"""Bytes behind a URL of strangers: from public addresses alone, once, in bounded time and size."""

import asyncio
import ipaddress
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import BoundedSemaphore
from urllib.parse import urlsplit

from mm1.engine.infer.engine import Busy
from mm1.errors import UserError

SECONDS = 10
PORTS = (80, 443)
LOOK_UPS = ThreadPoolExecutor(2, "mm1-names")  # of their own: a name server that is silent holds up nothing else
TURNS = BoundedSemaphore(32)  # URLs at a time, those included whose names wait to be looked up


async def fetch(url: str, most: int) -> bytes:
    """Return at most so many bytes. Raises UserError, or Busy.

    Redirects are not followed: each would have to be looked at like the first.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = f"GET {path} HTTP/1.0\r\nHost: {parts.netloc.rpartition('@')[2]}\r\nUser-Agent: mm1\r\n\r\n".encode(
            "ascii"
        )
        if not host or len(host) > 253 or head.split(b"\r\n", 1)[0].count(b" ") != 2:
            raise ValueError
    except (ValueError, KeyError):
        raise UserError(f"{url[:60]!r} is no http or https URL in ASCII") from None
    if port not in PORTS:
        raise UserError(f"port {port} of {host} is none of {', '.join(map(str, PORTS))}")
    if not TURNS.acquire(blocking=False):
        raise Busy("too many URLs are being fetched")
    try:
        async with asyncio.timeout(SECONDS):
            return await _got(host, port, parts.scheme == "https", head, most)
    except TimeoutError:
        raise UserError(f"{host} took more than {SECONDS} s") from None
    except OSError as error:
        raise UserError(f"{host}: {error}") from None
    finally:
        TURNS.release()


async def _got(host: str, port: int, encrypted: bool, head: bytes, most: int) -> bytes:
    loop = asyncio.get_running_loop()
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = await loop.run_in_executor(LOOK_UPS, look_up)
    except ValueError:  # a label of more than 63 characters, a zero
        raise UserError(f"{host[:60]!r} is no name of a host") from None
    addresses = [str(where[0]) for *_, where in found]
    if not addresses or not all(map(public, addresses)):
        raise UserError(f"{host} is not at a public address")
    # That very address, for a second look-up of the name could give another.
    context = {"ssl": _tls(), "server_hostname": host} if encrypted else {}
    reader, writer = await asyncio.open_connection(addresses[0], port, **context)
    try:
        writer.write(head)
        answer = bytearray()
        while len(answer) <= most + 65536 and (more := await reader.read(65536)):
            answer += more
    finally:
        writer.transport.abort()
    lines, _, body = answer.partition(b"\r\n\r\n")
    status = lines.split(b"\r\n")[0].split(b" ")[1:2]
    if status != [b"200"] or b"\ntransfer-encoding:" in lines.lower():
        raise UserError(
            f"{host} answered {b''.join(status).decode('latin-1')[:9] or 'nothing'}, expected 200 and plain bytes"
        )
    if len(body) > most:
        raise UserError(f"what {host} sends has more than {most} bytes")
    return bytes(body)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # which reads some hundred certificates


def public(address: str) -> bool:
    """Neither private, loopback, link-local nor multicast, nor an IPv4 address in the clothes of an IPv6 one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.is_global and ip in ipaddress.ip_network("2000::/3") and not (ip.sixtofour or ip.teredo)
    return ip.is_global and not ip.is_multicast
