"""Translate OpenAI's older /v1/completions, which continues texts without a template and scores prompts.

A prompt is a text or token ids. A text is encoded as in training, after <bos>; ids are used unchanged. With echo and
logprobs, which is how lm-eval scores, each token of the prompt but the first has its log-probability given those
before it.

best_of texts are generated for each prompt, and the n with the highest mean log-probability are returned.
"""

import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mm1.engine.data.document import Document
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.request import Request
from mm1.engine.serve.chat import ENTRY_BYTES, Job, Picture, finish_of, name_of, pieces_of, tokens_from, usage
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
PROMPTS = 256  # limit of prompts in one request
MAX_TOKENS = 16  # OpenAI's default
SCORES = 1 << 21  # limit of prompts' log-probabilities in one response, alternatives included: some 200 bytes each


@dataclass(frozen=True)
class CompletionRequest:
    """Holds a parsed request. logprobs: alternatives of each token's log-probability; None for no log-probabilities."""

    texts_or_ids: tuple[str | tuple[int, ...], ...]
    settings: Settings
    best_of: int
    echo: bool
    logprobs: int | None

    @property
    def prompts(self) -> list[tuple[str | Picture, ...] | Document]:
        """Return texts as parts to encode, and token ids as documents."""
        return [
            (prompt,) if isinstance(prompt, str) else Document(np.array(prompt, np.int32), (), "completion")
            for prompt in self.texts_or_ids
        ]

    @property
    def texts(self) -> int:
        """Return how many texts the Engine has to generate."""
        return len(self.texts_or_ids) * self.best_of

    def jobs(self, documents: Sequence[Document], context: int, grammar: Grammar | None) -> list[Job]:
        """Return the jobs of the first prompt's choices, then of the second's, and so on.

        The first choice of a prompt scores the prompt for all of its choices. context: limit of prompt and text in
        tokens. Raises WrongField for more scores than SCORES.
        """
        scored = [len(d.tokens) - 1 if self.echo and self.logprobs is not None else 0 for d in documents]
        numbers = sum(scored) * (1 + (self.logprobs or 0)) * self.settings.count
        if numbers > SCORES:
            raise WrongField("logprobs", f"echo and logprobs ask for {numbers} numbers, expected at most {SCORES}")
        jobs: list[Job] = []
        for document, count in zip(documents, scored):
            samplings = self.settings.samplings(self.best_of, context - len(document.tokens), grammar)
            jobs += [Job(document, s, 0 if i else count) for i, s in enumerate(samplings)]
        return jobs

    def reply(self, model: str, tokenizer: TextTokenizer) -> "Reply":
        """Return the reply to fill, under the model's name."""
        return Reply(model, tokenizer, self)


def parse(body: bytes) -> CompletionRequest:
    """Parse a request. Raises UserError."""
    fields = json_object(body)
    logprobs = top_logprobs("logprobs", fields["logprobs"]) if "logprobs" in fields else None
    common = settings(fields, OWN, {"max_tokens": MAX_TOKENS, "top_logprobs": logprobs or 0})
    common = replace(common, has_max_tokens=True)
    best_of = number("best_of", fields.get("best_of", common.count), int, common.count, 16)
    if best_of > common.count and common.stream:
        raise WrongField("best_of", f"best_of is {best_of} in a stream, expected n, which is {common.count}")
    if best_of > common.count and common.sampling.max_tokens == 0:
        raise WrongField("best_of", "best_of is given, but max_tokens is 0")
    echo = typed("echo", fields.get("echo", False), bool)
    return CompletionRequest(_prompts(fields.get("prompt", "")), common, best_of, echo, logprobs)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts of a text, a list of texts, token ids or a list of those. Raises WrongField."""
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
        raise WrongField("prompt", f"prompt is a list of other values than {expected}")
    return tuple(tuple(x) for x in values)


class Reply:
    """Builds the response to one request, whole or in chunks with the same id."""

    def __init__(self, model: str, tokenizer: TextTokenizer, parsed: CompletionRequest):
        self.tokenizer, self.parsed = tokenizer, parsed
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": model}  # fmt: skip
        self.texts: dict[int, Offsets] = {}  # by choice, in a stream
        self.scorers: dict[int, Request] = {}  # by prompt, in a stream: the request with its scores

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the response without streaming, from the finished requests of all jobs."""
        best_of, n = self.parsed.best_of, self.parsed.settings.count
        choices: list[dict[str, Any]] = []
        for at in range(0, len(requests), best_of):
            candidates = requests[at : at + best_of]
            if n < best_of:
                candidates = sorted(candidates, key=lambda request: -float(np.mean(request.logprobs)))[:n]
            prompt, logprobs = self._prompt(at // best_of, requests[at])
            for request in candidates:
                own = self._logprobs(request, Offsets(len(prompt)))
                text, finish = prompt + request.text, finish_of(request)
                choices.append(_choice(len(choices), text, finish, _concatenated(logprobs, own)))
        return {**self.head, "choices": choices, "usage": usage(requests)}

    def size(self, requests: Sequence[Request]) -> int:
        """Return about how many bytes of JSON the whole response has."""
        own = sum(len(request.tokens) for request in requests)
        echoed = sum(len(request.document.tokens) for request in requests) if self.parsed.echo else 0
        each = 8 if self.parsed.logprobs is None else ENTRY_BYTES * (self.parsed.logprobs + 1)
        return (own + echoed) * each

    def begin(self, index: int, request: Request) -> list[dict[str, Any]]:
        """Return the chunks before a choice's text: none, because the prompt's scores are not there yet."""
        self.scorers.setdefault(index // self.parsed.best_of, request)  # the choices begin in order
        return []

    def piece(self, index: int, request: Request, text: str, finish: str | None = None) -> dict[str, Any]:
        """Return the chunk of a piece of a choice's text; the first one has the echoed prompt."""
        prompt, logprobs = "", None
        if index not in self.texts:
            number = index // self.parsed.best_of
            prompt, logprobs = self._prompt(number, self.scorers.get(number, request))
            self.texts[index] = Offsets(len(prompt))
        own = self._logprobs(request, self.texts[index])
        usage = {"usage": None} if self.parsed.settings.usage else {}
        return {**self.head, "choices": [_choice(index, prompt + text, finish, _concatenated(logprobs, own))], **usage}

    def end(self, index: int, request: Request) -> dict[str, Any]:
        """Return the chunk that ends a choice."""
        return self.piece(index, request, "", finish_of(request))

    def last(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the chunk with the usage of all choices."""
        return {**self.head, "choices": [], "usage": usage(requests)}

    def _prompt(self, number: int, scorer: Request) -> tuple[str, dict[str, Any] | None]:
        """Return the prompt's text and the log-probabilities of its tokens; "" and None if not requested."""
        if not self.parsed.echo:
            return "", None
        prompt, ids = self.parsed.texts_or_ids[number], scorer.document.tokens.tolist()
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        if self.parsed.logprobs is None:
            return text, None
        tops = [None, *scorer.score_top] if self.parsed.logprobs else [[] for _ in ids]
        return text, self.logprob_columns(ids, self.tokenizer.pieces(ids), [None, *scorer.scores], tops, Offsets(0))

    def _logprobs(self, request: Request, text: "Offsets") -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens that are not yet counted in `text`."""
        if self.parsed.logprobs is None:
            return None
        tokens, logprobs, tops = tokens_from(request, text.tokens, self.parsed.logprobs)
        return self.logprob_columns(tokens, pieces_of(self.tokenizer, request, text.tokens), logprobs, tops, text)

    def logprob_columns(
        self, ids: Sequence[int], pieces: Iterator[bytes], logprobs: Sequence[float | None], tops: Sequence[Any],
        text: "Offsets",
    ) -> dict[str, Any]:  # fmt: skip
        """Return OpenAI's logprobs object: lists with an entry for each token. text: counts the characters."""
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
        """Return a token's text, a control token's name, or for bytes that are no text OpenAI's "bytes:…"."""
        try:
            return piece.decode() or name_of(self.tokenizer, token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Offsets:
    """Counts the characters of a text, token by token. before: characters before its first token."""

    def __init__(self, before: int):
        self.characters, self.tokens = before, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> int:
        """Add a token of these bytes; return how many characters stand before it."""
        before = self.characters
        self.characters, self.tokens = before + len(self.decoder.decode(piece)), self.tokens + 1
        return before


def _choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _concatenated(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: a[key] + b[key] for key in a} if a and b else b
