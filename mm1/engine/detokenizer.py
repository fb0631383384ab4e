"""The text that a request's tokens become, while they come."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from mm1.engine.data.document import TextTokenizer

MARGIN = 8  # characters behind a cut that may not be those of the whole: half a character, a space that is stripped


class Text:
    """Collects the text of one prompt. It ends at end-of-text or before a stop string; what is settled is streamed."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], emit: Callable[[str], None] | None):
        self.tokenizer, self.stop, self.emit = tokenizer, [s for s in stop if s], emit
        self.ids: list[int] = []
        self.text, self.sent, self.done = "", 0, False  # text: without half a character at its end
        self._piece = tokenizer.stream()

    def add(self, token: int) -> None:
        if self.done:
            return
        if token == self.tokenizer.eos:
            self.done = True
        else:
            self.ids.append(token)
            self._grow(self._piece(token))
        if self.emit:
            self._send(self.text[: self._settled()])

    def ends(self, tokens: Sequence[int]) -> bool:
        """Say whether a text of these tokens is done, of which it was not done without the last."""
        if tokens[-1:] == (self.tokenizer.eos,):
            return True
        if not self.stop:
            return False
        text, same = self._tail(tokens)
        return any(text.find(s, max(0, same - len(s) + 1)) >= 0 for s in self.stop)

    def _tail(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the end of the text, and how many of its characters were there without the last token.

        It is decoded from a token on where neither side changes the other, and holds a stop string's length before the
        first new character.
        """
        decode, needed = self.tokenizer.decode, max(map(len, self.stop)) + MARGIN
        count = needed
        while True:
            first = max(len(tokens) - count, 0)
            while first and not self._stands_alone(tokens[first]):
                first -= 1
            before, text = decode(tokens[first:-1]), decode(tokens[first:])
            same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
            if first == 0 or same >= needed:
                return text, same
            count *= 2

    def _stands_alone(self, token: int) -> bool:
        """Say whether a token has a text that does not depend on the tokens before it, but for MARGIN characters."""
        return token not in bytes_of(self.tokenizer) and bool(self.tokenizer.decode([token]))

    def finish(self) -> None:
        if not self.done:
            self._grow(self.tokenizer.decode(self.ids)[len(self.text) :])
        if self.emit:
            self._send(self.text)

    def _grow(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        places = [at for s in self.stop if (at := self.text.find(s, max(0, before - len(s)))) >= 0]
        if places:
            self.text, self.done = self.text[: min(places)], True

    def _settled(self) -> int:
        """Count the characters that stay, whatever comes: all but the beginning of a stop string at the end."""
        sizes = (size for s in self.stop for size in range(1, len(s)) if self.text.endswith(s[:size]))
        return len(self.text) - max(sizes, default=0)

    def _send(self, text: str) -> None:
        if self.emit and len(text) > self.sent:
            piece, self.sent = text[self.sent :], len(text)  # before its on_text, which may cancel
            self.emit(piece)


@lru_cache(4)
def bytes_of(tokenizer: TextTokenizer) -> frozenset[int]:
    """Return the tokens of byte fallback, "<0x41>": one wrong byte spoils all that stand beside it."""
    return frozenset(id for token, id in tokenizer.vocabulary.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))
