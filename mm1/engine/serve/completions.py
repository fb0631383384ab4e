"""Translate OpenAI's older /v1/completions, which continues texts without a template and scores prompts.

A prompt is a text or token ids. A text is encoded as in training, after <bos>; ids are used unchanged. With echo and
logprobs, as lm-eval asks for them, each token of the prompt but the first has its log-probability given the tokens
before it. Of the best_of texts of each prompt, the n with the highest mean log-probability are returned.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mm1.engine.data.document import Document
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import TOP_LOGPROBS
from mm1.engine.serve import replies
from mm1.engine.serve.fields import WrongField, json_object, number, settings, text_of, typed
from mm1.engine.serve.replies import Parsed, finish_of, usage

OWN = ("prompt", "echo", "logprobs", "best_of")
PROMPTS = 256  # limit of prompts in one request
MAX_TOKENS = 16  # OpenAI's default


def parse(body: bytes) -> Parsed:
    """Parse a request. Raises UserError."""
    fields = json_object(body)
    logprobs = number("logprobs", fields["logprobs"], int, 0, TOP_LOGPROBS) if "logprobs" in fields else None
    common = settings(fields, OWN, {"max_tokens": MAX_TOKENS, "top_logprobs": logprobs or 0})
    common = replace(common, has_max_tokens=True)
    best_of = number("best_of", fields.get("best_of", common.count), int, common.count, 16)
    if best_of > common.count and common.stream:
        raise WrongField("best_of", f"is {best_of} in a stream, expected n, which is {common.count}")
    if best_of > common.count and common.sampling.max_tokens == 0:
        raise WrongField("best_of", f"is {best_of}, but max_tokens is 0")
    echo = typed("echo", fields.get("echo", False), bool)
    return Parsed(_prompts(fields.get("prompt", "")), common, best_of, logprobs, echo)


def _prompts(value: Any) -> list[tuple[str] | Document]:
    """Return the prompts of a text, a list of texts, token ids or a list of them. Raises WrongField."""
    values = [value] if isinstance(value, str) else typed("prompt", value, list)
    if values and all(type(x) is int for x in values):
        values = [values]
    if not 0 < len(values) <= PROMPTS:
        raise WrongField("prompt", f"has {len(values)} entries, expected 1 to {PROMPTS} prompts")
    if all(isinstance(x, str) for x in values):
        return [(text_of("prompt", x),) for x in values]
    if not all(isinstance(x, list) and x and all(type(i) is int and 0 <= i < 1 << 31 for i in x) for x in values):
        raise WrongField("prompt", "has entries of other types, expected texts alone, token ids, or lists of token ids")
    return [Document(np.array(ids, np.int32), (), "completion") for ids in values]


class Reply(replies.Reply):
    """Build the response to a completion request."""

    ID: ClassVar = "cmpl"
    OBJECT: ClassVar = "text_completion"

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        self.begin(requests)
        best_of, n = self.parsed.best_of, self.parsed.settings.count
        choices: list[dict[str, Any]] = []
        for first in range(0, len(requests), best_of):
            candidates = requests[first : first + best_of]
            if n < best_of:
                candidates = sorted(candidates, key=lambda request: -float(np.mean(request.logprobs)))[:n]
            prompt, logprobs = self._prompt(first)
            for request in candidates:
                own = self._logprobs(request, Offsets(len(prompt)))
                text, finish = prompt + request.text, finish_of(request)
                choices.append(_choice(len(choices), text, finish, _concatenated(logprobs, own)))
        return {**self.head, "choices": choices, "usage": usage(requests)}

    def begin(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        self.offsets: dict[int, Offsets] = {}  # of each text
        return super().begin(requests)

    def piece(self, index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        prompt, logprobs = "", None
        if index not in self.offsets:  # the first chunk has the echoed prompt
            prompt, logprobs = self._prompt(index)
            self.offsets[index] = Offsets(len(prompt))
        own = self._logprobs(self.requests[index], self.offsets[index])
        return self.chunk(_choice(index, prompt + text, finish, _concatenated(logprobs, own)))

    def end(self, index: int) -> dict[str, Any]:
        return self.piece(index, "", finish_of(self.requests[index]))

    def _prompt(self, index: int) -> tuple[str, dict[str, Any] | None]:
        """Return the prompt of a text and the log-probabilities of its tokens; "" and None without echo."""
        if not self.parsed.echo:
            return "", None
        number = index // self.parsed.best_of
        scorer, prompt = self.requests[number * self.parsed.best_of], self.parsed.prompts[number]
        ids = scorer.document.tokens.tolist()
        text = self.tokenizer.decode(ids) if isinstance(prompt, Document) else str(prompt[0])
        if self.parsed.logprobs is None:
            return text, None
        tops = [None, *scorer.score_top.tolist()] if self.parsed.logprobs else [[] for _ in ids]
        return text, self.logprob_columns(ids, [None, *scorer.scores], tops, self.tokenizer.pieces(ids), Offsets(0))

    def _logprobs(self, request: Request, text: "Offsets") -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens that `text` has not counted yet."""
        return None if self.parsed.logprobs is None else self.logprob_columns(*self.tokens(request, text.tokens), text)

    def logprob_columns(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Any], pieces: Iterable[bytes],
        text: "Offsets",
    ) -> dict[str, Any]:  # fmt: skip
        """Return OpenAI's logprobs object: lists with an entry for each token. text counts their characters."""
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, alternatives, piece in zip(ids, logprobs, tops, pieces):
            name, top = self._name(token, piece), None
            if logprob is not None:
                logprob, top = max(logprob, -9999.0), {}  # JSON has no infinity
                for other, value in [*alternatives, (token, logprob)]:
                    other = name if other == token else self._name(other, self.tokenizer.token_bytes(other))
                    top.setdefault(other, max(value, -9999.0))
            for column, value in zip(columns.values(), (name, logprob, top, text.add(piece))):
                column.append(value)
        return columns

    def _name(self, token: int, piece: bytes) -> str:
        """Return a token's text or a control token's name; bytes that are no text become "bytes:…", as at OpenAI."""
        try:
            return piece.decode() or self.control_name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Offsets:
    """Count the characters of a text, token by token. before: characters before its first token."""

    def __init__(self, before: int):
        self.characters, self.tokens = before, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> int:
        """Add a token of these bytes, and return the number of characters before it."""
        before = self.characters
        self.characters, self.tokens = before + len(self.decoder.decode(piece)), self.tokens + 1
        return before


def _choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _concatenated(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: a[key] + b[key] for key in a} if a and b else b
