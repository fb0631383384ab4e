"""Parse HTTP requests with h11, except those that cost the server far more time than their bytes are worth."""

import re
from typing import Any

import h11

HEAD_BYTES = 1 << 16  # limit of the head of a request
CHUNK_BYTES = 256  # minimum of the mean size of chunks, because parsing a chunk takes as long as copying 100 KB
CHUNKS = 1000  # number of chunks of a body from which on their mean size is checked
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")


class Reader(h11.Connection):
    """Parse the bytes of a client. problem: why they are no valid request, "" as long as they are."""

    def __init__(self):
        super().__init__(h11.SERVER, HEAD_BYTES)
        self.problem = ""
        self.chunks = self.size = 0  # of the current body

    def next_event(self) -> Any:
        """Return h11's next event. Raises h11.RemoteProtocolError."""
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
            message = f"{self.chunks} chunks have {self.size} bytes, expected {CHUNK_BYTES} each in the mean"
            raise h11.RemoteProtocolError(message)


def in_origin_form(request: h11.Request) -> h11.Request:
    """Return the request with a path as its target; a host in the target replaces the Host header (RFC 9112, 3.2.2)."""
    if not (uri := ABSOLUTE.fullmatch(request.target)):
        return request
    host, path = uri.groups()
    headers = [(b"host", host), *(pair for pair in request.headers if pair[0] != b"host")]
    target = path if path.startswith(b"/") else b"/" + path
    return h11.Request(method=request.method, headers=headers, target=target, http_version=request.http_version)
