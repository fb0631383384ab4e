"""The text that a request's tokens become, while they come.

It is that of TextTokenizer.decode for all tokens before end-of-text, up to the first stop string; the pieces that are
streamed, joined, are the same text. A token costs the same however long the text is.
"""

import codecs
from collections.abc import Callable, Sequence

from mm1.engine.data.text_tokenizer import TextTokenizer

MARGIN = 3  # bytes behind a cut that may belong to a character before it


class Text:
    """Collects the text of one prompt. It ends at end-of-text or before a stop string; what is settled is streamed."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], emit: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.emit = tokenizer, [s for s in stop if s], emit
        self.done = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of half a character
        self._begun = False  # whether a token has added something
        self._settled: list[str] = []
        self._held = ""  # the end of the text where it may be the beginning of a stop string
        self._unsent: list[str] = []

    @property
    def text(self) -> str:
        """Return the text without half a character at its end."""
        self._settled = ["".join(self._settled)]
        return self._settled[0] + self._held

    def add(self, token: int) -> None:
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
        """Write what was held back: half a character becomes U+FFFD."""
        self._grow(self._decoder.decode(b"", final=True))
        self._settle(self._held, "")
        self._send()

    def ends(self, tokens: Sequence[int]) -> bool:
        """Say whether a text of these tokens is done, of which it was not done without the last."""
        if tokens[-1:] == (self.tokenizer.eos,):
            return True
        if not self.stop:
            return False
        # As many bytes as the longest stop string can take, so that one that ends in the last token is seen whole.
        first, needed = len(tokens) - 1, 4 * max(map(len, self.stop)) + MARGIN
        while first > 0 and needed > 0:
            first -= 1
            needed -= len(self.tokenizer.token_bytes(tokens[first]))
        *before, last = self.tokenizer.pieces(tokens[first:], continued=first > 0)
        start = b"".join(before)
        known = len(_whole_characters(start))
        text = _whole_characters(start + last)
        return any(text.find(s, max(0, known - len(s) + 1)) >= 0 for s in self.stop)

    def _grow(self, piece: str) -> None:
        text = self._held + piece
        places = [at for s in self.stop if (at := text.find(s)) >= 0]
        if places:
            self.done = True
            self._decoder.reset()
            return self._settle(text[: min(places)], "")
        ends = ((at, text[at:]) for at in range(len(text)))  # the longest first
        settled = next((at for at, end in ends if any(s.startswith(end) for s in self.stop)), len(text))
        self._settle(text[:settled], text[settled:])

    def _settle(self, text: str, held: str) -> None:
        self._held = held
        if text:
            self._settled.append(text)
            self._unsent.append(text)

    def _send(self) -> None:
        pieces, self._unsent = self._unsent, []  # before its on_text, which may cancel
        if self.emit and pieces:
            self.emit("".join(pieces))


def _whole_characters(data: bytes) -> str:
    return codecs.utf_8_decode(data, "replace", False)[0]
