"""The text that a request's tokens become, while they come."""

from collections.abc import Callable, Sequence

from mm1.engine.data.document import TextTokenizer


class Text:
    """The text of one prompt as it grows: ends at end-of-text or before a stop string, and streams what is settled."""

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
        """Say whether a text of these tokens would be done."""
        if tokens[-1:] == (self.tokenizer.eos,):
            return True
        return bool(self.stop) and any(s in text for text in [self.tokenizer.decode(tokens)] for s in self.stop)

    def finish(self) -> None:
        if not self.done:
            self._grow(self.tokenizer.decode(self.ids)[len(self.text) :])
        if self.emit:
            self._send(self.text)

    def _grow(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        found = [at for s in self.stop if (at := self.text.find(s, max(0, before - len(s)))) >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True

    def _settled(self) -> int:
        """Characters that later tokens cannot change: without the beginning of a stop string at the end."""
        sizes = (size for s in self.stop for size in range(1, len(s)) if self.text.endswith(s[:size]))
        return len(self.text) - max(sizes, default=0)

    def _send(self, text: str) -> None:
        if self.emit and len(text) > self.sent:
            piece, self.sent = text[self.sent :], len(text)  # before its on_text, which may cancel
            self.emit(piece)
