"""Detokenize a request's tokens as they arrive, up to end-of-text or a stop string.

The text and the concatenation of its streamed pieces equal the result of TextTokenizer.decode. The time for a token
does not depend on the length of the text.
"""

import codecs
import io
from collections.abc import Callable, Sequence

from mm1.engine.data.text_tokenizer import TextTokenizer

MARGIN = 3  # bytes after a cut that can belong to a character before it


class TextStream:
    """Collect the text of one request, which ends at end-of-text or before a stop string.

    stop: stop strings; emit: called with each piece that no stop string can still remove, None: nobody; done: whether
    the text has ended.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], emit: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.emit = tokenizer, [s for s in stop if s], emit
        self.done = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # buffers the bytes of an incomplete character
        self._begun = False  # whether a token has added text
        self._settled = io.StringIO()
        self._pending = ""  # the text's end, while it can be the beginning of a stop string
        self._unsent = ""

    @property
    def text(self) -> str:
        """Return the text so far, without an incomplete character at its end."""
        return self._settled.getvalue() + self._pending

    def add(self, token: int) -> None:
        """Append a token. Raises what `emit` raises."""
        if self.done:
            return
        if token == self.tokenizer.eos:
            self.done = True
        else:
            [piece] = self.tokenizer.pieces((token,), self._begun)
            self._begun = self._begun or self.tokenizer.has_text(token)
            self._grow(self._decoder.decode(piece))
        self._send()

    def finish(self) -> None:
        """Emit the text that is still pending; an incomplete character becomes U+FFFD."""
        self._grow(self._decoder.decode(b"", final=True))
        self._settle(self._pending, "")
        self._send()

    def ends(self, tokens: Sequence[int]) -> bool:
        """Return whether the last of these tokens ends a text that has not ended before it."""
        if tokens[-1:] == (self.tokenizer.eos,):
            return True
        if not self.stop:
            return False
        # Decode the bytes of the longest stop string, so that one that ends in the last token is complete.
        first, needed = len(tokens) - 1, 4 * max(map(len, self.stop)) + MARGIN
        while first > 0 and needed > 0:
            first -= 1
            needed -= len(self.tokenizer.token_bytes(tokens[first]))
        *before, last = self.tokenizer.pieces(tokens[first:], continued=first > 0)
        start = b"".join(before)
        length = len(_whole_characters(start))
        text = _whole_characters(start + last)
        return any(text.find(s, max(0, length - len(s) + 1)) >= 0 for s in self.stop)

    def _grow(self, piece: str) -> None:
        """Append text; cut it at the first stop string, or hold back an end that can become one."""
        text = self._pending + piece
        places = [at for s in self.stop if (at := text.find(s)) >= 0]
        if places:
            self.done = True
            self._decoder.reset()
            return self._settle(text[: min(places)], "")
        ends = ((at, text[at:]) for at in range(len(text)))  # the longest first
        settled = next((at for at, end in ends if any(s.startswith(end) for s in self.stop)), len(text))
        self._settle(text[:settled], text[settled:])

    def _settle(self, text: str, pending: str) -> None:
        self._pending = pending
        self._settled.write(text)
        self._unsent += text

    def _send(self) -> None:
        text, self._unsent = self._unsent, ""  # emptied first, because emit may cancel the request
        if self.emit and text:
            self.emit(text)


def _whole_characters(data: bytes) -> str:
    return codecs.utf_8_decode(data, "replace", False)[0]
