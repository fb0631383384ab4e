"""Define the common parts of chat and completion requests: jobs for the engine, and responses made of its texts."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from mm1.engine.data.document import Document
from mm1.engine.data.text_tokenizer import TextTokenizer
from mm1.engine.infer.cache import PAGE
from mm1.engine.infer.grammar import Grammar
from mm1.engine.infer.request import Request
from mm1.engine.infer.sampling import Sampling
from mm1.engine.serve.fields import Settings, WrongField

SCORES = 1 << 21  # limit of the log-probabilities of prompts in one response, with alternatives; each takes 200 bytes
ENTRY_BYTES = 64  # typical size of a token's log-probability in JSON


class Picture(NamedTuple):
    """Hold a reference to an image of a request: a data: or http URL, or the id of an uploaded file."""

    url: str


class Job(NamedTuple):
    """Hold the Engine's input for one text. scored: tokens at the prompt's end that get log-probabilities."""

    document: Document
    sampling: Sampling
    scored: int = 0


@dataclass(frozen=True)
class Parsed:
    """Hold a parsed request.

    prompts: parts to encode, or a document of token ids; best_of: texts generated for each prompt; logprobs:
    alternatives of each token, None for no log-probabilities; echo: whether the reply repeats the prompts.
    """

    prompts: Sequence[tuple[str | Picture, ...] | Document]
    settings: Settings
    best_of: int
    logprobs: int | None
    echo: bool = False

    @property
    def texts(self) -> int:
        """Return the number of texts that the Engine has to generate."""
        return len(self.prompts) * self.best_of

    def jobs(self, documents: Sequence[Document], context: int, grammar: Grammar | None) -> list[Job]:
        """Return the jobs of all texts, prompt by prompt. The first text of a prompt scores it for the others.

        context: limit of prompt and text in tokens. Raises WrongField for more scores than SCORES.
        """
        scored = [len(d.tokens) - 1 if self.echo and self.logprobs is not None else 0 for d in documents]
        numbers = sum(scored) * (1 + (self.logprobs or 0)) * self.settings.count
        if numbers > SCORES:
            raise WrongField("logprobs", f"and echo ask for {numbers} numbers, expected at most {SCORES}")
        jobs: list[Job] = []
        for document, count in zip(documents, scored):
            samplings = self.settings.samplings(self.best_of, context - len(document.tokens), grammar)
            jobs += [Job(document, sampling, 0 if i else count) for i, sampling in enumerate(samplings)]
        return jobs


class Reply:
    """Build the response to one request, whole or in chunks with the same id; a subclass has OpenAI's form of it."""

    ID: ClassVar[str]
    OBJECT: ClassVar[str]  # of a chunk

    def __init__(self, model: str, tokenizer: TextTokenizer, parsed: Parsed):
        # Without echo the prompts, which may have large data: URLs, are released once they are encoded.
        self.tokenizer, self.parsed = tokenizer, parsed if parsed.echo else replace(parsed, prompts=())
        self.head = {"id": f"{self.ID}-{secrets.token_hex(12)}", "object": self.OBJECT, "created": int(time.time()),
                     "model": model}  # fmt: skip
        self.requests: Sequence[Request] = ()

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the complete response. requests: the finished requests of all jobs."""
        raise NotImplementedError

    def size(self, requests: Sequence[Request]) -> int:
        """Estimate the bytes of the complete response as JSON."""
        tokens = sum(len(request.tokens) for request in requests)
        if self.parsed.echo:
            tokens += sum(len(request.document.tokens) for request in requests)
        return tokens * (8 if self.parsed.logprobs is None else ENTRY_BYTES * (self.parsed.logprobs + 1))

    def begin(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Return the chunks of a stream before all texts. requests: those of all jobs, as they grow."""
        self.requests = requests
        return []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of the text with this index."""
        raise NotImplementedError

    def end(self, index: int) -> dict[str, Any]:
        """Return the chunk that ends the text with this index."""
        raise NotImplementedError

    def last(self) -> dict[str, Any]:
        """Return the chunk with the usage of all texts."""
        return {**self.head, "choices": [], "usage": usage(self.requests)}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk of a choice."""
        return {**self.head, "choices": [choice], **({"usage": None} if self.parsed.settings.usage else {})}

    def tokens(self, request: Request, start: int) -> tuple[Sequence[int], Sequence[float], Sequence, Iterable[bytes]]:
        """Return the tokens from `start` on, their log-probabilities, most likely alternatives, and bytes in the text.

        They may differ in length while the engine's thread is appending to them; their common length is valid.
        """
        tokens = request.tokens[start:]
        tops = request.top[start:] if self.parsed.logprobs else [[] for _ in tokens]
        continued = any(map(self.tokenizer.has_text, islice(request.tokens, start)))
        return tokens, request.logprobs[start:], tops, self.tokenizer.pieces(tokens, continued)

    def control_name(self, token: int) -> str:
        """Return the name of a control token, such as <eos>; "" if the token has none."""
        return _names_of(self.tokenizer).get(token, "")


@lru_cache(4)
def _names_of(tokenizer: TextTokenizer) -> dict[int, str]:
    return {number: name for name, number in tokenizer.vocabulary.items()}


def finish_of(request: Request) -> str:
    """Return OpenAI's finish_reason of a request. Raises RuntimeError for one that was cancelled or failed."""
    if request.finish not in ("stop", "length", "scored"):
        raise RuntimeError(f"a request has ended as {request.finish}")
    return "stop" if request.finish == "stop" else "length"  # "scored": of max_tokens 0


def usage(requests: Sequence[Request]) -> dict[str, Any]:
    """Return OpenAI's usage object; each prompt counts once. cached_tokens: prompt tokens from the prefix cache."""
    firsts = {id(request.document): request for request in reversed(requests)}.values()
    prompt = sum(len(request.document.tokens) for request in firsts)
    generated = sum(len(request.tokens) for request in requests)
    cached = sum(request.shared * PAGE for request in firsts)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip
