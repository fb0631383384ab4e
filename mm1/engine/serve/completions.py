"""OpenAI's older form, /v1/completions: texts that go on as they are, and the scores of prompts.

A prompt is a text or token ids. A text is encoded as in training, behind <bos>; ids are taken as they are. With echo
and logprobs, which is how lm-eval scores, each token of the prompt has its log-probability given those before it; the
first has none.

best_of texts are made of each prompt, of which the n with the best mean log-probability come back.
"""

import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm1.engine.data.document import Document, TextTokenizer
from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.request import Request
from mm1.engine.serve.chat import ENTRY_BYTES, Job, Picture, finish_of, name_of, pieces_of, taken, usage
from mm1.engine.serve.fields import (
    Settings,
    WrongField,
    json_object,
    number,
    settings,
    text_of,
    top_logprobs,
    typed,
)

OWN = ("prompt", "echo", "logprobs", "best_of")
PROMPTS = 256
MAX_TOKENS = 16  # OpenAI's default
SCORES = 1 << 21  # log-probabilities of prompts' tokens and their alternatives in one answer: some 200 bytes each


@dataclass(frozen=True)
class Asked:
    """logprobs: None, or with how many alternatives."""

    given: tuple[str | tuple[int, ...], ...]
    settings: Settings
    best_of: int
    echo: bool
    logprobs: int | None

    @property
    def prompts(self) -> list[tuple[str | Picture, ...] | Document]:
        return [
            (prompt,) if isinstance(prompt, str) else Document(np.array(prompt, np.int32), (), "completion")
            for prompt in self.given
        ]

    @property
    def texts(self) -> int:
        """Return how many texts the Engine has to make."""
        return len(self.given) * self.best_of

    def jobs(self, documents: Sequence[Document], context: int, grammar: Grammar | None) -> list[Job]:
        """Return all choices of the first prompt, then of the second, and so on. The first choice of a prompt scores it
        for all of them. Raises WrongField for more scores than SCORES."""
        scored = [len(d.tokens) - 1 if self.echo and self.logprobs is not None else 0 for d in documents]
        told = sum(scored) * (1 + (self.logprobs or 0)) * self.settings.count
        if told > SCORES:
            raise WrongField("logprobs", f"echo and logprobs ask for {told} numbers, expected at most {SCORES}")
        jobs: list[Job] = []
        for document, count in zip(documents, scored):
            samplings = self.settings.samplings(self.best_of, context - len(document.tokens), grammar)
            jobs += [Job(document, s, 0 if i else count) for i, s in enumerate(samplings)]
        return jobs

    def reply(self, model: str, tokenizer: TextTokenizer) -> "Reply":
        return Reply(model, tokenizer, self)


def parse(body: bytes) -> Asked:
    """Read a request. Raises UserError."""
    asked = json_object(body)
    logprobs = top_logprobs("logprobs", asked["logprobs"]) if "logprobs" in asked else None
    read = settings(asked, OWN, {"max_tokens": MAX_TOKENS, "top_logprobs": logprobs or 0})
    read = Settings(**{**vars(read), "bounded": True})
    best_of = number("best_of", asked.get("best_of", read.count), int, read.count, 16)
    if best_of > read.count and read.stream:
        raise WrongField("best_of", f"best_of is {best_of} in a stream, expected n, which is {read.count}")
    if best_of > read.count and read.sampling.max_tokens == 0:
        raise WrongField("best_of", "best_of is given, but max_tokens is 0")
    echo = typed("echo", asked.get("echo", False), bool)
    return Asked(_prompts(asked.get("prompt", "")), read, best_of, echo, logprobs)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Read a text, texts, token ids or lists of them. Raises WrongField."""
    expected = "a text, texts, token ids, or lists of them"
    if isinstance(value, str):
        return (text_of("prompt", value),)
    values = typed("prompt", value, list)
    if values and all(type(x) is int for x in values):
        values = [values]
    if not 0 < len(values) <= PROMPTS:
        raise WrongField("prompt", f"prompt has {len(values)} entries, expected {expected}, at most {PROMPTS}")
    if all(isinstance(x, str) for x in values):
        return tuple(text_of("prompt", x) for x in values)
    if not all(isinstance(x, list) and x and all(type(i) is int and 0 <= i < 1 << 31 for i in x) for x in values):
        raise WrongField("prompt", f"prompt is a list of something else than {expected}")
    return tuple(tuple(x) for x in values)


class Reply:
    """The parts of one answer, whole or in chunks, all with its id."""

    def __init__(self, model: str, tokenizer: TextTokenizer, asked: Asked):
        self.tokenizer, self.asked = tokenizer, asked
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": model}  # fmt: skip
        self.texts: dict[int, Offsets] = {}  # of each choice that is streamed
        self.scorers: dict[int, Request] = {}  # of each prompt that is streamed

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        best_of, n = self.asked.best_of, self.asked.settings.count
        choices: list[dict[str, Any]] = []
        for at in range(0, len(requests), best_of):
            candidates = requests[at : at + best_of]
            if n < best_of:
                candidates = sorted(candidates, key=lambda request: -float(np.mean(request.logprobs)))[:n]
            prompt, logprobs = self._prompt(at // best_of, requests[at])
            for request in candidates:
                own = self._logprobs(request, Offsets(len(prompt)))
                text, finish = prompt + request.text, finish_of(request)
                choices.append(_choice(len(choices), text, finish, _together(logprobs, own)))
        return {**self.head, "choices": choices, "usage": usage(requests)}

    def size(self, requests: Sequence[Request]) -> int:
        """Return about how many bytes of JSON the whole is."""
        own = sum(len(request.tokens) for request in requests)
        echoed = sum(len(request.document.tokens) for request in requests) if self.asked.echo else 0
        each = 8 if self.asked.logprobs is None else ENTRY_BYTES * (self.asked.logprobs + 1)
        return (own + echoed) * each

    def begin(self, index: int, request: Request) -> list[dict[str, Any]]:
        """Return the chunks before a choice's text: none, as the prompt's scores are not there yet."""
        self.scorers.setdefault(index // self.asked.best_of, request)  # the choices begin in order
        return []

    def piece(self, index: int, request: Request, text: str, finish: str | None = None) -> dict[str, Any]:
        prompt, logprobs = "", None
        if index not in self.texts:
            number = index // self.asked.best_of
            prompt, logprobs = self._prompt(number, self.scorers.get(number, request))
            self.texts[index] = Offsets(len(prompt))
        own = self._logprobs(request, self.texts[index])
        usage = {"usage": None} if self.asked.settings.usage else {}
        return {**self.head, "choices": [_choice(index, prompt + text, finish, _together(logprobs, own))], **usage}

    def end(self, index: int, request: Request) -> dict[str, Any]:
        return self.piece(index, request, "", finish_of(request))

    def last(self, requests: Sequence[Request]) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": usage(requests)}

    def _prompt(self, number: int, scorer: Request) -> tuple[str, dict[str, Any] | None]:
        """Return the prompt's text if it is echoed, and the log-probabilities of its tokens if they are asked for."""
        if not self.asked.echo:
            return "", None
        given, ids = self.asked.given[number], scorer.document.tokens.tolist()
        text = given if isinstance(given, str) else self.tokenizer.decode(ids)
        if self.asked.logprobs is None:
            return text, None
        tops = [None, *scorer.score_top] if self.asked.logprobs else [[] for _ in ids]
        return text, self._columns(ids, self.tokenizer.pieces(ids), [None, *scorer.scores], tops, Offsets(0))

    def _logprobs(self, request: Request, text: "Offsets") -> dict[str, Any] | None:
        """Return those of the tokens that `text` has not seen."""
        if self.asked.logprobs is None:
            return None
        tokens, logprobs, tops = taken(request, text.tokens, self.asked.logprobs)
        return self._columns(tokens, pieces_of(self.tokenizer, request, text.tokens), logprobs, tops, text)

    def _columns(
        self, ids: Sequence[int], pieces: Iterator[bytes], logprobs: Sequence[float | None], tops: Sequence[Any],
        text: "Offsets",
    ) -> dict[str, Any]:  # fmt: skip
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
        """Return a token's text, or, as OpenAI does, its bytes if they are no text; of a control token its name."""
        try:
            return piece.decode() or name_of(self.tokenizer, token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Offsets:
    """Counts the characters of a text while its tokens come. before: characters before the first."""

    def __init__(self, before: int):
        self.characters, self.tokens = before, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> int:
        """Return how many characters stand before a token of these bytes."""
        before = self.characters
        self.characters, self.tokens = before + len(self.decoder.decode(piece)), self.tokens + 1
        return before


def _choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _together(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: a[key] + b[key] for key in a} if a and b else b
