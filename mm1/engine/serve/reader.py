"""Requests read from bytes by h11, except those that cost the server far more time than their bytes."""

import re
from typing import Any

import h11

HEAD_BYTES = 1 << 16  # of a head
CHUNKS = 1000  # of a body, from which on their mean size counts: reading a chunk takes as long as copying 100 KB
CHUNK_BYTES = 256  # that they have at least, in the mean
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")


class Reader(h11.Connection):
    """The server's side of an HTTP connection. problem: why the bytes are no request, once they are none."""

    def __init__(self):
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.problem = ""
        self.chunks = self.size = 0  # of the present body

    def next_event(self) -> Any:
        """Raises h11.RemoteProtocolError."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.chunks = self.size = 0
                return in_origin_form(event)
            if isinstance(event, h11.Data):
                self._count(event)
            return event
        except h11.RemoteProtocolError as error:
            self.problem = str(error)[:200]
            raise

    def _count(self, piece: h11.Data) -> None:
        self.chunks += piece.chunk_end
        self.size += len(piece.data)
        if self.chunks > CHUNKS and self.size < self.chunks * CHUNK_BYTES:
            found = f"{self.chunks} chunks have {self.size} bytes"
            raise h11.RemoteProtocolError(f"{found}, expected {CHUNK_BYTES} each in the mean")


def in_origin_form(request: h11.Request) -> h11.Request:
    """Return the request with the path alone as its target; the host of a whole URI takes the place of the header
    (RFC 9112, 3.2.2)."""
    if not (found := ABSOLUTE.fullmatch(request.target)):
        return request
    host, path = found.groups()
    headers = [(b"host", host), *(pair for pair in request.headers if pair[0] != b"host")]
    target = path if path.startswith(b"/") else b"/" + path
    return h11.Request(method=request.method, headers=headers, target=target, http_version=request.http_version)
